"""Samples a second in training, beside the Hugging Face Trainer with LlavaForConditionalGeneration and padded batches.

One process, one arm after the other, over again (A, B, C, A, B, C); medians over the rounds. Every arm trains one
composition from random weights on one data set: a tower of 6 x 192 (196 tokens), a connector, a Llama of 6 x 256,
16,384 words, texts of 40 to 180 tokens, about 18 % of all positions supervised; same type, threads and frozen parts.
The Trainer is given its images as tensors in memory; leveret decodes its own from files, unless it keeps features.
Each further arm is leveret with one of its tricks switched off. The first steps of a run are not counted.

    python speed/train_vs_trainer.py [--stage tune align] [--rounds 5] [--precision bf16] [--arms leveret trainer ...]
    python speed/train_vs_trainer.py --memory
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

TOWER = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3}
LANGUAGE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
WORDS, SIZE, PATCH, BATCH, WARM = 16_384, 224, 16, 16, 3
LEARNS = {"tune": ("connector", "language"), "align": ("connector",)}
RATE, CHAT = 1e-3, "vicuna_v1"
TEMPLATE = 29
"""Tokens that the chat format adds to what is said."""


def write_parts(folder: Path, samples: int) -> None:
    """A tower, a language model with a tokenizer of plain words, and conversations about pictures."""
    import numpy as np
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**TOWER, image_size=SIZE, patch_size=PATCH)).save_pretrained(folder / "tower")
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "USER:", "ASSISTANT:"]
    words += [f"w{number}" for number in range(WORDS - len(words))]
    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder / "language")
    LlamaForCausalLM(LlamaConfig(**LANGUAGE, vocab_size=WORDS)).save_pretrained(folder / "language")
    rng, noise, records = random.Random(0), np.random.default_rng(0), []
    for number in range(samples):
        picture = noise.integers(0, 255, (14, 14, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        length = rng.randint(40, 180)
        answer = max(4, round(length * 0.5))
        many = (max(1, length - answer - TEMPLATE), answer)
        said = [" ".join(f"w{rng.randint(0, 9999)}" for _ in range(words)) for words in many]
        turns = [{"from": "human", "value": "<image>\n" + said[0]}, {"from": "gpt", "value": said[1]}]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records), "utf-8")


def ours(folder: Path, stage: str, steps: int, precision: str, **changes: Any) -> float:
    """Samples a second of `leveret.train`."""
    from leveret.train import train
    from leveret.train.stages import TrainRecipe

    recipe = TrainRecipe.model_validate({
        "name": "speed", "ranks": changes.pop("_ranks", 1), "device": "cpu",
        "model": {
            "vision": {"tower": str(folder / "tower"), "layer": -1}, "connector": {"kind": "mlp2x_gelu"},
            "language": {"name": str(folder / "language")}, "chat": CHAT,
        },
        "stages": {stage: {
            "data": str(folder / "data.json"), "learn": {part: {"lr": RATE} for part in LEARNS[stage]}, "steps": steps,
            "batch": BATCH, "precision": precision, "save_every": 10_000, **changes,
        }},
    })  # fmt: skip
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    train(recipe, out)
    rows = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text("utf-8").splitlines()][WARM:]
    return sum(row["samples"] for row in rows) / sum(row["seconds"] for row in rows)


def theirs(folder: Path, stage: str, steps: int, precision: str) -> float:
    """Samples a second of the Hugging Face Trainer."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=SIZE, patch_size=PATCH),
        text_config=LlamaConfig(**LANGUAGE, vocab_size=WORDS), image_token_index=4, vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    for name, value in model.named_parameters():
        part = "vision" if "vision_tower" in name else "connector" if "projector" in name else "language"
        value.requires_grad_(part in LEARNS[stage])

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=RATE,
        lr_scheduler_type="cosine", bf16=precision == "bf16", use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", remove_unused_columns=False, disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=in_memory(folder), data_collator=padded, callbacks=[clock])
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    return BATCH * (len(clock.ends) - WARM) / (clock.ends[-1] - clock.ends[WARM - 1])


_MEMORY: list[dict[str, Any]] = []


def in_memory(folder: Path) -> Any:
    """The same samples for the Trainer, id for id, their pixels ready."""
    from transformers import AutoTokenizer

    from leveret.images import load
    from leveret.inputs import encode, prepare
    from leveret.pool import open_source
    from leveret.records import ImageSpec, TowerView

    if not _MEMORY:
        tokenizer = AutoTokenizer.from_pretrained(folder / "language")
        view = TowerView("tower", SIZE)
        spec = ImageSpec((view,), (SIZE // PATCH) ** 2)
        source = open_source(folder / "data.json")
        for number in range(len(source)):
            sample = source.sample(number)
            encoded = encode(sample.turns, CHAT, tokenizer, spec, [(SIZE, SIZE)])
            ids = [4 if image else token for token, image in zip(encoded.input_ids, encoded.image_mask, strict=True)]
            pixels = torch.from_numpy(prepare(load(sample.images[0]), view))
            _MEMORY.append({"ids": ids, "labels": encoded.labels, "pixels": pixels})
        texts = [len(row["ids"]) - spec.tokens for row in _MEMORY]
        learned = sum(label != -100 for row in _MEMORY for label in row["labels"])
        print(
            f"texts of {min(texts)} to {max(texts)} tokens; {learned / sum(len(row['ids']) for row in _MEMORY):.0%} of "
            "all positions are learned from", file=sys.stderr,
        )  # fmt: skip
    return _MEMORY


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch padded to its longest row, as every collator of the field does it."""
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(row["ids"]) for row in rows], True, 3)
    labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], True, -100)
    pixels = torch.stack([row["pixels"] for row in rows])
    return {"input_ids": ids, "labels": labels, "attention_mask": ids != 3, "pixel_values": pixels}


@contextlib.contextmanager
def without(path: str, name: str, instead: Any) -> Iterator[None]:
    """A module's function replaced."""
    import importlib

    module = importlib.import_module(path)
    kept = getattr(module, name)
    setattr(module, name, instead)
    try:
        yield
    finally:
        setattr(module, name, kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", default=["tune", "align"], choices=list(LEARNS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--memory", action="store_true", help="peak memory of either, in a process of its own")
    given = parser.parse_args()
    if given.memory:
        for stage, arm in ((stage, arm) for stage in given.stage for arm in ("trainer", "leveret")):
            alone = ["--stage", stage, "--arms", arm, "--rounds", "1", "--precision", given.precision]
            out = subprocess.run([sys.executable, __file__, *alone], capture_output=True, text=True, check=True).stdout
            print(f"{stage}, {arm}: {out.strip().splitlines()[-1].strip()}")
        return
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder, given.samples)
        for stage in given.stage:
            compare(folder, stage, given)


@contextlib.contextmanager
def every_row(language: Any, rows: Any) -> Iterator[None]:
    """Instead of only_rows: the output layer on every position, the supervised ones picked from its logits."""

    def pick(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        return out.flatten(0, 1)[rows.flatten()][None]

    if rows is None:
        yield
        return
    hook = language.get_output_embeddings().register_forward_hook(pick)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def own_attention(language: Any, packed: bool = False) -> Iterator[bool]:
    yield False


def compare(folder: Path, stage: str, given: Any) -> None:
    """Every arm in turn, over again; the table."""
    steps, precision = given.steps + WARM, given.precision

    def run(**changes: Any) -> float:
        return ours(folder, stage, steps, precision, **changes)

    def off(path: str, name: str, instead: Any) -> Callable[[], float]:
        def arm() -> float:
            with without(path, name, instead):
                return run()

        return arm

    arms: dict[str, Callable[[], float]] = {
        "trainer": lambda: theirs(folder, stage, steps, precision),
        "leveret": run,
        "leveret, two ranks of one thread": lambda: run(_ranks=2),
        "- kept features": lambda: run(cache_features=False),
        "- output only where supervised": off("leveret.model.vlm", "only_rows", every_row),
        "- last layer only there": off("leveret.model.rows", "last_of", lambda language: []),
        "- rows of like length": lambda: run(order="random"),
        "- AdamW in one kernel": lambda: run(fused=False),
        "- attention in blocks": off("leveret.train.loop", "trained_in_blocks", own_attention),
    }
    chosen = {name: arm for name, arm in arms.items() if not given.arms or name.strip("- ") in given.arms}
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(given.rounds):
        for name, arm in chosen.items():
            rates[name].append(arm())
            print(f"{stage} round {turn + 1}: {name} {rates[name][-1]:.1f} samples/s", file=sys.stderr, flush=True)
    base = statistics.median(rates.get("trainer", [float("nan")]))
    print(f"\n{stage}, {precision}, {given.threads} threads, batches of {BATCH}, {given.rounds} rounds")
    for name, found in rates.items():
        middle = statistics.median(found)
        print(f"  {name:32} {middle:6.1f} samples/s  {middle / base:5.2f} x the Trainer  "
              f"({min(found):.1f} to {max(found):.1f})")  # fmt: skip
    print(f"  peak memory of the process so far: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
