"""An image becomes tiles: LLaVA-1.6's "anyres", the pixels of what `records.Tiling` describes.

    image -> the whole, squashed to one tile
          -> scaled to fit the best grid, centred on black -> cut into tiles, row by row

Equal to the last bit to LLaVA's `process_anyres_image` and to `LlavaNextImageProcessorPil` of transformers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from leveret.inputs.resize import filter_of, prepare
from leveret.records import ImageSpec, Tiling, TowerView

if TYPE_CHECKING:
    from PIL import Image


def cut(image: Image.Image, tiling: Tiling, resample: str = "bicubic") -> list[Image.Image]:
    """The whole image and its tiles, RGB, each `tiling.size` square; as many as `tiling.tiles` says."""
    from PIL import Image as pil

    if image.mode != "RGB":
        image = image.convert("RGB")
    size, filter = tiling.size, filter_of(resample)
    (width, height), (rows, columns) = image.size, tiling.best(image.height, image.width)
    across, down = columns / width, rows / height
    if across < down:
        to = (columns, min(math.ceil(height * across), rows))
    else:
        to = (min(math.ceil(width * down), columns), rows)
    canvas = pil.new("RGB", (columns, rows))
    canvas.paste(image.resize(to, filter), ((columns - to[0]) // 2, (rows - to[1]) // 2))
    corners = [(left, top) for top in range(0, rows, size) for left in range(0, columns, size)]
    whole = image.resize((size, size), filter)
    return [whole, *(canvas.crop((left, top, left + size, top + size)) for left, top in corners)]


def prepare_tiles(image: Image.Image, view: TowerView, tiling: Tiling) -> NDArray[np.float32]:
    """The image as one tower sees it in tiles: float32 `[1 + tiles, 3, size, size]`, the whole first.

    Raises ValueError when the tower's size is not the tiles', or `view.resample` is not a filter.
    """
    if view.size != tiling.size:
        raise ValueError(f"tower {view.name} sees {view.size} pixels, but tiles have {tiling.size}: they must agree")
    ready = replace(view, resize="squash", short=0)  # every tile has the tower's size: nothing is resized again
    return np.stack([prepare(tile, ready) for tile in cut(image, tiling, view.resample)])


def prepare_all(image: Image.Image, spec: ImageSpec) -> dict[str, NDArray[np.float32]]:
    """The image as every tower of a model sees it: float32 `[3, size, size]` by the tower's name, or, where the model
    sees images in tiles, `[1 + tiles, 3, size, size]`."""
    if spec.tiling is None:
        return {view.name: prepare(image, view) for view in spec.towers}
    return {view.name: prepare_tiles(image, view, spec.tiling) for view in spec.towers}
