"""What rank 0 writes down while a stage is taught, and what a person sees of it meanwhile.

    STAGE/metrics.jsonl     one line per step
    STAGE/validation.jsonl  one line per validation
    STAGE/samples.jsonl     one line per text that a validator handed in (`texts`), with its step

A stage that goes on from an older state cuts all three back to it. Two runs of one recipe differ in the fields of
`state.MEASURED` alone.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from leveret.runs import Progress, atomic_write, in_bytes, read_jsonl
from leveret.train import best, state
from leveret.train.track import Tracking

if TYPE_CHECKING:
    from leveret.train.loop import Job
    from leveret.train.stages import StageRecipe


def peak_memory(device: str) -> int:
    """Bytes that this process has held at most: of the GPU's memory where it computes there, else of the machine's."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _cut(quarantine: Path, step: int) -> None:
    """Take out what later steps named: they come again. Lines of the data's preparation have no step."""
    if quarantine.exists():
        rows = read_jsonl(quarantine)
        kept = [row for row in rows if row.get("step", 0) <= step]
        if len(kept) < len(rows):
            atomic_write(quarantine, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


class Watch:
    """The files, dashboards and progress of one stage."""

    def __init__(self, job: Job, stage: StageRecipe, folder: Path, step: int, samples: int, validates: bool) -> None:
        """step: the one the stage goes on from. samples: those that are left. validates: whether anything will."""
        self.job, self.stage, self.folder, self.step = job, stage, folder, step
        self._stack = contextlib.ExitStack()
        _cut(folder / "quarantine.jsonl", step)
        self.metrics = self._open("metrics.jsonl")
        self.validation = self._open("validation.jsonl") if validates else None
        self.texts = self._open("samples.jsonl") if (folder / "samples.jsonl").exists() else None
        run = f"{folder.parent.name}/{job.stage}"
        self.tracking = self._stack.enter_context(Tracking(job.recipe.get("track", ()), folder, run, job.recipe))
        self.progress = self._stack.enter_context(Progress(max(0, samples), job.stage, "samples"))

    def _open(self, name: str) -> state.Metrics:
        log = state.Metrics(self.folder / name, self.step)
        self._stack.callback(log.close)
        return log

    def log(self, row: dict[str, Any], *, skipped: int, failed: int) -> None:
        """One step: its row, and how many steps were skipped and samples failed so far."""
        self.metrics.log(**row)
        self.tracking.log(row)
        seconds = row["seconds"]
        self.progress.advance(
            row["samples"], step=f"{row['step']}/{self.job.total}", loss=row["loss"],
            **{"tokens/s": row["tokens"] / seconds if seconds else 0.0},
            padding=f"{1 - row['tokens'] / row['positions']:.0%}", memory=in_bytes(row["memory"]),
            waiting=f"{row['waiting'] / seconds if seconds else 0:.0%}",
            **({"skipped": skipped} if skipped else {}),
            **({"failed": failed} if failed else {}),
        )  # fmt: skip

    def validated(self, step: int, found: Mapping[str, Any]) -> None:
        """What the validators gave at a step. RecipeError when `keep_best` names what they do not give."""
        texts = list(found.get("texts", ()))
        found = {key: value for key, value in found.items() if key != "texts"}
        assert self.validation is not None
        self.validation.log(step=step, **found)
        self.validation.flush()
        if texts and self.texts is None:
            self.texts = self._open("samples.jsonl")
        for text in texts:
            assert self.texts is not None
            self.texts.log(**{"step": step, **text})
        if texts and self.texts is not None:
            self.texts.flush()
        self.tracking.validated(step, found, texts)
        if self.stage.keep_best is not None:
            best.check(self.stage.keep_best, found, self.job.stage)

    def flush(self) -> None:
        """Force what is written to the disk: done before a state that stands on it is committed."""
        self.metrics.flush()
        self.tracking.flush()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)
