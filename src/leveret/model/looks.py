"""Where a connector's learned queries look: their attention to the tower's tokens, read while it runs.

A user's own connector may say so itself, by a method `looks(features [N, n, W]) -> [N, m, n]`, rows of which sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leveret.model.qformer import QFormer
from leveret.model.resampler import PaperResampler, PerceiverResampler


def looks(connector: nn.Module, features: Tensor) -> Tensor | None:
    """How each of m queries shares its look over n tokens: [N, m, n], float32, rows sum to 1; the mean over the heads
    and layers that look. None where a connector has no queries, or an unknown one does not say.

    A Perceiver's queries look at each other too, in the same softmax; only what falls on tokens is counted.
    """
    said = getattr(connector, "looks", None)
    if callable(said):
        return said(features).float()
    if not isinstance(connector, PerceiverResampler | PaperResampler | QFormer):
        return None
    seen: list[Tensor] = []
    readers: dict[str, Callable[[Any, Any, Any], Tensor | None]] = {
        "PerceiverAttention": _perceiver, "PaperBlock": _paper, "Blip2QFormerMultiHeadAttention": _bert,
    }  # fmt: skip

    def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
        if (weights := readers[type(module).__name__](module, args, kwargs)) is not None:
            seen.append(weights)

    hooks = [
        module.register_forward_pre_hook(watch, with_kwargs=True)
        for module in connector.modules()
        if type(module).__name__ in readers
    ]
    try:
        connector(features)
    finally:
        for hook in hooks:
            hook.remove()
    whole = torch.stack(seen).mean(0)
    return whole / whole.sum(-1, keepdim=True).clamp(min=1e-30)


def _weights(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(head width)), the mean over heads: [N, q, H], [N, k, H] -> float32 [N, q, k]."""
    with torch.autocast(query.device.type, enabled=False):
        query, key = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
        return (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1).mean(1)


def _perceiver(module: Any, args: Any, kwargs: Any) -> Tensor:
    media, latents = module.norm_media(args[0]), module.norm_latents(args[1])
    key = module.to_kv(torch.cat((media, latents), dim=1)).chunk(2, dim=-1)[0]
    return _weights(module.to_q(latents), key, module.heads)[..., : media.shape[1]]


def _paper(module: Any, args: Any, kwargs: Any) -> Tensor:
    queries, image = args
    return _weights(module.to_q(module.norm_hidden(queries)), module.to_k(module.norm_image(image)), module.heads)


def _bert(module: Any, args: Any, kwargs: Any) -> Tensor | None:
    media = kwargs.get("encoder_hidden_states")
    if media is None:  # queries among themselves
        return None
    return _weights(module.query(kwargs["hidden_states"]), module.key(media), module.num_attention_heads)
