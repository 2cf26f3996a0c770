"""Pre-training of the tiny language models: they learn to answer questions about scenes that are told to them.

Most scenes are told as compound rows (`world/reading.py`): positions that are each the sum of the embeddings of what
is there. That is the skill a connector needs (a visual token is one position that holds several attributes), and
binding emerges with it where it does not from words alone. A plain model reads the same facts as running text, and
never a question.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leveret.world.pretrain import Log, begin_from, halves, pretrain
from leveret.world.questions import EXAM, KINDS, READER, Register
from leveret.world.reading import HINTED, LISTED, REST, SLOTS, WEIGHTS, Writer, in_words, named_places, phase_at
from leveret.world.scenes import GRID, sample_scene, stream

EXAMINE_EVERY = 500


class ToldScene(nn.Module):
    """Compound embeddings. Colour, shape and letter are the language model's own word embeddings; the coordinates
    have tables of their own, one a side, that start smooth in the coordinate (near numbers start near)."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        t = torch.arange(GRID + 1)[:, None] / GRID
        waves = torch.cat([t * 2 - 1, *(f(math.pi * k * t) for k in (1, 2, 4, 8) for f in (torch.sin, torch.cos))], 1)
        smooth = torch.stack(
            [waves @ torch.randn(waves.shape[1], width) / math.sqrt(waves.shape[1] / 2) for _ in range(4)]
        )
        self.sides = nn.Parameter(smooth * scale)
        self.empty = nn.Parameter(torch.randn(width) * scale)

    def forward(self, words: Tensor, table: Tensor, numbers: Tensor) -> Tensor:
        """words [B, S, 2] vocabulary ids or -1, table [V, C], numbers [B, S, 4] or -1, to [B, S, C]."""
        named = (table[words.clamp_min(0)] * (words >= 0).unsqueeze(-1)).sum(2)
        out = (named + self.coordinates(numbers.clamp_min(0))) / 2
        return torch.where(numbers[:, :, :1] >= 0, out, self.empty.to(out.dtype))

    def coordinates(self, numbers: Tensor) -> Tensor:
        """[..., 4] to [..., C]: the sum of the four sides' embeddings."""
        return sum(self.sides[side][numbers[..., side]] for side in range(4))  # type: ignore[return-value]


def build_language(vocabulary: int, eos: int, pad: int, *, width: int = 128, layers: int = 4) -> Any:
    """The tiny Llama: heads of 32, an MLP two and a half times as wide, tied embeddings, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        attention_bias=False,
    )
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def _logits(model: Any, scenes: ToldScene, batch: dict[str, Tensor], noise: float = 0.0, seed: int = 0) -> Tensor:
    table = model.get_input_embeddings().weight
    embeds = table[batch["ids"]]
    if len(batch["hint_at"]):
        rows, at = batch["hint_at"].T
        embeds = embeds.index_put((rows, at), scenes.coordinates(batch["hint_numbers"]) / 2, accumulate=True)
    told_as = scenes(batch["words"], table, batch["numbers"]).to(embeds.dtype)
    if noise:
        size = told_as.detach().square().mean(-1, keepdim=True).sqrt()
        told_as = told_as + noise * size * torch.randn(told_as.shape, generator=torch.Generator().manual_seed(seed))
    end = 1 + batch["words"].shape[1]
    compound = batch["compound"][:, None, None]
    embeds = torch.cat([embeds[:, :1], torch.where(compound, told_as, embeds[:, 1:end]), embeds[:, end:]], 1)
    return model(inputs_embeds=embeds, use_cache=False).logits


UNREAD = (("count", EXAM), ("relation", EXAM), ("choice", EXAM), ("colour", EXAM), ("word", EXAM))
"""What pre-training never asks, or never in these words; examined to know that it cannot do it."""
ASKED = ("existence", "shape", "box")
"""What READER asks in the examination's own words; a plain model never was asked it, in any."""


def examine(
    model: Any, scenes: ToldScene, writer: Writer, n: int, seed: int, *, told_in_words: bool = False
) -> dict[str, float]:
    """Share of answers whose every token is the most likely one, by kind, on fresh told scenes; `unread` marks kinds
    in the examination's wording where that is new to the model, `hinted` coordinates given with the names. A plain
    model is to end statements in the same way; `asked` marks what it is asked in a conversation for the first time."""
    right: dict[str, float] = {}
    model.eval()
    asks = Writer(writer.tokenizer) if writer.plain else writer
    asked: list[tuple[str, str, Register, Writer]] = [(kind, kind, LISTED, writer) for kind in (*WEIGHTS, "tell")]
    asked += [(f"{kind}, hinted", kind, READER, writer) for kind in HINTED]
    asked += [(f"{kind}, asked", kind, READER, asks) for kind in ASKED if writer.plain]
    asked += [(f"{kind}, unread", kind, register, asks) for kind, register in UNREAD]
    for name, kind, register, by in asked:
        rows: list[dict[str, Any]] = []
        index = 0
        while len(rows) < n:
            rng = stream(seed, f"examine-{name}", index)
            index += 1
            scene = sample_scene(rng, word=1.0 if kind in ("word", "names", "tell") else 0.4)
            question = KINDS[kind](scene, rng, by.words(register))
            if question:
                hints = {0: named_places(scene, question)} if name.endswith("hinted") else None
                opening = in_words(scene) if told_in_words else None
                rows.append(by.row(scene, opening, by.said([question]), hints, SLOTS[index % 2]))
        ok: list[bool] = []
        for slots in SLOTS:
            same = [row for row in rows if len(row["words"]) == slots]
            batch = by.batch(same)
            with torch.no_grad(), halves():
                guess = _logits(model, scenes, batch)[:, :-1].argmax(-1)
            scored = batch["weights"][:, 1:] >= REST
            ok += ((guess == batch["ids"][:, 1:]) | ~scored).all(1).tolist()
        right[name] = sum(ok) / len(ok)
    model.train()
    return right


def train_language(
    out: Path,
    folder: Path,
    tokenizer: Any,
    *,
    seed: int,
    steps: int,
    log: Log,
    place: str = "language",
    width: int = 128,
    layers: int = 4,
    plain: bool = False,
    after: Path | None = None,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Trains a language model; writes the Hugging Face folder `out/place`, tokenizer included.

    folder  keeps the state.
    plain   reads running text, never a conversation.
    after   the `folder` of another one: goes on from its last state, as one longer reading.

    Returns the shares of right answers on fresh scenes, told as compounds and in words. With `stop_after` it leaves
    after that step, writes no model and returns {}.
    """
    torch.manual_seed(seed)
    vocabulary = 8 * math.ceil(len(tokenizer) / 8)
    model = build_language(vocabulary, tokenizer.eos_token_id, tokenizer.pad_token_id, width=width, layers=layers)
    scenes = ToldScene(model.config.hidden_size, 0.05)
    writer = Writer(tokenizer, plain=plain)
    parts = {"model": model, "scenes": scenes}
    read = 0 if after is None else begin_from(after, parts)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        at, end = read + step, read + steps
        item = writer.training_batch(stream(seed, "language", at), at, end)
        with halves():
            logits = _logits(model, scenes, item, phase_at(at, end).noise, 1_000_003 * seed + at)
        weights = item["weights"][:, 1:].flatten()
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), item["ids"][:, 1:].flatten(), reduction="none")
        figures = {}
        if (step + 1) % EXAMINE_EVERY == 0:
            figures = examine(model, scenes, writer, 100, seed + 1)
        return (losses * weights).sum() / weights.sum(), figures

    warmup = min(270, steps // 10)
    pretrain(
        parts, loss_of, steps=steps, rate=1.5e-3, clip=1.0, warmup=warmup, folder=folder, log=log, stop_after=stop_after
    )
    if stop_after is not None and stop_after < steps:
        return {}
    scores = examine(model, scenes, writer, 500, seed + 2)
    words = examine(model, scenes, writer, 300, seed + 2, told_in_words=True)
    model.to(torch.bfloat16).save_pretrained(out / place)
    tokenizer.save_pretrained(out / place)
    return {"told as compounds": scores, "told in words": words}
