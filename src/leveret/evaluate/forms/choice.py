"""Questions with options, answered by a letter."""

from __future__ import annotations

from leveret.evaluate.forms.base import Form, Item, Place
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
                    meta={"image_id": name or f"text/{pid}", "choices": len(record["choices"])},
                )
            )
    return items


CHOICE = {"scienceqa": Form(_scienceqa, identity="question_id (the problem's id)")}
