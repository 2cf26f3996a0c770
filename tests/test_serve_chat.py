"""The chat in a terminal (through a pty), through pipes, and its commands."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import leveret
from fakes import tiny_vlm
from leveret.cli import run as command
from leveret.generate.model import Model
from leveret.images import ImageFault
from leveret.model.checkpoint import save
from leveret.records import ImageRef, Sample, Turn
from leveret.runs import DataError, EnvironmentFault, RecipeError
from leveret.serve.chat import COMMANDS, Talk, as_path, chat, converse, shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_vlm(), tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return leveret.load(folder)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "a photo.png"
    Image.linear_gradient("L").resize((40, 30)).save(path)
    return path


@pytest.fixture
def talk(model: Model) -> Talk:
    return Talk(model, max_new_tokens=6, out=io.StringIO())


def test_ask_takes_a_picture_in_every_form(model: Model, photo: Path) -> None:
    forms = [photo, str(photo), photo.read_bytes(), Image.open(photo), ImageRef(str(photo))]
    answers = {model.ask(form, "is there a square", max_new_tokens=8) for form in forms}
    assert len(answers) == 1
    assert model.ask(None, "is there a square", max_new_tokens=8) != ""
    with pytest.raises(ImageFault):
        model.ask(b"no picture", "is there a square")
    with pytest.raises(RecipeError, match=r"ask\(image, question\)"):
        model.ask("is there a square", photo)  # type: ignore[arg-type]


def test_load_refuses_what_is_not_there(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="is not a model"):
        leveret.load(tmp_path)
    with pytest.raises(EnvironmentFault, match="device 'meta-physical'"):
        leveret.load(folder, device="meta-physical")


def test_a_conversation_remembers(talk: Talk, photo: Path) -> None:
    assert "40 x 30 pixels, seen as 32 x 32" in talk.show(str(photo))
    talk.say("is there a square")
    talk.say("and <image> a circle")
    assert [turn.role for turn in talk.turns] == ["user", "assistant"] * 2
    assert isinstance(talk.out, io.StringIO)
    assert talk.out.getvalue() == "".join(shown(turn.text) + "\n" for turn in talk.turns[1::2])
    whole = "".join(talk.model.chat(talk.turns[:-1], [photo], max_new_tokens=6))
    assert whole == talk.turns[-1].text
    talk.say("/reset")
    assert talk.turns == [] and talk.image is not None


def test_the_image_stays_when_its_file_goes(talk: Talk, photo: Path, tmp_path: Path) -> None:
    (copy := tmp_path / "copy.png").write_bytes(photo.read_bytes())
    talk.say(f"/image {copy}")
    copy.unlink()
    talk.say("is there a square")
    assert talk.turns


def test_saved_talks_are_read_again(talk: Talk, photo: Path, tmp_path: Path) -> None:
    talk.say(f'/image "{photo}"')
    talk.say("what is <image>")
    talk.say(f"/save {tmp_path / 'talk.json'}")
    (record,) = json.loads((tmp_path / "talk.json").read_text())
    roles: dict[str, Any] = {"human": "user", "gpt": "assistant"}
    turns = tuple(Turn(roles[turn["from"]], turn["value"]) for turn in record["conversations"])
    assert record["image"] == str(photo)
    assert Sample(record["id"], (ImageRef(record["image"]),), turns).fault() is None
    talk.say(f"/save {tmp_path / 'talk.txt'}")
    assert (tmp_path / "talk.txt").read_text().startswith(f"image: {photo}\nuser: what is")
    with pytest.raises(DataError, match="exists"):
        talk.say(f"/save {tmp_path / 'talk.txt'}")
    with pytest.raises(DataError, match="name of a file"):
        talk.say("/save")


def test_commands(talk: Talk) -> None:
    with pytest.raises(DataError, match="/rest is no command; try /reset"):
        talk.say("/rest")
    with pytest.raises(DataError, match="path of an image"):
        talk.say("/image")
    with pytest.raises(ImageFault):
        talk.say("/image no such.png")
    talk.say(" /usr is what")
    assert talk.turns[0].text == "/usr is what"
    talk.say("/quit")
    assert talk.over


def test_help_names_every_command(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.say("/help")
    said = capsys.readouterr().err
    assert all(command.form in said and command.help in said for command in COMMANDS.values())


def test_control_characters_are_not_shown() -> None:
    assert shown("a\x1b[31mb\n\tc\x07\x9b") == "a[31mb\n\tc"


def test_paths_as_people_write_them(photo: Path) -> None:
    for written in (str(photo), f'"{photo}"', f"'{photo}'", str(photo).replace(" ", "\\ ")):
        assert as_path(written) == str(photo)
    assert as_path("it's.png") == "it's.png"
    assert as_path("~") == str(Path.home())


def test_control_c_stops_an_answer_and_keeps_what_was_said(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = []

    def endless(*_: Any, **__: Any) -> Iterator[str]:
        try:
            yield "begun"
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                yield " more"
        finally:
            closed.append(True)

    monkeypatch.setattr(model, "chat", endless)
    talk = Talk(model, out=io.StringIO())
    talk.say("hello")
    assert talk.turns[-1].text == "begun more"
    assert closed and "(stopped)" in capsys.readouterr().err


def test_one_question_and_out(folder: Path, photo: Path, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    chat(folder, photo, "is there a square", max_new_tokens=6)
    assert capsys.readouterr().out == shown(model.ask(photo, "is there a square", 6)) + "\n"
    with pytest.raises(ImageFault):
        chat(folder, "no such.png", "is there a square")


def test_a_question_behind_the_picture(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr("leveret.serve.chat.chat", lambda *_, prompt, **__: asked.append(prompt))
    for words in (["is there a square"], ["-p", "is there a square"], []):
        assert command(["chat", "model", "photo.png", *words]) == 0
    assert asked == ["is there a square", "is there a square", None]
    assert command(["chat", "model", "photo.png", "is there a square", "-p", "how many"]) == 2
    assert "given twice" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["exit", " quit "])
def test_the_words_that_leave_other_prompts_leave(talk: Talk, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: word)
    converse(talk)
    assert not talk.turns, "nobody was asked"


def test_lines_of_a_pipe_are_questions_of_their_own(
    folder: Path, photo: Path, model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("is there a square\n\nhow many\n/quit\nnot asked\n"))
    chat(folder, photo, max_new_tokens=6)
    want = [shown(model.ask(photo, question, 6)) for question in ("is there a square", "how many")]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in want)


TALK = "import sys; from leveret.serve.chat import chat; chat(sys.argv[1], max_new_tokens=5)"


def test_a_terminal(folder: Path, photo: Path, tmp_path: Path) -> None:
    """A whole talk through a pty: commands, faults that do not end it, Ctrl-C at the prompt, Ctrl-D."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    (broken := tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    process = subprocess.Popen(
        [sys.executable, "-c", TALK, str(folder)], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    heard = bytearray()

    def listen() -> None:
        while True:
            try:
                heard.extend(os.read(ours, 4096))
            except OSError:
                return

    threading.Thread(target=listen, daemon=True).start()

    def wait(pattern: bytes, seconds: float = 100) -> None:
        until = time.monotonic() + seconds
        while not re.search(pattern, heard, re.DOTALL):
            assert time.monotonic() < until and process.poll() is None, heard.decode(errors="replace")
            time.sleep(0.02)
        heard.clear()

    def send(line: bytes, answer: bytes) -> None:
        os.write(ours, line)
        wait(answer)

    try:
        wait(rb"parameters\..*> ")
        send(b"/image no such.png\n", rb"error: image .*> ")
        send(b"/image " + bytes(broken) + b"\n", rb"error: image .*> ")
        send(b"/image " + bytes(photo) + b"\n", rb"40 x 30 pixels.*> ")
        send(b"is there a square\n", rb"square\r?\n.*\n.*> ")
        send(b"\x1b[A\n", rb"square\r?\n.*\n.*> ")  # the arrow brings the question back
        send(b"half a line\x03", rb"\n.*> ")
        send(b"/rest\n", rb"error: /rest is no command.*> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_what_cannot_be_asked_is_one_clear_line(model: Model) -> None:
    with pytest.raises(DataError, match="not valid Unicode"):
        model.ask(None, "what is \udcff this?")
    with pytest.raises(RecipeError, match="question is empty"):
        model.ask(None, "  ")


def test_save_in_a_pipe_writes_the_last_question(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"is there a square\nhow many\n/save {tmp_path / 'talk.json'}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat(folder, max_new_tokens=4)
    said = json.loads((tmp_path / "talk.json").read_text())
    assert "how many" in json.dumps(said) and "is there a square" not in json.dumps(said)
    assert "no picture" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x.png", "a\0b.png"])
def test_what_can_be_no_path_is_told_in_one_line(path: str, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    with pytest.raises(DataError, match="is no path"):
        as_path(path)
    assert command(["chat", str(folder), path, "-p", "hi"]) in (2, 3)
    assert "Traceback" not in capsys.readouterr().err


def test_an_answer_that_the_terminal_cannot_write_is_spelled(folder: Path, photo: Path) -> None:
    """Windows' cp1252 in place of ASCII: what it lacks is written as Python escapes it."""
    told = {}
    for encoding in ("utf-8", "ascii"):
        line = [sys.executable, "-m", "leveret.cli", "chat", str(folder), str(photo), "-p", "is there a square"]
        env = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(line, env=env, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        told[encoding] = done.stdout
    text = told["utf-8"].decode()
    assert not text.isascii() and told["ascii"] == text.encode("ascii", "backslashreplace")


def test_an_empty_question_is_no_reason_to_read_from_a_pipe(
    folder: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["chat", str(folder), str(photo), ""]) == 2
    assert "the question is empty" in capsys.readouterr().err
