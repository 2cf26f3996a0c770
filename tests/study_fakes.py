"""A tiny study, and units that cost nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leveret.runs import read_json
from leveret.study.files import StudyRecipe
from leveret.study.kinds import KINDS, Kind

TINY: dict[str, Any] = {
    "name": "tiny",
    "title": "A tiny study",
    "world": {"web": 200, "tune": 60, "test": 12, "captions": 0},
    "choose": {"recipe": "world", "set": ["steps.budget.count=40", "steps.cluster.k=4"]},
    "train": ["stages.align.steps=3", "stages.tune.steps=3"],
    "seeds": [0, 1],
    "axes": {
        "length": {
            "question": "Does longer tuning help?",
            "base": "usual",
            "levels": {
                "usual": {"about": "three steps"},
                "longer": {"train": ["stages.tune.steps=4"]},
                "mean": {"average": {"levels": ["usual", "longer"]}},
            },
        }
    },
    "claims": [{"paper": "none", "says": "longer is better", "axis": "length", "level": "longer", "expect": "higher"}],
}


def study(**changes: Any) -> StudyRecipe:
    return StudyRecipe.model_validate({**TINY, **changes})


def axis(**levels: Any) -> dict[str, Any]:
    return {"question": "?", "base": next(iter(levels)), "levels": levels}


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Units that cost nothing: a model is worth its steps; what was made, in order."""
    made: list[str] = []

    def making(kind: str) -> Any:
        def make(place: Path, settings: Any, inputs: Any) -> dict[str, Any]:
            made.append(kind)
            if kind == "draw":
                (place / "world").mkdir()
            if kind == "embed":
                (place / "embeddings").mkdir()
            if kind == "choose":
                (place / "coreset").mkdir()
                (place / "pairs.json").touch()
            if kind in ("teach", "average"):
                (place / "run").mkdir(exist_ok=True)
            if kind == "teach":
                share = 1 + settings["recipe"].get("seed", 0) / 100
                return {"trainable": 7, "worth": settings["how"]["steps"] * share}
            if kind == "average":
                return {"worth": sum(read_json(one / "done.json")["worth"] for one in inputs.values()) / len(inputs)}
            if kind == "examine":
                worth = read_json(inputs["model"] / "done.json")["worth"]
                return {"tasks": {name: {"score": worth / 100, "n": 5} for name in ("colour", "count", "word")}}
            return {}

        return make

    for kind, row in list(KINDS.items()):
        monkeypatch.setitem(KINDS, kind, Kind(making(kind), row.read, row.heavy))
    return made
