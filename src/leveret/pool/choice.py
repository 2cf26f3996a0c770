"""Which records of a mixture are taken, and their order: pure functions of digests of the records and of a seed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from leveret.pool.catalogue import DataSet

if TYPE_CHECKING:
    import numpy as np


def counts(wanted: DataSet) -> list[int | None]:
    """How many each source gives; None for all. Weights share out what the counts leave, by largest remainders."""
    parts = wanted.sources
    given_counts = [part.count for part in parts]
    if wanted.total is None:
        return given_counts
    left = wanted.total - sum(count or 0 for count in given_counts)
    weights = {number: part.weight for number, part in enumerate(parts) if part.weight is not None}
    shares = {number: left * weight / sum(weights.values()) for number, weight in weights.items()}
    given = {number: int(share) for number, share in shares.items()}
    by_rest = sorted(shares, key=lambda number: (given[number] - shares[number], number))
    for number in by_rest[: left - sum(given.values())]:
        given[number] += 1
    return [given.get(number, count) for number, count in enumerate(given_counts)]


def occurrence(digests: np.ndarray) -> np.ndarray:
    """How many equal digests stand before each one: int64 [n]."""
    import numpy as np

    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in their order
    rows = digests[order]
    first = np.ones(len(rows), dtype=bool)
    first[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    places = np.arange(len(rows))
    before = np.empty(len(rows), dtype=np.int64)
    before[order] = places - np.maximum.accumulate(np.where(first, places, 0))
    return before


def shuffled(words: np.ndarray, records: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """A permutation that hangs on the seed and on what the records say alone: int64 [n].

    words: uint64 [n], of ids and texts; records: uint64 [n, 2], of images too, which decide ties. Word, seed and how
    many equal records stand before go through splitmix64's finaliser.
    """
    import numpy as np

    said = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()
    before = occurrence(records)
    with np.errstate(over="ignore"):
        word = words ^ np.uint64(int.from_bytes(said, "little"))
        word = word + before.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word = word ^ (word >> np.uint64(31))
    return np.lexsort((before, records[:, 1], records[:, 0], word))
