"""TinyLLaVA Factory's checkpoints (TinyLLaVA/TinyLLaVA_Factory): tuned, after a stage, and with adapters.

    tuned      one checkpoint: language_model.*, vision_tower._vision_tower.*, connector._connector.*
    a stage    folders language_model/, vision_tower/ and connector/, each with a pytorch_model.bin
    adapters   the same folders, `.base_layer` in the language model's names, and PEFT's adapters beside them

Its feature selection `patch` drops the first token of every tower, of SigLIP, which has no class token, a real patch:
models that learned so are loaded so (`tokens: drop_first`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leveret.inputs.formats import published
from leveret.model.language import LanguageFacts
from leveret.model.peers.files import Folder, State, merge_adapters, renamed
from leveret.model.peers.foreign import TEMPLATE, Foreign, Hub, called, no_tokenizer, rows_of, written_as
from leveret.model.peers.languages import language_config
from leveret.model.peers.towers import fused, source_of, tower_of
from leveret.model.published import of_factory, read_state, times
from leveret.model.recipe import LanguageRecipe, ModelRecipe, TowerRecipe
from leveret.model.tower_table import describe
from leveret.runs import DataError

LANGUAGE, TOWER, CONNECTOR = "language_model.", "vision_tower._vision_tower.", "connector._connector."
PARTS = ("language_model", "vision_tower", "connector")
ADAPTED = "base_model.model.language_model."
TOKENS = {"patch": "drop_first", "cls_patch": "cls_patch"}
MOF = "mof:"
BERT = "google-bert/bert-base-uncased"
"""Where the Factory takes the sizes of its Q-Former from."""


def recognise(folder: Folder) -> bool:
    """A `tinyllava` model, or the folders that a stage leaves."""
    return folder.config.get("model_type") == "tinyllava" or ("connector_type" in folder.config and folder.has(*PARTS))


def read(folder: Folder, hub: Hub, base: str | None = None, size: int | None = None) -> Foreign:
    """The model. DataError where the folder is not whole, EnvironmentFault where what it stands on is not there."""
    config = folder.config
    notes: list[str] = []
    language, seen, connector = _parts(folder, notes)
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise DataError(f"{folder.path / 'config.json'}: no text_config, which says what the language model is")
    told = language_config(text, f"{folder.path / 'config.json'}: text_config")
    rows = rows_of(language, "model.embed_tokens.weight", folder.path)
    source = called(config.get("llm_model_name_or_path"), folder)
    facts = LanguageFacts(told, rows, head_bias="lm_head.bias" in language, attention=None, source=source)
    names = [str(config.get(f"vision_model_name_or_path{end}") or "") for end in ("", "2")]
    choices: dict[str, Any] = {
        "layer": int(config.get("vision_feature_layer", -2)),
        "tokens": TOKENS[str(config.get("vision_feature_select_strategy", "patch"))],
        "resize": "pad" if config.get("image_aspect_ratio") == "pad" else None,
        "size": size,
    }
    if names[0].startswith(MOF):
        # Both get the pixels that CLIP's processor makes (tinyllava/model/vision_tower/mof.py).
        eye = describe(TowerRecipe(tower=source_of(names[0].removeprefix(MOF), hub)[0]), f"{folder.path}: CLIP")
        same = {"normalise": "clip", "crop": 1.0, "size": size or eye.size}
        both = [
            (name.removeprefix(MOF), renamed(seen, (f"{view}.", "")), {"name": view, **same})
            for name, view in zip(names, ("clip", "dinov2"), strict=True)
        ]
        vision, towers = fused(both, hub, **choices)
    else:
        vision, towers = tower_of(names[0], seen, hub, notes, trained=True, **choices)
    bert = hub.find(BERT)
    joined = of_factory(config, Folder(bert).config if bert is not None else None)
    if (scale := image_scale(told)) != 1:
        connector = times(joined.kind, connector, scale)
        notes.append(
            "Gemma's scale of the images, which transformers applied when the Factory ran, is in the connector"
        )
    usual = _chat(source, str(told["model_type"]))
    recipe = ModelRecipe(
        vision=vision,
        connector=joined,
        language=LanguageRecipe(name=source, vocab=rows, head_bias=facts.head_bias),
        chat=(written_as(folder, usual) if folder.has(TEMPLATE) else None) or usual,
    )
    spoken = folder.path
    if no_tokenizer(folder):
        named = str(config.get("tokenizer_name_or_path") or source)
        spoken = hub.get(named, f"{folder.path}: the tokenizer")
    eyes = tuple(name.removeprefix(MOF) for name in names if name)
    return Foreign(
        "TinyLLaVA Factory", recipe, towers, connector, language, facts, spoken, notes, eyes, positions="dino"
    )


def image_scale(language: Mapping[str, Any]) -> float:
    """What the Factory's transformers (4.40) multiplied all that comes into a language model by, and later ones only
    the tokens."""
    return float(language["hidden_size"]) ** 0.5 if language["model_type"] == "gemma" else 1.0


def _parts(folder: Folder, notes: list[str]) -> tuple[State, State, State]:
    """Language model, tower and connector, each under its own names."""
    if folder.weights():
        whole = folder.state()
        parts = [renamed(whole, (prefix, "")) for prefix in (LANGUAGE, TOWER, CONNECTOR)]
        if left := [name for name in whole if not name.startswith((LANGUAGE, TOWER, CONNECTOR))]:
            raise DataError(f"{folder.path}: {len(left)} tensors belong to no part of the model: {', '.join(left[:8])}")
        return parts[0], parts[1], read_state(whole)
    language, seen, connector = (folder.state(part) for part in PARTS)
    language = {name.replace(".base_layer.", "."): x for name, x in language.items()}
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if folder.has(name):
            settings = folder.settings("adapter_config.json")
            language = merge_adapters(language, folder.tensors(folder.path / name), settings, ADAPTED)
            notes.append("the adapters are merged into the language model")
    return language, seen, read_state(connector)


def speaks(config: Mapping[str, Any]) -> str:
    """The format in which the Factory's own code asks a model with this config.json."""
    return _chat(str(config["llm_model_name_or_path"]), str(config["text_config"]["model_type"]))


def _chat(source: str, model_type: str) -> str:
    """The template that the Factory's scripts give to a language model (scripts/train/*.sh, conv_version)."""
    if model_type == "qwen2":
        return published("TinyLLaVA", "qwen2_instruct" if "instruct" in source.lower() else "qwen2_base").name
    return published("TinyLLaVA", {"gemma": "gemma", "llama": "llama"}.get(model_type, "phi")).name
