"""A finished coreset for who reads it next: tars ready for training, or a filter in front of a loader that exists.

    store      tars with their images, as `pool convert` writes them           CORESET -> OUT/00000.tar ...
    filter     OUT, a .npy of sorted 128-bit hashes of the kept ids            `sample["__key__"] in Kept(OUT)`
    datacomp   OUT, a .npy of sorted 128-bit uids, as DataComp's resharder wants them
    text       OUT, an id a line

The ids themselves are in CORESET/coreset.parquet, the LLaVA records in CORESET/coreset.json.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from leveret.condense.pipeline import finished
from leveret.runs import DataError, RecipeError, atomic_file, atomic_write, closest

MADE_BY = "`leveret coreset export CORESET --as filter -o FILE.npy` makes one"
PAIR = np.dtype([("f0", "<u8"), ("f1", "<u8")])
"""128 bits as DataComp writes them: the upper and the lower half."""


def export(path: str | Path, out: str | Path, kind: str = "store", **how: Any) -> dict[str, Any]:
    """Writes the coreset at `path` as `kind` (a row of KINDS) to `out`; returns what was written.

    how  for `store`: what `pool.convert` takes. Raises RecipeError for another kind, DataError where `path` is no
    finished coreset, or its ids or records are not of that kind.
    """
    if kind not in KINDS:
        near = closest(kind, KINDS)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(f"export as {kind!r}: allowed are {', '.join(KINDS)}.{hint}")
    manifest = finished(Path(path))
    return KINDS[kind].write(Path(path), Path(out), manifest, how)


class Kept:
    """The kept ids of a coreset, for a filter: `id in Kept("filter.npy")`, or of many at once: `kept.mask(ids)`.

    Takes 16 bytes an id, mapped from the file and shared by all workers of a loader; a look-up is a binary search.
    Two ids share a hash with a chance of 2^-128.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.hashes = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as fault:
            raise DataError(
                f"{path}: not a filter ({fault}); `leveret coreset export --as filter` writes one"
            ) from None
        if self.hashes.dtype != PAIR or self.hashes.ndim != 1:
            raise DataError(f"{path}: {self.hashes.dtype} of shape {self.hashes.shape} is no filter; {MADE_BY}")

    def __len__(self) -> int:
        return len(self.hashes)

    def __contains__(self, id: str | bytes) -> bool:
        return bool(self.mask([id])[0])

    def mask(self, ids: Iterable[str | bytes]) -> np.ndarray:
        """[n] bool: which of some ids are kept."""
        asked = _hashes(id if isinstance(id, bytes) else id.encode("utf-8", "surrogatepass") for id in ids)
        upper = self.hashes["f0"]
        at = np.searchsorted(upper, asked["f0"])
        found = np.zeros(len(asked), np.bool_)
        while True:  # one step, but for ids whose upper halves are the same
            inside = np.flatnonzero(at < len(upper))
            inside = inside[upper[at[inside]] == asked["f0"][inside]]
            if not len(inside):
                return found
            found[inside] |= self.hashes["f1"][at[inside]] == asked["f1"][inside]
            at[inside] += 1
            at[found] = len(upper)


def _hashes(ids: Iterable[bytes]) -> np.ndarray:
    data = b"".join(blake2b(id, digest_size=16).digest() for id in ids)
    return np.frombuffer(data, PAIR)


def _ids(path: Path) -> Iterator[str]:
    """The kept ids in the order of the source."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path / "coreset.parquet") as file:
        for batch in file.iter_batches(65_536, columns=["id"]):
            yield from batch.column(0).to_pylist()


def _store(path: Path, out: Path, manifest: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    from leveret.pool import convert, open_source

    if manifest["pool"] is None and manifest["images"] is None:
        raise DataError(
            f"{path} was made of embeddings without images, so there is nothing to write into tars. Condense with "
            "--images FOLDER where their image paths start from; or export a filter and keep your loader."
        )
    root = manifest["images"]
    if root is None:
        root = open_source(manifest["pool"], None).root.path
    made = convert(open_source(path / "coreset.json", root), out, **how)
    return {"out": str(made.store), "samples": made.ok, "refused": made.quarantined, "tars": made.shards}


def _filter(path: Path, out: Path, manifest: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    return _save(out, _hashes(id.encode("utf-8", "surrogatepass") for id in _ids(path)))


def _datacomp(path: Path, out: Path, manifest: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    found = []
    for id in _ids(path):
        if not re.fullmatch("[0-9a-f]{32}", id):
            raise DataError(f"{path}: the id {id[:60]!r} is no DataComp uid (32 hexadecimal digits); export a filter")
        found.append((int(id[:16], 16), int(id[16:], 16)))
    return _save(out, np.array(found, PAIR))


def _text(path: Path, out: Path, manifest: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    count = 0
    with atomic_file(out) as file:
        for id in _ids(path):
            if "\n" in id or "\r" in id:
                raise DataError(
                    f"{path}: the id {id[:60]!r} holds a line break; export a filter, or read coreset.parquet"
                )
            file.write(f"{id}\n".encode())
            count += 1
    return {"out": str(out), "ids": count}


def _save(out: Path, pairs: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, np.sort(pairs, order=("f0", "f1")), allow_pickle=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, buffer.getvalue())
    return {"out": str(out), "ids": len(pairs)}


@dataclass(frozen=True)
class Kind:
    """A form of export. write: (coreset, out, its manifest, options) -> what was written."""

    write: Callable[[Path, Path, dict[str, Any], dict[str, Any]], dict[str, Any]]
    about: str


KINDS: dict[str, Kind] = {
    "store": Kind(_store, "tars with their images, ready for training"),
    "filter": Kind(_filter, "a .npy of hashes, for leveret.condense.export.Kept in front of any loader"),
    "datacomp": Kind(_datacomp, "a .npy of uids, for DataComp's resharder"),
    "text": Kind(_text, "an id a line"),
}
