"""Rules over words, phrases and numbers."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache
from typing import Any

import numpy as np

from leveret.evaluate import text as rules
from leveret.evaluate.curves import auc_pr, auc_roc, probabilities
from leveret.evaluate.forms.base import Item
from leveret.evaluate.scorers.base import Scorer, Verdict, mean
from leveret.evaluate.scorers.yes_no import f1

Pairs = Sequence[tuple[Item, Verdict]]


def percent(scores: Iterable[float], places: int | None = None) -> float:
    """100 times the mean; to so many places where the original rounds before it prints."""
    value = 100 * mean(list(scores))
    return value if places is None else round(value, places)


# --- GQA ------------------------------------------------------------------------------------------------------------


def _judge_gqa(said_of: Callable[[str], str], gold_of: Callable[[str], str]) -> Callable[[Item, str], Verdict]:
    def judge(item: Item, text: str) -> Verdict:
        said = said_of(text)
        return Verdict(float(said == gold_of(item.gold)), said, bool(said.strip()))

    return judge


def gqa_prediction(text: str) -> str:
    """convert_gqa_for_eval.py of LLaVA and Bunny: periods at the end go, lower case."""
    return text.rstrip(".").lower()


def _summary_gqa(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What GQA's eval.py prints, to two places as it does; validity and plausibility are switched off in the copies in
    use and print 0."""
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
        detail[title] = {str(name): [percent(scores[name], 2), len(scores[name])] for name in sorted(scores)}
    return {
        "accuracy": percent((v.score for v in verdicts), 2),
        "binary": percent((v.score for i, v in pairs if i.meta["structural"] != "query"), 2),
        "open": percent((v.score for i, v in pairs if i.meta["structural"] == "query"), 2),
        "distribution": _gqa_distribution(pairs),
        "validity": 0.0,
        "plausibility": 0.0,
        "detail": detail,
    }


def _gqa_distribution(pairs: Pairs) -> float | None:
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
    return round(total / weight / 100, 2) if weight else None


def _summary_accuracy(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {"samples": len(items), "accuracy": percent(v.score for v in verdicts)}


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


COUNTS = 16
"""Prismatic's options for TallyQA: the letters A to P stand for 0 to 15."""


def _judge_counts(item: Item, text: str) -> Verdict:
    """The most probable option, the first of equals (numpy's argmax)."""
    shares = probabilities(text, COUNTS, f"{item.question_id!r} (letters A to P for 0 to 15)")
    said = int(np.argmax(shares))
    return Verdict(float(said == item.gold), str(said), readable=True, detail={"probabilities": shares})


def _summary_counts(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Prismatic's split is `issimple` alone. The areas are over the answers that are there, and over the counts that
    occur as right answers (where one of 0 to 15 does not, the original stops)."""
    summary: dict[str, Any] = {}
    pairs = list(zip(items, verdicts, strict=True))
    for name, part in (
        ("simple", [(i, v) for i, v in pairs if i.meta["issimple"]]),
        ("complex", [(i, v) for i, v in pairs if not i.meta["issimple"]]),
        ("final", pairs),
    ):
        said = [(i.gold, v.detail["probabilities"]) for i, v in part if not v.missing and i.gold < COUNTS]
        gold, shares = [g for g, _ in said], [p for _, p in said]
        head = f"accuracy__TallyQA-{name}"
        summary[f"{head}-Accuracy"] = mean([v.score for _, v in part])
        summary[f"{head}-AUCROC"] = auc_roc(gold, shares)
        summary[f"{head}-AUCPR"] = auc_pr(gold, shares)
    return summary


def _counts_gold(item: Item) -> str:
    return json.dumps([float(k == item.gold) for k in range(COUNTS)])


# --- ten people's answers: VQAv2, TextVQA, VizWiz -------------------------------------------------------------------

Read = Callable[[Sequence[str], str], tuple[str, Sequence[str]]]
"""(the people's answers, the model's text) -> both as a lineage compares them."""


def soft_accuracy(said: str, people: Sequence[str]) -> float:
    """Mean over the people of min(1, how many of the OTHERS said the same / 3)."""
    same = people.count(said)
    # Only an answer that somebody gave has a score, so an empty text earns nothing unless somebody wrote nothing.
    return sum(min(1.0, (same - (answer == said)) / 3) for answer in people) / len(people)


def _soft(read: Read) -> Callable[[Item, str], Verdict]:
    def judge(item: Item, text: str) -> Verdict:
        said, people = read(item.gold, text)
        return Verdict(soft_accuracy(said, people), said, bool(said))

    return judge


def _alike(normal: Callable[[str], str]) -> Read:
    """Both sides through one normaliser."""
    return lambda people, text: (normal(text), [normal(answer) for answer in people])


def _read_official(people: Sequence[str], text: str) -> tuple[str, Sequence[str]]:
    """vqaEval.py: where all people agree to the letter, raw text is compared ("Yes" with ten "yes" earns nothing)."""
    said, lines = rules.one_line(text), [rules.one_line(answer) for answer in people]
    if len(set(lines)) == 1:
        return said, lines
    return rules.vqa(said), [rules.vqa(answer) for answer in lines]


def _read_lmms_vqav2(people: Sequence[str], text: str) -> tuple[str, Sequence[str]]:
    """lmms-eval's vqav2 at 75571cf: m4c on the prediction, then the VQA evaluation's steps on both. (Older copies leave
    them out where all people agree.)"""
    return rules.lmms_vqa(rules.m4c(text)), [rules.lmms_vqa(rules.one_line(answer)) for answer in people]


_marks_off = lru_cache(maxsize=rules.REMEMBERED)(rules.strip_punctuation)


def _read_trivlm(people: Sequence[str], text: str) -> tuple[str, Sequence[str]]:
    """TRI-ML's vqav2/eval.py: of the people's answers the punctuation alone."""
    return rules.lavis(text), [_marks_off(answer) for answer in people]


def _read_lavis(people: Sequence[str], text: str) -> tuple[str, Sequence[str]]:
    """LAVIS and Qwen-VL: of the people's answers the punctuation alone, and nothing where all agree."""
    return rules.lavis(text), [_marks_off(answer) for answer in people] if len(set(people)) > 1 else people


def _after_m4c(read: Read) -> Read:
    """The same on what LLaVA's and Bunny's converters submit: the number an evaluation server sees."""
    return lambda people, text: read(people, rules.m4c(text))


def _commonest(item: Item) -> str:
    return Counter(item.gold).most_common(1)[0][0]


def _summary_vqav2(
    overall: str, answer_types: str = "", question_types: str = "", round_to: Callable[[float], float] = float
) -> Callable[[Sequence[Item], Sequence[Verdict]], dict[str, Any]]:
    """Accuracy in percent under the lineage's names, rounded as it rounds."""

    def summary(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
        found: dict[str, Any] = {overall: round_to(percent(v.score for v in verdicts))}
        for name, key in ((answer_types, "answer_type"), (question_types, "question_type")):
            parts: dict[str, list[float]] = defaultdict(list)
            for item, verdict in zip(items, verdicts, strict=True):
                parts[item.meta[key]].append(verdict.score)
            if name:
                found[name] = {part: round_to(percent(parts[part])) for part in sorted(parts)}
        return found

    return summary


def _two_places(value: float) -> float:
    return round(value, 2)


def _two_places_up(value: float) -> float:
    """Python 2's round: a half goes away from zero."""
    return float(Decimal(value).quantize(Decimal("0.01"), ROUND_HALF_UP))


def _summary_textvqa(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    accuracy = percent(v.score for v in verdicts)
    return {"samples": len(items), "accuracy": accuracy, "accuracy_full_precision": accuracy}


def _summary_vizwiz(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    parts: dict[str, list[float]] = {"answerable": [], "unanswerable": []}
    for item, verdict in zip(items, verdicts, strict=True):
        parts["unanswerable" if item.meta["answer_type"] == "unanswerable" else "answerable"].append(verdict.score)
    scores = {name: {"n": len(part), "accuracy": 100 * mean(part)} for name, part in parts.items()}
    overall = percent(v.score for v in verdicts)
    return {"samples": len(items), "accuracy": overall, "overall": overall, **scores}


def _summary_vizwiz_api(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Parts by the file's `answerable`. The last two figures are of the prediction "unanswerable" as a yes or no; both
    are 0 where they are undefined, as scikit-learn has it."""
    pairs = list(zip(items, verdicts, strict=True))
    gold = [int(not i.meta["answerable"]) for i in items]
    said = [int(v.parsed == "unanswerable") for v in verdicts]
    both = sum(g and s for g, s in zip(gold, said, strict=True))
    head = "accuracy__VizWiz"
    return {
        f"{head}-Overall": percent((v.score for v in verdicts), 2),
        f"{head}-Answerable": percent((v.score for i, v in pairs if i.meta["answerable"]), 2),
        f"{head}-Unanswerable": percent((v.score for i, v in pairs if not i.meta["answerable"]), 2),
        f"{head}-Unanswerable-AvgPR": round(100 * (auc_pr(gold, said) or 0.0), 2),
        f"{head}-Unanswerable-F1": round(100 * f1(both, sum(said) - both, sum(gold) - both), 2),
    }


_VQA_TYPES = ("overall", "perAnswerType", "perQuestionType")

WORDS = {
    "gqa": Scorer(
        "GQA eval.py after LLaVA's converter (exact match)",
        _judge_gqa(gqa_prediction, str),
        lambda i: i.gold,
        _summary_gqa,
    ),
    "gqa_prismatic": Scorer(
        "GQA eval.py as Prismatic calls it (all ASCII punctuation taken out of the prediction)",
        _judge_gqa(rules.no_punctuation, str),
        lambda i: i.gold,
        _summary_gqa,
    ),
    "gqa_lmms_eval": Scorer(
        "GQA as in lmms-eval (exact match; case and ASCII punctuation ignored on both sides)",
        _judge_gqa(rules.no_punctuation, rules.no_punctuation),
        lambda i: i.gold,
        _summary_accuracy,
    ),
    "gqa_vlmevalkit": Scorer(
        "GQA as in VLMEvalKit (exact match but for case and blanks around; a period makes it wrong)",
        _judge_gqa(lambda text: text.strip().lower(), lambda text: text.strip().lower()),
        lambda i: i.gold,
        _summary_accuracy,
    ),
    "tally_qa_integers": Scorer(
        "TallyQA eval_simp_comp on integers; number words up to twenty are read too (our addition)",
        _judge_tallyqa,
        lambda i: str(i.gold),
        _summary_tallyqa,
    ),
    "tally_qa_probabilities": Scorer(
        "TallyQA as in Prismatic: the most probable of sixteen letters, A for 0 to P for 15",
        _judge_counts,
        _counts_gold,
        _summary_counts,
        reads="probabilities",
    ),
    "vqav2_official": Scorer(
        "VQAv2 vqaEval.py on the raw answers (where all ten people agree, to the letter)",
        _soft(_read_official),
        _commonest,
        _summary_vqav2(*_VQA_TYPES, _two_places_up),
    ),
    "vqav2_submission": Scorer(
        "VQAv2 vqaEval.py on what LLaVA's converter submits (m4c first): what an evaluation server sees",
        _soft(_after_m4c(_read_official)),
        _commonest,
        _summary_vqav2(*_VQA_TYPES, _two_places_up),
    ),
    "vqav2_trivlm": Scorer(
        "VQAv2 as in TRI-ML's vlm-evaluation (of the people's answers the punctuation alone)",
        _soft(_read_trivlm),
        _commonest,
        _summary_vqav2("accuracy", "accuracy-by-answer-type", "accuracy-by-question-type", _two_places),
    ),
    "vqav2_lavis": Scorer(
        "VQAv2 as in LAVIS and Qwen-VL (of the people's answers the punctuation alone, none where all agree)",
        _soft(_read_lavis),
        _commonest,
        _summary_vqav2(*_VQA_TYPES, _two_places),
    ),
    "vqav2_lmms_eval": Scorer(
        "VQAv2 as in lmms-eval (m4c on the prediction, then the VQA evaluation on both sides)",
        _soft(_read_lmms_vqav2),
        _commonest,
        _summary_vqav2("overall"),
    ),
    "vqav2_m4c": Scorer(
        "VQAv2 with m4c on both sides, as LLaVA's m4c_evaluator",
        _soft(_alike(rules.m4c)),
        _commonest,
        _summary_vqav2("overall"),
    ),
    "vqav2_vlmevalkit": Scorer(
        "VQAv2 as in VLMEvalKit (both sides normalised; a period after a digit stays)",
        _soft(_alike(rules.vlmevalkit)),
        _commonest,
        _summary_vqav2("overall"),
    ),
    "vizwiz": Scorer(
        "VizWiz soft accuracy as in lmms-eval (m4c on both sides)",
        _soft(_alike(rules.m4c)),
        _commonest,
        _summary_vizwiz,
    ),
    "vizwiz_api": Scorer(
        "VizWiz's own evaluation as in Prismatic (the people's answers are taken as they are)",
        _soft(lambda people, text: (rules.vizwiz_api(text), people)),
        _commonest,
        _summary_vizwiz_api,
    ),
    "vizwiz_api_submission": Scorer(
        "VizWiz's own evaluation on what LLaVA's converter submits (m4c first)",
        _soft(_after_m4c(lambda people, text: (rules.vizwiz_api(text), people))),
        _commonest,
        _summary_vizwiz_api,
    ),
    "textvqa": Scorer(
        "TextVQA m4c soft accuracy as in LLaVA and Bunny",
        _soft(_alike(rules.m4c)),
        _commonest,
        _summary_textvqa,
    ),
    "textvqa_lmms_eval": Scorer(
        "TextVQA as in lmms-eval (m4c on both sides)",
        _soft(_alike(rules.m4c)),
        _commonest,
        _summary_textvqa,
    ),
    "textvqa_vlmevalkit": Scorer(
        "TextVQA as in VLMEvalKit (both sides normalised; a period after a digit stays)",
        _soft(_alike(rules.vlmevalkit)),
        _commonest,
        _summary_textvqa,
    ),
}
