"""k-means, our own Lloyd: the same bits for any number of workers, on one machine or many.

Training rows stand in the order of their ids' hash and are summed in fixed chunks of that order; labels are exact
(`screen.Nearest`), sums of a chunk are float64 in row order, and chunks are added in their order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from leveret.condense.rows import Array, Doubles, Floats, Ints, distances, first_of_equal, spans
from leveret.condense.screen import Nearest

CHUNK = 8192
"""Training rows whose sums are taken together. Part of the rule: another number gives other bits."""


class Rows(Protocol):
    """Training rows: float32 unit vectors, read in blocks."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Floats: ...


Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""(function, items) -> the function of each, in the order of the items."""


def start(rows: Rows, k: int) -> Floats:
    """The first k distinct rows; all distinct ones where there are fewer."""
    found: list[Floats] = []
    seen: set[bytes] = set()
    for part in spans(len(rows), CHUNK):
        x = rows.read(part.start, part.stop)
        for place in np.flatnonzero(first_of_equal(x) == np.arange(len(x))).tolist():
            if (bits := x[place].tobytes()) not in seen:
                seen.add(bits)
                found.append(x[place])
                if len(found) == k:
                    return np.stack(found)
    return np.stack(found)


def one_round(rows: Rows, centroids: Floats, run: Map) -> Floats:
    """The next centroids [k, width]: means of the rows that are nearest to each.

    A centroid without rows takes the row that is farthest from its own one (the next farthest for the next one
    without; ties to the row that stands first).
    """
    nearest = Nearest(centroids)

    def part(span: slice) -> tuple[Array, Array, Array]:
        x = rows.read(span.start, span.stop)
        labels = nearest.of(x)
        return labels, *_sums(x, labels, len(centroids))

    sums, counts, everyone = np.zeros(centroids.shape), np.zeros(len(centroids), np.int64), []
    for labels, found, part_sums in run(part, list(spans(len(rows), CHUNK))):
        sums[found] += part_sums
        counts += np.bincount(labels, minlength=len(centroids))
        everyone.append(labels)
    new: Floats = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        away = _away(rows, centroids, np.concatenate(everyone), run)
        farthest = np.lexsort((np.arange(len(away)), -away))[: len(empty)]
        for place, row in zip(empty, farthest.tolist(), strict=False):
            new[place] = rows.read(row, row + 1)[0]
    return new


def _sums(x: Floats, labels: Ints, k: int) -> tuple[Ints, Doubles]:
    """The labels that occur, and the float64 sum of each one's rows, added in row order."""
    from scipy.sparse import csr_matrix

    wide = _buffer(x.shape)
    np.copyto(wide, x)
    found, back = np.unique(labels, return_inverse=True)
    order = np.argsort(back, kind="stable")
    ends = np.r_[0, np.cumsum(np.bincount(back, minlength=len(found)))]
    # Row after row of a sparse product adds its terms one by one, in the order of its columns.
    picks = csr_matrix((np.ones(len(x)), order, ends), (len(found), len(x)))
    return found, picks @ wide


_local = threading.local()


def _buffer(shape: tuple[int, ...]) -> Doubles:
    """This thread's, for rows widened to float64: fresh memory for each chunk would cost more than the sums."""
    if not hasattr(_local, "wide") or _local.wide.shape[1] != shape[1]:
        _local.wide = np.empty((CHUNK, shape[1]))
    found: Doubles = _local.wide[: shape[0]]
    return found


def _away(rows: Rows, centroids: Floats, labels: Ints, run: Map) -> Doubles:
    def part(span: slice) -> Doubles:
        return distances(rows.read(span.start, span.stop), centroids, labels[span])

    return np.concatenate(list(run(part, list(spans(len(rows), CHUNK)))))
