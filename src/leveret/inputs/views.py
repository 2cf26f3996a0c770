"""How published systems prepare an image, as `TowerView`s: read off their configs, never off a folder's name.

preprocessor_config.json     ->  view_of_processor   LLaVA, Bunny, TinyLLaVA, HF models
image_resize_strategy        ->  STRATEGIES          Prismatic
normalise, in our recipes    ->  MOMENTS

What has no such file says it in its row (model/tower_table.py) or its family's (model/tower_facts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from leveret.records import Resize, TowerView
from leveret.runs import RecipeError

Moments = tuple[tuple[float, float, float], tuple[float, float, float]]

_CLIP: Moments = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF: Moments = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET: Moments = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NONE: Moments = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
MOMENTS = {"half": _HALF, "clip": _CLIP, "imagenet": _IMAGENET, "none": _NONE}
"""Mean and std of the pixels, by the name that a recipe's `normalise` has."""

RESAMPLE: dict[int, Literal["nearest", "bilinear", "bicubic"]] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""PIL.Image.Resampling, as preprocessor_config.json has it."""


def view_of_processor(processor: Mapping[str, Any], name: str = "vision") -> TowerView:
    """What a `preprocessor_config.json` does, as a view.

    `size` may be a number (old CLIP files), {"height", "width"} (SigLIP: distorts) or {"shortest_edge"} (CLIP, DINOv2:
    scales the short side, then cuts `crop_size` out of the centre).

    Raises RecipeError naming the key that says something a view cannot: no square, no resizing, an unknown filter.
    """
    size, crop = processor.get("size"), processor.get("crop_size")
    cuts = processor.get("do_center_crop", crop is not None)
    kind: Resize = "crop"
    short = 0
    if isinstance(size, Mapping) and "height" in size:
        if size["height"] != size.get("width"):
            raise RecipeError(f"preprocessor_config.json: size {dict(size)} is no square; towers see squares here")
        kind, side = ("crop" if cuts and crop is not None else "squash"), size["height"]
        if kind == "crop":
            raise RecipeError(
                f"preprocessor_config.json: size {dict(size)} with do_center_crop is distorted, then cut: "
                "not supported. Give the short side as {'shortest_edge': N}, or leave do_center_crop out"
            )
    elif (isinstance(size, Mapping) and "shortest_edge" in size) or isinstance(size, int):
        edge = size if isinstance(size, int) else size["shortest_edge"]
        cut = crop["height"] if isinstance(crop, Mapping) else crop
        if not cuts or cut is None:
            if not isinstance(size, int):
                raise RecipeError("preprocessor_config.json: shortest_edge without do_center_crop gives no square")
            kind, side = "squash", edge
        else:
            side, short = int(cut), 0 if edge == cut else int(edge)
            if short and short < side:
                raise RecipeError(
                    f"preprocessor_config.json: the short side is scaled to {short}, too small to cut {side} out of it"
                )
    else:
        raise RecipeError(
            f"preprocessor_config.json: size is {size!r}; allowed: a number, {{'height', 'width'}}, {{'shortest_edge'}}"
        )
    if not processor.get("do_resize", True) or not processor.get("do_normalize", True):
        raise RecipeError("preprocessor_config.json: do_resize and do_normalize must be on")
    number = processor.get("resample", 3)
    if number not in RESAMPLE:
        raise RecipeError(f"preprocessor_config.json: resample is {number}; allowed: {RESAMPLE}")
    mean, std = (tuple(map(float, processor[key])) for key in ("image_mean", "image_std"))
    return TowerView(name, int(side), mean, std, kind, RESAMPLE[number], short)  # type: ignore[arg-type]


STRATEGIES: dict[str, Resize] = {"resize-naive": "squash", "resize-crop": "centre", "letterbox": "letterbox"}
"""Prismatic's image_resize_strategy in our words."""
