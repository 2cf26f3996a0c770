"""LLaVA's form: a JSON list (or one record a line) of conversations, beside a folder of images.

    {"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                         {"from": "gpt", "value": "A cat."}]}

`image` may be a list of paths, null, or absent (a text-only dialogue). Every other key travels in `Sample.meta`.

Where `conversations` is absent, `messages` may hold the words in the chat form of OpenAI, TRL and the Hub, and `images`
the paths where `image` is absent:

    {"images": ["coco/1.jpg"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from leveret.images import Root
from leveret.pool import jsonfile
from leveret.pool.base import SampleFault, Source
from leveret.records import IMAGE_MARK, Role, Sample, Turn

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""What `from` may say."""

CHAT_ROLES: tuple[Role, ...] = ("system", "user", "assistant")
"""What `role` may say."""

OWN = ("id", "image", "conversations")
"""What every record of this form says; never in `Sample.meta`."""

OWN_CHAT = (*OWN, "images", "messages")
"""The same of a record whose words are in `messages`."""

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
        record = self._record(jsonfile.read(self.path, self._spans[index]), refuse)
        id = named(record, str(index), refuse)
        names = _names(record)
        image = ", ".join(str(name)[:200] for name in names)
        images = tuple(self._ref(name, index, id) for name in names)
        own: tuple[str, ...] = OWN
        if _is_chat(record):
            turns, own = marked(chatted(record["messages"], refuse), len(images)), OWN_CHAT
        else:
            turns = spoken(record, refuse)
        meta = {key: value for key, value in record.items() if key not in own}
        return Sample(id=id, images=images, turns=turns, source=self.name, meta=meta)

    def _record(self, recorded: bytes, refuse: Refuse) -> dict[str, Any]:
        """The record as LLaVA has it."""
        return parsed(recorded, refuse)

    def _trace(self, index: int) -> tuple[bytes, Sequence[str]]:
        recorded = jsonfile.read(self.path, self._spans[index]).strip()
        try:
            record = self._record(recorded, partial(SampleFault, index, "", ""))
        except SampleFault:
            return recorded, ()
        return recorded, [name for name in _names(record) if isinstance(name, str)]


def _is_chat(record: Mapping[str, Any]) -> bool:
    return "messages" in record and "conversations" not in record


def _names(record: dict[str, Any]) -> list[Any]:
    image = record.get("image")
    if image is None and _is_chat(record):
        image = record.get("images")
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


def chatted(messages: Any, refuse: Refuse) -> tuple[Turn, ...]:
    """The turns of `messages`: a list of {role, content}. Content is text, or a list of parts: {type: "text", text} and
    {type: "image"}, of which each stands for the record's next image. Parts are joined by a newline, but where there is
    whitespace already."""
    if not isinstance(messages, list):
        raise refuse("messages is not a list", type(messages).__name__)
    turns: list[Turn] = []
    images = 0
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise refuse("message has no role and content", f"message {position}")
        role, content = message["role"], message["content"]
        if role not in CHAT_ROLES:
            raise refuse(
                "unknown role", f"message {position} is of {ascii(role)[:40]}; allowed: {', '.join(CHAT_ROLES)}"
            )
        if isinstance(content, list):
            parts = [_part(part, f"message {position}, part {at}", role, refuse) for at, part in enumerate(content)]
            for at, part in enumerate(parts):
                if part is None:
                    # Some tables say which image it is: other words would be about another picture.
                    if content[at].get("index") not in (None, images):
                        raise refuse("images are not in order", f"message {position}, part {at}")
                    images += 1
            content = _joined([IMAGE_MARK if part is None else part for part in parts])
        if not isinstance(content, str):
            raise refuse("message's content is not text", f"message {position} holds {type(content).__name__}")
        turns.append(Turn(role, content))
    return tuple(turns)


def _part(part: Any, where: str, role: Role, refuse: Refuse) -> str | None:
    """The text of a part of a message's content; None if it stands for an image."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        if role != "user":
            raise refuse("image outside a user's message", where)
        return None
    if kind != "text":
        raise refuse("unknown part of a message", f"{where} is of type {ascii(kind)[:40]}; allowed: text, image")
    if not isinstance(part.get("text"), str):
        raise refuse("message's content is not text", f"{where} holds {type(part.get('text')).__name__}")
    return str(part["text"])


def _joined(parts: Sequence[str]) -> str:
    text = ""
    for part in parts:
        between = "\n" if text and part and not text[-1].isspace() and not part[0].isspace() else ""
        text += between + part
    return text


def marked(turns: tuple[Turn, ...], images: int) -> tuple[Turn, ...]:
    """The turns with a mark for each image, at the start of the first user turn, where there is none at all."""
    first = next((at for at, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or not images or any(IMAGE_MARK in turn.text for turn in turns if turn.role == "user"):
        return turns
    marks = f"{IMAGE_MARK}\n" * images
    return (*turns[:first], Turn("user", marks + turns[first].text), *turns[first + 1 :])
