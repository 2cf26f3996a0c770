"""Clusters as concepts: how many rows each may keep, and which clusters are kept at all.

density        more of clusters that are wide and stand apart        Density-Based Pruning, arXiv 2401.04578
image_cluster  clusters that some target image falls into            DataComp's image-based filter, arXiv 2304.14108
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from leveret.condense import ranks
from leveret.condense.given import Given
from leveret.condense.lloyd import Map, finish
from leveret.condense.rows import Array, Doubles, Floats, Ints, spans
from leveret.condense.screen import Nearest
from leveret.condense.working import Part, Rows
from leveret.runs import DataError

DIGITS = 9
"""Decimals of a cluster's complexity: what a product of matrices leaves in the last bits decides nothing."""

SALT = 4
TOGETHER = 65_536


# --- density -------------------------------------------------------------------------------------------------------


def density(
    rows: Rows,
    label: str,
    amount: int,
    centroids: Floats,
    *,
    temperature: float,
    neighbours: int,
    keep: str,
    seed: int,
    run: Map,
) -> tuple[Rows, dict[str, Any]]:
    """Keeps `amount` rows: of each cluster its quota, the ones that `keep` says.

    keep  hard: the least similar to their centroid first; easy: the most similar; random: the seeded order of id
          hashes. Ties by id.
    Also returns {"clusters": those with rows, "least", "most": the smallest and the largest share that a cluster kept}.
    """
    k = len(centroids)

    def widths(part: Part) -> tuple[Ints, Doubles]:
        """[k] rows of each cluster, and the sum of their distances to the centroid, in the order of ids."""
        alive = rows.alive(part)
        cluster, near = (column[alive] for column in part.read("cluster", "centroid_cosine"))
        count, distance = np.bincount(cluster, minlength=k), np.bincount(cluster, 1.0 - near, k)
        return count.astype(np.int64), distance.astype(np.float64)

    sizes, away = np.zeros(k, np.int64), np.zeros(k)
    for count, distance in run(widths, rows.parts):
        sizes += count
        away += distance  # a cluster lies in one part: everything else adds nothing
    quota = np.zeros(k, np.int64)
    there = np.flatnonzero(sizes)
    if len(there):
        complexity = np.round(apart(centroids[there], neighbours) * away[there] / sizes[there], DIGITS)
        weight = np.exp((complexity - complexity.max()) / temperature)
        quota[there] = quotas(weight / weight.sum(), sizes[there], amount)

    def judge(part: Part) -> None:
        if rows.place(label, part).exists():
            return
        alive = rows.alive(part)
        cluster, near, hashes = (column[alive] for column in part.read("cluster", "centroid_cosine", "hash"))
        key: Array = {"hard": near, "easy": -near}.get(keep, np.zeros(0))
        if keep == "random":
            key = ranks.hash_keys(hashes, seed, SALT)
        order = np.lexsort((np.arange(len(alive)), key, cluster))
        begins = np.searchsorted(cluster[order], np.arange(k))
        dropped = np.zeros(part.n, np.bool_)
        place = np.arange(len(alive)) - begins[cluster[order]]
        dropped[alive[order]] = place >= quota[cluster[order]]
        rows.judge(label, part, dropped)

    finish(run(judge, rows.parts))
    share = quota[there] / sizes[there]
    notes = {"clusters": len(there)}
    return rows.after(label), notes | ({"least": float(share.min()), "most": float(share.max())} if len(there) else {})


def apart(centroids: Floats, neighbours: int) -> Doubles:
    """[k] mean of 1 - cosine of each centroid to its nearest others, at most `neighbours`; 0 for one alone."""
    wide = centroids.astype(np.float64)
    lengths = np.sqrt(np.square(wide).sum(1))[:, None]
    wide = np.divide(wide, lengths, out=np.zeros(wide.shape), where=lengths > 0)
    k = len(wide)
    m = min(neighbours, k - 1)
    out = np.zeros(k)
    for part in spans(k if m else 0, 256):
        cosine = wide[part] @ wide.T
        cosine[np.arange(len(cosine)), np.arange(part.start, part.stop)] = -2.0
        out[part] = 1.0 - np.sort(np.partition(cosine, k - m, axis=1)[:, k - m :], axis=1).mean(1)
    return out


def quotas(share: Doubles, sizes: Ints, amount: int) -> Ints:
    """[k] whole numbers that add up to min(amount, all rows): the nearest in squares to `share` times that many, none
    above its cluster's size and, where there are enough, each at least 1 (0 for a cluster of one, as published).

    The published program is min sum (x - N p)^2 with sum x = N and these bounds; its solution is N p moved by one
    number and cut at the bounds. Fractions are then given to the largest remainders, ties to the lowest cluster.
    """
    total = int(min(amount, sizes.sum()))
    least = np.minimum(1, sizes - 1)
    if least.sum() > total:
        least = np.zeros_like(sizes)
    wanted = share * total

    def at(moved: float) -> Doubles:
        cut: Doubles = np.clip(wanted + moved, least, sizes)
        return cut

    low, high = -float(wanted.max(initial=0.0)) - 1.0, float(sizes.max(initial=0)) + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if at(middle).sum() < total:
            low = middle
        else:
            high = middle
    exact = np.round(at(high), 6)
    found = np.floor(exact).astype(np.int64)
    for one in np.lexsort((np.arange(len(found)), -(exact - found))):
        if found.sum() >= total:
            break
        found[one] += found[one] < sizes[one]
    for one in np.lexsort((np.arange(len(found)), exact - found)):  # rounding may have given one too many
        if found.sum() <= total:
            break
        found[one] -= found[one] > least[one]
    return found


# --- clusters that hold a target -----------------------------------------------------------------------------------


def image_cluster(rows: Rows, label: str, targets: Given, centroids: Floats, run: Map) -> tuple[Rows, dict[str, Any]]:
    """Keeps the rows of clusters that are nearest to at least one target.

    Also returns {"targets": how many, "clusters": how many are kept}. DataError where targets have another width.
    """
    width = centroids.shape[1]
    if any(shard.width != width for shard in targets.shards):
        raise DataError(
            f"{targets.path}: targets of width {targets.shards[0].width}, and the rows have {width}; both must come "
            "from one encoder"
        )
    nearest = Nearest(centroids)
    wanted = np.zeros(len(centroids), np.bool_)
    for labels in run(lambda block: np.unique(nearest.of(block[0].read(*block[1:]))), list(_blocks(targets))):
        wanted[labels] = True

    def judge(part: Part) -> None:
        if not rows.place(label, part).exists():
            rows.judge(label, part, ~wanted[part.read("cluster")[0]])

    finish(run(judge, rows.parts))
    return rows.after(label), {"targets": len(targets), "clusters": int(wanted.sum())}


def _blocks(targets: Given) -> Iterator[tuple[Any, int, int]]:
    for shard in targets.shards:
        yield from ((shard, span.start, span.stop) for span in spans(shard.n, TOGETHER))
