"""A set of the catalogue, fetched below a data root: planned and told first, then file after file, then checked."""

from __future__ import annotations

import errno
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leveret.pool import catalogue, jsonfile
from leveret.pool.catalogue import ARCHIVES, DataSet, File
from leveret.pool.fetch import begun, enough, fetch, fetch_hub, full
from leveret.pool.unpack import unpack
from leveret.runs import DataError, EnvironmentFault, Progress, RecipeError, UserError, atomic_write, graceful_stop

MARGIN = 1 << 28
"""Bytes of the disk that stay free."""


@dataclass(frozen=True)
class Planned:
    """One file: of which set, where it goes, and where its archive is laid out."""

    owner: DataSet
    file: File
    path: Path
    into: Path

    @property
    def there(self) -> bool:
        return self.path.is_file()

    @property
    def missing(self) -> int:
        """Bytes still to come, as far as they are known."""
        return 0 if self.there else max(0, (self.file.size or 0) - begun(self.path))


def plan(name: str, root: Path, pictures: bool = True) -> tuple[DataSet, list[Planned]]:
    """A set, and all its files below `root`. RecipeError for a mixture without files of its own, or a `root` that is a
    file."""
    one = catalogue.load(name)
    if not one.files:
        parts = ", ".join(dict.fromkeys(part.data for part in one.sources))
        into = root / (one.data or one.name)
        raise RecipeError(f"{name} is mixed, not fetched: get {parts}, then leveret pool mix {name} -o {into}")
    if root.exists() and not root.is_dir():
        raise RecipeError(f"{root} is a file; what is fetched goes into a folder. Name another.")
    rows = [Planned(owner, file, root / file.path, into) for owner, file, into in catalogue.wanted(one, root, pictures)]
    return one, rows


def facts_of(name: str, root: Path, one: DataSet, rows: list[Planned]) -> dict[str, Any]:
    """What is told before anything is fetched."""
    owners = {row.owner.name: row.owner for row in rows}
    return {
        "name": name,
        "title": one.title,
        "samples": one.counts.samples,
        "counted": one.counts.shown,
        "root": str(root),
        "data": one.data and str(root / one.data),
        "images": str(root / one.images),
        "licences": {owner.name: catalogue.licence_of(owner) for owner in owners.values()},
        "files": [
            {
                "path": row.file.path,
                "of": row.owner.name,
                "from": row.file.url or row.file.by_hand or f"{row.file.hub} (Hugging Face)",
                "bytes": row.file.size,
                "exact": row.file.bytes is not None,
                "sha256": row.file.sha256,
                "state": catalogue.state(row.file, root),
                "by_hand": row.file.by_hand is not None,
            }
            for row in rows
        ],
        "missing_bytes": sum(row.missing for row in rows if row.file.by_hand is None),
        "unknown_sizes": sum(row.file.size is None and not row.there for row in rows if row.file.by_hand is None),
        "by_hand": [
            {"path": row.file.path, "how": row.file.by_hand} for row in rows if row.file.by_hand and not row.there
        ],
        "defects": list(one.defects),
    }


def get(
    name: str,
    root: str | Path,
    *,
    pictures: bool = True,
    lay_out: bool = False,
    urls: bool = False,
    pause: float = 1.0,
) -> dict[str, Any]:
    """Fetch a set below `root` and check it. Returns what `facts_of` tells, with what became of it.

    pictures  also the image sets that it needs. lay_out: unpack the archives (they stay where they are).
    urls      write the pictures' addresses as a parquet for img2dataset, where the set tells them; always done where
              only the addresses are public.

    Files that a person must fetch are left to them, and named. A file that cannot be had does not keep the others from
    coming: all faults are told at the end, by EnvironmentFault, or DataError where one is of the data.
    """
    root = Path(root)
    one, rows = plan(name, root, pictures)
    facts = facts_of(name, root, one, rows)
    todo = [row for row in rows if row.file.by_hand is None and not row.there]
    coming = sum(row.missing for row in todo)
    # Pictures hardly shrink in archives: laid out they take as much again.
    laid = [row for row in rows if row.file.form in ARCHIVES and not _laid_out(row)] if lay_out else []
    needed = coming + sum(row.file.size or 0 for row in laid if row.there or row.file.by_hand is None)
    enough(root, needed + MARGIN if needed else 0)
    faults: list[UserError] = []
    with graceful_stop():
        with Progress(coming or None, f"fetching {name}", "bytes") as progress:
            for row in todo:
                try:
                    _fetch(row, progress, pause)
                except (DataError, EnvironmentFault) as fault:
                    faults.append(fault)
        facts["unpacked"] = _unpack(rows, faults) if lay_out else {}
        facts["notes"] = _notes(rows, facts["unpacked"])
        facts["checked"] = _check(one, root, faults)
        told = one.addresses
        if told is not None and (urls or told.only) and (root / told.file).is_file():
            facts["urls"] = write_urls(one, root)
        elif urls and told is None:
            raise RecipeError(f"{name} does not tell the addresses of its pictures")
    facts["fetched"] = [row.file.path for row in todo if row.there]
    if faults:
        whole = "\n".join(f"  {fault}" for fault in faults)
        count = f"{len(faults)} of the files of {name} could not be had" if len(faults) > 1 else name
        kind = DataError if any(isinstance(fault, DataError) for fault in faults) else EnvironmentFault
        raise kind(f"{count}:\n{whole}" if len(faults) > 1 else str(faults[0]))
    return facts


def _fetch(row: Planned, progress: Progress, pause: float) -> None:
    file = row.file
    had = begun(row.path)
    if file.url is not None:
        fetch(file.url, row.path, size=file.bytes, sha256=file.sha256, told=progress.advance, pause=pause)
        return
    assert file.hub is not None
    name = file.name or Path(file.path).name
    told = {"size": file.bytes, "sha256": file.sha256}
    fetch_hub(file.hub, name, row.path, revision=file.revision, told=lambda size: progress.advance(size - had), **told)  # type: ignore[arg-type]


# --- archives ------------------------------------------------------------------------------------------------------


def _archives(rows: list[Planned]) -> Iterator[list[Planned]]:
    """Archives, each with all its parts: files of one set that are called NAME.part-aa, NAME.part-ab ..."""
    groups: dict[tuple[str, str, Path], list[Planned]] = {}
    for row in rows:
        if row.file.form in ARCHIVES:
            whole = re.sub(r"\.part-?[a-z0-9]+$", "", row.file.path)
            groups.setdefault((row.owner.name, whole, row.into), []).append(row)
    yield from groups.values()


def _notes(rows: list[Planned], unpacked: Mapping[str, Any]) -> list[str]:
    """Where a set of pictures has another number of files than the catalogue tells: no fault, since archives may hold
    more than pictures, but worth a look."""
    notes = []
    for owner in {row.owner.name: row.owner for row in rows}.values():
        groups = [group for group in _archives(rows) if group[0].owner is owner]
        done = [unpacked.get(group[0].file.path, {}) for group in groups]
        if owner.counts.images is None or not done or not all("files" in one for one in done):
            continue
        files = sum(one["files"] for one in done)
        if owner.data is None and files != owner.counts.images:
            notes.append(f"{owner.name}: {files:,} files, the catalogue tells {owner.counts.images:,} pictures")
    return notes


def _laid_out(row: Planned) -> bool:
    return (row.into / f".unpacked-{row.path.name}.json").exists()


def _unpack(rows: list[Planned], faults: list[UserError]) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for group in _archives(rows):
        first = group[0]
        if missing := [row for row in group if not row.there]:
            # Of a file for a person's hands `get` tells anyway; of one that failed, its own fault is told.
            done[first.file.path] = {"missing": len(missing)}
            continue
        try:
            found = unpack([row.path for row in group], first.into, first.file.form, strip=first.file.strip)
        except (DataError, EnvironmentFault) as fault:
            faults.append(fault)
            continue
        except OSError as fault:
            if fault.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            faults.append(full(first.into))
            continue
        done[first.file.path] = {
            "into": str(first.into),
            "files": found.files,
            "written": found.written,
            "refused": dict(found.refused),
        }
    return done


# --- checks --------------------------------------------------------------------------------------------------------


def _check(one: DataSet, root: Path, faults: list[UserError]) -> dict[str, Any]:
    """Count the records of a list that has come, against the catalogue."""
    path = root / one.data if one.data else None
    if path is None or not path.is_file() or one.mapped is not None or path.suffix not in (".json", ".jsonl"):
        return {}
    try:
        records = len(jsonfile.index(path))
    except DataError as fault:
        faults.append(fault)
        return {}
    if one.counts.samples not in (None, records):
        faults.append(
            DataError(f"{path} holds {records:,} records, the catalogue tells {one.counts.samples:,}: fetch it again")
        )
    return {"records": records, "expected": one.counts.samples}


# --- addresses -----------------------------------------------------------------------------------------------------


def write_urls(one: DataSet, root: Path) -> dict[str, Any]:
    """`<list>.urls.parquet` beside the list: url, caption, key, as img2dataset reads them. Records without an address
    are counted; DataError where none has one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    told = one.addresses
    assert told is not None
    path = root / told.file
    out = path.with_name(f"{path.stem}.urls.parquet")
    schema = pa.schema({"url": pa.string(), "caption": pa.string(), "key": pa.string()})
    sink, without, written = io.BytesIO(), 0, 0
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        rows: list[dict[str, str]] = []
        for span in jsonfile.index(path):
            row = _address(jsonfile.read(path, span), one)
            if row is None:
                without += 1
                continue
            rows.append(row)
            if len(rows) == 50_000:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                written, rows = written + len(rows), []
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        written += len(rows)
    if not written:
        raise DataError(f"{path}: none of its {without:,} records has an address under the key {told.url!r}")
    atomic_write(out, sink.getvalue())
    return {"path": str(out), "rows": written, "without": without}


def _address(recorded: bytes, one: DataSet) -> dict[str, str] | None:
    told = one.addresses
    assert told is not None
    try:
        record: Mapping[str, Any] = json.loads(recorded)
        url = record[told.url]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return None
    caption = record.get(told.caption) if told.caption else None
    return {
        "url": url,
        "caption": caption if isinstance(caption, str) else "",
        "key": str(record.get(told.key, "")),
    }
