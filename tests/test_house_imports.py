"""Imports run one way: the order of the story, held for every import statement, also those inside functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "leveret"

# A room may import rooms of the rows above it, never its neighbours in the row. Only the first row's members may
# import each other, in the order they stand in.
ROWS: tuple[tuple[str, ...], ...] = (
    ("naflex", "records", "runs", "recipe", "own", "processes", "cells", "images", "pages"),
    ("pool",),
    ("inputs",),
    ("model",),
    ("condense", "train", "generate"),
    ("evaluate", "serve"),
    ("world",),
    ("study",),
    ("show", "doctor", "quickstart_page", "quickstart", "cli"),
)
# The last row: the command line calls the others; the world is reached by these alone.
ALSO = {("quickstart", "quickstart_page"), ("cli", "show"), ("cli", "doctor"), ("cli", "quickstart")}
MAY_IMPORT_WORLD = {"study", "quickstart_page", "quickstart", "cli"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of our own, whatever its form."""
    found: list[tuple[int, str]] = []
    package = ["leveret", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from leveret import pages` names a room; `from leveret.pool import check` may name a file. Both count.
            found += [
                (node.lineno, f"{module}.{alias.name}" if module == "leveret" else module) for alias in node.names
            ]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            if node.args and isinstance(node.args[0], ast.Constant):
                found.append((node.lineno, str(node.args[0].value)))
    return [(line, name) for line, name in found if name.partition(".")[0] == "leveret"]


def row_of(room: str) -> int:
    return next((index for index, row in enumerate(ROWS) if room in row), -1)


def allowed(importer: str, room: str) -> bool:
    if importer == room or (importer, room) in ALSO:
        return True
    if room == "world" and importer not in MAY_IMPORT_WORLD:
        return False
    here, there = row_of(importer), row_of(room)
    if here == there == 0:
        return ROWS[0].index(room) < ROWS[0].index(importer)
    return there < here


def test_every_file_has_its_place() -> None:
    strangers = {room_of(path) for path in FILES} - {room for row in ROWS for room in row} - {"__init__"}
    assert not strangers, f"{', '.join(sorted(strangers))}: name their row in ROWS, in the README and in the design"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    importer = room_of(path)
    if importer == "__init__":  # the public API: everything it names is imported on first use only
        return
    wrong = []
    for line, name in imported(path):
        room = name.split(".")[1] if "." in name else ""
        if row_of(room) >= 0 and not allowed(importer, room):
            wrong.append(
                f"{path.relative_to(PACKAGE.parent)}:{line} imports {name}: {importer} stands before or beside {room}"
            )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "module",
    ["leveret", "leveret.records", "leveret.runs", "leveret.recipe", "leveret.own", "leveret.pages", "leveret.cli"],
)
def test_the_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = {"torch", "transformers", "peft", "PIL", "pyarrow", "scipy", "numpy", "pydantic", "yaml", "jinja2"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip(), f"import {module} loads {done.stdout.strip()}"
