"""Resamplers: learned queries that look at a tower's tokens and leave in their place. [N, n, W] -> [N, queries, D].

Two forms are published under one name. TinyLLaVA Factory's is Flamingo's Perceiver resampler as wide as the language
model; TinyLLaVA's paper (and its repository before the Factory) has a narrow one with cross-attention alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of [N, q, H] to [N, k, H] in `heads` heads; no mask. [N, q, H]."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def feed_forward(width: int, times: int) -> nn.Sequential:
    """LayerNorm, Linear to `times` the width, GELU, Linear back; no biases."""
    wide = times * width
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, wide, bias=False), nn.GELU(), nn.Linear(wide, width, bias=False)
    )


class PerceiverResampler(nn.Module):
    """TinyLLaVA Factory's `resampler` (tinyllava/model/connector/resampler.py), after Flamingo, arXiv 2204.14198.

    Linear to D; then in every layer the queries look at the tokens and at themselves, and pass a feed-forward; a
    LayerNorm ends. The width is the language model's throughout.
    """

    def __init__(
        self, in_width: int, out_width: int, *, queries: int, layers: int, heads: int, head_width: int, times: int
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(queries, out_width))
        self.linear = nn.Linear(in_width, out_width)
        # pairs in a list, as published: `layers.0.0` looks, `layers.0.1` is its feed-forward
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(out_width, heads, head_width), feed_forward(out_width, times)])
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(out_width)

    def forward(self, input: Tensor) -> Tensor:
        media = self.linear(input)  # [N, n, D]
        latents = self.latents.expand(len(input), -1, -1)  # [N, queries, D]
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            latents = layer[0](media, latents) + latents
            latents = layer[1](latents) + latents
        return self.norm(latents)


class PerceiverAttention(nn.Module):
    """Queries look at tokens and queries together, each normed on its own."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_width
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        media, latents = self.norm_media(media), self.norm_latents(latents)
        key, value = self.to_kv(torch.cat((media, latents), dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents), key, value, self.heads))


class PaperResampler(nn.Module):
    """The resampler of TinyLLaVA's paper (arXiv 2402.14289; tinyllava/model/multimodal_projector/builder.py of
    TinyLLaVABench, `mm_projector_type` "resampler").

    Queries of a width of their own look at the tower's tokens (not at themselves) and pass a feed-forward, `layers`
    times; then LayerNorm and Linear to D without bias.
    """

    def __init__(
        self, in_width: int, out_width: int, *, queries: int, layers: int, width: int, heads: int, times: int
    ) -> None:
        super().__init__()
        self.resampler_blocks = nn.ModuleList(PaperBlock(in_width, width, heads, times) for _ in range(layers))
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.post_norm = nn.LayerNorm(width)
        self.final_proj = nn.Linear(width, out_width, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        queries = self.queries.expand(len(input), -1, -1)
        for block in self.resampler_blocks:
            queries = block(queries, input)
        return self.final_proj(self.post_norm(queries))


class PaperBlock(nn.Module):
    """Cross-attention and feed-forward, both residual."""

    def __init__(self, in_width: int, width: int, heads: int, times: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(in_width, width, bias=False)
        self.to_v = nn.Linear(in_width, width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.feed_forward = feed_forward(width, times)
        self.norm_image, self.norm_hidden = nn.LayerNorm(in_width), nn.LayerNorm(width)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        image = self.norm_image(image)
        seen = attend(self.to_q(self.norm_hidden(queries)), self.to_k(image), self.to_v(image), self.heads)
        queries = self.to_out(seen) + queries
        return self.feed_forward(queries) + queries
