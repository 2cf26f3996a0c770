"""What a stage must remember to go on as if nothing had happened: trainable weights, moments, and a step.

    STAGE/state/step-00000200/{state.safetensors, state.json}

A state is written into a temporary folder, flushed to the disk and renamed: the rename is the commit. The one before
is removed only after it. Randomness needs no state, since every draw is a pure function of (seed, stage, step, rank).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import DataError, RecipeError, differences, read_json, sync_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

_TEMPORARY = ".writing-"


def random_seed(seed: int, stage: str, step: int, rank: int) -> int:
    """A 63-bit seed for everything random in one step on one rank."""
    key = f"{seed}/{stage}/{step}/{rank}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def flush(path: Path) -> None:
    """Force a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write the state of `step` under `folder`; whatever happens meanwhile, a complete state stays there."""
    from safetensors.torch import save_file

    final, writing = folder / f"step-{step:08d}", folder / f"{_TEMPORARY}{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, writing / "state.safetensors")
    flush(writing / "state.safetensors")
    write_json(writing / "state.json", {"step": step, **facts})
    if final.exists():
        shutil.rmtree(final)
    writing.rename(final)
    sync_folder(folder)
    for old in sorted(folder.glob("step-*")):
        if old != final:
            shutil.rmtree(old)
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete state under `folder`. What an interrupted write left behind is not one."""
    return max(folder.glob("step-*"), default=None)


def load(state: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a state. DataError when it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(state / "state.safetensors"), read_json(state / "state.json")
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(
            f"the saved state {state} cannot be read ({error}); remove it to start this stage from its beginning"
        ) from error


NAMES = {
    "data": (DataError, "the data changed"),
    "tokenizer": (RecipeError, "the tokenizer changed"),
    "start": (RecipeError, "the model this stage starts from changed"),
    "recipe": (RecipeError, "the recipe changed"),
    "precision": (RecipeError, "the precision changed (another machine?)"),
}
"""Facts that bind a run; the error to raise and the words for it."""


def refuse_change(where: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise when a fact that binds the run changed since `old`; the error names each and says how to mend it."""
    for name, (error, words) in NAMES.items():
        if changes := differences({name: old.get(name)}, {name: new.get(name)}):
            listed = "; ".join(changes)
            raise error(
                f"{where} cannot go on: {words} since it was begun ({listed}). "
                f"Put it back, or train into another folder."
            )


class Metrics:
    """One JSON line per step, appended; cut back to a step when a run goes on from an older state."""

    def __init__(self, path: Path, keep: int) -> None:
        """Open `path` and keep the lines of steps up to `keep`; a torn last line is dropped."""
        from leveret.runs import atomic_write, read_jsonl

        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        if path.exists():
            raw = path.read_bytes()
            kept = [row for row in read_jsonl(path) if row["step"] <= keep]
            if not raw.endswith(b"\n") or len(kept) != raw.count(b"\n"):
                atomic_write(path, "".join(_line(row) for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def log(self, **row: Any) -> None:
        """Append one line. It reaches the system at once, the disk with `flush`."""
        self._file.write(_line(row))
        self._file.flush()

    def flush(self) -> None:
        """Force the lines to the disk: done before a state that stands on them is committed."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    import json

    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
