"""Tables with the images in them: what columns say, whatever kind of file holds the cells.

Images stand in a column `images` or `image`, in the form that Hugging Face's `Image` feature has on disk: a struct of
`bytes` and `path`, or a list of such. Words stand in the first of these columns that is there, a row of `LAYOUTS` each:

    conversations   LLaVA's: a list of {from, value}
    texts           The Cauldron's and FineVision's: a list of {user, assistant}, each a pair of turns
    messages        the chat form of OpenAI, TRL and the Hub: a list of {role, content}
    caption, text   one string

Where no user turn holds an image mark, the marks are put at the start of the first one. A column `id` gives ids; else
they are `<file>-<row>`. Every other column of numbers, words and lists of them (ratings, sources) travels in
`Sample.meta`, and so does what else `texts` says of each pair; columns of other types are left out.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from leveret import cells
from leveret.images import Root
from leveret.pool.base import SampleFault, Source
from leveret.pool.llava import OWN, Refuse, chatted, marked, named, spoken
from leveret.pool.webdataset import captioned, shard_name
from leveret.records import ImageRef, Sample, Turn
from leveret.runs import DataError

if TYPE_CHECKING:
    import numpy as np

COLUMNS = ("images", "image")
"""Where images may stand."""

Words = tuple[tuple[Turn, ...], dict[str, Any]]
"""Turns, and what else the column said."""


@dataclass(frozen=True)
class Layout:
    """One form of words: the column, whether its type is the right one, and how a cell becomes turns.

    number  stands in fingerprints: a row keeps it, wherever in the table it is.
    """

    number: int
    column: str
    fits: Callable[[Any], bool]
    words: Callable[[Any, int, Refuse], Words]
    shape: str


def _said(cell: Any, images: int, refuse: Refuse) -> Words:
    return spoken({"conversations": cell}, refuse), {}


def _chatted(cell: Any, images: int, refuse: Refuse) -> Words:
    return chatted(cell, refuse), {}


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


def _is_chat(kind: Any) -> bool:
    if not _list_of("role", "content")(kind):
        return False
    content = _entry(kind).field("content").type
    return _is_text(content) or _list_of("type")(content)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


LAYOUTS = (
    Layout(0, "conversations", _list_of("from", "value"), _said, "conversations: list<struct<from, value>> (LLaVA)"),
    Layout(
        1,
        "texts",
        _list_of("user", "assistant"),
        _pairs,
        "texts: list<struct<user, assistant>> (The Cauldron, FineVision)",
    ),
    Layout(
        4,
        "messages",
        _is_chat,
        _chatted,
        "messages: list<struct<role, content>>, content a string or list<struct<type, text>> (OpenAI, TRL)",
    ),
    Layout(2, "caption", _is_text, _caption, "caption: string"),
    Layout(3, "text", _is_text, _caption, "text: string"),
)
"""Tried in order."""


class TableSource(Source):
    """Rows of files of one kind; subclasses say which files they are and where their cells come from.

    Rows lie in groups (parquet's row groups, Arrow's record batches), and a row's words are read with its group's.
    """

    kind: ClassVar[Literal["parquet", "arrow"]]
    group: ClassVar[str]
    """What a group of rows is called, for messages."""

    def __init__(self, path: Path, images: str | Path | None = None) -> None:
        """`images` only goes with a JSON file and must be None here, or the folder of the files.

        `DataError` if a file cannot be read, its columns are not understood, its groups are too large to be read, the
        files differ in where images and words stand, or there are no rows.
        """
        super().__init__(path, Root(path if path.is_dir() else path.parent))
        self._within(images, "holds its images itself, so there is no image folder to name")
        self._files = self._list()
        self._plans: list[Plan] = []
        first, file, group = [0], [], []
        for number, name in enumerate(self._files):
            plan, lengths = self._plan(self.root.path / name)
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

    @abstractmethod
    def _list(self) -> list[str]:
        """Names of the files in the root's folder, in order. `DataError` if they cannot be told."""

    @abstractmethod
    def _plan(self, path: Path) -> tuple[Plan, list[int]]:
        """What the file's columns are, and the rows of each group. `DataError` if it cannot be read."""

    @abstractmethod
    def _rows(self, path: Path, group: int, plan: Plan) -> Any:
        """The columns `plan.read` of one group, a pyarrow table or batch. `OSError`, `cells.Unreadable`."""

    @abstractmethod
    def _packed(self, path: Path, group: int, plan: Plan) -> Iterator[bytes]:
        """What a fingerprint covers of one group: words and image paths as they are packed, and how many bytes the
        images fill, but not these. Raises as `_rows`."""

    def _keep(self, first: list[int], file: list[int], group: list[tuple[int, int]]) -> None:
        import numpy as np

        self._first: np.ndarray = np.array(first, np.int64)  # [groups + 1]: first sample of every group
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
            table = self._rows(self.root.path / name, number, plan)
        except OSError as error:
            raise refuse("file is unreadable", error.strerror or "") from None
        except cells.Unreadable:
            raise refuse(f"{self.group} is damaged", f"{self.group} {number} of {shard_name(name)}") from None
        # Not `as_py`: images are only counted here, and where files are mapped it would read them.
        held = table.column(plan.images)[within]
        entries = [held] if held.is_valid and not plan.many else list(held) if held.is_valid else []
        others = (field for field in table.column_names if field != plan.images)
        try:
            record = {field: table.column(field)[within].as_py() for field in others}
        except UnicodeDecodeError:
            raise refuse("text is not UTF-8") from None
        id = named(record, id, refuse)
        path = str(self.root.path / name)
        refs = tuple(
            ImageRef(path, self.kind, row, -1, plan.images, place if plan.many else -1) for place in range(len(entries))
        )
        image = ", ".join(self.root.name(ref) for ref in refs)
        if missing := [place for place, entry in enumerate(entries) if not entry.is_valid]:
            raise refuse("no image", f"entry {missing[0]} of {plan.images} is null")
        layout = LAYOUTS[plan.layout]
        turns, more = layout.words(record.pop(layout.column), len(refs), refuse)
        meta = {key: value for key, value in {**more, **record}.items() if key not in OWN}
        return Sample(id, refs, marked(turns, len(refs)), self.name, meta)

    def _trace(self, index: int) -> tuple[bytes, Sequence[str]]:
        """Of each group, at its first row: the words and image paths as they are packed in the file, byte for byte,
        and the number of bytes that its images fill there. Image bytes are not read, so another image of exactly the
        same packed size is not noticed; the same rows packed in another way are other data."""
        at = int(self._first.searchsorted(index, side="right")) - 1
        if index != self._first[at]:
            return b"", ()
        name, plan = self._files[self._file[at]], self._plans[self._file[at]]
        digest = hashlib.sha256(f"{name}\0{plan.stamp()}\0".encode("utf-8", "surrogatepass"))
        try:
            for part in self._packed(self.root.path / name, int(self._group[at, 0]), plan):
                digest.update(part)
        except (OSError, cells.Unreadable) as error:
            digest.update(type(error).__name__.encode())
        return digest.digest(), ()


# --- which column is what ------------------------------------------------------------------------------------------


class Plan(NamedTuple):
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

    def stamp(self) -> str:
        """What a fingerprint covers of it, in the words of the first version: other words would be other data."""
        number = LAYOUTS[self.layout].number
        return f"_Plan(images={self.images!r}, many={self.many}, layout={number}, read={self.read!r})"


def understood(path: Path, schema: Any) -> Plan:
    """Where things stand in a file of this Arrow schema; `read` names whole columns. `DataError` if it is not told."""
    kinds: dict[str, Any] = {field.name: field.type for field in schema}
    if twice := [name for name in kinds if schema.names.count(name) > 1]:
        raise DataError(f"{path}: several columns are named {', '.join(map(ascii, twice))}. Rename all but one.")
    images = next((name for name in COLUMNS if name in kinds and _is_images(kinds[name])), None)
    layout = next((at for at, row in enumerate(LAYOUTS) if row.column in kinds and row.fits(kinds[row.column])), None)
    if images is None or layout is None:
        raise DataError(_not_understood(path, kinds, images, layout))
    words = LAYOUTS[layout].column
    others = [name for name, kind in kinds.items() if name == words or (name != images and _is_plain(kind))]
    return Plan(images, _entry(kinds[images]) is not None, layout, (*others, images))


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
