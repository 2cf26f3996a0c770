"""What the finished cells say: figures in order, paired differences, and a verdict in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from leveret.runs import read_json
from leveret.study.arms import ARMS, BASELINE, METHODS
from leveret.study.measures import MEASURES
from leveret.study.paired import Estimate, difference
from leveret.world.captions import STRENGTHS

OURS, WITH_COPIES = "coreset", "no-dedup"
"""The two whose difference is what putting copies together brings."""

Row = dict[str, Any]


def gather(done: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """All that a folder's finished cells tell; what results.json holds.

    wanted       names of the plan's cells; those that are not done are `missing`.
    cells, arms  one row a figure, one row a choice, in the order of the tables. worlds: seconds of what is shared.
    comparisons  one row for each strength, measure, length and arm: `values` by seed, `mean`, and `to_random`, the
                 paired difference {mean, low, high, n} (None without a common seed).
    dedup        one row for each strength, measure and length: coreset minus no-dedup, the same four numbers.
    verdict      sentences.
    """
    facts = [read_json(path) for path in done.glob("*.json")]
    cells = sorted((row for row in facts if "measure" in row), key=_order)
    arms = sorted((row for row in facts if "recipe" in row), key=_order)
    worlds = sorted((row for row in facts if "arm" not in row), key=_order)
    compared = _comparisons(cells)
    known = {row["step"] for row in facts}
    results = {
        "cells": [_without(row, "step") for row in cells],
        "arms": [_without(row, "step") for row in arms],
        "worlds": [_without(row, "step") for row in worlds],
        "comparisons": compared,
        "dedup": _dedup(compared),
        "missing": [name for name in wanted if name not in known],
    }
    return {**results, "verdict": verdict(results)}


def _order(row: Row) -> tuple[int, ...]:
    def place(key: str, names: Mapping[str, Any]) -> int:
        return list(names).index(row[key]) if key in row else -1

    measure = place("measure", MEASURES), row.get("length", 0)
    return (*measure, place("strength", STRENGTHS), place("arm", ARMS), row["seed"])


def _without(row: Row, key: str) -> Row:
    return {name: value for name, value in row.items() if name != key}


def _comparisons(cells: Sequence[Row]) -> list[Row]:
    """Cells of one arm at all seeds, beside the baseline's."""
    values: dict[tuple[str, int, str, str], dict[int, float]] = {}
    for row in cells:
        own = values.setdefault((row["measure"], row["length"], row["strength"], row["arm"]), {})
        if row["value"] is not None:
            own[row["seed"]] = row["value"]
    rows = []
    for (measure, length, strength, arm), own in values.items():
        baseline = values.get((measure, length, strength, BASELINE), {})
        paired = difference(own, baseline) if arm != BASELINE else None
        rows.append(
            {
                "measure": measure,
                "length": length,
                "strength": strength,
                "arm": arm,
                "values": {str(seed): value for seed, value in own.items()},
                "mean": sum(own.values()) / len(own) if own else None,
                "to_random": asdict(paired) if paired else None,
            }
        )
    return rows


def groups(results: Mapping[str, Any]) -> dict[tuple[str, int, str], dict[str, Row]]:
    """(measure, length, strength) -> arm -> its row of `comparisons`."""
    found: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in results["comparisons"]:
        found.setdefault((row["measure"], row["length"], row["strength"]), {})[row["arm"]] = row
    return found


def by_seed(row: Row) -> dict[int, float]:
    return {int(seed): value for seed, value in row["values"].items()}


def _dedup(compared: Sequence[Row]) -> list[Row]:
    rows = []
    for (measure, length, strength), arms in groups({"comparisons": compared}).items():
        if not {OURS, WITH_COPIES} <= arms.keys():
            continue
        if found := difference(by_seed(arms[OURS]), by_seed(arms[WITH_COPIES])):
            rows.append({"measure": measure, "length": length, "strength": strength, **asdict(found)})
    return rows


# --- in words ------------------------------------------------------------------------------------------------------


def estimate(facts: Mapping[str, Any]) -> Estimate:
    return Estimate(facts["mean"], facts["low"], facts["high"], facts["n"])


def name_of(measure: str, length: int, strength: str) -> str:
    return f"{measure}{f' x{length}' if length else ''}, {strength}"


def signed(found: Estimate) -> str:
    """`+0.120 [0.050, 0.190]`, or without the interval where there is none."""
    bounds = f" [{found.low:+.3f}, {found.high:+.3f}]" if found.low is not None else ""
    return f"{found.mean:+.3f}{bounds}"


def gain(measure: str, found: Estimate) -> int:
    """1 where the whole interval is for the better, -1 where it is for the worse, 0 where the seeds do not tell."""
    return found.sign if MEASURES[measure].better == "higher" else -found.sign


def best_method(measure: str, arms: Mapping[str, Row]) -> str | None:
    """The arm with the best mean among those that do not read the truth."""
    means = {name: row["mean"] for name, row in arms.items() if name in METHODS and row["mean"] is not None}
    if not means:
        return None
    return (max if MEASURES[measure].better == "higher" else min)(means, key=means.__getitem__)


def verdict(results: Mapping[str, Any]) -> list[str]:
    """What the figures say of choosing at all, where another method is best, of each comparison, and of copies."""
    told, signs, others = [], [], []
    for (measure, length, strength), arms in groups(results).items():
        best = best_method(measure, arms)
        if best is None or OURS not in arms or not arms[OURS]["to_random"]:
            continue
        paired = estimate(arms[OURS]["to_random"])
        signs.append(gain(measure, paired))
        place = name_of(measure, length, strength)
        if best != OURS:
            others.append(f"{best} ({place})")
        told.append(
            f"{place}: {_first(best, arms)}; {OURS} minus {BASELINE} {signed(paired)}, {_told(signs[-1], paired.n)}."
        )
    if not signs:
        return _on_copies(results["dedup"])
    lead = [
        f"{OURS} against {BASELINE}: the 95 % interval of the difference lies wholly on the better side of zero in "
        f"{signs.count(1)} of {len(signs)} comparisons, wholly on the worse in {signs.count(-1)}."
    ]
    if others:
        lead.append(f"Another method has the best mean in {len(others)} of {len(signs)}: {', '.join(others)}.")
    return lead + told + _on_copies(results["dedup"])


def _first(best: str, arms: Mapping[str, Row]) -> str:
    if best == OURS:
        return f"{OURS} is the best method ({arms[best]['mean']:.3f})"
    return f"{best} is the best method ({arms[best]['mean']:.3f}), {OURS} has {arms[OURS]['mean']:.3f}"


def _told(sign: int, n: int) -> str:
    if n == 1:
        return "one seed, so no interval"
    return f"{({1: 'better', -1: 'worse', 0: 'not told apart'})[sign]} over {n} seeds"


def _on_copies(rows: Sequence[Row]) -> list[str]:
    """A sentence a measure: coreset against no-dedup, strength by strength."""
    told: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        found = estimate(row)
        words = f"{row['strength']} {signed(found)} ({_told(gain(row['measure'], found), found.n)})"
        told.setdefault((row["measure"], row["length"]), []).append(words)
    return [
        f"{OURS} minus {WITH_COPIES}, {measure}{f' x{length}' if length else ''}: {'; '.join(words)}."
        for (measure, length), words in told.items()
    ]
