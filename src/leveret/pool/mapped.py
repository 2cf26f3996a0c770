"""JSON lists of questions and answers (LRV-Instruction, Alpaca and their like), read as conversations.

    {"image_id": "2392588", "question": "Is there a teapot?", "answer": "No.", "task": "negative"}

with  user: "{question}"  assistant: "{answer}"  id: "{image_id}"  image: "lrv/lrv-vg/{image_id}.jpg".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leveret.pool.llava import LlavaSource, Refuse, parsed
from leveret.records import IMAGE_MARK

_KEY = re.compile(r"\{([^{}]+)\}")


class MappedSource(LlavaSource):
    """Records of a JSON list, each made a conversation of one question and one answer.

    user, assistant, id, image  texts in which {key} stands for the record's value. Values are stripped of blanks at
    their ends, as Prismatic strips them. What no text names travels in `Sample.meta`. Without `id` it is the record's
    own, or its number.
    """

    def __init__(
        self,
        path: Path,
        images: str | Path | None = None,
        *,
        user: str,
        assistant: str,
        id: str | None = None,
        image: str | None = None,
    ) -> None:
        texts = {"id": id, "user": user, "assistant": assistant, "image": image}
        self._texts = {name: text for name, text in texts.items() if text is not None}
        self._used = {key for text in self._texts.values() for key in _KEY.findall(text)}
        super().__init__(path, images)

    def _record(self, recorded: bytes, refuse: Refuse) -> dict[str, Any]:
        record = parsed(recorded, refuse)
        said = {name: _filled(text, record, refuse) for name, text in self._texts.items()}
        mark = f"{IMAGE_MARK}\n" if "image" in said else ""
        made: dict[str, Any] = {key: value for key, value in record.items() if key not in self._used}
        made |= {key: said[key] for key in ("id", "image") if key in said}
        made["conversations"] = [
            {"from": "human", "value": mark + said["user"].replace(IMAGE_MARK, "").strip()},
            {"from": "gpt", "value": said["assistant"]},
        ]
        return made


def _filled(text: str, record: Mapping[str, Any], refuse: Refuse) -> str:
    def value(found: re.Match[str]) -> str:
        if found[1] not in record:
            raise refuse("record lacks a key", f"{found[1]}; it has {', '.join(map(ascii, list(record)[:8]))}")
        given = record[found[1]]
        if isinstance(given, bool) or not isinstance(given, (str, int, float)):
            raise refuse("record's value is not text", f"{found[1]} is {type(given).__name__}")
        return str(given).strip()

    return _KEY.sub(value, text)
