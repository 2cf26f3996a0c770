"""QLoRA: the frozen linear layers under adapters in 4 or 8 bits, through bitsandbytes, on a GPU.

Only layers that get an adapter are replaced; embeddings, norms, the output layer and the other parts stay as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from leveret.runs import EnvironmentFault

if TYPE_CHECKING:
    import torch

BYTES = {4: 0.5 + 0.5 / 64, 8: 1.0}
"""Of one weight: 4 bits, and a byte of scale for every 64 weights, itself in few bits (arXiv 2305.14314, double
quantisation), or 8 bits (a scale a row hardly counts)."""


def refuse(bits: int, device: str | torch.device) -> None:
    """EnvironmentFault where weights cannot stand in few bits: on a CPU, or without bitsandbytes."""
    given = f"lora.bits: {bits}"
    if str(device).partition(":")[0] != "cuda":
        raise EnvironmentFault(
            f"{given} needs a GPU (CUDA), and this runs on {device}; leave bits out to train plain LoRA, or run it "
            "where there is one"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFault(
            f"{given} needs bitsandbytes, which is not installed: pip install 'leveret[quant]'; or leave bits out"
        )


def replace(module: nn.Module, names: Sequence[str], bits: int, quant: str) -> None:
    """Put the linear layers `names` of `module` into 4 (`quant`: nf4 or fp4) or 8 bits, one after another, where they
    are. They compute in bfloat16 (4) or as LLM.int8 (8), and do not learn."""
    import bitsandbytes as bnb
    import torch

    for name in names:
        old = module.get_submodule(name)
        assert isinstance(old, nn.Linear)
        sizes, bias = (old.in_features, old.out_features), old.bias is not None
        weight, device = old.weight.data.cpu(), old.weight.device  # rounding happens on the way to a device
        new: Any
        if bits == 4:
            new = bnb.nn.Linear4bit(*sizes, bias=bias, compute_dtype=torch.bfloat16, quant_type=quant, device="meta")
            rounded = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type=quant)
        else:
            new = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, device="meta")
            rounded = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.weight = rounded.to(device)
        if bias:
            new.bias = old.bias
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, new)


@contextmanager
def told(module: Any, bits: int | None) -> Iterator[None]:
    """While the block runs, `module` says to PEFT that its layers stand in few bits, as a model of transformers that
    was loaded so does."""
    flag = f"is_loaded_in_{bits}bit"
    if bits is not None:
        module.__dict__[flag] = True
    try:
        yield
    finally:
        module.__dict__.pop(flag, None)


def plain(layer: nn.Module) -> nn.Linear:
    """A linear layer as torch's own: itself, or one with the weights that its few bits stand for, in bfloat16, which is
    what those of 4 bits compute in."""
    import torch
    from peft.utils.integrations import dequantize_module_weight

    kind = type(getattr(layer, "weight", None)).__name__
    if kind not in ("Params4bit", "Int8Params"):
        assert isinstance(layer, nn.Linear)
        return layer
    with torch.no_grad():
        weight = dequantize_module_weight(layer).detach().to(torch.bfloat16)
    old: Any = layer
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    if old.bias is not None:
        new.bias = old.bias
    return new
