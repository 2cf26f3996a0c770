"""A stand-in of the model hub on 127.0.0.1: what huggingface_hub asks for to download a repository, and to commit.

It knows folders of a place, `PLACE/OWNER/NAME`, each one revision; and it writes down what it was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

GATED, TOKEN = "gated/model", "hf_standin"


class Hub:
    """with Hub(place) as hub: hub.leveret("chat", ..).

    asked   (method, path) of every request. committed: repository -> {file: bytes}. private: of those it made.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.asked = place, list[tuple[str, str]]()
        self.committed: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        hub = self

        class Handler(_Handler):
            standin = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def seat(self, **env: str) -> Seat:
        """A process for command lines whose model hub this is."""
        around = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.place / ".home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return Seat(around | {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "no_proxy": "*"} | env)

    def fetched(self) -> set[str]:
        """Files whose content somebody asked for."""
        return {
            path.split("/resolve/")[1].split("/", 1)[1]
            for how, path in self.asked
            if how == "GET" and "/resolve/" in path
        }

    def files(self, name: str) -> dict[str, Path] | None:
        folder = self.place / name
        if not folder.is_dir():
            return None
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass(frozen=True)
class Done:
    """A command line's end."""

    code: int
    out: str
    err: str


WORDS = 12
"""Tokens of an answer: toys never end of themselves."""

_DRIVER = f"""
import contextlib, io, json, os, sys
from leveret.cli import run
from leveret.serve.chat import chat
chat.__kwdefaults__["max_new_tokens"] = {WORDS}
for line in sys.stdin:
    args, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ |= dict(HF_TOKEN=token) if token else dict()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(args)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Seat:
    """A process that runs command lines one after the other: the hub's library reads its environment when it is
    imported, so every environment needs a process, and a process takes seconds to start."""

    def __init__(self, env: dict[str, str]) -> None:
        unset = ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        around = {key: value for key, value in os.environ.items() if key not in unset} | env
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", _DRIVER], text=True, env=around, **pipes)

    def __call__(self, *args: str, token: str = "") -> Done:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([args, token]) + "\n")
        self.process.stdin.flush()
        return Done(*json.loads(self.process.stdout.readline()))

    def __enter__(self) -> Seat:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def _sha(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    standin: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def look(self) -> None:
        path = unquote(urlsplit(self.path).path).removeprefix("/datasets")
        self.standin.asked.append((self.command, path))
        found = re.match(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?$", path)
        found = found or re.match(r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)$", path)
        if not found:
            return self.reply(404, {"error": "?"})
        name, what, revision = found[1], found[2], found[3]
        files = self.standin.files(name)
        if name == GATED:
            return self.reply(403, {"error": "gated"}, X_Error_Code="GatedRepo")
        if files is None:
            return self.reply(401, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
        if revision not in (None, "main", _sha(name)):
            return self.reply(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        if what == "tree":
            rows = [
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": _sha(path)}
                for path, file in files.items()
            ]
            return self.reply(200, rows)
        if what != "resolve":
            siblings = [{"rfilename": path} for path in files]
            return self.reply(200, {"id": name, "sha": _sha(name), "siblings": siblings, "private": False, "tags": []})
        if found[4] not in files:
            return self.reply(404, X_Error_Code="EntryNotFound")
        body = files[found[4]].read_bytes()
        about = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": _sha(name), "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self.reply(200, b"", **about, Content_Length=str(len(body)))
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
            span = f"bytes {first}-{last}/{len(body)}"
            return self.reply(206, body[first : last + 1], **about, Content_Range=span)
        self.reply(200, body, **about)

    do_GET = do_HEAD = look

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.standin.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
            if name.startswith("others/"):
                return self.reply(403, {"error": "You don't have the rights"})
            self.standin.private[name] = told.get("private") is True or told.get("visibility") == "private"
            self.standin.committed.setdefault(name, {})
            return self.reply(200, {"url": f"{self.standin.url}/{name}", "name": name})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    self.standin.committed[found[1]][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            url = f"{self.standin.url}/{found[1]}/commit/{_sha('commit')}"
            return self.reply(200, {"success": True, "commitOid": _sha("commit"), "commitUrl": url})
        self.reply(404, {"error": "?"})
