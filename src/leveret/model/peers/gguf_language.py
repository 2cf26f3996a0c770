"""Language models as llama.cpp's architectures have them: which there are, what is said of one, its tensors.

Sources: llama.cpp's `conversion/*.py` (keys, the order of rotary dimensions) and `src/models/*.cpp` (which tensors must
be there, what the graph computes). Names of tensors come from the gguf package's own maps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leveret.runs import RecipeError

State = dict[str, Tensor]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp.

    arch     its name there.
    acts     transformers' names of the activation that its graph has.
    turned   rotary dimensions go in pairs (0, 1), (2, 3), ..; transformers' go (0, n / 2), (1, n / 2 + 1), .. .
    plus     RMS norms multiply by 1 + weight in transformers, by weight there.
    scaled   the graph multiplies all embeddings by the root of their width, those of images too; transformers'
             embedding table does it to words alone.
    head     an output layer of its own must be there, with a bias where it says "bias"; "" where a tied one is known.
    norm     the norm's epsilon: "rms" or "layer".
    """

    arch: str
    acts: tuple[str, ...] = ("silu",)
    turned: bool = False
    plus: bool = False
    scaled: bool = False
    head: str = ""
    norm: str = "rms"


_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", turned=True),
    "mistral": Family("llama", turned=True),
    "granite": Family("granite", turned=True),
    "smollm3": Family("smollm3", turned=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi": Family("phi2", acts=_TANH, head="bias", norm="layer"),
    "phi3": Family("phi3"),
    "gemma": Family("gemma", acts=_TANH, plus=True, scaled=True),
    "gemma2": Family("gemma2", acts=_TANH, plus=True, scaled=True),
    "stablelm": Family("stablelm", head="plain", norm="layer"),
}
"""transformers' model types -> llama.cpp's architectures."""


@dataclass(frozen=True)
class Language:
    """A language model ready to be written.

    keys     what is said of it: name of a method of gguf's writer (without `add_`) -> value.
    tensors  by llama.cpp's names.
    image    what the images' tokens are multiplied with beforehand, because the graph multiplies them too.
    notes    where llama.cpp would compute otherwise, for the user.
    """

    arch: str
    keys: dict[str, Any]
    tensors: State
    image: float
    notes: list[str]


def language(config: Config, state: State, name: str) -> Language:
    """A causal language model of transformers, by its configuration and tensors, as llama.cpp has it.

    RecipeError names what of `name` llama.cpp has no graph for.
    """
    kind = str(config["model_type"])
    if kind not in FAMILIES:
        raise RecipeError(
            f"llama.cpp: no architecture is known here for the language model {name} ({kind}); known are "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    for fault in _faults(config, state, family):
        raise RecipeError(f"llama.cpp's {family.arch} {fault}: the language model {name} does not fit")
    keys, notes = _keys(config, state, family)
    width = int(config["hidden_size"])
    return Language(
        family.arch, keys, _tensors(config, state, family), 1 / math.sqrt(width) if family.scaled else 1.0, notes
    )


def _faults(config: Config, state: State, family: Family) -> Iterator[str]:
    """What llama.cpp's graph has not, and this model has."""
    rope = dict(config.get("rope_parameters") or {})
    if (act := config.get("hidden_act") or config.get("hidden_activation")) not in family.acts:
        yield f"has no activation {act}"
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        yield f"is not written here with rotary positions of the kind {rope['rope_type']}"
    if rope.get("rope_type") == "llama3" and not family.turned:
        yield "has no rotary positions of the kind llama3"
    if config.get("qk_layernorm"):
        yield "has no norms of queries and keys"
    if config.get("num_local_experts") or config.get("num_experts"):
        yield "is not written here with experts"
    if "lm_head.bias" in state and family.head != "bias":
        yield "has no bias in the output layer"
    if family.plus and "lm_head.weight" in state:
        yield "has no output layer of its own"
    heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
    if family.arch in ("qwen2", "phi2", "phi3", "stablelm") and _head(config) * heads != width:
        yield "has no heads that are together wider or narrower than the model"
    if family.arch == "gemma2" and config["query_pre_attn_scalar"] != _head(config):
        yield "scales attention by the width of a head and by nothing else"
    if family.arch == "gemma2" and None in (config["attn_logit_softcapping"], config["final_logit_softcapping"]):
        yield "always caps its logits"
    if family.arch == "gemma2" and not _alternates(config):
        yield "has a sliding window in every second layer, from the first on"
    if family.arch == "smollm3" and not all(
        bool(use) == bool((layer + 1) % 4) for layer, use in enumerate(config["no_rope_layers"])
    ):
        yield "leaves rotary positions out of every fourth layer and of no other"
    if family.arch == "stablelm" and bool(config.get("use_parallel_residual")):
        yield "is not written here with parallel residuals"


def _alternates(config: Config) -> bool:
    kinds = config["layer_types"]
    return all((kind == "sliding_attention") == (layer % 2 == 0) for layer, kind in enumerate(kinds))


def _head(config: Config) -> int:
    """Width of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _keys(config: Config, state: State, family: Family) -> tuple[dict[str, Any], list[str]]:
    rope = dict(config.get("rope_parameters") or {})
    head = _head(config)
    length, notes = int(config["max_position_embeddings"]), []
    window = config.get("sliding_window")
    if "layer_types" in config and "sliding_attention" not in (config["layer_types"] or ["sliding_attention"]):
        window = None
    if window and family.arch != "gemma2" and window < length:
        notes.append(
            f"attention reaches back {window} tokens in this model and without end in llama.cpp's {family.arch}: the "
            f"file says a context of {window} tokens, within which both are the same"
        )
        length = int(window)
    keys: dict[str, Any] = {
        "context_length": length,
        "embedding_length": int(config["hidden_size"]),
        "block_count": int(config["num_hidden_layers"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "head_count": int(config["num_attention_heads"]),
        "head_count_kv": int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        "key_length": head,
        "value_length": head,
        "rope_dimension_count": int(head * float(rope.get("partial_rotary_factor", 1.0))),
        "rope_freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": len(state["model.embed_tokens.weight"]),
    }
    if family.norm == "rms":
        keys["layer_norm_rms_eps"] = float(config["rms_norm_eps"])
    else:
        keys["layer_norm_eps"] = float(config["layer_norm_eps"])
    if rope.get("rope_type") == "linear":
        keys |= {"rope_scaling_type": "linear", "rope_scaling_factor": float(rope["factor"])}
    if family.arch == "phi3":
        keys["rope_scaling_orig_ctx_len"] = int(
            rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
        keys["sliding_window"] = 0  # the graph asks for the key; it knows no window
    if family.arch == "stablelm":
        keys["parallel_residual"] = False
    if family.arch == "gemma2":
        keys |= {
            "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
            "final_logit_softcapping": float(config["final_logit_softcapping"]),
            "sliding_window": int(config["sliding_window"]),
        }
    if family.arch == "granite":
        keys |= {
            "attention_scale": float(config["attention_multiplier"]),
            "embedding_scale": float(config["embedding_multiplier"]),
            "residual_scale": float(config["residual_multiplier"]),
            "logit_scale": float(config["logits_scaling"]),
        }
    return keys, notes


def _tensors(config: Config, state: State, family: Family) -> State:
    import gguf

    archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(archs[family.arch], int(config["num_hidden_layers"]))
    heads = {"q_proj": int(config["num_attention_heads"])}
    heads["k_proj"] = int(config.get("num_key_value_heads") or heads["q_proj"])
    tensors: State = {}
    for name, tensor in state.items():
        told = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if told is None:
            raise RecipeError(f"llama.cpp's {family.arch} has no tensor for {name}")
        part = name.split(".")[-2]
        if family.turned and part in heads:
            tensor = interleaved(tensor, heads[part])
        if family.plus and name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        tensors[told] = tensor
    table = tensors["token_embd.weight"]
    if family.head:
        tensors.setdefault("output.weight", table)
    if family.head == "bias":
        tensors.setdefault("output.bias", table.new_zeros(len(table), dtype=torch.float32))
    rope = dict(config.get("rope_parameters") or {})
    if rope.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(rope, _head(config))
    return tensors


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows [heads * n, ..] of a query or key layer, each head's two halves interleaved: 0, n / 2, 1, n / 2 + 1, .. ."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def llama3_factors(rope: Mapping[str, Any], head: int) -> Tensor:
    """By what Llama 3.1 divides each rotary frequency: float32 [head / 2] (transformers' `_compute_llama3_parameters`:
    1 for short waves, `factor` for long ones, between them a blend of both)."""
    factor, old = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    blend = ((old / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - blend) / factor + blend)).float()
