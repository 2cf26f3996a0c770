"""Questions whose answers a language model judges: MM-Vet, LLaVA-Bench in the wild."""

from __future__ import annotations

from typing import Any

from leveret.evaluate.forms.base import Form, Item, Place, read_lines
from leveret.runs import DataError, read_json


def _mm_vet(place: Place) -> list[Item]:
    """MM-Vet: `mm-vet.json` {v1_0: {imagename, question, answer, capability}}."""
    items = []
    for path in place.files:
        for name, record in read_json(path).items():
            if not record["capability"] or isinstance(record["capability"], str):
                raise DataError(f"{path}, question {name!r}: `capability` must be a list that names at least one.")
            items.append(
                Item(
                    question_id=str(name),
                    image=place.image(record["imagename"]),
                    prompt=place.prompt.format(question=record["question"]),
                    gold=str(record["answer"]),
                    meta={
                        "image_id": record["imagename"],
                        "question": record["question"],
                        "capability": tuple(map(str, record["capability"])),
                    },
                )
            )
    return items


def _mm_vet_keys(item: Item) -> tuple[str, ...]:
    """Bunny's and LLaVA's question files say 0 for v1_0 (convert_mmvet_for_eval.py puts the `v1_` before it)."""
    bare = item.question_id.removeprefix("v1_")
    return (item.question_id, bare) if bare != item.question_id else (item.question_id,)


def _llava_bench(place: Place) -> list[Item]:
    """LLaVA-Bench in the wild: `questions.jsonl`, and beside it `context.jsonl` and `answers_gpt4.jsonl`.

    Captions are joined by the picture's name and reference answers by question_id, where the original reads its files
    side by side."""
    items = []
    for path in place.files:
        questions = read_lines(path)
        captions = _by(path.with_name("context.jsonl"), "image")
        references = _by(path.with_name("answers_gpt4.jsonl"), "question_id")
        for what, key, there in (("caption", "image", captions), ("reference answer", "question_id", references)):
            lacking = [record for record in questions if str(record[key]) not in there]
            if lacking:
                raise DataError(
                    f"{path}: {len(lacking)} of {len(questions)} questions have no {what}, first question "
                    f"{lacking[0]['question_id']!r} ({key} {lacking[0][key]!r}). Fetch the three files again together."
                )
        for record in questions:
            name, caption = str(record["question_id"]), captions[str(record["image"])]["caption"]
            reference = references[name]
            items.append(
                Item(
                    question_id=name,
                    image=place.image(record["image"]),
                    prompt=place.prompt.format(question=record["text"]),
                    gold=str(reference["text"]),
                    meta={
                        "image_id": record["image"],
                        "question": record["text"],
                        "category": record["category"],
                        "caption": "\n".join(caption) if isinstance(caption, list) else str(caption),
                        "number": record["question_id"],
                        "reference_id": reference.get("answer_id", reference["question_id"]),
                    },
                )
            )
    return items


def _by(path: Any, key: str) -> dict[str, dict[str, Any]]:
    """The lines of a file by one of their fields; DataError where the file is not there, or two lines share it."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; LLaVA-Bench in the wild has it beside questions.jsonl.")
    found: dict[str, dict[str, Any]] = {}
    for record in read_lines(path):
        if str(record[key]) in found:
            raise DataError(f"{path}: {key} {record[key]!r} occurs more than once; which one is meant cannot be told.")
        found[str(record[key])] = record
    return found


JUDGED = {
    "mm_vet": Form(_mm_vet, keys=_mm_vet_keys, identity="question_id (v1_0, or 0 as in Bunny's file)"),
    "llava_bench_w": Form(_llava_bench),
}
