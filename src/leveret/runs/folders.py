"""Run folders: one command fills one, no other process beside it, and only under the recipe that it was begun with."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from leveret.runs.errors import DataError, EnvironmentFault, OtherRecipe, RecipeError
from leveret.runs.files import append_jsonl, as_json, atomic_write, read_json, repair_jsonl, write_json
from leveret.runs.machine import environment


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by key path: {"a": {"b": [1]}} -> {"a.b.0": 1}. Empty mappings and lists are leaves too."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping) and value:
        items = value.items()
    elif isinstance(value, (list, tuple)) and value:
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


_MISSING = object()


def differences(old: Any, new: Any) -> list[str]:
    """One line per key path whose value differs, in the order of the keys: `a.b: 1 there, 2 now`."""
    before, after = _flat(old), _flat(new)
    lines = []
    for key in dict.fromkeys([*before, *after]):
        there, now = before.get(key, _MISSING), after.get(key, _MISSING)
        if there != now:
            lines.append(f"{key}: {_shown(there)} there, {_shown(now)} now")
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return f"fingerprint {value[:10]}"
    return "nothing" if value is _MISSING else as_json(value)[:80]


_DIGEST = re.compile("[0-9a-f]{16,}")
"""Fingerprints of data and weights in a recipe: nobody compares them by eye to the last letter."""


_LOCKS: dict[str, IO[str]] = {}  # open for the life of the process: closing the file would drop the lock


def claim(path: Path) -> None:
    """Make a folder, and keep other processes out while this one lives. The system drops the lock, even after kill -9.

    Raises EnvironmentFault where another process holds the folder, or where it may not be written.
    """
    rights = f"{path}: no right to write in this folder. Change its rights, or name another with -o."
    try:
        path.mkdir(parents=True, exist_ok=True)
    except PermissionError:
        raise EnvironmentFault(rights) from None
    try:
        import fcntl
    except ImportError:
        return
    key = str(path.resolve())
    if key in _LOCKS and (path / ".lock").exists():
        return
    try:
        file = open(path / ".lock", "a+", encoding="utf-8")
    except PermissionError:
        raise EnvironmentFault(rights) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        raise EnvironmentFault(
            f"{path}: another process is writing this folder. Wait for it, stop it, or name another folder with -o."
        ) from None
    except OSError:
        return  # a file system without locks
    _LOCKS[key] = file


def is_held(path: Path) -> bool:
    """Whether a process, this one too, has claimed the folder. Asking takes no lock, so it disturbs nobody."""
    if str(path.resolve()) in _LOCKS:
        return True
    try:
        import fcntl
        import struct

        with open(path / ".lock", "rb+") as file:
            # struct flock: (type, whence, start, length, pid) on Linux, (start, length, pid, type, whence) on macOS
            form, place = ("qqihh", 3) if sys.platform == "darwin" else ("hhqqi", 0)
            asked = [0, 0, 0, 0, 0]
            asked[place] = fcntl.F_WRLCK
            told = struct.unpack(form, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(form, *asked)))
            return told[place] != fcntl.F_UNLCK
    except (ImportError, OSError):
        return False


def fixed(free: Collection[str], *recipes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recipes without the fields that may differ."""
    return [{key: value for key, value in recipe.items() if key not in free} for recipe in recipes]


def kept_recipe(folder: Path) -> dict[str, Any]:
    """The recipe that a run wrote into its folder. DataError where the file is damaged."""
    import yaml

    file = folder / "recipe.yaml"
    try:
        recipe = yaml.safe_load(file.read_text("utf-8"))
        if isinstance(recipe, dict):
            return recipe
        why = "it holds no fields"
    except UnicodeDecodeError as fault:
        why = f"not UTF-8 text (byte {fault.start})"
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        why = "not YAML" + (f" at line {mark.line + 1}, column {mark.column + 1}" if mark else "")
    raise DataError(
        f"{file} is damaged: {why}. The run wrote it and needs it to go on: bring it back from a copy, or name another "
        "folder with -o and begin anew"
    )


def check_parents(path: Path) -> None:
    """RecipeError where a folder could not be made, for a file stands where one of its parents would be."""
    there = next((parent for parent in path.absolute().parents if parent.exists()), None)
    if there is not None and not there.is_dir():
        raise RecipeError(f"{there} is a file, so there can be no {path} below it. Name another with -o.")


class RunFolder:
    """A folder that one command fills: its resolved recipe, what it ran on, its metrics, and which steps are done.

    recipe.yaml        the resolved recipe; opening the folder with another one is refused
    environment.json   python, packages, cores, git state; later openings elsewhere are listed in it
    metrics.jsonl      one line per `log`
    done/<step>.json   one file per finished step, for resume
    """

    def __init__(self, path: Path, kind: str, *, fresh: bool = False) -> None:
        """fresh: whether the folder was empty until now, so that all in it is this run's."""
        self.path = path
        self.kind = kind
        self.fresh = fresh

    @classmethod
    def open(cls, path: str | Path, kind: str, recipe: Mapping[str, Any], free: Collection[str] = ()) -> RunFolder:
        """Make the folder, or open it again to go on with the same `kind` of run under the same recipe.

        free  fields of the recipe (of its top) that may be others than the folder was begun with; it keeps those.

        Raises:
            RecipeError: the folder holds another kind of run, another recipe (the text names every field that
                differs), or files that are no run.
            DataError: the recipe in it is damaged.
            EnvironmentFault: another process is writing in it, or it may not be written.
        """
        import yaml

        path = Path(path)
        cls.check_place(path, kind)
        claim(path)
        wanted = json.loads(as_json(recipe))
        recipe_file = path / "recipe.yaml"
        fresh = not any(item.name != ".lock" for item in path.iterdir())
        if recipe_file.exists():
            cls._check_same(path, kind, *fixed(free, kept_recipe(path), wanted))
        else:
            write_json(path / "environment.json", {"kind": kind, **environment(), "resumed": []})
            # The recipe comes last: a folder that has it is whole.
            atomic_write(recipe_file, yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True, width=120))
        repair_jsonl(path / "metrics.jsonl")
        return cls(path, kind, fresh=fresh)

    @classmethod
    def peek(cls, path: str | Path, kind: str, recipe: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
        """Which steps are done in a folder, without opening it. RecipeError where `open` would refuse the recipe, or
        the folder."""
        path = Path(path)
        cls.check_place(path, kind)
        if not (path / "recipe.yaml").exists():
            return []
        cls._check_same(path, kind, *fixed(free, kept_recipe(path), json.loads(as_json(recipe))), look=True)
        return sorted(mark.stem for mark in (path / "done").glob("*.json"))

    @classmethod
    def adopt(cls, path: str | Path, kind: str, recipe: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
        """Make another recipe the folder's own, so that `open` takes it; the lines say what differs. For those who were
        told to go on all the same. Another kind of run is refused as ever."""
        import yaml

        path = Path(path)
        if not (path / "recipe.yaml").exists():
            return []
        claim(path)
        there, wanted = kept_recipe(path), json.loads(as_json(recipe))
        cls._check_same(path, kind, there, there, look=True)
        if lines := differences(*fixed(free, there, wanted)):
            atomic_write(path / "recipe.yaml", yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True, width=120))
        return lines

    @staticmethod
    def check_place(path: Path, kind: str) -> None:
        """RecipeError where it is a file or would lie below one, or has files and no run."""
        check_parents(path)
        if path.exists() and not path.is_dir():
            raise RecipeError(f"{path} is a file; the output of `{kind}` is a folder. Name another with -o.")
        if not path.is_dir() or (path / "recipe.yaml").exists():
            return
        # environment.json alone is what a kill between the two writes of `open` leaves: no stranger.
        known = {"environment.json"}
        if strangers := sorted(i.name for i in path.iterdir() if i.name not in known and i.name[0] != "."):
            raise RecipeError(
                f"{path} is not empty and holds no run (it holds {', '.join(strangers[:5])}"
                f"{', ...' if len(strangers) > 5 else ''}). Name a new or empty folder with -o."
            )

    @staticmethod
    def _check_same(path: Path, kind: str, there: Any, wanted: Any, *, look: bool = False) -> None:
        record = read_json(path / "environment.json")
        if record.get("kind") != kind:
            raise RecipeError(f"{path} holds a `{record.get('kind')}` run, not `{kind}`. Name another folder with -o.")
        if lines := differences(there, wanted):
            shown = "".join(f"\n  {line}" for line in lines[:20])
            more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
            if all(": fingerprint " in line for line in lines):
                what, old = "other data or another model", "what it was begun with"
            else:
                what, old = "another recipe", f"the old recipe ({path / 'recipe.yaml'})"
            raise OtherRecipe(
                f"{path} was made with {what}:{shown}{more}\n"
                f"Name another folder with -o, delete this one, or give {old} to go on with it."
            )
        if look:
            return
        now = environment()
        seen = [record, *record["resumed"]]
        if all(differences({key: old.get(key) for key in now}, now) for old in seen):
            record["resumed"].append(now)
            write_json(path / "environment.json", record)

    def log(self, **metrics: Any) -> None:
        """Add one line to metrics.jsonl. Numbers that are not finite become null."""
        append_jsonl(self.path / "metrics.jsonl", metrics)

    def done(self, name: str, **facts: Any) -> None:
        """Mark a step as finished, with facts worth keeping. Call it after the step's files are in place."""
        write_json(self._mark(name), {"step": name, **facts})

    def is_done(self, name: str) -> bool:
        return self._mark(name).exists()

    def facts(self, name: str) -> dict[str, Any]:
        """What `done` was given for a finished step; DataError when it is not finished."""
        return read_json(self._mark(name))

    def _mark(self, name: str) -> Path:
        return self.path / "done" / f"{name}.json"
