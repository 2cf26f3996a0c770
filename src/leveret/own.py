"""Rows of a user's own: `path/to/my.py:NAME` stands in a recipe where the name of a row stands.

    pin    a reference out of a recipe that a person gave: the file may run from now on, and the reference gets its
           fingerprint, `my.py:NAME@0123456789abcdef`, so that whatever holds the recipe tells a changed file apart
    allow  a file that a person named beside a model folder (`--own my.py`, LEVERET_OWN)
    row    what stands under the name; runs the file, once, if it was allowed, and refuses otherwise

A reference read out of a model folder is only text: nobody pins it, so nothing runs until a person names the file. What
runs is always the file that was named, as it was when it was named.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from leveret.runs import RecipeError, closest, sha256_of

Row = TypeVar("Row")

VARIABLE = "LEVERET_OWN"
"""Files that may run in this process and in those it starts, joined as in PATH."""

_MEANT = re.compile(r"\.py(:|$)")
_FORM = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)(?:@(?P<print>[0-9a-f]{16}))?")


@dataclass(frozen=True, slots=True)
class Reference:
    """`file:name@fingerprint`; fingerprint is "" where it was not pinned."""

    file: str
    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _File:
    """A file that may run, as it was when it was named."""

    path: Path
    source: bytes


_ALLOWED: dict[str, _File] = {}
_MODULES: dict[str, ModuleType] = {}


def is_own(text: str | None) -> bool:
    """Whether a recipe's text means a row in a file: it ends in `.py`, or goes on with a colon after it."""
    return text is not None and _MEANT.search(text) is not None


def parse(text: str, where: str) -> Reference:
    """The parts of a reference. RecipeError where it has another form."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise RecipeError(f"{where}: {text!r} given; a row in a file of your own is written path/to/my.py:NAME")
    return Reference(found["file"], found["name"], found["print"] or "")


def pin(text: str, where: str) -> str:
    """The reference of a recipe that a person gave, with its file's fingerprint; the file may run from now on.

    Paths are relative to the current folder. RecipeError when there is no such file, or when the reference has a
    fingerprint already (a recipe.yaml that a run wrote) and the file has changed since.
    """
    said = parse(text, where)
    if said.fingerprint in _ALLOWED:
        return text
    found = _allow(said.file, where)
    if said.fingerprint and said.fingerprint != found:
        raise RecipeError(
            f"{where}: {said.file} has changed since {said.name} was taken from it (fingerprint {said.fingerprint} "
            f"then, {found} now); bring that version back, or write {said.file}:{said.name} for the new one"
        )
    return f"{said.file}:{said.name}@{found}"


def allow(paths: str | Path | Iterable[str | Path], where: str = "--own") -> None:
    """A person says that these files may run. RecipeError when one is not there."""
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        _allow(path, where)


def _allow(path: str | Path, where: str) -> str:
    place = Path(path)
    try:
        place = place.expanduser()
        source = place.read_bytes()
    except (OSError, ValueError, RuntimeError) as fault:  # no path at all: a zero byte, an unknown ~user
        why = "that is a folder" if place.is_dir() else (
            "it cannot be read" if place.exists() else f"there is no such file in {Path.cwd()}"
            if not place.is_absolute() else "there is no such file"
        )  # fmt: skip
        raise RecipeError(f"{where}: {path} given, but {why}; give the path of a Python file") from fault
    fingerprint = sha256_of(source)[:16]
    _ALLOWED.setdefault(fingerprint, _File(place.resolve(), source))
    return fingerprint


def environment() -> dict[str, str]:
    """What a process needs in its environment to be allowed what this one is."""
    paths = [str(file.path) for file in _ALLOWED.values()] + _told()
    return {VARIABLE: os.pathsep.join(dict.fromkeys(paths))} if paths else {}


def _told() -> list[str]:
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def is_allowed(text: str) -> bool:
    """Whether the file of a reference was named in this process, in this version."""
    return parse(text, "own").fingerprint in _ALLOWED


def lacking(text: str, where: str) -> str:
    """Why the file of a reference may not run, in words; "" where it may."""
    said = parse(text, where)
    if said.fingerprint not in _ALLOWED:
        allow(_told(), VARIABLE)
    if said.fingerprint in _ALLOWED:
        return ""
    same = [print_ for print_, file in _ALLOWED.items() if file.path.name == Path(said.file).name]
    other = f"; the {Path(said.file).name} that was named is another version ({', '.join(same)})" if same else ""
    version = f" (fingerprint {said.fingerprint})" if said.fingerprint else ""
    return f"{where} is {said.name} of the file {said.file}{version}, which nobody named here{other}"


def source_of(text: str) -> tuple[Path, bytes]:
    """Path and bytes of the allowed file of a reference."""
    found = _ALLOWED[parse(text, "own").fingerprint]
    return found.path, found.source


def row(text: str, kind: type[Row], where: str) -> Row:
    """What stands under the name in the file; a `kind`. The file runs when it is first asked for.

    RecipeError in one line when the file was not named by a person, when it fails (with the line where it does), holds
    no such name, or holds something else there.
    """
    if fault := lacking(text, where):
        raise RecipeError(f"{fault}; give it: --own PATH/{Path(parse(text, where).file).name}")
    said = parse(text, where)
    module = _MODULES.get(said.fingerprint) or _run(said, where)
    if not hasattr(module, said.name):
        held = [name for name, value in vars(module).items() if isinstance(value, kind)]
        near = closest(said.name, held) or held[:3]
        hint = f"; did you mean {' or '.join(near)}?" if near else f", nor any {kind.__name__}"
        raise RecipeError(f"{where}: {said.file} holds no {said.name}{hint}")
    found = getattr(module, said.name)
    if not isinstance(found, kind):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise RecipeError(
            f"{where}: {said.name} of {said.file} (line {_line_of(said)}) is {what}; it must be a {kind.__name__}, "
            f"from {kind.__module__}"
        )
    return found


def _run(said: Reference, where: str) -> ModuleType:
    file = _ALLOWED[said.fingerprint]
    name = f"leveret_own_{said.fingerprint}"
    module = ModuleType(name)
    module.__file__ = str(file.path)
    sys.modules[name] = module  # dataclasses and pydantic look their module up there
    try:
        with guard(f"{said.file}:{said.name}@{said.fingerprint}", where):
            exec(compile(file.source, str(file.path), "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    _MODULES[said.fingerprint] = module
    return module


def _line_of(said: Reference) -> int | str:
    """The line that gives `name` its value, as far as it can be seen."""
    text = _ALLOWED[said.fingerprint].source.decode("utf-8", "replace")
    pattern = re.compile(rf"(?:class |def )?{said.name}\b")
    return max((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), default="?")


@contextmanager
def guard(text: str, where: str) -> Iterator[None]:
    """What a user's own code does wrong inside the block becomes one line that names the line of the user's file.

    For a `text` that is no reference it does nothing. RecipeErrors and the like pass as they are.
    """
    if not is_own(text):
        yield
        return
    said = parse(text, where)
    try:
        yield
    except (Exception, SystemExit) as fault:
        from leveret.runs import UserError

        if isinstance(fault, UserError):
            raise
        file = _ALLOWED[said.fingerprint].path if said.fingerprint in _ALLOWED else Path(said.file)
        line: int | None = None
        if isinstance(fault, SyntaxError) and fault.filename == str(file):
            line = fault.lineno
        for frame in traceback.extract_tb(fault.__traceback__):
            line = frame.lineno if frame.filename == str(file) else line
        place = f"{said.file}, line {line}" if line else said.file
        reason = fault.msg if isinstance(fault, SyntaxError) else str(fault)
        words = f"{type(fault).__name__}: {(reason.strip().splitlines() or [''])[0]}".rstrip(": ")
        raise RecipeError(f"{where}: {place}: {words}") from fault
