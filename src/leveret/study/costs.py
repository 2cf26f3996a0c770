"""What a study would cost, told before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leveret.study.runner import Folder
    from leveret.study.units import Unit

KINDS = 8
"""Kinds of question in the world suite."""
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
    """What a study would do (`runner.describe`), in lines. jobs: pieces of work at once, by default one a core."""
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


ALONE = 1.6
"""How much longer a unit takes on one core than a step of the quickstart on two."""


def unit_seconds(units: Mapping[str, Unit], folder: Folder) -> dict[str, float]:
    """About how long each unit of a study takes: as those of its kind and size took that are done in the folder, else
    as the quickstart's steps do."""
    measured: dict[str, list[float]] = {}
    guesses = {id: ALONE * _guess(unit) for id, unit in units.items()}
    for id, unit in units.items():
        if (facts := folder.facts(id)) is not None:
            measured.setdefault(sort_of(unit), []).append(float(facts["seconds"]) / guesses[id])
    return {id: guesses[id] * median(measured.get(sort_of(unit), [1.0])) for id, unit in units.items()}


def sort_of(unit: Unit) -> str:
    """Units of one sort take about as long as each other, for their size."""
    return f"{unit.kind} {unit.what}" if unit.kind == "teach" else unit.kind


def _guess(unit: Unit) -> float:
    """Of the drawn world's sizes; elsewhere a word only, until the first of its kind is done."""
    from leveret.train.stages import StageRecipe
    from leveret.world.write import WorldSize

    settings = unit.settings
    if unit.kind == "draw":
        size = WorldSize(**settings["size"])
        return float((size.web + size.tune + 20 * size.test) * DRAW)
    if unit.kind == "teach":
        how = StageRecipe.model_validate(settings["how"])
        deep = "language" in how.learn or "vision" in how.learn
        return float((how.steps or 1000) * how.batch * (TUNE if deep else ALIGN))
    if unit.kind == "examine":
        return float(KINDS * (settings["n"] or 1000) * (2 if settings["blind"] else 1) * ASK)
    if unit.kind == "encoder":
        return float(settings["steps"] * settings["batch"] * ENCODE)
    return {"embed": 75_000 * EMBED, "choose": CHOOSE}.get(unit.kind, 2.0)
