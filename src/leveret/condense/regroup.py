"""From rows in the order of their files to rows in the order of their clusters, in memory that does not grow with them.

part (alive rows)   --assign-->  run: the part's rows sorted by cluster, and where each cluster begins
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
from leveret.condense.rows import Ints, similarities, spans
from leveret.condense.screen import Nearest
from leveret.condense.shards import Shard
from leveret.condense.working import BLOCK, Part, Rows
from leveret.runs import atomic_file

CARRIED = ("row", "id", "score", "hash")
"""Columns that go with a row from one order to the next."""


@dataclass(frozen=True)
class Run:
    """A part's alive rows sorted by cluster.

    FOLDER/NUMBER.rows   vectors as stored. FOLDER/NUMBER.npz: starts [k + 1], the carried columns, centroid_cosine.
    """

    folder: Path
    number: int

    @property
    def vectors(self) -> Path:
        return self.folder / f"{self.number:06d}.rows"

    @property
    def columns(self) -> Path:
        return self.folder / f"{self.number:06d}.npz"


def assign(rows: Rows, part: Part, nearest: Nearest, folder: Path) -> Run:
    """Writes a part's run, or finds it."""
    run = Run(folder, part.number)
    if run.columns.exists():
        return run
    alive = rows.alive(part)
    x = part.vectors(None if len(alive) == part.n else alive, lent=True)
    labels = nearest.of(x)
    closeness = similarities(x, nearest.centroids, labels)
    order = np.argsort(labels, kind="stable")
    columns = dict(zip(CARRIED, part.read(*CARRIED), strict=True))
    taken = {
        name: value.take(alive[order]) if isinstance(value, Ids) else value[alive[order]]
        for name, value in columns.items()
    }
    starts = np.searchsorted(labels[order], np.arange(len(nearest.centroids) + 1)).astype(np.int64)
    with atomic_file(run.vectors) as file:
        for some in spans(len(x), BLOCK):
            file.write(x[order[some]].data)
    save(run.columns, {"starts": starts, **taken, "centroid_cosine": closeness[order]})  # last: then the run is whole
    return run


@dataclass(frozen=True)
class Bucket:
    """Clusters [first, last) and how many rows they have."""

    number: int
    first: int
    last: int
    n: int


def plan(runs: Sequence[Run], k: int, most: int) -> list[Bucket]:
    """Buckets of at most `most` rows, but for a cluster that alone has more."""
    sizes = np.zeros(k, np.int64)
    for run in runs:
        sizes += np.diff(load(run.columns, "starts")[0])
    found: list[Bucket] = []
    first, n = 0, 0
    for cluster, size in enumerate(sizes.tolist()):
        if n and n + size > most:
            found.append(Bucket(len(found), first, cluster, n))
            first, n = cluster, 0
        n += size
    return [*found, Bucket(len(found), first, k, n)] if n else found


def gather(bucket: Bucket, runs: Sequence[Run], width: int, dtype: str, path: Path) -> Part:
    """Writes the part of a bucket, or finds it: its columns sorted by (cluster, id), and where its vectors are."""
    starts = [load(run.columns, "starts")[0] for run in runs]
    pieces = tuple(
        (Shard(run.vectors, int(s[-1]), width, dtype), int(s[bucket.first]), int(s[bucket.last]))
        for run, s in zip(runs, starts, strict=True)
        if s[bucket.first] < s[bucket.last]
    )
    part = Part(bucket.number, path, bucket.n, pieces)
    if path.exists():
        return part
    names = (*CARRIED, "centroid_cosine")
    labels: list[Ints] = []
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for run, s in zip(runs, starts, strict=True):
        a, b = int(s[bucket.first]), int(s[bucket.last])
        if a == b:
            continue
        labels.append(np.repeat(np.arange(bucket.first, bucket.last), np.diff(s[bucket.first : bucket.last + 1])))
        for name, column in zip(names, load(run.columns, *names), strict=True):
            columns[name].append(column.part(a, b) if isinstance(column, Ids) else column[a:b])
    cluster = np.concatenate(labels)
    ids = Ids.join(columns.pop("id"))
    order = order_of(ids, cluster)
    others = {name: np.concatenate(column)[order] for name, column in columns.items()}
    save(path, {"cluster": cluster[order].astype(np.int32), "id": ids.take(order), **others, "source": order})
    return part
