"""Which samples make up which step, and which of them are whose: pure functions of the step, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from leveret.inputs.orders import BY_WORDS, plan
from leveret.train.state import random_seed

if TYPE_CHECKING:
    from leveret.train.data import Prepared
    from leveret.train.stages import StageRecipe


class Order:
    """The samples of every step of a stage, by the rule that its recipe names (`inputs.orders.ORDERS`)."""

    def __init__(self, data: Prepared, stage: StageRecipe, seed: int) -> None:
        self.tokens = data.lengths
        sizes = data.words if stage.order in BY_WORDS else data.lengths
        self._sizes = np.where(np.diff(data.image_offsets) > 0, sizes, -sizes)
        if stage.order in ("llava", "tinyllava"):  # who counts the images' marks as words
            self._sizes = self._sizes + np.diff(data.image_offsets)
        self._rule, self._batch, self._seed = stage.order, stage.batch, seed
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self.per_epoch = len(self._of(0))
        """Steps in one pass over the data."""
        self._whole = sum(map(len, self._of(0)))

    def _of(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch; every epoch has as many, and as many rows in all."""
        known = self._epoch  # once: another thread, which is a step ahead, may be in the next epoch
        if known[0] != epoch:
            known = self._epoch = (epoch, plan(self._sizes, self._batch, self._seed, epoch, by=self._rule))
        return known[1]

    def rows(self, step: int) -> list[int]:
        """The samples of `step` (from 0), long ones first, so that ranks and micro-batches get rows alike in length."""
        epoch, place = divmod(step, self.per_epoch)
        return sorted(self._of(epoch)[place], key=lambda row: (-self.tokens[row], row))

    def seen(self, step: int) -> int:
        """Samples in all steps before `step`: an epoch may have short batches, and repeat rows."""
        epoch, place = divmod(step, self.per_epoch)
        return epoch * self._whole + sum(map(len, self._of(epoch)[:place]))


def order_of(data: Prepared, stage: StageRecipe, name: str, seed: int) -> Order:
    """The order of a stage. Prismatic's is drawn from the seed itself, so that theirs (7) gives their own order."""
    drawn = seed if stage.order == "prismatic" else random_seed(seed, name, -2, 0) & 0x7FFFFFFF
    return Order(data, stage, drawn)


def micro_batches(rows: Sequence[int], rank: int, world: int, size: int | None) -> Iterator[Sequence[int]]:
    """This rank's rows of a global batch, in passes of at most `size`."""
    mine = rows[rank::world]
    size = size or max(1, len(mine))
    yield from (mine[at : at + size] for at in range(0, len(mine), size))
