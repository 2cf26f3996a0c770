"""MMBench's tables: one row a rotation of a question's options, the picture inside as base64."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from leveret.evaluate.forms.base import Form, Item, Place
from leveret.records import ImageRef
from leveret.runs import DataError

ROUND = 1_000_000
"""Rotation k of question i has the index i + k * ROUND."""

NOTHING = frozenset(
    "|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null".split("|")
)
"""What pandas reads as a missing cell; both lineages read the tables with it."""

NAME_LENGTH = 64
"""A cell of the picture's column that is no longer than this is the index of another row (VLMEvalKit)."""


def _mmbench(place: Place) -> list[Item]:
    """MMBench: a TSV with `index, question, hint, A, B, C, D, answer, category, image, l2-category, split`.

    Read are the legacy table (the picture in every row) and VLMEvalKit's (once; other rows give that row's index).
    Pictures stay base64 until they are asked for. As in Bunny the options stop at the first that is missing, and the
    words "nan" and "none" are missing.
    """
    items = []
    for path in place.files:
        rows = list(_rows(path))
        pictures: dict[str, str] = {}  # equal ones once
        by_index = {row["index"]: row["image"] for row in rows}
        for row in rows:
            index = _index(path, row["index"])
            _check_split(path, place, row.get("split", ""))
            hint = row["hint"] if "hint" in row else ""
            offered = {letter: row[letter] for letter in "ABCDE" if letter in row and row[letter] not in NOTHING}
            options = _options(row)
            image = _picture(path, row, by_index)
            gold = row.get("answer", "")
            items.append(
                Item(
                    question_id=str(index),
                    image=ImageRef(pictures.setdefault(image, f"data:image/jpeg;base64,{image}"), "data"),
                    prompt=place.prompt.format(
                        context="" if _none(hint) else f"{hint}\n",
                        question=row["question"],
                        options="".join(f"\n{letter}. {option}" for letter, option in options.items()),
                    ),
                    gold=None if gold in NOTHING else gold,
                    meta={
                        # All rotations of a question are one: they fail together.
                        "image_id": str(index % ROUND),
                        "whole": str(index % ROUND),
                        "index": index,
                        "category": row.get("category", ""),
                        "l2": row.get("l2-category", ""),
                        "texts": offered,
                        "cells": {name: cell for name, cell in row.items() if name not in DROPPED},
                    },
                )
            )
    return items


DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
"""Columns that the file for MMBench's server leaves out (convert_mmbench_for_submission.py)."""


def _rows(path: Path) -> Iterator[dict[str, str]]:
    before = csv.field_size_limit(2**31 - 1)  # a picture is one field
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t")
            header = next(reader, [])
            lacking = [name for name in ("index", "question", "A", "B", "image") if name not in header]
            if lacking:
                raise DataError(f"{path}: an MMBench table has the columns index, question, A, B, image, and others; "
                                f"missing: {', '.join(lacking)}.")  # fmt: skip
            for cells in reader:
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(cells)} columns, the header has {len(header)}. "
                        "Fetch the file again."
                    )
                yield dict(zip(header, cells, strict=True))
    except csv.Error as fault:
        raise DataError(f"{path} is no table with tabs: {fault}. Fetch it again.") from None
    finally:
        csv.field_size_limit(before)


def _index(path: Path, cell: str) -> int:
    try:
        return int(cell)
    except ValueError:
        raise DataError(f"{path}: the index {cell!r} is no whole number.") from None


def _check_split(path: Path, place: Place, cell: str) -> None:
    """A table under another one's name is told by its rows."""
    wanted = place.split.split("_")[0].lower()
    if cell and cell.lower() != wanted:
        raise DataError(f"{path}: its rows are of MMBench's split {cell!r}, asked for is {wanted!r}.")


def _none(cell: str) -> bool:
    return cell in NOTHING or cell.lower() in ("nan", "none")


def _options(row: Mapping[str, str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for letter in "ABCD":
        if _none(row.get(letter, "")):
            break
        options[letter] = row[letter]
    return options


def _picture(path: Path, row: Mapping[str, str], by_index: Mapping[str, str]) -> str:
    image = row["image"]
    if len(image) <= NAME_LENGTH:
        other = by_index.get(image, "")
        if len(other) <= NAME_LENGTH:
            raise DataError(f"{path}: row {row['index']} has the picture of row {image!r}, which has none itself.")
        return other
    return image


def _answer_keys(answer: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """LLaVA's `--all-rounds` keeps the question's index and counts the rounds; elsewhere the index says both."""
    turn = answer.get("round_id")
    if isinstance(turn, int) and turn > 0 and name.isdecimal() and int(name) < ROUND:
        return (str(int(name) + turn * ROUND),)
    return (name,)


MMBENCH = {"mmbench": Form(_mmbench, answer_keys=_answer_keys, identity="question_id (the index), with round_id")}
