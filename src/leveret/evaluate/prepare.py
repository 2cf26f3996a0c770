"""What the tasks are, and whether a folder holds what they need: official files, their version, their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leveret.evaluate.forms import Item
from leveret.evaluate.scorers import SCORERS
from leveret.evaluate.sources import source_of
from leveret.evaluate.tasks import SUITES, TASKS, TaskRow, asked, base, find_files, load_items, splits_there
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


def _check(row: TaskRow, root: Path, split: str) -> dict[str, Any]:
    source = source_of(row.id)
    files = find_files(row, root, split)[1]
    record: dict[str, Any] = {"task": row.id, "split": split, "state": "ready", "files": [str(f) for f in files]}
    official = row.splits.get(split, split)
    place = root / base(row.id)
    wanted = " or ".join(str(place / pattern.format(split=official)) for pattern in row.files)
    if not files:
        pictures = f"; pictures{f' from {source.pictures}' if source.pictures else ''} in {place / row.images}"
        note = f" ({source.note})" if source.note else ""
        return record | {"state": "missing", "mend": f"fetch {source.where}{note}; put it at {wanted}{pictures}"}
    try:
        items = load_items(row, root, split)
    except (DataError, OSError, UnicodeDecodeError) as fault:
        return record | {"state": "unreadable", "mend": f"{fault} Published at {source.where}."}
    record |= {"questions": len(items), "pictures": len({i.meta["image_id"] for i in items if i.image is not None})}
    expected = source.n.get(split)
    if other := source.other(items) or _count(items, expected):
        return record | {"state": "other version", "mend": f"{other}; published at {source.where}"}
    missing = _missing(items)
    if missing:
        where = f" They come from {source.pictures}." if source.pictures else ""
        return record | {
            "state": "pictures missing",
            "pictures_missing": len(missing),
            "mend": f"{len(missing):,} of {record['pictures']:,} pictures are not there, first {missing[0]}.{where}",
        }
    return record


def _count(items: Sequence[Item], expected: int | None) -> str:
    if expected is None or len(items) == expected:
        return ""
    return f"{len(items):,} questions, where {expected:,} are published"


def _missing(items: Sequence[Item]) -> list[str]:
    paths = {item.image.path for item in items if item.image is not None and item.image.kind != "data"}
    return sorted(path for path in paths if not Path(path).is_file())
