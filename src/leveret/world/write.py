"""Draws a world into a folder, in the field's own file forms, so that the ordinary readers and scorers are used.

    ROOT/web.json            LLaVA JSON: image-text pairs with the web's diseases; pictures in ROOT/web/
    ROOT/web_truth.jsonl     what is wrong with which pair; for examining a choice of data, read by no station
    ROOT/tune.json           LLaVA JSON: conversations about clean scenes, text-only ones too; pictures in ROOT/images/
    ROOT/captions.json       LLaVA JSON: pairs that fit, of scenes that nothing else shows; no step learns from them
    ROOT/eval/               questions in the benchmarks' official forms: the splits test and train, and harder ones
    ROOT/world.json          the parameters; written last, so a folder that has it is whole

Every picture and line is a pure function of (seed, split, index). A stopped draw continues: finished chunks are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from leveret.runs import Progress, RecipeError, claim, closest, read_json, write_json
from leveret.world.captions import PLAIN, STRENGTHS, fitting, web_pair, web_scene
from leveret.world.draw import jpeg, render
from leveret.world.examination import EXAMINED, HARDER, LEAST, MORE, write_kind, write_pictures
from leveret.world.layout import conversation_record, image_file, lines, pair_record, web_file, write_lines, write_list
from leveret.world.questions import REFUSALS, TUNE_OPTIONS, TUNE_WEIGHTS, conversation, text_only
from leveret.world.scenes import Frames, frames_with, shuffled, stream, tune_scene

VERSION = 3
CHUNK = 2000
LATER: dict[str, Any] = {"oblong": 0.0, "refusals": REFUSALS, "asked": {}, "plain": PLAIN}
"""Fields of a world that came after the first, and what they are where nothing is said."""


@dataclass(frozen=True, slots=True)
class WorldSize:
    """How much is drawn. The defaults are the quickstart's.

    web         image-text pairs, diseases included.
    tune        pictures with a conversation of `turns` questions each.
    strength    of the web's diseases: mild, usual or severe (`captions.STRENGTHS`).
    text_share  text-only conversations, as a share of `tune`.
    test        questions a kind in the test split (and in its train twin); `harder` in each of the harder splits, and
                of the kinds beyond the eight (`MORE`).
    captions    held-out pairs that fit.
    oblong      share of the pictures that are clearly not square (`scenes.OBLONG`), in the web, among the held-out
                pairs, in tuning and in the examination. Boxes are told in shares of the picture's own sides.
    refusals    share of the text-only questions that are requests to be refused.
    asked       kind of question (`questions.TUNE_WEIGHTS`) -> how often conversations about pictures draw it, as a
                share of usual: 0 is never; the others take its place. No picture is asked the same twice, so what was
                asked often falls by less. Descriptions stay. The examination asks all the same.
    plain       share of the web's fitting captions that are short: they name things without saying where.
    """

    web: int = 75_000
    strength: str = "usual"
    tune: int = 8_000
    turns: int = 10
    text_share: float = 0.04
    test: int = 1_000
    harder: int = 100
    captions: int = 512
    oblong: float = LATER["oblong"]
    refusals: float = LATER["refusals"]
    asked: Mapping[str, float] = field(default_factory=dict)
    plain: float = LATER["plain"]

    def __post_init__(self) -> None:
        if not isinstance(self.strength, str) or self.strength not in STRENGTHS:
            raise RecipeError(f"strength={self.strength!r}: allowed are {', '.join(STRENGTHS)}")
        for name, least in (("web", 1), ("tune", 1), ("turns", 1), ("test", 1), ("harder", 0), ("captions", 0)):
            given = getattr(self, name)
            if type(given) is not int or given < least:  # a study's file may hold anything
                raise RecipeError(f"{name}={given!r}: a whole number of {least} or more")
        for name in ("test", "harder"):
            if 0 < getattr(self, name) < LEAST:
                raise RecipeError(
                    f"{name}={getattr(self, name)}: too few questions for existence, which is asked in POPE's three "
                    f"ways, a yes and a no each; {LEAST} or more{', or 0 for none' if name == 'harder' else ''}"
                )
        shares = (
            ("text_share", "conversations"), ("oblong", "pictures"), ("refusals", "text-only questions"),
            ("plain", "captions that fit"),
        )  # fmt: skip
        for name, what in shares:
            share = getattr(self, name)
            if type(share) not in (int, float) or not 0 <= share <= 1:
                raise RecipeError(f"{name}={share!r}: a share of the {what}, 0 to 1")
        self._check_asked()

    def web_part(self) -> tuple[Any, ...]:
        """What, with the seed, the web hangs on: worlds that agree in it have the same web to the byte."""
        return self.web, self.strength, self.oblong, self.plain

    def _check_asked(self) -> None:
        given = self.asked
        if not isinstance(given, Mapping) or not all(isinstance(kind, str) for kind in given):
            raise RecipeError(f"asked={given!r}: kind of question -> how often, such as {{box: 0.1}}")
        if strange := [kind for kind in given if kind not in TUNE_WEIGHTS]:
            near = closest(strange[0], TUNE_WEIGHTS)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RecipeError(f"asked: {strange[0]}: tuning asks {', '.join(TUNE_WEIGHTS)}{hint}")
        for kind, often in given.items():
            if type(often) not in (int, float) or not 0 <= often < float("inf"):
                raise RecipeError(f"asked: {kind}: {often!r}; a share of how often it is usually asked, from 0 on")
        # Frozen, so by the back door: the usual is left out, and order says nothing.
        asked = {kind: float(given[kind]) for kind in TUNE_WEIGHTS if given.get(kind, 1) != 1}
        object.__setattr__(self, "asked", asked)
        if not any(self.weights().values()):
            raise RecipeError("asked: nothing is left to ask; ask a kind more often than never")

    def weights(self) -> dict[str, float]:
        """Kind of question -> how often tuning asks it, beside the others; those never asked are left out."""
        weights = {kind: weight * self.asked.get(kind, 1.0) for kind, weight in TUNE_WEIGHTS.items()}
        return {kind: weight for kind, weight in weights.items() if weight}

    def told(self) -> dict[str, Any]:
        """The fields that say which world it is. Those of LATER are left out where they change nothing, so that what
        was drawn, and what was made from it, before there were such fields is still known for the same."""
        return {key: value for key, value in asdict(self).items() if key not in LATER or value != LATER[key]}


# --- the work, in pieces that any process can do ----------------------------------------------------------------------


def _web_chunk(root: Path, seed: int, start: int, stop: int, size: WorldSize) -> dict[str, list[str]]:
    """Draws web pairs start..stop."""
    records, truth, frames = [], [], frames_with(size.oblong)
    for index in range(start, stop):
        pair = web_pair(seed, "web", index, STRENGTHS[size.strength], frames, plain=size.plain)
        path = root / web_file(index)
        if index % 1000 == 0 or index == start:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pair.image())
        records.append(pair_record(f"web-{index:06d}", web_file(index), pair.caption))
        truth.append({"id": f"web-{index:06d}", "words": pair.words, "copy": pair.copy, "source": pair.source})
    return {"records": lines(records), "truth": lines(truth)}


def _tune_chunk(root: Path, seed: int, start: int, stop: int, size: WorldSize) -> dict[str, list[str]]:
    """Draws tuning pictures start..stop, each with its conversation."""
    records, turns, frames, weights = [], size.turns, frames_with(size.oblong), size.weights()
    (root / "images/tune").mkdir(parents=True, exist_ok=True)
    for index in range(start, stop):
        scene, image = tune_scene(seed, index, frames), "images/" + image_file("tune", index)
        (root / image).write_bytes(jpeg(render(scene)))
        rng = stream(seed, "tune/questions", index)
        questions = conversation(scene, rng, turns, weights, describe=0.1, options=TUNE_OPTIONS)
        records.append(conversation_record(f"tune-{index:06d}", questions, image))
        if rng.random() < size.text_share:
            questions = [text_only(rng, refusals=size.refusals) for _ in range(turns)]
            records.append(conversation_record(f"text-{index:06d}", questions, None))
    return {"records": lines(records)}


def _captions(root: Path, seed: int, n: int, frames: Frames) -> None:
    """Held-out pairs that fit: what a connector's loss and a retrieval are measured on."""
    (root / "images/captions").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(n):
        scene, image = web_scene(seed, "captions", index, frames), "images/" + image_file("captions", index)
        (root / image).write_bytes(jpeg(render(scene)))
        caption = fitting(scene, stream(seed, "captions/words", index))
        records.append(pair_record(f"captions-{index:06d}", image, caption))
    write_list(root / "captions.json", lines(records))


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of the work. What it tells is left in ROOT/parts/NAME.json; a piece that has left it is done."""

    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    pictures: int = 0

    def part(self, root: Path) -> Path:
        return root / "parts" / f"{self.name}.json"

    def run(self, root: Path) -> None:
        write_json(self.part(root), self.work(root, *self.arguments))


def _chunks(seed: int, size: WorldSize) -> list[_Piece]:
    """The web and the tuning pictures."""
    pieces = []
    for start in range(0, size.web, CHUNK):
        stop = min(start + CHUNK, size.web)
        pieces.append(_Piece(f"web-{start:07d}", _web_chunk, (seed, start, stop, size), stop - start))
    for start in range(0, size.tune, CHUNK):
        stop = min(start + CHUNK, size.tune)
        pieces.append(_Piece(f"tune-{start:07d}", _tune_chunk, (seed, start, stop, size), stop - start))
    return pieces


def _questions(seed: int, size: WorldSize) -> list[_Piece]:
    """Every kind's questions; they tell which scenes they are about."""
    splits = {"train": min(size.test, size.tune // 4), "test": size.test}
    splits |= {split: size.harder for split in HARDER if size.harder}
    counts = dict.fromkeys(EXAMINED, splits) | {kind: {"test": size.harder} for kind in MORE if size.harder}
    frames = frames_with(size.oblong)
    return [_Piece(f"questions-{kind}", write_kind, (seed, kind, told, frames)) for kind, told in counts.items()]


def _pictures(seed: int, size: WorldSize, about: Iterable[dict[str, list[int]]]) -> list[_Piece]:
    """The pictures of the examination, of every split those that any kind asks about."""
    scenes: dict[str, set[int]] = {}
    for kind in about:
        for split, indexes in kind.items():
            scenes.setdefault(split, set()).update(indexes)
    frames = frames_with(size.oblong)
    return [
        _Piece(f"pictures-{split}", write_pictures, (seed, split, sorted(own), frames)) for split, own in scenes.items()
    ]


def same_world(root: Path, seed: int, size: WorldSize) -> dict[str, Any]:
    """What a world of this seed and size is made from. RecipeError where the folder holds, or was begun as, another."""
    parameters = {"version": VERSION, "seed": seed, **size.told(), "diseases": asdict(STRENGTHS[size.strength])}
    for file in (root / "world.json", root / "parts" / "parameters.json"):
        if file.exists():
            there = read_json(file)
            was, wanted = ({**LATER, **one}.get for one in (there, parameters))
            differ = [key for key in {**parameters, **LATER} if was(key) != wanted(key)]
            if "version" in differ:
                differ = ["version"]  # what else differs follows from it
            elif "strength" in differ:
                differ.remove("diseases")
            if differ:
                told = ", ".join(f"{key} {was(key)!r} (wanted {wanted(key)!r})" for key in differ)
                raise RecipeError(f"{root} holds another world: {told}. Give another folder, or delete this one.")
    return parameters


def draw(out: str | Path, *, seed: int = 0, size: WorldSize | None = None, workers: int | None = None) -> Path:
    """Draws the world of `seed` into `out`, or reuses what is there.

    Returns the folder. Raises RecipeError when the folder holds a world of another seed or size, EnvironmentFault when
    another process draws in it.
    """
    root, size = Path(out), size or WorldSize()
    parameters = same_world(root, seed, size)
    stamp, begun = root / "world.json", root / "parts" / "parameters.json"
    if stamp.exists():
        return root
    claim(root)
    (root / "parts").mkdir(parents=True, exist_ok=True)
    write_json(begun, parameters)

    asked, chunks = _questions(seed, size), _chunks(seed, size)
    workers = workers or min(os.cpu_count() or 1, 8)
    left = sum(piece.pictures for piece in chunks if not piece.part(root).exists())
    # spawn: the same on every system, and safe when the caller already runs threads
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 and left > CHUNK else None
    with Progress(left, "draw the world", "pictures") as progress, pool or nullcontext():
        _do(asked, root, pool, progress)
        rest = [*chunks, *_pictures(seed, size, (read_json(piece.part(root)) for piece in asked))]
        if size.captions:
            rest.append(_Piece("captions", _captions, (seed, size.captions, frames_with(size.oblong))))
        _do(rest, root, pool, progress)

    told = {
        kind: [read_json(piece.part(root)) for piece in chunks if piece.name.startswith(kind)]
        for kind in ("web", "tune")
    }
    for key, name, write in (("records", "web.json", write_list), ("truth", "web_truth.jsonl", write_lines)):
        write(root / name, (line for part in told["web"] for line in part[key]))
    tune = [line for part in told["tune"] for line in part["records"]]
    write_list(root / "tune.json", shuffled(stream(seed, "tune", "order"), tune))
    for piece in (*asked, *rest):
        piece.part(root).unlink()
    write_json(stamp, parameters)
    begun.unlink()
    (root / "parts").rmdir()
    return root


def _do(pieces: list[_Piece], root: Path, pool: ProcessPoolExecutor | None, progress: Progress) -> None:
    """Does the pieces that are not done, here or in the pool's processes."""
    left = [piece for piece in pieces if not piece.part(root).exists()]
    waiting = [pool.submit(piece.run, root) for piece in left] if pool else None
    for position, piece in enumerate(left):
        waiting[position].result() if waiting else piece.run(root)
        progress.advance(piece.pictures)
