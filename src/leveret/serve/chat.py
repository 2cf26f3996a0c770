"""Talking to a model in a terminal or through a pipe.

    leveret chat MODEL photo.jpg                     a conversation; answers appear as they are made
    leveret chat MODEL photo.jpg -p "What is this?"  one answer, and out
    leveret chat MODEL photo.jpg < questions.txt     one answer per line, each line a conversation of its own

Answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from leveret.generate.model import Model, load, reference
from leveret.images import ImageFault, decode, read_bytes
from leveret.inputs.chat import literal
from leveret.records import IMAGE_MARK, ImageRef, Turn
from leveret.runs import DataError, RecipeError, UserError, atomic_write, closest, write_json

PROMPT = "> "


def chat(
    model_folder: str | Path,
    image: str | Path | None = None,
    prompt: str | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    device: str = "auto",
    load_in: str | None = None,
) -> None:
    """Answer `prompt`; or, without one, the lines of standard input; or, in a terminal, converse until Ctrl-D.

    image            what the first question is about; the talk's `/image PATH` takes another.
    max_new_tokens   of one answer.
    temperature,...  see `leveret.generate.Sampling`. device, load_in: see `leveret.load`.

    In a conversation a fault is one line and the talk goes on. Elsewhere it is raised: DataError for a model, image or
    question that cannot be read, EnvironmentFault for a device that is not there.
    """
    model = load(model_folder, device, load_in=load_in)
    talk = Talk(model, max_new_tokens, {"temperature": temperature, "top_p": top_p, "seed": seed})
    if image is not None:
        preview = talk.show(str(image))
    if prompt is not None:
        talk.answer(prompt)
    elif sys.stdin.isatty():
        parameters = sum(weight.numel() for weight in talk.model.vlm.parameters())
        talk.note(f"{Path(model_folder)}: {parameters:,} parameters. /help lists the commands, Ctrl-D leaves.")
        if image is not None:
            talk.note(preview)
        converse(talk)
    else:
        for line in sys.stdin:
            if line.strip():
                if not line.startswith("/"):  # each question is a conversation of its own; commands look at the last
                    talk.turns = []
                talk.say(line.rstrip("\r\n"))
            if talk.over:
                break


def converse(talk: Talk) -> None:
    """The loop in the terminal. Ctrl-C stops an answer or clears the line; Ctrl-D leaves."""
    try:
        import readline  # noqa: F401  (gives input() its editing and history)
    except ImportError:  # Windows has none; input() works without
        pass
    while not talk.over:
        try:
            line = input(PROMPT)
        except EOFError:
            talk.out.write("\n")
            return
        except KeyboardInterrupt:
            talk.out.write("\n")
            continue
        if not line.strip():
            continue
        if line.strip() in ("exit", "quit"):  # what every other prompt takes; no model is asked this
            return
        try:
            talk.say(line)
        except (UserError, OSError) as fault:
            talk.note("error: " + one_line(fault))
        except KeyboardInterrupt:
            talk.note("(stopped)")


@dataclass
class Talk:
    """A conversation with a model about at most one image.

    turns  what was said, the image's mark in the first.
    out    where answers go; notes go to standard error, so that a pipe holds answers only.
    """

    model: Model
    max_new_tokens: int = 256
    sampling: dict[str, Any] = field(default_factory=dict)
    out: TextIO = field(default_factory=lambda: sys.stdout)
    turns: list[Turn] = field(default_factory=list)
    image: ImageRef | None = None
    path: str = ""
    over: bool = False

    def say(self, line: str) -> None:
        """A line of the user's: a command when it begins with `/`, else a question. A blank before `/` makes it one."""
        if not line.startswith("/"):
            return self.answer(line)
        name, _, rest = line[1:].strip().partition(" ")
        if name not in COMMANDS:
            near = [f"/{one}" for one in closest(name, COMMANDS)] or [f"/{one}" for one in COMMANDS]
            raise DataError(f"/{name} is no command; try {' or '.join(near)}, or a blank before it to ask about it")
        COMMANDS[name].run(self, rest.strip())

    def answer(self, question: str) -> None:
        """Write the answer as it is made, and remember both. Ctrl-C stops it; what was said till then is kept."""
        text = literal(question.strip())
        if not text:
            raise RecipeError("the question is empty: give it some words")
        if self.image is None and not self.turns:
            self.note("(no picture: answered from the words alone)")
        if self.image is not None and not self.turns:
            text = f"{IMAGE_MARK}\n{text}"
        turns = [*self.turns, Turn("user", text)]
        images = [] if self.image is None else [self.image]
        pieces = self.model.chat(turns, images, max_new_tokens=self.max_new_tokens, **self.sampling)
        said = ""
        with closing(pieces), interrupts() as stopped:
            for piece in pieces:
                said += piece
                self.out.write(shown(piece))
                self.out.flush()
                if stopped():
                    break
        self.out.write("\n")
        self.out.flush()
        if stopped():
            self.note("(stopped)")
        elif not said:
            self.note("(the model ended its answer at once)")
        if said.strip():
            self.turns = [*turns, Turn("assistant", said)]

    def show(self, path: str) -> str:
        """Look at another image and begin anew; gives a line about it. ImageFault when it is refused."""
        ref = ImageRef(as_path(path))
        data = read_bytes(ref)
        try:
            seen = decode(data)  # unpacked now, so that a broken image is a fault here and not in the answer
        except ImageFault as fault:
            raise fault.at(str(ref)) from None
        # The bytes are kept: the talk goes on when the file is moved.
        self.image, self.path, self.turns = reference(data), ref.path, []
        spec = self.model.vlm.spec
        views = ", ".join(f"{view.size} x {view.size} ({view.resize})" for view in spec.towers)
        if spec.tiling is not None:
            views = spec.tiling.said(seen.height, seen.width)
        tokens = spec.count(seen.height, seen.width)
        return f"{ref.path}: {seen.width} x {seen.height} pixels, seen as {views}, {tokens} tokens"

    def save(self, path: str) -> None:
        """The conversation as a file: LLaVA's JSON when the name ends so, else text. Never over an existing file."""
        if not path:
            raise DataError("/save needs the name of a file: /save talk.json (LLaVA's form) or /save talk.txt")
        file = Path(as_path(path))
        if file.exists():
            raise DataError(f"{file} exists; give another name")
        said = [Turn(turn.role, plain(turn.text)) for turn in self.turns]
        if file.suffix == ".json":
            names = {"user": "human", "assistant": "gpt"}
            record: dict[str, Any] = {"id": file.stem, **({"image": self.path} if self.image else {})}
            record["conversations"] = [{"from": names[turn.role], "value": turn.text} for turn in said]
            write_json(file, [record])
        else:
            first = f"image: {self.path}\n" if self.image else ""
            body = "".join(f"{turn.role}: {turn.text.removeprefix(IMAGE_MARK).strip()}\n" for turn in said)
            atomic_write(file, first + body)
        self.note(f"saved {len(said) // 2} question(s) in {file}")

    def note(self, text: str) -> None:
        """A line that is no answer."""
        self.out.flush()
        print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Command:
    """form: how it is written. help: what it does. run: takes the talk and what stands behind the name."""

    form: str
    help: str
    run: Callable[[Talk, str], None]


def _image(talk: Talk, path: str) -> None:
    if not path:
        raise DataError("/image needs the path of an image: /image photo.jpg")
    talk.note(talk.show(path))


def _reset(talk: Talk, _: str) -> None:
    talk.turns = []
    talk.note("begun anew" + (f", still about {talk.path}" if talk.image else ""))


def _help(talk: Talk, _: str) -> None:
    for command in COMMANDS.values():
        talk.note(f"{command.form:<14}{command.help}")
    talk.note("Ctrl-C stops an answer, Ctrl-D leaves; the arrow keys bring back earlier lines")


def _quit(talk: Talk, _: str) -> None:
    talk.over = True


COMMANDS: dict[str, Command] = {
    "image": Command("/image PATH", "look at another image and begin anew", _image),
    "reset": Command("/reset", "forget what was said, keep the image", _reset),
    "save": Command("/save FILE", "write the conversation: .json in LLaVA's form, else as text", Talk.save),
    "help": Command("/help", "show this list", _help),
    "quit": Command("/quit", "leave", _quit),
}
"""Every command of a conversation."""


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is remembered, so that the engine is never left in the middle of a step. The second one is raised."""
    count = 0

    def remember(number: int, frame: Any) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)


def as_path(text: str) -> str:
    """A path as people type or drop it: `~`, quotes, and blanks behind backslashes. DataError where it can be none."""
    try:
        if "\0" in text:
            raise ValueError("a zero byte stands in it")
        whole = Path(text).expanduser()
        if not whole.exists():
            try:
                parts = shlex.split(text)
            except ValueError:
                parts = []
            if len(parts) == 1:
                return str(Path(parts[0]).expanduser())
    except (RuntimeError, ValueError) as fault:  # the home of nobody; a zero byte
        raise DataError(f"{shown(text)!r} is no path: {fault}") from None
    return str(whole)


def plain(text: str) -> str:
    """A turn as it was typed, with the mark of a real image in front."""
    front = f"{IMAGE_MARK}\n" if text.startswith(f"{IMAGE_MARK}\n") else ""
    return front + text.removeprefix(front).replace(literal(IMAGE_MARK), "< image>")


def shown(text: str) -> str:
    """Text without control characters: a model must not steer the reader's terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or (letter >= " " and not "\x7f" <= letter <= "\x9f"))


def one_line(fault: BaseException) -> str:
    return " ".join(str(fault).split())
