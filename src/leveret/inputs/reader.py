"""Chunks of a conversation become token ids, and character spans become a label mask: what an encoded text is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from leveret.records import IGNORE, IMAGE_MARK
from leveret.runs import DataError, RecipeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Encoded:
    """A conversation as the model reads it; the lists have one entry per position.

    input_ids   token ids; at image positions the tokenizer's id of `<image>`, else its padding id, else 0.
    labels      the id where the position is supervised, IGNORE elsewhere. Not shifted.
    image_mask  True where an image token stands.
    text        the rendered conversation, one `<image>` per image.
    cut         positions that `max_tokens` took off the right end.
    """

    input_ids: list[int]
    labels: list[int]
    image_mask: list[bool]
    text: str
    cut: int = 0


@dataclass(slots=True)
class Chunk:
    """Text between two images.

    pieces      (text, whether somebody said it), in order; `text` is their concatenation.
    supervised  character spans of `text` inside generation blocks.
    """

    pieces: list[tuple[str, bool]]
    text: str
    supervised: list[tuple[int, int]]


_LONE = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs: what Python makes of bytes that are no UTF-8, and no tokenizer can read."""


def check_unicode(text: str) -> None:
    """DataError when a tokenizer could not read the text."""
    if not text.isascii() and _LONE.search(text):
        raise DataError("the text is not valid Unicode (bytes that are no UTF-8 were read into it): mend its encoding")


class Reader:
    """A tokenizer made ready: private copies, so that nobody's padding, truncation or trimmed offsets show here."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from tokenizers import Tokenizer

        shared = getattr(tokenizer, "backend_tokenizer", None)
        if shared is None:
            raise RecipeError(
                f"{type(tokenizer).__name__} cannot say which characters a token came from; "
                "a tokenizer with a tokenizer.json is needed"
            )
        self.size = len(tokenizer)
        self._state: dict[str, Any] = json.loads(shared.to_str())
        # A byte-level post-processor would trim blanks off the offsets, and the others add special tokens.
        self._state.update(post_processor=None, truncation=None, padding=None)
        self.backend: Tokenizer = Tokenizer.from_str(json.dumps(self._state))
        self._literal: Tokenizer | None = None
        # GPT-2's way of writing bytes, as opposed to SentencePiece's words that bring their blank along.
        self.byte_level = '"ByteLevel"' in json.dumps([self._state["pre_tokenizer"], self._state["decoder"]])
        # Llama's way: what the vocabulary has no word for, in tokens of one byte.
        spelled = self._state["model"].get("byte_fallback") and '"ByteFallback"' in json.dumps(self._state["decoder"])
        found = {self.backend.token_to_id(f"<0x{value:02X}>"): value for value in range(256)} if spelled else {}
        self.bytes: dict[int, int] = {token: value for token, value in found.items() if token is not None}
        # Runs of blanks are added tokens in some vocabularies (Phi-2): those are how text is written, not structure.
        added = {token["content"]: token["id"] for token in self._state["added_tokens"] if token["content"].strip()}
        self.special: dict[str, int] = added
        self._words = {token: content for content, token in added.items()}
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first) if added else r"(?!)")
        habit = tokenizer("").input_ids
        start = tokenizer.bos_token_id
        self.start: tuple[int, ...] = (start,) if start is not None and list(habit[:1]) == [start] else ()
        image = self.backend.token_to_id(IMAGE_MARK)
        self.image_id: int = image if image is not None else tokenizer.pad_token_id or 0
        self.checked: set[tuple[str, ...]] = set()  # end tokens known to be there

    def has(self, texts: tuple[str, ...]) -> bool:
        """Is each of `texts` one token?"""
        return all(self.backend.token_to_id(text) is not None for text in texts)

    def token(self, text: str) -> int:
        """The id of a token that the model puts before its images. RecipeError where `text` is not one token."""
        if (found := self.backend.token_to_id(text)) is None:
            raise RecipeError(
                f"the model puts {text!r} before what it sees, which is no token of this tokenizer; add it"
            )
        return found

    def read(self, chunk: Chunk, supervise: bool) -> tuple[list[int], list[int]]:
        """Ids and labels of one chunk."""
        if not chunk.text:
            return [], []
        check_unicode(chunk.text)
        if any(said and self._special.search(text) for text, said in chunk.pieces):
            ids, offsets = self._spelled(chunk.pieces)
        else:
            encoding = self.backend.encode(chunk.text, add_special_tokens=False)
            ids, offsets = encoding.ids, encoding.offsets
        if not supervise or not chunk.supervised:
            return ids, [IGNORE] * len(ids)
        learned = bytearray(len(chunk.text) + 1)
        for begin, end in chunk.supervised:
            learned[begin:end] = b"\x01" * (end - begin)
        labels = []
        for token, (begin, end) in zip(ids, offsets, strict=True):
            if (word := self._words.get(token)) is not None and end - begin > len(word):
                # Some take the blanks around them in (Phi-3's): where the token itself stands is what counts.
                begin = max(begin, chunk.text.find(word, begin, end))
                end = begin + len(word)
            labels.append(token if learned[begin] or (end > begin and learned[end - 1]) else IGNORE)
        return ids, labels

    def _spelled(self, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of a chunk in which somebody typed a special token: only the template's own are special.

        The text between the template's special tokens is tokenised by a copy of the tokenizer that knows none. (A
        tokenizer that puts a blank before the first word of a text then puts one before each such stretch.)
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        stretch: list[str] = []
        place = 0  # where `stretch` begins

        def spell() -> None:
            nonlocal place
            text = "".join(stretch)
            encoding = self.literal.encode(text, add_special_tokens=False)
            if clash := set(encoding.ids) & set(self.special.values()):
                words = [word for word, token in self.special.items() if token in clash]
                raise DataError(f"a turn holds {words}, which this tokenizer cannot spell as plain text")
            ids.extend(encoding.ids)
            offsets.extend((begin + place, end + place) for begin, end in encoding.offsets)
            place += len(text)
            stretch.clear()

        for text, said in pieces:
            if said:
                stretch.append(text)
                continue
            cursor = 0
            for match in self._special.finditer(text):
                stretch.append(text[cursor : match.start()])
                spell()
                ids.append(self.special[match.group()])
                offsets.append((place, place + len(match.group())))
                place += len(match.group())
                cursor = match.end()
            stretch.append(text[cursor:])
        spell()
        return ids, offsets

    @property
    def literal(self) -> Tokenizer:
        """The same tokenizer, for which no text but a run of blanks is an added token."""
        if self._literal is None:
            from tokenizers import Tokenizer

            added = [{**token, "special": bool(token["content"].strip())} for token in self._state["added_tokens"]]
            self._literal = Tokenizer.from_str(json.dumps({**self._state, "added_tokens": added}))
            self._literal.encode_special_tokens = True  # meaning: as the characters they are written with
        return self._literal


def end_ids(stop: Iterable[str], tokenizer: Any, eos: int | Iterable[int] | None = None) -> frozenset[int]:
    """Ids that end an answer: those of a chat format's `stop` strings that are tokens of their own, the tokenizer's
    end-of-text token, and the model's `eos`."""
    special = tokenizer.get_added_vocab()
    more = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    ids = {special[text] for text in stop if text in special}
    return frozenset(ids | {int(token) for token in [tokenizer.eos_token_id, *more] if token is not None})


_READERS: WeakKeyDictionary[Any, Reader] = WeakKeyDictionary()


def reader_of(tokenizer: PreTrainedTokenizerBase) -> Reader:
    """The reader of a tokenizer, made once (and again when tokens were added to it since)."""
    reader = _READERS.get(tokenizer)
    if reader is None or reader.size != len(tokenizer):
        reader = _READERS[tokenizer] = Reader(tokenizer)
    return reader
