"""Rules over one of two words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from leveret.evaluate import text as rules
from leveret.evaluate.curves import auc_pr, auc_roc, probabilities
from leveret.evaluate.forms.base import Item
from leveret.evaluate.forms.yes_no import POPE_CATEGORIES
from leveret.evaluate.scorers.base import Scorer, Verdict, mean
from leveret.evaluate.scorers.mme import MME

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


def _judge_pope_lmms(item: Item, text: str) -> Verdict:
    said = text.lower().strip()
    known = said in ("yes", "no")
    return Verdict(float(said == item.gold), said if known else None, known)


def _summary_pope_lmms(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Unreadable answers are wrong, but count in neither precision nor recall. `yes_ratio` is that of the LABELS, as
    there; `yes_said` is that of the answers."""
    summary: dict[str, Any] = {}
    for part in (*POPE_CATEGORIES, "all"):
        rows = [(i.gold, v) for i, v in zip(items, verdicts, strict=True) if part in ("all", i.meta["group"])]
        if not rows:
            continue
        tp, fp, fn = (
            sum(gold == wanted and v.parsed == said for gold, v in rows)
            for wanted, said in (("yes", "yes"), ("no", "yes"), ("yes", "no"))
        )
        summary[part] = {
            "accuracy": mean([v.score for _, v in rows]),
            "precision": tp / (tp + fp) if tp + fp else 0.0,
            "recall": tp / (tp + fn) if tp + fn else 0.0,
            "f1_score": f1(tp, fp, fn),
            "yes_ratio": mean([float(gold == "yes") for gold, _ in rows]),
            "yes_said": mean([float(v.parsed == "yes") for _, v in rows]),
        }
    return summary


def _summary_pope_vlmevalkit(items: Sequence[Item], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """POPE_rating: a row for all and for each category, percent; "Overall" is F1, in which the unreadable are no."""
    table = []
    for part in ("Overall", *sorted(POPE_CATEGORIES)):
        rows = [(i.gold, v) for i, v in zip(items, verdicts, strict=True) if part in ("Overall", i.meta["group"])]
        if not rows:
            continue
        tp = sum(gold == "yes" and v.parsed == "yes" for gold, v in rows)
        fp = sum(gold == "no" and v.parsed == "yes" for gold, v in rows)
        fn = sum(gold == "yes" and v.parsed != "yes" for gold, v in rows)
        table.append(
            {
                "split": part,
                "Overall": 100 * f1(tp, fp, fn),
                "acc": 100 * mean([v.score for _, v in rows]),
                "precision": 100 * tp / (tp + fp) if tp + fp else 0.0,
                "recall": 100 * tp / (tp + fn) if tp + fn else 0.0,
            }
        )
    return table


# --- probabilities of the two words ---------------------------------------------------------------------------------


def _judge_likely(yes: str, no: str, right: Callable[[Item], bool]) -> Callable[[Item, str], Verdict]:
    def judge(item: Item, text: str) -> Verdict:
        first, second = probabilities(text, 2, item.question_id)
        said = first >= second  # equal ones are the first word
        return Verdict(float(said == right(item)), yes if said else no, readable=True, detail={"p": first})

    return judge


def _curves(rows: Sequence[tuple[bool, Verdict]]) -> tuple[float | None, float | None]:
    """AUC-ROC and AUC-PR of the first word's probability, over the questions that were answered."""
    there = [(int(gold), verdict.detail["p"]) for gold, verdict in rows if "p" in verdict.detail]
    labels, scores = [label for label, _ in there], [score for _, score in there]
    return auc_roc(labels, scores), auc_pr(labels, scores)


def _summary_pope_likely(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    rows = [(i.meta["group"], i.gold == "yes", v) for i, v in zip(items, verdicts, strict=True)]
    for category in ("adversarial", "popular", "random"):
        part = [(gold, v) for group, gold, v in rows if group == category]
        if part:
            summary[f"POPE-{category}-Accuracy"] = mean([v.score for _, v in part])
            summary[f"POPE-{category}-AUCROC"], summary[f"POPE-{category}-AUCPR"] = _curves(part)
    final = mean([value for name, value in summary.items() if name.endswith("Accuracy")])
    roc, pr = _curves([(gold, v) for _, gold, v in rows])
    return summary | {"POPE-final-Accuracy": final, "POPE-final-AUCROC": roc, "POPE-final-AUCPR": pr}


def _summary_vsr_likely(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    roc, pr = _curves([(bool(i.gold), v) for i, v in zip(items, verdicts, strict=True)])
    return {
        "accuracy__VSR-ExactMatch": mean([v.score for v in verdicts]),
        "accuracy__VSR-AUCROC": roc,
        "accuracy__VSR-AUCPR": pr,
        "auc-roc": roc,
        "auc-pr": pr,
    }


# --- VSR ------------------------------------------------------------------------------------------------------------


def _judge_words(yes: str, no: str) -> Callable[[Item, str], Verdict]:
    def judge(item: Item, text: str) -> Verdict:
        said = rules.one_of(text, yes, no)
        right = yes if item.gold in (True, "yes") else no
        return Verdict(float(said == right), said, said is not None)

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
    "pope_lmms": Scorer(
        "POPE as in lmms-eval: exactly yes or no in lower case, anything else is wrong",
        _judge_pope_lmms,
        lambda i: i.gold,
        _summary_pope_lmms,
        headline="F1 of the readable",
    ),
    "pope_vlmevalkit": Scorer(
        "POPE as in VLMEvalKit without a judge: the word yes or the word no, not both; in F1 the unreadable are no",
        _judge_words("yes", "no"),
        lambda i: i.gold,
        _summary_pope_vlmevalkit,
        headline="F1",
    ),
    "pope_probabilities": Scorer(
        "POPE as in Prismatic: the likelier of the words Yes and No",
        _judge_likely("yes", "no", lambda i: i.gold == "yes"),
        lambda i: "[1, 0]" if i.gold == "yes" else "[0, 1]",
        _summary_pope_likely,
        reads="probabilities",
        headline="accuracy, mean of parts",
    ),
    "vsr_probabilities": Scorer(
        "VSR as in Prismatic: the likelier of the words True and False",
        _judge_likely("true", "false", lambda i: bool(i.gold)),
        lambda i: "[1, 0]" if i.gold else "[0, 1]",
        _summary_vsr_likely,
        reads="probabilities",
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
    **MME,
}
