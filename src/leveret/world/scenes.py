"""Scenes from a seed: what is in a picture, before anyone draws or describes it.

A scene is a pure function of (seed, split, index). Things have a shape, a colour and a free position (no grid);
some scenes repeat a shape or a colour so that counts above one occur; some hold a short word; some pictures are
not square. Eight colour-shape pairs are kept out of every picture but those of the split `novel-pairs`, and a tenth
of all words out of every training split, so that what a model has learned can be told from what it has memorised.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from zlib import crc32

T = TypeVar("T")
Frames = Sequence[tuple[int, int]] | Mapping[tuple[int, int], float]
"""The (width, height) that pictures may have, each with its weight or all alike."""

SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring", "cross", "heart")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
LETTERS = "ACEHKLOTUXZN"
WORD_LENGTH = 3
GRID = 32
"""Coordinates are told in 1/GRID of the picture's side, rounded to two decimals: 33 different numbers."""

SIDE = 64
USUAL = {(64, 64): 0.88, (80, 64): 0.06, (64, 80): 0.06}
"""The (width, height) of pictures and how frequent they are."""
OBLONG = ((96, 64), (64, 96), (112, 64), (64, 112), (128, 64), (64, 128))
"""The sides of pictures that are clearly not square: from 3:2 to 2:1, either way."""
SIZES = (13, 19)
"""Least and greatest side of a thing, in pixels."""
LETTER_PITCH, LETTER_HEIGHT = 8, 11
GAP = 2
"""Least distance between two things, in pixels."""

# Frequencies fall a little along the tables, so that "popular" (POPE's second way of sampling absent objects) means
# something.
SHAPE_WEIGHTS = tuple(1.25 - 0.5 * i / 7 for i in range(8))
COLOUR_WEIGHTS = tuple(1.25 - 0.5 * i / 7 for i in range(8))
COUNT_WEIGHTS = (1.0, 1.7, 2.0, 2.3)

HELD_OUT = frozenset((COLOURS[i], SHAPES[(3 * i + 2) % 8]) for i in range(8))
"""Pairs never drawn outside the split `novel-pairs`: every colour once, every shape once."""
ALL_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT)
STYLES = ("muted", "paper", "stripes")
"""Backgrounds: muted gradients (all that is taught about), near white ones (which the tower has seen too), and bold
stripes, which only an examination draws."""


NAMELESS = "nameless-"
"""`nameless-N` is a shape without a name: polygon N of `draw.thing_mask`."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn object; the box is in pixels, right and bottom edges exclusive.

    shape, colour  of SHAPES and COLOURS. What the vision tower is shown beside the world's own scenes may have a shape
                   or a colour without a name: `nameless-N`, `#rrggbb`.
    """

    shape: str
    colour: str
    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.x0, self.y0, self.x1, self.y1


@dataclass(frozen=True, slots=True)
class Word:
    """A drawn word; each letter fills LETTER_PITCH x LETTER_HEIGHT pixels from (x0, y0)."""

    text: str
    dark: bool
    x0: int
    y0: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.x0, self.y0, self.x0 + LETTER_PITCH * len(self.text), self.y0 + LETTER_HEIGHT


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that decides a picture's pixels but the renderer itself."""

    width: int
    height: int
    things: tuple[Thing, ...]
    word: Word | None
    background: int
    """Seed of the background's colours, gradient, texture and noise."""
    style: str = "muted"
    clutter: int = 0
    """So many lines, streaks and soft patches lie behind the things; nobody asks about them."""
    meta: dict[str, object] = field(default_factory=dict, compare=False)

    def numbers(self, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """A pixel box in 1/GRID of the sides, rounded to the nearest: (x0, y0, x1, y1), each 0..GRID."""
        x0, y0, x1, y1 = box
        w, h = self.width, self.height
        return round(x0 * GRID / w), round(y0 * GRID / h), round(x1 * GRID / w), round(y1 * GRID / h)

    def in_reading_order(self) -> list[Thing | Word]:
        """Things and the word as an 8 x 8 grid over the picture would meet their centres, row by row."""

        def cell(item: Thing | Word) -> tuple[int, int]:
            x0, y0, x1, y1 = item.box
            return int((y0 + y1) * 4 / self.height), int((x0 + x1) * 4 / self.width)

        items: list[Thing | Word] = [*self.things]
        if self.word:
            items.append(self.word)
        return sorted(items, key=cell)


def stream(seed: int, split: str, index: int | str) -> random.Random:
    """The random numbers of one scene: a pure function of its address."""
    return random.Random(f"leveret/{seed}/{split}/{index}")


def pick(rng: random.Random, values: Sequence[T], weights: Sequence[float] | None = None) -> T:
    """One of `values`; own arithmetic on `random()` alone, which Python keeps stable over versions."""
    r = rng.random()
    if weights is None:
        return values[int(r * len(values))]
    r *= sum(weights)
    for value, weight in zip(values, weights, strict=True):
        r -= weight
        if r < 0:
            return value
    return values[-1]


def between(rng: random.Random, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


def shuffled(rng: random.Random, values: Iterable[T]) -> list[T]:
    """The values in random order (Fisher-Yates on `random()` alone)."""
    mixed = list(values)
    for i in range(len(mixed) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        mixed[i], mixed[j] = mixed[j], mixed[i]
    return mixed


def frames_with(oblong: float) -> Frames:
    """The world's own sides, but a share of the pictures, `oblong` (0 to 1), clearly not square."""
    if not oblong:
        return USUAL
    usual = {side: weight * (1 - oblong) for side, weight in USUAL.items()}
    return usual | dict.fromkeys(OBLONG, oblong / len(OBLONG))


def is_novel_word(text: str) -> bool:
    """True for the tenth of all words that no training split draws."""
    return crc32(text.encode()) % 10 == 0


def sample_scene(
    rng: random.Random,
    *,
    counts: tuple[int, int] = (1, 4),
    word: float = 0.4,
    sizes: tuple[int, int] = SIZES,
    novel_pairs: bool | None = False,
    novel_words: bool | None = False,
    frames: Frames = USUAL,
    flat: bool = False,
    style: str = "muted",
    clutter: int = 0,
) -> Scene:
    """One scene.

    counts       least and most things; (0, 0) is a scene with nothing but, perhaps, a word.
    word         probability of a word.
    sizes        least and greatest side of a thing, in pixels.
    novel_pairs  True: the first thing is a held-out pair. False: no thing is. None: any pair.
    novel_words  False: only words of training; True: only held-out ones; None: any.
    frames       the (width, height) of pictures, by their weights or at random.
    flat         every shape and colour is as frequent as every other (else they fall a little along the tables).
    """
    shape_weights, colour_weights = (None, None) if flat else (SHAPE_WEIGHTS, COLOUR_WEIGHTS)
    weighed = tuple(frames.values()) if isinstance(frames, Mapping) else None
    width, height = pick(rng, tuple(frames), weighed)
    low, high = counts
    weights = COUNT_WEIGHTS[low - 1 : high] if 1 <= low < high <= len(COUNT_WEIGHTS) else None
    wanted = low + pick(rng, range(high - low + 1), weights) if high > low else low
    theme = pick(rng, ("free", "shape", "colour"), (0.55, 0.25, 0.2))
    theme_shape, theme_colour = pick(rng, SHAPES, shape_weights), pick(rng, COLOURS, colour_weights)

    taken: list[tuple[int, int, int, int]] = []

    def place(w: int, h: int) -> tuple[int, int] | None:
        for _ in range(40):
            x, y = between(rng, 0, width - w), between(rng, 0, height - h)
            if all(
                x >= x1 + GAP or x + w + GAP <= x0 or y >= y1 + GAP or y + h + GAP <= y0 for x0, y0, x1, y1 in taken
            ):
                taken.append((x, y, x + w, y + h))
                return x, y
        return None

    text = None
    if rng.random() < word:
        letters = LETTERS
        while True:
            candidate = "".join(pick(rng, letters) for _ in range(WORD_LENGTH))
            if novel_words is None or is_novel_word(candidate) == novel_words:
                break
        spot = place(LETTER_PITCH * WORD_LENGTH, LETTER_HEIGHT)
        if spot:
            text = Word(candidate, rng.random() < 0.5, *spot)

    things: list[Thing] = []
    for position in range(wanted):
        while True:
            keep = rng.random() < 0.8
            shape = theme_shape if theme == "shape" and keep else pick(rng, SHAPES, shape_weights)
            colour = theme_colour if theme == "colour" and keep else pick(rng, COLOURS, colour_weights)
            if novel_pairs is None or ((colour, shape) in HELD_OUT) == (novel_pairs and position == 0):
                break
        size = between(rng, *sizes)
        spot = place(size, size)
        if spot:
            x, y = spot
            things.append(Thing(shape, colour, x, y, x + size, y + size))
    if len(things) < low:  # no room in 40 tries: another scene, not one with fewer things than were asked for
        again: dict[str, Any] = {"novel_pairs": novel_pairs, "novel_words": novel_words, "frames": frames, "flat": flat}
        return sample_scene(rng, counts=counts, word=word, sizes=sizes, style=style, clutter=clutter, **again)
    return Scene(width, height, tuple(things), text, int(rng.random() * 2**31), style, clutter)


def tune_scene(seed: int, index: int, frames: Frames = USUAL) -> Scene:
    """The scene of tuning picture `index`: most hold a word, some hold nothing, some have clutter behind the things."""
    rng = stream(seed, "tune", index)
    r = rng.random()
    clutter = between(rng, 1, 5) if r < 0.12 else 0
    counts = (0, 0) if r < 0.03 or r > 0.98 else (1, 4)
    return sample_scene(rng, word=0.88, counts=counts, clutter=clutter, frames=frames)
