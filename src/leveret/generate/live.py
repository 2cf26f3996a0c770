"""One thread that answers whoever asks, joining new answers while others are being made.

    caller's thread     prepare   prompt to tokens; images read, hashed, unpacked, resized
                        submit    into a queue with a bound; `Full` says when to come again
    the engine's        admit -> advance | step -> events            (lanes.py)

When a pass over prompts is worth it: at once where nothing is being made; else when enough prompts have come for one
pass (a quarter of the answers in the making), or one has waited for `PATIENCE`, or a more urgent one came. Between two
steps prompts get at most `SHARE` seconds (or three steps' time), so that answers in the making go on behind any prompt.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Literal, TypeVar

from leveret.generate.asks import Ask, Chance, Closed, Event, Full, NoRoom, Prepared, Told
from leveret.generate.engine import Engine
from leveret.generate.guests import Guest, smooth, spans_of, trace_of
from leveret.generate.lanes import Lanes
from leveret.generate.sampling import Sampling
from leveret.inputs.text import Pieces, Stops, spelling
from leveret.runs import DataError

__all__ = ["Ask", "Chance", "Closed", "Event", "Full", "Live", "NoRoom", "Prepared", "Sampling", "Ticket", "Told"]

PATIENCE = 0.05
"""Seconds that a prompt waits for others to join it in a pass, at most."""
SHARE = 0.1
"""Seconds of passes over prompts between two steps of those who have theirs behind them."""
PASS = 0.5
"""Seconds of one pass over prompts where nobody waits for a step: who comes meanwhile waits for its end."""
LEAST = 64
"""Positions of a pass over prompts, at least."""
SMOOTH = 0.02
"""Seconds between two events of one answer, at least: fifty a second are as smooth as can be seen."""
IDLE = 2.0
"""Seconds without work after which the rows' memory is given back."""
MOST_LOGPROBS = 20
"""Alternatives told for a token, at most: OpenAI's bound."""

T = TypeVar("T")
Running = Literal["open", "draining", "closing", "closed"]
log = logging.getLogger(__name__)


class Ticket:
    """A request that was taken."""

    def __init__(self, live: Live, prepared: Prepared, guest: Guest, on_event: Callable[[Event], None]) -> None:
        self._live, self._guest, self._on_event = live, guest, on_event
        self._choices = prepared.ask.request.choices or ()
        self._pieces = Pieces(live.engine.vlm.tokenizer, live.stops(prepared.ask.stop))
        self._watched = bool(self._pieces.stops.strings)
        self._shown = 0  # tokens of which the text was made
        self._untold: deque[tuple[int, Told]] = deque()  # where each begins in the text
        self._last = 0.0  # when the last event was
        self._ended = self._cancelled = False
        self._counted = 0  # tokens that the queue has more by this one: of answers to one prompt the first tells them

    def cancel(self) -> None:
        """Stop the answer; it leaves its slot at the next step, with a last event "left". Nothing if it has ended."""
        self._live._cancel(self)

    @property
    def _rank(self) -> tuple[int, int]:
        return -self._guest.priority, self._guest.number


class Live:
    """An engine at work for many at once. Takes the engine for itself: nobody else may ask it meanwhile, but through
    `between`.

    waiting         requests in the queue, at most.
    waiting_tokens  tokens of their prompts, at most; None takes 131,072. The first in the queue is always taken.
    past            bytes of keys and values kept of earlier conversations; None takes the engine's `cache_bytes`.
    idle            called in the engine's thread, once, when there has been no work for `IDLE` seconds.

    The engine's `memory` bounds all that is held for answers: an eighth of it is for earlier conversations, an eighth
    for images, the rest for the answers in the making. What one pass computes comes on top.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        waiting: int = 256,
        waiting_tokens: int | None = None,
        past: int | None = None,
        idle: Callable[[], object] = lambda: None,
    ) -> None:
        if waiting < 1 or (waiting_tokens is not None and waiting_tokens < 1):
            raise DataError(f"waiting and waiting_tokens must be at least 1; got {waiting} and {waiting_tokens}")
        self._idle = idle
        self.engine, self.waiting, self.waiting_tokens = engine, waiting, waiting_tokens or 2**17
        kept, rows = engine.kept, engine.memory
        if rows is not None:
            kept = min(kept, rows // 8)
            rows -= 2 * kept
            engine.eyes.keep(kept)
        self.lanes = Lanes(
            engine.vlm, engine.most, engine.eyes.features, engine.stops, bf16=engine.bf16, threads=engine.threads,
            past=kept if past is None else past, memory=rows, relieve=engine.eyes.forget,
        )  # fmt: skip
        self._door = threading.Condition()  # guards everything down to `_reading`
        self._state: Running = "open"
        self._line: list[tuple[tuple[int, int], Ticket]] = []  # those that wait, in order
        self._line_tokens = self._number = 0
        self._leaving: deque[Ticket] = deque()
        self._works: deque[Callable[[], None]] = deque()
        self._counts = dict.fromkeys(
            ("answered", "left", "closed", "failed", "refused", "tokens", "prompt_tokens", "reused_tokens"), 0
        )
        self._reading = threading.Lock()  # tokenizers are asked by one thread at a time
        self._inside: dict[int, Ticket] = {}  # by id of the guest; the engine's thread only, as all that follows
        self._prompting = 0.0  # seconds of passes over prompts since the last step
        self._usual = float(engine.max_new_tokens)  # tokens of an answer, about
        self._spelled: dict[int, tuple[str, bytes]] = {}
        self._thread = threading.Thread(target=self._run, name="leveret-live", daemon=True)
        self._thread.start()

    # --- for callers, in any thread ----------------------------------------------------------------------------------

    def prepare(self, ask: Ask) -> Prepared:
        """Encode a prompt; read, check and resize its images.

        Raises DataError when it cannot be answered (see `Engine.answer`), NoRoom when it never would find room, and
        ImageFault when an image is refused.
        """
        if ask.logprobs is not None and not 0 <= ask.logprobs <= MOST_LOGPROBS:
            raise DataError(f"logprobs: got {ask.logprobs}; allowed are 0 to {MOST_LOGPROBS} alternatives")
        if not all(ask.stop):
            raise DataError("stop: an empty string ends no answer; give it some words, or leave it out")
        seen = {ref: self.engine.eyes.look(ref) for ref in dict.fromkeys(ask.request.images)}
        with self._reading:
            reply = self.engine.reply(ask.request, seen.__getitem__)
        if (need := self.lanes.need(len(reply.ids) + reply.limit)) > self.lanes.bound:
            raise NoRoom(len(reply.ids), reply.limit, need, self.lanes.bound)
        pictures = tuple(seen[ref] for ref in ask.request.images)
        counts = [self.engine.vlm.spec.count(*picture.size) for picture in pictures]
        return Prepared(
            ask, reply.ids, reply.marks, trace_of(reply.ids, reply.marks, reply.images, counts),
            spans_of(reply.marks, counts), reply.images, pictures, reply.limit, reply.choices,
        )  # fmt: skip

    def submit(self, prepared: Prepared, on_event: Callable[[Event], None]) -> Ticket:
        """Put a request into the queue. `on_event` gets its pieces, in the engine's thread: it must not take long, and
        if it raises, the answer is left. Raises Full and Closed."""
        return self.submit_all([(prepared, on_event)])[0]

    def submit_all(self, group: Sequence[tuple[Prepared, Callable[[Event], None]]]) -> list[Ticket]:
        """Put requests with one prompt into the queue, all or none; where nobody waits they are always taken."""
        tickets = [self._ticket(prepared, on_event) for prepared, on_event in group]
        tokens = max((prepared.tokens for prepared, _ in group), default=0)
        with self._door:
            if self._state != "open":
                raise Closed("no new requests are taken any more")
            if self._line and (
                len(self._line) + len(tickets) > self.waiting or self._line_tokens + tokens > self.waiting_tokens
            ):
                self._counts["refused"] += 1
                raise Full(min(300.0, max(1.0, self._ahead() / 2)))
            for ticket in tickets:
                ticket._guest.number = self._number
                self._number += 1
                insort(self._line, (ticket._rank, ticket), key=lambda entry: entry[0])
            for ticket in tickets[:1]:
                ticket._counted = tokens
            self._line_tokens += tokens
            self._door.notify_all()
        return tickets

    def _ticket(self, prepared: Prepared, on_event: Callable[[Event], None]) -> Ticket:
        ask = prepared.ask
        guest = Guest(
            prepared.ids, prepared.marks, prepared.images, prepared.limit, prepared.pictures, ask.sampling.picker(),
            prepared.choices, trace=prepared.trace, spans=prepared.spans, logprobs=ask.logprobs, priority=ask.priority,
            came=time.perf_counter(),
        )  # fmt: skip
        return Ticket(self, prepared, guest, on_event)

    def between(self, work: Callable[[], T]) -> T:
        """Run something in the engine's thread, between two passes, and give what it gives: for whoever needs the
        model for a moment. Raises what it raises, and Closed."""
        return self.soon(work).result()

    def soon(self, work: Callable[[], T]) -> Future[T]:
        """What `between` gives, when it is there; what is cancelled before it began is not done. Raises Closed."""
        found: Future[T] = Future()

        def run() -> None:
            if not found.set_running_or_notify_cancel():
                return
            try:
                found.set_result(work())
            except BaseException as fault:
                found.set_exception(fault)

        with self._door:
            if self._state in ("closing", "closed"):
                raise Closed("the engine has ended")
            self._works.append(run)
            self._door.notify_all()
        return found

    def figures(self) -> dict[str, float]:
        """How it stands: requests that wait, come in and are being made; what was counted since it began; what is kept;
        measured speeds. Cheap, and never waits for a pass."""
        lanes, eyes, rows = self.lanes, self.engine.eyes, self.lanes.cache.kv
        with self._door:
            found = {
                "waiting": len(self._line),
                "waiting_tokens": self._line_tokens,
                "entering": len(lanes.entering),
                "active": len(lanes.active),
                "slots": lanes.size,
                **self._counts,
                "steps": lanes.steps,
                "prompt_passes": lanes.passes,
                "prompt_tokens_per_second": lanes.prompts,
                "step_seconds": lanes.seconds,
                "seconds_ahead": self._ahead(),
                "images_kept": len(eyes.shelf),
                "image_bytes": eyes.shelf.bytes,
                "image_hits": eyes.hits,
                "image_misses": eyes.misses,
                "past_runs": len(lanes.past),
                "past_bytes": lanes.past.bytes,
                "row_bytes": 0 if rows is None else rows.nbytes,
            }
        return {name: float(value) for name, value in found.items()}

    def drain(self, seconds: float) -> None:
        """Take no new requests and wait for those that are here, at most so long; what has not ended then gets a last
        event "closed". The thread has ended when this returns."""
        with self._door:
            if self._state == "open":
                self._state = "draining"
            self._door.notify_all()
            self._door.wait_for(lambda: self._state == "closed" or not self._busy(), max(0.0, seconds))
            if self._state != "closed":
                self._state = "closing"
            self._door.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def close(self) -> None:
        """End now: what is here gets a last event "closed"."""
        self.drain(0)

    def stops(self, more: tuple[str, ...] = ()) -> Stops:
        """What ends an answer: the model's own, and further strings."""
        stops = self.engine.stops
        return replace(stops, strings=tuple(dict.fromkeys((*stops.strings, *more)))) if more else stops

    # --- the engine's thread -----------------------------------------------------------------------------------------

    def _busy(self) -> bool:
        return bool(self._line or self._inside or self._leaving or self._works)

    def _ahead(self) -> float:
        """Seconds until what is here has been answered, as fast as it went until now."""
        lanes = self.lanes
        prompts = self._line_tokens / lanes.prompts if lanes.prompts else 0.0
        answers = (len(self._line) + lanes.used / 2) * self._usual * lanes.seconds / lanes.size
        return prompts + answers

    def _cancel(self, ticket: Ticket) -> None:
        with self._door:
            if not ticket._ended and not ticket._cancelled:
                ticket._cancelled = True
                self._leaving.append(ticket)
                self._door.notify_all()

    def _run(self) -> None:
        while True:
            with self._door:
                if self._state == "closing":
                    break
                if not self._busy():
                    self._door.notify_all()  # whoever drains
                    if not self._door.wait_for(lambda: self._busy() or self._state == "closing", IDLE):
                        self.lanes.release()
                        self._idle()
                        self._door.wait_for(lambda: self._busy() or self._state == "closing")
                    continue
                leaving, works = list(self._leaving), list(self._works)
                self._leaving.clear()
                self._works.clear()
            for work in works:
                work()
            try:
                for ticket in leaving:
                    self._leave(ticket)
                self._admit()
                self._turn()
            except Exception as fault:  # our own mistake: it costs those who are inside, and nobody else
                log.exception("the engine's thread failed")
                self._broken(fault)
        self._end()

    def _leave(self, ticket: Ticket) -> None:
        with self._door:
            entry = (ticket._rank, ticket)
            if entry in self._line:
                self._line.remove(entry)
                self._line_tokens -= ticket._counted
        if not ticket._ended:
            self.lanes.leave(ticket._guest, "left")
            ticket._guest.finish = ticket._guest.finish or "left"
            self._tell(ticket)

    def _admit(self) -> None:
        """Give rows to those that wait, in their order; who waits for another's prompt lets others by."""
        with self._door:
            line = [ticket for _, ticket in self._line] if self.lanes.free else []
        for ticket in line:
            guest = ticket._guest
            if not self.lanes.room(guest):
                return
            try:
                if not self.lanes.admit(guest):
                    continue
            except Exception as fault:  # no memory for its row
                guest.finish, guest.fault = "failed", fault
            self._inside[id(guest)] = ticket
            with self._door:
                self._line.remove((ticket._rank, ticket))
                self._line_tokens -= ticket._counted
            if guest.finish:
                self._tell(ticket)

    def _turn(self) -> None:
        """One pass, of prompts or of answers, and what it gave."""
        lanes, began = self.lanes, time.perf_counter()
        share = max(SHARE, 3 * lanes.seconds)
        if lanes.entering and self._worth(began, share):
            seconds = share - self._prompting if lanes.active else PASS
            most = int(min(lanes.pass_tokens, lanes.prompts * seconds)) if lanes.prompts else 8 * LEAST
            ended = lanes.advance(max(LEAST, most))
            self._prompting += time.perf_counter() - began
        else:
            ended = lanes.step()
            self._prompting = 0.0
        now = time.perf_counter()
        for guest in [*ended, *lanes.active]:
            ticket = self._inside[id(guest)]
            # Some answers end by their text, which is read at every token; of the others now and then.
            if guest.finish or ticket._watched or now - ticket._last >= SMOOTH:
                self._tell(ticket, now)

    def _worth(self, now: float, share: float) -> bool:
        """Whether a pass over prompts comes next."""
        lanes = self.lanes
        if not lanes.active:
            return True
        if self._prompting >= share:
            return False
        return (
            4 * len(lanes.entering) >= len(lanes.active)
            or any(guest.inputs is not None for guest in lanes.entering)  # it has begun
            or now - min(guest.came for guest in lanes.entering) >= PATIENCE
            or max(guest.priority for guest in lanes.entering) > max(guest.priority for guest in lanes.active)
        )

    # --- events ------------------------------------------------------------------------------------------------------

    def _tell(self, ticket: Ticket, now: float = 0.0) -> None:
        """The text and the chances that are new, and the end where it has come; ends an answer at a stop string."""
        guest, pieces = ticket._guest, ticket._pieces
        new = guest.tokens[ticket._shown :]
        ticket._shown += len(new)
        if guest.logprobs is None:
            pieces.add(new)
        else:
            for token, (own, others) in zip(new, guest.told, strict=False):
                ticket._untold.append((pieces.read, self._told(token, own, others)))
                pieces.add([token])
            guest.told.clear()
        if pieces.stopped and guest.finish in (None, "length"):
            self.lanes.leave(guest, "stop")
            guest.finish = "stop"
        text = pieces.take(last=guest.finish is not None)
        told = []
        while ticket._untold and (ticket._untold[0][0] < (pieces.read if guest.finish else pieces.given)):
            told.append(ticket._untold.popleft()[1])
        if guest.finish and not pieces.stopped:
            told += [one for _, one in ticket._untold]
        if guest.finish:
            self._over(ticket, text, tuple(told))
        elif text or told:
            ticket._last = now
            self._send(ticket, Event(text, tuple(told)))

    def _over(self, ticket: Ticket, text: str, told: tuple[Told, ...]) -> None:
        """The last event of an answer."""
        guest = ticket._guest
        assert guest.finish is not None
        chances = None
        if guest.finish == "choice":
            chances = dict(zip(ticket._choices, guest.chances, strict=True))
            text = max(chances, key=chances.__getitem__)
        kind = guest.finish if guest.finish in ("left", "closed", "failed") else "answered"
        if kind == "answered" and guest.finish != "choice":
            self._usual = smooth(self._usual, len(guest.tokens))
        with self._door:
            self._counts[kind] += 1
            for name, count in (("tokens", len(guest.tokens)), ("prompt_tokens", len(guest.ids)),
                                ("reused_tokens", guest.reused)):  # fmt: skip
                self._counts[name] += count
            self._inside.pop(id(guest), None)
            ticket._ended = True
        self._send(
            ticket,
            Event(text, told, guest.finish, len(guest.ids), len(guest.tokens), guest.reused, chances, guest.fault),
        )
        ticket._on_event = _nobody  # whoever keeps the ticket keeps neither his own things nor the images by it
        guest.pictures, ticket._choices = (), ()

    def _send(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket._on_event(event)
        except Exception:
            log.exception("whoever asked could not take an answer")
            self._cancel(ticket)

    def _told(self, token: int, own: float, others: list[tuple[int, float]]) -> Told:
        return Told(self._chance(token, own), tuple(self._chance(*other) for other in others))

    def _chance(self, token: int, logprob: float) -> Chance:
        if token not in self._spelled:
            self._spelled[token] = spelling(self.engine.vlm.tokenizer, token)
        text, held = self._spelled[token]
        return Chance(text, logprob, held)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _broken(self, fault: Exception) -> None:
        self.lanes.empty()
        for ticket in list(self._inside.values()):
            ticket._guest.finish, ticket._guest.fault = "failed", fault
            self._over(ticket, "", ())

    def _end(self) -> None:
        """A last event for everyone, and the thread ends."""
        with self._door:
            line = [ticket for _, ticket in self._line]
            self._line.clear()
            self._line_tokens = 0
            works = list(self._works)
        for work in works:
            work()
        for ticket in [*self._inside.values(), *line]:
            if not ticket._ended:
                try:
                    self.lanes.leave(ticket._guest, "closed")
                except Exception:
                    log.exception("a row could not be given back")
                ticket._guest.finish = ticket._guest.finish or "closed"
                self._tell(ticket)
        self.lanes.empty()
        with self._door:
            self._state = "closed"
            self._door.notify_all()


def _nobody(event: Event) -> None:
    """Who listens to an answer that has ended."""


def answer(live: Live, ask: Ask) -> tuple[str, Event]:
    """Ask and wait: the whole answer, and its last event. For scripts and tests. Raises what `prepare`, `submit` and a
    failed answer raise."""
    found: Future[Event] = Future()
    pieces: list[str] = []

    def on_event(event: Event) -> None:
        pieces.append(event.text)
        if event.finish:
            found.set_result(event)

    live.submit(live.prepare(ask), on_event)
    last = found.result()
    if last.fault is not None:
        raise last.fault
    return "".join(pieces), last
