# ruff: noqa: RUF001 (full-width commas and colons are CMMMU's own)
"""MMMU and CMMMU: college questions with options, or open, over six disciplines."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from leveret.evaluate.forms.base import Form, Item, Place, read_lines
from leveret.records import ImageRef
from leveret.runs import DataError, read_json

MULTIPLE = "multiple-choice"
ASKS = {
    True: "\nAnswer with the option's letter from the given choices directly.",
    False: "\nAnswer the question using a single word or phrase.",
}
"""How a question with options ends, and an open one (Bunny's configuration)."""
_SUBJECT = re.compile(r"(?:dev|validation|test)_(.+)_\d+")


def _mmmu(place: Place) -> list[Item]:
    """MMMU: the dataset folder `<Subject>/<split>-*.parquet` (id, question, options, answer, question_type, image_1),
    the official example outputs `<Subject>/output.json` (id, question_type, answer, index2ans), or
    `answer_dict_val.json` {id: {question_type, ground_truth}}.

    The last two hold neither questions nor pictures, and the last no options: they serve to score, not to ask. Only the
    first picture is shown, as in Bunny; marks such as `<image 1>` stay in the question.
    """
    items = [_mmmu_item(place, path, record) for path in place.files for record in _mmmu_records(path)]
    return [item for item in items if item.question_id.startswith(f"{place.split}_")]


def _mmmu_records(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        columns = ("id", "question", "options", "answer", "question_type")
        for row, record in enumerate(_parquet(path, columns, ("image_1",))):
            options = _listed(record["options"])
            letters = {chr(ord("A") + k): str(option) for k, option in enumerate(options)}
            answer = str(record["answer"])
            # "?" and "" where the server keeps the answer; several right answers are a list in writing.
            gold = None if answer.strip() in ("", "?") else _listed(answer) or answer
            yield record | {"index2ans": letters, "answer": gold, "row": row}
    elif path.name == "answer_dict_val.json":
        for name, entry in read_json(path).items():
            yield {"id": name, "question_type": entry["question_type"], "answer": entry["ground_truth"]}
    else:
        yield from read_json(path)


def _listed(text: str) -> list[Any]:
    """A Python list in writing (the original calls `eval` on it); [] for anything else."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return value if isinstance(value, list) else []


def _parquet(path: Path, columns: tuple[str, ...], pictures: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of some columns; of a picture's only whether there is one (`<name> there`), without reading the bytes where
    the file itself says that none is missing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = {file.metadata.schema.column(k).path: k for k in range(file.metadata.num_columns)}
            lacking = [name for name in columns if name not in names]
            if lacking:
                raise DataError(f"{path}: no column {', '.join(lacking)}; it has {', '.join(sorted(names))}.")
            for group in range(file.metadata.num_row_groups):
                table = file.read_row_group(group, columns=list(columns))
                shown = {}
                for name in pictures:
                    leaf = f"{name}.bytes"
                    if leaf not in names:
                        continue
                    known = file.metadata.row_group(group).column(names[leaf]).statistics
                    if known is not None and known.has_null_count and known.null_count == 0:
                        shown[f"{name} there"] = [True] * table.num_rows
                        continue
                    cells = file.read_row_group(group, columns=[leaf]).column(name)
                    shown[f"{name} there"] = [cell.is_valid and cell["bytes"].is_valid for cell in cells]
                for number, record in enumerate(table.to_pylist()):
                    yield record | {name: values[number] for name, values in shown.items()}
    except (pa.ArrowInvalid, OSError) as fault:
        raise DataError(f"{path} is no parquet file: {fault}. Fetch it again.") from None


def _mmmu_item(place: Place, path: Path, record: Mapping[str, Any]) -> Item:
    name, kind, options = str(record["id"]), record["question_type"], record.get("index2ans") or {}
    subject = _SUBJECT.fullmatch(name)
    if subject is None:
        raise DataError(f"{path}: MMMU's ids are <split>_<Subject>_<number>; this one is {name!r}.")
    choice = kind == MULTIPLE
    shown = "".join(f"({letter}) {option}\n" for letter, option in options.items())
    prompt = place.prompt.format(
        question=record.get("question"), options=f"\n{shown}" if choice else "", ask=ASKS[choice]
    )
    return Item(
        question_id=name,
        image=ImageRef(str(path), "parquet", record["row"], member="image_1") if record.get("image_1 there") else None,
        prompt=prompt if record.get("question") else "",
        gold=record["answer"],
        meta={"image_id": name, "subject": subject[1], "choice": choice, "texts": dict(options)},
    )


def _mmmu_read(path: Path) -> list[dict[str, Any]] | None:
    """The official outputs: a folder of `<Subject>/output.json` with `response`, or one `{id: answer}`."""
    if path.is_dir():
        files = sorted(path.glob("*/output.json"))
        if not files:
            raise DataError(f"{path}: no <Subject>/output.json with answers in it.")
        return [{"id": r["id"], "response": r.get("response", "")} for file in files for r in read_json(file)]
    if path.suffix == ".json" and isinstance(record := read_json(path), dict):
        return [{"id": name, "text": text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)}
                for name, text in record.items()]  # fmt: skip
    return None


# --- CMMMU ------------------------------------------------------------------------------------------------------------

CHOICE_TYPE, JUDGE_TYPE = "选择", "判断"
CMMMU_TASKS = {
    CHOICE_TYPE: "请回答以下多项选择题，并选出正确选项。这些题目可能包括单选和多选题型。"
    "如果所提供的信息不足以确定一个明确的答案，那么请根据可用的数据和你的判断来选择最可能正确的选项。",
    JUDGE_TYPE: "请回答以下判断题，并根据题目描述和所给的信息来判断问题中陈述的对错。"
    "如果信息不完整或不足以作出绝对判断，请运用你的逻辑推理和现有信息来做出最可能的判断。",
    "": "请回答以下填空题，并根据题目的要求和所提供的信息来给出最恰当的答案。"
    "如果信息不足以确切回答，那么请依据现有的数据和你的推理能力来填写最合理的答案。",
}
"""What is asked, by the question's type (CMMMU's own configuration); any other type is a blank to fill."""


def _cmmmu(place: Place) -> list[Item]:
    """CMMMU: `cmmmu-data-<split>-answer.jsonl` (id, type, question, option1 .. option4, answer, category, subcategory,
    img_list), or the dataset folder `<category>/<split>-*.parquet` with `image_1`.

    Only the first picture is shown. Where a question has several, Bunny answers at random instead.
    """
    items = []
    for path in place.files:
        for row, record in enumerate(_cmmmu_records(path)):
            kind = record["type"]
            options = [record.get(f"option{k}") for k in range(1, 5)] if kind == CHOICE_TYPE else []
            letters = {
                letter: str(option) for letter, option in zip("ABCD", options, strict=False) if option is not None
            }
            shown = "".join(f"({letter}) {option}\n" for letter, option in letters.items())
            pictures = record.get("img_list") or []
            image = place.image(pictures[0]) if pictures else None
            if path.suffix == ".parquet":
                there = record.get("image_1 there")
                image = ImageRef(str(path), "parquet", row, member="image_1") if there else None
            answer = record.get("answer")
            items.append(
                Item(
                    question_id=str(record["id"]),
                    image=image,
                    prompt=place.prompt.format(
                        instruction=CMMMU_TASKS.get(kind, CMMMU_TASKS[""]),
                        question=f"问题：{record['question']}",
                        answer="正确答案：\n",
                        options=f"选项：\n{shown}\n" if kind == CHOICE_TYPE else "",
                    ),
                    gold=None if answer in (None, "", "?") else str(answer),
                    meta={
                        "image_id": str(record["id"]),
                        "type": kind,
                        "category": record.get("category", ""),
                        "subject": record.get("subcategory", ""),
                        "texts": letters,
                        # What somebody who guesses picks from; the options of a choice stand under `texts`.
                        "choices": {"对": "", "错": ""} if kind == JUDGE_TYPE else {},
                    },
                )
            )
    return items


def _cmmmu_records(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        options = tuple(f"option{k}" for k in range(1, 5))
        columns = ("id", "type", "question", *options, "answer", "category", "subcategory")
        yield from _parquet(path, columns, ("image_1",))
    else:
        yield from read_lines(path)


MMMU = {
    "mmmu": Form(_mmmu, identity="id", read=_mmmu_read),
    "cmmmu": Form(_cmmmu, identity="id"),
}
