"""Cells of parquet files: a row group is read once, its needed columns only, and kept for a while.

Parquet cannot be read by the row. Whoever reads rows in order pays for each row group once; in a random order nearly
every image costs a row group, which is what converting to tars is for.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from leveret.runs import UserError

if TYPE_CHECKING:
    import numpy as np

    Mark = tuple[int, int]
    """Size and time of change: a file that was written anew is another file."""


class Unreadable(Exception):
    """A file that is there and is no parquet, or a part of it that cannot be unpacked."""


class _Kept:
    """What was read last, up to `most` bytes; the newest always. Threads that want the same wait for one reading."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._slots: OrderedDict[Any, _Slot] = OrderedDict()

    def get(self, key: Any, read: Callable[[], Any]) -> Any:
        with self._lock:
            slot = self._slots.setdefault(key, _Slot())
            self._slots.move_to_end(key)
        with slot.lock:
            if slot.table is None:
                slot.table = read()
                with self._lock:
                    slot.size = slot.table.nbytes
                    while len(self._slots) > 1 and sum(kept.size for kept in self._slots.values()) > self.most:
                        self._slots.popitem(last=False)
            return slot.table


class _Slot:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.table: Any = None
        self.size = 0


WORDS = _Kept(128 * 2**20)
IMAGES = _Kept(512 * 2**20)
"""Two, so that a row group of images does not push out the words that are asked for beside it."""


def rows(path: str | os.PathLike[str], group: int, columns: tuple[str, ...], kept: _Kept = WORDS) -> Any:
    """Table of the leaf columns (`images.list.element.path`) of one row group.

    `OSError` if the file is not there or may not be read, `Unreadable` if it is broken.
    """
    path = os.fspath(path)
    return kept.get((path, _mark(path), group, columns), lambda: _read(path, group, columns))


def image(path: str, column: str, row: int, place: int = -1) -> bytes | None:
    """Bytes of the image in row `row` (over all row groups) of a column of `struct<bytes, path>`; where the column
    holds lists, of entry `place`. None if the cell has no bytes. Raises as `rows`, and `Unreadable` where there is no
    such cell."""
    starts, leaves = _plan(path, _mark(path))
    leaf = next((leaf for leaf in leaves if leaf.startswith(f"{column}.") and leaf.endswith(".bytes")), None)
    if leaf is None or not 0 <= row < starts[-1]:
        raise Unreadable(f"{path} has no cell {row} of {column}")
    group = int(starts.searchsorted(row, side="right")) - 1
    cell = rows(path, group, (leaf,), IMAGES).column(column)[row - int(starts[group])]
    if place >= 0:
        if not cell.is_valid or place >= len(cell):
            raise Unreadable(f"{path} has no entry {place} in row {row} of {column}")
        cell = cell[place]
    held = cell["bytes"] if cell.is_valid else None
    return held.as_buffer().to_pybytes() if held is not None and held.is_valid else None


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`. Raises as `rows`, also for what is found broken inside the block."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as fault:
        if isinstance(fault, OSError) and fault.errno is not None:
            raise  # no such file, no right: the system's own
        raise Unreadable(type(fault).__name__) from None


def _mark(path: str) -> Mark:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1024)
def _plan(path: str, mark: Mark) -> tuple[np.ndarray, tuple[str, ...]]:
    """First row of every row group and the number of rows (int64 [groups + 1]), and the paths of the leaf columns."""
    import numpy as np

    with opened(path) as file:
        facts = file.metadata
        lengths = [facts.row_group(group).num_rows for group in range(facts.num_row_groups)]
        leaves = tuple(facts.schema.column(number).path for number in range(facts.num_columns))
    return np.cumsum([0, *lengths], dtype=np.int64), leaves


def _read(path: str, group: int, columns: tuple[str, ...]) -> Any:
    with opened(path) as file:
        # One thread: several row groups are read side by side by those who ask for them.
        table = file.read_row_group(group, columns=list(columns), use_threads=False)
        if table.num_rows != file.metadata.row_group(group).num_rows:
            raise Unreadable(f"{table.num_rows} rows")
    return table
