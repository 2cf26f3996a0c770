"""An image becomes what a vision tower eats: a square of the tower's size, normalised.

Five geometries, each equal to the last bit to the system it comes from:

- `squash` distorts to the square: `SiglipImageProcessorPil` of transformers.
- `crop` scales the short side to the tower's size and cuts the centre: `CLIPImageProcessorPil`.
- `pad` centres the image on a square of the mean colour, then scales: LLaVA's `expand2square` before the processor.
- `centre` is `crop` as torchvision does it (`Resize` and `CenterCrop`): Bunny's EVA towers, Prismatic's "resize-crop".
- `letterbox` pads both sides alike, then `centre`: Prismatic's `LetterboxPad` before timm's transform.

`crop`, `pad`, `centre` and `letterbox` may scale to `TowerView.short` before they cut.

Only Pillow and numpy are needed; Pillow is imported by whoever opened the image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from leveret.records import TowerView

if TYPE_CHECKING:
    from PIL import Image

LARGEST_CANVAS = 64_000_000
"""Pixels of the largest intermediate picture that is built as the original builds it.

The originals make a square as wide as the long side (`pad`), or scale a ribbon until its short side fits (`crop`): one
photo of 50,000 x 1 pixels would then ask for gigabytes. Beyond this bound the same picture is made from the part that
is seen, or from a copy reduced first; it then agrees to rounding, no longer to the last bit.
"""

_KINDS = ("squash", "pad", "crop", "centre", "letterbox")
_FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # the numbers of PIL.Image.Resampling


def prepare(image: Image.Image, view: TowerView) -> NDArray[np.float32]:
    """The image as one tower sees it: float32 `[3, view.size, view.size]`, `(value / 255 - mean) / std`.

    Each value is between `(0 - mean) / std` and `(1 - mean) / std`. An image that already has the tower's size is not
    resized, whatever `view.resize` says.
    """
    return normalised(fit(image, view), view)


def normalised(image: Image.Image, view: TowerView) -> NDArray[np.float32]:
    """An RGB image as numbers, whatever its size: float32 `[3, height, width]`, `(value / 255 - mean) / std`."""
    mean, std = _moments(view.mean, view.std)
    # Channel-first in memory while casting: the three passes below then run over contiguous rows. For all 256 values,
    # x / 255 in float32 equals transformers' float32(float64(x) * (1 / 255)); a test holds it.
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
    pixels /= np.float32(255)
    pixels -= mean
    pixels /= std
    return pixels


def fit(image: Image.Image, view: TowerView) -> Image.Image:
    """The image squashed, padded or cropped to `view.size` square: RGB, still in 0..255.

    Raises ValueError when `view.resize` or `view.resample` is none of those that `TowerView` names, or when
    `view.short` is below `view.size`.
    """
    if image.mode != "RGB":
        image = image.convert("RGB")
    size, short, (width, height) = view.size, view.short or view.size, image.size
    resample = filter_of(view.resample)
    if view.resize not in _KINDS:
        raise ValueError(f"resize of {view.name}: {view.resize!r} is none of {', '.join(_KINDS)}")
    if short < size:
        raise ValueError(f"short of {view.name}: {short} is below its size, {size}: the centre would be too small")
    if width == size and height == size and (short == size or view.resize == "squash"):
        return image
    if view.resize == "squash":
        return image.resize((size, size), resample)
    if view.resize in ("pad", "letterbox"):
        fill = (int(255 * view.mean[0]), int(255 * view.mean[1]), int(255 * view.mean[2]))
        square = _on_square if view.resize == "pad" else _letterboxed
        image = square(image, fill, short, resample)
    if view.resize in ("crop", "pad"):
        return _cut(image, size, short, resample, _half_down)
    return _cut(image, size, short, resample, _half_even)


def filter_of(resample: str) -> int:
    """Pillow's number of a filter. ValueError when it is none of those that `TowerView` names."""
    if resample not in _FILTERS:
        raise ValueError(f"resample: {resample!r} is none of {', '.join(_FILTERS)}")
    return _FILTERS[resample]


def _half_down(spare: int) -> int:
    """transformers: an odd remainder goes to the right or below."""
    return spare // 2


def _half_even(spare: int) -> int:
    """torchvision: an odd remainder's half pixel goes to the even side."""
    return round(spare / 2)


def _on_square(image: Image.Image, fill: tuple[int, int, int], size: int, resample: int) -> Image.Image:
    """LLaVA's `expand2square`: centred on a square of `fill`; an odd remainder goes below or to the right."""
    from PIL import Image as pil

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    if side * side > LARGEST_CANVAS:  # a ribbon: shrink first, to a square that still has 4 pixels for each one seen
        shrunk = max(4 * size, 1)
        image = image.resize((max(1, width * shrunk // side), max(1, height * shrunk // side)), resample)
        (width, height), side = image.size, shrunk
    square = pil.new("RGB", (side, side), fill)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _letterboxed(image: Image.Image, fill: tuple[int, int, int], size: int, resample: int) -> Image.Image:
    """Prismatic's `LetterboxPad`: the same on both sides, half a pixel dropped, so it may end one pixel off square."""
    from PIL import Image as pil

    width, height = image.size
    side = max(width, height)
    if side * side > LARGEST_CANVAS:
        return _on_square(image, fill, size, resample)
    across, down = (side - width) // 2, (side - height) // 2
    canvas = pil.new("RGB", (width + 2 * across, height + 2 * down), fill)
    canvas.paste(image, (across, down))
    return canvas


def _cut(image: Image.Image, size: int, short: int, resample: int, half: Callable[[int], int]) -> Image.Image:
    """Short side to `short` (the long one rounded down), then the middle; `half` says where an odd remainder goes."""
    width, height = image.size
    least = min(width, height)
    new_width, new_height = (short if side == least else int(short * side / least) for side in (width, height))
    left, top = half(new_width - size), half(new_height - size)
    if new_width * new_height <= LARGEST_CANVAS:
        scaled = image if (new_width, new_height) == image.size else image.resize((new_width, new_height), resample)
        return scaled if scaled.size == (size, size) else scaled.crop((left, top, left + size, top + size))
    across, down = width / new_width, height / new_height  # source pixels per pixel seen
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return image.resize((size, size), resample, box=box)


@lru_cache(maxsize=64)
def _moments(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and std as float32 `[3, 1, 1]`, or as scalars where the channels agree (that is twice as fast)."""

    def shaped(values: tuple[float, ...]) -> NDArray[np.float32]:
        same = len(set(values)) == 1
        array = np.asarray(values[0] if same else values, dtype=np.float32)
        return array if same else array.reshape(3, 1, 1)

    return shaped(mean), shaped(std)
