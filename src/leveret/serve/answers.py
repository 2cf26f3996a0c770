"""From the engine's thread to a reply, whole or in pieces.

    submit -> events (engine's thread) -> a queue (event loop) -> one JSON object, or server-sent events

Whatever ends a request (its answers, a client that left or does not read, the server's end) ends in `leave`: no answer
is made for nobody.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from leveret.generate.live import Chance, Event, Live, Prepared, Ticket, Told
from leveret.serve.messages import Form
from leveret.serve.protocol import ChatRequest
from leveret.serve.refusals import Refusal, failed, shutting_down

log = logging.getLogger(__name__)

QUIET = 15.0
"""Seconds without a piece after which a stream sends a comment, so that nobody on the way takes it for dead."""

LEAST = -9999.0
"""Written in place of minus infinity, which JSON does not have."""


class Gone(Exception):
    """The client has left."""


@dataclass(slots=True)
class Answers:
    """The answers of one request while they are made.

    on_first  called with the seconds until the first piece of text.
    on_end    called with every answer's last event.
    """

    live: Live
    prepared: Sequence[Prepared]
    request: ChatRequest
    form: Form | None
    name: str
    request_id: str
    on_first: Callable[[float], None] = lambda seconds: None
    on_end: Callable[[Event], None] = lambda event: None
    created: int = field(default_factory=lambda: int(time.time()))
    tickets: list[Ticket] = field(default_factory=list)
    queue: asyncio.Queue[tuple[int, Event | None]] = field(default_factory=asyncio.Queue)
    ended: dict[int, Event] = field(default_factory=dict)
    _begun: float = field(init=False, default=0.0)

    def submit(self) -> None:
        """Hand all to the engine, or none. Raises what `Live.submit` raises."""
        loop = asyncio.get_running_loop()
        self._begun = time.perf_counter()

        def hear(number: int) -> Callable[[Event], None]:
            def on_event(event: Event) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(self.queue.put_nowait, (number, event))

            return on_event

        self.tickets = self.live.submit_all([(one, hear(number)) for number, one in enumerate(self.prepared)])
        self.prepared = ()  # the pictures in them are the engine's now

    def leave(self) -> None:
        """No more of it is wanted. Harmless where all has ended."""
        for ticket in self.tickets:
            ticket.cancel()

    def hang_up(self) -> None:
        """The client has left: whoever listens here is told."""
        self.queue.put_nowait((-1, None))

    async def events(self) -> AsyncIterator[tuple[int, Event] | None]:
        """(which answer, its event) as they come, until all have ended; None after every QUIET seconds without one.

        Raises Gone when the client has left, and Refusal for an answer that the server could not end.
        """
        first = True
        while len(self.ended) < len(self.tickets):
            try:
                async with asyncio.timeout(QUIET):
                    number, event = await self.queue.get()
            except TimeoutError:
                yield None
                continue
            if event is None:
                raise Gone
            if event.text and first:
                first = False
                self.on_first(time.perf_counter() - self._begun)
            if event.finish is not None:
                self.ended[number] = event
                self.on_end(event)
                if event.finish in ("closed", "left"):
                    raise shutting_down()
                if event.finish == "failed":
                    log.error("%s: an answer failed", self.request_id, exc_info=event.fault)
                    raise failed(self.request_id)
            yield number, event

    # --- as one object --------------------------------------------------------------------------------------------

    async def whole(self) -> dict[str, Any]:
        """A `chat.completion`."""
        texts = [""] * len(self.tickets)
        told: list[list[Told]] = [[] for _ in self.tickets]
        async for each in self.events():
            if each is not None:
                number, event = each
                texts[number] += event.text
                told[number] += event.told
        choices = []
        for number, text in enumerate(texts):
            last = self.ended[number]
            said = self.form.write(text) if self.form else text
            choices.append(
                {
                    "index": number,
                    "message": {"role": "assistant", "content": said, "refusal": None},
                    "logprobs": self.logprobs(told[number], last.probabilities),
                    "finish_reason": finish_of(last),
                }
            )
        return {**self.head("chat.completion"), "choices": choices, "usage": self.usage()}

    # --- in pieces ------------------------------------------------------------------------------------------------

    async def pieces(self) -> AsyncIterator[bytes]:
        """Server-sent events: `chat.completion.chunk`s and [DONE]. What goes wrong on the way is an event too."""
        options = self.request.stream_options
        wants_usage = bool(options and options.include_usage)
        for number in range(len(self.tickets)):
            yield self.chunk(number, {"role": "assistant", "content": ""}, wants_usage)
        texts = [""] * len(self.tickets)
        try:
            async for each in self.events():
                if each is None:
                    yield b": still there\n\n"
                    continue
                number, event = each
                text, last = event.text, event.finish is not None
                if self.form is not None:  # written as JSON, which is known when it is whole
                    texts[number] += text
                    text = self.form.write(texts[number]) if last else ""
                logprobs = self.logprobs(event.told, event.probabilities)
                if text or logprobs:
                    yield self.chunk(number, {"content": text}, wants_usage, logprobs)
                if last:
                    yield self.chunk(number, {}, wants_usage, finish=finish_of(event))
        except Refusal as refusal:
            yield server_sent(refusal.body())
            yield DONE
            return
        if wants_usage:
            yield server_sent({**self.head("chat.completion.chunk"), "choices": [], "usage": self.usage()})
        yield DONE

    def chunk(
        self,
        number: int,
        delta: Mapping[str, Any],
        wants_usage: bool,
        logprobs: Mapping[str, Any] | None = None,
        finish: str | None = None,
    ) -> bytes:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if wants_usage else {}
        return server_sent({**self.head("chat.completion.chunk"), "choices": [choice], **usage})

    # --- what both are made of --------------------------------------------------------------------------------------

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.request_id}", "object": kind, "created": self.created, "model": self.name}

    def usage(self) -> dict[str, Any]:
        """The prompt counts once, however many answers it has; as OpenAI counts."""
        ends = self.ended.values()
        prompt = max((end.prompt_tokens for end in ends), default=0)
        made = sum(end.tokens for end in ends)
        # The first answer computes what the others share with it: nothing of that was known before.
        reused = min((end.reused_tokens for end in ends), default=0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def logprobs(self, told: Sequence[Told], chances: Mapping[str, float] | None) -> dict[str, Any] | None:
        """OpenAI's logprobs. Of a choice one entry, whose token is the whole answer and whose alternatives are the
        other choices, their probabilities renormalised."""
        if not self.request.logprobs:
            return None
        if chances is not None:
            told = [of_choices(chances, self.request.top_logprobs or 0)]
        if not told:
            return None
        content = [{**chance(one.chosen), "top_logprobs": [chance(other) for other in one.top]} for one in told]
        return {"content": content, "refusal": None}


def of_choices(chances: Mapping[str, float], most: int) -> Told:
    from math import log

    ranked = sorted(chances, key=chances.__getitem__, reverse=True)
    each = [Chance(text, log(chances[text]) if chances[text] > 0 else LEAST, text.encode()) for text in ranked]
    return Told(each[0], tuple(each[:most]))


def chance(one: Chance) -> dict[str, Any]:
    return {"token": one.token, "logprob": max(one.logprob, LEAST), "bytes": list(one.bytes)}


def finish_of(event: Event) -> str:
    return "length" if event.finish == "length" else "stop"


def server_sent(facts: Mapping[str, Any]) -> bytes:
    # ASCII: some clients take U+2028 for the end of a line, and with it of an event.
    return b"data: " + json.dumps(facts, separators=(",", ":")).encode("ascii") + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """Answers as server-sent events. However it ends, nothing is made for it afterwards."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.status_code, self.background, self.body = 200, None, b""
        # The second for nginx, which would else wait until it has a buffer full.
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(until_gone(receive))
        watch.add_done_callback(lambda task: self.answers.hang_up())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with suppress(Gone):
                async for piece in self.answers.pieces():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self.answers.leave()


async def whole(answers: Answers, receive: Receive) -> dict[str, Any]:
    """The answers as one object. Raises Gone when the client leaves, and Refusal."""
    watch = asyncio.create_task(until_gone(receive))
    watch.add_done_callback(lambda task: answers.hang_up())
    try:
        return await answers.whole()
    finally:
        watch.cancel()
        answers.leave()
