"""Files that benchmarks' servers take: answers in their form, as the published converters write them.

SUBMISSIONS has one row a task: the file's name, and what writes it from the questions asked, the answers by question id
and a path. Writers raise DataError where the server would refuse the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leveret.evaluate import text as rules
from leveret.evaluate.forms import Item
from leveret.evaluate.scorers.words import gqa_prediction
from leveret.runs import DataError, atomic_write

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
    "gqa": ("testdev_balanced_predictions.json", write_gqa),
    "vizwiz": ("vizwiz.json", write_vizwiz),
    "vqav2": ("vqav2_test2015.json", write_vqav2),
}
"""Task -> (the file's name, what writes it)."""
