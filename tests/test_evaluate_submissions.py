"""Files for the servers: to the byte what the published converters write, refused where the server would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evaluate_fakes import FakeEngine, FakeModel
from leveret.evaluate import evaluate, load_items
from leveret.evaluate.forms import Item
from leveret.evaluate.submissions import SUBMISSIONS, submit
from leveret.evaluate.tasks import TASKS, wording
from leveret.runs import DataError, RecipeError, read_json


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


def picture(path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_a_part_whose_answers_only_the_server_knows(tmp_path: Path) -> None:
    """Asked, not scored, and its file written from the answers."""
    questions = [{"question_id": 10 + k, "image_id": k, "question": f"What is {k}?"} for k in range(3)]
    whole = json.dumps({"questions": questions})
    (tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json").write_text(whole, encoding="utf-8")
    for k in range(3):
        picture(tmp_path / f"test2015/COCO_test2015_{k:012d}.jpg")
    engine = FakeEngine(lambda request: "Two cats.")
    results = evaluate(FakeModel(), tmp_path, "vqav2", out=tmp_path / "out", engine=engine, split="server", n=2)
    said = tmp_path / "out/answers/vqav2.jsonl"
    assert results["tasks"] == {} and results["unscored"] == {"vqav2": {"n": 2, "answers": str(said)}}
    assert (tmp_path / "out/report.html").exists() and read_json(tmp_path / "out/results.json")["unscored"]
    written = submit("vqav2", said, tmp_path, tmp_path / "out", split="server")
    assert written == tmp_path / "out/vqav2_test2015.json"
    assert sorted(record["answer"] for record in read_json(written)) == ["", "2 cats", "2 cats"]
    with pytest.raises(RecipeError, match="No server takes a file of 'pope'; files are written for cmmmu, gqa"):
        submit("pope", said, tmp_path, tmp_path / "out")


def test_the_command_writes_it(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from leveret.cli import app

    rows = [{"image": f"VizWiz_test_{k}.jpg", "question": "What?"} for k in range(2)]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    said = tmp_path / "said.jsonl"
    said.write_text("".join(json.dumps({"question_id": k, "text": "Tea!"}) + "\n" for k in range(2)), encoding="utf-8")
    given = ["score", "vizwiz", str(said), "--data", str(tmp_path), "--split", "server"]
    done = CliRunner().invoke(app, [*given, "--submission", str(tmp_path / "up.json")])
    assert done.exit_code == 0 and "up.json" in done.output
    assert read_json(tmp_path / "up.json") == [{"image": f"VizWiz_test_{k}.jpg", "answer": "tea"} for k in range(2)]


def test_a_rule_over_probabilities_asks_in_its_own_words(tmp_path: Path) -> None:
    rows = [
        {"answer": 2, "image": "a.jpg", "question": "How many?", "question_id": k, "issimple": True} for k in (1, 2)
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    picture(tmp_path / "a.jpg")
    said: list[str] = []

    def tell(request: Any) -> str:
        said.append(request.turns[0].text)
        return "2"

    evaluate(FakeModel(), tmp_path, "tally_qa", out=tmp_path / "words", engine=FakeEngine(tell), blind=False)
    assert all("\nA. 0\n" not in text for text in said)
    said.clear()
    evaluate(
        FakeModel(), tmp_path, "tally_qa", out=tmp_path / "prismatic", engine=FakeEngine(tell), blind=False,
        prompts="prismatic",
    )  # fmt: skip
    assert said and all("\nA. 0\n" in text and "\nP. 15\n" in text for text in said)
    assert wording(TASKS["tally_qa"], "prismatic_probabilities") == "prismatic"
    assert wording(TASKS["tally_qa"], "tallyqa_official_integers") is None
    with pytest.raises(RecipeError, match="'tally_qa' has no prompts 'qwen'"):
        evaluate(FakeModel(), tmp_path, "tally_qa", out=tmp_path / "x", engine=FakeEngine(tell), prompts="qwen")
