"""k-means, our own Lloyd: the same bits for any number of workers, on one machine or many.

Training rows stand in the order of their ids' hash and are summed in fixed chunks of that order; labels are exact
(`screen.Nearest`), sums of a chunk are float64 in row order, and chunks are added in their order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from leveret.condense.rows import Bools, Doubles, Floats, Ints, distances, first_of_equal, spans
from leveret.condense.screen import STEP, Nearest, Told, tell

CHUNK = 8192
"""Training rows whose sums are taken together. Part of the rule: another number gives other bits."""


MANY = 0.6
"""Share of the centroids that moved from which every row is compared with all of them at once."""


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


class Lloyd:
    """Rounds of Lloyd's algorithm, each as if it looked at everything, which it does not.

    After a few rounds most centroids stay where they are, to the bit. A row whose centroid stayed can only go to one
    that moved, and a centroid that no row came to or left is the mean that it was: neither is computed again.

    rows       the training rows.
    centroids  [k, width] float32 to begin with; `step` gives the next ones.
    memory     bytes that 8-bit copies of the rows may take; without them they are made in every round.
    """

    def __init__(self, rows: Rows, centroids: Floats, run: Map, memory: int = 0) -> None:
        k, width = centroids.shape
        self.rows, self.centroids, self.run = rows, centroids, run
        self.spans = list(spans(len(rows), CHUNK))
        self.mean = centroids.astype(np.float64).mean(0).astype(np.float32)
        self.scale = tell(centroids[: 4 * STEP], self.mean).scale
        self.told: list[Told | None] = [None] * len(self.spans)
        self.keeps = len(rows) * (width + 16) <= memory
        self.labels = np.full(len(rows), -1, np.int64)
        self.least = np.zeros(len(rows))  # each row's closeness to its centroid is at least this (`Nearest.closest`)
        self.moved = np.ones(k, np.bool_)
        self.settled = np.zeros(k, np.bool_)  # whether a centroid is the mean of the rows that have its label

    def step(self) -> Floats:
        """The next centroids [k, width]: means of the rows that are nearest to each.

        A centroid without rows takes the row that is farthest from its own one (the next farthest for the next one
        without; ties to the row that stands first).
        """
        before = self.labels.copy()
        self._label()
        changed = self.labels != before
        stale = ~self.settled
        stale[self.labels[changed]] = True
        left = before[changed]
        stale[left[left >= 0]] = True
        counts = np.bincount(self.labels, minlength=len(stale))
        new = self.centroids.copy()
        new[stale] = (self._sums(stale) / np.maximum(counts[stale], 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            away = self._away()
            farthest = np.lexsort((np.arange(len(away)), -away))[: len(empty)]
            for place, row in zip(empty, farthest.tolist(), strict=False):
                new[place] = self.rows.read(row, row + 1)[0]
        self.settled = counts > 0
        self.moved = (new != self.centroids).any(1)
        self.centroids = new
        return new

    def _label(self) -> None:
        """Every row's nearest centroid."""
        nearest, moved = Nearest(self.centroids, self.mean), np.flatnonzero(self.moved)
        few = Nearest(self.centroids[moved], self.mean) if 0 < len(moved) < MANY * len(self.centroids) else None

        def part(number: int) -> None:
            span = self.spans[number]
            labels, least = self.labels[span], self.least[span]
            open_ = (labels < 0) | self.moved[labels]
            if not len(moved) and not open_.any():
                return
            x, told = self._read(number)
            if few is None:
                labels[:], least[:] = nearest.closest(x, told)
                return
            open_[few.rivals(x, told, least)] = True
            again = np.flatnonzero(open_)
            labels[again], least[again] = nearest.closest(x[again], told.at(again))

        for _ in self.run(part, range(len(self.spans))):
            pass

    def _read(self, number: int) -> tuple[Floats, Told]:
        span, told = self.spans[number], self.told[number]
        x = self.rows.read(span.start, span.stop)
        if told is None:
            told = tell(x, self.mean, self.scale)
            if self.keeps:
                self.told[number] = told
        return x, told

    def _sums(self, wanted: Bools) -> Doubles:
        """[wanted, width] float64 sums of some centroids' rows."""
        number = np.cumsum(wanted) - 1

        def part(span: slice) -> tuple[Ints, Doubles] | None:
            inside = np.flatnonzero(wanted[self.labels[span]])
            if not len(inside):
                return None
            x = self.rows.read(span.start, span.stop)
            return _sums(x if len(inside) == len(x) else x[inside], number[self.labels[span][inside]])

        sums = np.zeros((int(wanted.sum()), self.centroids.shape[1]))
        for found in self.run(part, self.spans):
            if found is not None:
                sums[found[0]] += found[1]
        return sums

    def _away(self) -> Doubles:
        def part(span: slice) -> Doubles:
            return distances(self.rows.read(span.start, span.stop), self.centroids, self.labels[span])

        return np.concatenate(list(self.run(part, self.spans)))


def _sums(x: Floats, labels: Ints) -> tuple[Ints, Doubles]:
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
