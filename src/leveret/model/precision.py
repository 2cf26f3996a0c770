"""In which precision a device computes best."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from leveret.runs import RecipeError

Precision = Literal["auto", "bf16", "fp32"]


def pick_device(device: str) -> str:
    """`auto` is CUDA where there is a GPU, else MPS (Apple's), else the CPU; any other name is itself."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def native_bf16(device: str | torch.device) -> bool:
    """Whether `device` multiplies bfloat16 natively; where it does not, it is emulated, and slower than float32.

    Of MPS it is taken that it does not: before macOS 14 it has no bfloat16, and nothing here was run on it.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))


def resolve_precision(precision: str, device: str | torch.device) -> Literal["bf16", "fp32"]:
    """`auto` is bf16 where the hardware multiplies it natively, else fp32; the two others are what they are.

    RecipeError for a word that is none of them."""
    if precision not in get_args(Precision):
        raise RecipeError(f"precision {precision!r}: allowed are {', '.join(get_args(Precision))}")
    return "bf16" if precision == "bf16" or (precision == "auto" and native_bf16(device)) else "fp32"
