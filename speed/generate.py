"""How much the engine saves: batches and shared image prefixes against one question at a time.

    python speed/generate.py [--questions 400] [--images 75] [--slots 64] [--threads N] [--precision auto]

The model has the drawn world's size (64-pixel tower with 64 tokens; Llama of width 128, 4 layers) and random weights;
answers are cut at 1 to 10 tokens. The ways run in turn in one process, A, B, A, B, so that a busy machine is fair to
both. Prints seconds and ratios, and checks that in float32 all ways give the same answers.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

WORDS = "is are there a the red blue green square circle in image how many what colour of left right above big".split()


def world_sized(vocabulary: int = 760) -> Any:
    """A random model of the drawn world's size, with a byte-level tokenizer trained on the questions' words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from leveret.model.connectors import build_connector
    from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, VisionRecipe
    from leveret.model.tiny import TinyVisionTower
    from leveret.model.vlm import VLM
    from leveret.records import ImageSpec

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
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=specials[0], eos_token=specials[1], extra_special_tokens=specials[2:]
    )
    torch.manual_seed(0)
    tower = TinyVisionTower({"size": 64, "width": 128, "layers": 2, "heads": 4})
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    recipe = ModelRecipe(
        vision=VisionRecipe(tower="world/vision"),
        connector=ConnectorRecipe(kind="residual_2d"),
        language=LanguageRecipe(name="world/language"),
        chat="tiny",
    )
    return VLM(
        {tower.view.name: tower},
        build_connector("residual_2d", tower.width, 128, tower.tokens),
        LlamaForCausalLM(config),
        spec=ImageSpec((tower.view,), tower.tokens),
        recipe=recipe,
        tokenizer=fast,
    ).eval()


def examination(folder: Path, questions: int, images: int) -> list[Any]:
    """`questions` about `images` JPEG files of 64 pixels, 8 to 30 words each, in random order."""
    from PIL import Image

    from leveret.generate import Request
    from leveret.records import ImageRef, Turn

    rng, noise = random.Random(0), np.random.default_rng(0)
    refs = []
    for number in range(images):
        held = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(held, "JPEG", quality=90)
        (path := folder / f"{number}.jpg").write_bytes(held.getvalue())
        refs.append(ImageRef(str(path)))
    requests = []
    for number in range(questions):
        text = " ".join(rng.choices(WORDS, k=rng.randint(8, 30)))
        turns = (Turn("user", f"<image>\n{text}?"),)
        requests.append(Request(str(number), (refs[number % images],), turns, max_new_tokens=rng.randint(1, 10)))
    rng.shuffle(requests)
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--images", type=int, default=75)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--no-singles", action="store_true", help="leave out the slow way; for large examinations")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    from leveret.generate import Engine

    vlm = world_sized()
    with tempfile.TemporaryDirectory() as folder:
        requests = examination(Path(folder), options.questions, options.images)

        def together(precision: str) -> list[str]:
            return [p.text for p in Engine(vlm, slots=options.slots, precision=precision).answer(requests)]  # type: ignore[arg-type]

        def singly(precision: str) -> list[str]:
            engine = Engine(vlm, slots=1, precision=precision, cache_bytes=0)  # type: ignore[arg-type]
            return [engine.answer([request])[0].text for request in requests]

        ways = {"engine": together} if options.no_singles else {"engine": together, "one by one": singly}
        if not options.no_singles and together("fp32") != singly("fp32"):
            sys.exit("the ways disagree in float32")
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, run in ways.items():
                began = time.perf_counter()
                run(options.precision)
                seconds[way].append(time.perf_counter() - began)
    for way, taken in seconds.items():
        shown = ", ".join(f"{one:.2f}" for one in taken)
        print(f"{way:>10}: {shown} s; {options.questions / median(taken):,.0f} questions/s")
    if "one by one" in seconds:
        ratio = median(seconds["one by one"]) / median(seconds["engine"])
        print(f"batches and shared prefixes: {ratio:.1f} times as fast; the same answers in float32")


if __name__ == "__main__":
    main()
