"""Files that benchmarks' servers take: answers in their form, as the published converters write them.

SUBMISSIONS has one row a task: the file's name, and what writes it from the questions asked, the answers by question id
and a path. Writers raise DataError where the server would refuse the file. The files of tasks with letters and with
judges are written in rooms of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leveret.evaluate import text as rules
from leveret.evaluate.forms import Item
from leveret.evaluate.scorers.words import gqa_prediction
from leveret.evaluate.scoring import answered
from leveret.evaluate.submissions.choice import SUBMISSIONS as CHOICE
from leveret.evaluate.submissions.judged import SUBMISSIONS as JUDGED
from leveret.evaluate.tasks import TaskRow, base, one
from leveret.runs import DataError, RecipeError, atomic_write

Write = Callable[[Sequence[Item], Mapping[str, str], Path], None]
"""(items, question_id -> text, path): writes the file."""


def complete(items: Sequence[Item], texts: Mapping[str, str], why: str) -> None:
    """DataError where questions have no answer, with how many; `why` says what that does to the file."""
    missing = [item.question_id for item in items if item.question_id not in texts]
    if missing:
        raise DataError(f"{len(missing)} of {len(items)} questions have no answer (first {missing[0]!r}); {why}.")


def _json(path: Path, records: list[dict[str, Any]]) -> None:
    # As json.dump writes it: one line, what is not ASCII escaped. The servers take it so.
    atomic_write(path, json.dumps(records))


def write_vqav2(items: Sequence[Item], texts: Mapping[str, str], path: Path) -> None:
    """EvalAI 830 (convert_vqav2_for_submission.py of LLaVA and Bunny): `[{question_id, answer}]`, answers through m4c.

    The server wants every question of test2015, also where only test-dev was asked: ask for `items` of the split
    `server`. Questions without an answer get "".
    """
    records = []
    for item in items:
        if not item.question_id.isdecimal():
            raise DataError(f"VQAv2's question ids are numbers, not {item.question_id!r}.")
        said = texts.get(item.question_id)
        records.append({"question_id": int(item.question_id), "answer": "" if said is None else rules.m4c(said)})
    _json(path, records)


def write_vizwiz(items: Sequence[Item], texts: Mapping[str, str], path: Path) -> None:
    """EvalAI 2185 (convert_viswiz_for_submission.py): `[{image, answer}]`, answers through m4c; none may be missing."""
    complete(items, texts, "VizWiz's server wants all")
    _json(path, [{"image": i.meta["image_id"], "answer": rules.m4c(texts[i.question_id])} for i in items])


def write_gqa(items: Sequence[Item], texts: Mapping[str, str], path: Path) -> None:
    """What GQA's eval.py reads (convert_gqa_for_eval.py): `[{questionId, prediction}]`; none may be missing."""
    complete(items, texts, "GQA's eval.py stops at the first that is missing")
    _json(path, [{"questionId": i.question_id, "prediction": gqa_prediction(texts[i.question_id])} for i in items])


SUBMISSIONS: dict[str, tuple[str, Write]] = {
    **CHOICE,
    **JUDGED,
    "gqa": ("testdev_balanced_predictions.json", write_gqa),
    "vizwiz": ("vizwiz.json", write_vizwiz),
    "vqav2": ("vqav2_test2015.json", write_vqav2),
}
"""Task -> (the name of its file, or of the folder where it is several; what writes it)."""


def submit(
    task: str | TaskRow,
    answers: str | Path | Iterable[Mapping[str, Any]],
    data_root: str | Path,
    path: str | Path,
    *,
    split: str = "test",
) -> Path:
    """Write the file that a benchmark's server takes, of answers as `scoring.score` reads them; returns where it is.

    path   the file; in a folder that is there it gets the name that the benchmark gives it.
    split  the part that was asked about (`server`, where only the server knows the answers).

    Raises:
        RecipeError: unknown task, or one for which no server takes a file.
        DataError: repeated or foreign ids, answers missing where the server wants all, files that are not in order.
    """
    row, split = one(task, split)
    if base(row.id) not in SUBMISSIONS:
        raise RecipeError(
            f"No server takes a file of {row.id!r}; files are written for {', '.join(sorted(SUBMISSIONS))}."
        )
    name, write = SUBMISSIONS[base(row.id)]
    items, texts = answered(row, answers, data_root, split=split)
    path = Path(path)
    path = path / name if path.is_dir() else path
    write(items, texts, path)
    return path
