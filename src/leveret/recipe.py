"""Recipes: YAML with `extends`, `key.path=value` overrides, and a check that reports every fault at once.

A recipe is called by name (package data, `leveret/recipes/<kind>/<name>.yaml`) or by path. A file may say
`extends: other`, a name of the same kind or a path beside it; mappings are merged key by key, anything else is
replaced. Overrides come last; their values are YAML, and lists are reached by index: `stages.0.lr=2e-5`.

Recipes that differ in little stand in one file, as rows of a table under `recipes:`. The row NAME of FILE.yaml is
called FILE/NAME (in a file of your own: PATH.yaml/NAME), and that is also its `name`, unless it says another.

The YAML is 1.2's where 1.1 surprises: `2e-5` is a number, only `true` and `false` are booleans, and a key that
stands twice is a fault.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from leveret.runs import RecipeError, closest

if TYPE_CHECKING:
    import yaml
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

Kind = Literal["models", "data", "condense", "studies"]
KeyPath = tuple[str | int, ...]

RECIPES = Path(__file__).parent / "recipes"
TABLE = "recipes"
"""The key of a file under which its recipes stand, where it holds several."""


def names(kind: Kind) -> list[str]:
    """The recipes of a kind that come with leveret, sorted. Names may hold slashes."""
    folder = RECIPES / kind
    found: list[str] = []
    for path in folder.rglob("*.yaml"):
        name, rows = path.relative_to(folder).with_suffix("").as_posix(), _read(path).data.get(TABLE)
        found += [f"{name}/{row}" for row in rows] if isinstance(rows, dict) else [name]
    return sorted(found)


def load(name_or_path: str | Path, schema: type[Model], kind: Kind, overrides: Sequence[str] = ()) -> Model:
    """Read a recipe, apply what it extends and the overrides, and check it against `schema`.

    Raises:
        RecipeError: with every fault in one text, each with its key path, what was given, what is allowed, where it
            came from (file and line, or the override) and the nearest key or value.
    """
    from pydantic import ValidationError

    raw = _resolve(_find(str(name_or_path), kind), kind, ())
    faults: list[str] = []
    for text in overrides:
        if fault := _override(raw, text):
            faults.append(fault)
    try:
        model = schema.model_validate(raw.data)
    except ValidationError as error:
        faults += _faults(error, raw, schema)
    if faults:
        count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise RecipeError(f"recipe {name_or_path}: {count}\n" + "\n".join(f"  {fault}" for fault in faults))
    return model


def dump(model: BaseModel) -> dict[str, Any]:
    """The recipe as plain data (what YAML and JSON can hold), every default filled in."""
    return model.model_dump(mode="json")


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass
class _Raw:
    """A recipe before it is checked: plain data, and where each key path came from."""

    data: Any
    origin: dict[KeyPath, str] = field(default_factory=dict)

    def came_from(self, path: KeyPath) -> str:
        """The origin of a path, or of the nearest one above it."""
        while path and path not in self.origin:
            path = path[:-1]
        return self.origin.get(path, "")

    def lay_over(self, other: _Raw) -> _Raw:
        """This recipe, with `other`'s keys over it."""
        origin = dict(self.origin)
        data = _merge(self.data, other.data, (), origin)
        return _Raw(data, {**origin, **other.origin})


def _merge(below: Any, above: Any, path: KeyPath, origin: dict[KeyPath, str]) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        merged = dict(below)
        for key, value in above.items():
            merged[key] = _merge(below[key], value, (*path, key), origin) if key in below else value
        return merged
    for old in [known for known in origin if known[: len(path)] == path]:
        del origin[old]
    return above


def _shown(file: Path) -> str:
    return file.relative_to(RECIPES.parent).as_posix() if file.is_relative_to(RECIPES) else str(file)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a recipe stands: a file, and its row there ("" where the file is one recipe)."""

    file: Path
    row: str = ""

    def __str__(self) -> str:
        return f"{_shown(self.file)}/{self.row}" if self.row else _shown(self.file)


def _find(name: str, kind: Kind, beside: Path | None = None) -> _Place:
    """The place of a recipe: package data by name first, then a path (relative to `beside`, when a file names it)."""
    packaged = RECIPES / kind / f"{name}.yaml"
    path = (beside or Path()) / Path(name).expanduser()
    if packaged.resolve().is_relative_to(RECIPES.resolve()):
        if packaged.is_file():
            return _Place(packaged)
        table = packaged.parent.with_name(f"{packaged.parent.name}.yaml")
        if table.is_file() and path.name in (_read(table).data.get(TABLE) or ()):
            return _Place(table, path.name)
    if path.is_file():
        return _Place(path)
    if path.parent.is_file():
        return _Place(path.parent, path.name)
    if path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"{path}: there is no such recipe file")
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; a recipe is a YAML file or one of: {_listed(kind)}")
    near = closest(name, names(kind))
    hint = f"Did you mean {_either(near)}?" if near else f"The {kind} recipes: {_listed(kind)}."
    raise RecipeError(f"there is no recipe {name!r} (kind: {kind}), and no file of that name. {hint}")


def _listed(kind: Kind) -> str:
    """The recipes of a kind for a message: of a table its first one, and how many more it has."""
    tables: dict[str, list[str]] = {}
    for name in names(kind):
        tables.setdefault(name.partition("/")[0], []).append(name)
    said = [
        row[0] if len(row) == 1 else f"{row[0]} (and {len(row) - 1} more: {table}/..)" for table, row in tables.items()
    ]
    return ", ".join(said) or "none"


def _resolve(place: _Place, kind: Kind, above: tuple[_Place, ...]) -> _Raw:
    place = _Place(place.file.resolve(), place.row)
    if place in above:
        circle = " -> ".join(str(other) for other in (*above[above.index(place) :], place))
        raise RecipeError(f"recipes extend each other in a circle: {circle}")
    raw = _row(_read(place.file), place, kind)
    if "extends" not in raw.data:
        return raw
    parent = raw.data.pop("extends")
    where = raw.origin.pop(("extends",))
    if not isinstance(parent, str):
        raise RecipeError(f"extends: given {parent!r}; allowed: the name or path of one recipe  [{where}]")
    try:
        base = _find(parent, kind, beside=place.file.parent)
    except RecipeError as fault:
        raise RecipeError(f"extends: {fault}  [{where}]") from None
    return _resolve(base, kind, (*above, place)).lay_over(raw)


def _row(raw: _Raw, place: _Place, kind: Kind) -> _Raw:
    """What a file says of one of its recipes."""
    rows, shown = raw.data.get(TABLE), _shown(place.file)
    if rows is None and not place.row:
        return raw
    if not isinstance(rows, dict) or set(raw.data) != {TABLE}:
        raise RecipeError(f"{shown}: a table of recipes holds names and their recipes under {TABLE!r}, nothing else")
    home = RECIPES.resolve() / kind
    packaged = place.file.is_relative_to(home)
    table = place.file.relative_to(home).with_suffix("").as_posix() if packaged else str(place.file)
    if place.row not in rows:
        near = closest(place.row, [str(name) for name in rows]) or [str(name) for name in rows]
        raise RecipeError(f"{shown} is a table of recipes; call one: {', '.join(f'{table}/{name}' for name in near)}")
    within = (TABLE, place.row)
    origin = {path[2:]: line for path, line in raw.origin.items() if path[:2] == within}
    if not isinstance(row := rows[place.row], dict):
        raise RecipeError(f"a recipe is a mapping of keys to values, this is {_what(row)}  [{origin[()]}]")
    return _Raw({"name": f"{table}/{place.row}", **row}, {("name",): origin[()], **origin})


@cache
def _loader() -> type[yaml.SafeLoader]:
    """PyYAML's safe loader with YAML 1.2's numbers and booleans."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own class attribute)
            first: [(tag, rule) for tag, rule in rules if tag not in _REPLACED]
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"
    )
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^(?:[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
        "-+0123456789.",
    )
    return Loader


_REPLACED = (
    "tag:yaml.org,2002:bool",
    "tag:yaml.org,2002:float",
    "tag:yaml.org,2002:timestamp",  # a date would not survive JSON
)


def _parse(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """One YAML document as plain data, and its node tree for line numbers."""
    import yaml

    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        if node is not None:
            _refuse_twice(node, where)
        return (None if node is None else loader.construct_document(node)), node
    except RecipeError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark is not None else where
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{place}: not YAML: {problem}") from None
    except (
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # what no constructor takes: an odd number, a list as a key
        raise RecipeError(f"{where}: not usable YAML: {error}") from None


def _read(file: Path) -> _Raw:
    shown = _shown(file)
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise RecipeError(f"{shown}: not UTF-8 text (byte {fault.start})") from None
    data, origin = _parsed(text, shown)
    # copies: what is read may be changed, and the same table is read again for every row that extends another
    return _Raw(deepcopy(data), dict(origin))


@lru_cache(maxsize=64)
def _parsed(text: str, shown: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """A file's data, and the line of every key path."""
    data, node = _parse(text, shown)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise RecipeError(f"{shown}: a recipe is a mapping of keys to values, this is {_what(data)}")
    origin: dict[KeyPath, str] = {(): shown}
    if node is not None:
        _note_lines(node, (), shown, origin)
    return data, origin


def _refuse_twice(node: yaml.Node, where: str, inside: tuple[yaml.Node, ...] = ()) -> None:
    """Refuse a key that stands twice (YAML keeps the last in silence) and an anchor that holds itself."""
    import yaml

    if node in inside:
        raise RecipeError(f"{where}:{node.start_mark.line + 1}: an anchor refers to itself")
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, line) != line:
                raise RecipeError(
                    f"{where}:{line}: the key {key.value!r} stands twice, first in line {first[key.value]}"
                )
            _refuse_twice(value, where, (*inside, node))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, where, (*inside, node))


def _note_lines(node: yaml.Node, path: KeyPath, file: str, origin: dict[KeyPath, str]) -> None:
    """Remember file and line of every key path. Merges (`<<`) are folded into their mapping by now."""
    import yaml

    if path:
        origin[path] = f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _note_lines(value, (*path, key.value), file, origin)
            origin[(*path, key.value)] = f"{file}:{key.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_lines(item, (*path, index), file, origin)


# --- overrides ------------------------------------------------------------------------------------------------------


_IN_PLACE_OF = {"steps": "epochs", "epochs": "steps"}
"""Two keys that say one thing: an override of the one takes the place of the other where the recipe has that."""


def _override(raw: _Raw, text: str) -> str | None:
    """Apply one `key.path=value`; returns the fault, if it has one."""
    where = f"[override {text!r}]"
    key, equals, value_text = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        return f"{text!r}: an override reads key.path=value, for example stages.align.steps=100  {where}"
    try:
        value, _ = _parse(value_text, where)
    except RecipeError as fault:
        return str(fault)
    here: Any = raw.data
    path: KeyPath = ()
    for position, name in enumerate(keys):
        last = position == len(keys) - 1
        step: str | int = name
        if isinstance(here, list):
            if not re.fullmatch(r"\d+", name) or int(name) >= len(here):
                return f"{_dotted((*path, name))}: the list's last index is {len(here) - 1}  {where}"
            step = int(name)
        elif not isinstance(here, dict):
            return f"{_dotted((*path, name))}: {_dotted(path)} is {_what(here)}, it has no keys below it  {where}"
        elif not last and here.get(name) is None:
            here[name] = {}  # a key the schema has a default for; the schema says so if it has none
            raw.origin[(*path, name)] = f"override {text!r}"
        path = (*path, step)
        if last:
            _merge({}, value, path, raw.origin)
            here[step] = value
            raw.origin[path] = f"override {text!r}"
            other = _IN_PLACE_OF.get(str(step)) if value is not None else None
            beside = (*path[:-1], other or "")
            if other and here.get(other) is not None and not raw.came_from(beside).startswith("override"):
                here[other] = None
                raw.origin[beside] = f"override {text!r}"
        else:
            here = here[step]
    return None


# --- faults ---------------------------------------------------------------------------------------------------------


def _faults(error: Any, raw: _Raw, schema: type[BaseModel]) -> list[str]:
    """Pydantic's errors as lines for people; errors of the same key (the arms of a union) become one line."""
    by_path: dict[KeyPath, list[Mapping[str, Any]]] = {}
    for entry in error.errors(include_url=False):
        by_path.setdefault(_real_path(entry, raw.data), []).append(entry)
    lines = []
    for path, entries in by_path.items():
        # When a value has a fault deeper down, the arms of the union that did not fit at all only distract.
        if any(len(other) > len(path) and other[: len(path)] == path for other in by_path) and _only_wrong_arms(
            entries
        ):
            continue
        where = raw.came_from(path)
        lines.append(
            f"{_dotted(path) or 'the recipe'}: {_said(entries, path, raw, schema)}{f'  [{where}]' if where else ''}"
        )
    return lines


def _only_wrong_arms(entries: Sequence[Mapping[str, Any]]) -> bool:
    return all(str(entry["type"]).endswith(("_type", "_parsing", "literal_error", "_instance")) for entry in entries)


def _real_path(entry: Mapping[str, Any], data: Any) -> KeyPath:
    """Pydantic's location without what is not a key: the names of a union's arms, `[key]`."""
    path: KeyPath = ()
    steps = entry["loc"]
    for position, step in enumerate(steps):
        if (isinstance(data, dict) and step in data) or (
            isinstance(data, list) and isinstance(step, int) and step < len(data)
        ):
            data = data[step]
            path = (*path, step)
        elif entry["type"] == "missing" and position == len(steps) - 1:
            path = (*path, step)
    return path


def _said(entries: Sequence[Mapping[str, Any]], path: KeyPath, raw: _Raw, schema: type[BaseModel]) -> str:
    first = entries[0]
    if first["type"] == "missing":
        return "missing, and it has no default" + _mistaken(path[:-1], raw.data)
    if first["type"] == "extra_forbidden":
        known = _fields_at(schema, path[:-1], raw.data)
        near = _elsewhere(path, schema, raw.data) or closest(str(path[-1]), known)
        hint = f"did you mean {_either(near)}?" if near else f"allowed: {', '.join(known) or 'no keys'}"
        return f"unknown key (given {_brief(first['input'])}); {hint}"
    allowed = list(dict.fromkeys(_allowed(str(entry["msg"])) for entry in entries))
    near = [name for entry in entries for name in closest(str(first["input"]), _choices(entry))]
    hint = f"; did you mean {_either(near[:2])}?" if near and isinstance(first["input"], str) else ""
    return f"given {_brief(first['input'])}; {' or '.join(allowed).replace(' or allowed: ', ' or ')}{hint}"


def _elsewhere(path: KeyPath, schema: type[BaseModel], data: Any) -> list[str]:
    """Where else in the recipe there is a key of this very name, as key paths; the nearest to the top first."""
    found: list[str] = []
    level: list[tuple[KeyPath, Any]] = [((), data)]
    while level and not found:
        here, level = level, []
        for at, value in here:
            if at != path[:-1] and path[-1] in _fields_at(schema, at, data):
                found.append(".".join(map(str, (*at, path[-1]))))
            if isinstance(value, dict):
                level += [((*at, key), below) for key, below in value.items()]
    return found


def _mistaken(path: KeyPath, data: Any) -> str:
    """Where something is missing below a name that the user may have meant for another one that is there."""
    for step in path[:-1]:
        data = data.get(step, {}) if isinstance(data, dict) else {}
    others = [name for name in data if name != path[-1]] if path and isinstance(data, dict) else []
    near = closest(str(path[-1]), others) if others else []
    return f"; did you mean {_either(near)} and not {path[-1]!r}?" if near else ""


_PLAIN = {
    "a valid tuple": "a list", "a valid list": "a list", "a valid dictionary": "keys and values",
    "a valid string": "text", "a valid number": "a number", "a valid integer": "a whole number",
    "a valid boolean": "true or false",
}  # fmt: skip


def _allowed(message: str) -> str:
    """Pydantic's words as what is allowed, in plain ones; a validator's own words as they are."""
    for prefix in ("Value error, ", "Assertion failed, "):
        if message.startswith(prefix):
            return message.removeprefix(prefix)
    if message.startswith("Input should be "):
        told = message.removeprefix("Input should be ").partition(", unable to parse")[0]
        told = re.sub(r" or instance of \w+$", "", told)
        return "allowed: " + _PLAIN.get(told, told)
    return message[:1].lower() + message[1:]


def _choices(entry: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", str(entry.get("ctx", {}).get("expected", "")))


def _fields_at(schema: type[BaseModel], path: KeyPath, data: Any) -> list[str]:
    """The keys the schema knows at a key path: those of every model that may stand there."""
    here: list[Any] = [schema]
    for step in path:
        below: list[Any] = []
        for annotation in here:
            for arm in _arms(annotation):
                if (fields := getattr(arm, "model_fields", None)) is not None:
                    below += [info.annotation for name, info in fields.items() if step in (name, info.alias)]
                else:
                    below += [inner for inner in get_args(arm) if inner is not Ellipsis][-1:]
        here = below
    found: dict[str, None] = {}
    for annotation in here:
        for arm in _arms(annotation):
            found.update({info.alias or name: None for name, info in getattr(arm, "model_fields", {}).items()})
    return list(found)


def _arms(annotation: Any) -> list[Any]:
    """The alternatives of a union, `Annotated` taken off; a plain type is its own only one."""
    import types
    from typing import Annotated, Union, get_origin

    origin = get_origin(annotation)
    if origin is Annotated:
        return _arms(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [arm for inner in get_args(annotation) for arm in _arms(inner)]
    return [annotation]


def _dotted(path: KeyPath) -> str:
    return ".".join(str(step) for step in path)


def _either(near: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in near)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _what(value: Any) -> str:
    words = {dict: "a mapping", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "empty" if value is None else f"{words.get(type(value), type(value).__name__)} ({_brief(value)})"
