"""Faithful rows: the same ids, labels and warnings as Bunny, LLaVA, TinyLLaVA and Prismatic, in every folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import inputs_parity as given
from leveret.inputs.chat import encode
from leveret.inputs.faithful import PLACE, row_of
from leveret.records import IMAGE_MARK, ImageSpec, TowerView, Turn
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


@pytest.mark.parametrize("folder", given.folders("training.json"))
def test_every_prompt_is_the_originals(folder: Path) -> None:
    """Faithfully and by default: what is asked is written alike (but for Prismatic's bracket), image and all."""
    tokenizer, chat = given.tokenizer_of(folder), given.chat_of(folder)
    prismatic = given.system_of(folder) == "Prismatic"
    cases = given.cases(folder)
    assert cases
    for case in cases:
        turns = given.conversation_of(case["prompt"], chat)
        assert turns, f"{chat.name} does not write {case['prompt']!r}"
        if prismatic and case["image"]:
            turns[0] = Turn("user", IMAGE_MARK + "\n" + turns[0].text)
        images = [(56, 56)] if case["image"] else []
        for faithful in (True, False) if "<<SYS>\n" not in case["prompt"] else (True,):
            ours = encode(turns, chat, tokenizer, ONE, images, generate=True, faithful=faithful)
            text = ours.text.replace(IMAGE_MARK, "") if prismatic else ours.text
            assert text.rstrip() == case["prompt"], case["name"]
            if prismatic:  # the patches come after the first token
                assert ours.image_mask == [False, *[True] * len(images), *[False] * (len(case["input_ids"]) - 1)]
                ids = [token for token, seen in zip(ours.input_ids, ours.image_mask, strict=True) if not seen]
            else:
                ids = [PLACE if seen else token for token, seen in zip(ours.input_ids, ours.image_mask, strict=True)]
            assert ids == case["input_ids"], (case["name"], faithful)
