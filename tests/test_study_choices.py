"""Ways of choosing pairs as a study: levels hold what they say, measures beside the examination, the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from leveret import quickstart
from leveret.cli import run as command
from leveret.runs import RecipeError
from leveret.study import loss, read, run
from leveret.study.choices import by_truth, contents
from leveret.study.encoder import fresh, recall, rows_of
from leveret.study.figures import AGREES, UNDECIDED, mean_in_words, paired, step_of, verdict
from leveret.study.files import StudyRecipe, base_cell
from leveret.study.matrix import Matrix
from leveret.study.paired import t_interval
from study_fakes import study

BUDGET, WEB = 20, 300
LEVELS = ("random", "coreset", "no-dedup", "score-only", "dedup-only", "windows", "everything", "oracle")
TINY = (
    "seeds=[0]", "measures=[encoder,loss]", "train=[stages.align.steps=3,stages.tune.steps=1]",
    f"world={{web: {WEB}, tune: 16, test: 6, captions: 24, strength: usual}}",
)  # fmt: skip
CLAIMS = [
    {"paper": "none", "says": "less surprise", "axis": "choice", "level": "oracle", "expect": "lower", "by": ["loss"]},
    {"paper": "none", "says": "found sooner", "axis": "choice", "level": "oracle", "expect": "higher"},
]


def tiny(*changes: str) -> StudyRecipe:
    """The study of choices as it is shipped, with budgets of BUDGET pairs."""
    plain = json.loads(
        read("bunny/selection", [*TINY, *changes]).model_dump_json(exclude_defaults=True).replace("1500", str(BUDGET))
    )
    usual = {"recipe": "world", "set": [f"steps.budget.count={BUDGET}"]}
    return StudyRecipe.model_validate({**plain, "choose": usual, "claims": CLAIMS})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of all ways of choosing, by the two cheap measures."""
    folder = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leveret.study.units.ENCODER_STEPS", 6)
        patch.setattr("leveret.study.units.ENCODER_BATCH", 16)
        run(tiny(), folder, jobs=1, keep=True)
    return folder


def results(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "results.json").read_text()))


def choice(out: Path, level: str) -> Path:
    return out / "units" / results(out)["choices"]["choice"][level]["unit"]


def ids(out: Path, level: str) -> set[str]:
    return {pair["id"] for pair in json.loads((choice(out, level) / "pairs.json").read_text())}


def ledger(out: Path, level: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(choice(out, level) / "coreset" / "ledger").to_pylist()
    return rows


def world(out: Path) -> Path:
    (place,) = out.glob("units/draw-*/world")
    return place


def truth(out: Path) -> dict[str, dict[str, Any]]:
    lines = (world(out) / "web_truth.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


# --- the choices ---------------------------------------------------------------------------------------------------


def test_every_level_holds_the_budget_in_the_webs_own_records(out: Path) -> None:
    known = {record["id"]: record for record in json.loads((world(out) / "web.json").read_text())}
    rows = results(out)["choices"]["choice"]
    assert tuple(rows) == LEVELS
    for level, row in rows.items():
        chosen = json.loads((choice(out, level) / "pairs.json").read_text())
        assert [known[pair["id"]] for pair in chosen] == chosen
        assert row["kept"] == len(chosen) == len(ids(out, level))
        if level not in ("windows", "everything"):
            assert len(chosen) == BUDGET
    assert 0 < rows["windows"]["kept"] < BUDGET and rows["everything"]["kept"] == WEB


def test_every_level_chooses_as_it_says(out: Path) -> None:
    scores = {row["id"]: row["score"] for row in ledger(out, "random")}
    assert ids(out, "score-only") == set(sorted(scores, key=scores.__getitem__)[-BUDGET:])

    rows = {row["id"]: row for row in ledger(out, "coreset")}
    of_each_group = [row for row in rows.values() if row["verdict"] != "dedup"]
    best = sorted(row["score"] for row in of_each_group)[-int(0.3 * len(of_each_group)) :]
    assert len(of_each_group) < WEB and all(rows[id]["score"] >= best[0] for id in ids(out, "coreset"))

    best = sorted(scores.values())[-int(0.1 * WEB) :]
    assert all(scores[id] >= best[0] for id in ids(out, "no-dedup"))

    groups = [row["component"] for row in ledger(out, "dedup-only") if row["verdict"] == "kept"]
    assert len(set(groups)) == len(groups) == BUDGET

    steps = sorted((choice(out, "windows") / "coreset" / "done").glob("step_*"))
    assert [json.loads(path.read_text())["label"] for path in steps] == [
        "cluster", "dedup", "score", "centroid", "budget",
    ]  # fmt: skip
    assert {row["verdict"] for row in ledger(out, "windows")} <= {"dedup", "score", "centroid", "kept"}


def test_the_random_draws_are_one_draw_so_that_levels_differ_by_their_rules(out: Path) -> None:
    """Pairs that two levels could both draw come in the same order in both."""
    good = {id for id, row in truth(out).items() if row["words"] == "fits" and row["copy"] == "new"}
    assert ids(out, "random") & good <= ids(out, "oracle")


def test_the_oracle_holds_no_bad_pair_and_what_is_said_of_each_choice_is_true(out: Path) -> None:
    told, known = results(out)["choices"]["choice"], truth(out)
    assert all(known[id]["words"] == "fits" and known[id]["copy"] == "new" for id in ids(out, "oracle"))
    assert (told["oracle"]["fits"], told["oracle"]["copies"], told["oracle"]["scenes"]) == (1.0, 0.0, BUDGET)
    assert told["random"]["fits"] == sum(known[id]["words"] == "fits" for id in ids(out, "random")) / BUDGET
    assert told["coreset"]["fits"] > told["random"]["fits"]
    assert len(by_truth(known, 10**6, 0)) == sum(r["words"] == "fits" and r["copy"] == "new" for r in known.values())


def test_contents_count_copies_by_scene() -> None:
    def pair(id: str) -> dict[str, Any]:
        return {"id": id, "conversations": [{"value": "say"}, {"value": "abcd"}]}

    known = {
        id: {"words": words, "source": source}
        for id, words, source in (("a", "fits", 1), ("b", "wrong", 1), ("c", "fits", 2), ("d", "dull", 3))
    }
    assert contents([pair(id) for id in "abcd"], known) == {
        "kept": 4, "fits": 0.5, "copies": 0.5, "scenes": 3, "characters": 4.0,
    }  # fmt: skip
    assert contents([], known) == {"kept": 0, "fits": None, "copies": None, "scenes": 0, "characters": None}


# --- the measures ---------------------------------------------------------------------------------------------------


def test_the_first_measure_is_the_score_and_each_can_be_claimed(out: Path) -> None:
    found = results(out)
    assert len(found["cells"]) == len(LEVELS)
    for cell in found["cells"]:
        assert cell["score"] == cell["measures"]["encoder"] and cell["measures"]["loss"] > 1 and not cell["tasks"]
    by_level = {cell["levels"]["choice"]: cell["measures"] for cell in found["cells"]}
    losses, score = found["claims"]
    assert losses["difference"]["mean"] == pytest.approx(by_level["oracle"]["loss"] - by_level["random"]["loss"])
    assert score["difference"]["mean"] == pytest.approx(by_level["oracle"]["encoder"] - by_level["random"]["encoder"])
    kinds = {path.name.split("-")[0] for path in out.glob("units/*-*")}
    assert kinds == {"draw", "embed", "choose", "teach", "loss", "encoder"}
    assert len(list(out.glob("units/teach-*"))) == len(LEVELS), "no stage that nothing is measured on"


def test_a_cell_has_no_loss_where_nothing_of_its_own_learned_from_the_pairs() -> None:
    def matrix(base: str) -> Matrix:
        levels = {"two": {}, "one": {"train": ["stages.align=null"]}}
        axes = {"stages": {"question": "?", "base": base, "levels": levels}}
        return Matrix.of(StudyRecipe(name="x", title="x", axes=axes, measures=("suite", "loss"), seeds=(0,)))

    two = matrix("two")
    base = base_cell(two.study, 0)
    assert set(two.measured[base]) == {"suite", "loss"}
    assert set(two.measured[base.at("stages", "one")]) == {"suite"}
    with pytest.raises(RecipeError, match=r"loss: cannot be taken of stages=one@0, which has not exactly one stage"):
        matrix("one")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("measures=[suite,suite]", "each only once"),
        ("measures=[suite,recall]", r"measures\.1"),
        ("world.captions=0", r"encoder, loss needs held-out captions; world\.captions is 0"),
        ("world=null", "is measured on the drawn world only"),
        ("axes.choice.levels.oracle.choose.oracle=0", "oracle"),
    ],
)
def test_measures_that_cannot_be_are_told(change: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read("bunny/selection", [*TINY, "claims=[]", "questions=x", change])


def test_recall_counts_neither_twins_nor_ties() -> None:
    captions = [f"c{place}" for place in range(12)]
    assert recall(np.eye(12), captions).mean == 1.0
    assert recall(np.ones((12, 12)), captions).mean == 0.0  # an encoder for which all is one finds nothing
    assert recall(np.ones((12, 12)), ["same"] * 12).mean == 1.0  # any of them is right
    shifted = np.eye(12)
    shifted[0, 1:6] = 2.0  # five texts before the first picture's own
    assert recall(shifted, captions).image_to_text == pytest.approx(11 / 12)
    assert recall(shifted, captions).text_to_image == 1.0
    shifted[0, 5] = 0.0  # four: it is the fifth
    assert recall(shifted, captions).image_to_text == 1.0


@pytest.mark.parametrize(("n", "batch"), [(40, 16), (10, 16), (32, 16)])
def test_a_pass_shows_each_pair_at_most_once_and_depends_on_its_step_alone(n: int, batch: int) -> None:
    size = min(n, batch)
    turn = np.concatenate([rows_of(step, n, batch, 3) for step in range(n // size)])
    assert len(set(turn.tolist())) == len(turn) == n // size * size
    assert np.array_equal(rows_of(5, n, batch, 3), rows_of(5, n, batch, 3))
    assert not np.array_equal(rows_of(n // size, n, batch, 3), rows_of(0, n, batch, 3))


def test_the_encoder_starts_from_random_weights_that_are_equal_for_all_choices_of_a_seed() -> None:
    import torch

    from leveret.model.encoders import load_encoder

    scorer: Any = load_encoder("world/scorer")
    state = torch.random.get_rng_state()
    one, same, other = (dict(fresh(seed).named_parameters()) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())  # nobody else's draws are moved
    taught = dict(scorer.module.named_parameters())
    assert one.keys() == taught.keys()
    for name, value in one.items():
        assert torch.equal(value, same[name])
        if value.ndim > 1:
            assert not torch.equal(value, other[name]) and not torch.equal(value, taught[name])


def test_the_held_out_loss_does_not_depend_on_how_captions_are_batched(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (told,) = [cell["measures"]["loss"] for cell in results(out)["cells"] if cell["levels"]["choice"] == "coreset"]
    unit = next(path for path in out.glob("units/loss-*/done.json") if json.loads(path.read_text())["value"] == told)
    model = out / "units" / json.loads(unit.read_text())["unit"]["inputs"]["model"] / "run" / "model"
    monkeypatch.setattr(loss, "CHUNK", 5)
    found = loss.held_out_loss(model, world(out) / "captions.json", world(out), 512, tmp_path / "cache")
    assert found["value"] == pytest.approx(told, rel=1e-5) and found["tokens"] > 24


def test_a_loss_above_one_is_told_whole() -> None:
    row = {"mean": 1.5, "low": 1.2, "high": 1.8}
    assert mean_in_words(row, share=False) == "1.500 (1.200 to 1.800)"
    assert mean_in_words({"mean": 0.9, "low": 0.7, "high": 1.1}) == "0.900 (0.700 to 1.000)"


# --- what is told ---------------------------------------------------------------------------------------------------


def test_intervals_are_students() -> None:
    found = t_interval([1.0, 2.0, 3.0])  # t(0.975, 2) = 4.302653 in every printed table
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    five = t_interval([0.5, 0.7, 0.6, 0.8, 0.4])  # t(0.975, 4) = 2.776445, s = 0.158114
    assert five.mean - five.low == pytest.approx(2.776445 * 0.158114 / 5**0.5, rel=1e-5)
    assert t_interval([0.3]).low is None
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


def test_differences_are_paired_by_seed() -> None:
    found = paired({0: 0.9, 1: 0.5, 7: 0.1}, {0: 0.8, 1: 0.3, 2: 0.0})
    assert found is not None and found["n"] == 2 and found["mean"] == pytest.approx(0.15)
    assert found["high"] - found["mean"] == pytest.approx(12.706205 * 0.0707107 / 2**0.5, rel=1e-5)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_seeds_that_are_alike_do_not_say_how_far_they_spread() -> None:
    """240 questions a kind may give the same difference twice by chance."""
    found = paired({0: 0.5, 1: 0.52}, {0: 0.49, 1: 0.51})
    assert found is not None and found["mean"] == pytest.approx(0.01) and found["n"] == 2
    assert found["low"] is found["high"] is found["p"] is None and verdict("higher", 0.01, found) == UNDECIDED
    nothing = paired({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5})
    assert nothing is not None and (nothing["low"], nothing["high"], nothing["p"]) == (0, 0, 1)
    # Of shares of questions the smallest step is known: a difference is told that no such step explains.
    seeds = dict.fromkeys((0, 1, 2), 0.01)
    small = paired(seeds, dict.fromkeys(seeds, 0.0), 1 / 200)
    assert small is not None and small["low"] < 0 < small["high"] and small["p"] > 0.05
    refused = paired(dict.fromkeys(seeds, 0.0), dict.fromkeys(seeds, 1.0), 1 / 200)
    assert refused is not None and verdict("lower", 0.01, refused) == AGREES and 0 < refused["p"] < 0.001
    assert refused["low"] == refused["mean"] == -1, "no share falls by more than all"
    assert refused["high"] - refused["mean"] == pytest.approx(4.302653 / 200 / 3**0.5, rel=1e-5)
    same = paired(seeds, seeds, 1 / 200)
    assert same is not None and same["p"] == 1.0
    assert same["high"] == -same["low"] == pytest.approx(refused["high"] + 1)
    assert verdict("same", 0.02, same) == AGREES and verdict("same", 0.01, same) == UNDECIDED


def test_the_step_of_a_figure_is_one_question_s() -> None:
    world = {"web": 200, "tune": 60, "test": 12, "captions": 4}
    one, other = (study(measures=names, world=world) for names in (["suite", "loss"], ["loss", "suite"]))
    found = {"tasks": {"colour": 0.5, "word": 0.5}, "n": {"colour": 100, "word": 50}, "measures": {"loss": 1.0}}
    figures = {base_cell(one, 0): found}
    steps = {("colour",): 0.01, ("score",): 0.01, ("colour", "word"): 0.01, ("loss",): 0, ("words",): 0}
    assert {by: step_of(one, figures, by) for by in steps} == pytest.approx(steps)
    assert step_of(other, figures, ("score",)) == 0, "there it is the loss"


def test_false_findings_among_shares_of_questions_are_rare() -> None:
    """Two models that are alike, near the end of the scale, where seeds often agree to the last digit."""
    rng = np.random.default_rng(5)
    for right in (0.999, 0.99, 0.9):
        ours, theirs = rng.binomial(200, right, (2, 4000, 3)) / 200
        found = [paired(dict(enumerate(a)), dict(enumerate(b)), 1 / 200) for a, b in zip(ours, theirs, strict=True)]
        wrong = np.mean([one is not None and not one["low"] <= 0 <= one["high"] for one in found])
        assert wrong < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 4000), right


def test_the_page_holds_every_choice_and_measure_and_loads_nothing(out: Path) -> None:
    from test_house_pages import Reader

    html = (out / "report.html").read_text("utf-8")
    text = Reader(html).text
    for name, level in tiny().axes["choice"].levels.items():
        assert html.count(f">{name}<") >= 3 and level.about in text
    assert "recall at 5 of held-out pairs" in text and "loss on held-out captions" in text
    assert html.count("data:image/") >= 5 * len(LEVELS) - 2 and "<script" not in html
    for cell in results(out)["cells"]:
        assert all(f"{value:.3f}" in text for value in cell["measures"].values())


def test_the_page_draws_in_a_browser(out: Path, chromium: Callable[..., Path]) -> None:
    from PIL import Image

    picture = Image.open(chromium(out / "report.html", "choices", height=5000))
    assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 200


# --- the quickstart's rounds ----------------------------------------------------------------------------------------


def test_the_quickstart_says_what_it_would_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["quickstart", "-o", str(tmp_path / "x"), "--full", "--dry-run", "study.seeds=[0,1]"]) == 0
    told = capsys.readouterr().out
    assert [told.index(question) for question, _ in quickstart.ROUNDS.values()] == sorted(
        told.index(question) for question, _ in quickstart.ROUNDS.values()
    )
    assert len(re.findall(r"bunny/selection: 16 models, seeds 0, 1", told)) == 3 and "4 models" in told
    assert not (tmp_path / "x").exists()
    assert command(["quickstart", "-o", str(tmp_path / "x"), "--dry-run", "study.seeds=[0]"]) == 2
    assert "only with --full" in capsys.readouterr().err
    assert command(["quickstart", "-o", str(tmp_path / "x"), "--full", "--dry-run", "study.seads=[0]"]) == 2
    assert "seads" in capsys.readouterr().err


def test_the_quickstart_runs_its_rounds_and_they_share_what_is_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[Path, StudyRecipe, Path]] = []
    monkeypatch.setattr("leveret.study.run", lambda study, place, units: ran.append((place, study, units)) or {})
    monkeypatch.setattr("leveret.study.page.say", lambda results, place: None)
    quickstart.compare(tmp_path, quickstart.studies(["seeds=[0]"]))
    assert [place for place, _, _ in ran] == [tmp_path / name for name in ("severe", "usual", "mild", "longer")]
    assert {units for _, _, units in ran} == {tmp_path / "units"} and all(one.seeds == (0,) for _, one, _ in ran)
    assert [one.measures for _, one, _ in ran] == [("suite", "loss", "encoder"), *2 * [("encoder",)], ("suite",)]
    strengths = [(one.world or {})["strength"] for _, one, _ in ran]
    assert strengths == ["severe", "usual", "mild", "severe"]
    first, last = (set(Matrix.of(ran[at][1]).units) for at in (0, 3))
    assert len(first & last) == 1 + 1 + 2 + 2, "the world, its embedding, two choices and what was aligned with them"
    assert "four times the tuning" in capsys.readouterr().err
