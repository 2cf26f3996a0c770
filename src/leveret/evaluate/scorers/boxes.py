"""Rules over boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leveret.evaluate import text as rules
from leveret.evaluate.forms.base import Item
from leveret.evaluate.scorers.base import Scorer, Verdict

# --- RefCOCO --------------------------------------------------------------------------------------------------------


def _judge_refcoco(item: Item, text: str) -> Verdict:
    said = rules.box(text)
    if said is None:
        return Verdict(0.0, None, readable=False)
    overlap = rules.iou(said, item.gold)
    return Verdict(float(overlap >= 0.5), box_text(said), readable=True, detail={"iou": overlap})


def box_text(box: Sequence[float]) -> str:
    return "[" + ", ".join(f"{number:.2f}" for number in box) + "]"


def _summary_refcoco(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    summary: dict[str, Any] = {"counts": {}}
    for name in sorted({item.meta["group"] for item in items}):
        part = [v for i, v in zip(items, verdicts, strict=True) if i.meta["group"] == name]
        correct, invalid = sum(v.score == 1.0 for v in part), sum(not v.readable for v in part)
        summary["counts"][name] = {"correct": correct, "incorrect": len(part) - correct - invalid, "invalid": invalid}
        summary[f"accuracy__{name}"] = correct / len(part)
    return summary


BOXES = {
    "refcoco": Scorer(
        "RefCOCO Acc@0.5 as in Prismatic (the whole answer is one box)",
        _judge_refcoco,
        lambda i: box_text(i.gold),
        _summary_refcoco,
    ),
}
