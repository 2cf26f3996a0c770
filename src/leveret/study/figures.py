"""What a study found: cells, differences to each axis' base with intervals, and whether papers' findings hold.

A difference is paired: level less base at the same seed, hence of the same world, the same choice and the same draws
where these are shared. Its interval is Student's over seeds; its p is corrected (Holm) for all comparisons of a study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leveret.runs import sha256_of
from leveret.study.files import SCORE, WORDS, Axis, Cell, Claim, StudyRecipe, base_cell
from leveret.study.matrix import Folder, Matrix
from leveret.study.paired import Estimate, differences, holm, p_value, t_interval

CONTENTS = ("kept", "fits", "copies", "scenes", "characters")
"""What is told of a choice (`choices.contents`)."""
AGREES, DISAGREES, UNDECIDED, MISSING = "agrees", "disagrees", "not decided", "not measured yet"


def gather(folder: Folder, matrix: Matrix) -> dict[str, Any]:
    """All that is known by now:

    cells        [{cell, seed, levels, score, tasks, measures, words, seconds, trainable}] of which the first measure
                 is taken; seconds of teaching, had nothing been shared (None before all is taught)
    asked, whole how many cells there are to be, and how many have all their measures
    axes         name -> {question, base, levels: {level: {about, n, mean, low, high, tasks, words, seconds,
                 difference}}}; among tasks what else is measured
    crossed      of a study of all combinations: [{levels, n, mean, low, high, difference to the base cell}]
    choices      where levels of an axis choose by other rules: axis -> {level: {kept, fits, copies, scenes,
                 characters: means over the n seeds that are known, shown: of the first of these, unit}}
    costs        level -> {seconds, score}: means over the seeds that all of them have
    comparisons  how many levels are compared with a base
    claims       [{paper, says, figures, axis, level, base (compared with), by, expect, difference, verdict,
                 at_most}]
    ledger       kind of work -> {made, needed, seconds, saved: seconds that sharing saved}
    """
    study = matrix.study
    figures = {cell: found for cell in matrix.measured if (found := _figures(folder, matrix, cell))}
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
        "measures": list(study.measures),
        "asked": len(matrix.measured),
        "whole": sum(all(folder.is_done(id) for id in ends.values()) for ends in matrix.measured.values()),
        "axes": axes,
        "crossed": _crossed(study, figures) if study.crossed else [],
        "costs": _costs(study, figures),
        "choices": {name: rows for name in study.axes if (rows := _choices(folder, matrix, name))},
        "comparisons": len(raw),
        "claims": [_claim(study, claim, figures) for claim in study.claims],
        "ledger": _ledger(folder, matrix),
    }


def _figures(folder: Folder, matrix: Matrix, cell: Cell) -> dict[str, Any] | None:
    """Of a cell whose first measure is taken."""
    measured = {name: facts for name, id in matrix.measured[cell].items() if (facts := folder.facts(id)) is not None}
    asked = measured.get("suite", {"tasks": {}})["tasks"]
    tasks = {name: row["score"] for name, row in asked.items() if row.get("score") is not None}
    others = {name: facts["value"] for name, facts in measured.items() if name != "suite"}
    first = matrix.study.measures[0]
    score = others.get(first) if first != "suite" else sum(tasks.values()) / len(tasks) if tasks else None
    if score is None:
        return None
    words = [row["words"] for row in asked.values() if row.get("words") is not None]
    taught = [folder.facts(id) for id in matrix.needed(cell) if matrix.units[id].kind == "teach"]
    known = [facts for facts in taught if facts is not None]
    return {
        "score": score,
        "tasks": tasks,
        "n": {name: row["n"] for name, row in asked.items() if row.get("n") and name in tasks},
        "measures": others,
        "words": _mean(words),
        "seconds": round(sum(float(one["seconds"]) for one in known), 1) if len(known) == len(taught) else None,
        "trainable": max((int(one["trainable"]) for one in known), default=0),
    }


def _choices(folder: Folder, matrix: Matrix, axis: str) -> dict[str, Any]:
    """What the levels of an axis chose, by what is known; nothing where all of them choose by one rule."""
    rows: dict[str, Any] = {}
    rules = set()
    for level, how in matrix.study.axes[axis].levels.items():
        if how.average is not None:
            continue
        cells = [base_cell(matrix.study, seed).at(axis, level) for seed in matrix.study.seeds]
        chosen = [id for cell in cells for id in matrix.needed(cell) if matrix.units[id].kind == "choose"]
        found = {id: facts for id in chosen if "fits" in (facts := folder.facts(id) or {})}
        if found:
            rules.add(sha256_of(matrix.units[chosen[0]].settings))
            first = next(iter(found))
            means = {name: _mean([facts[name] for facts in found.values()]) for name in CONTENTS}
            rows[level] = {**means, "n": len(found), "unit": first, "shown": found[first]["shown"]}
    return rows if len(rules) > 1 else {}


def _crossed(study: StudyRecipe, figures: Mapping[Cell, Any]) -> list[dict[str, Any]]:
    base = {cell.seed: found["score"] for cell, found in figures.items() if cell == base_cell(study, cell.seed)}
    by_levels: dict[tuple[tuple[str, str], ...], dict[int, float]] = {}
    step = step_of(study, figures, (SCORE,))
    for cell, found in figures.items():
        by_levels.setdefault(cell.levels, {})[cell.seed] = found["score"]
    return [
        {
            "levels": dict(levels),
            **_plain(t_interval(list(own.values()), step)),
            "difference": paired(own, base, step),
        }
        for levels, own in by_levels.items()
    ]


def _costs(study: StudyRecipe, figures: Mapping[Cell, Any]) -> dict[str, dict[str, float]]:
    """Seconds and score of each level, over the seeds that all of them have: means over others cannot be compared."""
    known: dict[str, dict[int, Any]] = {}
    for name, axis in study.axes.items():
        for level in axis.levels:
            label = "base" if level == axis.base else f"{name}={level}"
            cells = {seed: base_cell(study, seed).at(name, level) for seed in study.seeds}
            own = {seed: figures[cell] for seed, cell in cells.items() if cell in figures}
            if any(found["seconds"] for found in own.values()):
                known.setdefault(label, {s: found for s, found in own.items() if found["seconds"] is not None})
    common = set.intersection(*(set(own) for own in known.values())) if known else set()
    return {
        label: {key: sum(own[seed][key] for seed in common) / len(common) for key in ("seconds", "score")}
        for label, own in known.items()
        if common
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def value_of(found: Mapping[str, Any], by: Sequence[str]) -> float | None:
    """The mean of what is named (tasks, the score, the words, another measure) of a cell; None where one of them was
    not measured."""
    known = {**found["tasks"], **found["measures"], SCORE: found["score"], WORDS: found["words"]}
    values: list[Any] = [known.get(name) for name in by]
    return None if None in values else sum(values) / len(values)


def step_of(study: StudyRecipe, figures: Mapping[Cell, Any], by: Sequence[str]) -> float:
    """How much one question more or less moves what `value_of` gives; 0 where it is no share of questions."""
    steps = []
    for found in figures.values():
        names = [*found["tasks"]] if [*by] == [SCORE] and study.measures[0] == "suite" else [*by]
        if names and all(found["n"].get(name) for name in names):
            steps.append(max(1 / found["n"][name] for name in names) / len(names))
    return max(steps, default=0.0)


def _at(study: StudyRecipe, axis: str, level: str, figures: Mapping[Cell, Any], by: Sequence[str]) -> dict[int, float]:
    """Seed -> value of a level, all other axes at their base."""
    found = {}
    for seed in study.seeds:
        cell = base_cell(study, seed).at(axis, level)
        if cell in figures and (value := value_of(figures[cell], by)) is not None:
            found[seed] = value
    return found


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], least: float = 0.0) -> dict[str, Any] | None:
    """The difference at the seeds that both have, its interval and its p: what a seed does to both cancels. None
    without such a seed. least: the smallest that it can be."""
    by_seed = differences(ours, theirs)
    if not by_seed:
        return None
    values = list(by_seed.values())
    found = _plain(t_interval(values, least))
    if least and found["low"] is not None:  # shares of questions differ by no more than all of them
        found |= {"low": max(-1.0, found["low"]), "high": min(1.0, found["high"])}
    return {**found, "p": p_value(values, least), "by_seed": by_seed}


def _plain(found: Estimate) -> dict[str, Any]:
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}


def _axis(study: StudyRecipe, name: str, axis: Axis, figures: Mapping[Cell, Any]) -> dict[str, Any]:
    names = (name for found in figures.values() for name in (*found["tasks"], *found["measures"]))
    tasks = [name for name in dict.fromkeys(names) if name != study.measures[0]]
    base, step = _at(study, name, axis.base, figures, (SCORE,)), step_of(study, figures, (SCORE,))
    levels = {}
    for level, how in axis.levels.items():
        own, words = (_at(study, name, level, figures, (by,)) for by in (SCORE, WORDS))
        cells = [figures[cell] for seed in own if (cell := base_cell(study, seed).at(name, level)) in figures]
        by_task = {}
        for task in tasks:
            values, others = (_at(study, name, one, figures, (task,)) for one in (level, axis.base))
            if values:
                one = step_of(study, figures, (task,))
                compared = None if level == axis.base else paired(values, others, one)
                by_task[task] = {**_plain(t_interval(list(values.values()), one)), "difference": compared}
        levels[level] = {
            "about": how.about,
            **(
                _plain(t_interval(list(own.values()), step))
                if own
                else {"mean": None, "low": None, "high": None, "n": 0}
            ),
            "tasks": by_task,
            "words": _mean(list(words.values())),
            "seconds": _mean([cell["seconds"] for cell in cells]),
            "trainable": max((cell["trainable"] for cell in cells), default=None),
            "difference": None if level == axis.base else paired(own, base, step),
        }
    return {"question": axis.question, "base": axis.base, "levels": levels}


def _claim(study: StudyRecipe, claim: Claim, figures: Mapping[Cell, Any]) -> dict[str, Any]:
    than = claim.than or study.axes[claim.axis].base
    ours, theirs = (_at(study, claim.axis, level, figures, claim.by) for level in (claim.level, than))
    found = paired(ours, theirs, step_of(study, figures, claim.by))
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
        return UNDECIDED  # one seed has no interval, nor have losses that are alike to the last digit
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


def mean_in_words(row: Mapping[str, Any] | None, share: bool = True) -> str | None:
    """`0.982 (0.972 to 0.993)` of {mean, low, high}; without an interval where one seed gives none. share: whether it
    lies between 0 and 1, as all do but the loss."""
    if not row or row["mean"] is None:
        return None
    if row["low"] is None:
        return f"{row['mean']:.3f}"
    low, high = (max(0.0, row["low"]), min(1.0, row["high"])) if share else (row["low"], row["high"])
    return f"{row['mean']:.3f} ({low:.3f} to {high:.3f})"


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
    """Of name -> (cost, score) those that no other beats: none is as cheap and better (higher), or cheaper and as
    good."""
    return [
        name
        for name, (cost, score) in points.items()
        if not any(
            (c <= cost and s > score) or (c < cost and s >= score) for one, (c, s) in points.items() if one != name
        )
    ]
