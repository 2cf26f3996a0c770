"""Another coreset from the same rows: another threshold, window or budget, and only what hangs on it is done again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leveret import recipe as recipes
from leveret.condense.pipeline import as_before, condense, finished
from leveret.condense.prepare import prepare
from leveret.condense.steps import CondenseRecipe, changed
from leveret.runs import RecipeError, RunFolder


def recut(path: str | Path, out: str | Path, overrides: Sequence[str] = (), *, workers: int | None = None) -> Path:
    """Makes the coreset `out` from the finished one at `path` under another recipe; returns `out`.

    It equals what `condense` would make with that recipe. Steps before the first that differs are taken from `path`
    (linked, not copied), so that a window or a budget reads no vectors, and a threshold reads them but groups nothing
    anew. `redone` says which steps are done again.

    Raises RecipeError (no override, or one that the recipe does not take; another seed or encoder changes every step)
    and DataError (`path` holds no finished coreset, or its data are gone or were changed).
    """
    path, out = Path(path), Path(out)
    manifest, after, given = _given(path, overrides)
    kept = list(after.steps)[: len(after.steps) - len(redone(path, overrides))]

    def begin(folder: Path) -> None:
        _link(path, folder, kept, sum(after.steps[label].step == "cluster" for label in kept))

    return condense(
        manifest["pool"] or manifest["embeddings"],
        out,
        after,
        memory=manifest["memory"],
        workers=workers,
        begin=begin,
        **given,
    )


def check(path: str | Path, out: str | Path, overrides: Sequence[str] = ()) -> None:
    """Raises what `recut` would before it begins, for a dry run; nothing is written."""
    manifest, after, given = _given(Path(path), overrides)
    ready = prepare(manifest["pool"] or manifest["embeddings"], after, **given)
    RunFolder.peek(out, "condense", ready.bound())


def _given(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], CondenseRecipe, dict[str, Any]]:
    """(manifest of the coreset, the recipe as it is to be, what `prepare` takes besides)."""
    manifest = finished(path)
    before = CondenseRecipe.model_validate(manifest["recipe"])
    after = changed(before, overrides)
    for name in ("seed", "encoder"):
        if getattr(before, name) != getattr(after, name):
            raise RecipeError(f"{name}: every step hangs on it, so there is nothing to take from {path}; condense anew")
    if recipes.dump(before) == recipes.dump(after):
        raise RecipeError(f"this is the recipe that {path} was made by; say what is to differ, such as budget=1000")
    return manifest, after, {**as_before(manifest), "like": manifest}


def redone(path: str | Path, overrides: Sequence[str]) -> list[str]:
    """Labels of the steps that a recut does again: from the first whose settings, or whose place, differ."""
    before = CondenseRecipe.model_validate(finished(Path(path))["recipe"])
    after = changed(before, overrides)
    old, new = list(before.steps.items()), list(after.steps.items())
    same = 0
    while same < min(len(old), len(new)) and old[same] == new[same]:
        same += 1
    return [label for label, _ in new[same:]]


def _link(path: Path, out: Path, labels: Sequence[str], generations: int) -> None:
    """What steps before the change made, seen from the new folder."""
    names = [Path(label) for label in labels]
    names += [Path("rows", str(number)) for number in range(generations + 1)]
    names += [Path("runs", str(number)) for number in range(1, generations + 1)]
    # Parts are named by bucket, so which clusters are in which bucket comes along, whatever memory there is now.
    names += [Path("buckets", f"{number}.npz") for number in range(1, generations + 1)]
    for name in [Path("embeddings"), Path("against"), *(Path("work") / name for name in names)]:
        there = (path / name).resolve()
        if there.exists() and not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).symlink_to(there, target_is_directory=there.is_dir())
