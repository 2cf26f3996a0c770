"""What is said of single rows, exactly: every figure here is float64 and of its own row alone, so equal rows tie.

A row is what is stored (float16 or float32); its unit vector is the row divided by its length, both in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

TOGETHER = 512
"""Rows widened to float64 at once. No part of any rule."""


def spans(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover n."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def unit(x: Array) -> Doubles:
    """[n, width] unit vectors of stored rows. Rows without a length must have been refused before."""
    # By float32, which is exact: torch turns halves into it several times as fast as numpy turns them into anything.
    wide = floats(x).astype(np.float64)
    return np.divide(wide, np.sqrt(np.square(wide).sum(1))[:, None], out=wide)


def floats(x: Array) -> Floats:
    """Stored rows as float32, to the bit what they were; the same memory where they are that already."""
    import torch

    found: Floats = torch.from_numpy(np.ascontiguousarray(x)).to(torch.float32).numpy()
    return found


def unit32(x: Array) -> Floats:
    """[n, width] unit vectors rounded to float32, for screens alone (error below (width + 8) 2^-24)."""
    import torch

    wide = torch.from_numpy(floats(x))
    lengths = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    out: Floats = torch.div(wide, lengths, out=wide if x.dtype != np.float32 else None).numpy()
    return out


def cosines(a: Array, b: Array) -> Doubles:
    """[n] cosine of row i of `a` with row i of `b`, both as stored."""
    out = np.empty(len(a))
    for part in spans(len(a), TOGETHER):
        out[part] = (unit(a[part]) * unit(b[part])).sum(1)
    return out


def rough_cosines(a: Array, b: Array) -> tuple[Floats, float]:
    """The same by float32: [n], and how far they may be from float64's."""
    found: Floats = np.einsum("ij,ij->i", unit32(a), unit32(b))
    return found, (a.shape[1] + 32) * 2.0**-22


def distances(x: Array, centroids: Array, labels: Ints) -> Doubles:
    """[n] L2 distance of each row's unit vector to centroids[labels], the centroids as they are."""
    out = np.empty(len(x))
    for part in spans(len(x), TOGETHER):
        out[part] = np.sqrt(np.square(unit(x[part]) - centroids[labels[part]].astype(np.float64)).sum(1))
    return out


def similarities(x: Array, centroids: Array, labels: Ints) -> Doubles:
    """[n] product of each row's unit vector with its centroid divided by its length; 0 for the zero centroid."""
    wide = centroids.astype(np.float64)
    lengths = np.sqrt(np.square(wide).sum(1))[:, None]
    normal = np.divide(wide, lengths, out=np.zeros(wide.shape), where=lengths > 0)
    out = np.empty(len(x))
    for part in spans(len(x), TOGETHER):
        out[part] = (unit(x[part]) * normal[labels[part]]).sum(1)
    return out


def first_of_equal(x: Array) -> Ints:
    """[n] the lowest position that holds the same bits as each row of [n, width].

    Rows are told apart by a few of their words, and those that these do not tell apart by all of their bytes.
    """
    n = len(x)
    if not n:
        return np.zeros(0, np.int64)
    data = np.ascontiguousarray(x).view(np.uint8).reshape(n, -1)
    some = data[:, : data.shape[1] // 8 * 8].view(np.uint64)
    mark = np.zeros(n, np.uint64)
    with np.errstate(over="ignore"):
        for place in np.unique(np.linspace(0, some.shape[1] - 1, 8).astype(np.int64)) if some.shape[1] else ():
            mark = (mark ^ some[:, place]) * np.uint64(0x9E3779B97F4A7C15)
            mark ^= mark >> np.uint64(29)
    first = _first(mark)
    again = np.flatnonzero(first != np.arange(n))
    same = np.ones(len(again), np.bool_)
    for part in spans(len(again), TOGETHER):
        same[part] = (data[again[part]] == data[first[again[part]]]).all(1)
    if not same.all():  # other rows share the mark: settled among themselves, by all of their bytes
        members = np.flatnonzero(np.isin(mark, np.unique(mark[again[~same]])))
        whole = np.ascontiguousarray(data[members]).view(np.dtype((np.void, data.shape[1]))).ravel()
        first[members] = members[_first(whole)]
    return first


def _first(values: Array) -> Ints:
    """[n] the lowest position of each value."""
    _, first, back = np.unique(values, return_index=True, return_inverse=True)
    found: Ints = first[back].astype(np.int64)
    return found
