"""In which order samples are visited: a pure function, so that resuming needs one integer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0..n-1 (int64 [n]) of one epoch; depends on (n, seed, epoch) and on nothing else.

    A stable sort of the raw words of Philox keyed by (seed, epoch). NumPy promises the same raw words in every
    release, but not that `Generator.permutation` stays the same, and an order must outlive an upgrade.
    `ValueError` if n is negative or seed or epoch is outside 0..2**64-1.
    """
    import numpy as np

    if n < 0:
        raise ValueError(f"cannot order {n} samples: n must be 0 or more")
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value}; allowed is 0 to 2**64 - 1")
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)
