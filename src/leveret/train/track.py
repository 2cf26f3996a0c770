"""Dashboards that get what metrics.jsonl gets: TensorBoard and Weights & Biases.

    STAGE/tensorboard/    events; made anew from metrics.jsonl whenever a run goes on (tensorboard --logdir RUN)
    STAGE/wandb.json      id of the stage's run there, and the last step it was given

metrics.jsonl is the truth, without gaps or repeats; a dashboard is a copy of it. A run that goes on writes no step
twice, and brings up the steps that a killed one wrote down here and had not yet sent. A dashboard that fails while a
stage is taught is named once and left alone: it is not worth a run.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from leveret.runs import EnvironmentFault, read_json, read_jsonl, write_json

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check(names: Sequence[str]) -> None:
    """EnvironmentFault naming every dashboard whose package is not installed."""
    from importlib import import_module

    missing = []
    for name in names:
        try:
            import_module(_MODULES[name])
        except ImportError:
            missing.append(name)
    if missing:
        raise EnvironmentFault(
            f"track: {' and '.join(missing)} asked for, but not installed. To mend it: pip install 'leveret[track]'; "
            "or leave it out, metrics.jsonl is always written"
        )


def scalars(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All finite numbers of a row by their names, `lr/vision` for one in another; without its step."""
    found: dict[str, float] = {}
    for key, item in row.items():
        if isinstance(item, Mapping):
            found |= scalars(item, f"{prefix}{key}/")
        elif isinstance(item, (int, float)) and not isinstance(item, bool) and f"{prefix}{key}" != "step":
            found[f"{prefix}{key}"] = item
    return found


class Board(Protocol):
    """One dashboard of one stage."""

    def log(self, step: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files. Those of an earlier session are dropped: what they held is written again by `Tracking`."""

    first = 1

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        for name, text in texts.items():
            self.writer.add_text(name, text, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One run there for each stage. `first` is the first step it has not been given."""

    def __init__(self, folder: Path, name: str, recipe: Mapping[str, Any]) -> None:
        import wandb

        self.file = folder / "wandb.json"
        self.told: dict[str, Any] = (
            read_json(self.file) if self.file.exists() else {"id": secrets.token_hex(4), "step": 0}
        )
        try:
            self.run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "leveret"), id=self.told["id"], resume="allow", name=name,
                dir=str(folder), config=dict(recipe),
            )  # fmt: skip
        except Exception as error:  # its own classes, and those of whatever it speaks through
            raise EnvironmentFault(
                f"wandb did not start ({error}). WANDB_MODE=offline keeps everything on this disk; or leave it out of "
                "`track`"
            ) from error
        # What the server has counts; where it cannot be asked (offline), what this side sent.
        self.first = int(self.run.step) if getattr(self.run, "resumed", False) else self.told["step"] + 1
        write_json(self.file, self.told)
        self.mark = os.open(self.file, os.O_WRONLY)

    def log(self, step: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None:
        if step > self.told["step"]:
            # Written down before it is sent: after a kill a step may be missing there, and is never there twice.
            self.told["step"] = step
            line = f'{{"id": "{self.told["id"]}", "step": {step}}}\n'.encode()
            os.pwrite(self.mark, line.ljust(os.fstat(self.mark).st_size), 0)
        self.run.log({**values, **texts}, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        os.close(self.mark)
        self.run.finish()


class Tracking:
    """The dashboards of one stage, brought up to a step and then given each row."""

    def __init__(self, names: Sequence[str], folder: Path, name: str, recipe: Mapping[str, Any]) -> None:
        """names: of `track`. folder: the stage's; its metrics.jsonl is already cut back to where the run goes on."""
        self.boards: dict[str, Any] = {}
        for kind in names:
            self.boards[kind] = TensorBoard(folder) if kind == "tensorboard" else WandB(folder, name, recipe)
        self._catch_up(folder)

    def _catch_up(self, folder: Path) -> None:
        if not self.boards:
            return
        rows: dict[int, tuple[dict[str, float], dict[str, str]]] = {}
        for file, prefix in (("metrics.jsonl", ""), ("validation.jsonl", "validation/"), ("samples.jsonl", "")):
            for row in read_jsonl(folder / file) if (folder / file).exists() else []:
                values, texts = rows.setdefault(row["step"], ({}, {}))
                if file == "samples.jsonl":
                    texts.update(_texts([row]))
                else:
                    values.update(scalars(row, prefix))
        for step in sorted(rows):
            self._give(step, *rows[step])

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""
        self._give(row["step"], scalars(row), {})

    def validated(self, step: int, found: Mapping[str, Any], texts: Sequence[Mapping[str, Any]]) -> None:
        """What a validation gave; it belongs to the step that `log` was given last."""
        self._give(step, scalars(found, "validation/"), _texts(texts))

    def _give(self, step: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None:
        for name, board in list(self.boards.items()):
            if step >= board.first:
                self._try(name, lambda board=board: board.log(step, values, texts))

    def flush(self) -> None:
        for name, board in list(self.boards.items()):
            self._try(name, board.flush)

    def _try(self, name: str, work: Any) -> None:
        try:
            work()
        except Exception as error:
            self.boards.pop(name)
            print(f"{name} failed and is left alone from here on: {error}", file=sys.stderr, flush=True)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for board in self.boards.values():
            with contextlib.suppress(Exception):
                board.close()


def _texts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {f"answers/{row.get('id', place)}": str(row.get("answer", "")) for place, row in enumerate(rows)}
