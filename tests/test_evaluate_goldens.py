"""Scores of the golden answer files equal what the official scripts printed for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leveret.evaluate import score
from leveret.runs import DataError


def golden(goldens: Path, folder: str) -> tuple[Path, dict[str, Any]]:
    root = goldens / "eval" / folder
    if not root.is_dir():
        pytest.skip(f"{root} is not here")
    expected = json.loads((root / "expected.json").read_text(encoding="utf-8"))
    return root, {name: entry.get("metrics") for name, entry in expected["scores"].items()} | {
        "all": expected["scores"]
    }


@pytest.mark.parametrize("file", ["predictions.jsonl", "predictions_shuffled.jsonl"])
def test_pope(goldens: Path, file: str) -> None:
    root, expected = golden(goldens, "pope")
    found = score("pope", root / file, root)
    for category in ("adversarial", "popular", "random"):
        assert found["metrics"][category] == pytest.approx(expected["bunny"][category], abs=1e-9)
    assert found["score"] == pytest.approx(expected["bunny"]["average_f1"], abs=1e-9)
    assert found["metrics"]["average_f1"] == pytest.approx(expected["bunny"]["average_f1"], abs=1e-9)
    assert found["n"] == 306 and found["parsed"] + found["unparsable"] == 306 and found["unparsable"] > 0


def test_pope_by_category_and_its_own_ids(goldens: Path) -> None:
    root, expected = golden(goldens, "pope")
    offsets = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
    answers = []
    for line in (root / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        category = {0: "adversarial", 1: "random", 2: "popular"}[record["question_id"] // 10_000_000]
        answers.append(record | {"question_id": record["question_id"] - offsets[category], "category": category})
    assert score("pope", answers, root)["score"] == pytest.approx(expected["bunny"]["average_f1"], abs=1e-9)


@pytest.mark.parametrize("file", ["predictions.jsonl", "testdev_balanced_predictions_expected.json"])
def test_gqa(goldens: Path, file: str) -> None:
    root, expected = golden(goldens, "gqa")
    metrics = score("gqa", root / file, root)["metrics"]
    for name in ("accuracy", "binary", "open", "distribution"):
        assert metrics[name] == pytest.approx(expected["official"][name], abs=0.005)
    for title, table in expected["official"]["detail"].items():
        assert set(metrics["detail"][title]) == set(table)
        for name, (value, n) in table.items():
            assert metrics["detail"][title][name] == pytest.approx([value, n], abs=0.0051)


def test_scienceqa(goldens: Path) -> None:
    root, expected = golden(goldens, "scienceqa")
    found = score("scienceqa", root / "predictions.jsonl", root)
    for name in ("total", "correct", "accuracy", "img_accuracy", "image_correct", "image_count"):
        assert found["metrics"][name] == pytest.approx(expected["official"][name], abs=0.005)
    assert found["score"] == pytest.approx(expected["official"]["acc"] / 100)


def test_scienceqa_with_missing_answers(goldens: Path) -> None:
    root, expected = golden(goldens, "scienceqa")
    with pytest.raises(DataError, match="12 questions without an answer"):
        score("scienceqa", root / "predictions_with_12_missing.jsonl", root)
    found = score("scienceqa", root / "predictions_with_12_missing.jsonl", root, allow_missing=True)
    official = expected["official_with_12_missing"]
    assert found["missing"] == 12
    assert found["metrics"]["accuracy"] == pytest.approx(official["acc"])
    # Ours keeps the 150 image questions of problems.json; the script's denominator stands beside it.
    assert found["metrics"]["image_count"] == 150
    assert found["metrics"]["answered_image_acc"] == pytest.approx(official["image_acc"])
    assert found["metrics"]["answered_image_count"] == official["image_count"]


def test_textvqa(goldens: Path) -> None:
    root, expected = golden(goldens, "textvqa")
    found = score("textvqa", root / "predictions.jsonl", root)
    assert found["metrics"]["accuracy"] == pytest.approx(expected["official"]["accuracy_full_precision"], abs=1e-9)
    assert found["metrics"]["samples"] == expected["official"]["samples"]


def test_vizwiz(goldens: Path) -> None:
    root, expected = golden(goldens, "vizwiz")
    found = score("vizwiz", root / "predictions.jsonl", root, rule="lmms_eval")
    assert found["score"] * 100 == pytest.approx(expected["lmms_eval"]["overall"], abs=1e-9)


def test_refcoco(goldens: Path) -> None:
    root, expected = golden(goldens, "refcoco")
    found = score("refcoco", root / "predictions.jsonl", root)
    for name, value in expected["prismatic"].items():
        assert found["metrics"][name] == pytest.approx(value, abs=1e-9)
    assert found["metrics"]["counts"] == expected["all"]["prismatic"]["counts"]
    assert found["score"] == pytest.approx(sum(expected["prismatic"].values()) / 3)


def test_vsr_yes_no(goldens: Path) -> None:
    root, expected = golden(goldens, "vsr")
    metrics = score("vsr", root / "predictions_yes_no.jsonl", root)["metrics"]
    for name, value in expected["vlmevalkit_yes_no"].items():
        assert metrics[name] == pytest.approx(value, abs=1e-9)


def test_tally_qa_integers(goldens: Path) -> None:
    root, expected = golden(goldens, "tally_qa")
    metrics = score("tally_qa", root / "predictions_integers.jsonl", root)["metrics"]
    for name in ("simple", "complex"):
        assert metrics[name] == pytest.approx(expected["tallyqa_official_integers"][name], abs=1e-9)
    assert metrics["counts"] == expected["all"]["tallyqa_official_integers"]["counts"]


@pytest.mark.parametrize(
    ("task", "folder", "key", "read"),
    [
        ("pope", "pope", "question_id", lambda r: r["parsed"]),
        ("gqa", "gqa", "question_id", lambda r: float(r["correct"])),
        ("scienceqa", "scienceqa", "question_id", lambda r: float(r["correct"])),
        ("refcoco", "refcoco", "example_id", lambda r: float(r["prismatic"] == "correct")),
    ],
)
def test_every_answer_is_judged_as_officially(
    goldens: Path, tmp_path: Path, task: str, folder: str, key: str, read: Any
) -> None:
    root, _ = golden(goldens, folder)
    score(task, root / "predictions.jsonl", root, items_path=tmp_path / "items.jsonl")
    ours = {r["question_id"]: r for r in map(json.loads, (tmp_path / "items.jsonl").read_text("utf-8").splitlines())}
    theirs = [json.loads(line) for line in (root / "per_item.jsonl").read_text("utf-8").splitlines()]
    assert len(ours) == len(theirs)
    for record in theirs:
        mine = ours[str(record[key])]
        assert (mine["parsed"] if task == "pope" else mine["score"]) == pytest.approx(read(record)), record


def test_textvqa_normaliser_agrees_word_for_word(goldens: Path) -> None:
    from leveret.evaluate.text import m4c

    root, _ = golden(goldens, "textvqa")
    for line in (root / "per_item.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        assert m4c(record["text"]) == record["processed"]


def test_scoring_imports_no_torch(goldens: Path) -> None:
    root, _ = golden(goldens, "pope")
    code = (
        "import sys; from leveret.evaluate import score; "
        f"score('pope', {str(root / 'predictions.jsonl')!r}, {str(root)!r}); "
        "assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_boxes_of_the_official_files_equal_the_index(goldens: Path, tmp_path: Path) -> None:
    from leveret.evaluate import load_items

    root, _ = golden(goldens, "refcoco")
    index = {item.question_id: item for item in load_items("refcoco", root)}
    for folder in ("refcoco", "refcoco+", "refcocog"):
        (tmp_path / folder).symlink_to(root / folder)
    official = load_items("refcoco", tmp_path)
    assert len(official) == len(index) - 3  # three entries stand in the index alone
    for item in official:
        assert (item.gold, item.meta["group"]) == (index[item.question_id].gold, index[item.question_id].meta["group"])
