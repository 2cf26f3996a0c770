"""Where a model's visual tokens lie on the picture: what lays attention, or anything else of theirs, out as a map.

    tower (class tokens, registers, patches)  ->  fusion  ->  connector  ->  tiles  ->  `Canvas`: a grid on the image

A connector keeps every token in its place, joins neighbours (pixel shuffle, pools, strides, groups), or puts learned
queries in their place. A query stands nowhere; it is laid where it looked, by its own attention to the tower's tokens
(mean over the heads and layers that look). Only an unknown connector of a user's own leaves a token without a place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leveret.inputs.extent import WHOLE, Box, inside, seen, tiled
from leveret.model.connectors import MofMlp
from leveret.model.fusion import fuse
from leveret.model.grids import Grouped, Ldp, PixelShuffle, Residual2d, Spp
from leveret.model.looks import looks
from leveret.model.tower_facts import grid as grid_of
from leveret.model.tower_facts import patch as patch_of
from leveret.model.tower_facts import prefix
from leveret.model.towers import Tower
from leveret.model.vlm import VLM
from leveret.records import NaFlex, Split, Tiling


@dataclass(frozen=True, slots=True)
class Places:
    """How tokens lie on a grid.

    grid  (rows, columns) of cells.
    box   where the grid lies on the square that the tower is given.
    mix   [tokens, rows * columns] which share of a token lies in which cell, row by row; a row of zeros is a token
          without a place.
    """

    grid: tuple[int, int]
    box: Box
    mix: Tensor

    @property
    def plain(self) -> bool:
        """Whether token t is cell t."""
        tokens, cells = self.mix.shape
        return tokens == cells and torch.equal(self.mix, torch.eye(cells))


Part = Literal["picture", "whole", "tiles"]


@dataclass(frozen=True, slots=True)
class Canvas:
    """A grid on an image, and the visual tokens that lie in it.

    image       which image of the conversation, from 0.
    part        "picture": all that was seen of it. Where it was seen in tiles: "whole", and "tiles" put together.
    grid        (rows, columns).
    shown       the part of the upright image that the grid covers, in fractions; beyond 0 and 1 is padding.
    placed      False where nothing is known of where the tokens lie: the grid is then one cell over the whole.
    token, cell, share   three rows of equal length: `share` of visual token `token` (counted over all images of the
                conversation, in reading order) lies in `cell`, row by row.
    """

    image: int
    part: Part
    grid: tuple[int, int]
    shown: Box
    placed: bool
    token: Tensor
    cell: Tensor
    share: Tensor

    def lay(self, weights: Tensor) -> Tensor:
        """Weights [.., visual tokens] on the grid: [.., rows * columns]."""
        found = weights.new_zeros(*weights.shape[:-1], self.grid[0] * self.grid[1])
        return found.index_add_(-1, self.cell, weights[..., self.token] * self.share.to(weights))

    def stands(self) -> list[int | None]:
        """The visual token that stands in each cell; None where there is none, or only such as lie in several."""
        found: list[int | None] = [None] * (self.grid[0] * self.grid[1])
        for token, cell, share in zip(self.token.tolist(), self.cell.tolist(), self.share.tolist(), strict=True):
            if self.placed and share > 0.999 and found[cell] is None:
                found[cell] = token
        return found


def tower_places(tower: Tower) -> Places:
    """Where the tokens that a tower gives lie; class tokens and registers lie nowhere."""
    side, leading = grid_of(tower.facts), prefix(tower.facts)
    reach = side * patch_of(tower.facts) / tower.facts.side  # a rest that fills no patch is dropped (SigLIP: 6 of 384)
    first = {"patch": leading, "cls_patch": 0, "drop_first": 1}[tower.facts.tokens]
    mix = torch.zeros(tower.tokens, side * side)
    for token in range(tower.tokens):
        if 0 <= (patch := token + first - leading) < side * side:
            mix[token, patch] = 1.0
    return Places((side, side), (0.0, 0.0, reach, reach), mix)


# --- through the connector --------------------------------------------------------------------------------------------


def _smaller(old: Places, side: int, reach: float = 1.0, start: float = 0.0) -> Places:
    """A grid of its own, from `start` on over a `reach` of the old one's sides."""
    box = inside(old.box, (start, start, start + reach, start + reach))
    return Places((side, side), box, torch.eye(side * side))


def _shuffled(connector: Any, old: Places) -> Places:
    return _smaller(old, old.grid[0] // connector.factor)


def _pooled(connector: Any, old: Places) -> Places:
    if connector.version is None:
        return old
    side = old.grid[0] // connector.pool  # a last row and column that fill no square are dropped
    return _smaller(old, side, side * connector.pool / old.grid[0])


def _strided(connector: Any, old: Places) -> Places:
    # The 3 x 3 convolution with stride 2 and padding 1: output r is centred on the middle of patch 2 r.
    size = old.grid[0]
    side = (size + 1) // 2
    return _smaller(old, side, 2 * side / size, -0.5 / size)


def _twice(connector: Any, old: Places) -> Places:
    return Places(old.grid, old.box, old.mix.repeat_interleave(2, dim=0))


def _in_groups(connector: Any, old: Places) -> Places:
    return Places(old.grid, old.box, old.mix.unflatten(0, (-1, connector.group)).mean(1))


JOINED: dict[type[nn.Module], Callable[[Any, Places], Places]] = {
    PixelShuffle: _shuffled, Spp: _pooled, Ldp: _strided, MofMlp: _twice, Grouped: _in_groups,
}  # fmt: skip
"""What a connector makes of where its tokens lie, by its class."""

SQUARE = (PixelShuffle, Spp, Ldp)
"""Those that need token t to be cell t."""
KEPT = (nn.Linear, nn.Sequential, nn.Identity, Residual2d)
"""Every token by itself."""


def connected(connector: nn.Module, places: Places, features: Tensor) -> tuple[list[Places | None], str]:
    """Where the connector's tokens lie, for each of the N pictures of `features` [N, n, W] (None: nobody knows), and a
    remark in words where they do not simply keep their places."""
    kind, pictures = type(connector), len(features)
    if kind in SQUARE and not places.plain and not (kind is Spp and getattr(connector, "version", "") is None):
        return [
            None
        ] * pictures, f"{kind.__name__}: the tower's tokens are no plain grid, so nobody knows where its lie"
    if kind in JOINED:
        return [JOINED[kind](connector, places)] * pictures, ""
    if kind in KEPT:
        return [places] * pictures, ""
    looked = looks(connector, features)  # [N, m, n], or None
    if looked is not None:
        mixed: list[Places | None] = [Places(places.grid, places.box, one @ places.mix) for one in looked.float().cpu()]
        return mixed, (
            "The connector's queries stand nowhere on the picture: each is laid where it looked itself, mean over the "
            "heads and layers in which it does. Read these maps as a second-hand tale."
        )
    tokens = connector(features[:1]).shape[1]
    if tokens == places.mix.shape[0]:
        return [places] * pictures, f"{kind.__name__} is a connector of your own: its tokens are taken to keep places"
    return [None] * pictures, f"{kind.__name__} is a connector of your own: nobody knows where its tokens lie"


# --- on the images ----------------------------------------------------------------------------------------------------


def canvases(vlm: VLM, features: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[list[Canvas], list[str]]:
    """The grids that a conversation's visual tokens lie in, image by image, and what there is to know about them.

    features  [N, n, W] what the towers gave for all pictures (tiles) of the images. sizes: (height, width) of each,
              upright, in pixels.
    """
    tiling = vlm.spec.tiling
    notes: list[str] = []
    found: list[Canvas] = []
    picture = offset = 0
    view = vlm.spec.towers[0]
    lying: list[Places | None] = []
    if not isinstance(tiling, NaFlex):
        places, note = _fused(vlm)
        lying, more = connected(vlm.connector, places, features.to(vlm.dtype))
        notes += [said for said in (note, more) if said]
    for image, (height, width) in enumerate(sizes):
        count = vlm.spec.count(height, width)
        if isinstance(tiling, NaFlex):
            own = Places(tiling.grid(height, width), WHOLE, torch.eye(count))
            found += [_canvas(image, "picture", own, WHOLE, offset, count)]
        elif tiling is None:
            square = seen(view, height, width)
            found += [_canvas(image, "picture", lying[picture], square, offset, count)]
            picture += 1
        else:
            tiles = tiling.tiles(height, width)
            found += _tiles(tiling, image, height, width, lying[picture : picture + tiles], offset)
            picture += tiles
        offset += count
    if tiling is None and any(len({seen(one, *size) for one in vlm.spec.towers}) > 1 for size in sizes):
        notes.append(f"The towers see different parts of the picture; the maps lie where {view.name} sees it.")
    return found, notes


def _fused(vlm: VLM) -> tuple[Places, str]:
    """Where the tokens of all towers lie together."""
    each = [tower_places(tower) for tower in vlm.towers.values()]  # type: ignore[arg-type]
    first = each[0]
    odd = [place for place, one in enumerate(each) if one.grid != first.grid]
    note = ""
    if vlm.recipe.vision.fusion == "channel" or len(each) == 1:
        if any(not torch.equal(one.mix, first.mix) for one in each if one.grid == first.grid) or odd:
            note = f"The towers' grids differ; the maps lie where {vlm.spec.towers[0].name} has its tokens."
        return first, note
    if odd:
        note = f"The towers' grids differ; tokens of others than {vlm.spec.towers[0].name} have no place."
    mixes = [one.mix if one.grid == first.grid else torch.zeros_like(first.mix) for one in each]
    return Places(first.grid, first.box, fuse([mix[None] for mix in mixes], "interleave")[0]), note


def _canvas(image: int, part: Part, places: Places | None, square: Box, offset: int, count: int) -> Canvas:
    """Tokens offset .. offset + count - 1, which lie in a square that covers `square` of the image."""
    if places is None:
        cell, tokens = torch.zeros(count, dtype=torch.long), torch.arange(count) + offset
        return Canvas(image, part, (1, 1), square, False, tokens, cell, torch.ones(count))
    token, cell = places.mix.nonzero(as_tuple=True)
    share = places.mix[token, cell]
    return Canvas(image, part, places.grid, inside(square, places.box), True, token + offset, cell, share)


def _tiles(
    tiling: Tiling | Split, image: int, height: int, width: int, lying: Sequence[Places | None], offset: int
) -> list[Canvas]:
    """The whole, and the tiles put together. What a connector cut off a tile or moved by half a patch is not told."""
    layout = torch.tensor(tiling.layout(height, width))
    if any(one is None for one in lying):
        return [_canvas(image, "picture", None, WHOLE, offset, len(layout))]
    known = [one for one in lying if one is not None]
    (high, wide), each = known[0].grid, known[0].mix.shape[0]
    rows, columns = (side // tiling.size for side in tiling.best(height, width))
    whole = len(known) > rows * columns
    # per position: which picture, which of its tokens; newlines (-1) lie nowhere
    at = (layout >= 0).nonzero()[:, 0]
    picture, token = layout[at] // each, layout[at] % each
    pieces: dict[bool, list[tuple[Tensor, Tensor, Tensor]]] = {True: [], False: []}
    for number, places in enumerate(known):
        here = (picture == number).nonzero()[:, 0]
        row, cell = places.mix[token[here]].nonzero(as_tuple=True)
        share = places.mix[token[here]][row, cell]
        first = whole and number == 0
        if not first:
            tile = number - whole
            down, right = tile // columns * high + cell // wide, tile % columns * wide + cell % wide
            cell = down * columns * wide + right
        pieces[first].append((at[here][row] + offset, cell, share))
    found = []
    if whole:
        box = inside(WHOLE, known[0].box)
        found.append(Canvas(image, "whole", (high, wide), box, True, *_joined(pieces[True])))
    tokens, cells, shares = _joined(pieces[False])
    if not len(cells):  # a strip so narrow that borders are all that its tiles hold
        return found
    grid, shown = (rows * high, columns * wide), WHOLE
    if isinstance(tiling, Tiling):
        # borders that are left out are rows or columns that no token lies in
        shown = tiled(tiling, height, width)
        down, right = cells // grid[1], cells % grid[1]
        top, bottom = int(down.min()), int(down.max()) + 1
        left, end = int(right.min()), int(right.max()) + 1
        shown = inside(shown, (left / grid[1], top / grid[0], end / grid[1], bottom / grid[0]))
        grid = (bottom - top, end - left)
        cells = (down - top) * grid[1] + right - left
        if (to := tiling.shrunk(height, width)) is not None:  # scaled down as a whole, a newline after every row
            grid, cells, shares = to, torch.arange(to[0] * to[1]), torch.ones(to[0] * to[1])
            tokens = offset + tiling.cells**2 + cells // to[1] * (to[1] + 1) + cells % to[1]
    part: Part = "tiles" if whole else "picture"
    return [*found, Canvas(image, part, grid, shown, True, tokens, cells, shares)]


def _joined(pieces: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    token, cell, share = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return token, cell, share
