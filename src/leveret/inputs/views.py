"""How published systems prepare an image, as `TowerView`s: read off their configs, never off a folder's name.

preprocessor_config.json (+ image_aspect_ratio, S2)  ->  view_of_processor   LLaVA, Bunny, TinyLLaVA, HF models
none, Bunny's EVA towers                             ->  EVA
Prismatic's backbone id and resize strategy          ->  prismatic_views
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from leveret.records import Resize, TowerView
from leveret.runs import RecipeError, closest

Moments = tuple[tuple[float, float, float], tuple[float, float, float]]

_CLIP: Moments = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF: Moments = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET: Moments = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MOMENTS = {"half": _HALF, "clip": _CLIP, "imagenet": _IMAGENET}
"""Mean and std of the pixels, by the name that a recipe's `normalise` has."""

EVA = TowerView("eva", 336, *_CLIP, resize="centre")
"""What Bunny gives EVA-02-CLIP-L-336, which has no preprocessor_config.json (multimodal_encoder/eva_clip)."""

_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling

ASPECTS = ("square", "pad")


def with_aspect(view: TowerView, aspect: str | None, largest: int | None = None) -> TowerView:
    """The view under LLaVA's `image_aspect_ratio`: "pad" centres on a square first, "square" and None change nothing.

    largest  the largest scale of S2, at which the image is prepared; the tower's own size where S2 is not used.

    Raises RecipeError for any other word ("anyres" gives several pictures per image: `records.Tiling`).
    """
    if aspect not in (None, *ASPECTS):
        raise RecipeError(
            f"image_aspect_ratio: {aspect!r} is not one picture per image. Allowed: {', '.join(ASPECTS)}; for 'anyres' "
            "take records.Tiling.from_llava"
        )
    if largest is not None:
        view = replace(view, size=largest, short=0)
    return replace(view, resize="pad") if aspect == "pad" else view


def view_of_processor(
    processor: Mapping[str, Any], name: str = "vision", *, aspect: str | None = None, largest: int | None = None
) -> TowerView:
    """What a `preprocessor_config.json` does, as a view; `aspect` and `largest` as in `with_aspect`.

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
    else:
        raise RecipeError(
            f"preprocessor_config.json: size is {size!r}; allowed: a number, {{'height', 'width'}}, {{'shortest_edge'}}"
        )
    if not processor.get("do_resize", True) or not processor.get("do_normalize", True):
        raise RecipeError("preprocessor_config.json: do_resize and do_normalize must be on")
    number = processor.get("resample", 3)
    if number not in _RESAMPLE:
        raise RecipeError(f"preprocessor_config.json: resample is {number}; allowed: {_RESAMPLE}")
    mean, std = (tuple(map(float, processor[key])) for key in ("image_mean", "image_std"))
    view = TowerView(name, int(side), mean, std, kind, _RESAMPLE[number], short)  # type: ignore[arg-type]
    return with_aspect(view, aspect, largest)


PRISMATIC: dict[str, tuple[tuple[str, Moments, float], ...]] = {
    "clip-vit-b": (("clip", _CLIP, 0.9),),  # timm's crop_pct, left in for this one
    "clip-vit-l": (("clip", _CLIP, 1.0),),
    "clip-vit-l-336px": (("clip", _CLIP, 1.0),),
    "siglip-vit-b16-224px": (("siglip", _HALF, 1.0),),
    "siglip-vit-b16-256px": (("siglip", _HALF, 1.0),),
    "siglip-vit-b16-384px": (("siglip", _HALF, 1.0),),
    "siglip-vit-so400m": (("siglip", _HALF, 1.0),),
    "siglip-vit-so400m-384px": (("siglip", _HALF, 1.0),),
    "dinov2-vit-l": (("dino", _IMAGENET, 1.0),),
    "in1k-vit-l": (("in1k", _HALF, 1.0),),
    "dinoclip-vit-l-336px": (("dino", _IMAGENET, 1.0), ("clip", _CLIP, 1.0)),
    "dinosiglip-vit-so-224px": (("dino", _IMAGENET, 1.0), ("siglip", _HALF, 1.0)),
    "dinosiglip-vit-so-384px": (("dino", _IMAGENET, 1.0), ("siglip", _HALF, 1.0)),
}
"""Prismatic's vision backbones: tower, moments, and the share of the scaled picture that is cut out (crop_pct)."""

STRATEGIES: dict[str, Resize] = {"resize-naive": "squash", "resize-crop": "centre", "letterbox": "letterbox"}
"""Prismatic's image_resize_strategy in our words."""


def prismatic_views(backbone: str, size: int, strategy: str) -> tuple[TowerView, ...]:
    """One view per tower of a Prismatic vision backbone, in fusion order.

    size      `default_image_size`, in pixels.
    strategy  `image_resize_strategy`: "resize-naive", "resize-crop" or "letterbox".

    Raises RecipeError for a backbone or a strategy that Prismatic does not have.
    """
    if backbone not in PRISMATIC:
        near = closest(backbone, PRISMATIC)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise RecipeError(f"vision_backbone_id: {backbone!r} is not Prismatic's. Allowed: {', '.join(PRISMATIC)}{hint}")
    if strategy not in STRATEGIES:
        raise RecipeError(f"image_resize_strategy: {strategy!r} is none of {', '.join(STRATEGIES)}")
    kind = STRATEGIES[strategy]
    return tuple(
        TowerView(name, size, *moments, resize=kind, short=0 if share == 1 or kind == "squash" else int(size / share))
        for name, moments, share in PRISMATIC[backbone]
    )
