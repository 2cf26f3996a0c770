"""A server as a process: how it starts, how it ends, and what becomes of those it was answering."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fakes import tiny_vlm
from leveret import cli
from leveret.generate.model import Model, load
from leveret.model.checkpoint import save
from leveret.runs import DataError, EnvironmentFault, RecipeError
from leveret.serve.app import Service
from leveret.serve.limits import Limits
from leveret.serve.pictures import Rules
from leveret.serve.run import TOKEN, Where, _greeting, name_of, token_from
from leveret.serve.wire import bind
from serve_fakes import about, client_for, events, picture, question, serving, soon

pytestmark = [pytest.mark.serve, pytest.mark.skipif(sys.platform == "win32", reason="signals are not the same there")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_vlm(), tmp_path_factory.mktemp("served") / "tiny")


def command(*args: Any) -> list[str]:
    return [sys.executable, "-m", "leveret.cli", *map(str, args)]


@dataclass
class Process:
    """A server that is ready. facts: its JSON line."""

    popen: subprocess.Popen[str]
    facts: dict[str, Any]
    said: list[str]

    @property
    def url(self) -> str:
        return str(self.facts["url"])

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def ended(self, seconds: float = 60.0) -> int:
        return self.popen.wait(seconds)


@contextmanager
def started(folder: Path, *args: Any, **environment: str) -> Iterator[Process]:
    popen = subprocess.Popen(
        command("serve", folder, "--json", "--port", 0, *args),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    said: list[str] = []
    assert popen.stdout is not None and popen.stderr is not None
    reader = threading.Thread(target=lambda: said.extend(popen.stderr or ()), daemon=True)
    reader.start()
    try:
        line = popen.stdout.readline()
        assert line, "".join(said)
        yield Process(popen, json.loads(line), said)
    finally:
        popen.kill()
        popen.wait()
        reader.join(10)
        popen.stdout.close()
        popen.stderr.close()


def test_a_server_answers_as_the_terminal_chat_and_ends_when_it_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "red.png"
    photo.write_bytes(picture())
    assert cli.run(["chat", str(folder), str(photo), "-p", "what colour is it"]) == 0
    shown = capsys.readouterr().out
    with started(folder, "--name", "tiny") as process:
        assert process.facts["pid"] == process.popen.pid and process.facts["model"] == "tiny"
        assert 0 < process.facts["imports"] <= process.facts["seconds"]
        with client_for(process.url) as client:
            got = client.chat.completions.create(model="tiny", messages=about(picture()))  # type: ignore[arg-type]
        # The terminal leaves out signs that would steer it.
        said = "".join(letter for letter in got.choices[0].message.content or "" if letter in "\n\t" or
                       (letter >= " " and not "\x7f" <= letter <= "\x9f"))  # fmt: skip
        assert said == shown.removesuffix("\n")
        told = "".join(process.said)
        assert "ready after" in told and "importing" in told and f"{process.url}/v1" in told
        assert "none asked for" in told and "WARNING" not in told
        process.signal(signal.SIGTERM)
        assert process.ended() == 0
    assert "requests were answered" in "".join(process.said)


def test_answers_in_the_making_end_with_a_proper_event(folder: Path) -> None:
    with started(folder, "--name", "tiny", "--drain", 0.3, "--slots", 2) as process:

        def stream(number: int) -> str:
            body = question(stream=True, max_tokens=480, temperature=1.0, seed=number, n=2)
            return httpx.post(f"{process.url}/v1/chat/completions", json=body, timeout=60).text

        def whole() -> httpx.Response:
            return httpx.post(f"{process.url}/v1/chat/completions", json=question(max_tokens=480, n=8), timeout=60)

        def by_the_client() -> str:
            with client_for(process.url) as client:
                try:
                    for _ in client.chat.completions.create(**question(stream=True, max_tokens=480, n=8)):
                        pass
                except openai.APIError as fault:
                    return str(fault.code)
            return "ended"

        def taken() -> float:
            kinds = [f"leveret_engine_{kind} " for kind in ("waiting", "entering", "active", "answered")]
            lines = httpx.get(f"{process.url}/metrics").text.splitlines()
            return sum(float(line.split()[1]) for line in lines if line.startswith(tuple(kinds)))

        with ThreadPoolExecutor(8) as crowd:
            streams = [crowd.submit(stream, number) for number in range(4)]
            wholes = [crowd.submit(whole) for _ in range(2)]
            client = crowd.submit(by_the_client)
            soon(lambda: taken() > 4 * 2 + 2 * 8 + 8, every=0.2)  # and the one that it asked itself
            process.signal(signal.SIGTERM)
            soon(lambda: "ending when" in "".join(process.said))
            last = [events(one.result())[-1] for one in streams]
            assert process.ended() == 0
        for one in last:
            finished = one.get("choices") and one["choices"][0]["finish_reason"]
            assert finished or one["error"]["code"] == "server_shutdown", one
        assert any("error" in one for one in last), "some were cut"
        for answer in (one.result() for one in wholes):
            assert answer.status_code == 200 or answer.json()["error"]["code"] == "server_shutdown"
        assert client.result() in ("server_shutdown", "ended")


def test_a_server_that_drains_says_so_and_a_second_signal_ends_it(folder: Path) -> None:
    with started(folder, "--name", "tiny", "--drain", 60, "--slots", 1) as process:
        lines = [socket.create_connection(("127.0.0.1", int(process.url.rsplit(":", 1)[1]))) for _ in range(24)]
        body = json.dumps(question(stream=True, max_tokens=480, n=8)).encode()
        for line in lines:  # 192 answers of 480 tokens, one at a time: minutes
            line.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
        for line in lines:
            line.recv(100)
        process.signal(signal.SIGTERM)
        soon(lambda: httpx.get(f"{process.url}/health").status_code == 503)
        assert httpx.get(f"{process.url}/health").json() == {"status": "draining"}
        late = httpx.post(f"{process.url}/v1/chat/completions", json=question())
        assert late.status_code == 503 and late.json()["error"]["code"] == "server_shutdown"
        assert int(late.headers["retry-after"]) > 0
        assert process.popen.poll() is None
        process.signal(signal.SIGTERM)
        assert process.ended(20) == 4
        for line in lines:
            line.close()


@pytest.mark.slow
def test_killed_and_started_again_on_the_same_port(folder: Path) -> None:
    port = 0
    for _ in range(2):
        # The last --port counts.
        with started(folder, "--name", "tiny", "--port", port) as process:
            port = int(process.url.rsplit(":", 1)[1])
            assert httpx.post(f"{process.url}/v1/chat/completions", json=question(), timeout=60).status_code == 200
            with httpx.stream("POST", f"{process.url}/v1/chat/completions",
                              json=question(stream=True, max_tokens=480)) as answer:  # fmt: skip
                next(answer.iter_lines())
                process.signal(signal.SIGKILL)
                assert process.ended() == -signal.SIGKILL


def test_starting_says_clearly_what_is_wrong(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: Any) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["leveret", "serve", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return ended.value.code, said

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        code, said = refused(folder, "--port", other.getsockname()[1])
        assert code == 5 and "another program listens there" in said
    code, said = refused(tmp_path / "nothing", "--port", 0)
    assert code == 3 and "nothing" in said
    assert refused(folder, "--port", 99999)[0] == 2
    code, said = refused(folder, "--port", 0, "--token-file", tmp_path / "no")
    assert code == 3 and "--token-file" in said
    code, said = refused(folder, "--port", 0, "--allow-domain", "http://a.example/")
    assert code == 2 and "--allow-domain" in said and "loading" not in said
    code, said = refused(folder, "--port", 0, "--memory", "1")
    assert code == 2 and "1 B are what --memory leaves for answers" in said
    with pytest.raises(RecipeError, match="allowed are auto, bf16, fp32"):
        load(tmp_path / "nothing", "cpu", precision="fp31")  # type: ignore[arg-type]
    assert refused(folder, "--port", 0, "--rate", -1)[0] == 2


# --- without a process ---------------------------------------------------------------------------------------------


def test_who_lets_everybody_in_is_warned() -> None:
    service = Service(Model(tiny_vlm()), "tiny", Limits(), Rules())
    facts = {"url": "http://127.0.0.1:1", "device": "cpu", "seconds": 1, "imports": 1}

    def told(**where: Any) -> str:
        return "\n".join(_greeting(service, Where(**where), facts))

    open_to_all = told(host="0.0.0.0")
    assert "WARNING: --host 0.0.0.0" in open_to_all and TOKEN in open_to_all
    assert "WARNING" not in told() and "none asked for" in told()
    shut = told(host="0.0.0.0", token="open-sesame")
    assert "WARNING" not in shut and "open-sesame" not in shut
    with serving(where=Where(host="0.0.0.0", port=0, token="open-sesame")) as up:
        assert up.running.url.startswith("http://127.0.0.1:")
        assert up.http.get("/v1/models").status_code == 401


def test_an_address_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    with monkeypatch.context() as patched, pytest.raises(EnvironmentFault, match="no such address"):
        patched.setattr(socket, "getaddrinfo", unknown)
        bind("nowhere.example", 0)
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(EnvironmentFault, match="not an address of this machine"):
        bind("192.0.2.1", 0)
    monkeypatch.undo()
    with bind("127.0.0.1", 0) as line:
        assert line.getsockname()[1] > 0


def test_a_token_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert token_from(None) is None
    monkeypatch.setenv(TOKEN, "from-outside")
    assert token_from(None) == "from-outside"
    file = tmp_path / "token"
    file.write_text("open-sesame\n")
    file.chmod(0o644)
    assert token_from(file) == "open-sesame", "a file that is named goes before"
    assert "chmod 600" in capsys.readouterr().err
    file.chmod(0o600)
    assert token_from(file) == "open-sesame" and not capsys.readouterr().err
    for text, kind in (("", DataError), (" \n", DataError), ("two words", RecipeError), ("schön", RecipeError)):
        file.write_text(text)
        with pytest.raises(kind, match="token"):
            token_from(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not text"):
        token_from(file)
    with pytest.raises(DataError, match="cannot be read"):
        token_from(tmp_path)


def test_what_a_model_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_of(".") == tmp_path.name
    (tmp_path / "quickstart").mkdir()
    assert name_of("quickstart/") == "quickstart"
    assert name_of("OWNER/NAME@main") == "NAME"
    assert name_of(Path("/x/y")) == "y"
