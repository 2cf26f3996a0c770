"""The official scoring rules, one row per rule: how one answer is judged, and what the official script prints.

Sources: Bunny's eval/ (pope, gqa, scienceqa, textvqa), manoja328/tallyqacode (eval_simp_comp), VLMEvalKit (yes/no
words), TRI-ML/vlm-evaluation (RefCOCO). Where an official script joins by position, we join by id; where it counts an
unreadable answer as one of the answers, we do too, and say how many there were.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from leveret.evaluate import text as rules
from leveret.evaluate.forms import LETTERS, POPE_CATEGORIES, Item


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule made of one answer.

    score     0..1.
    parsed    the answer as the rule read it, as text; None where it read nothing.
    readable  False where the text holds nothing the rule looks for (the rule may still count it as an answer).
    missing   there was no answer at all.
    detail    more of the rule's findings (`iou`).
    """

    score: float
    parsed: str | None
    readable: bool
    missing: bool = False
    detail: Mapping[str, float] = field(default_factory=dict)


MISSING = Verdict(0.0, None, readable=False, missing=True)


@dataclass(frozen=True, slots=True)
class Scorer:
    """One rule.

    rule     where it comes from, in words; printed beside every score.
    judge    (item, the model's text) -> Verdict.
    gold     the right answer as a text that `judge` would accept: shown to people, and a candidate constant answer.
    summary  the official figures under their official names and in their official scale.
    forms    rows of FORMS whose questions it can judge; the first is its own.
    """

    rule: str
    judge: Callable[[Item, str], Verdict]
    gold: Callable[[Item], str]
    summary: Callable[[Sequence[Item], Sequence[Verdict]], dict[str, Any]]
    forms: tuple[str, ...]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


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


# --- GQA ------------------------------------------------------------------------------------------------------------


def _judge_gqa(item: Item, text: str) -> Verdict:
    """convert_gqa_for_eval.py (`rstrip(".")`, lower case), then exact match."""
    said = text.rstrip(".").lower()
    return Verdict(float(said == item.gold), said, bool(said.strip()))


def _summary_gqa(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    tables = {
        "Accuracy / structural type": "structural",
        "Accuracy / semantic type": "semantic",
        "Accuracy / steps number": "steps",
        "Accuracy / words number": "words",
    }
    pairs = list(zip(items, verdicts, strict=True))
    detail: dict[str, dict[str, list[float]]] = {}
    for title, key in tables.items():
        scores: dict[Any, list[float]] = defaultdict(list)
        for item, verdict in pairs:
            scores[item.meta[key]].append(verdict.score)
        detail[title] = {str(name): [100 * mean(scores[name]), len(scores[name])] for name in sorted(scores)}
    return {
        "accuracy": 100 * mean([v.score for v in verdicts]),
        "binary": 100 * mean([v.score for i, v in pairs if i.meta["structural"] != "query"]),
        "open": 100 * mean([v.score for i, v in pairs if i.meta["structural"] == "query"]),
        "distribution": _gqa_distribution(pairs),
        "detail": detail,
    }


def _gqa_distribution(pairs: Sequence[tuple[Item, Verdict]]) -> float | None:
    """Chi-square of said against right answers per global group, weighted by group, over 100; None without groups."""
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    said: dict[str, Counter[str | None]] = defaultdict(Counter)
    for item, verdict in pairs:
        if item.meta["global"] is not None:
            gold[item.meta["global"]][item.gold] += 1
            said[item.meta["global"]][verdict.parsed] += 1
    total = weight = 0.0
    for group, expected in gold.items():
        size = sum(expected.values())
        total += size * sum((said[group][answer] - count) ** 2 / count for answer, count in expected.items())
        weight += size
    return total / weight / 100 if weight else None


# --- TallyQA --------------------------------------------------------------------------------------------------------


def _judge_tallyqa(item: Item, text: str) -> Verdict:
    said = rules.integer(text)
    return Verdict(float(said == item.gold), None if said is None else str(said), said is not None)


def _summary_tallyqa(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The authors' split: complex is data_source "amt", simple is issimple and not amt, the rest is in neither."""
    parts: dict[str, list[tuple[Item, Verdict]]] = {"simple": [], "complex": [], "neither": []}
    for item, verdict in zip(items, verdicts, strict=True):
        amt = item.meta["data_source"] == "amt"
        parts["complex" if amt else "simple" if item.meta["issimple"] else "neither"].append((item, verdict))
    summary: dict[str, Any] = {"counts": {name: len(part) for name, part in parts.items()}}
    for name in ("simple", "complex"):
        read = [(item.gold, int(v.parsed)) for item, v in parts[name] if v.parsed is not None]
        summary[name] = {
            "accuracy": 100 * mean([v.score for _, v in parts[name]]),
            # Over the answers that were read as a number: there is no distance to prose.
            "rmse": mean([(gold - said) ** 2 for gold, said in read]) ** 0.5,
        }
    return summary | {"accuracy": 100 * mean([v.score for v in verdicts])}


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


# --- TextVQA --------------------------------------------------------------------------------------------------------


def _judge_textvqa(item: Item, text: str) -> Verdict:
    """m4c soft accuracy: mean over the ten people of min(1, agreeing others / 3)."""
    said = rules.m4c(text)
    answers = [rules.m4c(answer) for answer in item.gold]
    # Only an answer that somebody gave has a score, so an empty text earns nothing unless somebody wrote nothing.
    scores = [min(1.0, (answers.count(said) - (answer == said)) / 3) for answer in answers]
    return Verdict(sum(scores) / len(scores), said, bool(said))


def _commonest(item: Item) -> str:
    return Counter(item.gold).most_common(1)[0][0]


def _summary_textvqa(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {"samples": len(items), "accuracy": 100 * mean([v.score for v in verdicts])}


# --- VizWiz ---------------------------------------------------------------------------------------------------------


def _summary_vizwiz(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    parts: dict[str, list[float]] = {"answerable": [], "unanswerable": []}
    for item, verdict in zip(items, verdicts, strict=True):
        parts["unanswerable" if item.meta["answer_type"] == "unanswerable" else "answerable"].append(verdict.score)
    scores = {name: {"n": len(part), "accuracy": 100 * mean(part)} for name, part in parts.items()}
    return {"samples": len(items), "accuracy": 100 * mean([v.score for v in verdicts]), **scores}


# --- descriptions -----------------------------------------------------------------------------------------------------


def _phrases(text: str) -> list[str]:
    return [phrase.strip().lower() for phrase in text.split(",") if phrase.strip()]


def _judge_phrases(item: Item, text: str) -> Verdict:
    """Share of the reference's phrases (between its commas) that stand in the answer, each as often as it is said."""
    wanted, said = Counter(_phrases(item.gold)), text.lower()
    found = sum(min(n, len(re.findall(rf"\b{re.escape(phrase)}\b", said))) for phrase, n in wanted.items())
    return Verdict(found / sum(wanted.values()), text or None, bool(text.strip()))


# --- a user's own questions -----------------------------------------------------------------------------------------


def _judge_own(item: Item, text: str) -> Verdict:
    """The same words as the recorded answer, once both went through TextVQA's normaliser."""
    said = rules.m4c(text)
    return Verdict(float(said == rules.m4c(item.gold)), said, bool(said))


def _summary_own(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {"samples": len(items), "accuracy": 100 * mean([v.score for v in verdicts])}


SCORERS: dict[str, Scorer] = {
    "pope": Scorer(
        "POPE evaluate.py as in Bunny and LLaVA (what is not a no is a yes)",
        _judge_pope,
        lambda i: i.gold,
        _summary_pope,
        ("pope",),
    ),
    "gqa": Scorer(
        "GQA eval.py after LLaVA's converter (exact match)", _judge_gqa, lambda i: i.gold, _summary_gqa, ("gqa",)
    ),
    "tallyqa": Scorer(
        "TallyQA eval_simp_comp on integers; number words up to twenty are read too (our addition)",
        _judge_tallyqa,
        lambda i: str(i.gold),
        _summary_tallyqa,
        ("tallyqa",),
    ),
    "vsr_yes_no": Scorer(
        "VSR as in VLMEvalKit: the word yes or the word no, not both, without a judge",
        _judge_words("yes", "no"),
        lambda i: "Yes" if i.gold else "No",
        _summary_vsr("yes"),
        ("vsr",),
    ),
    "vsr_true_false": Scorer(
        "VSR as in VLMEvalKit with the words true and false, not both",
        _judge_words("true", "false"),
        lambda i: "True" if i.gold else "False",
        _summary_vsr("true"),
        ("vsr",),
    ),
    "scienceqa": Scorer(
        "ScienceQA eval_science_qa.py as in Bunny",
        _judge_scienceqa,
        lambda i: LETTERS[i.gold],
        _summary_scienceqa,
        ("scienceqa",),
    ),
    "refcoco": Scorer(
        "RefCOCO Acc@0.5 as in Prismatic (the whole answer is one box)",
        _judge_refcoco,
        lambda i: box_text(i.gold),
        _summary_refcoco,
        ("refcoco",),
    ),
    "own": Scorer(
        "the same words as the recorded answer; case, articles, punctuation and digits for number words do not matter",
        _judge_own,
        lambda i: i.gold,
        _summary_own,
        ("own", "gqa"),
    ),
    "vizwiz": Scorer(
        "VizWiz soft accuracy as in lmms-eval (m4c on both sides)",
        _judge_textvqa,
        _commonest,
        _summary_vizwiz,
        ("vizwiz",),
    ),
    "phrases": Scorer(
        "share of the reference's phrases, between its commas, that the answer holds; what it adds costs nothing "
        "(our own rule)",
        _judge_phrases,
        lambda i: i.gold,
        _summary_own,
        ("own",),
    ),
    "textvqa": Scorer(
        "TextVQA m4c soft accuracy as in LLaVA and Bunny",
        _judge_textvqa,
        _commonest,
        _summary_textvqa,
        ("textvqa", "vizwiz"),
    ),
}
