"""LLaVA's form: a JSON list (or one record a line) of conversations, beside a folder of images.

    {"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                         {"from": "gpt", "value": "A cat."}]}

`image` may be a list of paths, null, or absent (a text-only dialogue). Every other key travels in `Sample.meta`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leveret.images import Root
from leveret.pool import jsonfile
from leveret.pool.base import SampleFault, Source
from leveret.records import Role, Sample, Turn

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""What `from` may say."""

OWN = ("id", "image", "conversations")
"""What every record of this form says; never in `Sample.meta`."""

SAID: dict[Role, str] = {"user": "human", "assistant": "gpt", "system": "system"}
"""What `from` says where we write."""

Refuse = Callable[..., SampleFault]
"""Makes the fault of the record in hand from a reason and a detail."""


class LlavaSource(Source):
    """Records of a LLaVA file. Opening it reads it once; a record is read again when it is asked for."""

    def __init__(self, path: Path, images: str | Path | None = None) -> None:
        """`images`: the folder that image paths start from; the file's own folder by default."""
        super().__init__(path, Root(images if images is not None else path.parent))
        self._spans = jsonfile.index(path)

    def __len__(self) -> int:
        return len(self._spans)

    def _draft(self, index: int) -> Sample:
        def refuse(reason: str, detail: str = "") -> SampleFault:
            return SampleFault(index, id, image, reason, detail, self.name)

        id = image = ""
        record = parsed(jsonfile.read(self.path, self._spans[index]), refuse)
        id = named(record, str(index), refuse)
        names = _names(record)
        image = ", ".join(str(name)[:200] for name in names)
        images = tuple(self._ref(name, index, id) for name in names)
        turns = spoken(record, refuse)
        meta = {key: value for key, value in record.items() if key not in OWN}
        return Sample(id=id, images=images, turns=turns, source=self.name, meta=meta)

    def _trace(self, index: int) -> tuple[bytes, Sequence[str]]:
        recorded = jsonfile.read(self.path, self._spans[index]).strip()
        try:
            record = json.loads(recorded)
        except (ValueError, RecursionError):
            return recorded, ()
        return recorded, [name for name in _names(record) if isinstance(name, str)] if isinstance(record, dict) else ()


def _names(record: dict[str, Any]) -> list[Any]:
    image = record.get("image")
    if image is None:
        return []
    return image if isinstance(image, list) else [image]


def record_of(sample: Sample) -> dict[str, Any]:
    """The record that reads as this sample, but for its images: id, conversations, and what else it knows."""
    turns = [{"from": SAID[turn.role], "value": turn.text} for turn in sample.turns]
    record = {"id": sample.id, "conversations": turns}
    return record | {key: value for key, value in sample.meta.items() if key not in OWN}


def parsed(recorded: bytes, refuse: Refuse) -> dict[str, Any]:
    """The JSON object of one record."""
    try:
        record = json.loads(recorded)
    except (ValueError, RecursionError):
        raise refuse("record is not JSON") from None
    if not isinstance(record, dict):
        raise refuse("record is not an object", type(record).__name__)
    return record


def named(record: Mapping[str, Any], otherwise: str, refuse: Refuse) -> str:
    """The record's `id`, or `otherwise` where it has none."""
    given = record.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int))):
        raise refuse("id is not text", type(given).__name__)
    return otherwise if given is None or given == "" else str(given)


def spoken(record: Mapping[str, Any], refuse: Refuse) -> tuple[Turn, ...]:
    """The turns of a record's `conversations`."""
    if "conversations" not in record:
        raise refuse("no conversations", f"keys: {', '.join(map(ascii, list(record)[:8]))}")
    conversations = record["conversations"]
    if not isinstance(conversations, list):
        raise refuse("conversations is not a list", type(conversations).__name__)
    turns = []
    for position, turn in enumerate(conversations):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise refuse("turn has no from and value", f"turn {position}")
        said, text = turn["from"], turn["value"]
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise refuse("unknown role", f"turn {position} is from {ascii(said)[:40]}; allowed: {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise refuse("turn's value is not text", f"turn {position} holds {type(text).__name__}")
        turns.append(Turn(role, text))
    return tuple(turns)
