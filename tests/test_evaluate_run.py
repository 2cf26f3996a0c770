"""Examining a model: every question once, resumable to the kill, baselines that mean what they say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from evaluate_fakes import FakeEngine, FakeModel, sighted, tiny_world
from leveret.cli import run
from leveret.evaluate import SUITES, evaluate, load_items, score
from leveret.evaluate.plan import Plan, _questions_hash
from leveret.runs import DataError, RecipeError, read_jsonl

WORLD = SUITES["world"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run finds."""
    return evaluate(FakeModel(), world, out=tmp_path_factory.mktemp("whole") / "out", engine=FakeEngine())["tasks"]


def test_every_task_is_scored_with_its_baselines(world: Path, tmp_path: Path) -> None:
    results = evaluate(FakeModel(), world, out=tmp_path / "out", engine=FakeEngine())
    assert {"tasks", "seconds", "suite", "model", "root"} <= set(results) and tuple(results["tasks"]) == WORLD
    assert results == json.loads((tmp_path / "out/results.json").read_text())
    for facts in results["tasks"].values():
        assert list(facts)[:5] == ["score", "n", "ci95", "majority", "blind"]
        low, high = facts["ci95"]
        assert 0 <= low <= facts["score"] <= high <= 1
        assert facts["parsed"] + facts["unparsable"] == facts["n"] and facts["missing"] == 0
        assert facts["words"] >= 1
    tasks = results["tasks"]
    assert tasks["existence"]["n"] == 72 and tasks["existence"]["score"] == 1.0
    assert tasks["existence"]["majority"] == 0.5 and tasks["existence"]["blind"] < 1.0
    assert set(tasks["existence"]["metrics"]) == {"random", "popular", "adversarial", "average_f1", "accuracy"}
    assert tasks["colour"]["score"] == 1.0 and tasks["colour"]["blind"] < 0.6
    assert tasks["shape"]["score"] == tasks["shape"]["majority"] == tasks["shape"]["blind"] == 1.0
    assert tasks["choice"]["majority"] == 1.0  # the letter is always C in this little world
    assert tasks["relation"]["unparsable"] > 0
    for name in ("results.md", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 500


def test_answer_files_can_be_scored_without_the_model(world: Path, tmp_path: Path) -> None:
    results = evaluate(FakeModel(), world, out=tmp_path / "out", engine=FakeEngine(), blind=False)
    for task, facts in results["tasks"].items():
        again = score(task, tmp_path / f"out/answers/{task}.jsonl", world)
        assert (again["score"], again["n"], again["metrics"]) == (facts["score"], facts["n"], facts["metrics"])
        assert facts["blind"] is None
        lines = read_jsonl(tmp_path / f"out/items/{task}.jsonl")
        assert len(lines) == facts["n"] and {"question_id", "gold", "text", "parsed", "score"} <= set(lines[0])
    answer = read_jsonl(tmp_path / "out/answers/colour.jsonl")[0]
    assert {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} <= set(answer)


def test_blind_shows_each_picture_another_one_and_always_the_same(world: Path, tmp_path: Path) -> None:
    engine = FakeEngine()
    evaluate(FakeModel(), world, out=tmp_path / "out", engine=engine)
    half = len(engine.asked) // 2
    right = {request.question_id: request for request in engine.asked[:half]}
    swapped: dict[tuple[str, str], set[str]] = defaultdict(set)
    for request in engine.asked[half:]:
        before = right[request.question_id]
        assert request.turns == before.turns and request.images[0].path != before.images[0].path
        swapped[request.question_id.split("/")[0], before.images[0].path].add(request.images[0].path)
    assert all(len(others) == 1 for others in swapped.values())
    assert all(request.turns[0].text.startswith("<image>\n") for request in engine.asked)


def test_a_stopped_run_goes_on_with_no_question_twice(world: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    first = FakeEngine(stop_after=70)
    with pytest.raises(RuntimeError, match="power"):
        evaluate(FakeModel(), world, out=tmp_path / "out", engine=first)
    torn = sorted((tmp_path / "out/answers").glob("*.jsonl"))[0]
    torn.write_bytes(torn.read_bytes()[:-9])
    lost = 1  # the line that was torn is asked again
    second = FakeEngine()
    results = evaluate(FakeModel(), world, out=tmp_path / "out", engine=second)
    assert results["tasks"] == whole
    asked = [request.question_id for request in first.asked + second.asked]
    assert len(asked) == 2 * sum(facts["n"] for facts in whole.values()) + lost
    third = FakeEngine()
    assert evaluate(FakeModel(), world, out=tmp_path / "out", engine=third)["tasks"] == whole
    assert third.asked == []


def test_kill_minus_nine(world: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal, sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from evaluate_fakes import FakeEngine, FakeModel, sighted
            from leveret.evaluate import evaluate
            count = 0
            def say(request):
                global count
                count += 1
                if count == 100:
                    os.kill(os.getpid(), signal.SIGKILL)
                return sighted(request)
            evaluate(FakeModel(), {str(world)!r}, out={str(tmp_path / "out")!r}, engine=FakeEngine(say))
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], env=os.environ, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = sum(len(read_jsonl(path)) for path in (tmp_path / "out/answers").glob("*.jsonl"))
    assert kept == 99
    engine = FakeEngine()
    results = evaluate(FakeModel(), world, out=tmp_path / "out", engine=engine)
    assert results["tasks"] == whole
    assert kept + len(engine.asked) == 2 * sum(facts["n"] for facts in whole.values())


def test_another_model_or_other_questions_are_refused_by_name(world: Path, tmp_path: Path) -> None:
    root = tiny_world(tmp_path / "world")
    out = tmp_path / "out"
    evaluate(FakeModel(), root, "colour", out=out, engine=FakeEngine())
    with pytest.raises(RecipeError, match=r"model: .*fake-1.* there, .*fake-2.* now(.|\n)*another folder"):
        evaluate(FakeModel("fake-2"), root, "colour", out=out, engine=FakeEngine())
    path = root / "eval/colour/test_balanced_questions.json"
    path.write_text(path.read_text().replace("What colour is", "Which colour has"))
    with pytest.raises(RecipeError, match=r"questions\.colour"):
        evaluate(FakeModel(), root, "colour", out=out, engine=FakeEngine())


def test_other_pictures_under_the_same_names_are_other_questions(tmp_path: Path) -> None:
    """Else the answers to the old ones would be scored beside those to the new ones."""
    root, out = tiny_world(tmp_path / "world"), tmp_path / "out"
    evaluate(FakeModel(), root, "colour", out=out, engine=FakeEngine(), n=2)
    moved = root.rename(tmp_path / "elsewhere")
    evaluate(FakeModel(), moved, "colour", out=out, engine=FakeEngine(), n=2)
    picture = min((moved / "images").rglob("*.*"))
    Image.new("RGB", (90, 90), "red").save(picture)
    with pytest.raises(RecipeError, match=r"questions\.colour"):
        evaluate(FakeModel(), moved, "colour", out=out, engine=FakeEngine(), n=2)


def test_a_folder_that_knew_pictures_by_their_ids_alone_goes_on(world: Path, tmp_path: Path) -> None:
    """Of an older version: what was asked and answered stands, for a judge or more questions later."""
    out, engine = tmp_path / "out", FakeEngine()
    plan = Plan.of(world, "colour")
    evaluate(FakeModel(), world, "colour", out=out, engine=engine, n=3)
    asked = len(engine.asked)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    (row,) = plan.rows
    recipe["questions"]["colour"] = _questions_hash(row, plan.loaded["colour"], None, None)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    evaluate(FakeModel(), world, "colour", out=out, engine=engine, n=3)
    assert len(engine.asked) == asked
    assert plan.look_ahead(out, "fake-1", True)["colour"]["answered"] == 6


def test_more_questions_later_continue(world: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    few, more = FakeEngine(), FakeEngine()
    assert evaluate(FakeModel(), world, out=tmp_path / "out", engine=few, n=4)["tasks"]["box"]["n"] == 4
    results = evaluate(FakeModel(), world, out=tmp_path / "out", engine=more)
    assert results["tasks"] == whole
    assert not {r.question_id for r in few.asked[:32]} & {r.question_id for r in more.asked[: len(more.asked) // 2]}
    third = FakeEngine()
    assert evaluate(FakeModel(), world, out=tmp_path / "out", engine=third, n=4)["tasks"]["box"]["n"] == 4
    assert third.asked == []


def test_boxes_are_matched_by_overlap_and_the_constant_is_chosen_on_train(world: Path, tmp_path: Path) -> None:
    by_id = {f"box/{item.question_id}": item for item in load_items("box", world)}

    def say(request: object) -> str:
        item = by_id.get(request.question_id)  # type: ignore[attr-defined]
        return json.dumps(item.gold) if item else sighted(request)

    facts = evaluate(FakeModel(), world, "box", out=tmp_path / "out", engine=FakeEngine(say))["tasks"]["box"]
    assert facts["score"] == 1.0 and 0 <= facts["majority"] < 1
    (answer,) = {row["majority_answer"] for row in facts["templates"].values()}
    assert answer in {str(item.gold).replace("0.1,", "0.10,") for item in load_items("box", world, "train")} or answer
    assert {item.meta["group"] for item in by_id.values()} == {"box"}


def test_a_missing_picture_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    root = tiny_world(tmp_path / "world", scenes=3)
    (root / "images/test-001.jpg").unlink()
    engine = FakeEngine()
    with pytest.raises(DataError, match=r"1 of .* pictures are not there, first .*test-001.jpg"):
        evaluate(FakeModel(), root, out=tmp_path / "out", engine=engine)
    with pytest.raises(DataError, match=r"1 of .* pictures are missing, first .*test-001.jpg"):
        evaluate(FakeModel(), root, "colour", out=tmp_path / "out", engine=engine)
    assert engine.asked == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1, 2]", "a line is no answer"),
        ('{"question_id": "c0", "model_id": "fake-1"}', "a line is no answer"),
        (None, "the answer to 'c0' stands twice"),
    ],
)
def test_an_answers_file_that_somebody_changed_is_refused(tmp_path: Path, line: str | None, said: str) -> None:
    root = tiny_world(tmp_path / "world", scenes=3)
    evaluate(FakeModel(), root, "colour", out=tmp_path / "out", engine=FakeEngine(), blind=False)
    file = tmp_path / "out/answers/colour.jsonl"
    there = file.read_text("utf-8")
    file.write_text(f"{there}{line or there.splitlines()[0]}\n", "utf-8")
    with pytest.raises(DataError, match=f"answers/colour.jsonl: {said}.*Delete the file"):
        evaluate(FakeModel(), root, "colour", out=tmp_path / "out", engine=FakeEngine(), blind=False)


def test_without_a_train_twin_the_majority_is_of_the_test_itself_and_says_so(tmp_path: Path) -> None:
    root = tiny_world(tmp_path / "world", scenes=3)
    (root / "eval/colour/train_balanced_questions.json").unlink()
    facts = evaluate(FakeModel(), root, "colour", out=tmp_path / "out", engine=FakeEngine())["tasks"]["colour"]
    assert facts["majority_of"] == "test" and "train_balanced_questions.json" in facts["majority_absent"]
    golds = [item.gold for item in load_items("colour", root)]
    assert facts["majority"] == max(map(golds.count, golds)) / len(golds)


def test_an_unknown_suite_names_the_near_ones(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no suite 'wrld'.*world"):
        evaluate(FakeModel(), world, "wrld", out=tmp_path / "out", engine=FakeEngine())
    with pytest.raises(RecipeError, match="Did you mean colour"):
        load_items("color", world)


def test_a_real_model_from_its_folder(world: Path, tmp_path: Path) -> None:
    from fakes import tiny_vlm
    from leveret.generate import Model
    from leveret.model.checkpoint import save

    vlm = tiny_vlm()
    folder = save(vlm, tmp_path / "model")
    from_folder = evaluate(folder, world, out=tmp_path / "a", n=3)
    loaded = evaluate(Model(vlm), world, out=tmp_path / "b", n=3)
    assert from_folder["tasks"] == loaded["tasks"]
    assert all(facts["n"] == 3 for facts in from_folder["tasks"].values())
    answers = [read_jsonl(tmp_path / run / "answers/word.jsonl") for run in "ab"]
    assert [a["text"] for a in answers[0]] == [b["text"] for b in answers[1]]


def test_a_dry_run_says_what_is_asked_and_refuses_what_the_run_refuses(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fakes import tiny_vlm
    from leveret.model.checkpoint import save

    folder, out = save(tiny_vlm(), tmp_path / "model"), tmp_path / "out"
    asked = ["eval", str(folder), str(world), "-o", str(out), "--suite", "colour"]

    def planned(*more: str) -> dict[str, Any]:
        there = sorted(tmp_path.rglob("*"))
        assert run([*asked, *more, "--dry-run", "--json"]) == 0
        assert sorted(tmp_path.rglob("*")) == there, "a dry run writes nothing"
        return dict(json.loads(capsys.readouterr().out)["colour"])

    assert planned("-n", "5") == {"questions": 5, "with other pictures": 5}
    assert planned("-n", "5", "--no-blind") == {"questions": 5, "with other pictures": 0}
    assert run([*asked, "-n", "3", "--workers", "1"]) == 0
    capsys.readouterr()
    assert planned("-n", "5") == {"questions": 5, "with other pictures": 5, "answered": 6}
    other = save(tiny_vlm(seed=1), tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    cases = (
        ([str(other), str(world), "-o", str(out)], "was made with other data or another model"),
        ([str(tmp_path / "none"), str(world), "-o", str(out)], "none"),
        ([str(folder), str(world), "-o", str(tmp_path / "full")], "is not empty and holds no run"),
        ([str(folder), str(world), "-o", str(out), "--rule", "pope=lmms_eval"], "does not ask"),
        ([str(folder), str(world), "-o", str(out), "--judge-cache", str(tmp_path / "no.jsonl")], "no.jsonl"),
        ([str(folder), str(world), "-o", str(out), "--load-in", "4bit"], "--load-in 4bit"),
        ([str(folder), str(world), "-o", str(out), "--load-in", "4"], "--load-in 4: allowed"),
        (["openai:http://127.0.0.1:9#x", str(world), "-o", str(out), "--load-in", "4bit"], "is not run by leveret"),
        ([f"hf:{tmp_path / 'none'}", str(world), "-o", str(out)], "config.json"),
        ([str(folder), str(world), "-o", str(tmp_path / "full" / "letter.txt" / "x")], "letter.txt is a file"),
    )
    for given, why in cases:
        for more in ([], ["--dry-run"]):
            assert run(["eval", *given, "--suite", "colour", *more]) in (2, 3, 5)
            assert why in capsys.readouterr().err
