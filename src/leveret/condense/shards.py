"""Vectors in files, read in blocks into memory of our own: nothing is mapped, so a run holds what it asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from leveret.condense.rows import Array
from leveret.runs import DataError


@dataclass(frozen=True)
class Shard:
    """A `.npy` file of rows, or raw numbers of the same kind.

    n, width, dtype  rows, numbers a row, their kind. offset: bytes before the first row.
    """

    path: Path
    n: int
    width: int
    dtype: str
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        return self.width * np.dtype(self.dtype).itemsize

    def read(self, start: int, stop: int) -> Array:
        """Rows [start, stop) as stored. DataError where the file ends before them."""
        count = (stop - start) * self.width
        found = np.fromfile(self.path, self.dtype, count, offset=self.offset + start * self.row_bytes)
        if len(found) < count:
            raise DataError(f"{self.path} ends after row {start + len(found) // self.width:,} of {self.n:,}")
        return found.reshape(-1, self.width)


def open_npy(path: Path) -> Shard:
    """A `.npy` file of float16 or float32 rows. DataError says what else it is."""
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(file)
            offset = file.tell()
    except (OSError, ValueError) as fault:
        raise DataError(f"{path}: not a readable .npy file ({fault})") from None
    if len(shape) != 2 or dtype not in (np.float16, np.float32) or by_columns:
        kind = f"{dtype} of shape {shape}{', stored by columns' if by_columns else ''}"
        raise DataError(f"{path}: {kind}; allowed are float16 or float32 [rows, width], stored by rows")
    shard = Shard(path, int(shape[0]), int(shape[1]), dtype.str, offset)
    there = (path.stat().st_size - offset) // max(1, shard.row_bytes)
    if there < shard.n:
        raise DataError(f"{path}: cut off; it should hold {shard.n:,} rows and holds {there:,}")
    return shard
