"""Our own rules: descriptions, and a user's own questions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from leveret.evaluate import text as rules
from leveret.evaluate.forms.base import Item
from leveret.evaluate.scorers.base import Scorer, Verdict, mean

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


OWN = {
    "own": Scorer(
        "the same words as the recorded answer; case, articles, punctuation and digits for number words do not matter",
        _judge_own,
        lambda i: i.gold,
        _summary_own,
    ),
    "phrases": Scorer(
        "share of the reference's phrases, between its commas, that the answer holds; what it adds costs nothing "
        "(our own rule)",
        _judge_phrases,
        lambda i: i.gold,
        _summary_own,
    ),
}
