"""Docstrings and tables as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterable, Sequence


def cell(text: str) -> str:
    """A text for a cell of a table: one line, with nothing in it that Markdown or HTML takes for its own."""
    text = " ".join(text.split())
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*")
        for part in re.split(r"(`[^`]*`)", text)
    ).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown, "" where there are no rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *lines]) + "\n\n"


def _names(paragraph: list[str], known: Collection[str]) -> list[tuple[str, str]] | None:
    """What a paragraph says of each parameter, where each of its unindented lines begins with a parameter's name."""
    found: list[tuple[str, str]] = []
    for line in paragraph:
        if line.startswith(" "):
            if not found:
                return None
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
            continue
        # `a, b: of both`, or the name, blanks and words; a sentence about the one before may follow on its line
        match = re.match(r"`?(\w+(?:, \w+)*)`?:? +(.*)$", line) or re.match(r"`?(\w+)`?:?()$", line)
        if match is None or not set(re.split(r", ", match[1])) <= set(known):
            return None
        found.append((match[1], match[2]))
    return found or None


def _raises(paragraph: list[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for line in paragraph[1:]:
        match = re.match(r"    (\w+): (.*)$", line)
        if match:
            found.append((match[1], match[2]))
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    return found


def markdown(docstring: str, known: Collection[str] = ()) -> str:
    """A docstring as Markdown: paragraphs, indented blocks as code, what it says of parameters and errors as tables.

    known  the names of the parameters, or of a class's fields.
    """
    parts: list[str] = []
    for text in re.split(r"\n\s*\n", docstring.strip("\n")):
        lines = text.splitlines()
        if lines[0] == "Raises:" and (raised := _raises(lines)):
            parts.append(table(("raises", "when"), [(f"`{name}`", cell(when)) for name, when in raised]).rstrip())
        elif said := _names(textwrap.dedent(text).splitlines(), known):
            parts.append(table(("", ""), [(f"`{name}`", cell(words)) for name, words in said]).rstrip())
        elif all(line.startswith("    ") for line in lines):
            parts.append(text)
        elif any(line.startswith("  ") for line in lines[1:]) and not re.match(r"[-*] ", lines[0]):
            # a table drawn with blanks
            head = [] if lines[0].startswith(" ") else [lines[0]]
            rest = lines[len(head) :]
            if head and re.match(r"\S+ {2,}\S", head[0]):
                head, rest = [], lines
            code = "\n".join(f"    {line}" for line in rest)
            parts.append("\n\n".join([*(cell(line) for line in head), code]))
        elif re.match(r"[-*] ", lines[0]):
            parts.append("\n".join(line.replace("<", "&lt;") for line in lines))
        elif len(lines) > 1 and all(re.match(r"\S+ {2,}\S", line) for line in lines):
            parts.append("\n".join(f"    {line}" for line in lines))
        else:
            parts.append(cell(text).replace("\\|", "|"))
    return "\n\n".join(parts) + "\n\n"
