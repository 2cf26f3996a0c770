"""From token ids back to words: where an answer ends, and pieces that never cut a character in two."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leveret.inputs.reader import end_ids, reader_of

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
    """The words of `ids`, without special tokens and exactly as the tokens spell them.

    Where a vocabulary spells what it has no word for in tokens of one byte (Llama's, `<0xE4>`), bytes that are no
    character are left out: transformers makes a whole run of such tokens unreadable where one of them is.
    """
    if values := reader_of(tokenizer).bytes:
        ids = list(_Bytes(values).whole(ids))
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Bytes:
    """Lets tokens through, those of one byte when the character is whole that they spell."""

    def __init__(self, values: Mapping[int, int]) -> None:
        self.values = values
        self._begun: list[int] = []  # tokens of an unfinished character

    def whole(self, ids: Iterable[int]) -> Iterator[int]:
        for token in ids:
            if (value := self.values.get(token)) is None:
                self._begun.clear()
                yield token
                continue
            self._begun.append(token)
            spelled = bytes(self.values[one] for one in self._begun)
            if _letter(spelled) is None and len(spelled) > 1:  # it ends what was begun, and may begin another
                self._begun, spelled = [token], bytes([value])
            if letter := _letter(spelled):
                yield from self._begun
            if letter != "":
                self._begun.clear()


def _letter(spelled: bytes) -> str | None:
    """The character that bytes spell; "" while it is unfinished, None where no further byte can make it one."""
    try:
        return getincrementaldecoder("utf-8")().decode(spelled)
    except UnicodeDecodeError:
        return None


class Detokenizer:
    """Tokens in, text out, as soon as it is certain; the pieces joined are what decoding all tokens at once gives.

    A character of several bytes may be spread over several tokens: a piece waits until its last character is whole.
    Each piece is decoded together with the piece before it, because some tokenizers drop the space of a first token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        values = reader_of(tokenizer).bytes
        self._bytes = _Bytes(values) if values else None
        self._context = self._done = 0

    def push(self, token: int) -> str:
        """The text that this token completes; often "" inside a character."""
        return self.extend([token])

    def extend(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete, as pushing one after the other."""
        self.ids += tokens if self._bytes is None else self._bytes.whole(tokens)
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


class Pieces:
    """The text of an answer as far as it may be shown: whole characters, no stop string nor the beginning of one, no
    blanks at either end.

    stopped  a stop string came; what follows it is no part of the answer.
    read     characters that came, those that are not shown among them.
    given    of these, how many have been shown or left out for good.
    """

    def __init__(self, tokenizer: Any, stops: Stops) -> None:
        self.stops, self.stopped = stops, False
        self.read = self.given = 0
        self._detokenizer, self._kept, self._said = Detokenizer(tokenizer), "", False

    def add(self, ids: Sequence[int]) -> None:
        """Further tokens."""
        if ids and not self.stopped:
            self._add(self._detokenizer.extend(ids))

    def take(self, last: bool = False) -> str:
        """What can be shown now and has not been; `last`: nothing more will come."""
        if last and not self.stopped:
            self._add(self._detokenizer.finish())
        last = last or self.stopped
        kept = self._kept if last else self._kept[: len(self._kept) - self.stops.held(self._kept)]
        # Blanks at the very beginning are no part of the answer; those at the end are known only later.
        ready = kept.rstrip()
        skipped = 0 if self._said else len(ready) - len(ready.lstrip())
        self._kept = self._kept[len(ready) :]
        self.given += len(ready)
        self._said = self._said or skipped < len(ready)
        return ready[skipped:]

    def _add(self, text: str) -> None:
        self._kept += text
        self.read += len(text)
        if (cut := self.stops.cut(self._kept)) is not None:
            self.read -= len(self._kept) - len(cut)
            self._kept, self.stopped = cut, True


def spelling(tokenizer: Any, token: int) -> tuple[str, bytes]:
    """A token's text, and the bytes that it adds to an answer: no whole character where that is spread over several
    tokens, none where the token is special."""
    written = str(tokenizer.convert_ids_to_tokens(token))
    if token in tokenizer.all_special_ids:
        return written, b""
    if token in tokenizer.added_tokens_decoder:
        return written, written.encode()
    if all(letter in _BYTES for letter in written) and reader_of(tokenizer).byte_level:
        held = bytes(_BYTES[letter] for letter in written)
    elif len(written) == 6 and written.startswith("<0x"):  # SentencePiece's way of writing a byte
        held = bytes([int(written[3:5], 16)])
    else:
        held = written.replace("\u2581", " ").encode()
    return held.decode(errors="replace"), held


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for 256 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}


_BYTES = _byte_letters()
