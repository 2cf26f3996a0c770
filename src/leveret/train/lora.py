"""LoRA through PEFT, put into the language part in place.

`inject_adapter_in_model` swaps the linear layers and leaves the model's class alone, so the VLM does not know.
Only the language module is handed over, with the exact names of its layers: a tower can never be hit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from leveret.model.merge import REST
from leveret.runs import RecipeError, closest

if TYPE_CHECKING:
    from torch import Tensor

    from leveret.train.stages import Lora


def targets(language: nn.Module, names: tuple[str, ...] | None) -> list[str]:
    """Full names of the linear layers that get an adapter: all but the output head, or those called one of `names`.

    Raises RecipeError for a name that no layer has.
    """
    head = cast("Any", language).get_output_embeddings()
    linears = [
        name for name, module in language.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name.rpartition(".")[2] != "lm_head"
    ]  # fmt: skip
    if names is None:
        return linears
    known = {name.rpartition(".")[2] for name in linears}
    unknown = [name for name in names if name not in known]
    if unknown:
        near = ", ".join(closest(unknown[0], sorted(known)) or sorted(known))
        raise RecipeError(
            f"lora.targets names {', '.join(unknown)}, no linear layer of this language model; there is: {near}"
        )
    return [name for name in linears if name.rpartition(".")[2] in names]


def config(language: nn.Module, lora: Lora) -> Any:
    """PEFT's LoraConfig for exactly these layers."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets(language, lora.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )


def attach(language: nn.Module, lora: Lora) -> None:
    """Put adapters into `language`. Their first values come from torch's global generator: seed it before."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config(language, lora), language)


def _adapted(language: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    found = [(name, module) for name, module in language.named_modules() if isinstance(module, LoraLayer)]
    yield from found


def merge(language: nn.Module) -> None:
    """Add every adapter to its layer, in float32, and put the plain layers back."""
    for name, layer in _adapted(language):
        base = layer.get_base_layer()
        delta = layer.get_delta_weight("default")
        base.weight.data = (base.weight.data.float() + delta.float()).to(base.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(language.get_submodule(parent), child, base)
    for leftover in ("peft_config", "active_adapter"):
        if leftover in language.__dict__:
            delattr(language, leftover)


def save(
    language: nn.Module,
    lora: Lora,
    folder: Path,
    base: str,
    rest: Mapping[str, Tensor] | None = None,
    resize: str | None = None,
) -> None:
    """Write the adapters as PEFT does: `adapter_config.json` and `adapter_model.safetensors`; and beside them, in
    `rest.safetensors`, what else learned, without which base and adapters would not be the model that was taught.

    base    name or path of the model they belong to.
    rest    names in the whole model -> tensors. resize: how images were made square meanwhile, where the stage says so.
    """
    import torch
    from safetensors.torch import save as to_bytes

    from leveret.runs import atomic_write

    tensors = {}
    for name, layer in _adapted(language):
        for side in ("lora_A", "lora_B"):
            weight = getattr(layer, side)["default"].weight
            tensors[f"base_model.model.{name}.{side}.weight"] = weight.detach().to("cpu", torch.float32).contiguous()
    described = {
        "base_model_name_or_path": base,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(name for name, _ in _adapted(language)),
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "adapter_model.safetensors", to_bytes(tensors, metadata={"format": "pt"}))
    if rest or resize:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in (rest or {}).items()}
        told = {"format": "pt"} | ({"resize": resize} if resize else {})
        atomic_write(folder / REST, to_bytes(kept, metadata=told))
    atomic_write(folder / "adapter_config.json", json.dumps(described, indent=2) + "\n")
