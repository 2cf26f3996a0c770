"""The Dockerfile, read as a builder reads it: no daemon is asked."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "STOPSIGNAL", "USER",
    "WORKDIR",
}  # fmt: skip


def instructions() -> list[tuple[str, str]]:
    """(instruction, what follows it), comments gone and lines joined."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name.upper(), " ".join(rest.split())) for name, _, rest in pairs]


def last_stage() -> dict[str, str]:
    """Instructions of the image that is shipped; of one that stands several times the last."""
    steps = instructions()
    begin = max(place for place, (name, _) in enumerate(steps) if name == "FROM")
    return dict(steps[begin:])


def test_it_is_written_in_known_instructions() -> None:
    assert {name for name, _ in instructions()} <= KNOWN
    assert instructions()[0][0] == "ARG" and instructions()[1][0] == "FROM"


def test_nothing_is_fetched_but_packages_of_the_constraints() -> None:
    said = instructions()
    assert not [rest for name, rest in said if name == "ADD"]
    runs = [rest for name, rest in said if name == "RUN"]
    assert not [run for run in runs if re.search(r"\b(curl|wget|git|apt-get|apt)\b", run)]
    hosts = {re.sub(r"https?://([^/]+).*", r"\1", url) for run in runs for url in re.findall(r"https?://\S+", run)}
    assert hosts == {"download.pytorch.org", "pypi.org"}
    installs = [run for run in runs if "pip install" in run]
    assert len(installs) == 2 and all("pip install --constraint constraints.txt" in run for run in installs)
    images = [rest.split()[0] for name, rest in said if name == "FROM"]
    assert images == ["python:${PYTHON}"] * 2
    version = next(rest for name, rest in said if name == "ARG" and rest.startswith("PYTHON="))
    assert re.fullmatch(r"PYTHON=3\.\d+-slim-\w+", version) and "latest" not in version


def test_nobody_is_root_and_secrets_are_not_in_it() -> None:
    stage = last_stage()
    user, group = stage["USER"].split(":")
    assert int(user) > 1000 and int(group) > 1000  # numbers: a cluster can check that they are not root's
    order = [name for name, _ in instructions()]
    assert len(order) - 1 - order[::-1].index("RUN") < len(order) - 1 - order[::-1].index("USER")
    assert not re.search(r"(?i)(token|password|secret)\s*=", (ROOT / "Dockerfile").read_text("utf-8"))


def test_the_root_may_be_read_only() -> None:
    said = dict(pair.split("=", 1) for pair in shlex.split(last_stage()["ENV"]))
    assert said["PYTHONDONTWRITEBYTECODE"] == "1" and said["HOME"] == "/cache" and said["HF_HOME"].startswith("/cache")
    assert last_stage()["WORKDIR"] == "/cache"


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server on a free port whose /health has a status."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/health"]


@pytest.mark.parametrize(("status", "well"), [(200, True), (503, False), (500, False)])
def test_the_health_check_asks_the_server(status: int, well: bool) -> None:
    check = last_stage()["HEALTHCHECK"]
    said = json.loads(check.partition("CMD ")[2])
    assert said[:2] == ["python", "-c"] and "8000/health" in said[2]
    with answering(status) as port:
        done = subprocess.run([sys.executable, "-c", said[2].replace("8000", str(port))], capture_output=True)
    assert (done.returncode == 0) == well


def test_a_server_that_is_not_there_is_not_well() -> None:
    said = json.loads(last_stage()["HEALTHCHECK"].partition("CMD ")[2])
    assert subprocess.run([sys.executable, "-c", said[2].replace("8000", "9")], capture_output=True).returncode


def test_it_starts_what_the_command_line_knows() -> None:
    from leveret.cli import run

    stage = last_stage()
    assert json.loads(stage["ENTRYPOINT"]) == ["leveret"]
    verb, model, *options = json.loads(stage["CMD"])
    assert (verb, model) == ("serve", "/model") and stage["EXPOSE"] == options[options.index("--port") + 1] == "8000"
    from leveret import cli

    if verb not in {command.name for command in cli.app.registered_commands}:
        pytest.skip("this leveret has no command `serve` yet")
    assert run([verb, model, *options, "--help"]) == 0


def test_what_it_copies_is_there_and_sent_to_the_builder() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and line[0] != "#"]

    def sent(path: str) -> bool:
        kept = True
        for rule in rules:
            if fnmatch(path, rule.lstrip("!")) or path.startswith(rule.lstrip("!") + "/"):
                kept = rule.startswith("!")
        return kept

    lines = [rest.split() for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    copied = [source for line in lines for source in line[:-1]]
    assert set(copied) == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "src"}
    for source in copied:
        assert (ROOT / source).exists() and sent(source), source
    for other in ("runs/quickstart/model.safetensors", ".git/config", ".venv/bin/python", "tests/fakes.py", ".env"):
        assert not sent(other), other
    assert sent("src/leveret/cli/__init__.py")
