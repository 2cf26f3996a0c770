"""nanoVLM computed once more, from its description alone: plain torch over its own tensors, with random weights.

Nothing of leveret is used; the formulas are written out (attention as a softmax, positions as turns of pairs, tiles by
arithmetic).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

OWNER = "HuggingFaceTB/toy-tokenizer"
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TILES = {f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)}
FORMS: dict[str, dict[str, Any]] = {
    "question": {},
    "chat": {"vlm_extra_tokens": {"image_token": "<|image|>"}},
    "tiles": {"vlm_extra_tokens": {"image_token": "<|image|>"} | TILES, "max_img_size": 128},
    "global": {
        "vlm_extra_tokens": {"image_token": "<|image|>", "global_image_token": "<|global_image|>"} | TILES,
        "max_img_size": 96, "resize_to_max_side_len": False,
    },
    "grown": {
        "vlm_extra_tokens": {"image_token": "<|image|>", "global_image_token": "<|global_image|>"} | TILES,
        "max_img_size": 96, "resize_to_max_side_len": True,
    },
    "one": {
        "vlm_extra_tokens": {"image_token": "<|image|>", "global_image_token": "<|global_image|>"},
        "max_img_size": 32, "resize_to_max_side_len": False,
    },
}  # fmt: skip
"""The versions: pictures in front; ChatML; with tiles; with a whole image before them; small images grown; one tile."""


def settings(form: str, **more: Any) -> dict[str, Any]:
    """A toy config.json. 32 pixels, patches of 4, shuffled by 2: 16 tokens a picture."""
    tokens = FORMS[form].get("vlm_extra_tokens", {})
    config = {
        "vit_hidden_dim": 16, "vit_inter_dim": 32, "vit_patch_size": 4, "vit_img_size": 32, "vit_n_heads": 2,
        "vit_dropout": 0.0, "vit_n_blocks": 3, "vit_ln_eps": 1e-6, "vit_cls_flag": False,
        "vit_model_type": "google/siglip-toy", "lm_hidden_dim": 32, "lm_inter_dim": 64, "lm_rms_eps": 1e-5,
        "lm_re_base": 10000, "lm_max_position_embeddings": 1024, "lm_vocab_size": 320 + len(tokens), "lm_n_heads": 4,
        "lm_n_kv_heads": 2, "lm_dropout": 0.0, "lm_n_blocks": 2, "lm_attn_scaling": 1.0, "lm_max_length": 128,
        "lm_use_tokens": False, "lm_tie_weights": True, "lm_model_type": "HuggingFaceTB/toy", "lm_tokenizer": OWNER,
        "mp_pixel_shuffle_factor": 2, "vlm_load_backbone_weights": True, "vlm_checkpoint_path": "checkpoints",
    }  # fmt: skip
    if tokens:
        more = {
            "lm_chat_template": TEMPLATE, "mp_image_token_length": 16, "lm_base_vocab_size": 320,
            "extra_token_amount": len(tokens), "hf_repo_name": "nanoVLM",
        } | more  # fmt: skip
    else:
        more = {"lm_eos_token_id": 0} | more
    return config | FORMS[form] | more


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights under its names, large enough that everything moves the logits; norms away from one."""
    gen = torch.Generator().manual_seed(seed)
    vit, lm, head = config["vit_hidden_dim"], config["lm_hidden_dim"], config["lm_hidden_dim"] // config["lm_n_heads"]
    cells, factor = config["vit_img_size"] // config["vit_patch_size"], config["mp_pixel_shuffle_factor"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_embedding.conv.weight": (vit, 3, config["vit_patch_size"], config["vit_patch_size"]),
        "vision_encoder.patch_embedding.conv.bias": (vit,),
        "vision_encoder.patch_embedding.position_embedding": (1, cells * cells, vit),
        "vision_encoder.layer_norm.weight": (vit,),
        "vision_encoder.layer_norm.bias": (vit,),
        "MP.proj.weight": (lm, vit * factor * factor),
        "decoder.token_embedding.weight": (config["lm_vocab_size"], lm),
        "decoder.norm.weight": (lm,),
    }
    for block in range(config["vit_n_blocks"]):
        at, deep = f"vision_encoder.blocks.{block}.", config["vit_inter_dim"]
        sizes = {"attn.qkv_proj": (3 * vit, vit), "attn.out_proj": (vit, vit), "mlp.fc1": (deep, vit),
                 "mlp.fc2": (vit, deep), "ln1": (vit,), "ln2": (vit,)}  # fmt: skip
        for name, size in sizes.items():
            shapes |= {f"{at}{name}.weight": size, f"{at}{name}.bias": size[:1]}
    for block in range(config["lm_n_blocks"]):
        at, deep, small = f"decoder.blocks.{block}.", config["lm_inter_dim"], head * config["lm_n_kv_heads"]
        shapes |= {f"{at}attn.q_proj.weight": (lm, lm), f"{at}attn.out_proj.weight": (lm, lm),
                   f"{at}attn.k_proj.weight": (small, lm), f"{at}attn.v_proj.weight": (small, lm),
                   f"{at}mlp.gate_proj.weight": (deep, lm), f"{at}mlp.up_proj.weight": (deep, lm),
                   f"{at}mlp.down_proj.weight": (lm, deep), f"{at}norm1.weight": (lm,),
                   f"{at}norm2.weight": (lm,)}  # fmt: skip
    if not config["lm_tie_weights"]:
        shapes["decoder.head.weight"] = (config["lm_vocab_size"], lm)
    found = {name: torch.randn(shape, generator=gen) * 0.25 for name, shape in shapes.items()}
    for name in found:
        if name.endswith(("norm.weight", "ln1.weight", "ln2.weight", "norm1.weight", "norm2.weight")):
            found[name] += 1
    turns = torch.arange(0, head, 2).float() / head
    return found | {"decoder.rotary_embd.inv_freq": 1.0 / config["lm_re_base"] ** turns}


def toy_tokenizer(end: str) -> Any:
    """Byte-level BPE as SmolLM's: digits apart, three special tokens in front; 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    text = (
        "Question: What is in the picture? Answer: a red square and a blue circle, two of them. user assistant image "
    )
    tokenizer.train_from_iterator(
        [text * 3, "How many green things are there on the left? none right above below"] * 4, trainer
    )
    assert tokenizer.get_vocab_size() == 320
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)


class Nano:
    """A toy nanoVLM: its folder, and what it computes."""

    def __init__(self, place: Path, form: str, **more: Any) -> None:
        from safetensors.torch import save_file

        self.form, self.config = form, settings(form, **more)
        self.weights = tensors(self.config)
        self.folder, self.hub = place / "nano", place / "hub"
        self.folder.mkdir(parents=True)
        (self.folder / "config.json").write_text(json.dumps(self.config, indent=4))
        saved = dict(self.weights)
        if self.config["lm_tie_weights"]:  # of two names for one tensor safetensors keeps the first of the alphabet
            saved["decoder.head.weight"] = saved.pop("decoder.token_embedding.weight")
        save_file(saved, self.folder / "model.safetensors")
        tokenizer = toy_tokenizer("<|im_end|>" if self.extra else "<|endoftext|>")
        tokenizer.save_pretrained(self.hub / OWNER)
        tokenizer.add_tokens(list(self.extra.values()), special_tokens=True)
        self.tokenizer = tokenizer

    @property
    def extra(self) -> dict[str, str]:
        return self.config.get("vlm_extra_tokens", {})

    # --- the image ----------------------------------------------------------------------------------------------------

    def pictures(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """([pictures, 3, 32, 32] from 0 to 1, the grid of its tiles)."""
        image, size = image.convert("RGB"), self.config["vit_img_size"]
        most = self.config.get("max_img_size")
        if most is None:
            return self._floats(image.resize((size, size), Image.Resampling.BILINEAR))[None], (1, 1)
        long, short = max(image.size), min(image.size)
        long_to = most if self.config.get("resize_to_max_side_len") else min(most, math.ceil(long / size) * size)
        short_to = max(size, math.ceil(short * (long_to / long) / size) * size)
        wide = image.width >= image.height
        scaled = image.resize((long_to, short_to) if wide else (short_to, long_to), Image.Resampling.BICUBIC)
        across, down = scaled.width // size, scaled.height // size
        pixels = self._floats(scaled)
        tiles = [
            pixels[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            for row in range(down) for column in range(across)
        ]  # fmt: skip
        if "global_image_token" in self.extra and len(tiles) > 1:
            # Pillow's own filter on floats stands for torchvision's
            layers = [
                Image.fromarray(layer.numpy(), "F").resize((size, size), Image.Resampling.BILINEAR) for layer in pixels
            ]
            tiles = [torch.from_numpy(np.stack([np.asarray(layer) for layer in layers])), *tiles]
        return torch.stack(tiles), (down, across)

    @staticmethod
    def _floats(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255

    # --- the words ----------------------------------------------------------------------------------------------------

    def image_string(self, grids: list[tuple[int, int]]) -> str:
        some = self.extra["image_token"] * self.config["mp_image_token_length"]
        if self.config.get("max_img_size") is None:
            return some * len(grids)
        words = ""
        for place, (down, across) in enumerate(grids):
            words += f"<image: {place}>" if len(grids) > 1 else ""
            if "global_image_token" in self.extra:
                words += self.extra["global_image_token"] + some
                if down * across == 1:
                    continue
            for row in range(down):
                for column in range(across):
                    words += self.extra[f"r{row + 1}c{column + 1}"] + some
        return words

    def ids(self, turns: list[tuple[str, str]], grids: list[tuple[int, int]], generate: bool = True) -> list[int]:
        """Of a conversation [(role, text), ..]; without those of images that are put in front."""
        if not self.extra:
            (_, question), *rest = turns
            text = f"Question: {question} Answer:" + "".join(f"{said}<|endoftext|>" for _, said in rest)
            return list(self.tokenizer(text).input_ids)
        import jinja2

        (role, first), *rest = turns
        said = [(role, self.image_string(grids) + first), *rest]
        messages = [{"role": role, "content": text} for role, text in said]
        text = jinja2.Environment().from_string(self.config["lm_chat_template"]).render(
            messages=messages, add_generation_prompt=generate
        )  # fmt: skip
        return list(self.tokenizer(text).input_ids)

    # --- the network --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def see(self, pictures: Tensor) -> Tensor:
        """[n, 3, S, S] -> [n, tokens, D]."""
        w, c = self.weights, self.config
        at, heads, eps = "vision_encoder.", c["vit_n_heads"], c["vit_ln_eps"]
        x = F.conv2d(pictures, w[f"{at}patch_embedding.conv.weight"], w[f"{at}patch_embedding.conv.bias"],
                     stride=c["vit_patch_size"]).flatten(2).mT  # fmt: skip
        x = x + w[f"{at}patch_embedding.position_embedding"]
        wide = x.shape[-1]
        for block in range(c["vit_n_blocks"]):
            b = f"{at}blocks.{block}."
            y = F.layer_norm(x, (wide,), w[f"{b}ln1.weight"], w[f"{b}ln1.bias"], eps)
            qkv = (y @ w[f"{b}attn.qkv_proj.weight"].T + w[f"{b}attn.qkv_proj.bias"]).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
            seen = torch.softmax(q @ k.mT / math.sqrt(wide / heads), -1) @ v
            x = x + seen.transpose(1, 2).flatten(2) @ w[f"{b}attn.out_proj.weight"].T + w[f"{b}attn.out_proj.bias"]
            y = F.layer_norm(x, (wide,), w[f"{b}ln2.weight"], w[f"{b}ln2.bias"], eps)
            y = F.gelu(y @ w[f"{b}mlp.fc1.weight"].T + w[f"{b}mlp.fc1.bias"], approximate="tanh")
            x = x + y @ w[f"{b}mlp.fc2.weight"].T + w[f"{b}mlp.fc2.bias"]
        x = F.layer_norm(x, (wide,), w[f"{at}layer_norm.weight"], w[f"{at}layer_norm.bias"], eps)
        cells, factor = math.isqrt(x.shape[1]), c["mp_pixel_shuffle_factor"]
        grid = x.unflatten(1, (cells, cells))
        squares = [
            grid[:, row : row + factor, column : column + factor].flatten(1)
            for row in range(0, cells, factor) for column in range(0, cells, factor)
        ]  # fmt: skip
        return torch.stack(squares, 1) @ w["MP.proj.weight"].T

    @torch.no_grad()
    def speak(self, x: Tensor) -> Tensor:
        """[T, D] -> logits [T, V]."""
        w, c = self.weights, self.config
        heads, groups = c["lm_n_heads"], c["lm_n_heads"] // c["lm_n_kv_heads"]
        head, length = c["lm_hidden_dim"] // heads, len(x)
        angles = torch.arange(length)[:, None] * w["decoder.rotary_embd.inv_freq"]
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        past = torch.ones(length, length).tril() == 0

        def norm(y: Tensor, name: str) -> Tensor:
            return y / torch.sqrt((y * y).mean(-1, keepdim=True) + c["lm_rms_eps"]) * w[name]

        def turned(y: Tensor) -> Tensor:
            left, right = y.chunk(2, -1)
            return y * cos + torch.cat([-right, left], -1) * sin

        for block in range(c["lm_n_blocks"]):
            b = f"decoder.blocks.{block}."
            y = norm(x, f"{b}norm1.weight")
            q, k, v = (
                (y @ w[f"{b}attn.{name}_proj.weight"].T).unflatten(-1, (-1, head)).transpose(0, 1) for name in "qkv"
            )
            q, k = turned(q), turned(k)
            k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
            seen = torch.softmax((q @ k.mT / math.sqrt(head)).masked_fill(past, -math.inf), -1) @ v
            x = x + seen.transpose(0, 1).flatten(1) @ w[f"{b}attn.out_proj.weight"].T
            y = norm(x, f"{b}norm2.weight")
            gate = y @ w[f"{b}mlp.gate_proj.weight"].T
            gated = gate * torch.sigmoid(gate) * (y @ w[f"{b}mlp.up_proj.weight"].T)
            x = x + gated @ w[f"{b}mlp.down_proj.weight"].T
        table = w["decoder.token_embedding.weight"]
        return norm(x, "decoder.norm.weight") @ (table if c["lm_tie_weights"] else w["decoder.head.weight"]).T

    def embedded(self, ids: list[int], pictures: list[Tensor]) -> Tensor:
        """[T, D]: images in front, or over the positions of `<|image|>`."""
        x = self.weights["decoder.token_embedding.weight"][torch.tensor(ids)]
        seen = torch.cat([self.see(some).flatten(0, 1) for some in pictures]) if pictures else x[:0]
        if not self.extra:
            return torch.cat([seen, x])
        where = torch.tensor(ids) == self.tokenizer.convert_tokens_to_ids(self.extra["image_token"])
        x = x.clone()
        x[where] = seen
        return x

    def logits(self, ids: list[int], pictures: list[Tensor]) -> Tensor:
        """[T, V], images in front included."""
        return self.speak(self.embedded(ids, pictures))

    def greedy(self, ids: list[int], pictures: list[Tensor], count: int) -> list[int]:
        """So many new tokens; it goes on behind the end of an answer."""
        x, said = self.embedded(ids, pictures), list[int]()
        for _ in range(count):
            said.append(int(self.speak(x)[-1].argmax()))
            x = torch.cat([x, self.weights["decoder.token_embedding.weight"][said[-1:]]])
        return said
