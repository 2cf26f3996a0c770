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

from leveret.images import ImageFault
from leveret.model.parts import PartRow, adapted, embeddings_size, parts_table, render, tokens_of
from leveret.records import NaFlex
from leveret.runs import DataError, EnvironmentFault, RecipeError, cores, in_bytes, in_words
from leveret.train.optim import rate
from leveret.train.quantised import BYTES
from leveret.train.sharing import Sharing, decide, held, units
from leveret.train.stages import Learn, StageRecipe, TrainRecipe, averaged, total_steps

if TYPE_CHECKING:
    from rich.console import Console

    from leveret.model.vlm import VLM
    from leveret.train.data import Prepared
    from leveret.train.loop import Job

SAMPLED = 256
"""Samples a dry run tokenises to learn how long they are."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device; the activations are an estimate, the rest is arithmetic.

    gathered  what a rank that holds a share has whole for a while. host: bytes in the host's memory instead.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    gathered: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.activations + self.gathered


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
    from leveret.train import learning, starts

    vlm = build_meta(recipe.model)
    # Only where there is something to tokenise: the tokenizer may have to come over the network.
    if any(Path(recipe.stages[name].data).exists() for name in chosen):
        with contextlib.suppress(RecipeError, EnvironmentFault):
            vlm.tokenizer = load_tokenizer(describe_language(recipe.model.language).source)
    if faults := [f"stages.{name}.{fault}" for name in chosen for fault in learning.faults(vlm, recipe.stages[name])]:
        raise RecipeError("\n".join(faults))
    starts.look(recipe, chosen, strict=False)
    plans = []
    world = recipe.ranks if isinstance(recipe.ranks, int) else 1
    for name in chosen:
        learning.set_resize(vlm, recipe.stages[name].resize)
        sharing = decide(recipe, world, "cpu" if recipe.device == "cpu" else "cuda")
        found = describe(vlm, name, recipe.stages[name], world=world, sharing=sharing)
        found.lines[:0] = beginnings(recipe, name)
        if name == list(recipe.stages)[-1] and (words := averaged(recipe)):
            found.lines.append(("average", words))
        plans.append(found)
    return plans


def beginnings(recipe: TrainRecipe, name: str) -> list[tuple[str, str]]:
    """What a stage's model is before it learns: lines for its plan."""
    from leveret.train import starts

    names = list(recipe.stages)
    before = names[names.index(name) - 1] if name != names[0] else None
    first = f"the model of {before}" if before else "the backbones as they come, a connector that knows nothing"
    told = [starts.in_words(how) for how in starts.of_stage(recipe, name).values()]
    return [("start", line) for line in told or [first]]


def sharing(recipe: TrainRecipe, stage: StageRecipe, vlm: VLM, world: int, device: str) -> Sharing:
    """How the ranks of a run hold the model in this stage (strategy.decide)."""
    if recipe.parallel.kind != "auto" or world == 1 or device.startswith("cpu"):
        return decide(recipe, world, device)
    import torch

    parts = parts_table(vlm, {str(part): how for part, how in stage.learn.items()})
    needed = estimate(vlm, parts, stage, stage.max_tokens, world, frozen=4 if stage.precision == "fp32" else 2).total
    return decide(recipe, world, device, needed, torch.cuda.get_device_properties(device).total_memory)


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
    sharing: Sharing | None = None,
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
        if cut := data.meta.get("cut"):
            lines.append(("cut", f"{cut:,} of these are longer than max_tokens {stage.max_tokens} and lose their end"))
        lines.append(
            ("tokens", f"{tokens} per sample on average, {int(data.lengths.max())} at most; "
             f"{data.supervised.mean():.0f} of them learned from")
        )  # fmt: skip
    else:
        count, mean, words = _sampled(vlm, stage)
        lines.append(("data", f"{stage.data}: {words}"))
        average = f"{mean} per sample on average, " if mean else ""
        image = f"{vlm.spec.tokens} per image" if vlm.spec.tiling is None else tokens_of(vlm)
        image += " an image" if isinstance(vlm.spec.tiling, NaFlex) else ""
        lines.append(("tokens", f"{average}{image}, at most {stage.max_tokens} per sample"))
        tokens, total = mean or tokens, total_steps(stage, -(-count // stage.batch)) if count else None
    sharing = sharing or Sharing(**(job.sharing if job is not None else {}))
    lines.append(("batch", _geometry(stage, world)))
    if world > 1 or sharing.sharded:
        lines.append(("ranks", sharing.words(world)))
    lines.append(("order", f"by {stage.order}; {_computed(stage)}"))
    lines.append(("schedule", _schedule(stage, total, sure=data is not None)))
    if stage.held_out is not None or stage.keep_best is not None:
        lines.append(("validation", _validation(stage)))
    elif stage.validate_every and not (job is not None and job.validates):
        lines.append(("validation", "validate_every is set, but there are no `held_out` data: nothing validates"))
    square = "made square by " + ", ".join(dict.fromkeys(view.resize for view in vlm.spec.towers))
    shaped = isinstance(vlm.spec.tiling, NaFlex)
    seen = square if vlm.spec.tiling is None else "seen at their own shape" if shaped else "cut into tiles"
    lines.append(("chat", f"{stage.chat or vlm.chat}; images are {seen}"))
    if job is not None:
        begun = f", going on from {Path(job.resume).name}" if job.resume else ""
        lines.append(("precision", f"{job.precision} on {job.device}, {job.threads} thread(s) per rank{begun}"))
        lines += [("resumed", words) for words in _other_ranks(job)]
    gpu = job is None or not str(job.device).startswith("cpu")
    half = gpu and stage.precision != "fp32"
    memory = estimate(vlm, parts, stage, tokens, world, frozen=2 if half else 4, sharing=sharing)
    words = ", ".join(
        f"{label} {in_bytes(value)}"
        for label, value in (
            ("weights", memory.weights), ("gradients", memory.gradients), ("optimiser", memory.optimiser),
            ("activations about", memory.activations), ("gathered about", memory.gathered),
        )
        if value or label != "gathered about"
    )  # fmt: skip
    if memory.host:
        words += f"; and {in_bytes(memory.host)} of the host's memory"
    counted = ", what is frozen counted in bf16, as on a GPU" if half and job is None else ""
    lines.append(("memory", f"{in_bytes(memory.total)} per rank: {words}{counted}"))
    return StagePlan(name, parts, memory, lines, vlm)


def _sampled(vlm: VLM, stage: StageRecipe) -> tuple[int | None, int | None, str]:
    """Samples in the data and their mean length in tokens, as far as they can be known here, and that in words."""
    from leveret.pool import open_source
    from leveret.train.data import absent, encode_sample, reason_of

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
            if absent(text.refs):
                raise ImageFault("missing")
            lengths.append(len(text.ids))
        except DataError as error:
            refused[reason_of(error)] += 1
    if refused and not lengths:
        seen = min(SAMPLED, count)
        raise DataError(
            f"{stage.data}: none of {'the first ' * (seen < count)}{seen:,} samples can be used: {in_words(refused)}."
            f"{source.advice(refused, seen)}"
        )
    looked = f"{count:,} samples; of the first {min(SAMPLED, count):,}, {len(lengths):,} are good"
    if refused:
        looked += f", the rest are not: {in_words(refused)}.{source.advice(refused, min(SAMPLED, count))}"
    looked += " (no picture was opened)" if vlm.spec.tiling is None else " (of pictures the size was read)"
    return count, round(sum(lengths) / len(lengths)) if lengths else None, looked


def _other_ranks(job: Job) -> list[str]:
    """What to know of a state that other ranks saved."""
    from leveret.runs import read_json

    there = read_json(Path(job.resume) / "state.json")["facts"] if job.resume else job.facts
    if (old := held(there)) == (new := held(job.facts)):
        return []
    return [f"saved by {old}; now {new}: the same batches and steps, equal up to rounding and dropout's draws"]


def _geometry(stage: StageRecipe, world: int) -> str:
    each = -(-stage.batch // world)
    size = min(stage.micro_batch or each, each)
    if world == 1:
        return f"{stage.batch} samples a step, {size} at a time"
    return f"{stage.batch} samples a step; {world} ranks, {each} samples each, {size} at a time"


def _computed(stage: StageRecipe) -> str:
    """How a pass is laid out and computed, in words."""
    packed = {True: "samples packed in one row", False: "a sample a row", "auto": "packed where that is faster"}
    ways = {
        "layers computed again on the way back": stage.recompute,
        "layers compiled": stage.compile,
        "AdamW unfused": not stage.fused,
    }
    more = [words for words, on in ways.items() if on]
    return ", ".join([packed[stage.pack], *more])


def _validation(stage: StageRecipe) -> str:
    held, best = stage.held_out, stage.keep_best
    when = f"every {stage.validate_every:,} steps" if stage.validate_every else "at the end"
    words = [f"{when}, on {held.count:,} samples of {held.data}, answering {held.answers}" if held else when]
    return "; ".join(words + ([f"the model with the {best.mode} {best.metric} is kept"] if best else []))


def _schedule(stage: StageRecipe, total: int | None, sure: bool) -> str:
    """sure: whether the data were counted, and not only what an epoch of `batch` makes of them."""
    count = total or stage.steps
    about = "" if sure or count == stage.steps else "about "
    length = f"{about}{count:,} steps" if count else f"{stage.epochs:g} epoch(s)"
    tail = f", falling over the last {stage.decay:.0%}" if stage.schedule == "wsd" else ""
    ends = f", from {rate(stage.schedule, 0, count, stage.warmup, stage.decay):.3g} of the peak" if count else ""
    clip = f"gradients clipped at {stage.clip:g}" if stage.clip else "no clipping"
    return f"{length}, {stage.schedule}, warm-up {stage.warmup:.0%}{ends}{tail}; {clip}"


def estimate(
    vlm: VLM,
    parts: Sequence[PartRow],
    stage: StageRecipe,
    tokens: int,
    world: int = 1,
    frozen: int = 2,
    sharing: Sharing | None = None,
) -> Memory:
    """Memory of one rank.

    frozen   bytes of a frozen weight: 2 in bf16 on a GPU, 4 in float32 and on a CPU.
    sharing  how the ranks hold the model; each the whole of it when left out.

    Trainable weights, gradients and AdamW's two moments are float32. Activations: 34 bytes per token, width and layer
    (Korthikanti et al. 2022, with attention recomputed or fused), plus float32 logits at half of the positions. Where
    layers are computed again, what goes into each stays (2 bytes), and one layer is whole at a time.
    A rank with a share gathers embeddings and output layer for the whole pass and two layers at a time (the next one
    comes while one computes), and holds the gradient of the largest of these whole, in float32, until it is summed.
    """
    trainable = sum(row.trainable for row in parts)
    added = {part for part, how in stage.learn.items() if how.lora is not None}
    still = sum(row.parameters for row in parts) - sum(row.trainable for row in parts if row.part not in added)
    still -= sum(embeddings_size(vlm, how) for how in stage.learn.values())
    config: Any = vlm.language.config
    each = -(-stage.batch // world)
    rows = min(stage.micro_batch or each, each)
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    vocab = int(vlm.language.get_input_embeddings().weight.shape[0])
    few = sum(_saved(vlm, part, how, frozen) for part, how in stage.learn.items())
    kept = 2 * layers + 34 if stage.recompute else 34 * layers  # what goes into each layer, and one layer whole
    activations = rows * tokens * (kept * width + 3 * vocab)
    weights, gradients, optimiser = still * frozen + trainable * 4 - few, trainable * 4, trainable * 8
    if sharing is None or not sharing.sharded:
        return Memory(weights, gradients, optimiser, activations)
    rest, largest = _units(vlm)
    gathered = (rest + 2 * largest) * frozen + (4 * max(rest, largest) if trainable else 0)
    weights, gradients, optimiser = (-(-size // sharing.shard) for size in (weights, gradients, optimiser))
    if sharing.offload:
        return Memory(0, 0, 0, activations, gathered, host=weights + gradients + optimiser)
    return Memory(weights, gradients, optimiser, activations, gathered)


def _units(vlm: VLM) -> tuple[int, int]:
    """Parameters that stay gathered through a pass, and those of the largest unit that is gathered at a time."""
    seen: set[int] = set()
    sizes = []
    for unit in units(vlm):
        own = {id(value): value.numel() for value in unit.parameters() if id(value) not in seen}
        seen |= own.keys()
        sizes.append(sum(own.values()))
    rest = sum(value.numel() for value in vlm.parameters() if id(value) not in seen)
    return rest, max(sizes, default=0)


def _saved(vlm: VLM, part: str, how: Learn, frozen: int) -> int:
    """Bytes that the adapted layers of a part save by standing in few bits."""
    if how.lora is None or how.lora.bits is None:
        return 0
    numbers = sum(layer.weight.numel() for layer in adapted(vlm, part, how).values())
    return int(numbers * (frozen - BYTES[how.lora.bits]))


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
