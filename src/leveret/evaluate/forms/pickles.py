"""Published lists that come pickled, read without running what a pickle may run."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

from leveret.runs import DataError

PLAIN = frozenset({"set", "frozenset", "list", "dict", "tuple", "int", "float", "complex", "bool", "str", "bytearray"})
"""Of the built-in names a pickle may call these; lists, tables, numbers and texts need none of them."""


# The one written in Python: a pickle can tell the one written in C to fill all memory with room for what it recalls.
class _Plain(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in PLAIN:
            return super().find_class("builtins", name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(path: Path) -> Any:
    """A pickle of lists, tables, numbers and texts, as Python 2 and 3 write them (texts of Python 2 as UTF-8).

    DataError where it asks for anything else, by name, or is no pickle; nothing it asks for is imported or called.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    try:
        return _Plain(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except (
        pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError, MemoryError,
        OverflowError, ImportError, RecursionError, struct.error,
    ) as fault:  # fmt: skip
        raise DataError(
            f"{path}: not a pickle of lists, tables, numbers and texts alone ({str(fault) or type(fault).__name__}). "
            f"Fetch it again from where it is published, or save the list as JSON beside it as {path.stem}.json."
        ) from None
