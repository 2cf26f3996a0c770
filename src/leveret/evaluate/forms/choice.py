"""Questions with options, answered by a letter."""

from __future__ import annotations

from leveret.evaluate.forms.base import Form, Item, Place
from leveret.evaluate.forms.mmbench import MMBENCH
from leveret.evaluate.forms.mmmu import MMMU
from leveret.runs import DataError, read_json

LETTERS = "ABCDE"
"""ScienceQA's letters; choices beyond the fifth cannot be answered (eval_science_qa.py)."""


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
                    meta={
                        "image_id": name or f"text/{pid}",
                        "choices": len(record["choices"]),
                        "texts": dict(zip("ABCDEFGH", map(str, record["choices"]), strict=False)),
                    },
                )
            )
    return items


def _seed_bench(place: Place) -> list[Item]:
    """SEED-Bench: `{"questions": [{question_id, question, choice_a .. choice_d, answer, data_id, data_type,
    question_type_id}], "question_type": {name: id}}`.

    A video question is asked about one frame: `SEED-Bench-video-image/<type>_<question_id>.png`, which Bunny's
    extract_video_frames.py writes, or else `<data_id>.png`. The splits `image` and `video` are the two halves.
    """
    items = []
    for path in place.files:
        record = read_json(path)
        types = {number: name for name, number in record["question_type"].items()}
        for question in record["questions"]:
            kind, name, number = question["data_type"], str(question["question_id"]), question["question_type_id"]
            if place.split not in ("all", kind):
                continue
            picture = f"SEED-Bench-image/{question['data_id']}"
            if kind == "video":
                frames = (f"{number}_{name}.png", f"{question['data_id'].rsplit('/')[-1]}.png")
                there = [f for f in frames if (place.root / place.images / "SEED-Bench-video-image" / f).is_file()]
                picture = f"SEED-Bench-video-image/{(there or frames)[0]}"
            options = {letter: str(question[f"choice_{letter.lower()}"]) for letter in "ABCD"}
            items.append(
                Item(
                    question_id=name,
                    image=place.image(picture),
                    prompt=place.prompt.format(
                        question=question["question"],
                        options="\n".join(f"{letter}. {option}" for letter, option in options.items()),
                    ),
                    gold=question.get("answer"),
                    # Questions on one picture or one video fail together.
                    meta={"image_id": f"{kind}/{question['data_id']}", "kind": kind, "type": types[number],
                          "type_id": number, "texts": options},
                )
            )  # fmt: skip
    return items


def _ai2d(place: Place) -> list[Item]:
    """AI2D: `questions/<n>.png.json` {imageName, questions: {text: {answerTexts, correctAnswer, questionId}}} and
    `ai2d_test_ids.csv` (a picture's number a line).

    Questions of the pictures that the csv names are `test`, all others `val` (as in Prismatic's index of all 15,501).
    """
    listed = place.root / "ai2d_test_ids.csv"
    if not listed.is_file():
        raise DataError(f"{listed} is not there: it tells which of AI2D's pictures are the test set.")
    test = {line.split(",")[0].strip() for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    items = []
    for path in place.files:
        record = read_json(path)
        part = "test" if path.name.split(".")[0] in test else "val"
        if place.split not in ("all", part):
            continue
        for text, question in record["questions"].items():
            options = dict(zip("ABCDEFGH", map(str, question["answerTexts"]), strict=False))
            items.append(
                Item(
                    question_id=str(question["questionId"]),
                    image=place.image(record["imageName"]),
                    prompt=place.prompt.format(
                        question=text, options="\n".join(f"{letter}. {option}" for letter, option in options.items())
                    ),
                    gold=int(question["correctAnswer"]),
                    meta={"image_id": record["imageName"], "group": part, "texts": options},
                )
            )
    return items


CHOICE = {
    "scienceqa": Form(_scienceqa, identity="question_id (the problem's id)"),
    "seed_bench": Form(_seed_bench),
    "ai2d": Form(_ai2d, identity="questionId"),
    **MMBENCH,
    **MMMU,
}
