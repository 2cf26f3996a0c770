"""Prismatic's checkpoints (TRI-ML/prismatic-vlms): config.json with a recipe of ids, and one pickle of tensors (ours:
safetensors, nested names joined by dots).

    model.projector.projector.*      ->  the connector
    model.llm_backbone.llm.*         ->  the language model
    model.vision_backbone.*          ->  the towers, where they learned; else they are timm's

Nothing in the folder says how large anything is: the ids do (prismatic.md 4, 6, 7). The language model's settings are
read from the hub, its weights never.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leveret.inputs.formats import published
from leveret.inputs.views import STRATEGIES
from leveret.model.language import LanguageFacts
from leveret.model.peers.files import Folder, renamed
from leveret.model.peers.foreign import Foreign, Hub, rows_of
from leveret.model.peers.languages import language_config
from leveret.model.peers.towers import fused, tower_of
from leveret.model.published import of_prismatic, read_state
from leveret.model.recipe import LanguageRecipe, ModelRecipe
from leveret.runs import DataError, closest

WEIGHTS = "checkpoints/latest-checkpoint."
"""Prismatic writes `pt`, we `safetensors`."""
PROJECTOR, LANGUAGE, TOWERS = "model.projector.projector.", "model.llm_backbone.llm.", "model.vision_backbone."
ONE = "featurizer."
"""What stands before the names of a tower that is alone; of several, PREFIXES tells."""


@dataclass(frozen=True)
class Backbone:
    """A vision_backbone_id. towers: (view, timm's name). size: of the square image."""

    towers: tuple[tuple[str, str], ...]
    size: int


_CLIP, _DINO = "vit_large_patch14_clip_336.openai", "vit_large_patch14_reg4_dinov2.lvd142m"
_SIGLIP_SO = "vit_so400m_patch14_siglip_"
BACKBONES: dict[str, Backbone] = {
    "clip-vit-b": Backbone((("clip", "vit_base_patch16_clip_224.openai"),), 224),
    "clip-vit-l": Backbone((("clip", "vit_large_patch14_clip_224.openai"),), 224),
    "clip-vit-l-336px": Backbone((("clip", _CLIP),), 336),
    "siglip-vit-b16-224px": Backbone((("siglip", "vit_base_patch16_siglip_224"),), 224),
    "siglip-vit-b16-256px": Backbone((("siglip", "vit_base_patch16_siglip_256"),), 256),
    "siglip-vit-b16-384px": Backbone((("siglip", "vit_base_patch16_siglip_384"),), 384),
    "siglip-vit-so400m": Backbone((("siglip", f"{_SIGLIP_SO}224"),), 224),
    "siglip-vit-so400m-384px": Backbone((("siglip", f"{_SIGLIP_SO}384"),), 384),
    "dinov2-vit-l": Backbone((("dinov2", _DINO),), 224),
    "in1k-vit-l": Backbone((("vit", "vit_large_patch16_224.augreg_in21k_ft_in1k"),), 224),
    "dinosiglip-vit-so-224px": Backbone((("dinov2", _DINO), ("siglip", f"{_SIGLIP_SO}224")), 224),
    "dinosiglip-vit-so-384px": Backbone((("dinov2", _DINO), ("siglip", f"{_SIGLIP_SO}384")), 384),
    "dinoclip-vit-l-336px": Backbone((("dinov2", _DINO), ("clip", _CLIP)), 336),
}
"""prismatic/models/backbones/vision/*.py"""
ACTIVATIONS = {"clip": "gelu"}
"""Fused, CLIP runs with the plain GELU of timm's default: prismatic/models/backbones/vision/dinoclip_vit.py."""

LANGUAGES: dict[str, tuple[str, str]] = {
    "llama2-7b-pure": ("meta-llama/Llama-2-7b-hf", "PurePromptBuilder"),
    "llama2-13b-pure": ("meta-llama/Llama-2-13b-hf", "PurePromptBuilder"),
    "llama2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", "LLaMa2ChatPromptBuilder"),
    "llama2-13b-chat": ("meta-llama/Llama-2-13b-chat-hf", "LLaMa2ChatPromptBuilder"),
    "vicuna-v15-7b": ("lmsys/vicuna-7b-v1.5", "VicunaV15ChatPromptBuilder"),
    "vicuna-v15-13b": ("lmsys/vicuna-13b-v1.5", "VicunaV15ChatPromptBuilder"),
    "mistral-v0.1-7b-pure": ("mistralai/Mistral-7B-v0.1", "PurePromptBuilder"),
    "mistral-v0.1-7b-instruct": ("mistralai/Mistral-7B-Instruct-v0.1", "MistralInstructPromptBuilder"),
    "phi-2-3b": ("microsoft/phi-2", "PhiPromptBuilder"),
}
"""llm_backbone_id -> (hub id, prompt builder): prismatic/models/backbones/llm/*.py"""

PREFIXES = {"clip": "clip_featurizer.", "siglip": "siglip_featurizer.", "dinov2": "dino_featurizer."}


def recognise(folder: Folder) -> bool:
    """A config.json whose `model` names a vision and a language backbone."""
    model = folder.config.get("model")
    return isinstance(model, dict) and "vision_backbone_id" in model and "llm_backbone_id" in model


def _row(table: dict[str, Any], name: str, what: str, folder: Folder) -> Any:
    if name not in table:
        near = closest(name, table)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise DataError(f"{folder.path / 'config.json'}: {what} {name!r} is not known. Known: {', '.join(table)}{hint}")
    return table[name]


def read(folder: Folder, hub: Hub, base: str | None = None, size: int | None = None) -> Foreign:
    """The model. base: instead of the hub id of the language model. size: of the image, instead of the id's."""
    model = folder.config["model"]
    backbone: Backbone = _row(BACKBONES, str(model["vision_backbone_id"]), "vision_backbone_id", folder)
    source, builder = _row(LANGUAGES, str(model["llm_backbone_id"]), "llm_backbone_id", folder)
    resize = _row(STRATEGIES, str(model["image_resize_strategy"]), "image_resize_strategy", folder)
    notes: list[str] = []
    ending = next((end for end in ("safetensors", "pt") if folder.has(WEIGHTS + end)), "pt")
    whole = folder.tensors(folder.path / f"{WEIGHTS}{ending}")
    home = Folder(hub.get(base or source, f"{folder.path}: the language model's settings and tokenizer"))
    language = renamed(whole, (LANGUAGE, ""))
    rows = rows_of(language, "model.embed_tokens.weight", folder.path)
    told = language_config(home.config, str(home.path / "config.json"))
    facts = LanguageFacts(told, rows, head_bias="lm_head.bias" in language, attention=None, source=source)
    trained = renamed(whole, (TOWERS, ""))
    choices: dict[str, Any] = {"layer": -2, "resize": resize, "size": size or backbone.size}
    if len(backbone.towers) > 1:
        both = [
            (
                f"timm/{name}",
                renamed(trained, (PREFIXES[view], "")),
                {"name": view, "activation": ACTIVATIONS.get(view)},
            )
            for view, name in backbone.towers
        ]
        vision, seen = fused(both, hub, **choices)
    else:
        ((_, name),) = backbone.towers
        learned = renamed(trained, (ONE, ""))
        vision, seen = tower_of(f"timm/{name}", learned, hub, notes, trained=True, **choices)
    recipe = ModelRecipe(
        vision=vision,
        connector=of_prismatic(str(model["arch_specifier"])),
        language=LanguageRecipe(name=source, vocab=rows, head_bias=facts.head_bias),
        chat=published("Prismatic", builder).name,
    )
    connector = read_state(renamed(whole, ("model.projector.", "")))
    called = tuple(f"timm/{name}" for _, name in backbone.towers)
    return Foreign("Prismatic", recipe, seen, connector, language, facts, home.path, notes, called, letter=True)
