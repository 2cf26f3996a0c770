"""Write any source as a store: plain tars in WebDataset's form, where every sample is read at its place.

    STORE/000000.tar ...    <number in the source>.jpg (or .0.jpg, .1.jpg ...) and .json: LLaVA's record, with the id
    STORE/index.parquet     one row for each image (one without image for a text-only sample), in the order of the tars
    STORE/quarantine.jsonl  {index, id, image, reason, detail}: what was refused, as `check` does
    STORE/parts/            while it is being written; such a store is not opened

Image bytes are copied as they are. A shard holds what is good of a fixed range of the source, so a run that was killed
goes on with the shard it was at and ends with the same bytes. `open_source(STORE)` gives the same samples again.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from leveret.images import form_of
from leveret.pool.base import Source
from leveret.pool.check import Look, look, too_many
from leveret.pool.llava import record_of
from leveret.runs import (
    Interrupted,
    Progress,
    RunFolder,
    atomic_write,
    cores,
    graceful_stop,
    read_json,
    stop_requested,
    sync_folder,
    write_json,
)

RULES = 1
"""Raise when the same data would be written differently, so that no store is made by two rules."""

WINDOW = 128
"""Samples that are read ahead, and so held, at a time."""

ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}


@dataclass(frozen=True)
class Converted:
    """What became of a source.

    total    its samples; ok (written) + quarantined. reasons: reason -> samples refused for it, most frequent first.
    images   images written. shards: files. size: their bytes.
    """

    total: int
    ok: int
    quarantined: int
    reasons: Mapping[str, int]
    images: int
    shards: int
    size: int
    store: Path


def convert(
    source: Source,
    out: str | Path,
    *,
    shard_size: int = 4096,
    limit_share: float = 0.2,
    workers: int | None = None,
) -> Converted:
    """Write `source` as a store at `out`. Every image is unpacked once, and what `check` refuses is left out.

    shard_size   samples of the source in one tar.
    limit_share  more refused samples than this share of all: `DataError`, as soon as it is certain.
    workers      threads; changes no result.

    On SIGTERM or Ctrl-C: `Interrupted`; the same call goes on. `RecipeError` when `out` holds anything else.
    """
    total = len(source)
    run = RunFolder.open(
        out, "convert", {"source": source.fingerprint(), "samples": total, "shard_size": shard_size, "rules": RULES}
    )
    parts = run.path / "parts"
    if not run.is_done("convert"):
        parts.mkdir(exist_ok=True)
        with graceful_stop():
            _fill(source, run, shard_size, limit_share, workers or cores())
        run.done("convert", **_gather(run, total))
    shutil.rmtree(parts, ignore_errors=True)
    facts = run.facts("convert")
    if facts["quarantined"] > limit_share * total or not facts["ok"]:
        raise too_many(source, facts["reasons"], total, limit_share, run.path / "quarantine.jsonl")
    return Converted(**{name: value for name, value in facts.items() if name != "step"}, store=run.path)


def _fill(source: Source, run: RunFolder, shard_size: int, limit_share: float, workers: int) -> None:
    total = len(source)
    reasons: Counter[str] = Counter()
    with Progress(total, f"converting {source.name}", "samples") as progress, ThreadPoolExecutor(workers) as pool:
        for number, begin in enumerate(range(0, total, shard_size)):
            end = min(begin + shard_size, total)
            part = run.path / "parts" / f"{number:06d}.json"
            if not part.exists():
                shard = _Shard(run.path, number)
                try:
                    for at in range(begin, end, WINDOW):
                        if stop_requested():
                            raise Interrupted(
                                f"convert stopped after {at:,} of {total:,} samples; run it again to go on"
                            )
                        window = range(at, min(at + WINDOW, end))
                        for index, seen in zip(
                            window, pool.map(lambda index: look(source, index), window), strict=True
                        ):
                            shard.add(index, seen)
                        progress.advance(len(window), refused=reasons.total() + len(shard.refused))
                    shard.finish()
                finally:
                    shard.close()
                # After the tar is in its place: a part says that its shard is whole.
                write_json(part, {"rows": shard.rows, "refused": shard.refused, "size": shard.at})
            else:
                progress.advance(end - begin)
            reasons.update(entry["reason"] for entry in read_json(part)["refused"])
            if reasons.total() > limit_share * total:
                quarantine = run.path / "quarantine.jsonl"
                _write_quarantine(run.path, quarantine)
                raise too_many(source, reasons, end, limit_share, quarantine)


class _Shard:
    """One tar while it is written, under a hidden name that becomes its own when it is whole.

    rows  of the index. refused: of the quarantine. at: bytes written.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.name = f"{number:06d}.tar"
        self.path, self._hidden = folder / self.name, folder / f".{self.name}.tmp"
        self._file: IO[bytes] = open(self._hidden, "wb")
        self.rows: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []
        self.at = 0

    def add(self, index: int, seen: Look) -> None:
        """Write a sample, or note why not."""
        self.refused += seen.refused
        if seen.refused or seen.sample is None:
            return
        key, several = f"{index:09d}", len(seen.data) > 1
        places: list[int | None] = [
            self._member(f"{key}{f'.{number}' * several}.{ENDINGS[form_of(data)]}", data)
            for number, data in enumerate(seen.data)
        ]
        record = json.dumps(record_of(seen.sample), ensure_ascii=False).encode()
        words = self._member(f"{key}.json", record)
        for row, place in zip(seen.rows, places or [None], strict=True):
            kept = {name: row[name] for name in ("index", "id", "position", "sha256", "modality", "width", "height")}
            shard = {"shard": self.name, "key": key, "offset": place, "json_offset": words, "json_length": len(record)}
            self.rows.append(kept | shard | {"length": None if place is None else len(seen.data[row["position"]])})

    def _member(self, name: str, data: bytes) -> int:
        """Where the member's bytes begin. No times, owners or rights: the same samples are the same tar."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        head = info.tobuf(tarfile.USTAR_FORMAT)
        self._file.write(head + data + bytes(-len(data) % tarfile.BLOCKSIZE))
        begin = self.at + len(head)
        self.at = begin + len(data) + -len(data) % tarfile.BLOCKSIZE
        return begin

    def finish(self) -> None:
        end = bytes(2 * tarfile.BLOCKSIZE)
        self._file.write(end)
        self.at += len(end)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._hidden, self.path)
        sync_folder(self.path.parent)

    def close(self) -> None:
        """Leave nothing behind of a shard that was not finished."""
        self._file.close()
        self._hidden.unlink(missing_ok=True)


# --- the whole -----------------------------------------------------------------------------------------------------


def _parts(folder: Path) -> list[Path]:
    return sorted((folder / "parts").glob("*.json"))


def _gather(run: RunFolder, total: int) -> dict[str, Any]:
    """Join the parts to the index and the quarantine; returns the counts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, long, whole = pa.string(), pa.int64(), pa.int32()
    schema = pa.schema(
        {"key": text, "id": text, "index": long, "position": whole, "modality": text, "shard": text, "offset": long}
        | {"length": long, "json_offset": long, "json_length": long, "sha256": text, "width": whole, "height": whole}
    )
    reasons: Counter[str] = Counter()
    ok = images = size = 0
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for part in _parts(run.path):
            found = read_json(part)
            reasons.update(entry["reason"] for entry in found["refused"])
            ok += sum(row["position"] == 0 for row in found["rows"])
            images += sum(row["modality"] == "image" for row in found["rows"])
            size += found["size"]
            writer.write_table(pa.Table.from_pylist(found["rows"], schema=schema))
    atomic_write(run.path / "index.parquet", sink.getvalue())
    _write_quarantine(run.path, run.path / "quarantine.jsonl")
    return {
        "total": total,
        "ok": ok,
        "quarantined": reasons.total(),
        "reasons": dict(reasons.most_common()),
        "images": images,
        "shards": len(_parts(run.path)),
        "size": size,
    }


def _write_quarantine(folder: Path, path: Path) -> None:
    entries = [entry for part in _parts(folder) for entry in read_json(part)["refused"]]
    atomic_write(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
