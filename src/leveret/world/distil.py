"""Self-distillation for the drawn world's self-supervised tower: DINO's loss between two crops of a picture, iBOT's on
hidden cells, prototypes balanced by Sinkhorn and Knopp's iteration.

    crop a --> student --+--> pooled: what the teacher says of crop b        (DINO, arXiv 2104.14294)
     (some cells hidden  +--> hidden cells: what the teacher says of them     (iBOT, arXiv 2111.07832)
      in half of them)
    crops a, b --> teacher: a slow mean of the student, which sees all of them

What is other than there, because the pictures are small and hold several things each: no small local crops (one of
them would hold another thing than the next, and background alone would tell that they belong together); the student
sees one crop of each picture, not both, which saves a third of the time; pooled is the maximum over tokens, as for
the other towers, for want of a class token; cells are hidden in the picture, since a convolutional stem would look
around a mask that is laid on behind it.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leveret.model.tiny import TinyVisionTower

if TYPE_CHECKING:
    from leveret.world.teachers import Drawn

PROTOTYPES = 256
STUDENT, TEACHER = 0.1, 0.06
"""Temperatures of what the student and the teacher say."""
MOMENTUM = 0.99
"""Of the teacher's mean; in so few steps it does not rise to 1."""
CROP = (0.7, 1.0)
"""Least and greatest side of a crop, as a share of the picture's."""
MASKED, HIDDEN = 0.5, (0.2, 0.5)
"""Share of crops with hidden cells, and least and greatest share of cells that are hidden there."""


class Head(nn.Module):
    """[.., width] to what it says of PROTOTYPES: cosines with each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, 64)
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.down(F.gelu(self.up(x))).float(), dim=-1)
        return x @ F.normalize(self.prototypes.float(), dim=-1).T


@torch.no_grad()
def balanced(said: Tensor, rounds: int = 3) -> Tensor:
    """What a teacher says [n, K], as shares that use all prototypes alike (Sinkhorn-Knopp, as in SwAV and DINOv2)."""
    q = (said.float() / TEACHER).exp().T
    q = q / q.sum()
    for _ in range(rounds):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def agree(said: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of what the student says with what the teacher does; both [n, K]."""
    return -(wanted * F.log_softmax(said / STUDENT, -1)).sum(-1).mean()


def crops(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """A crop of each picture, scaled back to its size, mirrored or not, otherwise exposed: [N, 3, S, S] to the same."""
    n = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=rng)

    side = uniform(*CROP, n)
    mirror = 1 - 2 * (torch.rand(n, generator=rng) < 0.5).float()
    room = 1 - side
    x, y = uniform(-1, 1, n) * room, uniform(-1, 1, n) * room
    nothing = torch.zeros(n)
    theta = torch.stack([torch.stack([side * mirror, nothing, x], 1), torch.stack([nothing, side, y], 1)], 1)
    cut = F.grid_sample(pixels, F.affine_grid(theta, list(pixels.shape), align_corners=False), align_corners=False,
                        padding_mode="reflection")  # fmt: skip
    gain, shift = uniform(0.7, 1.3, n, 1, 1, 1), uniform(-0.3, 0.3, n, 1, 1, 1) + uniform(-0.1, 0.1, n, 3, 1, 1)
    return (cut * gain + shift + 0.04 * torch.randn(cut.shape, generator=rng)).clamp(-1, 1)


def hidden(n: int, grid: int, rng: torch.Generator) -> Tensor:
    """Which cells are hidden: [n, grid, grid] bool, in blocks of 2 x 2, none in a crop that is not chosen."""
    half = math.ceil(grid / 2)
    share = HIDDEN[0] + (HIDDEN[1] - HIDDEN[0]) * torch.rand(n, 1, 1, generator=rng)
    blocks = torch.rand(n, half, half, generator=rng) < share
    blocks &= torch.rand(n, 1, 1, generator=rng) < MASKED
    return blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :grid, :grid]


class Distil(nn.Module):
    """The teacher and both heads. `tower` is the slow mean, which is the one to keep."""

    def __init__(self, tower: TinyVisionTower, tokenizer: Any = None) -> None:
        super().__init__()
        self.whole, self.cell = Head(tower.width), Head(tower.width)
        self.tower = copy.deepcopy(tower).requires_grad_(False)
        self.mean_whole = copy.deepcopy(self.whole).requires_grad_(False)
        self.mean_cell = copy.deepcopy(self.cell).requires_grad_(False)
        self.blank = nn.Parameter(torch.zeros(3))

    @torch.no_grad()
    def follow(self, tower: TinyVisionTower, share: float) -> None:
        """The teacher becomes `share` of itself and the rest of the student. Running statistics are its own: it sees
        whole crops."""
        for mean, now in ((self.tower, tower), (self.mean_whole, self.whole), (self.mean_cell, self.cell)):
            for kept, new in zip(mean.parameters(), now.parameters(), strict=True):
                kept.lerp_(new, 1 - share)

    def forward(self, tower: TinyVisionTower, seen: Drawn, step: int) -> tuple[Tensor, dict[str, float]]:
        # A step later than in the papers: the student's weights are those that the step before left.
        self.follow(tower, MOMENTUM if step else 0.0)
        rng = torch.Generator().manual_seed(seen.seed)
        views = torch.cat([crops(seen.pixels, rng), crops(seen.pixels, rng)])
        n, grid = len(seen.pixels), tower.grid
        mask = hidden(n, grid, rng)
        over = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
        with torch.no_grad():
            told = self.tower.train()(views)
            whole = balanced(self.mean_whole(told.amax(1)))[n:]
            cells = balanced(self.mean_cell(told[:n][mask.flatten(1)]))
        tokens = tower(torch.where(over, self.blank[:, None, None], views[:n]))
        pooled = self.whole(tokens.amax(1))
        between, within = agree(pooled, whole), agree(self.cell(tokens[mask.flatten(1)]), cells)
        same = (pooled.argmax(1) == whole.argmax(1)).float().mean()
        return between + within, {"between": between.item(), "within": within.item(), "same": same.item()}
