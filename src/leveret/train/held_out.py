"""Samples that a stage does not learn from: their loss, and the model's own answers to a few of them.

    STAGE/held-out/quarantine.jsonl pictures/    those that cannot be used; small pictures for the run's page

A validator like any other (`validator(vlm, step) -> dict`), made where a stage has `held_out`. It draws no random
number and leaves nothing changed, so a run with it gives the same bits as one without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.pool.base import Source
from leveret.records import IGNORE, IMAGE_MARK, Sample
from leveret.runs import DataError, RecipeError, sha256_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from leveret.model.vlm import VLM
    from leveret.train.data import Prepared
    from leveret.train.stages import StageRecipe

SIDE = 160
"""Pixels of the small pictures."""


class Some(Source):
    """`count` samples of a source, spread evenly over it: data are often sorted."""

    def __init__(self, whole: Source, count: int) -> None:
        super().__init__(whole.path, whole.root)
        self.whole, self.name = whole, whole.name
        count = min(count, len(whole))
        self.places = [index * len(whole) // count for index in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def _draft(self, index: int) -> Sample:
        return self.whole.sample(self.places[index])

    def _trace(self, index: int) -> tuple[bytes, Sequence[str]]:
        return self.whole._trace(self.places[index])

    def advice(self, reasons: Mapping[str, int], seen: int) -> str:
        return self.whole.advice(reasons, seen)


def open_held_out(stage: StageRecipe, name: str, learned: Source) -> Some | None:
    """The stage's held-out samples. DataError where they are missing; RecipeError where it learns from the same."""
    from leveret.pool import open_source

    how = stage.held_out
    if how is None:
        return None
    try:
        whole = open_source(how.data, how.images)
    except DataError as error:
        raise DataError(f"stages.{name}.held_out.data: {error}") from error
    if not len(whole):
        raise DataError(f"stages.{name}.held_out.data: {how.data} holds no sample")
    if whole.path.resolve() == learned.path.resolve() or whole.fingerprint() == learned.fingerprint():
        raise RecipeError(f"stages.{name}.held_out.data: {how.data} is what the stage learns from; give it other data")
    return Some(whole, how.count)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One sample that is answered: its row in the arrays, how many positions its question takes, and what page and
    file say of it."""

    row: int
    length: int
    said: dict[str, Any]


class HeldOut:
    """The validator of one stage's held-out samples; gives `loss` (mean over supervised tokens) and `texts`."""

    def __init__(self, stage: StageRecipe, source: Some, data: Prepared, folder: Path, computing: Any) -> None:
        """computing: gives the context (autocast) that a forward pass runs in."""
        assert stage.held_out is not None
        self.data, self.computing, self.longest = data, computing, stage.held_out.max_answer
        self.chat = stage.chat
        self.size = min(stage.micro_batch or stage.batch, stage.batch)
        self.asked = _asked(source, data, stage.held_out.answers, folder / "pictures")

    def __call__(self, vlm: VLM, step: int) -> dict[str, Any]:
        import torch

        loss, count = 0.0, 0
        with torch.no_grad():
            for at in range(0, len(self.data), self.size):
                batch, _ = self.data.batch(range(at, min(at + self.size, len(self.data))), vlm.spec)
                with self.computing():
                    out = vlm(batch.to(str(vlm.device)))
                loss += float(out.loss_sum)
                count += out.supervised
            texts = [{**one.said, "answer": self._answer(vlm, one)} for one in self.asked]
        return {"loss": loss / max(1, count), **({"texts": texts} if texts else {})}

    def _answer(self, vlm: VLM, one: _Asked) -> str:
        """The model's greedy answer."""
        from leveret.inputs.formats import find_chat
        from leveret.inputs.text import Stops, decode

        batch, _ = self.data.batch([one.row], vlm.spec)
        cut = {
            name: getattr(batch, name)[:, : one.length]
            for name in ("input_ids", "labels", "attention_mask", "position_ids", "segments", "image_mask")
        }
        stops = Stops.of(find_chat(self.chat or vlm.chat).stop, vlm.tokenizer)
        ends = stops.ids
        pad = vlm.tokenizer.pad_token_id
        with self.computing():
            said = vlm.generate(
                replace(batch, **cut).to(str(vlm.device)),
                max_new_tokens=self.longest, do_sample=False, eos_token_id=sorted(ends),
                pad_token_id=min(ends) if pad is None else pad,
            )[0].tolist()  # fmt: skip
        kept = next((said[:place] for place, token in enumerate(said) if token in ends), said)
        text = decode(vlm.tokenizer, kept)
        short = stops.cut(text)
        return (text if short is None else short).strip()


def _asked(source: Some, data: Prepared, count: int, pictures: Path) -> list[_Asked]:
    """The first `count` usable samples whose images all stand before the first answer, with their words."""
    found: list[_Asked] = []
    for row in range(len(data)):
        if len(found) == count:
            break
        start, end = data.offsets[row], data.offsets[row + 1]
        length = int((data.labels[start:end] != IGNORE).argmax())
        if length == 0 or data.visual[start + length : end].any():
            continue
        sample = source.sample(data.place(row))
        first = next(at for at, turn in enumerate(sample.turns) if turn.role == "assistant")
        question = sample.turns[first - 1].text.replace(IMAGE_MARK, "").strip() if first else ""
        said = {"id": sample.id, "question": question, "expected": sample.turns[first].text.strip()}
        if picture := _picture(sample, pictures):
            said["picture"] = picture
        found.append(_Asked(row, length, said))
    return found


def _picture(sample: Sample, folder: Path) -> str:
    """A small picture of the sample's first image, written once; its name beside the stage, "" where there is none."""
    from leveret import images
    from leveret.runs import atomic_file

    if not sample.images:
        return ""
    # Not by its place: going on, a run may be given other data.
    path = folder / f"{sha256_of(asdict(sample.images[0]))[:16]}.png"
    with contextlib.suppress(images.ImageFault):
        if not path.exists():
            small = images.load(sample.images[0])
            small.thumbnail((SIDE, SIDE))
            with atomic_file(path) as file:
                small.save(file, "PNG")
        return f"held-out/pictures/{path.name}"
    return ""
