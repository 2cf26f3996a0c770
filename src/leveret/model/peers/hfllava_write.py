"""HF LLaVA written: the folder of transformers' own LLaVA class, which vLLM and hfllava.py read."""

from __future__ import annotations

from typing import Any

import torch

from leveret.model.peers import write_parts as parts
from leveret.model.peers.hfllava import SCALED
from leveret.model.peers.write_parts import State, Written
from leveret.model.vlm import VLM
from leveret.records import Tiling
from leveret.runs import RecipeError

IMAGE = "<image>"
RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}
"""Filters by PIL's numbers."""


def written(vlm: VLM) -> Written:
    """The spelling that vLLM reads too: `vision_tower.vision_model.*`, `language_model.model.*`, and `architectures` in
    text_config but not in vision_config (ecosystem: llama.cpp would route by it)."""
    name, tiling = "HF LLaVA", vlm.spec.tiling if isinstance(vlm.spec.tiling, Tiling) else None
    eyes = {"siglip_vision_model": "transformers", "clip_vision_model": "transformers"}
    tower = parts.eye(vlm, name, eyes, ("unpad",))
    if tiling is not None and tiling.limit:
        raise RecipeError(
            f"{name}: tiles with a limit are LLaVA-OneVision's, whose folders are read here and not written; "
            "`--to llava` writes LLaVA's own layout"
        )
    facts, text = tower.facts, parts.language_config(vlm)
    if facts.s2:
        raise RecipeError(f"{name} has no multi-scale towers, and {facts.source} runs at {facts.s2}")
    if facts.tokens == "drop_first" and facts.family == "siglip_vision_model":
        raise RecipeError(f"{name} cannot leave out a patch, and this model was taught without the first of SigLIP's")
    if (kind := vlm.recipe.connector.kind) != "mlp2x_gelu":
        raise RecipeError(f"{name} has one connector, mlp2x_gelu, and this model has {kind}")
    language = parts.language(vlm)
    if "lm_head.bias" in language:
        if language.pop("lm_head.bias").abs().max() > 0:
            raise RecipeError(f"{name} has no bias in the output layer, and {vlm.recipe.language.name} has one")
    if text["model_type"] in SCALED:
        raise RecipeError(
            f"{name} leaves out how {text['model_type']} scales or caps its logits, so answers would differ"
        )
    text["tie_word_embeddings"] = "lm_head.weight" not in language
    token = _image_token(vlm, text, language)
    default = facts.family == "clip_vision_model" and facts.tokens != "cls_patch"
    vision = {key: value for key, value in facts.config.items() if key not in ("architectures", "transformers_version")}
    built = len(list(tower.model.get_submodule("encoder.layers")))
    vision |= {"num_hidden_layers": built, "image_size": facts.size}
    if facts.family == "siglip_vision_model":
        vision["vision_use_head"] = "head" in facts.keep
    rest = {key: x for key, x in tower.model.state_dict().items()}
    rest["embeddings.position_embedding.weight"] = parts.positions(tower)
    if not any(key.startswith("post_layernorm.") for key in rest):  # never run, but the class has it
        width = int(vision["hidden_size"])
        rest |= {"post_layernorm.weight": torch.ones(width), "post_layernorm.bias": torch.zeros(width)}
    kind_of = next(iter(language.values())).dtype
    state = {f"language_model.{key}": x for key, x in language.items()} | parts.newline(vlm, "image_newline")
    state |= {f"vision_tower.vision_model.{key}": x.to(kind_of) for key, x in rest.items() if "position_ids" not in key}
    for at, place in (("0", "1"), ("2", "2")):
        for what in ("weight", "bias"):
            state[f"multi_modal_projector.linear_{place}.{what}"] = vlm.connector.state_dict()[f"{at}.{what}"]
    config = {
        "architectures": [f"Llava{'' if tiling is None else 'Next'}ForConditionalGeneration"],
        "model_type": "llava" if tiling is None else "llava_next",
        "image_token_index": token,
        "image_seq_length": vlm.spec.tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": facts.depth - built - 1,
        "vision_feature_select_strategy": "default" if default else "full",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": str(kind_of).removeprefix("torch."),
        "text_config": text,
        "vision_config": vision,
    }
    view = vlm.spec.towers[0]
    side = {"height": view.size, "width": view.size}
    if tiling is None and view.resize not in ("squash", "pad", "crop"):
        raise RecipeError(f"{name} has no processor that prepares images by {view.resize}, as this model's are")
    cuts, short = view.resize == "crop", view.short or view.size
    images: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor" if cuts else "SiglipImageProcessor",
        "size": {"shortest_edge": short} if cuts else side,
        "crop_size": side,
        "do_center_crop": cuts,
        "image_mean": list(view.mean),
        "image_std": list(view.std),
        "resample": RESAMPLE[view.resample],
    }
    processor = {
        "processor_class": "LlavaProcessor" if tiling is None else "LlavaNextProcessor",
        "patch_size": int(facts.config["patch_size"]),
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        "num_additional_image_tokens": 1 if default else 0,
        "image_token": IMAGE,
    }
    if view.resize == "pad":  # the colour that LLaVA pads with is the mean, here and there
        images |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    if tiling is not None:
        config["image_grid_pinpoints"] = grids = [list(grid) for grid in tiling.grids]
        images |= {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": grids, "do_pad": True}
        images |= {"size": {"shortest_edge": view.size}, "do_center_crop": True}
    return config, state, {"preprocessor_config.json": images, "processor_config.json": processor}


def _image_token(vlm: VLM, text: dict[str, Any], language: State) -> int:
    """The id of `<image>`, which the class writes the image over: the tokenizer's, or a new one behind all others."""
    if vlm.tokenizer is None:
        raise RecipeError("HF LLaVA needs a tokenizer, in which <image> is a token; this model has none")
    if IMAGE not in vlm.tokenizer.get_vocab():
        vlm.tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    token = int(vlm.tokenizer.convert_tokens_to_ids(IMAGE))
    if token >= text["vocab_size"]:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in language:
                more = language[name].new_zeros(token + 1 - text["vocab_size"], language[name].shape[1])
                language[name] = torch.cat([language[name], more])
        text["vocab_size"] = token + 1
    return token
