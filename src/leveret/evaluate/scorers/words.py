"""Rules over words, phrases and numbers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from leveret.evaluate import text as rules
from leveret.evaluate.forms.base import Item
from leveret.evaluate.scorers.base import Scorer, Verdict, mean

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


WORDS = {
    "gqa": Scorer("GQA eval.py after LLaVA's converter (exact match)", _judge_gqa, lambda i: i.gold, _summary_gqa),
    "tally_qa_integers": Scorer(
        "TallyQA eval_simp_comp on integers; number words up to twenty are read too (our addition)",
        _judge_tallyqa,
        lambda i: str(i.gold),
        _summary_tallyqa,
    ),
    "vizwiz": Scorer(
        "VizWiz soft accuracy as in lmms-eval (m4c on both sides)",
        _judge_textvqa,
        _commonest,
        _summary_vizwiz,
    ),
    "textvqa": Scorer(
        "TextVQA m4c soft accuracy as in LLaVA and Bunny",
        _judge_textvqa,
        _commonest,
        _summary_textvqa,
    ),
}
