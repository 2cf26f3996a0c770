"""Every golden folder, every rule of its tasks: our figures, and what we make of each answer, equal the originals'.

Goes over all folders with an `expected.json` under LEVERET_GOLDENS/eval. The folder's name is the task's id (TASKS_OF
names more tasks on the same files). Every lineage under `scores` that is a rule of the task's row is scored on its
answers file and compared, by names in the golden `metrics` (and `counts`) alone, at any depth.

A new folder usually needs nothing here. Where it does, add one line to one of these tables:

    ANSWERS     (folder, lineage) -> (the part of the folder that holds its files, the answers in it), where they are
                not ("", "predictions.jsonl"); ("part", "") is a folder of answers. Lineages with `probabilities`,
                `integers` or `yes_no` in their names find `probabilities.jsonl`, `predictions_integers.jsonl` and
                `predictions_yes_no.jsonl` by themselves. A judge's replies are read from `judge_replies.json`.
    NO_RULE     (folder, lineage) that is not a rule, and why: a file, a defect on files made to show it.
    ELSEWHERE   (folder, lineage) whose answers are more than that: the test that compares them.
    SHAPE       (folder, lineage) whose golden `metrics` are no table of names (a list, a number): our metrics -> that.
    PER_ITEM    (folder, lineage) -> [(column of per_item.jsonl, how ours reads)]: our line of the items file, and
                theirs, to what must equal the column. A column that is named as the lineage and holds numbers is
                compared with `score` (times 100 where the column is in percent) without a line here.
    KEYS        folder -> the field that names an item in per_item.jsonl, where it is none of ID_FIELDS. Where that
                names several items (one picture's), their `prompt` or `question` tells which.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from leveret.evaluate import TASKS, score
from leveret.evaluate.judges import Judge

GOLDENS = Path(os.environ.get("LEVERET_GOLDENS", Path(__file__).resolve().parents[2] / "shared" / "goldens")) / "eval"
FOLDERS = sorted(path.parent.name for path in GOLDENS.glob("*/expected.json"))

TASKS_OF: dict[str, tuple[str, ...]] = {
    "textvqa": ("textvqa", "textvqa_ocr"),
}

ANSWERS: dict[tuple[str, str], tuple[str, str]] = {
    ("mmmu", "official_no_fallback"): ("no_fallback", ""),
    ("mmmu", "official_with_fallback"): ("with_fallback", ""),
    ("mmmu", "lmms_eval_no_fallback"): ("no_fallback", ""),
    ("mmmu", "eval_only"): ("", "eval_only_predictions.json"),
    ("cmmmu", "official"): ("", "responses.jsonl"),
    ("cmmmu", "lmms_eval"): ("", "responses.jsonl"),
    ("cmmmu", "official_answer_mode"): ("", "answers.jsonl"),
    ("cmmmu", "official_with_fallback"): ("with_fallback", "responses.jsonl"),
}

NO_RULE: dict[tuple[str, str], str] = {
    ("refcoco", "refer_loader_check"): "counts of what the reader of the pickles finds",
    ("vizwiz", "submission"): "a file, compared in test_evaluate_submissions.py",
    ("mmbench", "submission"): "a file",
    ("pope", "llava_on_shuffled_answers"): "wrong by construction: labels joined by position",
    ("scienceqa", "official_with_12_missing"): "an answers file with gaps, in test_evaluate_goldens.py",
    ("mme", "mme_eval_tool_raw"): "it stops at answers of several lines",
}

ELSEWHERE: dict[tuple[str, str], str] = {
    ("mmmu", "real_model_outputs"): "test_real_answers_to_mmmu",
}

SHAPE: dict[tuple[str, str], Callable[[Mapping[str, Any]], Any]] = {}

Reader = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
"""(our line of the items file, their line of per_item.jsonl) -> what their column must equal."""

PER_ITEM: dict[tuple[str, str], list[tuple[str, Reader]]] = {
    ("pope", "bunny"): [("parsed", lambda ours, _: ours["parsed"])],
    ("gqa", "official"): [
        ("correct", lambda ours, _: ours["score"] == 1),
        ("converted", lambda ours, _: ours["parsed"]),
    ],
    ("mme", "bunny"): [("parsed", lambda ours, _: ours["parsed"] or "other")],
    ("vsr", "vlmevalkit_yes_no"): [("extracted", lambda ours, _: (ours["parsed"] or "Unknown").capitalize())],
    ("mmbench", "vlmevalkit_circular_exact_matching"): [("circular_hit", lambda ours, _: ours["circular_hit"])],
    ("seed_bench", "official"): [("correct", lambda ours, _: ours["score"] == 1)],
    ("scienceqa", "official"): [("correct", lambda ours, _: ours["score"] == 1)],
    ("mmmu", "official_no_fallback"): [("judge", lambda ours, _: "Correct" if ours["score"] == 1 else "Wrong")],
    ("cmmmu", "official"): [("correct", lambda ours, _: ours["score"] == 1)],
    ("ai2d", "lmms_eval"): [("correct", lambda ours, _: ours["score"] == 1)],
    ("textvqa", "official"): [
        ("score", lambda ours, _: ours["score"]),
        ("processed", lambda ours, _: ours["parsed"]),
    ],
    ("vizwiz", "lmms_eval"): [("submitted", lambda ours, _: ours["parsed"])],
    ("tally_qa", "prismatic_probabilities"): [("argmax", lambda ours, _: int(ours["parsed"]))],
    ("tally_qa", "tallyqa_official_integers"): [("integer", lambda ours, _: int(ours["parsed"]))],
    ("refcoco", "prismatic"): [
        ("prismatic", lambda ours, _: box_status(ours)),
        ("iou", lambda ours, _: ours.get("iou")),
    ],
    ("ocid_ref", "prismatic"): [
        ("status", lambda ours, _: box_status(ours)),
        ("iou", lambda ours, _: ours.get("iou")),
    ],
}

KEYS: dict[str, str] = {}

ID_FIELDS = ("question_id", "example_id", "questionId", "index", "id")


def box_status(ours: Mapping[str, Any]) -> str:
    return "correct" if ours["score"] == 1 else "incorrect" if ours["readable"] else "invalid"


def expected(folder: str) -> dict[str, Any]:
    return json.loads((GOLDENS / folder / "expected.json").read_text(encoding="utf-8"))


def cases() -> Iterator[Any]:
    if not FOLDERS:
        skip = pytest.mark.skip(reason=f"no goldens in {GOLDENS}; set LEVERET_GOLDENS")
        yield pytest.param("", "", "", marks=skip)
    for folder in FOLDERS:
        tasks = [task for task in TASKS_OF.get(folder, (folder,)) if task in TASKS]
        if not tasks:
            skip = pytest.mark.skip(reason=f"there is no task {folder!r}")
            yield pytest.param("", folder, "", marks=skip, id=folder)
        for task in tasks:
            for lineage in expected(folder)["scores"]:
                marks = []
                if (folder, lineage) in NO_RULE:
                    continue
                if (folder, lineage) in ELSEWHERE:
                    marks = [pytest.mark.skip(reason=f"compared in {ELSEWHERE[folder, lineage]}")]
                elif lineage not in TASKS[task].rules:
                    marks = [pytest.mark.skip(reason=f"the task {task!r} has no rule {lineage!r}")]
                yield pytest.param(task, folder, lineage, marks=marks, id=f"{task}-{lineage}")


def files_of(folder: str, lineage: str) -> tuple[Path, Path]:
    """The lineage's answers and the folder of their official files, by the table or by its name."""
    root = GOLDENS / folder
    if (folder, lineage) in ANSWERS:
        inside, name = ANSWERS[folder, lineage]
        return root / inside / name, root / inside
    for word, name in (
        ("probabilities", "probabilities.jsonl"),
        ("integers", "predictions_integers.jsonl"),
        ("yes_no", "predictions_yes_no.jsonl"),
    ):
        if word in lineage and (root / name).exists():
            return root / name, root
    return root / "predictions.jsonl", root


def differences(theirs: Any, ours: Any, tolerance: float, where: str = "") -> list[str]:
    """Every place where ours is not theirs; only names that theirs has are looked at."""
    if isinstance(theirs, dict):
        if not isinstance(ours, Mapping):
            return [f"{where}: {ours!r} is no table"]
        named = {str(name): value for name, value in ours.items()}
        return [
            fault
            for name, value in theirs.items()
            for fault in (
                differences(value, named[name], tolerance, f"{where}/{name}")
                if name in named
                else [f"{where}/{name} is not there; there are {', '.join(named)}"]
            )
        ]
    if isinstance(theirs, list):
        if not isinstance(ours, list | tuple) or len(ours) != len(theirs):
            return [f"{where}: {ours!r}, not {theirs!r}"]
        pairs = enumerate(zip(theirs, ours, strict=True))
        return [fault for k, (a, b) in pairs for fault in differences(a, b, tolerance, f"{where}[{k}]")]
    if isinstance(theirs, bool) or not isinstance(theirs, int | float) or not isinstance(ours, int | float):
        return [] if ours == theirs else [f"{where}: {ours!r}, not {theirs!r}"]
    # A figure that lies exactly between two printed ones differs by the whole tolerance, and the last bit.
    return [] if abs(ours - theirs) <= tolerance * (1 + 1e-9) + 1e-12 else [f"{where}: {ours!r}, not {theirs!r}"]


@pytest.mark.goldens
@pytest.mark.parametrize(("task", "folder", "lineage"), list(cases()))
def test_scores_are_the_originals(tmp_path: Path, task: str, folder: str, lineage: str) -> None:
    root, golden = GOLDENS / folder, expected(folder)
    entry = golden["scores"][lineage]
    answers, place = files_of(folder, lineage)
    judge = Judge(replay=root / "judge_replies.json") if (root / "judge_replies.json").exists() else None
    found = score(task, answers, place, rule=lineage, items_path=tmp_path / "items.jsonl", judge=judge)
    metrics = SHAPE.get((folder, lineage), lambda metrics: metrics)(found["metrics"])
    assert not differences(entry["metrics"], metrics, golden["tolerance"])
    if "counts" in entry:
        assert not differences(entry["counts"], found["metrics"]["counts"], 0)
    ours = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text("utf-8").splitlines()]
    if (root / "per_item.jsonl").exists():
        compare_items(folder, lineage, ours)


def compare_items(folder: str, lineage: str, ours: list[dict[str, Any]]) -> None:
    """Our lines against those of per_item.jsonl."""
    lines = (GOLDENS / folder / "per_item.jsonl").read_text("utf-8").split("\n")
    theirs = [json.loads(line) for line in lines if line.strip()]
    readers = list(PER_ITEM.get((folder, lineage), []))
    values = [record.get(lineage) for record in theirs]
    if not any(column == lineage for column, _ in readers) and all(is_number(value) for value in values):
        percent = 100 if max(values) > 1 else 1
        readers.append((lineage, lambda mine, _: mine["score"] * percent))
    if not readers:
        return
    pairs = list(paired(folder, theirs, ours))
    faults = []
    for record, mine in pairs:
        for column, read in readers:
            value, wanted = read(mine, record), record[column]
            close = pytest.approx(wanted, abs=0.0051 if is_number(wanted) and abs(wanted) > 1 else 1e-9)
            if value != (close if is_number(wanted) else wanted):
                faults.append(f"{column}: {value!r}, not {wanted!r}, for {record}")
    assert not faults, "\n".join(faults[:10])
    assert len(pairs) == len(theirs)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def paired(
    folder: str, theirs: list[dict[str, Any]], ours: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    field = KEYS.get(folder) or next(field for field in ID_FIELDS if field in theirs[0])
    names: dict[str, list[dict[str, Any]]] = {}
    for mine in ours:
        names.setdefault(str(mine["image"]).removesuffix(".jpg"), []).append(mine)
    names |= {str(mine["question_id"]): [mine] for mine in ours}
    for record in theirs:
        name = str(record[field])
        # MME names a picture's file, ours is the picture in its subtask.
        found = names.get(name) or names.get(re.sub(r"/(.*/)?([^/.]*)[^/]*$", r"/\2", name), [])
        # Where an id names several questions of a picture, the question tells which.
        asked = str(record.get("prompt") or record.get("question") or "").lower()
        exact = [mine for mine in found if mine["prompt"].lower().startswith(asked)] if len(found) > 1 else found
        assert len(exact) == 1, f"{len(exact)} items for {record}"
        yield record, exact[0]


@pytest.mark.goldens
def test_real_answers_to_mmmu() -> None:
    root = GOLDENS / "mmmu" / "real_outputs"
    if not root.is_dir():
        pytest.skip(f"{root} is not here")
    entry, tolerance = expected("mmmu")["scores"]["real_model_outputs"], expected("mmmu")["tolerance"]
    for model, metrics in entry["metrics"].items():
        found = score("mmmu", root / f"{model}_total_val_output.json", root, rule="eval_only")
        assert not differences(metrics, found["metrics"], tolerance), model


@pytest.mark.goldens
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_golden_primary_is_the_tasks_own_rule(folder: str) -> None:
    """The first rule of a row is what `score` uses unless told otherwise."""
    if folder not in TASKS:
        pytest.skip(f"there is no task {folder!r}")
    rules = list(TASKS[folder].rules)
    if expected(folder)["primary"] not in rules:
        pytest.skip(f"the task {folder!r} has no rule {expected(folder)['primary']!r}")
    assert rules[0] == expected(folder)["primary"]
