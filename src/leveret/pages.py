"""Self-contained HTML and SVG: the one look of every report.

A report is `page(title, [Section(...), ...])`; a section's body is what the builders below return. Everything is
escaped, nothing is loaded from anywhere, no script runs but one that the page itself is given (a content security
policy says so to the browser), and each picture says in words and in a table what it shows. Charts draw in percent of
their width, so that text keeps its size from a telephone to a wide screen; colours follow the reader's light or dark
setting. The style is `pages.css`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = "bytes | str | Path | Image"
"""An encoded image's bytes, the path of a file, or a PIL image."""


@dataclass(frozen=True)
class Section:
    """One part of a page: a heading, builders' markup, and a sentence that says what to look for."""

    title: str
    body: Markup | str | Sequence[Markup | str]
    lead: str = ""


@dataclass(frozen=True)
class Bar:
    """One row of `bars`: a value, its interval, and baselines to hold it against (name -> value)."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    marks: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


# --- the page -------------------------------------------------------------------------------------------------------


@cache
def _style() -> str:
    return (Path(__file__).parent / "pages.css").read_text("utf-8")


def page(title: str, sections: Sequence[Section], subtitle: str = "", script: str = "") -> str:
    """A whole HTML document. Contents are linked at the top when there are more than three sections.

    script  JavaScript of ours (never of what is shown) that works on the finished page; none runs where none is given.
    """
    from leveret import __version__

    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    if script:
        assert "</script" not in script.lower(), "would end its own element"
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    anchors = _anchors([section.title for section in sections])
    links = [Markup('<a href="#{}">{}</a>').format(a, s.title) for a, s in zip(anchors, sections, strict=True)]
    contents = Markup('<nav aria-label="Contents">{}</nav>').format(_join(links)) if len(links) > 3 else Markup()
    parts = []
    for anchor, section in zip(anchors, sections, strict=True):
        body = [section.body] if isinstance(section.body, str) else section.body
        lead = Markup('<p class="lead">{}</p>\n').format(section.lead) if section.lead else Markup()
        whole = _join((item if isinstance(item, Markup) else paragraphs(item) for item in body), "\n")
        parts.append(
            Markup('<section id="{}">\n<h2>{}</h2>\n{}{}\n</section>').format(anchor, section.title, lead, whole)
        )
    return Markup(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        "<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        '<header class="top"><h1>{title}</h1>{subtitle}{contents}</header>\n<main>\n{parts}\n</main>\n'
        "<footer><div>Made by leveret {version}. This page loads nothing and {runs}.</div></footer>\n"
        "{script}</body>\n</html>\n"
    ).format(
        policy=policy,
        title=title,
        style=Markup(style),
        subtitle=Markup("<p>{}</p>").format(subtitle) if subtitle else "",
        contents=contents,
        parts=_join(parts, "\n"),
        runs="runs only its own script, which filters what it shows" if script else "runs no script",
        script=Markup("<script>{}</script>\n").format(Markup(script)) if script else "",
        version=__version__,
    )


def _join(items: Iterable[Any], between: str = "") -> Markup:
    return Markup(between).join(items)


def _anchors(titles: Sequence[str]) -> list[str]:
    """Readable ids, each used once."""
    seen: dict[str, int] = {}
    anchors = []
    for title in titles:
        stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        seen[stem] = seen.get(stem, 0) + 1
        anchors.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
    return anchors


# --- words and tables -----------------------------------------------------------------------------------------------


def paragraphs(text: str) -> Markup:
    """Plain text; empty lines part paragraphs and `backquotes` set code."""
    out = []
    for block in re.split(r"\n\s*\n", text.strip()):
        pieces = block.split("`")
        words = [Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(pieces)]
        out.append(Markup("<p>{}</p>").format(_join(words)))
    return _join(out, "\n")


def code(text: str) -> Markup:
    """Lines to copy, as they are."""
    return Markup('<pre tabindex="0"><code>{}</code></pre>').format(text)


def link(text: str, address: str) -> Markup:
    """A link to another file beside the page, for table cells; an address with a scheme is shown as text only."""
    if ":" in address.split("/")[0]:
        return Markup("{} ({})").format(text, address)
    return Markup('<a href="{}">{}</a>').format(address, text)


_NUMBER = re.compile(r"^[-+\u2212]?[\d][\d.,:%eE\u2013 x\u00d7+*\u2020-]*$")


def _is_number(cell: Any) -> bool:
    if isinstance(cell, bool):
        return False
    return isinstance(cell, (int, float)) or bool(_NUMBER.match(str(cell).strip()))


def _cell(value: Any) -> Markup:
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup("\u2013")
    if isinstance(value, bool):
        return Markup("yes" if value else "no")
    return escape(_number(value) if isinstance(value, (int, float)) else str(value))


def _number(value: float) -> str:
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
        and all(_is_number(row[i]) or row[i] in (None, "") for row in rows)
        and any(_is_number(r[i]) for r in rows)
        for i in range(len(header))
    ]

    def cells(row: Sequence[Any], tag: str) -> Markup:
        out = []
        for i, value in enumerate(row):
            name = tag if tag == "th" or i else "th"
            scope = Markup(' scope="{}"').format("col" if tag == "th" else "row") if name == "th" else Markup()
            kind = Markup(' class="num"') if i < len(numeric) and numeric[i] else Markup()
            out.append(Markup("<{}{}{}>{}</{}>").format(name, scope, kind, _cell(value), name))
        return Markup("<tr>{}</tr>").format(_join(out))

    return Markup(
        '<div class="scroll" role="region" tabindex="0" aria-label="{}">'
        "<table>{}<thead>{}</thead>\n<tbody>\n{}\n</tbody></table></div>"
    ).format(
        caption or "Table: " + ", ".join(str(name) for name in header),
        Markup("<caption>{}</caption>").format(caption) if caption else "",
        cells(header, "th"),
        _join((cells(row, "td") for row in rows), "\n"),
    )


def tiles(facts: Sequence[tuple[str, Any] | tuple[str, Any, str]]) -> Markup:
    """The few figures that matter most, large: (label, value) or (label, value, note)."""
    out = []
    for label, value, *note in facts:
        more = Markup("<dd>{}</dd>").format(note[0]) if note and note[0] else ""
        out.append(Markup('<div class="tile"><dt>{}</dt><dd>{}</dd>{}</div>').format(label, _cell(value), more))
    return Markup('<dl class="tiles">{}</dl>').format(_join(out))


# --- pictures -------------------------------------------------------------------------------------------------------

_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}

GOOD = frozenset({"kept", "right", "correct", "yes", "ok", "representative", "pass"})
BAD = frozenset({"dropped", "wrong", "incorrect", "no", "bad", "duplicate", "fail"})


def _data_uri(picture: Picture, side: int) -> tuple[str, int, int]:
    """A data URI no larger than `side` pixels, with the size of what was embedded."""
    from PIL import Image

    if isinstance(picture, (str, Path)):
        picture = Path(picture).read_bytes()
    data = picture if isinstance(picture, bytes) else None
    image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
    if max(image.size) > side or (data is not None and not any(data.startswith(magic) for magic in _MAGIC)):
        image = image.convert("RGB")
        image.thumbnail((side, side))
        data = None
    if data is None:
        stream = io.BytesIO()
        # Drawn and tiny pictures stay exact and small as PNG; photographs would be ten times the size.
        if max(image.size) <= 128:
            image.save(stream, "PNG")
        else:
            image.convert("RGB").save(stream, "JPEG", quality=82)
        data = stream.getvalue()
    kind = next(name for magic, name in _MAGIC.items() if data.startswith(magic))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", image.width, image.height


def _img(picture: Picture, words: str, side: int) -> Markup:
    uri, width, height = _data_uri(picture, side)
    pixel = Markup(' class="pixel"') if max(width, height) <= 128 else ""
    return Markup('<img src="{}" width="{}" height="{}" alt="{}"{} loading="lazy">').format(
        uri, width, height, words, pixel
    )


def thumbnail(picture: Picture, words: str, side: int = 160) -> Markup:
    """A picture by itself, at most `side` pixels wide or high, with the words for who cannot see it."""
    return _img(picture, words, side)


def figure(picture: Picture, caption: str, side: int = 1200) -> Markup:
    """One picture, at most `side` pixels wide or high, with its caption."""
    return Markup('<figure class="picture">{}<figcaption>{}</figcaption></figure>').format(
        _img(picture, caption, side), caption
    )


def gallery(items: Sequence[tuple[Picture, str, str]], side: int = 240) -> Markup:
    """Pictures side by side: (picture, caption, mark). The mark ("kept", "wrong", ...) is shown as a badge; those in
    GOOD and BAD are coloured, and always named too. Line breaks in captions are kept."""
    out = []
    for picture, caption, mark in items:
        tone = "good" if mark.lower() in GOOD else "bad" if mark.lower() in BAD else ""
        badge = Markup('<span class="badge {}">{}</span><br>').format(tone, mark) if mark else ""
        image = _img(picture, caption.split("\n")[0] or "picture", side)
        out.append(
            Markup('<li class="{}"><div class="pic">{}</div><div class="words">{}{}</div></li>').format(
                tone, image, badge, caption
            )
        )
    return Markup('<ul class="gallery">{}</ul>').format(_join(out, "\n"))


def beside(items: Sequence[Markup]) -> Markup:
    """Charts two beside each other where there is room, one under the other where there is not."""
    return Markup('<div class="beside">{}</div>').format(_join(items, "\n"))


# --- charts ---------------------------------------------------------------------------------------------------------


def _chart(words: str, inner: Markup, header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> Markup:
    """A chart in its frame: words for who cannot see it, the numbers for who wants them."""
    return Markup(
        '<figure class="card" aria-label="{}">{}{}<details><summary>The numbers</summary>{}</details></figure>'
    ).format(
        words, inner, Markup("<figcaption>{}</figcaption>").format(caption) if caption else "", table(rows, header)
    )


def _legend(names: Sequence[str], shape: str) -> Markup:
    out = [Markup("<li>{}{}</li>").format(Markup(shape).format(i=i), name) for i, name in enumerate(names)]
    return Markup('<ul class="legend">{}</ul>').format(_join(out))


def _pct(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.3f}%"


def bars(items: Sequence[Bar], maximum: float = 1.0, caption: str = "", digits: int = 3) -> Markup:
    """Horizontal bars from 0 to `maximum`, with intervals as whiskers and baselines as ticks named in a legend."""
    marks = list(dict.fromkeys(name for item in items for name in item.marks))
    out = []
    for item in items:
        inner = [Markup('<rect class="track" x="0" y="5" width="100%" height="16" rx="3"/>')]
        inner.append(
            Markup('<rect class="bar" x="0" y="5" width="{}" height="16" rx="3"/>').format(_pct(item.value / maximum))
        )
        if item.low is not None and item.high is not None:
            low, high = _pct(item.low / maximum), _pct(item.high / maximum)
            for kind in ("halo", "ci"):
                inner.append(Markup('<line class="{}" x1="{}" x2="{}" y1="13" y2="13"/>').format(kind, low, high))
            inner += [Markup('<line class="ci" x1="{x}" x2="{x}" y1="9" y2="17"/>').format(x=x) for x in (low, high)]
        for name, value in item.marks.items():
            inner.append(
                Markup(
                    '<line class="halo" x1="{x}" x2="{x}" y1="1" y2="25"/>'
                    '<line class="tick m{}" x1="{x}" x2="{x}" y1="1" y2="25"/>'
                ).format(1 + marks.index(name) % 2, x=_pct(value / maximum))
            )
        out.append(
            Markup(
                '<div class="label">{}</div><div class="plot"><svg height="26" aria-hidden="true">{}</svg></div>'
                '<div class="value">{}</div>{}'
            ).format(
                item.label,
                _join(inner),
                f"{item.value:.{digits}f}",
                Markup('<div class="note">{}</div>').format(item.note) if item.note else "",
            )
        )
    tick = '<svg aria-hidden="true"><line class="tick m{i}" x1="8" x2="8" y1="0" y2="12"/></svg>'.replace(
        "m{i}", "m{j}"
    )
    keys = [Markup(tick.replace("{j}", str(1 + i % 2))) + name for i, name in enumerate(marks)]
    if any(item.low is not None for item in items):
        whisker = '<svg aria-hidden="true"><path class="ci" fill="none" d="M1 6H15M1 2V10M15 2V10"/></svg>'
        keys.insert(0, Markup(whisker) + "interval")
    legend = (
        Markup('<ul class="legend">{}</ul>').format(_join(Markup("<li>{}</li>").format(k) for k in keys))
        if keys
        else ""
    )
    header = ["", "value", "low", "high", *marks]
    rows = [[b.label, b.value, b.low, b.high, *(b.marks.get(name) for name in marks)] for b in items]
    words = "Bars: " + "; ".join(f"{item.label} {item.value:.{digits}f}" for item in items)
    chart = Markup('{}<div class="rows" aria-hidden="true">{}</div>').format(legend, _join(out, "\n"))
    return _chart(words, chart, header, rows, caption)


def funnel(steps: Sequence[tuple[str, int] | tuple[str, int, str]], caption: str = "") -> Markup:
    """What was left after each step: (label, count) or (label, count, note). Bars are shares of the first count."""
    first = max(1, steps[0][1]) if steps else 1
    out, rows = [], []
    for position, (label, count, *more) in enumerate(steps):
        note = more[0] if more else ""
        share = count / first
        out.append(
            Markup(
                '<div class="label">{}</div><div class="plot"><svg height="30" aria-hidden="true">'
                '<rect class="track" x="0" y="4" width="100%" height="22" rx="4"/>'
                '<rect class="bar" x="0" y="4" width="{}" height="22" rx="4"/></svg></div>'
                '<div class="value">{}<small>{}</small></div>{}'
            ).format(
                label,
                _pct(share),
                f"{count:,}",
                f"{share:.1%}" if position else "of all",
                Markup('<div class="note">{}</div>').format(note) if note else "",
            )
        )
        rows.append([label, count, f"{share:.2%}", note])
    words = "Funnel: " + ", then ".join(f"{label} {count:,}" for label, count, *_ in steps)
    inner = Markup('<div class="rows" aria-hidden="true">{}</div>').format(_join(out, "\n"))
    return _chart(words, inner, ["step", "left", "share", "why"], rows, caption)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _axes(
    x: tuple[float, float], y: tuple[float, float], height: int, x_name: str, y_name: str
) -> tuple[Markup, Markup]:
    """Grid lines, to lie under the data, and labels, to lie over it.

    The y labels stand on their lines inside the plot: there is no gutter, so percentages stay simple.
    """
    grid, labels = [], []
    for value in _ticks(*y, about=4):
        at = height * (1 - (value - y[0]) / ((y[1] - y[0]) or 1))
        grid.append(Markup('<line class="grid" x1="0" x2="100%" y1="{a:.1f}" y2="{a:.1f}"/>').format(a=at))
        # On its line; that of a line at the very top below it, where the axis' name does not stand.
        labels.append(Markup('<text x="0" y="{:.1f}">{}</text>').format(at - 4 if at > 12 else at + 13, _number(value)))
    labels.append(Markup('<line class="axis" x1="0" x2="100%" y1="{h}" y2="{h}"/>').format(h=height))
    for value in _ticks(*x, about=6):
        share = (value - x[0]) / ((x[1] - x[0]) or 1)
        anchor = "start" if share < 0.03 else "end" if share > 0.97 else "middle"
        labels.append(
            Markup(
                '<line class="axis" x1="{p}" x2="{p}" y1="{a}" y2="{b}"/>'
                '<text x="{p}" y="{c}" text-anchor="{d}">{v}</text>'
            ).format(p=_pct(share), a=height, b=height + 4, c=height + 18, d=anchor, v=_number(value))
        )
    if x_name:
        labels.append(Markup('<text x="50%" y="{}" text-anchor="middle">{}</text>').format(height + 36, x_name))
    if y_name:
        labels.append(Markup('<text x="0" y="-6">{}</text>').format(y_name))
    return _join(grid), _join(labels)


def histogram(
    values_or_counts: Sequence[float],
    edges: Sequence[float],
    bands: Sequence[tuple[float, float, str]] = (),
    caption: str = "",
    name: str = "",
) -> Markup:
    """A histogram, with bands (low, high, label) drawn in.

    One number fewer than edges are counts; anything else are values, counted here (the last bin closed, as numpy
    does). `name` says what lies along the axis.
    """
    given = len(values_or_counts) == len(edges) - 1
    counts: Sequence[float] = values_or_counts if given else _count(values_or_counts, edges)
    low, high = float(edges[0]), float(edges[-1])
    top = max([*counts, 1]) * 1.08
    height = 200
    span = (high - low) or 1.0
    grid, labels = _axes((low, high), (0, top), height, name, "samples")
    out = [grid]
    for left, right, _ in bands:
        a, b = (max(low, min(high, float(edge))) for edge in (left, right))
        out.append(
            Markup('<rect class="bandfill" x="{}" y="0" width="{}" height="{}"/>').format(
                _pct((a - low) / span), _pct((b - a) / span), height
            )
        )
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        tall = height * float(count) / top
        inside = any(a <= (left + right) / 2 <= b for a, b, _ in bands)
        out.append(
            Markup('<rect class="{}" x="{}" y="{:.2f}" width="{}" height="{:.2f}"/>').format(
                "inband" if inside else "bar",
                _pct((left - low) / span),
                height - tall,
                _pct((right - left) * 0.94 / span),
                tall,
            )
        )
    for left, right, label in bands:
        a, b = (max(low, min(high, float(edge))) for edge in (left, right))
        for x in (a, b):
            out.append(
                Markup('<line class="bandedge" x1="{p}" x2="{p}" y1="0" y2="{h}"/>').format(
                    p=_pct((x - low) / span), h=height
                )
            )
        out.append(
            Markup('<text class="band" x="{}" y="-6" text-anchor="middle">{}</text>').format(
                _pct(((a + b) / 2 - low) / span), label
            )
        )
    total = sum(int(count) for count in counts)
    words = f"Histogram of {total:,} values of {name or 'a quantity'} from {_number(low)} to {_number(high)}"
    words += "".join(f"; band {label}: {_number(float(a))} to {_number(float(b))}" for a, b, label in bands)
    rows = [
        [f"{_number(float(a))} to {_number(float(b))}", int(c)]
        for a, b, c in zip(edges, edges[1:], counts, strict=False)
    ]
    return _chart(words, _frame(_join([*out, labels]), height), ["from, to", "count"], rows, caption)


def _count(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    from bisect import bisect_right

    counts = [0] * (len(edges) - 1)
    for value in values:
        if edges[0] <= value <= edges[-1]:
            counts[min(bisect_right(edges, value) - 1, len(counts) - 1)] += 1
    return counts


def _frame(inner: Markup, height: int) -> Markup:
    return Markup('<svg height="{}" aria-hidden="true"><svg y="22" height="{}" width="100%">{}</svg></svg>').format(
        height + 66, height + 44, inner
    )


def _spread(values: Iterable[float], margin: float) -> tuple[float, float]:
    finite = [float(value) for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    pad = (high - low) * margin or 0.5
    return low - pad, high + pad


def scatter(
    points: Sequence[tuple[float, float]],
    groups: Sequence[str] | None = None,
    caption: str = "",
    words: str = "",
    height: int = 420,
) -> Markup:
    """A map of points (x, y), coloured by group; axes carry no labels, for a map's units mean nothing.

    The first seven groups have colours of their own, in order of appearance; the rest share the eighth.
    """
    names = list(dict.fromkeys(groups)) if groups else [""]
    slot = {name: min(index, 7) for index, name in enumerate(names)}
    x, y = _spread((p[0] for p in points), 0.03), _spread((p[1] for p in points), 0.03)
    paths: dict[int, list[str]] = {}
    tally = dict.fromkeys(names, 0)
    for index, (px, py) in enumerate(points):
        name = groups[index] if groups else ""
        tally[name] += 1
        if math.isfinite(px) and math.isfinite(py):
            at = f"M{1000 * (px - x[0]) / (x[1] - x[0]):.1f} {1000 * (y[1] - py) / (y[1] - y[0]):.1f}h0"
            paths.setdefault(slot[name], []).append(at)
    inner = _join(
        Markup('<path class="dots l{}" d="{}"/>').format(index, "".join(path)) for index, path in paths.items()
    )
    shown = [*names[:7], "other"] if len(names) > 8 else names
    legend = (
        _legend(shown, '<svg aria-hidden="true"><circle class="f{i}" cx="8" cy="6" r="4.5"/></svg>') if groups else ""
    )
    svg = Markup(
        '{}<svg height="{}" viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    ).format(legend, height, inner)
    said = words or f"Map of {len(points):,} points" + (f" in {len(names)} groups" if groups else "")
    return _chart(said, svg, ["group", "points"], [[name or "all", count] for name, count in tally.items()], caption)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_name: str = "",
    y_name: str = "",
    caption: str = "",
    faint: Collection[str] = (),
    zero: bool = False,
) -> Markup:
    """Curves over one axis: name -> [(x, y), ...]. Values that are not finite break a curve.

    faint  names of curves that lie thin behind the one after them, in its colour: what that one smooths.
    zero   the axis begins at 0, for amounts whose changes should not look larger than they are.
    """
    every = [point for curve in series.values() for point in curve]
    x, y = _spread((p[0] for p in every), 0.0), _spread((p[1] for p in every), 0.06)
    y = (min(0.0, min((p[1] for p in every), default=0.0)), y[1]) if zero else y
    height = 240
    curves, kinds, colour = [], [], 0
    for name, curve in series.items():
        kinds.append(f"l{colour % 8}{' faint' if name in faint else ''}")
        colour += name not in faint
        path, pen = [], "M"
        for px, py in curve:
            if not (math.isfinite(px) and math.isfinite(py)):
                pen = "M"
                continue
            path.append(f"{pen}{1000 * (px - x[0]) / (x[1] - x[0]):.1f} {1000 * (y[1] - py) / (y[1] - y[0]):.1f}")
            pen = "L"
        curves.append(Markup('<path class="curve {}" d="{}"/>').format(kinds[-1], "".join(path)))
    plot = Markup('<svg width="100%" height="{}" viewBox="0 0 1000 1000" preserveAspectRatio="none">{}</svg>').format(
        height, _join(curves)
    )
    key = Markup('<li><svg aria-hidden="true"><line class="curve {}" x1="0" x2="16" y1="6" y2="6"/></svg>{}</li>')
    keys = _join(key.format(kind, name) for kind, name in zip(kinds, series, strict=True))
    legend = Markup('<ul class="legend">{}</ul>').format(keys) if len(series) > 1 else ""
    last = [
        [name, len(curve), curve[0][1] if curve else None, curve[-1][1] if curve else None]
        for name, curve in series.items()
    ]
    words = f"Curves of {y_name or 'values'} over {x_name or 'steps'}: " + "; ".join(
        f"{name} from {_cell(first)} to {_cell(end)}" for name, _, first, end in last
    )
    grid, labels = _axes(x, y, height, x_name, y_name)
    frame = _frame(_join([grid, plot, labels]), height)
    return _chart(words, Markup("{}{}").format(legend, frame), ["curve", "points", "first", "last"], last, caption)
