"""What is taught, in which order, and what learns at which rate: the recipe of a training run.

A recipe is a model and an ordered table of stages. Whatever a stage does not name under `learn` is frozen.
This file is data and its rules; nothing heavy is imported, so faults are found before torch is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from leveret import own
from leveret.model.recipe import ModelRecipe, named
from leveret.records import Resize
from leveret.runs import RecipeError

Part = Literal["vision", "connector", "language"]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, lt=10)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Start(_Strict):
    """Weights to begin with, instead of the backbones' or of those that the stage before left."""

    source: str = Field(
        alias="from",
        description="A model's folder or a run's, of ours or of another tool; an id of the hub; or, for a connector "
        "alone, a file (mm_projector.bin).",
    )
    parts: tuple[Part, ...] | None = Field(None, min_length=1, description="Only these parts; all when left out.")

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        return {"from": self.source, "parts": None if self.parts is None else list(self.parts)}


class Lora(_Strict):
    """Low-rank adapters on the linear layers of a part, in PEFT's terms and PEFT's format."""

    rank: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    targets: tuple[str, ...] | None = Field(
        None,
        description="Last names of the linear layers that get an adapter (q_proj ...); all but lm_head when left out.",
    )
    dora: bool = Field(
        False, description="DoRA (arXiv 2402.09353): the length of every output's weights learns apart from them."
    )
    rslora: bool = Field(
        False, description="rsLoRA (arXiv 2312.03732): scaled by alpha / sqrt(rank), for ranks of 64 and more."
    )
    embeddings: bool = Field(
        False,
        description="The embeddings, and an output layer of its own, learn whole beside the adapters (language "
        "only): words that the language model never met cannot be told apart without.",
    )
    bits: Literal[4, 8] | None = Field(
        None,
        description="QLoRA: the adapted layers' own weights stand in so many bits while the adapters learn (language "
        "only, on a GPU, with bitsandbytes). The saved model is what was taught: these weights and the adapters.",
    )
    quant: Literal["nf4", "fp4"] = Field("nf4", description="The numbers that 4 bits stand for.")


class Learn(_Strict):
    """How one part learns. A part that is not named is frozen."""

    lr: Rate = Field(description="Peak learning rate of this part.")
    weight_decay: float | None = Field(None, ge=0, description="Instead of the stage's; `decays` says of what.")
    lora: Lora | None = Field(None, description="Train adapters instead of the weights.")
    from_layer: int | None = Field(
        None,
        ge=0,
        description="Only this block (from 0) and what comes after it learn (vision and language).",
    )
    towers: tuple[str, ...] | None = Field(
        None, min_length=1, description="Of several towers only these, by their names (vision)."
    )


class KeepBest(_Strict):
    """Which of a stage's models is the best one."""

    metric: str = Field(
        min_length=1,
        description="What a validation gives; `loss` with held_out. a.b means b in a.",
    )
    mode: Literal["min", "max"] = Field("min", description="Whether a small or a large value is good.")


class HeldOut(_Strict):
    """Samples the stage does not learn from: their loss and the answers to a few of them, at each validation."""

    data: str = Field(description="As the stage's data; it must hold none of that.")
    images: str | None = Field(None, description="Root of the images; the folder of the data when left out.")
    count: int = Field(64, ge=1, description="Samples the loss is taken over, spread evenly over the data.")
    answers: int = Field(4, ge=0, description="So many of them are answered, into samples.jsonl.")
    max_answer: int = Field(64, ge=1, description="Longest answer, in tokens.")


class StageRecipe(_Strict):
    """One stage: its data, what learns, and how long."""

    data: str = Field(description="LLaVA JSON, tars, parquet, a folder of save_to_disk, or of photos with captions.")
    images: str | None = Field(None, description="Root of the images; the folder of the data when left out.")
    chat: str | None = Field(
        None, description="Chat format of this stage, named as the model's is; that when left out."
    )
    resize: Resize | None = Field(
        None, description="How images become square from this stage on; the model's when left out."
    )
    start: Start | None = Field(
        None, description="Weights laid over the model that the stage begins with: all of it, or parts."
    )
    learn: dict[Part, Learn] = Field(min_length=1, description="What learns, at which rate. The rest is frozen.")
    steps: int | None = Field(None, ge=1, description="Optimiser steps; or give epochs.")
    epochs: float | None = Field(None, gt=0, description="Passes over the data; or give steps.")
    batch: int = Field(32, ge=1, description="Samples in one optimiser step, over all ranks.")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="Samples in one pass on one rank; gradients add up to the batch. All at once when left out.",
    )
    order: Literal["length", "modality", "random", "llava", "tinyllava", "prismatic"] = Field(
        "length",
        description="Which samples make a step: alike in length; the same, each step with images or without; as they "
        "fall; or as LLaVA and Bunny, TinyLLaVA Factory or Prismatic group them.",
    )
    schedule: Literal["cosine", "wsd", "constant", "linear"] = Field(
        "cosine", description="Shape of the learning rate after the warm-up."
    )
    warmup: Share = Field(0.03, description="Share of the steps over which the rate rises.")
    decay: Share = Field(0.2, description="Share of the steps over which wsd falls to zero at the end.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW) of what `decays` says.")
    decays: Literal["matrices", "trainer"] = Field(
        "matrices",
        description="matrices: what has two dimensions and is no bias. trainer: as transformers' Trainer had it (4.37 "
        "to 4.40): all but biases and the norms it was told of, so layer scales and some norms too.",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's two averages."
    )
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    clip: float | None = Field(1.0, gt=0, description="Largest norm of the whole gradient; null never clips.")
    max_tokens: int = Field(2048, ge=8, description="Longer samples are cut at the right end.")
    pack: bool | Literal["auto"] = Field(
        "auto",
        description="All samples of a pass in one row, none seeing another, instead of one a row with padding. auto: "
        "on a GPU, where the language model's attention takes such rows as they are.",
    )
    recompute: bool = Field(
        False, description="Gradient checkpointing: the language model's layers are computed again on the way back."
    )
    compile: bool = Field(False, description="The language model's layers through torch.compile.")
    fused: bool = Field(True, description="AdamW in one kernel.")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto is bf16 autocast where the hardware computes bf16 natively, else fp32."
    )
    cache_features: bool = Field(
        True,
        description="A frozen tower sees each image once and its features stay on disk. No effect when vision learns.",
    )
    workers: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = Field(
        "auto",
        description="Threads of a rank that decode images for the next step; auto is its cores, up to 8, beside "
        "a GPU, and 1 beside a CPU, which computes meanwhile.",
    )
    save_every: int = Field(200, ge=1, description="Steps between saved states.")
    keep_last: int = Field(2, ge=1, description="Saved states that are kept: a damaged one is passed over.")
    keep_best: KeepBest | None = Field(
        None, description="Also keep the model of the best validation, in STAGE/best/model."
    )
    held_out: HeldOut | None = Field(None, description="Samples to validate with; nothing is learned from them.")
    validate_every: int | None = Field(
        None, ge=1, description="Steps between validations; at the end only when left out."
    )
    bad_steps: int = Field(
        10, ge=0, description="Steps with a non-finite loss that may be skipped before the run stops."
    )
    bad_share: Share = Field(0.2, description="Share of samples that may fail before the run stops.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="Instead of the run's.")

    @field_validator("learn", mode="before")
    @classmethod
    def _frozen(cls, learn: Any) -> Any:
        """`PART: null` freezes a part that learns in the recipe further up."""
        return {part: how for part, how in learn.items() if how is not None} if isinstance(learn, dict) else learn

    @model_validator(mode="after")
    def _whole(self) -> StageRecipe:
        """Rules between fields. All broken ones are told at once."""
        faults = []
        if (self.steps is None) == (self.epochs is None):
            faults.append(
                "give exactly one of steps and epochs; where the recipe has the other, add steps=null or epochs=null"
            )
        if self.micro_batch is not None and self.micro_batch > self.batch:
            faults.append(f"micro_batch {self.micro_batch} is larger than batch {self.batch}")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            faults.append(f"warmup {self.warmup} and decay {self.decay} together pass the whole of the stage")
        for part, how in self.learn.items():
            if how.from_layer is not None and part == "connector":
                faults.append("learn.connector.from_layer: only vision and language can learn from a layer on")
            if how.towers is not None and part != "vision":
                faults.append(f"learn.{part}.towers: only vision has towers")
            if how.lora is not None and how.lora.bits is not None and part != "language":
                faults.append(f"learn.{part}.lora.bits: only the language model's weights can stand in few bits")
            if how.lora is not None and how.lora.embeddings and how.from_layer:
                faults.append(
                    f"learn.{part}.lora.embeddings: with from_layer {how.from_layer} they stay; take one of the two out"
                )
            if how.lora is not None and how.lora.embeddings and part != "language":
                faults.append(f"learn.{part}.lora.embeddings: only the language model has embeddings")
            if how.lora is not None and how.lora.bits != 4 and how.lora.quant != "nf4":
                faults.append(f"learn.{part}.lora.quant: it says what 4 bits stand for; give bits: 4, or leave it out")
        if faults:
            raise ValueError("; ".join(faults))
        return self


class Averaged(_Strict):
    """One of the models that a published one is the mean of."""

    recipe: str = Field(description="Name of the recipe that trains it.")
    weight: float = Field(gt=0, lt=1, description="Its share.")


class Parallel(_Strict):
    """How several processes hold the model: each of them whole (ddp), or each a share of it (fsdp)."""

    kind: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="auto shares the model only between GPUs that it would not fit on whole."
    )
    shard: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        "all", description="fsdp: ranks that hold one copy together; a divisor of the ranks, which then hold several."
    )
    offload: bool = Field(
        False, description="fsdp on GPUs: shares, gradients and moments lie in the host's memory, and AdamW runs there."
    )
    reshard: bool = Field(
        True, description="fsdp: give a layer's weights up after the forward pass, gather them again on the way back."
    )


class TrainRecipe(_Strict):
    """A model and the stages that teach it, in order."""

    name: str = Field(min_length=1, description="Name of the recipe, for people.")
    seed: int = Field(0, ge=0, lt=2**63, description="Everything random follows from it.")
    model: ModelRecipe = Field(description="The backbones the first stage starts from.")
    start: Start | None = Field(None, description="Weights the first stage starts from, instead of the backbones'.")
    stages: dict[str, StageRecipe] = Field(
        min_length=1, description="Stages in order; each starts from the one before."
    )
    average: tuple[Averaged, ...] | None = Field(
        None,
        min_length=2,
        description="The model that was published is the mean of what these recipes train: `leveret merge` makes it "
        "when all of them are done.",
    )
    ranks: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        "auto", description="Processes on this machine; auto is 2 on a CPU with 2 cores or more, else 1."
    )
    parallel: Parallel = Field(
        default_factory=lambda: Parallel.model_validate({}), description="How these processes hold the model."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU when there is one.")

    track: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="Dashboards that get what metrics.jsonl gets (pip install 'leveret[track]')."
    )

    @field_validator("stages", mode="before")
    @classmethod
    def _left_out(cls, stages: Any) -> Any:
        """`NAME: null` takes away a stage that a recipe further up `extends` has."""
        return {name: how for name, how in stages.items() if how is not None} if isinstance(stages, dict) else stages

    @model_validator(mode="after")
    def _names(self) -> TrainRecipe:
        """A stage's name becomes a folder beside `model`, so it must be a plain word."""
        for name in self.stages:
            if not name.replace("_", "").replace("-", "").isalnum() or name in RESERVED:
                raise ValueError(f"stage {name!r}: a stage's name is letters, digits, - and _, and none of {RESERVED}")
        if self.average and abs(sum(one.weight for one in self.average) - 1) > 1e-6:
            raise ValueError(f"average: the weights sum to {sum(one.weight for one in self.average):g}, and must to 1")
        return self


def averaged(recipe: TrainRecipe) -> str | None:
    """How the published model is made of what several recipes train, in words; None where it is what this one does."""
    if recipe.average is None:
        return None
    shares = " + ".join(f"{one.weight:g} of {one.recipe}" for one in recipe.average)
    weights = " ".join(f"{one.weight:g}" for one in recipe.average)
    runs = " ".join(f"RUN{place}" for place, _ in enumerate(recipe.average, 1))
    return f"published is {shares}: leveret merge {runs} --weights {weights} -o OUT"


RESERVED = ("model", "done", "recipe", "metrics")
"""Names a run folder already uses."""

HARMLESS = ("workers", "save_every", "keep_last", "keep_best", "held_out", "validate_every", "bad_steps", "bad_share")
"""Stage fields that may change between a stop and a resume: they do not move a single bit of the result."""

FREE = ("ranks", "parallel")
"""Fields of a recipe that may change between a stop and a resume, though sums are then rounded in another order and
dropout draws other numbers: states are whole, so they fit any number of ranks."""


def binding(recipe: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dumped recipe that a resumed run must share with the run it continues."""
    stages = {name: _binding_stage(stage) for name, stage in recipe["stages"].items()}
    return {key: value for key, value in recipe.items() if key not in ("average", "track")} | {"stages": stages}


def _binding_stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if key not in HARMLESS}


def filled(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What `binding` gave an earlier version, with the fields that came since at their defaults; as it is where today's
    recipes cannot be so."""
    try:
        return binding(TrainRecipe.model_validate(kept).model_dump(mode="json"))
    except ValueError:
        return dict(kept)


def filled_stage(kept: Any) -> Any:
    """The same of one stage."""
    try:
        return _binding_stage(StageRecipe.model_validate(kept).model_dump(mode="json"))
    except ValueError:
        return kept


def given(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe as a person gave it: rows in files of their own with the files' fingerprints (own.py), so that a run
    is told from one before the file changed. RecipeError with all that is wrong at once."""
    faults, model, stages = [], recipe.model, {}
    try:
        model = named(recipe.model)
    except RecipeError as fault:
        faults.append(str(fault))
    for name, stage in recipe.stages.items():
        stages[name] = stage
        try:
            if stage.chat is not None and own.is_own(stage.chat):
                stages[name] = stage.model_copy(update={"chat": own.pin(stage.chat, f"stages.{name}.chat")})
        except RecipeError as fault:
            faults.append(str(fault))
    if faults:
        raise RecipeError("\n".join(faults))
    return recipe.model_copy(update={"model": model, "stages": stages})


def total_steps(stage: StageRecipe, per_epoch: int) -> int:
    """Optimiser steps of a stage whose order makes so many of one pass over the data."""
    return stage.steps or math.ceil((stage.epochs or 0) * per_epoch)
