"""The chain at any size: read -> train centroids -> regroup -> near copies -> rank cuts -> budget -> ledger.

Work is cut into tasks (a chunk, a bucket), each a function of files to one file, whole or absent. So a killed run goes
on where it was, tasks may run anywhere, and memory is set by the size of a bucket and not by the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from leveret.condense import groups, lloyd, ranks, regroup
from leveret.condense.columns import Ids, load, save
from leveret.condense.rows import Array, Floats, Ints, unit
from leveret.condense.shards import Shard
from leveret.runs import DataError

CHUNK = 65_536
"""Rows of a file that are read together. No part of any rule."""

SALT_TRAIN, SALT_BUDGET = 1, 2
PLACES: dict[str, Callable[[Ints], Ints]] = {
    "middle": lambda size: size // 2,
    "far": lambda size: size - 1,
    "near": lambda size: 0 * size,
}


@dataclass(frozen=True)
class Settings:
    """What decides the ids. low, high: shares of ranks, counted from the highest, as a person wrote them."""

    k: int
    iterations: int = 20
    rows_per_centroid: int = 256
    threshold: float = 0.86
    keep: str = "middle"
    score: tuple[str, str] | None = ("0.40", "0.60")
    centroid: tuple[str, str] | None = ("0.15", "0.35")
    budget: int | None = None
    seed: int = 0


FATES = ("kept", "dedup", "score", "centroid", "budget")


def keyed(hashes: Array, seed: int, salt: int) -> Array:
    """Sort keys of the seeded order of id hashes."""
    from leveret.condense.table import _mix

    with np.errstate(over="ignore"):
        key = _mix(np.array([seed & (2**64 - 1)], np.uint64) + _mix(np.array([salt], np.uint64)))
    mixed: Array = _mix(hashes ^ key)
    return mixed


class Training:
    """Training rows in a file, in the order of their ids' hash."""

    def __init__(self, path: Path, n: int, width: int) -> None:
        self.shard = Shard(path, n, width, "<f4")

    def __len__(self) -> int:
        return self.shard.n

    def read(self, start: int, stop: int) -> Floats:
        return self.shard.read(start, stop)


def ingest(chunk: regroup.Chunk, ids: Ids, score: Array | None, folder: Path) -> Path:
    """Writes a chunk's columns; DataError at a row that is not finite or has no length."""
    from leveret.condense.table import hash_ids

    path = folder / f"{chunk.number:06d}.npz"
    if path.exists():
        return path
    x = chunk.shard.read(chunk.start, chunk.stop)
    for start in range(0, len(x), 4096):
        lengths = np.einsum("ij,ij->i", *(2 * [x[start : start + 4096].astype(np.float32)]))
        wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(wrong):
            row = start + int(wrong[0])
            what = "is all zeros" if lengths[wrong[0]] == 0 else "is not finite"
            raise DataError(f"{chunk.shard.path}: row {chunk.start + row:,} {what}; a row needs a direction")
    hashes = hash_ids([id.decode("utf-8", "surrogatepass") for id in ids.at(np.arange(len(ids)))])
    scores = np.full(len(x), np.nan) if score is None else score.astype(np.float64)
    save(path, {"id": ids, "score": scores, "hash": hashes})
    return path


def training_rows(parts: Sequence[tuple[regroup.Chunk, Path]], wanted: int, seed: int, path: Path) -> Training:
    """The rows whose ids' hashes come first, in that order, as float32 unit vectors."""
    width = parts[0][0].shard.width
    total = sum(len(chunk) for chunk, _ in parts)
    wanted = min(wanted, total)

    def keys() -> Iterator[tuple[Array, Callable[[Array], list[bytes]]]]:
        for _, part in parts:
            ids, hashes = load(part, "id", "hash")
            yield keyed(hashes, seed, SALT_TRAIN), ids.at

    cut = ranks.cut_at(keys, wanted)
    chosen = []
    for (chunk, _), (key, at) in zip(parts, keys(), strict=True):
        inside = np.flatnonzero(cut.before(key, at))
        chosen.append((chunk, inside, key[inside], at(inside)))
    names = Ids.of([id for *_, ids in chosen for id in ids])
    from leveret.condense.columns import order_of

    order = order_of(names, np.concatenate([key for _, _, key, _ in chosen]))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    out = np.empty((len(order), width), np.float32)
    done = 0
    for chunk, inside, _, _ in chosen:
        if len(inside):
            x = chunk.shard.read(chunk.start, chunk.stop)[inside]
            out[rank[done : done + len(inside)]] = unit(x)
            done += len(inside)
    path.parent.mkdir(parents=True, exist_ok=True)
    out.tofile(path)
    return Training(path, len(order), width)


def judge(
    bucket: regroup.Bucket,
    runs: list[regroup.Run],
    centroids: Floats,
    settings: Settings,
    shard: Shard,
    folder: Path,
    most: int,
) -> Path:
    """Finds the near copies of a bucket and writes its part: columns, component, keeper, and fate 0 or 1.

    most  rows whose vectors are held at once; a bucket with more (one large cluster) is compared in blocks.
    """
    path = folder / f"{bucket.number:06d}.npz"
    if path.exists():
        return path
    rows = regroup.gather(bucket, runs, shard.width, shard.dtype)
    if bucket.rows <= most:
        x = rows.vectors()
        bounds = np.searchsorted(rows.cluster, np.arange(bucket.first, bucket.last + 1))
        component = groups.components(x, bounds, settings.threshold)

        def read(places: Ints) -> Array:
            return x[places]
    else:
        read = rows.at
        component = groups.components_apart(read, bucket.rows, settings.threshold, max(1, most // 2))
    keeper = np.arange(bucket.rows)
    _, back, counts = np.unique(component, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[back] > 1)
    if len(several):
        key = groups.by_distance(read, several, component[several], centroids, rows.cluster[several])
        keeper[several] = several[groups.kept_of(component[several], key, PLACES[settings.keep])]
    save(
        path,
        {
            "row": rows.row,
            "id": rows.id,
            "score": rows.score,
            "hash": rows.hash,
            "centroid": rows.centroid,
            "cluster": rows.cluster,
            "component": bucket.place + component,
            "keeper": bucket.place + keeper,
            "keeper_id": rows.id.take(keeper),
            "fate": (keeper != np.arange(bucket.rows)).astype(np.uint8),
        },
    )
    return path


class Alive:
    """The rows that are still alive, part by part; their fates are kept beside the parts."""

    def __init__(self, parts: list[Path]) -> None:
        self.parts = parts
        self.fates = [load(part, "fate")[0] for part in parts]

    @property
    def count(self) -> int:
        return int(sum((fate == 0).sum() for fate in self.fates))

    def keys(self, column: str, key: Callable[[Array], Array]) -> ranks.Parts:
        """The alive rows' keys for `ranks.cut_at`."""

        def each() -> Iterator[tuple[Array, Callable[[Array], list[bytes]]]]:
            for part, fate in zip(self.parts, self.fates, strict=True):
                alive = np.flatnonzero(fate == 0)
                values, ids = load(part, column, "id")
                yield key(values[alive]), ids.take(alive).at

        return each

    def keep(self, column: str, key: Callable[[Array], Array], begin: int, end: int, fate: int) -> None:
        """Rows at ranks [begin, end) stay; the others get their fate."""
        keys = self.keys(column, key)
        first, last = ranks.cut_at(keys, begin), ranks.cut_at(keys, end)
        for number, (values, ids) in enumerate(keys()):
            inside = last.before(values, ids) & ~first.before(values, ids)
            alive = np.flatnonzero(self.fates[number] == 0)
            self.fates[number][alive[~inside]] = fate


def choose(parts: list[Path], settings: Settings) -> tuple[Alive, dict[str, int]]:
    """The rank steps and the budget over the buckets' parts; counts after each step."""
    alive = Alive(parts)
    counts = {"dedup": alive.count}
    for name, column, window in (("score", "score", settings.score), ("centroid", "centroid", settings.centroid)):
        if window is not None:
            n = alive.count
            begin, end = (ranks.rank_of(share, n) for share in window)
            alive.keep(column, ranks.descending, begin, end, FATES.index(name))
            counts[name] = alive.count
    if settings.budget is not None:
        alive.keep("hash", lambda h: keyed(h, settings.seed, SALT_BUDGET), 0, settings.budget, FATES.index("budget"))
        counts["budget"] = alive.count
    return alive, counts


def train(rows: Training, settings: Settings, run: lloyd.Map) -> Floats:
    centroids = lloyd.start(rows, settings.k)
    for _ in range(settings.iterations):
        new = lloyd.one_round(rows, centroids, run)
        if np.array_equal(new, centroids):
            break
        centroids = new
    return centroids
