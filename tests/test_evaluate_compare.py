"""Two examinations beside each other: pairing, intervals, tests, flips, refusals, the page."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from browser_pipe import Browser
from evaluate_fakes import FakeEngine, FakeModel, sighted, tiny_world
from leveret.cli import run
from leveret.evaluate import evaluate, score
from leveret.evaluate.compare import compare, holm, lines, mcnemar
from leveret.evaluate.compare_page import write_page
from leveret.runs import DataError, RecipeError


def items(path: Path, scores: dict[str, float], images: dict[str, str] | None = None, **changed: Any) -> Path:
    """An items file with these scores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        for name, value in scores.items():
            line = {
                "question_id": name, "image": (images or {}).get(name, name), "prompt": f"{name}?", "gold": "g",
                "text": f"said {value}", "score": value, "task": "t", "rule": "own", "headline": "accuracy",
                "adds": [value, 1],
            }  # fmt: skip
            stream.write(json.dumps(line | changed) + "\n")
    return path


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    from scipy.stats import binomtest

    wanted = binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(wanted, rel=1e-9)


def test_holm_steps_down_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5]) == [0.5] and holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_is_at_least_the_value(values: list[float]) -> None:
    corrected = holm(values)
    assert all(value <= more <= 1 for value, more in zip(values, corrected, strict=True))
    pairs = sorted(zip(values, corrected, strict=True))
    assert [more for _, more in pairs] == sorted(corrected)


def test_what_is_told_of_one_task(tmp_path: Path) -> None:
    rng = random.Random(1)
    left = {f"q{k}": float(rng.random() < 0.6) for k in range(200)}
    right = {name: float(rng.random() < 0.9) if rng.random() < 0.5 else value for name, value in left.items()}
    found = compare(items(tmp_path / "a.jsonl", left), items(tmp_path / "b.jsonl", dict(reversed(right.items()))))
    row = found["tasks"]["t"]
    lost = [name for name in left if left[name] > right[name]]
    won = [name for name in left if left[name] < right[name]]
    assert [flip["question_id"] for flip in row["flips"]["right_to_wrong"]] == lost
    assert [flip["question_id"] for flip in row["flips"]["wrong_to_right"]] == won
    assert row["flips"]["wrong_to_right"][0]["b"] == "said 1.0"
    assert row["n"] == 200 and row["difference"] == pytest.approx((len(won) - len(lost)) / 200)
    assert row["p"] == row["p_mcnemar"] == mcnemar(len(lost), len(won)) and row["test"] == "McNemar, exact"
    # The spread of a paired difference of independent questions: known in closed form.
    d = np.array([right[name] - left[name] for name in left])
    half = 1.96 * d.std() / 200**0.5
    assert row["ci95"] == pytest.approx([d.mean() - half, d.mean() + half], abs=0.012)
    assert row["differs"] == (row["p"] < 0.05)


def test_questions_on_one_picture_are_drawn_together(tmp_path: Path) -> None:
    rng = random.Random(2)
    names = [f"q{k}" for k in range(240)]
    wins = {k: float(rng.random() < 0.7) for k in range(12)}
    left = {name: 0.0 for name in names}
    right = {name: wins[k % 12] for k, name in enumerate(names)}
    images = {name: f"i{k % 12}" for k, name in enumerate(names)}
    row = compare(items(tmp_path / "a.jsonl", left, images), items(tmp_path / "b.jsonl", right, images))["tasks"]["t"]
    alone = compare(items(tmp_path / "c.jsonl", left), items(tmp_path / "d.jsonl", right))["tasks"]["t"]
    assert row["images"] == 12 and np.diff(row["ci95"]) > 3 * np.diff(alone["ci95"])
    assert compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")["tasks"]["t"] == row, "the same draws every time"


def test_soft_scores_are_tested_by_the_bootstrap(tmp_path: Path) -> None:
    left = {f"q{k}": k % 4 / 3 for k in range(60)}
    right = {name: min(1.0, value + 0.3) for name, value in left.items()}
    row = compare(items(tmp_path / "a.jsonl", left), items(tmp_path / "b.jsonl", right))["tasks"]["t"]
    assert row["p_mcnemar"] is None and row["test"] == "bootstrap" and 0 < row["p"] < 0.01
    assert len(row["flips"]["wrong_to_right"]) == 15, "only what crosses to right is a flip"


def test_nothing_turned_is_no_certainty(tmp_path: Path) -> None:
    left = {f"q{k}": 1.0 for k in range(20)}
    row = compare(items(tmp_path / "a.jsonl", left), items(tmp_path / "b.jsonl", left))["tasks"]["t"]
    assert row["difference"] == 0 and row["p"] == 1 and not row["differs"]
    assert row["ci95"][0] < -0.1 and row["ci95"][1] > 0.1


def test_only_the_questions_both_were_asked_count(tmp_path: Path) -> None:
    left = {f"q{k}": 1.0 for k in range(30)}
    right = {f"q{k}": 0.0 for k in range(20, 80)}
    row = compare(items(tmp_path / "a.jsonl", left), items(tmp_path / "b.jsonl", right))["tasks"]["t"]
    assert row["n"] == 10 and row["left_out"] == {"a": 20, "b": 50} and (row["a"], row["b"]) == (1.0, 0.0)


BASE = {f"q{k}": float(k % 2) for k in range(6)}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompt": "otherwise?"}, "different questions of 't': 6 of 6 are asked in other words, first 'q0'"),
        ({"gold": "h"}, "with another right answer"),
        ({"image": "another"}, "pictured otherwise"),
        ({"rule": "lmms_eval"}, "different rules in 't': own .* lmms_eval .*--rule t=own"),
        ({"headline": "F1, mean of parts"}, "different rules"),
        ({"adds": [1, 1, 1, 1]}, "different parts"),
        ({"task": "u"}, "share no task: the first has t, the second u"),
    ],
)
def test_other_questions_are_refused_by_name(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    a, b = items(tmp_path / "a.jsonl", BASE), items(tmp_path / "b.jsonl", BASE, **changed)
    with pytest.raises(RecipeError, match=said):
        compare(a, b)


def test_files_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    good = items(tmp_path / "a.jsonl", BASE)
    with pytest.raises(RecipeError, match="no id of"):
        compare(good, items(tmp_path / "o.jsonl", {"x": 1.0}))
    (tmp_path / "answers.jsonl").write_text('{"question_id": "q0", "text": "yes"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "twice.jsonl").write_text(good.read_text() + good.read_text())
    (tmp_path / "torn.jsonl").write_text(good.read_text()[:-20])
    items(tmp_path / "new.jsonl", BASE, headline="a new one")
    (tmp_path / "folder").mkdir()
    for name, said in {
        "answers.jsonl": "line 1: no image, prompt",
        "empty.jsonl": "is empty",
        "twice.jsonl": "line 7: the question 'q0' stands twice",
        "torn.jsonl": "the last line is torn",
        "new.jsonl": "'a new one' is not known",
        "folder": "no items",
        "nowhere": "is not there",
    }.items():
        with pytest.raises(DataError, match=said):
            compare(good, tmp_path / name)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tiny_world(tmp_path_factory.mktemp("world"))
    folder = tmp_path_factory.mktemp("runs")

    def worse(request: Any) -> str:
        return "red" if "What colour" in request.turns[0].text else sighted(request)

    evaluate(FakeModel(), root, out=folder / "a", engine=FakeEngine())
    evaluate(FakeModel("fake-2"), root, out=folder / "b", engine=FakeEngine(worse))
    return folder / "a", folder / "b"


def test_two_folders(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = compare(*two)
    told = json.loads((two[0] / "results.json").read_text())["tasks"]
    assert list(found["tasks"]) == list(told)
    for task, row in found["tasks"].items():
        assert row["a"] == pytest.approx(told[task]["score"]) and row["n"] == told[task]["n"]
    assert found["tasks"]["colour"]["differs"] and not found["tasks"]["shape"]["differs"]
    assert run(["compare", str(two[0]), str(two[1]), "--json", "-o", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tasks"]["colour"]["p_holm"] == found["tasks"]["colour"]["p_holm"]
    assert Path(printed["page"]).is_file()
    assert run(["compare", str(two[0]), str(two[1])]) == 0
    shown = capsys.readouterr().out
    assert (
        "a is better" in shown and "colour, right to wrong (of" in shown and shown.rstrip() == "\n".join(lines(found))
    )
    assert run(["compare", str(two[0]), str(tmp_path / "no")]) == 3


def test_items_of_a_score_and_of_an_examination_fit(two: tuple[Path, Path], tmp_path: Path) -> None:
    root = json.loads((two[0] / "results.json").read_text())["root"]
    score("count", two[0] / "answers/count.jsonl", root, items_path=tmp_path / "count.jsonl")
    row = compare(two[0], tmp_path / "count.jsonl")["tasks"]["count"]
    assert row["difference"] == 0 and row["n"] == 12


def test_the_page_shows_what_turned_with_pictures(
    two: tuple[Path, Path], tmp_path: Path, browser: str, chromium: Callable[..., Path]
) -> None:
    found = compare(*two)
    page = write_page(found, tmp_path / "out")
    html = page.read_text()
    turned = sum(len(kind) for row in found["tasks"].values() for kind in row["flips"].values())
    assert html.count("<li ") == turned and html.count("data:image/") == turned
    seen = Browser(browser, tmp_path / "profile")
    try:
        seen.open(page.as_uri(), width=390, height=844)
        assert seen.run("document.documentElement.scrollWidth") <= 390
        assert seen.run("document.querySelector('.told').textContent") == f"1 to {turned} of {turned}"
        assert seen.fetched() == [] and seen.complaints() == []
    finally:
        seen.close()


def test_the_page_says_why_there_are_no_pictures(two: tuple[Path, Path], tmp_path: Path) -> None:
    found = compare(*two)
    html = write_page(found, tmp_path / "p.html", tmp_path / "nowhere").read_text()
    assert "No pictures of existence, colour" in html and "data:image/" not in html
    alone = compare(two[0] / "items/colour.jsonl", two[1] / "items/colour.jsonl")
    assert "name the data folder" in write_page(alone, tmp_path / "q.html").read_text()
