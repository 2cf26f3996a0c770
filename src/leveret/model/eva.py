"""EVA-02-CLIP's vision transformer, which transformers has no class for: pixels [N, 3, S, S] -> tokens [N, 1 + n, W].

Read from Bunny's and open_clip's copies of the original (`EVA02-CLIP-L-14-336`): a pre-norm ViT with learned positions,
and on top of them rotary positions in two dimensions on queries and keys of the patches (never of the class token); a
LayerNorm inside the attention (before its output layer) and one inside the SwiGLU MLP; no bias on keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

THETA = 10000.0


class EvaEmbeddings(nn.Module):
    """Patches by a convolution, a class token in front, learned positions. [N, 3, S, S] -> [N, 1 + n, W]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        tokens = (config["image_size"] // patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 1 + tokens, width) * 0.02)
        self.patch = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.position


def rotation(grid: int, trained: int, width: int, device: torch.device) -> Tensor:
    """Angles [grid * grid, width] of the patches, row by row: half of `width` turns with the row, half with the column.

    Positions are stretched to the grid of the pre-training: t = arange(grid) / grid * trained. Neighbouring numbers
    share an angle, because they are the two axes of one plane.
    """
    half = width // 2
    speeds = THETA ** -(torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)
    place = torch.arange(grid, device=device, dtype=torch.float32) / grid * trained
    angles = (place[:, None] * speeds).repeat_interleave(2, dim=1)  # [grid, half]
    row = angles[:, None, :].expand(grid, grid, half)
    column = angles[None, :, :].expand(grid, grid, half)
    return torch.cat([row, column], dim=-1).reshape(grid * grid, width)


def rotate(tokens: Tensor, angles: Tensor) -> Tensor:
    """Turns the patches among `tokens` [N, heads, 1 + n, width] by `angles` [n, width]; the class token stays."""
    patches = tokens[:, :, 1:]
    even, odd = patches[..., 0::2], patches[..., 1::2]
    crossed = torch.stack([-odd, even], dim=-1).flatten(-2)
    turned = patches * angles.cos().to(tokens.dtype) + crossed * angles.sin().to(tokens.dtype)
    return torch.cat([tokens[:, :, :1], turned], dim=2)


class EvaAttention(nn.Module):
    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.inner_norm = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor, angles: Tensor) -> Tensor:
        count, tokens, width = hidden.shape
        query, key, value = (
            layer(hidden).view(count, tokens, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(rotate(query, angles), rotate(key, angles), value)
        return self.proj(self.inner_norm(mixed.transpose(1, 2).reshape(count, tokens, width)))


class EvaMLP(nn.Module):
    """w3(norm(silu(w1 x) * w2 x))."""

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.w3(self.norm(F.silu(self.w1(hidden)) * self.w2(hidden)))


class EvaBlock(nn.Module):
    """[N, 1 + n, W] -> the same; `angles` [n, head width] as EvaVision.angles gives them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = EvaAttention(width, config["num_attention_heads"], eps)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = EvaMLP(width, config["intermediate_size"], eps)

    def forward(self, hidden: Tensor, angles: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), angles)
        return hidden + self.mlp(self.norm2(hidden))


class EvaVision(nn.Module):
    """The whole tower.

    `config` has hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, image_size, patch_size,
    projection_dim, layer_norm_eps, and pretrain_grid: patches to a side in the pre-training, which the rotary positions
    are stretched to. ValueError when a head cannot be split into planes for rows and for columns.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, heads = config["hidden_size"], config["num_attention_heads"]
        if width % heads or (width // heads) % 4:
            raise ValueError(f"hidden_size {width} over num_attention_heads {heads}: a head's width must divide by 4")
        self.grid, self.trained = config["image_size"] // config["patch_size"], int(config["pretrain_grid"])
        self.head_width = width // heads
        self.embeddings = EvaEmbeddings(config)
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.head = nn.Linear(width, config["projection_dim"])

    def angles(self, device: torch.device) -> Tensor:
        """What every block turns its queries and keys by: [n, head width] float32."""
        return rotation(self.grid, self.trained, self.head_width, device)

    def forward(self, pixels: Tensor) -> Tensor:
        """The image's vector [N, projection_dim]: the class token after all blocks, normed and projected."""
        hidden, angles = self.embeddings(pixels), self.angles(pixels.device)
        for block in self.blocks:
            hidden = block(hidden, angles)
        return self.head(self.norm(hidden)[:, 0])
