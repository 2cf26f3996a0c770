"""Text, links, tables and figures of a page, escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup, escape


def join(items: Iterable[Any], between: str = "") -> Markup:
    return Markup(between).join(items)


def paragraphs(text: str) -> Markup:
    """Plain text; empty lines part paragraphs and `backquotes` set code."""
    out = []
    for block in re.split(r"\n\s*\n", text.strip()):
        pieces = block.split("`")
        words = [Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(pieces)]
        out.append(Markup("<p>{}</p>").format(join(words)))
    return join(out, "\n")


def code(text: str) -> Markup:
    """Lines to copy, as they are."""
    return Markup('<pre tabindex="0"><code>{}</code></pre>').format(text)


def link(text: str, address: str) -> Markup:
    """A link to another file beside the page, for table cells; an address with a scheme is shown as text only."""
    if ":" in address.split("/")[0]:
        return Markup("{} ({})").format(text, address)
    return Markup('<a href="{}">{}</a>').format(address, text)


_NUMBER = re.compile(r"^[-+\u2212]?[\d][\d.,:%eE\u2013 x\u00d7+*\u2020-]*$")


def _isnumber(cell: Any) -> bool:
    if isinstance(cell, bool):
        return False
    return isinstance(cell, (int, float)) or bool(_NUMBER.match(str(cell).strip()))


def cell(value: Any) -> Markup:
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup("\u2013")
    if isinstance(value, bool):
        return Markup("yes" if value else "no")
    return escape(number(value) if isinstance(value, (int, float)) else str(value))


def number(value: float) -> str:
    """A number for reading: thousands parted, four figures where there is a fraction."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("\u221e" if value > 0 else "\u2212\u221e")
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def table(rows: Sequence[Sequence[Any]], header: Sequence[str], caption: str = "") -> Markup:
    """A table; the first column names its row, columns of numbers stand to the right. Cells may be markup."""
    numeric = [
        bool(rows)
        and all(_isnumber(row[i]) or row[i] in (None, "") for row in rows)
        and any(_isnumber(r[i]) for r in rows)
        for i in range(len(header))
    ]

    def cells(row: Sequence[Any], tag: str) -> Markup:
        out = []
        for i, value in enumerate(row):
            name = tag if tag == "th" or i else "th"
            scope = Markup(' scope="{}"').format("col" if tag == "th" else "row") if name == "th" else Markup()
            kind = Markup(' class="num"') if i < len(numeric) and numeric[i] else Markup()
            out.append(Markup("<{}{}{}>{}</{}>").format(name, scope, kind, cell(value), name))
        return Markup("<tr>{}</tr>").format(join(out))

    return Markup(
        '<div class="scroll" role="region" tabindex="0" aria-label="{}">'
        "<table>{}<thead>{}</thead>\n<tbody>\n{}\n</tbody></table></div>"
    ).format(
        caption or "Table: " + ", ".join(str(name) for name in header),
        Markup("<caption>{}</caption>").format(caption) if caption else "",
        cells(header, "th"),
        join((cells(row, "td") for row in rows), "\n"),
    )


def tiles(facts: Sequence[tuple[str, Any] | tuple[str, Any, str]]) -> Markup:
    """The few figures that matter most, large: (label, value) or (label, value, note)."""
    out = []
    for label, value, *note in facts:
        more = Markup("<dd>{}</dd>").format(note[0]) if note and note[0] else ""
        out.append(Markup('<div class="tile"><dt>{}</dt><dd>{}</dd>{}</div>').format(label, cell(value), more))
    return Markup('<dl class="tiles">{}</dl>').format(join(out))
