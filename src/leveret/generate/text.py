"""From token ids back to words: where an answer ends, and pieces that never cut a character in two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from leveret.inputs.reader import end_ids

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are not (or not yet) a character."""


@dataclass(frozen=True, slots=True)
class Stops:
    """What ends an answer: ids of special tokens, and strings that are written with ordinary tokens."""

    ids: frozenset[int]
    strings: tuple[str, ...] = ()

    @classmethod
    def of(cls, stop: Iterable[str], tokenizer: Any, eos: int | Iterable[int] | None = None) -> Stops:
        """A chat format's `stop` strings as `tokenizer` knows them, its end-of-text token and the model's `eos`."""
        special = tokenizer.get_added_vocab()
        return cls(end_ids(stop, tokenizer, eos), tuple(text for text in stop if text and text not in special))

    def cut(self, text: str) -> str | None:
        """The text before the first stop string; None if there is none in it."""
        found = [place for stop in self.strings if (place := text.find(stop)) >= 0]
        return text[: min(found)] if found else None

    def held(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop string and must wait."""
        return max(
            (n for stop in self.strings for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The words of `ids`, without special tokens and exactly as the tokens spell them."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Detokenizer:
    """Tokens in, text out, as soon as it is certain; the pieces joined are what decoding all tokens at once gives.

    A character of several bytes may be spread over several tokens: a piece waits until its last character is whole.
    Each piece is decoded together with the piece before it, because some tokenizers drop the space of a first token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._context = self._done = 0

    def push(self, token: int) -> str:
        """The text that this token completes; often "" inside a character."""
        self.ids.append(token)
        text = self._new()
        return "" if text.endswith(BROKEN) else self._take(text)

    def finish(self) -> str:
        """What still waits, whole or not."""
        return self._take(self._new())

    def _new(self) -> str:
        known = decode(self.tokenizer, self.ids[self._context : self._done])
        return decode(self.tokenizer, self.ids[self._context :])[len(known) :]

    def _take(self, text: str) -> str:
        if text:
            self._context, self._done = self._done, len(self.ids)
        return text
