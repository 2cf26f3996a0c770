"""Columns of rows on disk, in parts that fit in memory: numbers as arrays, ids as bytes end to end."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from leveret.condense.npy import Arrays
from leveret.condense.rows import Array, Ints
from leveret.runs import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Ids:
    """Names of rows: bytes (UTF-8 where they were text), ordered bytewise.

    blob [bytes] uint8: all of them end to end. ends [n + 1] int64: where each begins, and the end.
    """

    blob: NDArray[np.uint8]
    ends: Ints

    def __len__(self) -> int:
        return len(self.ends) - 1

    @classmethod
    def of(cls, names: Iterable[str | bytes]) -> Ids:
        data = [name.encode("utf-8", "surrogatepass") if isinstance(name, str) else name for name in names]
        ends = np.zeros(len(data) + 1, np.int64)
        np.cumsum([len(name) for name in data], out=ends[1:])
        return cls(np.frombuffer(b"".join(data), np.uint8), ends)

    @classmethod
    def from_arrow(cls, column: Any) -> Ids:
        """Of a column of strings, bytes or numbers (these as their digits)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not (pa.types.is_large_binary(column.type) or pa.types.is_binary(column.type)):
            column = pc.cast(column, pa.string())
        column = pc.cast(column, pa.large_binary())
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        _, offsets, data = array.buffers()
        ends = np.frombuffer(offsets, np.int64, len(array) + 1, array.offset * 8)
        blob = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
        return cls(blob[ends[0] : ends[-1]], ends - ends[0])

    def arrow(self) -> pa.LargeBinaryArray:
        import pyarrow as pa

        buffers = [None, pa.py_buffer(np.ascontiguousarray(self.ends)), pa.py_buffer(np.ascontiguousarray(self.blob))]
        return pa.Array.from_buffers(pa.large_binary(), len(self), buffers)

    def __iter__(self) -> Iterator[bytes]:
        data, ends = self.blob.tobytes(), self.ends.tolist()
        return (data[start:stop] for start, stop in pairwise(ends))

    def at(self, positions: Array) -> list[bytes]:
        return list(self.take(positions))

    def text(self) -> pa.StringArray:
        """As text; where bytes are no UTF-8, with a mark in place of what cannot be shown."""
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            return pc.cast(self.arrow(), pa.string())
        except pa.ArrowInvalid:
            return pa.array([name.decode("utf-8", "replace") for name in self], pa.string())

    def take(self, positions: Array) -> Ids:
        import pyarrow as pa

        return Ids.from_arrow(self.arrow().take(pa.array(positions)))

    def part(self, start: int, stop: int) -> Ids:
        ends = self.ends[start : stop + 1]
        return Ids(self.blob[ends[0] : ends[-1]], ends - ends[0])

    @classmethod
    def join(cls, parts: Sequence[Ids]) -> Ids:
        shifts = np.cumsum([0, *(len(part.blob) for part in parts)])
        ends = [part.ends[1:] + shift for part, shift in zip(parts, shifts, strict=False)]
        return cls(np.concatenate([np.zeros(0, np.uint8), *(part.blob for part in parts)]),
                   np.concatenate([np.zeros(1, np.int64), *ends]))  # fmt: skip


def order_of(ids: Ids, *first: Array) -> Ints:
    """Positions sorted by the columns of `first`, then by id (bytewise)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = {f"k{place}": pa.array(values) for place, values in enumerate(first)} | {"id": ids.arrow()}
    keys = [(name, "ascending") for name in columns]
    found: Ints = pc.sort_indices(pa.table(columns), sort_keys=keys).to_numpy().astype(np.int64)
    return found


def save(path: Path, columns: dict[str, Array | Ids]) -> None:
    """Writes a part, whole or not at all."""
    arrays: dict[str, Array] = {}
    for name, column in columns.items():
        if isinstance(column, Ids):
            arrays[f"{name}.blob"], arrays[f"{name}.ends"] = column.blob, column.ends
        else:
            arrays[name] = column
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    atomic_write(path, buffer.getvalue())


def load(path: Path, *names: str) -> list[Any]:
    """Some columns of a part; the others are not read."""
    with Arrays(path) as file:
        return [
            Ids(file[f"{name}.blob"], file[f"{name}.ends"]) if f"{name}.blob" in file.names else file[name]
            for name in names
        ]
