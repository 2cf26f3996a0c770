"""How a drawn world lies on disk: names of pictures, and records in LLaVA's form, a record a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from leveret.records import IMAGE_MARK
from leveret.runs import atomic_write
from leveret.world.questions import Question

DESCRIBE = "Describe the image."


def web_file(index: int) -> str:
    """A web picture's path in the world's folder."""
    return f"web/{index // 1000:03d}/{index:06d}.jpg"


def image_file(split: str, index: int) -> str:
    """Any other picture's path in `images/` of the world's folder."""
    return f"{split}/{index:06d}.jpg"


def pair_record(identity: str, image: str, caption: str) -> dict[str, Any]:
    """A picture and its caption as LLaVA's pre-training file has them."""
    return {
        "id": identity,
        "image": image,
        "conversations": [
            {"from": "human", "value": f"{IMAGE_MARK}\n{DESCRIBE}"},
            {"from": "gpt", "value": caption},
        ],
    }


def conversation_record(identity: str, questions: list[Question], image: str | None) -> dict[str, Any]:
    """Questions and answers about a picture, or about none, as LLaVA's tuning file has them."""
    turns: list[dict[str, str]] = []
    for position, question in enumerate(questions):
        mark = f"{IMAGE_MARK}\n" if image and position == 0 else ""
        turns += [{"from": "human", "value": mark + question.text}, {"from": "gpt", "value": question.answer}]
    return {"id": identity, **({"image": image} if image else {}), "conversations": turns}


def lines(records: Iterable[dict[str, Any]]) -> list[str]:
    """The records as JSON, each on one line."""
    return [json.dumps(record) for record in records]


def write_lines(path: Path, rows: Iterable[str]) -> None:
    """JSON lines."""
    atomic_write(path, "".join(row + "\n" for row in rows))


def write_list(path: Path, records: Iterable[str]) -> None:
    """A JSON list with a record a line: as readable as JSON lines, and still what LLaVA's loaders take."""
    atomic_write(path, "[\n" + ",\n".join(records) + "\n]\n")
