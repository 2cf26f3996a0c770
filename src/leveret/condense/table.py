"""What a step sees and what it says.

    Table (rows still alive, their columns, their vectors)  --step-->  Verdict (keep, reason, new columns)

A step is a pure function: the same table and settings give the same verdict on any machine, for any number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Array = NDArray[Any]
T = TypeVar("T")
R = TypeVar("R")


class Vectors:
    """The unit vectors of all rows, in shards that stay on disk (memory-mapped) and are read in blocks.

    n, width   rows and numbers per row. Rows are numbered through all shards in their order.
    """

    def __init__(self, shards: Sequence[Array]) -> None:
        self.shards = [shard for shard in shards if len(shard)] or list(shards[:1])
        self.bounds = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self.n = int(self.bounds[-1])
        self.width = int(self.shards[0].shape[1]) if self.shards else 0

    def raw(self, rows: Ints) -> Array:
        """The stored numbers of `rows` (any order, repeats allowed), in their own dtype: [len(rows), width]."""
        if len(rows) and np.all(rows[1:] >= rows[:-1]):
            cuts = np.searchsorted(rows, self.bounds)
            parts = [
                shard[rows[a:b] - base]
                for shard, base, a, b in zip(self.shards, self.bounds[:-1], cuts[:-1], cuts[1:], strict=True)
                if b > a
            ]
            return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
        if not len(rows):
            dtype = self.shards[0].dtype if self.shards else np.float32
            return np.zeros((0, self.width), dtype)
        order = np.argsort(rows, kind="stable")
        out = np.empty((len(rows), self.width), self.shards[0].dtype)
        out[order] = self.raw(rows[order])
        return out

    def take(self, rows: Ints) -> NDArray[np.float32]:
        """The vectors of `rows` as float32 [len(rows), width]; float16 widens without loss."""
        return self.raw(rows).astype(np.float32, copy=False)


@dataclass(frozen=True)
class Table:
    """The rows that are still alive when a step runs.

    rows     [n] int64, ascending row numbers; every tie in every rule is settled by them.
    columns  name -> [n]. Always there: `hash` (uint64, of the id). By the source: `score` (float64 image-text
             cosine). By steps: `copy_of`, `cluster`, `centroid_cosine`, `component`, `component_size`,
             `representative`.
    facts    arrays that are not per row: `centroids` [k, width] float32.
    """

    rows: Ints
    columns: Mapping[str, Array]
    vectors: Vectors
    facts: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Verdict:
    """What a step says of each row of its table.

    keep     [n] bool.
    reason   [n] uint8: position in `reasons` (fixed words), why a row that is not kept is not.
    columns  new columns, [n] each. facts: new facts. notes: what the summary and the report should say.
    """

    keep: NDArray[np.bool_]
    reason: NDArray[np.uint8]
    reasons: tuple[str, ...]
    columns: Mapping[str, Array] = field(default_factory=dict)
    facts: Mapping[str, Array] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


def keep_all(n: int, **more: Any) -> Verdict:
    """A verdict of a step that only adds columns."""
    return Verdict(np.ones(n, bool), np.zeros(n, np.uint8), ("",), **more)


class Shop:
    """Where a step works: how many workers, and a place that remembers finished parts of long work.

    Without a place nothing is remembered. What is remembered never changes a result: parts are pure functions too.
    """

    def __init__(self, seed: int = 0, workers: int = 1) -> None:
        self.seed, self.workers = seed, max(1, workers)

    def memo(self, name: str, make: Callable[[], Array]) -> Array:
        """`make()`, or what it gave in a run that was killed later."""
        return make()

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """`function` of each item on the workers' threads, results in the order of the items; few are in flight."""
        if self.workers == 1 or len(items) < 2:
            yield from map(function, items)
            return
        from leveret.model.threads import torch_threads

        # One product per thread, each on one core: threads inside small products cost more than they bring.
        with torch_threads(1), ThreadPoolExecutor(self.workers) as pool:
            waiting: deque[Future[R]] = deque()
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def product(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """a @ b.T in float32, [len(a), len(b)]; only ever a screen whose error `screen_error` bounds."""
    import torch

    if torch.get_float32_matmul_precision() != "highest":  # someone allowed bfloat16 inside: the bound would not hold
        return a @ b.T
    return torch.mm(torch.from_numpy(a), torch.from_numpy(b).T).numpy()


def screen_error(width: int) -> float:
    """Bound on |float32 product - exact product| / (|a| |b|), whatever the order of summation.

    Higham's gamma_n = n u / (1 - n u) with u = 2**-24 covers any order and fused multiply-adds.
    """
    unit = (width + 2) * 2.0**-24
    return unit / (1 - unit)


def dots(a: Array, b: Array) -> NDArray[np.float64]:
    """Row-wise products in float64, [n]: a row's result depends on that row alone, so equal rows tie.

    Products of two float32 numbers are exact in float64, and for float16 unit vectors the sums are exact as well.
    """
    out = np.empty(len(a))
    for start in range(0, len(a), _ROWS):
        part = slice(start, start + _ROWS)
        out[part] = (a[part].astype(np.float64) * b[part].astype(np.float64)).sum(1)
    return out


def distances(a: Array, b: Array) -> NDArray[np.float64]:
    """Row-wise squared L2 distances in float64, [n]. `b` is [n, width] or one vector."""
    out = np.empty(len(a))
    for start in range(0, len(a), _ROWS):
        part = slice(start, start + _ROWS)
        other = b if b.ndim == 1 else b[part]
        out[part] = np.square(a[part].astype(np.float64) - other.astype(np.float64)).sum(1)
    return out


_ROWS = 4096


# --- orders that depend on ids alone -------------------------------------------------------------------------------


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: a fixed permutation of 64-bit words that looks random."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def hash_ids(ids: Sequence[str]) -> NDArray[np.uint64]:
    """[n] uint64: the first 8 bytes (little end first) of BLAKE2b of each id in UTF-8."""
    from hashlib import blake2b

    data = b"".join(blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest() for id in ids)
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


def hash_keys(hashes: NDArray[np.uint64], seed: int, salt: int) -> NDArray[np.uint64]:
    """[n] keys of the seeded order of id hashes; `salt`: what the order is for."""
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed & (2**64 - 1)], np.uint64) + _mix(np.array([salt], np.uint64)))
    return _mix(hashes ^ key)


def hash_order(hashes: NDArray[np.uint64], seed: int, salt: int) -> Ints:
    """Positions in a seeded order that depends on ids, not on where rows stand; equal ids by position."""
    return np.argsort(hash_keys(hashes, seed, salt), kind="stable").astype(np.int64)
