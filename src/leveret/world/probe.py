"""What the frozen tokens of a small tower hold: linear reads of them on fresh scenes of the drawn world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leveret.model.tiny import TinyVisionTower, load_module
from leveret.world.scenes import (
    COLOURS,
    GRID,
    LETTER_HEIGHT,
    LETTER_PITCH,
    LETTERS,
    SHAPES,
    Scene,
    sample_scene,
    stream,
)
from leveret.world.vision import picture_array


@dataclass(frozen=True, slots=True)
class _Read:
    """Tokens at the centres of things [n, W] with colour, shape and box [n, 4] in 0..GRID; at letters with the letter;
    means of all tokens of a picture [N, 2W] (and their maxima) with the number of things."""

    things: Tensor
    colours: Tensor
    shapes: Tensor
    boxes: Tensor
    letters: Tensor
    which: Tensor
    pictures: Tensor
    counts: Tensor


@torch.no_grad()
def _read(tower: nn.Module, seed: int, split: str, n: int, **options: Any) -> _Read:
    size, grid = int(tower.config["size"]), int(tower.config["size"]) // 8  # type: ignore[index, arg-type]
    rng = stream(seed, split, 0)
    scenes = [sample_scene(rng, word=0.5, **options) for _ in range(n)]
    pixels = torch.from_numpy(np.stack([picture_array(scene, rng, size=size) for scene in scenes]))
    tokens = torch.cat([tower(part) for part in pixels.split(256)])
    found: dict[str, list[Any]] = {key: [] for key in ("things", "colours", "shapes", "boxes", "letters", "which")}

    def at(i: int, x: float, y: float, scene: Scene) -> Tensor:
        row, column = (min(int(share * grid), grid - 1) for share in (y / scene.height, x / scene.width))
        return tokens[i, row * grid + column]

    for i, scene in enumerate(scenes):
        # of a scene with a held-out pair, that thing alone: the others are like all others
        for thing in scene.things[:1] if options.get("novel_pairs") else scene.things:
            found["things"].append(at(i, *thing.centre, scene))
            found["colours"].append(COLOURS.index(thing.colour))
            found["shapes"].append(SHAPES.index(thing.shape))
            found["boxes"].append(scene.numbers(thing.box))
        for place, letter in enumerate(scene.word.text if scene.word else ""):
            assert scene.word is not None
            x = scene.word.x0 + (place + 0.5) * LETTER_PITCH
            found["letters"].append(at(i, x, scene.word.y0 + LETTER_HEIGHT / 2, scene))
            found["which"].append(LETTERS.index(letter))
    return _Read(
        things=torch.stack(found["things"]),
        colours=torch.tensor(found["colours"]),
        shapes=torch.tensor(found["shapes"]),
        boxes=torch.tensor(found["boxes"]),
        letters=torch.stack(found["letters"]),
        which=torch.tensor(found["which"]),
        pictures=torch.cat([tokens.mean(1), tokens.amax(1)], 1),
        counts=torch.tensor([len(scene.things) - 1 for scene in scenes]),
    )


def _linear(x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], outputs: int) -> Callable[[Tensor], Tensor]:
    """The best linear read of x [n, W] for y under a loss: L-BFGS from zero, so no seed."""
    mean, spread = x.mean(0), x.std(0) + 1e-5
    weight = torch.zeros(x.shape[1], outputs, requires_grad=True)
    bias = torch.zeros(outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")
    scaled = (x - mean) / spread

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(scaled @ weight + bias, y) + 1e-4 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return lambda new: ((new - mean) / spread @ weight + bias).detach()


def _sides(said: Tensor, numbers: Tensor) -> Tensor:
    """Cross-entropy of the four numbers of a box, each one of GRID + 1."""
    return F.cross_entropy(said.unflatten(1, (4, GRID + 1)).flatten(0, 1), numbers.flatten())


def probe(tower: nn.Module, seed: int, *, taught: int = 2048, asked: int = 1024) -> dict[str, float]:
    """What linear reads of a frozen tower's tokens get right on fresh scenes of the world.

    colour, shape (of 8) and box are read at the token where a thing's centre lies, letter (of 12) at a letter's, count
    (of 1 to 4) from the mean and the greatest of all tokens. A box is right when each of its four numbers, told among
    33 as the world tells them, is at most one off. The reads learn from `taught` pictures and are asked on `asked`
    others; colour and shape also of the eight pairs that no picture showed.
    """
    tower.eval()
    own, new = _read(tower, seed, "towers/probe", taught), _read(tower, seed, "towers/asked", asked)
    held_out = _read(tower, seed, "towers/held-out", asked, novel_pairs=True)
    figures: dict[str, float] = {}

    def share(read: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
        return float((read(x).argmax(1) == y).float().mean())

    for name, truth, classes in (("colour", "colours", len(COLOURS)), ("shape", "shapes", len(SHAPES))):
        read = _linear(own.things, getattr(own, truth), F.cross_entropy, classes)
        figures[name] = share(read, new.things, getattr(new, truth))
        figures[f"{name} of held-out pairs"] = share(read, held_out.things, getattr(held_out, truth))
    read = _linear(own.letters, own.which, F.cross_entropy, len(LETTERS))
    figures["letter"] = share(read, new.letters, new.which)
    read = _linear(own.things, own.boxes, _sides, 4 * (GRID + 1))
    off = (read(new.things).unflatten(1, (4, GRID + 1)).argmax(2) - new.boxes).abs()
    figures["box"] = float((off <= 1).all(1).float().mean())
    read = _linear(own.pictures, own.counts, F.cross_entropy, 4)
    figures["count"] = share(read, new.pictures, new.counts)
    return figures


def references(seed: int) -> dict[str, dict[str, float]]:
    """The probe of the shipped grounded tower and of one with random weights: what the others stand between."""
    from leveret.model.hub import package_file

    torch.manual_seed(seed)
    untaught = TinyVisionTower({"size": 64, "width": 128, "layers": 2, "heads": 4})
    grounded = load_module(TinyVisionTower, package_file("world/weights/vision.safetensors", "world/vision"))
    return {"random weights": probe(untaught, seed), "vision, as shipped": probe(grounded, seed)}
