"""What a sample of rows tells of near copies among all: how many a dedup would leave, as a range.

Of near copies a sample shows few: a pair is seen when both its rows are drawn. At the high end as large a share is
dropped of all rows as of the sample. At the low end at most one row for each pair that the pairs in the sample stand
for (exactly that where copies come in pairs), and so many that as many groups are left as those in the sample tell of
(Chao's bound). Each end is two or three standard deviations of what a sample may be off away.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from leveret.condense import groups, screen
from leveret.condense.given import Given
from leveret.condense.rows import Array, floats

SHARE, LEAST, MOST = 0.01, 2_000, 20_000
"""Rows that are looked at: this share of all, but no fewer and no more."""
BLOCK = 64
"""Rows next to each other that are read together."""
CHAINS = 0.03
"""Where more of a sample hang together in chains, what is apart there says little of what is apart among all."""


@dataclass(frozen=True)
class Range:
    """How many rows, at least and at most."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class Sample:
    """Rows that were drawn: x [m, width] as stored. of: all rows. rate: bytes a second that were read. block: [m]
    number of the block that each was read with."""

    x: Array
    of: int
    rate: float
    block: Array

    def thinned(self, of: int, seed: int) -> tuple[Sample, Array]:
        """As many of its rows as would be drawn if only `of` of all rows were left, whichever these are; and where they
        stand in it."""
        wanted = max(2, round(len(self.x) * of / max(self.of, 1)))
        rows = np.sort(np.random.default_rng(seed).permutation(len(self.x))[:wanted])
        return Sample(self.x[rows], max(of, len(rows)), self.rate, self.block[rows]), rows


def places(counts: Sequence[int], seed: int) -> list[tuple[int, range]]:
    """Blocks that are looked at, as the seed says, in its order: (number of the file, rows in it). counts: rows of each
    file."""
    n = sum(counts)
    wanted = min(n, max(LEAST, min(MOST, round(SHARE * n))))
    ends = np.cumsum([-(-count // BLOCK) for count in counts])
    found: list[tuple[int, range]] = []
    for block in np.random.default_rng(seed).permutation(np.arange(ends[-1] if len(ends) else 0)).tolist():
        if wanted <= 0:
            break
        file = int(np.searchsorted(ends, block, "right"))
        start = (block - (int(ends[file - 1]) if file else 0)) * BLOCK
        found.append((file, range(start, min(start + BLOCK, counts[file]))))
        wanted -= len(found[-1][1])
    return found


def draw(given: Given, seed: int) -> Sample:
    """Blocks of rows at places that the seed says."""
    began, found, blocks = time.perf_counter(), [], []
    chosen = places([file.shard.n for file in given.files], seed)
    for number, (file, rows) in enumerate(sorted(chosen, key=lambda place: (place[0], place[1].start))):
        found.append(given.files[file].shard.read(rows.start, rows.stop))
        blocks.append(np.full(len(rows), number))
    x = np.concatenate(found) if found else np.zeros((0, given.shards[0].width if given.shards else 1), np.float32)
    block = np.concatenate([np.zeros(0, np.int64), *blocks])
    good = np.isfinite(floats(x)).all(1) & (floats(x) != 0).any(1)
    return Sample(x[good], len(given), x.nbytes / max(time.perf_counter() - began, 1e-6), block[good])


@dataclass(frozen=True)
class Copies:
    """Near copies among all rows of a sample. beside, apart: [m] how many rows of a row's own block, and of others, are
    near it. group: [m] number of the component that it is in; inside: of the component that is left of it where only
    pairs of one cell join."""

    beside: Array
    apart: Array
    group: Array
    inside: Array

    def in_chains(self) -> float:
        """Share of the rows that are in groups of which less than half of all pairs are near: not copies of one, but
        rows that hang together by others, as more of them will when more rows are seen."""
        size = np.bincount(self.group)
        near = np.bincount(self.group, self.beside + self.apart) / 2
        return float(size[(size > 2) & (near < size * (size - 1) / 4)].sum()) / max(len(self.group), 1)


def dropped(group: Array) -> Array:
    """[m] 1 where a row would be dropped, when the first of each group stays."""
    gone = np.ones(len(group), np.int64)
    gone[np.unique(group, return_index=True)[1]] = 0
    return gone


def near_copies(sample: Sample, threshold: float, cells: Array | None = None) -> Copies:
    """Which rows of a sample are above the threshold with which. cells: [m, several] numbers of the cells that each row
    lies in, where only rows of one cell are compared."""
    x, m = sample.x, len(sample.x)
    joined, inside, near = groups.Joined(m), groups.Joined(m), np.zeros((2, m), np.int64)
    block = screen.prepare(x, screen.middle_of(x))
    for i, j, sure in screen.candidates(block, block, threshold, same=True):
        edge = sure.copy()
        edge[~sure] = groups.is_edge(x, i[~sure], x, j[~sure], threshold)
        i, j = i[edge], j[edge]
        apart = sample.block[i] != sample.block[j]
        for which, some in enumerate((~apart, apart)):
            for ends in (i[some], j[some]):
                near[which] += np.bincount(ends, minlength=m)
        joined.add(i, j)
        if cells is not None:
            met = (cells[i][:, :, None] == cells[j][:, None, :]).any((1, 2))
            inside.add(i[met], j[met])
    group, within = (np.unique(one.settle(), return_inverse=True)[1] for one in (joined, inside))
    return Copies(near[0], near[1], group, group if cells is None else within)


def cells_of(x: Array, k: int, per_row: int, seed: int) -> Array | None:
    """[m, per_row] cells that lie as k clusters might: around rows drawn from the sample. None where there is one."""
    if k <= 1 or len(x) < 4:
        return None
    centroids = floats(x[np.random.default_rng(seed).permutation(len(x))[: min(k, len(x) // 2)]])
    lengths = np.sqrt(np.square(centroids).sum(1, keepdims=True))
    return np.asarray(screen.Nearest(centroids / lengths).several(x, per_row)).reshape(len(x), -1)


def after_dedup(
    sample: Sample, threshold: float, came: Range, cells: Array | None = None, *, seed: int = 0, again: bool = False
) -> Range:
    """What dedup leaves of `came` rows. cells: of the sample's rows (`cells_of`); pairs that their borders part are not
    found. again: whether an earlier dedup has dropped copies already."""
    m, of = len(sample.x), sample.of
    if m < 2 or not came.high:
        return came
    found = near_copies(sample, threshold, cells)
    share = came.low / of
    gone = float(dropped(found.group).sum())
    if m == of:
        low = came.low - gone * share
    else:
        # Rows were drawn in blocks: a pair inside one is seen where that is drawn, another where two are. Ends are two
        # standard deviations of what the sums may be off. Of pairs apart the blocks' shares give the first term of the
        # variance of a U-statistic (Hoeffding 1948); where pairs are few, so that blocks say little, it is a count's.
        most = 0.0
        for near, each in ((found.beside, of / m), (found.apart, of * (of - 1) / (m * (m - 1)))):
            pairs = near.sum() / 2
            most += each * (pairs + 2 * max(math.sqrt(pairs + 1), _spread(sample, near)))
        low = came.low - max(most, of * gone / m) * share
        if came.low == of and found.in_chains() <= CHAINS:
            low = max(low, _groups(sample, found.group))
    if again:
        high = came.high
    elif came.high >= of:
        high = _at_most(sample, found, came.high, thinned=False)
    else:
        some, rows = sample.thinned(came.high, seed)
        inside = near_copies(some, threshold, None if cells is None else cells[rows])
        high = _at_most(some, inside, came.high, thinned=True)
    low = min(max(1, math.floor(low)), high, came.low)
    return Range(low if came.low else 0, high)


def _at_most(sample: Sample, found: Copies, came: int, *, thinned: bool) -> int:
    """At most so many of `came` rows are left: as large a share is dropped as of a sample of them, less two standard
    deviations of what that may be off. Of all rows in one cluster it is what they come to. thinned: whether which rows
    came was drawn, too."""
    gone = dropped(found.inside)
    total = float(gone.sum())
    if not thinned and len(sample.x) == sample.of:  # only where the clusters' borders run is guessed
        total -= 2 * math.sqrt(dropped(found.group).sum() - total)
    else:
        total -= 2 * max(math.sqrt(total), _spread(sample, gone))
    return max(1, came - math.floor(max(0.0, total) * came / len(sample.x)))


def _spread(sample: Sample, of_rows: Array) -> float:
    """Standard deviation of a sum over the blocks of a sample, from that between its blocks."""
    sums = np.bincount(np.unique(sample.block, return_inverse=True)[1], of_rows.astype(np.float64))
    return float(math.sqrt(len(sums) * max(0.0, 1 - len(of_rows) / sample.of)) * sums.std())


def _groups(sample: Sample, group: Array) -> float:
    """At least so many groups are among all rows, by those of a sample that one or two rows are of: Chao's bound for
    samples without replacement (Chao and Lin 2012, Biometrics 68), less three standard deviations, told by leaving out
    one block at a time (three, for a crowd may lie in few blocks)."""

    def bound(size: Array, m: int) -> float:
        one, two = int((size == 1).sum()), int((size == 2).sum())
        rest = m / (sample.of - m) * one + (2 * m / (m - 1) * two if m > 1 else 0.0)
        return float((size > 0).sum()) + (one * one / rest if rest else 0.0)

    size = np.bincount(group)
    blocks = np.unique(sample.block, return_inverse=True)[1]
    without = []
    for rows in np.split(np.argsort(blocks, kind="stable"), np.cumsum(np.bincount(blocks))[:-1]):
        without.append(bound(size - np.bincount(group[rows], minlength=len(size)), len(group) - len(rows)))
    spread = np.sqrt((len(without) - 1) * np.var(without))
    return bound(size, len(group)) - 3 * float(spread)
