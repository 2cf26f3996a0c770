"""What a study found: cells, differences to each axis' base with intervals, and whether papers' findings hold.

A difference is paired: level less base at the same seed, hence of the same world, the same choice and the same draws
where these are shared. Its interval is Student's over seeds; its p is corrected (Holm) for all comparisons of a study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leveret.study.files import SCORE, WORDS, Axis, Cell, Claim, StudyRecipe, base_cell
from leveret.study.paired import Estimate, differences, holm, p_value, t_interval
from leveret.study.runner import Folder, Matrix
from leveret.study.units import chain

AGREES, DISAGREES, UNDECIDED, MISSING = "agrees", "disagrees", "not decided", "not measured yet"


def gather(folder: Folder, matrix: Matrix) -> dict[str, Any]:
    """All that is known by now:

    cells        [{cell, seed, levels, score, tasks, seconds, trainable}]; seconds of teaching, had nothing been shared
    axes         name -> {question, base, levels: {level: {about, n, mean, low, high, tasks, words, seconds,
                 difference}}}
    comparisons  how many levels are compared with a base
    claims       [{paper, says, figures, axis, level, base (compared with), by, expect, difference, verdict,
                 at_most}]
    ledger       {made, shared, seconds made, seconds that sharing saved}
    """
    study = matrix.study
    figures = {cell: found for cell, last in matrix.last.items() if (found := _figures(folder, matrix, last))}
    axes = {name: _axis(study, name, axis, figures) for name, axis in study.axes.items()}
    raw = {
        f"{name}={level}": row["difference"]["p"]
        for name, axis in axes.items()
        for level, row in axis["levels"].items()
        if row["difference"]
    }
    corrected = holm(raw)
    for name, axis in axes.items():
        for level, row in axis["levels"].items():
            if row["difference"]:
                row["difference"]["p_holm"] = corrected[f"{name}={level}"]
    return {
        "name": study.name,
        "title": study.title,
        "seeds": list(study.seeds),
        "cells": [
            {"cell": cell.name, "seed": cell.seed, "levels": dict(cell.levels), **found}
            for cell, found in figures.items()
        ],
        "asked": len(matrix.last),
        "axes": axes,
        "comparisons": len(raw),
        "claims": [_claim(study, claim, figures) for claim in study.claims],
        "ledger": _ledger(folder, matrix),
    }


def _figures(folder: Folder, matrix: Matrix, last: str) -> dict[str, Any] | None:
    facts = folder.facts(last)
    if facts is None:
        return None
    tasks = {name: row["score"] for name, row in facts["tasks"].items() if row.get("score") is not None}
    if not tasks:
        return None
    words = [row["words"] for row in facts["tasks"].values() if row.get("words") is not None]
    taught = [folder.facts(id) or {} for id in chain(matrix.units, last) if matrix.units[id].kind == "teach"]
    return {
        "score": sum(tasks.values()) / len(tasks),
        "tasks": tasks,
        "words": sum(words) / len(words) if words else None,
        "questions": sum(int(row.get("n") or 0) for row in facts["tasks"].values()),
        "seconds": round(sum(float(one.get("seconds", 0)) for one in taught), 1),
        "trainable": max((int(one.get("trainable", 0)) for one in taught), default=0),
    }


def value_of(found: Mapping[str, Any], by: Sequence[str]) -> float | None:
    """The mean of the named tasks (or the score, or the words) of a cell; None where one of them was not asked."""
    values: list[Any] = [found.get(name) if name in (SCORE, WORDS) else found["tasks"].get(name) for name in by]
    return None if None in values else sum(values) / len(values)


def _at(study: StudyRecipe, axis: str, level: str, figures: Mapping[Cell, Any], by: Sequence[str]) -> dict[int, float]:
    """Seed -> value of a level, all other axes at their base."""
    found = {}
    for seed in study.seeds:
        cell = base_cell(study, seed).at(axis, level)
        if cell in figures and (value := value_of(figures[cell], by)) is not None:
            found[seed] = value
    return found


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any] | None:
    """The difference at the seeds that both have, its interval and its p; None without such a seed."""
    by_seed = differences(ours, theirs)
    if not by_seed:
        return None
    values = list(by_seed.values())
    return {**_plain(t_interval(values)), "p": p_value(values), "by_seed": by_seed}


def _plain(found: Estimate) -> dict[str, Any]:
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}


def _axis(study: StudyRecipe, name: str, axis: Axis, figures: Mapping[Cell, Any]) -> dict[str, Any]:
    tasks = list(dict.fromkeys(task for found in figures.values() for task in found["tasks"]))
    base = _at(study, name, axis.base, figures, (SCORE,))
    levels = {}
    for level, how in axis.levels.items():
        own, words = (_at(study, name, level, figures, (by,)) for by in (SCORE, WORDS))
        cells = [figures[cell] for seed in own if (cell := base_cell(study, seed).at(name, level)) in figures]
        by_task = {}
        for task in tasks:
            values, others = (_at(study, name, one, figures, (task,)) for one in (level, axis.base))
            if values:
                compared = None if level == axis.base else paired(values, others)
                by_task[task] = {**_plain(t_interval(list(values.values()))), "difference": compared}
        levels[level] = {
            "about": how.about,
            **(_plain(t_interval(list(own.values()))) if own else {"mean": None, "low": None, "high": None, "n": 0}),
            "tasks": by_task,
            "words": sum(words.values()) / len(words) if words else None,
            "seconds": sum(cell["seconds"] for cell in cells) / len(cells) if cells else None,
            "trainable": max((cell["trainable"] for cell in cells), default=None),
            "difference": None if level == axis.base else paired(own, base),
        }
    return {"question": axis.question, "base": axis.base, "levels": levels}


def _claim(study: StudyRecipe, claim: Claim, figures: Mapping[Cell, Any]) -> dict[str, Any]:
    than = claim.than or study.axes[claim.axis].base
    ours, theirs = (_at(study, claim.axis, level, figures, claim.by) for level in (claim.level, than))
    found = paired(ours, theirs)
    return {
        **claim.model_dump(mode="json"),
        "base": than,
        "difference": found,
        "verdict": verdict(claim.expect, claim.margin, found),
        "at_most": at_most(claim.expect, found),
    }


def verdict(expect: str, margin: float, found: Mapping[str, Any] | None) -> str:
    """Whether a difference is what a finding would have it be, by its 95 % interval alone.

    higher      agrees when all of it lies above 0, disagrees when all of it lies below. lower: the other way.
    same        agrees when all of it lies within +- margin, disagrees when none of it does.
    not lower   agrees when all of it lies above -margin, disagrees when all of it lies below. not higher: so too.
    """
    if found is None:
        return MISSING
    low, high = found["low"], found["high"]
    if low is None or high is None:
        return UNDECIDED  # one seed has no interval
    if expect in ("lower", "not higher"):
        low, high = -high, -low
    if expect in ("higher", "lower"):
        return AGREES if low > 0 else DISAGREES if high < 0 else UNDECIDED
    if expect == "same":
        inside, outside = -margin < low and high < margin, low > margin or high < -margin
        return AGREES if inside else DISAGREES if outside else UNDECIDED
    return AGREES if low > -margin else DISAGREES if high < -margin else UNDECIDED


def at_most(expect: str, found: Mapping[str, Any] | None) -> str | None:
    """What an interval on both sides of zero does say: how large, at most, the difference is that a finding speaks of.
    None where the verdict says it all."""
    if found is None or found["low"] is None or expect == "same" or not found["low"] <= 0 <= found["high"]:
        return None
    if expect in ("higher", "not higher"):
        return f"at most {found['high']:.3f} higher"
    return f"at most {max(0.0, -found['low']):.3f} lower"


def mean_in_words(row: Mapping[str, Any] | None) -> str | None:
    """`0.982 (0.972 to 0.993)` of {mean, low, high}, a share; without an interval where one seed gives none."""
    if not row or row["mean"] is None:
        return None
    if row["low"] is None:
        return f"{row['mean']:.3f}"
    return f"{row['mean']:.3f} ({max(0.0, row['low']):.3f} to {min(1.0, row['high']):.3f})"


def difference_in_words(found: Mapping[str, Any] | None) -> str | None:
    """`-0.055 (-0.068 to -0.042)` of {mean, low, high}; None where nothing was compared."""
    if not found:
        return None
    if found["low"] is None:
        return f"{found['mean']:+.3f}"
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _ledger(folder: Folder, matrix: Matrix) -> dict[str, Any]:
    """What sharing saved: each unit was made once, whatever number of cells needs it."""
    users = matrix.users()
    rows: dict[str, dict[str, Any]] = {}
    for id, unit in matrix.units.items():
        facts = folder.facts(id)
        if facts is None:
            continue
        row = rows.setdefault(unit.kind, {"made": 0, "needed": 0, "seconds": 0.0, "saved": 0.0})
        row["made"] += 1
        row["needed"] += users[id]
        row["seconds"] += float(facts["seconds"])
        row["saved"] += float(facts["seconds"]) * (users[id] - 1)
    return {kind: {key: round(value, 1) for key, value in row.items()} for kind, row in rows.items()}


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Of name -> (cost, score) those that no other beats: none is as cheap and better, or cheaper and as good."""
    return [
        name
        for name, (cost, score) in points.items()
        if not any(
            (c <= cost and s > score) or (c < cost and s >= score) for one, (c, s) in points.items() if one != name
        )
    ]
