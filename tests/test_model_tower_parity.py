"""Towers give what Bunny, TinyLLaVA, LLaVA and Prismatic gave: every folder of checkpoints under LEVERET_PARITY."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leveret.model.fusion import fuse
from leveret.model.recipe import TowerRecipe, VisionRecipe
from leveret.model.tower_files import read_weights
from leveret.model.towers import Tower, describe_all, fill_tower, load_tower

ROOT = Path(os.environ.get("LEVERET_PARITY", Path(__file__).resolve().parents[2] / "shared" / "parity"))
TOLERANCE = 1e-5  # a wrong epsilon moves features by 2e-5


def folders() -> list[Path]:
    """Every folder of cases with tower features, whatever it is called."""
    found = []
    for file in sorted(ROOT.glob("*/cases.json")):
        if any(case.get("tower_features") for case in json.loads(file.read_text("utf-8"))["cases"]):
            found.append(file.parent)
    return found


def checkpoint_state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, from whichever files the system wrote."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    files += sorted(folder.glob("non_lora_trainables.bin"))
    return {name: tensor for file in files for name, tensor in read_weights(file).items()}


def towers_of(folder: Path, meta: dict[str, Any], checkpoint: str, side: int) -> list[Tower]:
    """The towers as the original loader would have had them; `side` is that of its pixels."""
    system = meta["system"]
    if system == "prismatic-vlms":
        # Prismatic forgot quick_gelu where CLIP stands beside DINOv2
        clip = "gelu" if meta["vision_backbone_id"].startswith("dinoclip") else None
        recipes = [
            TowerRecipe(
                tower=str(folder / "hub/timm" / name),
                size=meta["default_image_size"],
                activation=clip if "clip_" in name else None,
            )
            for name in meta["timm_models"]
        ]
        return [load_tower(facts) for facts in describe_all(VisionRecipe(towers=recipes))]
    config = json.loads((folder / checkpoint / "config.json").read_text("utf-8"))
    if system in ("Bunny", "LLaVA"):
        scales = config.get("s2_scales", "384,768,1152") if config.get("use_s2") else ""
        chosen = {"patch": "patch", "cls_patch": "cls_patch"}[config.get("mm_vision_select_feature", "patch")]
        recipe = VisionRecipe(
            tower=str(folder / "hub" / config["mm_vision_tower"]),
            layer=config.get("mm_vision_select_layer", -2),
            tokens=chosen,
            size=side,
            s2=[int(scale) for scale in scales.split(",") if scale],
        )
        (facts,) = describe_all(recipe)
        state = checkpoint_state(folder / checkpoint) if config.get("unfreeze_vision_tower") else {}
        if any("vision_tower" in name for name in state):
            return [fill_tower(facts, state, where=str(folder))]
        return [load_tower(facts)]
    assert system == "TinyLLaVA_Factory", f"{folder}: no rule for {system}"
    names = [name.removeprefix("mof:") for name in (meta["vision"], meta.get("vision2")) if name]
    recipes = [
        TowerRecipe(
            tower=str(folder / "hub" / name),
            layer=meta["vision_feature_layer"],
            size=side,
            tokens={"patch": "drop_first", "cls_patch": "cls_patch"}[meta["vision_feature_select_strategy"]],
            normalise="clip" if len(names) > 1 else None,
        )
        for name in names
    ]
    apart = folder / checkpoint / "vision_tower"
    state = checkpoint_state(apart if apart.is_dir() else folder / checkpoint)
    stem = "" if apart.is_dir() else "vision_tower._vision_tower."
    unders = [f"{stem}clip.", f"{stem}dinov2."] if len(names) > 1 else [stem]
    return [  # where DINOv2's grid is another, its positions follow the pixels by the rule of that time
        fill_tower(facts, state, under=under, positions="dino" if facts.family == "dinov2" else None, where=str(folder))
        for facts, under in zip(describe_all(VisionRecipe(towers=recipes)), unders, strict=True)
    ]


def numbers(folder: Path) -> float:
    """The largest difference between our features and the stored ones, over all cases with an image."""
    said = json.loads((folder / "cases.json").read_text("utf-8"))
    worst, built = 0.0, {}
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays, torch.no_grad():
        for case in said["cases"]:
            if not case.get("tower_features"):
                continue
            checkpoint = case.get("checkpoint") or said["meta"].get("checkpoint") or "checkpoint"
            keys = case["pixel_values"]
            keys = list(keys.values()) if isinstance(keys, dict) else keys if isinstance(keys, list) else [keys]
            side = arrays[keys[0]].shape[-1]
            if checkpoint not in built:
                built[checkpoint] = [tower.eval() for tower in towers_of(folder, said["meta"], checkpoint, side)]
            towers = built[checkpoint]
            keys = keys * len(towers) if len(keys) == 1 else keys
            pixels = [torch.from_numpy(arrays[key])[None] for key in keys]
            assert all(p.shape[-1] == tower.view.size for p, tower in zip(pixels, towers, strict=True))
            features = [tower(p) for tower, p in zip(towers, pixels, strict=True)]
            wanted = case["tower_features"]
            wanted = list(wanted.values()) if isinstance(wanted, dict) else wanted
            if isinstance(wanted, str):
                features, wanted = [fuse(features, "channel")], [wanted]
            for ours, key in zip(features, wanted, strict=True):
                assert ours[0].shape == arrays[key].shape and ours.isfinite().all() and arrays[key].std() > 0.1
                worst = max(worst, float(np.abs(ours[0].numpy() - arrays[key]).max()))
    return worst


@pytest.mark.parity
@pytest.mark.parametrize("folder", folders() or [None], ids=lambda folder: folder.name if folder else "none")
def test_tower_features_are_the_originals(
    folder: Path | None, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if folder is None:
        pytest.skip(f"no family folders under {ROOT}; set LEVERET_PARITY to the folder that holds them")
    worst = numbers(folder)
    record_property("largest_difference", worst)
    with capsys.disabled():
        print(f" {folder.name} {worst:.1e}", end="")
    assert worst <= TOLERANCE
