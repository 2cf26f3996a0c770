"""The parts of a model of ours as other tools' layouts ask for them; RecipeError names what one cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leveret.model import tower_keys
from leveret.model.checkpoint import stored
from leveret.model.connectors import settle
from leveret.model.recipe import ConnectorRecipe, TowerRecipe
from leveret.model.tower_table import TowerFacts, describe, family_of
from leveret.model.towers import Tower
from leveret.model.vlm import VLM
from leveret.records import NaFlex, Tiling
from leveret.runs import EnvironmentFault, RecipeError

State = dict[str, Tensor]
Written = tuple[dict[str, Any], State, dict[str, Any]]
"""(config.json, tensors, other files by name: JSON or text; under "tokenizer" another tokenizer than the model's)."""


def eye(vlm: VLM, layout: str, families: Mapping[str, str], tiles: Sequence[str] = ()) -> Tower:
    """The model's one tower. families: those that the layout knows -> a layout of tower_keys. tiles: the ways in which
    it puts tiles together."""
    check_tiles(vlm, layout, tiles)
    towers = list(vlm.towers.values())
    if len(towers) > 1:
        names = ", ".join(str(tower.facts.source) for tower in towers if isinstance(tower, Tower))
        raise RecipeError(f"{layout} holds one tower, and this model has {len(towers)}: {names}")
    tower = towers[0]
    assert isinstance(tower, Tower)
    if tower.facts.family not in families:
        raise RecipeError(
            f"{layout} has no name for the tower {tower.facts.source} ({tower.facts.family}); it knows "
            f"{', '.join(families)}"
        )
    return tower


def check_tiles(vlm: VLM, layout: str, tiles: Sequence[str] = ()) -> None:
    """RecipeError where the model sees tiles, and the layout does not put them together in that way."""
    tiling = vlm.spec.tiling
    if isinstance(tiling, NaFlex):
        raise RecipeError(f"{layout} sees every image as a square, and this model sees each at its own shape (NaFlex)")
    merge = tiling.merge if isinstance(tiling, Tiling) else "split, each with a token before it"
    if tiling is not None and merge not in tiles:
        known = f"puts tiles together as {', '.join(tiles)}" if tiles else "sees every image as one picture"
        raise RecipeError(f"{layout} {known}, and this model sees tiles (merge {merge})")
    for tower in vlm.towers.values():
        if isinstance(tower, Tower) and tower.facts.norm:
            raise RecipeError(f"{layout} runs no norm behind the tower's last block, as {tower.facts.source} does here")


def newline(vlm: VLM, name: str) -> State:
    """The newline of tiles under its name in the layout; nothing where the model has none."""
    return {name: vlm.tiles.newline} if vlm.tiles is not None and vlm.tiles.newline is not None else {}


def seen(tower: Tower, layout: str, prefix: str) -> State:
    """The tower's tensors under the names of a layout of tower_keys, `prefix` before them."""
    return seen_so(tower.model.state_dict(), tower.facts.family, layout, prefix)


def seen_so(state: Mapping[str, Tensor], family: str, layout: str, prefix: str) -> State:
    """The same of these tensors of a tower."""
    return tower_keys.to_theirs(state, family, layout, prefix)


def positions(tower: Tower) -> Tensor:
    """The positions [grid^2, width] of SigLIP, and with the class token's before them of CLIP, brought to the grid that
    the tower runs at as the tower does it when it runs."""
    own, side = tower.model.embeddings, tower.facts.side
    table, config = own.position_embedding.weight, tower.facts.config
    if side == int(config["image_size"]):
        return table
    leading = int(tower.facts.family == "clip_vision_model")
    empty = table.new_zeros(1, leading + (side // int(config["patch_size"])) ** 2, table.shape[1])
    with torch.no_grad():
        return own.interpolate_pos_encoding(empty, side, side)[0]


def language(vlm: VLM, prefix: str = "") -> State:
    """The language model's tensors, a tied one once."""
    own = [(name, tensor) for name, tensor in stored(vlm) if name.startswith("language.")]
    return {prefix + name.removeprefix("language."): tensor for name, tensor in own}


def language_config(vlm: VLM) -> dict[str, Any]:
    """transformers' configuration of the language model as it is held: its rows and its type."""
    config: dict[str, Any] = vlm.language.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    rows = vlm.language.get_input_embeddings().weight.shape[0]
    kind = str(next(vlm.language.parameters()).dtype).removeprefix("torch.")
    return config | {"vocab_size": rows, "dtype": kind, "architectures": [type(vlm.language).__name__]}


def layer(tower: Tower) -> int:
    """The layer that is taken, counted from the end of the published tower."""
    return tower.facts.depth - tower.published_depth - 1


def kind(vlm: VLM, layout: str, known: Callable[[str], bool]) -> str:
    """The connector's kind, where the layout knows it."""
    kind = vlm.recipe.connector.kind
    if not known(kind):
        raise RecipeError(f"{layout} has no name for the connector {kind}")
    return kind


def is_mlp(kind: str) -> bool:
    """Whether a kind of connector is a chain of linear layers as LLaVA names them."""
    return kind in ("linear", "identity") or (kind.startswith("mlp") and kind.endswith("x_gelu"))


def seen_alike(vlm: VLM, layout: str, theirs: Sequence[Mapping[str, Any]]) -> None:
    """RecipeError where the layout's code would see an image otherwise than this model was taught to: it knows a tower
    by its name, and the rest of what our recipes choose by little more. theirs: what it chooses, by tower, as fields of
    TowerRecipe."""
    for one, choices, view, tower in zip(
        vlm.recipe.vision.each(), theirs, vlm.spec.towers, vlm.towers.values(), strict=True
    ):
        assert isinstance(tower, Tower)
        given = {"resize": view.resize, **{key: value for key, value in one.model_dump().items() if key != "resize"}}
        same = {"tower": one.tower, "layer": one.layer, "tokens": one.tokens, "s2": one.s2, "norm": one.norm}
        try:
            ours, other = describe(TowerRecipe(**given)), describe(TowerRecipe(**{**same, **choices}))
        except (RecipeError, EnvironmentFault):  # a tower that is known by the model's own folder alone
            ours, other = tower.facts, _usual(tower.facts, one, choices.get("resize"))
        told = [_looks(facts) for facts in (ours, other)]
        differ = {key: (told[0][key], told[1][key]) for key in told[0] if told[0][key] != told[1][key]}
        if differ:
            what = "; ".join(
                f"{key} {mine}" + ("" if its is None else f", not {its}") for key, (mine, its) in differ.items()
            )
            raise RecipeError(
                f"{layout} prepares images for {one.tower} in one way, and this model was taught in another: {what}. "
                "--to hf-llava or remote-code may hold it"
            )


def _usual(facts: TowerFacts, one: TowerRecipe, resize: Any) -> TowerFacts:
    """What a tower that only its own folder knows is by its architecture. What its pixels are scaled by cannot be told:
    it stands in a processor's file that lies with the tower."""
    size = facts.size if facts.s2 else int(facts.config.get("image_size") or facts.size)
    act = None if one.activation is not None else facts.config.get("hidden_act")
    config = {**facts.config, "hidden_act": act}
    return replace(facts, size=size, resize=resize or family_of(facts).resize, short=0, config=config)


def _looks(facts: TowerFacts) -> dict[str, Any]:
    """What a tower makes of an image, beside its weights, layer and tokens."""
    cut = facts.resize in ("crop", "centre", "letterbox")
    return {
        "size": facts.size,
        "resize": facts.resize,
        "short side": (facts.short or facts.size) if cut else facts.size,
        "mean": facts.mean,
        "std": facts.std,
        "activation": facts.config.get("hidden_act"),
    }


def joined_alike(vlm: VLM, layout: str, theirs: ConnectorRecipe) -> None:
    """RecipeError where the layout builds the connector with other settings than this model has."""
    ours, other = vlm.recipe.connector.options, settle(theirs).options
    if differ := [f"{key} {ours[key]}, not {other.get(key)}" for key in ours if ours[key] != other.get(key)]:
        raise RecipeError(f"{layout} builds {theirs.kind} in one way, and this model's is another: {'; '.join(differ)}")
