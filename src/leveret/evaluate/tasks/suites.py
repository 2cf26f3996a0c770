"""The suites: which tasks, of which splits, stand in one table.

An entry is a task's id, or `ID.SPLIT` where the table holds that split whatever else is asked for (MMBench's dev and
test are two columns). An id alone is asked about the split that the command names, which is the part that can be scored
here unless it names another. Splits whose answers are not public are asked and not scored: their servers take the file.
"""

from __future__ import annotations

SUITES: dict[str, tuple[str, ...]] = {
    "world": ("existence", "colour", "shape", "count", "relation", "choice", "box", "word"),
    # What studies of language models and of text-only data ask beside the eight kinds.
    "world-study": (
        "existence", "colour", "shape", "count", "relation", "choice", "box", "word", "caption", "unanswerable", "text",
        "refusal",
    ),
    "world-more": ("caption", "reading", "unanswerable", "double", "text", "refusal"),
    # Bunny's table has eleven columns: MME is two of them (perception and cognition).
    "bunny": (
        "mme", "mmbench.server", "mmbench", "seed_bench", "mmmu", "mmmu.server", "vqav2.test-dev2015", "gqa",
        "scienceqa", "pope",
    ),
    # TinyLLaVA's tables 3 and A1. TextVQA is asked with OCR tokens, as LLaVA's question file has them.
    "tinyllava": (
        "vqav2.test-dev2015", "gqa", "scienceqa", "textvqa_ocr", "mm_vet", "pope", "llava_bench_w", "mme", "mmbench",
    ),
    # Prismatic's twelve: RefCOCO, RefCOCO+ and RefCOCOg are one task of three parts, TextVQA is two tasks.
    "prismatic": (
        "vqav2", "gqa", "vizwiz", "textvqa_ocr", "textvqa", "refcoco", "ocid_ref", "vsr", "pope", "tally_qa",
        "ai2d",
    ),
}  # fmt: skip
