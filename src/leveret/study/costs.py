"""What a comparison would cost, told before it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from statistics import median
from typing import TYPE_CHECKING

from leveret.study.measures import MEASURES, train_recipe
from leveret.study.plan import Cell, Plan

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

PICTURE, LEARNED = 4.5e-6, 0.03
"""Gigabytes of disk a picture takes, and all that is taught with one arm."""


def seconds(plan: Plan, cells: Collection[Cell]) -> dict[str, float]:
    """About how long each part of these cells takes, by name."""
    stages = train_recipe(plan).stages
    align = (stages["align"].steps or 0) * stages["align"].batch * ALIGN
    tune = (stages["tune"].steps or 0) * stages["tune"].batch * TUNE
    worlds = {(cell.strength, cell.seed) for cell in cells}
    choices = {(cell.strength, cell.seed, cell.arm) for cell in cells}
    trained = {(cell.strength, cell.seed, cell.arm) for cell in cells if MEASURES[cell.measure].stages}
    tunings = [cell.length for cell in cells if MEASURES[cell.measure].tunes]
    return {
        "draw": len(worlds) * (plan.web + plan.tune) * DRAW,
        "embed": len(worlds) * plan.web * EMBED,
        "choose": len(choices) * CHOOSE,
        "encoder": sum(cell.measure == "encoder" for cell in cells) * plan.encoder_steps * plan.encoder_batch * ENCODE,
        "align": len(trained) * align,
        "tune": sum(tunings) * tune,
        "examine": len(tunings) * KINDS * plan.test * ASK,
    }


def minutes(seconds: float) -> str:
    """A time for people, who plan with no finer ones."""
    return f"about {seconds / 60:.0f} min" if seconds >= 60 else "less than a minute"


def outline(plan: Plan, done: Collection[str] = ()) -> str:
    """The cells of a plan, what they share, and about how many minutes those that are not `done` take."""
    cells = plan.cells()
    left = [cell for cell in cells if cell.name not in done]
    worlds = {(cell.strength, cell.seed) for cell in left}
    told = [
        f"{len(cells)} cells, {len(cells) - len(left)} of them done: {len(plan.strengths)} strengths "
        f"({', '.join(plan.strengths)}) x {len(plan.seeds)} seeds ({', '.join(map(str, plan.seeds))}) x "
        f"{len(plan.arms)} arms ({', '.join(plan.arms)}), in rounds; stopped after any, it is a whole comparison:",
        *_rounds(plan, left),
        f"Shared: {len(worlds)} worlds of {plan.web:,} pairs are drawn and embedded once for all arms; "
        f"each arm's {plan.budget:,} pairs are chosen once for all measures, and aligned on once for loss and suite.",
    ]
    parts = seconds(plan, left)
    each = ", ".join(f"{name} {value / 60:.0f}" for name, value in parts.items() if value >= 30)
    room = len(worlds) * ((plan.web + plan.tune) * PICTURE + len(plan.arms) * LEARNED)
    whole = minutes(sum(parts.values()))
    told.append(f"{whole[0].upper()}{whole[1:]} on 2 quiet cores{f' ({each})' if each else ''}.")
    told.append(f"About {room:.1f} GB of disk while it runs.")
    return "\n".join(told)


def _rounds(plan: Plan, left: Collection[Cell]) -> list[str]:
    """Each round's question, cells, and minutes of what is left: what an earlier round makes is not made again."""
    lines, before, spent = [], list[Cell](), 0.0
    names = {cell.name for cell in left}
    for question, cells in plan.rounds().items():
        before += [cell for cell in cells if cell.name in names]
        total = sum(seconds(plan, before).values())
        lines += [f"{question}: {minutes(total - spent)}", *_measures(cells)]
        spent = total
    return lines


def _measures(cells: Collection[Cell]) -> list[str]:
    counts = Counter((cell.measure, cell.length) for cell in cells)
    lines = []
    for (measure, length), count in counts.items():
        own = [cell for cell in cells if (cell.measure, cell.length) == (measure, length)]
        arms, strengths = (dict.fromkeys(getattr(cell, name) for cell in own) for name in ("arm", "strength"))
        longer = f" at {length} x the recipe's tune steps" if length else ""
        lines.append(f"  {measure}{longer}: {count} cells; {', '.join(strengths)}; {', '.join(arms)}")
    return lines


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
    return {"embed": 75_000 * EMBED, "choose": CHOOSE}.get(unit.kind, 2.0)
