"""Answers by the probabilities of options; the same bytes by several processes, stopped or killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate_fakes import FakeEngine, FakeModel, tiny_world
from fakes import tiny_vlm
from leveret.evaluate import evaluate, load_items, score
from leveret.evaluate.scorers import SCORERS, Scorer, Verdict
from leveret.evaluate.tasks import SUITES, TASKS
from leveret.generate import Engine, Request
from leveret.generate.helpers import Helpers
from leveret.model.checkpoint import load, save
from leveret.records import Prediction, Turn
from leveret.runs import RecipeError, read_jsonl
from test_generate_engine import some_requests

RULE = "by_chance"
TOGETHER = ("existence", "colour", "box")
"""A task by options, tasks by text, on the same pictures."""


def first_of_two(item: Any, read: str) -> Verdict:
    """Yes where the first of two probabilities is not the smaller."""
    yes, no = json.loads(read)
    said = "yes" if yes >= no else "no"
    return Verdict(float(said == item.gold), said, readable=True)


def add_rule() -> None:
    """A rule over probabilities for the drawn world's existence, in place of a text to read."""
    SCORERS[RULE] = Scorer(
        "the likelier of Yes and No", first_of_two, lambda item: "[1, 0]" if item.gold == "yes" else "[0, 1]",
        lambda items, verdicts: {"accuracy": sum(v.score for v in verdicts) / len(items)}, reads="probabilities",
        headline="accuracy",
    )  # fmt: skip
    row = TASKS["existence"]
    TASKS["existence"] = replace(row, rules={**row.rules, RULE: RULE}, options=("Yes", "No"))
    TASKS["colour"] = replace(TASKS["colour"], rules={**TASKS["colour"].rules, RULE: RULE})
    SUITES["together"] = TOGETHER


@contextmanager
def with_rule() -> Iterator[None]:
    tables: tuple[dict[str, Any], ...] = (SCORERS, TASKS, SUITES)
    before = [dict(table) for table in tables]
    add_rule()
    try:
        yield
    finally:
        for table, kept in zip(tables, before, strict=True):
            table.clear()
            table.update(kept)


@pytest.fixture(autouse=True)
def rule() -> Iterator[None]:
    with with_rule():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("world"), scenes=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vlm = tiny_vlm()
    with torch.no_grad():
        vlm.language.get_output_embeddings().weight[vlm.tokenizer.eos_token_id] *= 2
    return save(vlm, tmp_path_factory.mktemp("model") / "model")


def ask(model: Any, world: Path, out: Path, **options: Any) -> dict[str, Any]:
    return evaluate(model, world, "together", out=out, rules={"existence": RULE}, **options)


def answers(out: Path) -> dict[str, bytes]:
    """Every answer file's bytes."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.glob("answers/**/*.jsonl"))}


@pytest.fixture(scope="module")
def whole(model: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed run of one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with with_rule():
        ask(model, world, out, helpers=Helpers(0))
    return answers(out)


def test_options_are_asked_for_where_the_rule_reads_probabilities(model: Path, world: Path, tmp_path: Path) -> None:
    results = ask(model, world, tmp_path / "out")
    facts = results["tasks"]["existence"]
    assert facts["rule"] == RULE and facts["n"] == 30
    assert (facts["chance"], facts["majority"]) == (0.5, 0.5)
    lines = read_jsonl(tmp_path / "out/answers/existence.jsonl")
    for line in lines:
        assert line["options"] == ["Yes", "No"]
        assert line["metadata"]["finish"] == "choice" and line["metadata"]["tokens"] == 0, "nothing is generated"
        assert sum(line["probabilities"]) == pytest.approx(1)
        assert line["text"] == ("Yes" if line["probabilities"][0] >= line["probabilities"][1] else "No")
    assert len({tuple(line["probabilities"]) for line in lines}) > 5
    assert "probabilities" not in read_jsonl(tmp_path / "out/answers/colour.jsonl")[0]
    again = score("existence", tmp_path / "out/answers/existence.jsonl", world, rule=RULE)
    assert (again["score"], again["metrics"]) == (facts["score"], facts["metrics"])
    item = load_items("existence", world)[0]
    assert item.image is not None
    request = Request("q", (item.image,), (Turn("user", f"<image>\n{item.prompt}"),), choices=("Yes", "No"))
    (want,) = Engine(load(model), precision="fp32").answer([request])
    assert want.choices is not None
    got = next(line for line in lines if line["question_id"] == item.question_id)["probabilities"]
    assert got == pytest.approx(list(want.choices.values()), rel=1e-4)


def test_options_need_a_row_that_names_them(world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"'by_chance' of 'colour' judges probabilities, and the task names no options"
    ):
        evaluate(FakeModel(), world, "colour", out=tmp_path / "out", rules={"colour": RULE}, engine=FakeEngine())
    assert not (tmp_path / "out").exists()


def test_options_may_hang_on_the_question(world: Path, tmp_path: Path) -> None:
    TASKS["existence"] = replace(
        TASKS["existence"], options=lambda item: ("Yes", "No") if item.gold == "yes" else ("No", "Yes")
    )

    class Chooser(FakeEngine):
        def answer(self, requests: Any, on_prediction: Any = None) -> list[Prediction]:
            made = [
                Prediction(r.question_id, r.choices[0], dict(zip(r.choices, (0.75, 0.25), strict=True)))
                for r in requests
            ]
            for prediction in made:
                on_prediction(prediction)
            return made

    results = evaluate(
        FakeModel(), world, "existence", out=tmp_path / "out", rules={"existence": RULE}, engine=Chooser()
    )
    assert results["tasks"]["existence"]["score"] == 0.5
    lines = read_jsonl(tmp_path / "out/answers/existence.jsonl")
    assert {tuple(line["options"]) for line in lines} == {("Yes", "No"), ("No", "Yes")}
    assert all(line["probabilities"] == [0.75, 0.25] for line in lines)


def test_texts_and_probabilities_do_not_share_a_folder(world: Path, tmp_path: Path) -> None:
    evaluate(FakeModel(), world, "existence", out=tmp_path / "out", engine=FakeEngine())
    with pytest.raises(RecipeError, match="existence"):
        evaluate(FakeModel(), world, "existence", out=tmp_path / "out", engine=FakeEngine(), rules={"existence": RULE})


@pytest.mark.parametrize("memory", [None, 3_000_000])
def test_few_questions_first_and_a_bound_of_memory_give_the_same_bytes(
    model: Path, world: Path, whole: dict[str, bytes], tmp_path: Path, memory: int | None
) -> None:
    for n in (2, 7, None):
        results = ask(model, world, tmp_path / "out", n=n, memory=memory)
    assert answers(tmp_path / "out") == whole
    assert set(whole) == {f"answers/{way}{task}.jsonl" for way in ("", "blind/") for task in TOGETHER}
    held = results["memory"]
    assert held["processes"] == 1 and held["allowed"] == memory
    assert held["total"] == held["rows"] + held["prefixes"] + held["features"] + held["passes"]
    assert memory is None or held["total"] <= memory


SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import leveret.evaluate.desk as desk
    from leveret.generate.helpers import Helpers
    from test_evaluate_options import add_rule, ask
    add_rule()
    helpers, append, count = Helpers({helpers}, least=1), desk.append_jsonl, 0
    def killing(path, record):
        global count
        append(path, record)
        count += 1
        if count == {after}:
            os.kill(helpers.workers[0].process.pid if {helper} else os.getpid(), signal.SIGKILL)
    desk.append_jsonl = killing
    with helpers:
        ask({model!r}, {world!r}, {out!r}, helpers=helpers)
"""


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("helpers", "after", "helper"),
    [
        (1, 9, False),
        pytest.param(1, 75, False, marks=slow),
        pytest.param(1, 9, True, marks=slow),
        pytest.param(0, 30, False, marks=slow),
    ],
)
def test_processes_and_kills_give_the_same_bytes(
    model: Path, world: Path, whole: dict[str, bytes], tmp_path: Path, helpers: int, after: int, helper: bool
) -> None:
    out, tests = tmp_path / "out", str(Path(__file__).parent)
    script = textwrap.dedent(SCRIPT).format(
        tests=tests, helpers=helpers, after=after, helper=helper, model=str(model), world=str(world), out=str(out)
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True)
    if helper:
        assert done.returncode == 0, done.stderr
        assert answers(out) == whole, "one that is lost hands its questions back"
        return
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert answers(out) != whole
    with Helpers(1 - helpers, least=1) as others:
        ask(model, world, out, helpers=others)
    assert answers(out) == whole


def test_alone_is_the_same_bits_in_any_company(model: Path) -> None:
    requests = some_requests(24, seed=31)
    asked = [replace(request, choices=("yes", "two", "red")) for request in requests]
    alone = Engine(load(model), precision="fp32", threads=1)
    texts = [replace(request, question_id=f"text {request.question_id}") for request in requests]
    whole = {prediction.question_id: prediction for prediction in alone.answer([*asked, *texts])}
    for seed in range(3):
        rng = random.Random(seed)
        some = rng.sample(asked, 9)
        other = Engine(load(model), precision="fp32", threads=1, slots=1 + 4 * seed, memory=[None, 10**6, 10**7][seed])
        assert other.answer(some) == [whole[request.question_id] for request in some]
