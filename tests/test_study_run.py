"""Studies as files: what their cells share, that nothing is made twice, statistics with known answers, and the page."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from leveret.cli import run as command
from leveret.recipe import names
from leveret.runs import DataError, RecipeError, read_json, read_jsonl, write_json
from leveret.study.costs import describe
from leveret.study.figures import AGREES, DISAGREES, MISSING, UNDECIDED, at_most, paired, pareto, verdict
from leveret.study.files import cells, read
from leveret.study.kinds import KINDS, Kind
from leveret.study.matrix import Matrix
from leveret.study.paired import holm, p_value, t_interval
from leveret.study.runner import _Running, make, run
from leveret.study.units import Unit, chain
from study_fakes import TINY, axis, study, worker

__all__ = ["worker"]  # a fixture


# --- files ---------------------------------------------------------------------------------------------------------


def test_every_study_that_comes_with_leveret_can_be_planned(tmp_path: Path) -> None:
    assert "prismatic/one-stage" in names("studies")
    for name in names("studies"):
        one = read(name)
        assert one.name == name and one.claims and len(one.seeds) >= 3
        facts = describe(Matrix.of(one), tmp_path)
        assert facts["kinds"]["examine"]["units"] == len(cells(one)) and facts["seconds"] > 0
        assert facts["timed"] == (one.world is not None), "real backbones were not measured here"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"claims": [{**TINY["claims"][0], "axis": "lenght"}]}, "the axes are length"),
        ({"claims": [{**TINY["claims"][0], "level": "usual"}]}, "allowed are longer, mean"),
        ({"claims": [{**TINY["claims"][0], "than": "shorter"}]}, "claims.0.than: 'shorter'; allowed are longer, mean"),
        ({"claims": [{**TINY["claims"][0], "than": "longer"}]}, "claims.0.level: 'longer'; allowed are mean, usual"),
        ({"world": None}, "the suite's files need a folder"),
        ({"axes": {"a": {"question": "?", "base": "c", "levels": {"a": {}, "b": {}}}}}, "none of its levels: a, b"),
        ({"axes": {"a": axis(a={}, b={"average": {"levels": ["a", "z"]}})}}, "z is no level"),
        ({"axes": {"a": axis(a={}, b={"train": ["x=1"], "average": {"levels": ["a", "a"]}})}}, "teaches nothing"),
        ({"axes": {"a": axis(a={}, b={"average": {"levels": ["a", "a"], "weights": [1.0]}})}}, "as many weights"),
        ({"axes": {"a": axis(a={}, b={"average": {"levels": ["a", "a"], "weights": [2, -1]}})}}, "from 0 on"),
        ({"axes": {"a": axis(a={}, b={"average": {"levels": ["a", "a"], "weights": [0, 0]}})}}, "sum to 1"),
        ({"suite": "wrld"}, "no suite 'wrld'.*the suite world"),
        ({"claims": [{**TINY["claims"][0], "by": ["color"]}]}, r"claims.0.by: 'color'.*Did you mean colour"),
        ({"radar": {"see": ["colour", "nothing"]}}, "radar.see: 'nothing' is no task of the suite world"),
        ({"radar": {"see": ["score"]}}, "radar.see: 'score' is no task"),
        ({"name": "../x"}, r"name: '../x'.*no \.\."),
        ({"name": "/x"}, "no / in front"),
    ],
)
def test_faults_of_a_file_are_told(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**TINY, **change}))
    with pytest.raises(RecipeError, match=said):
        read(path)


def test_a_field_of_the_world_that_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**TINY, "world": {"wbe": 3}}))
    with pytest.raises(RecipeError, match=r"no 'wbe'.*Did you mean web"):
        read(path)


@pytest.mark.parametrize(
    ("world", "said"),
    [
        ({"web": "many"}, "web='many': a whole number of 1 or more"),
        ({"test": 12.5}, "test=12.5: a whole number"),
        ({"text_share": "some"}, "text_share='some': a share"),
        ({"strength": ["mild"]}, "allowed are mild, usual, severe"),
    ],
)
def test_what_no_world_can_be_is_told(world: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Matrix.of(study(world={**TINY["world"], **world}))


def test_faults_of_levels_are_told_together_before_anything_is_made(tmp_path: Path) -> None:
    levels = axis(a={}, b={"train": ["stages.tune.stps=1"]}, c={"choose": {"recipe": "nothing"}})
    with pytest.raises(RecipeError, match=r"(?s)axis=b: .*stps.*axis=c: .*nothing"):
        run(study(axes={"axis": levels}, claims=[]), tmp_path / "out")
    levels = axis(a={}, b={"train": ["model.connector.options={quries: 4}"]})
    with pytest.raises(RecipeError, match="quries"):
        run(study(axes={"axis": levels}, claims=[]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_change_at_a_time_or_all_combinations() -> None:
    two = {"a": axis(x={}, y={}), "b": axis(u={}, v={}, w={})}
    assert len(cells(study(axes=two, claims=[], seeds=[0]))) == 1 + 1 + 2
    crossed = cells(study(axes=two, claims=[], seeds=[0, 5], crossed=True))
    assert len(crossed) == len(set(crossed)) == 12
    assert crossed[0].name == "a=x,b=u@0" and crossed[6].name == "a=x,b=u@5"


# --- sharing -------------------------------------------------------------------------------------------------------


def test_eight_cells_that_share_an_align_stage_train_it_once(tmp_path: Path, worker: list[str]) -> None:
    levels = axis(**{f"l{n}": {"train": [f"stages.tune.steps={n}"]} for n in range(1, 9)})
    one = study(axes={"length": levels}, claims=[], seeds=[0])
    results = run(one, tmp_path / "out", jobs=1)
    assert worker.count("teach") == 1 + 8 and [worker.count(kind) for kind in ("draw", "embed", "choose")] == [1, 1, 1]
    ledger = read_jsonl(tmp_path / "out" / "ledger.jsonl")
    align = [row for row in ledger if (row["kind"], row["what"]) == ("teach", "align")]
    assert [row["did"] for row in align] == ["made"] + ["shared"] * 7 and len({row["unit"] for row in align}) == 1
    assert results["ledger"]["teach"] | {"seconds": 0, "saved": 0} == {
        "made": 9,
        "needed": 16,
        "seconds": 0,
        "saved": 0,
    }


def test_worlds_of_one_web_share_what_is_made_of_the_web(tmp_path: Path, worker: list[str]) -> None:
    """Other conversations or questions change no pair, so none is embedded, chosen or learned from again; another web
    does."""
    levels = axis(
        usual={},
        talk={"world": {"text_share": 0.5, "refusals": 0.2}},
        boxes={"world": {"asked": {"box": 0.1}}},
        severe={"world": {"strength": "severe"}},
        both={"world": {"strength": "severe", "tune": 61}},
    )
    run(study(axes={"data": levels}, claims=[], seeds=[0]), tmp_path / "out", jobs=1)
    made = {kind: worker.count(kind) for kind in ("draw", "embed", "choose", "teach", "examine")}
    assert made == {"draw": 5, "embed": 2, "choose": 2, "teach": 2 + 5, "examine": 5}
    units = read_json(tmp_path / "out" / "units.json")["units"]
    for unit in units.values():
        if unit["kind"] == "teach" and unit["what"] == "tune":
            assert units[unit["inputs"]["world"]]["kind"] == "draw"
    tuned = {unit["inputs"]["world"] for unit in units.values() if unit["kind"] == "teach" and unit["what"] == "tune"}
    assert len(tuned) == 5, "each from conversations of its own world"
    # What keeps a study of one world as it was: its units are those of the world that the cell itself draws.
    alone = Matrix.of(study(seeds=[0]))
    assert {unit.inputs.get("world") for unit in alone.units.values() if unit.inputs.get("world")} == {
        id for id, unit in alone.units.items() if unit.kind == "draw"
    }


def test_a_level_whose_world_cannot_be_is_told_by_its_name() -> None:
    levels = axis(a={}, b={"world": {"strength": "severe"}}, c={"world": {"web": 0}})
    with pytest.raises(RecipeError) as told:
        Matrix.of(study(axes={"data": levels}, claims=[], seeds=[0]))
    assert "data=c: web=0" in str(told.value) and "data=b" not in str(told.value)


def test_what_differs_is_not_shared() -> None:
    def ids(**changes: Any) -> set[str]:
        matrix = Matrix.of(study(seeds=[0], **changes))
        return {id for id in matrix.units if id.startswith("teach")}

    usual = ids()
    assert usual == ids() and len(usual) == 3
    assert usual.isdisjoint(ids(train=["stages.align.steps=2", "stages.tune.steps=3"]))
    assert usual.isdisjoint(ids(world={**TINY["world"], "strength": "severe"}))
    assert usual.isdisjoint(
        ids(choose={"recipe": "random", "set": ["steps.random.count=40", "steps.random.share=null"]})
    )
    later = ids(train=["stages.align.steps=3", "stages.tune.steps=3", "stages.tune.batch=8"])
    assert len(usual & later) == 1, "the align stage"
    assert usual == ids(train=[*TINY["train"], "stages.tune.data=world/tune.json"])


def test_a_study_that_grows_keeps_what_it_has(tmp_path: Path, worker: list[str]) -> None:
    run(study(seeds=[0]), tmp_path / "out", jobs=1)
    before = len(worker)
    assert run(study(seeds=[0]), tmp_path / "out", jobs=1)["cells"] and len(worker) == before
    run(study(), tmp_path / "out", jobs=1)
    assert len(worker) == 2 * before
    # What was thrown away is made again only where something is missing that needs it.
    levels = {**TINY["axes"]["length"]["levels"], "short": {"train": ["stages.tune.steps=1"]}}
    run(study(axes={"length": {**TINY["axes"]["length"], "levels": levels}}), tmp_path / "out", jobs=1)
    more = worker[2 * before :]
    assert sorted(more) == sorted(2 * ["draw", "teach", "examine"])
    with pytest.raises(RecipeError, match="holds the study 'tiny', not 'other'"):
        run(study(name="other"), tmp_path / "out", jobs=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(RecipeError, match=r"holds no study \(it holds letter.txt\)"):
        run(study(), tmp_path / "full", jobs=1)


def test_studies_share_what_they_have_in_common(tmp_path: Path, worker: list[str]) -> None:
    run(study(), tmp_path / "a", jobs=1, units=tmp_path / "units")
    before = len(worker)
    plan = describe(Matrix.of(study(name="b")), tmp_path / "b", tmp_path / "units")["kinds"]
    assert all(row["done"] == row["units"] for row in plan.values())
    levels = {"usual": {}, "short": {"train": ["stages.tune.steps=1"]}}
    other = study(name="b", axes={"length": axis(**levels)}, claims=[])
    found = run(other, tmp_path / "b", jobs=1, units=tmp_path / "units")
    assert sorted(worker[before:]) == sorted(2 * ["draw", "teach", "examine"]) and len(found["cells"]) == 4
    told = {row["cell"]: row["did"] for row in read_jsonl(tmp_path / "b" / "ledger.jsonl") if row["kind"] == "examine"}
    assert set(told.values()) == {"found", "made"} and told["length=usual@0"] == "found"
    assert run(study(name="b", seeds=[0]), tmp_path / "b", jobs=1)["cells"], "the folder knows where its units are"
    for place, units in (("a", "elsewhere"), ("c", "units")):
        if place == "c":
            run(study(name="c"), tmp_path / "c", jobs=1)
        with pytest.raises(RecipeError, match="leave --units out"):
            run(study(name={"a": "tiny"}.get(place, place)), tmp_path / place, jobs=1, units=tmp_path / units)


def test_a_unit_that_fails_costs_only_what_needs_it(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = KINDS["teach"].make

    def fail(place: Path, settings: Any, inputs: Any) -> dict[str, Any]:
        if settings["how"]["steps"] == 4 and settings["recipe"].get("seed", 0) == 1:
            raise DataError("no, says\nthe test")
        return usual(place, settings, inputs)

    monkeypatch.setitem(KINDS, "teach", Kind(fail))
    with pytest.raises(DataError, match=r"(?s)4 of the study's units failed.*teach \(tune\): no, says the test"):
        run(study(), tmp_path / "out", jobs=1)
    results = read_json(tmp_path / "out" / "results.json")
    assert len(results["cells"]) == 4 and results["axes"]["length"]["levels"]["longer"]["n"] == 1
    monkeypatch.setitem(KINDS, "teach", Kind(usual))
    assert len(run(study(), tmp_path / "out", jobs=1)["cells"]) == 6


def test_a_unit_alone(tmp_path: Path, worker: list[str]) -> None:
    run(study(seeds=[0]), tmp_path / "out", jobs=1)
    with pytest.raises(DataError, match="no study with the unit teach-0"):
        make(tmp_path / "out", "teach-0")
    matrix = Matrix.of(study(seeds=[0]))
    last = matrix.measured[cells(study(seeds=[0]))[0]]["suite"]
    (tmp_path / "out" / "units" / chain(matrix.units, last)[-2] / "done.json").unlink()
    (tmp_path / "out" / "units" / last / "done.json").unlink()
    with pytest.raises(DataError, match="which is not done"):
        make(tmp_path / "out", last)


# --- figures -------------------------------------------------------------------------------------------------------


def test_waiting_is_no_work(tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What others take of the cores is not what a model costs."""
    teach = KINDS["teach"].make

    def waiting(place: Path, settings: Any, inputs: Any) -> dict[str, Any]:
        time.sleep(0.5)
        return teach(place, settings, inputs)

    monkeypatch.setitem(KINDS, "teach", Kind(waiting))
    results = run(study(seeds=[0], axes={"a": axis(b={}, c={"world": {"tune": 61}})}, claims=[]), tmp_path, jobs=1)
    assert all(cell["seconds"] < 1 for cell in results["cells"]), "each waits for a second in two stages"


def test_figures_of_a_study_whose_answer_is_known(tmp_path: Path, worker: list[str]) -> None:
    results = run(study(seeds=[0, 1, 2]), tmp_path / "out", jobs=1)
    levels = results["axes"]["length"]["levels"]
    assert [levels[name]["mean"] for name in ("usual", "longer", "mean")] == pytest.approx([0.0303, 0.0404, 0.03535])
    longer = levels["longer"]["difference"]
    assert longer["mean"] == pytest.approx(0.0101) and longer["high"] - longer["low"] < 1e-3
    (claim,) = results["claims"]
    assert claim["verdict"] == AGREES and results["comparisons"] == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "longer is better" in page and "agrees" in page and "Does longer tuning help?" in page
    assert "stages.tune.steps=4" in page and "the mean of usual and longer" in page, (
        "levels that say nothing of themselves"
    )


def test_a_claim_may_compare_two_levels_that_are_no_base(tmp_path: Path, worker: list[str]) -> None:
    claim = {**TINY["claims"][0], "level": "mean", "than": "longer", "expect": "lower"}
    (told,) = run(study(claims=[claim]), tmp_path / "out", jobs=1)["claims"]
    assert told["base"] == "longer" and told["verdict"] == AGREES
    assert told["difference"]["mean"] == pytest.approx(-0.005025)
    assert "mean less longer" in (tmp_path / "out" / "report.html").read_text()


def test_how_much_is_said_is_a_measure_too(tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim by words compares how many an answer has; what was examined before these were counted has none."""
    usual = KINDS["examine"].make

    def talkative(place: Path, settings: Any, inputs: Any) -> dict[str, Any]:
        facts = usual(place, settings, inputs)
        worth = facts["tasks"]["count"]["score"]
        return {
            "tasks": {name: {**row, "words": 100 * worth + at} for at, (name, row) in enumerate(facts["tasks"].items())}
        }

    claim = {**TINY["claims"][0], "by": ["words"], "expect": "lower"}
    before = run(study(claims=[claim]), tmp_path / "before", jobs=1)
    assert before["claims"][0]["difference"] is None and before["axes"]["length"]["levels"]["usual"]["words"] is None
    monkeypatch.setitem(KINDS, "examine", Kind(talkative))
    results = run(study(claims=[claim]), tmp_path / "out", jobs=1)
    levels = results["axes"]["length"]["levels"]
    assert levels["longer"]["words"] - levels["usual"]["words"] == pytest.approx(1.005)
    assert results["claims"][0]["difference"]["mean"] == pytest.approx(1.005)
    assert "words an answer" in (tmp_path / "out" / "report.html").read_text()


LOW_HIGH = {
    "higher": [(0.1, 0.2, AGREES), (-0.2, -0.1, DISAGREES), (-0.1, 0.1, UNDECIDED)],
    "lower": [(-0.2, -0.1, AGREES), (0.1, 0.2, DISAGREES), (-0.1, 0.1, UNDECIDED)],
    "same": [(-0.005, 0.009, AGREES), (0.02, 0.1, DISAGREES), (-0.1, -0.02, DISAGREES), (-0.005, 0.02, UNDECIDED)],
    "not lower": [(-0.005, 0.3, AGREES), (-0.3, -0.02, DISAGREES), (-0.02, 0.3, UNDECIDED)],
    "not higher": [(-0.3, 0.005, AGREES), (0.02, 0.3, DISAGREES), (-0.3, 0.02, UNDECIDED)],
}


def test_verdicts() -> None:
    for expect, rows in LOW_HIGH.items():
        for low, high, said in rows:
            assert verdict(expect, 0.01, {"low": low, "high": high}) == said, (expect, low, high)
        assert verdict(expect, 0.01, None) == MISSING
        assert verdict(expect, 0.01, {"low": None, "high": None}) == UNDECIDED, "one seed has no interval"


def test_what_an_interval_on_both_sides_says() -> None:
    found = {"low": -0.003, "high": 0.011}
    assert at_most("lower", found) == at_most("not lower", found) == "at most 0.003 lower"
    assert at_most("higher", found) == at_most("not higher", found) == "at most 0.011 higher"
    assert at_most("same", found) is None and at_most("higher", None) is None
    assert at_most("higher", {"low": None, "high": None}) is None, "one seed has no interval"
    assert at_most("lower", {"low": 0.001, "high": 0.01}) is None, "all of it on one side: the verdict says so"


def test_how_sums_round_is_no_difference() -> None:
    ours, theirs = {0: (0.1 + 0.2) + 0.3, 1: 0.5}, {0: 0.1 + (0.2 + 0.3), 1: 0.5, 2: 0.1}
    assert ours[0] != theirs[0]
    found = paired(ours, theirs)
    assert found == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 2, "p": 1.0, "by_seed": {0: 0.0, 1: 0.0}}
    assert verdict("higher", 0.01, found) == verdict("lower", 0.01, found) == UNDECIDED


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 5):
        tried = rng.normal(0.3, 2.0, (4000, n))
        found = [t_interval(list(row)) for row in tried]
        inside = np.mean([one.low is not None and one.low <= 0.3 <= one.high for one in found])
        assert abs(inside - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 4000), (n, inside)


def test_false_findings_under_the_null_are_as_rare_as_stated() -> None:
    """Each p alone is below .05 in 5 % of cases; of six comparisons any corrected one in at most 5 %."""
    rng = np.random.default_rng(1)
    alone, any_of_six = [], []
    for _ in range(2000):
        raw = {str(at): p_value(list(rng.normal(0, 1, 4))) for at in range(6)}
        alone += [p < 0.05 for p in raw.values() if p is not None]
        any_of_six.append(min(p for p in holm(raw).values() if p is not None) < 0.05)
    assert abs(np.mean(alone) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / len(alone))
    assert np.mean(any_of_six) < 0.05 + 4 * np.sqrt(0.05 * 0.95 / len(any_of_six))
    assert np.mean(any_of_six) > 0.03, "and not so careful that nothing is ever found"


def test_p_and_holm_against_known_answers() -> None:
    from scipy.stats import ttest_1samp

    for values in ([0.1, 0.3, 0.2], [-1.0, 2.0], [0.01, 0.02, 0.03, -0.01]):
        assert p_value(values) == pytest.approx(ttest_1samp(values, 0.0).pvalue)
    assert p_value([1.0]) is None and p_value([0.0, 0.0]) == 1.0 and p_value([0.5, 0.5]) is None
    # Holm's own rule, by hand: .01 x 4, .02 x 3, .03 x 2, .04 x 1, never below the one before.
    found = holm({"a": 0.04, "b": 0.01, "c": None, "d": 0.03, "e": 0.02})
    assert found == pytest.approx({"a": 0.06, "b": 0.04, "c": None, "d": 0.06, "e": 0.06})


@given(st.dictionaries(st.text(max_size=3), st.tuples(st.floats(0, 9), st.floats(0, 1)), min_size=1, max_size=8))
def test_the_front_is_beaten_by_none_and_beats_the_rest(points: dict[str, tuple[float, float]]) -> None:
    front = pareto(points)
    assert front
    for name, (cost, score) in points.items():
        beaten = any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points.values())
        assert (name in front) != beaten


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_a_study_is_taught_and_examined(tmp_path: Path) -> None:
    levels = {name: how for name, how in TINY["axes"]["length"]["levels"].items() if name != "usual"}
    one = study(axes={"length": {"question": "?", "base": "longer", "levels": levels | {"usual": {}}}}, claims=[])
    results = run(one.model_copy(update={"seeds": (0,)}), tmp_path / "out", jobs=1)
    assert len(results["cells"]) == 3 and all(0 <= cell["score"] <= 1 for cell in results["cells"])
    assert results["cells"][0]["trainable"] > 900_000 and {"colour", "count"} <= set(results["cells"][0]["tasks"])
    assert not list(tmp_path.glob("out/units/draw-*/world")), "drawn worlds are not kept"
    assert (tmp_path / "out" / "report.html").stat().st_size > 20_000


@pytest.mark.slow
def test_a_study_is_taught_and_examined_in_processes_and_goes_on_after_a_kill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "seeds": [0]}))
    out = tmp_path / "out"
    line = [sys.executable, "-m", "leveret.cli", "study", "run", str(tmp_path / "tiny.yaml"), "-o", str(out)]
    child = subprocess.Popen([*line, "--jobs", "2"], stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 120
    while not list(out.glob("units/choose-*/done.json")) and child.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    while subprocess.run(["pgrep", "-f", f"study unit {out}"], stdout=subprocess.DEVNULL).returncode == 0:
        assert time.monotonic() < end, "units end when their study is gone"
        time.sleep(0.2)
    made = {path.parent.name: path.read_bytes() for path in out.glob("units/*/done.json")}
    assert made and not (out / "report.html").exists()
    assert command(["study", "run", str(tmp_path / "tiny.yaml"), "-o", str(out), "--jobs", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["cells"]) == 3 and all(0 <= cell["score"] <= 1 for cell in found["cells"])
    assert found["cells"][0]["trainable"] > 900_000 and set(found["cells"][0]["tasks"]) >= {"colour", "count"}
    for name, facts in made.items():
        assert (out / "units" / name / "done.json").read_bytes() == facts, "made once"
    assert not list(out.glob("units/draw-*/world")), "drawn worlds are not kept"
    assert command(["study", "report", str(out)]) == 0 and "longer is better" in capsys.readouterr().out
    # In one process: the same scores, whatever ran beside.
    assert (
        command(["study", "run", str(tmp_path / "tiny.yaml"), "-o", str(tmp_path / "b"), "--jobs", "1", "--json"]) == 0
    )
    again = json.loads(capsys.readouterr().out)
    assert [cell["tasks"] for cell in again["cells"]] == [cell["tasks"] for cell in found["cells"]]


def test_the_command_line_tells_what_it_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["study", "list"]) == 0
    listed = capsys.readouterr().out
    assert "prismatic/one-stage" in listed and max(map(len, listed.splitlines())) <= 80
    assert command(["study", "run", "prismatic/one-stage", "-o", str(tmp_path / "x"), "--dry-run", "seeds=[0,1]"]) == 0
    said = capsys.readouterr().out
    assert "6 models, seeds 0, 1" in said and "about" in said and "less than a minute of one core" in said
    assert "about 0 min" not in said and not (tmp_path / "x").exists()
    assert command(["study", "run", "prismatic/one-stge", "--dry-run"]) == 2
    assert "prismatic/one-stage" in capsys.readouterr().err
    assert command(["study", "run", "prismatic/one-stage", "--command", "srun", "--dry-run"]) == 2
    assert "write {} there" in capsys.readouterr().err
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").touch()
    line = ["study", "run", "prismatic/one-stage", "--dry-run", "-o"]
    assert command([*line, str(tmp_path / "x")]) == 2 and "thesis.txt" in capsys.readouterr().err
    assert command([*line, str(tmp_path / "x" / "thesis.txt")]) == 2 and "is a file" in capsys.readouterr().err
    write_json(tmp_path / "y" / "study.json", {"name": "another"})
    assert command([*line, str(tmp_path / "y")]) == 2 and "holds the study 'another'" in capsys.readouterr().err
    no_such = "axes.stages.levels.one.train=[model.vision.tower=world/towre]"
    assert command([*line, str(tmp_path / "z"), no_such]) == 2
    assert "cannot run" in (said := capsys.readouterr().err) and "world/towre" in said and not (tmp_path / "z").exists()
    assert command(["study", "report", str(tmp_path)]) == 3 and "holds no study" in capsys.readouterr().err


def test_units_run_by_a_command_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "seeds": [0], "train": ["stages.tune.steps=nonsense"]}))
    said = tmp_path / "said.txt"
    # The command only notes what it was given: nothing is made, so every unit that was tried failed.
    line = [
        "study",
        "run",
        str(tmp_path / "tiny.yaml"),
        "-o",
        str(tmp_path / "out"),
        "--command",
        f"echo {{}} >> {said}",
    ]
    assert command(line) == 2, "the study's own faults are told before any command runs"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "seeds": [0]}))
    assert command(line) == 3
    (first,) = said.read_text().splitlines()
    assert "study unit" in first and "draw-" in first


def test_it_says_what_runs_and_how_far_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("leveret.runs.progress._PLAIN_EVERY", 0.0)
    monkeypatch.setattr("leveret.study.runner.LOOK", 0.0)
    share = _Running.share

    def looked(self: _Running, unit: Unit) -> float:
        if found := share(self, unit):
            (tmp_path / "seen").touch()
        return found

    monkeypatch.setattr(_Running, "share", looked)
    log = "echo 'draw the world: 500 of 2,000 pictures  9 pictures/s'; echo 'tokenising: 6 of 6 samples'"
    wait = f"for i in $(seq 600); do [ -e {tmp_path}/seen ] && break; sleep .05; done"
    with pytest.raises(DataError, match="failed"):
        run(read("prismatic/one-stage", ["seeds=[0]"]), tmp_path / "out", jobs=2, command=f"{log}; {wait}; false {{}}")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("study (seconds of work): ")]
    told = next(line for line in said if "now draw world 0 of stages=two@0 25%" in line)
    first, total = (float(number.replace(",", "")) for number in re.findall(r"[\d,]+", told)[:2])
    assert 0 < first < total / 2 and "left" in told
