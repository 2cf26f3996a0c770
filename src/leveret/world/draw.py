"""A scene's pixels: Pillow for the masks (drawn once, kept), numpy for the rest; some thousand pictures a second.

Masks are drawn eight times too large and averaged down, so edges are smooth; colours vary a little from thing to
thing; backgrounds are muted gradients with a texture and noise.
"""

from __future__ import annotations

import io
import math
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

from leveret.world.scenes import LETTER_HEIGHT, LETTER_PITCH, NAMELESS, Scene

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "orange": (244, 134, 20),
    "yellow": (246, 220, 44),
    "green": (36, 150, 52),
    "cyan": (42, 206, 214),
    "blue": (36, 62, 206),
    "purple": (126, 40, 160),
    "pink": (250, 140, 196),
}
OVER = 8

# Letters as strokes on a 0..1 box, x to the right, y down; each stroke is a polyline.
STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "A": [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.62), (0.8, 0.62)]],
    "C": [[(1, 0.12), (0.7, 0), (0.3, 0), (0, 0.25), (0, 0.75), (0.3, 1), (0.7, 1), (1, 0.88)]],
    "E": [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.8, 0.5)]],
    "H": [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(0, 0.5), (1, 0.5)]],
    "K": [[(0, 0), (0, 1)], [(1, 0), (0, 0.55)], [(0.3, 0.42), (1, 1)]],
    "L": [[(0, 0), (0, 1), (1, 1)]],
    "O": [[(0.3, 0), (0.7, 0), (1, 0.25), (1, 0.75), (0.7, 1), (0.3, 1), (0, 0.75), (0, 0.25), (0.3, 0)]],
    "T": [[(0, 0), (1, 0)], [(0.5, 0), (0.5, 1)]],
    "U": [[(0, 0), (0, 0.75), (0.3, 1), (0.7, 1), (1, 0.75), (1, 0)]],
    "X": [[(0, 0), (1, 1)], [(1, 0), (0, 1)]],
    "Z": [[(0, 0), (1, 0), (0, 1), (1, 1)]],
    "N": [[(0, 1), (0, 0), (1, 1), (1, 0)]],
}


def _polygon(points: list[tuple[float, float]], size: int) -> list[tuple[float, float]]:
    return [(x * (size - 1), y * (size - 1)) for x, y in points]


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, n: int) -> None:
    if shape == "circle":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    elif shape == "triangle":
        draw.polygon(_polygon([(0.5, 0), (1, 1), (0, 1)], n), fill=255)
    elif shape == "diamond":
        draw.polygon(_polygon([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)], n), fill=255)
    elif shape == "star":
        # A five-pointed star, stretched so that it fills its box to the edges.
        points = [
            (r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5))
            for k, r in ((k, 1.0 if k % 2 == 0 else 0.42) for k in range(10))
        ]
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        points = [
            ((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys)))
            for x, y in zip(xs, ys, strict=True)
        ]
        draw.polygon(_polygon(points, n), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        hole = 0.27 * n
        draw.ellipse((hole, hole, n - 1 - hole, n - 1 - hole), fill=0)
    elif shape == "cross":
        arm = 0.33 * n
        draw.rectangle((arm, 0, n - 1 - arm, n - 1), fill=255)
        draw.rectangle((0, arm, n - 1, n - 1 - arm), fill=255)
    elif shape == "heart":
        draw.ellipse((0, 0, 0.54 * n, 0.56 * n), fill=255)
        draw.ellipse((0.46 * n, 0, n - 1, 0.56 * n), fill=255)
        draw.polygon(_polygon([(0.04, 0.4), (0.96, 0.4), (0.5, 1.0)], n), fill=255)
    elif shape.startswith(NAMELESS):
        # Three to nine corners around the middle, at any distance from it; stretched to fill the box to its edges.
        rng = np.random.Generator(np.random.PCG64(int(shape.removeprefix(NAMELESS))))
        turns = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 10))))
        corners = rng.uniform(0.25, 1, len(turns))[:, None] * np.stack([np.cos(turns), np.sin(turns)], 1)
        corners = (corners - corners.min(0)) / np.maximum(np.ptp(corners, 0), 1e-3)
        draw.polygon(_polygon([(float(x), float(y)) for x, y in corners], n), fill=255)
    else:
        raise AssertionError(f"no mask for shape {shape!r}")


def rgb(colour: str) -> tuple[int, ...]:
    """Red, green and blue, 0 to 255, of a colour of the world or of one without a name (`#rrggbb`)."""
    return PALETTE.get(colour) or ImageColor.getrgb(colour)


@lru_cache(maxsize=4096)
def thing_mask(shape: str, size: int) -> np.ndarray:
    """Coverage of a shape in its box: [size, size, 1] float32 in 0..1."""
    big = Image.new("L", (size * OVER, size * OVER), 0)
    _draw_shape(ImageDraw.Draw(big), shape, size * OVER)
    return np.asarray(big.reduce(OVER), np.float32)[:, :, None] / 255.0


@cache
def letter_mask(letter: str) -> np.ndarray:
    """Coverage of a letter in its cell: [LETTER_HEIGHT, LETTER_PITCH, 1] float32 in 0..1."""
    w, h = LETTER_PITCH * OVER, LETTER_HEIGHT * OVER
    big = Image.new("L", (w, h), 0)
    draw = ImageDraw.Draw(big)
    pad, stroke = 1.2 * OVER, int(1.5 * OVER)
    for line in STROKES[letter]:
        points = [(pad + x * (w - 2 * pad), pad + y * (h - 2 * pad)) for x, y in line]
        draw.line(points, fill=255, width=stroke, joint="curve")
        for x, y in points:
            draw.ellipse((x - stroke / 2, y - stroke / 2, x + stroke / 2, y + stroke / 2), fill=255)
    return np.asarray(big.reduce(OVER), np.float32)[:, :, None] / 255.0


@lru_cache(maxsize=64)
def _ramp(length: int) -> np.ndarray:
    return np.linspace(-0.5, 0.5, length, dtype=np.float32)


def _clutter(picture: np.ndarray, marks: int, rng: np.random.Generator) -> np.ndarray:
    """Lines, long streaks, soft patches and dots, of any colour: what pictures hold that is none of the shapes."""
    h, w = picture.shape[:2]
    layer = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    for kind in rng.integers(0, 4, marks):
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        x, y, angle = rng.uniform(0, w), rng.uniform(0, h), rng.uniform(0, math.pi)
        dx, dy = math.cos(angle), math.sin(angle)
        draw = ImageDraw.Draw(layer)
        if kind == 0:  # a line right across
            reach = 2 * max(w, h)
            ends = (x - dx * reach, y - dy * reach, x + dx * reach, y + dy * reach)
            draw.line(ends, fill=colour, width=int(rng.integers(1, 4)))
        elif kind == 1:  # a streak, four times as long as wide or more
            reach = rng.uniform(8, 16)
            draw.line((x - dx * reach, y - dy * reach, x + dx * reach, y + dy * reach), fill=colour, width=4)
        elif kind == 2:  # a soft patch that is larger than any thing
            size = rng.uniform(24, 56)
            mask = Image.new("L", (w, h), 0)
            ImageDraw.Draw(mask).ellipse((x - size, y - size * dx, x + size, y + size * dx) if dx > 0 else
                                         (x - size, y + size * dx, x + size, y - size * dx), fill=180)  # fmt: skip
            layer.paste(colour, mask=mask.filter(ImageFilter.GaussianBlur(6)))
        else:  # dots
            for px, py in rng.uniform(0, 1, (12, 2)) * (w, h):
                draw.ellipse((px, py, px + 2, py + 2), fill=colour)
    return np.asarray(layer, np.float32)


def render(scene: Scene, *, shift: tuple[int, int] = (0, 0), jitter: int = 0) -> np.ndarray:
    """The picture: [height, width, 3] uint8.

    shift   the whole picture moved by so many pixels (dx, dy), edges wrapped: what a re-crop does to a duplicate.
    jitter  another seed for colours and noise of the same scene: a scene really drawn again.
    """
    w, h = scene.width, scene.height
    rng = np.random.Generator(np.random.PCG64(scene.background + 7919 * jitter))
    base = rng.uniform(70, 190, 3).astype(np.float32)
    base = 0.45 * base + 0.55 * base.mean()  # muted
    if scene.style == "paper":
        base = 232 + 0.15 * (base - 130)
    slope = rng.uniform(-45, 45, 2).astype(np.float32)
    light = slope[0] * _ramp(w)[None, :] + slope[1] * _ramp(h)[:, None]
    angle, wave = rng.uniform(0, math.pi), rng.uniform(0.25, 0.9)
    phase = (np.cos(angle) * np.arange(w, dtype=np.float32)[None, :] + np.sin(angle) * np.arange(h)[:, None]) * wave
    if scene.style == "stripes":
        light = light + 45 * np.sign(np.sin(phase, dtype=np.float32))
    else:
        light = light + rng.uniform(0, 9) * np.sin(phase, dtype=np.float32)
    picture = base[None, None, :] + light[:, :, None]
    noise = rng.integers(-12, 13, (h, w, 3), dtype=np.int8)
    if scene.clutter:
        picture = _clutter(picture, scene.clutter, rng)
    tints = rng.uniform(-16, 16, (len(scene.things) + 1, 3)).astype(np.float32)
    for thing, tint in zip(scene.things, tints, strict=False):
        mask = thing_mask(thing.shape, thing.x1 - thing.x0)
        patch = picture[thing.y0 : thing.y1, thing.x0 : thing.x1]
        patch += mask * (np.asarray(rgb(thing.colour), np.float32) + tint - patch)
    if scene.word:
        ink = np.float32(18.0 if scene.word.dark or scene.style == "paper" else 240.0)
        for i, letter in enumerate(scene.word.text):
            x = scene.word.x0 + i * LETTER_PITCH
            patch = picture[scene.word.y0 : scene.word.y0 + LETTER_HEIGHT, x : x + LETTER_PITCH]
            patch += letter_mask(letter) * (ink - patch)
    picture += noise
    if shift != (0, 0):
        picture = np.roll(picture, (shift[1], shift[0]), axis=(0, 1))
    return np.clip(picture, 0, 255).astype(np.uint8)


def jpeg(picture: np.ndarray, quality: int = 90) -> bytes:
    """The picture as JPEG bytes, without chroma subsampling above quality 75 (small coloured things survive)."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=quality, subsampling=0 if quality > 75 else 2)
    return out.getvalue()
