"""A folder of embeddings in clip-retrieval's layout, opened whole: names, captions and pictures, looked up by row.

img_emb/img_emb_0.npy       [rows, width] float16 or float32, each row of length 1
text_emb/text_emb_0.npy     the same for captions (optional)
metadata/metadata_0.parquet one row per vector: id (or key), image path, caption, score
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from leveret.condense.given import numbered
from leveret.condense.rows import Array, Ints, cosines
from leveret.runs import DataError, read_json, read_jsonl

if TYPE_CHECKING:
    import pyarrow as pa

ID_COLUMNS = ("id", "key", "uid", "sample_id")
IMAGE_COLUMNS = ("image", "image_path", "file_name", "url")
CAPTION_COLUMNS = ("caption", "text", "TEXT")
SCORE_COLUMNS = ("score", "similarity", "clip_score")
"""Names that a metadata column may have, in the order in which they are looked for."""

OFF_LENGTH = 0.01
"""How far from 1 a vector's length may be: float16 rounding gives 5e-4; anything larger is not a unit vector."""


class Vectors:
    """The unit vectors of all rows, in shards that stay on disk (memory-mapped) and are read in blocks.

    n, width   rows and numbers per row. Rows are numbered through all shards in their order.
    """

    def __init__(self, shards: Sequence[Array]) -> None:
        self.shards = [shard for shard in shards if len(shard)] or list(shards[:1])
        self.bounds = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self.n = int(self.bounds[-1])
        self.width = int(self.shards[0].shape[1]) if self.shards else 0

    def raw(self, rows: Ints) -> Array:
        """The stored numbers of `rows` (any order, repeats allowed), in their own dtype: [len(rows), width]."""
        if len(rows) and np.all(rows[1:] >= rows[:-1]):
            cuts = np.searchsorted(rows, self.bounds)
            parts = [
                shard[rows[a:b] - base]
                for shard, base, a, b in zip(self.shards, self.bounds[:-1], cuts[:-1], cuts[1:], strict=True)
                if b > a
            ]
            return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
        if not len(rows):
            dtype = self.shards[0].dtype if self.shards else np.float32
            return np.zeros((0, self.width), dtype)
        order = np.argsort(rows, kind="stable")
        out = np.empty((len(rows), self.width), self.shards[0].dtype)
        out[order] = self.raw(rows[order])
        return out

    def take(self, rows: Ints) -> NDArray[np.float32]:
        """The vectors of `rows` as float32 [len(rows), width]; float16 widens without loss."""
        return self.raw(rows).astype(np.float32, copy=False)


@dataclass
class Embeddings:
    """Vectors with what is known of each row.

    index   [n] int64: position in the source (the row number where the folder does not say).
    score   [n] float64 image-text cosine, or None.
    length  of the source: rows that were refused are index values that do not occur.
    """

    path: Path
    vectors: Vectors
    index: NDArray[np.int64]
    ids: Sequence[str]
    images: Sequence[str]
    captions: Sequence[str]
    score: NDArray[np.float64] | None
    length: int
    encoder: str
    refused: list[dict[str, Any]]

    def __len__(self) -> int:
        return self.vectors.n


def open_embeddings(path: str | Path) -> Embeddings:
    """Open a folder; vectors stay on disk. DataError names the file that is missing, or does not fit the others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    files = numbered(path, "img_emb", ".npy")
    if not files:
        raise DataError(f"{path}: there is no img_emb/img_emb_<number>.npy; a folder of embeddings holds at least one")
    arrays = [_open_npy(file) for file in files]
    widths = {int(array.shape[1]) for array in arrays}
    if len(widths) > 1:
        raise DataError(f"{path}/img_emb: vectors of several widths ({', '.join(map(str, sorted(widths)))}) in one set")
    metas = numbered(path, "metadata", ".parquet")
    if metas and len(metas) != len(files):
        raise DataError(f"{path}: {len(files)} files in img_emb and {len(metas)} in metadata; they must go in pairs")
    tables = []
    for file, array in zip(metas, arrays, strict=False):
        try:
            table = pq.read_table(file)
        except (OSError, pa.ArrowInvalid) as fault:
            raise DataError(f"{file}: not a readable parquet file ({str(fault).splitlines()[0]})") from None
        if table.num_rows != len(array):
            raise DataError(f"{file} has {table.num_rows:,} rows, and its vectors are {len(array):,}")
        tables.append(table)
    n = sum(map(len, arrays))
    manifest = read_json(path / "manifest.json") if (path / "manifest.json").is_file() else {}
    numbers = [str(row) for row in range(n)]
    ids = _words(tables, ID_COLUMNS) or _words(tables, IMAGE_COLUMNS) or numbers
    index = _numbers(tables, ("index",), np.int64)
    if index is not None and len(np.unique(index)) < n:
        index = None  # someone else's column of that name, counted anew in each file
    score = _numbers(tables, SCORE_COLUMNS, np.float64)
    if score is None:
        score = _from_texts(path, arrays)
    if score is not None and len(score) and np.isnan(score).all():
        score = None
    refused = read_jsonl(path / "quarantine.jsonl") if (path / "quarantine.jsonl").is_file() else []
    return Embeddings(
        path=path,
        vectors=Vectors(arrays),
        index=np.arange(n, dtype=np.int64) if index is None else index,
        ids=ids,
        images=_words(tables, IMAGE_COLUMNS) or [""] * n,
        captions=_words(tables, CAPTION_COLUMNS) or [""] * n,
        score=score,
        length=int(manifest.get("length", n)),
        encoder=str(manifest.get("encoder", "made elsewhere")),
        refused=refused,
    )


def _open_npy(file: Path) -> Array:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as fault:
        # An empty shard cannot be mapped; anything else is damaged.
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, OSError, EOFError):
            raise DataError(f"{file}: not a readable .npy file ({fault})") from None
    if array.ndim != 2 or array.dtype not in (np.float16, np.float32):
        raise DataError(f"{file}: {array.dtype} of shape {array.shape}; allowed are float16 or float32 [rows, width]")
    return array


def _column(tables: Sequence[pa.Table], names: Sequence[str]) -> list[Any] | None:
    name = next((name for name in names if tables and all(name in table.column_names for table in tables)), None)
    return None if name is None else [table.column(name) for table in tables]


def _words(tables: Sequence[pa.Table], names: Sequence[str]) -> list[str] | None:
    columns = _column(tables, names)
    if columns is None:
        return None
    return ["" if value is None else str(value) for column in columns for value in column.to_pylist()]


def _numbers(tables: Sequence[pa.Table], names: Sequence[str], dtype: Any) -> Array | None:
    columns = _column(tables, names)
    if columns is None:
        return None
    return np.concatenate([column.to_numpy(zero_copy_only=False) for column in columns] or [[]]).astype(dtype)


def _from_texts(path: Path, images: Sequence[Array]) -> NDArray[np.float64] | None:
    """Image-text cosines in float64 from stored caption vectors, as the published pipeline takes them."""
    files = numbered(path, "text_emb", ".npy")
    if not files:
        return None
    texts = [_open_npy(file) for file in files]
    if [array.shape for array in texts] != [array.shape for array in images]:
        raise DataError(f"{path}: the shapes in text_emb differ from those in img_emb; they must go in pairs")
    return np.concatenate([cosines(text, image) for text, image in zip(texts, images, strict=True)])
