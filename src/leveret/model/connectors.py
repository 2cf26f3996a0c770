"""Connectors: what carries a tower's tokens [N, n, W] into the language model's width [N, m, D].

A row is a function that builds the module and one that says how many tokens come out. Parameter names are LLaVA's and
Bunny's (`0.weight`, `2.weight`, ..), so that a published projector fits without renaming.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

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


class GridMLP(nn.Sequential):
    """An MLP that also tells the language model where on the image's grid each token stood.

    LayerNorm, Linear to 2 D, GELU, Linear to D, then one learned vector per row and one per column of the token grid
    are added. The language model's own positions run along the sequence and say nothing about rows and columns; on
    small models this is what makes places learnable.
    """

    def __init__(self, in_width: int, out_width: int, tokens: int) -> None:
        side = isqrt(tokens)
        if side * side != tokens:
            raise RecipeError(
                f"model.connector.kind: mlp2x_gelu_2d needs a square grid of tokens, but the tower gives {tokens}; "
                "choose mlp2x_gelu"
            )
        hidden = 2 * out_width
        super().__init__(nn.LayerNorm(in_width), nn.Linear(in_width, hidden), nn.GELU(), nn.Linear(hidden, out_width))
        self.side = side
        self.row = nn.Embedding(side, out_width)
        self.column = nn.Embedding(side, out_width)

    def forward(self, input: Tensor) -> Tensor:
        for layer in list(self)[:4]:
            input = layer(input)
        # token t stands in row t // side, column t % side
        grid = self.row.weight.repeat_interleave(self.side, dim=0) + self.column.weight.repeat(self.side, 1)
        return input + grid.to(input.dtype)


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
    "mlp2x_gelu_2d": ConnectorRow(GridMLP),
    "identity": ConnectorRow(_identity),
}


def build_connector(kind: str, in_width: int, out_width: int, tokens: int) -> nn.Module:
    """A fresh connector from `tokens` tokens of `in_width` to tokens of `out_width`. RecipeError on an unknown kind."""
    return find_row(CONNECTORS, kind, "model.connector.kind").build(in_width, out_width, tokens)
