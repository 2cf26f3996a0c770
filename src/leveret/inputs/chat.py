"""Turns of a conversation become token ids, with a label mask that says what the model learns to say.

    turns -> template (Jinja) -> pieces -> chunks between images -> ids + character offsets -> labels

Chat formats are rows of `formats.CHATS`. Three rules hold for every one:

- **Labels come from character offsets**: a token is supervised when it holds at least one character of a generation
  block. Nothing is tokenised twice and compared, so no row is lost to a "tokenization mismatch". All bytes of one
  character share its offset, hence its label.
- **Chunks**: text is cut at the image marks and every chunk is tokenised by itself, as LLaVA and Bunny do; the start
  token, where the tokenizer has the habit of one, stands once at the very beginning.
- **What people typed is text.** Only the template makes structure. A special token's text inside a turn (`<|end|>`,
  `</s>`, ...) is spelled out with ordinary tokens. `<image>` is a mark in user turns only, and only in a conversation
  that has images; elsewhere it is spelled out too. `literal` protects a text in which it must not be a mark.

Where the originals are wrong, ids are kept and labels corrected: Bunny drops a whole row when an answer holds
"ASSISTANT: "; here the answer and its end are supervised. Two marks in a turn stay two (the originals fold them to one;
`Sample.fault` refuses the row unless it has two images). `faithful=True` does as they did; `docs/chat-formats.md` lists
where that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from leveret.inputs.faithful import encode_faithfully
from leveret.inputs.formats import CHATS, ChatFormat, find_chat, published
from leveret.inputs.reader import Chunk, Encoded, Reader, reader_of
from leveret.inputs.template import BEGIN, END, ESCAPED, Said, render
from leveret.records import IGNORE, IMAGE_MARK, ImageSpec, Split, Turn
from leveret.runs import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHATS", "ChatFormat", "Encoded", "encode", "find_chat", "fitting", "literal", "published"]


def literal(text: str) -> str:
    """`text` so that `<image>` in it is no mark but the seven characters a person typed.

    For servers and chats, which add their own marks to what people write. `encode` takes the protection out again.
    """
    return text.replace(IMAGE_MARK, ESCAPED)


def encode(
    turns: Sequence[Turn],
    chat: str | ChatFormat,
    tokenizer: PreTrainedTokenizerBase,
    spec: ImageSpec,
    image_sizes: Sequence[tuple[int, int]],
    *,
    generate: bool = False,
    max_tokens: int | None = None,
    faithful: bool = False,
) -> Encoded:
    """One conversation as ids, labels and image positions.

    turns        as in a Sample. A user turn's image marks go to its front, each followed by a newline (LLaVA's habit).
    image_sizes  (height, width) of every image, in reading order; each fills `spec.count(height, width)` positions,
                 before which tokens of the model's own may stand (`spec.runs`).
    generate     write the beginning of the assistant's turn at the end; nothing is supervised then.
    max_tokens   longest row; what is over is cut from the right and counted in `Encoded.cut`.
    faithful     as the system the format comes from makes ids and labels, its faults included (`faithful.py`);
                 formats named NAME/faithful always do.

    Raises:
        DataError: there are not as many marks as images, nothing to answer, or `max_tokens` would cut an image.
        RecipeError: unknown format, a template that fails, or a tokenizer that lacks the format's end token.
    """
    form, reader = fitting(chat, tokenizer), reader_of(tokenizer)
    _check_turns(turns, generate)
    if faithful or form.faithful:
        if isinstance(spec.tiling, Split) and (spec.tiling.tile or spec.tiling.whole):
            raise RecipeError(f"chat: {form.name} faithfully: no system it comes from has tokens before tiles")
        return encode_faithfully(turns, form, tokenizer, spec, image_sizes, generate=generate, max_tokens=max_tokens)
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user") if image_sizes else 0
    if marks != len(image_sizes):
        raise DataError(
            f"{marks} {IMAGE_MARK} in the user turns, but {len(image_sizes)} image(s): there must be one mark per image"
        )
    chunks = _chunks(form, turns, bool(image_sizes), generate)
    if len(chunks) != len(image_sizes) + 1:
        raise RecipeError(
            f"the template of chat format {form.name!r} wrote {len(chunks) - 1} {IMAGE_MARK} "
            f"where the conversation has {len(image_sizes)}"
        )
    ids: list[int] = list(reader.start)
    labels = [IGNORE] * len(ids)
    seen = [False] * len(ids)
    ends_of_images = []
    for number, chunk in enumerate(chunks):
        if number:
            for mark, count in spec.runs(*image_sizes[number - 1]):
                before = [reader.token(mark)] if mark else []
                ids += before + [reader.image_id] * count
                labels += [IGNORE] * (len(before) + count)
                seen += [False] * len(before) + [True] * count
            ends_of_images.append(len(ids))
        new_ids, new_labels = reader.read(chunk, supervise=not generate)
        ids += new_ids
        labels += new_labels
        seen += [False] * len(new_ids)
    encoded = Encoded(ids, labels, seen, IMAGE_MARK.join(chunk.text for chunk in chunks))
    if max_tokens is not None and len(ids) > max_tokens:
        _cut(encoded, max_tokens, ends_of_images[-1] if ends_of_images else 0)
    return encoded


def _cut(encoded: Encoded, max_tokens: int, end_of_images: int) -> None:
    """Takes off what is over, on the right. DataError when that would be part of an image."""
    if end_of_images > max_tokens:
        raise DataError(
            f"max_tokens={max_tokens} would cut an image: the last image ends at position {end_of_images}. "
            f"Allow at least that many tokens, or shorten the text before the image"
        )
    encoded.cut = len(encoded.input_ids) - max_tokens
    for part in (encoded.input_ids, encoded.labels, encoded.image_mask):
        del part[max_tokens:]


def fitting(chat: str | ChatFormat, tokenizer: PreTrainedTokenizerBase | None) -> ChatFormat:
    """The format that `chat` means. RecipeError where there is none, or it ends answers with no token of `tokenizer`
    (which is not asked where it is None)."""
    form = find_chat(chat)
    if tokenizer is not None:
        _check(form, reader_of(tokenizer))
    return form


def _check(form: ChatFormat, reader: Reader) -> None:
    """RecipeError when the end of an answer is not one token: the model could not learn to stop."""
    if form.stop in reader.checked:
        return
    for stop in form.stop:
        if stop.strip() and not reader.has((stop,)):
            others = [row.name for row in CHATS.values() if reader.has(row.stop) and not row.faithful]
            hint = f"Formats whose end token it has: {', '.join(others)}" if others else "Add the token to it"
            raise RecipeError(
                f"chat format {form.name!r} ends answers with {stop!r}, which this tokenizer does not have. {hint}"
            )
    reader.checked.add(form.stop)


def _check_turns(turns: Sequence[Turn], generate: bool) -> None:
    """DataError when nothing is said, or nothing asked where an answer is wanted."""
    if not turns:
        raise DataError("a conversation needs at least one turn")
    if generate and turns[-1].role != "user":
        raise DataError(f"nothing to answer: the last turn is the {turns[-1].role}'s, it must be the user's")


# --- from turns to chunks -------------------------------------------------------------------------------------------


def _chunks(form: ChatFormat, turns: Sequence[Turn], has_images: bool, generate: bool) -> list[Chunk]:
    """The rendered conversation, cut at its image marks."""
    messages = [{"role": turn.role, "content": _content(turn, has_images)} for turn in turns]
    chunks: list[Chunk] = []
    pieces: list[tuple[str, bool]] = []
    spans: list[tuple[int, int]] = []
    length, block = 0, -1  # characters so far in this chunk; where the open generation block began, -1 when none is
    blocks = 0

    def close() -> None:
        if 0 <= block < length:
            spans.append((block, length))

    for piece in render(form, messages, generate):
        if piece is BEGIN:
            block, blocks = length, blocks + 1
            continue
        if piece is END:
            close()
            block = -1
            continue
        said = type(piece) is Said
        for number, part in enumerate(piece.split(IMAGE_MARK) if IMAGE_MARK in piece else (piece,)):
            if number:
                close()
                chunks.append(Chunk(pieces, "".join([text for text, _ in pieces]), spans))
                pieces, spans, length, block = [], [], 0, 0 if block >= 0 else -1
            if part:
                part = part.replace(ESCAPED, IMAGE_MARK) if "\ue000" in part else part
                pieces.append((part, said))
                length += len(part)
    chunks.append(Chunk(pieces, "".join([text for text, _ in pieces]), spans))
    if not blocks and not generate and any(turn.role == "assistant" for turn in turns):
        raise RecipeError(
            f"the template of chat format {form.name!r} has no generation block: nothing would be learned"
        )
    return chunks


def _content(turn: Turn, has_images: bool) -> Said:
    """A turn's text with its marks in front; without images, or said by another than the user, with none."""
    text = turn.text
    if IMAGE_MARK not in text:
        return Said(text)
    if not has_images or turn.role != "user":
        return Said(literal(text))
    front = (IMAGE_MARK + "\n") * text.count(IMAGE_MARK)
    return Said((front + text.replace(IMAGE_MARK, "").strip()).strip())
