"""Which part of an image a tower sees: the square it is given, in fractions of the upright original.

    (left, top, right, bottom)    0, 0, 1, 1 is the whole image; below 0 and above 1 lies what was padded around it

The same arithmetic as in `resize.fit` and `tiles.cut`, told instead of done; a test holds both against their pixels.
"""

from __future__ import annotations

import math
from typing import TypeAlias

from leveret.records import Tiling, TowerView

Box: TypeAlias = tuple[float, float, float, float]
"""(left, top, right, bottom) in fractions of what it lies in."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def inside(outer: Box, inner: Box) -> Box:
    """Where `inner`, told in fractions of `outer`, lies in what `outer` is told in fractions of."""
    left, top, right, bottom = outer
    wide, high = right - left, bottom - top
    return left + inner[0] * wide, top + inner[1] * high, left + inner[2] * wide, top + inner[3] * high


def seen(view: TowerView, height: int, width: int) -> Box:
    """What a tower sees of an image of (height, width) pixels, as `resize.fit` makes it square."""
    size, short = view.size, view.short or view.size
    if view.resize == "squash" or (width == height == size == short):
        return WHOLE
    left, top, wide, high = 0, 0, width, height  # where the image lies on the canvas that is scaled and cut
    across, down = width, height
    if view.resize == "pad":
        across = down = max(width, height)
        left, top = (across - width) // 2, (down - height) // 2
    elif view.resize == "letterbox":
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        across, down = width + 2 * left, height + 2 * top
    least = min(across, down)
    columns, rows = (short if side == least else int(short * side / least) for side in (across, down))
    begin = [
        (spare // 2 if view.resize in ("crop", "pad") else round(spare / 2)) for spare in (columns - size, rows - size)
    ]
    box = (begin[0] / columns, begin[1] / rows, (begin[0] + size) / columns, (begin[1] + size) / rows)
    canvas = (-left / wide, -top / high, (across - left) / wide, (down - top) / high)
    return inside(canvas, box)


def tiled(tiling: Tiling, height: int, width: int) -> Box:
    """What all tiles together show of an image of (height, width) pixels, as `tiles.cut` lays it on black."""
    rows, columns = tiling.best(height, width)
    across, down = columns / width, rows / height
    if across < down:
        to = (columns, min(math.ceil(height * across), rows))
    else:
        to = (min(math.ceil(width * down), columns), rows)
    left, top = (columns - to[0]) // 2, (rows - to[1]) // 2
    return -left / to[0], -top / to[1], (columns - left) / to[0], (rows - top) / to[1]
