"""Asking: one task's questions, the file where their answers gather, and the engine that they are put to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from leveret.evaluate.forms import Item
from leveret.evaluate.options import Answered, Options, chosen
from leveret.evaluate.stats import deranged
from leveret.evaluate.tasks import TaskRow
from leveret.records import IMAGE_MARK, Prediction, Turn
from leveret.runs import (
    DataError,
    Interrupted,
    Progress,
    RunFolder,
    append_jsonl,
    atomic_write,
    graceful_stop,
    read_jsonl,
    repair_jsonl,
    sha256_of,
    stop_requested,
)

if TYPE_CHECKING:
    from leveret.generate.engine import Request

OnPrediction = Callable[[Prediction], None]


class Answers(Protocol):
    """What answers requests: `generate.Engine`, or anything that calls back once per finished request."""

    def answer(
        self, requests: Sequence[Request], on_prediction: OnPrediction | None = None
    ) -> Sequence[Prediction]: ...


def _name(item: Item) -> str:
    """The picture's file name; where it lies inside the questions' file, its id there."""
    if item.image is not None and item.image.kind == "file":
        return Path(item.image.path).name
    return str(item.meta["image_id"])


class Desk:
    """One task's questions, in one of the two ways of asking, and the file where their answers gather."""

    def __init__(
        self,
        row: TaskRow,
        all_items: list[Item],
        items: list[Item],
        model: str,
        folder: Path,
        blind: bool = False,
        options: Options | None = None,
    ) -> None:
        self.row, self.blind, self.options = row, blind, options
        self.path = folder / "answers" / ("blind" if blind else "") / f"{row.id}.jsonl"
        self.swappable = True
        if blind:
            # Over all questions, so that a run with more of them later gives each the same wrong picture.
            swapped = deranged(all_items)
            self.swappable = swapped is not None
            pictures = {i.question_id: p for i, p in zip(all_items, swapped or [], strict=bool(swapped))}
            items = [replace(i, image=pictures[i.question_id]) for i in items if i.image is not None] if swapped else []
        self.items = {item.question_id: item for item in items}
        self.model = model
        self.known = {item.question_id for item in all_items}
        self.done: set[str] = set()

    def there(self) -> int:
        """How many of its questions' answers are there. A torn last line is left as it is; DataError as in `open`."""
        answers = read_jsonl(self.path) if self.path.exists() else []
        return len({str(one.get("question_id")) for one in answers if isinstance(one, dict)} & self.items.keys())

    def open(self) -> list[Item]:
        """Mend the file where a killed run tore it, read what is there; returns the questions still to be asked."""
        repair_jsonl(self.path)
        for answer in read_jsonl(self.path) if self.path.exists() else []:
            if not (isinstance(answer, dict) and isinstance(answer.get("text"), str)):
                raise DataError(
                    f"{self.path}: a line is no answer: {str(answer)[:60]!r}. Delete the file to ask again."
                )
            name = str(answer.get("question_id"))
            if name in self.done:
                raise DataError(f"{self.path}: the answer to {name!r} stands twice. Delete the file to ask again.")
            if name not in self.known or answer.get("model_id") != self.model:
                raise DataError(
                    f"{self.path}: the answer to {name!r} is of another model or of no question of {self.row.id!r}. "
                    "Delete the file to ask again, or name another folder."
                )
            self.done.add(name)
        return [item for item in self.items.values() if item.question_id not in self.done]

    def write(self, prediction: Prediction, name: str) -> None:
        item = self.items[name]
        # No path of this machine: the same questions to the same model give the same bytes wherever they lie.
        picture = item.image and [item.meta["image_id"], self.blind]
        options = self.options and self.options(item)
        way = list(options) if options else self.row.max_new_tokens
        key = sha256_of([self.row.id, name, item.prompt, picture, way, self.model])[:22]
        record: dict[str, Any] = {
            "question_id": name,
            "prompt": item.prompt,
            "text": prediction.text.strip(),  # as the official loops do; some rules compare to the letter
            "answer_id": key,
            "model_id": self.model,
            "metadata": {**prediction.meta, "image": item.image and _name(item)},
            "task": self.row.id,
        }
        append_jsonl(self.path, record | (chosen(prediction, options) if options else {}))
        self.done.add(name)

    def settle(self) -> None:
        """Put the answers in the questions' order: however often the run was stopped, the file is the same bytes."""
        if not self.path.exists():
            return
        place = {name: number for number, name in enumerate(self.items)}
        answers = sorted(read_jsonl(self.path), key=lambda answer: place.get(str(answer["question_id"]), len(place)))
        atomic_write(self.path, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))

    def answered(self) -> Answered | None:
        """What came to the questions asked; None where there was no other picture to show."""
        if not self.swappable:
            return None
        return Answered.of(read_jsonl(self.path) if self.path.exists() else [], self.items, self.options is not None)


def ask(desks: Sequence[Desk], answers: Callable[[], Answers], folder: RunFolder) -> None:
    """Put all questions of all desks to the engine in one call, so that tasks on one picture share its prefix."""
    waiting = [(desk, item) for desk in desks for item in desk.open()]
    if not waiting:
        return
    from leveret.generate import Request
    from leveret.inputs.chat import literal

    places: dict[str, tuple[Desk, str]] = {}
    requests = []
    for desk, item in waiting:
        name = f"{desk.row.id}/{item.question_id}"
        places[name] = desk, item.question_id
        mark = f"{IMAGE_MARK}\n" if item.image is not None else ""
        requests.append(
            Request(
                question_id=name,
                images=(item.image,) if item.image is not None else (),
                turns=(Turn("user", mark + literal(item.prompt)),),
                choices=desk.options and desk.options(item),
                max_new_tokens=desk.row.max_new_tokens,
            )
        )
    what = "asking with other pictures" if desks[0].blind else "asking"
    start = time.perf_counter()
    before = sum(len(desk.done) for desk in desks)
    try:
        with graceful_stop(), Progress(len(requests), what, "questions") as progress:

            def take(prediction: Prediction) -> None:
                desk, name = places[prediction.question_id]
                desk.write(prediction, name)
                progress.advance()
                if stop_requested():
                    raise Interrupted(f"Stopped; the answers so far are in {folder.path}. The same command continues.")

            answers().answer(requests, on_prediction=take)
    finally:
        answered = sum(len(desk.done) for desk in desks) - before
        folder.log(blind=desks[0].blind, answers=answered, seconds=round(time.perf_counter() - start, 3))
    left = sum(len(desk.items.keys() - desk.done) for desk in desks)
    if left:
        raise RuntimeError(f"the engine came back without {left} of {len(requests)} answers")
