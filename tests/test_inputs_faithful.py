"""Faithful rows: the same ids, labels and warnings as Bunny, LLaVA, TinyLLaVA and Prismatic, in every folder."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inputs_parity as given
from leveret.inputs.chat import encode
from leveret.inputs.faithful import PLACE, row_of
from leveret.inputs.formats import ChatFormat
from leveret.records import IGNORE, IMAGE_MARK, ImageRef, ImageSpec, Sample, TowerView, Turn
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
def test_every_row_as_our_model_reads_it(folder: Path) -> None:
    """The twin `NAME/faithful`: the same row with its image opened to two positions, cut as they cut it."""
    tokenizer, spec = given.tokenizer_of(folder), ImageSpec((TowerView("t", 56),), 2)
    limit = given.read(folder / "training.json")["tokenizer"]["model_max_length"]
    prismatic = given.system_of(folder) == "Prismatic"
    for name, chat, part in given.parts(folder):
        for row in part["rows"]:
            if "error" in row:
                continue
            sizes = [(56, 56)] if row["image"] else []
            twin = f"{chat.name}/faithful"
            ours = encode(given.turns_of(row), twin, tokenizer, spec, sizes, max_tokens=limit)
            ids, labels = row["input_ids"], row["labels"]
            if prismatic and sizes:
                ids, labels = [ids[0], PLACE, *ids[1:]], [labels[0], IGNORE, *labels[1:]]
            pairs = [pair for pair in zip(ids, labels, strict=True) for _ in range(2 if pair[0] == PLACE else 1)]
            pairs = pairs if prismatic else pairs[:limit]
            seen = [PLACE if mark else token for token, mark in zip(ours.input_ids, ours.image_mask, strict=True)]
            assert list(zip(seen, ours.labels, strict=True)) == pairs, (name, row["id"])


@pytest.mark.parametrize("folder", given.folders("training.json"))
def test_a_batch_has_the_originals_expanded_labels(folder: Path) -> None:
    """After the original collator and the insertion of image features (Prismatic stores no such array)."""
    training, tokenizer = given.read(folder / "training.json"), given.tokenizer_of(folder)
    rows = {row["id"]: row for name, _, part in given.parts(folder) if name == "chat" for row in part["rows"]}
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        if "batch.expanded_labels" not in arrays:
            pytest.skip("the folder holds no expanded labels")
        features = next(case["projected_features"] for case in given.cases(folder) if case["image"])
        spec = ImageSpec((TowerView("t", 56),), arrays[features].shape[-2])
        stored = zip(arrays["batch.expanded_labels"], arrays["batch.expanded_attention_mask"], strict=True)
        chat, limit = (
            next(form for name, form, _ in given.parts(folder) if name == "chat"),
            training["tokenizer"]["model_max_length"],
        )
        for row_id, (labels, mask) in zip(training["batch"]["ids"], stored, strict=True):
            row = rows[row_id]
            sizes = [(56, 56)] if row["image"] else []
            ours = encode(given.turns_of(row), chat, tokenizer, spec, sizes, max_tokens=limit, faithful=True)
            assert ours.labels == labels[mask.astype(bool)].tolist(), row_id


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


# --- where the default does otherwise ---------------------------------------------------------------------------------


def documented() -> list[tuple[list[str], list[str], str]]:
    """(formats, rows, what) of the list in docs/chat-formats.md, the patterns as fnmatch reads them."""
    text = (Path(__file__).resolve().parents[1] / "docs/chat-formats.md").read_text("utf-8")
    lines = text.partition("| formats | rows |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    assert all(len(line) == 4 and line[3] for line in cells), "every difference has its reason"
    return [(re.findall("`(.*?)`", one), re.findall("`(.*?)`", two), what) for one, two, what, _ in cells]


def difference(row: dict[str, Any], chat: ChatFormat, tokenizer: Any, limit: int) -> str:
    """What the default does otherwise with a row; "" where nothing is, once the row is cut as the collator cuts it."""
    turns, has_image = given.turns_of(row), row["image"] is not None
    if Sample("row", (ImageRef("picture.png"),) * has_image, tuple(turns)).fault():
        return "refused"
    assert "error" not in row, "what the original cannot read is refused"
    front = has_image and chat.name.startswith("prismatic")  # the image comes on top of the text, after the first token
    ours = encode(turns, chat, tokenizer, ONE, [(56, 56)] * has_image, max_tokens=limit + front)
    ids = [PLACE if seen else token for token, seen in zip(ours.input_ids, ours.image_mask, strict=True)]
    theirs = [
        part[:1] + [extra] * front + part[1:limit]
        for part, extra in ((row["input_ids"], PLACE), (row["labels"], IGNORE))
    ]
    return ", ".join(name for name, a, b in zip(("ids", "labels"), (ids, ours.labels), theirs, strict=True) if a != b)


@pytest.mark.parametrize("folder", given.folders("training.json"))
def test_the_default_differs_where_the_list_says(folder: Path) -> None:
    tokenizer = given.tokenizer_of(folder)
    limit = given.read(folder / "training.json")["tokenizer"]["model_max_length"]
    for name, chat, part in given.parts(folder):
        for row in part["rows"]:
            said = [
                what
                for chats, ids, what in documented()
                if any(fnmatch(chat.name, one) for one in chats) and any(fnmatch(row["id"], one) for one in ids)
            ]
            found, allowed = difference(row, chat, tokenizer, limit), said[0] if said else ""
            assert bool(found) == bool(allowed) and found in allowed, (name, row["id"], found, allowed)
            if found == allowed == "labels":  # the original masks the whole row
                assert set(row["labels"]) == {IGNORE}
