"""Language models as peers save them, in the words of transformers' own classes.

Bunny and LLaVA put the language model's settings beside their own in one config.json, under a model type of their own;
MiniCPM-2B is Granite with other names. No remote code is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from leveret.model.language import REFUSED as LANGUAGES_REFUSED
from leveret.runs import DataError

Config = dict[str, Any]


def _same(config: Mapping[str, Any]) -> Config:
    return dict(config)


def _stablelm(config: Mapping[str, Any]) -> Config:
    """StableLMEpoch's names (stabilityai/stablelm-2-1_6b, configuration_stablelm_epoch.py) as StableLmConfig's."""
    found = dict(config)
    for old, new in (("norm_eps", "layer_norm_eps"), ("rope_pct", "partial_rotary_factor")):
        if old in found:
            found[new] = found.pop(old)
    return found


def _minicpm(config: Mapping[str, Any]) -> Config:
    """MiniCPM's three scales (openbmb/MiniCPM-2B, modeling_minicpm.py) as Granite's four multipliers."""
    found = dict(config)
    scale_emb, scale_depth, base = (found.pop(name) for name in ("scale_emb", "scale_depth", "dim_model_base"))
    head = found["hidden_size"] // found["num_attention_heads"]
    return found | {
        "embedding_multiplier": float(scale_emb),
        "residual_multiplier": scale_depth / math.sqrt(found["num_hidden_layers"]),
        "logits_scaling": found["hidden_size"] / base,
        "attention_multiplier": 1 / math.sqrt(head),
        "tie_word_embeddings": found.get("tie_word_embeddings", True),
    }


FAMILIES: dict[str, tuple[str, Callable[[Mapping[str, Any]], Config]]] = {
    "bunny-phi": ("phi", _same),
    "bunny-phi3": ("phi3", _same),
    "bunny-stablelm": ("stablelm", _stablelm),
    "bunny-qwen2": ("qwen2", _same),
    "bunny-llama": ("llama", _same),
    "bunny-minicpm": ("granite", _minicpm),
    "minicpm": ("granite", _minicpm),
    "stablelm_epoch": ("stablelm", _stablelm),
    "llava": ("llama", _same),
    "llava_llama": ("llama", _same),
    "llava_mistral": ("mistral", _same),
    "llava_qwen": ("qwen2", _same),
    "tiny_llava_phi": ("phi", _same),
    "tiny_llava_stablelm": ("stablelm", _stablelm),
    "tiny_llava_llama": ("llama", _same),
}
"""Model types of peers: transformers' own, and how the settings are said there."""

REFUSED = {
    **LANGUAGES_REFUSED,
    "llava_mpt": "there is no table yet for the names of MosaicML's own class",
}
"""Model types that are met but cannot be had, and why."""


def language_config(config: Mapping[str, Any], where: str) -> Config:
    """The settings of the language model in a peer's config, for `AutoConfig.for_model`; nothing of the peer's own.

    DataError where no class of transformers can be it.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as KNOWN

    said = str(config.get("model_type", ""))
    if said in REFUSED:
        raise DataError(f"{where}: the language model is a {said!r}, which is not supported: {REFUSED[said]}")
    name, told = FAMILIES.get(said, (said, _same))
    if name not in KNOWN:
        more = "; it asks for code from its repository, and none is run" if config.get("auto_map") else ""
        raise DataError(
            f"{where}: model_type {said!r} is no language model that is known here{more}. Known besides those of "
            f"transformers: {', '.join(FAMILIES)}"
        )
    rope = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # said at the top before transformers 5
    known = {*AutoConfig.for_model(name).to_dict(), *rope} - {"_name_or_path", "architectures", "transformers_version"}
    try:
        own = told(config)
    except KeyError as fault:
        raise DataError(f"{where}: a {said!r} config that does not say {fault}, on which its numbers depend") from None
    found = {key: value for key, value in own.items() if key in known}
    if found.get("rope_scaling", 0) is None:
        del found["rope_scaling"]
    return found | {"model_type": name}
