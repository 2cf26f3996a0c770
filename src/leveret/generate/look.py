"""Looking inside an answer: where each of its words attends on the image, what else it might have been, and which
words each visual token is near to.

    turns, images -> the model's own answer, or one that is given -> one teacher-forced pass -> `Look`

An answer's word is read at the row that chose it: the position before each of its tokens, in whose last hidden state
the token's probability stands too. A question's word is read at its own row: what it gathers there is what the answer
may find in the text later, without a look at the picture. What attention does and does not say: docs/look.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from leveret.generate.engine import Eyes, stops_of
from leveret.generate.gaze import watched
from leveret.generate.looked import SHARES, Look, Near, Read, Token, split_words
from leveret.generate.model import Model, reference
from leveret.generate.slots import Reply, Slots
from leveret.images import read_bytes, upright_size
from leveret.inputs.chat import encode
from leveret.inputs.text import BROKEN, Detokenizer, decode
from leveret.model.language import reach
from leveret.model.places import canvases
from leveret.model.precision import resolve_precision
from leveret.model.rows import only_rows
from leveret.model.vlm import VLM
from leveret.records import IGNORE, IMAGE_MARK, Batch, ImageRef, Turn
from leveret.runs import DataError

if TYPE_CHECKING:
    from leveret.generate.model import Picture

MOST = 2**26
"""Weights that are kept at most: 256 MB of float32. Of an answer that needs more only the first tokens are read."""
PIECE = 2**24
"""Numbers of the language model's table, or cosines to it, that are held at once."""
ASKED = 64
"""Tokens of the question that are read, at most: the last ones."""


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

    model           a Model with its precision and the image features it keeps; a VLM computes as `Engine` does when
                    nothing is said. Neither is changed.
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
    question = next((turn.text for turn in reversed(turns) if turn.role == "user"), "").replace(IMAGE_MARK, "").strip()
    return seen.look(ids, marks, first, question, top=top, near=near, heads=heads, most=most)


class _Seen:
    """A model and the images of one conversation."""

    def __init__(self, vlm: VLM, bf16: bool, eyes: Eyes, refs: Sequence[ImageRef]) -> None:
        self.vlm, self.bf16, self.eyes = vlm, bf16, eyes
        self.pictures = [eyes.name(ref) for ref in refs]  # held: the engine knows an image while somebody does
        self.keys = tuple(one.key for one in self.pictures)
        self.sizes = [upright_size(read_bytes(ref))[::-1] for ref in refs]  # where no tile counts, a name tells another
        self.stops = stops_of(vlm)

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
        if not turns or turns[-1].role != "user":
            raise DataError("nothing to answer: the last turn must be the user's")
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
        while said and decode(self.vlm.tokenizer, said[:-1]).startswith(kept):
            said.pop()
        return said

    @torch.inference_mode()
    def look(
        self,
        ids: list[int],
        marks: list[bool],
        first: int,
        question: str,
        *,
        top: int,
        near: int,
        heads: bool,
        most: int,
    ) -> Look:
        vlm, device = self.vlm, self.vlm.device
        config = vlm.language.config.get_text_config()
        layers, count, every = int(config.num_hidden_layers), sum(marks), int(config.num_attention_heads)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            seen: Any = self.eyes.features(self.keys) if self.keys else {"tile_image": torch.empty(0, dtype=torch.long)}
            lying, notes = canvases(vlm, seen["features"], self.sizes) if self.keys else ([], [])
        # A learned query lies in every cell of its map, so maps may be larger than what draws them.
        wide = max(count, sum(canvas.grid[0] * canvas.grid[1] for canvas in lying), 1)
        room = max(2, most // (layers * wide * (1 + every * heads)))
        whole = self._asked(ids, marks, first, question)
        asked = whole[-min(ASKED, room // 2) :]
        if len(asked) < len(whole):
            notes = [*notes, f"Of the question's {len(whole)} tokens the last {len(asked)} were read."]
        said = len(ids) - first
        read = min(said, room - len(asked))
        answer = decode(vlm.tokenizer, ids[first:]).strip()
        ids, marks = ids[: first + read], marks[: first + read]
        batch = self._batch(ids, marks, seen)
        rows = torch.tensor([*asked, *range(first - 1, first - 1 + read)], dtype=torch.long, device=device)
        kinds = _kinds(marks, first, device)
        eye = batch.image_mask[0]
        weights = torch.zeros(len(rows), layers, count)
        each_head = torch.zeros(len(rows), layers, every, count) if heads else None
        shares = torch.zeros(len(rows), layers, len(SHARES))

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
        # The row before the answer may be a word of the question, too: `only_rows` gives it once.
        tokens = self._tokens(ids[first:], logits[-read:], top)

        def piece(part: slice, texts: Sequence[str], ends: Sequence[int] = ()) -> Read:
            heads = None if each_head is None else each_head[part]
            return Read(split_words(texts, ends), weights[part], heads, shares[part])

        # Between turns stand tokens of the chat format, which are no words.
        ends = [at for at in range(1, len(asked)) if asked[at] > asked[at - 1] + 1]

        return Look(
            answer, tokens, piece(slice(len(asked), None), [token.text for token in tokens]),
            piece(slice(0, len(asked)), self._texts([ids[place] for place in asked]), ends), tuple(lying),
            nearest(vlm, embeddings[0, eye], near) if near and count else (), tuple(notes), said - read,
        )  # fmt: skip

    def _asked(self, ids: Sequence[int], marks: Sequence[bool], first: int, question: str) -> list[int]:
        """Where the question's tokens stand: those of the last user's words, without what a chat format writes around
        them. All tokens behind the image where a tokenizer writes these words in another way."""
        begin = max((place + 1 for place, mark in enumerate(marks) if mark), default=0)
        special = {*self.vlm.tokenizer.all_special_ids, *self.stops.ids}
        places = [place for place in range(begin, first) if ids[place] not in special]
        texts = self._texts([ids[place] for place in places])
        start = "".join(texts).rfind(question)
        if start < 0:
            return places
        found, length = [], 0
        for place, text in zip(places, texts, strict=True):
            at, length = length, length + len(text)
            if at < start + len(question) and (length > start or (not text and at == start)):
                found.append(place)
        return found

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; what was never a whole character comes with the last one."""
        writer = Detokenizer(self.vlm.tokenizer)
        texts = [writer.push(token) for token in ids]
        return [*texts[:-1], texts[-1] + writer.finish()] if texts else []

    def _batch(self, ids: list[int], marks: list[bool], seen: Any) -> Batch:
        device = self.vlm.device
        row = torch.tensor([ids], device=device)
        return Batch(
            input_ids=row, labels=torch.full_like(row, IGNORE), attention_mask=torch.ones_like(row, dtype=torch.bool),
            position_ids=torch.arange(len(ids), device=device)[None], segments=torch.zeros_like(row),
            image_mask=torch.tensor([marks], device=device), pixels={}, **seen,
        )  # fmt: skip

    def _tokens(self, ids: Sequence[int], logits: Tensor, top: int) -> tuple[Token, ...]:
        tokenizer = self.vlm.tokenizer
        chances = logits.softmax(-1)
        best = chances.topk(min(top, chances.shape[-1]), dim=-1)
        found = []
        for place, (token, text) in enumerate(zip(ids, self._texts(ids), strict=True)):
            others, values = best.indices[place].tolist(), best.values[place].tolist()
            mine = float(chances[place, token])
            if token not in others:
                others, values = [*others, token], [*values, mine]
            spelled = [_spelled(tokenizer, other) for other in others]
            found.append(Token(text, mine, tuple(zip(spelled, values, strict=True)), others.index(token)))
        return tuple(found)


def _kinds(marks: Sequence[bool], first: int, device: Any) -> Tensor:
    """[T, 4]: one 1 a position, by the first four of SHARES."""
    kinds = [0 if mark else 1 if place == 0 else 2 if place < first else 3 for place, mark in enumerate(marks)]
    return torch.eye(4)[kinds].to(device)


def _spelled(tokenizer: Any, token: int) -> str:
    """A token for reading: its text, or its name where that is no text by itself."""
    text = decode(tokenizer, [token])
    return text if text and BROKEN not in text else str(tokenizer.convert_ids_to_tokens(token))


@torch.inference_mode()
def nearest(vlm: VLM, visual: Tensor, count: int) -> tuple[tuple[Near, ...], ...]:
    """The `count` words of the language model's table nearest to each visual token [m, D], by cosine.

    The mean row of the table is taken off both: all rows share it, so it tells no word from another. What is left is
    told beside the mean of the same cosine over all visual tokens. Special tokens and fragments of characters are no
    words.
    """
    tokenizer, embedding = vlm.tokenizer, vlm.language.get_input_embeddings()
    table = embedding.weight[: len(tokenizer)]
    # Gemma's rows are scaled before they are read, and visual tokens stand beside the scaled ones.
    scale = float(getattr(embedding, "embed_scale", 1.0))
    mean = table.mean(0, dtype=torch.float32) * scale
    tokens = normalize(visual.float() - mean, dim=-1)
    middle = tokens.mean(0)
    special = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    special[[token for token in tokenizer.all_special_ids if token < len(table)]] = True
    best = tokens.new_zeros(len(tokens), 0)
    words = torch.zeros(len(tokens), 0, dtype=torch.long, device=tokens.device)
    usual: list[Tensor] = []
    step = max(1, PIECE // max(len(tokens), table.shape[1]))
    for first in range(0, len(table), step):  # a table of 150,000 rows is never held in float32
        rows = normalize(table[first : first + step].float() * scale - mean, dim=-1)
        usual.append(rows @ middle)
        cosines = (tokens @ rows.T).masked_fill(special[first : first + step], -2.0)
        here = torch.arange(first, first + len(rows), device=words.device).expand(len(tokens), -1)
        best, order = torch.cat([best, cosines], 1).topk(min(8 * count, first + len(rows)), dim=1)
        words = torch.cat([words, here], 1).gather(1, order)
    mostly = torch.cat(usual).tolist()
    spelled = {token: decode(tokenizer, [token]) for token in set(words.flatten().tolist())}
    found: list[tuple[Near, ...]] = []
    for values, ids in zip(best.tolist(), words.tolist(), strict=True):
        fit = [
            Near(spelled[token].strip(), cosine, mostly[token])
            for cosine, token in zip(values, ids, strict=True)
            if cosine > -1.5 and spelled[token].strip() and BROKEN not in spelled[token]
        ]
        found.append(tuple(fit[:count]))
    return tuple(found)
