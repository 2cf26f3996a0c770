"""A server that speaks the API which the chat page speaks, and says what a test wants it to say."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import leveret

PAGE = Path(leveret.__file__).parent / "serve" / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
"""As strict as it can be said: no inline script or style, nothing foreign, and no string ever becomes markup."""

CLOSE = object()
"""Among the pieces of an answer: the connection ends here, without a word."""
Piece = Any
"""A text, seconds to wait, an event to wait for, a raw event of the stream (a mapping), or CLOSE."""


def default_model(**extra: Any) -> dict[str, Any]:
    told = {"parameters": 1_640_000, "max_images": 4, "vision": True, "max_tokens": 1024, **extra}
    return {"id": "quickstart", "object": "model", "created": 0, "owned_by": "leveret", "leveret": told}


def openapi() -> dict[str, Any]:
    """A description with every construction the page has to show."""
    body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Chat"}}}, "required": True}
    message = {
        "type": "object", "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "user", "assistant"], "type": "string"},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
        },
    }  # fmt: skip
    chat = {
        "type": "object", "required": ["messages"], "title": "Chat",
        "properties": {
            "messages": {"type": "array", "items": {"$ref": "#/components/schemas/Message"}, "minItems": 1},
            "temperature": {
                "type": "number", "minimum": 0, "maximum": 2, "default": 1, "description": "0: the **likeliest**",
            },
            "again": {"$ref": "#/components/schemas/Chat"},
        },
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "leveret", "version": "0", "description": "An <b>API</b> with `code`."},
        "paths": {
            "/v1/chat/completions": {"post": {
                "summary": "Answer a conversation", "requestBody": body, "description": "Streams with `stream`.",
                "responses": {"200": {"description": "An answer"}, "429": {"description": "No room"}},
            }},
            "/v1/models": {"get": {
                "summary": "Which models there are", "responses": {"200": {"description": "The list"}},
                "parameters": [
                    {"name": "limit", "in": "query", "schema": {"type": "integer"}, "description": "how many"},
                ],
            }},
        },
        "components": {"schemas": {"Chat": chat, "Message": message}},
    }  # fmt: skip


class PageServer:
    """Serves the page, and answers as `reply(body)` says.

    refusals  (status, headers, error) that the next requests for an answer get instead.
    asked     bodies of the requests for answers, in their order; `left` counts readers who went before the end.
    """

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Iterable[Piece]] = lambda body: ["A red", " circle."]
        self.refusals: list[tuple[int, dict[str, str], dict[str, Any]]] = []
        self.models = [default_model()]
        self.token = ""
        self.asked: list[dict[str, Any]] = []
        self.looked: list[dict[str, Any]] = []
        self.left = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.get(self)

            def do_POST(self) -> None:
                server.post(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}/"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    # --- how it answers

    def send(self, to: BaseHTTPRequestHandler, status: int, kind: str, data: bytes, **headers: str) -> None:
        to.send_response(status)
        for name, value in {
            "Content-Type": kind, "Content-Length": str(len(data)), "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache", **headers,
        }.items():  # fmt: skip
            to.send_header(name, value)
        to.end_headers()
        to.wfile.write(data)

    def json(self, to: BaseHTTPRequestHandler, status: int, value: Any, **headers: str) -> None:
        self.send(to, status, "application/json", json.dumps(value).encode(), **headers)

    def refused(self, to: BaseHTTPRequestHandler) -> bool:
        if not self.token or to.headers.get("Authorization") == f"Bearer {self.token}":
            return False
        self.json(to, 401, {"error": {"message": "This server asks for a token.", "type": "authentication_error"}})
        return True

    def get(self, to: BaseHTTPRequestHandler) -> None:
        path = to.path.partition("?")[0]
        name = {"/": "index.html", "/docs": "docs.html"}.get(path) or path.removeprefix("/page/")
        if path == "/v1/models":
            if not self.refused(to):
                self.json(to, 200, {"object": "list", "data": self.models})
        elif path == "/openapi.json":
            self.json(to, 200, openapi())
        elif "/" not in name and (PAGE / name).is_file():
            self.send(to, 200, KINDS[Path(name).suffix] + "; charset=utf-8", (PAGE / name).read_bytes())
        else:
            self.json(to, 404, {"error": {"message": f"There is no {path}."}})

    def post(self, to: BaseHTTPRequestHandler) -> None:
        body = json.loads(to.rfile.read(int(to.headers["Content-Length"])))
        if self.refused(to):
            return
        if to.path == "/v1/look":
            self.looked.append(body)
            self.json(to, 200, look(body))
            return
        self.asked.append(body)
        if self.refusals:
            status, headers, error = self.refusals.pop(0)
            self.json(to, status, {"error": error}, **headers)
            return
        try:
            self.stream(to, body)
        except OSError:
            self.left += 1
            to.close_connection = True

    def stream(self, to: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        to.send_response(200)
        to.send_header("Content-Type", "text/event-stream")
        to.send_header("Connection", "close")
        to.end_headers()
        to.close_connection = True

        def event(value: Any) -> None:
            to.wfile.write(b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n")
            to.wfile.flush()

        def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
            choice: dict[str, Any] = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
            if body.get("logprobs") and text:
                choice["logprobs"] = {"content": [told(text)]}
            return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}

        made = 0
        for piece in self.reply(body):
            if piece is CLOSE:
                return
            if isinstance(piece, threading.Event):
                while not piece.wait(0.05):
                    to.wfile.write(b": still here\n\n")  # finds out whether the reader has left
                    to.wfile.flush()
            elif isinstance(piece, (int, float)):
                time.sleep(piece)
            elif isinstance(piece, str):
                made += 1
                event(chunk(piece))
            else:
                event(piece)
                if "error" in piece:
                    event(b"[DONE]")
                    return
        event(chunk("", "length" if made >= body.get("max_tokens", 1 << 30) else "stop"))
        if body.get("stream_options", {}).get("include_usage"):
            event({"choices": [], "usage": {"prompt_tokens": 87, "completion_tokens": made, "total_tokens": 87 + made}})
        event(b"[DONE]")


def told(text: str) -> dict[str, Any]:
    """A token with probabilities that follow from its letters."""
    sure = 0.35 + (sum(map(ord, text)) % 64) / 100
    others = [(" blue", 0.6), (" round", 0.25), ("\n", 0.1), (" \ufffd", 0.02)]
    shares = [(text, sure)] + [(other, part * (1 - sure)) for other, part in others]
    ways = [
        {"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in sorted(shares, key=lambda s: -s[1])
    ]
    return {"token": text, "logprob": math.log(sure), "bytes": list(text.encode()), "top_logprobs": ways}


def look(body: dict[str, Any]) -> dict[str, Any]:
    """For each word of an answer a spot that wanders over the pictures; as `generate.looked.Look.as_json` writes it."""
    words = body["answer"].split()
    count = sum(
        part["type"] == "image_url" for m in body["messages"] if isinstance(m["content"], list) for part in m["content"]
    )
    side, layers = 8, 3

    def spot(image: int, word: int, layer: int) -> list[float]:
        row, column = (2 * word + layer + image) % side, 3 * word % side
        squares = (((i // side - row) ** 2 + (i % side - column) ** 2) / 4 for i in range(side * side))
        return [round(0.05 * math.exp(-square), 4) for square in squares]

    weights = [[[spot(i, w, layer) for layer in range(layers)] for w in range(len(words))] for i in range(count)]
    return {
        "answer": body["answer"],
        "words": [{"text": word, "tokens": [word]} for word in words],
        "images": [
            {"grid": [side, side], "shown": [0, -0.1, 1, 1.1], "image": i, "part": "picture", "placed": True}
            for i in range(count)
        ],
        "layers": layers,
        "weights": weights,
        "shares": {
            "names": ["image", "first", "text", "answer", "nowhere"],
            "values": [[[0.4, 0.3, 0.2, 0.1, 0.0] for _ in range(layers)] for _ in words],
        },
        "asked": {
            "words": [{"text": word} for word in ("Which", "thing?")],
            "weights": [[[spot(i, w + 3, layer) for layer in range(layers)] for w in range(2)] for i in range(count)],
            "shares": [[[0.6, 0.2, 0.2, 0.0, 0.0] for _ in range(layers)] for _ in range(2)],
        },
        "alternatives": [{"token": word, "probability": 0.9, "top": [[word, 0.9], ["other", 0.05]]} for word in words],
        "notes": [],
        "unread": 0,
    }  # fmt: skip
