"""Many clients at once, beside one by one.

    python speed/serve.py [MODEL] [--clients 64] [--each 4] [--rounds 3] [--past BYTES] [--ends] [--profile]
    python speed/serve.py MODEL --url http://127.0.0.1:8000 [--token T]       the same, over HTTP, of a running server

Every client holds a conversation about a drawn scene of its own (one in ten about none): `--each` questions, one after
the other, each with all before it and their true answers in its prompt; prompts of some 20 to 400 tokens, answers of 4
to 64. So that there are long ones, no answer ends before its limit; with `--ends`, and over HTTP, they end where the
model ends them, which for the drawn world is after 4 tokens on average.

All clients ask at the same time, in threads: `generate.live.Live` in this process, or a server that speaks OpenAI's
protocol and has the same MODEL. Beside it: the same requests one by one through transformers' own `generate`, with the
same model in this process, reading, resizing and tokenising included. The two run in turn, so that a busy machine is
fair to both. A round of one question a client comes before, untimed.

MODEL is a model or a run; without it, the drawn world's own tower and language model with an untrained connector, which
talk at length about nothing. All in float32.

Prints tokens a second of both, their ratio, processor time (which a busy machine hardly changes), times to the first
token, and how many answers differ from those of `generate` (all asked once more, untimed) where its two likeliest
tokens were closer than 1e-4 at the token that differs, and where they were not: there must be none of these, or the
exit status is 1.
"""

from __future__ import annotations

import argparse
import base64
import cProfile
import json
import os
import pstats
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import torch

MARGIN = 1e-4
"""Logits this close may change places by the order of a sum."""
LIMITS = (4, 16, 32, 64)
"""Tokens of an answer, at most."""


@dataclass(slots=True)
class Said:
    """One answer: its text, its tokens (None where nobody tells), seconds to its first piece and to its end."""

    text: str
    tokens: int
    first: float
    whole: float


def conversations(folder: str, clients: int, each: int, seed: int = 0) -> list[list[Any]]:
    """The requests of every client, in order."""
    from leveret.generate import Request
    from leveret.records import ImageRef, Turn
    from leveret.world.draw import jpeg, render
    from leveret.world.questions import EXAMINED, conversation, text_only
    from leveret.world.scenes import sample_scene

    found = []
    for client in range(clients):
        rng = random.Random(f"{seed} {client}")
        scene, seen = sample_scene(rng), client % 10 != 9
        refs: tuple[Any, ...] = ()
        if seen:
            (path := Path(folder) / f"{seed}-{client}.jpg").write_bytes(jpeg(render(scene)))
            refs = (ImageRef(str(path)),)
            asked = conversation(scene, rng, each, dict.fromkeys(EXAMINED, 1.0), describe=0.5)
        else:
            asked = [text_only(rng) for _ in range(each)]
        turns: list[Any] = []
        requests = []
        for number, question in enumerate(asked):
            turns.append(Turn("user", ("<image>\n" if seen and not number else "") + question.text))
            limit = rng.choice(LIMITS)
            requests.append(Request(f"{client}-{number}", refs, tuple(turns), max_new_tokens=limit))
            turns.append(Turn("assistant", question.answer))
        found.append(requests)
    return found


# --- the two ways ----------------------------------------------------------------------------------------------------


def laid(vlm: Any, request: Any) -> Any:
    """A batch of one."""
    from leveret.images import load
    from leveret.inputs import Item, collate, encode
    from leveret.inputs.tiles import prepare_all

    images = [load(ref) for ref in request.images]
    sizes = [(image.height, image.width) for image in images]
    encoded = encode(request.turns, vlm.chat, vlm.tokenizer, vlm.spec, sizes, generate=True)
    return collate([Item(encoded, pixels=[prepare_all(image, vlm.spec) for image in images])], 0, side="left")


def one_by_one(vlm: Any, requests: list[Any], ends: frozenset[int]) -> list[Said]:
    """Through transformers' `generate`; `ends` are the tokens that end an answer."""
    from leveret.inputs.text import decode

    found = []
    for request in requests:
        began = time.perf_counter()
        made = vlm.generate(
            laid(vlm, request), max_new_tokens=request.max_new_tokens, do_sample=False, pad_token_id=0,
            eos_token_id=sorted(ends) or None,
        )  # fmt: skip
        tokens = made[0].tolist()
        tokens = tokens[:-1] if tokens and tokens[-1] in ends else tokens
        text, seconds = decode(vlm.tokenizer, tokens).strip(), time.perf_counter() - began
        found.append(Said(text, len(tokens), seconds, seconds))
    return found


def live_way(live: Any) -> Callable[[Any], Said]:
    """Asks `Live` and waits."""
    from leveret.generate.live import Ask

    def ask(request: Any) -> Said:
        began, first = time.perf_counter(), 0.0
        pieces: list[str] = []
        ended = threading.Event()
        lasts: list[Any] = []

        def on_event(event: Any) -> None:
            nonlocal first
            first = first or time.perf_counter()
            pieces.append(event.text)
            if event.finish:
                lasts.append(event)
                ended.set()

        live.submit(live.prepare(Ask(request)), on_event)
        ended.wait()
        if lasts[0].fault is not None:
            raise lasts[0].fault
        return Said("".join(pieces), lasts[0].tokens, first - began, time.perf_counter() - began)

    return ask


def http_way(url: str, token: str) -> Callable[[Any], Said]:
    """Asks a server for a stream, images as data URIs."""
    import http.client

    at = urlsplit(url)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def opened(verb: str, path: str, body: str | None = None) -> tuple[Any, Any]:
        line = http.client.HTTPConnection(at.hostname or "127.0.0.1", at.port or 80, timeout=600)
        line.request(verb, f"{at.path.rstrip('/')}{path}", body, headers)
        answer = line.getresponse()
        if answer.status != 200:
            sys.exit(f"the server says {answer.status}: {answer.read()[:500]!r}")
        return line, answer

    name = json.loads(opened("GET", "/v1/models")[1].read())["data"][0]["id"]

    def ask(request: Any) -> Said:
        content: list[dict[str, Any]] = []
        messages = []
        for number, turn in enumerate(request.turns):
            content = [{"type": "text", "text": turn.text.removeprefix("<image>\n")}]
            if not number:
                for ref in request.images:
                    held = base64.b64encode(Path(ref.path).read_bytes()).decode()
                    content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{held}"}})
            messages.append({"role": turn.role, "content": content if turn.role == "user" else turn.text})
        body = json.dumps(
            {
                "model": name, "messages": messages, "max_tokens": request.max_new_tokens, "temperature": 0,
                "stream": True, "stream_options": {"include_usage": True},
            }
        )  # fmt: skip
        began, first, pieces, tokens = time.perf_counter(), 0.0, [], 0
        line, answer = opened("POST", "/v1/chat/completions", body)
        for row in answer:
            if not row.startswith(b"data: {"):
                continue
            chunk = json.loads(row[6:])
            if "error" in chunk:
                sys.exit(f"the server says {chunk['error']}")
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            for choice in chunk.get("choices", ()):
                if piece := choice["delta"].get("content"):
                    first = first or time.perf_counter()
                    pieces.append(piece)
        line.close()
        now = time.perf_counter()
        return Said("".join(pieces), tokens, (first or now) - began, now - began)

    return ask


def together(ask: Callable[[Any], Said], clients: list[list[Any]]) -> tuple[float, dict[str, Said]]:
    """All clients at once, each its questions in order: (seconds, answers by question)."""
    found: dict[str, Said] = {}
    faults: list[BaseException] = []

    def client(requests: list[Any]) -> None:
        try:
            for request in requests:
                found[request.question_id] = ask(request)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=client, args=(requests,)) for requests in clients]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if faults:
        raise faults[0]
    return seconds, found


# --- what is shown ---------------------------------------------------------------------------------------------------


def differing(vlm: Any, requests: list[Any], ours: dict[str, Said], ends: frozenset[int]) -> tuple[int, int, int]:
    """Answers that are not those of `generate`: (where it was sure, on a knife's edge, of how many)."""
    from leveret.inputs.text import decode

    sure = edge = 0
    for request in requests:
        made = vlm.language.generate(
            inputs_embeds=vlm.embed(laid(vlm, request)).detach(), max_new_tokens=request.max_new_tokens,
            do_sample=False, pad_token_id=0, eos_token_id=sorted(ends) or None, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        tokens = made.sequences[0].tolist()
        said = [token for token in tokens if token not in ends]
        mine = ours[request.question_id].text
        if mine == decode(vlm.tokenizer, said).strip():
            continue
        agreed = next(
            (n for n in range(len(said)) if not mine.startswith(decode(vlm.tokenizer, said[: n + 1]).strip())),
            len(said),
        )
        leads = [float(two[0] - two[1]) for step in made.logits for two in [step[0].float().topk(2).values]]
        lead = leads[min(agreed, len(leads) - 1)]
        if lead >= MARGIN:
            sure += 1
            print(f"{request.question_id}: {mine!r}, and generate: {decode(vlm.tokenizer, said)!r} by {lead:.2g}")
        else:
            edge += 1
    return sure, edge, len(requests)


def share(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def model(path: str | None) -> Any:
    if path is not None:
        from leveret.model.source import load

        return load(path, "cpu").eval()
    from leveret.model.build import build
    from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, VisionRecipe

    vision, language = VisionRecipe(tower="world/vision", resize="squash"), LanguageRecipe(name="world/language")
    connector = ConnectorRecipe(kind="residual_2d")
    return build(ModelRecipe(vision=vision, connector=connector, language=language, chat="tiny")).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model or a run")
    parser.add_argument("--url", help="a server with the same model; without it, Live in this process")
    parser.add_argument("--token", default="", help="what the server asks for")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--each", type=int, default=4, help="questions of a client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--past", type=int, help="bytes kept of earlier conversations; 0 for none")
    parser.add_argument("--ends", action="store_true", help="answers end where the model ends them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="show where the engine's thread spends its time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from leveret.generate import Engine
    from leveret.generate.live import Live
    from leveret.inputs.text import Stops

    vlm = model(options.model)
    stops = Engine(vlm).stops
    if not (options.ends or options.url):
        stops, vlm.language.generation_config.eos_token_id = Stops(frozenset()), None
    ways = []
    singles: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        live = None
        if options.url:
            ask = http_way(options.url, options.token)
        else:
            engine = Engine(vlm, slots=options.slots, precision="fp32")
            engine.stops = stops
            live = Live(engine, waiting=4 * options.clients, past=options.past)
            ask = live_way(live)
        together(ask, conversations(folder, options.clients, 1, seed=-1))
        for number in range(options.rounds):
            # Other questions in each round: nothing is answered from what the round before has left.
            clients = conversations(folder, options.clients, options.each, seed=number)
            watch = cProfile.Profile()
            if live is not None and options.profile:
                live.between(watch.enable)
            used = time.process_time()
            seconds, said = together(ask, clients)
            used = time.process_time() - used
            if live is not None and options.profile:
                live.between(watch.disable)
                pstats.Stats(watch).sort_stats("tottime").print_stats(35)
            ways.append((seconds, said))
            asked = [request for requests in clients for request in requests]
            began, spent = time.perf_counter(), time.process_time()
            alone = one_by_one(vlm, asked, stops.ids)
            took, spent = time.perf_counter() - began, time.process_time() - spent
            tokens, others = sum(one.tokens for one in said.values()), sum(one.tokens for one in alone)
            singles.append(others / took)
            print(
                f"round {number + 1}: {len(asked)} answers of {tokens / len(asked):.1f} tokens; together "
                f"{tokens / seconds:,.0f} tokens/s, {len(asked) / seconds:.1f} answers/s; one by one "
                f"{others / took:,.0f} and {len(asked) / took:.1f}"
                + ("" if options.url else f"; in {used:.2f} and {spent:.2f} s of processor time"),
                flush=True,
            )
        if live is not None:
            print(", ".join(f"{name} {value:,.4g}" for name, value in live.figures().items()))
            live.close()
        sure, edge, count = differing(vlm, asked, said, stops.ids)
    rates = [sum(one.tokens for one in said.values()) / seconds for seconds, said in ways]
    firsts = [one.first for _, said in ways for one in said.values()]
    wholes = [one.whole for _, said in ways for one in said.values()]
    print(
        f"{options.clients} clients{' over HTTP' if options.url else ''}: {median(rates):,.0f} tokens/s; one by one "
        f"{median(singles):,.0f}: {median(map(lambda a, b: a / b, rates, singles)):.1f} times (rounds: "
        f"{', '.join(f'{a / b:.1f}' for a, b in zip(rates, singles, strict=True))})\n"
        f"first token after {1000 * share(firsts, 0.5):.0f} ms (p50), {1000 * share(firsts, 0.95):.0f} ms (p95); whole "
        f"answers {1000 * share(wholes, 0.5):.0f} and {1000 * share(wholes, 0.95):.0f} ms\n"
        f"of {count} answers {sure} differ where generate was sure, {edge} where its lead was under {MARGIN}; load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {options.threads} threads"
    )
    sys.exit(1 if sure else 0)


if __name__ == "__main__":
    main()
