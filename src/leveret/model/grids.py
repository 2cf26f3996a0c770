"""Connectors that join neighbouring tokens or know where on the image's grid a token stood.

Shapes: [N, n, W] -> [N, m, D]. N images, n tokens in, m tokens out, W and D widths; a grid of s x s tokens lies row
by row, so token t stands in row t // s, column t % s. Parameter names are those of the published state dicts.
"""

from __future__ import annotations

from math import isqrt
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from leveret.runs import RecipeError


def side_of(tokens: int, kind: str) -> int:
    """Side of the square grid that `tokens` tokens form. RecipeError naming the connector when they form none."""
    side = isqrt(tokens)
    if side * side != tokens or not side:
        raise RecipeError(
            f"model.connector.kind: {kind} needs a square grid of tokens, but the tower gives {tokens}; "
            "choose mlp2x_gelu"
        )
    return side


def divided(tokens: int, size: int, what: str, kind: str) -> int:
    """`tokens / size`. RecipeError naming the connector when it leaves a rest."""
    if tokens % size or not tokens:
        raise RecipeError(
            f"model.connector.kind: {kind} needs {what} that {size} divides, but the tower's is {tokens}; "
            "choose mlp2x_gelu"
        )
    return tokens // size


class Residual2d(nn.Module):
    """A linear layer, an MLP beside it, and where on the image's grid each token stood.

    LayerNorm, then the sum of Linear to D and of an MLP (to 2 D, GELU, to D) that starts at nothing, then one learned
    vector per row and one per column of the token grid. The linear way carries what adds up (a colour and a shape that
    it never met together), the MLP mends what does not; an MLP alone learns the pairs it meets by heart. The language
    model's own positions run along the sequence and say nothing about rows and columns; on small models this is what
    makes places learnable. RecipeError when `tokens` form no square.
    """

    def __init__(self, in_width: int, out_width: int, tokens: int) -> None:
        side = side_of(tokens, "residual_2d")
        super().__init__()
        self.norm = nn.LayerNorm(in_width)
        self.straight = nn.Linear(in_width, out_width)
        self.up, self.down = nn.Linear(in_width, 2 * out_width), nn.Linear(2 * out_width, out_width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.side = side
        self.row, self.column = nn.Embedding(side, out_width), nn.Embedding(side, out_width)

    def forward(self, input: Tensor) -> Tensor:
        input = self.norm(input)
        output = self.straight(input) + self.down(F.gelu(self.up(input)))
        # token t stands in row t // side, column t % side
        grid = self.row.weight.repeat_interleave(self.side, dim=0) + self.column.weight.repeat(self.side, 1)
        return output + grid.to(output.dtype)


class Grouped(nn.Module):
    """`group` tokens in a row become one: their numbers side by side, then Linear to D. [N, n, W] -> [N, n / group, D].

    Bunny's `minigpt` (token after token) and `vanilla` (`interleave`: number after number, each of all tokens), from
    bunny/model/multimodal_projector/builder.py; minigpt is MiniGPT-v2's (arXiv 2310.09478).
    """

    def __init__(self, in_width: int, out_width: int, group: int, interleave: bool) -> None:
        super().__init__()
        self.group, self.interleave = group, interleave
        self.linear = nn.Linear(group * in_width, out_width)

    def forward(self, input: Tensor) -> Tensor:
        groups = input.unflatten(1, (-1, self.group))  # [N, n / group, group, W]
        return self.linear((groups.transpose(2, 3) if self.interleave else groups).flatten(2))


class PixelShuffle(nn.Module):
    """Every `factor` x `factor` neighbours become one token: [N, s*s, W] -> [N, (s / factor)^2, D].

    Their numbers stand side by side (row after row of the square), then Linear to D. nanoVLM's models/
    modality_projector.py and transformers' Idefics3Connector; both have no bias and start at normal(0, 0.02).
    """

    def __init__(self, in_width: int, out_width: int, factor: int, bias: bool) -> None:
        super().__init__()
        self.factor = factor
        self.proj = nn.Linear(factor * factor * in_width, out_width, bias=bias)
        nn.init.normal_(self.proj.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.proj.bias)

    def forward(self, input: Tensor) -> Tensor:
        images, tokens, width = input.shape
        small, factor = isqrt(tokens) // self.factor, self.factor
        squares = input.reshape(images, small, factor, small, factor, width).transpose(2, 3)
        return self.proj(squares.reshape(images, small * small, factor * factor * width))


class Spp(nn.Module):
    """Bunny's `spp` family: linear layers and an average over `pool` x `pool` neighbours; nothing between them bends.

    v1: Linear to D, pool, Linear.  v2: Linear to D, Linear, pool.  v3: Linear of W, pool, Linear to D, Linear.
    Without a version it returns its input, as Bunny does. [N, s*s, W] -> [N, (s // pool)^2, D]; a last row and column
    that fill no square are dropped. From bunny/model/multimodal_projector/builder.py.

    Every version's state dict holds all three layers. Those that do not run are buffers here: a checkpoint carries
    them, no optimizer sees them.
    """

    def __init__(self, in_width: int, out_width: int, pool: int, version: Literal["v1", "v2", "v3"] | None) -> None:
        super().__init__()
        self.pool, self.version = pool, version
        self.linear_0 = nn.Linear(in_width, in_width)
        self.linear_1 = nn.Linear(in_width, out_width)
        self.linear_2 = nn.Linear(out_width, out_width)
        idle = {"v1": 1, "v2": 1, "v3": 0, None: 3}[version]
        for layer in (self.linear_0, self.linear_1, self.linear_2)[:idle]:
            for name, parameter in list(layer.named_parameters()):
                delattr(layer, name)
                layer.register_buffer(name, parameter.detach())

    def forward(self, input: Tensor) -> Tensor:
        if self.version == "v1":
            return self.linear_2(self._pooled(self.linear_1(input)))
        if self.version == "v2":
            return self._pooled(self.linear_2(self.linear_1(input)))
        if self.version == "v3":
            return self.linear_2(self.linear_1(self._pooled(self.linear_0(input))))
        return input

    def _pooled(self, input: Tensor) -> Tensor:
        side = isqrt(input.shape[1])
        grid = input.transpose(1, 2).unflatten(2, (side, side))  # [N, W, s, s]
        return F.avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)


class Ldp(nn.Module):
    """MobileVLM's lightweight downsample projector: [N, s*s, W] -> [N, ceil(s / 2)^2, D].

    An MLP (W to D, GELU, D), then on the grid two blocks of MobileNetV3, the second with stride 2. arXiv 2312.16886,
    figure 3; the names are those of mobilevlm/model/vision_projector.py, which Bunny took over.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Identity(), nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
        blocks = nn.Sequential(nn.Identity(), MobileBlock(out_width, stride=1), MobileBlock(out_width, stride=2))
        self.model = nn.ModuleDict({"mlp": mlp, "mb_block": blocks})

    def forward(self, input: Tensor) -> Tensor:
        side = isqrt(input.shape[1])
        grid = self.model["mlp"](input).transpose(1, 2).unflatten(2, (side, side))  # [N, D, s, s]
        return self.model["mb_block"](grid).flatten(2).transpose(1, 2)


class MobileBlock(nn.Module):
    """MobileNetV3's block without expansion (arXiv 1905.02244; torchvision's InvertedResidual), with LayerNorm.

    Depthwise 3 x 3 convolution, norm, hard swish; squeeze and excitation; 1 x 1 convolution, norm. With stride 1 the
    input is added. [N, D, s, s] -> [N, D, ceil(s / stride), ceil(s / stride)].
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1
        depthwise = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, ChannelNorm(width), nn.Hardswish()),
            SqueezeExcite(width),
            nn.Sequential(Pointwise(width, width, bias=False), ChannelNorm(width)),
        )

    def forward(self, grid: Tensor) -> Tensor:
        return self.block(grid) + grid if self.residual else self.block(grid)


class Pointwise(nn.Conv2d):
    """1 x 1 convolution of [N, C, h, w], computed as the linear layer that it is.

    On a CPU torch's convolution rounds by where in memory its weights lie, and a loaded model would differ in its last
    bits from the one that was saved.
    """

    def __init__(self, in_width: int, out_width: int, bias: bool = True) -> None:
        super().__init__(in_width, out_width, 1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, D, h, w]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Channels [N, D, h, w] weighted by what the whole picture shows: mean, D to about D / 4, ReLU, D, hard sigmoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # MobileNet's rule: a multiple of 8, at least 8, and never more than a tenth below a quarter of the width
        quarter = width // 4
        squeezed = max(8, (quarter + 4) // 8 * 8)
        if squeezed < 0.9 * quarter:
            squeezed += 8
        self.fc1, self.fc2 = Pointwise(width, squeezed), Pointwise(squeezed, width)

    def forward(self, grid: Tensor) -> Tensor:
        scale = F.hardsigmoid(self.fc2(F.relu(self.fc1(grid.mean((2, 3), keepdim=True)))))
        return grid * scale
