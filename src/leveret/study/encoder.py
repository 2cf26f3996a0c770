"""A small dual encoder taught from random weights on chosen pairs alone: the cheapest judge of a choice of data.

It has the scorer's architecture and none of its weights. What it can find among held-out pairs, the chosen pairs have
taught it; nothing pre-trained stands in between. The loss is SigLIP's (Zhai et al., arXiv 2303.15343).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import Progress

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from leveret.model.tiny import TinyDualEncoder

RATE, CLIP, WARMUP = 2e-3, 2.0, 0.03
"""Peak learning rate, largest gradient norm, share of the steps over which the rate rises: the scorer's own."""
AMONG_FIRST = 5
"""Recall is counted at this rank."""


@dataclass(frozen=True, slots=True)
class Recall:
    """Shares of held-out pairs whose own partner is among the first five."""

    image_to_text: float
    text_to_image: float

    @property
    def mean(self) -> float:
        return (self.image_to_text + self.text_to_image) / 2


def judge(
    pairs: Path, held_out: Path, images: Path, *, steps: int, batch: int, seed: int, folder: Path
) -> Recall | None:
    """Teaches an encoder on `pairs` and examines it on `held_out` (both LLaVA JSON, pictures below `images`).

    folder  keeps the state of a run that was stopped; the same call continues from it to the bit.
    None where there are no pairs to learn from. Raises Interrupted with the state saved.
    """
    from leveret.model.encoders import TinyEncoder
    from leveret.model.threads import torch_threads

    pictures, captions = _pairs(pairs, images)
    if not captions:
        return None
    with torch_threads(1):
        model = fresh(seed)
        learn(model, _pixels(pictures, model), captions, steps=steps, batch=batch, seed=seed, folder=folder)
        seer = TinyEncoder("study/encoder", model)
        pictures, captions = _pairs(held_out, images)
        texts = seer.texts(captions)
        assert texts is not None
        return recall(seer.images(pictures) @ texts.T, captions)


def fresh(seed: int) -> TinyDualEncoder:
    """The scorer's architecture and tokenizer with random weights, float32; equal for all choices of a seed."""
    import torch

    from leveret.model.encoders import load_encoder
    from leveret.model.tiny import TinyDualEncoder
    from leveret.study.choices import SCORER

    scorer: Any = load_encoder(SCORER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyDualEncoder(scorer.module.config)


def learn(
    model: TinyDualEncoder,
    pixels: Tensor,
    captions: Sequence[str],
    *,
    steps: int,
    batch: int,
    seed: int,
    folder: Path,
) -> None:
    """Teaches `model` for `steps` steps of `batch` pairs; pixels [N, 3, S, S] float32 as the model's view wants them.

    A pass over the pairs is shuffled anew each time; the rest that fills no batch waits for the next pass.
    """
    from leveret.world.pretrain import pretrain
    from leveret.world.vision import Contrast

    contrast = Contrast()
    ids, keep = model.tokenize(list(captions))
    model.train()
    with Progress(steps, "teaching an encoder", "steps") as progress:

        def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
            rows = rows_of(step, len(captions), batch, seed)
            longest = int(keep[rows].sum(1).max())
            words = model.embed_ids(ids[rows, :longest], keep[rows, :longest])
            return contrast(model.embed_images(pixels[rows]), words), {}

        def log(step: int, steps: int, loss: float) -> None:
            progress.advance(1, loss=loss)

        pretrain(
            {"model": model, "contrast": contrast},
            loss_of,
            steps=steps,
            rate=RATE,
            clip=CLIP,
            warmup=max(1, round(WARMUP * steps)),
            folder=folder,
            log=log,
            save_every=steps + 1,  # half a minute is done again sooner than its states are written
        )
    model.eval()


def rows_of(step: int, n: int, batch: int, seed: int) -> np.ndarray:
    """The pairs of a step [min(batch, n)], a pure function of its arguments."""
    import numpy as np

    size = min(batch, n)
    turn, place = divmod(step, n // size)
    order = np.random.default_rng([seed, turn]).permutation(n)
    return order[place * size : (place + 1) * size]


def recall(cosines: np.ndarray, captions: Sequence[str], first: int = AMONG_FIRST) -> Recall:
    """Recall among the first `first` of N candidates, both ways; cosines [N images, N captions], pair i at (i, i).

    Candidates with the very words of the pair's own caption are neither right nor wrong: they are left out. Of equally
    close ones the pair's own comes last, so that an encoder for which all is one scores nothing.
    """
    import numpy as np

    words = np.unique(np.asarray(captions), return_inverse=True)[1]
    other = words[:, None] != words[None]
    own = np.diagonal(cosines)
    texts_before = ((cosines >= own[:, None]) & other).sum(1)
    images_before = ((cosines >= own[None]) & other).sum(0)
    return Recall(float((texts_before < first).mean()), float((images_before < first).mean()))


def _pairs(data: Path, images: Path) -> tuple[list[Any], list[str]]:
    """Pictures (PIL, RGB) and captions of a pool. DataError names a picture that cannot be read."""
    from leveret.images import load
    from leveret.pool import open_source

    pool = open_source(data, images)
    samples = [pool.sample(index) for index in range(len(pool))]
    return [load(sample.images[0]) for sample in samples], [sample.caption for sample in samples]


def _pixels(pictures: Sequence[Any], model: TinyDualEncoder) -> Tensor:
    import numpy as np
    import torch

    from leveret.inputs.resize import prepare

    return torch.from_numpy(np.stack([prepare(picture, model.view) for picture in pictures]))
