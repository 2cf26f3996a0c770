"""Which tower a checkpoint means, and whose weights it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leveret.model.peers.files import State, renamed
from leveret.model.peers.foreign import Hub
from leveret.model.recipe import TowerRecipe, VisionRecipe

ALIASES = {
    "bczhou/TinyLLaVA-3.1B-SigLIP": "google/siglip-so400m-patch14-384",
    "bczhou/TinyLLaVA-2.0B-SigLIP": "google/siglip-so400m-patch14-384",
    "bczhou/TinyLLaVA-1.5B-SigLIP": "google/siglip-so400m-patch14-384",
}
"""Towers that were published again under another name, a layer shorter."""


def tower_of(
    name: str, own: Mapping[str, Any], hub: Hub, notes: list[str], *, trained: bool, **choices: Any
) -> tuple[VisionRecipe, dict[str, State]]:
    """(the recipe of one tower, {"vision": its tensors} or nothing where its own source has them).

    name     as the checkpoint says it: an id of the hub or a path of its authors' machine.
    own      tensors of the tower in the checkpoint. trained: whether they are the model's; they are taken too where the
             tower cannot be had elsewhere, and a note says so.
    choices  fields of VisionRecipe.
    """
    where, here = _where(name, hub)
    if not own or (here and not trained):
        return VisionRecipe(tower=where, **choices), {}
    if not trained:
        notes.append(f"{name} is not on this machine: its weights are those in the checkpoint")
    seen = renamed(own, ("vision_model.", ""), ("", ""))
    return VisionRecipe(tower=where, keep=_kept(seen), **choices), {"vision": seen}


def fused(
    towers: Sequence[tuple[str, Mapping[str, Any], str]], hub: Hub, notes: list[str], *, fusion: Any, **choices: Any
) -> tuple[VisionRecipe, dict[str, State]]:
    """(the recipe of several towers, {view: its tensors} of those that the checkpoint holds). towers: (name as the
    checkpoint says it, tensors in the checkpoint, view)."""
    recipes, seen = [], {}
    for name, own, view in towers:
        where, _ = _where(name, hub)
        state = renamed(own, ("vision_model.", ""), ("", ""))
        recipes.append(TowerRecipe(tower=where, name=view, keep=_kept(state), **choices))
        if state:
            seen[view] = state
    return VisionRecipe(towers=recipes, fusion=fusion), seen


def _where(name: str, hub: Hub) -> tuple[str, bool]:
    """What TOWERS or a path is meant by a name, and whether it is a folder or file on this machine."""
    from leveret.model.towers import TOWERS

    name = ALIASES.get(name, name)
    if (found := hub.find(name)) is not None:
        return str(found), True
    if name not in TOWERS:  # authors leave paths of their own machines behind: the last part tells
        end = name.rstrip("/").split("/")[-1]
        name = next((row for row in TOWERS if row.split("/")[-1] == end), name)
    return name, False


def _kept(state: Mapping[str, Any]) -> list[Any]:
    """Parts of the tower that do not run but are in the checkpoint."""
    kept = []
    if any(name.startswith(("post_layernorm.", "layernorm.", "norm.")) for name in state):
        kept += ["layers", "norm"]
    if any(name.startswith("head.") for name in state):
        kept.append("head")
    return kept
