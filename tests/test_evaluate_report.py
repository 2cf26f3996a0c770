"""The page of an examination: whole, self-contained, and honest about what it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from evaluate_fakes import FakeEngine, FakeModel, sighted, tiny_world, write
from leveret.evaluate import SUITES, evaluate
from leveret.evaluate.report import in_words


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_world(tmp_path_factory.mktemp("world"))
    folder = tmp_path_factory.mktemp("run") / "out"

    def say(request: object) -> str:
        text = sighted(request)
        return "<script>alert(1)</script>" if text == "W1" else text

    evaluate(FakeModel(), root, out=folder, engine=FakeEngine(say))
    return folder


def test_the_page_shows_every_task_with_pictures(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    for task in SUITES["world"]:
        assert f">{task}</h2>" in page
    assert page.count("data:image/") >= 40
    assert "counts as right" in page and "Right answer (row)" in page
    assert page.count("<script>") == 1 and "&lt;script&gt;alert(1)" in page and "<script>alert" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)


def test_the_table_equals_the_results(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    table = (out / "results.md").read_text()
    for name, facts in results["tasks"].items():
        low, high = facts["ci95"]
        assert f"| {name} | {facts['score']:.3f} | {low:.3f} - {high:.3f} | {facts['n']} |" in table


def test_the_sentence_names_what_sight_does_not_help() -> None:
    facts = {
        "colour": {"score": 0.9, "ci95": [0.8, 1.0], "majority": 0.2, "blind": 0.3},
        "count": {"score": 0.4, "ci95": [0.3, 0.5], "majority": 0.38, "blind": None},
    }
    words = in_words(facts)
    assert "most in colour (+0.60" in words and "least in count (+0.02)" in words and "chance: count" in words
    guessed = {"own": {"score": 0.1, "ci95": [0.0, 0.3], "majority": 0.15, "blind": 0.15}}
    assert in_words(guessed).startswith("Nothing is above guessing; nearest is the score in own (-0.05")
    bare = {"colour": {"score": 0.9, "ci95": [0.8, 1.0], "majority": None, "blind": None}}
    assert "no baseline" in in_words(bare).lower()


def test_published_figures_stand_beside_ours_where_there_are_some(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "pope/val2014").mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (20, 20), (250, 0, 0)).save(tmp_path / f"pope/val2014/{name}.jpg")
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": k, "image": f"{'ab'[k % 2]}.jpg", "text": "Is it?", "label": "yes"} for k in range(1, 5)
        ]
        write(tmp_path / f"pope/coco/coco_pope_{category}.json", rows)
    facts = evaluate(FakeModel(), tmp_path, "pope", out=tmp_path / "o", engine=FakeEngine(lambda request: "Yes"))
    assert facts["tasks"]["pope"]["score"] == 1.0 and facts["tasks"]["pope"]["chance"] == pytest.approx(0.667, abs=0.03)
    page = (tmp_path / "o/report.html").read_text("utf-8")
    assert "Beside published figures" in page and "Bunny-v1.0-3B" in page and 'class="radar"' not in page
    assert "86.8" in (tmp_path / "o/results.tex").read_text("utf-8")
    assert "Beside published" not in (tmp_path / "o/results.md").read_text("utf-8").partition("Beside Bunny")[0]


def test_the_page_draws_in_a_browser(out: Path, chromium: object) -> None:
    from PIL import Image

    picture = Image.open(chromium(out / "report.html", "examination"))  # type: ignore[operator]
    assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 200
