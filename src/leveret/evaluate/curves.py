"""Scores of probabilities: what a rule reads of them, and the areas under the two curves. NumPy only."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from leveret.runs import DataError

Array = np.ndarray[Any, np.dtype[np.float64]]


def probabilities(text: str, n: int, where: str) -> list[float]:
    """The `n` probabilities that an answer gives, as JSON; DataError names the question where they are not that."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        values = None
    numbers = isinstance(values, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not numbers or len(values) != n:
        raise DataError(f"Question {where}: {n} probabilities are wanted, a list of {n} numbers; given is {text[:80]}.")
    return [float(value) for value in values]


def auc_roc(labels: Sequence[int], scores: ArrayLike) -> float | None:
    """Area under the receiver's curve, 0..1; None where only one class occurs (it is undefined there).

    labels  [n] of 0 and 1 with scores [n] of class 1; or class numbers with scores [n, classes].
    Equal scores count half, as in scikit-learn. With several classes it is Hand and Till's (2001): the mean over all
    pairs of classes that occur, each pair seen from both sides (`roc_auc_score(..., multi_class="ovo")`).
    """
    gold, given = np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float64)
    if given.ndim == 1:
        return _pair(gold == 1, given)
    areas = []
    for one, other in combinations(np.unique(gold).tolist(), 2):
        both = (gold == one) | (gold == other)
        sides = [_pair(gold[both] == side, given[both, side]) for side in (one, other)]
        areas.append(sum(side for side in sides if side is not None) / 2)
    return sum(areas) / len(areas) if areas else None


def _pair(positive: np.ndarray[Any, Any], scores: Array) -> float | None:
    """The share of pairs of a positive and a negative that the scores order rightly (Mann and Whitney)."""
    yes, no = int(positive.sum()), int((~positive).sum())
    if not yes or not no:
        return None
    _, place, times = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(times)
    ranks = (ends - (times - 1) / 2)[place.reshape(-1)]  # equal scores share their mean rank
    return float((ranks[positive].sum() - yes * (yes + 1) / 2) / (yes * no))


def auc_pr(labels: Sequence[int], scores: ArrayLike) -> float | None:
    """Average precision, 0..1: precision at each distinct score, weighted by the recall gained there; None without a
    positive.

    labels and scores as in `auc_roc`. With several classes it is the mean over the classes that occur, each against
    the rest (`average_precision_score` of scikit-learn 1.3 to 1.5; later versions refuse several classes).
    """
    gold, given = np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float64)
    if given.ndim == 1:
        return _average_precision(gold == 1, given)
    areas = [_average_precision(gold == side, given[:, side]) for side in np.unique(gold).tolist()]
    known = [area for area in areas if area is not None]
    return sum(known) / len(known) if known else None


def _average_precision(positive: np.ndarray[Any, Any], scores: Array) -> float | None:
    total = int(positive.sum())
    if not total:
        return None
    order = np.argsort(-scores, kind="stable")
    sorted_scores, hits = scores[order], np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(sorted_scores)), len(order) - 1)  # the last of each run of equal scores
    found = hits[last]
    gained = np.diff(found, prepend=0) / total
    return float((gained * found / (last + 1)).sum())
