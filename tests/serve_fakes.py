"""A server in this process, around a tiny model, for tests that ask it over HTTP."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from PIL import Image

from fakes import tiny_vlm
from leveret.generate.model import Model
from leveret.model.vlm import VLM
from leveret.serve.app import Service
from leveret.serve.limits import Limits
from leveret.serve.pictures import Rules
from leveret.serve.run import Running, Where
from leveret.serve.wire import bind

NAME = "tiny"


@dataclass
class Up:
    """A server that listens. `client` is OpenAI's, `http` speaks plainly."""

    running: Running
    service: Service
    client: openai.OpenAI
    http: httpx.Client

    @property
    def url(self) -> str:
        return self.running.url

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    def post(self, body: Any, **more: Any) -> httpx.Response:
        """A completion; `body` is merged over a question that is in order."""
        return self.http.post("/v1/chat/completions", json={**question(), **body}, **more)

    def raw(self, data: bytes, seconds: float = 20.0) -> bytes:
        """Bytes as they are over a connection of their own; all that comes back until it ends."""
        with socket.create_connection(self.address, timeout=seconds) as line:
            line.sendall(data)
            return rest_of(line)


def soon(true: Callable[[], Any], seconds: float = 60.0, every: float = 0.01) -> None:
    """Waits until something is so."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(every)


def rest_of(line: socket.socket) -> bytes:
    got = b""
    while piece := line.recv(65536):
        got += piece
    return got


def question(text: str = "is there a square", **more: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 8, **more}


def client_for(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def serving(
    vlm: VLM | None = None,
    limits: Limits | None = None,
    where: Where | None = None,
    key: str = "none",
    slots: int = 64,
    **more: Any,
) -> Iterator[Up]:
    """A service on a free port, in a thread. `more` goes to Rules."""
    model = Model(vlm or tiny_vlm(), slots=slots)
    service = Service(model, NAME, limits or Limits(), Rules(**more))
    where = where or Where(port=0)
    running = Running(service, where, bind(where.host, 0))
    ready = threading.Event()
    thread = threading.Thread(target=running.run, args=(ready.set,))
    thread.start()
    try:
        assert ready.wait(30)
        with httpx.Client(base_url=running.url, timeout=60) as http, client_for(running.url, key) as client:
            yield Up(running, service, client, http)
    finally:
        running.stop()
        thread.join(30)
        service.close()
    assert not thread.is_alive()


def picture(colour: str = "red", size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, colour).save(held, form)
    return held.getvalue()


def uri(data: bytes, form: str = "png") -> str:
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


def about(*pictures: bytes, text: str = "what colour is it") -> list[dict[str, Any]]:
    """One user message with pictures."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": uri(one)}} for one in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def events(text: str) -> list[Any]:
    """The data of server-sent events; the last one must be [DONE]."""
    found = [part.removeprefix("data: ") for part in text.split("\n\n") if part and not part.startswith(":")]
    assert found[-1] == "[DONE]", text[-500:]
    return [json.loads(one) for one in found[:-1]]
