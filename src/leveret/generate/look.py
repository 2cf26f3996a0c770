"""Looking inside an answer: where each of its words attends on the image, what else it might have been, and which
words each visual token is near to.

    turns, images -> the model's own answer, or one that is given -> one teacher-forced pass -> `Look`

The row that a word is read from is the one that chose it: the position before each of its tokens, in whose last hidden
state the token's probability stands too. What attention does and does not say: docs/look.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leveret.generate.engine import Eyes
from leveret.generate.gaze import watched
from leveret.generate.model import Model, reference
from leveret.generate.slots import Reply, Slots
from leveret.generate.text import BROKEN, Detokenizer, Stops, decode
from leveret.inputs.chat import encode, find_chat
from leveret.model.language import reach
from leveret.model.places import Canvas, canvases
from leveret.model.precision import resolve_precision
from leveret.model.rows import only_rows
from leveret.model.vlm import VLM
from leveret.records import IGNORE, Batch, ImageRef, Turn
from leveret.runs import DataError

if TYPE_CHECKING:
    from leveret.generate.model import Picture

MOST = 2**26
"""Weights that are kept at most: 256 MB of float32. Of an answer that needs more only the first tokens are read."""
PIECE = 2**24
"""Cosines that are computed at once."""
SHARES = ("image", "first", "text", "answer", "nowhere")
"""Where attention goes, told apart: image tokens; the very first position (mostly a sink: where heads look that have
nothing to look for); the rest of the prompt; the answer so far; and what a family's own sinks swallow."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
"""A word: what blanks part, and each character of scripts that know no blanks."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the answer.

    text         what it adds to the answer.
    probability  that the model gave it, here.
    top          (token, probability) of the likeliest, likeliest first; this one may or may not be among them.
    """

    text: str
    probability: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Word:
    """A word of the answer: tokens first .. last - 1."""

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
class Look:
    """What was seen inside one answer. A tokens, W words, L layers, H heads, m visual tokens of all images.

    answer    the text.
    tokens    of the answer, A of them; `unread` more at its end were left out, so that memory stays bounded.
    words     tokens joined to words.
    canvases  the grids on the images that the visual tokens lie in.
    weights   float32 [A, L, m]: attention to each visual token, mean over heads. Together with what falls elsewhere it
              sums to 1.
    heads     float32 [A, L, H, m], where it was asked for.
    shares    float32 [A, L, 5]: where all attention went, by SHARES; sums to 1.
    nearest   for every visual token, nearest first; empty where not asked for.
    notes     what a reader has to know of these maps.
    """

    answer: str
    tokens: tuple[Token, ...]
    words: tuple[Word, ...]
    canvases: tuple[Canvas, ...]
    weights: Tensor
    heads: Tensor | None
    shares: Tensor
    nearest: tuple[tuple[Near, ...], ...]
    notes: tuple[str, ...] = ()
    unread: int = 0

    @property
    def layers(self) -> int:
        return self.weights.shape[1]

    def of_words(self, values: Tensor) -> Tensor:
        """Means over the tokens of each word: [A, ..] -> [W, ..]."""
        rows = [values[word.first : word.last].mean(0) for word in self.words]
        return torch.stack(rows) if rows else values.new_zeros(0, *values.shape[1:])

    def maps(self, canvas: int) -> Tensor:
        """The attention of every word laid on one canvas: float32 [W, L, rows, columns]. What a token without a place
        (a newline, a class token) draws is on no canvas."""
        chosen = self.canvases[canvas]
        return chosen.lay(self.of_words(self.weights)).unflatten(-1, chosen.grid)

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers rounded to 4 decimals.

        words         text, and the texts of its tokens.
        images        one entry a canvas: grid [rows, columns], shown [left, top, right, bottom] in fractions of the
                      upright picture; which image; part (picture, whole, tiles); placed (false: nobody knows where).
        layers        how many.
        weights       [canvas][word][layer][rows * columns], mean over heads.
        shares        names, and values [word][layer][name].
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
            "weights": [_rounded(self.maps(place).flatten(2)) for place in range(len(self.canvases))],
            "shares": {"names": list(SHARES), "values": _rounded(self.of_words(self.shares))},
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


def _rounded(values: Tensor) -> Any:
    return values.double().mul(1e4).round().div(1e4).tolist()


def look(
    model: Model | VLM,
    turns: Sequence[Turn],
    images: Sequence[Picture] = (),
    answer: str | None = None,
    *,
    max_new_tokens: int = 64,
    top: int = 5,
    near: int = 5,
    heads: bool = False,
    most: int = MOST,
) -> Look:
    """Look inside `answer` to a conversation that ends with a user turn; None takes the model's own, greedily.

    model           a Model keeps its precision and the image features it has; nothing of either is changed.
    images          one per image mark in the user turns, in reading order: paths, bytes, PIL images or ImageRefs.
    max_new_tokens  of an answer of its own.
    top             alternatives per token. near: words per visual token; 0 leaves them out.
    heads           keep the weights of every head, too.
    most            weights that are kept: bounds memory.

    Call it where the model is called (a server: on the engine's thread).

    Raises DataError when an image, a turn or the answer is refused, or all of it is longer than the model's positions;
    EnvironmentFault when the model's attention cannot be read.
    """
    vlm = model.vlm if isinstance(model, Model) else model
    if vlm.training:
        raise DataError("the model is in training: only a model that answers can be looked into; call eval() first")
    bf16 = model.engine.bf16 if isinstance(model, Model) else resolve_precision("auto", vlm.device) == "bf16"
    eyes = model.engine.eyes if isinstance(model, Model) else Eyes(vlm, bf16, 2**28)
    refs = [ref for image in images if (ref := reference(image)) is not None]
    seen = _Seen(vlm, bf16, eyes, refs)
    ids, marks, first = seen.own(turns, max_new_tokens) if answer is None else seen.given(turns, answer)
    return seen.look(ids, marks, first, top=top, near=near, heads=heads, most=most)


class _Seen:
    """A model and the images of one conversation."""

    def __init__(self, vlm: VLM, bf16: bool, eyes: Eyes, refs: Sequence[ImageRef]) -> None:
        self.vlm, self.bf16, self.eyes = vlm, bf16, eyes
        named = [eyes.name(ref) for ref in refs]
        self.keys, self.sizes = tuple(key for key, _ in named), [size for _, size in named]
        generation = getattr(vlm.language, "generation_config", None)
        self.stops = Stops.of(find_chat(vlm.chat).stop, vlm.tokenizer, getattr(generation, "eos_token_id", None))

    def own(self, turns: Sequence[Turn], limit: int) -> tuple[list[int], list[bool], int]:
        """The prompt and the model's own answer: ids, image mask, and where the answer begins."""
        if limit < 1:
            raise DataError(f"max_new_tokens must be at least 1; got {limit}")
        prompt = encode(turns, self.vlm.chat, self.vlm.tokenizer, self.vlm.spec, self.sizes, generate=True)
        length = len(prompt.input_ids)
        self._fits(length + 1)
        if (bound := reach(self.vlm.language.config.get_text_config())) is not None:
            limit = min(limit, bound - length)
        # A slot of its own: answers that others are being given in the engine's slots are not touched.
        slots = Slots(self.vlm, 1, self.eyes.features, self.stops, bf16=self.bf16, shelf=0)
        reply = Reply(prompt.input_ids, prompt.image_mask, self.keys, limit)
        slots.join([reply])
        while reply.finish is None:
            slots.step()
        tokens = self._said(reply.tokens)
        return prompt.input_ids + tokens, prompt.image_mask + [False] * len(tokens), length

    def given(self, turns: Sequence[Turn], answer: str) -> tuple[list[int], list[bool], int]:
        """The same of an answer that somebody gives."""
        if not answer.strip():
            raise DataError("the answer is empty: give it some words, or none to look into the model's own")
        if turns and turns[-1].role != "user":
            raise DataError(f"nothing to answer: the last turn is the {turns[-1].role}'s, it must be the user's")
        whole = encode(
            (*turns, Turn("assistant", answer)), self.vlm.chat, self.vlm.tokenizer, self.vlm.spec, self.sizes
        )
        labels = whole.labels
        end = max((place for place, label in enumerate(labels) if label != IGNORE), default=-1) + 1
        first = end
        while first and labels[first - 1] != IGNORE:
            first -= 1
        tokens = self._said(whole.input_ids[first:end])
        if not tokens or not first:
            raise DataError(f"chat format {self.vlm.chat!r} writes nothing that could be looked into for this answer")
        end = first + len(tokens)
        self._fits(end)
        return whole.input_ids[:end], whole.image_mask[:end], first

    def _fits(self, length: int) -> None:
        most = reach(self.vlm.language.config.get_text_config())
        if most is not None and length > most:
            raise DataError(f"prompt and answer fill {length} positions and the model has {most}; shorten one of them")

    def _said(self, tokens: Sequence[int]) -> list[int]:
        """An answer's tokens without what ends it."""
        said = list(tokens)
        while said and said[-1] in self.stops.ids:
            said.pop()
        text = decode(self.vlm.tokenizer, said)
        kept = self.stops.cut(text)
        kept = (text if kept is None else kept).rstrip()
        while said and len(decode(self.vlm.tokenizer, said[:-1])) >= len(kept):
            said.pop()
        return said

    @torch.inference_mode()
    def look(
        self, ids: list[int], marks: list[bool], first: int, *, top: int, near: int, heads: bool, most: int
    ) -> Look:
        vlm, device = self.vlm, self.vlm.device
        config = vlm.language.config.get_text_config()
        layers, count = int(config.num_hidden_layers), sum(marks)
        each = layers * max(count, 1) * (1 + int(config.num_attention_heads) * heads)
        said = len(ids) - first
        read = min(said, max(1, most // each))
        answer = decode(vlm.tokenizer, ids[first:]).strip()
        ids, marks = ids[: first + read], marks[: first + read]
        batch = self._batch(ids, marks)
        rows = torch.arange(first - 1, first - 1 + read, device=device)
        kinds = _kinds(marks, first, device)
        eye = batch.image_mask[0]
        weights = torch.zeros(read, layers, count)
        each_head = torch.zeros(read, layers, int(config.num_attention_heads), count) if heads else None
        shares = torch.zeros(read, layers, len(SHARES))

        def take(layer: int, at: int, found: Tensor) -> None:
            """found [rows, heads, T]"""
            here = slice(at, at + len(found))
            mean = found.mean(1)  # [rows, T]
            weights[here, layer] = mean[:, eye].cpu()
            if each_head is not None:
                each_head[here, layer] = found[..., eye].cpu()
            parts = mean @ kinds  # [rows, 4]
            shares[here, layer, :-1] = parts.cpu()
            shares[here, layer, -1] = (1 - parts.sum(-1)).clamp(min=0).cpu()

        wanted = torch.zeros_like(batch.image_mask)
        wanted[0, rows] = True
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = vlm.embed(batch)
            with watched(vlm.language, rows, take), only_rows(vlm.language, wanted, 1):
                logits = vlm.language(
                    inputs_embeds=embeddings, attention_mask=batch.attention_mask.long(),
                    position_ids=batch.position_ids, use_cache=False,
                ).logits[0].float()  # fmt: skip
            lying, notes = ([], []) if batch.features is None else canvases(vlm, batch.features, self.sizes)
        chosen = ids[first:]
        tokens = self._tokens(chosen, logits, top)
        return Look(
            answer, tokens, _words([token.text for token in tokens]), tuple(lying), weights, each_head, shares,
            nearest(vlm, embeddings[0, eye], near) if near and count else (), tuple(notes), said - read,
        )  # fmt: skip

    def _batch(self, ids: list[int], marks: list[bool]) -> Batch:
        device = self.vlm.device
        row = torch.tensor([ids], device=device)
        seen: Any = self.eyes.features(self.keys) if self.keys else {"tile_image": torch.empty(0, dtype=torch.long)}
        return Batch(
            input_ids=row, labels=torch.full_like(row, IGNORE), attention_mask=torch.ones_like(row, dtype=torch.bool),
            position_ids=torch.arange(len(ids), device=device)[None], segments=torch.zeros_like(row),
            image_mask=torch.tensor([marks], device=device), pixels={}, **seen,
        )  # fmt: skip

    def _tokens(self, ids: Sequence[int], logits: Tensor, top: int) -> tuple[Token, ...]:
        tokenizer = self.vlm.tokenizer
        chances = logits.softmax(-1)
        best = chances.topk(min(top, chances.shape[-1]), dim=-1)
        writer, texts = Detokenizer(tokenizer), []
        for place, token in enumerate(ids):
            text = writer.push(token)
            texts.append(text + writer.finish() if place == len(ids) - 1 else text)
        return tuple(
            Token(
                text,
                float(chances[place, token]),
                tuple(
                    (_spelled(tokenizer, other), chance)
                    for other, chance in zip(best.indices[place].tolist(), best.values[place].tolist(), strict=True)
                ),
            )
            for place, (token, text) in enumerate(zip(ids, texts, strict=True))
        )


def _kinds(marks: Sequence[bool], first: int, device: Any) -> Tensor:
    """[T, 4]: one 1 a position, by the first four of SHARES."""
    found = torch.zeros(len(marks), 4, device=device)
    for place, mark in enumerate(marks):
        found[place, 0 if mark else 1 if place == 0 else 2 if place < first else 3] = 1.0
    return found


def _spelled(tokenizer: Any, token: int) -> str:
    """A token for reading: its text, or its name where that is no text by itself."""
    text = decode(tokenizer, [token])
    return text if text and BROKEN not in text else str(tokenizer.convert_ids_to_tokens(token))


def _words(texts: Sequence[str]) -> tuple[Word, ...]:
    """Pieces of an answer joined to words; every token is in exactly one word.

    A token that holds parts of two words joins them; one that is only a blank, or only part of a character, goes with
    what follows.
    """
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


def nearest(vlm: VLM, visual: Tensor, count: int) -> tuple[tuple[Near, ...], ...]:
    """The `count` words of the language model's table nearest to each visual token [m, D], by cosine.

    The mean row of the table is taken off both: all rows share it, so it tells no word from another. What is left is
    told beside the mean of the same cosine over all visual tokens. Special tokens and fragments of characters are no
    words.
    """
    tokenizer = vlm.tokenizer
    table = vlm.language.get_input_embeddings().weight[: len(tokenizer)].float()
    mean = table.mean(0)
    rows = torch.nn.functional.normalize(table - mean, dim=-1)
    tokens = torch.nn.functional.normalize(visual.float() - mean, dim=-1)
    usual = rows @ tokens.mean(0)  # [V]
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long, device=rows.device)
    found: list[tuple[Near, ...]] = []
    spelled: dict[int, str] = {}
    step = max(1, PIECE // len(rows))
    for first in range(0, len(tokens), step):
        cosines = tokens[first : first + step] @ rows.T
        cosines[:, special[special < len(rows)]] = -2
        best = cosines.topk(min(8 * count, len(rows)), dim=-1)
        for values, ids in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            kept: list[Near] = []
            for cosine, token in zip(values, ids, strict=True):
                text = spelled.setdefault(token, decode(tokenizer, [token]))
                if text.strip() and BROKEN not in text and cosine >= -1.5 and len(kept) < count:
                    kept.append(Near(text.strip(), cosine, float(usual[token])))
            found.append(tuple(kept))
    return tuple(found)
