"""What a server gives to one request, to one client, and to all of them together."""

from __future__ import annotations

import contextlib
import math
import time
from collections import OrderedDict
from dataclasses import dataclass, field, fields

from leveret.runs import RecipeError

CLIENTS = 10_000
"""Clients whose rate is remembered. Who was silent longest is forgotten first, which is to his advantage."""


@dataclass(frozen=True, slots=True)
class Limits:
    """All bounds in one place; the defaults suit a machine with a few GiB.

    body_bytes      of one request. A photograph as a data URI takes 4/3 of its file.
    held_bytes      of all requests: their bodies while they are read, then their pictures, as they came and unpacked,
                    until the reply is sent. More than that must come again later.
    images          of one conversation.
    pixels          of one image, by its header, before it is unpacked.
    messages        of one conversation.
    characters      of all texts of a conversation. What the model has room for is found out later and is less.
    answer_tokens   of one answer; a request may ask for more and gets these.
    waiting         answers that wait for a slot; more get 429.
    connections     open at once.
    rate            requests a minute for one address, in bursts of up to a quarter of that; 0: as many as they like.
    header_seconds  from a connection (or the first byte of its next request) to the end of the headers.
    pause_seconds   between two pieces of a body.
    body_seconds    for a whole body.
    write_seconds   that a client may leave what it is sent unread.
    drain_seconds   after SIGTERM, for the answers in the making. `docker stop` kills after ten.

    Raises RecipeError for a value that is not positive.
    """

    body_bytes: int = 16 * 2**20
    held_bytes: int = 2**30
    images: int = 8
    pixels: int = 25_000_000
    messages: int = 256
    characters: int = 200_000
    answer_tokens: int = 1024
    waiting: int = 256
    connections: int = 512
    rate: float = 0.0
    header_seconds: float = 10.0
    pause_seconds: float = 15.0
    body_seconds: float = 120.0
    write_seconds: float = 60.0
    drain_seconds: float = 8.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            least = 0 if one.name in ("rate", "drain_seconds") else 1e-9
            if not (math.isfinite(value) and value >= least):
                raise RecipeError(f"{one.name}: got {value}; give a number {'above 0' if least else 'of 0 or more'}")


@dataclass(slots=True)
class Rate:
    """How often each client may come: a bucket that fills by `per_minute` and holds a quarter of that, at least one."""

    per_minute: float
    _left: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def wait(self, client: str, now: float | None = None) -> float:
        """Seconds until `client` may come again; 0.0 where it may now, which is then counted."""
        if not self.per_minute:
            return 0.0
        now = time.monotonic() if now is None else now
        most = max(1.0, self.per_minute / 4)
        left, since = self._left.pop(client, (most, now))
        left = min(most, left + (now - since) * self.per_minute / 60)
        allowed = left >= 1
        self._left[client] = (left - allowed, now)
        if len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if allowed else (1 - left) * 60 / self.per_minute


@dataclass(slots=True)
class Held:
    """Bytes that all requests together hold. Used from one thread."""

    most: int
    now: int = 0

    def take(self, size: int) -> bool:
        """Whether there is room for `size` more bytes, which are then counted."""
        if self.now + size > self.most:
            return False
        self.now += size
        return True

    def give_back(self, size: int) -> None:
        self.now -= size


def give_back() -> None:
    """Memory that was freed goes back to the system where the C library would keep it (glibc); elsewhere nothing."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
