"""A scene as a list of percepts: what stands in which cell of an 8 x 8 grid, with its coordinates.

Two uses, both declared on the card of the tiny backbones: the targets of the vision tower's dense grounded loss, and
the "compound rows" of the language model's pre-training, where a percept is one position (the sum of the embeddings
of its colour, shape or letter and its four coordinates) instead of nine words.
"""

from __future__ import annotations

from dataclasses import dataclass

from leveret.world.scenes import COLOURS, LETTER_HEIGHT, LETTER_PITCH, LETTERS, SHAPES, Scene, Thing

CELLS = 8
BORDER = 0.125
"""A centre so near a cell's border, in cells (a pixel of 64), may as well be said to lie in the next."""


@dataclass(frozen=True, slots=True)
class Percept:
    """One thing or one letter. `cell` = row * CELLS + column; ids are -1 where they do not apply, and for what has no
    name. `also` are the cells that a thing's centre lies a hair's breadth from. `thing` is None for a letter."""

    cell: int
    colour: int
    shape: int
    letter: int
    numbers: tuple[int, int, int, int]
    also: tuple[int, ...] = ()
    thing: Thing | None = None


def percepts(scene: Scene) -> list[Percept]:
    """Percepts in reading order. Letters that fall into one cell (on squashed pictures) move to the next column."""
    taken: set[int] = set()
    found: list[Percept] = []

    def add(box: tuple[int, int, int, int], letter: int, thing: Thing | None = None) -> None:
        x0, y0, x1, y1 = box
        y, x = (y0 + y1) / 2 * CELLS / scene.height, (x0 + x1) / 2 * CELLS / scene.width
        row, column = min(int(y), CELLS - 1), min(int(x), CELLS - 1)
        while row * CELLS + column in taken and column < CELLS - 1:
            column += 1
        taken.add(row * CELLS + column)
        near = {
            min(int(v), CELLS - 1) * CELLS + min(int(u), CELLS - 1)
            for v in (y - BORDER, y + BORDER)
            for u in (x - BORDER, x + BORDER)
        }
        also = tuple(sorted(near - {row * CELLS + column})) if thing else ()
        colour, shape = (_index(COLOURS, thing.colour), _index(SHAPES, thing.shape)) if thing else (-1, -1)
        found.append(Percept(row * CELLS + column, colour, shape, letter, scene.numbers(box), also, thing))

    for item in scene.in_reading_order():
        if isinstance(item, Thing):
            add(item.box, -1, item)
        else:
            for i, letter in enumerate(item.text):
                x = item.x0 + i * LETTER_PITCH
                add((x, item.y0, x + LETTER_PITCH, item.y0 + LETTER_HEIGHT), LETTERS.index(letter))
    return sorted(found, key=lambda percept: percept.cell)


def _index(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else -1
