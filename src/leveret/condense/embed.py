"""A pool becomes a folder of embeddings: shard by shard, each whole or absent, so that a killed run goes on.

Small encoders run as one process per core (a network of a few hundred thousand weights gains nothing from more
threads), large ones in this process with decoding on threads. Batches are cut by position in the pool, so vectors do
not depend on how many workers there were.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from leveret.condense.executors import executor
from leveret.condense.lloyd import Map
from leveret.condense.worker import Done, Job, look, pack_job, unpack_done, work
from leveret.pool import SampleFault, Source, open_source
from leveret.pool.check import printable
from leveret.pool.mixed import QUARANTINE
from leveret.processes import Worker
from leveret.records import ImageRef
from leveret.runs import (
    DataError,
    EnvironmentFault,
    Interrupted,
    Progress,
    RecipeError,
    RunFolder,
    atomic_file,
    atomic_write,
    cores,
    graceful_stop,
    in_words,
    stop_requested,
    write_json,
)

if TYPE_CHECKING:
    from leveret.model.encoders import Encoder

PROCESSES_FROM = 4000
"""Pools smaller than this are embedded in this process: starting workers costs seconds."""

JUDGED_FROM = 200
"""Samples seen before the share of bad ones is judged; the whole pool is judged at its end whatever its size."""


def embed(
    source: Source | str | Path,
    out: str | Path,
    encoder: str = "world/scorer",
    *,
    images: str | Path | None = None,
    batch: int = 256,
    shard: int = 20000,
    workers: int | None = None,
    limit_share: float = 0.2,
    device: str = "cpu",
    run_on: str = "local",
    texts: bool = False,
    precision: str = "auto",
) -> Path:
    """Embed every readable sample of a pool into `out` (clip-retrieval's layout), or go on where a run was killed.

    A sample of several images is embedded by its first; one without an image is refused. Refused samples go to
    `quarantine.jsonl` ({index, id, image, reason}).

    encoder      an id of `leveret.model.encoders`. batch: images in one pass. shard: samples in one file.
    workers      processes (small encoders) or decoding threads (large ones); the cores by default. The vectors are
                 the same for any number of processes.
    run_on       `local`, `ray` or `ray:ADDRESS` (`executors`), where every machine must see the pool's files.
    precision    fp32, bf16, or auto: bf16 for a CLIP or SigLIP where the device multiplies it natively. A folder holds
                 one.
    texts        also keep the captions' vectors (`text_emb/`). Scores are made from them either way.
    limit_share  DataError when more than this share of the samples is refused.

    Returns `out`. Raises RecipeError when the folder holds embeddings of another pool, encoder or shard size.
    """
    source = source if isinstance(source, Source) else open_source(source, images)
    loaded, precision, facts = _bound(source, encoder, batch, shard, texts, device, precision)
    run = RunFolder.open(out, "embed", facts)
    n = len(source)
    if run.is_done("embed"):
        _judge(Counter(run.facts("embed")["refused"]), n, n, limit_share, source, run, shard)
        return run.path
    starts = [start for start in range(0, n, shard) if not run.is_done(f"shard_{start // shard:06d}")]
    left = sum(min(shard, n - start) for start in starts)
    workers = workers or cores()
    bad: Counter[str] = Counter()
    seen = 0
    for start in range(0, n, shard):
        if start not in starts:
            bad.update(run.facts(f"shard_{start // shard:06d}")["refused"])
            seen += min(shard, n - start)
    with graceful_stop(), ExitStack() as stack:
        progress = stack.enter_context(Progress(left, "embedding", "images"))
        fleet = stack.enter_context(_fleet(encoder, loaded, workers, left, device, precision, run_on))
        for start in starts:
            end = min(start + shard, n)
            refused = _embed_shard(run, source, loaded, fleet, start, end, batch, shard, texts, progress, bad.total())
            bad.update(refused)
            seen += end - start
            _judge(bad, seen, n, limit_share, source, run, shard)
    quarantine = _gather(run, n, shard)
    if n and not shard_rows(run, n, shard):
        raise DataError(
            f"{source.name}: none of its {n:,} samples can be embedded; {quarantine} says why.{source.advice(bad, n)}"
        )
    facts["length"] = n
    write_json(run.path / "manifest.json", {**facts, "width": loaded.width, "refused": dict(sorted(bad.items()))})
    run.done("embed", rows=shard_rows(run, n, shard), refused=dict(sorted(bad.items())))
    return run.path


def look_ahead(
    source: Source,
    out: str | Path,
    encoder: str,
    *,
    batch: int = 256,
    shard: int = 20000,
    texts: bool = False,
    device: str = "cpu",
    precision: str = "auto",
) -> tuple[int, Counter[str]]:
    """(shards of `out` that are done already, what they refused), for a dry run; nothing is written. Raises what
    `embed` would refuse before it looks at a sample."""
    done = RunFolder.peek(out, "embed", _bound(source, encoder, batch, shard, texts, device, precision)[2])
    shards = [RunFolder(Path(out), "embed").facts(name) for name in done if name.startswith("shard_")]
    refused: Counter[str] = Counter()
    for facts in shards:
        refused.update(facts["refused"])
    return len(shards), refused


def _bound(
    source: Source, encoder: str, batch: int, shard: int, texts: bool, device: str, precision: str
) -> tuple[Encoder, str, dict[str, Any]]:
    """(the encoder, the precision that `auto` comes to, what the folder holds the run to)."""
    from leveret.model.encoders import load_encoder, precision_of

    precision = precision_of(encoder, device, precision)
    loaded = load_encoder(encoder, device, precision)
    facts = {
        "source": source.fingerprint(),
        "encoder": encoder,
        "weights": loaded.fingerprint,
        "batch": batch,
        "shard": shard,
    }
    if texts:
        if not loaded.has_texts:
            raise RecipeError(f"encoder {encoder!r} has no text side, so there are no captions' vectors to keep")
        facts["texts"] = True
    if precision != "fp32":
        facts["precision"] = precision
    return loaded, precision, facts


def shard_rows(run: RunFolder, n: int, shard: int) -> int:
    """Rows in all finished shards."""
    return sum(run.facts(f"shard_{start // shard:06d}")["rows"] for start in range(0, n, shard))


def _judge(bad: Counter[str], seen: int, n: int, limit: float, source: Source, run: RunFolder, shard: int) -> None:
    """DataError where too many of the first `seen` samples are refused, with a file that names each."""
    refuse_many(bad, seen, n, limit, source, lambda: f" Each is named in {_gather(run, n, shard)}.")


def refuse_many(
    bad: Counter[str], seen: int, n: int, limit: float, source: Source, where: Callable[[], str] = lambda: ""
) -> None:
    """DataError where of the `seen` of `n` samples too many are refused: certainly, or as far as can be told from so
    many. where: says where each is named."""
    if bad.total() > limit * n or (seen >= JUDGED_FROM and bad.total() > limit * seen):
        raise DataError(
            f"{bad.total():,} of {f'the {seen:,} samples looked at' if seen < n else f'{seen:,} samples'} are refused, "
            f"more than the limit of {limit:.0%}: {in_words(bad)}.{source.advice(bad, seen)}{where()} Mend the data, "
            "or raise the limit (--limit-share)."
        )


def _gather(run: RunFolder, n: int, shard: int) -> Path:
    """The shards' quarantine files as one."""
    path = run.path / QUARANTINE
    with atomic_file(path) as out:
        for start in range(0, n, shard):
            file = run.path / "quarantine" / f"quarantine_{start // shard}.jsonl"
            if file.is_file():
                with open(file, "rb") as part:
                    shutil.copyfileobj(part, out)
    return path


# --- one shard -----------------------------------------------------------------------------------------------------


def _embed_shard(
    run: RunFolder,
    source: Source,
    encoder: Encoder,
    fleet: Fleet,
    start: int,
    end: int,
    batch: int,
    shard: int,
    texts: bool,
    progress: Progress,
    before: int,
) -> Counter[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts: dict[int, tuple[str, str, str]] = {}
    refused: list[dict[str, Any]] = []

    def jobs() -> Iterator[Job]:
        for first in range(start, end, batch):
            rows = []
            for index in range(first, min(first + batch, end)):
                found = _look_up(source, index)
                if isinstance(found, dict):
                    refused.append(found)
                else:
                    row, facts[index] = found
                    rows.append(row)
            yield Job(first, rows, texts)

    parts: list[Done] = []
    for done in fleet.run(jobs()):
        parts.append(done)
        for index, reason, detail in done.faults:
            refused.append(_refusal(index, *facts[index][:2], f"image {reason}", detail))
        progress.advance(min(batch, end - done.start), refused=before + len(refused))
        if stop_requested():
            raise Interrupted(f"stopped as asked; the same command goes on after sample {start:,} ({run.path})")
    good = np.array([index for done in parts for index in done.good], np.int64)
    vectors = np.concatenate([done.vectors for done in parts] or [np.zeros((0, encoder.width), np.float16)])
    columns = {
        "index": good,
        "id": pa.array([facts[i][0] for i in good.tolist()], pa.string()),
        "image": pa.array([facts[i][1] for i in good.tolist()], pa.string()),
        "caption": pa.array([facts[i][2] for i in good.tolist()], pa.string()),
    }
    if encoder.has_texts:
        columns["score"] = np.concatenate([done.score for done in parts] or [np.zeros(0, np.float32)])
    table = pa.table(columns)
    number = start // shard
    refused.sort(key=lambda line: line["index"])
    quarantine = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in refused)
    kinds = {"img_emb": vectors}
    if texts:
        said = [done.texts for done in parts if done.texts is not None]
        kinds["text_emb"] = np.concatenate(said or [np.zeros((0, encoder.width), np.float16)])
    for kind, rows in kinds.items():
        buffer = io.BytesIO()
        np.save(buffer, rows, allow_pickle=False)
        atomic_write(run.path / kind / f"{kind}_{number}.npy", buffer.getvalue())
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    atomic_write(run.path / "metadata" / f"metadata_{number}.parquet", buffer.getvalue())
    atomic_write(run.path / "quarantine" / f"quarantine_{number}.jsonl", quarantine)
    counts = Counter(line["reason"] for line in refused)
    run.done(f"shard_{number:06d}", rows=len(good), refused=dict(sorted(counts.items())))
    return counts


def _look_up(source: Source, index: int) -> tuple[tuple[int, ImageRef, str], tuple[str, str, str]] | dict[str, Any]:
    """(the row of a job, (id, image's name, caption)) of a sample; or why it is refused."""
    try:
        sample = source.sample(index)
    except SampleFault as fault:
        return _refusal(index, fault.id, fault.image, fault.reason, fault.detail)
    if not sample.images:
        return _refusal(index, sample.id, "", "no image")
    ref = sample.images[0]
    name = ref.path if ref.kind == "data" else source.root.name(ref)
    return (index, ref, sample.caption), (sample.id, name, sample.caption)


def _refusal(index: int, id: str, image: str, reason: str, detail: str = "") -> dict[str, Any]:
    line = {"index": index, "id": printable(id), "image": printable(image), "reason": reason}
    return {**line, "detail": printable(detail)} if detail else line


@dataclass
class Some:
    """What some samples of a pool turned out to be. vectors: [n, width] float16. block: [n] number of the place that
    each is of. refused: reasons -> how many. looked: samples that were looked at, in so many seconds."""

    vectors: NDArray[np.float16]
    block: NDArray[np.int64]
    refused: Counter[str]
    looked: int
    seconds: float


def embed_some(
    source: Source, encoder: str, places: Sequence[range], limit: float, *, workers: int, device: str, precision: str
) -> Some:
    """Embeds the samples at some places of a pool, a range after the other, for at most about `limit` seconds, in this
    process. Nothing is written."""
    from leveret.model.encoders import is_light, load_encoder

    loaded = load_encoder(encoder, device, precision)
    refused: Counter[str] = Counter()
    faults: dict[int, list[str]] = {}

    def jobs() -> Iterator[Job]:
        for place in places:
            found = [_look_up(source, index) for index in place]
            faults[place.start] = [str(one["reason"]) for one in found if isinstance(one, dict)]
            yield Job(place.start, [one[0] for one in found if not isinstance(one, dict)])

    parts: list[NDArray[np.float16]] = [np.zeros((0, loaded.width), np.float16)]
    blocks: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    looked = 0
    with ThreadPoolExecutor(workers) as threads, Progress(sum(map(len, places)), "looking", "samples") as progress:
        fleet = Here(loaded, threads, single=is_light(encoder))
        began = time.perf_counter()
        for number, (place, done) in enumerate(zip(places, fleet.run(jobs()), strict=False)):
            parts.append(done.vectors)
            blocks.append(np.full(len(done.vectors), number))
            refused.update([*faults[place.start], *(f"image {reason}" for _, reason, _ in done.faults)])
            looked += len(place)
            progress.advance(len(place))
            if time.perf_counter() - began > limit:
                break
    return Some(np.concatenate(parts), np.concatenate(blocks), refused, looked, time.perf_counter() - began)


# --- who does the work ---------------------------------------------------------------------------------------------


class Fleet:
    """Takes jobs, gives what came of them in the same order, a few ahead."""

    def run(self, jobs: Iterator[Job]) -> Iterator[Done]:
        raise NotImplementedError


class Here(Fleet):
    """In this process: images are decoded on threads, one batch ahead of the encoder."""

    def __init__(self, encoder: Encoder, threads: ThreadPoolExecutor, single: bool) -> None:
        self.encoder, self.threads, self.single = encoder, threads, single

    def run(self, jobs: Iterator[Job]) -> Iterator[Done]:
        waiting: deque[tuple[Job, list[Future[Any]]]] = deque()
        for job in jobs:
            waiting.append((job, [self.threads.submit(look, row) for row in job.rows]))
            if len(waiting) > 1:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def _finish(self, job: Job, decoded: list[Future[Any]]) -> Done:
        given = [future.result() for future in decoded]
        if "torch" not in sys.modules:  # an encoder without weights needs none
            return work(self.encoder, job, given)
        from leveret.model.threads import torch_threads

        # One thread, as in a worker process: sums split over threads may differ in their last bits.
        with torch_threads(1 if self.single else None):
            return work(self.encoder, job, given)


class Processes(Fleet):
    """Worker processes, each with two jobs at hand so that it never waits for the next."""

    def __init__(self, encoder: str, count: int) -> None:
        self.children = [Worker("leveret.condense.worker", encoder) for _ in range(count)]
        # One thread per pipe and direction keeps the order; two jobs per child, so that none waits for the next.
        self.writers = [ThreadPoolExecutor(1) for _ in self.children]
        self.readers = [ThreadPoolExecutor(1) for _ in self.children]

    def run(self, jobs: Iterator[Job]) -> Iterator[Done]:
        waiting: deque[Future[bytes | None]] = deque()
        for number, job in enumerate(jobs):
            turn = number % len(self.children)  # fixed turns: batches cost about the same
            child = self.children[turn]
            self.writers[turn].submit(child.send, pack_job(job))
            waiting.append(self.readers[turn].submit(child.receive))
            if len(waiting) > 2 * len(self.children):
                yield self._got(waiting.popleft())
        while waiting:
            yield self._got(waiting.popleft())

    @staticmethod
    def _got(future: Future[bytes | None]) -> Done:
        data = future.result()
        if data is None:
            raise EnvironmentFault(
                "an embedding worker ended before its work (out of memory, or killed; its own words are above). "
                "Run the same command again, with fewer workers if memory is short."
            )
        return unpack_done(data)

    def close(self) -> None:
        for child in self.children:
            child.close()
        for threads in (*self.writers, *self.readers):
            threads.shutdown()


class Elsewhere(Fleet):
    """On an executor's machines, a job a task; each loads the encoder once."""

    def __init__(self, encoder: str, device: str, precision: str, execute: Map) -> None:
        self.task, self.execute = partial(_there, encoder, device, precision), execute

    def run(self, jobs: Iterator[Job]) -> Iterator[Done]:
        yield from self.execute(self.task, jobs)


def _there(encoder: str, device: str, precision: str, job: Job) -> Done:
    from leveret.model.encoders import load_encoder

    return work(load_encoder(encoder, device, precision), job)


@contextmanager
def _fleet(
    id: str, encoder: Encoder, workers: int, left: int, device: str, precision: str, run_on: str
) -> Iterator[Fleet]:
    from leveret.model.encoders import is_light

    if run_on != "local":
        with executor(run_on, workers) as execute:
            yield Elsewhere(id, device, precision, execute)
        return
    if is_light(id) and device == "cpu" and workers > 1 and left >= PROCESSES_FROM:
        processes = Processes(id, workers)
        try:
            yield processes
        finally:
            processes.close()
        return
    with ThreadPoolExecutor(workers) as threads:
        yield Here(encoder, threads, single=is_light(id))
