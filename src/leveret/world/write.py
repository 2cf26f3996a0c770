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

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from leveret.records import IMAGE_MARK
from leveret.runs import Progress, RecipeError, atomic_write, claim, read_json, write_json
from leveret.world.captions import STRENGTHS, fitting, web_pair, web_scene
from leveret.world.draw import jpeg, render
from leveret.world.questions import (
    EXAMINED,
    KINDS,
    POPE_WAYS,
    TEXT_FORMS,
    TUNE_OPTIONS,
    TUNE_WEIGHTS,
    Question,
    conversation,
    insufficient,
    text_only,
    told,
)
from leveret.world.scenes import PAIRS, Scene, Thing, between, sample_scene, shuffled, stream

VERSION = 3
CHUNK = 2000
DESCRIBE = "Describe the image."


@dataclass(frozen=True, slots=True)
class Split:
    """Where an examination's scenes come from.

    scenes   arguments of `sample_scene`.
    quality  of the JPEG.
    about    what is new, in words.
    """

    about: str
    scenes: Mapping[str, Any] = field(default_factory=dict)
    quality: int = 90


SPLITS: dict[str, Split] = {
    "test": Split("fresh scenes of the kind that was taught"),
    "train": Split("the tuning pictures, asked as in the examination; constants are chosen here"),
    "novel-pairs": Split("asked about a colour-shape pair that no picture ever showed", {"novel_pairs": True}),
    "novel-words": Split("a word that no training picture ever showed", {"novel_words": True, "word": 1.0}),
    "crowded": Split("five or six things, where at most four were taught", {"counts": (5, 6), "word": 0.3}),
    "small": Split("things of 9 to 12 pixels, where 13 to 19 were taught", {"sizes": (9, 12)}),
    "stripes": Split("bold stripes behind the things", {"style": "stripes"}),
    "jpeg20": Split("JPEG at quality 20", quality=20),
    "wide": Split(
        "pictures up to twice as wide as high, or as high as wide",
        {"frames": ((128, 64), (64, 128), (104, 64), (64, 104))},
    ),
}
HARDER = tuple(name for name in SPLITS if name not in ("test", "train"))


LEAST = 5
"""Questions a kind without which one of POPE's files is empty."""


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
    """

    web: int = 75_000
    strength: str = "usual"
    tune: int = 8_000
    turns: int = 10
    text_share: float = 0.04
    test: int = 1_000
    harder: int = 100
    captions: int = 512

    def __post_init__(self) -> None:
        if self.strength not in STRENGTHS:
            raise RecipeError(f"strength={self.strength!r}: allowed are {', '.join(STRENGTHS)}")
        for name, least in (("web", 1), ("tune", 1), ("turns", 1), ("test", 1), ("harder", 0), ("captions", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name}={getattr(self, name)}: a whole number of {least} or more")
        for name in ("test", "harder"):
            if 0 < getattr(self, name) < LEAST:
                raise RecipeError(
                    f"{name}={getattr(self, name)}: too few questions for existence, which is asked in POPE's three "
                    f"ways, a yes and a no each; {LEAST} or more{', or 0 for none' if name == 'harder' else ''}"
                )
        if not 0 <= self.text_share <= 1:
            raise RecipeError(f"text_share={self.text_share}: a share of the conversations, 0 to 1")


def _web_file(index: int) -> str:
    return f"web/{index // 1000:03d}/{index:06d}.jpg"


def _image_file(split: str, index: int) -> str:
    return f"{split}/{index:06d}.jpg"


def _pair_record(identity: str, image: str, caption: str) -> dict[str, Any]:
    return {
        "id": identity,
        "image": image,
        "conversations": [
            {"from": "human", "value": f"{IMAGE_MARK}\n{DESCRIBE}"},
            {"from": "gpt", "value": caption},
        ],
    }


def _web_chunk(root: str, seed: int, start: int, stop: int, strength: str) -> None:
    """Draws pairs start..stop and leaves their records in a part file, written last."""
    records, truth = [], []
    for index in range(start, stop):
        pair = web_pair(seed, "web", index, STRENGTHS[strength])
        path = Path(root, _web_file(index))
        if index % 1000 == 0 or index == start:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pair.image())
        records.append(_pair_record(f"web-{index:06d}", _web_file(index), pair.caption))
        truth.append({"id": f"web-{index:06d}", "words": pair.words, "copy": pair.copy, "source": pair.source})
    _part(root, "web", start, {"records": records, "truth": truth})


def tune_scene(seed: int, index: int) -> Scene:
    """The scene of tuning picture `index`: most hold a word, some hold nothing, some have clutter behind the things."""
    rng = stream(seed, "tune", index)
    r = rng.random()
    clutter = between(rng, 1, 5) if r < 0.12 else 0
    return sample_scene(rng, word=0.88, counts=(0, 0) if r < 0.03 or r > 0.98 else (1, 4), clutter=clutter)


def _tune_chunk(root: str, seed: int, start: int, stop: int, turns: int, text_share: float) -> None:
    records = []
    Path(root, "images/tune").mkdir(parents=True, exist_ok=True)
    for index in range(start, stop):
        scene = tune_scene(seed, index)
        Path(root, "images", _image_file("tune", index)).write_bytes(jpeg(render(scene)))
        rng = stream(seed, "tune/questions", index)
        questions = conversation(scene, rng, turns, TUNE_WEIGHTS, describe=0.1, options=TUNE_OPTIONS)
        records.append(_conversation_record(f"tune-{index:06d}", questions, "images/" + _image_file("tune", index)))
        if rng.random() < text_share:
            records.append(_conversation_record(f"text-{index:06d}", [text_only(rng) for _ in range(turns)], None))
    _part(root, "tune", start, {"records": records})


def _conversation_record(identity: str, questions: list[Question], image: str | None) -> dict[str, Any]:
    turns: list[dict[str, str]] = []
    for position, question in enumerate(questions):
        mark = f"{IMAGE_MARK}\n" if image and position == 0 else ""
        turns += [{"from": "human", "value": mark + question.text}, {"from": "gpt", "value": question.answer}]
    return {"id": identity, **({"image": image} if image else {}), "conversations": turns}


def _part(root: str, kind: str, start: int, content: dict[str, Any]) -> None:
    atomic_write(Path(root, "parts", f"{kind}-{start:07d}.json"), json.dumps(content))


# --- examination: one writer an official form; each takes the split and its items -------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of the examination and the picture it is about (`images/` + image)."""

    number: int
    image: str
    scene: Scene
    question: Question


CELLS: dict[str, tuple[int, Callable[[Question], Any]]] = {
    "colour": (len(PAIRS), lambda question: question.meta["object"]),
    "shape": (len(PAIRS), lambda question: question.meta["object"]),
    "relation": (8, lambda question: question.template + question.answer),
    "choice": (4, lambda question: question.answer),
}
"""What the test split balances, as GQA's balanced splits do: cells, and the cell of a question. Within a cell no answer
is likelier than another, so neither a constant nor a blind model finds one that pays."""


def _questions(seed: int, split: str, kind: str, n: int) -> list[Asked]:
    """`n` questions of one kind, at most one (existence: a yes and a no) a scene."""
    found: list[Asked] = []
    index = 0
    cells, cell_of = CELLS[kind] if split == "test" and kind in CELLS else (1, lambda question: 0)
    full, held = -(-n // cells), Counter[Any]()
    while len(found) < n:
        rng = stream(seed, f"{split}/{kind}", index)
        scene, image = exam_scene(seed, split, index)
        index += 1
        if not scene.things:
            continue
        new = scene.things[0] if SPLITS[split].scenes.get("novel_pairs") else None
        asked: list[dict[str, Any]] = [{}]
        if kind == "existence":
            way = POPE_WAYS[(index - 1) % len(POPE_WAYS)]
            asked = [{"way": way, "label": label} for label in (True, False)]
        for options in asked:
            about = new if options.get("label", True) else None
            for _ in range(20 if about else 8 if cells > 1 else 1):
                question = KINDS[kind](scene, rng, **options)
                if question and (about is None or _is_about(question, about)) and held[cell_of(question)] < full:
                    held[cell_of(question)] += 1
                    found.append(Asked(len(found), image, scene, question))
                    break
    return found[:n]


def _is_about(question: Question, thing: Thing) -> bool:
    """Whether a question names the thing, or has it as its answer. Counts and words name no single thing: always."""
    meta = question.meta
    if question.kind in ("count", "word"):
        return True
    if question.kind == "choice":
        right = meta["choices"][meta["index"]]
        return right == thing.name or (right == thing.colour and f" {thing.shape}" in meta["question"].split("\n")[0])
    if question.kind == "box":
        return bool(meta["box"] == thing.box)
    named = {meta.get(key) for key in ("object", "subj", "obj")}
    return bool(named & {thing.name, thing.shape, f"{thing.colour} object"})


def exam_scene(seed: int, split: str, index: int) -> tuple[Scene, str]:
    """A scene of an examination split and its picture's file. The train twin asks about the tuning pictures."""
    if split == "train":
        return tune_scene(seed, index), _image_file("tune", index)
    arguments = {"word": 0.7, "novel_words": None, "flat": True, **SPLITS[split].scenes}
    return sample_scene(stream(seed, split, index), **arguments), _image_file(split, index)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _pope(folder: Path, split: str, asked: list[Asked], root: Path) -> None:
    for way in POPE_WAYS:
        rows = [item for item in asked if item.question.meta["way"] == way]
        _write_lines(
            folder / split / f"coco_pope_{way}.json",
            (
                {
                    "question_id": number + 1,
                    "image": item.image,
                    "text": item.question.text,
                    "label": item.question.answer.lower(),
                    "template": item.question.template,
                }
                for number, item in enumerate(rows)
            ),
        )


def _gqa(folder: Path, split: str, asked: list[Asked], root: Path) -> None:
    write_json(
        folder / f"{split}_balanced_questions.json",
        {
            f"{split}-{item.number:06d}": {
                "question": item.question.text,
                "imageId": item.image.removesuffix(".jpg"),
                "answer": item.question.answer,
                "isBalanced": True,
                "types": {"structural": "query", "semantic": "attr", "detailed": item.question.template},
                "groups": {"global": item.question.kind, "local": item.question.meta["object"]},
                "semantic": [],
                "template": item.question.template,
            }
            for item in asked
        },
    )


def _tallyqa(folder: Path, split: str, asked: list[Asked], root: Path) -> None:
    write_json(
        folder / f"{split}.json",
        [
            {
                "answer": int(item.question.answer),
                "data_source": "leveret",
                "image": "images/" + item.image,
                "image_id": item.number,
                "issimple": item.question.meta["simple"],
                "question": item.question.text,
                "question_id": item.number,
                "template": item.question.template,
            }
            for item in asked
        ],
    )


def _vsr(folder: Path, split: str, asked: list[Asked], root: Path) -> None:
    keys = ("caption", "label", "relation", "subj", "obj")
    _write_lines(
        folder / f"{split}.jsonl",
        (
            {"image": item.image, **{key: item.question.meta[key] for key in keys}, "template": item.question.template}
            for item in asked
        ),
    )


def _scienceqa(folder: Path, split: str, asked: list[Asked], root: Path) -> None:
    splits_file, problems_file = folder / "pid_splits.json", folder / "problems.json"
    splits = read_json(splits_file) if splits_file.exists() else {}
    problems = read_json(problems_file) if problems_file.exists() else {}
    splits[split] = []
    for item in asked:
        pid = f"{split}-{item.number:06d}"
        splits[split].append(pid)
        problems[pid] = {
            "question": item.question.meta["question"],
            "choices": item.question.meta["choices"],
            "answer": item.question.meta["index"],
            "hint": "",
            "image": "image.jpg",
            "split": split,
            "template": item.question.template,
        }
        target = folder / "images" / split / pid / "image.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((root / "images" / item.image).read_bytes())
    write_json(problems_file, problems)
    write_json(splits_file, splits)


def _refcoco(folder: Path, split: str, asked: list[Asked], root: Path) -> None:
    refs_file, instances_file = folder / "refs(unc).json", folder / "instances.json"
    refs = [ref for ref in (read_json(refs_file) if refs_file.exists() else []) if ref["split"] != split]
    instances = read_json(instances_file) if instances_file.exists() else {"images": [], "annotations": []}
    base = list(SPLITS).index(split) * 10_000_000
    keep = {ref["image_id"] for ref in refs}
    instances["images"] = [image for image in instances["images"] if image["id"] in keep]
    instances["annotations"] = [item for item in instances["annotations"] if item["image_id"] in keep]
    for item in asked:
        number = base + item.number
        x0, y0, x1, y1 = item.question.meta["box"]
        sentence = {"sent": item.question.meta["sent"], "raw": item.question.meta["sent"], "sent_id": number}
        refs.append(
            {
                "ref_id": number,
                "ann_id": number,
                "image_id": number,
                "split": split,
                "category_id": 1,
                "sentences": [sentence],
                "file_name": item.image,
                "template": item.question.template,
            }
        )
        size = {"height": item.scene.height, "width": item.scene.width}
        instances["images"].append({"id": number, "file_name": item.image, **size})
        instances["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        )
    write_json(refs_file, refs)
    write_json(instances_file, instances)


def _vizwiz(folder: Path, split: str, asked: list[Asked], root: Path) -> None:
    rows = [
        {
            "image": item.image,
            "question": item.question.meta["question"],
            "answers": [{"answer": item.question.answer.lower(), "answer_confidence": "yes"}] * 10,
            "answer_type": item.question.meta["answer_type"],
            "answerable": int(item.question.meta["answer_type"] != "unanswerable"),
            "template": item.question.template,
        }
        for item in asked
    ]
    write_json(folder / f"{split}.json", rows)


def _own(folder: Path, split: str, asked: list[Asked], root: Path) -> None:
    records = [
        {
            **_conversation_record(
                f"{split}-{item.number:06d}", [item.question], item.image and "images/" + item.image
            ),
            "template": item.question.template,
        }
        for item in asked
    ]
    _write_list(folder / f"{split}.json", records)


def _textvqa(folder: Path, split: str, asked: list[Asked], root: Path) -> None:
    rows = [
        {
            "image_id": item.image.removesuffix(".jpg"),
            "question": item.question.text,
            "question_id": item.number,
            "answers": [item.question.answer] * 10,
            "image_width": item.scene.width,
            "image_height": item.scene.height,
            "template": item.question.template,
        }
        for item in asked
    ]
    write_json(folder / f"TextVQA_0.5.1_{split}.json", {"dataset_type": split, "data": rows})


FORMS: dict[str, Callable[[Path, str, list[Asked], Path], None]] = {
    "existence": _pope,
    "colour": _gqa,
    "shape": _gqa,
    "count": _tallyqa,
    "relation": _vsr,
    "choice": _scienceqa,
    "box": _refcoco,
    "word": _textvqa,
    "unanswerable": _vizwiz,
    "double": _gqa,
    "text": _own,
    "refusal": _own,
    "caption": _own,
    "reading": _own,
}
MORE = tuple(kind for kind in FORMS if kind not in EXAMINED)
"""Examined beside the eight kinds, in the test split."""


def _more_questions(seed: int, kind: str, n: int) -> list[Asked]:
    """`n` questions of a kind beyond the eight, each about another test scene, or about none."""
    found: list[Asked] = []
    index = 0
    while len(found) < n:
        rng = stream(seed, f"test/{kind}", index)
        scene, image = exam_scene(seed, "test", index)
        index += 1
        question: Question | None = None
        if kind == "text":
            form = TEXT_FORMS[len(found) % (len(TEXT_FORMS) - 1)]  # all but the last, which is to refuse
            question, image = text_only(rng, form=form), ""
        elif kind == "refusal":
            question, image = text_only(rng, form="refuse"), ""
        elif kind == "caption":
            names = [phrase for phrase in told(scene, boxes=False).split(", ") if not phrase.startswith("the word")]
            question = Question(kind, kind, DESCRIBE, ", ".join(names))
        elif kind == "reading":
            question = Question(kind, kind, DESCRIBE, f"the word {scene.word.text}") if scene.word else None
        elif kind == "unanswerable":
            question = insufficient(scene, rng, label=len(found) % 2 == 0)
        else:
            question = KINDS[kind](scene, rng)
        if question:
            found.append(Asked(len(found), image, scene, question))
    return found


def _examination(root: str, seed: int, split: str, n: int, more: int = 0) -> None:
    """All kinds of one split: the pictures they need, then the files."""
    asked = {kind: _questions(seed, split, kind, n) for kind in EXAMINED}
    asked |= {kind: _more_questions(seed, kind, more) for kind in MORE if more}
    if split != "train":  # the train twin's pictures are the tuning pictures
        Path(root, "images", split).mkdir(parents=True, exist_ok=True)
        scenes = {item.image: item.scene for questions in asked.values() for item in questions if item.image}
        for image, scene in scenes.items():
            Path(root, "images", image).write_bytes(jpeg(render(scene), SPLITS[split].quality))
    for kind, questions in asked.items():
        FORMS[kind](Path(root, "eval", kind), split, questions, Path(root))


def _captions(root: Path, seed: int, n: int) -> None:
    """Held-out pairs that fit: what a connector's loss and a retrieval are measured on."""
    (root / "images/captions").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(n):
        scene, image = web_scene(seed, "captions", index), "images/" + _image_file("captions", index)
        (root / image).write_bytes(jpeg(render(scene)))
        caption = fitting(scene, stream(seed, "captions/words", index))
        records.append(_pair_record(f"captions-{index:06d}", image, caption))
    _write_list(root / "captions.json", records)


def same_world(root: Path, seed: int, size: WorldSize) -> dict[str, Any]:
    """What a world of this seed and size is made from. RecipeError where the folder holds, or was begun as, another."""
    parameters = {"version": VERSION, "seed": seed, **asdict(size), "diseases": asdict(STRENGTHS[size.strength])}
    for file in (root / "world.json", root / "parts" / "parameters.json"):
        if file.exists():
            there = read_json(file)
            differ = [key for key in parameters if there.get(key) != parameters[key]]
            if "version" in differ:
                differ = ["version"]  # what else differs follows from it
            elif "strength" in differ:
                differ.remove("diseases")
            if differ:
                told = ", ".join(f"{key} {there.get(key)!r} (wanted {parameters[key]!r})" for key in differ)
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

    jobs: list[tuple[Path, Callable[..., None], tuple[Any, ...], int]] = []
    for start in range(0, size.web, CHUNK):
        stop = min(start + CHUNK, size.web)
        part = root / "parts" / f"web-{start:07d}.json"
        jobs.append((part, _web_chunk, (str(root), seed, start, stop, size.strength), stop - start))
    for start in range(0, size.tune, CHUNK):
        stop = min(start + CHUNK, size.tune)
        part = root / "parts" / f"tune-{start:07d}.json"
        jobs.append((part, _tune_chunk, (str(root), seed, start, stop, size.turns, size.text_share), stop - start))
    left = [job for job in jobs if not job[0].exists()]
    workers = workers or min(os.cpu_count() or 1, 8)
    with Progress(sum(job[3] for job in left), "draw the world", "pictures") as progress:
        if workers == 1 or len(left) < 2:
            for _, function, arguments, pictures in left:
                function(*arguments)
                progress.advance(pictures)
        else:
            # spawn: the same on every system, and safe when the caller already runs threads
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                waiting = [(pool.submit(function, *arguments), pictures) for _, function, arguments, pictures in left]
                for future, pictures in waiting:
                    future.result()
                    progress.advance(pictures)

    parts = {kind: sorted((root / "parts").glob(f"{kind}-*.json")) for kind in ("web", "tune")}
    web = [read_json(path) for path in parts["web"]]
    _write_list(root / "web.json", (record for part in web for record in part["records"]))
    _write_lines(root / "web_truth.jsonl", (row for part in web for row in part["truth"]))
    tune = [record for path in parts["tune"] for record in read_json(path)["records"]]
    _write_list(root / "tune.json", shuffled(stream(seed, "tune", "order"), tune))
    _examination(str(root), seed, "train", min(size.test, size.tune // 4))
    _examination(str(root), seed, "test", size.test, more=size.harder)
    for split in HARDER:
        if size.harder:
            _examination(str(root), seed, split, size.harder)
    if size.captions:
        _captions(root, seed, size.captions)
    for path in (*parts["web"], *parts["tune"]):
        path.unlink()
    write_json(stamp, parameters)
    begun.unlink()
    (root / "parts").rmdir()
    return root


def _write_list(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A JSON list with a record a line: as readable as JSON lines, and still what LLaVA's loaders take."""
    atomic_write(path, "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
