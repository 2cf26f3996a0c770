"""Whole models of Bunny, LLaVA, TinyLLaVA and Prismatic: the loss that a training step computed of a padded batch of
rows, with and without images, and the answers to pictures and questions, from files to words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import inputs_parity as given
from leveret.generate.engine import Engine, Request
from leveret.inputs import Item, collate, encode
from leveret.inputs.resize import prepare
from leveret.inputs.text import decode
from leveret.model import peers
from leveret.model.vlm import VLM
from leveret.records import IGNORE, IMAGE_MARK, ImageRef, Turn

pytestmark = pytest.mark.parity
CLOSE = 1e-5


def model_of(folder: Path, case: dict[str, Any] | None = None) -> VLM:
    """The model of a case; of the first where none is given."""
    said = given.read(folder / "cases.json")
    meta, first = said["meta"], case or said["cases"][0]
    name = first.get("checkpoint") or meta.get("checkpoint") or next(folder.glob("checkpoint*")).name
    base = first.get("base")
    base = str(folder / base) if base and (folder / base).exists() else base
    told: dict[str, Any] = {"hub": folder / "hub", "base": base, "size": meta.get("default_image_size")}
    return peers.load(folder / name, dtype=torch.float32, **told)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("folder", given.folders("training.json"))
def test_a_batchs_loss_is_the_originals(folder: Path, side: Any, record_property: Any) -> None:
    training, vlm = given.read(folder / "training.json"), model_of(folder)
    tokenizer, limit = given.tokenizer_of(folder), training["tokenizer"]["model_max_length"]
    _, chat, part = given.parts(folder)[0]
    rows = {row["id"]: row for row in part["rows"]}
    items = []
    for id in training["batch"]["ids"]:
        row, sizes, pixels = rows[id], [], []
        if row["image"]:
            with Image.open(folder / "images" / row["image"]) as image:
                picture = image.convert("RGB")
            sizes = [(picture.height, picture.width)]
            pixels = [{view.name: prepare(picture, view) for view in vlm.spec.towers}]
        encoded = encode(given.turns_of(row), f"{chat.name}/faithful", tokenizer, vlm.spec, sizes, max_tokens=limit)
        items.append(Item(encoded, id, pixels))
    batch = collate(items, tokenizer.pad_token_id, side)
    assert {bool(item.pixels) for item in items} == {True, False}, "rows with an image, and rows without"
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays, torch.no_grad():
        for item, ids, mask in zip(items, arrays["batch.input_ids"], arrays["batch.attention_mask"], strict=True):
            text = [
                token for token, seen in zip(item.encoded.input_ids, item.encoded.image_mask, strict=True) if not seen
            ]
            assert text == [token for token in ids[mask.astype(bool)].tolist() if token != -200], item.id
        output = vlm(batch)
    assert output.supervised == int((batch.labels != IGNORE).sum())
    found = float(output.loss_sum) / output.supervised
    record_property("difference", abs(found - training["batch"]["loss"]))
    print(f"{folder.name}: {found:.6f}, theirs {training['batch']['loss']:.6f}")
    assert abs(found - training["batch"]["loss"]) <= CLOSE


@pytest.mark.parametrize("folder", given.folders("training.json"))
def test_the_engine_answers_what_the_original_answered(folder: Path, tmp_path: Path) -> None:
    """The whole way, as people go it: a file of a picture and a question, through the tokenizer, the chat format and
    the views that were read with the model, to the words of an answer."""
    loaded: dict[Any, VLM] = {}
    chat, answered = given.chat_of(folder), 0
    for number, case in enumerate(given.cases(folder)):
        turns = given.conversation_of(case["prompt"], chat)
        if not case.get("greedy_ids") or not turns or "<<SYS>\n" in case["prompt"]:
            continue
        key = (case.get("checkpoint"), case.get("base"))
        if key not in loaded:
            loaded[key] = model_of(folder, case)
            # LLaVA's prompts are not in the format that its models are examined with
            loaded[key].recipe = loaded[key].recipe.model_copy(update={"chat": chat.name})
        vlm, refs = loaded[key], []
        if case["image"]:
            if given.system_of(folder) == "Prismatic":
                turns[0] = Turn("user", f"{IMAGE_MARK}\n{turns[0].text}")
            with Image.open(folder / case["image"]) as image:
                image.convert("RGB").save(tmp_path / f"{number}.png")  # the originals drop alpha, we paint on white
            refs = [ImageRef(str(tmp_path / f"{number}.png"))]
        request = Request("q", tuple(refs), tuple(turns), max_new_tokens=len(case["greedy_ids"]))
        (said,) = Engine(vlm, precision="fp32", slots=1).answer([request])
        assert said.text == decode(vlm.tokenizer, case["greedy_ids"]).strip(), case["name"]
        answered += 1
    assert answered > 1
