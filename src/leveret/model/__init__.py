"""Compose: a recipe becomes a model; a model becomes a folder and back.

In:  a ModelRecipe (ids of a tower, a connector, a language model, a chat format), or a model folder.
Out: a VLM, which turns a Batch into logits and a loss; and the ImageSpec that tells inputs what its eyes want.
Start reading at vlm.py. Names load on first use, because torch takes seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leveret.model.build import build, build_meta
    from leveret.model.checkpoint import find, load, save
    from leveret.model.parts import parts_table
    from leveret.model.recipe import ModelRecipe
    from leveret.model.vlm import VLM, VLMOutput

_HOMES = {
    "VLM": "vlm",
    "ModelRecipe": "recipe",
    "VLMOutput": "vlm",
    "build": "build",
    "build_meta": "build",
    "find": "checkpoint",
    "load": "checkpoint",
    "parts_table": "parts",
    "save": "checkpoint",
}

__all__ = ["VLM", "ModelRecipe", "VLMOutput", "build", "build_meta", "find", "load", "parts_table", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'leveret.model' has no attribute {name!r}")
    return getattr(import_module(f"leveret.model.{_HOMES[name]}"), name)
