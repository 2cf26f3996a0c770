"""Worker processes of our own: frames in, frames out, and an end with the one that started them.

Frames on stdin and stdout are a length (8 bytes, little end first) and that many bytes. No pickle, no shared state,
and no copy of the caller's `__main__`, so it works from scripts and notebooks. A worker reads until its stdin ends,
which it does with the parent, however that ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from leveret import own


class Worker:
    """A process that runs `module.main()`; it must call `serve`. `arguments` are its sys.argv[1:]."""

    def __init__(self, module: str, *arguments: str) -> None:
        here = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment = {**os.environ, **own.environment(), "PYTHONPATH": path, **threads}
        # A session of its own: Ctrl-C reaches the parent, which finishes what is in flight, and not the workers.
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {module} import main; main()", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def send(self, frame: bytes) -> None:
        """Give it a frame. OSError when it has ended."""
        assert self.process.stdin is not None
        _write(self.process.stdin, frame)

    def receive(self) -> bytes | None:
        """Its next frame; None when it has ended."""
        assert self.process.stdout is not None
        return _read(self.process.stdout)

    def close(self) -> None:
        """End it at once, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError, ValueError):  # a frame that was never taken may still be in the pipe's buffer
                assert pipe is not None
                pipe.close()


def serve(start: Callable[[], Callable[[bytes], bytes]]) -> None:
    """In the worker: answer every frame with one frame. `start` does the heavy imports and gives what answers.

    Answers go out on a copy of stdout; whatever a library prints goes to stderr and breaks no frame.
    """
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    answer = start()
    while (frame := _read(sys.stdin.buffer)) is not None:
        _write(out, answer(frame))


def _write(stream: IO[bytes], data: bytes) -> None:
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes | None:
    """The next frame; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "little")
    data = stream.read(size)
    return data if len(data) == size else None
