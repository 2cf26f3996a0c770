"""Causal attention in blocks of queries: what a CPU trains small models with.

Written-out attention makes every product of a query and a key, also those that the causal mask then takes away, and
holds them in float32. Here a block of queries meets only the keys up to its own end, and the weights are held in the
type that is computed in: half of the work, a quarter of the memory. transformers calls it by its name, as it
calls its own (`AttentionInterface`); what is not plain causal attention goes on to the family's own code.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAME = "leveret_blocks"
BLOCK = 128
"""Queries a block: 64 to 128 are as fast on the drawn world's model, smaller ones are not."""


class CausalBlocks(torch.autograd.Function):
    """softmax(scale q k^T + causal mask) v; [N, T, D] each, in the type they come in, to [N, T, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q = q * scale
        keys, length = k.transpose(1, 2), q.shape[1]
        later = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
        out, weights = torch.empty_like(v), []
        for begin in range(0, length, BLOCK):
            end = min(length, begin + BLOCK)
            scores = torch.bmm(q[:, begin:end], keys[:, :, :end])
            scores[:, :, begin:] += later[: end - begin, : end - begin]
            weights.append(torch.softmax(scores, -1))
            out[:, begin:end] = torch.bmm(weights[-1], v[:, :end])
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *weights = ctx.saved_tensors
        grad = grads[0]
        values, length = v.transpose(1, 2), q.shape[1]
        to_q = torch.empty_like(q)
        to_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)  # sums over blocks, so not in bf16
        to_v = torch.zeros_like(to_k)
        for begin, weight in zip(range(0, length, BLOCK), weights, strict=True):
            end = min(length, begin + BLOCK)
            to_v[:, :end] += torch.bmm(weight.transpose(1, 2), grad[:, begin:end])
            to_weight = torch.bmm(grad[:, begin:end], values[:, :, :end])
            to_scores = torch._softmax_backward_data(to_weight, weight, -1, weight.dtype)
            to_q[:, begin:end] = torch.bmm(to_scores, k[:, :end])
            to_k[:, :end] += torch.bmm(to_scores.transpose(1, 2), q[:, begin:end])
        return to_q * ctx.scale, to_k.to(k.dtype), to_v.to(v.dtype), None


def causal_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of queries [B, H, T, D] to keys and values [B, K, T, D], where K divides H; to [B, H, T, D].

    Under autocast it computes in autocast's type, and returns that.
    """
    heads, device = query.shape[1], query.device.type
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    with torch.autocast(device, enabled=False):
        q, k, v = (x.to(dtype, memory_format=torch.contiguous_format).flatten(0, 1) for x in (query, key, value))
        return CausalBlocks.apply(q, k, v, scale).unflatten(0, query.shape[:2])


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls. [B, H, T, D] to [B, T, H, D]."""
    if attention_mask is not None or options.get("dropout"):
        return _own(module)(module, query, key, value, attention_mask, **options)
    return causal_blocks(query, key, value, options["scaling"]).transpose(1, 2).contiguous(), None


def _mask(*, q_length: int, kv_length: int, mask_function: Callable[..., Any], **options: Any) -> Tensor | None:
    """No mask where it is the plain causal one: padding behind a sample is later than all of it, so that no real
    token sees it."""
    from transformers.masking_utils import causal_mask_function, eager_mask

    keep = options.get("attention_mask")
    behind = keep is None or bool((keep[:, 1:] <= keep[:, :-1]).all())
    if mask_function is causal_mask_function and q_length == kv_length and behind:
        return None
    return eager_mask(q_length=q_length, kv_length=kv_length, mask_function=mask_function, **options)


def _own(module: nn.Module) -> Any:
    """The written-out attention of a family: a function of the module that its layers are in."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _plain(language: nn.Module) -> bool:
    """Whether all attention of a model is written out as Llama's is, to the letter (no caps, no sinks)."""
    from transformers.models.llama.modeling_llama import eager_attention_forward as llama

    found = [_own(module) for module in language.modules() if hasattr(module, "q_proj")]
    return bool(found) and all(f is not None and f.__code__.co_code == llama.__code__.co_code for f in found)


@contextlib.contextmanager
def trained_in_blocks(language: Any) -> Iterator[bool]:
    """Inside, a model on the CPU that writes its attention out ("eager") computes it in blocks; says whether it does.

    Only where the family's attention is the plain one; any other model stays as it is.
    """
    config = language.config
    first = next(language.parameters())
    if first.device.type != "cpu" or config._attn_implementation != "eager" or not _plain(language):
        yield False
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    config._attn_implementation = NAME
    try:
        yield True
    finally:
        config._attn_implementation = "eager"
