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

from leveret.condense.against import MET
from leveret.condense.columns import Ids, load
from leveret.condense.engine import kept
from leveret.condense.folder import Embeddings
from leveret.condense.rows import Array, Ints
from leveret.condense.steps import State
from leveret.condense.working import ALIVE, Part, Rows
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
    def of(cls, embeddings: Embeddings, state: State, stages: list[Stage]) -> Ledger:
        """All rows at once, from the parts on disk: for pools whose columns fit in memory."""
        n = len(embeddings)
        place = np.full(embeddings.length, -1, np.int64)
        place[embeddings.index] = np.arange(n)
        fate, columns, words = np.zeros(n, np.int32), dict[str, Array](), list[tuple[str, str]]()
        for rows in (*state.earlier, state.rows):
            first = len(words) + 1
            reasons = {
                label: ("exact copy", "near copy") if "same" in rows.made_by(label) else ("",) for label in rows.judged
            }
            words += [(label, reason) for label in rows.judged for reason in reasons[label]]
            begins = first + np.cumsum([0, *(len(reasons[label]) for label in rows.judged)])
            for part in rows.parts:
                where = place[part.read("row")[0]]
                dropped = rows.fate(part)
                gone = np.flatnonzero(dropped)
                fates = begins[dropped[gone] - 1]
                if "same" in rows.columns:
                    same = rows.column("same", part)[gone]
                    fates = fates + (
                        np.array([len(reasons[rows.judged[d - 1]]) > 1 for d in dropped[gone]], bool) & ~same
                    )
                fate[where[gone]] = fates
                for name in LOOKED_AT:
                    if name in rows.columns or name in part.names():
                        values = rows.column(name, part)
                        if name in ("component", "keeper"):
                            values = np.where(values >= 0, place[values], -1)
                        if name not in columns:
                            columns[name] = np.full(n, _FILL.get(values.dtype.kind, 0), values.dtype)
                        columns[name][where] = values
        for name, filler in LOOKED_AT.items():  # a chain without rows, or without a step that makes it
            columns.setdefault(name, np.full(n, filler))
        columns["representative"] = columns.pop("keeper")
        facts = {} if state.centroids is None else {"centroids": state.centroids}
        return cls(embeddings, fate, columns, facts, stages, words)

    def kept(self) -> NDArray[np.int64]:
        """Row numbers of what is kept, in the order of the source."""
        rows = np.flatnonzero(self.fate == KEPT)
        return rows[np.argsort(self.embeddings.index[rows], kind="stable")]


_FILL = {"i": -1, "f": np.nan}
LOOKED_AT = {
    "score": np.nan, "hash": np.uint64(0), "cluster": -1, "centroid_cosine": np.nan, "component": -1,
    "component_size": -1, "keeper": -1,
}  # fmt: skip
"""Columns that the report looks at, and what stands where there are none."""

# --- on disk -------------------------------------------------------------------------------------------------------


def write_ledger(state: State, refused: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """`folder/*.parquet`: one row per sample of the source, refused ones too, in parts.

    index (position in the source), id; cluster, component (id of its member whose id comes first), component_size,
    keeper (id of the member that stays), score, centroid_similarity: null where no step made them; verdict: the label
    of the step that dropped it, `read`, or `kept`; reason: more about it, or empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generations = (*state.earlier, state.rows)
    for rows in generations:
        for part in rows.parts:
            path = folder / f"{rows.generation:02d}-{part.number:06d}.parquet"
            if not path.exists():
                _write_part(rows, part, path, whole=rows is state.rows)
    if refused:
        import pyarrow as pa

        n = len(refused)
        known = {
            "index": pa.array([line["index"] for line in refused], pa.int64()),
            "id": pa.array([str(line.get("id", "")) for line in refused], pa.string()),
            "verdict": pa.array(["read"] * n),
            "reason": pa.array([str(line["reason"]) for line in refused]),
        }
        _write_table(
            {name: known.get(name, pa.nulls(n, kind)) for name, kind in _kinds().items()}, folder / "refused.parquet"
        )


def _kinds() -> dict[str, Any]:
    import pyarrow as pa

    text = pa.string()
    return {
        "index": pa.int64(), "id": text, "cluster": pa.int32(), "component": text, "component_size": pa.int64(),
        "keeper": text, "score": pa.float64(), "centroid_similarity": pa.float64(), "verdict": text, "reason": text,
    }  # fmt: skip


def _write_part(rows: Rows, part: Part, path: Path, *, whole: bool) -> None:
    import pyarrow as pa

    fate = rows.fate(part)
    told = np.arange(part.n) if whole else np.flatnonzero(fate != ALIVE)
    fate = fate[told]

    def column(name: str) -> Any:
        if name not in rows.columns and name not in part.names():
            return None
        found = rows.column(name, part)
        return found.take(told) if isinstance(found, Ids) else found[told]

    def text(ids: Ids | None, present: Array | None = None) -> Any:
        if ids is None:
            return pa.nulls(len(told), pa.string())
        return pa.array(_texts(ids), pa.string(), mask=None if present is None else ~present)

    def numbers(name: str, kind: Any) -> Any:
        found = column(name)
        if found is None:
            return pa.nulls(len(told), kind)
        return pa.array(found, kind, mask=np.isnan(found) if found.dtype.kind == "f" else found < 0)

    grouped = column("component")
    present = None if grouped is None else grouped >= 0
    same, several = column("same"), np.array([False, *("same" in rows.made_by(label) for label in rows.judged)])
    reasons = np.full(len(told), "", object)
    if same is not None:
        reasons[several[fate]] = np.where(same[several[fate]], "exact copy", "near copy")
    verdicts = np.array(["kept", *rows.judged], object)
    kinds = _kinds()
    _write_table(
        {
            "index": pa.array(column("row")),
            "id": text(column("id")),
            "cluster": numbers("cluster", kinds["cluster"]),
            "component": text(column("component_id"), present),
            "component_size": numbers("component_size", kinds["component_size"]),
            "keeper": text(column("keeper_id"), present),
            "score": numbers("score", kinds["score"]),
            "centroid_similarity": numbers("centroid_cosine", kinds["centroid_similarity"]),
            "verdict": pa.array(verdicts[fate], pa.string()),
            "reason": pa.array(reasons, pa.string()),
        },
        path,
    )


def _write_table(columns: Mapping[str, Any], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), buffer)
    atomic_write(path, buffer.getvalue())


def write_ids(state: State, path: Path) -> Ints:
    """`coreset.parquet`: id and index of what is kept, in the order of the source. Returns the indices."""
    import pyarrow as pa

    found = list(kept(state.rows))
    row = np.concatenate([np.zeros(0, np.int64), *(part for part, _ in found)])
    names = [name for _, ids in found for name in _texts(ids)]
    order = np.argsort(row, kind="stable")
    _write_table({"id": pa.array([names[at] for at in order.tolist()], pa.string()), "index": row[order]}, path)
    return row[order]


def write_contaminated(state: State, names: Sequence[str], path: Path) -> None:
    """`contaminated.parquet`: what was dropped because of a benchmark, in the order of the source.

    id; benchmark (of `names`), benchmark_id and cosine of its nearest image.
    """
    import pyarrow as pa

    rows = (state.earlier or (state.rows,))[0]
    index, number, cosine = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    ids, met = list[str](), list[str]()
    for part in rows.parts:
        label = rows.columns["benchmark"]
        gone, which, name, near = load(rows.place(label, part), "dropped", *MET)
        row, own = part.read("row", "id")
        places = np.flatnonzero(gone)
        for column, values in ((index, row), (number, which), (cosine, near)):
            column.append(values[places])
        ids += _texts(own.take(places))
        met += _texts(name.take(places))
    order = np.argsort(np.concatenate(index), kind="stable")
    numbers = np.concatenate(number)[order]
    _write_table(
        {
            "id": pa.array([ids[at] for at in order.tolist()], pa.string()),
            "benchmark": pa.array([names[at] for at in numbers.tolist()], pa.string()),
            "benchmark_id": pa.array([met[at] for at in order.tolist()], pa.string()),
            "cosine": np.concatenate(cosine)[order],
        },
        path,
    )


def _texts(ids: Ids) -> list[str]:
    return [name.decode("utf-8", "surrogateescape") for name in ids.at(np.arange(len(ids)))]


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
