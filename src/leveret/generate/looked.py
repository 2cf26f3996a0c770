"""What was seen inside an answer: words, and their attention laid on the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from leveret.model.places import Canvas

SHARES = ("image", "first", "text", "answer", "nowhere")
"""Where attention goes, told apart: image tokens; the very first position (mostly a sink: where heads look that have
nothing to look for); the rest of the prompt; the answer so far; and what a family's own sinks swallow."""

_ALONE = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_LETTERS = rf"[^\W{_ALONE}]+"
_WORD = re.compile(rf"[{_ALONE}]|{_LETTERS}(?:[.,:'\u2019/-]{_LETTERS})*|[^\w\s]+")
"""A word: letters and digits with what joins them (don't, 0.28), other signs by themselves, and each character of
scripts that know no blanks."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the answer.

    text         what it adds to the answer.
    probability  that the model gave it, here.
    top          (token, probability) of the likeliest, likeliest first; this one comes last where it is none of them.
    own          its place in top.
    """

    text: str
    probability: float
    top: tuple[tuple[str, float], ...]
    own: int


@dataclass(frozen=True, slots=True)
class Word:
    """A word: tokens first .. last - 1 of the answer, or of the question's that were read."""

    text: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Near:
    """A word of the language model's table near a visual token.

    cosine  between the two, the table's mean taken off both.
    usual   the mean of the same cosine over all visual tokens of the conversation: what is not special to this one.
    """

    text: str
    cosine: float
    usual: float


@dataclass(frozen=True)
class Read:
    """The attention of some tokens. A tokens, W words, L layers, H heads, m visual tokens of all images.

    words    tokens joined to words.
    weights  float32 [A, L, m]: attention to each visual token, mean over heads. Together with what falls elsewhere it
             sums to 1.
    heads    float32 [A, L, H, m], where it was asked for.
    shares   float32 [A, L, 5]: where all attention went, by SHARES; sums to 1.
    """

    words: tuple[Word, ...]
    weights: Tensor
    heads: Tensor | None
    shares: Tensor

    def of_words(self, values: Tensor) -> Tensor:
        """Means over the tokens of each word: [A, ..] -> [W, ..]."""
        rows = [values[word.first : word.last].mean(0) for word in self.words]
        return torch.stack(rows) if rows else values.new_zeros(0, *values.shape[1:])


@dataclass(frozen=True)
class Look:
    """What was seen inside one answer.

    answer    the text.
    tokens    of the answer; `unread` more at its end were left out, so that memory stays bounded.
    said      the answer's words and their attention.
    asked     the same of the question: of the last user's words, at most the last ASKED tokens.
    canvases  the grids on the images that the visual tokens lie in.
    nearest   for every visual token, nearest first; empty where not asked for.
    notes     what a reader has to know of these maps.
    """

    answer: str
    tokens: tuple[Token, ...]
    said: Read
    asked: Read
    canvases: tuple[Canvas, ...]
    nearest: tuple[tuple[Near, ...], ...]
    notes: tuple[str, ...] = ()
    unread: int = 0

    @property
    def words(self) -> tuple[Word, ...]:
        return self.said.words

    @property
    def layers(self) -> int:
        return self.said.weights.shape[1]

    def maps(self, canvas: int, asked: bool = False) -> Tensor:
        """The attention of every word (of the answer, or of the question) laid on one canvas: float32
        [W, L, rows, columns]. What a token without a place (a newline, a class token) draws is on no canvas."""
        chosen, read = self.canvases[canvas], self.asked if asked else self.said
        return chosen.lay(read.of_words(read.weights)).unflatten(-1, chosen.grid)

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers rounded to 4 decimals.

        words         text, and the texts of its tokens.
        images        one entry a canvas: grid [rows, columns], shown [left, top, right, bottom] in fractions of the
                      upright picture; which image; part (picture, whole, tiles); placed (false: nobody knows where).
        layers        how many.
        weights       [canvas][word][layer][rows * columns], mean over heads.
        shares        names, and values [word][layer][name].
        asked         words, weights and shares' values of the question, in the same form.
        alternatives  of each token: its probability, and the likeliest [text, probability].
        nearest       [canvas][cell]: [word, cosine, usual cosine] of the visual token that stands there, or null.
        """
        return {
            "answer": self.answer,
            "words": [
                {"text": word.text, "tokens": [token.text for token in self.tokens[word.first : word.last]]}
                for word in self.words
            ],
            "images": [
                {
                    "grid": list(canvas.grid),
                    "shown": [round(side, 5) for side in canvas.shown],
                    "image": canvas.image,
                    "part": canvas.part,
                    "placed": canvas.placed,
                }
                for canvas in self.canvases
            ],
            "layers": self.layers,
            "weights": self._weights(asked=False),
            "shares": {"names": list(SHARES), "values": _rounded(self.said.of_words(self.said.shares))},
            "asked": {
                "words": [{"text": word.text} for word in self.asked.words],
                "weights": self._weights(asked=True),
                "shares": _rounded(self.asked.of_words(self.asked.shares)),
            },
            "alternatives": [
                {
                    "token": token.text,
                    "probability": round(token.probability, 4),
                    "top": [[text, round(probability, 4)] for text, probability in token.top],
                }
                for token in self.tokens
            ],
            "nearest": [
                [
                    None if token is None or not self.nearest else [
                        [near.text, round(near.cosine, 4), round(near.usual, 4)] for near in self.nearest[token]
                    ]
                    for token in canvas.stands()
                ]
                for canvas in self.canvases
            ],
            "notes": list(self.notes),
            "unread": self.unread,
        }  # fmt: skip

    def _weights(self, asked: bool) -> list[Any]:
        return [_rounded(self.maps(place, asked).flatten(2)) for place in range(len(self.canvases))]


def _rounded(values: Tensor) -> Any:
    return values.double().mul(1e4).round().div(1e4).tolist()


def split_words(texts: Sequence[str], ends: Sequence[int] = ()) -> tuple[Word, ...]:
    """Pieces of an answer joined to words; every token is in exactly one word.

    A token that holds parts of two words joins them; one that is only a blank, or only part of a character, goes with
    what follows. ends: numbers of tokens before which a word ends whatever it is (where a turn did).
    """
    if ends:
        cuts = [0, *ends, len(texts)]
        parts = [(first, split_words(texts[first:last])) for first, last in pairwise(cuts)]
        return tuple(Word(w.text, first + w.first, first + w.last) for first, words in parts for w in words)
    whole = "".join(texts)
    spans = [found.span() for found in _WORD.finditer(whole)]
    if not spans:
        return (Word(whole, 0, len(texts)),) if texts else ()
    word_at: list[int] = []  # of every character; a blank's is the next one
    for number, (_, end) in enumerate(spans):
        word_at += [number] * (end - len(word_at))
    word_at += [len(spans) - 1] * (len(whole) - len(word_at) + 1)
    groups: list[list[int]] = []  # first word, last word, first token, last token + 1
    place = 0
    for token, text in enumerate(texts):
        inked = [word_at[place + at] for at, letter in enumerate(text) if not letter.isspace()]
        low, high = (inked[0], inked[-1]) if inked else (word_at[place],) * 2
        place += len(text)
        if groups and low <= groups[-1][1]:
            groups[-1][1], groups[-1][3] = max(high, groups[-1][1]), token + 1
        else:
            groups.append([low, high, token, token + 1])
    return tuple(Word(whole[spans[low][0] : spans[high][1]], first, last) for low, high, first, last in groups)
