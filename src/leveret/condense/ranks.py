"""Exact cuts through an order that never stands in memory: which rows hold ranks `begin` to `end`.

Rows are ordered by a 64-bit key, then by id (bytes). One pass counts keys in bins; the bin that a cut falls into is
counted finer, or, once few rows are left in it, fetched and sorted. So a cut costs two passes and little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
BITS = 16
FETCHED = 1 << 20
"""Rows of one bin that are sorted in memory; a bin with more is counted finer."""


def rank_of(share: Decimal | float | str, n: int) -> int:
    """floor(share x n), the product taken exactly: shares are the decimals a person wrote, not floats near them."""
    return int((Decimal(str(share)) * n).to_integral_value(ROUND_FLOOR))


def descending(values: NDArray[Any]) -> Keys:
    """Keys whose ascending order is the values' descending one. Equal values, +0 and -0 among them, have equal keys."""
    bits = (values.astype(np.float64) + 0.0).view(np.uint64)
    sign = np.uint64(1 << 63)
    ascending = np.where(bits & sign, ~bits, bits | sign)
    return ~ascending


@dataclass(frozen=True)
class Cut:
    """A place in the order: rows with a smaller (key, id) come before it, all others after.

    key  None: after all rows.
    """

    key: int | None
    id: bytes = b""

    def before(self, keys: Keys, ids: Callable[[NDArray[np.int64]], list[bytes]]) -> NDArray[np.bool_]:
        """Which of some rows come before the cut. `ids` is asked for the positions that have the cut's own key."""
        if self.key is None:
            return np.ones(len(keys), np.bool_)
        out = keys < np.uint64(self.key)
        tied = np.flatnonzero(keys == np.uint64(self.key))
        if len(tied):
            out[tied] = np.array([id < self.id for id in ids(tied)], np.bool_)
        return out


Parts = Callable[[], Iterator[tuple[Keys, Callable[[NDArray[np.int64]], list[bytes]]]]]
"""Called once a pass: gives each part's keys and a function from positions in it to ids."""


def cut_at(parts: Parts, rank: int, fetched: int = FETCHED) -> Cut:
    """The cut with `rank` rows before it."""
    low, high, below = 0, 1 << 64, 0  # the keys that the row at `rank` may have, and rows before them
    while True:
        shift = max(0, (high - low).bit_length() - 1 - BITS)
        counts = np.zeros(1 << BITS, np.int64)
        for keys, _ in parts():
            inside = keys[(keys >= np.uint64(low)) & (keys <= np.uint64(high - 1))] - np.uint64(low)
            counts += np.bincount((inside >> np.uint64(shift)).astype(np.int64), minlength=1 << BITS)
        ends = below + np.cumsum(counts)
        if rank >= ends[-1]:
            return Cut(None)
        bin_ = int(np.searchsorted(ends, rank, side="right"))
        below = int(ends[bin_] - counts[bin_])
        low, high = low + (bin_ << shift), min(high, low + ((bin_ + 1) << shift))
        if counts[bin_] <= fetched or shift == 0:
            break
    found: list[tuple[int, bytes]] = []
    if shift == 0 and counts[bin_] > fetched:
        return Cut(low, _id_at(parts, low, rank - below, fetched))
    for keys, ids in parts():
        there = np.flatnonzero((keys >= np.uint64(low)) & (keys <= np.uint64(high - 1)))
        found += zip(keys[there].tolist(), ids(there), strict=True)
    found.sort()
    key, id = found[rank - below]
    return Cut(key, id)


def _id_at(parts: Parts, key: int, rank: int, fetched: int) -> bytes:
    """The id at `rank` among the rows of one key, of which there are many: found byte by byte of the id."""
    prefix = b""
    while True:
        ended, counts = 0, np.zeros(256, np.int64)
        for keys, ids in parts():
            for id in ids(np.flatnonzero(keys == np.uint64(key))):
                if id.startswith(prefix):
                    if len(id) == len(prefix):
                        ended += 1
                    else:
                        counts[id[len(prefix)]] += 1
        if rank < ended:
            return prefix
        ends = ended + np.cumsum(counts)
        byte = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[byte] - counts[byte])
        prefix += bytes([byte])
        if counts[byte] <= fetched:
            break
    left = [id for keys, ids in parts() for id in ids(np.flatnonzero(keys == np.uint64(key))) if id.startswith(prefix)]
    return sorted(left)[rank]


# --- orders that depend on ids alone -------------------------------------------------------------------------------


def _mix(words: Keys) -> Keys:
    """splitmix64's finaliser: a fixed permutation of 64-bit words that looks random."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def hash_ids(ids: Iterable[bytes]) -> Keys:
    """[n]: the first 8 bytes (little end first) of BLAKE2b of each id."""
    from hashlib import blake2b

    data = b"".join(blake2b(id, digest_size=8).digest() for id in ids)
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


def hash_keys(hashes: Keys, seed: int, salt: int) -> Keys:
    """[n] keys of the seeded order of id hashes; `salt`: what the order is for."""
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed & (2**64 - 1)], np.uint64) + _mix(np.array([salt], np.uint64)))
    return _mix(hashes ^ key)
