"""Published figures, by whom they were scored, and where ours stand in the same unit.

One table a lineage, as its authors print it. A column says which of our tasks it is, which of that task's official
figures it holds, in which unit, and by which of our rules that figure is the same quantity; a figure that came out of a
server or out of another rule is shown beside ours with a mark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leveret.evaluate.sources import source_of


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a published table.

    title   as printed. task: our id. metric: the path of the figure in our `metrics`, dots between keys.
    scale   what our figure is multiplied by to be in the printed unit.
    rules   our rules under which the figures are the same quantity; none where a server or a judge scored it.
    splits  our names of the split it is about, where the task has others that can be asked for.
    """

    title: str
    task: str
    metric: str
    scale: float = 1.0
    rules: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()

    def ours(self, tasks: Mapping[str, Mapping[str, Any]]) -> tuple[float, bool] | None:
        """Our figure in the column's unit, and whether it is the same quantity, by its rule and over all questions that
        are published; None where we have none."""
        for name, facts in tasks.items():
            if name.partition(".")[0] != self.task or (self.splits and facts.get("split") not in self.splits):
                continue
            value: Any = facts["metrics"]
            for key in self.metric.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, int | float):
                whole = source_of(self.task).n.get(facts.get("split", "test"))
                all_asked = whole is None or facts.get("n") in (None, whole)
                return self.scale * value, facts["rule"] in self.rules and all_asked
        return None


@dataclass(frozen=True, slots=True)
class Table:
    """What a group published of several models.

    scored   by which rules, in words. source: where the figures stand.
    models   model -> its figures, one a column; None where none was published.
    """

    name: str
    scored: str
    source: str
    columns: tuple[Column, ...]
    models: Mapping[str, tuple[float | None, ...]]


_MME = ("bunny", "mme_eval_tool_one_line")
_POPE = ("bunny", "llava", "pope_official")

_MME_P = Column("MME-P", "mme", "Perception.total", rules=_MME)
_VQAV2 = Column("VQAv2", "vqav2", "overall")  # test-dev, by its server; ours is val
_GQA = Column("GQA", "gqa", "accuracy", rules=("official",))
_SQA = Column("SQA-I", "scienceqa", "img_accuracy", rules=("official",))
_TEXT = Column("TextVQA", "textvqa_ocr", "accuracy", rules=("official",))
_F1 = Column("POPE", "pope", "average_f1", 100, rules=_POPE)
_MMVET = Column("MM-Vet", "mm_vet", "capability.total")
_LLAVA_W = Column("LLaVA-W", "llava_bench_w", "all.relative")
_MMB = Column("MMB", "mmbench", "Overall", 100)
_SEED = Column("SEED", "seed_bench", "Total", rules=("official",))

PUBLISHED: tuple[Table, ...] = (
    Table(
        "Bunny",
        "Bunny's scripts, which are LLaVA's; MMBench, VQAv2 and MMMU test by their servers, MMMU with random letters "
        "for what could not be read; POPE is the mean of the three F1",
        "the README of BAAI-DCAI/Bunny at 08273ac, and the paper's tables there (script/train/tutorials/assets)",
        (
            _MME_P,
            Column("MME-C", "mme", "Cognition.total", rules=_MME),
            Column("MMB-T", "mmbench", "Overall", 100, splits=("server",)),
            Column("MMB-D", "mmbench", "Overall", 100, splits=("test", "dev")),
            _SEED,
            Column("MMMU-V", "mmmu", "overall_exact", 100, rules=("official_with_fallback",), splits=("test", "val")),
            Column("MMMU-T", "mmmu", "overall_exact", 100, splits=("server",)),
            _VQAV2,
            _GQA,
            _SQA,
            _F1,
        ),
        {
            "Bunny-v1.0-3B": (1488.8, 289.3, 69.2, 68.6, 62.5, 38.2, 33.0, 79.8, 62.5, 70.9, 86.8),
            "Bunny-v1.0-4B": (1495.2, 338.9, 74.0, 73.5, 64.5, 40.1, 39.1, 81.5, 63.5, 75.2, 86.7),
            "Bunny-v1.1-4B": (1581.5, 361.1, 75.7, 74.2, 64.9, 41.4, 38.4, 82.1, 63.2, 78.3, 87.2),
            "Bunny-v1.1-Llama-3-8B-V": (1644.1, 367.5, 78.1, 77.2, 66.2, 43.3, 39.0, 82.9, 64.0, 79.9, 87.2),
            "LLaVA-1.5-7B-LoRA": (1476.9, 267.9, 66.1, 66.1, None, 34.4, 31.7, 79.1, 63.0, 68.4, 86.4),
            "LLaVA-1.5-13B-LoRA": (1541.7, 300.4, 68.4, 68.5, None, 40.0, 33.2, 80.0, 63.3, 71.2, 86.7),
        },
    ),
    Table(
        "LLaVA-1.5",
        "LLaVA's scripts; VQAv2, VizWiz test and MMBench by their servers, LLaVA-W and MM-Vet by GPT-4; TextVQA with "
        "OCR tokens in the prompt; POPE is the mean of the three F1",
        "the model zoo of haotian-liu/LLaVA (docs/MODEL_ZOO.md at c121f04)",
        (
            _VQAV2, _GQA, Column("VizWiz", "vizwiz", "accuracy__VizWiz-Overall"), _SQA, _TEXT, _F1, _MME_P, _MMB,
            Column("MMB-CN", "mmbench_cn", "Overall", 100, splits=("test", "dev")), _SEED, _LLAVA_W, _MMVET,
        ),
        {
            "LLaVA-1.5-7B": (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.3, 58.6, 65.4, 31.1),
            "LLaVA-1.5-7B-LoRA": (79.1, 63.0, 47.8, 68.4, 58.2, 86.4, 1476.9, 66.1, 58.9, 60.1, 67.9, 30.2),
            "LLaVA-1.5-13B": (80.0, 63.3, 53.6, 71.6, 61.3, 85.9, 1531.3, 67.7, 63.6, 61.6, 72.5, 36.1),
        },
    ),
    Table(
        "TinyLLaVA",
        "LLaVA's scripts; VQAv2 by its server, LLaVA-W and MM-Vet by GPT-4; TextVQA with OCR tokens; POPE is the mean "
        "of the three F1",
        "the TinyLLaVA paper (arXiv 2402.14289), table A1",
        (_VQAV2, _GQA, _SQA, _TEXT, _MMVET, _F1, _LLAVA_W),
        {
            "base-C-TL (1.4B)": (74.0, 58.1, 60.2, 45.8, 20.6, 85.9, 55.8),
            "base-Sig-Phi (3.1B)": (79.2, 61.3, 69.9, 55.6, 32.1, 87.1, 67.9),
            "share-Sig-TL (1.5B)": (76.9, 60.3, 60.1, 51.7, 25.8, 86.1, 60.8),
            "share-Sig-SLM (2.0B)": (78.9, 61.9, 64.7, 56.4, 32.6, 86.5, 66.4),
            "share-Sig-Phi (3.1B)": (79.9, 62.0, 69.1, 59.1, 32.0, 86.4, 75.8),
        },
    ),
    Table(
        "Prismatic",
        "TRI-ML's vlm-evaluation, on validation data; VSR, POPE, TallyQA and AI2D by the first token's probabilities, "
        "POPE as an accuracy",
        "the Prismatic paper (arXiv 2402.07865), its table of results",
        (
            Column("VQAv2", "vqav2", "accuracy", rules=("trivlm",)),
            Column("GQA", "gqa", "accuracy", rules=("prismatic",)),
            Column("VizWiz", "vizwiz", "accuracy__VizWiz-Overall", rules=("prismatic",)),
            Column("TextVQA+OCR", "textvqa_ocr", "accuracy", rules=("official",)),
            Column("TextVQA", "textvqa", "accuracy", rules=("official",)),
            Column("RefCOCO", "refcoco", "accuracy__RefCOCO", 100, rules=("prismatic",)),
            Column("RefCOCO+", "refcoco", "accuracy__RefCOCO+", 100, rules=("prismatic",)),
            Column("RefCOCOg", "refcoco", "accuracy__RefCOCOg", 100, rules=("prismatic",)),
            Column("OCID-Ref", "ocid_ref", "accuracy__OCIDRef-All", 100, rules=("prismatic",)),
            Column("VSR", "vsr", "accuracy__VSR-ExactMatch", 100, rules=("prismatic_probabilities",)),
            Column("POPE", "pope", "POPE-final-Accuracy", 100, rules=("prismatic_probabilities",)),
            Column("TallyQA", "tally_qa", "accuracy__TallyQA-final-Accuracy", 100, rules=("prismatic_probabilities",)),
            Column("AI2D", "ai2d", "accuracy__AI2D-final-Accuracy", 100, rules=("prismatic_probabilities",)),
        ),
        {
            "LLaVA-1.5-7B": (
                76.54, 61.58, 54.24, 58.25, 46.13, 55.12, 49.47, 50.92, 35.07, 51.47, 86.57, 62.06, 54.10,
            ),
            "Prism-CLIP-7B": (
                79.67, 64.56, 53.34, 57.72, 51.12, 71.98, 66.96, 66.18, 44.65, 57.77, 87.30, 66.00, 52.89,
            ),
            "Prism-SigLIP-7B": (
                80.67, 64.32, 53.70, 62.14, 58.01, 70.92, 65.73, 65.46, 48.08, 56.79, 87.30, 66.46, 54.38,
            ),
            "Prism-DINOSigLIP-7B": (
                80.97, 65.27, 52.82, 59.71, 55.64, 77.78, 73.08, 71.04, 54.12, 59.57, 88.12, 66.70, 55.65,
            ),
            "Prism-DINOSigLIP-13B": (
                81.66, 66.13, 58.01, 62.89, 57.08, 79.39, 75.55, 72.73, 54.62, 72.18, 88.07, 70.41, 57.96,
            ),
        },
    ),
)  # fmt: skip
