"""HF LLaVA's folder by the names and settings that vLLM's own LLaVA classes read (vllm/model_executor/models/llava.py,
clip.py, siglip.py and those of the language models). vLLM is not installed here and was not run: this is its list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fakes import SIGLIP
from leveret.model.peers.write import write
from leveret.model.recipe import TilesRecipe
from test_model_gguf import DEEP, model_of

BLOCK = [f"{part}.{what}" for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.q_proj",
         "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj") for what in ("weight", "bias")]  # fmt: skip
EYES = {
    "clip": [
        "embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
        "pre_layrnorm.weight", "pre_layrnorm.bias", "post_layernorm.weight", "post_layernorm.bias",
    ],
    "siglip": [
        "embeddings.patch_embedding.weight", "embeddings.patch_embedding.bias", "embeddings.position_embedding.weight",
        "post_layernorm.weight", "post_layernorm.bias",
    ],
}  # fmt: skip
PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm"]
PLAIN = [f"{part}.weight" for part in PROJECTIONS + GATED + NORMS]
LAYERS: dict[str, tuple[str, list[str]]] = {
    "llama": ("LlamaForCausalLM", PLAIN),
    "llama with biases": (
        "LlamaForCausalLM", PLAIN + [f"{part}.bias" for part in PROJECTIONS + GATED],
    ),
    "mistral": ("MistralForCausalLM", PLAIN),
    "smollm3": ("SmolLM3ForCausalLM", PLAIN),
    "qwen2": ("Qwen2ForCausalLM", PLAIN + [f"{part}.bias" for part in PROJECTIONS[:3]]),
    "qwen3": ("Qwen3ForCausalLM", [*PLAIN, "self_attn.q_norm.weight", "self_attn.k_norm.weight"]),
    "phi3": (
        "Phi3ForCausalLM",
        [f"{part}.weight" for part in
         ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", *NORMS)],
    ),
    "gemma": ("GemmaForCausalLM", PLAIN),
    "stablelm": (
        "StableLmForCausalLM", PLAIN + [f"{part}.bias" for part in PROJECTIONS[:3] + NORMS],
    ),
}  # fmt: skip
"""A row of test_model_gguf.MODELS -> the class that vLLM builds, and the names of a layer there."""
TIED = ("llama", "gemma", "smollm3")
BLOCKS = SIGLIP["num_hidden_layers"] - 1
"""Those that run: the toy tower's layer before the last is taken, and what stands behind it is not written."""


def names_of(tower: str, language: str) -> set[str]:
    before, inside = "vision_tower.vision_model.", "language_model.model."
    found = {f"{before}{name}" for name in EYES[tower]}
    found |= {f"{before}encoder.layers.{n}.{name}" for n in range(BLOCKS) for name in BLOCK}
    found |= {f"multi_modal_projector.linear_{n}.{what}" for n in (1, 2) for what in ("weight", "bias")}
    found |= {f"{inside}layers.{n}.{name}" for n in range(DEEP["num_hidden_layers"]) for name in LAYERS[language][1]}
    found |= {f"{inside}embed_tokens.weight", f"{inside}norm.weight"}
    found |= {f"{inside}norm.bias"} if language == "stablelm" else set()
    return found | (set() if language in TIED else {"language_model.lm_head.weight"})


def folder_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, list[int]]]:
    """(config.json, preprocessor_config.json, processor_config.json, name -> shape of every tensor)."""
    said = [
        json.loads((folder / name).read_text())
        for name in ("config.json", "preprocessor_config.json", "processor_config.json")
    ]
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    return said[0], said[1], said[2], shapes


@pytest.mark.parametrize("tower", EYES)
@pytest.mark.parametrize("language", LAYERS)
def test_every_name_and_setting_is_one_that_vllm_reads(tower: str, language: str, tmp_path: Path) -> None:
    vlm = model_of(tmp_path, language, tower)
    write(vlm, tmp_path / "out", "hf-llava")
    config, images, processor, shapes = folder_of(tmp_path / "out")
    assert shapes.keys() == names_of(tower, language)
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and config["model_type"] == "llava"
    # `init_vllm_registered_model` looks this up; without it transformers 5.23 writes none for a composed model
    assert config["text_config"]["architectures"] == [LAYERS[language][0]]
    assert "architectures" not in config["vision_config"]
    # one layer, by its number: the list of several is refused there
    assert config["vision_feature_layer"] == -1 and config["vision_config"]["num_hidden_layers"] == BLOCKS
    assert config["projector_hidden_act"] == "gelu" and config["multimodal_projector_bias"] is True
    # tokens of an image: CLIP's with the class token less one ("default"), all of SigLIP's ("full")
    kind = {"clip": ("clip_vision_model", "default", 1), "siglip": ("siglip_vision_model", "full", 0)}[tower]
    assert (config["vision_config"]["model_type"], config["vision_feature_select_strategy"]) == kind[:2]
    side = config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]
    table = shapes["vision_tower.vision_model.embeddings.position_embedding.weight"]
    assert table[0] == side**2 + kind[2] and config["image_seq_length"] == side**2 == vlm.spec.tokens
    assert (processor["processor_class"], processor["image_token"]) == ("LlavaProcessor", "<image>")
    assert (processor["patch_size"], processor["vision_feature_select_strategy"]) == (16, kind[1])
    assert processor["num_additional_image_tokens"] == kind[2]
    assert images["size"] in ({"height": 32, "width": 32}, {"shortest_edge": 32})
    # the image's token is a row of the table, for vLLM looks embeddings up before it writes images over them
    assert config["image_token_index"] < shapes["language_model.model.embed_tokens.weight"][0]
    assert config["text_config"]["vocab_size"] == shapes["language_model.model.embed_tokens.weight"][0]
    assert config["tie_word_embeddings"] is (language in TIED) is config["text_config"]["tie_word_embeddings"]
    wide = config["text_config"]["hidden_size"]
    assert shapes["multi_modal_projector.linear_2.weight"] == [wide, wide]
    if "num_attention_heads" in config["text_config"]:  # phi3's joined rows, q before k before v, gate before up
        joined = shapes.get("language_model.model.layers.0.self_attn.qkv_proj.weight")
        heads = config["text_config"]["num_attention_heads"] + 2 * config["text_config"]["num_key_value_heads"]
        assert joined is None or joined == [heads * wide // config["text_config"]["num_attention_heads"], wide]


def test_tiles_are_llava_next_with_their_newline(tmp_path: Path) -> None:
    vlm = model_of(tmp_path, "qwen2", "clip", tiles=TilesRecipe(grids=[(1, 2), (2, 1), (2, 2)]))
    write(vlm, tmp_path / "out", "hf-llava")
    config, images, processor, shapes = folder_of(tmp_path / "out")
    assert shapes.keys() == names_of("clip", "qwen2") | {"image_newline"}
    assert shapes["image_newline"] == [config["text_config"]["hidden_size"]]
    assert config["architectures"] == ["LlavaNextForConditionalGeneration"] and config["model_type"] == "llava_next"
    assert config["image_grid_pinpoints"] == images["image_grid_pinpoints"] == [[32, 64], [64, 32], [64, 64]]
    assert processor["processor_class"] == "LlavaNextProcessor"


def test_weights_are_in_the_type_that_the_config_says(tmp_path: Path) -> None:
    """vLLM takes `--dtype auto` from it."""
    vlm = model_of(tmp_path, "qwen2").cast(torch.bfloat16)
    write(vlm, tmp_path / "out", "hf-llava")
    config = json.loads((tmp_path / "out/config.json").read_text())
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}
    assert kinds == {"BF16"} and config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
