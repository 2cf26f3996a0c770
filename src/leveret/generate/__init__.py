"""Station 6, answer: the one engine, for examining and serving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leveret.generate.engine import Engine, Request
    from leveret.generate.model import Model, load
    from leveret.generate.sampling import Sampling

__all__ = ["Engine", "Model", "Request", "Sampling", "load"]

_HOMES = {"Engine": "engine", "Request": "engine", "Model": "model", "load": "model", "Sampling": "sampling"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
