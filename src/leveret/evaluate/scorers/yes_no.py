"""Rules over one of two words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from leveret.evaluate import text as rules
from leveret.evaluate.forms.base import Item
from leveret.evaluate.forms.yes_no import POPE_CATEGORIES
from leveret.evaluate.scorers.base import Scorer, Verdict, mean

# --- POPE -----------------------------------------------------------------------------------------------------------


def pope_word(text: str) -> str:
    """POPE's evaluate.py: first sentence, commas deleted, split on single blanks; "No", "no" or "not" is no, and
    everything else, silence included, is yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "no", "not") for word in words) else "yes"


def _judge_pope(item: Item, text: str) -> Verdict:
    said = pope_word(text)
    readable = said == "no" or "yes" in rules.strip_punctuation(text.lower()).split()
    return Verdict(float(said == item.gold), said, readable)


def pope_counts(item: Item, verdict: Verdict) -> tuple[int, int, int, int]:
    """(TP, FP, TN, FN) of one answer; a missing answer is a wrong one."""
    positive, right = item.gold == "yes", verdict.score == 1.0
    return (
        int(positive and right),
        int(not positive and not right),
        int(not positive and right),
        int(positive and not right),
    )


def f1(tp: float, fp: float, fn: float) -> float:
    """F1, and 0 where it is undefined (no yes said and none right): the official script divides by zero there."""
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def _summary_pope(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for category in POPE_CATEGORIES:
        rows = [pope_counts(i, v) for i, v in zip(items, verdicts, strict=True) if i.meta["group"] == category]
        if not rows:
            continue
        tp, fp, tn, fn = (sum(column) for column in zip(*rows, strict=True))
        summary[category] = {
            "n": len(rows),
            "TP": tp,
            "FP": fp,
            "TN": tn,
            "FN": fn,
            "accuracy": (tp + tn) / len(rows),
            "precision": tp / (tp + fp) if tp + fp else 0.0,
            "recall": tp / (tp + fn) if tp + fn else 0.0,
            "f1_score": f1(tp, fp, fn),
            "yes_ratio": (tp + fp) / len(rows),
        }
    summary["average_f1"] = mean([part["f1_score"] for part in summary.values()])
    summary["accuracy"] = mean([verdict.score for verdict in verdicts])
    return summary


# --- VSR ------------------------------------------------------------------------------------------------------------


def _judge_words(yes: str, no: str) -> Callable[[Item, str], Verdict]:
    def judge(item: Item, text: str) -> Verdict:
        said = rules.one_of(text, yes, no)
        return Verdict(float(said == (yes if item.gold else no)), said, said is not None)

    return judge


def _summary_vsr(yes: str) -> Callable[[Sequence[Item], Sequence[Verdict]], dict[str, Any]]:
    """VLMEvalKit's VSR_rating: an unreadable answer is wrong, and counts as "no" in precision, recall and F1."""

    def summary(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
        pairs = list(zip(items, verdicts, strict=True))
        tp = sum(bool(i.gold) and v.parsed == yes for i, v in pairs)
        fp = sum(not i.gold and v.parsed == yes for i, v in pairs)
        fn = sum(bool(i.gold) and v.parsed != yes for i, v in pairs)
        return {
            "acc": 100 * mean([v.score for v in verdicts]),
            "precision": 100 * tp / (tp + fp) if tp + fp else 0.0,
            "recall": 100 * tp / (tp + fn) if tp + fn else 0.0,
            "f1_score": f1(tp, fp, fn),
        }

    return summary


YES_NO = {
    "pope": Scorer(
        "POPE evaluate.py as in Bunny and LLaVA (what is not a no is a yes)",
        _judge_pope,
        lambda i: i.gold,
        _summary_pope,
    ),
    "vsr_yes_no": Scorer(
        "VSR as in VLMEvalKit: the word yes or the word no, not both, without a judge",
        _judge_words("yes", "no"),
        lambda i: "Yes" if i.gold else "No",
        _summary_vsr("yes"),
    ),
    "vsr_true_false": Scorer(
        "VSR as in VLMEvalKit with the words true and false, not both",
        _judge_words("true", "false"),
        lambda i: "True" if i.gold else "False",
        _summary_vsr("true"),
    ),
}
