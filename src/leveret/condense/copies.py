"""Bit-identical rows: found by a hash of their bytes, then compared byte for byte."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from leveret.condense.table import Array, Ints, Shop, Table, Verdict, keep_all

BLOCK = 65536
_NONE = np.zeros(0, np.uint64)


def collapse(table: Table, config: Any, shop: Shop) -> Verdict:
    """Adds `copy_of`: the lowest row number whose stored vector has the same bits. Drops nothing.

    Later steps then work on one row of each set and count it as often as it occurs, which changes no result: equal
    rows get equal labels, distances and components. `dedup` is what keeps one of them.
    """
    rows, raw = table.rows, table.vectors.raw
    hashes = np.concatenate([row_hash(raw(rows[at : at + BLOCK])) for at in range(0, len(rows), BLOCK)] or [_NONE])
    order = np.argsort(hashes, kind="stable")
    fresh = np.r_[True, hashes[order][1:] != hashes[order][:-1]][: len(order)]
    copy_of = np.empty(len(rows), np.int64)
    copy_of[order] = rows[order][np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]
    # A hash only proposes: every proposed copy is compared with its first row, and a set with strangers is settled.
    proposed = np.flatnonzero(copy_of != rows)
    for at in range(0, len(proposed), BLOCK):
        part = proposed[at : at + BLOCK]
        same = (raw(rows[part]).view(np.uint8) == raw(copy_of[part]).view(np.uint8)).all(1)
        for strangers in np.unique(hashes[part[~same]]):
            members = np.flatnonzero(hashes == strangers)
            copy_of[members] = _settle(table, members)
    distinct = int((copy_of == table.rows).sum())
    return keep_all(len(table), columns={"copy_of": copy_of}, notes={"distinct": distinct})


def _settle(table: Table, members: Ints) -> Ints:
    """Row number of each member's first equal among members of one hash (ascending), by bytes and in blocks."""
    out = np.full(len(members), -1, np.int64)
    left = np.arange(len(members))
    while len(left):  # once, unless two different rows share a 64-bit hash
        first = table.vectors.raw(table.rows[members[left[:1]]]).view(np.uint8)
        same = np.concatenate(
            [
                (table.vectors.raw(table.rows[members[left[at : at + BLOCK]]]).view(np.uint8) == first).all(1)
                for at in range(0, len(left), BLOCK)
            ]
        )
        out[left[same]] = table.rows[members[left[0]]]
        left = left[~same]
    return out


def row_hash(x: Array) -> NDArray[np.uint64]:
    """[n, width] to [n] uint64: equal bytes give equal hashes; unequal ones are told apart by whoever compares."""
    data = np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)
    data = np.pad(data, ((0, 0), (0, -data.shape[1] % 8))) if data.shape[1] % 8 else data
    words = data.view(np.uint64)
    odd = np.random.Philox(key=np.array([1, 2], np.uint64)).random_raw(words.shape[1]) | np.uint64(1)
    with np.errstate(over="ignore"):
        # The shift keeps high bits from falling off the product: plain multiply-add would lose their differences.
        mixed = (words ^ (words >> np.uint64(29))) * odd
        return (mixed ^ (mixed >> np.uint64(32))).sum(1, dtype=np.uint64)


def first_of_equal(x: Array) -> Ints:
    """For each row of [n, width], the first position that holds the same bits."""
    data = np.ascontiguousarray(x)
    keys = data.view(np.dtype((np.void, data.dtype.itemsize * data.shape[1]))).ravel()
    _, first, back = np.unique(keys, return_index=True, return_inverse=True)
    return first[back].astype(np.int64)
