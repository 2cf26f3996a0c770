"""Where each benchmark's files are published, how many questions they hold, and how another version is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from leveret.evaluate.forms import Item


@dataclass(frozen=True, slots=True)
class Source:
    """Where a benchmark comes from.

    where     the page that publishes the questions (and what to take there).
    pictures  where its pictures are, where they come from elsewhere.
    n         our split -> how many questions the published file holds.
    other     (items) -> what tells that this is another version than the one the field scores, or "".
    note      what else must be known.
    """

    where: str
    pictures: str = ""
    n: Mapping[str, int] = field(default_factory=dict)
    other: Callable[[Sequence[Item]], str] = lambda items: ""
    note: str = ""


def _pope(items: Sequence[Item]) -> str:
    """The first set has 2,910 random questions; the repository's head has 3,000, and changed all three files."""
    random = sum(item.meta.get("group") == "random" for item in items)
    return "" if random == 2910 else (
        f"{random:,} random questions, where the set that papers score has 2,910 (commit e3e39262; the head's 3,000 "
        "are another set)"
    )  # fmt: skip


COCO = "https://cocodataset.org/#download"
_TEXTVQA = Source("https://textvqa.org/dataset (v0.5.1)", n={"test": 5000}, note="pictures: train_images/")
_MMBENCH = "https://github.com/open-compass/MMBench (the legacy TSV, one row a rotation; its pictures are in it)"

SOURCES: dict[str, Source] = {
    "pope": Source(
        "https://github.com/RUCAIBox/POPE at e3e39262, output/coco", f"{COCO} (val2014)", {"test": 8910}, _pope
    ),
    "gqa": Source(
        "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions 1.2, testdev_balanced)", n={"test": 12578}
    ),
    "vqav2": Source(
        "https://visualqa.org/download.html (questions and annotations v2)", COCO,
        {"test": 214354, "test-dev2015": 107394, "server": 447793},
        note="test-dev's answers are not published: its server scores them",
    ),
    "vizwiz": Source("https://vizwiz.org/tasks-and-datasets/vqa", n={"test": 4319}, note="scored on val"),
    "textvqa": _TEXTVQA,
    "textvqa_ocr": _TEXTVQA,
    "scienceqa": Source("https://github.com/lupantech/ScienceQA (data/scienceqa, and its pictures)", n={"test": 4241}),
    "tally_qa": Source(
        "https://github.com/manoja328/TallyQA_dataset", f"{COCO}, and Visual Genome", {"test": 38589}
    ),
    "vsr": Source(
        "https://github.com/cambridgeltl/visual-spatial-reasoning (the zero-shot split)", n={"test": 1222}
    ),
    "refcoco": Source("https://github.com/lichengunc/refer", f"{COCO} (train2014)", {"test": 26488}),
    "ocid_ref": Source("https://github.com/lluma/OCID-Ref", n={"test": 18342}),
    "ai2d": Source("https://prior.allenai.org/projects/diagram-understanding", n={"test": 15501}),
    "mme": Source(
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (MME_Benchmark_release_version, if asked)",
        n={"test": 2374},
    ),
    "mmbench": Source(_MMBENCH, note="test's answers are not published: its server scores them"),
    "mmbench_cn": Source(_MMBENCH, note="test's answers are not published: its server scores them"),
    "seed_bench": Source("https://huggingface.co/datasets/AILab-CVC/SEED-Bench", n={"test": 19242}),
    "mmmu": Source(
        "https://huggingface.co/datasets/MMMU/MMMU", n={"test": 900},
        note="test's answers are not published: its server scores them",
    ),
    "cmmmu": Source("https://huggingface.co/datasets/m-a-p/CMMMU", n={"test": 900}),
    "mm_vet": Source("https://github.com/yuweihao/MM-Vet (mm-vet.zip)", n={"test": 218}, note="a judge scores it"),
    "llava_bench_w": Source(
        "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild", n={"test": 60}, note="a judge scores it"
    ),
    "own": Source("your own questions, in LLaVA's form"),
}  # fmt: skip

WORLD = Source("leveret world draw -o DIR (or leveret quickstart)")
"""The drawn world's tasks."""


def source_of(name: str) -> Source:
    """Of a task's id, with or without a split behind it; the drawn world's for whatever is no benchmark."""
    return SOURCES.get(name.partition(".")[0], WORLD)
