"""Which tower a checkpoint means, and whose weights it has."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from leveret.model.peers.files import State
from leveret.model.peers.foreign import Hub
from leveret.model.recipe import TilesRecipe, TowerRecipe, VisionRecipe
from leveret.records import Tiling
from leveret.runs import DataError

ALIASES = {
    "bczhou/TinyLLaVA-3.1B-SigLIP": "google/siglip-so400m-patch14-384",
    "bczhou/TinyLLaVA-2.0B-SigLIP": "google/siglip-so400m-patch14-384",
    "bczhou/TinyLLaVA-1.5B-SigLIP": "google/siglip-so400m-patch14-384",
}
"""Towers that were published again under another name, a layer shorter."""


def tower_of(
    name: str, own: Mapping[str, Any], hub: Hub, notes: list[str], *, trained: bool, **choices: Any
) -> tuple[VisionRecipe, dict[int, State]]:
    """(the recipe of one tower, {0: its tensors}, or nothing where they are those of its own source).

    name     as the checkpoint says it: an id of the hub or a path of its authors' machine.
    own      tensors of the tower in the checkpoint. trained: whether they are the model's; they are taken too where the
             tower cannot be had elsewhere, and a note says so.
    choices  fields of VisionRecipe.
    """
    where, here = source_of(name, hub)
    if not own or (here and not trained):
        return VisionRecipe(tower=where, **choices), {}
    if not trained:
        notes.append(f"{name} is not on this machine: the tower has the weights that the checkpoint holds")
    return VisionRecipe(tower=where, **choices), {0: dict(own)}


def fused(
    towers: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]], hub: Hub, **choices: Any
) -> tuple[VisionRecipe, dict[int, State]]:
    """(the recipe of several towers side by side, {place: its tensors} of those that the checkpoint holds).

    towers   (name as the checkpoint says it, its tensors in the checkpoint, choices of its own).
    choices  of all of them that do not choose for themselves: fields of TowerRecipe.
    """
    recipes, seen = [], {}
    for place, (name, own, more) in enumerate(towers):
        recipes.append(TowerRecipe(tower=source_of(name, hub)[0], **{**choices, **more}))
        if own:
            seen[place] = dict(own)
    return VisionRecipe(towers=recipes), seen


def tiles_of(grids: Any, size: int, merge: str, where: str, *, wide: bool, limit: int = 0) -> TilesRecipe:
    """How a checkpoint cuts an image into tiles of `size` pixels.

    grids  `image_grid_pinpoints`: pairs of pixels, (width, height) where `wide` (LLaVA's own) and else (height, width)
           (transformers'); LLaVA may write them as text, or the first and the last of a range of grids.
    merge  LLaVA's `mm_patch_merge_type`. limit: the N of anyres_max_N.
    DataError where they are no pairs of multiples of the tile, or the tiles are put together otherwise than is known.
    """
    if isinstance(grids, str) and (span := re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", grids)):
        wide_from, high_from, wide_to, high_to = map(int, span.groups())  # LLaVA's: in tiles, (width, height)
        grids = [(x * size, y * size) for x in range(wide_from, wide_to + 1) for y in range(high_from, high_to + 1)]
    try:
        pairs = [(int(one), int(two)) for one, two in (ast.literal_eval(grids) if isinstance(grids, str) else grids)]
    except (TypeError, ValueError, SyntaxError):
        pairs = []
    try:
        told = Tiling.from_llava(size, 1, pairs if wide else [(width, height) for height, width in pairs], merge, limit)
    except ValueError as fault:
        raise DataError(f"{where}: image_grid_pinpoints {grids!r} for a tower of {size} pixels: {fault}") from None
    found = [(height // size, width // size) for height, width in told.grids]
    return TilesRecipe(grids=found, merge=told.merge, limit=told.limit)


def limit_of(aspect: str) -> int | None:
    """The N of "anyres_max_N", 0 of "anyres"; None of what says something else about images (or about tiles that are
    not put together so)."""
    found = re.fullmatch(r"anyres(_max_([1-9]\d*))?", aspect)
    return None if found is None else int(found[2] or 0)


def source_of(name: str, hub: Hub) -> tuple[str, bool]:
    """The row of TOWERS or the path that a name means, and whether it is on this machine."""
    from leveret.model.tower_table import TOWERS

    name = ALIASES.get(name, name)
    if (found := hub.find(name)) is not None:
        return str(found), True
    if name not in TOWERS:  # authors leave paths of their own machines behind: the last part tells
        end = name.rstrip("/").split("/")[-1]
        name = next((row for row in TOWERS if row.split("/")[-1] == end), name)
    return name, False
