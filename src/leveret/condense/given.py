"""Embeddings as they are given, ours or anyone's, read a part at a time.

    FOLDER/img_emb/img_emb_N.npy      clip-retrieval's layout: vectors, one file a shard; beside them
           metadata/metadata_N.parquet    a row a vector: id or key, score, ...
           text_emb/text_emb_N.npy        captions' vectors, where no score is given
    FILE.parquet, FOLDER/*.parquet    a column of vectors, and the others in the same file
    FILE.npy, FOLDER/*.npy            vectors alone; a row's id is its number

Files are taken in the order of their numbers, else of their names; no rule depends on it.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from leveret.condense.columns import Ids
from leveret.condense.rows import Array, Doubles, Ints, cosines
from leveret.condense.shards import ParquetShard, Shard, open_npy, open_parquet, scattered
from leveret.pool.folder import ENDINGS, TABLES
from leveret.runs import DataError, read_json

IDS = ("id", "key", "uid", "sample_id", "image_path", "image", "url")
SCORES = ("score", "similarity", "clip_score")
"""Names that a column of ids, and of image-text scores, may have, in the order in which they are looked for."""

IMAGES = ("image", "image_path", "file_name", "url")
CAPTIONS = ("caption", "text", "TEXT")
"""The same for the image and the caption that are told of a row that is kept or shown."""

VECTORS = (".npy", ".parquet")
"""Files of vectors that may lie bare in a folder."""

BLOCK = 65_536
"""Rows of metadata that are read together."""


class Told(NamedTuple):
    """What the metadata say of a row: empty where they say nothing, but for the id, which is then its number."""

    id: str
    image: str
    caption: str


@dataclass(frozen=True)
class File:
    """One shard and what belongs to it. metadata: a parquet file with a row a vector, or None. text: captions' vectors.
    first: number of its first row among all rows."""

    shard: Shard
    metadata: Path | None
    text: Shard | None
    first: int


@dataclass(frozen=True)
class Given:
    """All files. id, score, told (id, image, caption): names of the metadata's columns, None where there are none.

    A row's place is its number among the rows of all files.
    """

    path: Path
    files: tuple[File, ...]
    id: str | None
    score: str | None
    told: tuple[str | None, str | None, str | None]

    def __len__(self) -> int:
        return sum(file.shard.n for file in self.files)

    @property
    def shards(self) -> list[Shard]:
        return [file.shard for file in self.files]

    @property
    def has_scores(self) -> bool:
        return self.score is not None or all(file.text is not None for file in self.files)

    def columns(self, number: int, start: int, stop: int) -> tuple[Ids, Doubles | None]:
        """Ids and scores of rows [start, stop) of file `number`. DataError at an id that is missing."""
        import pyarrow as pa

        file = self.files[number]
        wanted = [name for name in (self.id, self.score) if name is not None]
        table = _slice(file.metadata, wanted, start, stop) if file.metadata is not None and wanted else None
        if self.id is None or table is None:
            ids = Ids.of(str(file.first + row) for row in range(start, stop))
        else:
            column = table.column(self.id)
            if column.null_count:
                row = start + int(np.flatnonzero(column.is_null().to_numpy())[0])
                raise DataError(f"{file.metadata}: row {row:,} has no {self.id}; every row needs one of its own")
            try:
                ids = Ids.from_arrow(column)
            except pa.ArrowException:
                raise DataError(
                    f"{file.metadata}: the column {self.id} is {column.type}; ids are texts or numbers"
                ) from None
        if self.score is not None and table is not None:
            try:
                scores: Doubles = table.column(self.score).to_numpy().astype(np.float64)
            except (ValueError, TypeError):
                told = table.column(self.score).type
                raise DataError(f"{file.metadata}: the column {self.score} is {told}; scores are numbers") from None
        elif file.text is not None:
            scores = cosines(file.shard.read(start, stop), file.text.read(start, stop))
        else:
            return ids, None
        wrong = np.flatnonzero(~np.isfinite(scores))
        if len(wrong):
            where = file.metadata if self.score is not None or file.text is None else file.text.path
            raise DataError(f"{where}: row {start + int(wrong[0]):,} has score {scores[wrong[0]]}; each needs a number")
        return ids, scores

    def words(self, places: Ints) -> Iterator[Told]:
        """What is told of rows, in the order of `places`. Ascending ones cost one pass over the row groups that hold
        them, and BLOCK rows are held at once."""
        names = list(dict.fromkeys(name for name in self.told if name is not None))
        for file, rows in self._by_file(places):
            if file.metadata is None or not names:
                yield from (Told(str(file.first + row), "", "") for row in rows.tolist())
                continue
            for found, batch in _some(file.metadata, names, rows):
                ids, images, captions = (
                    None if name is None else ["" if value is None else str(value) for value in batch[name].to_pylist()]
                    for name in self.told
                )
                nothing = [""] * len(found)
                yield from map(
                    Told,
                    ids or [str(file.first + row) for row in found.tolist()],
                    images or nothing,
                    captions or nothing,
                )

    def vectors(self, places: Ints) -> Array:
        """[n, width] as stored, in the order of `places`, of which there is at least one. Of a column of vectors each
        row group that holds any is read once."""
        order = np.argsort(places, kind="stable")
        found = np.concatenate([scattered(file.shard, rows) for file, rows in self._by_file(places[order])])
        out = np.empty_like(found)
        out[order] = found
        return out

    def _by_file(self, places: Ints) -> Iterator[tuple[File, Ints]]:
        """Runs of ascending rows of one file, in the order of `places`; rows are counted from the file's first."""
        if not len(places):
            return
        number = np.searchsorted([file.first for file in self.files], places, side="right") - 1
        cuts = np.flatnonzero((np.diff(number) != 0) | (np.diff(places) <= 0)) + 1
        for run, at in zip(np.split(places, cuts), number[np.r_[0, cuts]].tolist(), strict=True):
            yield self.files[at], run - self.files[at].first

    def made_by(self) -> dict[str, str]:
        """{"encoder": its id, "weights": its fingerprint} where the embeddings say so, as ours do."""
        file = self.path / "manifest.json"
        manifest = read_json(file) if file.is_file() else {}
        return {name: str(manifest[name]) for name in ("encoder", "weights") if name in manifest}

    def fingerprint(self) -> str:
        """Hex digest of names and sizes of all files, the metadata's and 16 samples of 64 KiB of each file's bytes.

        Reads little even of terabytes; a change of single vectors between the samples is not seen.
        """
        digest = hashlib.sha256(b"leveret embeddings 2\n")
        for file in self.files:
            paths = dict.fromkeys([file.shard.path, file.metadata, file.text.path if file.text else None])
            for path in paths:
                if path is None:
                    continue
                size = path.stat().st_size
                digest.update(f"{path.name} {size}\n".encode())
                with open(path, "rb") as stream:
                    for part in range(16):
                        stream.seek(size * part // 16)
                        digest.update(stream.read(65536))
        return digest.hexdigest()


def is_given(path: str | Path) -> bool:
    """Whether a path is embeddings and no pool: `.npy`, parquet with a column of vectors, or a folder of these (not one
    that holds more photos than such files, or a table of captions: photos may have anything beside them)."""
    path = Path(path)
    if path.is_dir():
        return (path / "img_emb").is_dir() or (
            not _is_of_photos(path) and (any(path.glob("*.npy")) or _is_vectors(next(path.glob("*.parquet"), None)))
        )
    return path.suffix == ".npy" or _is_vectors(path if path.suffix == ".parquet" else None)


def _is_of_photos(folder: Path) -> bool:
    photos = vectors = 0
    with os.scandir(folder) as entries:
        for name in (entry.name for entry in entries if entry.name[0] != "."):
            if name in TABLES:
                return True
            ending = os.path.splitext(name)[1].lower()
            photos, vectors = photos + (ending in ENDINGS), vectors + (ending in VECTORS)
    return photos > vectors


def _is_vectors(path: Path | None) -> bool:
    if path is None or not path.is_file():
        return False
    try:
        open_parquet(path, dtype="float32")
    except DataError:
        return False
    return True


def numbered(folder: Path, kind: str, ending: str) -> list[Path]:
    """`folder/kind/kind_<number><ending>` in the order of the numbers."""
    found = []
    for file in (folder / kind).glob(f"{kind}_*{ending}"):
        if number := re.fullmatch(rf"{kind}_(\d+)", file.name.removesuffix(ending)):
            found.append((int(number[1]), file))
    return [file for _, file in sorted(found)]


def open_given(path: str | Path, *, column: str | None = None, dtype: str | None = None) -> Given:
    """Opens embeddings; nothing but headers and metadata is read.

    column, dtype  of vectors in parquet (`shards.open_parquet`).
    DataError names the file that is missing, damaged, or does not fit the others.
    """
    path = Path(path)
    if (
        (path / "recipe.yaml").is_file()
        and list((path / "done").glob("shard_*"))
        and not (path / "done/embed.json").exists()
    ):
        raise DataError(f"{path} was not embedded to its end: run the same `leveret embed` again, and it goes on")
    if (path / "img_emb").is_dir():
        return _retrieval(path)
    files = [path] if path.is_file() else sorted([*path.glob("*.npy"), *path.glob("*.parquet")])
    if not files:
        raise DataError(f"{path}: no img_emb/img_emb_<number>.npy, no .npy and no .parquet; a folder of embeddings has")
    endings = {file.suffix for file in files}
    if endings == {".npy"}:
        return _checked(path, [open_npy(file) for file in files], [None] * len(files), [None] * len(files))
    if endings == {".parquet"}:
        opened = [open_parquet(file, column, dtype) for file in files]
        return _checked(path, opened, list(files), [None] * len(files))
    raise DataError(f"{path}: {', '.join(sorted(endings))} together; embeddings are all .npy or all .parquet")


def _retrieval(path: Path) -> Given:
    images, texts = ([open_npy(file) for file in numbered(path, kind, ".npy")] for kind in ("img_emb", "text_emb"))
    metas = numbered(path, "metadata", ".parquet")
    if not images:
        raise DataError(f"{path}: there is no img_emb/img_emb_<number>.npy; a folder of embeddings holds at least one")
    if metas and len(metas) != len(images):
        raise DataError(f"{path}: {len(images)} files in img_emb and {len(metas)} in metadata; they must go in pairs")
    if texts and [(shard.n, shard.width) for shard in texts] != [(shard.n, shard.width) for shard in images]:
        raise DataError(f"{path}: the shapes in text_emb differ from those in img_emb; they must go in pairs")
    return _checked(path, images, metas or [None] * len(images), texts or [None] * len(images))


def _checked(path: Path, shards: Sequence[Shard], metas: Sequence[Path | None], texts: Sequence[Shard | None]) -> Given:
    """All files of one width and one kind of number, metadata of the same length, the same columns in all of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    full = [shard for shard in shards if shard.n]
    for shard in full:
        for what in ("width", "dtype"):
            if getattr(shard, what) != getattr(full[0], what):
                raise DataError(
                    f"{shard.path}: {what} {getattr(shard, what)}, and {getattr(full[0], what)} in {full[0].path}; "
                    "all vectors of one set must be alike"
                )
    names: list[set[str]] = []
    for shard, meta in zip(shards, metas, strict=True):
        if meta is None:
            continue
        try:
            with pq.ParquetFile(meta) as file:
                rows, columns = file.metadata.num_rows, set(file.schema_arrow.names)
        except (OSError, pa.ArrowInvalid) as fault:
            raise DataError(f"{meta}: not a readable parquet file ({str(fault).splitlines()[0]})") from None
        if rows != shard.n:
            raise DataError(f"{meta} has {rows:,} rows, and its vectors in {shard.path.name} are {shard.n:,}")
        names.append(columns - ({shard.column} if isinstance(shard, ParquetShard) else set()))
    common = set.intersection(*names) if names else set()
    first, files = 0, []
    for shard, meta, text in zip(shards, metas, texts, strict=True):
        if shard.n:
            files.append(File(shard, meta, text, first))
        first += shard.n
    id, score, image, caption = (
        next((name for name in known if name in common), None) for known in (IDS, SCORES, IMAGES, CAPTIONS)
    )
    for what, known, found in (("ids", IDS, id), ("scores", SCORES, score)):
        some = [at for at, there in enumerate(names) if there & set(known)]
        if found is None and some:
            there = ", ".join(sorted(names[some[0]] & set(known)))
            raise DataError(
                f"{path}: {len(some)} of {len(names)} files have {what} ({there}) and others have none of that name; "
                f"give all of them one column: {', '.join(known)}"
            )
    return Given(path, tuple(files), id, score, (id, image, caption))


def _ends(file: Any) -> Ints:
    """[groups + 1] where each row group of an open parquet file begins, and the end."""
    sizes = [file.metadata.row_group(place).num_rows for place in range(file.metadata.num_row_groups)]
    return np.cumsum([0, *sizes])


def _slice(path: Path, names: Sequence[str], start: int, stop: int) -> Any:
    """Rows [start, stop) of some columns; only the row groups that hold them are read."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        ends = _ends(file)
    first = int(np.searchsorted(ends, start, side="right")) - 1
    last = int(np.searchsorted(ends, max(start, stop - 1), side="right")) - 1
    with _one_reads:  # whoever comes second finds what the first has read
        groups = _groups(path, path.stat().st_mtime_ns, tuple(names), first, last)
    return groups.slice(start - int(ends[first]), stop - start)


def let_go() -> None:
    """Frees what the last reader of metadata left for the next."""
    _groups.cache_clear()


_one_reads = threading.Lock()


@lru_cache(maxsize=1)
def _groups(path: Path, changed: int, names: tuple[str, ...], first: int, last: int) -> Any:
    """Some columns of row groups. Kept until others are asked for: rows are taken in parts that are smaller than the
    groups that most writers make."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_groups(list(range(first, last + 1)), columns=list(names))


def _some(path: Path, names: Sequence[str], rows: Ints) -> Iterator[tuple[Ints, Any]]:
    """Some columns of ascending rows, block by block: (which rows, a record batch of them). Only the row groups that
    hold any are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        ends = _ends(file)
        for group in np.unique(np.searchsorted(ends, rows, side="right") - 1).tolist():
            start = int(ends[group])
            for batch in file.iter_batches(BLOCK, row_groups=[group], columns=list(names)):
                a, b = np.searchsorted(rows, (start, start + batch.num_rows))
                if a < b:
                    yield rows[a:b], batch.take(pa.array(rows[a:b] - start))
                start += batch.num_rows
