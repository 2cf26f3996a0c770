"""The one engine that answers, for examining and for serving.

    Request -> prompt (inputs) -> Reply -> slots: image prefixes once, prompts and steps in batches -> Prediction

What it saves, against answering one by one: an image goes through the tower once, and so do the layers over its tokens,
however many questions there are about it, in one call or several; prompts of like length are computed together; a
finished answer's place is taken by the next. What it keeps: the tokens. In float32 they are those of one question at a
time, whatever company a request has.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leveret.generate.cache import Shelf
from leveret.generate.memory import Costs, Plan
from leveret.generate.sampling import Sampling
from leveret.generate.slots import Reply, Seen, Slots
from leveret.images import ImageFault, declared_size, read_bytes, upright_size
from leveret.images import decode as decode_image
from leveret.inputs.chat import encode, find_chat
from leveret.inputs.text import Pieces, Stops, decode
from leveret.inputs.tiles import prepare_all
from leveret.model.language import reach
from leveret.model.precision import Precision, resolve_precision
from leveret.model.threads import threads_for, threads_for_pass
from leveret.model.vlm import VLM
from leveret.records import IGNORE, ImageRef, Prediction, Turn
from leveret.runs import DataError

WINDOW = 8
"""Requests are sorted by length among `WINDOW` times as many as there are slots: wide enough that batches are even,
narrow enough that the questions about one image come soon after each other."""

TILES = 64
"""Tiles that go through the tower at once, at most, where images are seen in tiles (one image may have more)."""

SPELLED = 4096
"""Choices whose tokens are remembered, at most."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question to answer.

    images          as many as there are image marks in the user turns.
    turns           ends with a user turn.
    choices         the allowed answers; then none is generated, but the probability of each one's first token
                    is computed (the first not shared by all), and the text is the likeliest choice.
    max_new_tokens  of the answer; None takes the engine's.
    """

    question_id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    choices: tuple[str, ...] | None = None
    max_new_tokens: int | None = None


class ChoiceFault(DataError):
    """Choices that cannot be told apart."""


class Engine:
    """Answers requests with one model.

    slots           answers made at once.
    max_new_tokens  of an answer whose request does not say.
    precision       "auto" computes in bfloat16 where the hardware does so natively, else as the weights are.
    cache_bytes     memory for image features, and again for image prefixes, kept for later questions.
    memory          bytes that answering may take beside the weights (see `memory`): fewer slots, smaller passes and
                    less kept where they would take more. None puts no bound on it. Changes no answer.
    threads         torch's, while answering; None takes torch's own choice, and for a small model on the CPU one, but
                    in passes over very many positions. With 1, in float32 on a CPU, probabilities of choices are the
                    same bits in any company, which costs some time (see `Slots`).

    `plan` says what the last call of `answer` was allowed to hold.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        slots: int = 64,
        max_new_tokens: int = 64,
        precision: Precision = "auto",
        cache_bytes: int = 512 * 2**20,
        memory: int | None = None,
        threads: int | None = None,
    ) -> None:
        if slots < 1 or max_new_tokens < 1:
            raise DataError(f"slots and max_new_tokens must be at least 1; got {slots} and {max_new_tokens}")
        self.vlm = vlm.eval()
        self.max_new_tokens = max_new_tokens
        self.bf16 = resolve_precision(precision, vlm.device) == "bf16"
        self.stops = stops_of(vlm)
        self.eyes = Eyes(vlm, self.bf16, cache_bytes)
        usual = threads_for(vlm) if threads is None else threads
        alone = threads == 1 and vlm.device.type == "cpu" and not self.bf16
        size = sum(parameter.numel() for parameter in vlm.parameters())

        def of_pass(positions: int) -> int | None:
            return threads or threads_for_pass(usual, size, positions)

        self.threads = of_pass
        self.slots = Slots(
            vlm, slots, self.eyes.features, self.stops, bf16=self.bf16, shelf=cache_bytes, alone=alone, threads=of_pass
        )
        self.memory, self.most, self.kept = memory, slots, cache_bytes
        self.costs = Costs(vlm, self.bf16)
        self.plan: Plan | None = None
        self._spelled: dict[str, list[int]] = {}

    def answer(
        self, requests: Sequence[Request], on_prediction: Callable[[Prediction], None] | None = None
    ) -> list[Prediction]:
        """The likeliest answers, in the order of `requests`; `on_prediction` gets each as soon as it is ready.

        Prediction.meta: `tokens` (how many were generated), `finish`: "stop" (the model ended it), "length" (cut at
        its limit) or "choice".

        Raises DataError naming the question when a request cannot be answered (no image under its reference, marks that
        do not match, a prompt longer than the model allows, choices that begin with the same token), and RecipeError
        when `memory` is too little for one answer.
        """
        seen: dict[ImageRef, Picture] = {}
        replies = [self.reply(request, self.eyes.name, seen) for request in requests]
        self.plan = self.costs.plan(replies, self.most, self.kept, self.memory)
        if self.memory is not None:
            self.slots.follow(self.plan)
            self.eyes.keep(self.plan.features)
        number = {id(reply): place for place, reply in enumerate(replies)}
        predictions: list[Prediction | None] = [None] * len(replies)
        waiting = deque(self._order(replies))
        try:
            while waiting or self.slots.active:
                # Joining is worth a pass of its own only for many at once.
                if waiting and (2 * self.slots.free >= self.slots.size or not self.slots.active):
                    ended = self.slots.join([waiting.popleft() for _ in range(min(self.slots.free, len(waiting)))])
                else:
                    ended = self.slots.step()
                for reply in ended:
                    if (place := number.get(id(reply))) is None:
                        continue  # somebody's stream, which sees for itself that it ended
                    predictions[place] = prediction = self._prediction(requests[place], reply)
                    if on_prediction is not None:
                        on_prediction(prediction)
        finally:
            for reply in replies:
                self.slots.leave(reply)
        return [prediction for prediction in predictions if prediction is not None]

    def stream(
        self, request: Request, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None
    ) -> Generator[str, None, None]:
        """The answer in pieces as it is made; joined they are its text. Closing the iterator stops the answer.

        temperature, top_p, seed: see `Sampling`. Raises what `answer` raises, before the first piece.
        """
        reply = self.reply(request, self.eyes.name)
        reply.picker = Sampling(temperature, top_p, seed).picker()
        return self._pieces(reply)

    def _pieces(self, reply: Reply) -> Generator[str, None, None]:
        pieces, shown = Pieces(self.vlm.tokenizer, self.stops), 0
        try:
            if not self.slots.free:
                raise DataError(
                    f"{len(self.slots.active)} answers are being made, which is as many as this model has slots; take "
                    "one of them to its end or close it, or load the model with more `slots`"
                )
            self.slots.join([reply])
            while True:
                pieces.add(reply.tokens[shown:])
                shown = len(reply.tokens)
                last = reply.finish is not None  # asked before the piece is handed out: others may end it meanwhile
                if ready := pieces.take(last):
                    yield ready
                if last or pieces.stopped:
                    return
                self.slots.step()
        finally:
            self.slots.leave(reply)

    def reply(
        self, request: Request, look: Callable[[ImageRef], Picture], seen: dict[ImageRef, Picture] | None = None
    ) -> Reply:
        """The prompt of a request. Raises DataError where it cannot be answered.

        look  finds an image (`Eyes.name`, or `Eyes.look`, which unpacks it too). seen  images that were looked at.
        """
        seen = {} if seen is None else seen
        try:
            for ref in request.images:
                if ref not in seen:
                    seen[ref] = look(ref)
            pictures = tuple(seen[ref] for ref in request.images)
            sizes = [picture.size for picture in pictures]
            encoded = encode(request.turns, self.vlm.chat, self.vlm.tokenizer, self.vlm.spec, sizes, generate=True)
            shared, choices = self._choices(request.choices) if request.choices is not None else ([], ())
            ids, marks = encoded.input_ids + shared, encoded.image_mask + [False] * len(shared)
            if not ids:
                raise DataError(f"chat format {self.vlm.chat!r} writes nothing for this question: it needs an image")
            limit = self._limit(len(ids), request.max_new_tokens)
        except DataError as fault:
            if not request.question_id:  # a lone question needs no name
                raise
            kind = ChoiceFault if isinstance(fault, ChoiceFault) else DataError
            raise kind(f"question {request.question_id!r}: {fault}") from fault
        return Reply(ids, marks, tuple(picture.key for picture in pictures), limit, pictures, choices=choices)

    def _limit(self, prompt: int, asked: int | None) -> int:
        """Tokens an answer may have: what was asked for, as far as the model's positions reach."""
        limit = self.max_new_tokens if asked is None else asked
        if limit < 1:
            raise DataError(f"max_new_tokens must be at least 1; got {limit}")
        most = reach(self.vlm.language.config.get_text_config())
        if most is None:
            return limit
        if prompt >= most:
            raise DataError(
                f"the prompt fills {prompt} positions and the model has {most}; shorten the text or show fewer images"
            )
        return min(limit, most - prompt)

    def _choices(self, choices: tuple[str, ...]) -> tuple[list[int], tuple[int, ...]]:
        """(tokens that all choices begin with, the token in which each first differs from the others).

        What all share (often a blank of its own) is put behind the prompt, so that one pass still tells them apart.
        """
        if len(self._spelled) > SPELLED:
            self._spelled.clear()
        for choice in choices:
            if choice not in self._spelled:
                turns = (Turn("user", "?"), Turn("assistant", choice))
                encoded = encode(turns, self.vlm.chat, self.vlm.tokenizer, self.vlm.spec, ())
                self._spelled[choice] = [label for label in encoded.labels if label != IGNORE]
        spelled = [self._spelled[choice] for choice in choices]
        shared = common(spelled) if len(spelled) > 1 else 0
        firsts = tuple(ids[shared] for ids in spelled if len(ids) > shared)
        if not choices or not all(choice.strip() for choice in choices) or len(set(firsts)) < len(choices):
            raise ChoiceFault(
                f"choices: {list(choices)} must be answers that differ in the first token not shared by all"
            )
        return spelled[0][:shared], firsts

    def _order(self, replies: Sequence[Reply]) -> list[Reply]:
        """Questions about one image close together, and among those near each other the short before the long."""
        met: dict[Any, int] = {}
        together = sorted(replies, key=lambda reply: met.setdefault(reply.images, len(met)))
        size = WINDOW * self.slots.size
        ordered: list[Reply] = []
        for first in range(0, len(together), size):
            ordered += sorted(together[first : first + size], key=lambda reply: len(reply.ids) - reply.prefix)
        return ordered

    def _prediction(self, request: Request, reply: Reply) -> Prediction:
        meta = {"tokens": len(reply.tokens), "finish": reply.finish}
        if request.choices is not None:
            chances = dict(zip(request.choices, reply.chances, strict=True))
            return Prediction(request.question_id, max(chances, key=chances.__getitem__), chances, meta)
        text = decode(self.vlm.tokenizer, reply.tokens)
        cut = self.stops.cut(text)
        return Prediction(request.question_id, (text if cut is None else cut).strip(), None, meta)


@dataclass(slots=True, weakref_slot=True, eq=False)
class Picture:
    """An image that somebody asks about.

    key     the hash of its bytes.
    size    (height, width); where the model sees tiles, of the upright image.
    pixels  as the towers see it, by their names, if it was unpacked already.
    """

    ref: ImageRef
    key: str
    size: tuple[int, int]
    pixels: dict[str, NDArray[np.float32]] | None = None


class Eyes:
    """Images by the hash of their bytes: each goes through the tower once, as long as its features are kept.

    `name` and `look` may be called in any thread, the rest in the one that computes. Of an image that nobody asks
    about any more only the features are left, and those within `limit` bytes.
    """

    def __init__(self, vlm: VLM, bf16: bool, limit: int) -> None:
        self.vlm, self.bf16 = vlm, bf16
        self.shelf = Shelf(limit)
        self.hits = self.misses = 0  # images that were asked for, and had been seen or not
        self._known: WeakValueDictionary[str, Picture] = WeakValueDictionary()
        self._lock = Lock()

    def name(self, ref: ImageRef) -> Picture:
        """An image with its key and size; reads its bytes, unpacks nothing. ImageFault if it is refused.

        Where the model sees tiles, or images at their own shape, the size is that of the upright image, which says how
        many tokens it fills.
        """
        return self._named(ref)[0]

    def look(self, ref: ImageRef) -> Picture:
        """What `name` gives, and unpacked and resized, unless it has been seen. ImageFault if it is refused."""
        picture, data = self._named(ref)
        with self._lock:
            ready = picture.pixels is not None or (picture.key, False) in self.shelf
        if not ready:
            try:
                picture.pixels = prepare_all(decode_image(data), self.vlm.spec)
            except ImageFault as fault:
                raise fault.at(str(ref)) from fault
        return picture

    def _named(self, ref: ImageRef) -> tuple[Picture, bytes]:
        try:
            data = read_bytes(ref)
            width, height = declared_size(data) if self.vlm.spec.tiling is None else upright_size(data)
        except ImageFault as fault:
            raise fault.at(str(ref)) from fault
        key = hashlib.sha256(data).hexdigest()
        with self._lock:
            # One picture a key: it is known for as long as anyone holds it.
            picture = self._known.get(key)
            if picture is None:
                self._known[key] = picture = Picture(ref, key, (height, width))
        return picture, data

    def keep(self, limit: int) -> None:
        """Keep features within `limit` bytes from now on."""
        with self._lock:
            self.shelf.shrink(limit)

    def forget(self) -> None:
        """Give back the features that are kept."""
        with self._lock:
            limit = self.shelf.limit
            self.shelf.shrink(0)
            self.shelf.limit = limit

    def features(self, keys: Sequence[str], alone: bool = False) -> Seen:
        """What a batch needs of images that `name` has seen, in the order of `keys`: the tower's outputs of all their
        pictures, whose these are, and the images' sizes.

        alone  each goes through the tower by itself, so that its features are the same bits in any company.
        """
        with self._lock:
            pictures = {key: self._known[key] for key in keys}
            held = {key: block for key in keys if (block := self.shelf.get((key, alone))) is not None}
        missing = [key for key in dict.fromkeys(keys) if key not in held]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        for some in [[key] for key in missing] if alone else [missing] if missing else []:
            for key, block in zip(some, self._see([pictures[key] for key in some]), strict=True):
                held[key] = block.clone()  # memory of its own: a row of the batch would keep all of it
                with self._lock:
                    self.shelf.put((key, alone), held[key])
                pictures[key].pixels = None
        tiles = torch.tensor([len(held[key]) for key in keys], device=self.vlm.device)
        return {
            "features": torch.cat([held[key] for key in keys]),
            "tile_image": torch.repeat_interleave(torch.arange(len(keys), device=tiles.device), tiles),
            "image_sizes": torch.tensor([pictures[key].size for key in keys]),
        }

    def _see(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Tower outputs of each image: [1, tokens, width], or [tiles, tokens, width]."""
        blocks: list[Tensor] = []
        for some in self._passes(pictures):
            seen = [picture.pixels or prepare_all(self._load(picture.ref), self.vlm.spec) for picture in some]
            counts, device = [], self.vlm.device
            pixels = {}
            for view in self.vlm.spec.towers:
                shape = self.vlm.spec.shape(view)
                each = [torch.from_numpy(image[view.name]).reshape(-1, *shape) for image in seen]
                counts = [len(tiles) for tiles in each]
                pixels[view.name] = torch.cat(each).to(device)
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                sizes = torch.tensor([picture.size for picture in some])
                blocks += self.vlm.see(pixels, sizes).split(counts)
        return blocks

    def _passes(self, pictures: Sequence[Picture]) -> list[list[Picture]]:
        """Images that are seen together: all of them, or, in tiles, as many as have at most TILES."""
        tiling = self.vlm.spec.tiling
        if tiling is None:
            return [list(pictures)]
        passes: list[list[Picture]] = []
        filled = TILES
        for picture in pictures:
            count = tiling.tiles(*picture.size)
            if filled + count > TILES:
                passes, filled = [*passes, []], 0
            passes[-1].append(picture)
            filled += count
        return passes

    def _load(self, ref: ImageRef) -> Any:
        try:
            return decode_image(read_bytes(ref))
        except ImageFault as fault:
            raise fault.at(str(ref)) from fault


def stops_of(vlm: VLM) -> Stops:
    """What ends an answer of a model: what its chat format says, and what the model was published with."""
    generation = getattr(vlm.language, "generation_config", None)
    return Stops.of(find_chat(vlm.chat).stop, vlm.tokenizer, getattr(generation, "eos_token_id", None))


def common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    shared = 0
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared
