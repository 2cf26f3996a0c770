"""What is asked of `live.Live`, and what it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from leveret.generate.engine import Picture, Request
from leveret.generate.past import Trace
from leveret.generate.sampling import Sampling
from leveret.runs import DataError


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    request   images, turns, choices, the most tokens of the answer.
    sampling  how tokens are drawn.
    stop      further strings that end the answer and are no part of it.
    logprobs  how many alternatives are told for each token; 0: only the chosen token's own chance; None: nothing.
    priority  higher goes first; equal ones in order of arrival.
    """

    request: Request
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Chance:
    """A token with the natural logarithm of its probability: of the model itself, before any temperature.

    bytes  what the token adds to the text; `token` has marks of damage where that is no whole character, and is the
           name of a special token, which adds nothing.
    """

    token: str
    logprob: float
    bytes: bytes


@dataclass(frozen=True, slots=True)
class Told:
    """A token of the answer, and the likeliest tokens at its place."""

    chosen: Chance
    top: tuple[Chance, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of an answer; the last one has `finish`.

    text           new text. Joined over all events it is the answer.
    told           of the tokens that this text ends, where it was asked for.
    finish         "stop", "length", "choice", "left" (cancelled), "closed" (the server ends) or "failed".
    prompt_tokens  of the prompt; tokens: of the answer; reused_tokens: of the prompt, that were not computed again.
                   All three on the last event only.
    probabilities  of the choices, on the last event.
    fault          with "failed": what went wrong.
    """

    text: str = ""
    told: tuple[Told, ...] = ()
    finish: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    reused_tokens: int = 0
    probabilities: Mapping[str, float] | None = None
    fault: Exception | None = None


class Full(Exception):
    """The queue has no room. retry_after: seconds after which about half of it will be done."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} seconds")
        self.retry_after = retry_after


class NoRoom(DataError):
    """A prompt and its answer need more memory than answers are allowed, however long they wait. In bytes."""

    def __init__(self, prompt: int, limit: int, need: int, bound: int) -> None:
        super().__init__(
            f"the prompt of {prompt} tokens and an answer of {limit} need {need:,} bytes, and {bound:,} are allowed; "
            "shorten them, or allow more memory"
        )
        self.need, self.bound = need, bound


class Closed(Exception):
    """No new requests are taken any more."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as the engine takes it. May be submitted several times, also with other sampling (`again`)."""

    ask: Ask
    ids: list[int]
    marks: list[bool]
    trace: Trace
    spans: tuple[tuple[int, int], ...]
    images: tuple[str, ...]
    pictures: tuple[Picture, ...]
    limit: int
    choices: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of the prompt."""
        return len(self.ids)

    @property
    def bytes(self) -> int:
        """Of its pictures, as they came and unpacked: they are kept until its answer has ended."""
        unpacked = [array.nbytes for picture in self.pictures for array in (picture.pixels or {}).values()]
        return sum(len(picture.ref.path) for picture in self.pictures) + sum(unpacked)

    def again(self, sampling: Sampling) -> Prepared:
        """The same prompt with other draws, without the work of preparing it. Answers that are asked for together
        share what is computed of it."""
        return replace(self, ask=replace(self.ask, sampling=sampling))
