"""Does choosing data pay: arms hold what they say, figures are made once, intervals are right, the page is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from leveret.runs import Interrupted, RecipeError, write_json
from leveret.study import Plan, compare, describe, measures
from leveret.study.arms import ARMS, METHODS, contents
from leveret.study.encoder import fresh, recall, rows_of
from leveret.study.findings import gather
from leveret.study.paired import difference, t_interval
from leveret.study.selection_report import write_page

SEED, BUDGET = 0, 20
TINY = Plan(
    seeds=(SEED,), strengths=("usual",), measures=("encoder", "loss"), lengths=(2,), web=300, tune=16, test=6,
    captions=24, budget=BUDGET, encoder_steps=6, encoder_batch=16, align_steps=3, tune_steps=1, ranks=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of all arms, never interrupted."""
    folder = tmp_path_factory.mktemp("study") / "out"
    compare(folder, TINY)
    return folder


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def values(out: Path) -> dict[tuple[str, ...], float]:
    """Every figure by what it is of."""
    keys = ("strength", "seed", "arm", "measure", "length")
    return {tuple(row[key] for key in keys): row["value"] for row in results(out)["cells"]}


def arm(out: Path, name: str) -> Path:
    return out / "worlds" / f"usual-{SEED}" / "arms" / name


def pairs(out: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((arm(out, name) / "pairs.json").read_text())


def ids(out: Path, name: str) -> set[str]:
    return {pair["id"] for pair in pairs(out, name)}


def ledger(out: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(arm(out, name) / "choice" / "ledger").to_pylist()


def truth(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "worlds" / f"usual-{SEED}" / "world" / "web_truth.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


# --- the arms -------------------------------------------------------------------------------------------------------


def test_every_arm_holds_the_budget_in_the_webs_own_records(out: Path) -> None:
    web = json.loads((out / "worlds" / f"usual-{SEED}" / "world" / "web.json").read_text())
    known = {record["id"]: record for record in web}
    for row in results(out)["arms"]:
        chosen = pairs(out, row["arm"])
        assert [known[pair["id"]] for pair in chosen] == chosen and row["kept"] == len(chosen) == len(
            ids(out, row["arm"])
        )
        if row["arm"] != "windows":
            assert len(chosen) == BUDGET
    kept = {row["arm"]: row["kept"] for row in results(out)["arms"]}
    assert set(kept) == set(ARMS) and 0 < kept["windows"] < BUDGET
    assert f"windows left {kept['windows']} of {BUDGET} pairs" in (out / "report.html").read_text()


def test_every_arm_chooses_as_it_says(out: Path) -> None:
    scores = {row["id"]: row["score"] for row in ledger(out, "random")}
    assert ids(out, "score-only") == set(sorted(scores, key=scores.__getitem__)[-BUDGET:])

    rows = {row["id"]: row for row in ledger(out, "coreset")}
    of_each_group = [row for row in rows.values() if row["verdict"] != "dedup"]
    best = sorted(row["score"] for row in of_each_group)[-int(0.3 * len(of_each_group)) :]
    assert len(of_each_group) < TINY.web and all(rows[id]["score"] >= best[0] for id in ids(out, "coreset"))

    best = sorted(scores.values())[-int(0.1 * TINY.web) :]
    assert all(scores[id] >= best[0] for id in ids(out, "no-dedup"))

    groups = [row["component"] for row in ledger(out, "dedup-only") if row["verdict"] == "kept"]
    assert len(set(groups)) == len(groups) == BUDGET

    labels = [
        json.loads(path.read_text())["label"]
        for path in sorted((arm(out, "windows") / "choice" / "done").glob("step_*"))
    ]
    assert labels == ["cluster", "dedup", "score", "centroid", "budget"]
    assert {row["verdict"] for row in ledger(out, "windows")} <= {"dedup", "score", "centroid", "kept"}


def test_the_random_draws_are_one_draw_so_that_arms_differ_by_their_rules(out: Path) -> None:
    """Pairs that two arms could both draw come in the same order in both."""
    good = {id for id, row in truth(out).items() if row["words"] == "fits" and row["copy"] == "new"}
    assert ids(out, "random") & good <= ids(out, "oracle")


def test_the_oracle_holds_no_bad_pair_and_what_is_said_of_each_choice_is_true(out: Path) -> None:
    told = {row["arm"]: row for row in results(out)["arms"]}
    known = truth(out)
    assert all(known[id]["words"] == "fits" and known[id]["copy"] == "new" for id in ids(out, "oracle"))
    assert told["oracle"]["fits"] == 1.0 and told["oracle"]["copies"] == 0.0 and told["oracle"]["scenes"] == BUDGET
    assert told["random"]["fits"] == sum(known[id]["words"] == "fits" for id in ids(out, "random")) / BUDGET
    assert told["coreset"]["fits"] > told["random"]["fits"] and "oracle" not in METHODS


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


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_continued_it_redoes_nothing_and_ends_with_the_same_figures(out: Path, tmp_path: Path) -> None:
    plan = replace(TINY, arms=("coreset", "random"))
    killed = tmp_path / "out"
    fields = {name: getattr(plan, name) for name in Plan.__dataclass_fields__}
    code = f"from leveret.study import Plan, compare; compare({str(killed)!r}, Plan(**{fields!r}))"
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    cells = [killed / "done" / f"{cell.name}.json" for cell in plan.cells()]
    while sum(cell.exists() for cell in cells) < 2:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in cells if path.exists()}
    assert 2 <= len(before) < len(cells)

    compare(killed, plan)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = values(killed)
    assert len(found) == len(cells) and found == {key: value for key, value in values(out).items() if key in found}
    assert results(killed)["missing"] == []


def test_a_finished_comparison_measures_nothing_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> dict[str, Any]:
        raise AssertionError("this cell is done")

    before = results(out)
    for name, row in measures.MEASURES.items():
        monkeypatch.setitem(measures.MEASURES, name, replace(row, run=never))
    assert compare(out, TINY) == before == results(out)


def test_a_plan_may_grow_and_what_is_large_may_go(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = values(out)
    run = measures.MEASURES["suite"].run
    calls: list[str] = []

    def counted(site: Any, plan: Plan, cell: Any, chosen: Path) -> dict[str, Any]:
        calls.append(cell.name)
        return run(site, plan, cell, chosen)

    monkeypatch.setitem(measures.MEASURES, "suite", replace(measures.MEASURES["suite"], run=counted))
    grown = replace(TINY, measures=("suite",), arms=("coreset", "random"))
    compare(out, grown, keep=False)
    assert calls == ["usual-0-coreset-suite-x2", "usual-0-random-suite-x2"]
    after = values(out)
    assert {key: after[key] for key in before} == before and len(after) == len(before) + 2
    suite = [row for row in results(out)["cells"] if row["measure"] == "suite"]
    assert all(len(row["tasks"]) == 8 and row["value"] == sum(row["tasks"].values()) / 8 for row in suite)
    align, tuned = arm(out, "coreset") / "align" / "align", arm(out, "coreset") / "tune-x2"
    assert (align / "model" / "model.safetensors").read_bytes() == (
        tuned / "align/model/model.safetensors"
    ).read_bytes()
    assert json.loads((tuned / "tune" / "done").read_text())["steps"] == 2  # twice the plan's single step
    site = out / "worlds" / f"usual-{SEED}"
    assert not (site / "world").exists() and not (site / "embeddings").exists()

    # Once more, with all of it gone: nothing is drawn for a plan that is done; a new length draws again.
    compare(out, grown)
    assert not (site / "world").exists()
    compare(out, replace(grown, lengths=(3,), long_arms=("random",)))
    assert calls[2:] == ["usual-0-random-suite-x3"] and (site / "world").exists()


def test_another_plan_or_another_recipe_is_refused_by_name(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"plan\.budget: 20 there, 41 now"):
        compare(out, replace(TINY, budget=41))
    with pytest.raises(RecipeError, match=r"train\.stages\.align\.steps: 3 there, 4 now"):
        compare(out, replace(TINY, align_steps=4))
    other = replace(ARMS["coreset"], overrides=(*ARMS["coreset"].overrides, "steps.dedup.threshold=0.5"))
    monkeypatch.setitem(ARMS, "coreset", other)
    with pytest.raises(RecipeError, match=r"'coreset' was chosen by another recipe:\n  steps\.dedup\.threshold"):
        compare(out, TINY)


def test_a_stop_is_heard_between_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.study.selection.stop_requested", lambda: True)
    with pytest.raises(Interrupted, match="usual-0-coreset-encoder; the same command"):
        compare(tmp_path / "out", TINY)
    assert not (tmp_path / "out" / "worlds").exists()


# --- the plan -------------------------------------------------------------------------------------------------------


def test_all_faults_of_a_plan_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as fault:
        Plan(arms=("coreset", "randon"), strengths=("usual", "usual"), seeds=(), web=0, lengths=(1, -4))
    for words in ("arms=randon: allowed are coreset, random", "did you mean random", "'random' must be one of them",
                  "strengths=usual,usual: each only once", "seeds: give at least one", "web=0: a whole number",
                  "lengths=-4"):  # fmt: skip
        assert words in str(fault.value)
    with pytest.raises(RecipeError, match="budget=500: more than the web holds"):
        Plan(web=400, budget=500)


def test_the_first_round_is_a_whole_comparison_and_no_cell_is_lost() -> None:
    plan = Plan()
    rounds = plan.rounds()
    pays, *_, longer = rounds.values()
    assert {cell.arm for cell in pays if cell.measure == "suite"} == {"coreset", "random"}
    assert {cell.arm for cell in pays if cell.measure == "encoder"} == set(ARMS)
    assert {cell.seed for cell in pays} == set(plan.seeds) and {cell.strength for cell in pays} == {"usual"}
    assert {cell.length for cell in longer} == {4}
    names = [cell.name for cell in plan.cells()]
    assert len(set(names)) == len(names) == sum(map(len, rounds.values()))
    dear = [cell for cell in plan.cells() if cell.measure != "encoder"]
    assert {cell.strength for cell in dear} == {"usual"}
    assert list(replace(plan, measures=("encoder",), strengths=("usual",)).rounds()) == ["does choosing pay"]


def test_what_a_plan_would_do_is_told_and_nothing_is_written(out: Path, tmp_path: Path) -> None:
    told = describe()
    assert told.startswith("111 cells, 0 of them done") and "9 worlds of 75,000 pairs" in told
    assert "suite at 4 x the recipe's tune steps: 6 cells; usual; coreset, random" in told and "min on 2" in told
    shares = [int(line.split()[-2]) for line in told.splitlines() if line.endswith("min")]
    whole = int(told.split(" min on 2")[0].split()[-1])
    assert len(shares) == 4 and abs(sum(shares) - whole) <= 2
    assert describe(TINY, out).startswith("14 cells, 14 of them done")
    assert describe(TINY, tmp_path / "none").startswith("14 cells, 0 of them done")
    assert not (tmp_path / "none").exists()


# --- the measures ---------------------------------------------------------------------------------------------------


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


def test_the_encoder_starts_from_random_weights_that_are_equal_for_all_arms_of_a_seed() -> None:
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
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leveret.study.site import Site

    site = Site(out / "worlds" / f"usual-{SEED}", "usual", SEED, TINY.size("usual"))
    site.draw()
    expected = values(out)["usual", SEED, "coreset", "loss", 0]
    monkeypatch.setattr(measures, "CHUNK", 5)
    found = measures.held_out_loss(arm(out, "coreset") / "align" / "model", site, 512)
    assert found["value"] == pytest.approx(expected, rel=1e-5) and found["tokens"] > 24


# --- what is told ---------------------------------------------------------------------------------------------------


def test_intervals_are_students() -> None:
    found = t_interval([1.0, 2.0, 3.0])  # t(0.975, 2) = 4.302653 in every printed table
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6) and found.sign == 0
    five = t_interval([0.5, 0.7, 0.6, 0.8, 0.4])  # t(0.975, 4) = 2.776445, s = 0.158114
    assert five.mean - five.low == pytest.approx(2.776445 * 0.158114 / 5**0.5, rel=1e-5) and five.sign == 1
    assert t_interval([0.3]).low is None and t_interval([0.3]).sign == 0
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


def test_differences_are_paired_by_seed() -> None:
    found = difference({0: 0.9, 1: 0.5, 7: 0.1}, {0: 0.8, 1: 0.3, 2: 0.0})
    assert found is not None and found.n == 2 and found.mean == pytest.approx(0.15)
    assert found.high - found.mean == pytest.approx(12.706205 * 0.0707107 / 2**0.5, rel=1e-5)
    assert difference({0: 1.0}, {1: 1.0}) is None


def fabricated(folder: Path, figures: dict[tuple[str, str], list[float | None]]) -> dict[str, Any]:
    """Results of made-up cells: (strength, arm) -> one loss a seed."""
    for (strength, name), column in figures.items():
        for seed, value in enumerate(column):
            place = {"strength": strength, "seed": seed, "arm": name, "measure": "loss", "length": 0}
            step = f"{strength}-{seed}-{name}-loss"
            write_json(folder / f"{step}.json", {"step": step, **place, "value": value, "seconds": 1.0})
    return gather(folder, ["usual-0-random-loss", "usual-9-random-loss"])


def test_the_verdict_says_what_the_figures_say_also_where_another_arm_wins(tmp_path: Path) -> None:
    found = fabricated(
        tmp_path / "done",
        {
            ("usual", "random"): [2.0, 2.1, 2.2],
            ("usual", "coreset"): [1.0, 1.11, 1.2],
            ("usual", "no-dedup"): [1.4, 1.51, 1.6],
            ("usual", "score-only"): [1.5, 1.6, 1.71],
            ("usual", "oracle"): [0.5, 0.5, 0.5],
            ("usual", "windows"): [None, None, None],
            ("severe", "random"): [2.0, 2.1, 2.2],
            ("severe", "coreset"): [2.5, 2.61, 2.7],
            ("severe", "no-dedup"): [2.4, 2.5, 2.61],
            ("severe", "score-only"): [1.5, 1.6, 1.71],
        },
    )
    assert found["missing"] == ["usual-9-random-loss"]
    first, second, usual, severe, copies = found["verdict"]
    assert "better side of zero in 1 of 2 comparisons, wholly on the worse in 1." in first
    assert second == "Another method has the best mean in 1 of 2: score-only (loss, severe)."
    assert usual.startswith("loss, usual: coreset is the best method (1.103); coreset minus random -0.997 [")
    assert usual.endswith("better over 3 seeds.")
    assert severe.startswith("loss, severe: score-only is the best method (1.603), coreset has 2.603; ")
    assert severe.endswith("worse over 3 seeds.")
    assert copies.startswith("coreset minus no-dedup, loss: usual -0.400 [") and "(worse over 3 seeds)" in copies
    row = next(row for row in found["comparisons"] if row["arm"] == "windows")
    assert row["mean"] is None and row["to_random"] is None
    write_page(tmp_path, found)
    assert "1 still missing" in (tmp_path / "report.html").read_text()


def test_a_folder_with_nothing_in_it_yet_is_told_too(tmp_path: Path) -> None:
    found = fabricated(tmp_path / "done", {})
    assert found["verdict"] == [] and len(found["missing"]) == 2
    write_page(tmp_path, found)
    assert "No comparison is finished yet." in (tmp_path / "report.html").read_text()


def test_the_page_holds_every_arm_and_measure_and_loads_nothing(out: Path) -> None:
    from test_house_pages import Reader

    html = (out / "report.html").read_text("utf-8")
    text = Reader(html).text
    for name, row in ARMS.items():
        assert html.count(f">{name}<") >= 3 and row.about in text
    for measure in ("encoder", "loss"):
        assert measures.MEASURES[measure].title in text
    for sentence in results(out)["verdict"]:
        assert sentence in text
    assert html.count("data:image/") >= 25 and "<script" not in html
    for key, value in values(out).items():
        if key[3] in ("encoder", "loss"):
            assert f"{value:.3f}" in text


def test_the_page_draws_in_a_browser(out: Path, chromium: Callable[..., Path]) -> None:
    from PIL import Image

    picture = Image.open(chromium(out / "report.html", "selection", height=5000))
    assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 200


def test_the_terminal_gets_every_arm_in_eighty_columns(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from leveret.study.selection_report import say

    say(results(out), out)
    said = capsys.readouterr().out
    header = next(line for line in said.splitlines() if "coreset" in line and "oracle" in line)
    assert all(name in header for name in ARMS) and len(header.rstrip()) <= 80
    assert "encoder, usual" in said and "report.html" in said
