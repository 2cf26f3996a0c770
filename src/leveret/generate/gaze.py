"""The attention weights of chosen rows, read while a language model runs, whatever attention code it runs by.

Fused attention (sdpa) never holds its weights. Inside `watched` a model computes as it always does, and beside that the
weights of the rows asked for are computed once more by the family's own written-out code (`eager_attention_forward`:
its scale, caps, windows and sinks), in float32 from the queries and keys that the model made. Only some rows at a time,
so that no [heads, T, T] ever stands in memory.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leveret.runs import EnvironmentFault

NAME = "leveret_watched"
PIECE = 2**23
"""Weights that are computed at once: 32 MB of float32."""


class Unreadable(EnvironmentFault):
    """This model's attention cannot be read, and never will be: its code has no form that gives the weights."""


Take = Callable[[int, int, Tensor], None]
"""(layer, first of the rows, weights [rows, heads, T] in float32)."""


@dataclass(slots=True)
class Watch:
    """What is read: `rows` are positions of the one row of the batch; `before` the attention code that answers."""

    rows: Tensor
    take: Take
    before: str
    layers: set[int] = field(default_factory=set)


_WATCH: ContextVar[Watch] = ContextVar("leveret_watch")
"""Per thread: another thread's models are not watched."""


def _written_out(module: nn.Module) -> Any:
    """The written-out attention of a family: a function of the module that its layers are in."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in place of the model's own attention code, which answers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    watch, own = _WATCH.get(), _written_out(module)
    if own is None:
        raise Unreadable(f"the attention of {type(module).__name__} cannot be read: its family has no written-out form")
    answer = ALL_ATTENTION_FUNCTIONS.get_interface(watch.before, own)
    out, _ = answer(module, query, key, value, attention_mask, **options)
    _read(watch, own, module, query, key, value, attention_mask, options)
    return out, None


def _read(
    watch: Watch, own: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Any
) -> None:
    layer, heads = int(module.layer_idx), query.shape[1]
    step = max(1, PIECE // (heads * key.shape[2]))
    with torch.autocast(query.device.type, enabled=False):
        key, value = key.float(), value.float()
        for first in range(0, len(watch.rows), step):
            rows = watch.rows[first : first + step]
            some = _added(mask, rows, key.shape[2])
            _, weights = own(module, query[:, :, rows].float(), key, value, some, **options)
            watch.take(layer, first, weights[0].transpose(0, 1))
    watch.layers.add(layer)


def _added(mask: Tensor | None, rows: Tensor, length: int) -> Tensor:
    """What is added to the scores of some rows, [1, 1, rows, T]: 0, or the least number where they may not look. Fused
    code is given True and False, or nothing where a mask would be plainly causal."""
    if mask is None:
        allowed = torch.arange(length, device=rows.device) <= rows[:, None]
        mask = allowed[None, None]
    else:
        mask = mask[:, :, rows]
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)


def _mask(**options: Any) -> Tensor | None:
    """The mask that the answering code takes."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[_WATCH.get().before](**options)


@contextlib.contextmanager
def watched(language: Any, rows: Tensor, take: Take) -> Iterator[None]:
    """Inside, the attention weights of `rows` (positions in a batch of one row) go to `take`, layer after layer.

    The model is left as it was, whatever happens inside. Raises Unreadable where its attention code is one that
    takes no mask (FlashAttention), or its layers do not go through transformers' interface.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    config = language.config.get_text_config()
    before = str(config._attn_implementation)
    if before not in ("eager", "sdpa"):
        raise Unreadable(
            f"attention {before!r} cannot be read: it takes no mask; allowed are eager and sdpa; set "
            "language.attention in the model's recipe"
        )
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    watch = Watch(rows, take, before)
    token = _WATCH.set(watch)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _WATCH.reset(token)
    if len(watch.layers) != int(config.num_hidden_layers):
        raise Unreadable(
            f"the attention of {type(language).__name__} cannot be read: {len(watch.layers)} of its "
            f"{config.num_hidden_layers} layers go through transformers' attention interface"
        )
