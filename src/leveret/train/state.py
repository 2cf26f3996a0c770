"""What a stage must remember to go on as if nothing had happened: trainable weights, moments, and a step.

    STAGE/state/step-00000200/{state.safetensors, state.json, SHA256SUMS}

A state is written into a temporary folder, flushed to the disk and renamed: the rename is the commit. Those before are
removed only after it, but for the last few. `SHA256SUMS` (the form of sha256sum) holds the hash of every file, taken
from what was meant to be written; a state that is not that any more is named and passed over. Randomness needs no
state, since every draw is a pure function of (seed, stage, step, rank).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import DataError, RecipeError, UserError, atomic_write, differences, read_json, sha256_of, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

_TEMPORARY = ".writing-"
SUMS = "SHA256SUMS"
FORMAT = 2
"""Layout of a state; since 2 it has hashes."""


def random_seed(seed: int, stage: str, step: int, rank: int) -> int:
    """A 63-bit seed for everything random in one step on one rank."""
    key = f"{seed}/{stage}/{step}/{rank}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def flush(path: Path) -> None:
    """Force a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write the state of `step` under `folder`; whatever happens meanwhile, the states that are there stay.

    Raises OSError as the disk gives it; nothing of the new state is then found by `latest`.
    """
    from leveret.model.tensors import write

    final, writing = folder / f"step-{step:08d}", folder / f"{_TEMPORARY}{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir()
        said = json.dumps({"format": FORMAT, "step": step, **facts}, indent=2).encode()
        hashes = {"state.safetensors": write(writing / "state.safetensors", tensors), "state.json": sha256_of(said)}
        atomic_write(writing / "state.json", said)
        atomic_write(writing / SUMS, "".join(f"{digest}  {name}\n" for name, digest in hashes.items()))
        if final.exists():
            # Only a damaged or a discarded one: it steps aside in one move, never half removed under its own name.
            final.rename(folder / f"{_TEMPORARY}old-{step:08d}")
        writing.rename(final)
    except OSError:
        shutil.rmtree(writing, ignore_errors=True)  # on a full disk it may be what fills it
        raise
    sync_folder(folder)
    shutil.rmtree(folder / f"{_TEMPORARY}old-{step:08d}", ignore_errors=True)
    return final


def steps(folder: Path) -> list[int]:
    """Steps of the states under `folder`, sound or not, in order."""
    return sorted(int(state.name.removeprefix("step-")) for state in folder.glob("step-*"))


def prune(folder: Path, kept: Collection[int]) -> None:
    """Remove all states but those of the steps `kept`."""
    for step in steps(folder):
        if step not in kept:
            # Renamed first: a half removed state must not be taken for a damaged one.
            gone = folder / f"{_TEMPORARY}gone-{step:08d}"
            (folder / f"step-{step:08d}").rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
    for left in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)


def fault(state: Path) -> str:
    """What is wrong with a state's files, in words; "" where they are as they were written."""
    needed = {"state.safetensors", "state.json"}
    if lacking := sorted(name for name in needed if not (state / name).is_file()):
        return f"{', '.join(lacking)} is not there"
    try:
        if not (state / SUMS).is_file():
            kind = json.loads((state / "state.json").read_bytes()).get("format")
            return "" if kind is None else f"{SUMS} is not there"  # an older leveret wrote none
        *lines, last = (state / SUMS).read_bytes().decode("utf-8", "replace").split("\n")
        said = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        there = {file.name for file in state.iterdir() if file.name[0] != "."} - {SUMS}
        if said.keys() != there or last:
            return f"{SUMS} does not list the files that are there"
        wrong = [name for name in sorted(there) if sha256_of(state / name) != said[name]]
    except (OSError, ValueError) as error:
        return str(error)
    return f"{', '.join(wrong)} is not as it was written (its hash differs)" if wrong else ""


def latest(folder: Path) -> Path | None:
    """The newest sound state under `folder`; None where there are no states. A damaged newer one is named on stderr.

    What an interrupted write left behind is no state. DataError, naming every one, where all are damaged.
    """
    damaged: list[str] = []
    for step in reversed(steps(folder)):
        state = folder / f"step-{step:08d}"
        if not (wrong := fault(state)):
            for line in damaged:
                print(f"{line}; going on from {state.name}, the one before", file=sys.stderr, flush=True)
            return state
        damaged.append(f"the saved state {state} is damaged: {wrong}")
    if damaged:
        raise DataError(
            "; ".join(damaged) + f". There is no other to go on from: remove {folder} to start this stage from its "
            "beginning, and look at the disk; `keep_last` of the stage says how many states are kept"
        )
    return None


def load(state: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a state. DataError when it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(state / "state.safetensors"), read_json(state / "state.json")
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(
            f"the saved state {state} cannot be read ({error}); remove it to go on from the one before, or from this "
            "stage's beginning"
        ) from error


NAMES: dict[str, tuple[type[UserError], str]] = {
    "data": (DataError, "the data changed"),
    "tokenizer": (RecipeError, "the tokenizer changed"),
    "start": (RecipeError, "the model this stage starts from changed"),
    "recipe": (RecipeError, "the recipe changed"),
    "precision": (RecipeError, "the precision changed (another machine?)"),
}
"""Facts that bind a run; the error to raise and the words for it."""


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[str]]:
    """What differs between facts that bind a run: the names of NAMES that do, with one line for each difference."""
    found = {name: differences({name: old.get(name)}, {name: new.get(name)}) for name in NAMES}
    return {name: lines for name, lines in found.items() if lines}


def refuse_change(where: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise when a fact that binds the run changed since `old`; the error names each and says how to mend it."""
    for name, lines in changes(old, new).items():
        error, words = NAMES[name]
        raise error(
            f"{where} cannot go on: {words} since it was begun ({'; '.join(lines)}). "
            f"Put it back, or train into another folder; --allow-change goes on all the same, and notes it."
        )


MEASURED = ("seconds", "waiting", "memory")
"""Fields of metrics.jsonl that a clock or the system gave: two runs of one recipe differ in these alone."""


class Metrics:
    """One JSON line per step, appended; cut back to a step when a run goes on from an older state."""

    def __init__(self, path: Path, keep: int) -> None:
        """Open `path` and keep the lines of steps up to `keep`; a torn last line is dropped."""
        from leveret.runs import read_jsonl

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
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
