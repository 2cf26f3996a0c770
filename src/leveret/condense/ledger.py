"""What became of every sample: one parquet row each, and the list of those that were kept."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leveret.condense.folder import Embeddings
from leveret.condense.table import Array, Table, Verdict
from leveret.pool import Source
from leveret.pool.llava import record_of
from leveret.records import ImageRef, Sample
from leveret.runs import atomic_write

KEPT = 0
"""Fate of a row that no step dropped."""


@dataclass
class Stage:
    """One step that has run: how many rows came and went, and what it noted."""

    label: str
    step: str
    before: int
    after: int
    reasons: tuple[str, ...]
    notes: Mapping[str, Any]


@dataclass
class Ledger:
    """The state of all rows while steps run, and the record of it after.

    fate     [n] int32: 0 while a row is alive; else 1 + position in `words` of (step's label, reason).
    columns  name -> [n]; a row that a step never saw holds that column's filler.
    """

    embeddings: Embeddings
    fate: NDArray[np.int32]
    columns: dict[str, Array]
    facts: dict[str, Array] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    words: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def begin(cls, embeddings: Embeddings, hashes: NDArray[np.uint64]) -> Ledger:
        columns: dict[str, Array] = {"hash": hashes}
        if embeddings.score is not None:
            columns["score"] = embeddings.score
        return cls(embeddings, np.zeros(len(embeddings), np.int32), columns)

    def table(self) -> Table:
        """The rows that are alive."""
        rows = np.flatnonzero(self.fate == KEPT).astype(np.int64)
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Table(rows, columns, self.embeddings.vectors, self.facts)

    def enter(self, label: str, step: str, table: Table, verdict: Verdict) -> None:
        """Write a verdict down."""
        for name, values in verdict.columns.items():
            column = np.full(len(self.fate), _FILL.get(values.dtype.kind, 0), values.dtype)
            column[table.rows] = values
            self.columns[name] = column
        self.facts |= dict(verdict.facts)
        first = len(self.words) + 1
        self.words += [(label, reason) for reason in verdict.reasons]
        dropped = table.rows[~verdict.keep]
        self.fate[dropped] = first + verdict.reason[~verdict.keep].astype(np.int32)
        after = int(verdict.keep.sum())
        self.stages.append(Stage(label, step, len(table), after, verdict.reasons, verdict.notes))

    def kept(self) -> NDArray[np.int64]:
        """Row numbers of what is kept, in the order of the source."""
        rows = np.flatnonzero(self.fate == KEPT)
        return rows[np.argsort(self.embeddings.index[rows], kind="stable")]


_FILL = {"i": -1, "f": np.nan}

COLUMNS = ("cluster", "component", "component_size", "representative", "score", "centroid_cosine")


def write_ledger(ledger: Ledger, path: Path) -> None:
    """One row per sample of the source, in its order, refused ones too.

    index, id; cluster, component (index of its first member), component_size, representative (index of the kept
    member), score, centroid_cosine (null where no step made them); step and reason of its fate; kept.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    embeddings = ledger.embeddings
    n, refused = len(embeddings), embeddings.refused
    index = np.concatenate([embeddings.index, np.array([line["index"] for line in refused], np.int64)])
    order = np.argsort(index, kind="stable")

    def column(values: Array, present: NDArray[np.bool_], kind: pa.DataType) -> pa.Array:
        values = np.concatenate([values, np.zeros(len(refused), values.dtype)])[order]
        present = np.concatenate([present, np.zeros(len(refused), bool)])[order]
        return pa.array(values, kind, mask=~present)

    data: dict[str, pa.Array] = {"index": pa.array(index[order])}
    ids = [*embeddings.ids, *(str(line.get("id", "")) for line in refused)]
    data["id"] = pa.array([ids[at] for at in order.tolist()], pa.string())
    for name in COLUMNS:
        values = ledger.columns.get(name)
        floats = name in ("score", "centroid_cosine")
        if values is None:
            values = np.full(n, np.nan if floats else -1)
        present = ~np.isnan(values) if floats else values >= 0
        if name in ("component", "representative"):
            values = np.where(present, embeddings.index[np.where(present, values, 0).astype(np.int64)] if n else 0, -1)
        kind = pa.float64() if floats else pa.int32() if name == "cluster" else pa.int64()
        data[name] = column(values.astype(np.float64 if floats else np.int64), present, kind)
    words = [("", "kept"), *ledger.words]
    steps = [words[fate][0] for fate in ledger.fate.tolist()] + ["read"] * len(refused)
    reasons = [words[fate][1] for fate in ledger.fate.tolist()] + [str(line["reason"]) for line in refused]
    text = pa.dictionary(pa.int32(), pa.string())
    data["step"] = pa.array([steps[at] for at in order.tolist()], pa.string()).cast(text)
    data["reason"] = pa.array([reasons[at] for at in order.tolist()], pa.string()).cast(text)
    data["kept"] = pa.array(np.concatenate([ledger.fate == KEPT, np.zeros(len(refused), bool)])[order])
    buffer = io.BytesIO()
    pq.write_table(pa.table(data), buffer, row_group_size=1 << 20)
    atomic_write(path, buffer.getvalue())


# --- the coreset ---------------------------------------------------------------------------------------------------


def _record(sample: Sample, name: Callable[[ImageRef], str]) -> dict[str, Any]:
    images = [name(ref) for ref in sample.images]
    record: dict[str, Any] = {"id": sample.id}
    if images:
        record["image"] = images[0] if len(images) == 1 else images
    return record | {key: value for key, value in record_of(sample).items() if key not in record}


def records(ledger: Ledger, source: Source | None, images: Path | None) -> Sequence[dict[str, Any]]:
    """LLaVA records of what is kept, in the order of the source, image paths relative to its root.

    From the source where there is one (conversations stay whole); else a caption pair from the folder's metadata.
    """
    rows = ledger.kept()
    if source is not None:

        def name(ref: ImageRef) -> str:
            return ref.path if ref.kind == "data" else source.root.name(ref)

        return [_record(source.sample(int(index)), name) for index in ledger.embeddings.index[rows]]
    found = []
    for row in rows.tolist():
        path = ledger.embeddings.images[row]
        if images is not None and Path(path).is_absolute() and Path(path).is_relative_to(images):
            path = Path(path).relative_to(images).as_posix()
        found.append(
            {
                "id": ledger.embeddings.ids[row],
                "image": path,
                "conversations": [
                    {"from": "human", "value": "<image>"},
                    {"from": "gpt", "value": ledger.embeddings.captions[row]},
                ],
            }
        )
    return found


def write_coreset(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A JSON list, one record a line, so that it can be read by eye and compared line by line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in found)
    atomic_write(path, f"[\n{lines}\n]\n" if lines else "[]\n")
