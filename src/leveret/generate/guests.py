"""A request that came by itself, as the slots of a server know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from torch import Tensor

from leveret.generate.past import Trace, image_trace
from leveret.generate.slots import Reply

Chances = list[tuple[int, float]]
"""Tokens and the natural logarithms of their probabilities."""


@dataclass(slots=True, eq=False)
class Guest(Reply):
    """One answer in the making, which came by itself.

    trace     what its prompt is told by (`past.Trace`).
    spans     where each of its images begins and ends.
    logprobs  how many alternatives are told for each token; None: nothing is.
    priority  higher goes first. number: of arrival.
    came      when (`time.perf_counter`).
    filled    columns of its row that are computed.
    reused    of these, how many something else had computed.
    runs      what these are copied from when its first pass comes: until then its row is empty.
    awaits    a prompt on its way in that will hold more of this one than is known yet.
    inputs    embeddings of the prompt from `reused` on, [T, D], while it comes in.
    told      of every token its own log-probability, and those of the likeliest ones.
    fault     why it failed.
    """

    trace: Trace = field(default_factory=lambda: np.empty(0, np.int64))
    spans: tuple[tuple[int, int], ...] = ()
    logprobs: int | None = None
    priority: int = 0
    number: int = 0
    came: float = 0.0
    filled: int = 0
    reused: int = 0
    runs: list[tuple[Tensor, int]] = field(default_factory=list)
    awaits: Guest | None = None
    inputs: Tensor | None = None
    told: list[tuple[float, Chances]] = field(default_factory=list)
    fault: Exception | None = None

    @property
    def held(self) -> int:
        """Columns that stand in its row."""
        return 0 if self.runs else self.filled

    @property
    def rest(self) -> int:
        """Tokens of the prompt that are not in yet."""
        return len(self.ids) - self.filled

    def whole(self, length: int) -> int:
        """The largest beginning of the prompt, at most `length`, that cuts no image and leaves a token to compute."""
        length = min(length, len(self.ids) - 1)
        return next((first for first, last in self.spans if first < length < last), length)


def spans_of(marks: Sequence[bool], counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Where each image begins and ends, of a mask of image tokens and how many each has."""
    places = np.flatnonzero(np.asarray(marks, bool))
    ends = np.cumsum([0, *counts])
    return tuple((int(places[first]), int(places[last - 1]) + 1) for first, last in pairwise(ends) if last > first)


def trace_of(ids: Sequence[int], marks: Sequence[bool], images: Sequence[str], counts: Sequence[int]) -> Trace:
    """The trace of a prompt: its ids, and at image tokens what tells this image."""
    trace = np.asarray(ids, np.int64)
    if images:
        trace[np.asarray(marks, bool)] = np.concatenate(list(map(image_trace, images, counts)))
    return trace


def smooth(before: float, now: float) -> float:
    """An average that forgets: a tenth of it is new."""
    return now if not before else 0.9 * before + 0.1 * now
