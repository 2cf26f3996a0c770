"""The attention that training uses: causal, in blocks of queries on a CPU, and inside the samples of a packed row.

Written-out attention makes every product of a query and a key, also those that the causal mask then takes away, and
holds them in float32. On a CPU a block of queries here meets only the keys up to its own end, and the weights are held
in the type that is computed in: half of the work, a quarter of the memory. In a row of several samples the keys begin
where the sample does; on a GPU torch's variable-length FlashAttention does the same. transformers calls it by its name,
as it calls its own (`AttentionInterface`); what is not plain causal attention goes on to the family's own code.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

NAME = "leveret_blocks"
BLOCK = 128
"""Queries a block: 64 to 128 are as fast on the drawn world's model, smaller ones are not."""


def _pieces(ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first key, first query, end of both) of every block: the queries of a sample's block, its keys up to them."""
    for start, end in pairwise(ends):
        for begin in range(start, end, BLOCK):
            yield start, begin, min(end, begin + BLOCK)


class CausalBlocks(torch.autograd.Function):
    """softmax(scale q k^T + causal mask) v inside each sample; [N, T, D] each, in the type they come in, to [N, T, D].

    ends  0, the ends of all samples but the last, T.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, ends: tuple[int, ...]) -> Tensor:
        q = q * scale
        keys = k.transpose(1, 2)
        later = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
        out, weights = torch.empty_like(v), []
        for start, begin, end in _pieces(ends):
            scores = torch.bmm(q[:, begin:end], keys[:, :, start:end])
            scores[:, :, begin - start :] += later[: end - begin, : end - begin]
            weights.append(torch.softmax(scores, -1))
            out[:, begin:end] = torch.bmm(weights[-1], v[:, start:end])
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale, ctx.ends = scale, ends
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *weights = ctx.saved_tensors
        grad = grads[0]
        values = v.transpose(1, 2)
        to_q = torch.empty_like(q)
        to_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)  # sums over blocks, so not in bf16
        to_v = torch.zeros_like(to_k)
        for (start, begin, end), weight in zip(_pieces(ctx.ends), weights, strict=True):
            to_v[:, start:end] += torch.bmm(weight.transpose(1, 2), grad[:, begin:end])
            to_weight = torch.bmm(grad[:, begin:end], values[:, :, start:end])
            to_scores = torch._softmax_backward_data(to_weight, weight, -1, weight.dtype)
            to_q[:, begin:end] = torch.bmm(to_scores, k[:, start:end])
            to_k[:, start:end] += torch.bmm(to_scores.transpose(1, 2), q[:, begin:end])
        return to_q * ctx.scale, to_k.to(k.dtype), to_v.to(v.dtype), None, None


def _typed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the type that autocast computes in, where it is on."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[0].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


def causal_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float, ends: Sequence[int] = ()) -> Tensor:
    """Causal attention of queries [B, H, T, D] to keys and values [B, K, T, D], where K divides H; to [B, H, T, D].

    ends  where the samples of a row end, T last; one sample a row when left out.
    Under autocast it computes in autocast's type, and returns that.
    """
    heads, device = query.shape[1], query.device.type
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    q, k, v = _typed(query, key, value)
    with torch.autocast(device, enabled=False):
        q, k, v = (x.contiguous().flatten(0, 1) for x in (q, k, v))
        return CausalBlocks.apply(q, k, v, scale, (0, *(ends or [q.shape[1]]))).unflatten(0, query.shape[:2])


def varlen(query: Tensor, key: Tensor, value: Tensor, scale: float, bounds: tuple[int, ...]) -> Tensor:
    """The same of one packed row on a GPU, by torch's FlashAttention for lengths that vary. [1, H, T, D] each.

    bounds  where each sample begins, and the end of the row.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in _typed(query, key, value))
    begins = torch.tensor(bounds, dtype=torch.int32, device=query.device)
    longest, grouped = max(end - begin for begin, end in pairwise(bounds)), q.shape[1] != k.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        out = varlen_attn(
            q, k, v, begins, begins, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=grouped
        )
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None]


_LAID: tuple[int, ...] = ()


def lay(bounds: tuple[int, ...]) -> None:
    """Where the samples of the packed row begin that comes next, and its end; () for rows of one sample.

    It holds until it is called again, so also on the way back, where layers may be computed once more. Not an argument
    of the pass: some families hand those on to their attention and some do not.
    """
    global _LAID
    _LAID = bounds


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls. [B, H, T, D] to [B, T, H, D]."""
    scale = options.get("scaling")
    if attention_mask is not None or options.get("dropout"):
        assert not _LAID, "a packed row with a mask"
        return _own(module)(module, query, key, value, attention_mask, **options)
    assert scale is not None
    assert not _LAID or _LAID[-1] == query.shape[2], f"a row of {query.shape[2]}, packed as {_LAID}"
    if _LAID and query.device.type == "cuda":
        out = varlen(query, key, value, scale, _LAID)
    else:
        out = causal_blocks(query, key, value, scale, _LAID[1:])
    return out.transpose(1, 2).contiguous(), None


def _mask(*, q_length: int, kv_length: int, mask_function: Callable[..., Any], **options: Any) -> Tensor | None:
    """No mask where it is the plain causal one: padding behind a sample is later than all of it, so that no real
    token sees it."""
    from transformers.masking_utils import causal_mask_function, eager_mask

    keep = options.get("attention_mask")
    behind = keep is None or bool((keep[:, 1:] <= keep[:, :-1]).all())
    if mask_function is causal_mask_function and q_length == kv_length and behind:
        return None
    return eager_mask(q_length=q_length, kv_length=kv_length, mask_function=mask_function, **options)


_PLAIN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""What `_plain` found, for it is asked at every pass."""


def _own(module: nn.Module) -> Any:
    """The written-out attention of a family: a function of the module that its layers are in."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _plain(language: Any) -> bool:
    """Whether all attention of a model is written out as Llama's is, to the letter (no caps, no sinks)."""
    from transformers.models.llama.modeling_llama import eager_attention_forward as llama

    if (known := _PLAIN.get(language)) is None:
        found = [_own(module) for module in language.modules() if hasattr(module, "q_proj")]
        known = bool(found) and all(f is not None and f.__code__.co_code == llama.__code__.co_code for f in found)
        _PLAIN[language] = known
    return known


def packs(language: Any) -> bool:
    """Whether rows of several samples cost a model no more than their samples: its attention is the plain one, without
    dropout and without windows. Other families take such rows too, with a mask of all positions by all."""
    config = language.config
    windows = {"sliding_attention", "chunked_attention"} & set(getattr(config, "layer_types", None) or ())
    # Older configurations give a width that only counts where it is switched on.
    wide = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    dropped = getattr(config, "attention_dropout", 0.0)
    return not (windows or (wide and not hasattr(config, "layer_types")) or dropped) and _plain(language)


def told_bounds(language: Any) -> bool:
    """Whether the attention that a model uses now is ours, and takes where samples begin."""
    return language.config._attn_implementation == NAME and packs(language)


@contextlib.contextmanager
def trained_in_blocks(language: Any, packed: bool = False) -> Iterator[bool]:
    """Inside, a model computes plain causal attention by the code here; says whether it does.

    On a CPU always, on a GPU for packed rows only: for others its own is as good. Only where the family's attention is
    the plain one; any other model stays as it is.
    """
    config = language.config
    first = next(language.parameters())
    ours = first.device.type == "cpu" or (packed and packs(language))
    if not ours or config._attn_implementation not in ("eager", "sdpa") or not _plain(language):
        yield False
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield True
    finally:
        config._attn_implementation = before
        lay(())
