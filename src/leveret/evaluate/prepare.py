"""What the tasks are, and whether a folder holds what they need: official files, their version, their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leveret.evaluate.forms import Item
from leveret.evaluate.scorers import SCORERS
from leveret.evaluate.sources import WORLD, source_of
from leveret.evaluate.tasks import (
    SUITES,
    TASKS,
    TaskRow,
    asked,
    base,
    find_files,
    load_items,
    patterns_of,
    splits_there,
)
from leveret.runs import DataError


def overview(root: str | Path | None = None, task: str | None = None) -> dict[str, Any]:
    """All tasks and suites: what each asks, its rules, where it is published, and with `root` what is there.

    task  also a user's own, from a YAML file.

    Returns `{"tasks": [{"id", "asks", "form", "rules", "suites", "published", "here"}], "suites": {name: [...]}}`;
    `here` is None without `root`, else the splits found there (a task whose files name no split has "test")."""
    rows = [*TASKS.values(), *([row for row, _ in asked(task)] if task else [])]
    return {
        "tasks": [
            {
                "id": row.id,
                "asks": row.about,
                "form": row.form,
                "rules": {name: SCORERS[scorer].rule for name, scorer in row.rules.items()},
                "suites": [suite for suite, entries in SUITES.items() if row.id in map(base, entries)],
                "published": source_of(row.id).where if row.id in TASKS else "a task of your own",
                "here": None if root is None else _here(row, Path(root)),
            }
            for row in rows
        ],
        "suites": {suite: list(entries) for suite, entries in SUITES.items()},
    }


def _here(row: TaskRow, root: Path) -> list[str]:
    return splits_there(row, root) or (["test"] if find_files(row, root)[1] else [])


def check(root: str | Path, suite: str, split: str = "test") -> list[dict[str, Any]]:
    """Whether `root` holds what a suite (or one task) needs, one record a task.

    `state` is "ready", "missing" (no file), "unreadable" (not in the form), "other version" (not as many questions as
    are published, or another set) or "pictures missing"; `mend` tells what to fetch and where it belongs.

    Raises RecipeError where the suite is unknown; what is wrong with the files is in the records."""
    return [_check(row, Path(root), part) for row, part in asked(suite, split)]


ANSWERS_ONLY = "They hold right answers but no questions: they serve to score. Give the folder of the dataset itself."


def load_suite(
    name: str, pairs: Sequence[tuple[TaskRow, str]], root: str | Path, words: Mapping[str, str | None], *, skip: bool
) -> tuple[dict[str, list[Item]], dict[str, dict[str, str]]]:
    """(task -> its questions, task -> the state and the mend of one that cannot be asked), pictures looked for too.

    words  task -> the lineage in whose words it is asked.
    skip   leave out what cannot be asked; without it all of them are named in one DataError. Where nothing is left to
           ask, too."""
    if len(pairs) == 1:
        ((row, split),) = pairs
        alone = load_items(row, root, split, words.get(row.id))
        _check_askable(row.id, alone)
        return {row.id: alone}, {}
    loaded: dict[str, list[Item]] = {}
    lacking: dict[str, dict[str, str]] = {}
    for row, split in pairs:
        record, items = _look(row, Path(root), split, words.get(row.id))
        if items is not None and not all(item.prompt for item in items):
            record |= {"state": "no questions", "mend": ANSWERS_ONLY}
        if items is not None and record["state"] == "ready":
            loaded[row.id] = items
        else:
            lacking[row.id] = {key: record[key] for key in ("state", "mend")}
    if not loaded and {record["state"] for record in lacking.values()} == {"missing"}:
        load_items(pairs[0][0], root, pairs[0][1])  # the wrong folder, mostly: one word about it says more than ten
    if lacking and not (skip and loaded):
        told = "".join(f"\n  {task}: {record['state']}: {record['mend']}" for task, record in lacking.items())
        others = f"--skip-missing asks the other {len(loaded)}. " if loaded else ""
        raise DataError(
            f"{len(lacking)} of the {len(pairs)} tasks of {name!r} cannot be asked:{told}\n"
            f"{others}`leveret tasks prepare {root} --suite {name}` looks again."
        )
    return loaded, lacking


def _check_askable(task: str, items: Sequence[Item]) -> None:
    """Before a model is loaded: every picture is there, and every question has words."""
    if not all(item.prompt for item in items):
        raise DataError(f"The files of {task}: {ANSWERS_ONLY}")
    if missing := _missing(items):
        paths = {item.image.path for item in items if item.image is not None and item.image.kind != "data"}
        raise DataError(
            f"{len(missing)} of {len(paths)} pictures are missing, first {missing[0]}. "
            "Put them there, or give the folder that holds the questions' files and the pictures as they name them."
        )


def _check(row: TaskRow, root: Path, split: str) -> dict[str, Any]:
    source = source_of(row.id)
    record, items = _look(row, root, split)
    if items is not None and (other := source.other(items) or _count(items, source.n.get(split))):
        record.pop("pictures_missing", None)
        return record | {"state": "other version", "mend": f"{other}; published at {source.where}"}
    return record


def _look(row: TaskRow, root: Path, split: str, prompts: str | None = None) -> tuple[dict[str, Any], list[Item] | None]:
    """What there is of a task, and its questions; None where they cannot be read."""
    source = source_of(row.id)
    files = find_files(row, root, split)[1]
    record: dict[str, Any] = {"task": row.id, "split": split, "state": "ready", "files": [str(f) for f in files]}
    official = row.splits.get(split, split)
    place = root if source is WORLD else root / base(row.id)  # the world's files name their task already
    wanted = " or ".join(str(place / pattern.format(split=official)) for pattern in patterns_of(row, split))
    if not files:
        there = splits_there(row, root)
        here = f"the splits here are {', '.join(there)}, not {split}; " if there else ""
        pictures = f"; pictures{f' from {source.pictures}' if source.pictures else ''} in {place / row.images}"
        note = f" ({source.note})" if source.note else ""
        fetch = "run" if source is WORLD else "fetch"
        mend = f"{here}{fetch} {source.where}{note}; put it at {wanted}{pictures}"
        return record | {"state": "missing", "mend": mend}, None
    try:
        items = load_items(row, root, split, prompts)
    except (DataError, OSError, UnicodeDecodeError) as fault:
        return record | {"state": "unreadable", "mend": f"{fault} Published at {source.where}."}, None
    record |= {"questions": len(items), "pictures": len({i.meta["image_id"] for i in items if i.image is not None})}
    missing = _missing(items)
    if missing:
        where = f" They come from {source.pictures}." if source.pictures else ""
        record |= {
            "state": "pictures missing",
            "pictures_missing": len(missing),
            "mend": f"{len(missing):,} of {record['pictures']:,} pictures are not there, first {missing[0]}.{where}",
        }
    return record, items


def _count(items: Sequence[Item], expected: int | None) -> str:
    if expected is None or len(items) == expected:
        return ""
    return f"{len(items):,} questions, where {expected:,} are published"


def _missing(items: Sequence[Item]) -> list[str]:
    paths = {item.image.path for item in items if item.image is not None and item.image.kind != "data"}
    return sorted(path for path in paths if not Path(path).is_file())
