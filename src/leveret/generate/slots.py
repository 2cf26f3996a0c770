"""Slots that answers join and leave, one token a step for all of them.

    join    prompts -> rows of the cache. The part up to the last image is computed once per image (batched over images)
            and copied to every question about it; the rest of the prompts is one batch. Gives each its first token.
            Who only chooses between answers is done then, and on a CPU gets a pass of his own (see `Slots.alone`).
    step    one pass over the rows in use gives each answer its next token.
    leave   an answer that ends frees its row; a row from the end takes its place, so that rows in use are always 0..n-1
            and no pass computes or copies anything for a row that is free.

Nothing here knows of files, chat formats or records: serving and examining both stand on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from leveret.generate.cache import Shelf, SlotCache
from leveret.generate.memory import Plan, pass_tokens
from leveret.generate.sampling import Picker
from leveret.inputs.text import Stops, decode
from leveret.model.rows import MULTIPLE, only_rows
from leveret.model.threads import torch_threads
from leveret.model.vlm import VLM
from leveret.records import IGNORE, Batch
from leveret.runs import EnvironmentFault

TAIL = 16
"""Tokens looked back at for a stop string."""

Seen = dict[str, Tensor]
"""What a batch needs of its images: `features`, `tile_image` and `image_sizes` of `records.Batch`."""

Finish = Literal["stop", "length", "choice", "left", "closed", "failed"]


@dataclass(slots=True, eq=False)
class Reply:
    """One answer in the making.

    ids, marks  the prompt's token ids, and True where an image token stands.
    images      a key per image of the prompt, in reading order.
    pictures    whatever `features` needs to know its images by their keys; held for as long as the answer is.
    limit       tokens it may have.
    picker      draws its tokens; None takes the likeliest.
    choices     first token of every allowed answer: then nothing is generated, only `chances` is computed.
    tokens      what has been generated, without the stop token.
    chances     probability of each of `choices`, renormalised.
    finish      why it ended; None while it is being made.
    prefix      length of the part that other prompts with the same images may share: up to the last image token.
    key         what the keys and values of the prefix depend on.
    """

    ids: list[int]
    marks: list[bool]
    images: tuple[str, ...]
    limit: int
    pictures: tuple[object, ...] = ()
    picker: Picker | None = None
    choices: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    finish: Finish | None = None
    prefix: int = field(init=False)
    key: tuple[tuple[str, ...], tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        end = len(self.ids) - self.marks[::-1].index(True) if self.images else 0
        # A prompt that ends with its image (a bare caption) is computed whole: its last token must give logits.
        self.prefix = end if end < len(self.ids) else 0
        self.key = (self.images, tuple(self.ids[: self.prefix]))

    @property
    def position(self) -> int:
        """Where the newest token stands."""
        return len(self.ids) + len(self.tokens) - 1


class Slots:
    """Rows of one cache and the answers in them.

    size      rows at most.
    features  keys of images, and whether each is to be seen alone -> what `VLM.see` gives and how large they are.
    stops     what ends an answer.
    bf16      compute in bfloat16 autocast.
    shelf     bytes of image prefixes (keys and values) to keep for later questions.
    threads   says how many threads a pass over so many positions gets; None stands for torch's own choice.
    alone     give choices a pass of their own, of images too. The order in which a product sums depends on how many
              rows it has, so probabilities differ in their last digits with the company; computed alone they are the
              same bits whatever else is asked, before or after a stop, here or in another process.
    """

    def __init__(
        self,
        vlm: VLM,
        size: int,
        features: Callable[[Sequence[str], bool], Seen],
        stops: Stops,
        *,
        bf16: bool,
        shelf: int,
        alone: bool = False,
        threads: Callable[[int], int | None] = lambda positions: None,
    ) -> None:
        self.vlm, self.size, self.features, self.stops, self.bf16 = vlm, size, features, stops, bf16
        self.alone, self.pass_tokens, self.threads = alone, pass_tokens(vlm), threads
        self.active: list[Reply] = []
        self.prefixes = Shelf(shelf)
        self.masks = Masks(vlm.language.config.get_text_config())
        self.cache = SlotCache(self.masks.layers, torch.bfloat16 if bf16 else None)

    @property
    def free(self) -> int:
        return self.size - len(self.active)

    def follow(self, plan: Plan) -> None:
        """Keep to a plan from now on; nothing happens while answers are being made."""
        if self.active:
            return
        self.size, self.pass_tokens = plan.slots, plan.pass_tokens
        self.prefixes.shrink(plan.prefixes)
        self.cache.fit(plan.slots, plan.positions)

    @torch.inference_mode()
    def join(self, replies: Sequence[Reply]) -> list[Reply]:
        """Take in answers, at most `free`, and give each its first token. Returns those that end with it."""
        assert len(replies) <= self.free, "more answers than free slots"
        columns = max((len(reply.ids) + reply.limit for reply in replies), default=0)
        ended: list[Reply] = []
        first = len(self.active)
        single = [reply for reply in replies if reply.choices and self.alone]
        for _, group, blocks in self._prefixes(single, first, alone=True):
            for reply in group:
                self.cache.reserve(first + 1, columns)
                self._enter([reply], blocks)
                ended += self._compact()
        others = [reply for reply in replies if not (reply.choices and self.alone)]
        self.cache.reserve(first + len(others), columns)
        placed: list[Reply] = []
        for row, group, blocks in self._prefixes(others, first):
            self._fill(row, group, blocks)
            placed += group
        for chunk in chunked(placed, lambda reply: len(reply.ids) - reply.prefix, self.pass_tokens):
            self._enter(chunk)
        return ended + self._compact()

    def _threaded(self, positions: int, alone: bool = False) -> AbstractContextManager[None]:
        return torch_threads(1 if alone else self.threads(positions))

    def _fill(self, row: int, replies: Sequence[Reply], blocks: Mapping[Any, Tensor]) -> None:
        """Copy the prefixes of `replies` into the rows from `row` on."""
        for place, reply in enumerate(replies, row):
            if reply.prefix:
                self.cache.copy_in(place, blocks[reply.key])

    def _enter(self, replies: Sequence[Reply], blocks: Mapping[Any, Tensor] | None = None) -> None:
        """Compute prompts behind their prefixes, which stand in the next rows or are given as `blocks`."""
        first = len(self.active)
        if blocks is not None:
            self._fill(first, replies, blocks)
        alone = blocks is not None
        with self._threaded(sum(len(reply.ids) - reply.prefix for reply in replies), alone):
            batch = self._batch(
                [(reply.ids[reply.prefix :], reply.marks[reply.prefix :]) for reply in replies],
                [image for reply in replies if not reply.prefix for image in reply.images],
                alone=alone,
            )
            logits = self._forward(first, [reply.prefix for reply in replies], batch)
        self.active += replies
        self._take(replies, logits)

    @torch.inference_mode()
    def step(self) -> list[Reply]:
        """One more token for every answer. Returns those that ended, which have left their rows."""
        if not self.active:
            return []
        batch = self._batch([([reply.tokens[-1]], [False]) for reply in self.active])
        with self._threaded(len(self.active)):
            logits = self._forward(0, [reply.position for reply in self.active], batch)
        self._take(self.active, logits)
        return self._compact()

    @torch.inference_mode()
    def leave(self, reply: Reply) -> None:
        """Stop an answer that has not ended; nothing happens if it has."""
        if reply.finish is None and reply in self.active:
            reply.finish = "left"
            self._compact()

    def _prefixes(
        self, replies: Sequence[Reply], first: int, *, alone: bool = False
    ) -> Iterator[tuple[int, list[Reply], dict[Any, Tensor]]]:
        """(row, replies from this row on, keys and values of their image prefixes), the same images together.

        What is new is computed, in the rows of those that need it. As many prefixes at a time as a pass has room for:
        however many images are asked about, only these are held beside the shelf.
        """
        same: dict[Any, list[Reply]] = {}
        for reply in replies:
            same.setdefault(reply.key, []).append(reply)
        heads = [group[0] for group in same.values()]
        chunks = [[head] for head in heads] if alone else chunked(heads, lambda reply: reply.prefix, self.pass_tokens)
        row = first
        for chunk in chunks:
            blocks = {
                head.key: block
                for head in chunk
                if head.prefix and (block := self.prefixes.get((head.key, alone))) is not None
            }
            if missing := [head for head in chunk if head.prefix and head.key not in blocks]:
                self.cache.reserve(row + len(missing), max(head.prefix for head in missing))
                with self._threaded(sum(head.prefix for head in missing), alone):
                    batch = self._batch(
                        [(head.ids[: head.prefix], head.marks[: head.prefix]) for head in missing],
                        [image for head in missing for image in head.images],
                        alone=alone,
                    )
                    self._forward(row, [0] * len(missing), batch, logits=False)
                for place, head in enumerate(missing, row):
                    blocks[head.key] = block = self.cache.copy_out(place, head.prefix)
                    self.prefixes.put((head.key, alone), block)
            group = [reply for head in chunk for reply in same[head.key]]
            yield row, group, blocks
            row += 0 if alone else len(group)

    def _batch(
        self, rows: Sequence[tuple[list[int], list[bool]]], images: Sequence[str] = (), *, alone: bool = False
    ) -> Batch:
        """Rows of (ids, image mask) and their images, padded on the right; positions count from 0 here."""
        length = max(len(ids) for ids, _ in rows)
        pad = [self.vlm.tokenizer.pad_token_id or 0] * length
        device = self.vlm.device
        ids = torch.tensor([row + pad[len(row) :] for row, _ in rows], device=device)
        lengths = torch.tensor([len(row) for row, _ in rows], device=device)
        place = torch.arange(length, device=device).expand(len(rows), length)
        attention = place < lengths[:, None]
        masks = [mark + [False] * (length - len(mark)) for _, mark in rows]
        seen: Any = (
            self.features(images, alone) if images else {"tile_image": torch.empty(0, dtype=torch.long, device=device)}
        )
        return Batch(
            input_ids=ids, labels=torch.full_like(ids, IGNORE), attention_mask=attention, position_ids=place,
            segments=attention.long() - 1, image_mask=torch.tensor(masks, device=device),
            pixels={}, **seen,
        )  # fmt: skip

    def _forward(self, first: int, starts: list[int], batch: Batch, *, logits: bool = True) -> Tensor:
        """Run rows `first`.. of the cache on; row i's tokens stand at starts[i].. Gives [rows, V] at each row's end."""
        last = batch.attention_mask & (batch.position_ids == batch.attention_mask.sum(1, keepdim=True) - 1)
        with self._precision():
            embeddings = self.vlm.embed(batch)
            return self._run(first, starts, embeddings, batch.position_ids, last, last if logits else None)

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.vlm.device.type, torch.bfloat16, enabled=self.bf16)

    def _run(
        self, first: int, starts: list[int], embeddings: Tensor, place: Tensor, last: Tensor, wanted: Tensor | None
    ) -> Tensor:
        """The language model over `embeddings` [B, q, D] of rows `first`..

        place  [B, q], counted from 0. last  one True a row, at its last position. wanted  where logits are; None:
               nowhere.
        """
        length = embeddings.shape[1]
        at = place + torch.tensor(starts, device=place.device)[:, None]
        self.cache.aim(first, starts, length, at)
        # Padding repeats the last real position: a model with a table of positions has no row beyond its end.
        positions = torch.minimum(at, (at * last).amax(1, keepdim=True))
        mask = self.masks.of(at, max(starts) + length, embeddings.dtype)
        with only_rows(
            self.vlm.language, torch.zeros_like(last) if wanted is None else wanted, MULTIPLE if self.bf16 else 1
        ):
            out = self.vlm.language(
                inputs_embeds=embeddings, attention_mask=mask, position_ids=positions,
                past_key_values=self.cache, use_cache=True,
            )  # fmt: skip
        logits: Tensor = out.logits[0].float()
        return logits

    def _take(self, replies: Sequence[Reply], logits: Tensor) -> None:
        """Give every answer its next token (or its chances), and the reason why it ends where it does."""
        for reply, token, row in zip(replies, logits.argmax(-1).tolist(), logits, strict=True):
            if reply.choices:
                reply.chances = torch.softmax(row[list(reply.choices)].double(), dim=0).tolist()
                reply.finish = "choice"
                continue
            token = reply.picker(row) if reply.picker else token
            if token in self.stops.ids:
                reply.finish = "stop"
                continue
            reply.tokens.append(token)
            if self.stops.strings and self.stops.cut(decode(self.vlm.tokenizer, reply.tokens[-TAIL:])) is not None:
                reply.finish = "stop"
            elif len(reply.tokens) >= reply.limit:
                reply.finish = "length"

    def _compact(self) -> list[Reply]:
        """Drop the answers that ended; the last rows in use move into the holes."""
        ended = [reply for reply in self.active if reply.finish]
        if not ended:
            return []
        staying = len(self.active) - len(ended)
        holes = [row for row in range(staying) if self.active[row].finish]
        movers = [row for row in range(staying, len(self.active)) if not self.active[row].finish]
        if holes:
            self.cache.move(movers, holes, max(self.active[row].position for row in movers))
        for hole, mover in zip(holes, movers, strict=True):
            self.active[hole] = self.active[mover]
        del self.active[staying:]
        return ended


class Masks:
    """Who may look at whom, in the form the language model's attention code takes.

    Raises EnvironmentFault for models whose layers keep something other than keys and values, and for attention code
    that takes no mask of its own.
    """

    def __init__(self, config: Any) -> None:
        self.layers = int(config.num_hidden_layers)
        self.attention = str(getattr(config, "_attn_implementation", "eager"))
        if self.attention not in ("eager", "sdpa"):
            raise EnvironmentFault(
                f"attention {self.attention!r} cannot be used to answer: it takes no mask; allowed are eager and sdpa; "
                "set language.attention in the model's recipe"
            )
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if odd := kinds - {"full_attention", "sliding_attention"}:
            raise EnvironmentFault(f"the language model has layers of kind {sorted(odd)}; only attention with keys and "
                                   "values can be answered with")  # fmt: skip
        window = getattr(config, "sliding_window", None)
        # Mixed kinds get one mask each; else one mask serves all, windowed where the model says so by either habit.
        self.mixed = len(kinds) > 1
        windowed = "sliding_attention" in kinds or not hasattr(config, "layer_types")
        self.window = int(window) if window and windowed else 0

    def of(self, at: Tensor, reach: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """For queries at columns `at` [B, q] over columns 0..reach-1: [B, 1, q, reach]; or one per kind of layer."""
        behind = at[:, None, :, None] - torch.arange(reach, device=at.device)
        full = behind >= 0
        sliding = full & (behind < self.window) if self.window else full
        if self.mixed:
            return {"full_attention": self._form(full, dtype), "sliding_attention": self._form(sliding, dtype)}
        return self._form(sliding, dtype)

    def _form(self, allowed: Tensor, dtype: torch.dtype) -> Tensor:
        if self.attention == "sdpa":
            return allowed
        forbidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
        return torch.where(allowed, torch.zeros_like(forbidden), forbidden)


def chunked(replies: Sequence[Reply], length: Callable[[Reply], int], most: int) -> list[list[Reply]]:
    """Cut a list where a padded pass would have more than `most` positions."""
    chunks: list[list[Reply]] = []
    longest = 0
    for reply in replies:
        longest = max(longest, length(reply))
        if not chunks or longest * (len(chunks[-1]) + 1) > most:
            chunks.append([])
            longest = length(reply)
        chunks[-1].append(reply)
    return chunks
