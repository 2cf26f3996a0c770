"""Questions that a word, a phrase or a number answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from leveret.evaluate.forms.base import Form, Item, Place
from leveret.runs import DataError, read_json


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


WORDS = {
    "gqa": Form(_gqa),
    "tally_qa": Form(_tallyqa),
    "vizwiz": Form(_vizwiz, identity="question_id (the question's number from 0)"),
    "textvqa": Form(
        _textvqa,
        _textvqa_keys,
        _textvqa_answer_keys,
        "question_id, or the image's id together with the question in the prompt",
    ),
}
