"""The pages of the documentation as they stand in the repository: their blocks, commands, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
PAGES = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "src/leveret/world/weights/CARD.md")),
    *sorted((REPO / "docs").rglob("*.md")),
]
HISTORY = {"docs/log.md", "CHANGELOG.md"}
"""Pages that tell what was run once: their commands need not be today's."""
SHELL = {"", "sh", "bash", "console", "text"}
PROGRAMS = (
    "leveret make python pip hf git curl docker vllm ollama llama-server llama-quantize torchrun img2dataset srun tar "
    "mkdir cd tensorboard pytest export"
).split()
MARK = re.compile(r"\b(?:needs? (?:a GPU|the network|[\w.' -]+)|not run)\b")
"""In a comment beside a command or above it: what it needs that a test does not have."""


@dataclass(frozen=True)
class Block:
    """A block of code: its page, its language as the fence says it ("" where none does), its text."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command line of a block: its words, placeholders as they stand, and the comments that belong to it."""

    page: str
    line: int
    words: tuple[str, ...]
    comment: str

    @property
    def program(self) -> str:
        return self.words[0]

    @property
    def marked(self) -> bool:
        return MARK.search(self.comment) is not None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {' '.join(self.words)}"


def named(page: Path) -> str:
    return page.relative_to(REPO).as_posix() if page.is_relative_to(REPO) else page.name


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks, and those that stand four blanks in, in their order."""
    lines, name = page.read_text("utf-8").splitlines(), named(page)
    at, before = 0, ""
    while at < len(lines):
        line = lines[at]
        if fence := re.match(r"^(\s*)(`{3,})(\w*)", line):
            end = next(
                (n for n in range(at + 1, len(lines)) if lines[n].strip() == fence[2]), len(lines)
            )  # fmt: skip
            yield Block(name, at + 1, fence[3], "\n".join(lines[at + 1 : end]))
            at = end
        elif line.startswith("    ") and not before.strip():
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield Block(name, at + 1, "", "\n".join(one[4:] for one in lines[at:end]).rstrip())
            at = end - 1
        before = lines[at] if at < len(lines) else ""
        at += 1


def commands(block: Block) -> Iterator[Command]:
    """The command lines of a block that is a shell's."""
    if block.language not in SHELL:
        return
    above, lines, at = "", block.text.splitlines(), 0
    while at < len(lines):
        start, line, comment = at, lines[at], ""
        if line.startswith("#"):
            above = f"{above} {line}"
            at += 1
            continue
        while True:
            line, _, said = lines[at].partition(" # ") if " # " in lines[at] else (lines[at], "", "")
            comment += f" {said}"
            piece = line.rstrip()
            text = piece if at == start else f"{text[:-1]} {piece.strip()}"  # noqa: F821  (set in the first round)
            at += 1
            if not text.endswith("\\") or at == len(lines):
                break
        text = re.sub(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?", "", text.strip())
        text = re.sub(r"\[(--?\w[^\]]*)\]", r"\1", text)  # [--seed 1] is said of what may be left out
        if text.split(" ")[0] in PROGRAMS:
            for one in re.split(r" && ", text):
                yield Command(block.page, block.line + start, tuple(shlex.split(one)), f"{above} {comment}")
        elif not text:
            above = ""


def inline(page: Path) -> Iterator[str]:
    """What stands between backticks in the text of a page, its blocks left out."""
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


@cache
def leveret() -> Any:
    """The tree of commands."""
    import typer

    from leveret.cli import app

    return typer.main.get_command(app)


def found(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words after `leveret` name, and the rest of them; AssertionError where there is none."""
    command, rest = leveret(), list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no command {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    return command, rest


# --- links ----------------------------------------------------------------------------------------------------------

LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`", text)


def links(page: Path) -> list[str]:
    return LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What headings are called in addresses, as MkDocs (and, but for rare signs, GitHub) makes them."""
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain.lower()).strip())
        count = sum(1 for one in found if re.fullmatch(re.escape(name) + r"(?:_\d+)?", one))
        found.append(f"{name}_{count}" if count else name)
    return {*found, *re.findall(r'id="([^"]+)"', text)}
