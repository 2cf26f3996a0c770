"""The in-cluster step beside SemDeDup's: near copies of 200,000 rows in 500 skewed clusters, one thread, CPU seconds.

    python speed/dedup.py [--rows 200000] [--width 512] [--clusters 500] [--copies 0.3] [--turns 3] [--check]

A is SemDeDup's way (facebookresearch/SemDeDup, semdedup.py): the whole matrix of a cluster in float32, its upper
triangle, the column maxima. B is ours: components by exact cosines, and the row that is kept of each. They run in turn
in one process, A, B, A, B. B answers more (components, and who stays), and exactly. `--check` compares B's kept rows
with a float64 brute force on the same clusters.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from leveret.condense import groups

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
THRESHOLD, THEIRS = 0.86, "SemDeDup's"


def rows_of(n: int, width: int, k: int, copies: float, seed: int = 0) -> tuple[Floats, Ints, Ints]:
    """Unit rows sorted by cluster, their clusters, and the clusters' bounds. In a cluster cosines are about .5; a share
    of the rows are another row of their cluster, moved by .05 to .6 of its length."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, k + 1) ** 0.62
    label = np.sort(rng.choice(k, n, p=shares / shares.sum()))
    bounds = np.searchsorted(label, np.arange(k + 1))

    def unit(x: Floats) -> Floats:
        found: Floats = x / np.linalg.norm(x, axis=1, keepdims=True)
        return found

    def noise(count: int) -> Floats:
        return unit(rng.standard_normal((count, width), dtype=np.float32))

    x = unit(noise(n) + noise(k)[label])
    moved = rng.permutation(n)[: int(copies * n)]
    first, sizes = bounds[label[moved]], np.diff(bounds)[label[moved]]
    away = rng.uniform(0.05, 0.6, (len(moved), 1)).astype(np.float32)
    x[moved] = unit(x[first + (rng.random(len(moved)) * sizes).astype(np.int64)] + away * noise(len(moved)))
    return x, label, bounds


def semdedup(x: Floats, bounds: Ints) -> int:
    """How many rows SemDeDup's rule keeps."""
    kept = 0
    for start, stop in pairwise(bounds.tolist()):
        rows = torch.from_numpy(x[start:stop])
        if len(rows):
            similarity = torch.triu(rows @ rows.T, diagonal=1)
            kept += int((similarity.max(dim=0).values <= THRESHOLD).sum())
    return kept


def ours(x: Floats, label: Ints, bounds: Ints, centroids: Floats) -> Ints:
    """The row that is kept of each row's component."""
    component = groups.components(x, bounds, THRESHOLD)
    _, back, counts = np.unique(component, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[back] > 1)
    key = groups.by_distance(lambda places: x[places], several, component[several], centroids, label[several])
    kept = np.arange(len(x))
    kept[several] = several[groups.kept_of(component[several], key, groups.KEEPS["middle"].place)]
    return kept


def brute(x: Floats, bounds: Ints, centroids: Floats) -> Ints:
    """The same in float64, all pairs."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    unit = x.astype(np.float64)
    unit /= np.sqrt(np.square(unit).sum(1))[:, None]
    kept = np.arange(len(x))
    for cluster, (start, stop) in enumerate(pairwise(bounds.tolist())):
        if start == stop:
            continue
        inside = unit[start:stop]
        count, group = connected_components(coo_matrix(inside @ inside.T > THRESHOLD), directed=False)
        away = np.sqrt(np.square(inside - centroids[cluster].astype(np.float64)).sum(1))
        order = np.lexsort((away, group))
        starts, sizes = np.searchsorted(group[order], np.arange(count)), np.bincount(group)
        kept[start:stop] = (start + order[starts + sizes // 2])[group]
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--copies", type=float, default=0.3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    x, label, bounds = rows_of(given.rows, given.width, given.clusters, given.copies)
    sizes = np.diff(bounds)
    centroids = np.stack([x[a:b].mean(0) if b > a else np.zeros(given.width, np.float32) for a, b in pairwise(bounds)])
    skew = len(sizes) * float(np.square(sizes.astype(np.float64)).sum()) / len(x) ** 2
    print(f"{len(x):,} rows of {given.width}, {len(sizes)} clusters, the largest {sizes.max():,}, skew {skew:.2f}")
    spent: dict[str, list[float]] = {THEIRS: [], "ours": []}
    for _ in range(given.turns):
        began = time.process_time()
        left = semdedup(x, bounds)
        spent[THEIRS].append(time.process_time() - began)
        began = time.process_time()
        kept = ours(x, label, bounds, centroids)
        spent["ours"].append(time.process_time() - began)
        ratio = spent[THEIRS][-1] / spent["ours"][-1]
        print(f"SemDeDup's {spent[THEIRS][-1]:.2f} s, ours {spent['ours'][-1]:.2f} s: {ratio:.2f} times less")
    components = int((kept == np.arange(len(x))).sum())
    print(f"kept: {left:,} by SemDeDup's rule (no earlier neighbour), {components:,} by ours (one a component)")
    print(f"median ratio {median(a / b for a, b in zip(*spent.values(), strict=True)):.2f}")
    if given.check:
        print(
            f"rows whose kept one differs from the float64 brute force's: {(kept != brute(x, bounds, centroids)).sum()}"
        )


if __name__ == "__main__":
    main()
