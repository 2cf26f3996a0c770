"""Which pairs of rows can have a cosine above a threshold: 8-bit products, each with a proven bound on its error.

A row's unit vector u is told as  u = m + s q + e:  m the middle of its block (any vector will do), q whole numbers of
8 bits, s one scale for the block, e what is left, whose length is measured. Then for two rows

    u v  =  (m u - mm/2) + (m v - mm/2)  +  s s' (q q')  +  at most  |e| |v - m| + |e'| |u - m| + |e| |e'|

The product q q' is exact (32-bit sums of whole numbers), so a pair is surely above, surely below, or needs a second
look. Encoders such as CLIP have a few dimensions that are large in every picture and would set the scale: there m is
the rows' middle. Where no dimension stands out m is nothing, which saves a pass over the products.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leveret.condense.rows import Doubles, Floats, Ints, distances, spans, unit32

Stored = NDArray[Any]

TILE = 256, 2048
"""Rows and columns of one product: its 2 MB of 32-bit sums stay in a core's cache while they are compared."""

LEVELS = 127
FINE, WIDEST = 0.012, 0.04
"""How far rows may be from what 8 bits say of them: without a middle, and at all. Beyond it float32 compares."""

STEP = 512
"""Rows prepared at once, so that the passes over them stay in the cache."""

NEAR = 256
"""Pairs of rows and centroids multiplied at once: both sides' rows then stay in a core's cache."""

HEADROOM = 1.05
"""How far beyond the largest number of the first rows the 8 bits reach."""


@dataclass(frozen=True)
class Block:
    """Rows made ready for products.

    codes   [n, width] int8, or float32 where 8 bits are too coarse: then scale is 1 and codes are u - m.
    about   [n] float64: m u - mm/2 of each row; None where m is nothing.
    error   [n] float64: bound on the length of e. spread: [n] float64, bound on the length of u - m.
    """

    codes: Any
    scale: float
    about: Doubles | None
    error: Doubles
    spread: Doubles

    def __len__(self) -> int:
        return len(self.error)

    def part(self, start: int, stop: int) -> Block:
        """Some of its rows."""
        inside = slice(start, stop)
        about = None if self.about is None else self.about[inside]
        return Block(self.codes[inside], self.scale, about, self.error[inside], self.spread[inside])


def middle_of(x: Stored) -> Floats | None:
    """A middle for these rows, found on the first of them; None where no dimension stands out too far for 8 bits."""
    some = unit32(x[:64])
    if float(np.abs(some).max(initial=0.0)) / LEVELS * math.sqrt(some.shape[1] / 12) <= FINE:
        return None
    middle: Floats = some.mean(0)
    return middle


def prepare(x: Stored, middle: Floats | None = None, kind: str | None = None) -> Block:
    """The block of some rows.

    x       [n, width] as stored, of any lengths but 0.
    middle  [width] float32 or None (nothing), the same for all blocks that are compared with each other.
    kind    "int8" or "float32" instead of what this machine and these rows allow.
    """
    import torch

    n, width = x.shape
    tiny = _rounding(width)
    about, spread = (None, np.full(n, 1 + tiny)) if middle is None else (np.empty(n), np.empty(n))

    def unit(part: slice) -> Any:
        """u - m of some rows; what is about them is written down."""
        rows = torch.from_numpy(unit32(x[part]))
        if middle is not None and about is not None:
            centre = torch.from_numpy(middle)
            about[part] = torch.mv(rows, centre).numpy() - 0.5 * float(middle.astype(np.float64) @ middle)
            rows.sub_(centre)
            spread[part] = torch.linalg.vector_norm(rows, dim=1).numpy() * (1 + tiny) + tiny
        return rows

    if kind != "float32" and n and (kind == "int8" or has_int8()):
        codes, error, scale = torch.empty(n, width, dtype=torch.int8), np.empty(n), 0.0
        for part in spans(n, STEP):
            rows = unit(part)
            # Of the first rows; a later one that goes beyond it is cut, and its error says so.
            scale = scale or _scale_of(rows)
            codes[part], error[part] = _coded(rows, scale)
        error = error * (1 + tiny) + tiny
        if kind == "int8" or error.max() <= WIDEST:
            return Block(codes, scale, about, error, spread)
    away = torch.empty(n, width)
    for part in spans(n, STEP):
        away[part] = unit(part)
    return Block(away, 1.0, about, np.full(n, tiny), spread)


def _scale_of(rows: Any) -> float:
    import torch

    low, high = torch.aminmax(rows)
    return HEADROOM * float(max(high, -low)) / LEVELS or 1.0


def _coded(rows: Any, scale: float) -> tuple[Any, NDArray[np.float32]]:
    """Whole numbers for some rows (float32, which is overwritten), and the length of what they leave out."""
    import torch

    whole = torch.mul(rows, 1 / scale).round_().clamp_(-LEVELS, LEVELS)
    return whole, torch.linalg.vector_norm(rows.sub_(whole, alpha=scale), dim=1).numpy()


def _rounding(width: int) -> float:
    """Covers every rounding in float32 above: of the unit vectors, the differences, sums of `width` terms, lengths."""
    return (width + 32) * 2.0**-23


def candidates(a: Block, b: Block, threshold: float, *, same: bool = False) -> Iterator[tuple[Ints, Ints, Any]]:
    """Pairs (rows of a, rows of b, whether surely above) that may be above the threshold, tile by tile.

    same  a and b are one block: each pair once, the first row before the second. All other pairs are surely not above.
    """
    rows, columns = TILE
    work = _workplace(_is_whole(a) and _is_whole(b))
    own = 4 * _rounding(a.codes.shape[1])  # of float32: of `about` on both sides, and of products that are not whole
    for top in range(0, len(a), rows):
        upper = a.part(top, top + rows)
        for left in range(top if same else 0, len(b), columns):
            lower = b.part(left, left + columns)
            slack = own + _slack(upper, lower)
            i, j, cosine = work.above(upper, lower, threshold - slack)
            i, j = i + top, j + left
            if same:
                once = i < j
                i, j, cosine = i[once], j[once], cosine[once]
            if len(i):
                yield i, j, cosine > threshold + slack


def _slack(a: Block, b: Block) -> float:
    """The bound of the module's text over all pairs of two blocks."""
    one, two = float(a.error.max()), float(b.error.max())
    return one * float(b.spread.max()) + two * float(a.spread.max()) + one * two


def _is_whole(block: Block) -> bool:
    return str(block.codes.dtype) == "torch.int8"


_local = threading.local()


def _workplace(whole: bool) -> _Workplace:
    """This thread's."""
    name = "whole" if whole else "wide"
    if not hasattr(_local, name):
        setattr(_local, name, _Workplace(whole))
    found: _Workplace = getattr(_local, name)
    return found


class _Workplace:
    """Buffers that all products of a thread share: fresh memory for each would cost more than the product."""

    def __init__(self, whole: bool) -> None:
        import torch

        self.whole = whole
        self.sums = torch.empty(TILE[0] * TILE[1], dtype=torch.int32 if whole else torch.float32)
        self.mask = np.empty(TILE[0] * TILE[1], np.bool_)

    def above(self, a: Block, b: Block, least: float) -> tuple[Ints, Ints, Doubles]:
        """Rows, columns and told cosines of the pairs where the told cosine is above `least`."""
        import torch

        shape = len(a), len(b)
        out = self.sums[: shape[0] * shape[1]].view(shape)
        unit = a.scale * b.scale if self.whole else 1.0
        if self.whole:
            torch._int_mm(a.codes, b.codes.T, out=out)
        else:
            torch.mm(_widened(a), _widened(b).T, out=out)
        product = out.numpy()
        mask = self.mask[: product.size].reshape(shape)
        if a.about is None or b.about is None:
            np.greater(product, self._outwards(np.floor, np.array(least / unit)), out=mask)
            found = np.flatnonzero(mask)
            i, j = np.divmod(found, shape[1])
            return i, j, product.ravel()[found].astype(np.float64) * unit
        adding = self._outwards(np.ceil, b.about / unit)
        product += adding
        np.greater(product, self._outwards(np.floor, (least - a.about) / unit)[:, None], out=mask)
        found = np.flatnonzero(mask)
        i, j = np.divmod(found, shape[1])
        told = product.ravel()[found].astype(np.float64) - adding[j]
        return i, j, told * unit + a.about[i] + b.about[j]

    def _outwards(self, rounded: Callable[[Doubles], Doubles], limit: Doubles) -> NDArray[Any]:
        """A limit in the products' own numbers, so that no pair is lost. Beyond 2^30 comes no sum of 8-bit products."""
        if not self.whole:
            return limit.astype(np.float32)
        return np.clip(rounded(limit), -(2.0**30), 2.0**30).astype(np.int32)


def _widened(block: Block) -> Any:
    import torch

    return block.codes.to(torch.float32) * block.scale if _is_whole(block) else block.codes


# --- the nearest centroid ------------------------------------------------------------------------------------------

BATCH = 1 << 21
"""Products taken at once: rows x centroids. Large, for threads wait for each other at every call that is short."""

CROWD = 1 / 24
"""Share of the centroids, as candidates of a row, from which float32 looks at all of them again: without clusters many
are nearly as near."""


@dataclass(frozen=True)
class Told:
    """Rows made ready to be compared with any centroids, told from `mean`; m below.

    codes   [n, width] int8, of one scale for all; None where this machine does not multiply them exactly.
    error   [n] float64, bound on what codes leave out. length: [n] float64, bound on |u - m|.
    """

    codes: Any
    scale: float
    error: Doubles
    length: Doubles

    def __len__(self) -> int:
        return len(self.length)

    def at(self, places: Any) -> Told:
        """Some of its rows: a slice, or their numbers."""
        codes = None if self.codes is None else self.codes[places]
        return Told(codes, self.scale, self.error[places], self.length[places])


def tell(x: Stored, mean: Floats, scale: float = 0.0) -> Told:
    """Makes stored rows ready. scale: of their codes; by default one that fits the first of them."""
    import torch

    n, width = x.shape
    tiny, whole = _rounding(width), has_int8()
    codes = torch.empty(n, width, dtype=torch.int8) if whole else None
    error, length = np.zeros(n), np.empty(n)
    for part in spans(n, STEP):
        rows = torch.from_numpy(_away(x[part], mean))
        length[part] = torch.linalg.vector_norm(rows, dim=1).numpy() * (1 + tiny) + tiny
        if codes is not None:
            scale = scale or _scale_of(rows)
            codes[part], error[part] = _coded(rows, scale)
    return Told(codes, scale, error * (1 + tiny) + tiny, length)


def _away(x: Stored, mean: Floats) -> Floats:
    """u - m of stored rows, in float32."""
    rows = unit32(x)
    return np.subtract(rows, mean, out=rows)


_Screen = tuple[Any, float, Doubles]
"""Closeness [n, k] of rows to centroids by rough products, its unit, and a bound [n] on its error."""


class Nearest:
    """Finds each row's nearest centroid: screened in 8 bits, then in float32; where both leave it open float64 decides.

    Least L2 distance of the unit vector to the centroid as it is; of equally near ones the lowest number.

    Distances do not change when everything is moved, so rows and centroids are told from one `mean`: the centroids' own
    unless another is given. A centroid's closeness to a row is (u - m) (c - m) - |c - m|^2 / 2: the closest is nearest.
    """

    def __init__(self, centroids: Floats, mean: Floats | None = None) -> None:
        import torch

        self.centroids = centroids
        self.tiny = _rounding(centroids.shape[1])
        wide = centroids.astype(np.float64)
        self.mean = wide.mean(0).astype(np.float32) if mean is None else mean
        away = wide - self.mean
        self.away = away.astype(np.float32)
        self.half = 0.5 * np.square(away).sum(1)
        self.longest = float(np.sqrt(2 * self.half.max()))
        self.codes: Any = None
        self.scale, self.error = 1.0, 0.0
        if has_int8():
            rows = torch.from_numpy(self.away.copy())
            self.scale = _scale_of(rows)
            whole, error = _coded(rows, self.scale)
            self.codes = whole.to(torch.int8)
            self.error = float(error.max()) * (1 + self.tiny) + self.tiny

    def of(self, x: Stored, told: Told | None = None) -> Ints:
        """[n] labels of stored rows; `told`: the same rows made ready with this `mean`."""
        return self.closest(x, told)[0]

    def closest(self, x: Stored, told: Told | None = None) -> tuple[Ints, Doubles]:
        """[n] labels of stored rows, and [n] bounds: each row's closeness to its centroid is at least that."""
        labels, least = np.zeros(len(x), np.int64), np.full(len(x), -np.inf)
        if len(self.centroids) > 1:
            for part in self._parts(len(x)):
                rows = x[part]
                labels[part], least[part] = self._some(rows, tell(rows, self.mean) if told is None else told.at(part))
        return labels, least

    def several(self, x: Stored, m: int) -> Ints:
        """[n, m] the m nearest centroids of stored rows, the nearest first; ties as in `of`. At most all of them."""
        found = np.zeros((len(x), min(m, len(self.centroids))), np.int64)
        for part in self._parts(len(x)) if len(self.centroids) > 1 else ():
            rows, taken = x[part], found[part]
            told = tell(rows, self.mean)
            screen = self._screen(rows, told)
            for column in range(taken.shape[1]):
                taken[:, column], screen = self._decide(rows, told, screen, taken[:, :column])
        return found

    def rivals(self, x: Stored, told: Told, least: Doubles) -> Ints:
        """Rows to which one of these centroids may be as close as `least` [n] says; surely none is to the others.

        x and told: the same rows, as for `of`.
        """
        found = [np.zeros(0, np.int64)]
        for part in self._parts(len(told)):
            rows = told.at(part)
            product, unit, slack = self._screen(x[part], rows)
            highest = product[np.arange(len(product)), product.argmax(1)] * unit
            found.append(part.start + np.flatnonzero(highest + slack >= least[part]))
        return np.concatenate(found)

    def _parts(self, n: int) -> Iterator[slice]:
        return spans(n, max(16, min(4096, BATCH // len(self.centroids))))

    def _some(self, x: Stored, told: Told) -> tuple[Ints, Doubles]:
        labels, (product, unit, slack) = self._decide(x, told, self._screen(x, told))
        return labels, product[np.arange(len(x)), labels] * unit - slack

    def _screen(self, x: Stored, told: Told) -> _Screen:
        return self._by_codes(told) or self._by_floats(x, told)

    def _decide(self, x: Stored, told: Told, screen: _Screen, taken: Ints | None = None) -> tuple[Ints, _Screen]:
        """Labels, and the screen that they were found by. taken: [n, any] centroids that are out of question for each
        row, the last of which `screen` does not know of yet."""
        product, unit, slack = screen
        if taken is not None:
            _without(product, taken[:, -1:])
        i, j = _within(product, 2 * slack / unit)
        if len(i) > max(6, CROWD * len(self.centroids)) * len(x) and product.dtype.kind == "i":
            product, unit, slack = self._by_floats(x, told)
            if taken is not None:
                _without(product, taken)
            i, j = _within(product, 2 * slack)
        labels: Ints = np.empty(len(x), np.int64)
        labels[i[::-1]] = j[::-1]  # the first candidate of each row; rows with one are done
        several = np.bincount(i, minlength=len(x))[i] > 1
        if several.any():
            self._look_again(x, told.length, i[several], j[several], labels)
        return labels, (product, unit, slack)

    def _by_codes(self, told: Told) -> _Screen | None:
        """(closeness [n, k] by 8-bit products, its unit, bound on its error [n]); None where 8 bits cannot say it."""
        import torch

        unit = told.scale * self.scale
        if told.codes is None or self.codes is None or self.half.max() > 2.0**30 * unit:
            return None
        product = torch._int_mm(told.codes, self.codes.T).numpy()
        product -= np.rint(self.half / unit).astype(np.int32)
        # Both sides' errors, and the rounding of `half`.
        slack = told.error * self.longest + self.error * (told.length + told.error) + 0.51 * unit
        return product, unit, slack

    def _by_floats(self, x: Stored, told: Told) -> _Screen:
        """The same by float32 products."""
        import torch

        product = torch.mm(torch.from_numpy(_away(x, self.mean)), torch.from_numpy(self.away).T).numpy()
        product -= self.half.astype(np.float32)
        return product, 1.0, self._float_error(told.length)

    def _float_error(self, lengths: Doubles) -> Doubles:
        """[n] bound on the error of a float32 product less half a length."""
        return 2 * self.tiny * (lengths + self.longest + 1) * max(self.longest, 1.0)

    def _look_again(self, x: Stored, lengths: Doubles, i: Ints, j: Ints, labels: Ints) -> None:
        """Decides among candidates: rows `i` (ascending), centroids `j` (ascending in each row)."""
        starts = np.flatnonzero(np.r_[True, np.diff(i) != 0])
        counts = np.diff(np.r_[starts, len(i)])
        rows, back = _away(x[i[starts]], self.mean), np.repeat(np.arange(len(starts)), counts)
        value = np.empty(len(i))
        for part in spans(len(i), NEAR):
            value[part] = np.einsum("ij,ij->i", rows[back[part]], self.away[j[part]])
        value -= self.half[j]
        best = np.repeat(np.maximum.reduceat(value, starts), counts)
        near = value >= best - 2 * self._float_error(lengths)[i]
        i, j = i[near], j[near]
        starts = np.flatnonzero(np.r_[True, np.diff(i) != 0])
        counts = np.diff(np.r_[starts, len(i)])
        labels[i[starts]] = j[starts]
        open_ = np.repeat(counts, counts) > 1
        if not open_.any():
            return
        i, j = i[open_], j[open_]
        away = distances(x[i], self.centroids, j)
        order = np.lexsort((j, away, i))
        found, first = np.unique(i[order], return_index=True)
        labels[found] = j[order][first]


def _without(product: NDArray[Any], taken: Ints) -> None:
    """Makes some columns of each row the farthest."""
    least = np.iinfo(product.dtype).min if product.dtype.kind == "i" else -np.inf
    np.put_along_axis(product, taken, product.dtype.type(least), axis=1)


def _within(product: NDArray[Any], slack: Doubles) -> tuple[Ints, Ints]:
    """Positions (row, column), in order, whose value is at most `slack` [rows] below the row's highest."""
    least = product[np.arange(len(product)), product.argmax(1)] - slack
    if product.dtype.kind == "i":
        limit = np.floor(least).astype(product.dtype)
    else:
        limit = np.nextafter(least.astype(product.dtype), product.dtype.type(-np.inf))
    i, j = np.divmod(np.flatnonzero(product >= limit[:, None]), product.shape[1])
    return i, j


@cache
def has_int8() -> bool:
    """Whether this machine multiplies 8-bit numbers exactly, and no slower than float32.

    Some add in 16 bits and lose what does not fit. Where a processor has no instruction for it (VNNI, or the like of
    other makers), PyTorch multiplies them one by one: 2.5 thousand million operations a second where float32 has 70.
    What is found is the same either way.
    """
    import torch

    try:
        generator = torch.Generator().manual_seed(0)
        one = torch.randint(-LEVELS, LEVELS + 1, (65, 512), generator=generator, dtype=torch.int8)
        one[:8], one[8:16] = LEVELS, -LEVELS
        exact = torch.equal(torch._int_mm(one, one.T).to(torch.int64), one.to(torch.int64) @ one.T.to(torch.int64))
    except (RuntimeError, AttributeError):
        return False
    if not exact:
        return False
    codes = torch.randint(-LEVELS, LEVELS + 1, (256, 256), generator=generator, dtype=torch.int8)
    wide = codes.float()
    taken = [math.inf, math.inf]
    for _ in range(4):  # in turn, and the best of each: other work comes and goes
        for at, (multiply, matrix) in enumerate(((torch._int_mm, codes), (torch.mm, wide))):
            began = time.perf_counter()
            multiply(matrix, matrix.T)
            taken[at] = min(taken[at], time.perf_counter() - began)
        if taken[0] > 8 * taken[1]:
            break
    return taken[0] <= taken[1]
