"""Areas under curves, as scikit-learn 1.5.2 computes them (which Prismatic's scorers call); numpy alone.

Where scikit-learn stops with an error because the figure is undefined, these return None.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def roc_auc(labels: Sequence[int] | Array, scores: Sequence[float] | Array) -> float | None:
    """Area under the ROC curve, `roc_auc_score(labels, scores)`: how often a positive outranks a negative, a tie
    counting half. labels [n] of 0 and 1, scores [n]. None where only one of the labels occurs."""
    wanted, values = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    positive, negative = values[wanted], np.sort(values[~wanted])
    if not positive.size or not negative.size:
        return None
    below = np.searchsorted(negative, positive, side="left").sum()
    not_above = np.searchsorted(negative, positive, side="right").sum()
    return float((below + not_above) / 2 / positive.size / negative.size)


def average_precision(labels: Sequence[int] | Array, scores: Sequence[float] | Array) -> float:
    """Area under the precision-recall curve, `average_precision_score(labels, scores)`: the precision at each distinct
    score, from the highest down, weighted by the recall it adds. labels [n] of 0 and 1, scores [n]. 0 where nothing is
    positive (scikit-learn warns and says the same)."""
    wanted, values = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if not wanted.sum():
        return 0.0
    order = np.argsort(-values, kind="stable")
    wanted, values = wanted[order], values[order]
    # Equal scores are one threshold: only the last of a run counts.
    last = np.append(np.flatnonzero(np.diff(values)), values.size - 1)
    hits = np.cumsum(wanted)[last]
    return float(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / (last + 1)))


def roc_auc_pairs(labels: Sequence[int] | Array, scores: Array) -> float | None:
    """`roc_auc_score(labels, scores, multi_class="ovo")`: the mean over all pairs of classes of the two areas that
    tell one from the other. labels [n], class k in column k of scores [n, k] that sum to 1. None where the labels do
    not take as many values as there are columns, or rows do not sum to 1."""
    named, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    classes = np.unique(named)
    if classes.size != values.shape[1] or classes.size < 3 or not np.allclose(values.sum(1), 1):
        return None
    areas = []
    for a, b in combinations(range(classes.size), 2):
        either = (named == classes[a]) | (named == classes[b])
        for one in (a, b):
            areas.append(roc_auc(named[either] == classes[one], values[either, one]))
    return float(np.mean(np.array(areas, dtype=np.float64)))


def average_precision_classes(labels: Sequence[int] | Array, scores: Array) -> float | None:
    """`average_precision_score(labels, scores)` for several classes: the mean over classes of one against the rest.
    Shapes and None as for `roc_auc_pairs`."""
    named, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    classes = np.unique(named)
    if classes.size != values.shape[1] or classes.size < 3:
        return None
    return float(np.mean([average_precision(named == name, values[:, k]) for k, name in enumerate(classes)]))
