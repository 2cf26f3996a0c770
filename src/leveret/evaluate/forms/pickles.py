"""Published lists that come pickled, read without running what a pickle may run."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

from leveret.runs import DataError

PLAIN = frozenset({"set", "frozenset"})
"""What a pickle may call; lists, tables, numbers and texts it holds as they are, without calling anything."""

_COUNTS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _argument(op: pickletools.OpcodeInfo) -> tuple[int, int, int]:
    """(bytes, bytes of a count that says how many more, lines) that follow an opcode."""
    if op.arg is None:
        return 0, 0, 0
    if op.arg.n == pickletools.UP_TO_NEWLINE:
        return 0, 0, 2 if op.arg.name == "stringnl_noescape_pair" else 1
    return (op.arg.n, 0, 0) if op.arg.n >= 0 else (0, _COUNTS[op.arg.n], 0)


_ARGUMENTS = {ord(op.code): _argument(op) for op in pickletools.opcodes}
_STEPS = [1 + _ARGUMENTS[code][0] if code in _ARGUMENTS and not any(_ARGUMENTS[code][1:]) else 0 for code in range(256)]
_STOP, _PUT, _LONG_PUT = ord("."), ord("p"), ord("r")


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in PLAIN:
            return super().find_class("builtins", name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _check_places(data: bytes) -> None:
    """UnpicklingError where a pickle keeps something in a place beyond its own length: places are a table that is made
    as long as the highest one, so a few bytes could fill all memory."""
    at = 0
    while True:
        code = data[at]  # IndexError: it has no end
        if step := _STEPS[code]:
            if code == _STOP:
                return
            place = int.from_bytes(data[at + 1 : at + 5], "little") if code == _LONG_PUT else 0
            at += step
        elif code not in _ARGUMENTS:
            raise pickle.UnpicklingError(f"byte {at} is no instruction")
        else:
            _, count, lines = _ARGUMENTS[code]
            start = at + 1
            at = start + count + int.from_bytes(data[start : start + count], "little")
            for _ in range(lines):
                at = data.index(b"\n", at) + 1
            place = int(data[start:at]) if code == _PUT else 0
        if place > len(data):
            raise pickle.UnpicklingError(f"it keeps something in place {place}, and has {len(data)} bytes")


def read_pickle(path: Path) -> Any:
    """A pickle of lists, tables, numbers and texts, as Python 2 and 3 write them (texts of Python 2 as UTF-8).

    DataError where it asks for anything else, by name, or is no pickle; nothing it asks for is imported or called.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    try:
        _check_places(data)
        return _Plain(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except (
        pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError, MemoryError,
        OverflowError, ImportError, RecursionError, struct.error,
    ) as fault:  # fmt: skip
        raise DataError(
            f"{path}: not a pickle of lists, tables, numbers and texts alone ({str(fault) or type(fault).__name__}). "
            f"Fetch it again from where it is published, or save the list as JSON beside it as {path.stem}.json."
        ) from None
