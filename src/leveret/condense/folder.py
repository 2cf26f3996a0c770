"""A folder of embeddings in clip-retrieval's layout, ours or anyone's, and reading it back.

img_emb/img_emb_0.npy       [rows, width] float16 or float32, each row of length 1
text_emb/text_emb_0.npy     the same for captions (optional)
metadata/metadata_0.parquet one row per vector: id (or key), image path, caption, score
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from leveret.condense.table import Array, Shop, Vectors, dots
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


def is_embeddings(path: str | Path) -> bool:
    """Whether a path is a folder of embeddings (it holds `img_emb`)."""
    return (Path(path) / "img_emb").is_dir()


def shards(path: Path, kind: str, ending: str) -> list[Path]:
    """`path/kind/kind_<number><ending>` in the order of the numbers."""
    found = []
    for file in (path / kind).glob(f"{kind}_*{ending}"):
        if number := re.fullmatch(rf"{kind}_(\d+)", file.name.removesuffix(ending)):
            found.append((int(number[1]), file))
    return [file for _, file in sorted(found)]


def open_embeddings(path: str | Path) -> Embeddings:
    """Open a folder; vectors stay on disk. DataError names the file that is missing, or does not fit the others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    files = shards(path, "img_emb", ".npy")
    if not files:
        raise DataError(f"{path}: there is no img_emb/img_emb_<number>.npy; a folder of embeddings holds at least one")
    arrays = [_open_npy(file) for file in files]
    widths = {int(array.shape[1]) for array in arrays}
    if len(widths) > 1:
        raise DataError(f"{path}/img_emb: vectors of several widths ({', '.join(map(str, sorted(widths)))}) in one set")
    metas = shards(path, "metadata", ".parquet")
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
    files = shards(path, "text_emb", ".npy")
    if not files:
        return None
    texts = [_open_npy(file) for file in files]
    if [array.shape for array in texts] != [array.shape for array in images]:
        raise DataError(f"{path}: the shapes in text_emb differ from those in img_emb; they must go in pairs")
    return np.concatenate([dots(text, image) for text, image in zip(texts, images, strict=True)])


def check_vectors(vectors: Vectors, shop: Shop) -> None:
    """DataError at the first row that is not finite or not of length 1: a product would then be no cosine."""

    def look(start: int) -> str:
        rows = np.arange(start, min(start + 65536, vectors.n))
        lengths = np.sqrt(np.square(vectors.take(rows)).sum(1))
        wrong = np.flatnonzero(~(np.abs(lengths - 1) <= OFF_LENGTH))  # NaN is wrong too
        return f"row {rows[wrong[0]]} has length {lengths[wrong[0]]:.4g}" if len(wrong) else ""

    for fault in shop.map(look, range(0, vectors.n, 65536)):
        if fault:
            raise DataError(f"{fault}; every vector must have length 1 (within {OFF_LENGTH}). Normalise them first.")


def fingerprint(path: str | Path) -> str:
    """Hex digest of a folder: names and sizes of all files, the metadata, and 16 samples of 64 KiB of each `.npy`.

    Reads little even of terabytes; a change of single vectors between the samples is not seen.
    """
    path = Path(path)
    digest = hashlib.sha256(b"leveret embeddings 1\n")
    for kind, ending in (("img_emb", ".npy"), ("text_emb", ".npy"), ("metadata", ".parquet")):
        for file in shards(path, kind, ending):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with open(file, "rb") as stream:
                for part in range(16):
                    stream.seek(size * part // 16)
                    digest.update(stream.read(65536))
    return digest.hexdigest()
