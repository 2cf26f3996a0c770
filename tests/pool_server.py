"""A web server on 127.0.0.1 with the faults of the world's: it breaks off, knows no ranges, changes its files."""

from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """with Server() as server: server.files["/a"] = b"..."; fetch(server.url + "/a", path).

    files    path -> content. asked: (path, Range header or "") of every request.
    breaks   path -> bytes after which an answer is cut, one entry an answer. status: path -> codes, one an answer.
    ranges, marks, lengths  whether it knows ranges, sends an ETag, tells lengths. moved: path -> where it sends on.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.breaks: dict[str, list[int]] = {}
        self.status: dict[str, list[int]] = {}
        self.moved: dict[str, str] = {}
        self.ranges = self.marks = self.lengths = True
        server = self

        class Handler(_Handler):
            standin = server

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    standin: Server

    def log_message(self, *_: Any) -> None:
        pass

    def _refuse(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self) -> None:
        server, path, asked = self.standin, self.path, self.headers.get("Range", "")
        server.asked.append((path, asked))
        if path in server.moved:
            return self._refuse(302, Location=server.moved[path])
        if codes := server.status.get(path):
            return self._refuse(codes.pop(0))
        if path not in server.files:
            return self._refuse(404)
        body = server.files[path]
        mark = f'"{hashlib.sha1(body).hexdigest()}"'
        span = re.fullmatch(r"bytes=(\d+)-", asked) if server.ranges else None
        if span and self.headers.get("If-Range", mark) != mark:
            span = None
        begin = int(span[1]) if span else 0
        if span and begin >= len(body):
            return self._refuse(416, Content_Range=f"bytes */{len(body)}")
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        if server.marks:
            self.send_header("ETag", mark)
        if server.lengths:
            self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        cuts = server.breaks.get(path)
        self.wfile.write(body[begin : begin + cuts.pop(0)] if cuts else body[begin:])
