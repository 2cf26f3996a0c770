"""k-means, our own Lloyd: plain L2 on raw centroids, the same bits for any number of workers and any BLAS.

Products are taken in float32 only to see which centroids can be nearest; where more than one can (the screen's error is
bounded), float64 decides, ties going to the lowest number. So labels, and then sums of rows taken in float64 and added
chunk by chunk in order, are functions of the data alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leveret.condense.copies import first_of_equal
from leveret.condense.table import (
    Array,
    Ints,
    Shop,
    Table,
    Vectors,
    Verdict,
    distances,
    dots,
    hash_order,
    keep_all,
    product,
    screen_error,
)

CHUNK = 8192
"""Training rows whose sums are taken together. Part of the rule: another number gives other bits."""

SPAN = 1 << 17
"""Rows assigned (and remembered) together. No part of the rule."""

LEAST = 65536
"""Training rows are at least this many (where there are so many): one centroid of 256 rows would be a rough mean."""

SALT = 1
Floats = NDArray[np.float32]


def cluster(table: Table, config: Any, shop: Shop) -> Verdict:
    """Adds `cluster` and `centroid_cosine`, and the fact `centroids`. Drops nothing.

    config: k (a number, or "auto" = sqrt(n / 2), where assignment and pairs cost the same), iterations,
    rows_per_centroid. With fewer distinct training rows than k, k is their number.
    """
    n = len(table)
    if not n:
        empty = {"cluster": np.zeros(0, np.int32), "centroid_cosine": np.zeros(0)}
        return keep_all(0, columns=empty, facts={"centroids": np.zeros((0, table.vectors.width), np.float32)})
    wanted = max(1, round(math.sqrt(n / 2))) if config.k == "auto" else min(int(config.k), n)
    ranked = hash_order(table.columns["hash"], shop.seed, SALT)
    training = ranked[: max(LEAST, wanted * config.rows_per_centroid)]
    centroids, rounds = train(table.vectors, table.rows[training], wanted, config.iterations, shop)
    distinct = table.rows if "copy_of" not in table.columns else np.unique(table.columns["copy_of"])
    labels, cosines = assign_all(table.vectors, distinct, centroids, shop)
    if "copy_of" in table.columns:
        # Equal rows get equal labels by themselves (float64 decides row by row): one of each is enough.
        back = np.searchsorted(distinct, table.columns["copy_of"])
        labels, cosines = labels[back], cosines[back]
    sizes = np.bincount(labels, minlength=len(centroids))
    notes = {
        "clusters": len(centroids),
        "empty": int((sizes == 0).sum()),
        "largest": int(sizes.max()),
        "iterations": rounds,
        "training_rows": len(training),
    }
    columns = {"cluster": labels, "centroid_cosine": cosines}
    return keep_all(n, columns=columns, facts={"centroids": centroids}, notes=notes)


# --- training ------------------------------------------------------------------------------------------------------


def train(vectors: Vectors, rows: Ints, k: int, iterations: int, shop: Shop) -> tuple[Floats, int]:
    """Centroids [<= k, width] float32 and the number of rounds made.

    rows   training rows in hash order: the first k distinct vectors among them are where the centroids start.
    A cluster that loses all its rows takes the training row that is farthest from its own centroid (the next
    farthest for the next empty one; ties by row number). Rounds end when no centroid moves, or at `iterations`.
    """
    centroids = shop.memo("start", lambda: _start(vectors, rows, k))
    rows = np.sort(rows)
    made = 0
    for made in range(1, iterations + 1):
        before = centroids

        def once(before: Floats = before) -> Floats:
            return _round(vectors, rows, before, shop)

        centroids = shop.memo(f"round_{made:03d}", once)
        if np.array_equal(centroids, before):
            break
    return centroids, made


def _start(vectors: Vectors, rows: Ints, k: int) -> Floats:
    # A few more than k are looked at first; all of them only where copies are many.
    for count in (2 * k, len(rows)):
        looked = rows[:count]
        found = looked[np.unique(first_of_equal(vectors.raw(looked)))]
        if len(found) >= k or count >= len(rows):
            break
    return vectors.take(found[:k])


def _round(vectors: Vectors, rows: Ints, centroids: Floats, shop: Shop) -> Floats:
    search = Search(centroids)

    def part(start: int) -> tuple[Array, Array, Array, Array]:
        x = vectors.take(rows[start : start + CHUNK])
        labels = search.nearest(x)
        order = np.argsort(labels, kind="stable")
        found, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
        # reduceat adds the rows of one label in row order, in float64.
        return labels, found, np.add.reduceat(x[order].astype(np.float64), starts, axis=0), counts

    sums = np.zeros(centroids.shape)
    counts = np.zeros(len(centroids), np.int64)
    everyone = []
    for labels, found, part_sums, part_counts in shop.map(part, range(0, len(rows), CHUNK)):
        sums[found] += part_sums
        counts[found] += part_counts
        everyone.append(labels)
    out = centroids.copy()
    full = counts > 0
    out[full] = (sums[full] / counts[full, None]).astype(np.float32)
    empty = np.flatnonzero(~full)
    if len(empty):
        out[empty] = vectors.take(_farthest(vectors, rows, np.concatenate(everyone), centroids, len(empty)))
    return out


def _farthest(vectors: Vectors, rows: Ints, labels: Array, centroids: Floats, count: int) -> Ints:
    away = np.concatenate(
        [
            distances(vectors.take(rows[start : start + CHUNK]), centroids[labels[start : start + CHUNK]])
            for start in range(0, len(rows), CHUNK)
        ]
    )
    return rows[np.argsort(-away, kind="stable")[:count]]


# --- assignment ----------------------------------------------------------------------------------------------------


class Search:
    """Nearest centroid by L2, as float64 says, ties to the lowest number."""

    def __init__(self, centroids: Floats) -> None:
        self.centroids = np.ascontiguousarray(centroids)
        squares = np.square(centroids.astype(np.float64)).sum(1)
        self.half = (squares / 2).astype(np.float32)
        longest = float(np.sqrt(squares.max()))
        error = screen_error(centroids.shape[1])
        # Per unit of |x|, and what does not depend on x: rounding of |c|^2 / 2 and of the subtraction.
        self.slope, self.base = 2 * (error + 2.0**-23) * longest, 2.0**-21 * float(squares.max()) + 1e-30

    def nearest(self, x: Floats) -> NDArray[np.int32]:
        """[n, width] to labels [n] int32."""
        closeness = product(x, self.centroids)  # x.c - |c|^2 / 2 is largest where |x - c|^2 is smallest
        closeness -= self.half
        labels = closeness.argmax(1).astype(np.int32)
        best = closeness[np.arange(len(x)), labels]
        slack = (self.slope * np.sqrt(np.square(x).sum(1)) * 1.01 + self.base).astype(np.float32)
        can = closeness >= (best - slack)[:, None]
        unsure = np.flatnonzero(can.sum(1) > 1)
        if len(unsure):
            row, candidate = np.nonzero(can[unsure])
            # In float64, for all pairs in doubt; the pair list is cut so that memory stays bounded.
            away = np.concatenate(
                [distances(x[unsure[row[part]]], self.centroids[candidate[part]]) for part in _parts(len(row), CHUNK)]
            )
            order = np.lexsort((candidate, away, row))
            first = np.unique(row[order], return_index=True)[1]
            labels[unsure] = candidate[order][first]
        return labels


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))


def assign_all(
    vectors: Vectors, rows: Ints, centroids: Floats, shop: Shop
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """The label of every row, and its cosine with the normalised centroid (0 where the centroid is the zero vector)."""
    search = Search(centroids)
    lengths = np.sqrt(np.square(centroids.astype(np.float64)).sum(1, keepdims=True))
    unit = np.divide(centroids, lengths, out=np.zeros(centroids.shape), where=lengths > 0)

    def part(block: Ints) -> Array:
        x = vectors.take(block)
        labels = search.nearest(x)
        return np.stack([labels.astype(np.float64), dots(x, unit[labels])])

    def span(start: int) -> Array:
        inside = rows[start : start + SPAN]
        blocks = [inside[at : at + CHUNK] for at in range(0, len(inside), CHUNK)]
        return np.concatenate(list(shop.map(part, blocks)), axis=1)

    parts = []
    for start in range(0, len(rows), SPAN):
        parts.append(shop.memo(f"assigned_{start:012d}", lambda start=start: span(start)))  # type: ignore[misc]
    found = np.concatenate(parts, axis=1)
    return found[0].astype(np.int32), found[1]
