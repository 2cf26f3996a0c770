"""Archives of images laid out as files: nothing leaves the folder, a killed run goes on, what is there is not written
again.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from leveret.pool.fetch import enough
from leveret.runs import DataError, Interrupted, UserError, atomic_file, in_words, read_json, stop_requested, write_json

_STRAY = re.compile(r"(^|/)(__MACOSX/|\.DS_Store$|\._)")
"""What a Mac puts into archives beside the files."""


@dataclass(frozen=True)
class Unpacked:
    """files: in the archive. written: of them, now. refused: why -> members left out."""

    files: int
    written: int
    refused: Mapping[str, int]


def unpack(
    parts: Sequence[Path], into: Path, form: str, *, strip: str | None = None, told: Callable[[int], None] | None = None
) -> Unpacked:
    """Lay out an archive (or the parts of one, which are joined while reading) below `into`.

    form: zip, tar or tar.gz. strip: a first folder that is left out of names that begin with it. told: called with each
    file's bytes. An archive that was wholly laid out there is not looked at again.

    Links, devices, absolute paths and `..` are refused and counted. DataError if the archive is damaged or cut off;
    EnvironmentFault if the disk cannot hold it; Interrupted, and the same call goes on.
    """
    key = {"archive": [[path.name, path.stat().st_size] for path in parts], "strip": strip}
    mark = into / f".unpacked-{parts[0].name}.json"
    if mark.exists() and (done := read_json(mark))["key"] == key:
        return Unpacked(done["files"], 0, done["refused"])
    into.mkdir(parents=True, exist_ok=True)
    inside = _folders(into)
    refused: Counter[str] = Counter()
    files = written = 0
    members = _zipped if form == "zip" else _tarred
    try:
        for name, size, file, fault in members(parts, into):
            if stop_requested():
                raise Interrupted(f"unpacking stopped after {files:,} files; run the same command again to go on")
            if _STRAY.search(name):
                continue
            fault = fault or _odd(name)
            pieces = [piece for piece in name.split("/") if piece not in ("", ".")]
            if strip and pieces[:1] == [strip]:
                pieces = pieces[1:]
            if not fault and not inside(pieces):
                fault = "leaves the folder by a link"
            if fault:
                refused[fault] += 1
                continue
            files += 1
            place = into.joinpath(*pieces)
            # Files are written under another name first, so one of the right size is whole.
            if not (place.is_file() and place.stat().st_size == size):
                assert file is not None
                with file() as source, atomic_file(place, sync=False) as target:
                    while data := source.read(1 << 20):
                        target.write(data)
                written += 1
            if told is not None:
                told(size)
    except UserError:
        raise
    except _DAMAGE as fault:
        raise DataError(
            f"{parts[0]}{f' and {len(parts) - 1} more parts' * (len(parts) > 1)}: damaged or cut off after {files:,} "
            f"files ({fault}). Fetch it again: delete it and run the same command."
        ) from None
    if not files:
        raise DataError(f"{parts[0]}: it holds no files{f' but {in_words(refused)}' if refused else ''}.")
    write_json(mark, {"key": key, "files": files, "refused": dict(refused)})
    return Unpacked(files, written, dict(refused))


_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, NotImplementedError,
)  # fmt: skip
"""What the libraries raise at archives that are not whole, or none."""

_Member = tuple[str, int, Callable[[], IO[bytes]] | None, str]
"""Name, bytes, what opens it, and why it is refused ("" if it is not)."""


def _odd(name: str) -> str:
    if name.startswith("/") or "\\" in name or ":" in name or "\0" in name:
        return "absolute or odd path"
    return "path with .." if ".." in name.split("/") else ""


def _folders(into: Path) -> Callable[[Sequence[str]], bool]:
    """Whether a path's folder lies inside `into` once links are followed; asked once a folder."""
    root, known = into.resolve(), dict[tuple[str, ...], bool]()

    def inside(pieces: Sequence[str]) -> bool:
        folder = tuple(pieces[:-1])
        if not pieces:
            return False
        if folder not in known:
            known[folder] = into.joinpath(*folder).resolve().is_relative_to(root)
        return known[folder]

    return inside


def _zipped(parts: Sequence[Path], into: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(_Joined(parts) if len(parts) > 1 else parts[0]) as archive:
        members = [one for one in archive.infolist() if not one.is_dir()]
        enough(into, sum(one.file_size for one in members) - sum(_size(into, one.filename) for one in members))
        for one in members:
            link = (one.external_attr >> 16) & 0o170000 == 0o120000

            def opened(one: zipfile.ZipInfo = one) -> IO[bytes]:
                return archive.open(one)

            yield one.filename, one.file_size, opened, "link" if link else "encrypted" if one.flag_bits & 1 else ""


def _size(into: Path, name: str) -> int:
    try:
        return (into / name).stat().st_size if not _odd(name) else 0
    except OSError:
        return 0


def _tarred(parts: Sequence[Path], into: Path) -> Iterator[_Member]:
    # Images hardly shrink: what a tar of them becomes is what it is. (Its table is at no one place, so it is not read.)
    enough(into, sum(path.stat().st_size for path in parts) if not any(into.iterdir()) else 0)
    with _Joined(parts) as joined:
        packed = joined.read(2) == b"\x1f\x8b"
        joined.seek(0)
        # tarfile's own unpacking of a stream takes a cut one for a whole one; gzip's does not.
        stream = _Counted(gzip.GzipFile(fileobj=joined) if packed else joined)
        with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
            for one in archive:
                if one.isdir():
                    continue
                if not one.isreg():
                    yield one.name, 0, None, "link" if one.issym() or one.islnk() else "no plain file"
                    continue

                def opened(one: tarfile.TarInfo = one) -> IO[bytes]:
                    file = archive.extractfile(one)
                    assert file is not None
                    return file

                yield one.name, one.size, opened, ""
            if stream.read_so_far < archive.offset + tarfile.BLOCKSIZE:
                raise EOFError("the mark at a tar's end is missing")
            while stream.read(1 << 20):  # to the checksum
                pass


class _Counted:
    """A stream that knows how much of it was read."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.read_so_far = stream, 0

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        self.read_so_far += len(data)
        return data


class _Joined(io.RawIOBase):
    """Several files read as one, without a copy of them all."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._parts = list(parts)
        self._starts = [0]
        for path in parts:
            self._starts.append(self._starts[-1] + path.stat().st_size)
        self._at = 0
        self._file: IO[bytes] | None = None
        self._open = -1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._starts[-1]}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._starts[-1]:
            return 0
        part = next(n for n, end in enumerate(self._starts[1:]) if self._at < end)
        if part != self._open:
            if self._file is not None:
                self._file.close()
            self._file, self._open = open(self._parts[part], "rb"), part
        assert self._file is not None
        self._file.seek(self._at - self._starts[part])
        data = self._file.read(min(len(buffer), self._starts[part + 1] - self._at))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
