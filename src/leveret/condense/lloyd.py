"""k-means, our own Lloyd: the same bits for any number of workers, on one machine or many.

Training rows stand in the order of their ids' hash and are summed in fixed chunks of that order; labels are exact
(`screen.Nearest`), sums of a chunk are float64 in row order, and chunks are added in their order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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


Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""(function, items) -> the function of each, in the order of the items. It may run in another process: what it needs
comes with it, and what it finds it returns, or writes to a file."""


def finish(results: Iterator[Any]) -> None:
    """Waits for tasks that write files and give nothing back."""
    for _ in results:
        pass


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


@dataclass(frozen=True)
class _Chunk:
    """Rows that are looked at together, and what is known of each: its label, its bound, and itself made ready."""

    span: slice
    labels: Ints
    least: Doubles
    told: Told | None


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
        rows, mean, scale, moved, keeps = self.rows, self.mean, self.scale, self.moved, self.keeps
        nearest, which = Nearest(self.centroids, mean), np.flatnonzero(moved)
        few = Nearest(self.centroids[which], mean) if 0 < len(which) < MANY * len(moved) else None

        def look(chunk: _Chunk) -> tuple[Ints, Ints, Doubles, Told | None] | None:
            """(places, their labels, their bounds, the rows made ready); None where nothing can have changed."""
            open_ = (chunk.labels < 0) | moved[chunk.labels]
            if not len(which) and not open_.any():
                return None
            x = rows.read(chunk.span.start, chunk.span.stop)
            told = tell(x, mean, scale) if chunk.told is None else chunk.told
            if few is not None:
                open_[few.rivals(x, told, chunk.least)] = True
            again = np.arange(len(x)) if few is None else np.flatnonzero(open_)
            found = nearest.closest(x, told) if few is None else nearest.closest(x[again], told.at(again))
            return again, *found, told if keeps else None

        chunks = [
            _Chunk(span, self.labels[span], self.least[span], told)
            for span, told in zip(self.spans, self.told, strict=True)
        ]
        for number, found in enumerate(self.run(look, chunks)):
            if found is not None:
                span = self.spans[number]
                self.labels[span][found[0]], self.least[span][found[0]], self.told[number] = found[1:]

    def _sums(self, wanted: Bools) -> Doubles:
        """[wanted, width] float64 sums of some centroids' rows."""
        rows, number = self.rows, np.cumsum(wanted) - 1

        def part(chunk: tuple[slice, Ints]) -> tuple[Ints, Doubles] | None:
            span, labels = chunk
            inside = np.flatnonzero(wanted[labels])
            if not len(inside):
                return None
            x = rows.read(span.start, span.stop)
            return _sums(x if len(inside) == len(x) else x[inside], number[labels[inside]])

        sums = np.zeros((int(wanted.sum()), self.centroids.shape[1]))
        for found in self.run(part, [(span, self.labels[span]) for span in self.spans]):
            if found is not None:
                sums[found[0]] += found[1]
        return sums

    def _away(self) -> Doubles:
        rows, centroids = self.rows, self.centroids

        def part(chunk: tuple[slice, Ints]) -> Doubles:
            return distances(rows.read(chunk[0].start, chunk[0].stop), centroids, chunk[1])

        return np.concatenate(list(self.run(part, [(span, self.labels[span]) for span in self.spans])))


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
