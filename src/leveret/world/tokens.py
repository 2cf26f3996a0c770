"""The tokenizer of the tiny language model: BPE with byte fallback, so that every string of a user round-trips.

Trained on what the drawn world says and some plain English. Capital letters that are not the start of a word stay
alone (drawn words are read letter by letter), and a coordinate with the sign before it is one piece (` [0.25`,
`, 0.53`), which makes a box five tokens.
"""

from __future__ import annotations

import json
import string
from dataclasses import replace
from typing import Any

PAD, END, USER, ASSISTANT, IMAGE = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>"
SPECIALS = (PAD, END, USER, ASSISTANT, IMAGE)
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
VOCABULARY = 832

PIECES = r"(?: ?\[|, )[01]\.[0-9][0-9]| ?[A-Z](?![a-z])| ?[A-Za-z][a-z]*| ?[0-9]| ?[^\sA-Za-z0-9]|\s"

PLAIN_ENGLISH = """
The quick brown fox jumps over the lazy dog. I do not know. I see none of these in the image. Hello, how are you?
This is a photo of a person with a dog and a cat near a house, a tree, a car and the sea. Can you help me with that?
Yes, I can. Please answer the question using a single word or phrase. It was the best of times. Thank you very much.
What is this? Who are they? When did it happen? Where are we? Why not? Which one do you like more, the big or the small?
There are many things that one may ask about a picture: what it shows, how many there are, where they stand, and so on.
The white and black and grey and brown ones are here. Nothing else. None. one two three four five six seven eight nine \
ten
"""


def corpus() -> list[str]:
    """The training text: every closed-class word of the world many times, then plain English once."""
    from leveret.world.questions import EXAM, KINDS, READ, READER, TUNE_WEIGHTS, text_only
    from leveret.world.scenes import GRID, sample_scene, stream

    lines: list[str] = []
    # The wrong options and the sentences are the reader's in both, so that the vocabulary stays when the exam's change.
    exam = replace(EXAM, decoys=READER.decoys, fact=READER.fact)
    for index in range(3000):
        rng = stream(0, "tokenizer", index)
        scene = sample_scene(rng)
        for register in (READER, exam):
            for kind in READ if register is READER else TUNE_WEIGHTS:
                question = KINDS[kind](scene, rng, register)
                if question:
                    lines += [question.text, " " + question.answer]
            question = text_only(rng, register)
            lines += [question.text, " " + question.answer]
    for value in range(GRID + 1):
        lines += [f" [{value / GRID:.2f}, {value / GRID:.2f}]"] * 400
    lines += PLAIN_ENGLISH.strip().splitlines() * 4
    return lines


def build() -> Any:
    """Trains the tokenizer: a transformers PreTrainedTokenizerFast with ids that depend on this file alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        show_progress=False,
        special_tokens=[*SPECIALS, *BYTES],
        initial_alphabet=[*string.printable[:95], "\n"],
        limit_alphabet=200,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    state = json.loads(tokenizer.to_str())
    # Byte tokens take part as plain pieces of the model, not as added tokens that a user's text could spell.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIALS]
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, IMAGE],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
