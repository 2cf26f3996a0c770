"""What became of every sample: one parquet row each, and the list of those that were kept."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from leveret.condense.against import MET
from leveret.condense.columns import Ids, load
from leveret.condense.engine import kept
from leveret.condense.given import Given
from leveret.condense.lloyd import Map, finish
from leveret.condense.ranks import cut_at, hash_keys
from leveret.condense.rows import Array, Ints
from leveret.condense.steps import State
from leveret.condense.working import ALIVE, Part, Rows
from leveret.pool import Source
from leveret.pool.llava import record_of
from leveret.records import ImageRef, Sample
from leveret.runs import atomic_file, atomic_write


@dataclass
class Stage:
    """One step that has run: how many rows came and went, and what it noted."""

    label: str
    step: str
    before: int
    after: int
    notes: Mapping[str, Any]


# --- a part of it, in memory ---------------------------------------------------------------------------------------

SALT = 9
"""Of the order that an excerpt is drawn in; no other has it."""


@dataclass(frozen=True)
class Excerpt:
    """Rows of the ledger that a report is made of: all, or of many those whose ids' hashes come first in an order of
    their own. So it does not hang on files, steps or the seed.

    total    rows there are in all.
    row      [n] int64, ascending: numbers in the source. place: [n] int64, numbers among the embeddings.
    hash     [n] uint64 of their ids.
    reached  [n] int64: position in `stages` of the step that dropped the row; len(stages) for one that is kept.
    """

    state: State
    stages: Sequence[Stage]
    total: int
    row: Ints
    place: Ints
    hash: Array
    reached: Ints

    @classmethod
    def of(cls, state: State, stages: Sequence[Stage], most: int) -> Excerpt:
        """At most `most` rows, found in passes over the parts on disk."""
        parts = _generations(state)[0].parts

        def order(part: Part) -> tuple[Array, Callable[[Array], list[bytes]]]:
            def ids(at: Array) -> list[bytes]:
                names: Ids = part.read("id")[0]
                return names.at(at)

            return hash_keys(part.read("hash")[0], 0, SALT), ids

        cut, first = cut_at(lambda: map(order, parts), most), 0
        found: list[tuple[Ints, Ints, Array]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64))]
        for part in parts:
            drawn = np.flatnonzero(cut.before(*order(part)))
            row, hashes = part.read("row", "hash")
            found.append((row[drawn], first + drawn, hashes[drawn]))
            first += part.n
        row, place, hashes = (np.concatenate(column) for column in zip(*found, strict=True))
        sort = np.argsort(row, kind="stable")
        reached = _reached(state, stages, row[sort])
        return cls(state, stages, first, row[sort], place[sort], hashes[sort], reached)

    def __len__(self) -> int:
        return len(self.row)

    @property
    def whole(self) -> bool:
        return len(self) == self.total

    def find(self, row: Ints) -> tuple[Ints, Ints]:
        """Which of some rows are in it: where they stand in `row`, and where here."""
        return _among(self.row, row)

    def judged_by(self, label: str) -> Rows:
        """The generation that a step judged."""
        return next(rows for rows in _generations(self.state) if label in rows.judged)

    def column(self, name: str, label: str) -> Array:
        """[n] float64: a column of numbers as the step `label` saw it; NaN for a row that never came into its
        generation."""
        out = np.full(len(self), np.nan)
        rows = self.judged_by(label)
        for part in rows.parts:
            found, at = self.find(part.read("row")[0])
            out[at] = rows.column(name, part)[found]
        return out


def _reached(state: State, stages: Sequence[Stage], known: Ints) -> Ints:
    """`Excerpt.reached` of ascending rows."""
    out = np.full(len(known), len(stages), np.int64)
    position = {stage.label: number for number, stage in enumerate(stages)}
    for rows in _generations(state):
        dropped_by = np.array([position[label] for label in rows.judged], np.int64)
        for part in rows.parts:
            found, at = _among(known, part.read("row")[0])
            fate = rows.fate(part)[found]
            gone = np.flatnonzero(fate != ALIVE)
            out[at[gone]] = dropped_by[fate[gone] - 1]
    return out


def _generations(state: State) -> tuple[Rows, ...]:
    """All orders of rows, first that of the files."""
    return (*state.earlier, state.rows)


def _among(known: Ints, row: Ints) -> tuple[Ints, Ints]:
    """Which of `row` are known (ascending): where they stand in `row`, and where in `known`."""
    if not len(known):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    at = np.searchsorted(known, row)
    found = np.flatnonzero(known.take(at, mode="clip") == row)
    return found, at[found]


def places(state: State, rows: Ints) -> Ints:
    """[n] int64: where rows, ascending numbers in the source, stand among the embeddings."""
    out = np.empty(len(rows), np.int64)
    first = 0
    for part in _generations(state)[0].parts:
        found, at = _among(rows, part.read("row")[0])
        out[at] = first + found
        first += part.n
    return out


LINES = 65_536
"""Refused samples in a part of the ledger."""


# --- on disk -------------------------------------------------------------------------------------------------------


def write_ledger(state: State, refused: Iterable[Mapping[str, Any]], folder: Path, run: Map) -> None:
    """`folder/*.parquet`: one row per sample of the source, refused ones too, in parts, which `run` writes.

    index (position in the source), id; cluster, component (id of its member whose id comes first), component_size,
    keeper (id of the member that stays), score, centroid_similarity: null where no step made them; verdict: the label
    of the step that dropped it, `read`, or `kept`; reason: more about it, or empty.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def write(job: tuple[Rows, Part, bool]) -> None:
        rows, part, last = job
        path = folder / f"{rows.generation:02d}-{part.number:06d}.parquet"
        if not path.exists():
            _write_part(rows, part, path, whole=last)

    finish(run(write, [(rows, part, rows is state.rows) for rows in _generations(state) for part in rows.parts]))
    left = iter(refused)
    for number, lines in enumerate(iter(lambda: list(islice(left, LINES)), [])):
        _write_refused(lines, folder / f"refused-{number:06d}.parquet")


def _write_refused(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pyarrow as pa

    known = {
        "index": pa.array([line["index"] for line in lines], pa.int64()),
        "id": pa.array([str(line.get("id", "")) for line in lines], pa.string()),
        "verdict": pa.array(["read"] * len(lines)),
        "reason": pa.array([str(line["reason"]) for line in lines]),
    }
    _write_table({name: known.get(name, pa.nulls(len(lines), kind)) for name, kind in _kinds().items()}, path)


def _kinds() -> dict[str, Any]:
    import pyarrow as pa

    text = pa.string()
    return {
        "index": pa.int64(), "id": text, "cluster": pa.int32(), "component": text, "component_size": pa.int64(),
        "keeper": text, "score": pa.float64(), "centroid_similarity": pa.float64(), "verdict": text, "reason": text,
    }  # fmt: skip


def _write_part(rows: Rows, part: Part, path: Path, *, whole: bool) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

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
        found = ids.text()
        return found if present is None else pc.if_else(pa.array(present), found, pa.scalar(None, pa.string()))

    def numbers(name: str, kind: Any) -> Any:
        found = column(name)
        if found is None:
            return pa.nulls(len(told), kind)
        return pa.array(found, kind, mask=np.isnan(found) if found.dtype.kind == "f" else found < 0)

    grouped = column("component")
    present = None if grouped is None else grouped >= 0
    same, several = column("same"), np.array([False, *("same" in rows.made_by(label) for label in rows.judged)])
    copy = np.zeros(len(told), np.int32) if same is None else np.where(several[fate], np.where(same, 1, 2), 0)

    def words(known: Sequence[str], which: Array) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(which, pa.int32()), pa.array(known, pa.string())).cast(
            pa.string()
        )

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
            "verdict": words(("kept", *rows.judged), fate),
            "reason": words(("", "exact copy", "near copy"), copy),
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
    found = list(kept(state.rows))
    row = np.concatenate([np.zeros(0, np.int64), *(part for part, _ in found)])
    order = np.argsort(row, kind="stable")
    names = Ids.join([ids for _, ids in found]).take(order).text()
    _write_table({"id": names, "index": row[order]}, path)
    return row[order]


def write_contaminated(state: State, names: Sequence[str], path: Path) -> None:
    """`contaminated.parquet`: what was dropped because of a benchmark, in the order of the source.

    id; benchmark (of `names`), benchmark_id and cosine of its nearest image.
    """
    import pyarrow as pa

    rows = (state.earlier or (state.rows,))[0]
    index, number, cosine = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    ids, met = list[Ids](), list[Ids]()
    for part in rows.parts:
        label = rows.columns["benchmark"]
        gone, which, name, near = load(rows.place(label, part), "dropped", *MET)
        row, own = part.read("row", "id")
        places = np.flatnonzero(gone)
        for column, values in ((index, row), (number, which), (cosine, near)):
            column.append(values[places])
        ids.append(own.take(places))
        met.append(name.take(places))
    order = np.argsort(np.concatenate(index), kind="stable")
    numbers = np.concatenate(number)[order]
    _write_table(
        {
            "id": Ids.join(ids).take(order).text(),
            "benchmark": pa.array([names[at] for at in numbers.tolist()], pa.string()),
            "benchmark_id": Ids.join(met).take(order).text(),
            "cosine": np.concatenate(cosine)[order],
        },
        path,
    )


# --- the coreset ---------------------------------------------------------------------------------------------------


def _record(sample: Sample, name: Callable[[ImageRef], str]) -> dict[str, Any]:
    images = [name(ref) for ref in sample.images]
    record: dict[str, Any] = {"id": sample.id}
    if images:
        record["image"] = images[0] if len(images) == 1 else images
    return record | {key: value for key, value in record_of(sample).items() if key not in record}


def under(images: Path, name: str) -> str:
    """The name of an image as it is said from the folder `images`; one that lies elsewhere stays as it is."""
    path = Path(name)
    return path.relative_to(images).as_posix() if path.is_absolute() and path.is_relative_to(images) else name


def records(state: State, given: Given, source: Source | None, images: Path | None) -> Iterator[dict[str, Any]]:
    """LLaVA records of what is kept, in the order of the source, image paths relative to its root; read as they are
    asked for.

    From the source where there is one (conversations stay whole); else a caption pair from the embeddings' metadata.
    """
    kept_rows = [part.read("row")[0][state.rows.alive(part)] for part in state.rows.parts]
    rows = np.sort(np.concatenate([np.zeros(0, np.int64), *kept_rows]))
    if source is not None:
        root = source.root

        def name(ref: ImageRef) -> str:
            return ref.path if ref.kind == "data" else root.name(ref)

        yield from (_record(source.sample(int(row)), name) for row in rows)
        return
    for told in given.words(places(state, rows)):
        yield {
            "id": told.id,
            "image": told.image if images is None else under(images, told.image),
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": told.caption}],
        }


def write_coreset(found: Iterable[Mapping[str, Any]], path: Path) -> None:
    """A JSON list, one record a line, so that it can be read by eye and compared line by line; none is held."""
    with atomic_file(path) as file:
        file.write(b"[")
        between = b"\n"
        for record in found:
            file.write(between + json.dumps(record, ensure_ascii=False).encode("utf-8"))
            between = b",\n"
        file.write(b"]\n" if between == b"\n" else b"\n]\n")
