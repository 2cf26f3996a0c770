"""QLoRA: the frozen linear layers under adapters in 4 or 8 bits, through bitsandbytes, on a GPU.

Only layers that get an adapter are replaced; embeddings, norms, the output layer and the other parts stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from leveret.model import fewbits
from leveret.model.fewbits import replace

if TYPE_CHECKING:
    import torch

__all__ = ["BYTES", "plain", "refuse", "replace", "told"]

BYTES = {4: 0.5 + 0.5 / 64, 8: 1.0}
"""Of one weight: 4 bits, and a byte of scale for every 64 weights, itself in few bits (arXiv 2305.14314, double
quantisation), or 8 bits (a scale a row hardly counts)."""


def refuse(bits: int, device: str | torch.device) -> None:
    """EnvironmentFault where weights cannot stand in few bits: on a CPU, or without bitsandbytes."""
    fewbits.refuse(f"lora.bits: {bits}", device, "leave bits out to train plain LoRA")


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
