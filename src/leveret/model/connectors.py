"""Connectors: what carries a tower's tokens [N, n, W] into the language model's width [N, m, D].

A row is a function that builds the module and one that says how many tokens come out. Parameter names are LLaVA's and
Bunny's (`0.weight`, `2.weight`, ..), so that a published projector fits without renaming.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch.nn.functional as F
from torch import Tensor, nn

from leveret.model.tables import find_row
from leveret.runs import RecipeError


@dataclass(frozen=True, slots=True)
class ConnectorRow:
    """One kind of connector.

    build   (in_width, out_width, in_tokens) -> module.
    tokens  in_tokens -> tokens that come out.
    """

    build: Callable[[int, int, int], nn.Module]
    tokens: Callable[[int], int] = lambda count: count


class Residual2d(nn.Module):
    """A linear layer, an MLP beside it, and where on the image's grid each token stood.

    LayerNorm, then the sum of Linear to D and of an MLP (to 2 D, GELU, to D) that starts at nothing, then one learned
    vector per row and one per column of the token grid. The linear way carries what adds up (a colour and a shape that
    it never met together), the MLP mends what does not; an MLP alone learns the pairs it meets by heart. The language
    model's own positions run along the sequence and say nothing about rows and columns; on small models this is what
    makes places learnable.
    """

    def __init__(self, in_width: int, out_width: int, tokens: int) -> None:
        side = isqrt(tokens)
        if side * side != tokens:
            raise RecipeError(
                f"model.connector.kind: residual_2d needs a square grid of tokens, but the tower gives {tokens}; "
                "choose mlp2x_gelu"
            )
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


def _mlp(depth: int) -> Callable[[int, int, int], nn.Module]:
    """LLaVA's mlpNx_gelu: `depth` linear layers with exact GELU between them."""

    def build(in_width: int, out_width: int, tokens: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_width, out_width)]
        return nn.Sequential(*layers)

    return build


def _linear(in_width: int, out_width: int, tokens: int) -> nn.Module:
    return nn.Linear(in_width, out_width)


def _identity(in_width: int, out_width: int, tokens: int) -> nn.Module:
    if in_width != out_width:
        raise RecipeError(
            f"model.connector.kind: identity needs equal widths, but the tower's is {in_width} and the language "
            f"model's {out_width}; choose linear or mlp2x_gelu"
        )
    return nn.Identity()


CONNECTORS: dict[str, ConnectorRow] = {
    "linear": ConnectorRow(_linear),
    "mlp2x_gelu": ConnectorRow(_mlp(2)),
    "mlp3x_gelu": ConnectorRow(_mlp(3)),
    "residual_2d": ConnectorRow(Residual2d),
    "identity": ConnectorRow(_identity),
}


def build_connector(kind: str, in_width: int, out_width: int, tokens: int) -> nn.Module:
    """A fresh connector from `tokens` tokens of `in_width` to tokens of `out_width`. RecipeError on an unknown kind."""
    return find_row(CONNECTORS, kind, "model.connector.kind").build(in_width, out_width, tokens)
