"""A soft stop: SIGTERM and Ctrl-C become a flag that loops read."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from leveret.runs.errors import Interrupted


class _Stop:
    """The state behind `graceful_stop`: how deep we are, and whether a stop was asked for."""

    depth = 0
    asked = False


def stop_requested() -> bool:
    """Whether SIGTERM or Ctrl-C came inside `graceful_stop`. A loop that sees it saves and raises Interrupted."""
    return _Stop.asked


@contextlib.contextmanager
def graceful_stop() -> Iterator[None]:
    """Turn the first SIGTERM or Ctrl-C into a flag that `stop_requested` reads; a second one stops at once.

    May be nested, and does nothing off the main thread. A request that the body never polled is not lost: leaving
    the outermost block raises Interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if _Stop.asked:
            raise KeyboardInterrupt
        _Stop.asked = True
        print("stopping as soon as the work is saved; once more to stop at once", file=sys.stderr, flush=True)

    if _Stop.depth == 0:
        _Stop.asked = False
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    _Stop.depth += 1
    try:
        yield
        if _Stop.depth == 1 and _Stop.asked:
            raise Interrupted("stopped as asked; run the same command again to go on")
    finally:
        _Stop.depth -= 1
        if _Stop.depth == 0:
            _Stop.asked = False
            for number, handler in previous.items():
                signal.signal(number, handler)
