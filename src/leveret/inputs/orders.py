"""Which rows go together in a step, and in which order: one row a rule, pure functions of (sizes, seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leveret.pool.order import order
from leveret.runs import RecipeError

WINDOW = 64
"""Batches whose rows are drawn together and then sorted by length. Wider means less padding, but company that is less
random: on log-normal lengths and batches of 32, random batches are 75 % padding, windows of 8 batches 39 %, of 64 10 %
and of the whole epoch 2 %."""

Lengths = Sequence[int] | NDArray[np.int64]
Batches = list[list[int]]


def plan(lengths: Lengths, batch: int, seed: int, epoch: int, *, by: str = "length") -> Batches:
    """Which rows form the batches of one epoch: a pure function.

    lengths  of every row; below 0 of those without images, for the rules that keep kinds apart.
    by       a row of `ORDERS`.

    Raises ValueError when `batch` is below 1 or a seed or epoch is negative, RecipeError for a rule that is not there or
    that cannot order these rows.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be 1 or more")
    if by not in ORDERS:
        raise RecipeError(f"order: {by!r} given; allowed are {', '.join(ORDERS)}")
    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return []
    try:
        return ORDERS[by](sizes, batch, seed, epoch)
    except ValueError as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"order: {by!r} cannot be used here: {error}") from None


def _shuffled(batches: Batches, seed: int, epoch: int) -> Batches:
    # Another key than the rows' own order, so that the two shuffles have nothing to do with each other.
    return [batches[place] for place in order(len(batches), seed ^ 0x5EED_BA7C, epoch)]


def _windows(rows: NDArray[np.int64], sizes: NDArray[np.int64], batch: int) -> Batches:
    """Rows in random order, sorted by length inside windows of `WINDOW` batches, and cut into batches."""
    batches: Batches = []
    for start in range(0, len(rows), WINDOW * batch):
        window = rows[start : start + WINDOW * batch]
        window = window[np.argsort(sizes[window], kind="stable")]
        batches += [window[at : at + batch].tolist() for at in range(0, len(window), batch)]
    return batches


def _by_length(sizes: NDArray[np.int64], batch: int, seed: int, epoch: int) -> Batches:
    return _shuffled(_windows(order(len(sizes), seed, epoch), np.abs(sizes), batch), seed, epoch)


def _by_modality(sizes: NDArray[np.int64], batch: int, seed: int, epoch: int) -> Batches:
    drawn = order(len(sizes), seed, epoch)
    kinds = (drawn[sizes[drawn] > 0], drawn[sizes[drawn] <= 0])
    return _shuffled([one for kind in kinds for one in _windows(kind, np.abs(sizes), batch)], seed, epoch)


def _random(sizes: NDArray[np.int64], batch: int, seed: int, epoch: int) -> Batches:
    drawn = order(len(sizes), seed, epoch).tolist()
    return [drawn[at : at + batch] for at in range(0, len(drawn), batch)]


def _llava(rest: str) -> Callable[..., Batches]:
    def rule(sizes: NDArray[np.int64], batch: int, seed: int, epoch: int) -> Batches:
        import torch

        from leveret.inputs.grouped import modality_grouped

        # The original draws from the global generator, which no run can repeat: here it is one of the seed and epoch.
        # Whole steps are dealt out, so that ranks and passes change nothing about which samples make a step.
        generator = torch.Generator().manual_seed((seed + epoch) % 2**63)
        given: Any = {"rows": generator, "batches": generator, "rest": rest}
        drawn = modality_grouped(sizes.tolist(), batch, 1, **given)
        return [drawn[at : at + batch] for at in range(0, len(drawn), batch)]

    return rule


def _prismatic(sizes: NDArray[np.int64], batch: int, seed: int, epoch: int) -> Batches:
    from leveret.inputs.grouped import split_modality

    return split_modality(sizes.tolist(), batch, 1, seed, epoch)


ORDERS: dict[str, Callable[[NDArray[np.int64], int, int, int], Batches]] = {
    "length": _by_length,  # alike in length, drawn from windows: little padding; every row once
    "modality": _by_modality,  # the same, and every batch with images or without
    "random": _random,  # every row once, batches as they fall
    "llava": _llava("last"),  # LLaVA's and Bunny's group_by_modality_length
    "tinyllava": _llava("first"),  # TinyLLaVA Factory's
    "prismatic": _prismatic,  # SplitModalitySampler; a kind's last batch is filled up with rows of its first
}
"""Rules of which rows make a step. The last three go by words, as the originals do; the others by tokens."""
BY_WORDS = ("llava", "tinyllava", "prismatic")


def padding_share(lengths: Lengths, batches: Sequence[Sequence[int]]) -> float:
    """Share of all positions that is padding when each batch is padded to its longest row; 0 for no batches."""
    sizes = np.abs(np.asarray(lengths, dtype=np.int64))
    laid = sum(len(rows) * int(sizes[list(rows)].max()) for rows in batches)
    return 1 - sum(int(sizes[list(rows)].sum()) for rows in batches) / laid if laid else 0.0
