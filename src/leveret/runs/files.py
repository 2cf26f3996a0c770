"""Files that are whole or not there: atomic writes, JSON and its lines, hashes, and a full disk told in words."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from leveret.runs.errors import DataError, EnvironmentFault, UserError


@contextlib.contextmanager
def atomic_file(path: str | Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """A file to write bytes into, piece by piece; a reader, or a crash at any moment, sees the old file at `path` or
    the new one, never a part.

    A temporary file in the same folder is written, and when the block ends it is synced and renamed; then the folder
    is synced, so that the rename itself survives a power cut. Missing folders are made.

    sync  False leaves it to the system when bytes reach the disk: a killed process still leaves all or nothing, but
          after a power cut the file may be short. For large files that can be made again, whose size is checked.

    Raises:
        OSError: the disk's own fault (full, read-only), with the file's name. At any error of the block the temporary
            file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The dot keeps it out of globs; the name is unguessable because several processes may write the same file.
    temporary = path.parent / f".{path.name[:80]}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        _name_file(error, path)
        raise
    if sync:
        sync_folder(path.parent)


_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Faults that only writing meets."""


def _name_file(error: BaseException, path: Path) -> None:
    """The system does not say into which file a write failed; whoever mends it wants to know."""
    if isinstance(error, OSError) and error.errno in _WRITING and error.filename is None:
        error.filename = str(path)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data`, whole or not at all, as `atomic_file` does. Text is UTF-8 with the line ends it has."""
    with atomic_file(path) as file:
        # Half a character (a JSON file may hold one) is written as JSON would: it is no UTF-8 by itself.
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


def sync_folder(folder: str | Path) -> None:
    """Make renames inside `folder` survive a power cut, where the system allows it."""
    with contextlib.suppress(OSError):  # some network file systems refuse to sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link_folder(source: Path, target: Path) -> None:
    """The folder `source` once more as `target`, in place of what is there, whole or not at all; its files are hard
    links, which take no room, or copies where the file system has none."""

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)

    writing = target.with_name(f".writing-{target.name}")
    shutil.rmtree(writing, ignore_errors=True)
    shutil.copytree(source, writing, copy_function=link)
    shutil.rmtree(target, ignore_errors=True)
    writing.rename(target)
    sync_folder(target.parent)


_DISK = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", "ENODEV", "ENXIO", "ESTALE")
    if hasattr(errno, name)
}
_IN_WORDS = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


@contextlib.contextmanager
def disk_faults(where: str | Path, mend: str) -> Iterator[None]:
    """Turn a disk that is full, read-only or broken into an EnvironmentFault that names the file and how to go on.

    Also where a library written in Rust, or the copying of a folder, says so in words alone. Other errors pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None) if isinstance(error, OSError) else None
        if number is None and (found := _IN_WORDS.search(str(error))):
            number = int(found[1] or found[2])
        if number is None or number not in _DISK:
            raise
        told = os.strerror(number).lower()
        file = getattr(error, "filename", None)
        words = f"{told}: {file}" if file else told
        raise EnvironmentFault(f"{where}: the disk failed ({words}). {mend}") from error


def _plain(value: Any) -> Any:
    """What json cannot write itself: paths, arrays and scalars of numpy or torch, dataclasses, sets."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {value!r:.80}")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, so that any reader can read the file."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _finite(_plain(value))


def as_json(obj: Any, **options: Any) -> str:
    """JSON that any reader takes: NaN and infinities are null, paths strings, arrays and sets lists.

    options: json's own. TypeError for what has no such form.
    """
    return json.dumps(_finite(obj), ensure_ascii=False, allow_nan=False, default=_plain, **options)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as readable JSON, atomically. NaN and infinities become null."""
    atomic_write(path, as_json(obj, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; DataError says which file, line and column is wrong, or that it is not there."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as fault:
        raise DataError(f"{path}: not UTF-8 text (byte {fault.start})") from None
    except json.JSONDecodeError as fault:
        raise DataError(f"{path}: not JSON: {fault.msg} at line {fault.lineno}, column {fault.colno}") from None


def append_jsonl(path: str | Path, obj: Any) -> None:
    """Add one line, in one write: a killed process leaves whole lines, or one torn last line."""
    path = Path(path)
    line = (as_json(obj) + "\n").encode("utf-8")
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        while line:
            line = line[os.write(handle, line) :]
    except OSError as error:
        _name_file(error, path)
        raise
    finally:
        os.close(handle)


def each_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON lines file, one at a time. A torn last line (a killed writer's) is dropped; any other fault
    is a DataError.

    A last line counts as torn when it has no line end and is not JSON.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as fault:
                if not line.endswith(b"\n"):
                    return
                raise DataError(f"{path}, line {number}: not JSON ({fault}): {line[:60].strip()!r}") from None


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a JSON lines file, as `each_jsonl` reads them."""
    return list(each_jsonl(path))


def repair_jsonl(path: str | Path) -> int:
    """Cut a torn last line, so that appending may go on; returns how many bytes were cut. A missing file is fine."""
    path = Path(path)
    if not path.exists():
        return 0
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        tail = b""
        start = size
        while start and b"\n" not in tail:
            step = min(65536, start)
            start -= step
            file.seek(start)
            tail = file.read(step) + tail
        last = tail.rpartition(b"\n")[2]
        if not last:
            return 0
        try:
            json.loads(last)
        except ValueError:
            file.truncate(size - len(last))
            return len(last)
        file.seek(0, os.SEEK_END)
        file.write(b"\n")  # a whole record whose line end was lost
        return 0


def sha256_of(obj_or_path: Any) -> str:
    """Hex SHA-256. A Path: the file's bytes (a folder: the sorted names and bytes of its files). bytes: themselves.
    Anything else, strings included: its JSON with sorted keys, so that equal recipes have equal hashes."""
    digest = hashlib.sha256()
    if isinstance(obj_or_path, Path):
        if obj_or_path.is_dir():
            for file in sorted(path for path in obj_or_path.rglob("*") if path.is_file()):
                name = file.relative_to(obj_or_path).as_posix()
                digest.update(f"{name}\n{sha256_of(file)}\n".encode())
            return digest.hexdigest()
        with open(obj_or_path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    data = obj_or_path if isinstance(obj_or_path, bytes) else as_json(obj_or_path, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()
