"""Rows become batches: how they are laid side by side (`collate`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from leveret.inputs.chat import Encoded
from leveret.records import IGNORE, Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Item:
    """One sample, ready to be laid into a batch.

    pixels    one dict per image, in reading order: tower name -> float32 [3, S, S], or [tiles, 3, S, S] where the image
              is seen in tiles. Empty for text-only samples.
    features  [images, tokens, width] tower outputs, instead of pixels; one picture per image.
    sizes     (height, width) in pixels of every image, in reading order, for models that see images in tiles.
    """

    encoded: Encoded
    id: str = ""
    pixels: Sequence[Mapping[str, NDArray[np.float32]]] = field(default_factory=tuple)
    features: Tensor | None = None
    sizes: Sequence[tuple[int, int]] = ()


def collate(items: Sequence[Item], pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """One Batch of B = len(items) rows, padded to the longest: on the right to train, on the left to generate.

    Raises:
        ValueError: no items; some samples bring pixels and others features; images were not prepared for the same
            towers; sizes of some images and not of others; `side` is neither right nor left.
    """
    import torch

    if not items:
        raise ValueError("a batch needs at least one item")
    if side not in ("right", "left"):
        raise ValueError(f"side is {side!r}; allowed: right, left")
    rows, width = len(items), max(len(item.encoded.input_ids) for item in items)
    ids = np.full((rows, width), pad_id, np.int64)
    labels = np.full((rows, width), IGNORE, np.int64)
    attention, images = np.zeros((rows, width), np.bool_), np.zeros((rows, width), np.bool_)
    positions, segments = np.zeros((rows, width), np.int64), np.full((rows, width), -1, np.int64)
    steps = np.arange(width)
    for row, item in enumerate(items):
        length = len(item.encoded.input_ids)
        real = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, real] = item.encoded.input_ids
        labels[row, real] = item.encoded.labels
        images[row, real] = item.encoded.image_mask
        attention[row, real] = True
        positions[row, real] = steps[:length]
        segments[row, real] = 0
    pixels, features, tiles = _images(items)
    sizes = [size for item in items for size in item.sizes]
    if sizes and len(sizes) != len(tiles):
        raise ValueError(f"{len(tiles)} images, but sizes of {len(sizes)}")
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        attention_mask=torch.from_numpy(attention),
        position_ids=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        image_mask=torch.from_numpy(images),
        pixels=pixels,
        tile_image=torch.repeat_interleave(torch.arange(len(tiles)), torch.tensor(tiles, dtype=torch.int64)),
        features=features,
        ids=tuple(item.id for item in items),
        image_sizes=torch.tensor(sizes, dtype=torch.int64) if sizes else None,
    )


def _images(items: Sequence[Item]) -> tuple[dict[str, Tensor], Tensor | None, list[int]]:
    """All images of the rows, in reading order: pixels per tower, or joined features; and how many tiles each has."""
    import torch

    seen = [image for item in items for image in item.pixels]
    given: list[Any] = [item.features for item in items if item.features is not None and len(item.features)]
    if seen and given:
        raise ValueError("a batch holds pixels or features, not both")
    if given:
        features = torch.cat(given)
        return {}, features, [1] * len(features)
    towers = list(seen[0]) if seen else []
    if odd := next((image for image in seen if set(image) != set(towers)), None):
        raise ValueError(f"images prepared for different towers in one batch: {towers} and {list(odd)}")
    tiled = {name: [image[name].reshape(-1, *image[name].shape[-3:]) for image in seen] for name in towers}
    counts = [[len(image) for image in images] for images in tiled.values()]
    if any(count != counts[0] for count in counts):
        raise ValueError(
            f"towers see different numbers of tiles of one image: {dict(zip(towers, counts, strict=True))}"
        )
    stacked = {name: torch.from_numpy(np.concatenate(images)) for name, images in tiled.items()}
    return stacked, None, counts[0] if counts else []

