"""How every table of the model is read: by id, with the closest ids named when there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from leveret.runs import RecipeError, closest

Row = TypeVar("Row")


def unknown(table: Mapping[str, object], name: str, where: str, also: str = "") -> str:
    """The words for an id that no row has."""
    near = closest(name, list(table))
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"{where}: {name!r} is not known. Allowed: {', '.join(table)}{also}{hint}"


def find_row(table: Mapping[str, Row], name: str, where: str) -> Row:
    """The row called `name`. RecipeError with what is allowed and the closest ids when there is none."""
    if name not in table:
        raise RecipeError(unknown(table, name, where))
    return table[name]
