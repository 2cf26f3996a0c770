"""An OpenAI-compatible server on this machine that does what it is told, good or bad; for the tests of endpoints."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Step = dict[str, Any]
"""status, body (a dictionary, or bytes), headers; or `cut`: close the connection after so many bytes of a reply."""


def said(text: str | None, finish: str = "stop", **usage: int) -> Step:
    """A reply as it should be."""
    told = {
        "model": "served",
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
    }
    return {"status": 200, "body": {**told, "usage": usage or {"prompt_tokens": 10, "completion_tokens": 2}}}


def refused(status: int, message: str = "no", code: str | None = None, **headers: str) -> Step:
    return {"status": status, "body": {"error": {"message": message, "code": code}}, "headers": headers}


class Server:
    """`answer(body, number) -> Step` for request `number`, counted from 0; `seen`: their bodies, `keys`: their keys.

    slow  seconds that it thinks about each."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Step]) -> None:
        self.answer = answer
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.at_once = self.most_at_once = 0
        self.slow = 0.0
        self.lock = threading.Lock()
        self.url = ""


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Step]) -> Iterator[Server]:
    server = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self.send_error(405)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = len(server.seen)
                server.seen.append(body)
                server.keys.append(self.headers.get("Authorization"))
                server.paths.append(self.path)
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            time.sleep(server.slow)
            try:
                step = server.answer(body, number)
            finally:
                with server.lock:  # before the reply: the client sends its next request the moment it has read this one
                    server.at_once -= 1
            self.reply(step)

        def reply(self, step: Step) -> None:
            data = step["body"] if isinstance(step["body"], bytes) else json.dumps(step["body"]).encode()
            self.send_response(step["status"])
            for name, value in step.get("headers", {}).items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: step.get("cut", len(data))])
            if "cut" in step:
                self.close_connection = True

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
