"""Draws the pictures that a newcomer tries on the quickstart's model, none of them by the world's own renderer.

    python docs/pictures/tried.py [MODEL]

Paper shapes on a table (seen at an angle, with shadows and lamp light), a screenshot of a paint program, a child's
drawing in crayon, and an empty table; 480 pixels wide or more. With MODEL, asks it about each and prints the answers.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HERE = Path(__file__).parent / "tried"
Points = Sequence[tuple[float, float]]
ASKED = {
    "paper": (
        "What is in the image?", "How many objects are there?", "What colour is the star?",
        "Is there a dog in the image?",
    ),
    "screenshot": (
        "What is in the image?", "Is the red circle left of or right of the blue square?",
        "What colour is the heart?",
    ),
    "crayon": ("What do you see?", "How many circles are there?", "Where is the green triangle?"),
    "empty": ("What is in the image?", "How many objects are there?", "What colour is the ring?"),
}  # fmt: skip


def star(x: float, y: float, r: float, turn: float = 0.0) -> Points:
    return [
        (x + k * math.sin(turn + i * math.pi / 5), y - k * math.cos(turn + i * math.pi / 5))
        for i in range(10)
        for k in (r if i % 2 == 0 else 0.42 * r,)
    ]


def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    return [(x + rx * math.cos(t / 40 * math.tau), y + ry * math.sin(t / 40 * math.tau)) for t in range(40)]


def table(width: int, height: int, seed: int) -> Image.Image:
    """Light wood under a lamp, out of focus at the far end."""
    rng = np.random.default_rng(seed)
    rows = np.cumsum(rng.normal(0, 1, height))
    rows = 10 * np.sin(rows / 4) + rng.normal(0, 3, height)
    y, x = np.mgrid[0:height, 0:width]
    light = 40 * np.exp(-(((x - 0.35 * width) / width) ** 2 + ((y - 0.3 * height) / height) ** 2) * 3)
    wood = np.array([150, 128, 104]) + (rows[:, None] + light - 15)[:, :, None]
    wood = wood + rng.normal(0, 5, (height, width, 1))
    return Image.fromarray(np.clip(wood, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))


def cut_out(picture: Image.Image, points: Points, colour: tuple[int, int, int]) -> None:
    """A piece of paper: its shadow, then the piece with a little grain."""
    shadow = Image.new("L", picture.size, 0)
    ImageDraw.Draw(shadow).polygon([(x + 7, y + 9) for x, y in points], fill=110)
    picture.paste((30, 24, 20), mask=shadow.filter(ImageFilter.GaussianBlur(6)))
    piece = Image.new("L", picture.size, 0)
    ImageDraw.Draw(piece).polygon(list(points), fill=255)
    grain = np.random.default_rng(len(points)).normal(0, 6, (picture.height, picture.width, 1))
    paper = np.clip(np.array(colour) + grain, 0, 255).astype(np.uint8)
    picture.paste(Image.fromarray(paper), mask=piece.filter(ImageFilter.GaussianBlur(0.8)))


def paper() -> Image.Image:
    picture = table(640, 480, 1)
    cut_out(picture, ellipse(150, 150, 68, 62), (206, 44, 44))
    cut_out(picture, [(400, 90), (535, 105), (522, 232), (392, 218)], (44, 70, 190))
    cut_out(picture, star(300, 355, 80, 0.12), (236, 212, 60))
    return picture.filter(ImageFilter.GaussianBlur(1.2))


def screenshot() -> Image.Image:
    picture = Image.new("RGB", (800, 600), (240, 240, 240))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 800, 34), fill=(60, 64, 72))
    draw.text((14, 11), "Untitled drawing - Paint", fill=(235, 235, 235))
    draw.rectangle((0, 34, 800, 62), fill=(225, 226, 230))
    for i, name in enumerate(("File", "Edit", "View", "Image", "Colours", "Help")):
        draw.text((14 + 70 * i, 43), name, fill=(40, 40, 40))
    draw.rectangle((40, 90, 760, 570), fill=(255, 255, 255), outline=(150, 150, 150))
    draw.ellipse((110, 180, 270, 340), fill=(220, 30, 30))
    draw.rectangle((500, 150, 650, 300), fill=(40, 60, 210))
    draw.polygon([(390, 360), (480, 530), (300, 530)], fill=(30, 150, 50))
    return picture


def crayon() -> Image.Image:
    rng = random.Random(4)
    picture = Image.new("RGB", (600, 600), (246, 243, 232))
    draw = ImageDraw.Draw(picture)

    def scribble(points: Points, colour: tuple[int, int, int]) -> None:
        """Filled with strokes that keep roughly inside the lines, as a child would."""
        mask = Image.new("L", picture.size, 0)
        wobbly = [(x + rng.uniform(-9, 9), y + rng.uniform(-9, 9)) for x, y in points]
        ImageDraw.Draw(mask).polygon(wobbly, fill=255)
        inside = np.asarray(mask) > 0
        ys, xs = np.nonzero(inside)
        for _ in range(900):
            i = rng.randrange(len(xs))
            x, y = float(xs[i]), float(ys[i])
            dx, dy = rng.uniform(10, 22), rng.uniform(-14, -4)
            shade = tuple(max(0, min(255, c + rng.randint(-18, 18))) for c in colour)
            if inside[min(599, max(0, int(y + dy))), min(599, int(x + dx))]:
                draw.line((x, y, x + dx, y + dy), fill=shade, width=5)
        draw.line([*wobbly, wobbly[0]], fill=colour, width=7, joint="curve")

    scribble(ellipse(150, 140, 80, 76), (244, 190, 30))
    scribble(ellipse(450, 190, 72, 74), (220, 50, 60))
    scribble([(290, 330), (400, 520), (170, 510)], (40, 150, 60))
    return picture.filter(ImageFilter.GaussianBlur(1))


PICTURES = {"paper": paper, "screenshot": screenshot, "crayon": crayon, "empty": lambda: table(640, 480, 7)}


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        draw().save(HERE / f"{name}.jpg", quality=85)
    if len(sys.argv) > 1:
        import leveret

        model = leveret.load(sys.argv[1])
        for name, questions in ASKED.items():
            for question in questions:
                print(f"{name:<11} {question:<58} {model.ask(HERE / f'{name}.jpg', question)}")


if __name__ == "__main__":
    main()
