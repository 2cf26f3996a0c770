"""pool.order: a permutation that depends on (n, seed, epoch) and on nothing else."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.pool import order

WORDS = st.integers(0, 2**64 - 1)


@given(st.integers(0, 3000), WORDS, WORDS)
def test_it_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    found = order(n, seed, epoch)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(n))


@given(st.integers(0, 500), WORDS, WORDS, st.integers(0, 2**32 - 1))
def test_it_depends_on_nothing_else(n: int, seed: int, epoch: int, noise: int) -> None:
    first = order(n, seed, epoch)
    np.random.seed(noise)
    random.seed(noise)
    state = np.random.get_state()[1].tolist()  # type: ignore[index]
    order(n + 1, seed, epoch)
    assert np.array_equal(order(n, seed, epoch), first)
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index]


@given(WORDS, WORDS)
def test_seeds_and_epochs_do_not_repeat_each_other(seed: int, epoch: int) -> None:
    first = order(100, seed, epoch).tolist()
    assert first != order(100, (seed + 1) % 2**64, epoch).tolist()
    assert first != order(100, seed, (epoch + 1) % 2**64).tolist()
    assert seed == epoch or first != order(100, epoch, seed).tolist()


def test_every_place_is_reached_equally_often() -> None:
    places = np.stack([order(10, 0, epoch) for epoch in range(4000)])
    counts = np.stack([np.bincount(places[:, at], minlength=10) for at in range(10)])
    # 400 expected, standard deviation 19: six of them.
    assert np.abs(counts - 400).max() < 114


def test_it_is_the_same_in_every_release() -> None:
    assert order(12, 0, 0).tolist() == [0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7]
    assert order(12, 2026, 3).tolist() == [0, 3, 2, 11, 5, 8, 9, 10, 6, 7, 1, 4]


@pytest.mark.parametrize(("n", "seed", "epoch"), [(-1, 0, 0), (5, -1, 0), (5, 0, 2**64)])
def test_what_is_out_of_range_is_refused(n: int, seed: int, epoch: int) -> None:
    with pytest.raises(ValueError, match=r"allowed|must be"):
        order(n, seed, epoch)
