"""The best model of a stage by a metric of its validations.

    STAGE/best/step-N/     the state that validated best so far, the files of STAGE/state/step-N once more (hard links)
    STAGE/best/model/      made of it when the stage is done; STAGE/done names it

With `keep_best` a state is saved at every validation, so which one is best is read off validation.jsonl, and a run that
goes on from an older state finds the best as it stood then.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import RecipeError, closest, link_folder, read_jsonl
from leveret.train import state

if TYPE_CHECKING:
    from leveret.train.optim import Trainable
    from leveret.train.stages import KeepBest


def value_of(found: Mapping[str, Any], metric: str) -> float | None:
    """A metric by its dotted name; None where it is not there or no finite number."""
    here: Any = found
    for key in metric.split("."):
        here = here.get(key) if isinstance(here, Mapping) else None
    good = isinstance(here, (int, float)) and not isinstance(here, bool) and math.isfinite(here)
    return float(here) if good else None


def names_of(found: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all numbers in what a validation gave, but for its step."""
    names = []
    for key, item in found.items():
        if isinstance(item, Mapping):
            names += names_of(item, f"{prefix}{key}.")
        elif isinstance(item, (int, float)) and not isinstance(item, bool) and f"{prefix}{key}" != "step":
            names.append(f"{prefix}{key}")
    return names


def check(how: KeepBest, found: Mapping[str, Any], stage: str) -> None:
    """RecipeError when validations do not give the metric at all. One that is no number this once is passed over."""
    here: Any = found
    for key in how.metric.split("."):
        if not isinstance(here, Mapping) or key not in here:
            known = names_of(found)
            near = ", ".join(closest(how.metric, known) or known) or "nothing"
            raise RecipeError(
                f"stages.{stage}.keep_best.metric: {how.metric!r} given, but the validations of this stage give {near}"
            )
        here = here[key]


def of(rows: Sequence[Mapping[str, Any]], how: KeepBest, until: int) -> tuple[int, float] | None:
    """(step, value) of the best of the validations up to a step; of equal ones the first."""
    sign = 1 if how.mode == "min" else -1
    found = [(sign * value, row["step"]) for row in rows if (value := value_of(row, how.metric)) is not None]
    found = [(value, step) for value, step in found if step <= until]
    return (min(found)[1], sign * min(found)[0]) if found else None


def settle(folder: Path, how: KeepBest | None, kept: Collection[int]) -> None:
    """Bring STAGE/best up to date: it holds the best state as it stands at each of the steps `kept`, which a run may go
    on from, and no other. Without `how` there is none to hold."""
    best, states = folder / "best", folder / "state"
    if how is None:
        if best.exists() and not (best / "model").exists():
            shutil.rmtree(best, ignore_errors=True)
        return
    there = {*state.steps(best), *state.steps(states)}
    rows = [row for row in _validations(folder) if row["step"] in there]
    wanted = {found[0] for step in kept if (found := of(rows, how, step)) is not None}
    for step in wanted - set(state.steps(best)):
        link_folder(states / f"step-{step:08d}", best / f"step-{step:08d}")
    if best.exists():
        state.prune(best, wanted)


def _validations(folder: Path) -> list[dict[str, Any]]:
    path = folder / "validation.jsonl"
    return read_jsonl(path) if path.exists() else []


def finish(
    folder: Path, how: KeepBest, total: int, again: Callable[[], tuple[Any, Sequence[Trainable], Callable[[], None]]]
) -> dict[str, Any] | None:
    """Make STAGE/best/model of the best state; returns what `done` says of it, None where no validation gave a number.

    again  builds the stage's model anew: the model, what learns in it, and what merges its adapters.
    """
    import torch

    from leveret.model import checkpoint

    best = folder / "best"
    there = [step for step in state.steps(best) if not _damaged(best / f"step-{step:08d}")]
    rows = [row for row in _validations(folder) if row["step"] in there]
    found = of(rows, how, total)
    if found is None:
        print(f"{folder.name}: no validation gave {how.metric} as a number; no best model", file=sys.stderr, flush=True)
        return None
    step, value = found
    facts = {"metric": how.metric, "mode": how.mode, "value": value, "step": step, "model": "best/model"}
    if step == total:
        link_folder(folder / "model", best / "model")
        return facts
    vlm, trainables, merge = again()
    tensors, _ = state.load(best / f"step-{step:08d}")
    with torch.no_grad():
        for one in trainables:
            one.value.copy_(tensors[f"weight.{one.name}"])
    vlm.eval()
    merge()
    checkpoint.save(vlm, best / "model")
    return facts


def _damaged(saved: Path) -> bool:
    if wrong := state.fault(saved):
        print(f"the best state {saved} is damaged: {wrong}; passed over", file=sys.stderr, flush=True)
    return bool(wrong)
