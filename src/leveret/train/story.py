"""A training run as its folder tells it: running, stopped or finished; read only, at any moment."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leveret.runs import DataError, RecipeError, is_held, kept_recipe, read_json, read_jsonl

RECENT = 50
"""Steps that the present speed is told from."""


@dataclass(frozen=True, slots=True)
class StageStory:
    """One stage. state: done, running, stopped, or not begun. total: its steps; None before its data are known.

    rows         metrics.jsonl. validations: validation.jsonl. samples: samples.jsonl.
    about        stage.json: parts, notes, what the data came to; empty for a run of an older leveret.
    quarantined  reason -> samples that cannot be used, those whose image failed while training too.
    best         what `done` says of the best model.
    """

    name: str
    folder: Path
    state: str
    total: int | None
    recipe: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = ()
    validations: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    quarantined: Mapping[str, int] = field(default_factory=dict)
    best: Mapping[str, Any] | None = None

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    def figures(self) -> dict[str, Any]:
        """What stands in tables: the loss now (smoothed), speeds over the whole stage, shares, memory, times in
        seconds. None where a figure is not known."""
        seconds = _sum(self.rows, "seconds")
        recent = self.rows[-RECENT:]
        pace = (_sum(recent, "seconds") or 0) / len(recent) if recent else 0.0
        tokens, positions = _sum(self.rows, "tokens"), _sum(self.rows, "positions")
        waiting = _sum(self.rows, "waiting")
        losses = smooth([row["loss"] for row in self.rows if row.get("loss") is not None])
        return {
            "state": self.state,
            "step": self.step,
            "steps": self.total,
            "loss": losses[-1] if losses else None,
            "samples": _sum(self.rows, "samples"),
            "samples_per_second": _per(_sum(self.rows, "samples"), seconds),
            "tokens_per_second": _per(tokens, seconds),
            "padding": None if not positions or tokens is None else 1 - tokens / positions,
            "waiting": _per(waiting, seconds),
            "memory": max((row["memory"] for row in self.rows if row.get("memory")), default=None),
            "seconds": seconds,
            "left": (self.total - self.step) * pace if self.total and self.state != "done" and self.rows else None,
            "skipped": sum(1 for row in self.rows if row.get("skipped")),
            "quarantined": dict(self.quarantined),
            "best": self.best,
            "validation": dict(self.validations[-1]) if self.validations else None,
        }


@dataclass(frozen=True, slots=True)
class Story:
    """A run. state: finished, running or stopped."""

    path: Path
    name: str
    state: str
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    stages: Sequence[StageStory]
    changes: Sequence[Mapping[str, Any]]

    def facts(self) -> dict[str, Any]:
        """The figures as plain data."""
        stages = {stage.name: stage.figures() for stage in self.stages}
        return {"run": str(self.path), "recipe": self.name, "state": self.state, "stages": stages,
                "changes": [dict(change) for change in self.changes]}  # fmt: skip


def _sum(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The sum of a field; None where a row of an older leveret lacks it."""
    found = [row.get(name) for row in rows]
    return sum(found) if found and None not in found else None  # type: ignore[arg-type]


def _per(amount: float | None, seconds: float | None) -> float | None:
    return None if amount is None or not seconds else amount / seconds


def smooth(values: Sequence[float]) -> list[float]:
    """A running mean that forgets, over about a twentieth of the values; unbiased from the first one on."""
    keep = 1 - 2 / (max(5, len(values) // 20) + 1)
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def _trains(environment: Path) -> bool:
    return bool(read_json(environment).get("kind") == "train")


def read(path: str | Path) -> Story:
    """The story of a run folder. DataError where it holds no training run; nothing is written and nothing is locked."""
    path = Path(path)
    if not (path / "recipe.yaml").is_file():
        raise DataError(
            f"{path} holds no training run: there is no recipe.yaml. Name the folder that `train -o` filled"
        )
    environment = read_json(path / "environment.json")
    if environment.get("kind") != "train":
        inside = next((entry.parent for entry in sorted(path.glob("*/environment.json")) if _trains(entry)), None)
        mend = f": name {inside}" if inside else ""
        raise RecipeError(f"{path} holds a `{environment.get('kind')}` run; only training runs are told here{mend}")
    if (path / "command.json").is_file():
        recipe = read_json(path / "command.json")["recipe"]
    else:
        recipe = kept_recipe(path)
    running = is_held(path)
    stages = [_stage(path / name, name, how, running) for name, how in recipe["stages"].items()]
    done = all(stage.state == "done" for stage in stages)
    state = "finished" if done else "running" if running else "stopped"
    name = recipe.get("name", path.name)
    return Story(path, name, state, recipe, environment, stages, _lines(path / "changes.jsonl"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.is_file() else []


def _stage(folder: Path, name: str, how: Mapping[str, Any], running: bool) -> StageStory:
    done = read_json(folder / "done") if (folder / "done").is_file() else None
    about = read_json(folder / "stage.json") if (folder / "stage.json").is_file() else {}
    begun = bool(about) or (folder / "metrics.jsonl").is_file() or (folder / "cache").is_dir()
    state = "done" if done else ("running" if running else "stopped") if begun else "not begun"
    return StageStory(
        name, folder, state,
        total=(done or about).get("steps") or how.get("steps"),
        recipe=how,
        rows=_lines(folder / "metrics.jsonl"),
        validations=_lines(folder / "validation.jsonl"),
        samples=_lines(folder / "samples.jsonl"),
        about=about,
        # A sample whose image fails while training is named each time it comes.
        quarantined=Counter(reason for _, reason in {
            (str(row.get("id")), str(row.get("reason"))) for row in _lines(folder / "quarantine.jsonl")
        }),
        best=(done or {}).get("best"),
    )  # fmt: skip


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    if not folder.is_dir():
        raise RecipeError(
            f"the command was given in {folder}, which is no folder any more; give the command itself again"
        )
    with contextlib.chdir(folder):
        yield


def again(path: str | Path, *, allow_change: bool = False) -> Path:
    """Go on with a run by its own command: the same recipe with its overrides, the same stages, in the folder the
    command was given in, which relative paths start from. Returns the model's folder, at once where all is done.

    Raises as `train` does; DataError or RecipeError where the folder holds no training run, or no command.
    """
    from leveret.train.run import train
    from leveret.train.stages import TrainRecipe

    path = Path(path).resolve()
    read(path)
    if not (path / "command.json").is_file():
        raise RecipeError(f"{path} was begun by an older leveret, which kept no command: give the command itself again")
    command = read_json(path / "command.json")
    with _inside(Path(command["folder"])):
        recipe = TrainRecipe.model_validate(command["recipe"])
        return train(recipe, path, stages=command["stages"], allow_change=allow_change)
