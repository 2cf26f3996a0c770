"""What all rules share: what is made of one answer, and what a rule must say of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from leveret.evaluate.forms.base import Item

if TYPE_CHECKING:
    from leveret.evaluate.scorers.asking import Judging


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule made of one answer.

    score     0..1.
    parsed    the answer as the rule read it, as text; None where it read nothing.
    readable  False where the text holds nothing the rule looks for (the rule may still count it as an answer).
    missing   there was no answer at all.
    detail    more of the rule's findings (`iou`, `probabilities`).
    """

    score: float
    parsed: str | None
    readable: bool
    missing: bool = False
    detail: Mapping[str, Any] = field(default_factory=dict)


MISSING = Verdict(0.0, None, readable=False, missing=True)


@dataclass(frozen=True, slots=True)
class Scorer:
    """One rule.

    rule     where it comes from, in words; printed beside every score.
    judge    (item, the model's text) -> Verdict.
    gold     the right answer as a text that `judge` would accept: shown to people, and a candidate constant answer.
    summary  the official figures under their official names and in their official scale.
    reads    what of an answer it judges: its `text`, its `probabilities` (of the options, in their order, as JSON), or
             its `answer`, already parsed.
    headline row of HEADLINES, where its one figure is another than the task's.
    together (items, question_id -> text in the answers' order) -> verdicts, for rules in which answers depend on each
             other; `judge` is then what the rule makes of one answer alone.
    judging  how a language model is asked, where the rule needs one; `judge` works once it is `asking.bound`.
    """

    rule: str
    judge: Callable[[Item, str], Verdict]
    gold: Callable[[Item], str]
    summary: Callable[[Sequence[Item], Sequence[Verdict]], Any]
    reads: str = "text"
    headline: str = ""
    together: Callable[[Sequence[Item], Mapping[str, str]], list[Verdict]] | None = None
    judging: Judging | None = None


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
