"""Language models of every family at toy size: the published configuration with small numbers in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fakes import HIDDEN, LLAMA, VOCAB, loud, tiny_tokenizer, tiny_vision_folder
from leveret.model.build import join
from leveret.model.language import LanguageFacts, build_language, describe
from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, VisionRecipe
from leveret.model.towers import describe_all, load_tower
from leveret.model.vlm import VLM

FAMILIES = {
    "Phi-1.5": "microsoft/phi-1_5",
    "Phi-2": "microsoft/phi-2",
    "Phi-3": "microsoft/Phi-3-mini-4k-instruct",
    "Phi-4-mini": "microsoft/Phi-4-mini-instruct",
    "StableLM-2": "stabilityai/stablelm-2-zephyr-1_6b",
    "Qwen1.5": "Qwen/Qwen1.5-1.8B",
    "Qwen2": "Qwen/Qwen2-0.5B",
    "Qwen2.5": "Qwen/Qwen2.5-3B",
    "Qwen3": "Qwen/Qwen3-0.6B",
    "MiniCPM": "openbmb/MiniCPM-2B-history",
    "Llama-2": "meta-llama/Llama-2-7b-hf",
    "Vicuna": "lmsys/vicuna-7b-v1.5",
    "Llama-3": "meta-llama/Meta-Llama-3-8B-Instruct",
    "Llama-3.2": "meta-llama/Llama-3.2-1B",
    "Mistral": "mistralai/Mistral-7B-v0.1",
    "TinyLlama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "Gemma": "google/gemma-2b-it",
    "Gemma-2": "google/gemma-2-2b",
    "Gemma-3": "google/gemma-3-1b-it",
    "SmolLM2": "HuggingFaceTB/SmolLM2-135M",
    "SmolLM3": "HuggingFaceTB/SmolLM3-3B",
    "OLMo-2": "allenai/OLMo-2-0425-1B",
    "Granite": "ibm-granite/granite-3.3-2b-instruct",
    "the drawn world's": "world/language",
}
"""What people call a family -> a row of LANGUAGES."""

HEADS, HEAD, WINDOW = 4, 8, 6
"""Heads of attention and their width; and how far a sliding window reaches, less than the tests' prompts."""


def small(config: Mapping[str, Any]) -> dict[str, Any]:
    """A full configuration at toy size. Ratios, multipliers, caps, kinds of layers and positions stay what they are."""
    share = config.get("num_key_value_heads", HEADS) / config["num_attention_heads"]
    found: dict[str, Any] = {
        **config, **LLAMA, "num_attention_heads": HEADS, "num_key_value_heads": max(1, int(HEADS * share)),
    }  # fmt: skip
    if config.get("head_dim"):
        found["head_dim"] = HEAD
    if config.get("query_pre_attn_scalar"):
        found["query_pre_attn_scalar"] = HEAD
    if config.get("sliding_window"):
        found["sliding_window"] = WINDOW
    kinds = list(dict.fromkeys(config.get("layer_types") or []))
    if kinds:
        found["layer_types"] = (kinds * 2)[:2]
    if config.get("no_rope_layers"):
        found["no_rope_layers"] = [1, 0]
    ropes = config.get("rope_parameters") or {}
    found["rope_parameters"] = {
        name: _rope(rope) if isinstance(rope, Mapping) else rope for name, rope in _rope(ropes).items()
    }
    return found


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(rope)
    turned = int(HEAD * found.get("partial_rotary_factor", 1.0))
    if turned % 2:  # 0.4 of 80 is even, of 8 it is not
        found["partial_rotary_factor"], turned = 0.5, HEAD // 2
    for first, name in enumerate(("short_factor", "long_factor")):
        if name in found:  # the short ones are 1 everywhere: others, so that a test sees them
            found[name] = [1.0 + first + step for step in range(turned // 2)]
    if found.get("rope_type") == "llama3":
        found["original_max_position_embeddings"] = 16
    return found


def toy_facts(name: str) -> LanguageFacts:
    """A row of LANGUAGES at toy size, with the tiny tokenizer's vocabulary."""
    facts = describe(LanguageRecipe(name=name))
    return replace(facts, config=small(facts.config), vocab=VOCAB)


def toy_language(name: str, scale: float = 0.25) -> Any:
    """The language model of a row at toy size, with random weights; in evaluation mode."""
    torch.manual_seed(0)
    return loud(build_language(toy_facts(name)), scale).eval()


def toy_vlm(name: str) -> VLM:
    """The tiny SigLIP, an MLP, and the language model of a row at toy size."""
    recipe = ModelRecipe(
        vision=VisionRecipe(tower=str(tiny_vision_folder())),
        connector=ConnectorRecipe(kind="mlp2x_gelu"),
        language=LanguageRecipe(name=name),
        chat="tiny",
    )
    language = toy_language(name)
    assert language.get_input_embeddings().weight.shape == (VOCAB, HIDDEN)
    eyes = [load_tower(facts) for facts in describe_all(recipe.vision)]
    return join(recipe, eyes, language, tokenizer=tiny_tokenizer()).eval()
