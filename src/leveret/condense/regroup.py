"""From rows in the order of their files to rows in the order of their clusters, in memory that does not grow with them.

    chunk (rows of one file)  --assign-->  run: the chunk's rows sorted by cluster, and where each cluster begins
    all runs' clusters        --plan-->    buckets: neighbouring clusters that fit in memory together
    bucket                    --gather-->  its rows by (cluster, id): a bucket is the same whatever the files were
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from leveret.condense.columns import Ids, load, order_of, save
from leveret.condense.rows import Array, Floats, Ints, similarities
from leveret.condense.screen import Nearest
from leveret.condense.shards import Shard
from leveret.runs import atomic_write


@dataclass(frozen=True)
class Chunk:
    """Some rows of one file. first: number of its first row among all rows."""

    number: int
    shard: Shard
    start: int
    stop: int
    first: int

    def __len__(self) -> int:
        return self.stop - self.start


def chunks_of(shards: list[Shard], size: int) -> list[Chunk]:
    """All rows in chunks of at most `size`, none over the border of a file."""
    found: list[Chunk] = []
    first = 0
    for shard in shards:
        for start in range(0, shard.n, size):
            stop = min(start + size, shard.n)
            found.append(Chunk(len(found), shard, start, stop, first + start))
        first += shard.n
    return found


@dataclass(frozen=True)
class Run:
    """A chunk's rows sorted by cluster.

    FOLDER/NUMBER.rows   vectors as stored. FOLDER/NUMBER.npz: starts [k + 1], row, id, score, hash, centroid.
    """

    folder: Path
    number: int

    @property
    def vectors(self) -> Path:
        return self.folder / f"{self.number:06d}.rows"

    @property
    def columns(self) -> Path:
        return self.folder / f"{self.number:06d}.npz"


def assign(chunk: Chunk, known: Path, centroids: Floats, folder: Path) -> Run:
    """Writes the chunk's run, or finds it. `known`: the part with the chunk's columns id, score, hash."""
    run = Run(folder, chunk.number)
    if run.columns.exists():
        return run
    x = chunk.shard.read(chunk.start, chunk.stop)
    labels = Nearest(centroids).of(x)
    closeness = similarities(x, centroids, labels)
    order = np.argsort(labels, kind="stable")
    ids, score, hashes = load(known, "id", "score", "hash")
    starts = np.searchsorted(labels[order], np.arange(len(centroids) + 1)).astype(np.int64)
    atomic_write(run.vectors, np.ascontiguousarray(x[order]).tobytes())
    save(
        run.columns,  # comes last: a run that has it is whole
        {
            "starts": starts,
            "row": chunk.first + order,
            "id": ids.take(order),
            "score": score[order],
            "hash": hashes[order],
            "centroid": closeness[order],
        },
    )
    return run


@dataclass(frozen=True)
class Bucket:
    """Clusters [first, last) and how many rows they have; `place`: rows in the buckets before it."""

    number: int
    first: int
    last: int
    rows: int
    place: int


def plan(runs: list[Run], k: int, most: int) -> list[Bucket]:
    """Buckets of at most `most` rows, but for a cluster that alone has more."""
    sizes = np.zeros(k, np.int64)
    for run in runs:
        (starts,) = load(run.columns, "starts")
        sizes += np.diff(starts)
    found: list[Bucket] = []
    first, rows, place = 0, 0, 0
    for cluster, size in enumerate(sizes.tolist()):
        if rows and rows + size > most:
            found.append(Bucket(len(found), first, cluster, rows, place))
            first, place, rows = cluster, place + rows, 0
        rows += size
    if rows:
        found.append(Bucket(len(found), first, k, rows, place))
    return found


@dataclass
class Gathered:
    """A bucket's rows sorted by (cluster, id). bounds: where its clusters begin, and the end, by `clusters`."""

    cluster: Ints
    row: Ints
    id: Ids
    score: Array
    hash: Array
    centroid: Array
    source: Ints
    pieces: list[tuple[Shard, int, int]]

    def vectors(self) -> Array:
        """All of them."""
        whole = np.concatenate([shard.read(start, stop) for shard, start, stop in self.pieces])
        return whole[self.source]

    def at(self, places: Ints) -> Array:
        """Those at some places, where all do not fit in memory."""
        wanted = self.source[places]
        ends = np.cumsum([stop - start for _, start, stop in self.pieces])
        order = np.argsort(wanted, kind="stable")
        cuts = np.r_[0, np.searchsorted(wanted[order], ends)]
        found = [
            _scattered(shard, wanted[order[a:b]] - (end - stop))
            for (shard, _, stop), end, a, b in zip(self.pieces, ends, cuts[:-1], cuts[1:], strict=True)
            if b > a
        ]
        out = np.empty((len(wanted), found[0].shape[1]), found[0].dtype)
        out[order] = np.concatenate(found)
        return out


def _scattered(shard: Shard, places: Ints) -> Array:
    """Rows at ascending places, neighbours read together."""
    cuts = np.flatnonzero(np.diff(places) > 8) + 1
    found = []
    for group in np.split(places, cuts):
        first = int(group[0])
        found.append(shard.read(first, int(group[-1]) + 1)[group - first])
    return np.concatenate(found)


def gather(bucket: Bucket, runs: list[Run], width: int, dtype: str) -> Gathered:
    """The columns of a bucket, and where its vectors are."""
    labels, columns, pieces = [], [], []
    for run in runs:
        (starts,) = load(run.columns, "starts")
        a, b = int(starts[bucket.first]), int(starts[bucket.last])
        if a == b:
            continue
        inside = np.diff(starts[bucket.first : bucket.last + 1])
        labels.append(np.repeat(np.arange(bucket.first, bucket.last), inside))
        row, ids, score, hashes, centroid = load(run.columns, "row", "id", "score", "hash", "centroid")
        columns.append((row[a:b], ids.part(a, b), score[a:b], hashes[a:b], centroid[a:b]))
        pieces.append((Shard(run.vectors, int(starts[-1]), width, dtype), a, b))
    cluster = np.concatenate(labels)
    ids = Ids.join([column[1] for column in columns])
    order = order_of(ids, cluster)
    row, score, hashes, centroid = (np.concatenate([c[at] for c in columns])[order] for at in (0, 2, 3, 4))
    return Gathered(cluster[order], row, ids.take(order), score, hashes, centroid, order, pieces)


def parts(folder: Path, buckets: list[Bucket]) -> Iterator[Path]:
    """The buckets' result files, in order."""
    return (folder / f"{bucket.number:06d}.npz" for bucket in buckets)
