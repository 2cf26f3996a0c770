"""Live answers each request as if it were alone, whoever comes, goes or fails beside it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import tiny_vlm
from leveret.generate import Engine, Request, Sampling
from leveret.generate.guests import Guest
from leveret.generate.live import Ask, Closed, Event, Full, Live, Ticket
from leveret.images import ImageFault
from leveret.inputs import collate
from leveret.inputs.text import decode
from leveret.model.vlm import VLM
from leveret.records import ImageRef, Turn
from leveret.runs import DataError
from serve_fakes import soon
from test_generate_engine import engine, from_nothing, item, picture, question, some_requests, words

WAIT = 60.0
"""Seconds after which a test gives up on an answer."""


def made(seed: int, ends: float) -> VLM:
    """A model whose end token is made so much likelier."""
    model = tiny_vlm(seed=seed)
    with torch.no_grad():
        model.language.get_output_embeddings().weight[model.tokenizer.eos_token_id] *= ends
    return model


@cache
def the_vlm() -> VLM:
    return made(0, ends=2)  # answers of many lengths


@cache
def twin() -> VLM:
    """The same model for the oracle: a model is one thread's."""
    return made(0, ends=2)


@pytest.fixture
def vlm() -> VLM:
    return the_vlm()


def oracle(request: Request, model: VLM | None = None) -> str:
    """What a request says when every token is computed from nothing, alone."""
    return words(model or twin(), from_nothing(model or twin(), request)[0])


@cache
def the_requests() -> tuple[Request, ...]:
    return tuple(some_requests(24, seed=41))


@cache
def solo(number: int) -> str:
    """What the request says when every token is computed from nothing, alone."""
    return oracle(the_requests()[number])


@dataclass
class Client:
    """Somebody who asked: what came until now."""

    events: list[Event] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    ticket: Ticket | None = None
    clock: list[Any] | None = None  # where all clients note who began and ended

    def __call__(self, event: Event) -> None:
        assert not self.ended.is_set(), "an event after the last"
        self.events.append(event)
        if self.clock is not None and not self.begun.is_set():
            self.clock.append(self)
        self.begun.set()
        if event.finish:
            self.ended.set()

    def last(self) -> Event:
        assert self.ended.wait(WAIT), "no answer"
        return self.events[-1]

    @property
    def text(self) -> str:
        self.last()
        return "".join(event.text for event in self.events)


def asked(live: Live, request: Request, clock: list[Any] | None = None, **options: Any) -> Client:
    client = Client(clock=clock)
    client.ticket = live.submit(live.prepare(Ask(request, **options)), client)
    return client


@contextmanager
def alive(vlm: VLM, slots: int = 4, **options: Any) -> Iterator[Live]:
    live = Live(engine(vlm, slots=slots), **options)
    try:
        yield live
    finally:
        live.close()


@contextmanager
def held(live: Live) -> Iterator[None]:
    """The engine's thread stands still inside."""
    reached, go = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        go.wait(WAIT)

    thread = threading.Thread(target=live.between, args=(wait,))
    thread.start()
    assert reached.wait(WAIT)
    try:
        yield
    finally:
        go.set()
        thread.join()


def talk(*said: str, images: tuple[ImageRef, ...] = (), tokens: int = 8) -> Request:
    """A conversation; what is said by turns by the user and the model."""
    turns = tuple(Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(said))
    return Request("talk", images, turns, max_new_tokens=tokens)


# --- company ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    order=st.permutations(range(24)),
    pauses=st.lists(st.integers(0, 5), min_size=24, max_size=24),
    slots=st.sampled_from([1, 3, 8]),
    past=st.sampled_from([0, 5_000, 10**7]),
    passes=st.sampled_from([4, 64, 1024]),
    leaving=st.sets(st.integers(0, 23), max_size=6),
)
def test_answers_are_those_of_a_solo_run_in_any_company(
    order: list[int], pauses: list[int], slots: int, past: int, passes: int, leaving: set[int]
) -> None:
    """Arrival by arrival, between random numbers of passes; some go before their time; prompts in pieces of any size,
    through images too."""
    with alive(the_vlm(), slots, past=past) as live, pytest.MonkeyPatch.context() as patch:
        patch.setattr("leveret.generate.live.LEAST", 4)
        live.lanes.pass_tokens = passes
        clients: dict[int, Client] = {}
        for number, pause in zip(order, pauses, strict=True):
            clients[number] = asked(live, the_requests()[number])
            for _ in range(pause):
                live.between(lambda: None)
            if number in leaving and clients[number].ticket is not None:
                clients[number].ticket.cancel()
        for number, client in clients.items():
            last = client.last()
            if last.finish == "left":
                assert number in leaving and solo(number).startswith(client.text.strip())
            else:
                assert last.fault is None and client.text == solo(number), number
        figures = live.figures()
        assert figures["past_bytes"] <= past and figures["answered"] + figures["left"] == 24
        assert figures["active"] == figures["entering"] == figures["waiting"] == 0


def test_threads_prepare_and_submit_at_once(vlm: VLM) -> None:
    with alive(vlm, 8) as live:
        found: dict[tuple[int, int], str] = {}

        def client(who: int) -> None:
            for number in random.Random(who).sample(range(24), 8):
                found[who, number] = asked(live, the_requests()[number]).text

        threads = [threading.Thread(target=client, args=(who,)) for who in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 64 and all(text == solo(number) for (_, number), text in found.items())


def test_sampling_is_that_of_a_stream(vlm: VLM) -> None:
    with alive(vlm) as live:
        for seed, request in enumerate(the_requests()[:8]):
            sampling = Sampling(temperature=1.2, top_p=0.9, seed=seed)
            want = "".join(engine(twin()).stream(request, 1.2, 0.9, seed))
            others = [asked(live, other) for other in the_requests()[8:12]]
            assert asked(live, request, sampling=sampling).text == want
            assert all(other.last().finish for other in others)


def test_choices_have_the_probabilities_of_the_engine(vlm: VLM) -> None:
    requests = [replace(request, choices=("yes", "no", "two")) for request in the_requests()[:8]]
    with alive(vlm) as live:
        clients = [asked(live, request) for request in requests]
        for client, prediction in zip(clients, engine(twin()).answer(requests), strict=True):
            last = client.last()
            assert last.finish == "choice" and client.text == prediction.text and last.tokens == 0
            assert last.probabilities == pytest.approx(prediction.choices, abs=1e-5)


def test_counts_and_reasons_are_told_at_the_end(vlm: VLM) -> None:
    with alive(vlm) as live:
        for number, request in enumerate(the_requests()):
            client, prediction = asked(live, request), engine(twin()).answer([request])[0]
            last = client.last()
            assert (last.finish, last.tokens) == (prediction.meta["finish"], prediction.meta["tokens"])
            assert last.prompt_tokens == len(item(twin(), request).encoded.input_ids)
            assert client.text == prediction.text == solo(number)
            assert all(not event.prompt_tokens and event.finish is None for event in client.events[:-1])


# --- the past of a conversation ---------------------------------------------------------------------------------------


def test_a_conversation_starts_behind_what_was_said(vlm: VLM) -> None:
    """The second turn begins behind the first one and its answer, also where its image comes only now."""
    one, other = picture(0), picture(1)
    with alive(vlm) as live:
        first = talk("<image>\nis there a red square and two blue circle", images=(one,))
        before = asked(live, first)
        said = before.text
        again = talk(first.turns[0].text, said, "<image>\nhow many", images=(one, other))
        client = asked(live, again)
        last = client.last()
        assert client.text == oracle(again)
        # The answer is read again as it was written unless its tokens are split in another way.
        assert last.reused_tokens >= before.last().prompt_tokens
        third = talk(*(turn.text for turn in again.turns), client.text, "what colour", images=(one, other))
        longer = asked(live, third)
        assert longer.text == oracle(third)
        assert longer.last().reused_tokens >= last.prompt_tokens
        assert live.figures()["image_misses"] == 2 and live.figures()["image_hits"] == 0


def test_an_edited_turn_starts_where_it_differs(vlm: VLM) -> None:
    one, other = picture(0), picture(1)
    with alive(vlm) as live:
        whole = talk("<image>\nhow many red", "two", "what colour above", images=(one,))
        asked(live, whole).last()
        edited = talk("<image>\nhow many red", "two", "is there a circle", images=(one,))
        client = asked(live, edited)
        assert client.text == oracle(edited)
        ids = [item(twin(), request).encoded.input_ids for request in (whole, edited)]
        shared = next(n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
        assert client.last().reused_tokens == shared
        # Another picture has the same ids; its tokens are others.
        foreign = replace(whole, images=(other,))
        client = asked(live, foreign)
        assert client.text == oracle(foreign)
        start = item(twin(), foreign).encoded.image_mask.index(True)
        assert client.last().reused_tokens == start


def test_several_answers_to_one_prompt_share_it(vlm: VLM) -> None:
    request = the_requests()[3]
    for past in (0, 10**7):
        with alive(vlm, 8, past=past) as live:
            prepared = live.prepare(Ask(request, Sampling(1.0, 1.0, 0)))
            clients = [Client() for _ in range(5)]
            with held(live):
                for seed, client in enumerate(clients):
                    live.submit(prepared.again(Sampling(1.0, 1.0, seed)), client)
            for seed, client in enumerate(clients):
                assert client.text == "".join(engine(twin()).stream(request, 1.0, 1.0, seed))
            reused = sorted(client.last().reused_tokens for client in clients)
            assert reused == [0] + [prepared.tokens - 1] * 4


def test_the_engines_own_answers_do_not_change(vlm: VLM) -> None:
    requests = [replace(request, choices=("yes", "no")) for request in the_requests()]
    want = Engine(vlm, precision="fp32", threads=1).answer(requests)
    one = Engine(vlm, precision="fp32", threads=1)
    live = Live(one)
    try:
        for request in the_requests():
            asked(live, request).last()
        assert live.between(lambda: one.answer(requests)) == want
    finally:
        live.close()


def test_memory_is_bounded_over_many_requests(vlm: VLM) -> None:
    rng = random.Random(5)
    one = engine(vlm, slots=4, cache_bytes=6_000)
    live = Live(one, past=40_000)
    try:
        clients = []
        for number in range(150):
            images = (picture(100 + number),)
            turns = (Turn("user", "<image>\n" + question(rng)),)
            clients.append(asked(live, Request("", images, turns, max_new_tokens=3)))
            if number % 20 == 19:
                assert all(client.last().finish for client in clients)
        assert all(client.last().fault is None for client in clients)
        clients.clear()
        assert live.lanes.past.most <= 40_000 and one.eyes.shelf.most <= 6_000
        assert live.lanes.past.bytes == sum(run.block.nbytes for run in live.lanes.past._order.values())
        live.between(lambda: None)
        assert len(one.eyes._known) <= 2, "pictures that nobody asks about are forgotten"
        assert not live._inside and not live._line
    finally:
        live.close()
    assert live.figures()["row_bytes"] == 0


def test_what_is_held_keeps_to_the_memory_allowed(vlm: VLM) -> None:
    one = engine(vlm, slots=8)
    one.memory = 4 * 64 * Live(one).lanes.kv
    live = Live(one)
    try:
        held = []
        many = [talk(question(random.Random(n), 9), tokens=40) for n in range(10)]
        clients = [asked(live, request) for request in many]
        for request, client in zip(many, clients, strict=True):
            assert client.text == oracle(request)
            now = live.figures()
            held.append([now[name] for name in ("row_bytes", "past_bytes", "image_bytes")])
        assert 0 < max(map(sum, held)) <= one.memory and max(past for _, past, _ in held) > 0
        with pytest.raises(DataError, match=r"need [\d,]+ bytes, and [\d,]+ are allowed"):
            live.prepare(Ask(talk("what", tokens=400)))
    finally:
        live.close()


# --- coming and going -------------------------------------------------------------------------------------------------


def long_request(number: int = 0, tokens: int = 400) -> Request:
    return talk(question(random.Random(number)), tokens=tokens)


@pytest.fixture
def endless() -> VLM:
    """A model that never ends an answer by itself."""
    return the_endless()


@cache
def the_endless() -> VLM:
    return made(3, ends=0)


@cache
def endless_twin() -> VLM:
    return made(3, ends=0)


def test_a_cancelled_answer_leaves_its_slot(endless: VLM) -> None:
    with alive(endless, 1) as live:
        first, second = asked(live, long_request(1)), asked(live, long_request(2, tokens=5))
        assert first.begun.wait(WAIT)
        assert first.ticket is not None
        first.ticket.cancel()
        first.ticket.cancel()
        last = first.last()
        assert last.finish == "left" and 0 < last.tokens < 400
        whole = decode(endless.tokenizer, from_nothing(endless_twin(), long_request(1, last.tokens))[0])
        assert first.text == whole.strip()
        assert second.last().finish == "length"
        first.ticket.cancel()
        assert live.figures()["left"] == 1 and live.figures()["answered"] == 1


def test_whoever_waits_can_be_cancelled_too(endless: VLM) -> None:
    with alive(endless, 1) as live:
        first, second = asked(live, long_request(1)), asked(live, long_request(2))
        assert first.begun.wait(WAIT)
        assert second.ticket is not None and first.ticket is not None
        second.ticket.cancel()
        assert second.last().finish == "left" and second.text == "" and not first.ended.is_set()
        first.ticket.cancel()


def test_a_full_queue_says_when_to_come_again(endless: VLM) -> None:
    with alive(endless, 1, waiting=2) as live:
        asked(live, long_request(0, tokens=20)).last()  # speeds are known now
        with held(live):
            clients = [asked(live, long_request(n, tokens=20)) for n in range(2)]
            with pytest.raises(Full) as full:
                asked(live, long_request(9))
            assert 1 <= full.value.retry_after <= 300
            assert live.figures()["refused"] == 1 and live.figures()["waiting"] == 2
        assert all(client.last().finish == "length" for client in clients)
        assert asked(live, long_request(9, tokens=2)).last().finish == "length"


def test_the_queue_is_bounded_in_tokens_too(endless: VLM) -> None:
    request = long_request(0, tokens=2)
    with alive(endless, 1, waiting_tokens=5) as live, held(live):
        assert live.prepare(Ask(request)).tokens > 5
        asked(live, request)  # the first is always taken
        with pytest.raises(Full):
            asked(live, request)


def test_priority_goes_first_and_then_order(endless: VLM) -> None:
    with alive(endless, 1) as live:
        clock: list[Client] = []
        with held(live):
            clients = [asked(live, long_request(n, tokens=3), clock, priority=n % 3) for n in range(9)]
        assert all(client.last() for client in clients)
        assert [clients.index(client) for client in clock] == [2, 5, 8, 1, 4, 7, 0, 3, 6]


def test_short_prompts_are_answered_behind_a_long_one_that_comes_in(
    endless: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 400 tokens comes in by pieces of 32; a short one that came later does not wait for its end."""
    with alive(endless, 4) as live:
        live.lanes.pass_tokens = 32
        monkeypatch.setattr("leveret.generate.live.LEAST", 32)
        clock: list[Client] = []
        with held(live):
            longer = asked(live, talk("is there a red square " * 60, tokens=2), clock)
            short = asked(live, talk("what", tokens=1), clock)
        assert longer.last().prompt_tokens > 300 and short.last()
        assert clock == [short, longer]


def test_draining_ends_what_is_here_and_takes_nothing_new(endless: VLM) -> None:
    live = Live(engine(endless, slots=2))
    clients = [asked(live, long_request(n, tokens=10)) for n in range(6)]
    live.drain(WAIT)
    assert [client.last().finish for client in clients] == ["length"] * 6
    with pytest.raises(Closed):
        asked(live, long_request(1))
    with pytest.raises(Closed):
        live.between(lambda: None)
    live.drain(WAIT)
    live.close()


def test_closing_ends_what_is_here_with_a_word(endless: VLM) -> None:
    live = Live(engine(endless, slots=1))
    clients = [asked(live, long_request(n)) for n in range(3)]
    assert clients[0].begun.wait(WAIT)
    live.close()
    assert [client.last().finish for client in clients] == ["closed"] * 3
    assert clients[0].last().tokens > 0 and clients[2].last().tokens == 0
    assert live.figures()["closed"] == 3


def test_work_between_passes_gives_what_it_gives(vlm: VLM) -> None:
    with alive(vlm) as live:
        client = asked(live, the_requests()[0])
        assert live.between(lambda: threading.current_thread().name) == "leveret-live"
        with pytest.raises(ZeroDivisionError):
            live.between(lambda: 1 // 0)
        assert client.text == solo(0)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def faulty(live: Live, bad: Callable[[Guest], bool], fault: Callable[[], Any]) -> None:
    """Passes with a guest that is `bad` raise what `fault` makes, or get it as their logits."""
    run = live.lanes._run

    def _run(first: int, starts: list[int], embeddings: Any, *rest: Any) -> Any:
        rows = [*live.lanes.active, *live.lanes.entering][first : first + len(starts)]
        logits = run(first, starts, embeddings, *rest)
        if any(map(bad, rows)):
            found = fault()
            if isinstance(found, Exception):
                raise found
            if len(logits) == len(rows):
                logits[[place for place, guest in enumerate(rows) if bad(guest)]] = found
        return logits

    live.lanes._run = _run  # type: ignore[method-assign]


@pytest.mark.parametrize("when", ["prompt", "step", "numbers"])
def test_a_request_that_fails_hurts_no_other(vlm: VLM, when: str) -> None:
    with alive(vlm, 8) as live:
        culprit = next(n for n in range(24) if len(solo(n).split()) > 2)
        ids = item(twin(), the_requests()[culprit]).encoded.input_ids

        def bad(guest: Guest) -> bool:
            return guest.ids == ids and (when != "step" or len(guest.tokens) > 1)

        faulty(live, bad, lambda: float("nan") if when == "numbers" else RuntimeError("a bad pass"))
        for _ in range(2):
            with held(live):
                clients = [asked(live, request) for request in the_requests()]
            for number, client in enumerate(clients):
                last = client.last()
                if number == culprit:
                    assert last.finish == "failed"
                    kind = ArithmeticError if when == "numbers" else RuntimeError
                    assert isinstance(last.fault, kind)
                else:
                    assert last.fault is None and client.text == solo(number)
        assert live.figures()["failed"] == 2 and live.figures()["answered"] == 46


def test_running_out_of_memory_gives_up_what_is_kept_and_goes_on(vlm: VLM) -> None:
    with alive(vlm, 8) as live:
        asked(live, the_requests()[0]).last()
        assert live.figures()["past_bytes"] > 0
        left = [3]
        run = live.lanes._run

        def _run(*args: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("no memory")
            return run(*args)

        live.lanes._run = _run  # type: ignore[method-assign]
        with held(live):
            clients = [asked(live, request) for request in the_requests()]
        assert all(client.text == solo(number) for number, client in enumerate(clients))


def test_our_own_mistake_costs_those_inside_and_nobody_else(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with alive(vlm, 8) as live:
        advance = live.lanes.advance
        once = [True]

        def broken(most: int) -> Any:
            if once.pop() if once else False:
                raise KeyError("a mistake")
            return advance(most)

        monkeypatch.setattr(live.lanes, "advance", broken)
        first = asked(live, the_requests()[1])
        assert first.last().finish == "failed" and isinstance(first.last().fault, KeyError)
        assert asked(live, the_requests()[1]).text == solo(1)


def test_whoever_cannot_take_an_answer_is_left(endless: VLM) -> None:
    with alive(endless, 2) as live:
        calls = []

        def broken(event: Event) -> None:
            calls.append(event)
            raise OSError("gone")

        live.submit(live.prepare(Ask(long_request(1))), broken)
        other = asked(live, long_request(2, tokens=20))
        assert other.last().finish == "length"
        live.drain(WAIT)
        assert calls[-1].finish == "left" and live.figures()["left"] == 1


@pytest.mark.parametrize(
    "ask, says",
    [
        (Ask(talk("what", tokens=0)), "max_new_tokens must be at least 1"),
        (Ask(talk("<image>\nwhat", images=(picture(0), picture(1)))), "there must be one mark per image"),
        (Ask(talk("what " * 600)), "the model has 512"),
        (Ask(replace(talk("what"), choices=("yes", "yes"))), "differ in the first token"),
        (Ask(talk("what"), stop=("",)), "an empty string ends no answer"),
        (Ask(talk("what"), logprobs=21), "got 21; allowed are 0 to 20"),
        (Ask(talk("what"), logprobs=-1), "got -1"),
        (Ask(talk("what", "two")), "the last turn is the assistant's"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_it_waits(vlm: VLM, ask: Ask, says: str) -> None:
    with alive(vlm) as live, pytest.raises(DataError, match=says):
        live.prepare(ask)


def test_a_bad_picture_is_refused_by_whoever_prepares(vlm: VLM) -> None:
    import base64

    data = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"no picture at all" * 9).decode()
    bad = ImageRef(f"data:image/png;base64,{data}", kind="data")
    with alive(vlm) as live:
        with pytest.raises(ImageFault):
            live.prepare(Ask(talk("<image>\nwhat", images=(bad,))))
        assert asked(live, the_requests()[0]).text == solo(0)


def test_bounds_that_make_no_sense_are_refused(vlm: VLM) -> None:
    for options in ({"waiting": 0}, {"waiting_tokens": 0}):
        with pytest.raises(DataError, match="must be at least 1"):
            Live(engine(vlm), **options)


# --- text and chances -------------------------------------------------------------------------------------------------


def test_stop_strings_end_an_answer_wherever_they_fall(endless: VLM) -> None:
    """Every stretch of the whole answer as a stop string: the text before its first place comes out, in pieces that
    never hold a part of it."""
    request = long_request(3, tokens=24)
    whole = decode(endless.tokenizer, from_nothing(endless_twin(), request)[0])
    rng = random.Random(0)
    with alive(endless, 16) as live:
        cases = []
        for _ in range(60):
            first = rng.randrange(1, len(whole) - 4)
            stop = whole[first : first + rng.randint(1, 6)]
            if "\ufffd" not in stop:
                cases.append((stop, asked(live, request, stop=(stop, "never said"), logprobs=0)))
        assert len(cases) > 20
        for stop, client in cases:
            assert client.last().finish == "stop"
            assert client.text == whole[: whole.find(stop)].strip()
            told = b"".join(one.chosen.bytes for event in client.events for one in event.told)
            assert told.decode(errors="replace").strip().startswith(client.text)
        assert asked(live, request, stop=("never said",)).last().finish == "length"


def test_told_chances_are_those_of_a_direct_forward(vlm: VLM) -> None:
    with alive(vlm, 8) as live:
        clients = [
            asked(live, request, logprobs=number % 6, sampling=Sampling(1.0 if number % 2 else 0.0, 1.0, 40 + number))
            for number, request in enumerate(the_requests())
        ]
        compared = 0
        for number, (request, client) in enumerate(zip(the_requests(), clients, strict=True)):
            last = client.last()
            told = [one for event in client.events for one in event.told]
            assert len(told) == last.tokens
            said = b"".join(one.chosen.bytes for one in told)
            assert said.decode(errors="replace").strip() == client.text
            row = item(twin(), request)
            ids = {vlm.tokenizer.decode([token]): token for token in range(vlm.tokenizer.vocab_size)}
            for one in told:
                logits = twin()(collate([row], 0), logits="last").logits[0].detach()
                chances = torch.log_softmax(logits, -1)
                values, _ = chances.topk(max(1, number % 6))
                assert [other.logprob for other in one.top] == pytest.approx(values.tolist()[: number % 6], abs=1e-4)
                if not number % 2:
                    assert one.chosen.logprob == pytest.approx(float(values[0]), abs=1e-4)
                token = ids[one.chosen.token]
                if one.chosen.token.isascii():
                    assert one.chosen.logprob == pytest.approx(float(chances[token]), abs=1e-4)
                    compared += 1
                else:
                    break  # several tokens are written as a broken character
                row.encoded.input_ids.append(token)
                row.encoded.labels.append(-100)
                row.encoded.image_mask.append(False)
        assert compared > 20


def test_pieces_come_while_the_answer_is_made(endless: VLM) -> None:
    with alive(endless) as live:
        client = asked(live, long_request(4, tokens=150))
        client.last()
        assert len(client.events) > 5
        assert client.text == decode(endless.tokenizer, from_nothing(endless_twin(), long_request(4, 150))[0]).strip()


def test_bfloat16_answers_and_reuses_too(vlm: VLM) -> None:
    live = Live(Engine(vlm, precision="bf16", slots=4))
    try:
        for _ in range(2):
            clients = [asked(live, request, logprobs=2) for request in the_requests()]
            assert all(client.last().fault is None for client in clients)
        same = sum(client.text == solo(number) for number, client in enumerate(clients))
        assert same > 8 and live.figures()["reused_tokens"] > 0
    finally:
        live.close()


def test_rows_are_moved_and_grown_without_a_trace(endless: VLM) -> None:
    """Long and short answers by turns: rows end in every order, and become longer meanwhile."""
    rng = np.random.default_rng(0)
    with alive(endless, 6) as live, pytest.MonkeyPatch.context() as patch:
        patch.setattr("leveret.generate.lanes.PROMISED", 32)
        requests = [long_request(n, tokens=int(rng.integers(1, 50))) for n in range(16)]
        clients = [asked(live, request) for request in requests]
        for request, client in zip(requests, clients, strict=True):
            assert client.last().tokens == request.max_new_tokens
            assert client.text == oracle(request, endless_twin())


def test_answers_to_one_prompt_come_in_together_or_not_at_all(vlm: VLM) -> None:
    """Where nobody waits they are taken, however few may wait; the prompt they share counts once."""
    live = Live(Engine(vlm, slots=1, max_new_tokens=8), waiting=2, waiting_tokens=60)
    try:
        prepared = live.prepare(Ask(Request("", (), (Turn("user", "is there a square"),), None, 8)))
        ended: list[Event] = []

        def hear(event: Event) -> None:
            if event.finish is not None:
                ended.append(event)

        for _ in range(3):
            ended.clear()
            tickets = live.submit_all([(prepared, hear)] * 6)
            assert len(tickets) == 6
            soon(lambda: len(ended) == 6)
        assert not live.figures()["waiting_tokens"]
        gate = threading.Event()
        held = live.soon(gate.wait)
        live.submit_all([(prepared, hear)] * 2)
        assert live.figures()["waiting_tokens"] == prepared.tokens
        with pytest.raises(Full):
            live.submit_all([(prepared, hear)] * 2)
        late = live.soon(lambda: pytest.fail("it was cancelled"))
        assert late.cancel()
        gate.set()
        held.result(20)
        soon(lambda: len(ended) == 8)
    finally:
        live.close()
