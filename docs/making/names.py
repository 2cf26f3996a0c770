"""The page of the Python names: what `leveret` and its rooms hand out, from docstrings, without importing them."""

from __future__ import annotations

import ast
from pathlib import Path

from words import markdown, table

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "leveret"
HEAD = """# Python

What `import leveret` gives, and what each room of the package hands out, from the docstrings. `leveret.train` and the
other rooms that are named like their verb can be called as they are: `leveret.train("world", "runs/mine")`.

"""
ROWS = {
    "leveret.own": ("allow",),
    "leveret.model.towers": ("TowerRow",),
    "leveret.model.connectors": ("ConnectorRow",),
    "leveret.model.language": ("LanguageRow",),
    "leveret.inputs.formats": ("ChatFormat",),
    "leveret.runs": ("UserError", "RecipeError", "DataError", "EnvironmentFault", "Interrupted"),
}
"""What parts of one's own are made of, and what can be caught: names of modules that are no rooms."""


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def exported(module: str) -> list[str]:
    """What a module's `__all__` names; nothing where it has none."""
    for line in ast.parse(_file(module).read_text("utf-8")).body:
        if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") == "__all__":
            return [name for name in ast.literal_eval(line.value) if not name.startswith("_")]
    return []


def find(module: str, name: str) -> tuple[str, ast.stmt, str]:
    """(its own module, its definition, the string below it) of a name, wherever a module has it from.

    Raises KeyError where a module hands out what it neither defines nor imports.
    """
    body = ast.parse(_file(module).read_text("utf-8")).body
    inner = [line for line in body if not (isinstance(line, ast.If) and "TYPE_CHECKING" in ast.unparse(line.test))]
    quiet = [one for line in body if line not in inner for one in getattr(line, "body", [])]
    for place, line in enumerate(inner):
        if isinstance(line, ast.FunctionDef | ast.ClassDef) and line.name == name:
            return module, line, ast.get_docstring(line) or ""
        target = (
            line.target
            if isinstance(line, ast.AnnAssign)
            else line.targets[0]
            if isinstance(line, ast.Assign)
            else None
        )
        if isinstance(target, ast.Name) and target.id == name:
            after = (
                inner[place + 1].value if place + 1 < len(inner) and isinstance(inner[place + 1], ast.Expr) else None
            )
            return module, line, str(after.value) if isinstance(after, ast.Constant) else ""
    for line in (*inner, *quiet):
        if isinstance(line, ast.ImportFrom) and line.module and line.module.startswith("leveret"):
            for one in line.names:
                if (one.asname or one.name) == name:
                    return find(line.module, one.name)
    raise KeyError(f"{module} hands out {name}, which is nowhere in it")


def _signature(function: ast.FunctionDef, name: str) -> str:
    """`name(a, b: int = 1) -> str`, an argument a line where one line would be long."""
    arguments, back = function.args, f" -> {ast.unparse(function.returns)}" if function.returns else ""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pieces = [_argument(one, value) for one, value in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        pieces.append(f"*{_argument(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        pieces.append("*")
    pieces += [_argument(one, value) for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        pieces.append(f"**{_argument(arguments.kwarg, None)}")
    pieces = [piece for piece in pieces if piece != "self"]
    line = f"{name}({', '.join(pieces)}){back}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {piece},\n" for piece in pieces) + f"){back}"


def _argument(one: ast.arg, value: ast.expr | None) -> str:
    kind = f": {ast.unparse(one.annotation)}" if one.annotation else ""
    if value is None:
        return one.arg + kind
    return f"{one.arg}{kind}{' = ' if kind else '='}{ast.unparse(value)}"


def _parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    return [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _fields(line: ast.ClassDef) -> dict[str, ast.AnnAssign]:
    """Field -> its line, of those that are declared in the class itself."""
    return {
        one.target.id: one
        for one in line.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and not one.target.id.startswith("_")
    }


def _said_below(line: ast.ClassDef) -> dict[ast.stmt, str]:
    """Line of a class -> the string that stands below it."""
    return {
        before: str(after.value.value)
        for before, after in zip(line.body, line.body[1:], strict=False)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


def _code(node: ast.expr | None) -> str:
    return "" if node is None else f"`{ast.unparse(node)}`".replace("|", "\\|")


def _class(line: ast.ClassDef, name: str) -> str:
    fields, strings = _fields(line), _said_below(line)
    begun = next((one for one in line.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    bases = f"({', '.join(ast.unparse(base) for base in line.bases)})" if line.bases else ""
    shape = f"class {name}{bases}" if begun is None else _signature(begun, name).removesuffix(" -> None")
    known = [*fields, *(_parameters(begun) if begun else ())]
    text = f"```python\n{shape}\n```\n\n{markdown(ast.get_docstring(line) or '', known)}"
    rows = [
        (f"`{field}`", _code(one.annotation), _code(one.value), " ".join(strings.get(one, "").split()))
        for field, one in fields.items()
    ]
    text += table(("field", "kind", "default", ""), rows)
    for one in line.body:
        if isinstance(one, ast.FunctionDef) and not one.name.startswith("_") and (said := ast.get_docstring(one)):
            mark = " ".join(ast.unparse(mark) for mark in one.decorator_list)
            shape = f"{name}.{one.name}" if "property" in mark else _signature(one, f"{name}.{one.name}")
            text += f"```python\n{shape}\n```\n\n{markdown(said, _parameters(one))}"
    return text


def _entry(module: str, name: str, shown: str) -> str:
    home, line, said = find(module, name)
    text = f"### {shown}\n\n"
    if isinstance(line, ast.FunctionDef):
        text += f"```python\n{_signature(line, shown)}\n```\n\n{markdown(said, _parameters(line))}"
    elif isinstance(line, ast.ClassDef):
        text += _class(line, shown)
    else:
        kind = f": {ast.unparse(line.annotation)}" if isinstance(line, ast.AnnAssign) else ""
        text += f"```python\n{shown}{kind}\n```\n\n" + (markdown(said) if said else "")
    return text + f"*Defined in `{home}`.*\n\n"


def rooms() -> dict[str, list[str]]:
    """Module -> the names it hands out, leveret itself first."""
    found = {"leveret": exported("leveret")}
    for folder in sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()):
        if names := exported(f"leveret.{folder.name}"):
            found[f"leveret.{folder.name}"] = names
    return {name: names for name, names in found.items() if name != "leveret.cli"} | {k: [*v] for k, v in ROWS.items()}


def page() -> str:
    """The whole page as Markdown. A name that several modules hand out is told once, in the first of them."""
    parts, told = [HEAD], set()
    for module, names in rooms().items():
        said = []
        for name in names:
            home = find(module, name)[0]
            if (home, name) not in told:
                told.add((home, name))
                said.append(_entry(module, name, f"{module}.{name}"))
        if said:
            parts += [f"## {module}\n\n", *said]
    return "".join(parts)
