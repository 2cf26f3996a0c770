"""Loaders of the benchmarks' own files: one row per official form, each giving the same `Item`.

A loader reads the files as their authors publish them (sources: the repositories named in each docstring) and gives
every question an id that is unique in its task. Where official ids repeat, or where answer files of the field use
another id, the row says so in `keys` (what a question is known by) and `answer_keys` (what an answer may name).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from leveret.pool import open_source
from leveret.records import IMAGE_MARK, ImageRef
from leveret.runs import DataError, read_json

LETTERS = "ABCDE"
"""ScienceQA's letters; choices beyond the fifth cannot be answered (eval_science_qa.py)."""

POPE_CATEGORIES = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""What LLaVA's and Bunny's question files add to the ids, which restart in each of POPE's three files."""

REFCOCO_SETS = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg"}
"""Folder of the refer repository -> name of the set, as Prismatic's index writes it."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark.

    question_id  unique in its task.
    image        None for a question without a picture.
    prompt       the user's words, without the image mark.
    gold         the right answer in the form's own terms (text, integer, letter, box, ten texts).
    template     the wording's name, for the best constant answer per wording; "" where the file names none.
    meta         `image_id` (questions of one picture are one cluster), `group` (the part a headline averages over),
                 and what the official summary needs.
    """

    question_id: str
    image: ImageRef | None
    prompt: str
    gold: Any
    template: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a form's files are and how their questions are put.

    files   the files found, sorted by path.
    root    the folder that image names are relative to, once `images` is put before them.
    images  folder under `root`, "" for root itself.
    split   the split's official name, for files that hold several.
    prompt  a template over the form's fields.
    """

    files: tuple[Path, ...]
    root: Path
    images: str
    split: str
    prompt: str

    def image(self, name: str) -> ImageRef:
        """The picture called `name`; DataError when the name leads out of the image folder."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not name:
            raise DataError(
                f"{self.files[0]}: image {name!r} leads out of the image folder {self.root / self.images}. "
                "Image names must be relative and without '..'."
            )
        return ImageRef(str(self.root / self.images / name))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a published file; DataError names the first line that is not one (a torn last line too)."""
    records = []
    # Not splitlines: it also cuts at line separators that stand inside JSON strings.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as fault:
            raise DataError(f"{path}, line {number} is not JSON: {fault}. Fetch the file again.") from None
    return records


def _pope(place: Place) -> list[Item]:
    """POPE: JSON lines `question_id, image, text, label`, one file per category (RUCAIBox/POPE, commit e3e39262)."""
    items = []
    for path in place.files:
        category = path.stem.rsplit("_", 1)[-1]
        if category not in POPE_CATEGORIES:
            raise DataError(
                f"{path}: POPE has the categories {', '.join(POPE_CATEGORIES)}, the file's name ends in {category!r}."
            )
        for record in read_lines(path):
            raw = int(record["question_id"])
            items.append(
                Item(
                    question_id=str(raw + POPE_CATEGORIES[category]),
                    image=place.image(record["image"]),
                    prompt=place.prompt.format(question=record["text"]),
                    # The official script reads every label that is not "no" as yes.
                    gold="no" if record["label"] == "no" else "yes",
                    template=record.get("template", ""),
                    meta={"image_id": record["image"], "group": category, "raw_id": str(raw)},
                )
            )
    missing = [category for category in POPE_CATEGORIES if not any(i.meta["group"] == category for i in items)]
    if missing:
        raise DataError(
            f"{place.files[0].parent}: POPE's score is over its three files; missing coco_pope_"
            f"{', coco_pope_'.join(f'{category}.json' for category in missing)}."
        )
    return items


def _pope_keys(item: Item) -> tuple[str, ...]:
    return item.question_id, f"{item.meta['group']}/{item.meta['raw_id']}", f"raw/{item.meta['raw_id']}"


def _pope_answer_keys(answer: Mapping[str, Any], name: str) -> tuple[str, ...]:
    category = answer.get("category")
    return ((f"{category}/{name}",) if category else ()) + (name, f"raw/{name}")


def _gqa(place: Place) -> list[Item]:
    """GQA: `{qid: {question, imageId, answer, types, groups, semantic, isBalanced}}`; only balanced ones count."""
    items = []
    for path in place.files:
        for qid, record in read_json(path).items():
            if not record.get("isBalanced", True):
                continue
            types = record.get("types") or {}
            steps = [f"{step['operation']}: {step['argument']}" for step in record.get("semantic") or []]
            items.append(
                Item(
                    question_id=str(qid),
                    image=place.image(f"{record['imageId']}.jpg"),
                    prompt=place.prompt.format(question=record["question"]),
                    gold=record["answer"],
                    template=record.get("template", ""),
                    meta={
                        "image_id": str(record["imageId"]),
                        "structural": types.get("structural") or "",
                        "semantic": types.get("semantic") or "",
                        "global": (record.get("groups") or {}).get("global"),
                        # Steps that only name the answer are not steps of reasoning (GQA's eval.py).
                        "steps": sum(not re.search("exist|query: name|choose name", step) for step in steps),
                        "words": len(record["question"].split()),
                    },
                )
            )
    return items


def _tallyqa(place: Place) -> list[Item]:
    """TallyQA: `[{answer, data_source, image, image_id, issimple, question, question_id}]`."""
    return [
        Item(
            question_id=str(record["question_id"]),
            image=place.image(record["image"]),
            prompt=place.prompt.format(question=record["question"]),
            gold=int(record["answer"]),
            template=record.get("template", ""),
            meta={
                "image_id": record["image"],
                "data_source": record.get("data_source", ""),
                "issimple": bool(record.get("issimple")),
            },
        )
        for path in place.files
        for record in read_json(path)
    ]


def _vsr(place: Place) -> list[Item]:
    """VSR: JSON lines `image, caption, label`; the id is the line's number from 0 (as in Prismatic's index)."""
    records = [record for path in place.files for record in read_lines(path)]
    return [
        Item(
            question_id=str(number),
            image=place.image(record["image"]),
            prompt=place.prompt.format(caption=record["caption"]),
            gold=bool(record["label"]),
            template=record.get("template", ""),
            meta={"image_id": record["image"], "relation": record.get("relation", "")},
        )
        for number, record in enumerate(records)
    ]


def _scienceqa(place: Place) -> list[Item]:
    """ScienceQA: `problems.json` {pid: {question, choices, answer, hint, image, split}} and `pid_splits.json`."""
    items = []
    for path in place.files:
        problems, splits = read_json(path), read_json(path.with_name("pid_splits.json"))
        if place.split not in splits:
            raise DataError(f"{path.with_name('pid_splits.json')}: no split {place.split!r}; it has {list(splits)}.")
        for pid in splits[place.split]:
            record = problems[pid]
            options = "\n".join(f"{LETTERS[k]}. {choice}" for k, choice in enumerate(record["choices"][: len(LETTERS)]))
            hint = record.get("hint") or ""
            name = f"{place.split}/{pid}/{record['image']}" if record.get("image") else None
            items.append(
                Item(
                    question_id=str(pid),
                    image=place.image(name) if name else None,
                    prompt=place.prompt.format(
                        context=f"Context: {hint}\n" if hint else "", question=record["question"], options=options
                    ),
                    gold=int(record["answer"]),
                    template=record.get("template", ""),
                    meta={"image_id": name or f"text/{pid}", "choices": len(record["choices"])},
                )
            )
    return items


def box_of(bbox: Sequence[float], width: float, height: float) -> list[float]:
    """xywh in pixels -> [x0, y0, x1, y1] in 0..1, each rounded to two decimals (Prismatic's box_xywh2xyxy)."""
    x, y, w, h = bbox
    return [round(x / width, 2), round(y / height, 2), round((x + w) / width, 2), round((y + h) / height, 2)]


def _refcoco(place: Place) -> list[Item]:
    """RefCOCO: `refs(unc|umd).json` (the refer repository's list, which it pickles) and COCO's `instances.json`.

    One item per sentence, with the id `<set>-<ref_id>-<sent_id>` of Prismatic's index; a folder that is none of the
    three official sets is a set under its own name. Prismatic's index (`metadata-full.json`, one entry per sentence
    with the box already normalised) is read too.
    """
    items = []
    for path in place.files:
        if path.name.startswith("metadata"):
            items += _prismatic_index(place, path)
            continue
        instances = read_json(path.with_name("instances.json"))
        images = {image["id"]: image for image in instances["images"]}
        boxes = {annotation["id"]: annotation["bbox"] for annotation in instances["annotations"]}
        name = REFCOCO_SETS.get(path.parent.name, path.parent.name)
        for ref in read_json(path):
            if ref["split"] != place.split:
                continue
            picture = images[ref["image_id"]]
            gold = box_of(boxes[ref["ann_id"]], picture["width"], picture["height"])
            for sentence in ref["sentences"]:
                items.append(
                    Item(
                        question_id=f"{name}-{ref['ref_id']}-{sentence['sent_id']}",
                        # The picture's own name: a ref's file_name carries the annotation's number at its end.
                        image=place.image(picture["file_name"]),
                        prompt=place.prompt.format(sent=sentence["sent"]),
                        gold=gold,
                        template=sentence.get("template", ref.get("template", "")),
                        meta={"image_id": picture["file_name"], "group": name},
                    )
                )
    return items


def _prismatic_index(place: Place, path: Path) -> list[Item]:
    return [
        Item(
            question_id=str(entry["example_id"]),
            image=place.image(PurePosixPath(entry["img_path"]).name),
            prompt=place.prompt.format(sent=entry["ref_expression"]),
            gold=list(entry["bbox"]),
            meta={"image_id": PurePosixPath(entry["img_path"]).name, "group": entry["refer_dataset"]},
        )
        for entry in read_json(path).values()
        if entry["split"] == place.split
    ]


def _textvqa(place: Place) -> list[Item]:
    """TextVQA: `{"data": [{image_id, question, question_id, answers[10]}]}`."""
    records = [record for path in place.files for record in read_json(path)["data"]]
    # The official script finds the answers by (image, question in lower case): where that repeats, the last ones count.
    answers = {(record["image_id"], record["question"].lower()): record["answers"] for record in records}
    items = []
    for record in records:
        pair = (record["image_id"], record["question"].lower())
        if len(answers[pair]) != 10:
            raise DataError(
                f"{place.files[0]}: question {record['question_id']} has {len(answers[pair])} answers, not ten."
            )
        items.append(
            Item(
                question_id=str(record["question_id"]),
                image=place.image(f"{record['image_id']}.jpg"),
                prompt=place.prompt.format(question=record["question"]),
                gold=answers[pair],
                template=record.get("template", ""),
                meta={"image_id": str(record["image_id"]), "question": record["question"].lower()},
            )
        )
    return items


def _vizwiz(place: Place) -> list[Item]:
    """VizWiz: `[{image, question, answers: [{answer, answer_confidence}], answer_type, answerable}]`; the id is the
    question's number from 0 (as in LLaVA's and Bunny's question files)."""
    records = [record for path in place.files for record in read_json(path)]
    return [
        Item(
            question_id=str(number),
            image=place.image(record["image"]),
            prompt=place.prompt.format(question=record["question"]),
            gold=[answer["answer"] for answer in record["answers"]],
            template=record.get("template", ""),
            meta={"image_id": record["image"], "answer_type": record.get("answer_type", "")},
        )
        for number, record in enumerate(records)
    ]


def _own(place: Place) -> list[Item]:
    """Your own questions in LLaVA's form: each user turn is asked by itself, its answer is the turn that follows."""
    items = []
    for path in place.files:
        source = open_source(path, place.root / place.images)
        for index in range(len(source)):
            sample = source.sample(index)
            if len(sample.images) > 1:
                raise DataError(f"{path}, sample {index} ({sample.id}): {len(sample.images)} pictures; allowed is one.")
            image = sample.images[0] if sample.images else None
            turns = [turn for turn in sample.turns if turn.role != "system"]
            for number, (asked, said) in enumerate(zip(turns[::2], turns[1::2], strict=False)):
                items.append(
                    Item(
                        question_id=sample.id if not number else f"{sample.id}#{number}",
                        image=image,
                        prompt=place.prompt.format(question=asked.text.replace(IMAGE_MARK, "").strip()),
                        gold=said.text.strip(),
                        template=str(sample.meta.get("template", "")),
                        meta={"image_id": source.root.name(image) if image else f"text/{sample.id}"},
                    )
                )
    return items


def _textvqa_keys(item: Item) -> tuple[str, ...]:
    image, question = item.meta["image_id"], item.meta["question"]
    return item.question_id, f"image {image}\n{question}", f"question {item.question_id}\n{question}"


def textvqa_question(prompt: str) -> str | None:
    """The question inside an answer file's prompt, in lower case, by the rules of eval_textvqa.py; None: not found."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return match.group(1).lower() if match else None
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


def _textvqa_answer_keys(answer: Mapping[str, Any], name: str) -> tuple[str, ...]:
    # In LLaVA's answer files the question_id is the image's id, and the question stands in the prompt. Where a prompt
    # is there it must agree: an image's id may well be the id of another question.
    question = textvqa_question(answer.get("prompt") or "")
    return (name,) if question is None else (f"image {name}\n{question}", f"question {name}\n{question}")


def _id(item: Item) -> tuple[str, ...]:
    return (item.question_id,)


def _answer_id(answer: Mapping[str, Any], name: str) -> tuple[str, ...]:
    return (name,)


@dataclass(frozen=True, slots=True)
class Form:
    """One official file form.

    load         files -> items.
    keys         names a question goes by, its own id first; a name that two questions share names neither.
    answer_keys  names an answer may mean, the likeliest first.
    identity     the key of an answer in words, for messages.
    """

    load: Callable[[Place], list[Item]]
    keys: Callable[[Item], tuple[str, ...]] = _id
    answer_keys: Callable[[Mapping[str, Any], str], tuple[str, ...]] = _answer_id
    identity: str = "question_id"


FORMS: dict[str, Form] = {
    "pope": Form(
        _pope,
        _pope_keys,
        _pope_answer_keys,
        "question_id (random + 10000000, popular + 20000000, as in LLaVA's question file), or category and question_id",
    ),
    "gqa": Form(_gqa),
    "tallyqa": Form(_tallyqa),
    "vsr": Form(_vsr, identity="example_id (the line's number from 0)"),
    "scienceqa": Form(_scienceqa, identity="question_id (the problem's id)"),
    "refcoco": Form(_refcoco, identity="example_id (<set>-<ref_id>-<sent_id>)"),
    "vizwiz": Form(_vizwiz, identity="question_id (the question's number from 0)"),
    "own": Form(_own),
    "textvqa": Form(
        _textvqa,
        _textvqa_keys,
        _textvqa_answer_keys,
        "question_id, or the image's id together with the question in the prompt",
    ),
}


def check_ids(items: Iterable[Item], where: str) -> None:
    """DataError when two questions of one task share an id: answers could not be told apart."""
    repeated = [name for name, count in Counter(item.question_id for item in items).items() if count > 1]
    if repeated:
        raise DataError(
            f"{where}: {len(repeated)} question ids occur more than once, first {repeated[0]!r}. "
            "Answers are joined by id, so each must be unique."
        )
