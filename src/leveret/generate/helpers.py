"""Processes that answer beside this one, started when it pays; no heavy import here. `crew` hands them their work."""

from __future__ import annotations

import sys

from leveret.processes import Worker
from leveret.runs import cores

START_FROM = 1_000
"""Questions from which starting helpers pays."""


class Helpers:
    """Processes that answer beside this one; the same ones serve any number of models, one after the other.

    They start, which takes seconds, when first there are many questions.
    count  how many; None: one for every core but one.
    least  questions from which they are many.
    """

    def __init__(self, count: int | None = None, least: int | None = None) -> None:
        self.count, self.least = count, least
        self.workers: list[Worker] | None = None

    def ready(self, questions: int) -> list[Worker]:
        """Those there are; for many questions they are started if they have not been."""
        if self.workers is None and questions >= (START_FROM if self.least is None else self.least):
            self.workers = [
                Worker("leveret.generate.crew") for _ in range(cores() - 1 if self.count is None else self.count)
            ]
        return list(self.workers or [])

    def lose(self, worker: Worker) -> None:
        """Go on without one that has ended."""
        assert self.workers is not None
        print("a process that helped to answer has ended; going on without it", file=sys.stderr, flush=True)
        self.workers.remove(worker)
        worker.close()

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers or []:
            worker.close()
        self.workers = None
