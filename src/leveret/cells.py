"""Cells of parquet and Arrow files.

Parquet cannot be read by the row: a row group is read once, its needed columns only, and kept for a while. Whoever
reads rows in order pays for each row group once; in a random order nearly every image costs a row group, which is what
converting to tars is for.

Arrow's stream format can: the file is mapped, the places of its record batches are found once by hopping from header to
header, and of an image no bytes but its own are read.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from leveret.runs import UserError

if TYPE_CHECKING:
    import numpy as np

    Mark = tuple[int, int]
    """Size and time of change: a file that was written anew is another file."""


class Unreadable(Exception):
    """A file that is there and is not of its format, or a part of it that cannot be unpacked."""


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
    return _held(rows(path, group, (leaf,), IMAGES).column(column)[row - int(starts[group])], place)


def _held(cell: Any, place: int) -> bytes | None:
    if place >= 0:
        if not cell.is_valid or place >= len(cell):
            raise Unreadable(f"there is no entry {place}")
        cell = cell[place]
    held = cell["bytes"] if cell.is_valid else None
    return held.as_buffer().to_pybytes() if held is not None and held.is_valid else None


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`. Raises as `rows`, also for what is found broken inside the block."""
    import pyarrow.parquet as pq

    with _checked(), pq.ParquetFile(path) as file:
        yield file


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


# --- Arrow streams -------------------------------------------------------------------------------------------------

END = b"\xff\xff\xff\xff\0\0\0\0"
"""How a stream ends that was written to its end."""


class Stream(NamedTuple):
    """A mapped file. schema: pyarrow's. loose: the same with bytes for text. starts: int64 [batches + 1], the first row
    of every record batch and the number of rows. offsets: int64 [batches], their first bytes."""

    data: Any
    schema: Any
    loose: Any
    starts: np.ndarray
    offsets: np.ndarray


def stream(path: str | os.PathLike[str]) -> Stream:
    """The record batches of an Arrow file in stream format. `OSError` as the system says, `Unreadable` if it is of
    another format, cut off, or has dictionaries (its batches cannot be read one by one)."""
    path = os.fspath(path)
    return _stream(path, _mark(path))


def batch(path: str | os.PathLike[str], number: int) -> Any:
    """Record batch `number`, checked but for its texts' encoding. Raises as `stream`."""
    path = os.fspath(path)
    mark = _mark(path)
    found = _stream(path, mark)
    return IMAGES.get((path, mark, number), lambda: _batch(found, number))


def mapped_image(path: str, column: str, row: int, place: int = -1) -> bytes | None:
    """As `image`, of an Arrow file."""
    found = stream(path)
    if found.schema.get_field_index(column) < 0 or not 0 <= row < found.starts[-1]:
        raise Unreadable(f"{path} has no cell {row} of {column}")
    number = int(found.starts.searchsorted(row, side="right")) - 1
    cell = batch(path, number).column(column)[row - int(found.starts[number])]
    try:
        return _held(cell, place)
    except (TypeError, KeyError, AttributeError):
        raise Unreadable(f"{column} holds no images") from None


@lru_cache(maxsize=1024)
def _stream(path: str, mark: Mark) -> Stream:
    import numpy as np
    import pyarrow as pa

    if not mark[0]:
        raise Unreadable("no bytes")  # nothing can be mapped
    with _checked(), pa.memory_map(path) as file:
        data = file.read_buffer()  # outlives the file: a map without an open file each
        reader = pa.BufferReader(data)
        schema = pa.ipc.read_schema(reader)
        starts, offsets = [0], []
        while True:
            at = reader.tell()
            try:
                message = pa.ipc.read_message(reader)
            except EOFError:
                break
            if message.type != "record batch":
                raise Unreadable(f"a {message.type} at byte {at}")
            offsets.append(at)
            starts.append(starts[-1] + pa.ipc.read_record_batch(message, schema).num_rows)
        if data[at : at + len(END)].to_pybytes() != END:
            raise Unreadable(f"it stops at byte {at}")
        loose = pa.schema([pa.field(field.name, _loose(field.type), field.nullable) for field in schema])
    return Stream(data, schema, loose, np.array(starts, np.int64), np.array(offsets, np.int64))


def _batch(found: Stream, number: int) -> Any:
    import pyarrow as pa

    with _checked():
        message = pa.ipc.read_message(pa.BufferReader(found.data[int(found.offsets[number]) :]))
        # Offsets that lead out of the map would end the process, so all are looked at. Not so the bytes of images; and
        # as bytes the texts, so that one that is no UTF-8 is refused alone.
        pa.ipc.read_record_batch(message, found.loose).validate(full=True)
        return pa.ipc.read_record_batch(message, found.schema)


def _loose(kind: Any) -> Any:
    """The type with bytes in place of text, which lies in a file in the same way."""
    import pyarrow as pa

    is_ = pa.types
    if is_.is_string(kind) or is_.is_large_string(kind):
        return pa.binary() if is_.is_string(kind) else pa.large_binary()
    if is_.is_struct(kind):
        return pa.struct([pa.field(field.name, _loose(field.type), field.nullable) for field in kind])
    if is_.is_fixed_size_list(kind):
        return pa.list_(_loose(kind.value_type), kind.list_size)
    if is_.is_list(kind) or is_.is_large_list(kind):
        return (pa.list_ if is_.is_list(kind) else pa.large_list)(_loose(kind.value_type))
    return kind


@contextmanager
def _checked() -> Iterator[None]:
    """Arrow's faults are `Unreadable`; the system's own go on, and so do ours."""
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError, OverflowError) as fault:
        if isinstance(fault, OSError) and fault.errno is not None:
            raise  # no such file, no right
        raise Unreadable(type(fault).__name__) from None
