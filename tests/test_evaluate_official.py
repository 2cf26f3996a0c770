"""Every published benchmark, from its official files to a score, asked of a toy model: with a stop, blind, in part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate_fakes import FakeEngine, FakeModel
from fakes import tiny_vlm
from leveret.cli import run as command
from leveret.evaluate import evaluate, load_items, rule_of, score, task_row
from leveret.evaluate.tasks.field import FIELD
from leveret.runs import DataError, read_jsonl
from official_files import OFFICIAL

JUDGED = ("mm_vet", "llava_bench_w")
BY_PROBABILITY = ("pope", "vsr", "tally_qa", "ai2d")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them below one folder, each in one of its name."""
    root = tmp_path_factory.mktemp("official")
    for task, make in OFFICIAL.items():
        make(root / task)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from leveret.model import checkpoint

    folder = tmp_path_factory.mktemp("toy") / "model"
    vlm = tiny_vlm(chat="tiny")
    with torch.no_grad():  # or every answer is as long as it may be
        vlm.language.get_output_embeddings().weight[vlm.tokenizer.eos_token_id] *= 3
    checkpoint.save(vlm, folder)
    return str(folder)


def test_every_benchmark_is_here() -> None:
    assert {row.id for row in FIELD} == {*OFFICIAL, "own"}


def facts_of(results: dict[str, Any], task: str) -> dict[str, Any]:
    return dict(results["unjudged" if task in JUDGED else "tasks"][task])


@pytest.mark.parametrize("task", OFFICIAL)
def test_a_toy_model_is_asked_and_scored(task: str, root: Path, model: str, tmp_path: Path) -> None:
    results = evaluate(model, root, task, out=tmp_path / "out")
    items = load_items(task, root)
    answers = read_jsonl(tmp_path / f"out/answers/{task}.jsonl")
    assert [answer["question_id"] for answer in answers] == [item.question_id for item in items]
    facts = facts_of(results, task)
    assert facts["n"] == len(items)
    if task in JUDGED:
        return
    assert 0 <= facts["score"] <= 1 and facts["missing"] == 0
    assert facts["blind"] is not None or len({item.meta["image_id"] for item in items if item.image}) < 2
    again = score(task, tmp_path / f"out/answers/{task}.jsonl", root)
    assert (again["score"], again["metrics"]) == (facts["score"], facts["metrics"])
    assert (tmp_path / "out/report.html").stat().st_size > 500


@pytest.mark.parametrize("task", BY_PROBABILITY)
def test_where_a_rule_reads_probabilities_the_model_is_asked_for_them(
    task: str, root: Path, model: str, tmp_path: Path
) -> None:
    rule = "prismatic_probabilities"
    results = evaluate(model, root, task, out=tmp_path / "out", rules={task: rule})
    assert results["tasks"][task]["rule"] == rule
    for answer in read_jsonl(tmp_path / f"out/answers/{task}.jsonl"):
        assert sum(answer["probabilities"]) == pytest.approx(1)
    again = score(task, tmp_path / f"out/answers/{task}.jsonl", root, rule=rule)
    assert again["metrics"] == results["tasks"][task]["metrics"]


@pytest.mark.parametrize("task", OFFICIAL)
def test_what_was_stopped_goes_on_and_more_questions_add_to_few(task: str, root: Path, tmp_path: Path) -> None:
    whole = evaluate(FakeModel(), root, task, out=tmp_path / "whole", engine=FakeEngine(plain))
    with pytest.raises(RuntimeError, match="power"):
        evaluate(FakeModel(), root, task, out=tmp_path / "cut", engine=FakeEngine(plain, stop_after=1))
    engine = FakeEngine(plain)
    after = evaluate(FakeModel(), root, task, out=tmp_path / "cut", engine=engine)
    assert facts_of(after, task)["n"] == facts_of(whole, task)["n"] and len(engine.asked) >= 1
    names = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole/answers").rglob("*.jsonl"))
    assert names and all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "cut" / n).read_bytes() for n in names)
    assert after["tasks"] == whole["tasks"]
    few = evaluate(FakeModel(), root, task, out=tmp_path / "few", engine=FakeEngine(plain), n=1, blind=False)
    count = facts_of(few, task)["n"]
    assert count < facts_of(whole, task)["n"]
    more = FakeEngine(plain)
    evaluate(FakeModel(), root, task, out=tmp_path / "few", engine=more, blind=False)
    assert len(more.asked) == facts_of(whole, task)["n"] - count


def plain(request: Any) -> str:
    """Something that no rule trips over."""
    return "Yes" if int(request.question_id.encode().hex(), 16) % 2 else "A"


@pytest.mark.parametrize("task", OFFICIAL)
def test_gold_answers_earn_everything(task: str, root: Path) -> None:
    row = task_row(task)
    _, rule = rule_of(row)
    items = load_items(task, root)
    if task in JUDGED or rule.reads != "text":
        pytest.skip("this rule does not judge a gold text")
    answers = [{"question_id": item.question_id, "text": rule.gold(item), "task": task} for item in items]
    assert score(task, answers, root)["score"] == 1.0


def test_a_file_that_tells_no_split_is_not_taken_for_the_servers(tmp_path: Path) -> None:
    OFFICIAL["mmbench"](tmp_path)
    (tmp_path / "MMBench_DEV_EN_legacy.tsv").rename(tmp_path / "mmbench_dev_20230712.tsv")
    assert len(load_items("mmbench", tmp_path)) == 6
    with pytest.raises(DataError, match="split 'server': no MMBench_TEST_EN"):
        load_items("mmbench", tmp_path, "server")


def test_two_processes_share_the_work_of_one_command(
    root: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bytes as one process, for a suite of a user's own choosing."""
    one = evaluate(model, root, "mme", out=tmp_path / "one")
    capsys.readouterr()
    two = ["eval", model, str(root), "-o", str(tmp_path / "two"), "--task", "mme", "--json", "--workers", "2"]
    assert command(two) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == json.loads(json.dumps(one["tasks"]))
    name = "answers/mme.jsonl"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
