"""Slots whose prompts come in bit by bit, for a server: nobody waits long behind another's prompt.

    admit     a prompt gets a row, and the keys and values of the longest known beginning of it: of earlier
              conversations (`Past`), or of a row that is in use
    advance   one bounded pass over prompts that are not in yet; who is all in gets his first token and joins the others
    step      one pass over these gives each his next token
    leave     an answer that ends gives its row back, and its keys and values go to `Past`

Rows of answers in the making are always 0..n-1, those of prompts on their way in follow. A pass that fails is tried
again in halves until the culprit is alone; only he fails. `Engine.answer` does not come here.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leveret.generate.memory import COLUMNS, Costs, spare
from leveret.generate.past import Past, Trace, alike, image_trace
from leveret.generate.slots import Finish, Reply, Slots

WORTH = 16
"""Tokens that must be gained before a prompt waits for another that begins like it."""
GROW = 1.5
"""Rows that become too short are made longer by this factor, so that they are seldom copied."""
PROMISED = 1024
"""Tokens of a row to begin with, on a CPU."""
MANY = 64
"""Positions from which a pass tells how fast prompts are computed."""

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


class Lanes(Slots):
    """See the module's docstring.

    past     bytes of keys and values kept of earlier conversations.
    memory   bytes that rows may take; None takes a share of what is free. Rows that would need more wait.
    relieve  gives memory back elsewhere when there is none left.

    Speeds, measured as it runs: `prompts` (positions a second), `seconds` (of a step).
    """

    def __init__(
        self,
        *args: Any,
        past: int,
        memory: int | None = None,
        relieve: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        super().__init__(*args, shelf=0, **options)
        self.active: list[Guest] = []  # type: ignore[assignment]
        self.entering: list[Guest] = []
        self.past = Past(past)
        self.kv = Costs(self.vlm, self.bf16).kv
        share = 2 if self.vlm.device.type == "cuda" else 4
        self.bound = memory if memory is not None else spare(self.vlm.device) // share
        self.relieve = relieve
        self.prompts = self.seconds = 0.0
        self.passes = self.steps = 0

    @property
    def used(self) -> int:
        return len(self.active) + len(self.entering)

    @property
    def free(self) -> int:
        return self.size - self.used

    # --- coming in ---------------------------------------------------------------------------------------------------

    def need(self, tokens: int) -> int:
        """Bytes of a row for so many tokens."""
        return -(-tokens // COLUMNS) * COLUMNS * self.kv

    def room(self, guest: Guest) -> bool:
        """Whether there is a row for it, and memory: rows are as long as the longest."""
        longest = max(len(other.ids) + other.limit for other in (guest, *self.active, *self.entering))
        return self.free > 0 and (not self.used or (self.used + 1) * self.need(longest) <= self.bound)

    @torch.inference_mode()
    def admit(self, guest: Guest) -> bool:
        """Give a prompt a row, with what is known of it. False, and nothing done, where another prompt on its way in
        will soon hold much more of it (`Guest.awaits`)."""
        if guest.awaits is not None:
            if guest.awaits in self.entering:
                return False
            guest.awaits = None
        runs = self.past.match(guest.trace)
        kept = guest.whole(sum(count for _, count in runs))
        known, source, promised = kept, -1, kept
        for row, other in enumerate([*self.active, *self.entering]):
            # Who knows more than is known already has the next token too.
            if len(other.ids) <= known or other.trace[known] != guest.trace[known]:
                continue
            shared = guest.whole(alike(guest.trace, other.trace))
            ready = guest.whole(min(shared, other.held))
            if ready > known:
                known, source = ready, row
            if row >= len(self.active) and shared > promised:
                promised, guest.awaits = shared, other
        if promised >= known + WORTH:
            return False
        guest.awaits = None
        if source < 0:
            guest.runs = runs if known else []
        else:
            self._room(self.used + 1, len(guest.ids) + 1)
            self.cache.move([source], [self.used], known)
        guest.filled = guest.reused = known
        self.entering.append(guest)
        return True

    @torch.inference_mode()
    def advance(self, most: int) -> list[Guest]:
        """One pass of at most `most` padded positions over prompts on their way in. Returns the answers that ended."""
        if not self.entering:
            return []
        group = self._group(most)
        rest = [guest for guest in self.entering if guest not in group]
        self._settle(self.active, group, rest)
        group = self.entering[: len(group)]
        began = time.perf_counter()
        chunks = [min(guest.rest, most) for guest in group]
        self._prompt(group, chunks, len(self.active))
        self._wait()
        positions, took = len(group) * max(chunks), time.perf_counter() - began
        # What any pass costs hides the speed of a small one, which must not make the next ones small for good.
        if positions / took > self.prompts:
            self.prompts = (self.prompts + positions / took) / 2 if self.prompts else positions / took
        elif positions >= MANY:
            self.prompts = smooth(self.prompts, positions / took)
        self.passes += 1
        ready = [guest for guest in group if not guest.rest and not guest.finish]
        self._settle(self.active + ready, [guest for guest in self.entering if guest not in ready])
        return self._sweep()

    def _group(self, most: int) -> list[Guest]:
        """Who comes in next: the highest priority first; by turns who came first, and who has the least to go."""
        by_age = self.passes % 2 == 0
        line = sorted(self.entering, key=lambda one: (-one.priority, one.number if by_age else one.rest, one.number))
        pictures = max(1, self.pass_tokens // max(1, self.vlm.spec.tokens))  # through the tower at once
        group: list[Guest] = []
        longest = shown = real = 0
        for guest in line:
            chunk = min(guest.rest, most)
            wide = max(longest, chunk)
            padded = wide * (len(group) + 1)
            more = sum(first >= guest.reused for first, _ in guest.spans) if guest.inputs is None else 0
            # A pass of their own costs those of another length about as much as so much padding.
            even = padded <= 1.5 * (real + chunk) + MANY
            if not group or (padded <= most and even and shown + more <= pictures):
                group.append(guest)
                longest, shown, real = wide, shown + more, real + chunk
        return group

    def _prompt(self, group: Sequence[Guest], chunks: Sequence[int], first: int) -> None:
        """The next `chunks` tokens of the prompts in rows `first`..; who fails alone has failed."""

        def one_pass(begin: int, end: int) -> None:
            some, counts = group[begin:end], chunks[begin:end]
            last = [guest for guest, count in zip(some, counts, strict=True) if count == guest.rest]
            self._take(last, self._pass(some, counts, first + begin))
            for guest, count in zip(some, counts, strict=True):
                guest.filled += count
            for guest in last:
                guest.inputs = None

        self._halving(one_pass, group, 0, len(group), first)

    def _pass(self, group: Sequence[Guest], chunks: Sequence[int], first: int) -> Tensor:
        """Logits [n, V] of those of the prompts that end with their chunk."""
        length, device = max(chunks), self.vlm.device
        reach = max(guest.filled for guest in group) + length
        with self._threaded(len(group) * length), self._precision():
            if lacking := [guest for guest in group if guest.inputs is None]:
                batch = self._batch(
                    [(guest.ids[guest.reused :], guest.marks[guest.reused :]) for guest in lacking],
                    [key for guest in lacking for key, (begin, _) in zip(guest.images, guest.spans, strict=True)
                     if begin >= guest.reused],
                )  # fmt: skip
                for guest, row in zip(lacking, self.vlm.embed(batch), strict=True):
                    guest.inputs = row[: len(guest.ids) - guest.reused].clone()
            parts = []
            for guest, count in zip(group, chunks, strict=True):
                assert guest.inputs is not None
                part = guest.inputs[guest.filled - guest.reused :][:count]
                parts.append(torch.nn.functional.pad(part, (0, 0, 0, length - count)))
            counts = torch.tensor(chunks, device=device)[:, None]
            place = torch.arange(length, device=device).expand(len(group), length)
            last = place == counts - 1
            done = torch.tensor(
                [count == guest.rest for guest, count in zip(group, chunks, strict=True)], device=device
            )
            self._room(first + len(group), reach)
            for row, guest in enumerate(group, first):
                self._load(guest, row)
            return self._run(
                first, [guest.filled for guest in group], torch.stack(parts), place, last, last & done[:, None]
            )

    def _load(self, guest: Guest, row: int) -> None:
        """Copy what is known of a prompt into its row."""
        at = 0
        for block, count in guest.runs:
            if (count := min(count, guest.reused - at)) > 0:
                self.cache.copy_in(row, block[:, :, :, :count], at)
                at += count
        guest.runs = []

    # --- one token for everyone --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Guest]:  # type: ignore[override]
        """One more token for every answer. Returns those that ended, which have left their rows."""
        if not self.active:
            return []
        began = time.perf_counter()

        def one_pass(begin: int, end: int) -> None:
            some = self.active[begin:end]
            starts = [guest.position for guest in some]
            self._room(end, max(starts) + 1)
            ids = torch.tensor([[guest.tokens[-1]] for guest in some], device=self.vlm.device)
            every = torch.ones_like(ids, dtype=torch.bool)
            with self._threaded(len(some)), self._precision():
                embeddings = self.vlm.language.get_input_embeddings()(ids)
                logits = self._run(begin, starts, embeddings, torch.zeros_like(ids), every, every)
            self._take(some, logits)
            for guest, start in zip(some, starts, strict=True):
                guest.filled = start + 1

        self._halving(one_pass, self.active, 0, len(self.active), 0)
        self.seconds = smooth(self.seconds, time.perf_counter() - began)
        self.steps += 1
        return self._sweep()

    @torch.inference_mode()
    def leave(self, reply: Reply, finish: Finish = "left") -> None:
        """Stop an answer that has not ended, for this reason; nothing happens if it has."""
        if reply.finish is None and (reply in self.active or reply in self.entering):
            reply.finish = finish
            self._sweep()

    def empty(self) -> None:
        """Take everybody out as they are, and forget everything that was computed."""
        for guest in [*self.active, *self.entering]:
            guest.finish = guest.finish or "failed"
        self.active, self.entering = [], []
        self.past.clear()
        self.cache.release()

    def _take(self, replies: Sequence[Guest], logits: Tensor) -> None:  # type: ignore[override]
        """Give every answer its next token (or its chances), and the reason why it ends where it does.

        What may fail for all comes first and changes nothing, so that a pass can be tried again.
        """
        if not replies:
            return
        likeliest = logits.argmax(-1, keepdim=True)
        tops = logits.gather(1, likeliest).squeeze(1).tolist()
        telling = []
        for place, (guest, token, top) in enumerate(zip(replies, likeliest.squeeze(1).tolist(), tops, strict=True)):
            if not math.isfinite(top):
                self._fail(guest, ArithmeticError("the model's logits are no numbers for this request"))
                continue
            if guest.choices:
                guest.chances = torch.softmax(logits[place, list(guest.choices)].double(), dim=0).tolist()
                guest.finish = "choice"
                continue
            if guest.picker:
                try:
                    token = guest.picker(logits[place])
                except Exception as fault:
                    self._fail(guest, fault)
                    continue
            if token in self.stops.ids:
                guest.finish = "stop"
                continue
            guest.tokens.append(token)
            if guest.logprobs is not None:
                telling.append(place)
            if len(guest.tokens) >= guest.limit:
                guest.finish = "length"
        if telling:
            told = [replies[place] for place in telling]
            try:
                self._tell(told, logits[telling])
            except Exception as fault:
                for guest in told:
                    self._fail(guest, fault)

    def _tell(self, guests: Sequence[Guest], logits: Tensor) -> None:
        """How likely the tokens were that these answers just got, and which others were likelier than the rest."""
        chances = torch.log_softmax(logits, dim=-1)
        chosen = chances.gather(1, torch.tensor([[guest.tokens[-1]] for guest in guests], device=chances.device))
        most = min(max(guest.logprobs or 0 for guest in guests), chances.shape[1])
        values, ids = chances.topk(most)
        for guest, own, row, row_ids in zip(
            guests, chosen.squeeze(1).tolist(), values.tolist(), ids.tolist(), strict=True
        ):
            count = guest.logprobs or 0
            guest.told.append((own, list(zip(row_ids[:count], row[:count], strict=True))))

    # --- rows --------------------------------------------------------------------------------------------------------

    def _sweep(self) -> list[Guest]:
        """Take out the answers that ended; what their rows hold is kept, and the rows close up."""
        line = [*self.active, *self.entering]
        ended = [guest for guest in line if guest.finish]
        if not ended:
            return []
        for row, guest in enumerate(line):
            if guest.finish and guest.finish != "failed":
                self._keep(guest, row)
            if guest.finish:
                guest.inputs, guest.runs = None, []
        self._settle(
            [guest for guest in self.active if not guest.finish],
            [guest for guest in self.entering if not guest.finish],
            over=ended,
        )
        return ended

    def _keep(self, guest: Guest, row: int) -> None:
        if not self.past.limit or not guest.held or self.cache.kv is None:
            return
        said = np.asarray(guest.tokens, np.int64)
        trace = np.concatenate([guest.trace, said])[: guest.filled]
        try:
            self.past.put(trace, lambda first, last: self.cache.copy_out(row, last, first), self.kv)
        except Exception as fault:  # it can be done without
            if not self._out_of_memory(fault):
                raise

    def _settle(self, active: list[Guest], *entering: list[Guest], over: Sequence[Guest] = ()) -> None:
        """Rows for these, in this order of groups; inside its group each stays where it is, if it can.

        over  whose rows are given up.
        """
        old = {id(guest): row for row, guest in enumerate([*self.active, *self.entering])}
        order: list[Guest] = []
        for zone in (active, *entering):
            rows = range(len(order), len(order) + len(zone))
            staying = {old[id(guest)]: guest for guest in zone if old[id(guest)] in rows}
            others = iter([guest for guest in zone if old[id(guest)] not in rows])
            order += [staying[row] if row in staying else next(others) for row in rows]
        assert len(order) + len(over) == len(old), "every row is kept or given up"
        moving = [(old[id(guest)], row, guest.held) for row, guest in enumerate(order) if old[id(guest)] != row]
        moving = [move for move in moving if move[2]]
        if moving:
            sources, targets, lengths = map(list, zip(*moving, strict=True))
            self.cache.move(sources, targets, lengths)
        self.active, self.entering = order[: len(active)], order[len(active) :]

    def _room(self, rows: int, columns: int) -> None:
        """Make rows of the cache long enough, and enough of them, within the bound where that is possible."""
        cache, rows = self.cache, max(rows, self.used)
        if rows <= cache.rows and columns <= cache.columns:
            return
        if columns > cache.columns:
            columns = max(columns, min(int(GROW * cache.columns), self.bound // (self.kv * max(rows, cache.rows))))
        many = 2 * cache.rows
        if self.vlm.device.type == "cpu":  # memory is taken when it is written to: much can be promised at once
            many, columns = self.size, max(columns, min(PROMISED, self.bound // (self.kv * self.size)))
        columns = -(-max(columns, cache.columns) // COLUMNS) * COLUMNS
        cache.reshape(max(rows, min(many, self.size, self.bound // (self.kv * columns))), columns, self.used)

    def release(self) -> None:
        """Give the rows' memory back, where nobody is in one."""
        if not self.used:
            self.cache.release()

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def _halving(
        self, one_pass: Callable[[int, int], None], guests: Sequence[Guest], begin: int, end: int, first: int
    ) -> None:
        """Run a pass over guests[begin:end], which stand in rows from `first` on; if it fails, over each half."""
        for again in (True, False):
            try:
                return one_pass(begin, end)
            except Exception as fault:
                traceback.clear_frames(fault.__traceback__)  # they hold what the pass computed
                if again and self._out_of_memory(fault):
                    continue
                if end - begin == 1:
                    return self._fail(guests[begin], fault, first + begin)
                break
        middle = (begin + end) // 2
        self._halving(one_pass, guests, begin, middle, first)
        self._halving(one_pass, guests, middle, end, first)

    def _out_of_memory(self, fault: Exception) -> bool:
        """Whether memory ran out; then what is kept is given back."""
        if not isinstance(fault, MemoryError | torch.OutOfMemoryError) and "not enough memory" not in str(fault):
            return False
        self.past.clear()
        self.relieve()
        if self.vlm.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def _fail(self, guest: Guest, fault: Exception, row: int | None = None) -> None:
        """It failed; its row is wiped, for a number that is none would spoil the next answer there."""
        guest.fault, guest.finish = fault, "failed"
        if row is None:
            line = [*self.active, *self.entering]
            row = next(place for place, other in enumerate(line) if other is guest)
        self.cache.wipe(row)

    def _wait(self) -> None:
        if self.vlm.device.type == "cuda":  # a pass that gives no token returns before it is computed
            torch.cuda.synchronize(self.vlm.device)


def smooth(before: float, now: float) -> float:
    """An average that forgets: a tenth of it is new."""
    return now if not before else 0.9 * before + 0.1 * now
