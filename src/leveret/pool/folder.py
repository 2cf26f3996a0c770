"""A folder of photos with captions: `photo.jpg` beside `photo.txt`, or one table for all of them.

The table lies at the top of the folder and is called captions.json, .jsonl, .csv or .tsv. Its columns: the photo's path
relative to the folder (`file`, `image` or `file_name`) and its caption (`caption` or `text`). A captions.json may also
be one object {path: caption}. A photo that the table names takes its caption from there, any other from its own .txt.
Hugging Face's ImageFolder has the same table as metadata.jsonl or metadata.csv; it is taken where it has such columns.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from leveret.images import Root
from leveret.pool import jsonfile
from leveret.pool.base import SampleFault, Source
from leveret.records import IMAGE_MARK, Sample, Turn
from leveret.runs import DataError

ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif")
"""Photos by the ending of their name. Their content is judged when they are decoded."""

FOREIGN = (".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ico", ".psd", ".svg", ".eps")
"""Endings of images that are not read. Listed, so that they are refused by name and not passed over."""

FILE_COLUMNS = ("file", "image", "file_name")
TEXT_COLUMNS = ("caption", "text")
TABLES = ("captions.json", "captions.jsonl", "captions.csv", "captions.tsv")
METADATA = ("metadata.jsonl", "metadata.csv")
"""Names that many programs use, for many things: a table only where it tells captions."""
MAX_CAPTION = 2**20
"""Bytes of one .txt: more is no caption."""


class _Entry(NamedTuple):
    photo: str  # POSIX path below the folder
    caption: Any  # what the table says, of whatever type; None: look for the .txt
    fault: str = ""  # reason to refuse, where it is known already
    repeat: int = 0  # which of several captions of one photo


class FolderSource(Source):
    """Photos of a folder and all folders below it, sorted by POSIX path. Hidden files and folders are passed over."""

    def __init__(self, path: Path, images: str | Path | None = None) -> None:
        """`images` only goes with a JSON file and must be None here, or the folder itself."""
        super().__init__(path, Root(path))
        self._within(images, "is a folder of photos, so the image folder is that folder itself")
        found = dict(_walk(path))
        table = _table(path)
        entries = [
            _Entry(photo, caption, fault, repeat)
            for photo, rows in table.items()
            for repeat, (caption, fault) in enumerate(rows)
        ]
        # Beside a table a .txt may be anything; without one it is the caption of a photo that got lost on the way.
        lone = {path for path, fault in found.items() if fault == _LONE}
        wanted = found.keys() - lone if table or len(lone) == len(found) else found.keys()
        entries += [_Entry(photo, None, found[photo]) for photo in wanted if photo not in table]
        if not entries:
            raise DataError(_nothing_in(path))
        self._entries = sorted(entries, key=lambda entry: (entry.photo, entry.repeat))

    def __len__(self) -> int:
        return len(self._entries)

    def _draft(self, index: int) -> Sample:
        entry = self._entries[index]
        id = entry.photo if not entry.repeat else f"{entry.photo}#{entry.repeat}"

        def refuse(reason: str, detail: str = "") -> SampleFault:
            return SampleFault(index, id, entry.photo, reason, detail, self.name)

        if entry.fault:
            raise refuse(entry.fault)
        ref = self._ref(entry.photo, index, id)
        caption: Any = entry.caption
        if caption is None:
            beside = self._text(entry.photo)
            if beside is None:
                raise refuse("no caption", f"neither {Path(entry.photo).with_suffix('.txt').name} nor a row of a table")
            try:
                caption = beside.decode("utf-8-sig")
            except UnicodeDecodeError:
                raise refuse("caption is not UTF-8") from None
            if len(beside) > MAX_CAPTION:
                raise refuse("caption is too long", f"more than {MAX_CAPTION:,} bytes")
        if not isinstance(caption, str):
            raise refuse("caption is not text", type(caption).__name__)
        if not caption.strip():
            raise refuse("empty caption")
        return Sample(id, (ref,), (Turn("user", IMAGE_MARK), Turn("assistant", caption.strip())), self.name)

    def _trace(self, index: int) -> tuple[bytes, Sequence[str]]:
        entry = self._entries[index]
        said = self._text(entry.photo) if entry.caption is None else json.dumps(entry.caption).encode()
        return entry.fault.encode() + b"\0" + (said or b""), (entry.photo,)

    def _text(self, photo: str) -> bytes | None:
        """The bytes of the .txt beside a photo; None if there is none inside the folder."""
        path = self.root.path / Path(photo).with_suffix(".txt")
        try:
            if not path.resolve().is_relative_to(self.root.path) or not path.is_file():
                return None
            with open(path, "rb") as handle:
                return handle.read(MAX_CAPTION + 1)
        except (OSError, ValueError):
            return None


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """(path below the folder, fault or "") of everything that may be a photo, and of captions that have none."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}. Check its permissions.")

    for here, folders, files in os.walk(folder, onerror=refuse):
        below = Path(here).relative_to(folder)
        folders[:] = [name for name in folders if not name.startswith(".")]
        # A linked folder is not entered (it may lead outside, or round in a circle) and is not passed over in silence.
        for name in folders:
            if os.path.islink(os.path.join(here, name)):
                yield (below / name).as_posix(), "linked folder is not entered"
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and ending in ENDINGS + FOREIGN:
                path = (below / name).as_posix()
                if any("\ud800" <= letter <= "\udfff" for letter in name):
                    yield path.encode("ascii", "backslashreplace").decode(), "file name is not UTF-8"
                else:
                    yield path, "image format not allowed" if ending in FOREIGN else ""
        parts = [os.path.splitext(name) for name in files if not name.startswith(".")]
        photos = {stem for stem, ending in parts if ending.lower() in ENDINGS + FOREIGN}
        for stem, ending in parts:
            if ending == ".txt" and stem not in photos:
                yield (below / f"{stem}.txt").as_posix().encode("utf-8", "backslashreplace").decode(), _LONE


_LONE = "caption without a photo"


def _nothing_in(path: Path) -> str:
    lists = sorted(p.name for p in path.iterdir() if p.suffix.lower() in (".json", *jsonfile.LINES))[:5]
    hint = f" It holds {', '.join(lists)}: if that is a LLaVA list, give the file itself." if lists else ""
    return f"{path} holds no photos ({', '.join(ENDINGS)}) and no table ({', '.join(TABLES + METADATA)}).{hint}"


# --- the table -----------------------------------------------------------------------------------------------------


def _table(folder: Path) -> dict[str, list[tuple[Any, str]]]:
    """photo -> [(caption, fault)], in the order of the table."""
    present = [folder / name for name in TABLES if (folder / name).is_file()]
    present += [path for name in METADATA if (path := folder / name).is_file() and _tells_captions(path)]
    if not present:
        return {}
    if len(present) > 1:
        names = ", ".join(path.name for path in present)
        raise DataError(f"{folder} holds several captions tables ({names}). Keep one.")
    path = present[0]
    found: dict[str, list[tuple[Any, str]]] = {}
    for number, (photo, caption, fault) in enumerate(_READERS[path.suffix.lower()](path), start=1):
        if not fault and (not isinstance(photo, str) or not photo.strip()):
            fault = "row names no photo"
        if fault:
            photo = f"{path.name} row {number}"
        elif ".." not in photo.split("/"):
            photo = Path(photo).as_posix()  # `./a.jpg` and `a.jpg` are one photo
        found.setdefault(photo, []).append(("" if caption is None else caption, fault))
    return found


def _tells_captions(path: Path) -> bool:
    """Whether the first row of a table names a photo and has words for it."""
    try:
        photo, caption, _ = next(_READERS[path.suffix.lower()](path), (None, None, ""))
    except DataError:
        return False
    return isinstance(photo, str) and isinstance(caption, str)


_Row = tuple[Any, Any, str]


def _json_rows(path: Path) -> Iterator[_Row]:
    text = path.read_bytes()
    if text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        try:
            whole = json.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            whole = None  # lines, or broken: the reader below says which
        if isinstance(whole, dict) and not (set(whole) & set(FILE_COLUMNS) and set(whole) & set(TEXT_COLUMNS)):
            yield from ((photo, caption, "") for photo, caption in whole.items())
            return
        if isinstance(whole, dict):
            yield _row(whole)
            return
    for span in jsonfile.index(path):
        try:
            record = json.loads(jsonfile.read(path, span))
        except (ValueError, RecursionError):
            yield None, None, "row is not JSON"
            continue
        yield _row(record) if isinstance(record, dict) else (None, None, "row is not an object")


def _row(record: dict[str, Any]) -> _Row:
    photo = next((record[key] for key in FILE_COLUMNS if key in record), None)
    caption = next((record[key] for key in TEXT_COLUMNS if key in record), None)
    return photo, caption, ""


def _csv_rows(path: Path) -> Iterator[_Row]:
    comma = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            rows = csv.DictReader(handle, delimiter=comma, strict=True)
            columns = rows.fieldnames or []
            if not set(columns) & set(FILE_COLUMNS) or not set(columns) & set(TEXT_COLUMNS):
                raise DataError(
                    f"{path}: the first line names the columns {', '.join(map(repr, columns)) or '(none)'}; needed are "
                    f"one of {', '.join(FILE_COLUMNS)} and one of {', '.join(TEXT_COLUMNS)}."
                )
            for record in rows:
                # DictReader keeps surplus cells under None: an unquoted comma in the caption.
                yield (None, None, "row has too many cells") if None in record else _row(record)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}") from None


_READERS = {".json": _json_rows, ".jsonl": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows}
