"""The chain's two large steps at any size: group rows by likeness, and keep one of each group of near copies.

Work is cut into tasks (a part, a bucket), each a function of files to one file, whole or absent. So a killed run goes
on where it was, tasks may run anywhere, and memory is set by the size of a bucket and not by the number of rows.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leveret.condense import groups, lloyd, ranks, regroup
from leveret.condense.columns import Ids, load, order_of, save
from leveret.condense.rows import TOGETHER, Array, Bools, Floats, Ints, distances, floats, spans, unit
from leveret.condense.screen import Nearest
from leveret.condense.shards import Shard
from leveret.condense.working import Part, Rows
from leveret.runs import DataError, atomic_file

CHUNK = 65_536
"""Rows of a file that are read together. No part of any rule."""

SALT_TRAIN, SALT_DRAW = 1, 2
LEAST = 65_536
"""Training rows are at least this many (where there are so many): one centroid of 256 rows would be a rough mean."""


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


def ingest(part: Part, row: Ints, ids: Ids, score: Array | None) -> Part:
    """Writes the columns of a part as it comes from a file. DataError at a row that is not finite or has no length.

    row  numbers of its rows among all of the source.
    """
    if part.path.exists():
        return part
    ((shard, start, stop),) = part.pieces
    x = shard.read(start, stop)
    for span in spans(len(x), 4096):
        nothing, wrong = _without_direction(x[span])
        if len(wrong):
            what = "is all zeros" if nothing[wrong[0]] else "is not finite"
            raise DataError(f"{shard.path}: row {start + span.start + int(wrong[0]):,} {what}; a row needs a direction")
    hashes = ranks.hash_ids(ids)
    scores = np.full(len(x), np.nan) if score is None else score.astype(np.float64)
    save(part.path, {"row": row, "id": ids, "score": scores, "hash": hashes, "source": np.zeros(0, np.int64)})
    return part


def _without_direction(x: Array) -> tuple[Bools, Ints]:
    """[n] whether each of some rows as stored has no length, and the places of those without, or with no finite one."""
    if x.dtype == np.float16:  # by their bits: no square of a half is too large or too small for what follows
        largest = (x.view(np.uint16) & 0x7FFF).max(axis=1, initial=0)
        nothing, endless = largest == 0, largest >= 0x7C00
    else:
        wide = floats(x)
        lengths = np.einsum("ij,ij->i", wide, wide)
        nothing, endless = lengths == 0, ~np.isfinite(lengths)
    return nothing, np.flatnonzero(nothing | endless)


def rename(part: Part, names: Mapping[int, bytes]) -> None:
    """Gives some rows of an ingested part other ids."""
    row, ids, score, hashes = part.read("row", "id", "score", "hash")
    given = list(ids)
    for place, name in names.items():
        given[place] = name
        hashes[place] = ranks.hash_ids([name])[0]
    columns = {"row": row, "id": Ids.of(given), "score": score, "hash": hashes, "source": np.zeros(0, np.int64)}
    save(part.path, columns)


# --- group by likeness ----------------------------------------------------------------------------------------------


class Training:
    """Training rows in the order of their ids' hash: float32 unit vectors, in memory (`held`) or in a file."""

    def __init__(self, path: Path, n: int, width: int, held: Floats | None = None) -> None:
        self.path, self.held = path, held
        self.shard = Shard(path, n, width, "<f4")

    def __len__(self) -> int:
        return self.shard.n

    def read(self, start: int, stop: int) -> Floats:
        return self.shard.read(start, stop) if self.held is None else self.held[start:stop]

    def __getstate__(self) -> dict[str, Any]:
        """Another process reads the file, which is written when the first asks for it."""
        if self.held is not None and not self.path.exists():
            with atomic_file(self.path) as file:
                file.write(self.held.astype("<f4", copy=False).data)
        return self.__dict__ | {"held": None}


def training_rows(rows: Rows, wanted: int, seed: int, path: Path, run: lloyd.Map, memory: int = 0) -> Training:
    """The alive rows whose ids' hashes come first, in that order (ties by id). Held where `memory` bytes suffice."""
    keys = rows.keys("hash", lambda hashes: ranks.hash_keys(hashes, seed, SALT_TRAIN))
    cut = ranks.cut_at(keys, min(wanted, rows.count()))
    chosen: list[tuple[Part, Ints]] = []
    order_keys, names = [], []
    for part, (key, at) in zip(rows.parts, keys(), strict=True):
        inside = np.flatnonzero(cut.before(key, at))
        chosen.append((part, rows.alive(part)[inside]))
        order_keys.append(key[inside])
        names += at(inside)
    rank = np.empty(len(names), np.int64)
    rank[order_of(Ids.of(names), np.concatenate(order_keys))] = np.arange(len(names))
    width = rows.parts[0].pieces[0][0].width
    path.parent.mkdir(parents=True, exist_ok=True)
    hold = 4 * len(rank) * width <= memory
    # Rows come in the order of their files and are wanted in another: so many of them are gathered at once.
    together = len(rank) if hold else max(CHUNK, memory // (4 * width))
    x = np.empty((min(together, len(rank)), width), np.float32)
    ends = np.cumsum([0, *(len(places) for _, places in chosen)])

    def take(job: tuple[Part, Ints]) -> Floats:
        part, places = job
        found = part.vectors(places, lent=True)
        out = np.empty(found.shape, np.float32)
        for some in spans(len(out), TOGETHER):
            out[some] = unit(found[some])
        return out

    with contextlib.nullcontext() if hold else atomic_file(path) as file:
        for span in spans(len(rank), together):
            jobs, to = [], []
            for (part, places), start, stop in zip(chosen, ends[:-1], ends[1:], strict=True):
                inside = np.flatnonzero((rank[start:stop] >= span.start) & (rank[start:stop] < span.stop))
                if len(inside):
                    jobs.append((part, places[inside]))
                    to.append(rank[start:stop][inside] - span.start)
            for at, found in zip(to, run(take, jobs), strict=True):
                x[at] = found
            if file is not None:
                file.write(x[: span.stop - span.start].astype("<f4", copy=False).data)
    return Training(path, len(rank), width, held=x if hold else None)


def train(
    rows: Training, k: int, iterations: int, run: lloyd.Map, folder: Path | None = None, memory: int = 0
) -> tuple[Floats, int]:
    """Centroids [<= k, width] and the rounds made: until none moves, at most `iterations`. Each round is kept in
    `folder`, so that a killed run goes on with the next. memory: as `lloyd.Lloyd` takes it."""

    def at(number: int) -> Path | None:
        return None if folder is None else folder / f"round-{number:04d}.npz"

    def remembered(number: int) -> Floats | None:
        path = at(number)
        found: Floats | None = load(path, "centroids")[0] if path is not None and path.exists() else None
        return found

    def remember(number: int, centroids: Floats) -> Floats:
        if (path := at(number)) is not None:
            save(path, {"centroids": centroids})
        return centroids

    centroids = remembered(0)
    if centroids is None:
        centroids = remember(0, lloyd.start(rows, k))
    rounds: lloyd.Lloyd | None = None
    for number in range(1, iterations + 1):
        before, found = centroids, remembered(number)
        if found is None:
            rounds = rounds or lloyd.Lloyd(rows, centroids, run, memory)
            found = remember(number, rounds.step())
        centroids = found
        if np.array_equal(centroids, before):
            return centroids, number
    return centroids, iterations


def given_centroids(path: str | Path, width: int) -> Floats:
    """Centroids someone else made. DataError where the file is not [k, width] numbers, all finite."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as fault:
        raise DataError(f"{path}: not a readable .npy file of centroids ({fault})") from None
    if found.ndim != 2 or found.shape[1] != width or not len(found) or found.dtype.kind != "f":
        raise DataError(f"{path}: {found.dtype} of shape {found.shape}; centroids for these vectors are [k, {width}]")
    if not np.isfinite(found).all():
        raise DataError(f"{path}: centroid {int(np.flatnonzero(~np.isfinite(found).all(1))[0])} is not finite")
    centroids: Floats = found.astype(np.float32)
    return centroids


def cluster_sizes(rows: Rows, k: int) -> Ints:
    """[k] rows of each cluster."""
    sizes = np.zeros(k, np.int64)
    for part in rows.parts:
        sizes += np.bincount(part.read("cluster")[0], minlength=k)
    return sizes


def group(rows: Rows, centroids: Floats, most: int, run: lloyd.Map, per_row: int = 1, *, copied: bool = True) -> Rows:
    """A new generation: the alive rows by (cluster, id), in parts of at most `most` rows (but for a larger cluster).

    per_row  clusters that a row sits in. Its own is the nearest; the others only show it to `linked.dedup`.
    copied   whether vectors are written in the new order (`regroup.stays` says where they need not be).
    """
    number = rows.generation + 1
    folder, runs_folder = rows.work / "rows" / str(number), rows.work / "runs" / str(number)
    nearest = Nearest(centroids)
    per_row = min(per_row, len(centroids))
    more = ("also",) if per_row > 1 else ()

    def assign(part: Part) -> regroup.Run:
        return regroup.assign(rows, part, nearest, runs_folder, per_row, copied=copied)

    runs = list(run(assign, rows.parts))
    buckets = regroup.plan(rows.work / "buckets" / f"{number}.npz", runs, len(centroids), most)

    def gather(bucket: regroup.Bucket) -> Part:
        return regroup.gather(bucket, runs, rows.parts, folder / f"{bucket.number:06d}.npz", more)

    parts = tuple(run(gather, buckets))
    return Rows(rows.work, number, parts, per_row=per_row, origin=None if copied else rows)


# --- near copies ----------------------------------------------------------------------------------------------------


def dedup(
    rows: Rows, label: str, threshold: float, keep: str, centroids: Floats, most: int, run: lloyd.Map
) -> tuple[Rows, dict[str, int]]:
    """One row of each component of near copies stays, by the rule `keep` of `groups.KEEPS`.

    Adds component and keeper (row numbers: of the member whose id comes first, and of the one that stays), their ids,
    component_size, same (whether the row is the keeper bit by bit). Also returns sizes of components -> how many.
    """
    rule = groups.KEEPS[keep]

    def judge(part: Part) -> None:
        if not rows.place(label, part).exists():
            alive = rows.alive(part)
            read, component = _components(rows, part, alive, threshold, most)
            _, back, counts = np.unique(component, return_inverse=True, return_counts=True)
            several = np.flatnonzero(counts[back] > 1)
            keeper = np.arange(len(alive))
            if len(several):
                if rule.by == "distance":
                    cluster = part.read("cluster")[0][alive[several]]
                    key = groups.by_distance(read, several, component[several], centroids, cluster)
                elif rule.by == "mean":
                    key = groups.by_mean(read, several, component[several])
                else:
                    key = -part.read("score")[0][alive[several]]
                keeper[several] = several[groups.kept_of(component[several], key, rule.place)]
            _write_groups(rows, label, part, alive, component, keeper, counts[back], _equal(read, keeper))

    lloyd.finish(run(judge, rows.parts))
    return rows.after(label, DEDUPED), component_sizes(rows, label)


DEDUPED = ("component", "component_id", "component_size", "keeper", "keeper_id", "same")
"""Columns that a dedup adds."""


def component_sizes(rows: Rows, label: str) -> dict[str, int]:
    """Sizes of components -> how many, once the step `label` has judged the rows."""
    sizes: Counter[int] = Counter()
    for part in rows.parts:
        alive = rows.alive(part)
        dropped, size = (column[alive] for column in load(rows.place(label, part), "dropped", "component_size"))
        sizes.update(dict(zip(*(x.tolist() for x in np.unique(size[~dropped], return_counts=True)), strict=True)))
    return {str(size): count for size, count in sorted(sizes.items())}


def _components(
    rows: Rows, part: Part, alive: Ints, threshold: float, most: int
) -> tuple[Callable[[Ints], Array], Ints]:
    """A way to read alive rows by their place among them, and their components."""
    bounds = _bounds(part.read("cluster")[0][alive])
    if part.n <= most:
        x = part.vectors(alive, lent=True)
        return lambda places: x[places], groups.components(x, bounds, threshold)
    read = _reader(part, alive)
    found = np.arange(len(alive))
    for begin, end, inside in _lots(bounds, most):

        def lot(places: Ints, begin: int = begin) -> Array:
            return read(begin + places)

        if end - begin <= most:
            found[begin:end] = begin + groups.components(lot(np.arange(end - begin)), inside, threshold)
        else:
            found[begin:end] = begin + groups.components_apart(lot, end - begin, threshold, max(1, most // 2))
    return read, found


def _reader(part: Part, alive: Ints) -> Callable[[Ints], Array]:
    everywhere = part.reader()
    return lambda places: everywhere(alive[places])


def _bounds(cluster: Ints) -> Ints:
    """Where clusters begin among sorted ones, and the end."""
    return np.r_[np.flatnonzero(np.r_[True, np.diff(cluster) != 0][: len(cluster)]), len(cluster)]


def _lots(bounds: Ints, most: int) -> Iterator[tuple[int, int, Ints]]:
    """Neighbouring clusters of at most `most` rows together, or one larger one: (begin, end, bounds inside).

    A part has more rows than `most` where it is one large cluster, or where it was made with more memory."""
    first = 0
    while first < len(bounds) - 1:
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + most, side="right")) - 1)
        yield int(bounds[first]), int(bounds[last]), bounds[first : last + 1] - bounds[first]
        first = last


def _equal(read: Callable[[Ints], Array], keeper: Ints) -> Array:
    """[n] whether each row holds the same bits as the one that is kept for it."""
    same = keeper == np.arange(len(keeper))
    others = np.flatnonzero(~same)
    for part in spans(len(others), 4096):
        one, two = read(others[part]), read(keeper[others[part]])
        same[others[part]] = (one.view(np.uint8) == two.view(np.uint8)).all(1)
    return same


def _write_groups(
    rows: Rows, label: str, part: Part, alive: Ints, component: Ints, keeper: Ints, size: Ints, same: Array
) -> None:
    row, ids = part.read("row", "id")
    columns = {"component": row[alive][component], "component_size": size, "keeper": row[alive][keeper], "same": same}
    whole = {}
    for name, values in columns.items():
        whole[name] = np.full(part.n, 0 if values.dtype == np.bool_ else -1, values.dtype)
        whole[name][alive] = values
    heads, keepers = np.arange(part.n), np.arange(part.n)
    heads[alive], keepers[alive] = alive[component], alive[keeper]
    dropped = np.zeros(part.n, np.bool_)
    dropped[alive] = keeper != np.arange(len(alive))
    rows.judge(label, part, dropped, **whole, component_id=ids.take(heads), keeper_id=ids.take(keepers))


def pairs(
    rows: Rows, label: str, threshold: float, first: str, seed: int, centroids: Floats, most: int, run: lloyd.Map
) -> Rows:
    """SemDeDup's own rule: a row goes when an earlier one of its cluster is near, whether that one stays or not.

    most   rows whose vectors a task holds at once.
    first  what comes first in a cluster: "far" or "near" (by L2 distance to the centroid, ties by id) or "random" (the
           seeded order of id hashes, ties by id).
    """

    def judge(part: Part) -> None:
        if not rows.place(label, part).exists():
            alive = rows.alive(part)
            cluster, hashes = (column[alive] for column in part.read("cluster", "hash"))
            dropped = np.zeros(part.n, np.bool_)
            read, bounds = _reader(part, alive), _bounds(cluster)
            for begin, end, inside in _lots(bounds, most) if len(alive) else ():
                places = np.arange(begin, end)
                whole = end - begin <= most
                x = part.vectors(alive[places], lent=True) if whole else None
                if first == "random":
                    key: Array = ranks.hash_keys(hashes[places], seed, SALT_DRAW)
                else:
                    blocks = (places,) if x is not None else np.split(places, range(most // 2, len(places), most // 2))
                    away = [distances(read(some) if x is None else x, centroids, cluster[some]) for some in blocks]
                    key = np.concatenate(away) * (1 if first == "near" else -1)
                rank = np.empty(len(places), np.int64)
                rank[np.lexsort((places, key))] = np.arange(len(places))
                if x is not None:
                    gone = groups.with_earlier_neighbour(x, inside, threshold, rank)
                else:

                    def lot(some: Ints, begin: int = begin) -> Array:
                        return read(begin + some)

                    gone = groups.with_earlier_neighbour_apart(lot, threshold, rank, max(1, most // 2))
                dropped[alive[places]] = gone
            rows.judge(label, part, dropped)

    lloyd.finish(run(judge, rows.parts))
    return rows.after(label)


# --- ranks ----------------------------------------------------------------------------------------------------------


def band(rows: Rows, label: str, by: str, low: float | str, high: float | str, *, published: bool = False) -> Rows:
    """Ranks floor(low n) to floor(high n) - 1 of the n alive rows, by value descending, then id; `published`: without
    the first of them, as the released code of Dataset-Pruning cuts."""
    n = rows.count()
    begin, end = ranks.rank_of(low, n), ranks.rank_of(high, n)
    return rows.keep_ranks(label, by, ranks.descending, min(begin + published, end), end)


def ranked(rows: Rows, label: str, by: str, begin: int, end: int) -> Rows:
    """Of the alive rows by value descending, then id, those at ranks [begin, end)."""
    return rows.keep_ranks(label, by, ranks.descending, begin, end)


def extent(rows: Rows, by: str) -> dict[str, Any]:
    """The lowest and the highest value of the alive rows."""
    lows, highs = [], []
    for part in rows.parts:
        values = rows.column(by, part)[rows.alive(part)]
        if len(values):
            lows.append(float(values.min()))
            highs.append(float(values.max()))
    return {"by": by, "lowest": min(lows), "highest": max(highs)} if lows else {"by": by}


def copies(rows: Rows, label: str) -> tuple[int, int]:
    """How many rows the step dropped that hold the kept one's bits, and how many others."""
    exact = near = 0
    for part in rows.parts:
        dropped, same = load(rows.place(label, part), "dropped", "same")
        exact += int((dropped & same).sum())
        near += int((dropped & ~same).sum())
    return exact, near


def draw(rows: Rows, label: str, count: int, seed: int) -> Rows:
    """The first `count` of the alive rows in the seeded order of id hashes, ties by id."""
    return rows.keep_ranks(label, "hash", lambda hashes: ranks.hash_keys(hashes, seed, SALT_DRAW), 0, count)


def kept(rows: Rows) -> Iterator[tuple[Ints, Ids]]:
    """(row numbers, ids) of what is alive, part by part."""
    for part in rows.parts:
        alive = rows.alive(part)
        row, ids = part.read("row", "id")
        yield row[alive], ids.take(alive)
