"""What must not be in a coreset: the images of benchmarks. Which rows are one of them, and which one, exactly.

    --against PATH -> a vector for each of its images -> lots of distinct ones -> 8-bit screen -> float64 decides

A row is contaminated when its cosine with any benchmark image is above the threshold, strictly, as float64 says of the
two unit vectors. It is named with the nearest of them: ties go to the benchmark that was given first, then to the id
that comes first bytewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from leveret.condense import screen
from leveret.condense.columns import Ids, load, order_of
from leveret.condense.embed import embed
from leveret.condense.given import Given, is_given, open_given
from leveret.condense.lloyd import Map, finish
from leveret.condense.rows import TOGETHER, Array, Doubles, Ints, cosines, first_of_equal, rough_cosines, spans
from leveret.condense.working import Part, Rows
from leveret.images import ImageFault
from leveret.pool import SampleFault, Source, open_source
from leveret.pool.folder import ENDINGS
from leveret.records import IMAGE_MARK, ImageRef, Sample, Turn
from leveret.runs import DataError, RecipeError

LOT = 8192
"""Benchmark images, and rows, that are compared together. No part of any rule."""

MET = ("benchmark", "benchmark_id", "benchmark_cosine")
"""Columns that the step makes: number of the benchmark, id of its nearest image, and their cosine; -1, empty and NaN
for a row that met none."""


# --- what is given -------------------------------------------------------------------------------------------------


class Pictures(Source):
    """Every image of another source once, as a sample of its own; words are of no account, so a folder of bare photos
    will do. The id is the sample's, with `#1`, `#2` ... for its second, third image; an image that several samples
    share goes by the first of them."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.path, source.root)
        self._source = source
        self._entries: list[tuple[int, str, ImageRef | None]] = []
        seen: set[ImageRef] = set()
        for index in range(len(source)):
            for place, (name, ref) in enumerate(self._images(index)):
                if ref is None or ref not in seen:
                    self._entries.append((index, f"{name}#{place}" if place else name, ref))
                if ref is not None:
                    seen.add(ref)
        if not self._entries:
            raise DataError(f"{source.path}: none of its {len(source):,} samples has an image; a benchmark's do")

    def _images(self, index: int) -> list[tuple[str, ImageRef | None]]:
        """(id, image) of one sample; None in place of an image that is refused."""
        try:
            sample = self._source.sample(index)
        except SampleFault as fault:
            # What is refused for its words still has its picture.
            if Path(fault.image).suffix.lower() in ENDINGS:
                try:
                    return [(fault.id or fault.image, self.root.ref(fault.image))]
                except ImageFault:
                    pass
            return [(fault.id, None)]
        return [(sample.id, ref) for ref in sample.images]

    def __len__(self) -> int:
        return len(self._entries)

    def _draft(self, index: int) -> Sample:
        at, name, ref = self._entries[index]
        if ref is None:
            return self._source.sample(at)  # raises what it raised before
        return Sample(name, (ref,), (Turn("user", IMAGE_MARK), Turn("assistant", "an image of a benchmark")), self.name)

    def _trace(self, index: int) -> tuple[bytes, Sequence[str]]:
        return self._source._trace(self._entries[index][0])


@dataclass(frozen=True)
class Side:
    """A benchmark as it was given. name: the end of its path, so much of it that no other has the same."""

    name: str
    path: Path
    source: Pictures | Given

    def check(self, eyes: Eyes) -> None:
        """DataError where its vectors cannot be compared with those that `eyes` made."""
        if isinstance(self.source, Pictures):
            return
        width, made = self.source.shards[0].width, self.source.made_by()
        if eyes.width is not None and width != eyes.width:
            raise DataError(
                f"the benchmark {self.path} has vectors of width {width}, and {eyes.of} has width {eyes.width}; both "
                "must come from one encoder. Embed one of them again, or give the benchmark's images themselves."
            )
        if eyes.weights is not None and made.get("weights", eyes.weights) != eyes.weights:
            raise DataError(
                f"the benchmark {self.path} was embedded by {made.get('encoder')!r} with other weights than {eyes.of} "
                f"({eyes.encoder!r}): cosines between them mean nothing. Embed it again, or give its images themselves."
            )

    def mark(self, eyes: Eyes) -> dict[str, str | None]:
        """What a run is told apart by: the name, the data, and for images the weights that embed them."""
        mark: dict[str, str | None] = {"name": self.name, "data": self.source.fingerprint()}
        return mark if isinstance(self.source, Given) else {**mark, "weights": eyes.weights}

    def embedded(self, folder: Path, eyes: Eyes, **how: Any) -> Path:
        """Its embeddings: those that were given, or its images' in `folder`, made or gone on with; `how` as for
        `embed`."""
        if isinstance(self.source, Given):
            return self.source.path
        assert eyes.encoder is not None, "eyes_of lets no images through without an encoder"
        return embed(self.source, folder, eyes.encoder, **how)


def look_at(paths: Sequence[str | Path]) -> list[Side]:
    """Opens what `--against` names: embeddings (`given.open_given`) or images (`pool.open_source`).

    RecipeError where one path stands twice. DataError where a path is neither, or holds no image.
    """
    places = [Path(path).resolve() for path in paths]
    if twice := [path for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
        raise RecipeError(f"--against {twice[0]} is given twice; give each benchmark once")
    return [
        Side(name, Path(path), open_benchmark(path) if is_given(path) else Pictures(open_source(path)))
        for path, name in zip(paths, _told_apart(places), strict=True)
    ]


def open_benchmark(path: str | Path) -> Given:
    """The embeddings of a benchmark. Its scores are of no account, so what is wrong with them is not either."""
    given = open_given(path)
    if not len(given):
        raise DataError(f"the benchmark {path} is empty: it holds no vector. Give one that has images.")
    return replace(given, score=None, files=tuple(replace(file, text=None) for file in given.files))


@dataclass(frozen=True)
class Eyes:
    """What made the vectors of the rows that are chosen from. encoder, weights (its fingerprint), width: None where
    they are not known. of: those rows, for texts."""

    encoder: str | None
    weights: str | None
    width: int | None
    of: str


def eyes_of(given: Given, encoder: str | None, sides: Sequence[Side], device: str = "cpu") -> Eyes:
    """What made these embeddings, as they say; where they do not, `encoder`.

    RecipeError where a side has images and no encoder is known, or `encoder` is not the one that the embeddings name.
    DataError where the encoder on this machine is not the one that made them.
    """
    made, of = given.made_by(), f"the set of embeddings {given.path}"
    width = given.shards[0].width if len(given) else None
    images = next((side.path for side in sides if isinstance(side.source, Pictures)), None)
    if images is None:
        return Eyes(made.get("encoder"), made.get("weights"), width, of)
    name = made.get("encoder", encoder)
    if name is None:
        raise RecipeError(
            f"--against {images} holds images, and {given.path} does not say which encoder made its vectors. Name it "
            "(--encoder), or give embeddings of the benchmark by the same encoder."
        )
    if encoder not in (None, name):
        raise RecipeError(f"--encoder {encoder}: {given.path} was made by {name!r}; leave the option out")
    from leveret.model.encoders import load_encoder

    loaded = load_encoder(name, device)
    if width not in (None, loaded.width):
        raise DataError(f"the encoder {name!r} makes vectors of width {loaded.width}, and {of} has width {width}")
    if made.get("weights", loaded.fingerprint) != loaded.fingerprint:
        raise DataError(f"the encoder {name!r} has other weights here than when {of} was made; embed it again")
    return Eyes(name, loaded.fingerprint, loaded.width, of)


def _told_apart(places: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that differ."""
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with its vectors. images: how many. refused: its images that could not be read, so that no row was
    compared with them. parts: its rows, read and checked by the first call."""

    name: str
    images: int
    refused: int
    parts: Callable[[], Sequence[Part]]


# --- which rows are one of them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lot:
    """Benchmark images that are compared together, those with the same bits once. places: [n] of them in the part.
    rank: [n] of each in the order of ties. block: ready for products, where it is held."""

    part: Part
    places: Ints
    rank: Ints
    block: screen.Block | None

    def vectors(self) -> Array:
        return self.part.vectors(self.places)


class _Lineup:
    """All images of all benchmarks in the order of ties: benchmark, then id (bytewise).

    ids     by rank. number: [n] of the benchmark, by rank.
    Memory: an id and 40 bytes an image; blocks are held within `memory` bytes, the others made when they are needed.
    """

    def __init__(self, benchmarks: Sequence[Benchmark], memory: int, run: Map) -> None:
        parts = [(number, part) for number, one in enumerate(benchmarks) for part in one.parts()]
        ids = Ids.join([part.read("id")[0] for _, part in parts])
        number = np.repeat([number for number, _ in parts], [part.n for _, part in parts]).astype(np.int64)
        order = order_of(ids, number)
        self.ids, self.number = ids.take(order), number[order]
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        ends = np.cumsum([part.n for _, part in parts])
        # Blocks are compared with each other only where their middle is one.
        self.middle = screen.middle_of(parts[0][1].reader()(np.arange(min(parts[0][1].n, screen.STEP))))

        def lot(piece: tuple[Part, Ints]) -> tuple[_Lot, screen.Block]:
            part, own = piece
            x = part.vectors()
            same = first_of_equal(x)
            order = np.lexsort((own, same))
            places = np.sort(order[np.r_[True, np.diff(same[order]) != 0]])
            return _Lot(part, places, own[places], None), screen.prepare(x[places], self.middle)

        self.lots: list[_Lot] = []
        for made, block in run(
            lot, [(part, rank[end - part.n : end]) for (_, part), end in zip(parts, ends, strict=True)]
        ):
            memory -= block.codes.nelement() * block.codes.element_size()
            self.lots.append(replace(made, block=block) if memory >= 0 else made)

    def nearest(self, x: Array, threshold: float) -> tuple[Doubles, Ints]:
        """([n] cosine of each stored row with the nearest image above the threshold, [n] that image's rank); -inf and
        -1 where there is none."""
        best, met = np.full(len(x), -np.inf), np.full(len(x), -1, np.int64)
        # In blocks: one row that 8 bits tell too coarsely has its whole block compared in float32.
        own = [(part.start, screen.prepare(x[part], self.middle)) for part in spans(len(x), LOT)]
        for lot in self.lots:
            block = lot.block or screen.prepare(lot.vectors(), self.middle)
            y: Array | None = None
            for start, rows in own:
                for i, j, _ in screen.candidates(rows, block, threshold):
                    y = lot.vectors() if y is None else y
                    for part in spans(len(i), TOGETHER):
                        _meet(x, start + i[part], y, j[part], lot.rank, threshold, best, met)
        return best, met


def _meet(x: Array, i: Ints, y: Array, j: Ints, rank: Ints, threshold: float, best: Doubles, met: Ints) -> None:
    """Takes pairs (row of x, row of y) into account that may be above the threshold."""
    rough, slack = rough_cosines(x[i], y[j])
    near = rough > np.maximum(threshold, best[i]) - slack
    i, j = i[near], j[near]
    cosine, order_of_ties = cosines(x[i], y[j]), rank[j]
    order = np.lexsort((order_of_ties, -cosine, i))
    first = order[np.r_[True, np.diff(i[order]) != 0][: len(order)]]
    i, cosine, order_of_ties = i[first], cosine[first], order_of_ties[first]
    better = (cosine > threshold) & ((cosine > best[i]) | ((cosine == best[i]) & (order_of_ties < met[i])))
    best[i[better]], met[i[better]] = cosine[better], order_of_ties[better]


def contaminated(
    rows: Rows, label: str, threshold: float, benchmarks: Sequence[Benchmark], most: int, memory: int, run: Map
) -> tuple[Rows, dict[str, Any]]:
    """Without the rows that are above the threshold with a benchmark image; adds the columns MET.

    most    rows that a task holds at once. memory: bytes for the benchmarks' blocks.
    Also returns {"against": {benchmark: {"images", "refused", "met": rows whose nearest image is one of its}}}.
    """
    if not all(rows.place(label, part).exists() for part in rows.parts):
        lineup = _Lineup(benchmarks, memory, run)

        def judge(part: Part) -> None:
            if not rows.place(label, part).exists():
                _judge(rows, label, part, threshold, lineup, most)

        finish(run(judge, rows.parts))
    met = np.zeros(len(benchmarks), np.int64)
    for part in rows.parts:
        number = load(rows.place(label, part), "benchmark")[0]
        met += np.bincount(number[number >= 0], minlength=len(benchmarks))
    said = {
        one.name: {"images": one.images, "refused": one.refused, "met": int(count)}
        for one, count in zip(benchmarks, met, strict=True)
    }
    return rows.after(label, MET), {"against": said}


def _judge(rows: Rows, label: str, part: Part, threshold: float, lineup: _Lineup, most: int) -> None:
    alive, read = rows.alive(part), part.reader()
    number, cosine, names = np.full(part.n, -1, np.int64), np.full(part.n, np.nan), [b""] * part.n
    for span in spans(len(alive), most):
        best, rank = lineup.nearest(read(alive[span]), threshold)
        found = np.flatnonzero(rank >= 0)
        gone = alive[span][found]
        number[gone], cosine[gone] = lineup.number[rank[found]], best[found]
        for place, name in zip(gone.tolist(), lineup.ids.at(rank[found]), strict=True):
            names[place] = name
    rows.judge(label, part, number >= 0, benchmark=number, benchmark_id=Ids.of(names), benchmark_cosine=cosine)
