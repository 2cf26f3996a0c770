"""Questions that a word, a phrase or a number answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from leveret.evaluate.forms.base import Form, Item, Place, asked, read_lines, read_whole
from leveret.runs import DataError


def _gqa(place: Place) -> list[Item]:
    """GQA: `{qid: {question, imageId, answer, types, groups, semantic, isBalanced}}`; only balanced ones count."""
    items = []
    for path in place.files:
        if path.suffix == ".jsonl":
            items += asked(place, path)
            continue
        for qid, record in read_whole(path).items():
            if not record.get("isBalanced", True):
                continue
            types = record.get("types") or {}
            steps = [f"{step['operation']}: {step['argument']}" for step in record.get("semantic") or []]
            items.append(
                Item(
                    question_id=str(qid),
                    image=place.image(f"{record['imageId']}.jpg"),
                    prompt=place.prompt.format(question=record["question"]),
                    gold=record.get("answer"),
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
                "group": "simple" if record.get("issimple") else "complex",
            },
        )
        for path in place.files
        for record in read_whole(path)
    ]


def _vqav2(place: Place) -> list[Item]:
    """VQAv2: `v2_OpenEnded_mscoco_<split>_questions.json` with `questions: [{question_id, image_id, question}]`, and
    beside it `v2_mscoco_<split>_annotations.json` with `annotations: [{question_id, answers, answer_type,
    question_type}]`. The test splits have no annotations."""
    items: list[Item] = []
    for path in place.files:
        if path.suffix == ".jsonl":
            items += asked(place, path, lambda name: f"{name.split('_')[1]}/{name}" if "_" in name else name)
            continue
        whole = read_whole(path)
        records, people = whole["questions"], _vqav2_people(place, path, whole)
        # Both test splits are asked about the same pictures.
        part = re.sub("^test.*", "test2015", place.split)
        for record in records:
            said = people.get(record["question_id"], {})
            picture = f"COCO_{part}_{int(record['image_id']):012d}.jpg"
            items.append(
                Item(
                    question_id=str(record["question_id"]),
                    image=place.image(f"{part}/{picture}"),
                    prompt=place.prompt.format(question=record["question"]),
                    gold=_answers(said, path, record["question_id"]) if said else None,
                    meta={
                        "image_id": picture,
                        "answer_type": said.get("answer_type", ""),
                        "question_type": said.get("question_type", ""),
                    },
                )
            )
    return items


def _vqav2_people(place: Place, path: Path, whole: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """question_id -> its annotation; {} for a test split, whose annotations are not public."""
    beside = path.with_name(f"v2_mscoco_{place.split}_annotations.json")
    if not beside.exists() and place.split.startswith("test"):
        return {}
    annotations = read_whole(beside)
    people = {record["question_id"]: record for record in annotations["annotations"]}
    asked_about = {record["question_id"] for record in whole["questions"]}
    if faults := [
        f"{len(ids)} questions stand in {file.name} alone (first {min(ids)})"
        for ids, file in ((asked_about - people.keys(), path), (people.keys() - asked_about, beside))
        if ids
    ]:
        versions = [table.get("info", {}).get("version", "unknown") for table in (whole, annotations)]
        raise DataError(
            f"{path} and {beside.name} do not belong together: {'; '.join(faults)}. Their versions are "
            f"{' and '.join(map(str, versions))}; fetch both of VQA v2.0."
        )
    return people


def _answers(record: Mapping[str, Any], path: Path, name: Any) -> list[str]:
    """The people's answers; DataError where there are none."""
    people = [str(answer["answer"]) for answer in record["answers"]]
    if not people:
        raise DataError(f"{path}: question {name} has an empty list of answers.")
    return people


TEXTVQA_VERSION = "0.5.1"


def _textvqa_records(place: Place) -> list[dict[str, Any]]:
    records = []
    for path in place.files:
        whole = read_whole(path)
        version = whole.get("dataset_version", TEXTVQA_VERSION)
        if version != TEXTVQA_VERSION:
            raise DataError(
                f"{path} is of TextVQA's version {version}; scores are published for {TEXTVQA_VERSION}, whose "
                "answers differ. Fetch TextVQA_0.5.1_<split>.json."
            )
        records += whole["data"]
    return records


def _textvqa(place: Place) -> list[Item]:
    """TextVQA: `{"data": [{image_id, question, question_id, answers[10]}]}`."""
    return _textvqa_items(place, lambda record: place.prompt.format(question=record["question"]))


def _textvqa_ocr(place: Place) -> list[Item]:
    """TextVQA as `textvqa`, and beside it the words an OCR program read: LLaVA's or Bunny's question file
    `*textvqa_val_v051_ocr.jsonl`, or `TextVQA_Rosetta_OCR_v0.2_<split>.json`.

    The question is put as in LLaVA's file: only its first letter is a capital.
    """
    words = _ocr_words(place)
    records = _textvqa_records(place)
    without = [record["question_id"] for record in records if words(record) is None]
    if without:
        raise DataError(
            f"{place.files[0].parent}: {len(without)} of {len(records)} questions (first {without[0]}) have no OCR "
            "words; the file that holds them is of another split or version."
        )
    return _textvqa_items(
        place, lambda record: place.prompt.format(question=record["question"].capitalize(), ocr=words(record))
    )


def _ocr_words(place: Place) -> Callable[[Mapping[str, Any]], str | None]:
    """A question's record -> the OCR words of its picture, joined by commas; None where the file has none for it."""
    folder = place.files[0].parent
    if files := sorted(folder.glob("*textvqa*ocr*.jsonl")):
        found = {}
        for record in read_lines(files[0]):
            lines = record["text"].split("\n")
            if len(lines) == 3 and lines[1].startswith(OCR_WORDS):
                found[str(record["question_id"]), lines[0].lower()] = lines[1].removeprefix(OCR_WORDS)
        return lambda record: found.get((str(record["image_id"]), record["question"].lower()))
    if files := sorted(folder.glob(f"TextVQA_Rosetta_OCR_v0.2_{place.split}.json")):
        tokens = {str(record["image_id"]): ", ".join(record["ocr_tokens"]) for record in read_whole(files[0])["data"]}
        return lambda record: tokens.get(str(record["image_id"]))
    raise DataError(
        f"{folder}: the task textvqa_ocr tells the model what an OCR program read, and that is in none of "
        f"*textvqa_{place.split}_v051_ocr.jsonl (LLaVA's question file) and "
        f"TextVQA_Rosetta_OCR_v0.2_{place.split}.json. Put one there, or ask and score without OCR words as textvqa."
    )


OCR_WORDS = "Reference OCR token: "


def _textvqa_items(place: Place, prompt: Callable[[Mapping[str, Any]], str]) -> list[Item]:
    records = _textvqa_records(place)
    # The official script finds the answers by (image, question in lower case): where that repeats, the last ones count.
    answers = {(record["image_id"], record["question"].lower()): record.get("answers") for record in records}
    items = []
    for record in records:
        pair = (record["image_id"], record["question"].lower())
        people = answers[pair]  # the test split has none
        if people is not None and len(people) != 10:
            raise DataError(f"{place.files[0]}: question {record['question_id']} has {len(people)} answers, not ten.")
        items.append(
            Item(
                question_id=str(record["question_id"]),
                image=place.image(f"{record['image_id']}.jpg"),
                prompt=prompt(record),
                gold=people,
                template=record.get("template", ""),
                meta={"image_id": str(record["image_id"]), "question": record["question"].lower()},
            )
        )
    return items


def _vizwiz(place: Place) -> list[Item]:
    """VizWiz: `[{image, question, answers: [{answer, answer_confidence}], answer_type, answerable}]`; the id is the
    question's number from 0 (as in LLaVA's and Bunny's question files). The test split has no answers."""
    if place.files[0].suffix == ".jsonl":
        return [item for path in place.files for item in asked(place, path)]
    records = [record for path in place.files for record in read_whole(path)]
    return [
        Item(
            question_id=str(number),
            image=place.image(record["image"]),
            prompt=place.prompt.format(question=record["question"]),
            gold=_answers(record, place.files[0], number) if "answers" in record else None,
            template=record.get("template", ""),
            meta={
                "image_id": record["image"],
                "answer_type": record.get("answer_type", ""),
                "answerable": record.get("answerable", record.get("answer_type") != "unanswerable"),
            },
        )
        for number, record in enumerate(records)
    ]


def _vizwiz_keys(item: Item) -> tuple[str, ...]:
    # What is submitted names the picture instead.
    return item.question_id, item.meta["image_id"]


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
    question = textvqa_question(str(answer.get("prompt") or ""))
    return (name,) if question is None else (f"image {name}\n{question}", f"question {name}\n{question}")


# A submitted file says `answer`, Prismatic's results say `model_output`.
_SUBMITTED = ("answer", "model_output")
_TEXTVQA_IDENTITY = "question_id, or the image's id together with the question in the prompt"

WORDS = {
    "gqa": Form(_gqa, texts=_SUBMITTED),
    "tally_qa": Form(_tallyqa, texts=_SUBMITTED),
    "vqav2": Form(_vqav2, texts=_SUBMITTED),
    "vizwiz": Form(
        _vizwiz,
        _vizwiz_keys,
        identity="question_id (the question's number from 0), or image",
        ids=("image",),
        texts=_SUBMITTED,
    ),
    "textvqa": Form(_textvqa, _textvqa_keys, _textvqa_answer_keys, _TEXTVQA_IDENTITY, texts=_SUBMITTED),
    "textvqa_ocr": Form(_textvqa_ocr, _textvqa_keys, _textvqa_answer_keys, _TEXTVQA_IDENTITY, texts=_SUBMITTED),
}
