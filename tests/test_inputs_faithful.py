"""Faithful rows: the same ids, labels and warnings as Bunny, LLaVA, TinyLLaVA and Prismatic, in every folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import inputs_parity as given
from leveret.inputs.faithful import row_of
from leveret.records import ImageSpec, TowerView
from leveret.runs import DataError

pytestmark = pytest.mark.parity
ONE = ImageSpec((TowerView("t", 56),), 1)


@pytest.mark.parametrize("folder", given.folders("training.json"))
def test_every_row_is_the_originals(folder: Path) -> None:
    tokenizer = given.tokenizer_of(folder)
    limit = given.read(folder / "training.json")["tokenizer"]["model_max_length"]
    wrong = []
    for name, chat, part in given.parts(folder):
        for row in part["rows"]:
            turns, has_image = given.turns_of(row), row["image"] is not None
            where = f"{name} {row['id']}"
            if "error" in row:
                with pytest.raises(DataError, match="the original raises"):
                    row_of(turns, chat, tokenizer, has_image, max_tokens=limit)
                continue
            ours = row_of(turns, chat, tokenizer, has_image, max_tokens=limit)
            for what, mine, theirs in (("ids", ours.ids, row["input_ids"]), ("labels", ours.labels, row["labels"])):
                if mine != theirs:
                    wrong.append(f"{where}: {what}: {mine} != {theirs}")
            said = [line for line in row.get("warnings") or [] if re.match("WARNING: tokenization mismatch", line)]
            if [line.strip() for line in said] != ours.warnings:
                wrong.append(f"{where}: warnings {ours.warnings} != {said}")
    assert not wrong, "\n".join(wrong)
