"""Teach a model in stages. `train` is the whole of it; `TrainRecipe` is what it follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leveret.train.run import train
    from leveret.train.stages import Learn, Lora, StageRecipe, Start, TrainRecipe

__all__ = ["Learn", "Lora", "StageRecipe", "Start", "TrainRecipe", "train"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("leveret.train.run" if name == "train" else "leveret.train.stages"), name)
