"""What a study would cost, told before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from leveret.runs import cores
from leveret.study.matrix import Folder, Matrix

if TYPE_CHECKING:
    from leveret.study.units import Unit, Units
    from leveret.world.write import WorldSize

DRAW, EMBED = 1 / 2_800, 1 / 2_450
CHOOSE = 5.0
ENCODE = 0.7e-3
ALIGN, TUNE = 3.8e-3, 12.7e-3
ASK = 2.2e-3
"""Seconds a picture drawn, a pair embedded, a choice, a pair the encoder learns from, a sample aligned on or tuned on,
a question: the quickstart's times on two quiet cores of a 2024 server (two processes), one core for the encoder."""


def minutes(seconds: float) -> str:
    """A time for people, who plan with no finer ones."""
    return f"about {seconds / 60:.0f} min" if seconds >= 60 else "less than a minute"


def outline(facts: Mapping[str, Any], jobs: int | None = None) -> str:
    """What a study would do (`describe`), in lines. jobs: pieces of work at once, by default one a core."""
    lines = [f"{facts['study']}: {len(facts['cells'])} models, seeds {', '.join(map(str, facts['seeds']))}"]
    lines += [f"  {name}: {', '.join(levels)}" for name, levels in facts["axes"].items()]
    for kind, row in facts["kinds"].items():
        shared = f", shared: {row['alone']} without" if row["alone"] > row["units"] else ""
        done = f", {row['done']} done" if row["done"] else ""
        told = facts["timed"] and row["done"] < row["units"]
        left = f"; {minutes(row['seconds'])} of one core" if told else ""
        lines.append(f"  {kind:<9}{row['units']:>4}{shared}{done}{left}")
    at_once = jobs or facts["cores"]
    if not facts["timed"]:
        return "\n".join([*lines, "how long that takes is told here when one piece of each kind is done"])
    lines.append(
        f"{minutes(facts['seconds'] / at_once)}, {at_once} at once "
        f"({minutes(facts['without_sharing'] / at_once)} if nothing were shared nor done)"
    )
    return "\n".join(lines)


def describe(matrix: Matrix, out: str | Path, units: str | Path | None = None) -> dict[str, Any]:
    """What `run` would do: the cells, the units, what is shared and done, and about how long it takes (`timed`:
    whether that was measured, on the drawn world or in this folder). Refuses what `run` would refuse before it begins,
    with its RecipeError, and writes nothing."""
    folder = Folder(Path(out), None if units is None else Path(units))
    folder.check(matrix.study)
    matrix.check()
    users, order = matrix.users(), matrix.order()
    done = {id for id in order if folder.is_done(id)} - matrix.wanted(folder)
    costs = unit_seconds(matrix.units, folder)
    kinds: dict[str, dict[str, Any]] = {}
    for id in order:
        row = kinds.setdefault(matrix.units[id].kind, {"units": 0, "done": 0, "alone": 0, "seconds": 0.0})
        row["units"] += 1
        row["alone"] += users[id]
        row["done"] += id in done
        row["seconds"] += 0.0 if id in done else costs[id]
    left = sum(row["seconds"] for row in kinds.values())
    measured = {sort_of(matrix.units[id]) for id in done}
    timed = matrix.study.world is not None or all(sort_of(unit) in measured for unit in matrix.units.values())
    apart = sum(costs[id] * users[id] for id in order)
    return {
        "study": matrix.study.name,
        "cells": [cell.name for cell in matrix.measured],
        "axes": {name: list(axis.levels) for name, axis in matrix.study.axes.items()},
        "seeds": list(matrix.study.seeds),
        "kinds": kinds,
        "seconds": round(left),
        "without_sharing": round(apart),
        "timed": timed,
        "cores": cores(),
    }


ALONE = 1.6
"""How much longer a unit takes on one core than a step of the quickstart on two."""


def unit_seconds(units: Units, folder: Folder) -> dict[str, float]:
    """About how long each unit of a study takes: as those of its kind and size took that are done in the folder, else
    as the quickstart's steps do."""
    measured: dict[str, list[float]] = {}
    guesses = {id: ALONE * _guess(units, unit) for id, unit in units.items()}
    for id, unit in units.items():
        if (facts := folder.facts(id)) is not None:
            measured.setdefault(sort_of(unit), []).append(float(facts["seconds"]) / guesses[id])
    return {id: guesses[id] * median(measured.get(sort_of(unit), [1.0])) for id, unit in units.items()}


def sort_of(unit: Unit) -> str:
    """Units of one sort take about as long as each other, for their size."""
    return f"{unit.kind} {unit.what}" if unit.kind == "teach" else unit.kind


def _guess(units: Units, unit: Unit) -> float:
    """Of the drawn world's sizes; elsewhere a word only, until the first of its kind is done."""
    from leveret.train.stages import StageRecipe
    from leveret.world.write import WorldSize

    settings = unit.settings
    world = unit if unit.kind == "draw" else units.get(unit.inputs.get("world", ""))
    size = WorldSize(**world.settings["size"]) if world else WorldSize()
    if unit.kind == "draw":
        return float((size.web + size.tune + 20 * size.test) * DRAW)
    if unit.kind == "embed":
        return size.web * EMBED
    if unit.kind == "teach":
        how = StageRecipe.model_validate(settings["how"])
        deep = "language" in how.learn or "vision" in how.learn
        return float((how.steps or 1000) * how.batch * (TUNE if deep else ALIGN))
    if unit.kind == "examine":
        return float(_questions(settings, size) * (2 if settings["blind"] else 1) * ASK)
    if unit.kind == "encoder":
        return float(settings["steps"] * settings["batch"] * ENCODE) / ALONE  # which is measured on one core
    return CHOOSE if unit.kind == "choose" else 2.0


def _questions(settings: Mapping[str, Any], size: WorldSize) -> int:
    """How many questions an examination asks, of benchmarks as if they were of the drawn world."""
    from leveret.evaluate.tasks import asked
    from leveret.world.examination import MORE

    most = settings["n"] or 10**9
    return sum(min(most, size.harder if row.id in MORE else size.test) for row, _ in asked(settings["suite"]))
