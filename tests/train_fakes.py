"""A toy set to teach a tiny model: one-coloured pictures and their colour. Written once per test process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
from leveret.train.stages import TrainRecipe

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40)}


def toy_set(folder: Path, count: int = 24) -> Path:
    """LLaVA JSON of `count` pictures, each asked for its colour; some answers are longer than others."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        name = list(COLOURS)[number % len(COLOURS)]
        shade = tuple(max(0, value - 3 * number) for value in COLOURS[name])
        Image.new("RGB", (40, 32), shade).save(folder / f"{number}.png")
        answer = name if number % 3 else f"the colour is {name}"
        turns = [{"from": "human", "value": "<image>\nwhat colour is it ?"}, {"from": "gpt", "value": answer}]
        records.append({"id": f"toy-{number}", "image": f"{number}.png", "conversations": turns})
    path = folder / "toy.json"
    path.write_text(json.dumps(records), "utf-8")
    return path


def recipe(data: Path, stages: dict[str, Any] | None = None, **stage: Any) -> TrainRecipe:
    """A one-stage recipe on the toy set (fp32, one rank) with fields of the stage changed; or stages of its own."""
    plain = {
        "data": str(data), "learn": {"connector": {"lr": 5e-3}, "language": {"lr": 5e-3}}, "steps": 6, "batch": 8,
        "precision": "fp32", "max_tokens": 128,
    }  # fmt: skip
    named = {name: {**plain, **own} for name, own in (stages or {"tune": stage}).items()}
    return TrainRecipe.model_validate(
        {"name": "toy", "model": fakes.tiny_recipe().model_dump(), "stages": named, "ranks": 1, "device": "cpu"}
    )
