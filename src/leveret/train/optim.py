"""The optimiser and its schedule: AdamW over a flat gradient, learning rates as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from leveret.train.stages import StageRecipe

Shape = Callable[[float, float], float]

SCHEDULES: dict[str, Shape] = {
    # share of the steps done after the warm-up (0..1), share of them that wsd spends falling -> factor
    "constant": lambda done, fall: 1.0,
    "linear": lambda done, fall: 1.0 - done,
    "cosine": lambda done, fall: 0.5 * (1.0 + math.cos(math.pi * done)),
    "wsd": lambda done, fall: 1.0 if fall <= 0 else min(1.0, (1.0 - done) / fall),
}
"""Shapes after the warm-up; each starts at 1, and all but `constant` would reach 0 one step after the last."""


def rate(name: str, step: int, total: int, warmup: float, decay: float = 0.0) -> float:
    """Factor on the peak learning rate at `step` (from 0) of `total`.

    warmup, decay  shares of all steps. The warm-up takes ceil(warmup * total) steps, as in transformers, but counts
                   from 1: its first step is not lost to a rate of zero.
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    rest = max(1, total - rising)
    return SCHEDULES[name]((step - rising) / rest, min(1.0, decay * total / rest))


@dataclass(frozen=True, slots=True)
class Trainable:
    """One parameter that learns."""

    name: str
    part: str
    value: nn.Parameter
    lr: float
    weight_decay: float


def decays(name: str, value: Tensor) -> bool:
    """Whether weight decay touches a parameter: matrices do, biases, norms and other vectors do not."""
    return value.ndim > 1 and not name.endswith(".bias")


class Optimiser:
    """AdamW with one learning rate per part, over gradients that lie in one flat buffer.

    The buffer makes the exchange between ranks a single all-reduce, and clipping a single norm. Every gradient is a
    view into it and is never None: a part that one batch does not touch still decays and keeps its momentum, on one
    rank as on four.

    extra  floats at the end of the buffer that travel with the gradients (loss, stop flag ...).
    """

    def __init__(self, trainables: Sequence[Trainable], stage: StageRecipe, extra: int) -> None:
        self.trainables = list(trainables)
        self.stage = stage
        device = self.trainables[0].value.device
        sizes = [t.value.numel() for t in self.trainables]
        self.buffer = torch.zeros(sum(sizes) + extra, dtype=torch.float32, device=device)
        self.gradient = self.buffer[: sum(sizes)]
        self.extra = self.buffer[sum(sizes) :]
        for trainable, piece in zip(self.trainables, self.gradient.split(sizes), strict=True):
            trainable.value.grad = piece.view_as(trainable.value)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for t in self.trainables:
            groups.setdefault((t.lr, t.weight_decay), []).append(t.value)
        self.peaks = [lr for lr, _ in groups]
        self.adam = torch.optim.AdamW(
            [{"params": values, "lr": lr, "weight_decay": decay} for (lr, decay), values in groups.items()],
            betas=stage.betas,
            eps=stage.eps,
            fused=stage.fused and device.type in ("cpu", "cuda"),
        )
        self.updates = 0

    def zero(self) -> None:
        """Gradients and extras to zero, in place."""
        self.buffer.zero_()

    def part_norms(self) -> dict[str, float]:
        """Largest absolute gradient of each part."""
        largest: dict[str, float] = {}
        for t in self.trainables:
            assert t.value.grad is not None
            largest[t.part] = max(largest.get(t.part, 0.0), float(t.value.grad.abs().max()))
        return largest

    def rates(self, step: int, total: int) -> dict[str, float]:
        """Learning rate of every part at `step`."""
        factor = rate(self.stage.schedule, step, total, self.stage.warmup, self.stage.decay)
        return {t.part: t.lr * factor for t in self.trainables}

    def clip(self) -> Tensor:
        """Norm of the whole gradient (a scalar tensor), scaled down to the stage's `clip` where it passes it."""
        norm = torch.linalg.vector_norm(self.gradient)
        if self.stage.clip is not None:
            # No branch on the value: a GPU would have to wait for it.
            self.gradient.mul_(torch.clamp(self.stage.clip / (norm + 1e-6), max=1.0))
        return norm

    def step(self, step: int, total: int) -> None:
        """One update at the rates of `step`."""
        factor = rate(self.stage.schedule, step, total, self.stage.warmup, self.stage.decay)
        for group, peak in zip(self.adam.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.adam.step()
        self.updates += 1

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments by name, to be saved: `weight.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`."""
        found = {f"weight.{t.name}": t.value.detach() for t in self.trainables}
        if self.updates:
            for t in self.trainables:
                for moment in ("exp_avg", "exp_avg_sq"):
                    found[f"{moment}.{t.name}"] = self.adam.state[t.value][moment]
        return found

    def names(self, updates: int) -> set[str]:
        """The names `tensors` gives after `updates` updates."""
        kinds = ("weight", "exp_avg", "exp_avg_sq") if updates else ("weight",)
        return {f"{kind}.{t.name}" for kind in kinds for t in self.trainables}

    def restore(self, saved: dict[str, Tensor], updates: int) -> None:
        """Put back what `tensors` gave after `updates` updates. The names were checked by the caller."""
        self.updates = updates
        for t in self.trainables:
            with torch.no_grad():
                t.value.copy_(saved[f"weight.{t.name}"])
            if updates:
                moments = {
                    moment: saved[f"{moment}.{t.name}"].to(t.value.device, copy=True)
                    for moment in ("exp_avg", "exp_avg_sq")
                }
                count = torch.tensor(float(updates), device=t.value.device)
                self.adam.state[t.value] = {"step": count, **moments}
