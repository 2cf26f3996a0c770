"""Connectors of published checkpoints: their config becomes our recipe, their weights our state dict, and back.

Names inside a projector are ours already, with one exception (the Q-Former's attention). What differs is how a
connector is named, where its sizes are written, and what stands before its names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leveret.model.recipe import ConnectorRecipe
from leveret.runs import DataError

_BEFORE = re.compile(
    r"(?:base_model\.model\.)?model\.mm_projector\."  # Bunny, LLaVA, TinyLLaVA's own repository before the Factory
    r"|(?:connector\.)?_connector\."  # TinyLLaVA Factory: in a whole checkpoint, and in its connector/ folder
    r"|projector\."  # Prismatic, within its "projector" dictionary
)
# The Factory's BERT calls `self` what transformers calls `attention`, in self- and cross-attention alike.
_SELF, _ATTENTION = "attention.self.", "attention.attention."
_POSITIONS = "bert.embeddings.position_ids"

# Our settings and the fields of their configs. What a config does not say has the same default there and here.
_RESAMPLER = {"queries": "num_queries", "layers": "num_resampler_layers"}
_BERT = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "norm_eps": "layer_norm_eps",
}


def of_llava(config: Mapping[str, Any]) -> ConnectorRecipe:
    """The connector of a Bunny, LLaVA or early TinyLLaVA config.json (`mm_projector_type`).

    Bunny takes any name that begins with "spp" and asks whether it holds v1, v2 or v3. DataError on a name that no
    row stands for.
    """
    kind = str(config.get("mm_projector_type"))
    if kind.startswith("spp"):
        version = next((v for v in ("v1", "v2", "v3") if v in kind), None)
        return ConnectorRecipe(kind=f"spp_{version}" if version else "spp")
    if kind == "resampler":
        width = config.get("resampler_hidden_size", 768)
        sizes = {"width": width, "heads": 8 if width == 512 else 12}  # the original's rule
        return ConnectorRecipe(kind="resampler_paper", options={**sizes, **_given(config, _RESAMPLER)})
    return _known(kind, ("linear", "ldp", "minigpt", "vanilla", "identity"), "mm_projector_type")


def of_factory(config: Mapping[str, Any], bert: Mapping[str, Any] | None = None) -> ConnectorRecipe:
    """The connector of a TinyLLaVA Factory config.json (`connector_type`).

    bert  config.json of google-bert/bert-base-uncased, from which the Factory takes the Q-Former's sizes; they are
          not in its own config. Default: those that model has had since it was published.
    """
    kind = str(config.get("connector_type"))
    if kind == "resampler":
        # its width is the language model's; `resampler_hidden_size` is written down and never read
        return ConnectorRecipe(kind=kind, options=_given(config, _RESAMPLER))
    if kind == "qformer":
        queries = _given(config, {"queries": _RESAMPLER["queries"]})
        return ConnectorRecipe(kind=kind, options={**queries, **_given(bert or {}, _BERT)})
    return _known(kind, ("linear", "mof_mlp", "identity"), "connector_type")


def of_prismatic(arch_specifier: str) -> ConnectorRecipe:
    """The connector of a Prismatic `arch_specifier`: its last word, behind "no-align+" or another stage's name."""
    kind = arch_specifier.rpartition("+")[2]
    if kind == "gelu-mlp":
        return ConnectorRecipe(kind="mlp2x_gelu")
    return _known(kind, ("linear", "fused-gelu-mlp"), "arch_specifier")


def _given(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: config[theirs] for ours, theirs in names.items() if theirs in config}


def _known(kind: str, kinds: tuple[str, ...], where: str) -> ConnectorRecipe:
    if kind not in kinds and not re.fullmatch(r"mlp[1-9]\d*x_gelu", kind):
        raise DataError(f"{where}: {kind!r} is not known. Allowed: {', '.join(kinds)}, mlpNx_gelu")
    return ConnectorRecipe(kind=kind)


def read_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a published checkpoint's `weights` is the connector's, by our names. Other names are passed over."""
    state = {}
    for name, tensor in weights.items():
        if (found := _BEFORE.match(name)) and (own := name[found.end() :]) != _POSITIONS:
            state[own.replace(_SELF, _ATTENTION)] = tensor
    return state


def times(kind: str, state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """A connector's `state` with all that it gives multiplied by `factor`: in its last weight and bias, in their type.

    Gemma multiplies its token table by the root of its width. transformers did so with all that came in, images too,
    until tokens were scaled at the table (GemmaTextScaledWordEmbedding); what was taught in those days is read so.
    DataError for a connector that does not end in a weight and a bias.
    """
    ends = {"linear": "", "qformer": "projector.", "resampler": "norm."}
    if found := re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind):
        ends[kind] = f"{2 * (int(found[1]) - 1)}."
    if kind not in ends:
        raise DataError(f"{kind} before a Gemma, whose images were scaled: known are {', '.join(ends)} and mlpNx_gelu")
    last = {f"{ends[kind]}{name}" for name in ("weight", "bias")}
    return {name: (x.float() * factor).to(x.dtype) if name in last else x for name, x in state.items()}


def write_state(kind: str, state: Mapping[str, Tensor], before: str, positions: int = 512) -> dict[str, Tensor]:
    """The reverse: our connector's `state` by the published names, each behind `before`.

    positions  of the table of positions that the Factory's Q-Former stores and never reads; BERT has 512.
    """
    renamed = {before + name.replace(_ATTENTION, _SELF): tensor for name, tensor in state.items()}
    if kind == "qformer":
        renamed[before + _POSITIONS] = torch.arange(positions)[None]
    return renamed
