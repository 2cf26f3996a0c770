"""The one figure a task is known by, as a function of sums over its answers, so that it can be resampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leveret.evaluate.forms import Item
from leveret.evaluate.scorers import Verdict
from leveret.evaluate.scorers.judged import points
from leveret.evaluate.scorers.yes_no import pope_counts

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Headline:
    """One figure of a task as a function of sums over its answers.

    columns  (items, verdicts) -> [n, k]: what each answer adds.
    figure   sums [..., k] -> the figure [...].
    """

    columns: Callable[[Sequence[Item], Sequence[Verdict]], Array]
    figure: Callable[[Array], Array]


def _groups(items: Sequence[Item]) -> tuple[list[str], Array]:
    """The names of the parts, and [n, parts] of 0 and 1: which part an item belongs to."""
    names = sorted({item.meta.get("group", "") for item in items})
    return names, np.array([[float(item.meta.get("group", "") == name) for name in names] for item in items])


def _mean_columns(items: Sequence[Item], verdicts: Sequence[Verdict]) -> Array:
    return np.array([[verdict.score, 1.0] for verdict in verdicts])


def _macro_columns(items: Sequence[Item], verdicts: Sequence[Verdict]) -> Array:
    member = _groups(items)[1]
    scores = np.array([verdict.score for verdict in verdicts])[:, None]
    return np.stack([member * scores, member], axis=2).reshape(len(items), -1)


def _ratio(sums: Array) -> Array:
    """Mean over parts of first column over second; a part that a resample left out does not count."""
    top, bottom = sums[..., 0::2], sums[..., 1::2]
    there = bottom > 0
    parts = np.divide(top, bottom, out=np.zeros_like(top), where=there)
    return parts.sum(-1) / np.maximum(there.sum(-1), 1)


def _f1_columns(items: Sequence[Item], verdicts: Sequence[Verdict]) -> Array:
    counts = np.array([pope_counts(i, v) for i, v in zip(items, verdicts, strict=True)], dtype=np.float64)
    tp, fp, fn = counts[:, 0], counts[:, 1], counts[:, 3]
    # F1 = 2 TP / (2 TP + FP + FN): a ratio of sums, like an accuracy.
    member = _groups(items)[1]
    parts = [member * (2 * tp)[:, None], member * (2 * tp + fp + fn)[:, None]]
    return np.stack(parts, axis=2).reshape(len(items), -1)


def _pooled_columns(unread_is_no: bool) -> Callable[[Sequence[Item], Sequence[Verdict]], Array]:
    """2 TP and 2 TP + FP + FN of each answer, yes being positive."""

    def columns(items: Sequence[Item], verdicts: Sequence[Verdict]) -> Array:
        rows = []
        for item, verdict in zip(items, verdicts, strict=True):
            positive, said = item.gold == "yes", verdict.parsed == "yes"
            missed = positive and not said and (unread_is_no or verdict.parsed == "no")
            tp = positive and said
            rows.append([2.0 * tp, 2.0 * tp + (said and not positive) + missed])
        return np.array(rows)

    return columns


def _mme_columns(items: Sequence[Item], verdicts: Sequence[Verdict]) -> Array:
    """Per subtask: right answers, answers, pictures with all right, pictures (each question bears its part of them)."""
    member = _groups(items)[1]
    pictures: dict[str, list[float]] = {}
    for item, verdict in zip(items, verdicts, strict=True):
        pictures.setdefault(item.meta["image_id"], []).append(verdict.score)
    mine = [pictures[item.meta["image_id"]] for item in items]
    rows = [[v.score, 1.0, min(both) / len(both), 1 / len(both)] for v, both in zip(verdicts, mine, strict=True)]
    return (member[:, :, None] * np.array(rows)[:, None, :]).reshape(len(items), -1)


def _circular_columns(items: Sequence[Item], verdicts: Sequence[Verdict]) -> Array:
    """Each rotation bears its part of its question, and of whether that is right in every order."""
    wholes: dict[str, list[float]] = {}
    for item, verdict in zip(items, verdicts, strict=True):
        wholes.setdefault(item.meta["whole"], []).append(float(verdict.score == 1.0))
    mine = [wholes[item.meta["whole"]] for item in items]
    return np.array([[min(hits) / len(hits), 1 / len(hits)] for hits in mine])


def _points_columns(items: Sequence[Item], verdicts: Sequence[Verdict]) -> Array:
    return np.array([points(verdict)[::-1] for verdict in verdicts])


HEADLINES: dict[str, Headline] = {
    "accuracy": Headline(_mean_columns, _ratio),
    "accuracy, mean of parts": Headline(_macro_columns, _ratio),
    "F1, mean of parts": Headline(_f1_columns, _ratio),
    "F1": Headline(_pooled_columns(unread_is_no=True), _ratio),
    "F1 of the readable": Headline(_pooled_columns(unread_is_no=False), _ratio),
    # 100 points for answers and 100 for pictures in each of fourteen subtasks: 2,800 in all.
    "share of all points": Headline(_mme_columns, _ratio),
    "circular accuracy": Headline(_circular_columns, _ratio),
    "points in relation to the reference's": Headline(_points_columns, _ratio),
}

PLAIN = frozenset({"accuracy", "accuracy, mean of parts"})
"""Headlines that are shares of right answers, so that only an answer's own score counts."""
