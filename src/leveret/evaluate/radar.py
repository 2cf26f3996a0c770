"""Scores around a circle: one spoke a task, one line a kind of score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from leveret import pages

WIDTH, HEIGHT, RADIUS = 560, 400, 140
LETTERS = 20
"""Of a name at a spoke; the whole of it stands in the table."""
RINGS = (0.25, 0.5, 0.75, 1.0)


def radar(names: Sequence[str], series: Mapping[str, Sequence[float | None]], caption: str = "") -> Markup:
    """A radar chart; series: name -> one value in 0..1 a spoke (None is drawn at the centre). "" under three spokes.

    The first series is filled. The numbers are in a table under it, for who cannot see it."""
    if len(names) < 3:
        return Markup()
    inner = [_ring(len(names), share) for share in RINGS]
    for at, name in enumerate(names):
        x, y = _point(at, len(names), 1.0)
        inner.append(Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(WIDTH / 2, HEIGHT / 2, x, y))
        x, y = _point(at, len(names), 1.09)
        anchor = "middle" if abs(x - WIDTH / 2) < 12 else "start" if x > WIDTH / 2 else "end"
        label = Markup('<text x="{}" y="{}" text-anchor="{}" dominant-baseline="middle">{}<title>{}</title></text>')
        inner.append(label.format(x, y, anchor, name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}\u2026", name))
    for share in RINGS[1:2]:  # the outermost would stand in the way of a name
        x, y = _point(0, len(names), share)
        inner.append(Markup('<text class="ring" x="{}" y="{}">{}</text>').format(x + 4, y - 3, f"{share:g}"))
    for colour, (_, values) in enumerate(series.items()):
        path = " ".join("{} {}".format(*_point(at, len(names), value or 0.0)) for at, value in enumerate(values))
        kind = Markup("area f{0} l{0}" if not colour else "l{0}").format(colour)
        inner.append(Markup('<polygon class="curve {}" points="{}"/>').format(kind, path))
    key = Markup('<li><svg aria-hidden="true"><line class="curve l{}" x1="0" x2="16" y1="6" y2="6"/></svg>{}</li>')
    legend = Markup('<ul class="legend">{}</ul>').format(
        Markup().join(key.format(colour, name) for colour, name in enumerate(series))
    )
    svg = Markup('<svg class="radar" viewBox="0 0 {} {}" aria-hidden="true">{}</svg>').format(
        WIDTH, HEIGHT, Markup().join(inner)
    )
    words = "Radar: " + "; ".join(
        f"{name} " + ", ".join("none" if value is None else f"{value:.2f}" for value in values)
        for name, values in series.items()
    )
    table = pages.table([[name, *(values[at] for values in series.values())] for at, name in enumerate(names)],
                        ["task", *series])  # fmt: skip
    return Markup(
        '<figure class="card" aria-label="{}">{}{}<figcaption>{}</figcaption>'
        "<details><summary>The numbers</summary>{}</details></figure>"
    ).format(f"{', '.join(names)}. {words}", legend, svg, caption, table)


def _point(at: int, count: int, share: float) -> tuple[float, float]:
    share = min(max(share, 0.0), 1.1)  # a ratio may pass 1, and stays in the drawing
    angle = 2 * math.pi * at / count - math.pi / 2
    return (
        round(WIDTH / 2 + RADIUS * share * math.cos(angle), 1),
        round(HEIGHT / 2 + RADIUS * share * math.sin(angle), 1),
    )


def _ring(count: int, share: float) -> Markup:
    points = " ".join("{} {}".format(*_point(at, count, share)) for at in range(count))
    return Markup('<polygon class="grid" fill="none" points="{}"/>').format(points)
