"""What a run would do and need, told before anything is spent: parts, geometry, schedule, memory.

The same table is printed before a stage's first step; a dry run prints it for models on the meta device, which have
sizes but no weights.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.model.parts import PartRow, parts_table, render, tokens_of
from leveret.runs import DataError, EnvironmentFault, RecipeError, cores, in_bytes, in_words
from leveret.train.optim import rate
from leveret.train.stages import StageRecipe, TrainRecipe, total_steps

if TYPE_CHECKING:
    from rich.console import Console

    from leveret.model.vlm import VLM
    from leveret.train.data import Prepared
    from leveret.train.loop import Job

SAMPLED = 256
"""Samples a dry run tokenises to learn how long they are."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device; the activations are an estimate, the rest is arithmetic."""

    weights: int
    gradients: int
    optimiser: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.activations


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage as it would be or is about to be done; `lines` are the facts in words, in the order they are shown."""

    name: str
    parts: list[PartRow]
    memory: Memory
    lines: list[tuple[str, str]]
    vlm: VLM


def plan(recipe: TrainRecipe, chosen: Sequence[str]) -> list[StagePlan]:
    """Every chosen stage on the meta device. RecipeError with the faults of all of them at once."""
    from leveret.model.build import build_meta
    from leveret.model.language import describe as describe_language
    from leveret.model.language import load_tokenizer
    from leveret.train import learning

    vlm = build_meta(recipe.model)
    # Only where there is something to tokenise: the tokenizer may have to come over the network.
    if any(Path(recipe.stages[name].data).exists() for name in chosen):
        with contextlib.suppress(RecipeError, EnvironmentFault):
            vlm.tokenizer = load_tokenizer(describe_language(recipe.model.language).source)
    if faults := [f"stages.{name}.{fault}" for name in chosen for fault in learning.faults(vlm, recipe.stages[name])]:
        raise RecipeError("\n".join(faults))
    plans = []
    for name in chosen:
        learning.set_resize(vlm, recipe.stages[name].resize)
        plans.append(describe(vlm, name, recipe.stages[name]))
    return plans


def facts(recipe: str | Path | TrainRecipe, overrides: Sequence[str], stages: Sequence[str] | None) -> dict[str, Any]:
    """What a dry run would show, as plain data: stage -> its parts, its bytes on one device, and the rest in words."""
    from dataclasses import asdict

    from leveret.train.run import choose, read

    whole = read(recipe, overrides)
    return {
        row.name: {
            "parts": [asdict(part) for part in row.parts],
            "memory": {**asdict(row.memory), "total": row.memory.total},
            "notes": dict(row.lines),
        }
        for row in plan(whole, choose(whole, stages))
    }


def describe(
    vlm: VLM,
    name: str,
    stage: StageRecipe,
    *,
    data: Prepared | None = None,
    total: int | None = None,
    job: Job | None = None,
    world: int = 1,
) -> StagePlan:
    """Facts of one stage. Without `data` the lengths come from a few samples, where the data is there at all."""
    parts = parts_table(vlm, {str(part): how for part, how in stage.learn.items()})
    lines: list[tuple[str, str]] = []
    tokens = stage.max_tokens
    if data is not None:
        tokens = int(data.lengths.mean())
        shown = "features kept" if data.features is not None else "images decoded when needed"
        lines.append(("data", f"{stage.data}: {len(data):,} samples; {shown}"))
        if refused := data.meta.get("reasons"):
            where = data.folder.with_name("quarantine.jsonl")
            lines.append(("refused", f"{sum(refused.values()):,} more: {in_words(refused)}; each is named in {where}"))
        lines.append(
            ("tokens", f"{tokens} per sample on average, {int(data.lengths.max())} at most; "
             f"{data.supervised.mean():.0f} of them learned from")
        )  # fmt: skip
    else:
        count, mean, words = _sampled(vlm, stage)
        lines.append(("data", f"{stage.data}: {words}"))
        average = f"{mean} per sample on average, " if mean else ""
        image = f"{vlm.spec.tokens} per image" if vlm.spec.tiling is None else tokens_of(vlm)
        lines.append(("tokens", f"{average}{image}, at most {stage.max_tokens} per sample"))
        tokens, total = mean or tokens, total_steps(stage, -(-count // stage.batch)) if count else None
    lines.append(("batch", _geometry(stage, world, job)))
    lines.append(("schedule", _schedule(stage, total)))
    square = "made square by " + ", ".join(dict.fromkeys(view.resize for view in vlm.spec.towers))
    seen = square if vlm.spec.tiling is None else "cut into tiles"
    lines.append(("chat", f"{stage.chat or vlm.chat}; images are {seen}"))
    if job is not None:
        begun = f", going on from {Path(job.resume).name}" if job.resume else ""
        lines.append(("precision", f"{job.precision} on {job.device}, {job.threads} thread(s) per rank{begun}"))
    gpu = job is None or not str(job.device).startswith("cpu")
    half = gpu and stage.precision != "fp32"
    memory = estimate(vlm, parts, stage, tokens, world, frozen=2 if half else 4)
    words = ", ".join(
        f"{label} {in_bytes(value)}"
        for label, value in (
            ("weights", memory.weights), ("gradients", memory.gradients), ("optimiser", memory.optimiser),
            ("activations about", memory.activations),
        )
    )  # fmt: skip
    counted = ", what is frozen counted in bf16, as on a GPU" if half and job is None else ""
    lines.append(("memory", f"{in_bytes(memory.total)} per rank: {words}{counted}"))
    return StagePlan(name, parts, memory, lines, vlm)


def _sampled(vlm: VLM, stage: StageRecipe) -> tuple[int | None, int | None, str]:
    """Samples in the data and their mean length in tokens, as far as they can be known here, and that in words."""
    from leveret.pool import open_source
    from leveret.train.data import encode_sample, lacking, reason_of

    if not Path(stage.data).exists():
        return None, None, "not here (a dry run does not need it)"
    source = open_source(stage.data, stage.images)
    count = len(source)
    if vlm.tokenizer is None:
        return count, None, f"{count:,} samples; the tokenizer is not here, so their lengths are not known"
    lengths: list[int] = []
    refused: Counter[str] = Counter()
    for index in range(min(SAMPLED, count)):
        try:
            text = encode_sample(source, index, stage.chat or vlm.chat, vlm.tokenizer, vlm.spec, stage.max_tokens)
            lacking(text.refs)
            lengths.append(len(text.ids))
        except DataError as error:
            refused[reason_of(error)] += 1
    looked = f"{count:,} samples; of the first {min(SAMPLED, count):,}, {len(lengths):,} are good"
    if refused:
        looked += f", the rest are not: {in_words(refused)}.{source.advice(refused, min(SAMPLED, count))}"
    looked += " (no picture was opened)" if vlm.spec.tiling is None else " (of pictures the size was read)"
    return count, round(sum(lengths) / len(lengths)) if lengths else None, looked


def _geometry(stage: StageRecipe, world: int, job: Job | None) -> str:
    each = -(-stage.batch // world)
    size = min(stage.micro_batch or each, each)
    ranks = f"{world} rank(s)" if job is not None else "each rank"
    return f"{stage.batch} samples a step; {ranks}, {each} samples each, {size} at a time"


def _schedule(stage: StageRecipe, total: int | None) -> str:
    length = f"{total:,} steps" if total else f"{stage.steps:,} steps" if stage.steps else f"{stage.epochs:g} epoch(s)"
    tail = f", falling over the last {stage.decay:.0%}" if stage.schedule == "wsd" else ""
    count = total or stage.steps
    ends = f", from {rate(stage.schedule, 0, count, stage.warmup, stage.decay):.3g} of the peak" if count else ""
    clip = f"gradients clipped at {stage.clip:g}" if stage.clip else "no clipping"
    return f"{length}, {stage.schedule}, warm-up {stage.warmup:.0%}{ends}{tail}; {clip}"


def estimate(
    vlm: VLM, parts: Sequence[PartRow], stage: StageRecipe, tokens: int, world: int = 1, frozen: int = 2
) -> Memory:
    """Memory of one rank.

    frozen  bytes of a frozen weight: 2 in bf16 on a GPU, 4 in float32 and on a CPU.

    Trainable weights, gradients and AdamW's two moments are float32. Activations: 34 bytes per token, width and layer
    (Korthikanti et al. 2022, with attention recomputed or fused), plus float32 logits at half of the positions.
    """
    trainable = sum(row.trainable for row in parts)
    adapted = {part for part, how in stage.learn.items() if how.lora is not None}
    still = sum(row.parameters for row in parts) - sum(row.trainable for row in parts if row.part not in adapted)
    config: Any = vlm.language.config
    each = -(-stage.batch // world)
    rows = min(stage.micro_batch or each, each)
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    vocab = int(vlm.language.get_input_embeddings().weight.shape[0])
    return Memory(
        weights=still * frozen + trainable * 4,
        gradients=trainable * 4,
        optimiser=trainable * 8,
        activations=rows * tokens * (34 * width * layers + 3 * vocab),
    )


def _console(file: Any) -> Console:
    from rich.console import Console

    console = Console(file=file, highlight=False)
    # Where nobody watches (a log, a pipe) lines need not fit 80 columns.
    return console if console.is_terminal else Console(file=file, highlight=False, width=140)


def show_stage(found: StagePlan, file: Any = None) -> None:
    """Print one stage's table and facts (to stderr, as progress is)."""
    console = _console(file or sys.stderr)
    console.print(f"\n[bold]stage {found.name}[/bold]")
    console.print(render(found.parts, found.vlm))
    for label, words in found.lines:
        console.print(f"  {label:<10} {words}", markup=False, soft_wrap=True)


def show(plans: Sequence[StagePlan]) -> None:
    """Print a dry run (to stdout: it is what was asked for)."""
    for found in plans:
        show_stage(found, sys.stdout)
    print(f"\ndry run: nothing was written; this machine has {cores()} core(s)")
