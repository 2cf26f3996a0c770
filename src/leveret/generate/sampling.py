"""How the next token is chosen from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leveret.runs import DataError

FEW = 1024
"""Tokens that are looked at first where the likeliest are drawn from."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature  0 takes the likeliest token; 1 follows the model; more is bolder.
    top_p        only the likeliest tokens whose probabilities together first reach this share are drawn from.
    seed         the same seed gives the same draws, whatever else is in the batch; None draws a fresh one.

    Raises DataError for values outside temperature >= 0 and 0 < top_p <= 1.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise DataError(f"temperature: got {self.temperature}; allowed is 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p: got {self.top_p}; allowed is more than 0 and at most 1")

    def picker(self) -> Picker | None:
        """What draws the tokens of one answer; None where the likeliest is taken."""
        return Picker(self) if self.temperature > 0 else None


class Picker:
    """Draws the tokens of one answer, with a random stream of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        # On the CPU wherever the model is: the same seed must mean the same answer.
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """One token id from logits [V]."""
        scores = logits.detach().cpu().double()
        # From the highest down: however small the temperature, the likeliest stays at 0 and nothing becomes inf - inf.
        probabilities = torch.softmax((scores - scores.max()) / self.sampling.temperature, dim=-1)
        if self.sampling.top_p == 1:
            return int(self._drawn(probabilities))
        ordered, ids = self._likeliest(probabilities)
        before = ordered.cumsum(0) - ordered  # the likeliest has nothing before it, so it always stays
        return int(ids[self._drawn(ordered.masked_fill(before >= self.sampling.top_p, 0))])

    def _likeliest(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens, from the highest down, that reach top_p; and their ids. A whole vocabulary is sorted
        (56 ms of 151,936) only where few are not enough."""
        if len(probabilities) > FEW:
            ordered, ids = probabilities.topk(FEW)
            if float(ordered.sum()) >= self.sampling.top_p:
                return ordered, ids
        return probabilities.sort(descending=True, stable=True)

    def _drawn(self, chances: Tensor) -> Tensor:
        """A place, by its chance: where one number falls among their sums."""
        sums = chances.cumsum(0)
        at = torch.rand(1, dtype=sums.dtype, generator=self.generator) * sums[-1]
        return torch.searchsorted(sums, at, right=True).clamp_(max=int(chances.nonzero()[-1]))
