"""MME's tree of text files, and the folder of answers that its tool reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leveret.evaluate.forms.base import Form, Item, Place, read_text
from leveret.runs import DataError

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = (*PERCEPTION, *COGNITION)

YES_OR_NO = "Please answer yes or no."
_SUFFIXES = (
    YES_OR_NO,
    "Answer the question using a single word or phrase.",
    "Answer the question directly with a short sentence or phrase.",
)


def _mme(place: Place) -> list[Item]:
    """MME: `MME_Benchmark_release_version/<subtask>/[questions_answers_YN/]<picture>.txt`, two lines a picture.

    A line is a question, a tab, and Yes or No. The pictures lie beside the text files, or in `<subtask>/images/`. Both
    questions of a picture share an id there; here they are `<subtask>/<picture>#1` and `#2`.
    """
    if place.split != "test":
        return []  # MME has one
    items = []
    shelves: dict[Path, dict[str, str]] = {}
    for path in place.files:
        apart = path.parent.name == "questions_answers_YN"
        folder = path.parent.parent if apart else path.parent
        if folder.name not in SUBTASKS:
            continue  # read-me files, and answers of an earlier run
        shelf = folder / "images" if apart else folder
        if shelf not in shelves:
            there = sorted(shelf.iterdir()) if shelf.is_dir() else []
            shelves[shelf] = {file.stem: file.name for file in there if file.suffix != ".txt"}
        name = (shelf / shelves[shelf].get(path.stem, f"{path.stem}.jpg")).relative_to(place.root).as_posix()
        for number, (question, answer) in enumerate(_pair(path), 1):
            items.append(
                Item(
                    question_id=f"{folder.name}/{path.stem}#{number}",
                    image=place.image(name),
                    prompt=place.prompt.format(question=question.replace(f" {YES_OR_NO}", "").strip()),
                    gold=answer,
                    meta={
                        "image_id": f"{folder.name}/{path.stem}",
                        "whole": f"{folder.name}/{path.stem}",
                        "group": folder.name,
                        "question": question,
                    },
                )
            )
    return items


def _pair(path: Path) -> list[tuple[str, str]]:
    """The two questions of a file, each with yes or no; DataError for anything else."""
    lines = [line.strip().split("\t") for line in read_text(path).split("\n") if line.strip()]
    pairs = [(line[0], line[-1].strip().lower()) for line in lines if len(line) == 2]
    if len(pairs) != len(lines) or sorted(answer for _, answer in pairs) != ["no", "yes"]:
        raise DataError(
            f"{path}: MME has two lines a picture, a question, a tab, and Yes in one and No in the other. "
            "Fetch the file again."
        )
    return pairs


def _core(prompt: str) -> str:
    """The bare question: without the sentences that ask for a short answer, which differ between lineages."""
    for suffix in _SUFFIXES:
        prompt = prompt.replace(suffix, " ")
    return " ".join(prompt.replace("<image>", " ").split())


def _keys(item: Item) -> tuple[str, ...]:
    return item.question_id, f"{item.meta['image_id']}\n{_core(item.meta['question'])}"


def _answer_keys(answer: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """LLaVA's ids are `<subtask>/[images/]<picture>.jpg`, the same for both questions: the prompt tells them apart."""
    parts = re.split(r"[/\\]", name)
    picture = f"{parts[0]}/{parts[-1].split('.')[0]}"
    return name, f"{picture}\n{_core(str(answer.get('prompt') or ''))}"


def _read(path: Path) -> list[dict[str, Any]] | None:
    """MME's own result folder: `<subtask>.txt`, lines `file, question, right answer, answer` with tabs between.

    A line that does not begin a record continues the answer before it, so that answers of several lines are read
    whole; MME's tool and Bunny's drop or misread them."""
    if not path.is_dir():
        return None
    records: list[dict[str, Any]] = []
    for file in sorted(path.glob("*.txt")):
        if file.stem not in SUBTASKS:
            continue
        first = len(records)
        for line in read_text(file).removesuffix("\n").split("\n"):
            cells = line.split("\t", 3)
            if len(cells) >= 3 and cells[2].strip().lower() in ("yes", "no"):
                said = cells[3] if len(cells) == 4 else ""
                records.append({"question_id": f"{file.stem}/{cells[0]}", "prompt": cells[1], "text": said})
            elif len(records) > first:
                records[-1]["text"] += f"\n{line}"
            else:
                raise DataError(f"{file}: the first line is not `file, question, right answer, answer` with tabs.")
    if not records:
        raise DataError(f"{path}: no answers. MME's folder holds a <subtask>.txt each for {', '.join(SUBTASKS)}.")
    return records


MME = {
    "mme": Form(
        _mme,
        _keys,
        _answer_keys,
        "question_id together with the prompt (both questions of a picture share an id)",
        read=_read,
    )
}
