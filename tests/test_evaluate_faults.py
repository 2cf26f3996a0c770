"""Files that are not what they should be, and figures at the edge: told in words, before anybody is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluate_fakes import FakeEngine, FakeModel, tiny_world
from leveret.cli import run as command
from leveret.evaluate import evaluate, load_items, score
from leveret.evaluate.forms.base import read_lines, read_whole
from leveret.evaluate.radar import radar
from leveret.evaluate.scoring import rehearse
from leveret.evaluate.stats import headline, interval
from leveret.evaluate.tasks import TASKS
from leveret.evaluate.text import integer
from leveret.runs import DataError, RecipeError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("faults"))


def pope(root: Path, labels: dict[str, list[Any]]) -> Path:
    root.mkdir(exist_ok=True)
    for category, given in labels.items():
        rows = [
            {"question_id": at, "image": f"{category}{at}.jpg", "text": "Is there?", "label": label}
            for at, label in enumerate(given)
        ]
        (root / f"coco_pope_{category}.json").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.mark.parametrize("more", [0, 3, 10])
def test_all_right_is_one_and_its_interval_is_of_pictures_that_were_not_met(tmp_path: Path, more: int) -> None:
    """Also where a part of POPE holds no yes, whose F1 is then of nothing."""
    root = pope(tmp_path / "pope", {"adversarial": ["yes", "no"], "popular": ["yes"] + ["no"] * more, "random": ["no"]})
    answers = [{"question_id": item.question_id, "text": str(item.gold)} for item in load_items("pope", root)]
    found = score("pope", answers, root)
    assert found["score"] == 1.0
    n = len({item.meta["image_id"] for item in load_items("pope", root)})
    assert found["ci95"] == pytest.approx([0.025 ** (1 / n), 1.0])


def test_an_interval_holds_its_score_also_beyond_one() -> None:
    """A judge may give the answer more points than the reference's."""
    from leveret.evaluate.scorers import Verdict

    items = [replace(_item(), meta={"image_id": str(at)}) for at in range(12)]
    verdicts = [Verdict(1.0, "x", True, detail={"gpt4": 8.0, "model": 9.0}) for _ in items]
    name = "points in relation to the reference's"
    low, high = interval(name, items, verdicts)
    assert headline(name, items, verdicts) == high == pytest.approx(1.125) and low < 1.125


def _item() -> Any:
    from leveret.evaluate.forms import Item

    return Item(question_id="0", image=None, prompt="?", gold="yes", meta={"image_id": "a"})


def test_labels_that_the_benchmark_has_not_are_told(tmp_path: Path) -> None:
    for label in ("No", None, 0):
        root = pope(tmp_path / "pope", {"adversarial": [label], "popular": ["no"], "random": ["yes"]})
        with pytest.raises(DataError, match="allowed are 'yes' and 'no'"):
            load_items("pope", root)


def test_nan_is_no_answer(world: Path, tmp_path: Path) -> None:
    items = load_items("count", world)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(f'{{"question_id": "{item.question_id}", "text": NaN}}' for item in items))
    with pytest.raises(DataError, match="text is nan"):
        score("count", path, world)


def test_an_id_that_stands_twice_in_one_table_is_told(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"0": "2", "1": "3", "0": "4"}')
    with pytest.raises(DataError, match="'0' stands in it twice"):
        score("count", path, world)


@pytest.mark.parametrize("read", [read_whole, lambda path: read_lines(path)])
def test_a_number_of_thousands_of_digits_is_told(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": ' + "1" * 5000 + "}")
    with pytest.raises(DataError, match=r"a\.json"):
        read(path)


def test_a_model_that_counts_on_and_on_counts_nothing(world: Path, tmp_path: Path) -> None:
    assert integer("1" * 160) is None and integer("12") == 12 and integer("twelve") == 12
    results = evaluate(FakeModel(), world, "count", out=tmp_path / "x", engine=FakeEngine(lambda _: "1" * 400))
    assert results["tasks"]["count"]["score"] == 0.0


def test_a_right_answer_that_no_rule_can_read_is_told_before_anybody_is_asked(world: Path, tmp_path: Path) -> None:
    row = TASKS["choice"]
    items = load_items("choice", world)
    strange = [replace(items[0], gold=40), *items[1:]]
    with pytest.raises(DataError, match=f"question '{items[0].question_id}': its right answer '40'"):
        rehearse(row, None, strange)
    rehearse(row, None, items)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"rule": "own", "headline": "F1"}, "right answers alone would score"),
        ({"rule": "scienceqa"}, "right answer|have not what the rule"),
        ({"rule": "own", "headline": "circular accuracy"}, "have not what the rule"),
        ({"rule": "own", "files": ["own/{splitt}.json"]}, "the only thing in braces"),
        ({"rule": "own", "files": ["x{split.json"]}, "the only thing in braces"),
    ],
)
def test_a_task_of_ones_own_that_does_not_fit_together(told: dict[str, Any], said: str, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "q.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}]))
    task = tmp_path / "mine.yaml"
    task.write_text(json.dumps({"form": "own", "files": ["q.json"], **told}))
    with pytest.raises((DataError, RecipeError), match=said):
        evaluate(FakeModel(), tmp_path, str(task), out=tmp_path / "x", engine=FakeEngine(lambda _: "red"))
    assert not (tmp_path / "x").exists()


def test_a_refused_selection_leaves_no_folder(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        evaluate(FakeModel(), world, "count", out=tmp_path / "x", how="foo", n=2, engine=FakeEngine(lambda _: "2"))
    assert not (tmp_path / "x").exists()


def test_grades_where_nobody_judges_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({item.question_id: "2" for item in load_items("count", world)}))
    line = ["score", "count", str(path), "--data", str(world)]
    assert command(line) == 0
    assert command([*line, "--grades", str(tmp_path / "g.json")]) == 2
    assert "nobody judges count" in capsys.readouterr().err


def test_half_a_character_is_written_as_json_would(world: Path, tmp_path: Path) -> None:
    answers = [{"question_id": item.question_id, "text": "2 \ud83d"} for item in load_items("count", world)]
    score("count", answers, world, items_path=tmp_path / "items.jsonl")
    assert read_lines(tmp_path / "items.jsonl")[0]["text"] == "2 \ud83d"


def test_long_names_and_large_ratios_stay_in_the_drawing() -> None:
    text = str(radar(["a" * 60, "b", "c"], {"score": [1.6, 0.5, None]}))
    assert "a" * 19 + "\u2026" in text and "<title>" + "a" * 60 in text
    assert text.count('points="280.0 46.0 ') == 1, "at a tenth beyond the outermost ring, not far above"
