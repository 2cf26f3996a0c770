"""Walk a whole source once: what is wrong goes to a quarantine with its reason, what is right to an index.

    OUT/index.parquet     one row for each image (one without image for a text-only or malformed sample)
    OUT/quarantine.jsonl  {index, id, image, reason, detail}: every sample that is refused
    OUT/checked.json      the counts, and what they were made from
    OUT/parts/            finished blocks; only while the walk is not

Killed at any moment, the same call goes on after the last finished block and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from leveret.images import ImageFault, decode, read_bytes
from leveret.pool.base import SampleFault, Source, first_of
from leveret.records import Sample
from leveret.runs import (
    DataError,
    Interrupted,
    Progress,
    RecipeError,
    atomic_write,
    cores,
    graceful_stop,
    in_words,
    read_json,
    stop_requested,
    write_json,
)

BLOCK = 1024
"""Samples of a block, the unit of resuming."""

_SLICE = 16
"""Samples a thread takes at a time: few enough that a stop is obeyed at once."""

_RULES = 1
"""Raise when the same data would be judged or written differently, so that what older versions left is not reused."""


@dataclass(frozen=True)
class Checked:
    """What a check found.

    total       samples of the source; ok + quarantined.
    reasons     reason -> samples refused for it, the most frequent first.
    images      images of the samples that are ok. text_only: samples without one.
    duplicates  samples whose id an earlier sample has. They are kept: an id is a name, not a key.
    index, quarantine  the files written.
    """

    total: int
    ok: int
    quarantined: int
    reasons: Mapping[str, int]
    images: int
    text_only: int
    duplicates: int
    index: Path
    quarantine: Path

    @property
    def share(self) -> float:
        """Refused samples / all samples."""
        return self.quarantined / self.total


def check(
    source: Source,
    out: str | Path,
    *,
    decode: bool = True,
    limit_share: float = 0.2,
    workers: int | None = None,
) -> Checked:
    """Look at every sample of `source`; never stops at a single one. Results do not depend on `workers`.

    decode       unpack every image. False: records are judged and files must exist, but no file is opened (sha256,
                 width and height stay empty).
    limit_share  more refused samples than this share of all: `DataError`, as soon as it is certain. What was found by
                 then stands in the quarantine, and a higher limit goes on from there.
    workers      threads; one per core by default (Pillow decodes outside the interpreter's lock).

    A source with the same `fingerprint()` is not walked again. On SIGTERM or Ctrl-C: `Interrupted`, resumable.
    `RecipeError` when `out` holds anything but an earlier check.
    """
    if not 0 <= limit_share <= 1:
        raise DataError(f"limit_share is {limit_share}; allowed is a share from 0 to 1.")
    out = Path(out)
    _refuse_strangers(out)
    parts = out / "parts"
    with graceful_stop():
        key = {"rules": _RULES, "fingerprint": source.fingerprint(), "decode": decode, "total": len(source)}
        checked = _finished(out, key)
        if checked is None:
            if _read(parts / "key.json") != key:
                shutil.rmtree(parts, ignore_errors=True)
                parts.mkdir(parents=True)
                write_json(parts / "key.json", key)
            for stale in ("checked.json", "index.parquet", "quarantine.jsonl"):
                (out / stale).unlink(missing_ok=True)
            _walk(source, parts, decode, limit_share, workers or cores())
            checked = _gather(out, parts, key)
        shutil.rmtree(parts, ignore_errors=True)
    if checked.quarantined > limit_share * checked.total:
        raise too_many(source, checked.reasons, checked.total, limit_share, checked.quarantine)
    return checked


def _refuse_strangers(out: Path) -> None:
    """RecipeError when `out` is a file, or a folder that holds something else: a photo folder, another run."""
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out} is a file; the output of `pool check` is a folder. Name another with -o.")
    found = sorted(path.name for path in out.iterdir() if path.name[0] != ".") if out.is_dir() else []
    if strangers := [name for name in found if name not in _OURS]:
        raise RecipeError(
            f"{out} holds no check of a pool (it holds {', '.join(strangers[:5])}{', ...' * (len(strangers) > 5)}). "
            "Name a new or empty folder with -o."
        )


_OURS = ("index.parquet", "quarantine.jsonl", "checked.json", "parts")


def _walk(source: Source, parts: Path, unpack: bool, limit_share: float, workers: int) -> None:
    total = len(source)
    reasons: Counter[str] = Counter()
    with Progress(total, f"checking {source.name}", "samples") as progress, ThreadPoolExecutor(workers) as pool:
        for begin in range(0, total, BLOCK):
            end = min(begin + BLOCK, total)
            part = parts / f"{begin // BLOCK:07d}.json"
            if (block := _read(part)) is None:
                block = {"rows": [], "refused": []}
                slices = [range(at, min(at + _SLICE, end)) for at in range(begin, end, _SLICE)]
                looks = pool.map(lambda indices: [look(source, index, unpack)[2:] for index in indices], slices)
                for indices, found in zip(slices, looks, strict=True):
                    for rows, refused in found:
                        block["rows"] += rows
                        block["refused"] += refused
                    progress.advance(len(indices), refused=reasons.total() + len(block["refused"]))
                    if stop_requested():
                        pool.shutdown(cancel_futures=True)
                        raise Interrupted(
                            f"check stopped after {indices[-1] + 1} of {total} samples; run it again to go on"
                        )
                write_json(part, block)
            else:
                progress.advance(end - begin)
            reasons.update(entry["reason"] for entry in block["refused"])
            if reasons.total() > limit_share * total:
                quarantine = parts.parent / "quarantine.jsonl"
                _write_quarantine(parts, quarantine)
                raise too_many(source, reasons, end, limit_share, quarantine)


# --- one sample ----------------------------------------------------------------------------------------------------


_Row = dict[str, Any]


class Look(NamedTuple):
    """What one sample is found to be: itself (None if it cannot be read), the bytes of its images as far as they are
    good, its rows of the index (all ok, or none), and its entry of the quarantine, if any."""

    sample: Sample | None
    data: list[bytes]
    rows: list[_Row]
    refused: list[dict[str, Any]]


def look(source: Source, index: int, unpack: bool = True) -> Look:
    """Judge one sample: its record, and its images by unpacking them (or by being there)."""
    try:
        sample = source.sample(index)
    except SampleFault as fault:
        entry = entry_of(index, fault)
        return Look(None, [], [_row(index, fault.id, 0, fault.image or None, ok=False)], [entry])
    return look_at(source, index, sample, unpack)


def look_at(source: Source, index: int, sample: Sample, unpack: bool = True) -> Look:
    """Judge the images of a sample whose record is good."""
    if not sample.images:
        return Look(sample, [], [_row(index, sample.id, 0, None, modality="text")], [])
    rows, refused, whole = [], [], []
    for position, ref in enumerate(sample.images):
        name = source.root.name(ref)
        sha256, width, height = None, None, None
        try:
            if unpack:
                data = read_bytes(ref)
                sha256 = hashlib.sha256(data).hexdigest()
                width, height = decode(data).size
                whole.append(data)
            elif not Path(ref.path).is_file():
                raise ImageFault("missing")
        except ImageFault as fault:
            refused.append(_entry(index, sample.id, name, f"image {fault.reason}", fault.detail))
        rows.append(_row(index, sample.id, position, name, sha256=sha256, width=width, height=height))
    if refused:
        rows = [row | {"ok": False} for row in rows]
    return Look(
        sample, whole, rows, refused[:1]
    )  # one entry a sample, so that entries are samples: the first of its bad images


def _row(index: int, id: str, position: int, image: str | None, **facts: Any) -> _Row:
    row = {"index": index, "id": printable(id), "position": position, "image": image and printable(image)}
    return row | {"sha256": None, "modality": "image", "width": None, "height": None, "ok": True} | facts


def entry_of(index: int, fault: SampleFault) -> dict[str, Any]:
    """A line of the quarantine."""
    return _entry(index, fault.id, fault.image, fault.reason, fault.detail)


def _entry(index: int, id: str, image: str, reason: str, detail: str) -> dict[str, Any]:
    texts = {"id": id, "image": image, "reason": reason, "detail": detail}
    return {"index": index} | {name: printable(text) for name, text in texts.items()}


def printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


# --- files ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """The JSON at `path`; None if there is none. (Files here are written atomically: none is torn.)"""
    return read_json(path) if path.exists() else None


def _gather(out: Path, parts: Path, key: dict[str, Any]) -> Checked:
    """Join the blocks; `checked.json` is written last and says that the rest is whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, whole = pa.string(), pa.int32()
    types = {"index": pa.int64(), "id": text, "position": whole, "image": text, "sha256": text, "modality": text}
    schema = pa.schema({**types, "width": whole, "height": whole, "ok": pa.bool_()})
    reasons: Counter[str] = Counter()
    ids: set[bytes] = set()
    ok = images = text_only = duplicates = 0
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        pending: list[_Row] = []
        for part in _parts(parts):
            block = read_json(part)
            reasons.update(entry["reason"] for entry in block["refused"])
            for row in block["rows"]:
                images += row["ok"] and row["modality"] == "image"
                if row["position"] == 0:
                    ok += row["ok"]
                    text_only += row["ok"] and row["modality"] == "text"
                    # 16 bytes of a hash instead of ids as long as paths.
                    name = hashlib.blake2b(row["id"].encode(), digest_size=16).digest()
                    duplicates += bool(row["id"]) and name in ids
                    ids.add(name)
            pending += block["rows"]
            if len(pending) >= 64 * BLOCK:
                writer.write_table(pa.Table.from_pylist(pending, schema=schema))
                pending = []
        writer.write_table(pa.Table.from_pylist(pending, schema=schema))
    atomic_write(out / "index.parquet", sink.getvalue())
    _write_quarantine(parts, out / "quarantine.jsonl")
    counts = {
        "total": key["total"],
        "ok": ok,
        "quarantined": reasons.total(),
        "reasons": dict(reasons.most_common()),
        "images": images,
        "text_only": text_only,
        "duplicates": duplicates,
    }
    write_json(out / "checked.json", {"key": key, "counts": counts})
    return Checked(**counts, index=out / "index.parquet", quarantine=out / "quarantine.jsonl")


def _finished(out: Path, key: dict[str, Any]) -> Checked | None:
    """What an earlier check of the same data found, if all of it is there."""
    made = _read(out / "checked.json")
    index, quarantine = out / "index.parquet", out / "quarantine.jsonl"
    if not made or made["key"] != key or not index.exists() or not quarantine.exists():
        return None
    return Checked(**made["counts"], index=index, quarantine=quarantine)


def _write_quarantine(parts: Path, path: Path) -> None:
    entries = (entry for part in _parts(parts) for entry in read_json(part)["refused"])
    atomic_write(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def _parts(parts: Path) -> list[Path]:
    return sorted(path for path in parts.glob("*.json") if path.stem.isdigit())


def too_many(source: Source, reasons: Mapping[str, int], seen: int, limit_share: float, quarantine: Path) -> DataError:
    """The error that says how many are refused, for what, and what to do."""
    total = len(source)
    return DataError(
        f"{sum(reasons.values()):,} of {'the first ' * (seen < total)}{seen:,} samples"
        f"{f' (of {total:,})' * (seen < total)} are refused, more than the limit of {limit_share:.0%} of all: "
        f"{in_words(reasons)}.{first_of(quarantine)}"
        f"{source.advice(reasons, seen)} Each is named in {quarantine}. Mend the data, or raise the limit "
        "(--limit-share)."
    )
