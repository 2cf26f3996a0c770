"""An image becomes tiles, or patches: the pixels of what `records.Tiling`, `Split` and `NaFlex` describe.

LLaVA-1.6's "anyres" (`Tiling`), equal to the last bit to LLaVA's `process_anyres_image` and to
`LlavaNextImageProcessorPil` of transformers:

    image -> the whole, squashed to one tile
          -> scaled to fit the best grid, centred on black -> cut into tiles, row by row

nanoVLM's (`Split`), whose whole is made of the scaled image and is not rounded to 256 values:

    image -> scaled to a multiple of the tile -> the whole, squashed to one tile
                                              -> cut into tiles, row by row

SigLIP2's (`NaFlex`), equal to the last bit to `Siglip2ImageProcessorPil`:

    image -> scaled to its own shape in whole patches -> cut into patches, side by side; nothing (0) behind them
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from leveret.inputs.resize import filter_of, normalised, prepare
from leveret.records import ImageSpec, NaFlex, Split, Tiling, TowerView

if TYPE_CHECKING:
    from PIL import Image


def cut(image: Image.Image, tiling: Tiling | Split, resample: str = "bicubic") -> list[Image.Image]:
    """The whole image (where it is shown) and its tiles, RGB, each `tiling.size` square; as many as `tiling.tiles`
    says."""
    from PIL import Image as pil

    if image.mode != "RGB":
        image = image.convert("RGB")
    if isinstance(tiling, Split):
        scaled = _scaled(image, tiling, resample)
        tiles = _grid(scaled, tiling.size)
        if tiling.whole is None or len(tiles) == 1:
            return tiles
        return [scaled.resize((tiling.size, tiling.size), filter_of("bilinear")), *tiles]
    size, filter = tiling.size, filter_of(resample)
    (width, height), (rows, columns) = image.size, tiling.best(image.height, image.width)
    across, down = columns / width, rows / height
    if across < down:
        to = (columns, min(math.ceil(height * across), rows))
    else:
        to = (min(math.ceil(width * down), columns), rows)
    canvas = pil.new("RGB", (columns, rows))
    canvas.paste(image.resize(to, filter), ((columns - to[0]) // 2, (rows - to[1]) // 2))
    return [image.resize((size, size), filter), *_grid(canvas, size)]


def _grid(image: Image.Image, size: int) -> list[Image.Image]:
    """Squares of `size`, row by row."""
    corners = [(left, top) for top in range(0, image.height, size) for left in range(0, image.width, size)]
    return [image.crop((left, top, left + size, top + size)) for left, top in corners]


def _scaled(image: Image.Image, split: Split, resample: str) -> Image.Image:
    """The image in the size of which its tiles are cut; not resized where it has it."""
    height, width = split.best(image.height, image.width)
    return image if image.size == (width, height) else image.resize((width, height), filter_of(resample))


def _squashed(image: Image.Image, size: int) -> NDArray[np.float32]:
    """torchvision's `resize` of the pixels as floats 0..1: bilinear with antialias. [3, size, size]."""
    import torch

    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255))
    found = torch.nn.functional.interpolate(
        pixels[None], size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return np.asarray(found[0].numpy(), dtype=np.float32)


def prepare_tiles(image: Image.Image, view: TowerView, tiling: Tiling | Split) -> NDArray[np.float32]:
    """The image as one tower sees it in tiles: float32 `[tiling.tiles(..), 3, size, size]`, the whole first.

    Raises ValueError when the tower's size is not the tiles', or `view.resample` is not a filter.
    """
    if view.size != tiling.size:
        raise ValueError(f"tower {view.name} sees {view.size} pixels, but tiles have {tiling.size}: they must agree")
    ready = replace(view, resize="squash", short=0)  # every tile has the tower's size: nothing is resized again
    pictures = cut(image, tiling, view.resample)
    found = np.stack([prepare(tile, ready) for tile in pictures])
    if isinstance(tiling, Split) and tiling.whole is not None and len(pictures) > 1:
        whole = _squashed(_scaled(image.convert("RGB"), tiling, view.resample), tiling.size)
        mean, std = (np.asarray(values, np.float32).reshape(3, 1, 1) for values in (view.mean, view.std))
        found[0] = (whole - mean) / std
    return found


def prepare_patches(image: Image.Image, view: TowerView, shape: NaFlex) -> NDArray[np.float32]:
    """The image as a NaFlex tower sees it: float32 `[3, patch, patches * patch]`, row by row one patch beside the
    other, and zeros where it has fewer than `shape.patches`. ValueError when `view.resample` is not a filter."""
    (height, width), (rows, columns) = shape.best(image.height, image.width), shape.grid(image.height, image.width)
    scaled = image.convert("RGB").resize((width, height), filter_of(view.resample))
    pixels = normalised(scaled, view).reshape(3, rows, shape.patch, columns, shape.patch)
    found = np.zeros((3, shape.patch, shape.patches * shape.patch), np.float32)
    found[..., : rows * columns * shape.patch] = pixels.transpose(0, 2, 1, 3, 4).reshape(3, shape.patch, -1)
    return found


def prepare_all(image: Image.Image, spec: ImageSpec) -> dict[str, NDArray[np.float32]]:
    """The image as every tower of a model sees it: float32 `[3, size, size]` by the tower's name, or, where the model
    sees images in tiles, `[tiles, 3, size, size]`, or, in their own shape, `[3, patch, patches * patch]`."""
    if isinstance(tiling := spec.tiling, NaFlex):
        return {view.name: prepare_patches(image, view, tiling) for view in spec.towers}
    if tiling is None:
        return {view.name: prepare(image, view) for view in spec.towers}
    return {view.name: prepare_tiles(image, view, tiling) for view in spec.towers}
