"""Definitions of this package, and all that they need of it, as one file that runs without it.

    roots -> every definition they name, wherever it stands (found in the syntax tree, nothing is run) -> one file

So a published model carries the code that it was taught with, and no second copy of it is kept. What other packages
provide is imported as it was; but for what only annotations need (`TYPE_CHECKING`), and nothing evaluates them.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

PACKAGE = "leveret"


@dataclass
class _Module:
    """A file: its lines, and under every name of its top level what defines it."""

    name: str
    lines: list[str]
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)  # ours: name -> (module, name there)
    foreign: dict[str, str] = field(default_factory=dict)  # name -> the import statement
    typing_only: set[str] = field(default_factory=set)
    notes: dict[ast.stmt, ast.stmt] = field(default_factory=dict)  # an assignment -> the docstring behind it


@lru_cache(maxsize=64)
def _module(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    text = Path(spec.origin).read_text("utf-8")
    module = _Module(name, text.splitlines())
    body = ast.parse(text).body
    for place, node in enumerate(body):
        _enter(module, node)
        after = body[place + 1] if place + 1 < len(body) else None
        assigned = isinstance(node, ast.Assign | ast.AnnAssign)
        if assigned and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            module.notes[node] = after
    return module


def _enter(module: _Module, node: ast.stmt, typing_only: bool = False) -> None:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        module.defined[node.name] = node
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    module.defined[name.id] = node
    elif isinstance(node, ast.Import | ast.ImportFrom):
        _enter_import(module, node)
        if typing_only:
            module.typing_only |= {alias.asname or alias.name for alias in node.names}
    elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        for inner in node.body:
            _enter(module, inner, typing_only=True)


def _enter_import(module: _Module, node: ast.Import | ast.ImportFrom) -> None:
    for alias in node.names:
        name = alias.asname or alias.name
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            module.imported[name] = (node.module or "", alias.name)
        elif isinstance(node, ast.ImportFrom):
            what = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
            module.foreign[name] = f"from {node.module} import {what}"
        elif alias.asname is not None and "." in alias.name:
            source, _, what = alias.name.rpartition(".")  # written in one way, so that it stands there once
            module.foreign[name] = f"from {source} import {what} as {alias.asname}"
        else:
            what = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
            module.foreign[name.partition(".")[0]] = f"import {what}"


Part = tuple[str, str]
"""(module, name of a definition in it)."""


@dataclass
class _Bundle:
    instead: Mapping[Part, str]
    texts: dict[Part, str] = field(default_factory=dict)  # in the order in which they must stand
    owners: dict[str, Part] = field(default_factory=dict)
    imports: set[str] = field(default_factory=set)

    def take(self, module: _Module, name: str) -> None:
        """The definition of `name` as `module` sees it, after all that it needs."""
        if name in module.imported and name not in module.typing_only:
            source, there = module.imported[name]
            whole = _module(source)
            assert there in {*whole.defined, *whole.imported, *whole.foreign}, f"{module.name} imports {name}, a module"
            self.take(whole, there)
            if there != name:
                self._own(name, (module.name, name))
                self.texts[module.name, name] = f"{name} = {there}"
        elif name in module.foreign and name not in module.typing_only:
            self.imports.add(module.foreign[name])
        elif name in module.defined:
            self._define(module, name)

    def _own(self, name: str, part: Part) -> None:
        if self.owners.setdefault(name, part) != part:
            raise AssertionError(f"{name} stands in {self.owners[name][0]} and in {part[0]}: rename one")

    def _define(self, module: _Module, name: str) -> None:
        node = module.defined[name]
        part = (module.name, _first_name(node))
        self._own(name, part)
        if part in self.texts:
            return
        self.texts[part] = ""  # asked for; a definition may need itself
        if part in self.instead:
            text = self.instead[part]
            node = ast.parse(text).body[0]
        else:
            text = _text(module, node)
        inside = {**_inside(node)}
        for used in _names(node):
            if used in inside:
                self.take(_module(inside[used]), used)
            else:
                self.take(module, used)
        del self.texts[part]  # now behind what it needs
        self.texts[part] = text

    def written(self, docstring: str) -> str:
        head = [f'"""{docstring}"""', "", "from __future__ import annotations", "", *_sorted(self.imports)]
        body, after_constant = "", False
        for text in self.texts.values():
            constant = not text.startswith(("class ", "def ", "@"))
            body += ("\n" if constant and after_constant else "\n\n\n") + text
            after_constant = constant
        return "\n".join(head) + body + "\n"


def bundle(roots: Iterable[Part], docstring: str, instead: Mapping[Part, str] | None = None) -> str:
    """The text of a file that defines `roots` and all they need of this package.

    instead  the source of a definition to be written in place of the one in the package; its names are looked up where
             that stands.
    """
    made = _Bundle(instead or {})
    for module, name in roots:
        made.take(_module(module), name)
    return made.written(docstring)


def called(function: Callable[..., object]) -> tuple[str, list[str], str]:
    """A lambda of this package as text: (its module, names of its arguments, statements that end in its `return`).

    What it has taken from around it (numbers, texts) is written out first.
    """
    code = function.__code__
    module = _module(function.__module__)
    arguments = list(code.co_varnames[: code.co_argcount])
    tree = ast.parse("\n".join(module.lines))
    node = next(
        each
        for each in ast.walk(tree)
        if isinstance(each, ast.Lambda)
        and each.lineno == code.co_firstlineno
        and [one.arg for one in each.args.args] == arguments
    )
    around = zip(code.co_freevars, function.__closure__ or (), strict=True)
    lines = [f"{name} = {cell.cell_contents!r}" for name, cell in around]
    return module.name, arguments, "\n".join([*lines, f"return {ast.unparse(node.body)}"])


def _first_name(node: ast.stmt) -> str:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target  # type: ignore[attr-defined]
    return next(name.id for name in ast.walk(target) if isinstance(name, ast.Name))


_LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _names(node: ast.AST) -> list[str]:
    """Names that a definition reads of its file, in order, each once: not builtins, and not what is bound inside."""
    found: dict[str, None] = {}

    def visit(node: ast.AST, bound: frozenset[str]) -> None:
        if isinstance(node, ast.Name) and node.id not in bound:
            found[node.id] = None
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            inner = bound | _bound(node)
            outside = [node.args, *getattr(node, "decorator_list", []), *filter(None, [getattr(node, "returns", None)])]
            for each in outside:
                visit(each, bound)
            for each in node.body if isinstance(node.body, list) else [node.body]:
                visit(each, inner)
            return
        if isinstance(node, _LOOPS):
            bound |= {
                name.id for each in node.generators for name in ast.walk(each.target) if isinstance(name, ast.Name)
            }
        for child in ast.iter_child_nodes(node):
            visit(child, bound)

    visit(node, frozenset())
    return [name for name in found if not hasattr(builtins, name)]


def _bound(function: ast.FunctionDef | ast.Lambda) -> frozenset[str]:
    """Names of a function's own: its arguments, and what its body assigns, outside of loops in brackets."""
    given = function.args
    names = {
        each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if each
    }
    waiting: list[ast.AST] = list(function.body) if isinstance(function.body, list) else []
    while waiting:
        each = waiting.pop()
        if isinstance(each, ast.FunctionDef | ast.ClassDef):
            names.add(each.name)
        elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            names.add(each.id)
        elif not isinstance(each, (ast.Lambda, *_LOOPS)):
            waiting += ast.iter_child_nodes(each)
    return frozenset(names)


def _inside(node: ast.AST) -> dict[str, str]:
    """Names that imports inside a function take from this package -> the module."""
    return {
        alias.name: each.module or ""
        for each in ast.walk(node)
        if isinstance(each, ast.ImportFrom) and (each.module or "").partition(".")[0] == PACKAGE
        for alias in each.names
    }


def _text(module: _Module, node: ast.stmt) -> str:
    """The source of a definition, with its decorators, the comments above it and the docstring behind it, without its
    imports from this package."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(each.lineno for each in decorators)]) - 1
    while first and module.lines[first - 1].startswith("#") and not module.lines[first - 1].startswith("# ---"):
        first -= 1
    last = module.notes.get(node, node).end_lineno
    gone = {
        line
        for each in ast.walk(node)
        if isinstance(each, ast.ImportFrom) and (each.module or "").partition(".")[0] == PACKAGE
        for line in range(each.lineno - 1, (each.end_lineno or each.lineno))
    }
    return "\n".join(line for place, line in enumerate(module.lines[first:last], first) if place not in gone)


def _sorted(imports: set[str]) -> list[str]:
    """Import lines: Python's own, then others'; `import x` before `from x import y`; one line a module."""
    plain = {line for line in imports if line.startswith("import ")}
    grouped: dict[str, list[str]] = {}
    for line in sorted(imports - plain):
        source, _, what = line.removeprefix("from ").partition(" import ")
        grouped.setdefault(source, []).append(what)
    lines = [*sorted(plain), *(f"from {source} import {', '.join(names)}" for source, names in grouped.items())]
    own = [line for line in lines if line.split()[1].partition(".")[0] in sys.stdlib_module_names]
    return [*own, "", *(line for line in lines if line not in own)]
