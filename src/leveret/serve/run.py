"""`leveret serve MODEL`: from a model's folder to a server that listens, and to its end.

    bind -> load -> one answer, to be sure -> listen -> ... -> SIGTERM: drain -> end

The port is taken first, so that a port in use costs no loading. SIGTERM or Ctrl-C: /health says `draining`, new
questions get 503, answers in the making have `drain_seconds`; what is not done by then ends with an event that says so.
A second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leveret.runs import DataError, EnvironmentFault, RecipeError, in_bytes

TOKEN = "LEVERET_TOKEN"
"""The environment variable that holds the token clients must send. Never on the command line: others read that."""

_NAME = re.compile(r"\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+", re.ASCII)
"""A host in a Host header, without its port."""
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?|[a-z]+-extension://[a-z0-9-]+|null", re.ASCII)
"""As browsers write the header Origin."""

KERNELS = 128
"""Compiled kernels that torch and oneDNN keep, each."""
LAST = 3
"""Seconds for connections to close when all answers have ended."""


@dataclass(frozen=True, slots=True)
class Where:
    """How a server is reached.

    host, port   port 0 takes any that is free.
    token        what clients must send as `Authorization: Bearer`; None lets everybody in.
    hosts        further names in the Host header that mean this server.
    origins      web pages of other hosts whose scripts may ask this one (CORS).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        # What a browser sends is compared letter by letter: another spelling would let nobody in, in silence.
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise RecipeError(
                    f"--allow-origin {origin}: an origin is https://app.example or http://localhost:3000, in small "
                    "letters; no path, and no slash at the end"
                )
        for name in self.hosts:
            if not _NAME.fullmatch(name):
                raise RecipeError(f"--allow-host {name!r}: this is no host's name; no http://, no port, no path")

    def names(self) -> list[str] | None:
        """Names allowed in the Host header. On loopback, those of this machine: a page of the web could otherwise
        point its own name at 127.0.0.1 and speak for its visitor. None: any, where others shall come in anyway."""
        from leveret.serve.guard import is_loopback

        own = f"[{self.host}]" if ":" in self.host else self.host  # as URLs write an address of IPv6
        return [own, *self.hosts] if self.hosts or is_loopback(self.host) else None


def serve(
    model: str | Path,
    where: Where | None = None,
    limits: Any = None,
    *,
    name: str | None = None,
    domains: Sequence[str] = (),
    device: str = "auto",
    precision: Any = "auto",
    slots: int = 64,
    memory: int | None = None,
    load_in: Any = None,
    json_line: bool = False,
    begun: float | None = None,
) -> None:
    """Answer until SIGTERM or Ctrl-C.

    limits    a `serve.limits.Limits`; None for the defaults.
    name      what clients call the model; by default its folder's name.
    domains   hosts that pictures may be fetched from; by default none are fetched.
    slots     answers made at once.
    memory    bytes that may be held for answers beside the weights (see `Live`); None takes what is free.
    load_in   the language model in few bits, as `leveret.load` takes it.
    json_line put one JSON line on stdout when it is ready: url, pid, model, seconds.
    begun     `time.perf_counter()` when the command began; for the time that is told.

    Raises EnvironmentFault for a port that is taken or a missing package, RecipeError for a value that is not allowed,
    DataError for a model that cannot be read or cannot answer. KeyboardInterrupt when it was stopped twice.
    """
    begun = time.perf_counter() if begun is None else begun
    where = where or Where()
    from leveret.serve.limits import Limits
    from leveret.serve.pictures import Rules

    limits = limits or Limits()
    rules = Rules(tuple(domains), max_pixels=limits.pixels)  # a value that means nothing is told before all else
    # Kernels are compiled for each shape and kept, by a thousand and more, half a megabyte each in bf16; clients send
    # every length there is. Read when torch is imported.
    for name_of_cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name_of_cache, str(KERNELS))
    from leveret.serve.wire import bind

    line = bind(where.host, where.port)
    # It warns of every write to a connection that was reset, which is a client's doing and would fill the log.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    with contextlib.closing(line):
        _say(f"loading {model} ...")
        import transformers  # noqa: F401  (so that its time is counted among the imports)

        from leveret.generate.model import load
        from leveret.serve.app import Service

        imported = time.perf_counter()
        loaded = load(
            model, device, precision=precision, load_in=load_in,
            slots=slots, max_new_tokens=limits.answer_tokens, memory=memory,
        )  # fmt: skip
        service = Service(loaded, name or name_of(model), limits, rules)
        try:
            try_out(service)
            running = Running(service, where, line)
            facts = {
                "url": running.url,
                "pid": os.getpid(),
                "model": service.name,
                "parameters": service.parameters,
                "device": str(loaded.vlm.device),
            }

            def ready() -> None:
                now = time.perf_counter()
                facts["seconds"] = round(now - begun, 2)
                facts["imports"] = round(imported - begun, 2)
                for text in _greeting(service, where, facts):
                    _say(text)
                if json_line:
                    print(json.dumps(facts), flush=True)

            running.run(ready)
        finally:
            service.close()
    _say(f"ended; {running.requests:,} requests were answered")


def name_of(model: str | Path) -> str:
    """What a model is called where nobody says: the last part of its path or of its id."""
    text = str(model)
    path = Path(text)
    return (path.resolve().name if path.exists() else text.rstrip("/").rpartition("/")[2].partition("@")[0]) or "model"


def try_out(service: Any) -> None:
    """One token about one grey picture: who says `ready` has answered once, and the first client need not wait for what
    is only done once. DataError when the model cannot answer, RecipeError or EnvironmentFault when not even this has
    room in memory."""
    from io import BytesIO

    from PIL import Image

    from leveret.generate.engine import Request
    from leveret.generate.live import Ask, Event, NoRoom
    from leveret.generate.model import reference
    from leveret.records import IMAGE_MARK, Turn

    held = BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(held, "PNG")
    ref = reference(held.getvalue())
    assert ref is not None
    done = threading.Event()
    last: list[Event] = []

    def hear(event: Event) -> None:
        if event.finish is not None:
            last.append(event)
            done.set()

    ask = Ask(Request("", (ref,), (Turn("user", f"{IMAGE_MARK}\n?"),), max_new_tokens=1))
    try:
        prepared = service.live.prepare(ask)
    except NoRoom as lack:
        least = f"a short answer needs {in_bytes(lack.need)} beside the weights, and {in_bytes(lack.bound)} are"
        if service.model.engine.memory is None:
            raise EnvironmentFault(f"{least} what is free here for answers; end other programs") from None
        raise RecipeError(f"{least} what --memory leaves for answers; give it more, such as 1GB") from None
    service.live.submit(prepared, hear)
    done.wait()
    if (fault := last[0].fault) is not None:
        raise fault


@dataclass
class Running:
    """uvicorn around one service.

    url       where it listens.
    draining  set by the first signal, or by `stop`.
    """

    service: Any
    where: Where
    line: socket.socket
    server: Any = field(init=False)
    url: str = field(init=False)
    _asked: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        import uvicorn

        from leveret.serve.app import build, guarded
        from leveret.serve.guard import Door
        from leveret.serve.wire import HEADER_BYTES, patient

        address = self.line.getsockname()
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{address[1]}"
        app: Any = build(self.service, token=self.where.token is not None)
        door = Door(self.service.limits, self.where.names(), self.where.token)
        app = guarded(self.service, app, door)
        if self.where.origins:  # around the guard: a page must be able to read why it was refused
            from starlette.middleware.cors import CORSMiddleware

            app = CORSMiddleware(
                app, allow_origins=list(self.where.origins), allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"], expose_headers=["x-request-id", "retry-after"],
            )  # fmt: skip
        outer = self

        class Server(uvicorn.Server):  # type: ignore[misc]
            """uvicorn's, without its own ideas about signals."""

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                outer._started()

        self.server = Server(
            uvicorn.Config(
                app,
                http=patient(self.service.limits),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=LAST,
                h11_max_incomplete_event_size=HEADER_BYTES,
            )
        )
        self.service.metrics.connections.set_function(lambda: len(self.server.server_state.connections))
        self._ready: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    @property
    def requests(self) -> int:
        return int(self.server.server_state.total_requests)

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until told to stop; `ready` is called when it listens. In the main thread signals do that."""
        self._ready = ready
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        from leveret.serve.wire import taken

        self._loop = asyncio.get_running_loop()
        with self._signals():
            try:
                await self.server.serve(sockets=[self.line])
            except OSError as fault:  # a port that another bound at the same moment: listening fails
                raise taken(self.where.host, self.where.port, fault) from None
            if self._drain is not None:
                await self._drain

    def _started(self) -> None:
        self._ready()

    def stop(self) -> None:
        """Begin to drain; from any thread. Harmless when it has begun."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        if self._drain is None:
            self.service.draining = True
            self._drain = asyncio.get_running_loop().create_task(self._drained())

    async def _drained(self) -> None:
        await asyncio.to_thread(self.service.live.drain, self.service.limits.drain_seconds)
        self.server.should_exit = True

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self._asked:
                # Threads of the engine and of pictures would be waited for; nothing of theirs is to be kept.
                os.write(2, b"ended at once\n")
                os._exit(4)
            self._asked = True
            seconds = self.service.limits.drain_seconds
            os.write(2, f"ending when the answers in the making are done, in {seconds:g} s at most; "
                        "once more to end at once\n".encode())  # fmt: skip
            self.stop()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# --- what is told -----------------------------------------------------------------------------------------------------


def _greeting(service: Any, where: Where, facts: dict[str, Any]) -> Iterator[str]:
    limits = service.limits
    yield (
        f"{service.name}: {service.parameters:,} parameters on {facts['device']}; ready after {facts['seconds']} s, "
        f"of which importing took {facts['imports']}"
    )
    yield f"  chat page  {facts['url']}/"
    yield f"  API        {facts['url']}/v1  (model {service.name!r})"
    yield (
        f"  limits     {in_bytes(limits.body_bytes)} a request, {limits.images} images of {limits.pixels / 1e6:g} MP, "
        f"{limits.answer_tokens} tokens an answer, {limits.waiting} waiting, {limits.connections} connections"
        + (f", {limits.rate:g} requests a minute for one address" if limits.rate else "")
    )
    fetched = f"fetched from {', '.join(service.rules.domains)}" if service.rules.domains else "none fetched"
    yield f"  pictures   as data URIs; {fetched}"
    yield f"  token      {'asked for' if where.token else 'none asked for'}"
    from leveret.serve.guard import is_loopback

    if not is_loopback(where.host) and where.token is None:
        yield (
            f"WARNING: --host {where.host} lets everybody in who reaches this machine, and none needs a token. Set the "
            f"environment variable {TOKEN}, or give --token-file FILE."
        )


def token_from(file: Path | None) -> str | None:
    """The token in a file or, without one, in the environment; None where there is neither.

    Raises DataError for a file that cannot be read or is empty, RecipeError for a token that no header can carry.
    """
    source = TOKEN if file is None else str(file)
    if file is None:
        text = os.environ.get(TOKEN, "")
        if not text:
            return None
    else:
        try:
            text = file.read_text("utf-8")
            if os.name == "posix" and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
                _say(f"note: others on this machine can read {file}; chmod 600 keeps it yours")
        except (OSError, UnicodeDecodeError) as fault:
            reason = getattr(fault, "strerror", None) or "not text"
            raise DataError(f"--token-file {file}: cannot be read ({reason})") from None
    token = text.strip()
    if not token:
        raise DataError(f"{source}: the token is empty; put one there, such as `openssl rand -hex 24` prints")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise RecipeError(f"{source}: a token is letters, digits and signs of ASCII, without blanks")
    return token


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
