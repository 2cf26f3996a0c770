"""Answers against questions: joined by id, judged by the task's rule, summed up. No model, no torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from leveret.evaluate.forms import FORMS, Form, Item
from leveret.evaluate.forms.base import Repeated, read_lines, read_whole
from leveret.evaluate.headlines import HEADLINES
from leveret.evaluate.judges import Judge, plan, settled
from leveret.evaluate.scorers import MISSING, SCORERS, Scorer, Verdict
from leveret.evaluate.scorers.asking import NEEDED, Judging, bound
from leveret.evaluate.stats import headline, interval
from leveret.evaluate.tasks import TASKS, TaskRow, base, find_files, load_items, one, rule_of
from leveret.runs import DataError, RecipeError, atomic_write


def judge_all(scorer: Scorer, items: Sequence[Item], answers: Mapping[str, str]) -> list[Verdict]:
    """One verdict per item; an item without an answer is missing, and wrong.

    DataError where the right answers are not public."""
    _check_public(items)
    if scorer.together is not None:
        return scorer.together(items, answers)
    return [scorer.judge(item, answers[item.question_id]) if item.question_id in answers else MISSING for item in items]


def _check_public(items: Sequence[Item]) -> None:
    unknown = [item.question_id for item in items if item.gold is None]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(items)} questions (first {unknown[0]!r}) have no right answer in the official "
            "files: it is not public. Write the file that the benchmark's server takes instead."
        )


def rehearse(row: TaskRow, rule: str | None, items: Sequence[Item]) -> None:
    """Score right answers, before anybody is asked: a file's own faults are told now and not after hours.

    DataError where a right answer does not fit the rule, or where a task of one's own would not give all right answers
    all the points. Questions without public answers, and rules that need a judge, are left alone."""
    scorer = rule_of(row, rule)[1]
    if scorer.judging is not None or any(item.gold is None for item in items):
        return
    faults = (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError)
    verdicts = []
    for item in items:
        try:
            gold = scorer.gold(item)
            verdicts.append(scorer.judge(item, gold))
        except DataError:
            raise
        except faults as fault:
            raise DataError(
                f"Task {row.id!r}, question {item.question_id!r}: its right answer {str(item.gold)[:60]!r} is none "
                f"that the rule {scorer.rule!r} can read ({fault!r})."
            ) from fault
    top = scorer.headline or row.headline
    try:
        reached = headline(top, items, verdicts)
        scorer.summary(items, verdicts)
    except faults as fault:
        raise DataError(
            f"Task {row.id!r}: its questions have not what the rule {scorer.rule!r} and the headline {top!r} go by "
            f"({fault!r}). A rule belongs to the form of its benchmark; `own` and `exact` go with any."
        ) from fault
    if row.id not in TASKS and base(row.id) not in TASKS and reached < 0.999:
        raise DataError(
            f"Task {row.id!r}: right answers alone would score {reached:.3f}: the headline {top!r} is not one for "
            "them. Leave `headline` out, or take `accuracy`."
        )


def figures(row: TaskRow, rule: str, items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What is said about one set of answers: the score, its interval, counts, the official figures and the rule."""
    scorer = SCORERS[row.rules[rule]]
    name = scorer.headline or row.headline
    low, high = interval(name, items, verdicts)
    missing = sum(verdict.missing for verdict in verdicts)
    readable = sum(verdict.readable for verdict in verdicts)
    return {
        "score": headline(name, items, verdicts),
        "n": len(items),
        "ci95": [low, high],
        "headline": name,
        "images": len({item.meta["image_id"] for item in items}),
        "parsed": readable,
        "unparsable": len(items) - readable - missing,
        "missing": missing,
        "rule": rule,
        "rule_says": scorer.rule,
        "metrics": scorer.summary(items, verdicts),
    }


def score(
    task: str | TaskRow,
    answers: str | Path | Iterable[Mapping[str, Any]],
    data_root: str | Path,
    *,
    split: str = "test",
    rule: str | None = None,
    allow_missing: bool = False,
    items_path: str | Path | None = None,
    judge: Judge | None = None,
    grades_path: str | Path | None = None,
) -> dict[str, Any]:
    """Score an answer file against the official files, by the official rule. Needs no model and imports no torch.

    answers        a file of JSON lines or one JSON list (or the records themselves), each with an id (`question_id`,
                   `example_id` or `questionId`) and a `text` (or `prediction`), or the `probabilities` of the options:
                   LLaVA's, Prismatic's and GQA's files fit, and so do those that `evaluate` writes. The order does not
                   matter.
    rule           another of the task's rules, by the name of its lineage (`lmms_eval`).
    allow_missing  score questions without an answer as wrong instead of refusing the file.
    items_path     where to write one JSON line per question: what was said, how it was read, what it earned.
    judge          who judges where the rule asks a language model; what it did stands under `judge` in what is
                   returned, and answers that nobody judged are refused as missing ones are.
    grades_path    where to write what the judge said, in the benchmark's own form.

    Returns `{"task", "items" (how many), "score" (0..1), "n", "ci95", "headline", "images", "parsed", "unparsable",
    "missing", "rule", "rule_says", "metrics" (official names and scale)}`.

    Raises:
        RecipeError: unknown task, or a rule that the task does not have.
        DataError: missing, repeated or foreign ids, with counts; files that are not what they should be.
    """
    answers = answers if isinstance(answers, (str, Path)) else list(answers)
    row, name, scorer, items, found = _joined(task, answers, data_root, split, rule, allow_missing)
    rehearse(row, name, items)
    if grades_path is not None and scorer.judging is None:
        raise RecipeError(f"--grades: nobody judges {row.id} by the rule {name}, so there are none")
    told: dict[str, Any] = {}
    if scorer.judging is not None:
        replies, told = judged(row, scorer.judging, items, found, judge, allow_missing=allow_missing)
        if grades_path is not None:
            _write_grades(grades_path, scorer.judging.record(items, replies, _answer_ids(row, items, answers)))
        scorer = bound(scorer, replies)
    verdicts = judge_all(scorer, items, found)
    if items_path is not None:
        top = scorer.headline or row.headline
        write_items(items_path, scorer, items, found, verdicts, task=row.id, rule=name, headline=top)
    return {"task": row.id, "items": len(items), **figures(row, name, items, verdicts), **told}


def judged(
    row: TaskRow,
    judging: Judging,
    items: Sequence[Item],
    texts: Mapping[str, str],
    judge: Judge | None,
    *,
    allow_missing: bool = False,
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """(question_id -> a judge's replies, `{"judge": what it did}`).

    RecipeError without a judge; DataError where answers stay unjudged and `allow_missing` does not make them wrong.
    """
    _check_public(items)  # before anything is spent
    if judge is None:
        raise RecipeError(f"{row.id!r}: {NEEDED}")
    talks = judge.talks(row, judging, items, texts)
    return settled(row, talks, allow=allow_missing), {"judge": judge.facts(judging, talks)}


def _answer_ids(row: TaskRow, items: Sequence[Item], answers: Any) -> dict[str, Any]:
    """question_id -> the answer's own id, where it has one."""
    form = FORMS[row.form]
    names, ids = _names(form, items), dict[str, Any]()
    for record in _read_answers(answers, form):
        if "answer_id" in record:
            keys = (str(record[key]) for key in ID_KEYS if key in record)
            ids |= {names[key]: record["answer_id"] for key in keys if key in names}
    return ids


def _write_grades(path: str | Path, record: Any) -> None:
    if isinstance(record, list):
        atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in record))
    else:
        atomic_write(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def plan_judge(
    task: str | TaskRow,
    answers: str | Path | Iterable[Mapping[str, Any]],
    data_root: str | Path,
    judge: Judge,
    path: str | Path,
    *,
    price: tuple[float, float] | None = None,
    split: str = "test",
    rule: str | None = None,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """What `score` would ask a judge, written to `path`; see `judges.plan`. RecipeError where the rule asks nobody."""
    row, name, scorer, items, found = _joined(task, answers, data_root, split, rule, allow_missing)
    if scorer.judging is None:
        raise RecipeError(f"The rule {name!r} of {row.id!r} asks no judge: scoring it costs nothing.")
    return {"task": row.id, "rule": name, **plan(judge, row, scorer.judging, items, found, path, price)}


def _joined(
    task: str | TaskRow,
    answers: str | Path | Iterable[Mapping[str, Any]],
    data_root: str | Path,
    split: str,
    rule: str | None,
    allow_missing: bool,
) -> tuple[TaskRow, str, Scorer, list[Item], dict[str, str]]:
    row, split = one(task, split)
    form = FORMS[row.form]
    records = _read_answers(answers, form)
    name, scorer = rule_of(row, rule, {kind for record in records for kind in _held(record, form)} or {"text"})
    if isinstance(answers, (str, Path)) and Path(answers).is_dir() and find_files(row, answers, split)[1]:
        data_root = answers  # MMMU's example outputs: the folder of the answers holds the questions they are to
    items = load_items(row, data_root, split)
    where = str(answers) if isinstance(answers, (str, Path)) else "the answers"
    if not records:
        raise DataError(f"{where}: there is no answer in it.")
    _check_asked(row, items, records, where, data_root, split)
    return row, name, scorer, items, join(row, items, records, where, reads=scorer.reads, allow_missing=allow_missing)


def _check_asked(
    row: TaskRow,
    items: Sequence[Item],
    records: Sequence[Mapping[str, Any]],
    where: str,
    root: str | Path,
    split: str,
) -> None:
    """Our own answer files say to what they answer: ids alone are often the same in other tasks and splits, and such
    answers would be scored without a word. DataError names the first that answers something else."""
    ours = [record for record in records if {"task", "answer_id", "prompt", "question_id"} <= record.keys()]
    other = {str(record["task"]) for record in ours} - {row.id}
    known = sorted(name for name in other if base(name) in TASKS and base(name) != base(row.id))
    if known and base(row.id) in TASKS:
        raise DataError(f"{where}: these are answers to {known[0]!r}, and {row.id!r} was to be scored. Name that task.")
    prompts = {item.question_id: {item.prompt} for item in items}

    def strange() -> list[Mapping[str, Any]]:
        return [
            record
            for record in ours
            if record["prompt"] not in prompts.get(str(record["question_id"]), [record["prompt"]])
        ]

    wordings = iter(row.prompts)
    while (wrong := strange()) and (lineage := next(wordings, None)):
        for item in load_items(row, root, split, lineage):
            prompts.setdefault(item.question_id, set()).add(item.prompt)
    if wrong:
        name = str(wrong[0]["question_id"])
        raise DataError(
            f"{where}: {len(wrong)} answers are to other questions than those that split {split!r} of {row.id!r} has "
            f"under their ids, first {name!r}: asked {str(wrong[0]['prompt'])[:80]!r}, the question is "
            f"{sorted(prompts[name])[0][:80]!r}. Name the --split and the --data that were asked."
        )


def answered(
    task: str | TaskRow,
    answers: str | Path | Iterable[Mapping[str, Any]],
    data_root: str | Path,
    *,
    split: str = "test",
) -> tuple[list[Item], dict[str, str]]:
    """All questions, and question_id -> text of the answered ones. DataError counts foreign and repeated ids."""
    row, split = one(task, split)
    items = load_items(row, data_root, split)
    where = str(answers) if isinstance(answers, (str, Path)) else "the answers"
    records = _read_answers(answers, FORMS[row.form])
    _check_asked(row, items, records, where, data_root, split)
    return items, join(row, items, records, where, allow_missing=True)


def join(
    row: TaskRow,
    items: Sequence[Item],
    answers: Sequence[Mapping[str, Any]],
    where: str,
    *,
    reads: str = "text",
    allow_missing: bool = False,
) -> dict[str, str]:
    """question_id -> what the rule reads of its answer. DataError counts all foreign, repeated and missing ids at once.

    where  the answers' file, for messages."""
    form = FORMS[row.form]
    names = _names(form, items)
    texts: dict[str, str] = {}
    foreign: list[str] = []
    repeated: list[str] = []
    for number, answer in enumerate(answers):
        name, text = _name_and_value(answer, reads, where, number, form)
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
        mend = (
            " Unanswered questions can be scored as wrong: --allow-missing (from Python allow_missing=True)."
            if unanswered
            else ""
        )
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


def _read_answers(answers: str | Path | Iterable[Mapping[str, Any]], form: Form) -> list[Mapping[str, Any]]:
    if not isinstance(answers, (str, Path)):
        return list(answers)
    path = Path(answers)
    if form.read is not None and (own := form.read(path)) is not None:
        return list(own)
    records = _read_json(path)
    if isinstance(records, dict) and all(isinstance(text, str) for text in records.values()):
        return [{"question_id": name, "text": text} for name, text in records.items()]  # MM-Vet's own form
    if isinstance(records, dict) and all(isinstance(record, dict) for record in records.values()):
        records = [
            {"question_id": name, **record} for name, record in records.items()
        ]  # Prismatic's results: id -> record
    if not isinstance(records, list):
        kind = KINDS.get(type(records), "a value")
        raise DataError(f"{path}: one JSON list of answers is expected, or one answer a line; it is {kind}.")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise DataError(f"{path}, answer {number}: a table of fields is expected, not {str(record)[:60]!r}.")
    return list(records)


KINDS = {dict: "one table of something else", str: "a text", type(None): "null", bool: "a truth value"}
KINDS |= {int: "a number", float: "a number"}


def _read_json(path: Path) -> Any:
    """One JSON value or JSON lines, whatever the file is called."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; a file of answers is wanted: JSON lines, or one JSON list.")
    whole_first = path.suffix == ".json"
    try:
        records: Any = read_whole(path, once=True) if whole_first else read_lines(path, torn=True)
    except Repeated:
        raise
    except DataError as fault:
        try:
            # One torn line alone is no file of lines: it is a list that was cut, or no JSON at all.
            records = read_lines(path) if whole_first else read_whole(path, once=True)
        except DataError:
            told = str(fault).removesuffix(" Fetch the file again.").rstrip(".")
            raise DataError(f"{told}. Answers are JSON lines or one JSON list.") from None
    return records[0] if isinstance(records, list) and len(records) == 1 and isinstance(records[0], list) else records


ID_KEYS = ("question_id", "example_id", "questionId", "id", "index")
TEXT_KEYS = ("text", "prediction", "response")


def _held(answer: Mapping[str, Any], form: Form) -> Iterator[str]:
    """Which of the fields that rules read an answer has."""
    if any(key in answer for key in (*TEXT_KEYS, *form.texts)):
        yield "text"
    if any(key.endswith("probabilities") for key in answer):
        yield "probabilities"
    if "answer" in answer:
        yield "answer"


def _is_said(value: Any) -> bool:
    """Whether it is an answer. NaN is what is left of a missing one that went through a table."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _name_and_value(answer: Mapping[str, Any], reads: str, where: str, number: int, form: Form) -> tuple[str, str]:
    ids, texts = (*ID_KEYS, *form.ids), (*TEXT_KEYS, *form.texts)
    names = [answer[key] for key in ids if key in answer]
    if reads == "probabilities":
        values = [json.dumps(answer[key]) for key in answer if key.endswith("probabilities")]
    elif reads == "answer":
        values = [str(answer["answer"])] if "answer" in answer else []
    else:
        values = [str(answer[key]) for key in texts if _is_said(answer.get(key))]
    if not names or not values:
        wanted = "the probabilities of its options" if reads == "probabilities" else f"a text ({' or '.join(texts)})"
        empty = [f"{key} is {answer[key]!r}"[:60] for key in texts if key in answer and not values]
        raise DataError(
            f"{where}, answer {number + 1}: needs an id ({', '.join(ids)}) and {wanted}; it has "
            f"{', '.join(answer) or 'no field'}{''.join(f'; {fault}' for fault in empty)}."
        )
    return str(names[0]), values[0]


def write_items(
    path: str | Path,
    scorer: Scorer,
    items: Sequence[Item],
    texts: Mapping[str, str],
    verdicts: Sequence[Verdict],
    *,
    task: str,
    rule: str,
    headline: str,
) -> None:
    """One JSON line per question, atomically: id, picture, template, prompt, gold, text, parsed, score, details; and
    what `compare` needs to put two such files beside each other: task, rule, headline, and what the answer `adds` to
    the headline's sums."""
    adds = HEADLINES[headline].columns(items, verdicts).tolist()
    lines = []
    for item, verdict, sums in zip(items, verdicts, adds, strict=True):
        record = {
            "question_id": item.question_id,
            "image": item.meta["image_id"],
            "template": item.template,
            "prompt": item.prompt,
            "gold": scorer.gold(item),
            "text": texts.get(item.question_id),
            "parsed": verdict.parsed,
            "readable": verdict.readable,
            "missing": verdict.missing,
            "score": verdict.score,
            **verdict.detail,
            "task": task,
            "rule": rule,
            "headline": headline,
            "adds": [int(value) if value.is_integer() else value for value in sums],
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    atomic_write(path, "\n".join(lines) + "\n")
