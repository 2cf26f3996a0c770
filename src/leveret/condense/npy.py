"""Numpy's files, read by several threads at once.

Numpy reads a file's header with `ast.literal_eval`, and CPython (3.11 among others) keeps one count of its depth for
all threads: two of them in it at once may end in "SystemError: AST constructor recursion depth mismatch"
(python/cpython#106905). So headers are read one at a time; the numbers behind them are not.
"""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from leveret.condense.rows import Array

_ONE = threading.Lock()


def header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether by columns, and dtype; the stream then stands at the numbers. ValueError where it is no .npy."""
    with _ONE:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format, where 1.0 and 2.0 are known")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(stream)
    return shape, by_columns, dtype


class Arrays:
    """An `.npz` file of plain arrays: `names`, and `[name]`, which reads that one.

    Raises OSError, ValueError or zipfile.BadZipFile where the file is none, KeyError where it has no such array."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path)
        self.names = [name.removesuffix(".npy") for name in self.zip.namelist()]

    def __getitem__(self, name: str) -> Array:
        with self.zip.open(f"{name}.npy") as stream:
            shape, by_columns, dtype = header(stream)
            if dtype.hasobject:
                raise ValueError(f"{self.zip.filename}: {name} holds objects, not numbers")
            found: Array = np.empty(int(np.prod(shape)), dtype)
            room: Any = memoryview(found.view(np.uint8))  # type: ignore[arg-type]
            into: Any = stream.readinto  # type: ignore[attr-defined]
            while len(room):
                count = into(room)
                if not count:
                    raise ValueError(f"{self.zip.filename}: {name} is cut off")
                room = room[count:]
        return found.reshape(shape, order="F" if by_columns else "C")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self.zip.close()
