"""Near copies inside clusters: connected components of the graph of cosines above a threshold, and who stays of each.

    rows of a cluster -> bit-identical ones are one -> pairs that 8-bit products leave open -> float64 decides -> joined

Pairs are joined as they are met; no list of edges is kept. Positions below are those of the rows that are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from leveret.condense import rows as exact
from leveret.condense import screen
from leveret.condense.rows import Array, Bools, Doubles, Ints

PENDING = 1 << 20
"""Pairs that wait to be joined: joining many at once is cheap, and this bounds what waits."""


BLOCK = 8192
"""Rows of a cluster that are made ready for products together."""


class Joined:
    """Which of n rows are in one component: `label` [n] is the lowest position in each row's, once `settle` has run."""

    def __init__(self, n: int) -> None:
        self.label = np.arange(n)
        self._waiting: list[tuple[Ints, Ints]] = []
        self._count = 0

    def add(self, i: Ints, j: Ints) -> None:
        if len(i):
            self._waiting.append((i, j))
            self._count += len(i)
            if self._count > PENDING:
                self.settle()

    def settle(self) -> Ints:
        if not self._waiting:
            return self.label
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        one = self.label[np.concatenate([i for i, _ in self._waiting])]
        two = self.label[np.concatenate([j for _, j in self._waiting])]
        self._waiting, self._count = [], 0
        differ = one != two
        one, two = one[differ], two[differ]
        if not len(one):
            return self.label
        roots = np.unique(np.concatenate([one, two]))
        ends = np.searchsorted(roots, one), np.searchsorted(roots, two)
        graph = coo_matrix((np.ones(len(one), np.bool_), ends), (len(roots), len(roots)))
        count, group = connected_components(graph, directed=False)
        lowest = np.full(count, len(self.label), np.int64)
        np.minimum.at(lowest, group, roots)
        renamed = np.arange(len(self.label))
        renamed[roots] = lowest[group]
        self.label = renamed[self.label]
        return self.label


def components(x: Array, bounds: Sequence[int] | Ints, threshold: float) -> Ints:
    """[n] the lowest position of each row's component.

    x       [n, width] rows as stored, cluster after cluster. bounds: where clusters begin, and n.
    Edge: cosine > threshold, strictly, as float64 says of the two rows' unit vectors; only inside a cluster.
    """
    joined, open_pairs = Joined(len(x)), _Open()
    first = _first_inside(x, bounds)
    again = np.flatnonzero(first != np.arange(len(x)))
    # A row and its copy have a cosine of 1 but for rounding, which matters for thresholds that near to 1 alone.
    copies = again[is_edge(x, first[again], x, again, threshold)] if threshold > 0.999 else again
    joined.add(first[copies], copies)
    fresh = np.flatnonzero(first == np.arange(len(x)))
    cuts = np.searchsorted(fresh, bounds)
    for start, stop in pairwise(cuts.tolist()):
        if stop - start > 1:
            _inside(x, fresh[start:stop], threshold, joined, open_pairs)
    open_pairs.decide(x, threshold, joined)
    return joined.settle()


def _first_inside(x: Array, bounds: Sequence[int] | Ints) -> Ints:
    """[n] the lowest position in its cluster that holds the same bits as each row."""
    first = exact.first_of_equal(x)
    begins = np.repeat(np.asarray(bounds[:-1], np.int64), np.diff(bounds))
    if (first < begins).any():  # clusters of k-means never share equal rows, other groups may
        for start, stop in pairwise(bounds):
            first[start:stop] = start + exact.first_of_equal(x[start:stop])
    return first


class _Open:
    """Pairs that the screen leaves open, by position."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Ints, Ints]] = []
        self.count = 0

    def add(self, i: Ints, j: Ints) -> None:
        if len(i):
            self.pairs.append((i, j))
            self.count += len(i)

    def decide(self, x: Array, threshold: float, joined: Joined) -> None:
        """Joins those that are edges; what is together already needs no second look."""
        if not self.pairs:
            return
        label = joined.settle()
        i, j = (np.concatenate([pair[side] for pair in self.pairs]) for side in (0, 1))
        self.pairs, self.count = [], 0
        apart = label[i] != label[j]
        i, j = i[apart], j[apart]
        for part in exact.spans(len(i), PENDING // 4):
            edge = is_edge(x, i[part], x, j[part], threshold)
            joined.add(i[part][edge], j[part][edge])


def is_edge(a: Array, i: Ints, b: Array, j: Ints, threshold: float) -> Array:
    """Whether rows a[i] and b[j] are nearer than the threshold: float32 says it where it can, float64 elsewhere."""
    edge = np.zeros(len(i), np.bool_)
    for part in exact.spans(len(i), exact.TOGETHER):
        one, two = a[i[part]], b[j[part]]
        rough, slack = exact.rough_cosines(one, two)
        edge[part] = rough > threshold
        near = np.flatnonzero(np.abs(rough - threshold) <= slack)
        if len(near):
            edge[part.start + near] = exact.cosines(one[near], two[near]) > threshold
    return edge


def _inside(x: Array, places: Ints, threshold: float, joined: Joined, open_pairs: _Open) -> None:
    """One cluster, held in memory: `places` are its distinct rows."""
    for i, j, sure in _candidates(x, places, threshold):
        joined.add(i[sure], j[sure])
        open_pairs.add(i[~sure], j[~sure])
        if open_pairs.count > PENDING:
            open_pairs.decide(x, threshold, joined)


def _candidates(x: Array, places: Ints, threshold: float) -> Iterator[tuple[Ints, Ints, Bools]]:
    """Pairs (i, j) of rows of x, among `places`, that may be nearer than the threshold, and which surely are.

    In blocks: one row that 8 bits tell too coarsely has its whole block compared in float32.
    """
    together = places[-1] - places[0] + 1 == len(places)
    own = x[places[0] : places[-1] + 1] if together else x[places]
    middle = screen.middle_of(own)
    blocks = [(part.start, screen.prepare(own[part], middle)) for part in exact.spans(len(own), BLOCK)]
    for number, (above, one) in enumerate(blocks):
        for left, two in blocks[number:]:
            for i, j, sure in screen.candidates(one, two, threshold, same=two is one):
                yield places[above + i], places[left + j], sure


def components_apart(
    read: Callable[[Ints], Array], n: int, threshold: float, size: int, turn: int | None = None
) -> Ints:
    """The same for one cluster that does not fit in memory: blocks of `size` rows are read and compared two at a time.

    read  places to rows as stored. turn: only block `turn` with itself and those after it, so that several may share
          the work; the components of all turns, joined, are those of the cluster.
    Memory: two blocks, and 8 bytes a row.
    """
    joined = Joined(n)
    middle = screen.middle_of(read(np.arange(min(n, screen.STEP))))
    blocks = [np.arange(part.start, part.stop) for part in exact.spans(n, size)]
    for number, upper in enumerate(blocks):
        if turn is not None and number != turn:
            continue
        x = read(upper)
        again = exact.first_of_equal(x)
        copies = np.flatnonzero(again != np.arange(len(x)))
        copies = copies[is_edge(x, again[copies], x, copies, threshold)]
        joined.add(upper[again[copies]], upper[copies])
        one = screen.prepare(x, middle)
        for lower in blocks[number:]:
            label = joined.settle()
            ends = label[upper], label[lower]
            if ends[0].min() == ends[0].max() == ends[1].min() == ends[1].max():
                continue  # all of one component, and nothing is ever parted again
            y, two = (x, one) if lower is upper else ((other := read(lower)), screen.prepare(other, middle))
            for i, j, sure in screen.candidates(one, two, threshold, same=lower is upper):
                joined.add(upper[i[sure]], lower[j[sure]])
                i, j = i[~sure], j[~sure]
                apart = joined.label[upper[i]] != joined.label[lower[j]]
                i, j = i[apart], j[apart]
                edge = is_edge(x, i, y, j, threshold)
                joined.add(upper[i[edge]], lower[j[edge]])
    return joined.settle()


# --- SemDeDup's rule -----------------------------------------------------------------------------------------------


def with_earlier_neighbour(x: Array, bounds: Sequence[int] | Ints, threshold: float, rank: Ints) -> Bools:
    """[n] whether an earlier row of the cluster (by `rank`, all different) is nearer than the threshold.

    SemDeDup's own rule (arXiv 2303.09540, semdedup.py: the column maxima of the upper triangle): a row goes when any
    earlier one is near, whether that one stays or not. So of a chain more than one row may stay.
    """
    first = _first_inside(x, bounds)
    # Of equal rows only the one that comes first can stay, and it is the one that others must fear.
    order = np.lexsort((rank, first))
    lead = order[np.r_[True, np.diff(first[order]) != 0][: len(order)]]
    gone = np.ones(len(x), np.bool_)
    gone[lead] = False
    if threshold > 0.999:
        again = np.flatnonzero(gone)
        ahead = np.empty(len(x), np.int64)
        ahead[first[lead]] = lead
        gone[again] = is_edge(x, ahead[first[again]], x, again, threshold)
        lead = np.flatnonzero(~gone)
    fresh = np.sort(lead)
    cuts = np.searchsorted(fresh, bounds)
    for start, stop in pairwise(cuts.tolist()):
        places = fresh[start:stop]
        if len(places) < 2:
            continue
        for one, two, sure in _candidates(x, places, threshold):
            later = np.where(rank[one] > rank[two], one, two)
            gone[later[sure]] = True
            open_ = np.flatnonzero(~sure & ~gone[later])
            if len(open_):
                edge = is_edge(x, one[open_], x, two[open_], threshold)
                gone[later[open_[edge]]] = True
    return gone


def with_earlier_neighbour_apart(read: Callable[[Ints], Array], threshold: float, rank: Ints, size: int) -> Bools:
    """The same for one cluster that does not fit in memory: blocks of `size` rows are compared two at a time.

    read  places to rows as stored. Memory: two blocks, and some bytes a row.
    """
    gone = np.zeros(len(rank), np.bool_)
    middle = screen.middle_of(read(np.arange(min(len(rank), screen.STEP))))
    blocks = [np.arange(part.start, part.stop) for part in exact.spans(len(rank), size)]
    for number, upper in enumerate(blocks):
        x = read(upper)
        gone[upper] |= with_earlier_neighbour(x, [0, len(x)], threshold, _places_of(rank[upper]))
        one = screen.prepare(x, middle)
        for lower in blocks[number + 1 :]:
            y = read(lower)
            for i, j, sure in screen.candidates(one, screen.prepare(y, middle), threshold):
                later = np.where(rank[upper[i]] > rank[lower[j]], upper[i], lower[j])
                gone[later[sure]] = True
                open_ = np.flatnonzero(~sure & ~gone[later])
                edge = is_edge(x, i[open_], y, j[open_], threshold)
                gone[later[open_[edge]]] = True
    return gone


def _places_of(rank: Ints) -> Ints:
    """[n] the position of each among them in order."""
    out = np.empty(len(rank), np.int64)
    out[np.argsort(rank, kind="stable")] = np.arange(len(rank))
    return out


# --- who stays -----------------------------------------------------------------------------------------------------


def rough_distances(read: Callable[[Ints], Array], places: Ints, centroids: Array, labels: Ints) -> Doubles:
    """[n] squared distances of unit vectors to centroids[labels], from float32."""
    out = np.empty(len(places))
    own = np.square(centroids.astype(np.float64)).sum(1)
    for part in exact.spans(len(places), exact.TOGETHER):
        middle = centroids[labels[part]].astype(np.float32, copy=False)
        product = np.einsum("ij,ij->i", exact.unit32(read(places[part])), middle)
        out[part] = 1 - 2.0 * product + own[labels[part]]
    return out


def by_distance(
    read: Callable[[Ints], Array], places: Ints, component: Ints, centroids: Array, labels: Ints
) -> Doubles:
    """[n] a key that orders the members of each component by their distance to the centroid, equal where that is equal.

    read    places to rows as stored. places, component, labels: [n] of the rows that are asked about.
    Where float32 tells two neighbours in this order apart the key is its distance; elsewhere float64 was asked.
    """
    rough = rough_distances(read, places, centroids, labels)
    longest = float(np.sqrt(np.square(centroids[np.unique(labels)].astype(np.float64)).sum(1).max(initial=1.0)))
    slack = (centroids.shape[1] + 32) * 2.0**-22 * longest
    order = np.lexsort((rough, component))
    near = (component[order][1:] == component[order][:-1]) & (np.diff(rough[order]) <= 2 * slack)
    doubtful = np.zeros(len(places), np.bool_)
    doubtful[order[1:][near]] = doubtful[order[:-1][near]] = True
    asked = np.flatnonzero(doubtful)
    key = np.sqrt(np.maximum(rough, 0.0))
    for part in exact.spans(len(asked), exact.TOGETHER):
        key[asked[part]] = exact.distances(read(places[asked[part]]), centroids, labels[asked[part]])
    return key


def by_mean(read: Callable[[Ints], Array], places: Ints, component: Ints) -> Doubles:
    """[n] distance of each row to the mean of its component's unit vectors (copies counted), in float64 and rounded to
    12 decimals: of two members both are equally far, and rounding in the last bits must not choose.

    Sums run in the order of `places`, so that they depend on nothing else.
    """
    order = np.argsort(component, kind="stable")
    key = np.empty(len(places))
    starts = np.flatnonzero(np.r_[True, np.diff(component[order]) != 0][: len(order)])
    for start, stop in pairwise([*starts.tolist(), len(order)]):
        inside = order[start:stop]
        total = np.zeros(0)
        for part in exact.spans(len(inside), exact.TOGETHER):
            x = exact.unit(read(places[inside[part]]))
            total = np.add.reduce(np.concatenate([total[None], x]) if len(total) else x, axis=0)
        mean = total / len(inside)
        for part in exact.spans(len(inside), exact.TOGETHER):
            x = exact.unit(read(places[inside[part]]))
            key[inside[part]] = np.sqrt(np.square(x - mean).sum(1))
    rounded: Doubles = np.round(key, 12)
    return rounded


@dataclass(frozen=True)
class KeepRow:
    """Which member of a component stays: sorted ascending by the key `by`, ties by id, the one at `place(size)`."""

    by: Literal["distance", "mean", "score"]
    place: Callable[[Ints], Ints]


KEEPS: dict[str, KeepRow] = {
    "middle": KeepRow("distance", lambda size: size // 2),
    "far": KeepRow("distance", lambda size: size - 1),
    "near": KeepRow("distance", lambda size: 0 * size),
    "inner-middle": KeepRow("mean", lambda size: size // 2),
    "best-score": KeepRow("score", lambda size: 0 * size),
}
"""Published: middle, far and inner-middle of Dataset-Pruning. `middle` is the upper median: of two, the farther one.
distance: L2, to the row's own centroid. mean: to the component's own mean. score: image-text, the highest first."""


def kept_of(component: Ints, key: Doubles, place: Callable[[Ints], Ints]) -> Ints:
    """[n] the position that is kept of each row's component: sorted by (key, position), the one at place(size)."""
    ranked = np.lexsort((key, component))
    starts = np.flatnonzero(np.r_[True, np.diff(component[ranked]) != 0][: len(ranked)])
    sizes = np.diff(np.r_[starts, len(ranked)])
    chosen = ranked[starts + place(sizes)]
    out = np.empty(len(component), np.int64)
    out[ranked] = np.repeat(chosen, sizes)
    return out
