"""The pixels of every image of the parity data: cases, training rows and Prismatic's transforms, to 1e-6."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import inputs_parity as given
from leveret.inputs.resize import prepare
from leveret.inputs.views import STRATEGIES, view_of_processor
from leveret.model.peers.prismatic import BACKBONES
from leveret.model.recipe import TowerRecipe, VisionRecipe
from leveret.model.tower_facts import TOWER_FAMILIES
from leveret.model.tower_table import describe_all
from leveret.records import TowerView
from leveret.runs import RecipeError

CLOSE = 1e-6


def prismatic_views(backbone: str, size: int, strategy: str) -> tuple[TowerView, ...]:
    """What the towers of one of Prismatic's backbones see, by the rows that its models are read with."""
    towers = [
        TowerRecipe(tower=f"timm/{name}", name=view, size=size, resize=STRATEGIES[strategy])
        for view, name in BACKBONES[backbone].towers
    ]
    return tuple(
        replace(facts.view, name=facts.name.replace("dinov2", "dino"))
        for facts in describe_all(VisionRecipe(towers=towers))
    )


def under(view: TowerView, aspect: str | None, largest: int | None) -> TowerView:
    """The view under LLaVA's `image_aspect_ratio` and with S2's largest scale."""
    view = view if largest is None else replace(view, size=largest, short=0)
    return replace(view, resize="pad") if aspect == "pad" else view


def views_of(folder: Path, aspect: str | None = None, checkpoint: str = "checkpoint*") -> tuple[TowerView, ...]:
    """What the folder's model sees, by its own configs; `aspect` instead of the model's."""
    meta = given.read(folder / "cases.json")["meta"]
    system = given.system_of(folder)
    if system == "Prismatic":
        return prismatic_views(meta["vision_backbone_id"], meta["default_image_size"], meta["image_resize_strategy"])
    config = given.read(next(path for path in sorted(folder.glob(f"{checkpoint}/config.json"))))
    aspect = aspect or config.get("image_aspect_ratio")
    source = config.get("mm_vision_tower") or config["vision_model_name_or_path"]
    processor = folder / "hub" / source.removeprefix("mof:") / "preprocessor_config.json"
    largest = max(map(int, config.get("s2_scales", "384,768,1152").split(","))) if config.get("use_s2") else None
    if processor.is_file():
        return (under(view_of_processor(given.read(processor)), aspect, largest),)
    size = meta["eva_vision_config"]["image_size"]
    eva = TOWER_FAMILIES["eva02_clip"]
    return (under(TowerView("eva", size, eva.mean, eva.std, eva.resize, eva.resample), aspect, largest),)


def near(folder: Path, image: str, views: tuple[TowerView, ...], arrays: Any, keys: Any) -> float:
    """Largest difference between our pixels and the stored ones; every key has its view."""
    picture = Image.open(folder / image)
    named = list(keys.values()) if isinstance(keys, dict) else list(keys) if isinstance(keys, list) else [keys]
    if isinstance(keys, dict) and len(views) > 1:
        assert list(keys) == [view.name for view in views]
    views = views * len(named) if len(views) == 1 else views  # TinyLLaVA's MoF: both towers see the first one's pixels
    differences = []
    for key, view in zip(named, views, strict=True):
        ours, theirs = prepare(picture, view), arrays[key]
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.float32
        assert np.isfinite(ours).all() and ours.std() > 0  # `max` below would pass over what is no number
        differences.append(float(np.abs(ours - theirs).max()))
    return max(differences)


@pytest.mark.parity
@pytest.mark.parametrize("folder", given.folders("training.json"))
def test_every_case_and_every_row(folder: Path, record_property: Any) -> None:
    largest, seen = 0.0, 0
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        for case in given.read(folder / "cases.json")["cases"]:
            if case.get("image"):
                views = views_of(folder, checkpoint=case.get("checkpoint") or "checkpoint*")
                largest = max(largest, near(folder, case["image"], views, arrays, case["pixel_values"]))
                seen += 1
        training = given.read(folder / "training.json")
        for key in arrays.files:
            if not key.startswith("train."):
                continue
            _, _template, aspect, row_id, *_ = key.split(".")
            rows = [row for part in training.values() if isinstance(part, dict) for row in part.get("rows", ())]
            row = next(row for row in rows if row["id"] == row_id)
            largest = max(largest, near(folder, f"images/{row['image']}", views_of(folder, aspect), arrays, key))
            seen += 1
    record_property("largest", largest)
    assert seen and largest <= CLOSE, f"{seen} images, largest difference {largest}"


@pytest.mark.parity
@pytest.mark.parametrize("folder", given.folders("cases.json", "image_resize_strategy"))
def test_every_transform_of_prismatic(folder: Path) -> None:
    cases = [case for case in given.read(folder / "cases.json")["cases"] if "image_resize_strategy" in case]
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        for case in cases:
            views = prismatic_views(case["vision_backbone_id"], case["image_size"], case["image_resize_strategy"])
            assert near(folder, case["image"], views, arrays, case["arrays"]) <= CLOSE, json.dumps(case)


def test_processors_as_views() -> None:
    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    siglip = {**half, "size": {"height": 384, "width": 384}}
    assert view_of_processor(siglip) == TowerView("vision", 384)
    clip = {**half, "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}
    assert view_of_processor(clip) == TowerView("vision", 224, resize="crop")
    dino = {**clip, "size": {"shortest_edge": 256}, "resample": 2}
    assert view_of_processor(dino) == TowerView("vision", 224, resize="crop", resample="bilinear", short=256)
    old = {**half, "size": 336, "crop_size": 336, "do_center_crop": True}
    assert view_of_processor(old, "clip") == TowerView("clip", 336, resize="crop")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 224, "width": 448}}, "no square"),
        ({"size": {"shortest_edge": 224}}, "gives no square"),
        ({"size": {"longest_edge": 224}}, "allowed: a number"),
        ({"size": {"height": 224, "width": 224}, "crop_size": 200}, "distorted, then cut"),
        ({"size": {"shortest_edge": 200}, "crop_size": 224}, "too small to cut 224"),
        ({"resample": 1}, "resample is 1"),
        ({"do_resize": False}, "must be on"),
    ],
)
def test_processors_that_no_view_can_say(change: dict[str, Any], message: str) -> None:
    base = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 224, "width": 224}}
    with pytest.raises(RecipeError, match=message):
        view_of_processor({**base, **change})


def test_prismatics_words() -> None:
    """Of all its towers one keeps timm's crop_pct of .9 (prismatic.md 5)."""
    assert [view.name for view in prismatic_views("dinoclip-vit-l-336px", 336, "letterbox")] == ["dino", "clip"]
    for backbone, row in BACKBONES.items():
        for view in prismatic_views(backbone, row.size, "resize-crop"):
            assert (view.resize, view.short) == ("centre", 248 if backbone == "clip-vit-b" else 0)
