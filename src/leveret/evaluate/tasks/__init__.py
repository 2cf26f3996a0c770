"""The tasks, one row each: which files of which form, how it is asked, by which rules it may be scored.

A benchmark's row reads its official files under `root`; a row of the drawn world reads the same forms under
`root/eval/<task>/`. Adding a benchmark of a known form is adding a row.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from leveret.evaluate.forms import FORMS, Item, Place, check_ids
from leveret.evaluate.scorers import SCORERS, Scorer
from leveret.evaluate.tasks.base import TaskRow
from leveret.evaluate.tasks.field import FIELD
from leveret.evaluate.tasks.suites import SUITES
from leveret.evaluate.tasks.world import WORLD
from leveret.runs import DataError, RecipeError, closest

SERVER = "server"
"""The split whose right answers only a benchmark's server knows."""

TASKS: dict[str, TaskRow] = {row.id: row for row in (*FIELD, *WORLD)}

__all__ = ["SUITES", "TASKS", "TaskRow", "asked", "find_files", "load_items", "one", "rule_of", "subset", "task_row"]


def task_row(task: str | TaskRow) -> TaskRow:
    """The row of an id (`tally_qa`, `tally-qa` and `tallyqa` are the same), or of a YAML file of a user's own.

    RecipeError names the closest ids, or every fault of the file."""
    if isinstance(task, TaskRow):
        return task
    if task.endswith((".yaml", ".yml")):
        from leveret.evaluate.tasks.own import read_task

        return read_task(task)
    row = {_plain(name): row for name, row in TASKS.items()}.get(_plain(task))
    if row is None:
        near = closest(task, TASKS)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise RecipeError(f"There is no task {task!r}.{hint} Known tasks: {', '.join(TASKS)}.")
    return row


def asked(name: str | TaskRow, split: str = "test") -> list[tuple[TaskRow, str]]:
    """The tasks of a suite, or the one task of that name, each with the split that is asked about.

    `mmbench.dev` is the split `dev` of `mmbench`, and its row's id is `mmbench.dev`, so that two splits of one task can
    stand in one table. RecipeError names the closest suites and tasks."""
    entries = SUITES.get(name) if isinstance(name, str) else None
    try:
        return [one(entry, split) for entry in (entries or (name,))]
    except RecipeError as fault:
        if entries is not None or not isinstance(name, str) or name.endswith((".yaml", ".yml")):
            raise
        near = closest(name, SUITES)
        hint = f"Did you mean the suite {' or '.join(near)}? " if near else ""
        raise RecipeError(f"There is no suite {name!r}. {hint}Suites: {', '.join(SUITES)}. {fault}") from None


def one(entry: str | TaskRow, split: str = "test") -> tuple[TaskRow, str]:
    """The row that an entry of a suite names, and its split: its own, or `split` where it names none."""
    if isinstance(entry, str) and not entry.endswith((".yaml", ".yml")):
        name, dot, named = entry.partition(".")
        if dot:
            row = task_row(name)
            return replace(row, id=f"{row.id}.{named}"), named
    return task_row(entry), split


def base(name: str) -> str:
    """A task's id without the split that a suite put behind it."""
    return name.partition(".")[0]


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def rule_of(row: TaskRow, rule: str | None = None, fields: Collection[str] = ("text",)) -> tuple[str, Scorer]:
    """A task's rule of that name (`lmms-eval` is `lmms_eval`); without one its first that reads one of `fields`.

    RecipeError names the rules that the task has."""
    if rule is None:
        named = [name for name, scorer in row.rules.items() if SCORERS[scorer].reads in fields] or list(row.rules)
        return named[0], SCORERS[row.rules[named[0]]]
    found = {_plain(name): name for name in row.rules}.get(_plain(rule))
    if found is None:
        known = "; ".join(f"{name} ({SCORERS[scorer].rule})" for name, scorer in row.rules.items())
        raise RecipeError(f"The task {row.id!r} has no rule {rule!r}; it has: {known}.")
    return found, SCORERS[row.rules[found]]


def homes(row: TaskRow, root: Path) -> list[Path]:
    """The folders under `root` that may hold a task's files: one of its own name, so that the tasks of a suite do not
    get in each other's way; that name without its last part (`textvqa_ocr` reads what `textvqa` does); `root`."""
    name = base(row.id)
    near = dict.fromkeys((name, name.rpartition("_")[0]))
    return [*(root / folder for folder in near if folder and (root / folder).is_dir()), root]


def splits_there(row: TaskRow, root: Path) -> list[str]:
    """The splits that a task's files in `root` are of, by our names; nothing where no file name tells the split."""
    ours = {official: name for name, official in row.splits.items()}
    found = set()
    for home in homes(row, root):
        seen: set[Path] = set()
        for pattern in row.files:
            if "{split}" in pattern:
                name = re.escape(pattern).replace(re.escape("{split}"), "([^/]+?)").replace(re.escape("*"), "[^/]*")
                for path in home.glob(pattern.format(split="*")):
                    match = re.fullmatch(name, path.relative_to(home).as_posix())
                    if match and path not in seen:  # a later pattern that fits too would read a part of the name
                        seen.add(path)
                        found.add(ours.get(match[1], match[1]))
    return sorted(found)


def prompt_of(row: TaskRow, prompts: str | None = None) -> str:
    """The template of a task's questions, by the lineage whose wording it is; without one the task's own.

    RecipeError names the wordings that the task has."""
    if prompts is None:
        return row.prompt
    found = {_plain(name): prompt for name, prompt in row.prompts.items()}.get(_plain(prompts))
    if found is None:
        known = f"it has its own and {', '.join(row.prompts)}" if row.prompts else "it has its own alone"
        raise RecipeError(f"The task {row.id!r} has no prompts {prompts!r}; {known}.")
    return found


def find_files(row: TaskRow, root: str | Path, split: str = "test") -> tuple[Path, tuple[Path, ...]]:
    """The folder that a task lies in, `root/<id>/` or `root`, and its files of a split; no files where there are none.

    The first of the row's patterns that finds something counts; RefCOCO's own folder holds one of its name."""
    for pattern in (pattern.format(split=row.splits.get(split, split)) for pattern in patterns_of(row, split)):
        for home in homes(row, Path(root)):
            if files := tuple(sorted(home.glob(pattern))):
                return home, files
    return Path(root), ()


def patterns_of(row: TaskRow, split: str) -> tuple[str, ...]:
    """The row's patterns that may find files of a split."""
    named = tuple(pattern for pattern in row.files if "{split}" in pattern)
    # A file whose name tells no split is of the part with public answers, where others tell theirs.
    return named if named and split == SERVER else row.files


def wording(row: TaskRow, rule: str | None = None, prompts: str | None = None) -> str | None:
    """The lineage in whose words a task is asked: `prompts`, else that of a rule over probabilities, whose options only
    its own words offer; None for the task's own words."""
    if prompts is not None:
        return prompts
    name, scorer = rule_of(row, rule)
    lineage = name.split("_")[0]
    return lineage if scorer.reads == "probabilities" and lineage in row.prompts else None


def load_items(task: str | TaskRow, root: str | Path, split: str = "test", prompts: str | None = None) -> list[Item]:
    """Every question of a task's split, in the order of its files, which lie in `root` or in `root/<id>`.

    prompts  the lineage in whose words the questions are put (`prismatic`); without it the task's own.

    Raises:
        RecipeError: the task is unknown, or has no such prompts.
        DataError: files are missing or malformed, or ids repeat.
    """
    row, root = task_row(task), Path(root)
    official = row.splits.get(split, split)
    if not root.exists():
        raise DataError(f"Task {row.id!r}: there is no folder {root}")
    home, files = find_files(row, root, split)
    if not files:
        patterns = [pattern.format(split=official) for pattern in row.files]
        own = "your questions in LLaVA's form, and the pictures as they name them"
        wanted = own if row.form == "own" else "the task's official files (for your own questions: --suite own)"
        there = splits_there(row, root)
        mend = f"There are the splits {', '.join(there)}." if there else f"Give the folder that holds {wanted}."
        raise DataError(f"Task {row.id!r}, split {split!r}: no {' or '.join(patterns)} in {root}. {mend}")
    place = Place(files=files, root=home, images=row.images, split=official, prompt=prompt_of(row, prompts))
    try:
        items = FORMS[row.form].load(place)
    except DataError as fault:  # it says what is wrong by itself
        raise DataError(f"Task {row.id!r}: {fault}") from fault
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as fault:
        if isinstance(fault, KeyError) and f"{{{fault.args[0]}}}" in row.prompt:
            raise DataError(
                f"Task {row.id!r}: the prompt asks for {{{fault.args[0]}}}, which {', '.join(map(str, files))} or the "
                f"form {row.form!r} does not give."
            ) from fault
        what = f"no field {fault.args[0]!r}" if isinstance(fault, KeyError) else repr(fault)
        raise DataError(
            f"Task {row.id!r}: {', '.join(map(str, files))} is not in the form {row.form!r} ({what}). "
            f"The form is: {(FORMS[row.form].load.__doc__ or '').splitlines()[0]}"
        ) from fault
    where = f"Task {row.id!r}, {', '.join(path.name for path in files)}"
    if not items:
        raise DataError(f"{where}: no question in split {official!r}.")
    check_ids(items, where)
    return items


def subset(items: Sequence[Item], n: int | None, how: str = "hash") -> list[Item]:
    """At most `n` of the items, always the same ones; n = 100 lies within n = 500.

    how  "hash": the first `n` by a hash of the id, in file order. Items that only count together (`whole`) are taken
         together, so there may be some more than `n`.
         "prismatic": its slim sets: `random.Random(21)` shuffles all in file order, and the first `n` of each part
         (`meta["group"]`) stay, in the shuffled order. The official files' order, that is: its own index is shuffled.
    """
    if how not in ("hash", "prismatic"):
        raise RecipeError(f"Subsets are chosen by 'hash' or as 'prismatic', not {how!r}.")
    if n is not None and n < 1:
        raise RecipeError(f"n = {n}: at least one question a task is needed.")
    if n is None or (n >= len(items) and how == "hash"):
        return list(items)
    if how == "prismatic":
        shuffled = list(items)
        random.Random(21).shuffle(shuffled)
        taken: Counter[str] = Counter()
        slim = []
        for item in shuffled:
            part = item.meta.get("group", "")
            taken[part] += 1
            slim += [item] if taken[part] <= n else []
        return slim
    sizes = Counter(item.meta.get("whole", item.question_id) for item in items)
    chosen: set[str] = set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if n <= 0:
            break
        chosen.add(name)
        n -= sizes[name]
    return [item for item in items if item.meta.get("whole", item.question_id) in chosen]
