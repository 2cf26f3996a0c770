"""The tasks, one row each: which files of which form, how it is asked, by which rule it is scored.

    load_items(task, root)          official files -> items
    score(task, answers, root)      items + an answer file -> the score; no model, no torch

A benchmark's row reads its official files under `root`; a row of the drawn world reads the same forms under
`root/eval/<task>/`. Adding a benchmark of a known form is adding a row.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leveret.evaluate.forms import FORMS, Form, Item, Place, check_ids
from leveret.evaluate.scorers import MISSING, SCORERS, Verdict
from leveret.evaluate.stats import headline, interval
from leveret.runs import DataError, RecipeError, atomic_write, closest, read_json, read_jsonl

SHORT = "\nAnswer the question using a single word or phrase."
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
        headline="accuracy, mean of parts",
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
)
TASKS: dict[str, TaskRow] = {row.id: row for row in _ROWS}
SUITES: dict[str, tuple[str, ...]] = {
    "world": ("existence", "colour", "shape", "count", "relation", "choice", "box", "word"),
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
        raise DataError(
            f"Task {row.id!r}, split {split!r}: no {' or '.join(patterns)} in {root}{pickled}. "
            f"Give the folder that holds the benchmark's official files."
        )
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


def judge_all(
    row: TaskRow, items: Sequence[Item], texts: Mapping[str, str], scorer: str | None = None
) -> list[Verdict]:
    """One verdict per item; an item without a text is missing, and wrong."""
    rule = SCORERS[scorer or row.scorer]
    return [rule.judge(item, texts[item.question_id]) if item.question_id in texts else MISSING for item in items]


def figures(
    row: TaskRow, items: Sequence[Item], verdicts: Sequence[Verdict], scorer: str | None = None
) -> dict[str, Any]:
    """What is said about one set of answers: the score, its interval, counts, the official figures and the rule."""
    rule = SCORERS[scorer or row.scorer]
    low, high = interval(row.headline, items, verdicts)
    missing = sum(verdict.missing for verdict in verdicts)
    readable = sum(verdict.readable for verdict in verdicts)
    return {
        "score": headline(row.headline, items, verdicts),
        "n": len(items),
        "ci95": [low, high],
        "headline": row.headline,
        "images": len({item.meta["image_id"] for item in items}),
        "parsed": readable,
        "unparsable": len(items) - readable - missing,
        "missing": missing,
        "rule": rule.rule,
        "metrics": rule.summary(items, verdicts),
    }


def score(
    task: str | TaskRow,
    answers: str | Path | Iterable[Mapping[str, Any]],
    data_root: str | Path,
    *,
    split: str = "test",
    scorer: str | None = None,
    allow_missing: bool = False,
    items_path: str | Path | None = None,
) -> dict[str, Any]:
    """Score an answer file against the official files, by the official rule. Needs no model and imports no torch.

    answers        a file of JSON lines or one JSON list (or the records themselves), each with an id (`question_id`,
                   `example_id` or `questionId`) and a `text` (or `prediction`): LLaVA's, Prismatic's and GQA's files
                   fit, and so do those that `evaluate` writes. The order does not matter.
    scorer         another rule of SCORERS over the same form (`vsr_true_false` for `vsr`).
    allow_missing  score questions without an answer as wrong instead of refusing the file.
    items_path     where to write one JSON line per question: what was said, how it was read, what it earned.

    Returns `{"task", "score" (0..1), "n", "ci95", "headline", "images", "parsed", "unparsable", "missing", "rule",
    "metrics" (official names and scale)}`.

    Raises:
        RecipeError: unknown task or scorer.
        DataError: missing, repeated or foreign ids, with counts; files that are not what they should be.
    """
    row = task_row(task)
    if scorer is not None and scorer not in SCORERS:
        raise RecipeError(f"There is no scorer {scorer!r}; known: {', '.join(SCORERS)}.")
    items = load_items(row, data_root, split)
    texts = join(row, items, answers, allow_missing=allow_missing)
    verdicts = judge_all(row, items, texts, scorer)
    if items_path is not None:
        write_items(items_path, row, items, texts, verdicts, scorer)
    return {"task": row.id, **figures(row, items, verdicts, scorer)}


def join(
    row: TaskRow,
    items: Sequence[Item],
    answers: str | Path | Iterable[Mapping[str, Any]],
    *,
    allow_missing: bool = False,
) -> dict[str, str]:
    """question_id -> text. DataError counts all foreign, repeated and missing ids at once."""
    form = FORMS[row.form]
    names = _names(form, items)
    where = str(answers) if isinstance(answers, (str, Path)) else "the answers"
    texts: dict[str, str] = {}
    foreign: list[str] = []
    repeated: list[str] = []
    for number, answer in enumerate(_read_answers(answers)):
        name, text = _name_and_text(answer, where, number)
        # Our own answer files carry the task and the exact id, which needs no second look.
        keys = (name,) if "task" in answer else form.answer_keys(answer, name)
        found = next((names[key] for key in keys if key in names), None)
        if found is None:
            foreign.append(name)
        elif found in texts:
            repeated.append(name)
        else:
            texts[found] = text
    missing = [item.question_id for item in items if item.question_id not in texts]
    faults = [
        f"{len(ids)} {what} (first {ids[0]!r})"
        for ids, what in (
            (foreign, "foreign ids that no question has"),
            (repeated, "repeated ids"),
            ([] if allow_missing else missing, "questions without an answer"),
        )
        if ids
    ]
    if faults:
        unanswered = bool(missing) and not allow_missing
        mend = " Unanswered questions can be scored as wrong with allow_missing." if unanswered else ""
        raise DataError(
            f"{where} does not fit the {len(items)} questions of {row.id!r}: {'; '.join(faults)}. "
            f"Answers are joined by {form.identity}.{mend}"
        )
    return texts


def _names(form: Form, items: Sequence[Item]) -> dict[str, str]:
    """Every name that means exactly one question -> its id; a question's own id always means it."""
    aliases = [(alias, item.question_id) for item in items for alias in form.keys(item)[1:]]
    uses = Counter(alias for alias, _ in aliases)
    return {alias: name for alias, name in aliases if uses[alias] == 1} | {i.question_id: i.question_id for i in items}


def _read_answers(answers: str | Path | Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if not isinstance(answers, (str, Path)):
        return list(answers)
    path = Path(answers)
    if path.suffix == ".json":
        records = read_json(path)
        if isinstance(records, list):
            return records
        raise DataError(f"{path}: one JSON list of answers is expected, not a {type(records).__name__}.")
    return list(read_jsonl(path))


def _name_and_text(answer: Mapping[str, Any], where: str, number: int) -> tuple[str, str]:
    names = [answer[key] for key in ("question_id", "example_id", "questionId") if key in answer]
    texts = [answer[key] for key in ("text", "prediction") if key in answer]
    if not names or not texts or not isinstance(texts[0], (str, int)):
        raise DataError(
            f"{where}, answer {number + 1}: needs an id (question_id, example_id or questionId) and a text (text or "
            f"prediction); it has {', '.join(answer)}."
        )
    return str(names[0]), str(texts[0])


def write_items(
    path: str | Path,
    row: TaskRow,
    items: Sequence[Item],
    texts: Mapping[str, str],
    verdicts: Sequence[Verdict],
    scorer: str | None = None,
) -> None:
    """One JSON line per question, atomically: id, picture, template, prompt, gold, text, parsed, score, details."""
    rule = SCORERS[scorer or row.scorer]
    lines = []
    for item, verdict in zip(items, verdicts, strict=True):
        record = {
            "question_id": item.question_id,
            "image": item.meta["image_id"],
            "template": item.template,
            "prompt": item.prompt,
            "gold": rule.gold(item),
            "text": texts.get(item.question_id),
            "parsed": verdict.parsed,
            "readable": verdict.readable,
            "missing": verdict.missing,
            "score": verdict.score,
            **verdict.detail,
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    atomic_write(path, "\n".join(lines) + "\n")


def subset(items: Sequence[Item], n: int | None) -> list[Item]:
    """The first `n` by a hash of the id, in file order: always the same ones, and n = 100 lies within n = 500."""
    if n is None or n >= len(items):
        return list(items)
    if n < 1:
        raise RecipeError(f"n = {n}: at least one question a task is needed.")
    chosen = sorted(items, key=lambda item: hashlib.sha256(item.question_id.encode()).digest())[:n]
    ids = {item.question_id for item in chosen}
    return [item for item in items if item.question_id in ids]
