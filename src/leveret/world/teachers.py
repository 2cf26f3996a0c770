"""How the drawn world's other towers (world/towers.py) are taught: a step's pictures, the teachers, the training.

A teacher is a module of (tower, drawn, step) to (loss, figures). Its own weights learn too and are thrown away;
`tower`, where it has one, is the tower to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leveret.model.tiny import TinyVisionTower, save_module
from leveret.world.distil import Distil
from leveret.world.pretrain import Log, halves, pretrain
from leveret.world.probe import probe
from leveret.world.scenes import LETTERS, PAIRS, Scene, between, stream
from leveret.world.towers import BATCH, TOWERS, file_of
from leveret.world.vision import STRANGE, Contrast, encode, loose_caption, picture_array, seen_scene, text_tower

WIDTH = 128
SHAPE = {"width": WIDTH, "layers": 2, "heads": 4}
"""That of `world/vision`."""
Loss = tuple[Tensor, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's pictures: pixels [n, 3, S, S] in -1..1, their scenes, a caption of each, and a seed for what a
    teacher does with them."""

    pixels: Tensor
    scenes: list[Scene]
    captions: list[str]
    seed: int


def drawn(seed: int, step: int, size: int, n: int) -> Drawn:
    """The pictures of a step: the same scenes, spoiled alike, for every tower; only their size may differ."""
    rng = stream(seed, "towers", step)
    scenes = [seen_scene(rng) for _ in range(n)]
    pixels = np.stack([picture_array(scene, rng, strange=STRANGE, size=size) for scene in scenes])
    captions = [loose_caption(scene, rng) for scene in scenes]
    return Drawn(torch.from_numpy(pixels), scenes, captions, between(rng, 0, 2**31))


class Captions(nn.Module):
    """Each picture with its own caption, and with none of the others' (SigLIP, arXiv 2303.15343)."""

    def __init__(self, tower: TinyVisionTower, tokenizer: Any) -> None:
        super().__init__()
        self.text = text_tower(tokenizer)
        self.pool, self.contrast = nn.Linear(WIDTH, WIDTH), Contrast()
        self.tokenizer = tokenizer

    def forward(self, tower: TinyVisionTower, seen: Drawn, step: int) -> Loss:
        image = F.normalize(self.pool(tower(seen.pixels).amax(1)).float(), dim=1)
        words = F.normalize(self.text(*encode(self.tokenizer, seen.captions)).float(), dim=1)
        found = (image @ words.T).argmax(1) == torch.arange(len(image))
        return self.contrast(image, words), {"retrieval": found.float().mean().item()}


class Labels(nn.Module):
    """Which of the drawn colour-shape pairs and of the letters are in the picture: a yes or no each, no place. What
    has no name is no label; of the pairs that are held out there is none to give."""

    NAMES = (*PAIRS, *LETTERS)

    def __init__(self, tower: TinyVisionTower, tokenizer: Any) -> None:
        super().__init__()
        self.read = nn.Linear(WIDTH, len(self.NAMES))
        self.place = {name: at for at, name in enumerate(self.NAMES)}

    def truth(self, scenes: list[Scene]) -> Tensor:
        """[N, labels], 0 or 1."""
        out = torch.zeros(len(scenes), len(self.NAMES))
        for i, scene in enumerate(scenes):
            there = [(thing.colour, thing.shape) for thing in scene.things]
            for name in (*there, *(scene.word.text if scene.word else ())):
                if name in self.place:
                    out[i, self.place[name]] = 1
        return out

    def forward(self, tower: TinyVisionTower, seen: Drawn, step: int) -> Loss:
        said, truth = self.read(tower(seen.pixels).amax(1)).float(), self.truth(seen.scenes)
        loss = F.binary_cross_entropy_with_logits(said, truth, reduction="sum") / len(truth)
        hit = ((said > 0) & (truth > 0)).sum() / truth.sum().clamp(min=1)
        return loss, {"found": hit.item()}


TEACHERS: dict[str, Callable[[TinyVisionTower, Any], nn.Module]] = {
    "captions": Captions,
    "labels": Labels,
    "itself": Distil,
}
"""(tower, tokenizer) -> teacher."""


def train_tower(
    name: str,
    out: Path,
    folder: Path,
    tokenizer: Any,
    *,
    seed: int,
    steps: int,
    log: Log,
    save_every: int = 100,
    stop_after: int | None = None,
) -> dict[str, float]:
    """Trains the tower `name` of TOWERS, or continues; writes `out/towers/NAME.safetensors` and returns its probe.

    A pure function of (name, seed, steps) on one machine, however often it is stopped. Raises Interrupted, with the
    state saved in `folder`, when a stop is asked for. With `stop_after` it leaves after that step, writes no tower and
    returns {}.
    """
    kind = TOWERS[name]
    torch.manual_seed(seed)
    tower = TinyVisionTower({"size": kind.size, **SHAPE})
    teacher = TEACHERS[kind.teacher](tower, tokenizer)

    def loss_of(step: int) -> Loss:
        seen = drawn(seed, step, kind.size, BATCH)
        with halves():
            loss, figures = teacher(tower, seen, step)
        return loss, figures

    pretrain(
        {"tower": tower, "teacher": teacher}, loss_of, steps=steps, rate=1.5e-3, clip=2.0, warmup=72, folder=folder,
        log=log, save_every=save_every, stop_after=stop_after,
    )  # fmt: skip
    if stop_after is not None and stop_after < steps:
        return {}
    kept = getattr(teacher, "tower", tower).eval()
    file_of(out, name).parent.mkdir(parents=True, exist_ok=True)
    save_module(kept, file_of(out, name))
    return probe(kept, seed)
