"""What passes between stations: a few frozen dataclasses and nothing else.

    pool -> Sample -> inputs -> Batch -> model, train, generate -> Prediction -> evaluate

`ImageSpec` travels beside them: made by a model, read by inputs, saved in the model's config.json.
Nothing heavy is imported here; tensors are named in annotations only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from leveret.naflex import NaFlex

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "IGNORE", "IMAGE_MARK", "Batch", "Cutting", "ImageRef", "ImageSpec", "NaFlex", "Prediction", "Resize", "Role",
    "Sample", "Split", "Tiling", "TowerView", "Turn",
]  # fmt: skip

IMAGE_MARK = "<image>"
"""Marks, in a turn's text, where an image stands. As many marks as images, or the sample is refused."""

IGNORE = -100
"""Label of a position that is not supervised (the value torch's cross entropy skips)."""

Role = Literal["system", "user", "assistant"]
Resize = Literal["squash", "pad", "crop", "centre", "letterbox"]


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where an image's bytes are; never a decoded image.

    kind    "file": the whole file at `path`. "tar": `length` bytes at `offset` of the tar at `path`.
            "parquet": row `offset` (over all row groups) of the column `member` of the file at `path`; where the cell
            holds a list, its entry `place`. "arrow": the same of an Arrow stream.
            "data": `path` is a data URI (`data:image/png;base64,...`).
    member  the column; of a tar the member's name, for messages.
    """

    path: str
    kind: Literal["file", "tar", "parquet", "arrow", "data"] = "file"
    offset: int = 0
    length: int = -1
    member: str = ""
    place: int = -1

    @property
    def inside(self) -> str:
        """Where it lies in the file at `path`; "" where it is the file. `images.Root` reads it back."""
        if self.kind == "tar":
            return f"{self.offset}+{self.length}/{self.member}"
        if self.kind in ("parquet", "arrow"):
            return f"{self.offset}/{self.member}{f'[{self.place}]' if self.place >= 0 else ''}"
        return ""

    def __str__(self) -> str:
        if self.kind == "data":
            return f"{self.path[:24]}... (data URI)"
        return f"{self.path}#{self.inside}" if self.inside else self.path


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation. `text` may hold IMAGE_MARK."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair, conversation or text-only dialogue.

    A caption pair is a sample whose user turn holds the image mark (and perhaps a prompt) and whose
    assistant turn is the caption.
    """

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def fault(self) -> str | None:
        """The reason this sample must be refused, or None. Looks at its structure, not at image bytes."""
        if not self.turns:
            return "no turns"
        turns = self.turns[1:] if self.turns[0].role == "system" else self.turns
        expected: tuple[Role, Role] = ("user", "assistant")
        for position, turn in enumerate(turns):
            if turn.role != expected[position % 2]:
                return f"roles do not alternate: turn {position} is {turn.role!r}, expected {expected[position % 2]!r}"
            if not turn.text.replace(IMAGE_MARK, "").strip() and turn.role == "assistant":
                return f"empty turn: the assistant's turn {position} has no text"
        if not any(turn.role == "assistant" for turn in turns):
            return "no assistant turn: there is nothing to learn or compare"
        marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
        if marks != len(self.images):
            return f"image marks do not match: {marks} {IMAGE_MARK} in the user turns, {len(self.images)} images"
        if any(IMAGE_MARK in turn.text for turn in turns if turn.role == "assistant"):
            return f"an assistant turn holds {IMAGE_MARK}"
        return None

    @property
    def caption(self) -> str:
        """The assistant's words, joined by newlines: what image-text scores compare with the image."""
        return "\n".join(turn.text.strip() for turn in self.turns if turn.role == "assistant")


@dataclass(frozen=True, slots=True)
class TowerView:
    """How one vision tower wants to see an image.

    size     side of the square input, in pixels.
    mean,std per channel, of values in 0..1.
    resize   "squash" distorts to the square; "pad" centres on a square of the mean colour (LLaVA's rule,
             int(255 * mean)); "crop" scales the short side and cuts the centre, as transformers does; "centre" is the
             same as torchvision does it (half a pixel goes to the even side); "letterbox" is Prismatic's: pads the two
             sides alike with the mean colour, half pixels dropped, then "centre".
    short    length the short side is scaled to before the centre is cut, where that is not `size` (timm's crop_pct,
             DINOv2's 256 for 224); 0 for `size`. "squash" has no use for it.
    """

    name: str
    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Resize = "squash"
    resample: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    short: int = 0


@dataclass(frozen=True, slots=True)
class Tiling:
    """LLaVA-1.6's "anyres": an image is seen whole, and again in tiles of the tower's size.

    size    side of a tile, in pixels; the towers' own.
    cells   tokens along one side of a tile, after the connector.
    grids   (height, width) in pixels of every arrangement of tiles allowed, multiples of `size`. The order decides
            ties. transformers writes pinpoints this way; LLaVA's own are (width, height): `from_llava` turns them.
    merge   "unpad": tokens of the tiles row by row over the whole image, those of the black borders left out, a newline
            token after every row. "spatial": row by row, borders in, no newlines. "flat": tile after tile.
    limit   LLaVA-OneVision's "anyres_max_N": where the tiles have more tokens than N tiles, by over a tenth in either
            direction, their grid is scaled down to as many, bilinearly (`shrunk`). 0 for never. Only with "unpad".
    """

    size: int
    cells: int
    grids: tuple[tuple[int, int], ...]
    merge: Literal["unpad", "spatial", "flat"] = "unpad"
    limit: int = 0

    def __post_init__(self) -> None:
        odd = [grid for grid in self.grids if min(grid) < self.size or grid[0] % self.size or grid[1] % self.size]
        if not self.grids or odd:
            raise ValueError(f"grids {odd or self.grids}: give at least one, all multiples of the tile's {self.size}")
        if self.merge not in ("unpad", "spatial", "flat"):
            raise ValueError(f"merge is {self.merge!r}; allowed: unpad, spatial, flat")
        if self.limit < 0 or (self.limit and self.merge != "unpad"):
            raise ValueError(f"limit is {self.limit} with merge {self.merge}; allowed: 0, or with unpad 1 and more")

    @classmethod
    def from_llava(
        cls, size: int, cells: int, pinpoints: Sequence[Sequence[int]], merge: str = "spatial_unpad", limit: int = 0
    ) -> Tiling:
        """From LLaVA's config: `image_grid_pinpoints`, (width, height) pairs, `mm_patch_merge_type`, and the N of an
        `image_aspect_ratio` anyres_max_N."""
        kinds: dict[str, Any] = {"spatial_unpad": "unpad", "spatial": "spatial", "flat": "flat"}
        if merge not in kinds:
            raise ValueError(f"mm_patch_merge_type is {merge!r}; allowed: {', '.join(kinds)}")
        return cls(size, cells, tuple((height, width) for width, height in pinpoints), kinds[merge], limit)

    @property
    def most(self) -> int:
        """Tokens of an image at most."""
        if not self.limit:
            return max(self.count(*grid) for grid in self.grids)
        # borders left out may spare a grid the scaling down: every window that a grid can have is looked at
        windows = set()
        for height, width in self.grids:
            rows, columns = height // self.size * self.cells, width // self.size * self.cells
            windows |= {(row, columns) for row in range(rows, -1, -2)} | {(rows, one) for one in range(columns, -1, -2)}
        return self.cells**2 + max(
            rows * (columns + 1) for rows, columns in (self._held(*window) or window for window in windows)
        )

    def best(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the grid for an image: most pixels of it kept, then least left over, then the first.

        LLaVA's `select_best_resolution`.
        """
        if height < 1 or width < 1:
            raise ValueError(f"an image of {height} x {width} pixels has no tiles")

        def worth(grid: tuple[int, int]) -> tuple[int, int]:
            scale = min(grid[1] / width, grid[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - grid[0] * grid[1]

        return max(self.grids, key=worth)  # the first of equals

    def said(self, height: int, width: int) -> str:
        """What the tower sees of an image, in words."""
        return f"{self.tiles(height, width)} tiles of {self.size} x {self.size}"

    def tiles(self, height: int, width: int) -> int:
        """How many pictures the tower sees of an image: the whole, then its tiles."""
        rows, columns = self.best(height, width)
        return 1 + (rows // self.size) * (columns // self.size)

    def _window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of the tokens that are not border, in the grid of all tiles (`unpad_image`)."""
        rows, columns = (side // self.size * self.cells for side in self.best(height, width))
        if self.merge != "unpad":
            return 0, rows, 0, columns
        if width / height > columns / rows:
            border = (rows - int(round(height * (columns / width), 7))) // 2
            return border, rows - border, 0, columns
        border = (columns - int(round(width * (rows / height), 7))) // 2
        return 0, rows, border, columns - border

    def _held(self, rows: int, columns: int) -> tuple[int, int] | None:
        """(rows, columns) that so many tokens of tiles are scaled down to; None where they stay."""
        times = math.sqrt(rows * columns / (self.limit * self.cells**2)) if self.limit else 0.0
        return (max(1, int(rows // times)), max(1, int(columns // times))) if times > 1.1 else None

    def extent(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of an image's tokens over all its tiles, without those of borders that are left out."""
        top, bottom, left, right = self._window(height, width)
        return bottom - top, right - left

    def shrunk(self, height: int, width: int) -> tuple[int, int] | None:
        """(rows, columns) that these are scaled down to before newlines are put behind them; None where they stay."""
        return self._held(*self.extent(height, width))

    def count(self, height: int, width: int) -> int:
        """Tokens of an image of (height, width) pixels, newlines included: the length of its `layout`, unless that is
        `shrunk`."""
        rows, columns = self.shrunk(height, width) or self.extent(height, width)
        return self.cells**2 + rows * (columns + (self.merge == "unpad"))

    def layout(self, height: int, width: int) -> list[int]:
        """Which token stands at each position: its place among tiles x cells x cells tower tokens, -1 for a newline.

        The whole image (tile 0) comes first, then its tiles; these as they are before they are `shrunk`.
        """
        cells, across = self.cells, self.best(height, width)[1] // self.size
        places = list(range(cells * cells))
        if self.merge == "flat":
            return list(range(self.tiles(height, width) * cells * cells))
        top, bottom, left, right = self._window(height, width)
        for row in range(top, bottom):
            for column in range(left, right):
                tile = 1 + (row // cells) * across + column // cells
                places.append((tile * cells + row % cells) * cells + column % cells)
            places += [-1] if self.merge == "unpad" else []
        return places


@dataclass(frozen=True, slots=True)
class Split:
    """nanoVLM's tiles: an image keeps its shape, is scaled until `size` divides both sides, and cut there.

    size    side of a tile, in pixels; the towers' own.
    tokens  of a tile, after the connector.
    side    longest side of the scaled image, a multiple of `size`; smaller images come to it where `grow` says so.
    whole   token before the whole image, squashed to one tile, which comes first; "" for no token, None where the whole
            is not shown. Of an image of one tile this is the whole.
    tile    token before every tile, in which {row} and {column} count from 1; "" for none.

    From data/custom_transforms.py (DynamicResize, GlobalAndSplitImages) and data/processors.py (get_image_string).
    """

    size: int
    tokens: int
    side: int
    grow: bool = False
    whole: str | None = ""
    tile: str = ""

    def __post_init__(self) -> None:
        if self.side < self.size or self.side % self.size:
            raise ValueError(f"side is {self.side}; it must be a multiple of the tile's {self.size}")
        try:
            self.tile.format(row=1, column=1)
        except (IndexError, KeyError, ValueError):
            raise ValueError(f"tile is {self.tile!r}; only {{row}} and {{column}} may stand in braces") from None

    @property
    def most(self) -> int:
        """Tokens of the largest image."""
        return self.count(self.side, self.side)

    def best(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is scaled to. ValueError where it has no pixels."""
        if height < 1 or width < 1:
            raise ValueError(f"an image of {height} x {width} pixels has no tiles")
        size, long, short = self.size, max(height, width), min(height, width)
        # in floats, as the original: a side may come out one tile longer than exact fractions make it
        longest = self.side if self.grow else min(self.side, math.ceil(long / size) * size)
        shortest = max(math.ceil(short * (longest / long) / size) * size, size)
        return (shortest, longest) if width >= height else (longest, shortest)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.best(height, width)
        return rows // self.size, columns // self.size

    def said(self, height: int, width: int) -> str:
        """What the tower sees of an image, in words."""
        return f"{self.tiles(height, width)} tiles of {self.size} x {self.size}"

    def tiles(self, height: int, width: int) -> int:
        """How many pictures the tower sees of an image."""
        rows, columns = self._grid(height, width)
        return rows * columns + (self.whole is not None and rows * columns > 1)

    def count(self, height: int, width: int) -> int:
        """Image tokens of an image of (height, width) pixels; the tokens before them do not count."""
        return self.tiles(height, width) * self.tokens

    def layout(self, height: int, width: int) -> list[int]:
        """Which of the tower's tokens stands at each image position: all of them, as they come."""
        return list(range(self.count(height, width)))

    def runs(self, height: int, width: int) -> list[tuple[str, int]]:
        """(the token before, image tokens) of every picture, in order."""
        rows, columns = self._grid(height, width)
        tiles = [
            self.tile.format(row=row, column=column) for row in range(1, rows + 1) for column in range(1, columns + 1)
        ]
        if self.whole is not None:
            tiles = [self.whole, *tiles] if len(tiles) > 1 else [self.whole]
        return [(mark, self.tokens) for mark in tiles]


Cutting = Tiling | Split | NaFlex
"""How images are cut, where they are not one square."""


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Everything inputs must know about a model's eyes; pure data, saved in config.json.

    towers   one view per tower, in fusion order.
    tokens   positions one image fills in the language model (after fusion and connector); of one tile, where it is
             seen in tiles; at most, where it keeps its shape.
    tiling   how images are cut into tiles, or into patches where they keep their shape; None for one square an image.
    """

    towers: tuple[TowerView, ...]
    tokens: int
    tiling: Cutting | None = None

    def count(self, height: int, width: int) -> int:
        """Positions that an image of (height, width) pixels fills; with tiles they depend on its size."""
        return self.tokens if self.tiling is None else self.tiling.count(height, width)

    def runs(self, height: int, width: int) -> list[tuple[str, int]]:
        """What stands for an image of (height, width) pixels: (text of one token, or "", and the image positions that
        follow it), in order; together `count` positions."""
        if isinstance(self.tiling, Split):
            return self.tiling.runs(height, width)
        return [("", self.count(height, width))]

    def shape(self, view: TowerView) -> tuple[int, int, int]:
        """[3, H, W] of one picture as a tower is given it: a square, or of NaFlex its patches side by side."""
        if isinstance(self.tiling, NaFlex):
            return 3, self.tiling.patch, self.tiling.patch * self.tiling.patches
        return 3, view.size, view.size

    def to_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ImageSpec:
        views = tuple(
            TowerView(**{**view, "mean": tuple(view["mean"]), "std": tuple(view["std"])}) for view in data["towers"]
        )
        tiling = data.get("tiling")
        if tiling is not None and "side" in tiling:
            tiling = Split(**tiling)
        elif tiling is not None and "patches" in tiling:
            tiling = NaFlex(**tiling)
        elif tiling is not None:
            tiling = Tiling(**{**tiling, "grids": tuple(tuple(grid) for grid in tiling["grids"])})
        return cls(towers=views, tokens=int(data["tokens"]), tiling=tiling)


@dataclass(slots=True)
class Batch:
    """What a model eats. B rows, T positions, N image tiles.

    input_ids      [B, T] int64; image positions hold the tokenizer's image id (any id: they are overwritten).
    labels         [B, T] int64; IGNORE where nothing is supervised. Not shifted: position t is the target of t - 1.
    attention_mask [B, T] bool; False on padding.
    position_ids   [B, T] int64; restart at 0 in every segment.
    segments       [B, T] int64; which sample of a packed row a position belongs to; -1 on padding.
    image_mask     [B, T] bool; True where an image token stands, in reading order.
    pixels         tower name -> [N, 3, H, W] float32. Empty when `features` is given or there are no images.
    tile_image     [N] int64; which image of the batch (in reading order) a tile belongs to.
    features       [N, tokens, width] tower outputs computed earlier (a cache), instead of pixels.
    ids            sample ids, for messages.
    image_sizes    [images, 2] int64; (height, width) in pixels of every image, upright, in reading order. Only models
                   that see images in tiles, or in their own shape, need it.
    bounds         where the samples of one packed row begin, each with the padding behind it, and the row's end; empty
                   where every row is one sample.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    segments: Tensor
    image_mask: Tensor
    pixels: dict[str, Tensor]
    tile_image: Tensor
    features: Tensor | None = None
    ids: tuple[str, ...] = ()
    image_sizes: Tensor | None = None
    bounds: tuple[int, ...] = ()

    def to(self, device: Any) -> Batch:
        """The same batch with every tensor on `device`."""
        from dataclasses import fields, replace

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: item.to(device) for key, item in value.items()}
            return value.to(device) if hasattr(value, "to") else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class Prediction:
    """What generation hands to scoring; one JSON line on disk, readable by LLaVA's scripts.

    choices  probability of each allowed answer, where a task asks for probabilities.
    """

    question_id: str
    text: str
    choices: Mapping[str, float] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
