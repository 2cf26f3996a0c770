"""Connectors: what carries a tower's tokens [N, n, W] into the language model's width [N, m, D].

One table. A row says how its module is built, how many tokens come out, and which settings of its own a recipe may
give in `model.connector.options`. Parameter names are those of published projectors, so that their state dicts fit
(model/published.py knows the rest). Formulas: grids.py, resampler.py, qformer.py, and here what is only linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from leveret import own
from leveret.model.grids import Grouped, Ldp, PixelShuffle, Residual2d, Spp, divided, side_of
from leveret.model.qformer import QFormer
from leveret.model.recipe import ConnectorRecipe
from leveret.model.resampler import PaperResampler, PerceiverResampler
from leveret.model.tables import unknown
from leveret.model.trial import build_own
from leveret.runs import RecipeError, closest

# --- settings of rows -------------------------------------------------------------------------------------------------


class Settings(BaseModel):
    """Settings of a row; this one has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolSettings(Settings):
    pool: int = Field(default=2, ge=1, description="Side of the square of tokens that becomes one.")


class GroupSettings(Settings):
    group: int = Field(default=4, ge=1, description="Tokens in a row that become one.")


class ShuffleSettings(Settings):
    factor: int = Field(default=2, ge=1, description="Side of the square of tokens that becomes one.")
    bias: bool = Field(default=False, description="Whether the linear layer has a bias.")


class MofSettings(Settings):
    first: int | None = Field(
        default=None, ge=1, description="Width of the first tower's features. Default: half of what the towers give."
    )


class ResamplerSettings(Settings):
    queries: int = Field(default=128, ge=1, description="Tokens that come out.")
    layers: int = Field(default=3, ge=1, description="Blocks.")
    heads: int = Field(default=8, ge=1, description="Heads of attention.")
    head_width: int = Field(default=64, ge=1, description="Width of one head.")
    times: int = Field(default=4, ge=1, description="Feed-forward width, in widths.")


class _Headed(Settings):
    width: int = Field(default=768, ge=1, description="Width of the queries.")
    heads: int = Field(default=12, ge=1, description="Heads of attention; they divide the width.")

    @model_validator(mode="after")
    def _divides(self) -> _Headed:
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, but {self.heads} does not divide {self.width}")
        return self


class PaperResamplerSettings(_Headed):
    queries: int = Field(default=128, ge=1, description="Tokens that come out.")
    layers: int = Field(default=3, ge=1, description="Blocks.")
    times: int = Field(default=4, ge=1, description="Feed-forward width, in widths.")


class QFormerSettings(_Headed):
    """Defaults: bert-base-uncased, as the Factory reads it."""

    queries: int = Field(default=128, ge=1, description="Tokens that come out.")
    layers: int = Field(default=12, ge=1, description="Blocks.")
    hidden: int = Field(default=3072, ge=1, description="Feed-forward width.")
    cross_every: int = Field(default=2, ge=1, description="Every how many blocks one looks at the picture.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Of attention and of every layer's output.")
    norm_eps: float = Field(default=1e-12, gt=0, description="Epsilon of the norms.")


# --- linear layers ----------------------------------------------------------------------------------------------------


class MofMlp(nn.Module):
    """Interleaved features of two towers: a two-layer MLP for each, then their tokens in turn. [N, n, W1 + W2] ->
    [N, 2 n, D].

    "Mixture of features", arXiv 2401.06209; TinyLLaVA Factory's tinyllava/model/connector/mof_mlp.py, whose names the
    towers bear here whatever they are.
    """

    def __init__(self, in_width: int, out_width: int, first: int) -> None:
        super().__init__()
        self.widths = (first, in_width - first)
        self.clip, self.dinov2 = (mlp(width, out_width, depth=2) for width in self.widths)

    def forward(self, input: Tensor) -> Tensor:
        first, second = input.split(self.widths, dim=-1)
        return torch.stack((self.clip(first), self.dinov2(second)), dim=2).flatten(1, 2)


def mlp(in_width: int, out_width: int, *, depth: int) -> nn.Module:
    """LLaVA's mlpNx_gelu: `depth` linear layers with exact GELU between them."""
    layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out_width, out_width)]
    return nn.Sequential(*layers)


def _fused_mlp(in_width: int, out_width: int) -> nn.Module:
    """Prismatic's fused-gelu-mlp (prismatic/util/nn_utils.py): W to 4 W to D to D, exact GELU between them."""
    wide = 4 * in_width
    return nn.Sequential(
        nn.Linear(in_width, wide), nn.GELU(), nn.Linear(wide, out_width), nn.GELU(), nn.Linear(out_width, out_width)
    )


def _mof(in_width: int, out_width: int, settings: MofSettings) -> nn.Module:
    if settings.first is None and in_width % 2:
        raise RecipeError(f"model.connector.options.first: set the first tower's width, for {in_width} has no half")
    first = settings.first or in_width // 2
    if first >= in_width:
        raise RecipeError(f"model.connector.options.first: {first} leaves nothing of {in_width} for the second tower")
    return MofMlp(in_width, out_width, first)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConnectorRow:
    """One kind of connector.

    build     (in_width, out_width, in_tokens, settings) -> module.
    tokens    (in_tokens, settings) -> tokens that come out. RecipeError where the kind cannot take so many.
    settings  what `model.connector.options` may say.
    plain     the module leaves the width as it is, so that the tower's must be the language model's.
    each      every token becomes one by itself: any number of them will do, in any grid (images at their own shape).
    """

    build: Callable[[int, int, int, Any], nn.Module]
    tokens: Callable[[int, Any], int] = lambda count, _: count
    settings: type[Settings] = Settings
    plain: bool = False
    each: bool = False


def _mlp_row(depth: int) -> ConnectorRow:
    return ConnectorRow(lambda w, d, n, s: mlp(w, d, depth=depth), each=True)


def _spp_row(version: Literal["v1", "v2", "v3"]) -> ConnectorRow:
    def tokens(count: int, settings: PoolSettings) -> int:
        if not (side := side_of(count, f"spp_{version}") // settings.pool):
            raise RecipeError(
                f"model.connector.options.pool: {settings.pool} is more than the side of the grid of {count} tokens"
            )
        return side * side

    return ConnectorRow(lambda w, d, n, s: Spp(w, d, s.pool, version), tokens, PoolSettings)


def _grouped_row(kind: str, interleave: bool) -> ConnectorRow:
    return ConnectorRow(
        lambda w, d, n, s: Grouped(w, d, s.group, interleave),
        lambda count, s: divided(count, s.group, "a number of tokens", kind),
        GroupSettings,
    )


CONNECTORS: dict[str, ConnectorRow] = {
    "linear": ConnectorRow(lambda w, d, n, s: nn.Linear(w, d), each=True),
    "mlp2x_gelu": _mlp_row(2),
    "mlp3x_gelu": _mlp_row(3),
    "fused-gelu-mlp": ConnectorRow(lambda w, d, n, s: _fused_mlp(w, d), each=True),
    "residual_2d": ConnectorRow(
        lambda w, d, n, s: Residual2d(w, d, n), lambda count, s: side_of(count, "residual_2d") ** 2
    ),
    "mof_mlp": ConnectorRow(lambda w, d, n, s: _mof(w, d, s), lambda count, s: 2 * count, MofSettings),
    "resampler": ConnectorRow(
        lambda w, d, n, s: PerceiverResampler(w, d, **dict(s)), lambda count, s: s.queries, ResamplerSettings
    ),
    "resampler_paper": ConnectorRow(
        lambda w, d, n, s: PaperResampler(w, d, **dict(s)), lambda count, s: s.queries, PaperResamplerSettings
    ),
    "qformer": ConnectorRow(lambda w, d, n, s: QFormer(w, d, **dict(s)), lambda count, s: s.queries, QFormerSettings),
    "ldp": ConnectorRow(lambda w, d, n, s: Ldp(w, d), lambda count, s: ((side_of(count, "ldp") + 1) // 2) ** 2),
    "spp_v1": _spp_row("v1"),
    "spp_v2": _spp_row("v2"),
    "spp_v3": _spp_row("v3"),
    "spp": ConnectorRow(lambda w, d, n, s: Spp(w, d, 1, None), plain=True, each=True),
    "minigpt": _grouped_row("minigpt", interleave=False),
    "vanilla": _grouped_row("vanilla", interleave=True),
    "pixel_shuffle": ConnectorRow(
        lambda w, d, n, s: PixelShuffle(w, d, s.factor, s.bias),
        lambda count, s: divided(side_of(count, "pixel_shuffle"), s.factor, "a grid with a side", "pixel_shuffle") ** 2,
        ShuffleSettings,
    ),
    "identity": ConnectorRow(lambda w, d, n, s: nn.Identity(), plain=True, each=True),
}


def find_connector(kind: str) -> ConnectorRow:
    """The row called `kind`, or in a user's own file (own.py); mlpNx_gelu is one for every N from 1. RecipeError with
    the closest ids."""
    if own.is_own(kind):
        return own.row(kind, ConnectorRow, "model.connector.kind")
    if found := re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind):
        return _mlp_row(int(found[1]))
    if kind not in CONNECTORS:
        raise RecipeError(unknown(CONNECTORS, kind, "model.connector.kind", ", mlpNx_gelu with any N, or my.py:NAME"))
    return CONNECTORS[kind]


def read_settings(kind: str, options: Mapping[str, Any]) -> Settings:
    """`options` as the row's settings. RecipeError listing every fault, each with what is allowed."""
    row = find_connector(kind)
    if not (isinstance(row.settings, type) and issubclass(row.settings, Settings)):
        raise RecipeError(f"model.connector.kind: {kind}: its `settings` must be a class made from Settings")
    try:
        return row.settings.model_validate(dict(options))
    except ValidationError as errors:
        known = row.settings.model_fields
        allowed = ", ".join(f"{name} (default {field.default})" for name, field in known.items()) or "none"
        faults = []
        for fault in errors.errors():
            name = ".".join(str(step) for step in fault["loc"])
            near = closest(name, known) if fault["type"] == "extra_forbidden" else []
            said = f"not a setting of {kind}" if fault["type"] == "extra_forbidden" else fault["msg"]
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            where = f"model.connector.options{'.' if name else ''}{name}"
            faults.append(f"{where}: {said}. Settings of {kind}: {allowed}{hint}")
        raise RecipeError("\n".join(faults)) from None


def settle(recipe: ConnectorRecipe) -> ConnectorRecipe:
    """The same recipe with every setting of its row written out. RecipeError as in `read_settings`."""
    return recipe.model_copy(update={"options": read_settings(recipe.kind, recipe.options).model_dump()})


def connector_tokens(kind: str, tokens: int, options: Mapping[str, Any] = {}) -> int:
    """How many tokens come out where `tokens` go in. RecipeError where the connector cannot take so many."""
    with own.guard(kind, "model.connector.kind"):
        found = find_connector(kind).tokens(tokens, read_settings(kind, options))
    if not isinstance(found, int) or found < 1:
        raise RecipeError(f"model.connector.kind: {kind} makes {found!r} tokens of {tokens}; it must be 1 or more")
    return found


def build_connector(
    kind: str,
    in_width: int,
    out_width: int,
    tokens: int,
    options: Mapping[str, Any] = {},
) -> nn.Module:
    """A fresh connector from `tokens` tokens of `in_width` to tokens of `out_width`.

    RecipeError on an unknown kind or setting, and where the kind cannot take such tokens or widths.
    """
    row, settings = find_connector(kind), read_settings(kind, options)
    out = connector_tokens(kind, tokens, options)
    if row.plain and in_width != out_width:
        raise RecipeError(
            f"model.connector.kind: {kind} needs equal widths, but the tower's is {in_width} and the language "
            f"model's {out_width}; choose linear or mlp2x_gelu"
        )
    if not own.is_own(kind):
        return row.build(in_width, out_width, tokens, settings)
    given, due = [2, tokens, in_width], [2, out, out_width]
    return build_own(kind, "model.connector.kind", lambda: row.build(in_width, out_width, tokens, settings), given, due)
