"""One embedding worker: takes batches of image references, gives vectors. A process that embed.py starts.

A job is JSON; what comes back is JSON and behind it raw numbers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from leveret.images import ImageFault, load
from leveret.processes import serve
from leveret.records import ImageRef

if TYPE_CHECKING:
    from leveret.model.encoders import Encoder


@dataclass
class Job:
    """Some rows of the pool: (position in the batch, image, caption) each. texts: whether to keep captions' vectors."""

    start: int
    rows: list[tuple[int, ImageRef, str]]
    texts: bool = False


@dataclass
class Done:
    """What came of a job.

    good      positions whose image was readable, in order. vectors: [len(good), width] float16.
    score     [len(good)] float32 image-text cosines, NaN without a text side.
    faults    (position, reason, detail) of the others.
    texts     [len(good), width] float16 of the captions, where the job asked for them.
    """

    start: int
    good: list[int]
    vectors: NDArray[np.float16]
    score: NDArray[np.float32]
    faults: list[tuple[int, str, str]]
    texts: NDArray[np.float16] | None = None


def work(encoder: Encoder, job: Job, decoded: Sequence[Any] | None = None) -> Done:
    """Embed one job. `decoded`: what `look` gave for each of its rows, where threads have done that part."""
    good, images, captions, faults = [], [], [], []
    for row, found in zip(job.rows, decoded or map(look, job.rows), strict=True):
        if isinstance(found, ImageFault):
            faults.append((row[0], found.reason, found.detail))
        else:
            good.append(row[0])
            images.append(found)
            captions.append(row[2])
    vectors = encoder.images(images)
    texts = encoder.texts(captions) if encoder.has_texts and captions else None
    if texts is None:
        score = np.full(len(good), np.nan, np.float32)
    else:
        # In float64 and before float16 rounding: the score is better than the stored vectors could give.
        score = (vectors.astype(np.float64) * texts).sum(1).astype(np.float32)
    kept = None if texts is None or not job.texts else texts.astype(np.float16)
    return Done(job.start, good, vectors.astype(np.float16), score, faults, kept)


def look(row: tuple[int, ImageRef, str]) -> Any:
    """The decoded image of a row, or the ImageFault that refuses it."""
    try:
        return load(row[1])
    except ImageFault as fault:
        return fault


# --- as bytes --------------------------------------------------------------------------------------------------------


def pack_job(job: Job) -> bytes:
    rows = [(at, ref.path, ref.kind, ref.offset, ref.length, ref.member, ref.place, text) for at, ref, text in job.rows]
    return json.dumps([job.start, rows, job.texts]).encode()


def unpack_job(data: bytes) -> Job:
    start, rows, texts = json.loads(data)
    return Job(start, [(at, ImageRef(path, *rest), text) for at, path, *rest, text in rows], texts)


def pack_done(done: Done) -> bytes:
    head = json.dumps([done.start, done.good, done.faults, done.vectors.shape[1]]).encode()
    texts = b"" if done.texts is None else done.texts.tobytes()
    return len(head).to_bytes(8, "little") + head + done.vectors.tobytes() + done.score.tobytes() + texts


def unpack_done(data: bytes) -> Done:
    size = int.from_bytes(data[:8], "little")
    start, good, faults, width = json.loads(data[8 : 8 + size])
    count = len(good) * width
    vectors = np.frombuffer(data, np.float16, count, 8 + size).reshape(len(good), width)
    score = np.frombuffer(data, np.float32, len(good), 8 + size + 2 * count)
    end = 8 + size + 2 * count + 4 * len(good)
    texts = np.frombuffer(data, np.float16, count, end).reshape(vectors.shape) if len(data) > end else None
    return Done(start, good, vectors, score, [tuple(fault) for fault in faults], texts)


def main() -> None:
    def start() -> Callable[[bytes], bytes]:
        import torch

        from leveret.model.encoders import load_encoder

        torch.set_num_threads(1)
        encoder = load_encoder(sys.argv[1])
        return lambda frame: pack_done(work(encoder, unpack_job(frame)))

    serve(start)
