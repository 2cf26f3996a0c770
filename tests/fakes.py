"""Tiny random stand-ins, saved as local Hugging Face folders so that tests go through the same tables and loaders as
real backbones do. Nothing here has learned anything."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, VisionRecipe
from leveret.model.vlm import VLM
from leveret.records import IGNORE, Batch

SPECIALS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>")
SIDE, TOKENS, WIDTH = 32, 4, 16
"""The tiny tower: 32 pixels, patches of 16, so 2 x 2 tokens, 16 wide."""
HIDDEN, VOCAB = 32, 320
"""The tiny language model."""

_TEXT = (
    "a red square and a blue circle . how many things are there ? two . what colour is the square ? red",
    "is there a green triangle in the image ? yes no left right above below big small A B C D 0 1 2 3 4",
    "Is the word in the picture? The answer is one of: red, green, blue, yellow.",
)


@cache
def _folder() -> Path:
    # kept on the object, so that the folder lives as long as the test process
    _folder.keep = tempfile.TemporaryDirectory(prefix="leveret-fakes-")  # type: ignore[attr-defined]
    return Path(_folder.keep.name)  # type: ignore[attr-defined]


@cache
def world_tokenizer() -> Any:
    """The drawn world's, as it is shipped (test_world_tokens.py: it is the one that `world.tokens` builds)."""
    from leveret.model.language import load_tokenizer

    return load_tokenizer("world/language", as_saved=True)


def tiny_tokenizer() -> Any:
    """A byte-level BPE with the specials of the `tiny` chat format; every string comes back unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|user|>", "<|assistant|>", "<image>"],
    )


SIGLIP = dict(
    hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=16
)
LLAMA = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip


def loud(model: Any, scale: float = 0.25) -> Any:
    """Weights drawn large enough that attention, positions and pictures visibly move the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale)
    return model


@cache
def tiny_vision_folder(seed: int = 0) -> Path:
    """A SigLIP vision tower as a Hugging Face folder."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    folder = _folder() / f"siglip-{seed}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loud(SiglipVisionModel(SiglipVisionConfig(**SIGLIP))).save_pretrained(folder)
    return folder


@cache
def tiny_language_folder(seed: int = 0) -> Path:
    """A two-layer Llama with the tiny tokenizer as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = _folder() / f"llama-{seed}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loud(LlamaForCausalLM(LlamaConfig(**LLAMA))).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_recipe(seed: int = 0, connector: str = "mlp2x_gelu", chat: str = "tiny") -> ModelRecipe:
    """SigLIP (32 px, 4 tokens x 16), an MLP, and Llama (2 layers, width 32)."""
    return ModelRecipe(
        vision=VisionRecipe(tower=str(tiny_vision_folder(seed))),
        connector=ConnectorRecipe(kind=connector),
        language=LanguageRecipe(name=str(tiny_language_folder(seed))),
        chat=chat,
    )


def tiny_vlm(seed: int = 0, connector: str = "mlp2x_gelu", chat: str = "tiny") -> VLM:
    """The model of `tiny_recipe`, in evaluation mode. Its own copy: a test may change it."""
    from leveret.model.build import build

    return build(tiny_recipe(seed, connector, chat), seed=seed)


def tiny_batch(
    vlm: VLM,
    lengths: tuple[int, ...] = (12, 9),
    images: tuple[bool, ...] = (True, True),
    side: str = "right",
    seed: int = 0,
) -> Batch:
    """A random batch for `vlm`: row i has `lengths[i]` real positions, an image from position 1 on where `images[i]`,
    and its last three tokens supervised; shorter rows are padded on `side`."""
    gen = torch.Generator().manual_seed(seed)
    rows, width, tokens = len(lengths), max(lengths), vlm.spec.tokens
    vocab = vlm.language.get_input_embeddings().weight.shape[0]
    ids = torch.zeros(rows, width, dtype=torch.long)
    labels = torch.full((rows, width), IGNORE)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    positions = torch.zeros(rows, width, dtype=torch.long)
    segments = torch.full((rows, width), -1)
    marks = torch.zeros(rows, width, dtype=torch.bool)
    for row, (length, image) in enumerate(zip(lengths, images, strict=True)):
        first = width - length if side == "left" else 0
        place = slice(first, first + length)
        ids[row, place] = torch.randint(len(SPECIALS), vocab, (length,), generator=gen)
        labels[row, first + length - 3 : first + length] = ids[row, first + length - 3 : first + length]
        mask[row, place] = True
        positions[row, place] = torch.arange(length)
        segments[row, place] = 0
        if image:
            marks[row, first + 1 : first + 1 + tokens] = True
    count = sum(images)
    pixels = {
        view.name: torch.randn(count, 3, view.size, view.size, generator=gen) for view in vlm.spec.towers if count
    }
    return Batch(
        input_ids=ids, labels=labels, attention_mask=mask, position_ids=positions, segments=segments, image_mask=marks,
        pixels=pixels, tile_image=torch.arange(count), ids=tuple(f"row{i}" for i in range(rows)),
    )  # fmt: skip


def take(batch: Batch, row: int, length: int, side: str = "right") -> Batch:
    """One row of a batch, without its padding. Images must be one a row."""
    width = batch.input_ids.shape[1]
    place = slice(width - length, width) if side == "left" else slice(0, length)
    cut = {name: getattr(batch, name)[row : row + 1, place] for name in (
        "input_ids", "labels", "attention_mask", "position_ids", "segments", "image_mask")}  # fmt: skip
    pixels = {name: value[row : row + 1] for name, value in batch.pixels.items()}
    return replace(batch, **cut, pixels=pixels, tile_image=batch.tile_image[:1], ids=batch.ids[row : row + 1])


def packed(batch: Batch, lengths: tuple[int, ...], padding: int = 0) -> Batch:
    """The rows of a right-padded batch, one behind the other in a single row, and some padding behind them."""

    def line(value: torch.Tensor, fill: int) -> torch.Tensor:
        pieces = [value[row, :length] for row, length in enumerate(lengths)]
        return torch.cat([*pieces, torch.full((padding,), fill).to(value.dtype)]).unsqueeze(0)

    segments = [torch.full((length,), row) for row, length in enumerate(lengths)]
    return replace(
        batch,
        input_ids=line(batch.input_ids, 0),
        labels=line(batch.labels, IGNORE),
        attention_mask=line(batch.attention_mask, 0),
        position_ids=line(batch.position_ids, 1),
        image_mask=line(batch.image_mask, 0),
        segments=torch.cat([*segments, torch.full((padding,), -1)]).unsqueeze(0),
    )


def save_dual_encoder(folder: Path, kind: str) -> None:
    """A tiny CLIP or SigLIP with random weights, as transformers saves it."""
    import torch
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    if kind == "clip":
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 1
        text["eos_token_id"] = end
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    else:
        text["projection_size"] = 16
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
