"""Ids and labels as Bunny, LLaVA, TinyLLaVA Factory and Prismatic make them, their faults included.

For loading old models and for repeating their training. Where `chat.encode` reads a label off character offsets, the
originals count: they cut the finished prompt at its end tokens, tokenise every round again by itself, add the lengths
up, and drop the labels of the whole row ("tokenization mismatch") when the sum is not the row's length. Here the same
is counted in the same way. Text is tokenised as the originals do it: a special token's text that somebody typed is the
special token.

Sources: Bunny bunny/util/data_utils.py (08273ac), LLaVA llava/train/train.py (c121f04), TinyLLaVA Factory
tinyllava/data/template/base.py (53f12c7), Prismatic prismatic/preprocessing/datasets/datasets.py (874c5bb).
`docs/chat-formats.md` lists what the default does otherwise, and why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from leveret.inputs.formats import CHATS, ChatFormat
from leveret.inputs.reader import Encoded, Reader, check_unicode, reader_of
from leveret.inputs.template import BEGIN, END, ESCAPED, Said, render
from leveret.records import IGNORE, IMAGE_MARK, ImageSpec, Turn
from leveret.runs import DataError, RecipeError

PLACE = -200
"""Stands for an image among the ids of Bunny, LLaVA and TinyLLaVA."""


@dataclass(frozen=True, slots=True)
class Original:
    """How one of the originals makes ids and labels from a conversation.

    system        whose rules prepare the turns: "llava" (and Bunny), "tinyllava", "prismatic".
    style         "rounds": counted round by round. "caption": the image and one caption. "turns": every turn is
                  tokenised by itself. "align": the caption after the first token.
    answer        what stands between question and answer; a round that does not hold it exactly once ends the count.
    start         positions counted (and not learnt) before the first round.
    end           added to the length of a round, for its end token. "token": as many as the end token has by itself.
    back          taken off the length of a question, so that its last blank is learnt with the answer.
    not_legacy    added to both lengths after the first round, unless the tokenizer is of SentencePiece's legacy kind.
    padding_ends  where padding and end are one token, the ends are missing from the row's length: "counted" takes the
                  ends of the rounds counted off their sum (Bunny), "all" adds those of the text to the length
                  (TinyLLaVA), "" does neither (LLaVA).
    """

    name: str
    system: Literal["llava", "tinyllava", "prismatic"]
    style: Literal["rounds", "caption", "turns", "align"] = "rounds"
    answer: str = " ASSISTANT: "
    start: int = 1
    end: int | Literal["token"] = 0
    back: int = 2
    not_legacy: int = 0
    padding_ends: Literal["", "counted", "all"] = ""


ORIGINALS: dict[str, Original] = {
    row.name: row
    for row in (
        Original("bunny", "llava", start=0, end=1, back=1, padding_ends="counted"),
        Original("bunny_start", "llava", padding_ends="counted"),
        Original("llava_v1", "llava", not_legacy=-1),
        Original("llava_llama_2", "llava", answer="[/INST] "),
        Original("llava_plain", "llava", "caption"),
        Original("tinyllava", "tinyllava", start=0, end="token", back=1, padding_ends="all"),
        Original("tinyllava_start", "tinyllava", padding_ends="all"),
        Original("tinyllava_llama", "tinyllava", not_legacy=-1, padding_ends="all"),
        Original("tinyllava_pretrain", "tinyllava", "caption"),
        Original("prismatic", "prismatic", "turns"),
        Original("prismatic_align", "prismatic", "align"),
    )
}
"""Every original rule by name; `ChatFormat.original` names one. "bunny_phi3" is one of Bunny's two."""


@dataclass(slots=True)
class Row:
    """What the original's dataset gives: ids (PLACE for an image, if it has such), labels, its prompt, its warnings."""

    ids: list[int]
    labels: list[int]
    text: str
    warnings: list[str] = field(default_factory=list)


class _Tokens:
    """The tokenizer as the originals call it: the start token is put before every text."""

    def __init__(self, tokenizer: Any) -> None:
        self.reader: Reader = reader_of(tokenizer)
        self.start = list(self.reader.start)
        self.bos: int | None = tokenizer.bos_token_id
        self.pad: int | None = tokenizer.pad_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.legacy = getattr(tokenizer, "legacy", None) is not False

    def alone(self, text: str) -> list[int]:
        """Ids of a text that holds no image, without a start token."""
        check_unicode(text)
        return list(self.reader.backend.encode(_unescaped(text), add_special_tokens=False).ids)

    def plain(self, text: str) -> list[int]:
        return self.start + self.alone(text)

    def with_images(self, text: str) -> list[int]:
        """LLaVA's `tokenizer_image_token`: chunks between the marks, PLACE between them, the start token once.

        What makes it "once": if the first id of all is the start token, the first id of every chunk is dropped.
        """
        chunks = [self.plain(chunk) for chunk in text.split(IMAGE_MARK)]
        first = chunks[0][:1] if chunks[0][:1] == [self.bos] else []
        ids = list(first)
        for number, chunk in enumerate(chunks):
            ids += ([PLACE] if number else []) + chunk[len(first) :]
        return ids


def _unescaped(text: str) -> str:
    return text.replace(ESCAPED, IMAGE_MARK)


def original_of(chat: ChatFormat, tokenizer: Any) -> Original:
    """The rule a format's rows were made by. RecipeError when the format is our own, or its rule is not known here."""
    name = chat.original
    if name == "bunny_phi3":  # Phi-3's tokenizer stopped adding a start token in June 2024; Bunny asks which it has
        name = "bunny_start" if reader_of(tokenizer).start else "bunny"
    if name not in ORIGINALS:
        have = ", ".join(row.name for row in CHATS.values() if row.original and not row.faithful)
        raise RecipeError(f"chat format {chat.name!r} has no original to be faithful to. Those that have: {have}")
    return ORIGINALS[name]


def row_of(
    turns: Sequence[Turn],
    chat: ChatFormat,
    tokenizer: Any,
    has_image: bool,
    *,
    generate: bool = False,
    max_tokens: int | None = None,
) -> Row:
    """One row as the original's dataset gives it, before its collator; with `generate` the ids of its prompt.

    max_tokens  the original's `tokenizer.model_max_length`. Bunny and LLaVA cut text rows at it, Prismatic all rows.

    Raises:
        DataError: the original raises too; the reason says at what.
        RecipeError: the format has no original, or its template fails.
    """
    rule, tokens = original_of(chat, tokenizer), _Tokens(tokenizer)
    limit = sys.maxsize if max_tokens is None else max_tokens
    messages = _messages(turns, rule, has_image, generate)
    if rule.style == "turns" and not generate:
        return _turn_by_turn(chat, messages, tokens, has_image, limit)
    text = "".join(render(chat, messages, generate, faithful=True))
    if rule.system == "prismatic":
        if rule.style == "align":
            text = text.replace(IMAGE_MARK, "")
        ids = tokens.plain(text.rstrip() if generate else text)[:limit]
        return Row(ids, [IGNORE] * len(ids) if generate else [IGNORE, *ids[1:]], text)
    images = has_image or generate or rule.system == "tinyllava" or rule.style == "caption"
    ids = tokens.with_images(text) if images else tokens.plain(text)[:limit]
    if generate:
        return Row(ids, [IGNORE] * len(ids), text)
    if rule.style == "caption":
        masked = len(tokens.with_images(IMAGE_MARK))
        return Row(ids, [IGNORE] * masked + ids[masked:], text)
    return _round_by_round(chat, rule, Row(ids, list(ids), text), tokens, images, limit)


# --- the turns, prepared ----------------------------------------------------------------------------------------------


def _messages(turns: Sequence[Turn], rule: Original, has_image: bool, generate: bool) -> list[dict[str, Any]]:
    """The turns as the original puts them into its template: who speaks goes by the place, marks by its own rule."""
    texts = [turn.text for turn in turns]
    roles = [turn.role for turn in turns]
    if not turns:
        raise DataError("a conversation needs at least one turn")
    if rule.system == "prismatic":
        return _prismatic_messages(texts, roles, rule)
    if "system" in roles:
        raise DataError("the original knows no system turn: leave it out, or do not ask to be faithful")
    if rule.system == "llava" and rule.style == "caption":
        if not generate and (len(turns) != 2 or IMAGE_MARK not in texts[0]):
            raise DataError(f"a caption is two turns, the first with {IMAGE_MARK}: the original raises AssertionError")
    elif roles[0] != "user":
        texts, roles = texts[1:], roles[1:]  # a greeting of the assistant's is left out
    if rule.system == "tinyllava":
        if not generate and len(texts) % 2:
            raise DataError("there are not as many answers as questions: the original raises AssertionError")
    elif rule.style == "rounds" and any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise DataError("roles do not alternate: the original raises AssertionError")
    if not texts:
        raise DataError("no turns: nothing is left when the assistant's first turn is taken off")
    if rule.answer.startswith("[/INST]") and not texts[0]:
        raise DataError("the first message is empty: the original raises AssertionError")
    front = [
        _marked_in_front(text) if _moves_marks(rule, has_image or generate, place) else text
        for place, text in enumerate(texts)
    ]
    if rule.style == "caption":  # whatever the question says
        front = [IMAGE_MARK if place % 2 == 0 else text for place, text in enumerate(front)]
    return [{"role": ("user", "assistant")[i % 2], "content": Said(text)} for i, text in enumerate(front)]


def _moves_marks(rule: Original, has_image: bool, place: int) -> bool:
    """LLaVA and Bunny tidy every turn of an image row, TinyLLaVA the questions of every row."""
    return has_image if rule.system == "llava" else place % 2 == 0


def _marked_in_front(text: str) -> str:
    """However many marks a turn holds, wherever: one, in front."""
    if IMAGE_MARK not in text:
        return text
    return (IMAGE_MARK + "\n" + text.replace(IMAGE_MARK, "").strip()).strip()


def _prismatic_messages(texts: list[str], roles: Sequence[str], rule: Original) -> list[dict[str, Any]]:
    if rule.style == "align":
        if len(texts) != 2 or IMAGE_MARK in texts[1]:
            raise DataError(f"a caption is two turns, without {IMAGE_MARK} in the second: the original raises")
    elif any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise DataError("the user begins and turns alternate, or the original raises AssertionError")
    return [
        {"role": ("user", "assistant")[i % 2], "content": Said(text.replace(IMAGE_MARK, "").strip())}
        for i, text in enumerate(texts)
    ]


# --- labels -----------------------------------------------------------------------------------------------------------


def _round_by_round(chat: ChatFormat, rule: Original, row: Row, tokens: _Tokens, images: bool, limit: int) -> Row:
    """Labels by counting: what is not counted is masked, and all of it when the sum is wrong."""

    def length(text: str) -> int:
        return len(tokens.with_images(text) if images else tokens.plain(text))

    stop, labels = chat.stop[0], row.labels
    end = len(tokens.plain(stop)) if rule.end == "token" else rule.end
    total = sum(token != tokens.pad for token in row.ids)
    at, counted = rule.start, 0
    labels[:at] = [IGNORE] * len(labels[:at])
    for number, words in enumerate(row.text.split(stop)):
        parts = words.split(rule.answer)
        if words == "" or len(parts) != 2:
            break
        change = rule.not_legacy if number and not tokens.legacy else 0
        question = max(at + length(parts[0] + rule.answer) - rule.back + change, at)
        masked = labels[at:question]
        labels[at : at + len(masked)] = [IGNORE] * len(masked)
        at += length(words) + end + change
        counted += 1
    labels[at:] = [IGNORE] * len(labels[at:])
    if tokens.pad == tokens.eos:
        at -= counted if rule.padding_ends == "counted" else 0
        total += row.text.count(stop) if rule.padding_ends == "all" else 0
    if at < limit and at != total:
        labels[:] = [IGNORE] * len(labels)
        row.warnings.append(f"WARNING: tokenization mismatch: {at} vs. {total}. (ignored)")
    return row


def _turn_by_turn(
    chat: ChatFormat, messages: list[dict[str, Any]], tokens: _Tokens, has_image: bool, limit: int
) -> Row:
    """Prismatic: every turn tokenised by itself, answers learnt; Llama's tokenizers get no blank at a turn's end."""
    said: list[str] = [""]
    for piece in render(chat, messages, False, faithful=True):
        if piece is BEGIN or piece is END:
            said.append("")
        else:
            said[-1] += piece
    ids: list[int] = []
    labels: list[int] = []
    for number in range(len(messages)):
        text = said[number] if tokens.reader.byte_level else said[number].rstrip()
        new = tokens.alone(text) if number else tokens.plain(text)
        ids += new
        labels += new if number % 2 else [IGNORE] * len(new)
    ids, labels = ids[:limit], labels[:limit]
    if has_image:
        labels[0] = IGNORE
    return Row(ids, labels, "".join(said))


# --- as our model reads it --------------------------------------------------------------------------------------------


def encode_faithfully(
    turns: Sequence[Turn],
    chat: ChatFormat,
    tokenizer: Any,
    spec: ImageSpec,
    image_sizes: Sequence[tuple[int, int]],
    *,
    generate: bool = False,
    max_tokens: int | None = None,
) -> Encoded:
    """`row_of` with its images opened to positions, for `chat.encode(..., faithful=True)`; same arguments.

    Bunny, LLaVA and TinyLLaVA cut the opened row at `max_tokens`; Prismatic's images come on top of its text.

    Raises DataError when the original would see another number of images than there are, or cut one.
    """
    row = row_of(turns, chat, tokenizer, bool(image_sizes), generate=generate, max_tokens=max_tokens)
    reader, prismatic = reader_of(tokenizer), original_of(chat, tokenizer).system == "prismatic"
    ids = row.ids[:1] + [PLACE] * len(image_sizes) + row.ids[1:] if prismatic else row.ids
    labels = row.labels[:1] + [IGNORE] * len(image_sizes) + row.labels[1:] if prismatic else row.labels
    marks = ids.count(PLACE)
    if marks != len(image_sizes) or (prismatic and marks > 1):
        raise DataError(
            f"the original sees {1 if prismatic else marks} image(s) in this row, but {len(image_sizes)} are given: "
            f"one {IMAGE_MARK} in one user turn per row, or do not ask to be faithful"
        )
    encoded, number = Encoded([], [], [], _unescaped(row.text)), 0
    for token, label in zip(ids, labels, strict=True):
        count = spec.count(*image_sizes[number]) if token == PLACE else 1
        number += token == PLACE
        encoded.input_ids += [reader.image_id if token == PLACE else token] * count
        encoded.labels += [IGNORE if token == PLACE else label] * count
        encoded.image_mask += [token == PLACE] * count
    if max_tokens is not None and not prismatic and len(encoded.input_ids) > max_tokens:
        if any(encoded.image_mask[max_tokens:]):
            raise DataError(
                f"max_tokens={max_tokens} would cut an image. Allow more tokens, or shorten the text before"
            )
        encoded.cut = len(encoded.input_ids) - max_tokens
        for part in (encoded.input_ids, encoded.labels, encoded.image_mask):
            del part[max_tokens:]
    return encoded
