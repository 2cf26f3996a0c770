"""The small networks of the drawn world: a vision tower, a text tower, and a dual encoder that scores pairs.

A convolutional stem, since a plain ViT of this size learns no shapes in minutes; then a little attention over an 8 x 8
grid with learned row and column embeddings. Everything is plain torch and saved as one safetensors file whose
metadata holds the configuration.
"""

from __future__ import annotations

import json
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leveret.records import TowerView


def _conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o))


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; [N, C, H, W] to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = _conv(width, width), _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(F.relu(self.one(x))))


class Layer(nn.Module):
    """A pre-norm transformer layer; [N, T, C] to the same. `keep` [N, T] hides padding."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mask = None if keep is None else keep[:, None, None, :]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(n, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyVisionTower(nn.Module):
    """[N, 3, 64, 64] to [N, 64, width]: four strided stages to 8 x 8, row and column embeddings, two layers.

    `config`: size, width, layers, heads.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        width = int(config["width"])
        self.size, self.width = int(config["size"]), width
        self.grid = self.size // 8
        self.tokens = self.grid**2
        self.view = TowerView(name="world/vision", size=self.size)
        self.stem = nn.Sequential(
            _conv(3, width // 4, 2),
            nn.ReLU(),
            _conv(width // 4, width // 2, 2),
            nn.ReLU(),
            Residual(width // 2),
            _conv(width // 2, width, 2),
            nn.ReLU(),
            Residual(width),
        )
        self.row = nn.Parameter(torch.randn(self.grid, 1, width) * 0.1)
        self.column = nn.Parameter(torch.randn(1, self.grid, width) * 0.1)
        self.layers = nn.ModuleList(Layer(width, int(config["heads"]), 2 * width) for _ in range(int(config["layers"])))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels).flatten(2).transpose(1, 2) + (self.row + self.column).flatten(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class TinyTextTower(nn.Module):
    """Token ids [N, T] and keep [N, T] bool to [N, out]: one layer and a maximum over positions."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        width = int(config["width"])
        self.length = int(config["length"])
        self.embed = nn.Embedding(int(config["vocabulary"]), width)
        self.position = nn.Parameter(torch.randn(self.length, width) * 0.1)
        self.layer = Layer(width, int(config["heads"]), 2 * width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, int(config["out"]))

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        x = self.layer(self.embed(ids) + self.position[: ids.shape[1]], keep)
        x = self.norm(x).masked_fill(~keep[:, :, None], float("-inf")).amax(1)
        return self.out(x)


class TinyDualEncoder(nn.Module):
    """An image and a text tower with one space: scores image-text pairs by cosine.

    `config`: size, widths (of the strided stages), dim, text (a TinyTextTower's), tokenizer (its JSON, so that the
    file is whole by itself).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.size, self.width = int(config["size"]), int(config["dim"])
        self.view = TowerView(name="world/scorer", size=self.size)
        widths = [3, *map(int, config["widths"])]
        stages: list[nn.Module] = []
        for i, o in pairwise(widths):
            stages += [_conv(i, o, 2), nn.ReLU()]
        self.stem = nn.Sequential(*stages, Residual(widths[-1]))
        self.project = nn.Linear(2 * widths[-1], self.width)
        self.text = TinyTextTower(config["text"])
        self._tokenizer: Any = None

    def embed_images(self, pixels: Tensor) -> Tensor:
        """[N, 3, S, S] to unit vectors [N, dim]."""
        x = self.stem(pixels)
        return F.normalize(self.project(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)).float(), dim=1)

    def embed_ids(self, ids: Tensor, keep: Tensor) -> Tensor:
        """[N, T] token ids and their mask to unit vectors [N, dim]."""
        return F.normalize(self.text(ids, keep).float(), dim=1)

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts to ids and keep [N, T], cut at the text tower's length; an empty text keeps one padding position."""
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_str(self.config["tokenizer"])
        rows = [item.ids[: self.text.length] or [0] for item in self._tokenizer.encode_batch(texts)]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        keep = torch.arange(max(map(len, rows), default=1)) < lengths[:, None]
        ids = torch.zeros(keep.shape, dtype=torch.long)
        ids[keep] = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long)
        return ids, keep

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts to unit vectors [N, dim]."""
        return self.embed_ids(*self.tokenize(texts))

    @classmethod
    def load(cls, path: str | Path) -> TinyDualEncoder:
        """Reads a file that `save_module` wrote; weights become float32."""
        return load_module(cls, path)


def save_module(module: nn.Module, path: str | Path, **metadata: str) -> None:
    """One safetensors file in bfloat16 (running statistics too), the configuration as JSON in its metadata."""
    from safetensors.torch import save

    from leveret.runs import atomic_write

    state = {
        key: value.to(torch.bfloat16) if value.is_floating_point() else value
        for key, value in module.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    data = save(state, {"config": json.dumps(module.config), **metadata})
    atomic_write(Path(path), data)


def load_module(cls: type, path: str | Path) -> Any:
    """Builds `cls` from a file of `save_module`, in float32 and evaluation mode."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        module = cls(json.loads(file.metadata()["config"]))
        state = {key: file.get_tensor(key).float() for key in file.keys()}
    own = {key for key in module.state_dict() if not key.endswith("num_batches_tracked")}
    if own != set(state):
        missing, extra = sorted(own - set(state)), sorted(set(state) - own)
        raise ValueError(f"{path}: missing {missing[:5]}, unexpected {extra[:5]}: not a file of this version")
    module.load_state_dict(state, strict=False)
    return module.eval().requires_grad_(False)
