"""From rows in the order of their files to rows in the order of their clusters, in memory that does not grow with them.

part (alive rows)   --assign-->  run: the part's rows sorted by cluster, and where each cluster begins
                                 (and once more as guests of their second nearest clusters, where rows sit in several)
                                 or, where all rows fit in the memory allowed, only which row is where: buckets are few
                                 then, and reading a file again for each costs less than writing it in another order
all runs' clusters  --plan-->    buckets: neighbouring clusters that fit in memory together
bucket              --gather-->  a new part: rows by (cluster, id), the same whatever the files were
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leveret.condense.columns import Ids, load, order_of, save
from leveret.condense.npy import Arrays
from leveret.condense.rows import Array, Ints, similarities, spans
from leveret.condense.screen import Nearest
from leveret.condense.shards import Shard
from leveret.condense.working import BLOCK, Part, Rows
from leveret.runs import atomic_file

CARRIED = ("row", "id", "score", "hash")
"""Columns that go with a row from one order to the next."""


@dataclass(frozen=True)
class Run:
    """A part's alive rows sorted by cluster.

    FOLDER/NUMBER.rows     vectors as stored; absent where they stay in the part's own file, then `place` says where.
    FOLDER/NUMBER.npz      starts [k + 1], the carried columns, centroid_cosine, also [n, m - 1] (the other clusters
                           that a row sits in, nearest first), place [n] (in the part's file; [0] where copied).
    FOLDER/NUMBER.guests   where m > 1, vectors by those other clusters; guest_starts [k + 1], guest_row.
    """

    folder: Path
    number: int

    @property
    def vectors(self) -> Path:
        return self.folder / f"{self.number:06d}.rows"

    @property
    def guests(self) -> Path:
        return self.folder / f"{self.number:06d}.guests"

    @property
    def columns(self) -> Path:
        return self.folder / f"{self.number:06d}.npz"


def stays(rows: Rows, memory: int) -> bool:
    """Whether vectors stay in the files they came in: rows as they were read, that fit in `memory` bytes together."""
    pieces = [piece for part in rows.parts for piece in part.pieces]
    plain = rows.generation == 0 and all(type(shard) is Shard for shard, _, _ in pieces)
    return plain and sum((stop - start) * shard.row_bytes for shard, start, stop in pieces) <= memory


def assign(rows: Rows, part: Part, nearest: Nearest, folder: Path, per_row: int = 1, *, copied: bool = True) -> Run:
    """Writes a part's run, or finds it. per_row: clusters that a row sits in, the nearest ones. copied: see `stays`."""
    run = Run(folder, part.number)
    if _is_whole(run, rows.parts[0].pieces[0][0].row_bytes):
        return run
    alive = rows.alive(part)
    x = part.vectors(None if len(alive) == part.n else alive, lent=True)
    found = nearest.of(x)[:, None] if per_row == 1 else nearest.several(x, per_row)
    labels, also = found[:, 0], found[:, 1:].astype(np.int32)
    closeness = similarities(x, nearest.centroids, labels)
    order = np.argsort(labels, kind="stable")
    columns = dict(zip(CARRIED, part.read(*CARRIED), strict=True))
    taken = {
        name: value.take(alive[order]) if isinstance(value, Ids) else value[alive[order]]
        for name, value in columns.items()
    }
    taken |= {"starts": _starts(labels[order], nearest), "centroid_cosine": closeness[order]}
    copied = copied or not len(order)  # a run of no rows is an empty file
    taken["place"] = np.zeros(0, np.int64) if copied else alive[order]
    if copied:
        _write(run.vectors, x, order)
    if per_row > 1:
        visits = np.argsort(also.ravel(), kind="stable")
        guest = visits // also.shape[1]
        _write(run.guests, x, guest)
        taken |= {
            "also": also[order],
            "guest_starts": _starts(also.ravel()[visits], nearest),
            "guest_row": columns["row"][alive][guest],
        }
    save(run.columns, taken)  # last: then the run is whole
    return run


def _is_whole(run: Run, row_bytes: int) -> bool:
    """Whether a run is there with all its vectors, of which a power cut may leave fewer: they are not synced."""
    if not run.columns.exists():
        return False
    with Arrays(run.columns) as file:
        starts = {run.guests: "guest_starts"} | ({} if len(_place(file)) else {run.vectors: "starts"})
        ends = {path: int(file[name][-1]) for path, name in starts.items() if name in file.names}
    return all(path.is_file() and path.stat().st_size == row_bytes * n for path, n in ends.items())


def _place(file: Arrays) -> Ints:
    """The column `place` of a run; an empty one where an earlier version wrote the run, which copied all vectors."""
    found: Ints = file["place"] if "place" in file.names else np.zeros(0, np.int64)
    return found


def _starts(labels: Array, nearest: Nearest) -> Ints:
    """[k + 1] where each cluster begins among sorted labels."""
    return np.searchsorted(labels, np.arange(len(nearest.centroids) + 1)).astype(np.int64)


def _write(path: Path, x: Array, order: Ints) -> None:
    with atomic_file(path, sync=False) as file:
        for some in spans(len(order), BLOCK):
            file.write(x[order[some]].data)


@dataclass(frozen=True)
class Bucket:
    """Clusters [first, last) and how many rows they have."""

    number: int
    first: int
    last: int
    n: int


def plan(path: Path, runs: Sequence[Run], k: int, most: int, starts: Sequence[str] = ("starts",)) -> list[Bucket]:
    """Buckets of at most `most` rows, but for a cluster that alone has more. starts: what is counted of the runs.

    Kept at `path`: files are named by bucket, so a run that goes on with other memory or workers keeps to its buckets.
    """
    if not path.exists():
        found = _plan(runs, k, most, starts)
        save(path, {"buckets": np.array([(b.number, b.first, b.last, b.n) for b in found], np.int64).reshape(-1, 4)})
    return [Bucket(*bucket) for bucket in load(path, "buckets")[0].tolist()]


def _plan(runs: Sequence[Run], k: int, most: int, starts: Sequence[str]) -> list[Bucket]:
    sizes = np.zeros(k, np.int64)
    for run in runs:
        sizes += sum(np.diff(column) for column in load(run.columns, *starts))
    found: list[Bucket] = []
    first, n = 0, 0
    for cluster, size in enumerate(sizes.tolist()):
        if n and n + size > most:
            found.append(Bucket(len(found), first, cluster, n))
            first, n = cluster, 0
        n += size
    return [*found, Bucket(len(found), first, k, n)] if n else found


def gather(bucket: Bucket, runs: Sequence[Run], parts: Sequence[Part], path: Path, more: Sequence[str] = ()) -> Part:
    """Writes the part of a bucket, or finds it: its columns sorted by (cluster, id), and where its vectors are.

    parts  what the runs are of. more: names of the runs' columns that it takes over besides CARRIED and
           centroid_cosine."""
    names = (*CARRIED, "centroid_cosine", *more)
    labels: list[Ints] = []
    columns: dict[str, list[Any]] = {name: [] for name in names}
    pieces: list[tuple[Shard, int, int]] = []
    source: list[Ints] = []
    before = 0
    for run, origin in zip(runs, parts, strict=True):
        with Arrays(run.columns) as file:
            s, place = file["starts"], _place(file)
        a, b = int(s[bucket.first]), int(s[bucket.last])
        if a == b:
            continue
        shard = origin.pieces[0][0]
        stay = len(place) > 0
        pieces += origin.pieces if stay else [(Shard(run.vectors, int(s[-1]), shard.width, shard.dtype), a, b)]
        source.append(before + (place[a:b] if stay else np.arange(b - a)))
        before += origin.n if stay else b - a
        if path.exists():
            continue
        labels.append(np.repeat(np.arange(bucket.first, bucket.last), np.diff(s[bucket.first : bucket.last + 1])))
        for name, column in zip(names, load(run.columns, *names), strict=True):
            columns[name].append(column.part(a, b) if isinstance(column, Ids) else column[a:b])
    part = Part(bucket.number, path, bucket.n, tuple(pieces))
    if path.exists():
        return part
    cluster = np.concatenate(labels)
    ids = Ids.join(columns.pop("id"))
    order = order_of(ids, cluster)
    others = {name: np.concatenate(column)[order] for name, column in columns.items()}
    save(
        path,
        {
            "cluster": cluster[order].astype(np.int32),
            "id": ids.take(order),
            **others,
            "source": np.concatenate(source)[order],
        },
    )
    return part
