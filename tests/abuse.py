"""Thousands of hostile requests against a running server, and what must hold after each.

    leveret serve MODEL --port 8000 --allow-domain images.example.org &
    python tests/abuse.py http://127.0.0.1:8000 --count 10000 --pid $!

What must hold: no reply of the 500s (but 503 from a server that is full), nothing of the inside in a reply, JSON that
is JSON, one reply to one request, an end to every connection, the same answer to the same honest question all along;
and at the end as much memory, as many threads and files as after the warm-up. `abuse_cases` has the requests.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import random
import re
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LEAK = re.compile(
    rb"Traceback|File \"|site-packages|dist-packages|/tmp/|/root/|/home/|/usr/|root:x:|\.py\b|line \d+, in "
    rb"|0x[0-9a-f]{8,}|at 0x|leveret\.[a-z]|\bPIL\b|[Pp]illow|\btorch|[Pp]ydantic|[Ss]tarlette|[Ff]ast[Aa][Pp][Ii]"
    rb"|[Uu]vicorn|\bh11\b|asyncio|\b[A-Z][A-Za-z]+(?:Error|Exception|Warning|Fault)\b|NoneType"
    rb"|'(?:str|int|dict|list|bytes)'"
)
"""What no client should read: where the server lies, of what it is made, what its exceptions say."""

PATIENCE = 60.0
"""Seconds for one reply, after which it counts as a hang. The machine may be slow; the server has lower limits."""


@dataclass(slots=True)
class Reply:
    """What came back. `status` is 0 where there was no reply; then `how` says what happened: "cut" (the server closed),
    "hang" (it did neither), "garbled" (no HTTP). `more`: bytes after the reply."""

    status: int = 0
    how: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    more: bytes = b""


@dataclass(frozen=True, slots=True)
class Case:
    """One hostile request.

    name    family/what, for the report.
    act     does it and returns the reply.
    want    statuses allowed; empty for any below 500.
    silent  the server may also close without a word.
    slow    takes as long as the server's own limits: done beside the others.
    """

    name: str
    act: Callable[[Target], Reply]
    want: frozenset[int] = frozenset()
    silent: bool = False
    slow: bool = False


class Target:
    """The server."""

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.token = token
        self.model = ""

    # --- by socket ------------------------------------------------------------------------------------------------

    def line(self) -> socket.socket:
        for _ in range(50):  # a server that is full of half-open connections lets the next in soon
            with contextlib.suppress(ConnectionError):
                return socket.create_connection((self.host, self.port), PATIENCE)
            time.sleep(0.1)
        return socket.create_connection((self.host, self.port), PATIENCE)

    def raw(self, *pieces: bytes, method: str = "POST", half: bool = False, pause: float = 0.0) -> Reply:
        """Send bytes as they are and read one reply. half: close our side when all is sent and nothing comes. pause:
        between pieces; the sending ends as soon as the server has something to say."""
        with self.line() as line:
            try:
                for piece in pieces:
                    line.sendall(piece)
                    if pause and select.select([line], [], [], pause)[0]:
                        break
                # Some servers take the end of our side for the end of us: time for a reply to what is whole.
                if half and not select.select([line], [], [], 2.0)[0]:
                    line.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it closed; perhaps it said why
            return read(line, method)

    def request(
        self, method: str, path: str, body: bytes = b"", headers: Sequence[tuple[str, str]] = (), **how: Any
    ) -> Reply:
        return self.raw(self.written(method, path, body, headers), method=method, **how)

    def written(self, method: str, path: str, body: bytes = b"", headers: Sequence[tuple[str, str]] = ()) -> bytes:
        """A request as it goes over the line; `headers` replace ours of the same name."""
        ours = [("Host", f"{self.host}:{self.port}"), ("Connection", "close")]
        if method == "POST":
            ours += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        if self.token:
            ours += [("Authorization", f"Bearer {self.token}")]
        given = {name.lower() for name, _ in headers}
        lines = [(name, text) for name, text in ours if name.lower() not in given] + list(headers)
        head = "".join(f"{name}: {text}\r\n" for name, text in lines)
        return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "surrogateescape") + body

    def chat(self, body: object, path: str = "/v1/chat/completions", **how: Any) -> Reply:
        return self.request("POST", path, written(body), **how)

    # --- what honest clients ask ----------------------------------------------------------------------------------

    def meet(self) -> None:
        """Ask for the model's name."""
        reply = self.request("GET", "/v1/models")
        assert reply.status == 200, f"/v1/models answers {reply.status} {reply.how}"
        self.model = json.loads(reply.body)["data"][0]["id"]

    def honest(self, picture: bytes) -> str:
        """An answer, greedy; or what was wrong."""
        url = "data:image/png;base64," + base64.b64encode(picture).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "is there a square"}]
        body = {"model": self.model, "messages": [{"role": "user", "content": parts}], "max_tokens": 8}
        reply = self.chat(body)
        if reply.status != 200:
            return f"<{reply.status} {reply.how} {reply.body[:200]!r}>"
        return str(json.loads(reply.body)["choices"][0]["message"]["content"])


def written(body: object) -> bytes:
    """JSON, with lone surrogates as escapes, and `Number`s as they are. Bytes stay."""
    if isinstance(body, bytes):
        return body
    text = json.dumps(body, default=repr, ensure_ascii=True)
    return text.replace('"\\u0001', "").replace('\\u0001"', "").encode()


def bare(text: str) -> str:
    """A text that `written` writes without its quotes."""
    return f"\x01{text}\x01"


def read(line: socket.socket, method: str = "POST") -> Reply:
    """One reply and, when our side is closed, whatever comes after it."""
    line.settimeout(PATIENCE)
    answer = http.client.HTTPResponse(line, method=method)
    try:
        answer.begin()
        body = answer.read()
    except TimeoutError:
        return Reply(how="hang")
    except http.client.RemoteDisconnected:
        return Reply(how="cut")
    except http.client.IncompleteRead as fault:
        return Reply(answer.status, "cut", body=fault.partial)
    except http.client.HTTPException:
        return Reply(how="garbled")
    except OSError:
        return Reply(how="cut")
    reply = Reply(answer.status, "", {name.lower(): text for name, text in answer.getheaders()}, body)
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_WR)
        while piece := line.recv(65536):
            reply.more += piece
    return reply


def reset(line: socket.socket) -> None:
    """Close with a RST in place of a FIN."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()


# --- what must hold --------------------------------------------------------------------------------------------------


def faults(case: Case, reply: Reply) -> list[str]:
    """What is wrong with a reply."""
    if not reply.status:
        return [] if reply.how == "cut" and case.silent else [reply.how]
    found = []
    if reply.status >= 500 and not (reply.status == 503 and b"too_many_connections" in reply.body):
        found.append(f"status {reply.status}: {reply.body[:200]!r}")
    elif case.want and reply.status not in case.want and reply.status != 408:  # a busy machine sends slowly, too
        found.append(f"status {reply.status}, not {sorted(case.want)}: {reply.body[:200]!r}")
    if b"HTTP/1." in reply.more and case.name.startswith(
        "smuggle"
    ):  # elsewhere what follows is a request, if a bad one
        found.append(f"a second reply to one request: {reply.more[:100]!r}")
    head = "\n".join(f"{name}: {text}" for name, text in reply.headers.items()).encode()
    whole = head + b"\n" + reply.body
    if reply.status >= 400 and (leak := LEAK.search(whole)):
        found.append(f"tells of the inside, {leak[0]!r}: {whole[max(0, leak.start() - 100) :][:300]!r}")
    kind = reply.headers.get("content-type", "")
    if reply.body and kind.startswith("application/json"):
        found += of_json(reply.status, reply.body)
    elif reply.status >= 400 and reply.body:
        found.append(f"a refusal as {kind!r}: {reply.body[:200]!r}")
    if reply.status >= 400 and not reply.headers.get("x-content-type-options"):
        found.append("no nosniff")
    return found


def of_json(status: int, body: bytes) -> list[str]:
    try:
        told = json.loads(body, parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return [f"this is no JSON: {body[:200]!r}"]
    if status < 400:
        return []
    error = told.get("error") if isinstance(told, dict) else None
    if not isinstance(error, dict) or set(error) != {"message", "type", "param", "code"} or len(told) != 1:
        return [f"not OpenAI's form of an error: {body[:200]!r}"]
    if not isinstance(error["message"], str) or not error["message"] or len(body) > 4000:
        return [f"an error of {len(body)} bytes: {body[:200]!r}"]
    return []


@dataclass(frozen=True, slots=True)
class Size:
    """What a process holds: MB of memory, threads, open files."""

    memory: float
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Size:
        facts = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
        files = len(os.listdir(f"/proc/{pid}/fd"))
        return cls(int(facts["VmRSS"].split()[0]) / 1024, int(facts["Threads"]), files)


@dataclass(slots=True)
class Report:
    """What happened. `wrong`: (case, fault), each kind of fault of a case once."""

    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: dict[tuple[str, str], int] = field(default_factory=dict)
    sizes: list[Size] = field(default_factory=list)
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total(self) -> int:
        return sum(self.seen.values())

    def add(self, name: str, how: str, found: Iterable[str]) -> None:
        with self.lock:
            self.seen[name.partition("/")[0], how] += 1
            for fault in found:
                self.wrong[name, fault] = self.wrong.get((name, fault), 0) + 1

    def __str__(self) -> str:
        families = sorted({family for family, _ in self.seen})
        lines = [f"{self.total:,} requests in {self.seconds:,.0f} s"]
        for family in families:
            counts = sorted((how, count) for (name, how), count in self.seen.items() if name == family)
            total = sum(count for _, count in counts)
            lines.append(f"  {family:<12}{total:>7,}  " + ", ".join(f"{how}: {count:,}" for how, count in counts))
        if self.sizes:
            first, last = self.sizes[0], self.sizes[-1]
            most = max(size.memory for size in self.sizes)
            lines.append(
                f"  memory {first.memory:,.0f} MB -> {last.memory:,.0f} MB (most seen {most:,.0f}), threads "
                f"{first.threads} -> {last.threads}, files {first.files} -> {last.files}"
            )
        lines += [f"  WRONG {count} x {name}: {fault}" for (name, fault), count in self.wrong.items()]
        return "\n".join(lines)


# --- doing it --------------------------------------------------------------------------------------------------------


def run(
    target: Target, cases: Iterable[Case], picture: bytes, *, pid: int | None = None, workers: int = 8, every: int = 500
) -> Report:
    """Do all, several at once; after each `every` ask honestly and look at the process. The slow ones go beside."""
    report = Report()
    begun = time.monotonic()
    wanted = target.honest(picture)
    if wanted.startswith("<"):
        report.add("honest", "at first", [wanted])
        return report

    def one(case: Case) -> None:
        try:
            reply = case.act(target)
        except OSError as fault:
            report.add(case.name, "no connection", [repr(fault)])
            return
        report.add(case.name, str(reply.status or reply.how), faults(case, reply))

    def checked() -> None:
        got = target.honest(picture)
        report.add("honest", "same" if got == wanted else "other", [] if got == wanted else [f"{got} for {wanted}"])
        if pid is not None:
            report.sizes.append(Size.of(pid))

    with ThreadPoolExecutor(64) as slow, ThreadPoolExecutor(workers) as pool:
        waiting = []
        for batch in batched(cases, every):
            waiting += [slow.submit(one, case) for case in batch if case.slow]
            list(pool.map(one, [case for case in batch if not case.slow]))
            checked()
        for done in waiting:
            done.result()
    checked()
    report.seconds = time.monotonic() - begun
    return report


def batched(cases: Iterable[Case], size: int) -> Iterator[list[Case]]:
    batch: list[Case] = []
    for case in cases:
        batch.append(case)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def grown(sizes: Sequence[Size], memory: float = 96.0, threads: int = 2, files: int = 8) -> list[str]:
    """What did not come back to its level between the first look and the last."""
    first, last = sizes[0], sizes[-1]
    found = []
    if last.memory > first.memory + memory:
        found.append(f"memory grew from {first.memory:,.0f} to {last.memory:,.0f} MB")
    if last.threads > first.threads + threads:
        found.append(f"threads grew from {first.threads} to {last.threads}")
    if last.files > first.files + files:
        found.append(f"open files grew from {first.files} to {last.files}")
    return found


def main() -> int:
    from abuse_cases import PICTURE, cases, warm

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the server's process, to watch its memory")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--token")
    parser.add_argument("--only", default="", help="families whose names begin so")
    given = parser.parse_args()
    target = Target(given.url, given.token)
    target.meet()
    order = random.Random(given.seed)
    before = run(target, warm(random.Random(given.seed + 1)), PICTURE, pid=given.pid, workers=given.workers)
    print("warm-up:", before, flush=True)
    chosen = (case for case in cases(order, given.count) if case.name.startswith(given.only))
    report = run(target, chosen, PICTURE, pid=given.pid, workers=given.workers)
    if given.pid:
        time.sleep(3)  # the engine gives memory back when it has been idle for a while
        report.sizes = [*before.sizes[-1:], *report.sizes, Size.of(given.pid)]
        for fault in grown(report.sizes):
            report.add("size", "grown", [fault])
    print(report)
    return 1 if report.wrong or before.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
