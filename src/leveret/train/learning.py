"""What learns: frozen and trainable parameters of a model in one stage, and the faults of naming them.

Works on the meta device too, except for attaching adapters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from leveret.inputs.chat import fitting
from leveret.model.parts import PREFIXES, embeddings, learnable
from leveret.runs import RecipeError
from leveret.train import lora
from leveret.train.decay import RULES
from leveret.train.optim import Trainable

if TYPE_CHECKING:
    from leveret.model.vlm import VLM
    from leveret.train.stages import Learn, StageRecipe


_SHAPED = "this model sees images in tiles or in their own shape; take it out"


def faults(vlm: VLM, stage: StageRecipe) -> list[str]:
    """Why a stage cannot teach this model: parts that would get no gradient, layers and targets that do not exist, a
    chat format that is none or not for this tokenizer (where the model has one by now)."""
    found = []
    try:
        fitting(stage.chat or vlm.chat, vlm.tokenizer)
    except RecipeError as error:
        found.append(str(error))
    if stage.resize is not None and vlm.spec.tiling is not None:
        found.append(f"resize: {stage.resize} given, but {_SHAPED}")
    for part, how in stage.learn.items():
        try:
            list(learnable(vlm, part, how.from_layer, how.towers))
            if how.lora is not None:
                lora.targets(vlm, part, how)
        except RecipeError as error:
            found.append(str(error))
    return found


def _chosen(vlm: VLM, part: str, how: Learn) -> list[tuple[str, nn.Parameter]]:
    if how.lora is not None:
        own = [(name, value) for name, value in vlm.named_parameters() if name.startswith(PREFIXES[part])]
        words = embeddings(vlm) if how.lora.embeddings else {}
        return [(name, value) for name, value in own if ".lora_" in name or name in words]
    return list(learnable(vlm, part, how.from_layer, how.towers))


def choose(vlm: VLM, stage: StageRecipe) -> list[Trainable]:
    """Freeze everything, then mark what `stage.learn` names (adapters must be attached by now)."""
    vlm.requires_grad_(False)
    trainables, decaying = [], RULES[stage.decays](vlm)
    for part, how in stage.learn.items():
        decay = stage.weight_decay if how.weight_decay is None else how.weight_decay
        for name, value in _chosen(vlm, part, how):
            value.requires_grad_(True)
            trainables.append(Trainable(name, part, value, how.lr, decay if name in decaying else 0.0))
    return trainables


def ready(vlm: VLM, stage: StageRecipe, *, seed: int, half_frozen: bool = False) -> list[Trainable]:
    """Make `vlm` ready for the stage: adapters attached, parts frozen, types and modes set. Returns what learns.

    Trainable weights are float32. seed: of the adapters' first values. half_frozen turns frozen weights to bfloat16 (on
    a GPU, to save memory).
    A frozen tower is in evaluation mode, so that its features may be cached; batch norms keep the statistics they
    were trained with, because running ones would differ between ranks and would have to be saved.
    """
    if any(how.lora is not None for how in stage.learn.values()):
        torch.manual_seed(seed)
        lora.attach(vlm, stage)
    trainables = choose(vlm, stage)
    learning = {id(t.value) for t in trainables}
    for value in vlm.parameters():
        if id(value) in learning:
            value.data = value.data.float()
        elif half_frozen and value.is_floating_point():  # not what stands in few bits
            value.data = value.data.to(torch.bfloat16)
    if stage.recompute:
        vlm.language.gradient_checkpointing_enable({"use_reentrant": False})
    if stage.compile:
        # In place, so that names stay. Not the last layer: its rows are picked by hooks, which the compiler would meet
        # anew with every batch (model/rows.py).
        for layer in list(vlm.language.get_decoder().layers)[:-1]:
            layer.compile(dynamic=True)
    teach_mode(vlm, stage)
    return trainables


def teach_mode(vlm: VLM, stage: StageRecipe) -> None:
    """Dropout on, but not in a frozen tower or connector; statistics of batch norms stay. Also called after a
    validation."""
    vlm.train()
    for part, module in (("vision", vlm.towers), ("connector", vlm.connector)):
        if part not in stage.learn:
            module.eval()
    for module in vlm.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def set_resize(vlm: VLM, resize: str | None) -> None:
    """Change how images become square, in the model's spec and its recipe, so that the saved model keeps it.

    RecipeError where images are seen in tiles or in their own shape, which no resize has a say in.
    """
    if resize is None:
        return
    if vlm.spec.tiling is not None:
        raise RecipeError(f"resize: {resize} given, but {_SHAPED}")
    views = tuple(replace(view, resize=resize) for view in vlm.spec.towers)  # type: ignore[arg-type]
    vlm.spec = replace(vlm.spec, towers=views)
    vision = vlm.recipe.vision.resized(resize)  # type: ignore[arg-type]
    vlm.recipe = vlm.recipe.model_copy(update={"vision": vision})
