"""The rows that are being judged, on disk and in parts, and what was decided of them so far.

    WORK/rows/G/NNNNNN.npz      columns of part N in generation G: row, id, score, hash; from `cluster` on also cluster
                                and centroid_cosine, the rows then sorted by (cluster, id)
    WORK/LABEL/NNNNNN.npz       what the step LABEL found of part N: its columns, and `fate`
    WORK/runs/G/                vectors of generation G, sorted by cluster, or where they are (`regroup`)
    WORK/buckets/G.npz          which clusters are in which part of generation G

A generation is an order of rows. Steps that only judge write beside the parts they read; `cluster` begins a new
generation with the rows that are still alive. Everything is written whole or not at all, so what exists is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from leveret.condense import ranks
from leveret.condense.columns import Ids, load, save
from leveret.condense.npy import Arrays
from leveret.condense.rows import Array, Ints, spans
from leveret.condense.shards import Shard, scattered

ALIVE = 0
BLOCK = 4096
"""Rows read at once on their way to where they are wanted: little enough to stay in a core's cache."""


@dataclass(frozen=True)
class Part:
    """Some rows. n: how many. pieces: (shard, start, stop) that hold their vectors, end to end, and maybe more; the
    column `source` [n] says which of those is whose row, and is empty where the order is the same."""

    number: int
    path: Path
    n: int
    pieces: tuple[tuple[Shard, int, int], ...]

    def read(self, *names: str) -> list[Any]:
        return load(self.path, *names)

    def names(self) -> list[str]:
        """Its columns."""
        with Arrays(self.path) as file:
            return list(dict.fromkeys(name.removesuffix(".blob").removesuffix(".ends") for name in file.names))

    def vectors(self, places: Ints | None = None, *, lent: bool = False) -> Array:
        """[n, width] as stored: of all rows, or of those at some places, in their order.

        lent  in memory that this thread uses again for the next that are lent.
        """
        (source,) = load(self.path, "source")
        total = sum(stop - start for _, start, stop in self.pieces)
        n = self.n if places is None else len(places)
        wanted = source if places is None else source[places] if len(source) else places
        everything = n == total
        to: Ints | None = None  # where each row goes, where the order is another
        if len(source) or not everything:
            to = np.full(total, -1, np.int64)
            to[wanted] = np.arange(len(wanted))
        shard = self.pieces[0][0]
        shape = n, shard.width
        out = _memory(shape, shard.dtype) if lent else np.empty(shape, shard.dtype)
        first = 0
        for shard, start, stop in self.pieces:
            for span in spans(stop - start, BLOCK):
                inside = slice(first + span.start, first + span.stop)
                block = start + span.start, start + span.stop
                if to is None:
                    out[inside] = shard.read(*block)
                elif everything:
                    out[to[inside]] = shard.read(*block)
                elif len(some := np.flatnonzero(to[inside] >= 0)):
                    out[to[inside][some]] = shard.read(*block)[some]
            first += stop - start
        return out

    def blocks(self, size: int) -> Iterator[tuple[Ints, Array]]:
        """All rows as they lie on disk, at most `size` at a time: their places, and their vectors as stored."""
        (source,) = load(self.path, "source")
        total = sum(stop - start for _, start, stop in self.pieces)
        place = np.arange(self.n)
        if len(source):
            place = np.full(total, -1, np.int64)  # of the rows that lie there, those of other parts too
            place[source] = np.arange(self.n)
        first = 0
        for shard, start, stop in self.pieces:
            for span in spans(stop - start, size):
                inside = place[first + span.start : first + span.stop]
                ours = inside >= 0
                if ours.all():
                    yield inside, shard.read(start + span.start, start + span.stop)
                elif ours.any():
                    yield inside[ours], shard.read(start + span.start, start + span.stop)[ours]
            first += stop - start

    def reader(self) -> Callable[[Ints], Array]:
        """Places to rows, for a part that does not fit in memory."""
        (source,) = load(self.path, "source")
        ends = np.cumsum([stop - start for _, start, stop in self.pieces])

        def at(places: Ints) -> Array:
            wanted = source[places] if len(source) else places
            order = np.argsort(wanted, kind="stable")
            cuts = np.r_[0, np.searchsorted(wanted[order], ends)]
            found = [
                scattered(shard, wanted[order[a:b]] - (end - stop))
                for (shard, _, stop), end, a, b in zip(self.pieces, ends, cuts[:-1], cuts[1:], strict=True)
                if b > a
            ]
            out = np.empty((len(wanted), found[0].shape[1]), found[0].dtype)
            out[order] = np.concatenate(found)
            return out

        return at


_local = threading.local()


def _memory(shape: tuple[int, int], dtype: str) -> Array:
    """Of this thread. To touch fresh memory, as large as a part, takes longer than to fill it."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    if not hasattr(_local, "bytes") or len(_local.bytes) < size:
        _local.bytes = None  # freed before the larger one is there
        _local.bytes = np.empty(size, np.uint8)
    found: Array = _local.bytes[:size].view(dtype).reshape(shape)
    return found


@dataclass(frozen=True)
class Rows:
    """All rows of one generation, and the steps that judged them.

    judged   labels of the steps that wrote `fate` for this generation, in order.
    columns  label -> names of the columns that step added.
    per_row  clusters that a row sits in.
    origin   the generation in whose files the vectors stayed; None where they are in files of this one's order.
    """

    work: Path
    generation: int
    parts: tuple[Part, ...]
    judged: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)
    per_row: int = 1
    origin: Rows | None = None

    def fate(self, part: Part) -> Array:
        """[n] uint8: 0 while alive, else 1 + position in `judged` of the step that dropped the row."""
        out = np.zeros(part.n, np.uint8)
        for place, label in enumerate(self.judged):
            (dropped,) = load(self.place(label, part), "dropped")
            out[(out == ALIVE) & dropped] = place + 1
        return out

    def alive(self, part: Part) -> Ints:
        """Places of the rows that no step dropped."""
        return np.flatnonzero(self.fate(part) == ALIVE)

    def place(self, label: str, part: Part) -> Path:
        return self.work / label / f"{part.number:06d}.npz"

    def column(self, name: str, part: Part) -> Any:
        """A column of the part, whoever made it."""
        return load(self.place(self.columns[name], part) if name in self.columns else part.path, name)[0]

    def made_by(self, label: str) -> list[str]:
        """Columns that a step added."""
        return [name for name, maker in self.columns.items() if maker == label]

    def count(self) -> int:
        return sum(len(self.alive(part)) for part in self.parts)

    def after(self, label: str, made: Sequence[str] = ()) -> Rows:
        """The same rows once the step `label` has judged them; `made`: columns that it added."""
        return replace(self, judged=(*self.judged, label), columns=self.columns | dict.fromkeys(made, label))

    def judge(self, label: str, part: Part, dropped: Array, **made: Array | Ids) -> Path:
        """Writes what a step found of a part."""
        path = self.place(label, part)
        save(path, {"dropped": dropped, **made})
        return path

    def keys(self, name: str, key: Callable[[Array], Array]) -> ranks.Parts:
        """Sort keys of the alive rows, for `ranks.cut_at`."""

        def each() -> Iterator[tuple[Array, Callable[[Array], list[bytes]]]]:
            for part in self.parts:
                alive = self.alive(part)

                def at(places: Array, part: Part = part, alive: Ints = alive) -> list[bytes]:
                    ids: Ids = part.read("id")[0]  # few passes ask for any: they are as much to read as all the rest
                    return ids.at(alive[places])

                yield key(self.column(name, part)[alive]), at

        return each

    def keep_ranks(self, label: str, name: str, key: Callable[[Array], Array], begin: int, end: int) -> Rows:
        """Of the alive rows in the order of `key`, ties by id, those at ranks [begin, end) stay."""
        if all(self.place(label, part).exists() for part in self.parts):
            return self.after(label)
        keys = self.keys(name, key)
        first, last = ranks.cut_at(keys, begin), ranks.cut_at(keys, end)
        for part, (values, at) in zip(self.parts, keys(), strict=True):
            dropped = np.zeros(part.n, np.bool_)
            dropped[self.alive(part)] = ~(last.before(values, at) & ~first.before(values, at))
            self.judge(label, part, dropped)
        return self.after(label)
