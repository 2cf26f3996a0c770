"""Messages as OpenAI writes them -> turns and pictures as the engine takes them.

What people typed stays text: `<image>` in it is no mark, and a special token's name is spelled with ordinary tokens
(`inputs.chat`). Only parts of the kind `image_url` become images. Roles must lead to a question:

    system, developer   at the beginning, joined by a blank line; refused where the model's chat format has no place
    user, assistant     in turn, the user first and last; several in a row are one turn, joined by newlines
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leveret.generate.engine import Request
from leveret.generate.live import Ask
from leveret.generate.sampling import Sampling
from leveret.images import ImageFault
from leveret.inputs.chat import encode, find_chat, literal
from leveret.model.vlm import VLM
from leveret.records import IMAGE_MARK, ImageRef, Turn
from leveret.runs import DataError, RecipeError
from leveret.serve.limits import Limits
from leveret.serve.protocol import CHOICE_CHARACTERS, CHOICES, ChatRequest, Choices, ImagePart, Message, TextPart
from leveret.serve.refusals import bad, of_fault

USUAL = 256
"""Tokens of an answer whose request does not say; as in `leveret chat`."""

Look = Callable[[str], ImageRef]
"""A reference in a request -> the picture, or ImageFault."""


@dataclass(frozen=True, slots=True)
class Manners:
    """What a model's chat format can be told.

    system   it has a place for a system message.
    special  texts that would be special tokens in what people type: only where the format is another system's, faults
             included, since all others spell them out.
    """

    system: bool
    special: tuple[str, ...] = ()

    @classmethod
    def of(cls, vlm: VLM) -> Manners:
        """Found by trying: a template may do with a system message what it likes, also nothing."""
        sign = "leveretsystem"
        try:
            tried = encode(
                (Turn("system", sign), Turn("user", "?")), vlm.chat, vlm.tokenizer, vlm.spec, (), generate=True
            )
            system = sign in tried.text
        except (DataError, RecipeError):
            system = False
        faithful = find_chat(vlm.chat).faithful
        return cls(system, tuple(sorted(vlm.tokenizer.get_added_vocab())) if faithful else ())


# --- a request becomes asks -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Form:
    """How a chosen answer is written: as the JSON that the schema describes.

    choices  the texts allowed.
    name     the property that holds it; None where the schema is the choice itself.
    """

    choices: tuple[str, ...]
    name: str | None

    def write(self, text: str) -> str:
        return json.dumps(text if self.name is None else {self.name: text}, ensure_ascii=False)


def asks_of(request: ChatRequest, manners: Manners, limits: Limits, look: Look) -> tuple[list[Ask], Form | None]:
    """One Ask for each of the `n` answers, and how a choice is written. `Refusal` for what cannot be answered."""
    turns, images = turns_of(request.messages, manners, limits, look)
    wished = request.response_format
    form = form_of(wished.json_schema.schema_) if isinstance(wished, Choices) else None
    for name, value in (("temperature", request.temperature), ("stop", request.stop)) if form else ():
        if value:
            raise bad(f"{name}: a choice is the likeliest of its answers; leave {name} out", name, "unsupported_value")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if request.top_logprobs is not None and not request.logprobs:
        raise bad("top_logprobs: needs logprobs to be true", "top_logprobs", "invalid_value")
    if request.max_tokens and request.max_completion_tokens and request.max_tokens != request.max_completion_tokens:
        raise bad("max_tokens and max_completion_tokens: give one of the two", "max_tokens", "invalid_value")
    if request.stream_options is not None and not request.stream:
        raise bad("stream_options: needs stream to be true", "stream_options", "invalid_value")
    wanted = request.max_completion_tokens or request.max_tokens or USUAL
    question = Request("", images, turns, form.choices if form else None, min(wanted, limits.answer_tokens))
    # A share of 0 means the likeliest token; the engine's own lower bound is above it.
    temperature, top_p = request.temperature or 0.0, 1.0 if request.top_p is None else max(request.top_p, 1e-9)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return [
        Ask(question, Sampling(temperature, top_p, seed_of(request.seed, number)), stop, logprobs)
        for number in range(request.n or 1)
    ], form


def seed_of(seed: int | None, number: int) -> int | None:
    """Each of several answers draws otherwise, and the first as if it were alone."""
    return seed if seed is None or not number else (seed + number) % 2**63


def turns_of(
    messages: Sequence[Message], manners: Manners, limits: Limits, look: Look
) -> tuple[tuple[Turn, ...], tuple[ImageRef, ...]]:
    """The conversation, marks in front of the user turns that hold pictures, and the pictures in reading order."""
    if len(messages) > limits.messages:
        raise bad(f"messages: {len(messages)} are more than the {limits.messages} allowed", "messages", "too_many")
    said: list[tuple[str, str, int]] = []  # role, text, pictures
    images: list[ImageRef] = []
    characters = pictures = 0
    for place, message in enumerate(messages):
        at = f"messages[{place}]"
        role = "system" if message.role == "developer" else message.role
        texts = []
        before = pictures
        for part_at, part in parts(message, at):
            if isinstance(part, TextPart):
                texts.append(part.text)
                continue
            pictures += 1
            if pictures > limits.images:
                raise bad(f"more than the {limits.images} images allowed", part_at, "too_many_images")
            images.append(seen(part, f"{part_at}.image_url.url", look))
        text = "\n".join(text for text in texts if text)
        text = text.strip() if role != "assistant" else text
        characters += len(text)
        if characters > limits.characters:
            raise bad(f"the texts have more than the {limits.characters:,} characters allowed", "messages", "too_long")
        if special := next((name for name in manners.special if name in text), None):
            raise bad(
                f"{at}: holds {special!r}, which this model's chat format cannot take as text", at, "special_token"
            )
        if not text.strip() and pictures == before:
            if role != "user":  # an answer of ours that a stop string emptied; a client's field for a system's words
                continue
            raise bad(f"{at}: the {role}'s message is empty", f"{at}.content", "empty")
        if role == "system" and said and said[-1][0] != "system":
            raise bad(f"{at}: a {message.role} message must stand at the beginning", f"{at}.role", "roles")
        if role == "system" and not manners.system:
            raise bad(
                f"{at}: this model's chat format has no place for a {message.role} message; put it into the first "
                "user message", f"{at}.role", "no_system_message",
            )  # fmt: skip
        if said and said[-1][0] == role:
            blank = "\n\n" if role == "system" else "\n"
            text = blank.join(some for some in (said[-1][1], text) if some)
            said[-1] = (role, text, said[-1][2] + pictures - before)
        else:
            said.append((role, text, pictures - before))
    roles = [role for role, _, _ in said if role != "system"]
    if not roles or roles[0] != "user" or roles[-1] != "user":
        raise bad("messages: the conversation must begin and end with the user's", "messages", "roles")
    return tuple(turn(role, text, count) for role, text, count in said), tuple(images)


def turn(role: Any, text: str, pictures: int) -> Turn:
    """A turn as `leveret chat` makes it: marks, a newline, and what was typed, in which no mark is left."""
    marks = "\n".join([IMAGE_MARK] * pictures)
    return Turn(role, "\n".join(some for some in (marks, literal(text)) if some))


def parts(message: Message, at: str) -> Iterator[tuple[str, TextPart | ImagePart]]:
    """(path, part) of a message; a plain text is one part."""
    if isinstance(message.content, str):
        yield f"{at}.content", TextPart(type="text", text=message.content)
        return
    for number, part in enumerate(message.content):
        yield f"{at}.content[{number}]", part


def seen(part: ImagePart, at: str, look: Look) -> ImageRef:
    try:
        return look(part.image_url.url)
    except ImageFault as fault:
        refusal = of_fault(fault, "")
        refusal.param = at
        raise refusal from None


# --- choices ----------------------------------------------------------------------------------------------------------

_CHATTER = {"title", "description", "default", "examples", "$schema", "$defs", "$id"}
_FORM = (
    'a schema must be a choice between strings: {"enum": ["A", "B"]}, or an object with one such property '
    "(docs/serve.md); other schemas are not supported"
)


def form_of(schema: Mapping[str, Any]) -> Form:
    """The choice that a JSON schema describes. `Refusal` for every other schema."""
    if (choices := strings_of(schema, schema)) is not None:
        return Form(choices, None)
    properties = schema.get("properties")
    rest = set(schema) - _CHATTER - {"type", "properties", "required", "additionalProperties"}
    if (
        rest
        or schema.get("type", "object") != "object"
        or not isinstance(properties, dict)
        or len(properties) != 1
        or schema.get("additionalProperties", False) is not False
        or schema.get("required", list(properties)) not in ([], list(properties))
    ):
        raise _unsupported()
    name, inner = next(iter(properties.items()))
    if not isinstance(inner, dict) or (choices := strings_of(inner, schema)) is None:
        raise _unsupported()
    return Form(choices, name)


def strings_of(schema: Mapping[str, Any], root: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The strings that `enum` or `const` allows, behind at most one reference into `$defs`; None without either."""
    if set(schema) - _CHATTER == {"$ref"}:
        home, _, name = str(schema["$ref"]).rpartition("/")
        shared = root.get("$defs")
        found = shared.get(name) if home == "#/$defs" and isinstance(shared, dict) else None
        schema = found if isinstance(found, dict) and "$ref" not in found else {}
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is None:
        return None
    wrong = set(schema) - _CHATTER - {"type", "enum", "const"} or schema.get("type", "string") != "string"
    if wrong or not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _unsupported()
    if not 1 <= len(values) <= CHOICES or any(not 1 <= len(value) <= CHOICE_CHARACTERS for value in values):
        raise bad(
            f"{_AT}: 1 to {CHOICES} choices of 1 to {CHOICE_CHARACTERS} characters are allowed", _AT, "invalid_value"
        )
    return tuple(values)


_AT = "response_format.json_schema.schema"


def _unsupported() -> Exception:
    return bad(f"{_AT}: {_FORM}", _AT, "unsupported_schema")
