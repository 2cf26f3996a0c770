"""LoRA and DoRA through PEFT, put into the parts of a model in place.

`inject_adapter_in_model` swaps the linear layers and leaves a module's class alone, so the VLM does not know. A part is
handed over with the exact names of its layers: another part can never be hit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from leveret.model.merge import REST
from leveret.model.parts import PREFIXES, adaptable, adapted, embeddings
from leveret.model.towers import Tower
from leveret.runs import RecipeError, closest
from leveret.train import quantised

if TYPE_CHECKING:
    from torch import Tensor

    from leveret.model.vlm import VLM
    from leveret.train.optim import Trainable
    from leveret.train.stages import Learn, Lora, StageRecipe

HOMES = {"vision": "towers", "connector": "connector", "language": "language"}
"""Part -> the module of the model that its layers are named in."""


def targets(vlm: VLM, part: str, how: Learn) -> list[str]:
    """Names, in the module of HOMES, of a part's linear layers that get an adapter.

    RecipeError for a name in `lora.targets` that no layer has, and where there is no layer at all.
    """
    assert how.lora is not None
    there = adaptable(vlm, part, how)
    known = sorted({name.rpartition(".")[2] for name in there})
    if unknown := [name for name in how.lora.targets or () if name not in known]:
        near = ", ".join(closest(unknown[0], known) or known) or "none"
        raise RecipeError(
            f"learn.{part}.lora.targets names {', '.join(unknown)}, no linear layer that learns there; there is: {near}"
        )
    if not there:
        raise RecipeError(f"learn.{part}.lora: this part has no linear layer that learns, so none to adapt")
    return [name.removeprefix(f"{HOMES[part]}.") for name in adapted(vlm, part, how)]


def attach(vlm: VLM, stage: StageRecipe) -> None:
    """Put the adapters of a stage into the model. Their first values come from torch's global generator: seed it
    before. EnvironmentFault where few bits are asked for and cannot be had (quantised.py)."""
    from peft import LoraConfig, inject_adapter_in_model

    # the language model first, so that its adapters begin the same whatever else has some
    for part in sorted(stage.learn, key=lambda name: name != "language"):
        lora = stage.learn[part].lora
        if lora is None:
            continue
        names, home = targets(vlm, part, stage.learn[part]), vlm.get_submodule(HOMES[part])
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules="|".join(map(re.escape, names)),  # as a list it would be matched by the ends of names
            use_dora=lora.dora,
            use_rslora=lora.rslora,
            bias="none",
            task_type="CAUSAL_LM" if part == "language" else None,
        )
        if lora.bits is not None:
            quantised.refuse(lora.bits, vlm.device)
            quantised.replace(home, names, lora.bits, lora.quant)
        with quantised.told(home, lora.bits):
            inject_adapter_in_model(config, home)


def _layers(module: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]


def _merged(layer: Any) -> nn.Linear:
    """A layer's own linear layer with its adapter added: in float32, kept in its own type (PEFT's arithmetic; for
    DoRA the sum is brought to the length that was learned, arXiv 2402.09353)."""
    import torch

    base = quantised.plain(layer.get_base_layer())
    with torch.no_grad():
        whole = base.weight.data.float() + layer.get_delta_weight("default").float()
        if layer.use_dora["default"]:
            length = layer.lora_magnitude_vector["default"].weight.float()
            whole *= (length / torch.linalg.vector_norm(whole, dim=1))[:, None]
        base.weight.data = whole.to(base.weight.dtype)
    return base


def merge(module: nn.Module) -> None:
    """Add every adapter in `module` to its layer, and put the plain layers back. Weights that stood in few bits come
    back as what these bits say, which is what the adapters learned on."""
    for name, layer in _layers(module):
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, _merged(layer))
    for part in module.modules():
        for leftover in ("peft_config", "active_adapter"):
            if leftover in part.__dict__:
                delattr(part, leftover)


def merge_all(vlm: VLM) -> None:
    """The same in every part of a model."""
    for module in (vlm.towers, vlm.connector, vlm.language):
        merge(module)


def finish(
    vlm: VLM, stage: StageRecipe, trainables: Sequence[Trainable], folder: Path, base: str, laid: Collection[str] = ()
) -> None:
    """Save a stage's adapters and merge them into the model.

    base  name or path of the model that the stage began with. laid: parts that were laid over it (starts.py).

    `folder/adapter` holds the language model's, and in rest.safetensors all else that is not the base's, adapters of
    other parts as whole weights: with the base they are the model that was taught (but for one whose weights stood in
    few bits, which the base's do not). `folder/adapter-NAME` holds those of the tower called NAME,
    `folder/adapter-connector` the connector's.
    """
    lora = {part: how.lora for part, how in stage.learn.items() if how.lora is not None}
    if not lora:
        return
    words = embeddings(vlm) if "language" in lora and lora["language"].embeddings else {}
    rest = {one.name for one in trainables if ".lora_" not in one.name and one.name not in words}
    rest |= {f"{name}.weight" for name, _ in _layers(vlm) if not name.startswith("language.")}
    rest |= {name for name, _ in vlm.named_parameters() if any(name.startswith(PREFIXES[part]) for part in laid)}
    for name, tower in vlm.towers.items() if "vision" in lora else ():
        assert isinstance(tower, Tower)
        # in the module that transformers knows, so that PEFT finds the same layers in the published one
        if _layers(tower.model):
            save(tower.model, lora["vision"], folder / f"adapter-{name}", tower.facts.source)
    if "connector" in lora:
        save(vlm.connector, lora["connector"], folder / "adapter-connector", base)
    if "language" in lora:
        whole = {name.removeprefix("language."): value for name, value in words.items()}
        save(vlm.language, lora["language"], folder / "adapter", base, "CAUSAL_LM", whole)
    merge_all(vlm)
    if "language" in lora and (rest or stage.resize):
        _save_rest({name: x for name, x in vlm.named_parameters() if name in rest}, folder / "adapter", stage.resize)


def _save_rest(tensors: Mapping[str, Tensor], folder: Path, resize: str | None) -> None:
    """Beside adapters: names in the whole model -> tensors; and how images were made square meanwhile, where the stage
    says so."""
    from safetensors.torch import save as to_bytes

    from leveret.runs import atomic_write

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = {"format": "pt"} | ({"resize": resize} if resize else {})
    atomic_write(folder / REST, to_bytes(kept, metadata=told))


def save(
    module: nn.Module,
    lora: Lora,
    folder: Path,
    base: str,
    task: str | None = None,
    whole: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write the adapters in `module` as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    base  name or path of the model they belong to. task: as PEFT calls it. whole: names in the module -> weights that
    learned without adapters (PEFT's modules_to_save).
    """
    import torch
    from safetensors.torch import save as to_bytes

    from leveret.runs import atomic_write

    tensors, found = {}, _layers(module)
    for name, layer in found:
        pieces = {f"{side}.weight": getattr(layer, side)["default"].weight for side in ("lora_A", "lora_B")}
        if lora.dora:
            pieces["lora_magnitude_vector"] = layer.lora_magnitude_vector["default"].weight
        for piece, weight in pieces.items():
            tensors[f"base_model.model.{name}.{piece}"] = weight.detach().to("cpu", torch.float32).contiguous()
    # PEFT looks for a tied weight under each of its names.
    twice = {
        other: weight
        for name, weight in whole.items()
        for other, same in module.named_parameters(remove_duplicate=False)
        if same is weight and other != name
    }
    for name, weight in {**whole, **twice}.items():
        tensors[f"base_model.model.{name}"] = weight.detach().to("cpu", torch.float32, copy=True).contiguous()
    described = {
        "base_model_name_or_path": base,
        "peft_type": "LORA",
        "task_type": task,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_dora": lora.dora,
        "use_rslora": lora.rslora,
        "target_modules": sorted(name for name, _ in found),
        "bias": "none",
        "inference_mode": True,
    }
    if whole:
        described["modules_to_save"] = sorted(name.removesuffix(".weight") for name in whole)
    if twice:
        described["ensure_weight_tying"] = True
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "adapter_model.safetensors", to_bytes(tensors, metadata={"format": "pt"}))
    atomic_write(folder / "adapter_config.json", json.dumps(described, indent=2) + "\n")
