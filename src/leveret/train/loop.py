"""One stage, step by step: the loop that every rank runs.

    rows of the step -> micro-batches -> loss_sum / supervised tokens of the whole global batch -> backward
        -> one all-reduce of [gradients, loss, stop, failed ...] -> clip -> AdamW -> metrics -> state

The weight of a token is one over the tokens of the global batch, known beforehand on every rank; so micro-batches and
ranks change the result only by rounding (and by what dropout draws). Where samples fail on the way, the sums are
scaled up afterwards to the tokens that were taught. Every random draw is seeded by (seed, stage, step, rank): a stage
that goes on from a saved step does what it would have done.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leveret.model.attention import packs, trained_in_blocks
from leveret.model.threads import torch_threads
from leveret.records import Batch
from leveret.runs import (
    DataError,
    Interrupted,
    RecipeError,
    append_jsonl,
    cores,
    graceful_stop,
    in_words,
    read_jsonl,
    stop_requested,
)
from leveret.train import best, state
from leveret.train.data import Failed, Prepared
from leveret.train.learning import ready, set_resize, teach_mode
from leveret.train.optim import Optimiser, Trainable
from leveret.train.order import order_of
from leveret.train.sharing import Sharing, held
from leveret.train.stages import StageRecipe, TrainRecipe
from leveret.train.starts import begin
from leveret.train.strategy import Model, Replicated, Sharded, idle
from leveret.train.watch import Watch, peak_memory

if TYPE_CHECKING:
    from leveret.model.vlm import VLM
    from leveret.train.ranks import Ranks

Validator = Callable[["VLM", int], dict[str, Any]]

LOSS, STOP, FAILED, LOST, POSITIONS, EXTRA = 0, 1, 2, 3, 4, 5
"""Places behind the gradients in the flat buffer, and how many there are."""


@dataclass(frozen=True, slots=True)
class Job:
    """All that a rank must know to do its share of a stage; plain JSON.

    start      folder of the model the stage begins with; None builds the recipe's backbones.
    total      steps of the stage.
    resume     folder of the state to go on from.
    precision  bf16 or fp32; device as torch spells it; threads per rank.
    sharing    how the ranks hold the model (strategy.Sharing).
    validates  whether the leader looks at the model on the way: with shares all ranks take part in that.
    """

    recipe: dict[str, Any]
    stage: str
    folder: str
    start: str | None
    total: int
    resume: str | None
    precision: str
    device: str
    threads: int
    facts: dict[str, Any] = field(default_factory=dict)
    sharing: dict[str, Any] = field(default_factory=dict)
    validates: bool = False

    @property
    def seed(self) -> int:
        seed = self.recipe["stages"][self.stage]["seed"]
        return self.recipe["seed"] if seed is None else seed


def arrange(vlm: VLM, stage: StageRecipe, job_seed: int, name: str, device: str, precision: str) -> list[Trainable]:
    """Make the model ready for a stage: the same on every rank."""
    set_resize(vlm, stage.resize)
    seed = state.random_seed(job_seed, name, -1, 0)
    return ready(vlm, stage, seed=seed, half_frozen=device != "cpu" and precision == "bf16")


def beginning(job: Job, device: str) -> Model:
    """The model that a stage begins with, on `device`, and what of it learns."""
    recipe = TrainRecipe.model_validate(job.recipe)
    vlm = begin(recipe, job.start, device, job.stage)
    return vlm, arrange(vlm, recipe.stages[job.stage], job.seed, job.stage, job.device, job.precision)


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast, or nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def workers(stage: StageRecipe, device: str, world: int) -> int:
    """Threads of one rank that decode images."""
    if stage.workers != "auto":
        return stage.workers
    return 1 if device == "cpu" else max(1, min(8, cores() // world))


def packed(vlm: VLM, stage: StageRecipe, device: str, precision: str) -> bool:
    """Whether the samples of a pass lie in one row: where the recipe says so, or where attention then costs no more
    than theirs. On a CPU rows of like length do as well as one row, with products of fewer shapes."""
    if stage.pack != "auto":
        return stage.pack
    there = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return device != "cpu" and precision == "bf16" and there and packs(vlm.language)


def follow(job: Job, ranks: Ranks) -> None:
    """A follower's share of a stage: the same model, the same arrays, its own rows."""
    stage = TrainRecipe.model_validate(job.recipe).stages[job.stage]
    job = replace(job, device=ranks.device(job.device))
    with torch_threads(job.threads):
        # To be cut, the model comes to the device a layer at a time.
        vlm, trainables = beginning(job, "cpu" if Sharing(**job.sharing).sharded else job.device)
        with contextlib.suppress(Interrupted):
            Teacher(job, stage, vlm, trainables, Prepared(Path(job.folder) / "cache"), ranks).run()


class Teacher:
    """The loop of one stage on one rank. Rank 0 also writes metrics and states, and validates."""

    def __init__(
        self,
        job: Job,
        stage: StageRecipe,
        vlm: VLM,
        trainables: Sequence[Trainable],
        data: Prepared,
        ranks: Ranks,
        validators: Sequence[Validator] = (),
    ) -> None:
        self.job, self.stage, self.vlm, self.data, self.ranks = job, stage, vlm, data, ranks
        self.validators = validators
        self.folder = Path(job.folder)
        self.leads = ranks.rank == 0
        data.workers = workers(stage, job.device, ranks.world)  # of this rank; whoever prepared it did not know
        self.packed = packed(vlm, stage, job.device, job.precision)
        self.strategy = self._strategy(trainables)
        self.optimiser = Optimiser(self.strategy.trainables, stage, EXTRA)
        self.strategy.bind(self.optimiser)
        self.finished: Model | None = None
        """The model that was taught, when `run` is over; on the leader."""
        self.resumed: dict[str, Any] = {}
        self.order = order_of(data, stage, job.stage, job.seed)
        self.step = self.skipped = self.failed = self.seen = 0
        self.unproved = set(stage.learn) if job.resume is None else set()
        """Parts that should learn and have had no gradient yet."""
        self.waited = 0.0
        if job.resume is not None:
            self._restore(Path(job.resume))

    def _strategy(self, trainables: Sequence[Trainable]) -> Replicated:
        job, sharing = self.job, Sharing(**self.job.sharing)
        if not sharing.sharded:
            return Replicated(self.vlm, trainables, self.ranks)
        half = job.device != "cpu" and job.precision == "bf16"
        again = partial(beginning, job, "cpu")
        return Sharded(self.vlm, trainables, self.ranks, sharing, self.data, again, job.device, half)

    def _restore(self, saved: Path) -> None:
        tensors, facts = state.load(saved)
        missing = self.optimiser.names(facts["updates"]) ^ set(tensors)
        if missing:
            raise DataError(f"the saved state {saved} does not fit this stage: {', '.join(sorted(missing)[:10])}")
        shares = self.strategy.share(tensors)
        odd = [t.name for t in self.optimiser.trainables if shares[f"weight.{t.name}"].shape != t.value.shape]
        if odd:
            raise DataError(f"the saved state {saved} does not fit this stage: of another shape {', '.join(odd[:10])}")
        self.optimiser.restore(shares, facts["updates"])
        there, now = held(facts["facts"]), held(self.job.facts)
        if there != now:
            self.resumed = {"resumed": {"from": there, "now": now}}
        self.step, self.skipped = facts["step"], facts["skipped"]
        self.failed, self.seen = facts["failed"], facts["seen"]

    # --- one step ---------------------------------------------------------------------------------------------------

    def _batches(self, step: int) -> list[tuple[Batch, Failed]]:
        rows = self.order.rows(step)
        pieces = self.strategy.pieces(rows, self.stage.micro_batch)
        return [self.data.batch(piece, self.vlm.spec, self.packed) if len(piece) else (idle(), []) for piece in pieces]

    def _ahead(self) -> Iterator[list[tuple[Batch, Failed]]]:
        """Batches in order. Where images must be decoded, the next step's are made while this one is computed."""
        steps = range(self.step, self.job.total)
        if self.data.features is not None or not len(self.data.images):
            yield from map(self._batches, steps)
            return
        with ThreadPoolExecutor(1) as pool:
            coming: Future[list[tuple[Batch, Failed]]] | None = None
            for step in steps:
                batches = coming.result() if coming is not None else self._batches(step)
                coming = pool.submit(self._batches, step + 1) if step + 1 < self.job.total else None
                yield batches

    def _timed(self, batches: Iterator[list[tuple[Batch, Failed]]]) -> Iterator[list[tuple[Batch, Failed]]]:
        """The same batches; `waited` tells how long the last one was waited for."""
        while True:
            began = time.perf_counter()
            found = next(batches, None)
            if found is None:
                return
            self.waited = time.perf_counter() - began
            yield found

    def _gradients(self, batches: Sequence[tuple[Batch, Failed]], weight: float) -> None:
        """Gradients of this rank's share, into the flat buffer."""
        optimiser = self.optimiser
        optimiser.zero()
        torch.manual_seed(state.random_seed(self.job.seed, self.job.stage, self.step, self.ranks.rank))
        for batch, _ in batches:
            # The way back too: layers that are computed again there must find the attention they had.
            with trained_in_blocks(self.vlm.language, self.packed):
                with autocast(self.job.device, self.job.precision):
                    total = self.strategy.loss(batch.to(self.job.device) if self.job.device != "cpu" else batch)
                loss = total * weight
                if loss.requires_grad:  # not so when only the connector learns and no sample of the pass has an image
                    self.strategy.backward(loss)
            optimiser.extra[LOSS] += loss.detach().to(optimiser.extra.device)
            optimiser.extra[POSITIONS] += batch.input_ids.numel()

    def _one(self, batches: Sequence[tuple[Batch, Failed]]) -> dict[str, Any]:
        """One step of all ranks; returns what metrics.jsonl gets."""
        optimiser, rows = self.optimiser, self.order.rows(self.step)
        supervised = int(self.data.supervised[rows].sum())
        self._gradients(batches, 1.0 / supervised)
        failed = [one for _, some in batches for one in some]
        for name, reason, _ in failed:
            append_jsonl(self.folder / "quarantine.jsonl", {"step": self.step + 1, "id": name, "reason": reason})
        optimiser.extra[FAILED] += len(failed)
        optimiser.extra[LOST] += sum(one.supervised for one in failed)
        if self.leads and stop_requested():
            optimiser.extra[STOP] += 1
        size = self.strategy.exchange(optimiser)
        loss, stop, bad, lost, positions = optimiser.extra.tolist()
        if lost:  # what failed taught nothing; the others weigh as if it had not been there
            scale = supervised / max(1.0, supervised - lost)
            optimiser.gradient.mul_(scale)
            loss, size = loss * scale, None if size is None else size * scale
            supervised -= int(lost)
        norm = float(optimiser.clip(size))
        row: dict[str, Any] = {"step": self.step + 1, "loss": loss, "lr": optimiser.rates(self.step, self.job.total)}
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped += 1
            row |= {"loss": None, "skipped": [self.data.names[index] for index in rows]}
        elif not supervised:
            row |= {"loss": None, "skipped": [self.data.names[index] for index in rows]}
        else:
            if self.unproved:
                self._check_parts(rows, bool(lost))
            optimiser.step(self.step, self.job.total)
            row["grad_norm"] = norm
        self.step += 1
        self.failed += int(bad)
        self.seen += len(rows)
        self.stop = stop > 0
        row |= {"samples": len(rows), "tokens": int(self.data.lengths[rows].sum()), "positions": int(positions)}
        sources = self.data.shares(rows)
        return row | {"supervised": supervised, **({"sources": sources} if sources else {})}

    def _check_parts(self, rows: Sequence[int], failed: bool) -> None:
        """A part that learns must get a gradient; with images in the batch, all of them do. failed: whether some of the
        batch could not be read, and may have been the images."""
        self.unproved -= {part for part, size in self.strategy.part_norms(self.optimiser).items() if size > 0}
        shown = any(self.data.image_offsets[row + 1] > self.data.image_offsets[row] for row in rows)
        still = [part for part in self.stage.learn if part in self.unproved and (shown or part == "language")]
        if still and not failed:
            raise RecipeError(
                f"stage {self.job.stage!r}: {' and '.join(still)} should learn but got no gradient in step "
                f"{self.step + 1}; take it out of `learn`, or look for what cuts it off"
            )

    # --- the stage --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All steps that are left. Interrupted after a state was saved; DataError when too much of the data is bad."""
        with contextlib.ExitStack() as stack:
            if self.leads:
                stack.enter_context(graceful_stop())
                left = self.order.seen(self.job.total) - self.order.seen(self.step)
                validates = bool(self.validators)
                watch = stack.enter_context(Watch(self.job, self.stage, self.folder, self.step, left, validates))
                best.settle(self.folder, self.stage.keep_best, state.steps(self.folder / "state"))
            saved, began = self.step, time.perf_counter()
            for batches in self._timed(self._ahead()):
                row = self._one(batches) | self.resumed
                self.resumed = {}
                if self.leads:
                    row["seconds"], row["waiting"] = round(time.perf_counter() - began, 4), round(self.waited, 4)
                    watch.log(row | {"memory": peak_memory(self.job.device)}, skipped=self.skipped, failed=self.failed)
                self._judge(row)
                last = self.step == self.job.total
                every = self.stage.validate_every
                validates = self.job.validates and (last or bool(every and self.step % every == 0))
                if validates:
                    model = self.strategy.whole()
                    if self.leads and model is not None:
                        watch.validated(self.step, self._validate(model[0]))
                    self.strategy.looked()
                # The best model is one of the saved states, so that there is one at every validation.
                saves = self.step % self.stage.save_every == 0 or (validates and self.stage.keep_best is not None)
                if self.stop or last or saves:
                    tensors = self.strategy.gather(self.optimiser.tensors())
                    if self.leads:
                        watch.flush()
                        self._save(tensors)
                    saved = self.step
                began = time.perf_counter()
                if self.stop and not last:
                    raise Interrupted(
                        f"stage {self.job.stage!r} stopped after step {saved} of {self.job.total}, which is saved; "
                        f"run the same command again to go on"
                    )
        self.finished = self.strategy.whole()
        self.strategy.looked()
        if self.leads and self.failed:
            print(f"{self.job.stage}: {self._failures()}", file=sys.stderr, flush=True)

    def _failures(self) -> str:
        """Samples whose image failed while a batch was made, in words; those of every rank."""
        quarantine = self.folder / "quarantine.jsonl"
        found = {row["id"]: row["reason"] for row in read_jsonl(quarantine) if "step" in row}
        return f"{len(found):,} sample(s) taught nothing: {in_words(Counter(found.values()))}; named in {quarantine}"

    def _judge(self, row: dict[str, Any]) -> None:
        if self.skipped > self.stage.bad_steps:
            names = ", ".join((row.get("skipped") or [])[:5])
            raise DataError(
                f"the loss was not finite in {self.skipped} steps, more than bad_steps {self.stage.bad_steps} allows "
                f"(last in step {self.step}: {names} ...); lower the learning rate, or look at these samples"
            )
        if self.failed > self.stage.bad_share * max(self.seen, len(self.data)):
            raise DataError(
                f"{self.failed:,} of {self.seen:,} samples failed while training, more than bad_share "
                f"{self.stage.bad_share} allows. {self._failures()}"
            )

    def _validate(self, vlm: VLM) -> dict[str, Any]:
        """What all validators give; of texts all of them."""
        vlm.eval()
        found: dict[str, Any] = {}
        for validator in self.validators:
            given = validator(vlm, self.step)
            texts = [*found.get("texts", ()), *given.get("texts", ())]
            found |= given | ({"texts": texts} if texts else {})
        teach_mode(vlm, self.stage)
        return found

    def _save(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the state of this step; of the others the last few stay, and what is best as they know it."""
        facts = {
            "updates": self.optimiser.updates, "skipped": self.skipped, "failed": self.failed, "seen": self.seen,
            "total": self.job.total, "facts": self.job.facts,
        }  # fmt: skip
        folder = self.folder / "state"
        state.save(folder, self.step, tensors, facts)
        # Those of later steps are of a way that was left when the run went on from before them.
        kept = [step for step in state.steps(folder) if step <= self.step][-self.stage.keep_last :]
        best.settle(self.folder, self.stage.keep_best, kept)
        state.prune(folder, kept)


def as_json(job: Job) -> dict[str, Any]:
    """The job as plain JSON, for a follower."""
    return asdict(job)
