"""leveret builds small vision-language models by choosing their data well.

    import leveret
    model = leveret.load("runs/quickstart/model")
    print(model.ask("photo.jpg", "What is this?"))

The public names load on first use, so `import leveret` is instant and needs no tensors.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Sample", "__version__", "condense", "evaluate", "load", "register", "train"]

if TYPE_CHECKING:
    from leveret.condense import condense
    from leveret.evaluate import evaluate
    from leveret.generate import load
    from leveret.model.hf import register
    from leveret.records import Sample
    from leveret.train import train

_HOMES = {
    "Sample": "leveret.records",
    "condense": "leveret.condense",
    "evaluate": "leveret.evaluate",
    "load": "leveret.generate",
    "register": "leveret.model.hf",
    "train": "leveret.train",
}


class _Room(ModuleType):
    """A room that bears the name of its one verb: `leveret.train` is the package, and calling it trains."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """Makes rooms callable as the import system binds them here, whichever way they are imported first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and value.__name__ == _HOMES.get(name):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'leveret' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return home if home.__name__ == f"leveret.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
