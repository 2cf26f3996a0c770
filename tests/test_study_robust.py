"""Studies that are stopped, killed, crowded, half done or asked for what cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from leveret import recipe as recipes
from leveret.cli import run as command
from leveret.runs import (
    DataError,
    EnvironmentFault,
    Interrupted,
    RecipeError,
    RunFolder,
    read_json,
    read_jsonl,
    write_json,
)
from leveret.study import runner
from leveret.study.costs import describe, unit_seconds
from leveret.study.files import base_cell, read
from leveret.study.kinds import KINDS, Kind
from leveret.study.matrix import Folder, Matrix
from leveret.study.page import _across
from leveret.study.runner import _last_words, run
from leveret.train.run import read as train_recipe
from study_fakes import TINY, axis, study, worker

__all__ = ["worker"]  # a fixture


def steps(*counts: int) -> dict[str, Any]:
    """An axis of so many tune steps."""
    return {"length": axis(**{f"l{n}": {"train": [f"stages.tune.steps={n}"]} for n in counts})}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


# --- stopped and crowded -------------------------------------------------------------------------------------------


def test_a_unit_knows_where_its_inputs_lie_however_the_folder_is_called(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that goes on is bound to where its data lie, so another name of the same folder must be the same."""
    seen: list[Path] = []
    teach = KINDS["teach"].make

    def looking(place: Path, settings: Any, inputs: Any) -> dict[str, Any]:
        seen.extend(inputs.values())
        return teach(place, settings, inputs)

    monkeypatch.setitem(KINDS, "teach", Kind(looking, "run"))
    monkeypatch.chdir(tmp_path)
    run(study(seeds=[0]), "out", jobs=1, units="units")
    assert seen and all(path.parent == (tmp_path / "units").resolve() for path in seen)


def test_a_unit_that_another_version_began_begins_anew(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It has the same id, so nothing of the study changed: what it was begun with is of no use to anybody."""
    teach = KINDS["teach"].make

    def binding(place: Path, settings: Any, inputs: Any) -> dict[str, Any]:
        RunFolder.open(place / "run", "train", {"default": version})
        if version == 1:
            raise Interrupted("stopped")
        return teach(place, settings, inputs)

    monkeypatch.setitem(KINDS, "teach", Kind(binding, "run"))
    version = 1
    with pytest.raises(Interrupted):
        run(study(seeds=[0]), tmp_path / "out", jobs=1)
    version = 2
    run(study(seeds=[0]), tmp_path / "out", jobs=1)
    assert capfd.readouterr().err.count("begun by another version of leveret; begun anew") == 1


def test_what_is_being_thrown_away_is_never_taken_for_whole(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.name.endswith("world") and path.is_dir():
            (path / "1.jpg").unlink()
            raise Killed

    draw = KINDS["draw"].make

    def drawing(place: Path, settings: Any, inputs: Any) -> dict[str, Any]:
        facts = draw(place, settings, inputs)
        for name in ("1.jpg", "2.jpg"):
            (place / "world" / name).touch()
        return facts

    monkeypatch.setitem(KINDS, "draw", Kind(drawing, "world", ("world",)))
    with monkeypatch.context() as patch:
        patch.setattr("leveret.study.runner.shutil.rmtree", killed)
        with pytest.raises(Killed):
            run(study(seeds=[0]), tmp_path / "out", jobs=1)
    (place,) = tmp_path.glob("out/units/draw-*")
    assert not (place / "world").exists() and (place / ".gone-world").exists()
    run(study(seeds=[0], axes=steps(3, 9), claims=[]), tmp_path / "out", jobs=1, keep=True)
    assert sorted(file.name for file in (place / "world").iterdir()) == ["1.jpg", "2.jpg"]


def test_one_after_the_other_a_cell_is_whole_before_the_next_is_begun(tmp_path: Path, worker: list[str]) -> None:
    run(study(axes=steps(3, 4), claims=[]), tmp_path / "out", jobs=1)
    one = ["draw", "embed", "choose", "teach", "teach", "examine", "teach", "examine"]
    assert worker == 2 * one


def test_a_unit_that_breaks_costs_only_what_needs_it(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teach = KINDS["teach"].make

    def breaking(place: Path, settings: Any, inputs: Any) -> dict[str, Any]:
        if settings["how"]["steps"] == 4:
            raise RuntimeError("CUDA out of memory")
        return teach(place, settings, inputs)

    monkeypatch.setitem(KINDS, "teach", Kind(breaking, "run"))
    with pytest.raises(
        DataError, match=r"(?s)2 of the study's units failed.*RuntimeError: CUDA out of memory \(see .*log"
    ):
        run(study(axes=steps(3, 4), claims=[], seeds=[0]), tmp_path / "out", jobs=1)
    results = read_json(tmp_path / "out" / "results.json")
    assert len(results["cells"]) == 1 and (results["whole"], results["asked"]) == (1, 2)
    assert "1 of 2 models are done" in (tmp_path / "out" / "report.html").read_text()
    (log,) = tmp_path.glob("out/units/teach-*/log.txt")
    assert "Traceback" in log.read_text()


def test_of_a_fault_of_ours_the_fault_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    unit = {"kind": "nonsense", "what": "x", "settings": {}, "inputs": {}}
    write_json(tmp_path / "units.json", {"cells": [], "units": {"nonsense-1": unit}})
    assert command(["study", "unit", str(tmp_path), "nonsense-1"]) == 1
    (tmp_path / "log.txt").write_text("before\n" + capfd.readouterr().err)
    assert _last_words(tmp_path / "log.txt") == f"KeyError: 'nonsense' (see {tmp_path / 'log.txt'})"
    (tmp_path / "log.txt").write_text("one\nerror: no such file\n\n")
    assert _last_words(tmp_path / "log.txt") == "error: no such file"


HOLD = """
import sys, time
from pathlib import Path
from leveret.runs import claim
claim(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
"""


def holding(place: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_what_another_process_is_still_at_is_waited_for(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A study that was killed and called again meets the processes that it left."""
    one = study(seeds=[0], axes=steps(3, 4), claims=[])
    first = Matrix.of(one).order()[0]
    other = holding(tmp_path / "out" / "units" / first)
    write_json(tmp_path / "out" / "study.json", {"name": "tiny"})
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            other.communicate("\n")

    monkeypatch.setattr(runner.time, "sleep", sleep)
    assert len(run(one, tmp_path / "out", jobs=1)["cells"]) == 2
    assert len(waited) >= 2 and capfd.readouterr().err.count("waiting for it") == 1


def test_two_studies_do_not_fill_one_folder_at_a_time(tmp_path: Path, worker: list[str]) -> None:
    other = holding(tmp_path / "units")
    with pytest.raises(EnvironmentFault, match="another process is writing this folder"):
        run(study(seeds=[0]), tmp_path / "out", jobs=1, units=tmp_path / "units")
    other.communicate("\n")
    assert run(study(seeds=[0]), tmp_path / "out", jobs=1, units=tmp_path / "units")["cells"]


def test_what_is_made_again_costs_what_that_costs(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_clock", lambda: lambda: 5.0)
    for more in (4, 5, 6):
        run(study(seeds=[0], axes=steps(3, more), claims=[]), tmp_path / "out", jobs=1)
    assert worker.count("draw") == 3
    lines = [
        row for row in read_jsonl(tmp_path / "out" / "ledger.jsonl") if row["kind"] == "draw" and row["did"] == "made"
    ]
    assert [row["seconds"] for row in lines] == [5.0, 5.0, 5.0]
    assert not list(tmp_path.glob("out/units/*/seconds.json"))


def test_a_choice_is_not_made_again_for_a_folder_that_nothing_reads(tmp_path: Path, worker: list[str]) -> None:
    run(study(seeds=[0], axes=steps(3, 4), claims=[]), tmp_path / "out", jobs=1)
    assert not list(tmp_path.glob("out/units/choose-*/coreset"))
    before = len(worker)
    grown = study(seeds=[0], axes=steps(3, 5), claims=[])
    told = describe(Matrix.of(grown), tmp_path / "out")["kinds"]
    assert {kind: row["units"] - row["done"] for kind, row in told.items() if row["done"] < row["units"]} == {
        "draw": 1, "teach": 1, "examine": 1,
    }, "the world was thrown away, and is asked for again"  # fmt: skip
    run(grown, tmp_path / "out", jobs=1)
    assert sorted(worker[before:]) == ["draw", "examine", "teach"]


def test_times_go_by_size() -> None:
    def seconds(**world: int) -> dict[str, float]:
        matrix = Matrix.of(study(seeds=[0], world={**TINY["world"], **world}))
        costs = unit_seconds(matrix.units, Folder(Path("/nowhere")))
        return {matrix.units[id].kind: cost for id, cost in costs.items()}

    small, large = seconds(), seconds(web=20_000, test=1200)
    assert large["embed"] == pytest.approx(100 * small["embed"])
    assert large["examine"] == pytest.approx(100 * small["examine"])


# --- what an id holds ----------------------------------------------------------------------------------------------


def test_an_id_holds_what_is_in_a_users_own_file(tmp_path: Path) -> None:
    own = tmp_path / "own.json"

    def ids() -> set[str]:
        one = study(seeds=[0], train=[*TINY["train"], f"stages.tune.data={own}"])
        return {id for id in Matrix.of(one).units if id.startswith("teach")}

    own.write_text("[]")
    before = ids()
    assert before == ids()
    own.write_text("[ ]")
    assert len(before & ids()) == 1, "the align stage"


def test_questions_count_where_they_are_asked(tmp_path: Path) -> None:
    def asked(**changes: Any) -> set[str]:
        return {id for id in Matrix.of(study(seeds=[0], **changes)).units if id.startswith("examine")}

    assert asked() == asked(questions=str(tmp_path))
    none: dict[str, Any] = {"world": None, "questions": str(tmp_path), "claims": []}
    none["train"] = [f"stages.{name}.data=x.json" for name in ("align", "tune")]
    before = asked(**none)
    (tmp_path / "mme.tsv").write_text("a")
    assert before.isdisjoint(asked(**none))


def test_the_loss_is_cut_where_the_stage_cuts_also_by_default() -> None:
    one = study(seeds=[0], measures=["loss"], world={**TINY["world"], "captions": 9}, claims=[],
                train=["stages.align.max_tokens=2048"], axes=steps(3, 4))  # fmt: skip
    (unit,) = [unit for unit in Matrix.of(one).units.values() if unit.kind == "loss"]
    assert unit.settings == {"max_tokens": 2048}


def test_an_average_is_judged_by_nothing_that_it_did_not_learn_from(tmp_path: Path, worker: list[str]) -> None:
    levels = axis(
        a={"choose": {"oracle": 5}}, b={"choose": {"oracle": 6}}, mean={"average": {"levels": ["a", "b"]}}
    )  # fmt: skip
    one = study(seeds=[0], measures=["suite", "encoder"], world={**TINY["world"], "captions": 9}, claims=[],
                axes={"c": levels})  # fmt: skip
    matrix = Matrix.of(one)
    mean = base_cell(one, 0).at("c", "mean")
    assert set(matrix.measured[mean]) == {"suite"}
    claim = {**TINY["claims"][0], "axis": "c", "level": "mean", "by": ["encoder"]}
    claimed = study(seeds=[0], measures=["suite", "encoder"], world={**TINY["world"], "captions": 9}, claims=[claim],
                    axes={"c": levels})  # fmt: skip
    with pytest.raises(RecipeError, match=r"claims\.0\.by: encoder cannot be measured of c=mean@0"):
        Matrix.of(claimed)


# --- asked for what cannot be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"axes": {"a": axis(x={}, y={"world": {"captions": 0}})}, "measures": ["suite", "loss"], "claims": [],
          "world": {"web": 9}}, r"a\.levels\.y\.world\.captions is 0"),
        ({"seeds": [True, False]}, "seeds"),
        ({"train": ["seed=9"]}, "'seed=9' is without effect"),
        ({"choose": {"set": ["seed=9"]}}, "'seed=9' is without effect"),
        ({"choose": {"oracle": True}}, "oracle"),
        ({"choose": {"oracle": 5, "recipe": "random"}}, "leave out recipe and set"),
        ({"name": "a\0b"}, "no control characters"),
        ({"axes": {"a": axis(**{"x": {}, "y=z": {}})}, "claims": []}, "names of axes and levels are words without ="),
        ({"suite": "world-study"}, r"asks caption, unanswerable, text, refusal.*world\.harder says, and that is 0"),
        ({"axes": {"a": axis(x={}, y={"world": {"web": 9}}, z={"average": {"levels": ["x", "y"]}})}, "claims": []},
         "of different worlds"),
        ({"world": None, "questions": "q", "axes": {"a": axis(x={}, y={"world": {"wbe": 1}})}, "claims": []},
         "this study draws none"),
        ({"world": None, "questions": "q", "axes": {"a": axis(x={}, y={"choose": {"oracle": 5}})}, "claims": []},
         "this study draws none"),
    ],
)  # fmt: skip
def test_faults_are_told_when_the_file_is_read(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"(?s){said}"):
        read(written(tmp_path, **change))


@pytest.mark.parametrize(
    ("level", "said"),
    [
        ({"choose": {"set": ["steps.cluster=null", "steps.budget.count=9"]}}, "dedup"),
        ({"choose": {"oracle": 5}, "train": ["stages.align=null"]}, "a=y@0 learns from world/coreset.json"),
        ({"train": ["stages.tune.start={from: /elsewhere, parts: [language]}"]}, "starts from the one before it"),
    ],
)
def test_faults_are_told_before_work_begins(level: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){said}"):
        Matrix.of(study(axes={"a": axis(x={}, y=level)}, claims=[], seeds=[0]))


def test_folders_that_hold_something_else_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    for held in ("[]", "{}", "nonsense", '{"name": 7}'):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "study.json").write_text(held)
        assert command(["study", "run", str(file), "-o", str(tmp_path / "out"), "--dry-run"]) == 3
        assert command(["study", "report", str(tmp_path / "out")]) == 3
    (tmp_path / "out" / "study.json").write_text('{"name": "tiny"}')
    assert command(["study", "report", str(tmp_path / "out")]) == 3
    assert "Traceback" not in (said := capsys.readouterr().err) and "holds no study" in said
    (tmp_path / "file").touch()
    line = ["study", "run", str(file), "-o", str(tmp_path / "x"), "--units", str(tmp_path / "file")]
    for more in ([], ["--dry-run"]):
        assert command([*line, *more]) == 2 and "is a file" in capsys.readouterr().err


def test_a_report_asks_no_recipe_of_today(tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "mine.yaml"
    base.write_text(yaml.safe_dump(recipes.dump(train_recipe("world"))))
    run(study(base=str(base), seeds=[0]), tmp_path / "out", jobs=1)
    before = read_json(tmp_path / "out" / "results.json")
    base.unlink()
    monkeypatch.chdir("/")
    assert command(["study", "report", str(tmp_path / "out")]) == 0
    assert read_json(tmp_path / "out" / "results.json") == before


# --- what is told --------------------------------------------------------------------------------------------------


def test_all_combinations_are_told(tmp_path: Path, worker: list[str]) -> None:
    two = {
        "a": axis(x={}, y={"train": ["stages.tune.steps=5"]}),
        "b": axis(u={}, v={"train": ["stages.align.steps=2"]}),
    }
    results = run(study(axes=two, claims=[], crossed=True), tmp_path / "out", jobs=1)
    rows = {tuple(row["levels"].values()): row for row in results["crossed"]}
    assert set(rows) == {("x", "u"), ("y", "u"), ("x", "v"), ("y", "v")}
    assert rows["y", "v"]["n"] == 2 and rows["y", "v"]["difference"]["mean"] == pytest.approx(0.0201)
    assert "All combinations" in (tmp_path / "out" / "report.html").read_text()
    plain = run(study(axes=two, claims=[]), tmp_path / "plain", jobs=1)
    assert not plain["crossed"] and "All combinations" not in (tmp_path / "plain" / "report.html").read_text()


def test_half_a_study_compares_like_with_like(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base has three seeds, the level one: what is drawn beside each other is of that one."""
    teach = KINDS["teach"].make

    def failing(place: Path, settings: Any, inputs: Any) -> dict[str, Any]:
        if settings["how"]["steps"] == 4 and settings["recipe"].get("seed", 0):
            raise DataError("no")
        return {**teach(place, settings, inputs), "seconds": 9.0}

    monkeypatch.setitem(KINDS, "teach", Kind(failing, "run"))
    with pytest.raises(DataError, match="failed"):
        run(study(axes=steps(3, 4), claims=[], seeds=[0, 1, 2]), tmp_path / "out", jobs=1)
    results = read_json(tmp_path / "out" / "results.json")
    assert results["costs"] == {"base": {"seconds": 18.0, "score": 0.03}, "length=l4": {"seconds": 18.0, "score": 0.04}}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "4 of 6 models are done" in page and "6 models, of 3 seeds" in page and "l4 (n = 1)" in page


def test_a_low_loss_is_good_on_the_page_too(tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(place: Path, settings: Any, inputs: Any) -> dict[str, Any]:
        return {"value": 10 / read_json(inputs["model"] / "done.json")["worth"]}

    def teach(place: Path, settings: Any, inputs: Any) -> dict[str, Any]:
        (place / "run").mkdir()
        return {"trainable": 7, "worth": settings["how"]["steps"], "seconds": 9.0}

    monkeypatch.setitem(KINDS, "loss", Kind(loss))
    monkeypatch.setitem(KINDS, "teach", Kind(teach, "run"))
    levels = axis(short={"train": ["stages.align.steps=2"]}, long={"train": ["stages.align.steps=9"]})
    one = study(axes={"a": levels}, claims=[], seeds=[0], measures=["loss"], world={**TINY["world"], "captions": 9})
    run(one, tmp_path / "out", jobs=1)
    page = (tmp_path / "out" / "report.html").read_text()
    rows = page.split("nothing is cheaper and as good")
    assert len(rows) == 2 and rows[0].rstrip().rfind("a=long") > rows[0].rfind(">base<") and "loss (95 %)" in page


def test_what_was_chosen_is_told_where_levels_choose_by_other_rules(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(place: Path, settings: Any, inputs: Any) -> dict[str, Any]:
        (place / "pairs.json").touch()
        facts = dict.fromkeys(("kept", "fits", "copies", "scenes", "characters"), 1)
        return {**facts, "shown": []}

    monkeypatch.setitem(KINDS, "choose", Kind(choose, "pairs.json"))
    worlds = {"text": axis(some={}, none={"world": {"text_share": 0.0}})}
    assert not run(study(axes=worlds, claims=[], seeds=[0]), tmp_path / "a", jobs=1)["choices"]
    rules = {"choice": axis(some={}, none={"choose": {"oracle": 5}})}
    assert set(run(study(axes=rules, claims=[], seeds=[0]), tmp_path / "b", jobs=1)["choices"]["choice"]) == {
        "some",
        "none",
    }


def test_a_table_of_many_levels_is_cut_into_several_with_the_base_in_each() -> None:
    assert _across(["b"], "b") == [["b"]] and _across(list("abcde"), "b") == [list("abcde")]
    assert _across(list("abcdefgh"), "b") == [list("abcde"), list("bfgh")]
    for count in range(1, 30):
        levels = [str(n) for n in range(count)]
        parts = _across(levels, "0")
        assert all(part[0] == "0" and len(part) <= 6 for part in parts)
        assert [level for part in parts for level in part[1:]] == levels[1:]
