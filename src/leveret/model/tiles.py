"""Tokens of an image's tiles become the tokens of the image: LLaVA-1.6's "anyres", behind the connector.

Images at their own shape (NaFlex) pass here too: of their one picture the tokens that are no padding.

[N, m, D]   tokens of all pictures that the towers saw: of every image the whole, then its tiles
    |  by the layout of each image (records.Tiling): rows over the whole grid, borders left out, newlines; of large
    |  images scaled down before the newlines, where there is a limit (LLaVA-OneVision)
    v
[K, D]      tokens of all images in reading order, as many for each as `ImageSpec.count` says
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leveret.model.connectors import CONNECTORS, find_connector
from leveret.model.recipe import TilesRecipe, VisionRecipe
from leveret.model.tower_facts import patch
from leveret.model.towers import Tower
from leveret.records import Cutting, NaFlex, Split, Tiling
from leveret.runs import RecipeError

GRIDLESS = ("resampler", "resampler_paper", "qformer", "mof_mlp", "minigpt", "vanilla")
"""Connectors whose tokens stand nowhere in the image, or for a stretch of a row of it."""


class Tiles(nn.Module):
    """Puts tiles together.

    newline  [D], learned: what stands at the end of every row of tokens. None but for merge "unpad".
    """

    def __init__(self, tiling: Cutting, width: int) -> None:
        super().__init__()
        self.tiling = tiling
        # drawn as LLaVA draws it (llava/model/llava_arch.py, initialize_vision_modules)
        rows = isinstance(tiling, Tiling) and tiling.merge == "unpad"
        self.newline = nn.Parameter(torch.randn(width) / width**0.5) if rows else None
        self._layouts: dict[tuple[int, int], Tensor] = {}

    def forward(self, tokens: Tensor, tile_image: Tensor, image_sizes: Tensor | None) -> Tensor:
        """tokens [N, m, D] of N tiles, tile_image [N], image_sizes [images, 2] as in `records.Batch` -> [K, D].

        ValueError when the sizes are not given, or are of images with other tiles than these.
        """
        if image_sizes is None:
            raise ValueError("this model sees images in tiles, and the batch does not say how large the images are")
        sizes = [(int(height), int(width)) for height, width in image_sizes.tolist()]
        counts = [self.tiling.tiles(*size) for size in sizes]
        if tile_image.tolist() != [image for image, count in enumerate(counts) for _ in range(count)]:
            given = torch.bincount(tile_image, minlength=len(sizes)).tolist()
            raise ValueError(f"images of (height, width) {sizes} have {counts} tiles, but {given} are given")
        places, first = [], 0
        for size, count in zip(sizes, counts, strict=True):
            layout = self._layout(size)
            places.append(torch.where(layout < 0, layout, layout + first))
            first += count * tokens.shape[1]
        at = torch.cat(places).to(tokens.device)
        laid = tokens.flatten(0, 1)[at.clamp(min=0)]
        if self.newline is None:
            return laid
        laid = torch.where((at < 0).unsqueeze(-1), self.newline.to(laid.dtype), laid)
        assert isinstance(self.tiling, Tiling), "only they have newlines"
        if not any(self.tiling.shrunk(*size) for size in sizes):
            return laid
        images = laid.split([len(layout) for layout in places])
        return torch.cat([self._shrunk(image, *size) for image, size in zip(images, sizes, strict=True)])

    def _shrunk(self, image: Tensor, height: int, width: int) -> Tensor:
        """The laid tokens of an image of (height, width) pixels, those of its tiles scaled down where they are more
        than the limit allows: LLaVA-OneVision's way, bilinear and without antialias."""
        assert isinstance(self.tiling, Tiling) and self.newline is not None
        to = self.tiling.shrunk(height, width)
        if to is None:
            return image
        whole, (rows, columns) = self.tiling.cells**2, self.tiling.extent(height, width)
        grid = image[whole:].unflatten(0, (rows, columns + 1))[:, :-1].permute(2, 0, 1)  # [D, rows, columns]
        small = F.interpolate(grid.unsqueeze(0), to, mode="bilinear")[0].permute(1, 2, 0)
        lines = torch.cat([small, self.newline.to(small.dtype).expand(to[0], 1, -1)], dim=1)
        return torch.cat([image[:whole], lines.flatten(0, 1)])

    def _layout(self, size: tuple[int, int]) -> Tensor:
        """`Tiling.layout` as a tensor, kept: a data set has few sizes."""
        if size not in self._layouts:
            if len(self._layouts) >= 1024:
                self._layouts.clear()
            self._layouts[size] = torch.tensor(self.tiling.layout(*size), device="cpu")
        return self._layouts[size]


def tiling_of(vision: VisionRecipe, eyes: Sequence[Tower], kind: str, tokens: int) -> Cutting | None:
    """How a recipe asks images to be cut; None where it asks for squares.

    kind, tokens  the connector's, and how many come out of it for one tile.
    RecipeError when towers or connector do not leave a square grid of tokens, which is what `tiles` puts together, or
    the tiles are none of the towers'.
    """
    if patches := eyes[0].facts.patches:
        return NaFlex(patch(eyes[0].facts), patches)
    if vision.tiles is None and vision.split is None:
        return None
    where = "model.vision.tiles" if vision.split is None else "model.vision.split"
    sizes = sorted({eye.view.size for eye in eyes})
    if len(sizes) > 1:
        said = " and ".join(map(str, sizes))
        raise RecipeError(f"{where}: towers of {said} pixels cannot see the same tiles; set `size` of one")
    if vision.split is not None:
        try:
            return Split(sizes[0], tokens, **vision.split.model_dump())
        except ValueError as fault:
            raise RecipeError(f"{where}: {fault}") from None
    assert vision.tiles is not None
    if len(eyes) > 1 and vision.fusion == "interleave":
        raise RecipeError(f"{where}: interleaved towers leave no grid of tokens; choose fusion: channel")
    if odd := next((eye for eye in eyes if eye.facts.tokens != "patch"), None):
        raise RecipeError(
            f"{where}: {odd.facts.source} gives {odd.facts.tokens}, which is no grid of patches; choose tokens: patch"
        )
    cells = round(tokens**0.5)
    if kind in GRIDLESS or cells**2 != tokens:
        raise RecipeError(
            f"{where}: the connector {kind} gives {tokens} tokens that are no square grid, so tiles cannot be put "
            "together; choose mlp2x_gelu"
        )
    return tiling(vision.tiles, sizes[0], cells)


def check_shapes(vision: VisionRecipe, eyes: Sequence[Tower], kind: str) -> None:
    """RecipeError when images are to keep their shape and anything else is asked for besides, or the connector `kind`
    needs a fixed number of tokens."""
    where = "model.vision.patches" if len(eyes) == 1 else "model.vision.towers"
    if vision.tiles is not None or vision.split is not None:
        given = "tiles" if vision.split is None else "split"
        raise RecipeError(f"{where}: given beside `{given}`; an image keeps its shape, or is cut into tiles")
    if len(eyes) > 1:
        raise RecipeError(f"{where}: `patches` is for a tower alone; others cannot see an image in the same patches")
    if not find_connector(kind).each:
        able = ", ".join(name for name, row in CONNECTORS.items() if row.each)
        raise RecipeError(
            f"model.connector.kind: {kind} needs a fixed grid or number of tokens, and with `patches` every image has "
            f"its own; choose one of {able}"
        )


def tiling(recipe: TilesRecipe, size: int, cells: int) -> Tiling:
    """The recipe's grids in pixels. size: of a tile. cells: tokens along its side."""
    grids = tuple((rows * size, columns * size) for rows, columns in recipe.grids)
    return Tiling(size, cells, grids, recipe.merge, recipe.limit)
