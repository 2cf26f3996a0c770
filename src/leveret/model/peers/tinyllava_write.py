"""TinyLLaVA Factory written: one checkpoint with all parts, as its training saves it and tinyllava.py reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leveret.model import tower_keys
from leveret.model.peers import tinyllava
from leveret.model.peers import write_parts as parts
from leveret.model.peers.write_parts import State, Written
from leveret.model.published import of_factory, times, write_state
from leveret.model.tower_facts import TowerFacts, grid, patch
from leveret.model.tower_table import TOWERS, backbones
from leveret.model.towers import Tower
from leveret.model.vlm import VLM
from leveret.runs import RecipeError

NAME = "TinyLLaVA Factory"
FAMILIES = dict.fromkeys(("siglip_vision_model", "clip_vision_model", "dinov2"), "transformers")
PAIR = {"clip": "clip_vision_model", "dinov2": "dinov2"}
"""The towers of its MoF, in its order: what stands before their weights, and their families."""
_POSITIONS = "embeddings.position_embeddings"


def written(vlm: VLM) -> Written:
    """One tower, or CLIP and DINOv2 with `mof_mlp`. RecipeError names what the Factory has no word for."""
    text = parts.language_config(vlm)
    pair = len(vlm.towers) == 2
    towers = _pair(vlm) if pair else [parts.eye(vlm, NAME, FAMILIES)]
    for tower in towers:
        if tower.facts.s2:
            raise RecipeError(f"{NAME} has no multi-scale towers, and {tower.facts.source} runs at {tower.facts.s2}")
    first, facts = towers[0], towers[0].facts
    sees: dict[str, Any] = {"resize": "pad" if vlm.spec.towers[0].resize == "pad" else None}
    if pair:
        sees |= {"normalise": "clip", "crop": 1.0, "size": int(facts.config.get("image_size") or facts.size)}
    parts.seen_alike(vlm, NAME, [sees] * len(towers))
    # Its `patch` drops the first token whatever it is: of CLIP the class token, of SigLIP a patch.
    said = {"drop_first": "patch", "cls_patch": "cls_patch"}
    said["patch"] = "cls_patch" if facts.family == "siglip_vision_model" else "patch"  # SigLIP: all that there are
    known = ("mof_mlp",) if pair else ("resampler", "qformer")
    kind = parts.kind(vlm, NAME, lambda kind: kind in known or (not pair and parts.is_mlp(kind)))
    options = vlm.recipe.connector.options
    names = [str(tower.facts.source) for tower in towers]
    marked = [tinyllava.MOF * pair + name for name in names]
    config = {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "connector_type": kind,
        "llm_model_name_or_path": vlm.recipe.language.name,
        "tokenizer_name_or_path": vlm.recipe.language.name,
        "vision_model_name_or_path": marked[0],
        "vision_model_name_or_path2": marked[1] if pair else "",
        "hidden_size": text["hidden_size"],
        "vision_hidden_size": first.width,
        "vocab_size": text["vocab_size"],
        "image_aspect_ratio": "pad" if vlm.spec.towers[0].resize == "pad" else "square",
        "image_token_index": -200,
        "ignore_index": -100,
        "vision_feature_layer": parts.layer(first),
        "vision_feature_select_strategy": said[facts.tokens],
        "num_queries": options.get("queries", 128),
        "num_resampler_layers": options.get("layers", 3),
        "tokenizer_padding_side": "right",
        "text_config": text,
        "vision_config": dict(facts.config) | {"image_size": _published(facts), "model_name_or_path": names[0]},
    }
    if kind != "qformer":  # whose sizes are those of a BERT that stands elsewhere
        parts.joined_alike(vlm, NAME, of_factory(config))
    if pair:
        config["vision_config"]["model_name_or_path2"] = names[1]
    state = parts.language(vlm, tinyllava.LANGUAGE)
    for tower, view in zip(towers, PAIR, strict=False):
        inside = "" if tower.facts.family == "dinov2" else "vision_model."
        before = f"{tinyllava.TOWER}{view}." if pair else tinyllava.TOWER
        state |= tower_keys.to_theirs(_weights(tower), tower.facts.family, "transformers", before + inside)
    connector: Mapping[str, Tensor] = vlm.connector.state_dict()
    if (scale := tinyllava.image_scale(text)) != 1:
        connector = times(kind, connector, 1 / scale)
    return config, state | write_state(kind, connector, tinyllava.CONNECTOR), {}


def _pair(vlm: VLM) -> list[Tower]:
    """CLIP and DINOv2 as its MoF runs them: one width, one layer, one choice of tokens, and for both the pixels that
    CLIP's processor makes (tinyllava/model/vision_tower/mof.py). RecipeError where the model's do otherwise."""
    parts.check_tiles(vlm, NAME)
    towers = [tower for tower in vlm.towers.values() if isinstance(tower, Tower)]
    if tuple(tower.facts.family for tower in towers) != tuple(PAIR.values()):
        names = ", ".join(str(tower.facts.source) for tower in towers)
        raise RecipeError(f"{NAME} joins two towers, CLIP and DINOv2 in that order, and this model has {names}")
    if vlm.recipe.vision.fusion != "channel" or vlm.recipe.connector.kind != "mof_mlp":
        raise RecipeError(
            f"{NAME} joins two towers by the connector mof_mlp behind fusion: channel, and this model has "
            f"{vlm.recipe.connector.kind} behind fusion: {vlm.recipe.vision.fusion}"
        )
    one, two = towers
    views = [replace(tower.facts.view, name="") for tower in towers]
    differ = {
        "width": (one.width, two.width),
        "layer": (parts.layer(one), parts.layer(two)),
        "tokens": tuple(_kept(tower) for tower in towers),
        "pixels": tuple(f"{v.size} {v.resize} {v.resample} {v.short or v.size} {v.mean} {v.std}" for v in views),
    }
    if odd := [f"{what} {a} and {b}" for what, (a, b) in differ.items() if a != b]:
        raise RecipeError(
            f"{NAME} runs both towers alike, on the pixels that CLIP's processor makes (normalise: clip), and this "
            f"model's differ: {'; '.join(odd)}"
        )
    return towers


def _kept(tower: Tower) -> str:
    """Which tokens are taken; both towers have one leading token, so that two choices are the same."""
    return "patch" if tower.facts.tokens == "drop_first" else tower.facts.tokens


def _published(facts: TowerFacts) -> int:
    """The image_size of the tower as it is published, which is what the Factory builds."""
    own = facts.config.get("image_size") or facts.size
    entry = backbones()["vision"].get(TOWERS[facts.source].like or facts.source) if facts.source in TOWERS else None
    theirs = entry["config"] if entry else {}
    same = all(facts.config.get(key, value) == value for key, value in theirs.items() if key != "image_size")
    return int(theirs.get("image_size", own) if same else own)


def _weights(tower: Tower) -> State:
    """The tower's tensors. The Factory builds DINOv2 with the positions that are published, and brings them to the
    image's size as it runs, by DINOv2's own rule: what is written comes out of that as what this model adds."""
    facts, state = tower.facts, dict(tower.model.state_dict())
    published = _published(facts) // patch(facts)
    if facts.family != "dinov2" or published == grid(facts):
        return state
    have = state[_POSITIONS]
    tokens, width = 1 + published**2, have.shape[-1]
    with torch.no_grad():
        blank = have.new_zeros(1, 1 + grid(facts) ** 2, width)
        added = tower.model.embeddings.interpolate_pos_encoding(blank, facts.side, facts.side)
    near = have if have.shape[1] == tokens else have.new_zeros(1, tokens, width)
    state[_POSITIONS] = tower_keys.spread(added, near)
    return state
