"""How much the engine saves: batches and shared image prefixes.

    python speed/generate.py field [--images 4] [--rounds 2] [--batches 4 8 16] [--tokens 4] [--choice]
    python speed/generate.py world [--questions 400] [--images 75] [--slots 64] [--precision auto]

field   beside a plain loop over transformers' own `generate` with the same model, at batch 1 and larger ones: a tower
        of 6 x 192 at 378 pixels (729 tokens), Llama of 6 x 256, 16,384 words, float32, 18 questions an image (about
        POPE's share), answers of `--tokens` tokens. The loop reads, resizes and tokenises what it asks, as the engine
        does. Answers must be the same; one may differ only where the loop's two likeliest tokens are closer than 1e-4,
        and those are counted. `--choice` asks for one of two words instead, by probabilities in one pass, and
        compares with generating: as an engine does by itself, and as `evaluate` asks (one thread, each alone).
world   against one question at a time: the drawn world's size (64-pixel tower with 64 tokens; Llama of width 128, 4
        layers), answers cut at 1 to 10 tokens.

Weights are random. The ways run in turn in one process, A, B, A, B, so that a busy machine is fair to all. Prints
seconds, questions a second and ratios.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

WORDS = "is are there a the red blue green square circle in image how many what colour of left right above big".split()
MARGIN = 1e-4
"""Logits this close may change places by the order of a sum."""
PER_IMAGE = 18


def words_tokenizer(vocabulary: int) -> Any:
    """A byte-level tokenizer trained on the questions' words, and words that nobody says up to `vocabulary`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [" ".join(WORDS)],
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.add_tokens([AddedToken(f"[{n}]") for n in range(vocabulary - tokenizer.get_vocab_size())])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=specials[0], eos_token=specials[1], extra_special_tokens=specials[2:]
    )


def composed(tower: Any, connector: str, vocabulary: int, **language: Any) -> Any:
    """A random model of a tower and a Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from leveret.model.connectors import build_connector
    from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, VisionRecipe
    from leveret.model.vlm import VLM
    from leveret.records import ImageSpec

    config = LlamaConfig(
        vocab_size=vocabulary, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0, **language,
    )  # fmt: skip
    recipe = ModelRecipe(
        vision=VisionRecipe(tower="world/vision"),
        connector=ConnectorRecipe(kind=connector),
        language=LanguageRecipe(name="world/language"),
        chat="tiny",
    )
    return VLM(
        {tower.view.name: tower},
        build_connector(connector, tower.width, config.hidden_size, tower.tokens),
        LlamaForCausalLM(config),
        spec=ImageSpec((tower.view,), tower.tokens),
        recipe=recipe,
        tokenizer=words_tokenizer(vocabulary),
    ).eval()


def world_sized(vocabulary: int = 760) -> Any:
    """A model of the drawn world's size."""
    from leveret.model.tiny import TinyVisionTower

    torch.manual_seed(0)
    tower = TinyVisionTower({"size": 64, "width": 128, "layers": 2, "heads": 4})
    return composed(
        tower, "residual_2d", vocabulary, hidden_size=128, intermediate_size=320, num_hidden_layers=4,
        initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip


class Siglip(torch.nn.Module):
    """A random SigLIP of 6 x 192 that gives 729 tokens of 378 pixels."""

    def __init__(self) -> None:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        from leveret.records import TowerView

        super().__init__()
        self.view, self.width, self.tokens = TowerView("vision", 378), 192, 729
        self.model = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, image_size=378,
                patch_size=14, vision_use_head=False,
            )
        )  # fmt: skip

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels).last_hidden_state


def field_sized() -> Any:
    """A model of the smallest published size of eyes: 729 tokens an image."""
    torch.manual_seed(0)
    return composed(
        Siglip(), "mlp2x_gelu", 16_384, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
        initializer_range=0.08, attn_implementation="sdpa",
    )  # fmt: skip


def examination(
    folder: Path, questions: int, images: int, *, side: int = 64, words: tuple[int, int] = (8, 30), tokens: int = 0
) -> list[Any]:
    """`questions` about `images` JPEG files of noise, in random order; answers of `tokens` tokens, or of 1 to 10."""
    from PIL import Image

    from leveret.generate import Request
    from leveret.records import ImageRef, Turn

    rng, noise = random.Random(0), np.random.default_rng(0)
    refs = []
    for number in range(images):
        held = io.BytesIO()
        grain = noise.integers(0, 256, (16, 16, 3) if tokens else (side, side, 3), dtype=np.uint8)
        Image.fromarray(grain).resize((side, side)).save(held, "JPEG", quality=90)
        (path := folder / f"{number}.jpg").write_bytes(held.getvalue())
        refs.append(ImageRef(str(path)))
    requests = []
    for number in range(questions):
        text = " ".join(rng.choices(WORDS, k=rng.randint(*words)))
        turns = (Turn("user", f"<image>\n{text}?"),)
        limit = tokens or rng.randint(1, 10)
        requests.append(Request(str(number), (refs[number % images],), turns, max_new_tokens=limit))
    rng.shuffle(requests)
    return requests


# --- transformers' own loop ------------------------------------------------------------------------------------------


def laid(vlm: Any, requests: list[Any]) -> Any:
    """A batch of questions, read from their files, padded on the left."""
    from leveret.images import load
    from leveret.inputs import Item, collate, encode, prepare

    items = []
    for request in requests:
        image = load(request.images[0])
        encoded = encode(request.turns, vlm.chat, vlm.tokenizer, vlm.spec, [(image.height, image.width)], generate=True)
        items.append(Item(encoded, pixels=[{view.name: prepare(image, view) for view in vlm.spec.towers}]))
    return collate(items, vlm.tokenizer.pad_token_id, side="left")


def loop(vlm: Any, requests: list[Any], size: int) -> list[list[int]]:
    """The tokens of every answer, `size` questions at a time by `generate`."""
    answers = []
    for first in range(0, len(requests), size):
        some = requests[first : first + size]
        made = vlm.generate(laid(vlm, some), max_new_tokens=some[0].max_new_tokens, do_sample=False, pad_token_id=0)
        for row in made.tolist():
            answers.append(row[: row.index(1)] if 1 in row else row)
    return answers


def differing(vlm: Any, requests: list[Any], ours: list[str], theirs: list[list[int]]) -> int:
    """How many answers differ by a token on a knife's edge; ends the program where one differs otherwise."""
    from leveret.inputs.text import decode

    count = 0
    for request, mine, tokens in zip(requests, ours, theirs, strict=True):
        if mine == decode(vlm.tokenizer, tokens).strip():
            continue
        made = vlm.language.generate(
            inputs_embeds=vlm.embed(laid(vlm, [request])).detach(), max_new_tokens=request.max_new_tokens,
            do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        edges = [float(two[0] - two[1]) for step in made.logits for two in [step[0].float().topk(2).values]]
        if min(edges) >= MARGIN:
            sys.exit(f"question {request.question_id}: {mine!r}, and generate gives {decode(vlm.tokenizer, tokens)!r}")
        count += 1
    return count


def in_turn(ways: dict[str, tuple[Callable[[list[Any]], Any], list[Any]]], rounds: int) -> dict[str, float]:
    """Questions a second of every way: the median of `rounds`, one way after the other in each."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (run, asked) in ways.items():
            began = time.perf_counter()
            run(asked)
            seconds[way].append(time.perf_counter() - began)
    rates = {way: len(asked) / median(seconds[way]) for way, (_, asked) in ways.items()}
    for way, taken in seconds.items():
        shown = ", ".join(f"{one:.2f}" for one in taken)
        print(f"{way:>20}: {len(ways[way][1])} in {shown} s; {rates[way]:,.1f} questions/s", flush=True)
    return rates


def beside() -> str:
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def field(options: argparse.Namespace, folder: Path) -> None:
    from dataclasses import replace

    from leveret.generate import Engine

    vlm, questions = field_sized(), PER_IMAGE * options.images
    requests = examination(folder, questions, options.images, side=384, words=(5, 12), tokens=options.tokens)
    requests.sort(key=lambda request: request.images[0].path)
    few = requests[: options.few or questions]

    def engine(asked: list[Any]) -> list[Any]:
        return Engine(vlm, slots=options.slots, precision="fp32").answer(asked)

    if options.choice:
        pair = [replace(request, choices=("red", "blue")) for request in requests]

        def alone(asked: list[Any]) -> list[Any]:
            return Engine(vlm, slots=options.slots, precision="fp32", threads=1).answer(asked)

        words = f"{options.tokens} tokens"
        ways = {"choice": (engine, pair), words: (engine, requests)}
        ways |= {"choice, alone": (alone, pair), f"{words}, one thread": (alone, requests)}
        rates = in_turn(ways, options.rounds)
        print(
            f"one pass: {rates['choice'] / rates[words]:.2f} times as fast as answers of {words}; as evaluate asks "
            f"{rates['choice, alone'] / rates[f'{words}, one thread']:.2f} times; {beside()}"
        )
        one, other = engine(pair), alone(pair)
        same = [a.text == b.text or abs(a.choices["red"] - 0.5) < MARGIN for a, b in zip(one, other, strict=True)]
        print(f"the same choice in {sum(same)} of {len(same)}")
        return
    ours = {prediction.question_id: prediction.text for prediction in engine(requests)}
    mine = [ours[request.question_id] for request in few]
    edges = differing(vlm, few, mine, loop(vlm, few, 1))
    print(
        f"{len(set(mine))} different answers to {len(few)} questions; {edges} of them not the loop's, each with a "
        f"token whose lead is under {MARGIN}",
        flush=True,
    )
    # The loop's time a question does not depend on how many there are, so a part of them tells it.
    loops = {
        f"generate, batch {size}": (lambda asked, size=size: loop(vlm, asked, size), few)
        for size in (1, *options.batches)
    }
    rates = in_turn({"engine": (engine, requests), **loops}, options.rounds)
    single, best = rates["generate, batch 1"], max(rate for way, rate in rates.items() if way != "engine")
    print(
        f"{rates['engine'] / single:.1f} times the loop at batch 1, {rates['engine'] / best:.1f} times the loop at its "
        f"best batch; {beside()}"
    )


def world(options: argparse.Namespace, folder: Path) -> None:
    from leveret.generate import Engine

    vlm = world_sized()
    requests = examination(folder, options.questions, options.images)

    def together(asked: list[Any], precision: str = options.precision) -> list[str]:
        return [p.text for p in Engine(vlm, slots=options.slots, precision=precision).answer(asked)]  # type: ignore[arg-type]

    def singly(asked: list[Any], precision: str = options.precision) -> list[str]:
        engine = Engine(vlm, slots=1, precision=precision, cache_bytes=0)  # type: ignore[arg-type]
        return [engine.answer([request])[0].text for request in asked]

    ways = {"engine": (together, requests)}
    if not options.no_singles:
        ways["one by one"] = (singly, requests)
        if together(requests, "fp32") != singly(requests, "fp32"):
            sys.exit("the ways disagree in float32")
    rates = in_turn(ways, options.rounds)
    if "one by one" in rates:
        ratio = rates["engine"] / rates["one by one"]
        print(f"batches and shared prefixes: {ratio:.1f} times as fast; the same answers in float32; {beside()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_subparsers(dest="size", required=True)
    for name, images in (("field", 16), ("world", 75)):
        arm = sizes.add_parser(name)
        arm.add_argument("--images", type=int, default=images)
        arm.add_argument("--slots", type=int, default=64)
        arm.add_argument("--rounds", type=int, default=2)
        arm.add_argument("--threads", type=int, default=torch.get_num_threads())
    field_arm, world_arm = sizes.choices["field"], sizes.choices["world"]
    field_arm.add_argument("--tokens", type=int, default=4, help="of every answer")
    field_arm.add_argument("--few", type=int, default=18, help="questions that the loop is asked; 0 for all")
    field_arm.add_argument("--batches", type=int, nargs="*", default=[6, 18])
    field_arm.add_argument("--choice", action="store_true")
    world_arm.add_argument("--questions", type=int, default=400)
    world_arm.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    world_arm.add_argument("--no-singles", action="store_true", help="leave out the slow way; for large examinations")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        {"field": field, "world": world}[options.size](options, Path(folder))


if __name__ == "__main__":
    main()
