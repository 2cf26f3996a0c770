"""The chain's two large steps at any size: group rows by likeness, and keep one of each group of near copies.

Work is cut into tasks (a part, a bucket), each a function of files to one file, whole or absent. So a killed run goes
on where it was, tasks may run anywhere, and memory is set by the size of a bucket and not by the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leveret.condense import groups, lloyd, ranks, regroup
from leveret.condense.columns import Ids, order_of, save
from leveret.condense.rows import Array, Floats, Ints, spans, unit
from leveret.condense.screen import Nearest
from leveret.condense.shards import Shard
from leveret.condense.table import hash_ids, hash_keys
from leveret.condense.working import Part, Rows
from leveret.runs import DataError

CHUNK = 65_536
"""Rows of a file that are read together. No part of any rule."""

SALT_TRAIN, SALT_DRAW = 1, 2
LEAST = 65_536
"""Training rows are at least this many (where there are so many): one centroid of 256 rows would be a rough mean."""

PLACES: dict[str, Callable[[Ints], Ints]] = {
    "middle": lambda size: size // 2,
    "far": lambda size: size - 1,
    "near": lambda size: 0 * size,
}
"""Which position stays of a component's members in the order of their distance to the centroid."""


def chunks_of(shards: Sequence[Shard], folder: Path, size: int = CHUNK) -> list[tuple[Part, int]]:
    """All rows in parts of at most `size`, none over the border of a file, and the number of each part's first row."""
    found: list[tuple[Part, int]] = []
    first = 0
    for shard in shards:
        for span in spans(shard.n, size):
            piece = (shard, span.start, span.stop)
            path = folder / f"{len(found):06d}.npz"
            found.append((Part(len(found), path, span.stop - span.start, (piece,)), first + span.start))
        first += shard.n
    return found


def ingest(part: Part, first: int, ids: Ids, score: Array | None) -> Part:
    """Writes the columns of a part as it comes from a file. DataError at a row that is not finite or has no length."""
    if part.path.exists():
        return part
    ((shard, start, stop),) = part.pieces
    x = shard.read(start, stop)
    for span in spans(len(x), 4096):
        wide = x[span].astype(np.float32)
        lengths = np.einsum("ij,ij->i", wide, wide)
        wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(wrong):
            what = "is all zeros" if lengths[wrong[0]] == 0 else "is not finite"
            raise DataError(f"{shard.path}: row {start + span.start + int(wrong[0]):,} {what}; a row needs a direction")
    names = ids.at(np.arange(len(ids)))
    hashes = hash_ids([name.decode("utf-8", "surrogatepass") for name in names])
    scores = np.full(len(x), np.nan) if score is None else score.astype(np.float64)
    row = np.arange(first, first + len(x))
    save(part.path, {"row": row, "id": ids, "score": scores, "hash": hashes, "source": np.zeros(0, np.int64)})
    return part


# --- group by likeness ----------------------------------------------------------------------------------------------


class Training:
    """Training rows in a file, in the order of their ids' hash: float32 unit vectors."""

    def __init__(self, path: Path, n: int, width: int) -> None:
        self.shard = Shard(path, n, width, "<f4")

    def __len__(self) -> int:
        return self.shard.n

    def read(self, start: int, stop: int) -> Floats:
        return self.shard.read(start, stop)


def training_rows(rows: Rows, wanted: int, seed: int, path: Path) -> Training:
    """The alive rows whose ids' hashes come first, in that order (ties by id)."""
    keys = rows.keys("hash", lambda hashes: hash_keys(hashes, seed, SALT_TRAIN))
    cut = ranks.cut_at(keys, min(wanted, rows.count()))
    chosen: list[tuple[Part, Ints]] = []
    order_keys, names = [], []
    for part, (key, at) in zip(rows.parts, keys(), strict=True):
        inside = np.flatnonzero(cut.before(key, at))
        chosen.append((part, rows.alive(part)[inside]))
        order_keys.append(key[inside])
        names += at(inside)
    order = order_of(Ids.of(names), np.concatenate(order_keys))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    width = rows.parts[0].pieces[0][0].width
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    done = 0
    with open(half, "wb") as file:
        for part, places in chosen:
            if len(places):
                for row, x in zip(rank[done : done + len(places)], unit(part.vectors()[places]), strict=True):
                    file.seek(int(row) * width * 4)
                    file.write(x.astype("<f4").tobytes())
                done += len(places)
    half.rename(path)
    return Training(path, len(order), width)


def train(rows: Training, k: int, iterations: int, run: lloyd.Map) -> tuple[Floats, int]:
    """Centroids [<= k, width] and the rounds made: until none moves, at most `iterations`."""
    centroids = lloyd.start(rows, k)
    for made in range(iterations):
        new = lloyd.one_round(rows, centroids, run)
        if np.array_equal(new, centroids):
            return centroids, made + 1
        centroids = new
    return centroids, iterations


def group(rows: Rows, centroids: Floats, most: int, run: lloyd.Map) -> Rows:
    """A new generation: the alive rows by (cluster, id), in parts of at most `most` rows (but for a larger cluster)."""
    number = rows.generation + 1
    folder, runs_folder = rows.work / "rows" / str(number), rows.work / "runs" / str(number)
    nearest = Nearest(centroids)
    shard = rows.parts[0].pieces[0][0]
    runs = list(run(lambda part: regroup.assign(rows, part, nearest, runs_folder), rows.parts))
    buckets = regroup.plan(runs, len(centroids), most)

    def gather(bucket: regroup.Bucket) -> Part:
        return regroup.gather(bucket, runs, shard.width, shard.dtype, folder / f"{bucket.number:06d}.npz")

    return Rows(rows.work, number, tuple(run(gather, buckets)))


# --- near copies ----------------------------------------------------------------------------------------------------


def dedup(rows: Rows, label: str, threshold: float, keep: str, centroids: Floats, most: int, run: lloyd.Map) -> Rows:
    """One row of each component stays. Adds `component` and `keeper` (row numbers: of the member whose id comes first,
    and of the one that stays) and `keeper_id`."""

    def judge(part: Part) -> Any:
        if rows.place(label, part).exists():
            return None
        alive = rows.alive(part)
        cluster, row, ids = part.read("cluster", "row", "id")
        cluster, row, ids = cluster[alive], row[alive], ids.take(alive)
        if part.n <= most:
            x = part.vectors()[alive]
            inside = np.unique(cluster, return_index=True)[1]
            component = groups.components(x, np.r_[inside, len(x)], threshold)

            def read(places: Ints) -> Array:
                return x[places]
        else:
            everywhere = part.reader()

            def read(places: Ints) -> Array:
                return everywhere(alive[places])

            component = groups.components_apart(read, len(alive), threshold, max(1, most // 2))
        keeper = np.arange(len(alive))
        _, back, counts = np.unique(component, return_inverse=True, return_counts=True)
        several = np.flatnonzero(counts[back] > 1)
        if len(several):
            key = groups.by_distance(read, several, component[several], centroids, cluster[several])
            keeper[several] = several[groups.kept_of(component[several], key, PLACES[keep])]
        whole = {"component": np.full(part.n, -1), "keeper": np.full(part.n, -1)}
        whole["component"][alive], whole["keeper"][alive] = row[component], row[keeper]
        dropped = np.zeros(part.n, np.bool_)
        dropped[alive] = keeper != np.arange(len(alive))
        names = [b""] * part.n
        for place, name in zip(alive.tolist(), ids.at(keeper), strict=True):
            names[place] = name
        return rows.judge(label, part, dropped, **whole, keeper_id=Ids.of(names))

    for _ in run(judge, rows.parts):
        pass
    return rows.after(label, ("component", "keeper", "keeper_id"))


# --- ranks ----------------------------------------------------------------------------------------------------------


def band(rows: Rows, label: str, by: str, low: str, high: str, *, published: bool = False) -> Rows:
    """Ranks floor(low n) to floor(high n) - 1 of the n alive rows, by value descending, then id; `published`: without
    the first of them, as the released code of Dataset-Pruning cuts."""
    n = rows.count()
    begin, end = ranks.rank_of(low, n), ranks.rank_of(high, n)
    return rows.keep_ranks(label, by, ranks.descending, min(begin + published, end), end)


def draw(rows: Rows, label: str, count: int, seed: int) -> Rows:
    """The first `count` of the alive rows in the seeded order of id hashes, ties by id."""
    return rows.keep_ranks(label, "hash", lambda hashes: hash_keys(hashes, seed, SALT_DRAW), 0, count)


def kept(rows: Rows) -> Iterator[tuple[Ints, Ids]]:
    """(row numbers, ids) of what is alive, part by part."""
    for part in rows.parts:
        alive = rows.alive(part)
        row, ids = part.read("row", "id")
        yield row[alive], ids.take(alive)
