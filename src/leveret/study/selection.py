"""Does choosing data pay? The same budget chosen in several ways from one drawn web, and what each choice teaches.

in each round, for each strength and seed:  draw the world -> embed its web once
    for each arm:                           choose the budget
        for each measure:                   teach, examine -> a cell

OUT/done/CELL.json     every figure, as soon as it is known; never made twice
OUT/worlds/            what the cells are made from; each station in it can be stopped and continued
OUT/results.json       all figures, differences with intervals, and the verdict in words
OUT/report.html        the same to look at
"""

from __future__ import annotations

import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

from leveret.runs import (
    Interrupted,
    RecipeError,
    RunFolder,
    differences,
    graceful_stop,
    read_json,
    sha256_of,
    stop_requested,
    write_json,
)
from leveret.study.arms import ARMS, choose, contents, keep_some, recipe_of
from leveret.study.findings import gather
from leveret.study.measures import MEASURES, train_recipe
from leveret.study.plan import Cell, Plan
from leveret.study.site import SCORER, Site

KIND = "study selection"


def compare(out: str | Path, plan: Plan | None = None, *, keep: bool = True) -> dict[str, Any]:
    """Runs what is missing of a plan in the folder `out`, or continues; returns what is in `out/results.json`.

    keep  False removes a world's pictures and embeddings when its last wanted cell is done. A plan that grows later
          draws them again, the same to the byte.

    A folder holds one kind of cell: another plan may ask for other seeds, strengths, arms, measures or lengths, and
    results.json then holds the old and the new. Everything else (`Plan.fixed`, the recipes, the shipped weights) must
    be what the folder was begun with.

    Raises RecipeError (the folder was made otherwise; the text names every difference), DataError, Interrupted (after
    SIGTERM or Ctrl-C; the same call continues) and EnvironmentFault.
    """
    plan = plan or Plan()
    folder = RunFolder.open(out, KIND, _settings(plan))
    _check_arms(folder, plan)
    cells = plan.cells()
    last = {(cell.strength, cell.seed): cell for cell in cells}
    with graceful_stop():
        for question, asked in plan.rounds().items():
            if not all(folder.is_done(cell.name) for cell in asked):
                print(f"{question}: {len(asked)} figures", file=sys.stderr, flush=True)
            for (strength, seed), own in groupby(asked, key=lambda cell: (cell.strength, cell.seed)):
                site = Site(folder.path / "worlds" / f"{strength}-{seed}", strength, seed, plan.size(strength))
                for cell in own:
                    if not folder.is_done(cell.name):
                        _run(folder, site, plan, cell)
                        _say_progress(folder, cells, cell)
                        _publish(folder, cells)
                    if cell == last[strength, seed] and not keep:
                        site.clear()
                _publish(folder, cells, page=True)
        results = _publish(folder, cells, page=True)
    from leveret.study.selection_report import say

    say(results, folder.path)
    return results


def describe(plan: Plan | None = None, out: str | Path | None = None) -> str:
    """What `compare` would do, in words: the cells, what they share, and about how many minutes it takes.

    out  a folder begun before; what is done there is not counted again. Nothing is written.
    """
    from leveret.study.costs import outline

    done = {path.stem for path in (Path(out) / "done").glob("*.json")} if out is not None else set()
    return outline(plan or Plan(), done)


def _settings(plan: Plan) -> dict[str, Any]:
    """Everything that all figures of a folder depend on."""
    from leveret.condense.pipeline import RULES
    from leveret.model.encoders import load_encoder
    from leveret.train.stages import binding
    from leveret.world import write
    from leveret.world.backbones import shipped
    from leveret.world.captions import STRENGTHS

    weights = Path(write.__file__).parent / "weights"
    taught = {path.name: sha256_of(path) for path in shipped(weights) if path.stem != "scorer"}
    return {
        "plan": plan.fixed(),
        "diseases": STRENGTHS,
        "train": binding(train_recipe(plan).model_dump(mode="json")),
        "versions": {"world": write.VERSION, "condense": RULES},
        "scorer": load_encoder(SCORER).fingerprint,
        "backbones": sha256_of(taught),
    }


def _check_arms(folder: RunFolder, plan: Plan) -> None:
    """A finished choice stands only while its arm's recipe does."""
    for path in sorted((folder.path / "done").glob("*.json")):
        facts = read_json(path)
        if "recipe" not in facts:
            continue
        name = facts["arm"]
        if name not in ARMS:
            raise RecipeError(f"{folder.path} holds the arm {name!r}, which is no more; allowed are {', '.join(ARMS)}")
        if lines := differences(facts["recipe"], recipe_of(name, plan.budget)):
            shown = "".join(f"\n  {line}" for line in lines[:20])
            raise RecipeError(
                f"{folder.path}: the arm {name!r} was chosen by another recipe:{shown}\n"
                "Name another folder with -o, delete this one, or give the old recipe back to go on with it."
            )


# --- one cell ------------------------------------------------------------------------------------------------------


def _run(folder: RunFolder, site: Site, plan: Plan, cell: Cell) -> None:
    """Makes one cell and remembers it. What it stands on is made first, and timed apart."""
    if stop_requested():
        raise Interrupted(f"stopped as asked before {cell.name}; the same command goes on from there")
    _ready(folder, site)
    pairs = _chosen(folder, site, plan, cell.arm)
    began = time.perf_counter()
    figures = MEASURES[cell.measure].run(site, plan, cell, pairs)
    spent = round(time.perf_counter() - began, 1)
    place = {"strength": cell.strength, "seed": cell.seed, "arm": cell.arm, "measure": cell.measure}
    folder.done(cell.name, **place, length=cell.length, **figures, seconds=spent)


def _ready(folder: RunFolder, site: Site) -> None:
    """The drawn world, and its web embedded before the first choice."""
    name = f"{site.strength}-{site.seed}"
    began = time.perf_counter()
    site.draw()
    if folder.is_done(name):
        return  # after `clear`, what is embedded is made again only where something must be chosen
    drawn = time.perf_counter()
    site.embed()
    seconds = {"draw": round(drawn - began, 1), "embed": round(time.perf_counter() - drawn, 1)}
    folder.done(name, strength=site.strength, seed=site.seed, seconds=seconds)


def _chosen(folder: RunFolder, site: Site, plan: Plan, arm: str) -> Path:
    """The arm's pairs, and a note of what they are."""
    name = f"{site.strength}-{site.seed}-{arm}"
    began = time.perf_counter()
    pairs = choose(site, arm, plan.budget)
    if not folder.is_done(name):
        records = read_json(pairs)
        place = {"strength": site.strength, "seed": site.seed, "arm": arm, "recipe": recipe_of(arm, plan.budget)}
        found = contents(records, site.truth)
        shown = keep_some(site, arm, records)
        spent = round(time.perf_counter() - began, 1)
        folder.done(name, **place, budget=plan.budget, **found, shown=shown, seconds=spent)
    return pairs


# --- what is told --------------------------------------------------------------------------------------------------


def _publish(folder: RunFolder, cells: list[Cell], *, page: bool = False) -> dict[str, Any]:
    """Writes results.json, and the page where asked."""
    results = gather(folder.path / "done", [cell.name for cell in cells])
    write_json(folder.path / "results.json", results)
    if page:
        from leveret.study.selection_report import write_page

        write_page(folder.path, results)
    return results


def _say_progress(folder: RunFolder, cells: list[Cell], cell: Cell) -> None:
    done = sum(folder.is_done(other.name) for other in cells)
    facts = folder.facts(cell.name)
    value = "nothing to measure" if facts["value"] is None else f"{facts['value']:.3f}"
    print(f"{done} of {len(cells)}: {cell.name} {value} ({facts['seconds']:.0f} s)", file=sys.stderr, flush=True)
