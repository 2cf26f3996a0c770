"""Rules over letters of options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leveret.evaluate import text as rules
from leveret.evaluate.forms.base import Item
from leveret.evaluate.forms.choice import LETTERS
from leveret.evaluate.scorers.base import Scorer, Verdict, mean

# --- ScienceQA ------------------------------------------------------------------------------------------------------


def _judge_scienceqa(item: Item, text: str) -> Verdict:
    said = rules.scienceqa_letter(text)
    offered = LETTERS[: item.meta["choices"]]
    right = said is not None and said in offered and offered.index(said) == item.gold
    return Verdict(float(right), said, said is not None)


def _summary_scienceqa(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """IMG is decided by problems.json. The official script decides by the prompt of the answer, so that a missing
    answer leaves its denominator: that figure is given as `answered_image_acc`."""
    pictured = [v for i, v in zip(items, verdicts, strict=True) if i.image is not None]
    answered = [v for v in pictured if not v.missing]
    return {
        "total": len(items),
        "correct": int(sum(v.score for v in verdicts)),
        "accuracy": 100 * mean([v.score for v in verdicts]),
        "img_accuracy": 100 * mean([v.score for v in pictured]),
        "image_correct": int(sum(v.score for v in pictured)),
        "image_count": len(pictured),
        "answered_image_acc": 100 * mean([v.score for v in answered]),
        "answered_image_count": len(answered),
    }


CHOICE = {
    "scienceqa": Scorer(
        "ScienceQA eval_science_qa.py as in Bunny",
        _judge_scienceqa,
        lambda i: LETTERS[i.gold],
        _summary_scienceqa,
    ),
}
