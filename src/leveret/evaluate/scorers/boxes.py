"""Rules over boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from leveret.evaluate import text as rules
from leveret.evaluate.forms.base import Item
from leveret.evaluate.scorers.base import Scorer, Verdict, mean
from leveret.runs import DataError

Judge = Callable[[Item, str], Verdict]


def box_text(box: Sequence[float]) -> str:
    return "[" + ", ".join(f"{number:.2f}" for number in box) + "]"


# --- Prismatic: RefCOCO and OCID-Ref ----------------------------------------------------------------------------------


def _judge_whole(threshold: float) -> Judge:
    """The whole answer is one box; right where it overlaps the true one, rounded to two decimals, by the threshold."""

    def judge(item: Item, text: str) -> Verdict:
        said = rules.box(text)
        if said is None:
            return Verdict(0.0, None, readable=False)
        overlap = rules.iou(said, item.gold)
        return Verdict(float(overlap >= threshold), box_text(said), readable=True, detail={"iou": overlap})

    return judge


def _by_group(
    items: Sequence[Item], verdicts: Sequence[Verdict], name_of: Callable[[str], str] = str
) -> dict[str, Any]:
    summary: dict[str, Any] = {"counts": {}}
    for name in sorted({item.meta["group"] for item in items}):
        part = [v for i, v in zip(items, verdicts, strict=True) if i.meta["group"] == name]
        correct, invalid = sum(v.score == 1.0 for v in part), sum(not v.readable and not v.missing for v in part)
        summary["counts"][name] = {"correct": correct, "incorrect": len(part) - correct - invalid, "invalid": invalid}
        summary[f"accuracy__{name_of(name)}"] = correct / len(part)
    return summary


def _summary_ocid_ref(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    found = _by_group(items, verdicts, lambda name: f"OCIDRef-{name.split()[0]}")
    return found | {"accuracy__OCIDRef-All": mean([v.score for v in verdicts])}


# --- lmms-eval: RefCOCO -----------------------------------------------------------------------------------------------

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)


def _judge_first(gold_of: Callable[[Item], Sequence[float]]) -> Judge:
    """utils_rec.py: the first box anywhere, as it stands. Where there is none the original takes the point
    [0, 0, 0, 0], whose middle lies in a box that begins in the corner."""

    def judge(item: Item, text: str) -> Verdict:
        gold, said = gold_of(item), rules.first_box(text)
        x0, y0, x1, y1 = said or (0.0, 0.0, 0.0, 0.0)
        middle = float(gold[0] <= (x0 + x1) / 2 <= gold[2] and gold[1] <= (y0 + y1) / 2 <= gold[3])
        if said is None:
            return Verdict(0.0, None, readable=False, detail={"center": middle})
        overlap = rules.iou(gold, said)
        return Verdict(float(overlap >= 0.5), box_text(said), readable=True, detail={"iou": overlap, "center": middle})

    return judge


def _exact(item: Item) -> Sequence[float]:
    if "exact" not in item.meta:
        raise DataError(
            f"{item.question_id}: this rule compares with the box before rounding, and Prismatic's index holds rounded "
            "ones alone. Give the folder with refs(*).p and instances.json, or take the rule 'lmms_eval'."
        )
    exact: Sequence[float] = item.meta["exact"]
    return exact


def _summary_first(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    groups = sorted({item.meta["group"] for item in items})
    summary: dict[str, Any] = {}
    for name in (*groups, "all"):
        part = [v.detail for i, v in zip(items, verdicts, strict=True) if name in ("all", i.meta["group"])]
        overlaps = [detail.get("iou", 0.0) for detail in part]
        summary[name] = {
            "IoU": mean(overlaps),
            **{f"ACC@{least}": mean([float(overlap >= least) for overlap in overlaps]) for least in THRESHOLDS},
            "Center_ACC": mean([detail.get("center", 0.0) for detail in part]),
        }
    return summary


BOXES = {
    "refcoco": Scorer(
        "RefCOCO Acc@0.5 as in Prismatic (the whole answer is one box)",
        _judge_whole(0.5),
        lambda i: box_text(i.gold),
        _by_group,
    ),
    "refcoco_lmms_eval": Scorer(
        "RefCOCO Acc@0.5 with lmms-eval's parser (the first [a, b, c, d] anywhere; against Prismatic's rounded boxes)",
        _judge_first(lambda i: i.gold),
        lambda i: box_text(i.gold),
        _summary_first,
    ),
    "refcoco_lmms_eval_exact": Scorer(
        "RefCOCO Acc@0.5 as in lmms-eval (the first [a, b, c, d] anywhere; against the boxes before rounding)",
        _judge_first(_exact),
        lambda i: box_text(i.gold),
        _summary_first,
    ),
    "ocid_ref": Scorer(
        "OCID-Ref Acc@0.25 as in Prismatic (the whole answer is one box)",
        _judge_whole(0.25),
        lambda i: box_text(i.gold),
        _summary_ocid_ref,
    ),
}
