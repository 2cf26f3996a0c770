"""The page of the command line: every command with its arguments and options, as the code has them."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from words import cell, table

HEAD = """# Commands

What `leveret COMMAND --help` says, written down by the code itself. Exit codes: 0 done, 1 our fault, 2 usage or
recipe, 3 data, 4 stopped and resumable, 5 environment.

"""


def commands(group: Any = None, name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below a group (all of leveret's, where none is given): its words after `leveret`, and itself."""
    if group is None:
        import typer

        from leveret.cli import app

        group = typer.main.get_command(app)
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*name, word))
        elif not getattr(command, "hidden", False):
            yield (*name, word), command


def _kind(param: Any) -> str:
    """The kind of a value in words; "" of a switch."""
    if getattr(param, "is_flag", False) or getattr(param, "is_bool_flag", False):
        return ""
    told = getattr(param, "type_descriptor", None)  # typer's own since 0.2x, click's `type` before
    kind = told.annotation if told is not None else param.type.name
    many = typing.get_origin(kind) is list
    kind = typing.get_args(kind)[0] if many else kind
    names = {"str": "text", "int": "whole number", "float": "number", "Path": "path"}
    name = getattr(kind, "__name__", str(kind))
    return names.get(name, name) + (", several" if many else "")


def _default(param: Any) -> str:
    value = param.default
    if param.required:
        return "needed"
    if value is None or value is False or callable(value) or value == () or str(value).startswith("Sentinel"):
        return ""
    return f"`{value}`"


def _rows(params: list[Any]) -> list[tuple[str, ...]]:
    rows = []
    for param in params:
        if param.param_type_name == "argument":
            shown = f"`{param.metavar or param.name.upper()}`"
        else:
            shown = ", ".join(f"`{flag}`" for flag in (*param.opts, *param.secondary_opts))
        rows.append((shown, _kind(param), _default(param), cell(getattr(param, "help", "") or "")))
    return rows


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for words, command in commands():
        given = [param for param in command.params if param.name != "help"]
        named = [param for param in given if param.param_type_name == "argument"]
        usage = " ".join(
            (param.metavar or param.name.upper()) if param.required else f"[{param.metavar or param.name.upper()}]"
            for param in named
        )
        line = " ".join(part for part in ("leveret", *words, usage, "[OPTIONS]") if part)
        parts.append(f"## leveret {' '.join(words)}\n\n{cell(command.help or '')}\n\n```text\n{line}\n```\n\n")
        parts.append(table(("", "kind", "default", ""), _rows([*named, *(p for p in given if p not in named)])))
    return "".join(parts)
