"""A disk that fails, or a process that dies, at a chosen call: every call that writes below a folder is counted."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

Act = Callable[[str], None]


def fails(number: int) -> Act:
    """The call raises OSError."""

    def act(path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    return act


def dies(path: str) -> None:
    """The process is killed, as kill -9 does it."""
    os.kill(os.getpid(), signal.SIGKILL)


FULL, BROKEN = fails(errno.ENOSPC), fails(errno.EIO)


class Disk:
    """What was called, in order: (what, path). At call number `at` (from 1) `act` happens; a write is half done."""

    def __init__(self, folder: Path, at: int = 0, act: Act = dies) -> None:
        self.folder, self.at, self.act = str(folder.resolve()), at, act
        self.calls: list[tuple[str, str]] = []
        self.names: dict[int, str] = {}

    @property
    def hit(self) -> bool:
        return 0 < self.at <= len(self.calls)

    def call(self, what: str, path: Any, half: Callable[[], Any] = lambda: None) -> None:
        where = self.names.get(path, "") if isinstance(path, int) else os.path.abspath(os.fspath(path))
        if where != self.folder and not where.startswith(self.folder + os.sep):
            return
        self.calls.append((what, where[len(self.folder) :]))
        if len(self.calls) == self.at:
            half()
            self.act(where)


class _File:
    """An open file whose writes are counted."""

    def __init__(self, file: Any, path: Any, disk: Disk) -> None:
        self._file, self._path, self._disk = file, path, disk
        disk.names[file.fileno()] = os.path.abspath(os.fspath(path))

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._disk.call("write", self._path, half)
        return self._file.write(data)

    def flush(self) -> None:
        self._disk.call("flush", self._path)
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *raised: Any) -> Any:
        return self._file.__exit__(*raised)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


@contextmanager
def watched(disk: Disk) -> Iterator[Disk]:
    """Everything that writes goes through `disk` meanwhile."""
    real_open, real = io.open, {name: getattr(os, name) for name in (
        "open", "write", "pwrite", "fsync", "replace", "rename", "mkdir", "link", "chmod")}  # fmt: skip

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        writes = isinstance(file, (str, os.PathLike)) and set(mode) & set("wxa+")
        if not writes:
            return real_open(file, mode, *args, **options)
        disk.call("open", file)
        found = real_open(file, mode, *args, **options)
        inside = os.path.abspath(os.fspath(file)).startswith(disk.folder)
        return _File(found, file, disk) if inside else found

    def os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            disk.call("open", path)
        handle = real["open"](path, flags, *args, **options)
        if isinstance(path, (str, os.PathLike)):
            disk.names[handle] = os.path.abspath(os.fspath(path))
        return handle

    def on_handle(name: str) -> Callable[..., Any]:
        def call(handle: int, *args: Any) -> Any:
            disk.call(name, handle)
            return real[name](handle, *args)

        return call

    def on_path(name: str) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **options: Any) -> Any:
            # Of two paths the second is the one that comes to be.
            disk.call(name, args[0] if name in ("replace", "rename", "link") else first)
            return real[name](first, *args, **options)

        return call

    new: dict[str, Any] = {name: on_handle(name) for name in ("write", "pwrite", "fsync")}
    new |= {name: on_path(name) for name in ("replace", "rename", "mkdir", "link", "chmod")} | {"open": os_open}
    with patch.object(builtins, "open", opened), patch.object(io, "open", opened), patch.multiple(os, **new):
        yield disk


def killed(work: Callable[[], Any]) -> int:
    """Run `work` in a child of this process; the signal it died of, or 0. What it says of an error is shown."""
    import traceback

    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended <= 0, "the child failed instead of being killed"
    return -ended
