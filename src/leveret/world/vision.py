"""Pre-training of the tiny vision tower and its text tower, and of the scorer.

The tower learns from a SigLIP loss and, beside it, a dense grounded one (as SigLIP 2 and LocCa have): at the cell of
a thing's centre its colour, shape and coordinates, at a letter's its letter. One linear layer reads all of it, so
what it reads is also the probe of what the 64 tokens hold. It also tells how the thing looks, in numbers, and some
things have a colour or a shape without a name: a tower that only learned names took a colour for another where it had
never met it on that shape.
The scorer is apart: a small dual encoder trained with the SigLIP loss alone on a noisy draw of the web, with no look
at clean labels; it is what judges a web pool, which is always another draw.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn

from leveret.model.tiny import TinyDualEncoder, TinyTextTower, TinyVisionTower, save_module
from leveret.world.captions import web_pair
from leveret.world.draw import PALETTE, jpeg, render, rgb, thing_mask
from leveret.world.perceive import CELLS, percepts
from leveret.world.pretrain import Log, halves, pretrain
from leveret.world.questions import a
from leveret.world.scenes import (
    COLOURS,
    GRID,
    HELD_OUT,
    LETTERS,
    NAMELESS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    between,
    sample_scene,
    shuffled,
    stream,
)

SIZE = 64
LENGTH = 48
"""Words of a caption that the text tower reads."""
STRANGE = 0.25
"""Share of the tower's pictures that are bent, blurred and badly exposed."""
NAMELESS_SCENES = 0.4
"""Share of them in which things may have a shape or a colour without a name."""
APART = 60
"""Least distance of such a colour from every colour with a name, in RGB of 0 to 255."""
LOOK = 8
"""A thing's look is its colour and its coverage at LOOK x LOOK points of its box."""


def seen_scene(rng: random.Random) -> Scene:
    """A scene of the tower's pre-training: wider than the world's own, so that a drawing by hand or a photo of paper
    shapes is not far off: some larger and smaller things, some clutter behind them, some with nothing to see."""
    sizes = (11, 28) if rng.random() < 0.3 else SIZES
    clutter = between(rng, 1, 5) if rng.random() < 0.25 else 0
    counts = (0, 0) if rng.random() < 0.05 else (1, 4)
    style = "paper" if rng.random() < 0.15 else "muted"
    scene = sample_scene(rng, counts=counts, word=0.5, sizes=sizes, clutter=clutter, style=style)
    if rng.random() >= NAMELESS_SCENES:
        return scene
    return replace(scene, things=tuple(_nameless(thing, rng) for thing in scene.things))


def _nameless(thing: Thing, rng: random.Random) -> Thing:
    """The thing with another shape (a fifth) or another colour (half) that has no name, or as it is.

    A colour without a name is far from all that have one, and nearest to none that the shape is kept apart from: no
    picture comes near a held-out pair.
    """
    r = rng.random()
    if r < 0.2:
        return replace(thing, shape=f"{NAMELESS}{between(rng, 0, 99_999)}")
    while r < 0.7:
        grey = between(rng, 0, 255)
        mixed = (grey,) * 3 if rng.random() < 0.3 else tuple(between(rng, 0, 255) for _ in range(3))
        away = {name: sum((x - y) ** 2 for x, y in zip(mixed, PALETTE[name], strict=True)) for name in COLOURS}
        nearest = min(away, key=lambda name: away[name])
        if away[nearest] > APART**2 and (nearest, thing.shape) not in HELD_OUT:
            return replace(thing, colour="#{:02x}{:02x}{:02x}".format(*mixed))
    return thing


def picture_array(scene: Scene, rng: random.Random, *, strange: float = 0.0, size: int = SIZE) -> np.ndarray:
    """The picture as a tower sees it under `squash`: [3, size, size] float32 in -1..1; half of them went through JPEG.

    strange  share of pictures with another exposure, blur, and lines that waver by up to 1.6 pixels.
    """
    pixels = render(scene)
    if rng.random() < strange:
        pixels = _wavering(pixels, np.random.default_rng(between(rng, 0, 2**31)))
    if rng.random() < 0.5:
        pixels = np.asarray(Image.open(io.BytesIO(jpeg(pixels, 60 + int(rng.random() * 36)))))
    if pixels.shape[:2] != (size, size):
        pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    return pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0


def _wavering(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    h, w = pixels.shape[:2]
    bend = [
        np.asarray(
            Image.fromarray(rng.uniform(-1.6, 1.6, (6, 6)).astype(np.float32)).resize((w, h), Image.Resampling.BICUBIC)
        )
        for _ in range(2)
    ]
    y, x = np.mgrid[0:h, 0:w].astype(np.float32) + np.stack(bend)
    y, x = np.clip(y, 0, h - 1.001), np.clip(x, 0, w - 1.001)
    top, left = y.astype(int), x.astype(int)
    down, right = (y - top)[..., None], (x - left)[..., None]
    source = pixels.astype(np.float32)
    upper = source[top, left] * (1 - right) + source[top, left + 1] * right
    lower = source[top + 1, left] * (1 - right) + source[top + 1, left + 1] * right
    bent = upper * (1 - down) + lower * down
    if rng.random() < 0.4:
        blurred = Image.fromarray(np.clip(bent, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))
        bent = np.asarray(blurred, np.float32)
    bent = (bent - 128) * rng.uniform(0.65, 1.25) + 128 + rng.uniform(-35, 45)
    return np.clip(bent + rng.normal(0, rng.uniform(0, 6), bent.shape), 0, 255).astype(np.uint8)


def loose_caption(scene: Scene, rng: Any) -> str:
    """A caption that leaves attributes out at random, so that the loss cannot fall on colour alone."""
    parts = []
    for item in scene.in_reading_order():
        r = rng.random()
        if isinstance(item, Thing):
            if item.shape not in SHAPES:
                parts.append(a(f"{item.colour} object"))
            else:
                parts.append(a(item.shape if r < 0.4 or item.colour not in COLOURS else item.name))
        else:
            parts.append(f"the word {item.text}")
    return ", ".join(shuffled(rng, parts)) or "nothing"


class DenseHead(nn.Module):
    """One linear layer over the tokens: is there a shape with a name, a letter; colour, shape, letter; four
    coordinates; red, green and blue; coverage."""

    SPLITS = (2, len(COLOURS), len(SHAPES), len(LETTERS), 4 * (GRID + 1), 3, LOOK * LOOK)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, sum(self.SPLITS))

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.read(tokens).split(self.SPLITS, dim=-1)


Loose = tuple[int, int, tuple[int, ...]]
"""(picture, cell, other cells): a thing whose centre lies on a border, so that several cells may claim it."""


def dense_targets(scenes: list[Scene]) -> tuple[np.ndarray, list[Loose]]:
    """[N, 64, 7 + 3 + LOOK * LOOK]: colour, shape, letter, x0, y0, x1, y1 and a thing's look (0 to 255) at the cell of
    each percept, -1 elsewhere; and which of them may stand in another cell instead."""
    out = np.full((len(scenes), CELLS * CELLS, 7 + 3 + LOOK * LOOK), -1)
    loose: list[Loose] = []
    for i, scene in enumerate(scenes):
        found = percepts(scene)
        taken = {p.cell for p in found}
        for p in found:
            out[i, p.cell, :7] = (p.colour, p.shape, p.letter, *p.numbers)
            if p.thing:
                out[i, p.cell, 7:10] = rgb(p.thing.colour)
                out[i, p.cell, 10:] = 255 * thing_mask(p.thing.shape, LOOK).ravel()
            others = tuple(cell for cell in p.also if cell not in taken)
            if others:
                loose.append((i, p.cell, others))
    return out, loose


def settled(targets: Tensor, loose: list[Loose], there: Tensor) -> Tensor:
    """The targets with each thing on a border given to the cell that is surest of it.

    Which of two cells holds a centre between them cannot be seen; that exactly one of them claims it can be learned,
    and is what counting needs. there: [N, 64] logits.
    """
    targets, sure = targets.clone(), there.detach()
    for i, cell, others in loose:
        best = max((cell, *others), key=lambda other: float(sure[i, other]))
        if best != cell and targets[i, best, 3] < 0:
            targets[i, best] = targets[i, cell]
            targets[i, cell] = -1
    return targets


def dense_loss(read: tuple[Tensor, ...], targets: Tensor, loose: list[Loose]) -> tuple[Tensor, dict[str, float]]:
    """The grounded loss and its accuracies (objectness over cells, the rest over occupied cells)."""
    targets = settled(targets, loose, read[0][..., 0])
    there, colour, shape, letter, numbers, ink, cover = read
    coloured, shaped, lettered = (targets[..., i] >= 0 for i in range(3))
    thing = coloured | shaped
    wanted = torch.stack([shaped, lettered], -1).float()
    loss = 8 * F.binary_cross_entropy_with_logits(there.float(), wanted)
    loss = loss + F.cross_entropy(colour[coloured].float(), targets[..., 0][coloured])
    loss = loss + F.cross_entropy(shape[shaped].float(), targets[..., 1][shaped])
    for said, truth in ((ink, targets[..., 7:10]), (cover, targets[..., 10:])):
        loss = loss + 4 * F.mse_loss(said[thing].float(), truth[thing] / 127.5 - 1)
    scores = {
        "cells": ((there > 0) == (wanted > 0)).all(-1).all(-1).float().mean().item(),
        "count": ((there[..., 0] > 0).sum(1) == shaped.sum(1)).float().mean().item(),
        "colour": (colour[coloured].argmax(-1) == targets[..., 0][coloured]).float().mean().item(),
        "shape": (shape[shaped].argmax(-1) == targets[..., 1][shaped]).float().mean().item(),
    }
    if lettered.any():
        loss = loss + F.cross_entropy(letter[lettered].float(), targets[..., 2][lettered])
        scores["letter"] = (letter[lettered].argmax(-1) == targets[..., 2][lettered]).float().mean().item()
    occupied = thing | lettered
    guess = numbers[occupied].float().unflatten(-1, (4, GRID + 1))
    truth = targets[..., 3:7][occupied]
    loss = loss + 0.5 * F.cross_entropy(guess.flatten(0, 1), truth.flatten()) * 4
    scores["box"] = ((guess.argmax(-1) - truth).abs() <= 1).all(-1).float().mean().item()
    return loss, scores


class Contrast(nn.Module):
    """The SigLIP loss (Zhai et al., arXiv 2303.15343): each pair of a batch is its own yes-or-no question."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-5.0))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        logits = image @ text.T * self.scale.exp() + self.bias
        signs = 2 * torch.eye(len(image)) - 1
        return -F.logsigmoid(signs * logits).sum(1).mean()


def text_tower(tokenizer: Any) -> TinyTextTower:
    """What a vision tower's captions are read by while it is taught; it is not kept."""
    vocabulary = 8 * math.ceil(len(tokenizer) / 8)
    return TinyTextTower({"width": 64, "heads": 4, "length": LENGTH, "vocabulary": vocabulary, "out": 128})


def encode(tokenizer: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids [N, T] of captions, cut at LENGTH, and which of them are there [N, T]."""
    rows = [tokenizer(c, add_special_tokens=False).input_ids[:LENGTH] for c in captions]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    keep = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, keep


def train_vision(out: Path, folder: Path, tokenizer: Any, *, seed: int, steps: int, log: Log) -> dict[str, float]:
    """Trains the vision tower, and a text tower that is not kept; writes `out/vision.safetensors`."""
    torch.manual_seed(seed)
    tower = TinyVisionTower({"size": SIZE, "width": 128, "layers": 2, "heads": 4})
    text = text_tower(tokenizer)
    head, pool = DenseHead(128), nn.Linear(128, 128)
    contrast = Contrast()

    def draw(
        split: str, index: int, n: int, scene_of: Callable[[random.Random], Scene] = seen_scene, strange: float = 0.0
    ) -> tuple[Tensor, Tensor, list[Loose], list[str]]:
        rng = stream(seed, split, index)
        scenes = [scene_of(rng) for _ in range(n)]
        pixels = np.stack([picture_array(scene, rng, strange=strange) for scene in scenes])
        targets, loose = dense_targets(scenes)
        captions = [loose_caption(scene, rng) for scene in scenes]
        return torch.from_numpy(pixels), torch.from_numpy(targets), loose, captions

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        pixels, targets, loose, captions = draw("vision", step, 64, strange=STRANGE)
        with halves():
            tokens = tower(pixels)
            read = head(tokens)
            image = pool(tokens.amax(1))
            words = text(*encode(tokenizer, captions))
        dense, scores = dense_loss(read, targets, loose)
        return 0.5 * contrast(F.normalize(image.float(), dim=1), F.normalize(words.float(), dim=1)) + dense, scores

    parts = {"tower": tower, "text": text, "head": head, "pool": pool, "contrast": contrast}
    pretrain(parts, loss_of, steps=steps, rate=1.5e-3, clip=2.0, warmup=72, folder=folder, log=log)
    tower.eval()
    out.mkdir(parents=True, exist_ok=True)
    save_module(tower, out / "vision.safetensors")
    with torch.no_grad():
        pixels, targets, loose, captions = draw("vision-examination", 0, 1024, partial(sample_scene, word=0.5))
        tokens = tower(pixels)
        _, scores = dense_loss(head(tokens), targets, loose)
        image = F.normalize(pool(tokens[:512].amax(1)), dim=1)
        words = F.normalize(text(*encode(tokenizer, captions[:512])), dim=1)
        scores["retrieval@1 of 512"] = ((image @ words.T).argmax(1) == torch.arange(512)).float().mean().item()
        pixels, targets, *_ = draw("vision-held-out", 0, 1024, partial(sample_scene, word=0.5, novel_pairs=True))
        _, colour, shape, *_ = head(tower(pixels))
        wanted = targets[..., :2]
        pairs = torch.tensor([(COLOURS.index(c), SHAPES.index(s)) for c, s in sorted(HELD_OUT)])
        held_out = (wanted[:, :, None] == pairs).all(-1).any(-1)
        for i, (name, said) in enumerate((("colour", colour), ("shape", shape))):
            right = said[held_out].argmax(-1) == wanted[held_out][:, i]
            scores[f"{name} of held-out pairs"] = right.float().mean().item()
    return scores


def train_scorer(out: Path, folder: Path, tokenizer: Any, *, seed: int, steps: int, log: Log) -> dict[str, float]:
    """Trains the scorer on a noisy web draw of its own; writes `scorer.safetensors`. The figures compare fitting
    with bad captions on yet another draw: they examine it, they never teach it."""
    torch.manual_seed(seed)
    config = {
        "size": SIZE,
        "widths": [16, 32, 64, 64],
        "dim": 64,
        "text": {
            "width": 48,
            "heads": 4,
            "length": 48,
            "vocabulary": 8 * math.ceil(len(tokenizer) / 8),
            "out": 64,
        },
        "tokenizer": json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()), separators=(",", ":")),
    }
    model, contrast = TinyDualEncoder(config), Contrast()

    def draw(split: str, index: int, n: int) -> tuple[Tensor, list[str], list[str]]:
        pairs = [web_pair(seed, split, i) for i in range(index * n, (index + 1) * n)]
        rng = stream(seed, split + "/pixels", index)
        pixels = np.stack([picture_array(pair.scene, rng) for pair in pairs])
        return torch.from_numpy(pixels), [pair.caption for pair in pairs], [pair.words for pair in pairs]

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        pixels, captions, _ = draw("scorer-web", step, 128)
        with halves():
            image = model.embed_images(pixels)
            words = model.embed_texts(captions)
        return contrast(image, words), {}

    parts = {"model": model, "contrast": contrast}
    pretrain(parts, loss_of, steps=steps, rate=2e-3, clip=2.0, warmup=120, folder=folder, log=log)
    model.eval()
    out.mkdir(parents=True, exist_ok=True)
    save_module(model, out / "scorer.safetensors")
    with torch.no_grad():
        pixels, captions, fates = draw("scorer-examination", 0, 3000)
        scores = (model.embed_images(pixels) * model.embed_texts(captions)).sum(1).numpy()
    fits = np.array([fate == "fits" for fate in fates])
    order = scores.argsort().argsort()
    auc = (order[fits].sum() - fits.sum() * (fits.sum() - 1) / 2) / (fits.sum() * (~fits).sum())
    top = np.argsort(-scores)[:60]
    return {
        "auc of fitting against bad": float(auc),
        "fitting among the top 2 %": float(fits[top].mean()),
        **{f"score of {fate}": float(scores[[f == fate for f in fates]].mean()) for fate in ("fits", "wrong", "dull")},
    }
