"""Charts in SVG. They draw in percent of their width, so that text keeps its size from a telephone to a wide screen."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from leveret.pages.words import cell, join, number, table


@dataclass(frozen=True)
class Bar:
    """One row of `bars`: a value, its interval, and baselines to hold it against (name -> value)."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    marks: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def beside(items: Sequence[Markup]) -> Markup:
    """Charts two beside each other where there is room, one under the other where there is not."""
    return Markup('<div class="beside">{}</div>').format(join(items, "\n"))


def _chart(words: str, inner: Markup, header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> Markup:
    """A chart in its frame: words for who cannot see it, the numbers for who wants them."""
    return Markup(
        '<figure class="card" aria-label="{}">{}{}<details><summary>The numbers</summary>{}</details></figure>'
    ).format(
        words, inner, Markup("<figcaption>{}</figcaption>").format(caption) if caption else "", table(rows, header)
    )


def _legend(names: Sequence[str], shape: str) -> Markup:
    out = [Markup("<li>{}{}</li>").format(Markup(shape).format(i=i), name) for i, name in enumerate(names)]
    return Markup('<ul class="legend">{}</ul>').format(join(out))


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
                join(inner),
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
        Markup('<ul class="legend">{}</ul>').format(join(Markup("<li>{}</li>").format(k) for k in keys)) if keys else ""
    )
    header = ["", "value", "low", "high", *marks]
    rows = [[b.label, b.value, b.low, b.high, *(b.marks.get(name) for name in marks)] for b in items]
    words = "Bars: " + "; ".join(f"{item.label} {item.value:.{digits}f}" for item in items)
    chart = Markup('{}<div class="rows" aria-hidden="true">{}</div>').format(legend, join(out, "\n"))
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
    inner = Markup('<div class="rows" aria-hidden="true">{}</div>').format(join(out, "\n"))
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
        labels.append(Markup('<text x="0" y="{:.1f}">{}</text>').format(at - 4 if at > 12 else at + 13, number(value)))
    labels.append(Markup('<line class="axis" x1="0" x2="100%" y1="{h}" y2="{h}"/>').format(h=height))
    for value in _ticks(*x, about=6):
        share = (value - x[0]) / ((x[1] - x[0]) or 1)
        anchor = "start" if share < 0.03 else "end" if share > 0.97 else "middle"
        labels.append(
            Markup(
                '<line class="axis" x1="{p}" x2="{p}" y1="{a}" y2="{b}"/>'
                '<text x="{p}" y="{c}" text-anchor="{d}">{v}</text>'
            ).format(p=_pct(share), a=height, b=height + 4, c=height + 18, d=anchor, v=number(value))
        )
    if x_name:
        labels.append(Markup('<text x="50%" y="{}" text-anchor="middle">{}</text>').format(height + 36, x_name))
    if y_name:
        labels.append(Markup('<text x="0" y="-6">{}</text>').format(y_name))
    return join(grid), join(labels)


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
    words = f"Histogram of {total:,} values of {name or 'a quantity'} from {number(low)} to {number(high)}"
    words += "".join(f"; band {label}: {number(float(a))} to {number(float(b))}" for a, b, label in bands)
    rows = [
        [f"{number(float(a))} to {number(float(b))}", int(c)] for a, b, c in zip(edges, edges[1:], counts, strict=False)
    ]
    return _chart(words, _frame(join([*out, labels]), height), ["from, to", "count"], rows, caption)


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
    inner = join(
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


def plot(
    points: Mapping[str, tuple[float, float]],
    x_name: str,
    y_name: str,
    caption: str = "",
    front: Collection[str] = (),
) -> Markup:
    """A few points with their names, over two axes that mean something: name -> (x, y).

    front  names that a line joins, from left to right: those that no other point beats.
    """
    x, y = _spread((p[0] for p in points.values()), 0.12), _spread((p[1] for p in points.values()), 0.18)
    height = 260

    def at(point: tuple[float, float]) -> tuple[float, float]:
        """Share of the width, pixels from the top."""
        return (point[0] - x[0]) / (x[1] - x[0]), height * (y[1] - point[1]) / (y[1] - y[0])

    grid, labels = _axes(x, y, height, x_name, y_name)
    best = sorted((at(points[name]) for name in points if name in front), key=lambda place: place[0])
    marks = [
        Markup('<line class="curve l0 faint" x1="{}" y1="{:.1f}" x2="{}" y2="{:.1f}"/>').format(
            _pct(a[0]), a[1], _pct(b[0]), b[1]
        )
        for a, b in pairwise(best)
    ]
    written: list[tuple[float, float]] = []
    for name, point in sorted(points.items(), key=lambda item: at(item[1])):
        left, top = at(point)
        # Beside its point, and lower where another name stands in the way.
        line = top + 4
        while any(abs(line - other) < 15 and abs(left - place) < 0.25 for place, other in written):
            line += 15
        written.append((left, line))
        anchor, gap = ("end", -9) if left > 0.75 else ("start", 9)
        marks.append(
            Markup(
                '<circle class="f{}" cx="{}" cy="{:.1f}" r="5"/><text class="band" x="{}" dx="{}" y="{:.1f}" '
                'text-anchor="{}">{}</text>'
            ).format(0 if name in front else 1, _pct(left), top, _pct(left), gap, line, anchor, name)
        )
    words = f"{y_name} over {x_name}: " + "; ".join(f"{n} {number(b)} at {number(a)}" for n, (a, b) in points.items())
    rows = [[name, *point] for name, point in points.items()]
    frame = _frame(join([grid, labels, *marks]), height)
    return _chart(words, frame, ["", x_name, y_name], rows, caption)


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
        height, join(curves)
    )
    key = Markup('<li><svg aria-hidden="true"><line class="curve {}" x1="0" x2="16" y1="6" y2="6"/></svg>{}</li>')
    keys = join(key.format(kind, name) for kind, name in zip(kinds, series, strict=True))
    legend = Markup('<ul class="legend">{}</ul>').format(keys) if len(series) > 1 else ""
    last = [
        [name, len(curve), curve[0][1] if curve else None, curve[-1][1] if curve else None]
        for name, curve in series.items()
    ]
    words = f"Curves of {y_name or 'values'} over {x_name or 'steps'}: " + "; ".join(
        f"{name} from {cell(first)} to {cell(end)}" for name, _, first, end in last
    )
    grid, labels = _axes(x, y, height, x_name, y_name)
    frame = _frame(join([grid, plot, labels]), height)
    return _chart(words, Markup("{}{}").format(legend, frame), ["curve", "points", "first", "last"], last, caption)
