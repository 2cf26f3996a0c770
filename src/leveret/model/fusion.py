"""Fusion: several towers, or several scales of an image, become one sequence of features.

`channel` puts towers side by side in width, as Prismatic does (DINOv2 first); `interleave` token by token, as the MoF
of "Eyes Wide Shut" and TinyLLaVA Factory do. S2 ("When Do We Not Need Larger Vision Models?") is Bunny's form of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from leveret.model.recipe import Fusion
from leveret.runs import RecipeError


def fuse(features: Sequence[Tensor], how: Fusion) -> Tensor:
    """Features of several towers as one. channel: each [N, n, W_i] -> [N, n, sum W_i]; interleave: T towers of
    [N, n, W] -> [N, T * n, W], ordered tower 1, tower 2, .., tower 1, tower 2, .."""
    if len(features) == 1:
        return features[0]
    if how == "channel":
        return torch.cat(list(features), dim=-1)
    return torch.stack(list(features), dim=2).flatten(1, 2)


def fused(shapes: Sequence[tuple[str, int, int]], how: Fusion) -> tuple[int, int]:
    """(tokens, width) after fusion, from each tower's (name, tokens, width). RecipeError when they do not fit."""
    names, tokens, widths = zip(*shapes, strict=True)
    if len(set(tokens)) > 1:
        said = ", ".join(f"{name} gives {count}" for name, count in zip(names, tokens, strict=True))
        raise RecipeError(
            f"model.vision.towers: they must give equally many tokens, but {said}; set `size` or `tokens` of one"
        )
    if how == "channel":
        return tokens[0], sum(widths)
    if len(set(widths)) > 1:
        said = ", ".join(f"{name} is {width} wide" for name, width in zip(names, widths, strict=True))
        raise RecipeError(
            f"model.vision.fusion: interleave needs towers of one width, but {said}; choose fusion: channel"
        )
    return len(tokens) * tokens[0], widths[0]


def multiscale(see: Callable[[Tensor], Tensor], pixels: Tensor, scales: Sequence[int]) -> Tensor:
    """S2 in Bunny's form: pixels [N, 3, S, S] -> [N, n, W * len(scales)], n tokens of the smallest scale.

    Each scale is made from `pixels` by bicubic interpolation in float32 without antialias, cut into tiles as large as
    the smallest scale (all images' first tile, all second tiles, .., row by row), seen by `see` ([M, 3, s, s] ->
    [M, n, W]), put together again, and brought to the smallest grid by area interpolation (the mean, as a scale is a
    multiple of the smallest). `scales` in rising order.
    """
    return torch.cat([_at(see, pixels, size, size // scales[0]) for size in scales], dim=-1)


def _at(see: Callable[[Tensor], Tensor], pixels: Tensor, size: int, cuts: int) -> Tensor:
    count = len(pixels)
    scaled = F.interpolate(pixels.float(), size=size, mode="bicubic").to(pixels.dtype)
    tiles = torch.cat([tile for row in scaled.chunk(cuts, dim=2) for tile in row.chunk(cuts, dim=3)])
    seen = see(tiles)  # [cuts * cuts * N, n, W]
    side = round(seen.shape[1] ** 0.5)
    grid = seen.transpose(1, 2).reshape(cuts, cuts, count, seen.shape[2], side, side)
    whole = grid.permute(2, 3, 0, 4, 1, 5).reshape(count, seen.shape[2], cuts * side, cuts * side)
    pooled = F.interpolate(whole.float(), size=side, mode="area").to(seen.dtype)
    return pooled.flatten(2).transpose(1, 2)
