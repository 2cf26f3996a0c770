"""The tree in the README is the tree on disk.

`python tests/test_house_tree.py --write` brings it up to date: descriptions that stand there are kept, new files
take the first line of their docstring.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
README = REPO / "README.md"
PACKAGE = REPO / "src" / "leveret"
BEGIN, END = "<!-- tree: begin -->", "<!-- tree: end -->"

# The order of the story; what is not named comes after, by name.
STORY = (
    "__init__.py", "records.py", "recipe.py", "runs/", "own.py", "cells.py", "images.py", "pages/",
    "pool/", "condense/", "inputs/", "model/", "train/", "generate/", "evaluate/", "serve/", "world/", "study/",
    "recipes/", "show.py", "doctor.py", "quickstart.py", "cli.py", "py.typed",
)  # fmt: skip


def entries(folder: Path) -> list[str]:
    """Names in a folder; folders end with a slash, what tools leave behind and empty folders do not count."""
    names = []
    for path in folder.iterdir():
        if path.name.startswith((".", "__pycache__")) or path.suffix == ".pyc":
            continue
        if path.is_dir():
            if any(item.is_file() and item.suffix != ".pyc" for item in path.rglob("*")):
                names.append(path.name + "/")
        else:
            names.append(path.name)
    return sorted(names, key=lambda name: (name != "__init__.py", name))


def on_disk() -> list[str]:
    """Every path of the package, two levels deep, in the order of the story."""
    paths = []
    for name in sorted(entries(PACKAGE), key=lambda name: (STORY.index(name) if name in STORY else len(STORY), name)):
        paths.append(name)
        if name.endswith("/"):
            paths += [name + inner for inner in entries(PACKAGE / name) if inner != "__init__.py"]
    return paths


def in_readme(text: str) -> dict[str, str]:
    """Path -> description, of the lines below src/leveret/ between the markers."""
    block = text.partition(BEGIN)[2].partition(END)[0]
    found: dict[str, str] = {}
    parent, inside = "", False
    for line in block.splitlines():
        match = re.match(r"^(\s*)(\S+)\s*(.*)$", line)
        if not match or match[2].startswith("```"):
            continue
        depth, name, words = len(match[1]), match[2], match[3]
        if depth == 0:
            inside = name == "src/leveret/"
            if name.endswith("/"):
                assert (REPO / name).is_dir(), f"the README's tree names {name}, which is not there"
            continue
        if not inside:
            continue
        path = name if depth == 2 else parent + name
        if depth == 2:
            parent = name
        found[path] = words
    return found


def first_line(path: Path) -> str:
    file = path / "__init__.py" if path.is_dir() else path
    if file.suffix != ".py" or not file.exists():
        return ""
    words = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split("\n\n")[0]
    words = " ".join(words.split()).split(": ")[-1].split(". ")[0].rstrip(".")
    return textwrap.shorten(words, 88, placeholder="")


def render(old: dict[str, str]) -> str:
    lines = ["src/leveret/"]
    for path in on_disk():
        name = path if path.count("/") == 0 or (path.endswith("/") and path.count("/") == 1) else path.partition("/")[2]
        indent = "  " if name == path else "    "
        words = old.get(path) or first_line(PACKAGE / path)
        lines.append(f"{indent + name:<22}  {words}".rstrip())
    return "\n".join(lines)


def test_the_readme_tree_is_the_tree_on_disk() -> None:
    named, there = set(in_readme(README.read_text("utf-8"))), set(on_disk())
    faults = [f"  + {path}" for path in sorted(there - named)] + [f"  - {path}" for path in sorted(named - there)]
    assert not faults, (
        "README.md's tree (between the markers) is not what is on disk; + is missing there, - is gone:\n"
        + "\n".join(faults)
        + "\nTo mend it: python tests/test_house_tree.py --write, then put each new line into words."
    )


if __name__ == "__main__":
    text = README.read_text("utf-8")
    head, _, rest = text.partition(BEGIN)
    block, _, tail = rest.partition(END)
    others = re.search(r"\n(tests/[\s\S]*?)\n```", block)
    tree = render(in_readme(text)) + ("\n" + others[1] if others else "")
    if "--write" in sys.argv:
        README.write_text(f"{head}{BEGIN}\n```\n{tree}\n```\n{END}{tail}", "utf-8")
    else:
        print(tree)
