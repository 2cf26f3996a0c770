"""The examination of a drawn world: which scenes, which questions, in which benchmark's official form.

Each kind of question has one official form (`FORMS`) and one folder; a split (`SPLITS`) says where its scenes come
from. A kind's files are written for all its splits in turn, for some forms keep every split in one file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leveret.runs import read_json, write_json
from leveret.world.draw import jpeg, render
from leveret.world.layout import DESCRIBE, conversation_record, image_file, lines, write_lines, write_list
from leveret.world.questions import (
    EXAMINED,
    KINDS,
    POPE_WAYS,
    REFUSE,
    TEXT_FORMS,
    Question,
    insufficient,
    text_only,
    told,
)
from leveret.world.scenes import PAIRS, USUAL, Frames, Scene, Thing, sample_scene, stream, tune_scene


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
class Asked:
    """A question of the examination and the picture it is about: `images/` + image, of the split's scene `index`."""

    number: int
    index: int
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


def _questions(seed: int, split: str, kind: str, n: int, frames: Frames) -> list[Asked]:
    """`n` questions of one kind, at most one (existence: a yes and a no) a scene."""
    found: list[Asked] = []
    index = 0
    cells, cell_of = CELLS[kind] if split == "test" and kind in CELLS else (1, lambda question: 0)
    full, held = -(-n // cells), Counter[Any]()
    while len(found) < n:
        rng = stream(seed, f"{split}/{kind}", index)
        scene, image = exam_scene(seed, split, index, frames)
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
                    found.append(Asked(len(found), index - 1, image, scene, question))
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


def exam_scene(seed: int, split: str, index: int, frames: Frames = USUAL) -> tuple[Scene, str]:
    """A scene of an examination split and its picture's file. The train twin asks about the tuning pictures; `frames`
    are those of a split that says nothing of its own."""
    if split == "train":
        return tune_scene(seed, index, frames), image_file("tune", index)
    arguments = {"word": 0.7, "novel_words": None, "flat": True, "frames": frames, **SPLITS[split].scenes}
    return sample_scene(stream(seed, split, index), **arguments), image_file(split, index)


def _more_questions(seed: int, kind: str, n: int, frames: Frames) -> list[Asked]:
    """`n` questions of a kind beyond the eight, each about another test scene, or about none."""
    found: list[Asked] = []
    index = 0
    while len(found) < n:
        rng = stream(seed, f"test/{kind}", index)
        scene, image = exam_scene(seed, "test", index, frames)
        index += 1
        question: Question | None = None
        if kind == "text":
            form = TEXT_FORMS[len(found) % (len(TEXT_FORMS) - 1)]  # all but the last, which is to refuse
            question, image = text_only(rng, form=form), ""
        elif kind == "refusal":
            question, image = text_only(rng, form=REFUSE), ""
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
            found.append(Asked(len(found), index - 1, image, scene, question))
    return found


def picture(scene: Scene, split: str) -> bytes:
    """The JPEG of a scene in a split."""
    return jpeg(render(scene), SPLITS[split].quality)


# --- the official forms, a writer each: the kind's folder, the split, its questions -----------------------------------


def _pope(folder: Path, split: str, asked: list[Asked]) -> None:
    for way in POPE_WAYS:
        rows = [item for item in asked if item.question.meta["way"] == way]
        write_lines(
            folder / split / f"coco_pope_{way}.json",
            lines(
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


def _gqa(folder: Path, split: str, asked: list[Asked]) -> None:
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


def _tallyqa(folder: Path, split: str, asked: list[Asked]) -> None:
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


def _vsr(folder: Path, split: str, asked: list[Asked]) -> None:
    keys = ("caption", "label", "relation", "subj", "obj")
    write_lines(
        folder / f"{split}.jsonl",
        lines(
            {"image": item.image, **{key: item.question.meta[key] for key in keys}, "template": item.question.template}
            for item in asked
        ),
    )


def _scienceqa(folder: Path, split: str, asked: list[Asked]) -> None:
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
        target.write_bytes(picture(item.scene, split))
    write_json(problems_file, problems)
    write_json(splits_file, splits)


def _refcoco(folder: Path, split: str, asked: list[Asked]) -> None:
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


def _vizwiz(folder: Path, split: str, asked: list[Asked]) -> None:
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


def _own(folder: Path, split: str, asked: list[Asked]) -> None:
    records = [
        {
            **conversation_record(f"{split}-{item.number:06d}", [item.question], item.image and "images/" + item.image),
            "template": item.question.template,
        }
        for item in asked
    ]
    write_list(folder / f"{split}.json", lines(records))


def _textvqa(folder: Path, split: str, asked: list[Asked]) -> None:
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


FORMS: dict[str, Callable[[Path, str, list[Asked]], None]] = {
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


def ask(seed: int, split: str, kind: str, n: int, frames: Frames = USUAL) -> list[Asked]:
    """`n` questions of a kind in a split; the kinds beyond the eight (`MORE`) are asked in the split `test`."""
    if kind in EXAMINED:
        return _questions(seed, split, kind, n, frames)
    assert split == "test", f"{kind} is asked in the test split"
    return _more_questions(seed, kind, n, frames)


def write_kind(
    root: Path, seed: int, kind: str, counts: Mapping[str, int], frames: Frames = USUAL
) -> dict[str, list[int]]:
    """Writes a kind's questions, so many a split, into `root/eval/KIND`.

    Returns by split the scenes that they are about: their pictures (`write_pictures`) are shared by the kinds.
    """
    scenes = {}
    for split, n in counts.items():
        asked = ask(seed, split, kind, n, frames)
        FORMS[kind](root / "eval" / kind, split, asked)
        scenes[split] = sorted({item.index for item in asked if item.image})
    return scenes


def write_pictures(root: Path, seed: int, split: str, scenes: Iterable[int], frames: Frames = USUAL) -> None:
    """Draws the scenes of a split into `root/images`; the train twin's are there, they are the tuning pictures."""
    if split == "train":
        return
    (root / "images" / split).mkdir(parents=True, exist_ok=True)
    for index in scenes:
        scene, image = exam_scene(seed, split, index, frames)
        (root / "images" / image).write_bytes(picture(scene, split))
