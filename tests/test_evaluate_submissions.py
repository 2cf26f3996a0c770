"""Files for the servers: to the byte what the published converters write, refused where the server would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from leveret.evaluate import load_items
from leveret.evaluate.forms import Item
from leveret.evaluate.submissions import SUBMISSIONS
from leveret.evaluate.tasks import TASKS
from leveret.runs import DataError


def answers(path: Path) -> dict[str, str]:
    lines = path.read_text("utf-8").split("\n")
    return {str(record["question_id"]): record["text"] for record in map(json.loads, filter(None, lines))}


def items_of(*names: str, gold: Any = None) -> list[Item]:
    return [Item(name, None, "", gold, meta={"image_id": f"{name}.jpg"}) for name in names]


def test_every_row_is_of_a_task() -> None:
    assert set(SUBMISSIONS) <= set(TASKS)
    assert len({name for name, _ in SUBMISSIONS.values()}) == len(SUBMISSIONS)


@pytest.mark.goldens
@pytest.mark.parametrize(
    ("task", "questions", "expected"),
    [
        ("vqav2", "submission_split.jsonl", "submission_expected.json"),
        ("vizwiz", "val.json", "submission_expected.json"),
        ("vizwiz", "bunny_val.jsonl", "submission_expected.json"),
        ("gqa", "testdev_balanced_questions.json", "testdev_balanced_predictions_expected.json"),
    ],
)
def test_files_are_the_converters(goldens: Path, tmp_path: Path, task: str, questions: str, expected: str) -> None:
    golden = goldens / "eval" / task
    if not golden.is_dir():
        pytest.skip(f"{golden} is not here")
    asked = tmp_path / {"submission_split.jsonl": "bunny_vqav2_mscoco_test2015.jsonl"}.get(questions, questions)
    shutil.copy(golden / questions, asked)
    items = load_items(task, tmp_path, "server" if task == "vqav2" else "test")
    name, write = SUBMISSIONS[task]
    write(items, answers(golden / "predictions.jsonl"), tmp_path / name)
    assert json.loads((tmp_path / name).read_text("utf-8")) == json.loads((golden / expected).read_text("utf-8"))


def test_questions_that_were_not_asked_are_empty_for_vqav2(tmp_path: Path) -> None:
    SUBMISSIONS["vqav2"][1](items_of("7", "8", "9"), {"8": "Two cats.", "9": ""}, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"question_id": 7, "answer": ""},
        {"question_id": 8, "answer": "2 cats"},
        {"question_id": 9, "answer": ""},
    ]
    with pytest.raises(DataError, match="are numbers, not 'x'"):
        SUBMISSIONS["vqav2"][1](items_of("x"), {}, tmp_path / "out.json")


@pytest.mark.parametrize("task", ["vizwiz", "gqa"])
def test_a_server_that_wants_all_is_not_given_less(tmp_path: Path, task: str) -> None:
    with pytest.raises(DataError, match=r"2 of 3 questions have no answer .first '0'"):
        SUBMISSIONS[task][1](items_of("0", "1", "2"), {"1": "x"}, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_what_is_not_ascii_is_escaped_as_the_converters_do(tmp_path: Path) -> None:
    SUBMISSIONS["gqa"][1](items_of("1"), {"1": "Größe.."}, tmp_path / "out.json")
    assert (tmp_path / "out.json").read_bytes() == rb'[{"questionId": "1", "prediction": "gr\u00f6\u00dfe"}]'
