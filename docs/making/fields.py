"""The page of the recipes: every key that a file may hold, from the classes that check it."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from words import cell, markdown, table

HEAD = """# What recipes may say

Written down by the code that checks them. A key that is not here is refused, and the nearest one is named. Overrides on
a command line take the same keys: `stages.tune.steps=400`, lists by index: `model.vision.towers.0.size=336`. Files may
extend each other, and a file may be a table of recipes: [train recipes](../models.md),
[what a stage can say](../train.md), [condensing](../condense.md), [studies](../study.md),
[data sets and mixtures](../data.md), [tasks of your own](../evaluate.md#a-task-of-your-own).

"""


def _plain(annotation: Any) -> str:
    """A type in words: `int or none`, `list of text`, the values of a Literal."""
    from pydantic import BaseModel

    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _plain(inside[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_plain(one) for one in inside if one is not type(None))) + (
            ", or null" if type(None) in inside else ""
        )
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin in (list, tuple, set, frozenset):
        kinds = [one for one in inside if one is not Ellipsis]
        if origin is tuple and Ellipsis not in inside and len(kinds) > 1:
            return "[" + ", ".join(_plain(one) for one in kinds) + "]"
        return f"list of {_plain(kinds[0])}" if kinds else "list"
    if origin is dict:
        return f"names, each with {_plain(inside[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        if (
            not annotation.__name__.startswith("_")
            and annotation.__subclasses__()
            and "step" in annotation.model_fields
        ):
            return "the keys of its step, below"
        return f"[{_called(annotation)}](#{_anchor(annotation)})"
    plain = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
    return plain.get(annotation, getattr(annotation, "__name__", "anything"))


_CALLED: dict[str, type] = {}
"""Whom a heading belongs to: of two classes of one name the second bears its room's name too."""


def _called(schema: type) -> str:
    name = schema.__name__.lstrip("_")
    if _CALLED.setdefault(name, schema) is not schema:
        name = f"{name}, {schema.__module__.split('.')[1]}"
    return name


def _anchor(schema: type) -> str:
    return _called(schema).lower().replace(", ", "-")


def _within(annotation: Any) -> Iterator[type]:
    from pydantic import BaseModel

    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for one in typing.get_args(annotation):
        yield from _within(one)


def _strings(schema: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source, of a class and those it comes from."""
    found: dict[str, str] = {}
    for one in reversed(schema.__mro__):
        if not one.__module__.startswith("leveret"):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body  # type: ignore[attr-defined]
        for line, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr):
                if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                    found[line.target.id] = after.value.value
    return found


def _default(field: Any) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ("", (), [], {}):
        return ""
    if hasattr(value, "model_dump"):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _shown(schema: type[Any], level: int, title: str = "") -> str:
    strings = _strings(schema)
    rows = []
    for name, field in schema.model_fields.items():
        if name == "step":
            continue
        said = field.description or strings.get(name, "")
        rows.append((f"`{field.alias or name}`", _plain(field.annotation), _default(field), cell(said)))
    words = inspect.getdoc(schema) or ""
    words = "" if words == inspect.getdoc(schema.__base__) else markdown(words)
    return f"{'#' * level} {title or _called(schema)}\n\n{words}" + table(("key", "value", "default", ""), rows)


def _tree(schema: type[Any], done: set[type]) -> str:
    """A class and all that its fields hold, each once."""
    text, ahead = "", [schema]
    while ahead:
        one = ahead.pop(0)
        if one in done:
            continue
        done.add(one)
        text += _shown(one, 3)
        ahead += [inner for field in one.model_fields.values() for inner in _within(field.annotation)]
    return text


def page() -> str:
    """The whole page as Markdown."""
    from leveret.condense.steps import STEPS, CondenseRecipe
    from leveret.evaluate.tasks.own import OwnTask
    from leveret.pool.catalogue import DataSet
    from leveret.study.files import StudyRecipe
    from leveret.train.stages import TrainRecipe

    done: set[type] = set()
    parts = [HEAD, "## Train recipes\n\n", _tree(TrainRecipe, done)]
    parts += ["## Condense recipes\n\n", _shown(CondenseRecipe, 3)]
    parts += [_shown(row.config, 3, f"step {name}") for name, row in STEPS.items()]
    parts += ["## Studies\n\n", _tree(StudyRecipe, done)]
    parts += ["## Mixtures and data sets\n\n", _tree(DataSet, done)]
    parts += ["## Tasks\n\n", _shown(OwnTask, 3)]
    return "".join(parts)
