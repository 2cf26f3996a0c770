"""Vectors in files, read in blocks into memory of our own: nothing is mapped, so a run holds what it asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leveret.condense.npy import header
from leveret.condense.rows import Array, Ints
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
            shape, by_columns, dtype = header(file)
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


VECTORS = ("embedding", "embeddings", "image_embedding", "img_emb", "vector", "emb")
"""Names that a parquet column of vectors may have, in the order in which they are looked for."""


@dataclass(frozen=True)
class ParquetShard(Shard):
    """A column of vectors in a parquet file: lists, lists of one length, or raw bytes of one length.

    column  its name. groups: where each row group begins, and the end.
    """

    column: str = ""
    groups: tuple[int, ...] = ()

    def read(self, start: int, stop: int) -> Array:
        """Rows [start, stop); only the row groups that hold them are read. DataError at a row of another width."""
        import pyarrow.parquet as pq

        first = int(np.searchsorted(self.groups, start, side="right")) - 1
        last = int(np.searchsorted(self.groups, max(start, stop - 1), side="right")) - 1
        with pq.ParquetFile(self.path) as file:
            table = file.read_row_groups(list(range(first, last + 1)), columns=[self.column])
        column = table.column(0).slice(start - self.groups[first], stop - start)
        return _numbers(self, column, start)


def _numbers(shard: ParquetShard, column: Any, start: int) -> Array:
    """[n, width] of a column's rows."""
    import pyarrow as pa

    found = []
    for chunk in column.chunks:
        if chunk.null_count:
            place = start + int(np.flatnonzero(chunk.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(f"{shard.path}: row {place:,} of {shard.column!r} is null; every row needs a vector")
        kind = chunk.type
        if pa.types.is_fixed_size_binary(kind):
            flat = np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, kind.byte_width)
            found.append(flat[chunk.offset : chunk.offset + len(chunk)].copy().view(shard.dtype))
            continue
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            lengths, unit = np.diff(_ends(chunk)), shard.row_bytes
            flat = np.frombuffer(chunk.buffers()[2] or b"", np.uint8)[_ends(chunk)[0] : _ends(chunk)[-1]]
            values = flat.copy().view(shard.dtype) if (lengths == unit).all() else None
        else:
            one_length = pa.types.is_fixed_size_list(kind)
            lengths = np.full(len(chunk), kind.list_size) if one_length else np.diff(_ends(chunk))
            unit = shard.width
            values = chunk.flatten().to_numpy(zero_copy_only=False) if (lengths == unit).all() else None
        if values is None:
            place = int(np.flatnonzero(lengths != unit)[0])
            raise DataError(
                f"{shard.path}: row {start + place:,} of {shard.column!r} is {lengths[place]:,} long, "
                f"the first is {unit:,}; all must be of one width"
            )
        found.append(np.ascontiguousarray(values).astype(shard.dtype, copy=False).reshape(-1, shard.width))
        start += len(chunk)
    return np.concatenate(found) if found else np.zeros((0, shard.width), shard.dtype)


def _ends(chunk: Any) -> Array:
    """[n + 1] where each row of a list or binary array begins, and the end."""
    import pyarrow as pa

    large = pa.types.is_large_list(chunk.type) or pa.types.is_large_binary(chunk.type)
    ends = np.frombuffer(chunk.buffers()[1], np.int64 if large else np.int32)
    return ends[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)


def open_parquet(path: Path, column: str | None = None, dtype: str | None = None) -> ParquetShard:
    """The vectors of a parquet file.

    column  its name; one of VECTORS by default. dtype: of a column of bytes, "float16" or "float32" (what its rows
            are cannot be seen; the field's metadata `dtype` is believed). Lists are taken as their own numbers.
    DataError says what is there instead.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, meta = file.schema_arrow, file.metadata
            name = column or next((name for name in VECTORS if name in schema.names), None)
            if name is None or name not in schema.names:
                raise DataError(f"{path}: no column {column or ' or '.join(VECTORS)}; it has {', '.join(schema.names)}")
            sizes = [meta.row_group(place).num_rows for place in range(meta.num_row_groups)]
            field = schema.field(name)
            head = next(file.iter_batches(1, columns=[name])).column(0) if meta.num_rows else None
    except (OSError, pa.ArrowInvalid) as fault:
        raise DataError(f"{path}: not a readable parquet file ({str(fault).splitlines()[0]})") from None
    kind = field.type
    bytes_ = pa.types.is_fixed_size_binary(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    said = dtype or (field.metadata or {}).get(b"dtype", b"").decode()
    if bytes_ and said not in ("float16", "float32"):
        raise DataError(
            f"{path}: {name!r} holds bytes, and nothing says of which numbers; name them (float16 or float32)"
        )
    numbers = said if bytes_ else {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float32"}.get(
        getattr(kind, "value_type", None)
    )  # fmt: skip
    if numbers is None:
        raise DataError(f"{path}: {name!r} is {kind}; allowed are lists of floats, or bytes of float16 or float32")
    width = 0
    if head is not None and head[0].is_valid:
        width = len(head[0].as_py()) // (np.dtype(numbers).itemsize if bytes_ else 1)
    groups = tuple(int(at) for at in np.cumsum([0, *sizes]))
    return ParquetShard(path, groups[-1], width, np.dtype(numbers).str, 0, name, groups)


def scattered(shard: Shard, rows: Ints) -> Array:
    """Vectors of ascending rows, of which there is at least one; those that lie near are read together."""
    if isinstance(shard, ParquetShard):
        apart = np.diff(np.searchsorted(shard.groups, rows, side="right")) != 0
    else:
        near = max(1, NEAR // shard.row_bytes)
        apart = (np.diff(rows) > near) | (np.diff(rows // TOGETHER) != 0)
    found = []
    for some in np.split(rows, np.flatnonzero(apart) + 1):
        first = int(some[0])
        found.append(shard.read(first, int(some[-1]) + 1)[some - first])
    return np.concatenate(found)


NEAR = 1 << 16
"""Bytes between two rows that are rather read than left out: a read of its own takes as long."""

TOGETHER = 4096
"""Rows of a file that are read at once, at most."""
