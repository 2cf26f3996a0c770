"""Yes/no and choice benchmarks: figures, verdicts, prompts and files equal those of the published scripts."""

from __future__ import annotations

import csv
import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leveret.evaluate import TASKS, load_items, score
from leveret.evaluate.submissions.choice import SUBMISSIONS
from leveret.evaluate.tasks.base import PRISMATIC_CHOICE

# task, rule -> the answers' file, and the folder where it is not the task's own
ANSWERS: dict[tuple[str, str], tuple[str, str]] = {
    ("pope", "prismatic_probabilities"): ("probabilities.jsonl", ""),
    ("vsr", "prismatic_probabilities"): ("probabilities.jsonl", ""),
    ("ai2d", "prismatic_probabilities"): ("probabilities.jsonl", ""),
    ("vsr", "vlmevalkit_yes_no"): ("predictions_yes_no.jsonl", ""),
    ("mmmu", "official_no_fallback"): ("", "no_fallback"),
    ("mmmu", "official_with_fallback"): ("", "with_fallback"),
    ("mmmu", "lmms_eval_no_fallback"): ("", "no_fallback"),
    ("mmmu", "eval_only"): ("eval_only_predictions.json", ""),
    ("cmmmu", "official"): ("responses.jsonl", ""),
    ("cmmmu", "lmms_eval"): ("responses.jsonl", ""),
    ("cmmmu", "official_answer_mode"): ("answers.jsonl", ""),
    ("cmmmu", "official_with_fallback"): ("responses.jsonl", "with_fallback"),
}
NO_RULES = {
    "mme_eval_tool_raw",  # stops on answers of several lines
    "llava_on_shuffled_answers",
    "official_with_12_missing",
    "submission",
    "real_model_outputs",
}
TASKS_HERE = ("mme", "pope", "vsr", "mmbench", "seed_bench", "scienceqa", "mmmu", "cmmmu", "ai2d")


def folder(goldens: Path, task: str) -> tuple[Path, dict[str, Any]]:
    root = goldens / "eval" / task
    if not root.is_dir():
        pytest.skip(f"{root} is not here")
    return root, json.loads((root / "expected.json").read_text(encoding="utf-8"))


def given(root: Path, task: str, rule: str) -> tuple[Path, Path]:
    """The answers, and the folder of the official files."""
    name, inside = ANSWERS.get((task, rule), ("predictions.jsonl", ""))
    return root / inside / name, root / inside


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def holds(found: Any, wanted: Any, tolerance: float) -> None:
    if isinstance(wanted, dict):
        for name, value in wanted.items():
            assert name in found
            holds(found[name], value, tolerance)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            holds(one, other, tolerance)
    elif isinstance(wanted, (int, float)):
        assert found == pytest.approx(wanted, abs=tolerance)
    else:
        assert found == wanted


@pytest.mark.parametrize("task", TASKS_HERE)
def test_every_lineage_gives_its_figures(goldens: Path, task: str) -> None:
    root, expected = folder(goldens, task)
    rules = [name for name in expected["scores"] if name not in NO_RULES]
    assert next(iter(TASKS[task].rules)) == expected["primary"]
    for rule in rules:
        answers, place = given(root, task, rule)
        found = score(task, answers, place, rule=rule)
        holds(found["metrics"], expected["scores"][rule]["metrics"], expected["tolerance"])
        assert found["ci95"][0] <= found["score"] <= found["ci95"][1] and found["rule"] == rule


@pytest.mark.parametrize("model", ["llava1.5_13b", "qwen_vl"])
def test_mmmu_outputs_of_real_models(goldens: Path, model: str) -> None:
    root, expected = folder(goldens, "mmmu")
    place = root / "real_outputs"
    found = score("mmmu", place / f"{model}_total_val_output.json", place, rule="eval_only")
    holds(found["metrics"], expected["scores"]["real_model_outputs"]["metrics"][model], 1e-9)


@pytest.mark.parametrize(
    ("task", "rule", "key", "read"),
    [
        ("mme", "bunny", "", lambda r: ("parsed", r["parsed"])),
        ("pope", "bunny", "question_id", lambda r: ("parsed", r["parsed"])),
        ("vsr", "vlmevalkit_yes_no", "example_id",
         lambda r: ("parsed", None if r["extracted"] == "Unknown" else r["extracted"].lower())),
        ("mmbench", "vlmevalkit_circular_exact_matching", "index", lambda r: ("circular_hit", r["circular_hit"])),
        ("seed_bench", "official", "question_id", lambda r: ("score", float(r["correct"]))),
        ("scienceqa", "official", "question_id", lambda r: ("score", float(r["correct"]))),
        ("mmmu", "official_no_fallback", "id", lambda r: ("score", float(r["judge"] == "Correct"))),
        ("cmmmu", "official", "id", lambda r: ("score", float(r["correct"]))),
        ("ai2d", "lmms_eval", "questionId", lambda r: ("score", float(r["correct"]))),
    ],
)  # fmt: skip
def test_every_answer_is_judged_as_officially(
    goldens: Path, tmp_path: Path, task: str, rule: str, key: str, read: Any
) -> None:
    root, _ = folder(goldens, task)
    answers, place = given(root, task, rule)
    score(task, answers, place, rule=rule, items_path=tmp_path / "items.jsonl")
    ours = {record["question_id"]: record for record in lines(tmp_path / "items.jsonl")}
    if task == "mme":  # both questions of a picture share an id: the prompt tells them apart
        by_prompt = {(record["image"], record["prompt"]): record for record in ours.values()}
    for record in lines(root / "per_item.jsonl"):
        if task == "mme":
            subtask, _, name = record["question_id"].partition("/")
            mine = by_prompt[f"{subtask}/{name.split('/')[-1].split('.')[0]}", record["prompt"]]
        else:
            mine = ours[str(record[key])]
        name, value = read(record)
        assert mine[name] == value, record
        if task == "mmmu" and isinstance(record["parsed_pred"], list):
            assert sorted(json.loads(mine["parsed"]), key=str) == sorted(record["parsed_pred"], key=str)


@pytest.mark.parametrize("task", ["mme", "mmbench", "seed_bench", "ai2d", "mmmu", "cmmmu"])
def test_order_and_the_type_of_ids_do_not_matter(goldens: Path, task: str) -> None:
    root, _ = folder(goldens, task)
    rule = list(TASKS[task].rules)[1] if task == "ai2d" else next(iter(TASKS[task].rules))
    answers, place = given(root, task, rule)
    if task == "mmmu":
        files = sorted(answers.glob("*/output.json"))
        records = [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))]
    else:
        records = lines(answers)
    names = ("question_id", "questionId", "id")
    shuffled = [record | {name: str(record[name]) for name in names if name in record} for record in records]
    random.Random(3).shuffle(shuffled)
    assert score(task, shuffled, place, rule=rule) == score(task, answers, place, rule=rule)


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompts(goldens: Path, name: str) -> list[dict[str, Any]]:
    path = goldens / "eval" / "prompts" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return lines(path)


def test_prompts_of_mmbench(goldens: Path) -> None:
    wanted = prompts(goldens, "bunny_mmbench.jsonl")
    root, _ = folder(goldens, "mmbench")
    for language, prompt in (("en", TASKS["mmbench"].prompt), ("cn", TASKS["mmbench_cn"].prompt)):
        row = replace(TASKS["mmbench"], prompt=prompt)
        ours = {item.meta["index"]: item.prompt for item in load_items(row, root)}
        asked = [record for record in wanted if record["lang"] == language]
        assert asked and all(f"<image>\n{ours[r['index']]}" == r["user_text"] for r in asked)


def test_prompts_of_mmmu(goldens: Path, tmp_path: Path) -> None:
    wanted = prompts(goldens, "bunny_mmmu.jsonl")
    (tmp_path / "X").mkdir()
    columns = ("id", "question", "options", "answer", "question_type")
    table = {name: [record["sample"][name] for record in wanted] for name in columns}
    shown = [{"bytes": b"x", "path": "x.png"} if record["image_used"] else None for record in wanted]
    pq.write_table(pa.table(table | {"image_1": shown}), tmp_path / "X" / "validation-00000-of-00001.parquet")
    for item, record in zip(load_items("mmmu", tmp_path), wanted, strict=True):
        assert f"<image>\n{item.prompt}" == record["prompt"]
        assert item.meta["texts"] == (record["index2ans"] or {}) and (item.image is not None) == record["image_used"]


def test_prompts_of_cmmmu(goldens: Path) -> None:
    root, _ = folder(goldens, "cmmmu")
    ours = {item.question_id: item.prompt for item in load_items("cmmmu", root)}
    for record in prompts(goldens, "bunny_cmmmu.jsonl"):
        assert f"<image>\n{ours[str(record['id'])]}" == record["prompt"]


@pytest.mark.parametrize("task", ["mme", "pope", "seed_bench"])
def test_prompts_equal_bunnys_question_files(goldens: Path, task: str) -> None:
    names = {"mme": "bunny_mme.jsonl", "pope": "bunny_pope_test.jsonl", "seed_bench": "bunny-seed-bench.jsonl"}
    root, _ = folder(goldens, task)
    assert sorted(i.prompt for i in load_items(task, root)) == sorted(r["text"] for r in lines(root / names[task]))


def test_prompts_of_prismatic(goldens: Path) -> None:
    wanted = {record["dataset_family"]: record for record in prompts(goldens, "prismatic.jsonl")}
    for task, template in PRISMATIC_CHOICE.items():
        record = wanted[task]
        words, *options = record["args"]
        shown = (
            "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", *options, strict=True)) if options else ""
        )
        assert "\n" + template.format(question=words, caption=words, options=shown) == record["human_message"]


# --- files for servers -----------------------------------------------------------------------------------------------


def cells(path: Path) -> list[list[str]]:
    """The cells of a workbook's first sheet as text, read by place."""
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    with zipfile.ZipFile(path) as book:
        sheet = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
    rows = []
    for row in sheet.iter(f"{space}row"):
        found: dict[int, str] = {}
        for cell in row.iter(f"{space}c"):
            letters = cell.attrib["r"].rstrip("0123456789")
            found[ord(letters) - ord("A")] = "".join(cell.itertext())
        rows.append([found.get(at, "") for at in range(max(found) + 1)])
    return rows


def test_mmbench_sheet_equals_the_official_one_cell_by_cell(goldens: Path, tmp_path: Path) -> None:
    root, _ = folder(goldens, "mmbench")
    name, write = SUBMISSIONS["mmbench"]
    texts = {str(record["question_id"]): record["text"] for record in lines(root / "predictions.jsonl")}
    write(load_items("mmbench", root), texts, tmp_path / name)
    with (root / "submission_expected.csv").open(encoding="utf-8", newline="") as file:
        wanted = list(csv.reader(file))
    assert cells(tmp_path / name) == wanted == cells(root / "submission_expected.xlsx")


def test_seed_bench_lines_equal_the_official_ones(goldens: Path, tmp_path: Path) -> None:
    root, _ = folder(goldens, "seed_bench")
    name, write = SUBMISSIONS["seed_bench"]
    texts = {str(record["question_id"]): record["text"] for record in lines(root / "predictions.jsonl")}
    write(load_items("seed_bench", root), texts, tmp_path / name)
    assert lines(tmp_path / name) == lines(root / "submission_expected.jsonl")


def test_mme_folder_scores_as_the_answers_do(goldens: Path, tmp_path: Path) -> None:
    root, expected = folder(goldens, "mme")
    score("mme", root / "predictions.jsonl", root, items_path=tmp_path / "items.jsonl")
    texts = {record["question_id"]: record["text"] for record in lines(tmp_path / "items.jsonl")}
    name, write = SUBMISSIONS["mme"]
    write(load_items("mme", root), texts, tmp_path / name)
    for ours in sorted((tmp_path / name).glob("*.txt")):
        told = [line.split("\t") for line in ours.read_text(encoding="utf-8").splitlines()]
        template = (root / "Your_Results" / ours.name).read_text(encoding="utf-8").splitlines()
        assert all(len(row) == 4 for row in told)
        # Without the pictures their endings are not known.
        assert sorted([Path(row[0]).stem, *row[1:3]] for row in told) == sorted(
            [Path(name).stem, *others] for name, *others in (line.split("\t")[:3] for line in template)
        )
    found = score("mme", tmp_path / name, root, rule="mme_eval_tool_one_line")
    holds(found["metrics"], expected["scores"]["mme_eval_tool_one_line"]["metrics"], expected["tolerance"])


def test_mmmu_and_cmmmu_files_score_as_the_answers_do(goldens: Path, tmp_path: Path) -> None:
    root, expected = folder(goldens, "mmmu")
    name, write = SUBMISSIONS["mmmu"]
    files = sorted((root / "no_fallback").glob("*/output.json"))
    told = [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))]
    write(load_items("mmmu", root / "no_fallback"), {r["id"]: r["response"] for r in told}, tmp_path / name)
    found = score("mmmu", tmp_path / name, root, rule="eval_only")
    holds(found["metrics"], expected["scores"]["eval_only"]["metrics"], expected["tolerance"])
    root, _ = folder(goldens, "cmmmu")
    name, write = SUBMISSIONS["cmmmu"]
    said = lines(root / "responses.jsonl")
    write(load_items("cmmmu", root), {str(r["id"]): r["response"] for r in said}, tmp_path / name)
    assert lines(tmp_path / name) == said
