"""SigLIP2's NaFlex: in which patches an image is seen at its own shape. Arithmetic alone; nothing heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NaFlex:
    """SigLIP2's NaFlex: an image keeps its shape, and is cut into as many patches as are allowed.

    patch    side of a patch, in pixels.
    patches  of an image, at most.

    Every patch is a token. Sizes are found as transformers' `get_image_size_for_max_num_patches` finds them, in the
    same floats.
    """

    patch: int
    patches: int

    def __post_init__(self) -> None:
        if self.patch < 1 or self.patches < 1:
            raise ValueError(f"patch is {self.patch} and patches {self.patches}; both must be at least 1")

    @property
    def most(self) -> int:
        """Tokens of an image at most."""
        return self.patches

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches of an image: its shape to a patch, as large as `patches` allows. ValueError where
        it has no pixels, or is so long that one row of patches is too many."""
        if height < 1 or width < 1:
            raise ValueError(f"an image of {height} x {width} pixels has no patches")

        def cells(scale: float, side: int) -> int:
            return max(1, math.ceil(side * scale / self.patch))

        low, high = 1e-5 / 10, 100.0
        while high - low >= 1e-5:
            scale = (low + high) / 2
            fits = cells(scale, height) * cells(scale, width) <= self.patches
            low, high = (scale, high) if fits else (low, scale)
        rows, columns = cells(low, height), cells(low, width)
        if rows * columns > self.patches:
            raise ValueError(f"an image of {height} x {width} pixels does not fit {self.patches} patches")
        return rows, columns

    def best(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that an image is scaled to."""
        rows, columns = self.grid(height, width)
        return rows * self.patch, columns * self.patch

    def said(self, height: int, width: int) -> str:
        """What the tower sees of an image, in words."""
        rows, columns = self.grid(height, width)
        return f"{rows} x {columns} patches of {self.patch} x {self.patch}"

    def tiles(self, height: int, width: int) -> int:
        """How many pictures the tower sees of an image: one."""
        return 1

    def count(self, height: int, width: int) -> int:
        """Tokens of an image of (height, width) pixels."""
        rows, columns = self.grid(height, width)
        return rows * columns

    def layout(self, height: int, width: int) -> list[int]:
        """Which of the tower's tokens stands at each image position: the first ones, for the rest is padding."""
        return list(range(self.count(height, width)))
