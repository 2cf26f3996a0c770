"""Our model computes what Bunny's own code computed: tower, connector and language model, on checkpoints it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leveret.model.build import build
from leveret.model.recipe import LanguageRecipe, ModelRecipe, VisionRecipe
from leveret.model.vlm import VLM
from leveret.records import IGNORE, Batch

FAMILIES = {"phi2": "phi", "stablelm2": "stablelm", "qwen1.5": "qwen2", "llama3": "llama"}
NAMES = (
    ("model.vision_tower.vision_tower.vision_model.", "towers.vision.model."),
    ("model.mm_projector.", "connector."),
    ("", "language."),
)


def bunny(folder: Path, model_type: str, work: Path) -> VLM:
    """The checkpoint as our model; every key of it is used and none is missing."""
    from safetensors.torch import load_file

    config = json.loads((folder / "checkpoint/config.json").read_text())
    (work / "config.json").write_text(json.dumps({**config, "model_type": model_type, "dtype": "float32"}))
    recipe = ModelRecipe(
        vision=VisionRecipe(tower=str(folder / "hub" / config["mm_vision_tower"]), keep=["layers", "norm", "head"]),
        language=LanguageRecipe(name=str(work), head_bias=False),
        chat="bunny",
    )
    vlm = build(recipe, weights=False)
    state: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "checkpoint").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            old, new = next(pair for pair in NAMES if name.startswith(pair[0]))
            state[new + name.removeprefix(old)] = tensor.float()
    vlm.load_state_dict(state, strict=True)
    return vlm


def batch_of(case: dict[str, Any], pixels: np.ndarray | None, tokens: int) -> Batch:
    """One row: Bunny's ids with -200, its placeholder, opened to `tokens` image positions."""
    ids = [i for i in case["input_ids"] for i in ([-200] * tokens if i == -200 else [i])]
    row = torch.tensor([ids])
    marks = row == -200
    ones = torch.ones_like(marks)
    return Batch(
        input_ids=row.masked_fill(marks, 0),
        labels=torch.full_like(row, IGNORE),
        attention_mask=ones,
        position_ids=torch.arange(len(ids))[None],
        segments=torch.zeros_like(row),
        image_mask=marks,
        pixels={} if pixels is None else {"vision": torch.from_numpy(pixels)[None]},
        tile_image=torch.arange(0 if pixels is None else 1),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_bunnys_numbers(family: str, parity: Path, tmp_path: Path) -> None:
    folder = parity / f"bunny-{family}-siglip"
    vlm = bunny(folder, FAMILIES[family], tmp_path)
    said = json.loads((folder / "cases.json").read_text())
    columns = said["meta"]["logits_columns"]
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays, torch.no_grad():
        for case in said["cases"]:
            pixels = arrays[case["pixel_values"]] if case["image"] else None
            if pixels is not None:
                features = vlm.see({"vision": torch.from_numpy(pixels)[None]})
                projected = vlm.connector(features)[0].numpy()
                np.testing.assert_allclose(features[0].numpy(), arrays[case["tower_features"]], atol=3e-5, rtol=0)
                np.testing.assert_allclose(projected, arrays[case["projected_features"]], atol=3e-5, rtol=0)
            batch = batch_of(case, pixels, vlm.spec.tokens)
            logits = vlm(batch, logits="all").logits[0, case["logits_first_row"] :, :columns]
            np.testing.assert_allclose(logits.numpy(), arrays[case["logits"]][:, :columns], atol=3e-5, rtol=0)
            last = vlm(batch, logits="last").logits[0, :columns]
            assert int(last.argmax()) == case["greedy_ids"][0]
