"""Tars in WebDataset's form, img2dataset's among them: a .tar, or a folder of .tar shards in the order of their names.

    000000.jpg, 000000.txt                   a caption
    000001.jpg, 000001.json                  {"conversations": [...]}, LLaVA's, or {"caption": ...} or {"text": ...}
    000002.0.jpg, 000002.1.jpg, 000002.json  several images, numbered from 0

Members of one tar belong together when their names are the same up to the first dot after the last slash: the key.
Where a JSON holds no words, the .txt beside it does. Other members (.cls, .npy, ...) are passed over, and so are names
without a dot, hidden ones and `__meta__/...`, as WebDataset does. A JSON's other keys travel in `Sample.meta`.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from leveret.images import Root
from leveret.pool import tar
from leveret.pool.base import SampleFault, Source
from leveret.pool.folder import ENDINGS, FOREIGN, TEXT_COLUMNS
from leveret.pool.llava import OWN, Refuse, named, parsed, spoken
from leveret.records import IMAGE_MARK, ImageRef, Sample, Turn
from leveret.runs import DataError

if TYPE_CHECKING:
    import numpy as np

TARS = re.compile(r"(?i)\.(tar(\.(gz|bz2|xz|zst|lz4))?|tgz)$")
"""What is taken for a tar by its name. The compressed ones, so that they are refused by name and not passed over."""

MAX_WORDS = 16 * 2**20
"""Bytes of one .json or .txt: more is no caption and no conversation."""


class _Member(NamedTuple):
    ending: str  # after the key and its dot
    offset: int
    length: int


class WebdatasetSource(Source):
    """Samples of tars in the order of their first members. Opening reads every header once (some 100,000 members a
    second where the disk is not what is waited for); kept are about 20 bytes a member and the keys.

    A tar that is cut off or damaged counts as one refused sample, of the tar's name, behind those that are whole.
    """

    def __init__(self, path: Path, images: str | Path | None = None) -> None:
        """`images` only goes with a JSON file and must be None here, or the folder of the tars.

        `DataError` if a tar cannot be read, is compressed or is none, or if there is no sample in any.
        """
        super().__init__(path, Root(path if path.is_dir() else path.parent))
        self._within(images, "holds its images itself, so there is no image folder to name")
        if (path / "parts").is_dir() and (path / "recipe.yaml").is_file():
            # It would be taken for a smaller store.
            raise DataError(f"{path} is not finished: run the same `leveret pool convert` again, and it goes on.")
        self._shards = shards(path, TARS)
        self._index = _index([self.root.path / name for name in self._shards])
        if not len(self):
            raise DataError(f"{path} holds no samples: no member of its tars has a name like 000001.jpg or 000001.json")

    def __len__(self) -> int:
        return len(self._index.first) - 1

    def _draft(self, index: int) -> Sample:
        def refuse(reason: str, detail: str = "") -> SampleFault:
            return SampleFault(index, id, shown, reason, detail, self.name)

        shard, key, members, broken = self._index.sample(index)
        id = key.decode("utf-8", "backslashreplace") if key else shard_name(self._shards[shard])
        shown = ""
        if broken:
            raise refuse(*broken)
        path = str(self.root.path / self._shards[shard])

        def ref(member: _Member) -> ImageRef:
            return ImageRef(path, "tar", member.offset, member.length, f"{id}.{member.ending}")

        shown = shard_name(", ".join(self.root.name(ref(member)) for member in members if _is_image(member)))
        if not id == key.decode("utf-8", "replace") or not all(_decoded(member.ending) for member in members):
            raise refuse("member name is not UTF-8")
        found = {member.ending.lower(): member for member in members}
        if len(found) < len(members):
            endings = sorted(member.ending for member in members)
            raise refuse("member is there twice", ", ".join(f"{id}.{ending}" for ending in endings))
        refs = tuple(map(ref, _pictures(members, refuse)))
        record: dict[str, Any] = {}
        if "json" in found:
            record = parsed(self._words(shard, found["json"], refuse), refuse)
            id = named(record, id, refuse)
        if not refs:
            _explain(record, members, refuse)
        column = next((name for name in TEXT_COLUMNS if record.get(name) is not None), "")
        if "conversations" in record:
            turns = spoken(record, refuse)
            column = ""
        else:
            said = record.get(column)
            if said is None and "txt" in found:
                try:
                    said = self._words(shard, found["txt"], refuse).decode("utf-8-sig")
                except UnicodeDecodeError:
                    raise refuse("caption is not UTF-8") from None
            turns = captioned(said, len(refs), refuse)
        meta = {name: value for name, value in record.items() if name not in (*OWN, column)}
        return Sample(id, refs, turns, self.name, meta)

    def _words(self, shard: int, member: _Member, refuse: Refuse) -> bytes:
        if member.length > MAX_WORDS:
            raise refuse("words are too long", f"{member.length:,} bytes of .{member.ending}, at most {MAX_WORDS:,}")
        try:
            data = _read(self.root.path / self._shards[shard], member)
        except OSError as error:
            raise refuse("tar is unreadable", error.strerror or "") from None
        if len(data) < member.length:
            raise refuse("tar is cut off", "it was whole when it was opened")
        return data

    def _trace(self, index: int) -> tuple[bytes, Sequence[str]]:
        """The words, and the names and lengths of all members; image bytes are not read."""
        shard, key, members, broken = self._index.sample(index)
        parts = [repr((self._shards[shard], key, members, broken)).encode("utf-8", "surrogatepass")]
        for member in members:
            if member.ending.lower() in ("json", "txt") and member.length <= MAX_WORDS:
                try:
                    parts.append(_read(self.root.path / self._shards[shard], member))
                except OSError as error:
                    parts.append(repr(error.errno).encode())
        return b"\0".join(parts), ()


def shards(path: Path, ending: re.Pattern[str]) -> list[str]:
    """Names of the files at `path` (itself, or what lies in the folder) that end so, sorted."""
    if path.is_file():
        return [path.name]
    try:
        names = sorted(entry.name for entry in os.scandir(path) if entry.name[0] != "." and entry.is_file())
    except OSError as error:
        raise DataError(f"cannot list {path}: {error.strerror}. Check its permissions.") from None
    return [name for name in names if ending.search(name)]


def shard_name(name: str) -> str:
    """A file's name as text, whatever its bytes are."""
    return name.encode("utf-8", "backslashreplace").decode()


def captioned(said: Any, images: int, refuse: Refuse) -> tuple[Turn, Turn]:
    """The turns of a caption."""
    if said is None:
        raise refuse("no caption")
    if not isinstance(said, str):
        raise refuse("caption is not text", type(said).__name__)
    if not said.strip():
        raise refuse("empty caption")
    return Turn("user", "\n".join([IMAGE_MARK] * images)), Turn("assistant", said.strip())


# --- the members of one sample -------------------------------------------------------------------------------------


def _decoded(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_image(member: _Member) -> bool:
    return f".{member.ending.rpartition('.')[2].lower()}" in ENDINGS + FOREIGN


def _pictures(members: Sequence[_Member], refuse: Refuse) -> list[_Member]:
    """The one image, or all images in the order of their numbers."""
    images = [member for member in members if _is_image(member)]
    for member in images:
        if f".{member.ending.rpartition('.')[2].lower()}" in FOREIGN:
            raise refuse("image format not allowed", member.ending)
    if len(images) < 2:
        return images
    numbers = [member.ending.rpartition(".")[0] for member in images]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise refuse("several images of one key", "one, or numbered ones (key.0.jpg, key.1.jpg), can be told apart")
    images.sort(key=lambda member: int(member.ending.rpartition(".")[0]))
    if sorted(map(int, numbers)) != list(range(len(numbers))):
        raise refuse("images are not numbered from 0", f"numbers {', '.join(sorted(numbers, key=int)[:20])}")
    return images


def _explain(record: dict[str, Any], members: Sequence[_Member], refuse: Refuse) -> None:
    """Refuse a sample that has no image and should: all but conversations that speak of none."""
    status = record.get("status")
    if isinstance(status, str) and status != "success":  # img2dataset keeps the record of what it could not fetch
        why = record.get("error_message")
        raise refuse("image was not fetched", f"{status}{f': {why}' if isinstance(why, str) else ''}"[:200])
    said = record.get("conversations")
    turns = said if isinstance(said, list) else []
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    marked = any(isinstance(text, str) and IMAGE_MARK in text for text in texts)
    if "conversations" not in record or marked or record.get("image"):
        held = ", ".join(sorted(f".{member.ending}" for member in members)[:8])
        raise refuse("no image", f"there is only {held}" if held else "")


def _read(path: Path, member: _Member) -> bytes:
    with open(path, "rb", buffering=0) as handle:
        handle.seek(member.offset)
        return handle.read(member.length)


# --- the index -----------------------------------------------------------------------------------------------------


class _Index(NamedTuple):
    """Flat arrays, whatever the number of members.

    offset, length  int64 [members], those of a sample side by side. ending: int32 [members], into `endings`.
    first           int64 [samples + 1]: first member of each sample. starts: int64 [shards + 1]: its first sample.
    keys, key       all keys in a row, and int64 [samples + 1] where each begins.
    broken          sample -> (reason, detail), for tars that are.
    """

    offset: np.ndarray
    length: np.ndarray
    ending: np.ndarray
    endings: list[str]
    first: np.ndarray
    starts: np.ndarray
    keys: bytes
    key: np.ndarray
    broken: dict[int, tuple[str, str]]

    def sample(self, index: int) -> tuple[int, bytes, list[_Member], tuple[str, str] | None]:
        """(shard, key, members, fault) of a sample."""
        shard = int(self.starts.searchsorted(index, side="right")) - 1
        here = slice(int(self.first[index]), int(self.first[index + 1]))
        lists = self.ending[here].tolist(), self.offset[here].tolist(), self.length[here].tolist()
        members = [_Member(self.endings[ending], at, length) for ending, at, length in zip(*lists, strict=True)]
        key = self.keys[int(self.key[index]) : int(self.key[index + 1])]
        return shard, key, members, self.broken.get(index)


def _index(paths: Sequence[Path]) -> _Index:
    import numpy as np

    offsets, lengths, endings, counts = array("q"), array("q"), array("i"), array("q")
    codes: dict[bytes, int] = {}
    keys, ends, starts = bytearray(), array("q", [0]), array("q", [0])
    broken: dict[int, tuple[str, str]] = {}
    for path in paths:
        owners, base = array("q"), len(offsets)
        places: dict[bytes, int] = {}
        fault = None
        try:
            for name, offset, length in tar.members(path):
                slash = name.rfind(b"/") + 1
                dot = name.find(b".", slash)
                if dot <= slash or (name.startswith(b"__") and b"__" in name.partition(b"/")[0][2:]):
                    continue
                owners.append(places.setdefault(name[:dot], len(places)))
                endings.append(codes.setdefault(name[dot + 1 :], len(codes)))
                offsets.append(offset)
                lengths.append(length)
        except tar.TarFault as found:
            fault = found.reason, found.detail
        owner = np.frombuffer(owners, np.int64)
        if (np.diff(owner) < 0).any():  # members of one key that do not lie side by side
            order = np.argsort(owner, kind="stable")
            for column in (offsets, lengths, endings):
                column[base:] = array(column.typecode, np.asarray(column[base:])[order].tolist())
        counts.extend(np.bincount(owner, minlength=len(places)).tolist())
        for key in places:
            keys += key
            ends.append(len(keys))
        if fault is not None:
            broken[len(counts)] = fault
            counts.append(0)
            ends.append(len(keys))
        starts.append(len(counts))
    return _Index(
        np.frombuffer(offsets, np.int64),
        np.frombuffer(lengths, np.int64),
        np.frombuffer(endings, np.int32),
        [code.decode("utf-8", "surrogateescape") for code in codes],
        np.concatenate([[0], np.cumsum(np.frombuffer(counts, np.int64))]).astype(np.int64),
        np.frombuffer(starts, np.int64),
        bytes(keys),
        np.frombuffer(ends, np.int64),
        broken,
    )
