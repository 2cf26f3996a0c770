"""The tasks, one row each: which files of which form, how it is asked, by which rule it is scored.

A benchmark's row reads its official files under `root`; a row of the drawn world reads the same forms under
`root/eval/<task>/`. Adding a benchmark of a known form is adding a row.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from leveret.evaluate.forms import FORMS, Item, Place, check_ids
from leveret.runs import DataError, RecipeError, closest

SHORT = "\nAnswer the question using a single word or phrase."
INSUFFICIENT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task.

    id              public name, on the command line and in results.
    form            row of FORMS: how the files are read.
    scorer          row of SCORERS: the rule.
    files           places to look, as globs under the root; the first that finds something counts. `{split}` is the
                    split's official name.
    images          folder of the pictures under the root; "" where image names already hold it.
    prompt          what the model is asked, over the form's fields.
    max_new_tokens  no right answer is longer.
    headline        row of HEADLINES: the one figure called `score`.
    splits          our name of a split -> the files' own.
    about           what is asked, in words for somebody who knows nothing.
    """

    id: str
    form: str
    scorer: str
    files: tuple[str, ...]
    images: str
    prompt: str
    max_new_tokens: int
    headline: str = "accuracy"
    splits: Mapping[str, str] = field(default_factory=dict)
    about: str = ""


_ROWS = (
    TaskRow(
        "pope",
        "pope",
        "pope",
        ("coco/coco_pope_*.json", "coco_pope_*.json"),
        "val2014",
        "{question}" + SHORT,
        128,
        headline="F1, mean of parts",
        about="Is a named object in the picture?",
    ),
    TaskRow(
        "gqa",
        "gqa",
        "gqa",
        ("{split}_questions.json",),
        "images",
        "{question}" + SHORT,
        128,
        splits={"test": "testdev_balanced"},
        about="Questions about objects, attributes and relations, answered in a word.",
    ),
    TaskRow(
        "tallyqa",
        "tallyqa",
        "tallyqa",
        ("{split}.json",),
        "",
        "{question}" + SHORT,
        128,
        about="How many are there?",
    ),
    TaskRow(
        "vsr",
        "vsr",
        "vsr_yes_no",
        ("{split}.jsonl",),
        "images",
        "{caption} Please answer yes or no.",
        128,
        about="Does a sentence about where things are fit the picture?",
    ),
    TaskRow(
        "scienceqa",
        "scienceqa",
        "scienceqa",
        ("problems.json",),
        "images",
        "{context}{question}\n{options}" + LETTER,
        1024,
        about="School questions with choices, some with a picture.",
    ),
    TaskRow(
        "refcoco",
        "refcoco",
        "refcoco",
        ("metadata-full.json", "refcoco*/refs(*).json", "refs(*).json"),
        "train2014",
        'Please provide the bounding box coordinate of the region this sentence describes: "{sent}"',
        128,
        headline="accuracy, mean of parts",
        splits={"test": "val"},
        about="Where is the thing that a phrase describes?",
    ),
    TaskRow(
        "textvqa",
        "textvqa",
        "textvqa",
        ("TextVQA_0.5.1_{split}.json",),
        "train_images",
        "{question}" + SHORT,
        128,
        splits={"test": "val"},
        about="Questions that need the text in the picture (asked without OCR tokens).",
    ),
    TaskRow(
        "vizwiz",
        "vizwiz",
        "vizwiz",
        ("{split}.json",),
        "images",
        "{question}" + INSUFFICIENT + SHORT,
        128,
        splits={"test": "val"},
        about="Questions of blind people, some of which the picture cannot answer.",
    ),
    TaskRow(
        "own",
        "own",
        "own",
        ("{split}.json", "{split}.jsonl"),
        "",
        "{question}",
        128,
        about="Your own questions, about your own pictures.",
    ),
    TaskRow(
        "existence",
        "pope",
        "pope",
        ("eval/existence/{split}/coco_pope_*.json",),
        "images",
        "{question}",
        8,
        about="Is a named object in the picture? Half of the right answers are yes.",
    ),
    TaskRow(
        "colour",
        "gqa",
        "gqa",
        ("eval/colour/{split}_balanced_questions.json",),
        "images",
        "{question}",
        8,
        about="What colour is the object of a given shape?",
    ),
    TaskRow(
        "shape",
        "gqa",
        "gqa",
        ("eval/shape/{split}_balanced_questions.json",),
        "images",
        "{question}",
        8,
        about="What shape is the object of a given colour?",
    ),
    TaskRow(
        "count",
        "tallyqa",
        "tallyqa",
        ("eval/count/{split}.json",),
        "",
        "{question}",
        8,
        about="How many objects of a kind are there?",
    ),
    TaskRow(
        "relation",
        "vsr",
        "vsr_true_false",
        ("eval/relation/{split}.jsonl",),
        "images",
        "True or false? {caption}",
        8,
        about="Is one object left of, right of, above or below another, as the sentence says?",
    ),
    TaskRow(
        "choice",
        "scienceqa",
        "scienceqa",
        ("eval/choice/problems.json",),
        "eval/choice/images",
        "{context}{question}\n{options}",
        8,
        about="Which of four options fits the picture? The answer is its letter.",
    ),
    TaskRow(
        "box",
        "refcoco",
        "refcoco",
        ("eval/box/refs(*).json",),
        "images",
        "Where is {sent}?",
        40,
        about="Draw a box around the named object; right when it overlaps the true box by half or more.",
    ),
    TaskRow(
        "word",
        "textvqa",
        "textvqa",
        ("eval/word/TextVQA_0.5.1_{split}.json",),
        "images",
        "{question}",
        24,
        about="Read the word that is written in the picture.",
    ),
    TaskRow(
        "unanswerable",
        "vizwiz",
        "vizwiz",
        ("eval/unanswerable/{split}.json",),
        "images",
        "{question}" + INSUFFICIENT,
        24,
        about="Half of the questions are about things that are not there.",
    ),
    TaskRow(
        "double",
        "gqa",
        "gqa",
        ("eval/double/{split}_balanced_questions.json",),
        "images",
        "{question}",
        24,
        about="Two questions in one; nobody taught that.",
    ),
    TaskRow(
        "text",
        "own",
        "own",
        ("eval/text/{split}.json",),
        "",
        "{question}",
        24,
        about="Questions without a picture: what is left of the language model's skills.",
    ),
    TaskRow(
        "refusal",
        "own",
        "own",
        ("eval/refusal/{split}.json",),
        "",
        "{question}",
        24,
        about="Requests, without a picture, that are to be refused.",
    ),
    TaskRow(
        "caption",
        "own",
        "phrases",
        ("eval/caption/{split}.json",),
        "",
        "{question}",
        160,
        about="Describe the picture: the share of its objects that are named (naming more costs nothing).",
    ),
    TaskRow(
        "reading",
        "own",
        "phrases",
        ("eval/reading/{split}.json",),
        "",
        "{question}",
        160,
        about="Describe the picture: is the word in it spelled right?",
    ),
)
TASKS: dict[str, TaskRow] = {row.id: row for row in _ROWS}
SUITES: dict[str, tuple[str, ...]] = {
    "world": ("existence", "colour", "shape", "count", "relation", "choice", "box", "word"),
    "world-more": ("caption", "reading", "unanswerable", "double", "text", "refusal"),
}


def task_row(task: str | TaskRow) -> TaskRow:
    """The row of an id (`tally_qa` and `tallyqa` are the same); RecipeError names the closest ids."""
    if isinstance(task, TaskRow):
        return task
    row = TASKS.get(task.replace("_", "").replace("-", "").lower())
    if row is None:
        near = closest(task, TASKS)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise RecipeError(f"There is no task {task!r}.{hint} Known tasks: {', '.join(TASKS)}.")
    return row


def splits_there(row: TaskRow, root: Path) -> list[str]:
    """The splits that a task's files in `root` are of, by our names; nothing where no file name tells the split."""
    ours = {official: name for name, official in row.splits.items()}
    found = set()
    for pattern in row.files:
        if "{split}" in pattern:
            name = re.escape(pattern).replace(re.escape("{split}"), "([^/]+?)").replace(re.escape("*"), "[^/]*")
            for path in root.glob(pattern.format(split="*")):
                match = re.fullmatch(name, path.relative_to(root).as_posix())
                if match:
                    found.add(ours.get(match[1], match[1]))
    return sorted(found)


def load_items(task: str | TaskRow, root: str | Path, split: str = "test") -> list[Item]:
    """Every question of a task's split, in the order of its files.

    Raises:
        RecipeError: the task is unknown.
        DataError: files are missing or malformed, or ids repeat.
    """
    row, root = task_row(task), Path(root)
    official = row.splits.get(split, split)
    patterns = [pattern.format(split=official) for pattern in row.files]
    files = next((found for pattern in patterns if (found := tuple(sorted(root.glob(pattern))))), ())
    if not files:
        pickled = " (the pickled refs*.p are not read: save their list as JSON beside them)" * (row.form == "refcoco")
        own = "your questions in LLaVA's form, and the pictures as they name them"
        wanted = own if row.form == "own" else "the task's official files (for your own questions: --suite own)"
        there = splits_there(row, root)
        mend = f"There are the splits {', '.join(there)}." if there else f"Give the folder that holds {wanted}."
        raise DataError(f"Task {row.id!r}, split {split!r}: no {' or '.join(patterns)} in {root}{pickled}. {mend}")
    place = Place(files=files, root=root, images=row.images, split=official, prompt=row.prompt)
    try:
        items = FORMS[row.form].load(place)
    except (KeyError, TypeError, AttributeError, IndexError) as fault:
        raise DataError(
            f"Task {row.id!r}: {', '.join(map(str, files))} is not in the form {row.form!r} ({fault!r}). "
            f"The form is: {(FORMS[row.form].load.__doc__ or '').splitlines()[0]}"
        ) from fault
    where = f"Task {row.id!r}, {', '.join(path.name for path in files)}"
    if not items:
        raise DataError(f"{where}: no question in split {official!r}.")
    check_ids(items, where)
    return items


def subset(items: Sequence[Item], n: int | None) -> list[Item]:
    """The first `n` by a hash of the id, in file order: always the same ones, and n = 100 lies within n = 500."""
    if n is None or n >= len(items):
        return list(items)
    if n < 1:
        raise RecipeError(f"n = {n}: at least one question a task is needed.")
    chosen = sorted(items, key=lambda item: hashlib.sha256(item.question_id.encode()).digest())[:n]
    ids = {item.question_id for item in chosen}
    return [item for item in items if item.question_id in ids]
