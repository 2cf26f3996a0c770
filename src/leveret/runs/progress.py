"""How far a long job is."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_PLAIN_EVERY = 10.0


class Progress:
    """How far a loop is, on stderr: a bar on a terminal, a line every ten seconds elsewhere.

        with Progress(len(items), "embedding", "images") as progress:
            for item in items:
                progress.advance(1, cached=hits)

    `total` may be None when it is not known. What `advance` is given by name is shown behind the throughput.
    """

    def __init__(self, total: int | None, what: str, unit: str = "") -> None:
        self.total, self.what, self.unit = total, what, unit
        self.count = 0
        self._shown: dict[str, Any] = {}
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("[dim]{task.fields[tail]}"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, tail="")
        return self

    def advance(self, n: int = 1, **shown: Any) -> None:
        self.count += n
        self._shown.update(shown)
        if self._bar is not None:
            self._bar.update(self._task, advance=n, tail=self._tail())
            return
        now = time.monotonic()
        if now - self._last >= _PLAIN_EVERY:
            self._last = now
            print(self._line(now), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif kind is None and self.count:
            print(self._line(time.monotonic(), finished=True), file=sys.stderr, flush=True)

    def _rate(self, now: float) -> float:
        return self.count / max(now - self._start, 1e-9)

    def _tail(self) -> str:
        words = [f"{_brief(self._rate(time.monotonic()))} {self.unit}/s" if self.unit else ""]
        words += [f"{name} {_brief(value)}" for name, value in self._shown.items()]
        return "  ".join(word for word in words if word)

    def _line(self, now: float, finished: bool = False) -> str:
        of = f" of {self.total:,}" if self.total is not None else ""
        line = f"{self.what}: {self.count:,}{of} {self.unit}".rstrip() + f"  {self._tail()}"
        if finished:
            return f"{line}  done in {_clock(now - self._start)}"
        if self.total and self.count:
            line += f"  {_clock((self.total - self.count) / self._rate(now))} left"
        return line


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _clock(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
