"""Parquet with the images in it: a .parquet file, or a folder of them in the order of their names.

Images stand in a column `images` or `image`, in the form that Hugging Face's `Image` feature has on disk: a struct of
`bytes` and `path`, or a list of such. Words stand in the first of these columns that is there, a row of `LAYOUTS` each:

    conversations   LLaVA's: a list of {from, value}
    texts           The Cauldron's and FineVision's: a list of {user, assistant}, each a pair of turns
    caption, text   one string

Where no user turn holds an image mark, the marks are put at the start of the first one. A column `id` gives ids; else
they are `<file>-<row>`. Every other column of numbers, words and lists of them (ratings, sources) travels in
`Sample.meta`, and so does what else `texts` says of each pair; columns of other types are left out.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from leveret import cells
from leveret.images import Root
from leveret.pool.base import SampleFault, Source
from leveret.pool.llava import OWN, Refuse, named, spoken
from leveret.pool.webdataset import captioned, shard_name, shards
from leveret.records import IMAGE_MARK, ImageRef, Sample, Turn
from leveret.runs import DataError

if TYPE_CHECKING:
    import numpy as np

FILES = re.compile(r"(?i)\.parquet$")

COLUMNS = ("images", "image")
"""Where images may stand."""

MAX_GROUP = 2**31 - 1
"""Bytes of images in one row group, unpacked: it is read as a whole."""

Words = tuple[tuple[Turn, ...], dict[str, Any]]
"""Turns, and what else the column said."""


@dataclass(frozen=True)
class Layout:
    """One form of words: the column, whether its type is the right one, and how a cell becomes turns."""

    column: str
    fits: Callable[[Any], bool]
    words: Callable[[Any, int, Refuse], Words]
    shape: str


def _said(cell: Any, images: int, refuse: Refuse) -> Words:
    return spoken({"conversations": cell}, refuse), {}


def _pairs(cell: Any, images: int, refuse: Refuse) -> Words:
    turns: list[Turn] = []
    more: dict[str, list[Any]] = {}
    for position, pair in enumerate(cell or []):
        for role, name in (("user", "user"), ("assistant", "assistant")):
            text = pair[name] if pair else None
            if not isinstance(text, str):
                raise refuse("turn's value is not text", f"texts[{position}].{name} holds {type(text).__name__}")
            turns.append(Turn(role, text))  # type: ignore[arg-type]
        for name, value in pair.items():
            if name not in ("user", "assistant") and isinstance(value, str | int | float | None):
                more.setdefault(name, []).append(value)
    return tuple(turns), more


def _caption(cell: Any, images: int, refuse: Refuse) -> Words:
    if not images:
        raise refuse("no image")
    return captioned(cell, images, refuse), {}


def _list_of(*names: str) -> Callable[[Any], bool]:
    def fits(kind: Any) -> bool:
        import pyarrow as pa

        entry = _entry(kind)
        return entry is not None and pa.types.is_struct(entry) and {*names} <= {field.name for field in entry}

    return fits


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


LAYOUTS = (
    Layout("conversations", _list_of("from", "value"), _said, "conversations: list<struct<from, value>> (LLaVA)"),
    Layout(
        "texts",
        _list_of("user", "assistant"),
        _pairs,
        "texts: list<struct<user, assistant>> (The Cauldron, FineVision)",
    ),
    Layout("caption", _is_text, _caption, "caption: string"),
    Layout("text", _is_text, _caption, "text: string"),
)
"""Tried in order."""


class ParquetSource(Source):
    """Rows of parquet files. Opening reads the files' ends alone; a row's words are read with its row group's.

    A row group's images are read together (`leveret.cells`), so samples in order are fast and samples in random order
    are not.
    """

    def __init__(self, path: Path, images: str | Path | None = None) -> None:
        """`images` only goes with a JSON file and must be None here, or the folder of the files.

        `DataError` if a file cannot be read, its columns are not understood, its row groups are too large to be read,
        the files differ in where images and words stand, or there are no rows.
        """
        super().__init__(path, Root(path if path.is_dir() else path.parent))
        self._within(images, "holds its images itself, so there is no image folder to name")
        self._files = shards(path, FILES)
        self._plans: list[_Plan] = []
        first, file, group = [0], [], []
        for number, name in enumerate(self._files):
            plan, lengths = _plan(self.root.path / name)
            if self._plans and plan[:3] != self._plans[0][:3]:
                raise DataError(
                    f"{path}: {shard_name(name)} has {plan.told()}, and {shard_name(self._files[0])} has "
                    f"{self._plans[0].told()}. The files of one source have the same columns: give them one by one."
                )
            self._plans.append(plan)
            before = 0
            for at, length in enumerate(lengths):
                if length:
                    first.append(first[-1] + length)
                    file.append(number)
                    group.append((at, before))
                before += length
        if not file:
            raise DataError(f"{path} holds no rows.")
        self._keep(first, file, group)

    def _keep(self, first: list[int], file: list[int], group: list[tuple[int, int]]) -> None:
        import numpy as np

        self._first: np.ndarray = np.array(first, np.int64)  # [groups + 1]: first sample of every row group
        self._file: np.ndarray = np.array(file, np.int32)  # [groups]
        self._group: np.ndarray = np.array(group, np.int64)  # [groups, 2]: number in its file, its first row there

    def __len__(self) -> int:
        return int(self._first[-1])

    def _draft(self, index: int) -> Sample:
        def refuse(reason: str, detail: str = "") -> SampleFault:
            return SampleFault(index, id, image, reason, detail, self.name)

        at = int(self._first.searchsorted(index, side="right")) - 1
        name, plan = self._files[self._file[at]], self._plans[self._file[at]]
        number, before = self._group[at].tolist()
        within = index - int(self._first[at])
        row, image = before + within, ""
        id = f"{shard_name(name).rpartition('.')[0]}-{row}"
        try:
            table = cells.rows(self.root.path / name, number, plan.read)
        except OSError as error:
            raise refuse("file is unreadable", error.strerror or "") from None
        except cells.Unreadable:
            raise refuse("row group is damaged", f"row group {number} of {shard_name(name)}") from None
        try:
            record = {field: table.column(field)[within].as_py() for field in table.column_names}
        except UnicodeDecodeError:
            raise refuse("text is not UTF-8") from None
        id = named(record, id, refuse)
        held = record.pop(plan.images)
        entries = (held or []) if plan.many else [] if held is None else [held]
        path = str(self.root.path / name)
        refs = tuple(
            ImageRef(path, "parquet", row, -1, plan.images, place if plan.many else -1) for place in range(len(entries))
        )
        image = ", ".join(self.root.name(ref) for ref in refs)
        if None in entries:
            raise refuse("no image", f"entry {entries.index(None)} of {plan.images} is null")
        layout = LAYOUTS[plan.layout]
        turns, more = layout.words(record.pop(layout.column), len(refs), refuse)
        meta = {key: value for key, value in {**more, **record}.items() if key not in OWN}
        return Sample(id, refs, _marked(turns, len(refs)), self.name, meta)

    def _trace(self, index: int) -> tuple[bytes, Sequence[str]]:
        """Of each row group, at its first row: the words and image paths as they are packed in the file, byte for
        byte, and the number of bytes that its images fill there. Image bytes are not read, so another image of exactly
        the same packed size is not noticed; the same rows packed in another way are other data."""
        at = int(self._first.searchsorted(index, side="right")) - 1
        if index != self._first[at]:
            return b"", ()
        name, plan = self._files[self._file[at]], self._plans[self._file[at]]
        path, number = self.root.path / name, int(self._group[at, 0])
        digest = hashlib.sha256(f"{name}\0{plan!r}\0".encode("utf-8", "surrogatepass"))
        try:
            with cells.opened(path) as file, open(path, "rb") as handle:
                group = file.metadata.row_group(number)
                for column in map(group.column, range(group.num_columns)):
                    leaf, size = column.path_in_schema, column.total_compressed_size
                    digest.update(f"{leaf}\0{column.num_values}\0{size}\0{column.total_uncompressed_size}\0".encode())
                    if any(leaf == read or leaf.startswith(f"{read}.") for read in plan.read):
                        start = column.dictionary_page_offset or column.data_page_offset
                        handle.seek(min(start, column.data_page_offset))
                        digest.update(handle.read(size))
        except (OSError, cells.Unreadable) as error:
            digest.update(type(error).__name__.encode())
        return digest.digest(), ()


def _marked(turns: tuple[Turn, ...], images: int) -> tuple[Turn, ...]:
    """The turns with a mark for each image, at the start of the first user turn, where there is none at all."""
    first = next((at for at, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or not images or any(IMAGE_MARK in turn.text for turn in turns if turn.role == "user"):
        return turns
    marks = f"{IMAGE_MARK}\n" * images
    return (*turns[:first], Turn("user", marks + turns[first].text), *turns[first + 1 :])


# --- which column is what ------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Where things stand in one file.

    images  the column. many: whether it holds lists. layout: place in LAYOUTS.
    read    what is read for a sample: all but the bytes of images.
    """

    images: str
    many: bool
    layout: int
    read: tuple[str, ...]

    def told(self) -> str:
        return f"{'lists of images' if self.many else 'one image a row'} in {self.images} and words in " + (
            LAYOUTS[self.layout].column
        )


def _plan(path: Path) -> tuple[_Plan, list[int]]:
    """What the file's columns are, and the rows of each row group."""
    try:
        with cells.opened(path) as file:
            schema, facts = file.schema_arrow, file.metadata
            leaves = [facts.schema.column(number).path for number in range(facts.num_columns)]
            kinds: dict[str, Any] = {field.name: field.type for field in schema}
            images = next((name for name in COLUMNS if name in kinds and _is_images(kinds[name])), None)
            layout = next(
                (at for at, row in enumerate(LAYOUTS) if row.column in kinds and row.fits(kinds[row.column])), None
            )
            if images is None or layout is None:
                raise DataError(_not_understood(path, kinds, images, layout))
            many = _entry(kinds[images]) is not None
            mine = [leaf for leaf in leaves if leaf.startswith(f"{images}.")]
            data, names = (next(leaf for leaf in mine if leaf.endswith(end)) for end in (".bytes", ".path"))
            words = LAYOUTS[layout].column
            others = [name for name, kind in kinds.items() if name == words or (name != images and _is_plain(kind))]
            lengths = []
            for number in range(facts.num_row_groups):
                group = facts.row_group(number)
                size = group.column(leaves.index(data)).total_uncompressed_size
                if size > MAX_GROUP:
                    raise DataError(
                        f"{path}: row group {number} holds {size:,} bytes of images in {group.num_rows:,} rows; it is "
                        f"read as a whole, and at most {MAX_GROUP:,} are. Write it in smaller row groups "
                        "(pyarrow.parquet.write_table(..., row_group_size=100))."
                    )
                lengths.append(group.num_rows)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check its permissions and the disk.") from None
    except cells.Unreadable:
        raise DataError(
            f"{path} is not a parquet file, or its end is missing ({os.path.getsize(path):,} bytes): fetch it again."
        ) from None
    return _Plan(images, many, layout, (*others, names)), lengths


def _not_understood(path: Path, kinds: Mapping[str, Any], images: str | None, layout: int | None) -> str:
    there = "; ".join(f"{name}: {str(kind)[:80]}" for name, kind in list(kinds.items())[:30]) or "none"
    missing = " and ".join(
        word for word, found in (("images", images is not None), ("words", layout is not None)) if not found
    )
    allowed = "; or ".join(layout.shape for layout in LAYOUTS)
    return (
        f"{path}: no column of {missing} is understood. The columns are: {there}. Allowed are images in "
        f"{' or '.join(COLUMNS)}: struct<bytes, path> or a list of it (Hugging Face's Image feature), and words in "
        f"{allowed}. Rename or convert the columns."
    )


def _entry(kind: Any) -> Any:
    """The type of a list's entries; None if it is no list."""
    import pyarrow as pa

    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind.value_type if any(is_list(kind) for is_list in lists) else None


def _is_images(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind if _entry(kind) is None else _entry(kind)
    if not pa.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    data = fields.get("bytes", pa.null())
    return "path" in fields and (pa.types.is_binary(data) or pa.types.is_large_binary(data))


def _is_plain(kind: Any) -> bool:
    """Whether a column's values are what JSON can hold."""
    import pyarrow as pa

    if (entry := _entry(kind)) is not None:
        return _is_plain(entry)
    if pa.types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    plain = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_null, _is_text)
    return any(is_plain(kind) for is_plain in plain)
