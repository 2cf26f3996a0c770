"""Linear layers in 4 or 8 bits, through bitsandbytes, on a GPU: under adapters, or to answer with less memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from leveret.model.precision import native_bf16
from leveret.runs import EnvironmentFault, RecipeError

if TYPE_CHECKING:
    import torch

    from leveret.model.vlm import VLM

LOAD_IN = {"8bit": 8, "4bit": 4}
"""What may be said of a model that is loaded -> bits."""


def bits_of(load_in: str | None) -> int | None:
    """A key of LOAD_IN in bits; None for None. RecipeError for anything else."""
    if load_in is None:
        return None
    if load_in not in LOAD_IN:
        raise RecipeError(f"--load-in {load_in}: allowed are {' and '.join(LOAD_IN)}; left out, weights are as saved")
    return LOAD_IN[load_in]


def refuse(given: str, device: str | torch.device, instead: str) -> None:
    """EnvironmentFault where weights cannot stand in few bits: on anything but a GPU (CUDA), or without bitsandbytes.

    given    what was asked for, in the user's words. instead: what to do, after "leave .. out".
    """
    if str(device).partition(":")[0] != "cuda":
        raise EnvironmentFault(
            f"{given} needs a GPU (CUDA), and this runs on {device}; {instead}, or run it where there is one"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFault(
            f"{given} needs bitsandbytes, which is not installed: pip install 'leveret[quant]'; or {instead}"
        )


def replace(
    module: nn.Module,
    names: Sequence[str],
    bits: int,
    quant: str,
    device: str | torch.device | None = None,
    compute: torch.dtype | None = None,
) -> None:
    """Put the linear layers `names` of `module` into 4 (`quant`: nf4 or fp4) or 8 bits, one after another, on `device`
    (default: where they are). They compute in `compute` (4; default bfloat16) or as LLM.int8 (8), and do not learn."""
    import bitsandbytes as bnb
    import torch

    for name in names:
        old = module.get_submodule(name)
        assert isinstance(old, nn.Linear)
        sizes, bias = (old.in_features, old.out_features), old.bias is not None
        place = old.weight.device if device is None else torch.device(device)
        weight = old.weight.data.cpu()  # rounding happens on the way to a device
        new: Any
        if bits == 4:
            kind = compute or torch.bfloat16
            new = bnb.nn.Linear4bit(*sizes, bias=bias, compute_dtype=kind, quant_type=quant, device="meta")
            rounded = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type=quant)
        else:
            new = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, device="meta")
            rounded = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.weight = rounded.to(place)
        if bias:
            new.bias = old.bias if device is None else nn.Parameter(old.bias.data.to(place), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, new)


def put(vlm: VLM, bits: int, device: str | torch.device) -> VLM:
    """The model on `device`, the linear layers of its language model in few bits (nf4 for 4), to answer with.

    Embeddings, the output layer, towers and connector keep 16 bits: float32 becomes bfloat16, or float16 where the
    device has no bfloat16. One layer after another moves, so the device never holds the whole in 16 bits.
    """
    import torch

    half = torch.bfloat16 if native_bf16(device) else torch.float16
    if vlm.dtype == torch.float32:
        vlm.cast(half)
    head = vlm.language.get_output_embeddings()
    names = [name for name, module in vlm.language.named_modules() if type(module) is nn.Linear and module is not head]
    replace(vlm.language, names, bits, "nf4", device, half)
    return vlm.to(device)


def stands_in_few_bits(vlm: VLM) -> bool:
    """Whether layers of the language model were put into few bits."""
    kinds = ("Params4bit", "Int8Params")
    return any(type(parameter).__name__ in kinds for parameter in vlm.language.parameters())
