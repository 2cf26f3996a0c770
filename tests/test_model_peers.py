"""Models that others wrote: recognised by their contents, and computing what the tools that wrote them computed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leveret.model import peers
from leveret.model.vlm import VLM
from leveret.records import IGNORE, Batch

PARITY = Path(os.environ.get("LEVERET_PARITY", Path(__file__).resolve().parents[2] / "shared" / "parity"))
FAMILIES = sorted(
    folder.name for folder in (PARITY.iterdir() if PARITY.is_dir() else ())
    if (folder / "cases.json").is_file() and any(folder.glob("checkpoint*"))
)  # fmt: skip
MISSING = pytest.mark.skipif(not FAMILIES, reason=f"no parity data in {PARITY}; LEVERET_PARITY names another place")


def size_of(meta: dict[str, Any]) -> int | None:
    """Prismatic's towers were made smaller than their ids say."""
    return meta.get("default_image_size")


def row_of(vlm: VLM, case: dict[str, Any], pixels: dict[str, torch.Tensor], prismatic: bool) -> Batch:
    """One row: the case's ids, with -200 (Prismatic: the place after the first token) opened to the image's tokens."""
    ids = list(case["input_ids"])
    if prismatic and pixels:
        ids[1:1] = [-200]
    ids = [i for i in ids for i in ([-200] * vlm.spec.tokens if i == -200 else [i])]
    row = torch.tensor([ids])
    marks = row == -200
    return Batch(
        input_ids=row.masked_fill(marks, 0),
        labels=torch.full_like(row, IGNORE),
        attention_mask=torch.ones_like(marks),
        position_ids=torch.arange(len(ids))[None],
        segments=torch.zeros_like(row),
        image_mask=marks,
        pixels=pixels,
        tile_image=torch.arange(1 if pixels else 0),
    )


def pixels_of(vlm: VLM, case: dict[str, Any], arrays: Any) -> dict[str, torch.Tensor]:
    """What each tower sees, from the stored arrays: one key, or one for each tower in their order."""
    said = case.get("pixel_values")
    if not said:
        return {}
    names = [view.name for view in vlm.spec.towers]
    if isinstance(said, str):
        said = [said] * len(names)
    elif isinstance(said, dict):
        said = list(said.values())
    return {name: torch.from_numpy(arrays[key])[None] for name, key in zip(names, said, strict=True)}


def close(found: torch.Tensor, expected: np.ndarray, most: float, what: str) -> None:
    worst = float(np.abs(found.float().numpy() - expected).max())
    assert worst <= most, f"{what}: {worst:.2e}"


@MISSING
@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_a_peers_model_computes_what_its_own_code_computed(family: str) -> None:
    folder = PARITY / family
    said = json.loads((folder / "cases.json").read_text())
    loaded: dict[tuple[str, ...], VLM] = {}
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays, torch.no_grad():
        for case in said["cases"]:
            key = (case.get("checkpoint") or next(folder.glob("checkpoint*")).name, case.get("base") or "")
            if key not in loaded:
                base = folder / key[1] if key[1] and (folder / key[1]).exists() else key[1] or None
                told: dict[str, Any] = {"hub": folder / "hub", "base": str(base) if base else None}
                told |= {"size": size_of(said["meta"]), "dtype": torch.float32}
                loaded[key] = peers.load(folder / key[0], **told)
            check(loaded[key], case, arrays, said["meta"])


def check(vlm: VLM, case: dict[str, Any], arrays: Any, meta: dict[str, Any]) -> None:
    pixels = pixels_of(vlm, case, arrays)
    if pixels:
        features = vlm.see(pixels)
        if isinstance(case.get("tower_features"), str):
            close(features[0], arrays[case["tower_features"]], 3e-5, "tower features")
        close(vlm.connector(features)[0], arrays[case["projected_features"]], 3e-5, "projected features")
    batch = row_of(vlm, case, pixels, prismatic=meta["system"].startswith("prismatic"))
    columns = meta.get("logits_columns") or arrays[case["logits"]].shape[1]
    first = case["logits_first_row"]
    logits = vlm(batch, logits="all").logits[0]
    assert len(logits) == case["logits_rows_total"]
    close(logits[first:, :columns], arrays[case["logits"]][:, :columns], 3e-5, "logits")
    if end := len(case.get("greedy_ids", ())):
        vlm.language.generation_config.eos_token_id = None  # what is stored ends with the end token
        found = vlm.generate(batch, do_sample=False, max_new_tokens=end, pad_token_id=0)
        assert found[0].tolist() == case["greedy_ids"]
