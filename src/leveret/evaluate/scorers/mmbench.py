"""MMBench: a question is right when it is in every order of its options."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from leveret.evaluate.forms.base import Item
from leveret.evaluate.forms.mmbench import ROUND
from leveret.evaluate.letters import by_priority, can_infer, can_infer_earlier
from leveret.evaluate.scorers.asking import unbound
from leveret.evaluate.scorers.base import Scorer, Verdict, mean
from leveret.evaluate.scorers.leftovers import NONE, judging, undecided

ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
"""VLMEvalKit's names of MMBench's six abilities."""


def _judge_inferred(item: Item, text: str) -> Verdict:
    said = can_infer(text, item.meta["texts"])
    return Verdict(float(said == item.gold), said, said not in (None, "Z"))


def _judge_static(item: Item, text: str) -> Verdict:
    said = can_infer_earlier(text, item.meta["texts"]) or by_priority(text, tuple("ABCD"))
    return Verdict(float(said == item.gold), said, said is not None)


def circular(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Question -> 1 where all its rotations that were asked are right, else 0."""
    hits: dict[str, float] = {}
    for item, verdict in zip(items, verdicts, strict=True):
        whole = item.meta["whole"]
        hits[whole] = min(hits.get(whole, 1.0), float(verdict.score == 1.0))
    return hits


def _by(items: Sequence[Item], hits: Mapping[str, float], key: str) -> dict[str, float]:
    """Mean over the questions of each category (or ability)."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for item in items:
        if item.meta[key]:
            found[item.meta[key]][item.meta["whole"]] = hits[item.meta["whole"]]
    return {name: mean(list(found[name].values())) for name in sorted(found)}


def _first(items: Sequence[Item], verdicts: Sequence[Verdict]) -> float:
    return mean([v.score for i, v in zip(items, verdicts, strict=True) if i.meta["index"] < ROUND])


def _counts(items: Sequence[Item], hits: Mapping[str, float]) -> dict[str, int]:
    return {"questions": len(hits), "rows": len(items)}


def _summary_circular(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """report_acc: over all questions, the six abilities by their abbreviations, the categories."""
    hits = circular(items, verdicts)
    abilities = {ABBREVIATIONS.get(name, name): value for name, value in _by(items, hits, "l2").items()}
    overall = {"Overall": mean(list(hits.values()))}
    return overall | abilities | _by(items, hits, "category") | _counts(items, hits)


def _summary_vanilla(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {"all_rows": mean([v.score for v in verdicts]), "first_rotation": _first(items, verdicts)}


def _summary_static(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    hits = circular(items, verdicts)
    return {
        "circular": mean(list(hits.values())),
        "first_rotation": _first(items, verdicts),
        "l2_category": _by(items, hits, "l2"),
        "category": _by(items, hits, "category"),
        **_counts(items, hits),
    }


def _together(judge: Callable[[Item, str], Verdict]) -> Callable[[Sequence[Item], Mapping[str, str]], list[Verdict]]:
    """Each row by itself; `circular_hit` says whether its question is right in every order."""

    def together(items: Sequence[Item], texts: Mapping[str, str]) -> list[Verdict]:
        missing = Verdict(0.0, None, readable=False, missing=True)
        verdicts = [judge(i, texts[i.question_id]) if i.question_id in texts else missing for i in items]
        hits = circular(items, verdicts)
        return [
            Verdict(v.score, v.parsed, v.readable, v.missing, {"circular_hit": hits[i.meta["whole"]]})
            for i, v in zip(items, verdicts, strict=True)
        ]

    return together


def _leftovers(items: Sequence[Item], texts: Mapping[str, str]) -> list[str]:
    """Rows from which no letter was read, of questions that are right so far."""
    groups: dict[str, list[str]] = defaultdict(list)
    for item in items:
        groups[item.meta["whole"]].append(item.question_id)
    # An answer that is missing is wrong, and so is its question.
    read = {i.question_id: can_infer(texts.get(i.question_id, NONE), i.meta["texts"]) for i in items}
    return undecided(groups.values(), read, {item.question_id: item.gold for item in items})


MMBENCH = {
    "mmbench_circular": Scorer(
        "MMBench as in VLMEvalKit without a judge (can_infer): right in every order of the options",
        _judge_inferred,
        lambda i: str(i.gold),
        _summary_circular,
        together=_together(_judge_inferred),
    ),
    "mmbench_judged": Scorer(
        "MMBench as in VLMEvalKit with a judge: can_infer, and what it cannot read is asked of a language model where "
        "the question is right so far; right in every order of the options",
        unbound,
        lambda i: str(i.gold),
        _summary_circular,
        judging=judging(lambda i: i.meta["cells"]["question"], lambda i: i.meta["texts"], can_infer, _leftovers),
    ),
    "mmbench_vanilla": Scorer(
        "MMBench row by row, as in VLMEvalKit without a judge (can_infer): every order by itself",
        _judge_inferred,
        lambda i: str(i.gold),
        _summary_vanilla,
        headline="accuracy",
    ),
    "mmbench_static": Scorer(
        "MMBench as in lmms-eval without a judge (mmbench_en_dev_static): right in every order of the options",
        _judge_static,
        lambda i: str(i.gold),
        _summary_static,
        together=_together(_judge_static),
    ),
}
