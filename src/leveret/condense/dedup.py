"""Near copies: a graph of cosines inside each cluster, its connected components, one row kept of each.

edge         cosine > threshold, strictly, as float64 says; a float32 product only decides what is far from it
component    connected components of that graph inside one cluster, joined while pairs are met (no list of edges)
kept         one row by a rule of KEEPS, every tie by row number
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leveret.condense.table import (
    Array,
    Ints,
    Shop,
    Table,
    Vectors,
    Verdict,
    distances,
    dots,
    product,
    screen_error,
)

BLOCK = 2048
"""Rows of one block of the product: 2048 x 2048 float32 are 16 MB, whatever the size of a cluster."""

CACHED = 1 << 28
"""Bytes of float32 vectors of one cluster that are held at once; a larger cluster is read block by block."""

TASK = 1 << 17
"""Rows of the clusters that are remembered together for resuming. No part of the rule."""

REASONS = ("", "exact copy", "near copy")
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


# --- components ----------------------------------------------------------------------------------------------------


def components(
    read: Callable[[Ints], Floats], n: int, threshold: float, block: int = BLOCK, shop: Shop | None = None
) -> Ints:
    """The lowest position of each row's component, [n] int64.

    read   positions to vectors (float32 [*, width], each of length 1 or nearly so).
    shop   whose workers take the products; what they find is joined in order, by this thread.
    Memory: for each worker a few blocks of vectors and two bits a pair of theirs; 8 bytes a row.
    """
    label = np.arange(n)
    for top in range(0, n, block):
        upper = np.arange(top, min(top + block, n))
        a = read(upper)

        def screen(left: int, upper: Ints = upper, a: Floats = a) -> tuple[Ints, Screened | None]:
            lower = np.arange(left, min(left + block, n))
            found = label[upper], label[lower]
            if found[0].min() == found[0].max() == found[1].min() == found[1].max():
                return lower, None  # all of one component, and nothing is ever parted again
            return lower, _screen(a, read(lower), threshold)

        for lower, screened in (shop or Shop()).map(screen, range(top, n, block)):
            if screened is not None:
                label[:] = _join(label, upper, lower, a, screened, threshold)
    return label


@dataclass(frozen=True)
class Screened:
    """What float32 says of all pairs of two blocks. sure: edges. unsure: too near the threshold to tell."""

    b: Floats
    sure: NDArray[np.bool_]
    unsure: NDArray[np.bool_]


def _screen(a: Floats, b: Floats, threshold: float) -> Screened | None:
    """None where no pair can be an edge."""
    slack = screen_error(a.shape[1]) * _longest(a) * _longest(b) + 2.0**-24
    cosine = product(a, b)
    # Two thresholds in float32, rounded outwards, so that "sure" is sure and nothing possible is passed over.
    lowest = np.nextafter(np.float32(threshold - slack), np.float32(-np.inf))
    if cosine.max() < lowest:
        return None
    sure = cosine > np.nextafter(np.float32(threshold + slack), np.float32(np.inf))
    return Screened(b, sure, (cosine >= lowest) & ~sure)


def _join(label: Ints, upper: Ints, lower: Ints, a: Floats, screened: Screened, threshold: float) -> Ints:
    """`label` after the edges between two blocks."""
    label = _merge(label, upper, lower, *np.nonzero(screened.sure))
    i, j = np.nonzero(screened.unsure)
    # What is already together, and each pair's mirror image, need no second look.
    open_ = (label[upper[i]] != label[lower[j]]) & (upper[i] < lower[j])
    i, j = i[open_], j[open_]
    for at in range(0, len(i), BLOCK):
        part = slice(at, at + BLOCK)
        edge = dots(a[i[part]], screened.b[j[part]]) > threshold
        label = _merge(label, upper, lower, i[part][edge], j[part][edge])
    return label


def _longest(x: Floats) -> float:
    return float(np.sqrt(np.square(x.astype(np.float64)).sum(1).max()))


def _merge(label: Ints, upper: Ints, lower: Ints, i: Ints, j: Ints) -> Ints:
    """`label` with rows upper[i] and lower[j] in one component; labels stay lowest positions."""
    one, two = label[upper[i]], label[lower[j]]
    differ = one != two
    if not differ.any():
        return label
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    one, two = one[differ], two[differ]
    roots = np.unique(np.concatenate([one, two]))
    shape = (len(roots), len(roots))
    ends = (np.searchsorted(roots, one), np.searchsorted(roots, two))
    count, group = connected_components(coo_matrix((np.ones(len(one), np.bool_), ends), shape), directed=False)
    lowest = np.full(count, len(label), np.int64)
    np.minimum.at(lowest, group, roots)
    renamed = np.arange(len(label))
    renamed[roots] = lowest[group]
    return renamed[label]


# --- which row is kept ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Members:
    """All rows of the components of one cluster that have at least two, sorted by (component, row).

    component, row   [m]. starts: where each component begins. source: position of each row's vector among the
    cluster's distinct ones. vectors: those positions to float32. centroid: [width]. score: [m] or None.
    """

    component: Ints
    row: Ints
    starts: Ints
    source: Ints
    vectors: Callable[[Ints], Floats]
    centroid: Floats
    score: Array | None

    def spread(self, values: Callable[[Floats, Ints], Doubles]) -> Doubles:
        """`values(vectors, positions)` of every distinct vector, given to each of its copies. In blocks."""
        distinct, back = np.unique(self.source, return_inverse=True)
        parts = [distinct[at : at + BLOCK] for at in range(0, len(distinct), BLOCK)]
        return np.concatenate([values(self.vectors(part), part) for part in parts])[back]


def _to_centroid(members: Members) -> Doubles:
    return members.spread(lambda x, _: distances(x, members.centroid))


def _to_mean(members: Members) -> Doubles:
    """Squared distance to the mean of the component's rows, copies counted; sums run in row order in float64."""
    out = np.empty(len(members.row))
    for start, end in zip(members.starts, np.r_[members.starts[1:], len(members.row)], strict=True):
        total = np.zeros(len(members.centroid))
        for at in range(start, end, BLOCK):
            x = members.vectors(members.source[at : min(at + BLOCK, end)]).astype(np.float64)
            # cumulative, so that a block border changes no bit
            total = np.add.reduce(np.concatenate([total[None], x]), axis=0)
        mean = total / (end - start)
        for at in range(start, end, BLOCK):
            part = slice(at, min(at + BLOCK, end))
            out[part] = distances(members.vectors(members.source[part]), mean)
    return out


def _worse(members: Members) -> Doubles:
    assert members.score is not None, "the recipe's check lets no best-score through without scores"
    return -members.score


@dataclass(frozen=True)
class KeepRow:
    """A rule: members are sorted ascending by (`key`, row number), and the one at `place(size)` is kept."""

    key: Callable[[Members], Doubles]
    place: Callable[[Ints], Ints]
    needs_score: bool = False


KEEPS: dict[str, KeepRow] = {
    "middle": KeepRow(_to_centroid, lambda size: size // 2),
    "far": KeepRow(_to_centroid, lambda size: size - 1),
    "near": KeepRow(_to_centroid, lambda size: 0 * size),
    "inner-middle": KeepRow(_to_mean, lambda size: size // 2),
    "best-score": KeepRow(_worse, lambda size: 0 * size, needs_score=True),
}
"""Published: middle, far and inner-middle of Dataset-Pruning. `middle` is the upper median: of two, the farther one."""


# --- the step ------------------------------------------------------------------------------------------------------


def dedup(table: Table, config: Any, shop: Shop) -> Verdict:
    """Keeps one row of each component; adds `component` (its lowest row number), `component_size` and
    `representative` (the kept row's number). Copies marked by `collapse` count as often as they occur.

    config: threshold, keep (a name of KEEPS).
    """
    n = len(table)
    clusters = table.columns["cluster"]
    order = np.argsort(clusters, kind="stable")
    found = np.zeros((3, n), np.int64)

    def judge(group: Ints) -> Ints:
        return _one_cluster(table, group, config, Shop())

    starts = np.flatnonzero(np.r_[True, np.diff(clusters[order]) != 0][:n])
    groups = [order[a:b] for a, b in zip(starts, np.r_[starts[1:], n], strict=True)] if n else []
    task = 0
    while groups:
        # Clusters are done in tasks of some TASK rows; a killed run goes on with the first task it did not finish.
        ends = np.searchsorted(np.cumsum([len(group) for group in groups]), TASK) + 1
        batch, groups = groups[:ends], groups[ends:]

        def part(batch: list[Ints] = batch) -> Ints:
            if len(batch) == 1:  # the workers share one large cluster, or take a small one each
                return _one_cluster(table, batch[0], config, shop)
            return np.concatenate(list(shop.map(judge, batch)), axis=1)

        found[:, np.concatenate(batch)] = shop.memo(f"clusters_{task:06d}", part)
        task += 1
    component, size, kept = found
    keep = kept == table.rows
    reason = np.where(keep, 0, 2).astype(np.uint8)
    if "copy_of" in table.columns and n:
        first = table.columns["copy_of"]
        reason[~keep & (first == first[np.searchsorted(table.rows, kept)])] = 1
    sizes = size[component == table.rows]
    counts = np.unique(sizes, return_counts=True)
    notes = {
        "components": len(sizes),
        "largest_component": int(sizes.max(initial=0)),
        "sizes": [[int(size), int(count)] for size, count in zip(*counts, strict=True)],
        "exact_copies": int((reason == 1).sum()),
        "near_copies": int((reason == 2).sum()),
    }
    columns = {"component": component, "component_size": size, "representative": kept}
    return Verdict(keep, reason, REASONS, columns=columns, notes=notes)


def _one_cluster(table: Table, group: Ints, config: Any, shop: Shop) -> Ints:
    """[3, len(group)]: component, size and kept row number of each row of one cluster (`group`: its positions)."""
    rows = table.rows[group]
    first = table.columns["copy_of"][group] if "copy_of" in table.columns else rows
    distinct, source = np.unique(first, return_inverse=True)
    read = _reader(table.vectors, distinct)
    lowest = components(read, len(distinct), config.threshold, BLOCK, shop)
    # Of a component, the lowest row number is its lowest distinct row's: a copy stands after its first.
    component = distinct[lowest][source]
    if "copy_of" in table.columns:
        component = _unless_short(read, source, rows, component, config.threshold)
    out = np.stack([component, np.ones_like(rows), rows])
    _, back, counts = np.unique(component, return_inverse=True, return_counts=True)
    out[1] = counts[back]
    several = np.flatnonzero(out[1] > 1)
    if len(several):
        order = several[np.argsort(component[several], kind="stable")]
        inside, starts, sizes = np.unique(component[order], return_index=True, return_counts=True)
        score = table.columns["score"][group][order] if "score" in table.columns else None
        centroid = table.facts["centroids"][table.columns["cluster"][group[0]]]
        members = Members(component[order], rows[order], starts, source[order], read, centroid, score)
        rule = KEEPS[config.keep]
        ranked = np.lexsort((members.row, rule.key(members), members.component))
        picked = members.row[ranked[starts + rule.place(sizes)]]
        out[2, order] = picked[np.searchsorted(inside, members.component)]
    return out


def _unless_short(read: Callable[[Ints], Floats], source: Ints, rows: Ints, component: Ints, threshold: float) -> Ints:
    """Copies are an edge only if their own product passes the threshold: rounding makes rows a little short of 1.

    Matters for thresholds within rounding of 1 alone. A short row has no edge at all to its copies, and (by Cauchy and
    Schwarz) none to a row that is not longer; where it is joined through a longer one, so are its copies.
    """
    return component if threshold < 0.99 else _exactly(read, source, rows, component, threshold)


def _exactly(read: Callable[[Ints], Floats], source: Ints, rows: Ints, component: Ints, threshold: float) -> Ints:
    counts = np.bincount(source)
    out = component.copy()
    _, back, sizes = np.unique(component, return_inverse=True, return_counts=True)
    alone = sizes[back] == counts[source]
    for position in np.flatnonzero(counts > 1):
        inside = np.flatnonzero(source == position)
        x = read(np.array([position]))
        if alone[inside[0]] and not dots(x, x)[0] > threshold:
            out[inside] = rows[inside]
    return out


def _reader(vectors: Vectors, rows: Ints) -> Callable[[Ints], Floats]:
    if len(rows) * vectors.width * 4 <= CACHED:
        held = vectors.take(rows)
        return lambda positions: held[positions]
    return lambda positions: vectors.take(rows[positions])
