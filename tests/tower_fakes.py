"""Towers of every architecture at toy size, made by transformers' own classes, and what their blocks give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from fakes import SIGLIP, loud
from leveret.model.towers import TOWER_FAMILIES, TowerFacts

# family -> transformers' configuration and class, the part of SIGLIP that is not its, and leading tokens
CLASSES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel", {}, 0),
    "siglip2_vision_model": ("Siglip2VisionConfig", "Siglip2VisionModel", {"num_patches": 4}, 0),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel", {}, 1),
    "dinov2": ("Dinov2Config", "Dinov2Model", {"mlp_ratio": 2}, 1),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"mlp_ratio": 2}, 5),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 4, "pos_embed_rescale": 2.0}, 5),
    "vit": ("ViTConfig", "ViTModel", {}, 1),
    "aimv2_vision_model": ("Aimv2VisionConfig", "Aimv2VisionModel", {}, 0),
}


def toy(family: str) -> Any:
    """transformers' own tower at toy size: 32 pixels, patches of 16, 3 blocks, 16 wide."""
    config, cls, extra, _ = CLASSES[family]
    torch.manual_seed(0)
    options = {"add_pooling_layer": False} if family == "vit" else {}
    sizes = {
        key: value for key, value in SIGLIP.items() if not (family == "siglip2_vision_model" and key == "image_size")
    }
    return loud(getattr(transformers, cls)(getattr(transformers, config)(**{**sizes, **extra}), **options)).eval()


def states_of(model: Any, family: str, pixels: torch.Tensor) -> list[torch.Tensor]:
    """transformers' [embeddings, block 1, .., block n], each as it leaves its block."""
    seen: list[torch.Tensor] = []
    blocks = model.get_submodule(TOWER_FAMILIES[family].blocks)
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    hooks += [block.register_forward_hook(lambda _, args, out: seen.append(out)) for block in blocks]
    with torch.no_grad():
        if family == "siglip2_vision_model":
            from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

            patches = [torch.from_numpy(convert_image_to_patches(p.numpy(), 16)) for p in pixels]
            cells = pixels.shape[-1] // 16
            model(torch.stack(patches), torch.ones(len(pixels), cells**2), torch.tensor([[cells, cells]] * len(pixels)))
        elif TOWER_FAMILIES[family].sizes == "flag":
            model(pixels, interpolate_pos_encoding=True)
        else:
            model(pixels)
    for hook in hooks:
        hook.remove()
    return seen


EVA = {
    "model_type": "eva02_clip", "hidden_size": 16, "intermediate_size": 42, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 16, "projection_dim": 12, "layer_norm_eps": 1e-6,
    "pretrain_grid": 16,
}  # fmt: skip


def eva_file(path: Path) -> Path:
    """A toy EVA-02-CLIP in the form of the published file: names, rotary tables, a text side."""
    from leveret.model.eva import EvaVision, rotation
    from leveret.model.tower_keys import to_theirs

    torch.manual_seed(0)
    model = loud(EvaVision(EVA))
    state = to_theirs(model.state_dict(), "eva02_clip", "eva", "visual.")
    angles = rotation(2, 16, 8, torch.device("cpu"))
    for place in ("visual.rope", *(f"visual.blocks.{block}.attn.rope" for block in range(3))):
        state |= {f"{place}.freqs_cos": angles.cos(), f"{place}.freqs_sin": angles.sin()}
    state |= {"logit_scale": torch.tensor(1.0), "text.token_embedding.weight": torch.zeros(8, 4)}
    torch.save(state, path)
    return path


def small(facts: TowerFacts, width: int) -> TowerFacts:
    """A tower's facts at toy size: 4 x 4 patches of 4 pixels, 3 blocks of which the row's layer is taken, `width` wide.
    What its family adds (registers, gates, epsilon, activation, leading tokens) stays what it is."""
    config = dict(facts.config)
    if facts.family == "tiny":
        return replace(facts, config={**config, "size": 32, "width": width}, size=32)
    skipped = int(config["num_hidden_layers"]) - facts.depth
    config |= {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    for key, value in {"mlp_ratio": 2, "num_patches": 16, "pretrain_grid": 4, "projection_dim": 12}.items():
        if key in config:
            config[key] = value
    if facts.family == "siglip2_vision_model":
        del config["image_size"]
    return replace(facts, config=config, depth=3 - skipped, size=16)
