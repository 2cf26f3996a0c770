"""Answers against questions: joined by id, judged by the task's rule, summed up. No model, no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leveret.evaluate.forms import FORMS, Form, Item
from leveret.evaluate.scorers import MISSING, SCORERS, Verdict
from leveret.evaluate.stats import headline, interval
from leveret.evaluate.tasks import TaskRow, load_items, task_row
from leveret.runs import DataError, RecipeError, atomic_write, read_json, read_jsonl


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
        RecipeError: unknown task or scorer, or a scorer of other forms than the task's.
        DataError: missing, repeated or foreign ids, with counts; files that are not what they should be.
    """
    row = task_row(task)
    if scorer is not None and scorer not in SCORERS:
        raise RecipeError(f"There is no scorer {scorer!r}; known: {', '.join(SCORERS)}.")
    fit = [name for name, rule in SCORERS.items() if row.form in rule.forms]
    if scorer is not None and scorer not in fit:
        raise RecipeError(
            f"The scorer {scorer!r} judges {', '.join(SCORERS[scorer].forms)}, and {row.id} has the form {row.form!r}: "
            f"allowed for it are {', '.join(fit)}."
        )
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
