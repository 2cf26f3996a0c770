"""How a rule asks a judge: the next request as a function of the replies so far. Nothing is sent from here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from leveret.evaluate.forms.base import Item
from leveret.evaluate.scorers.base import Scorer, Verdict
from leveret.runs import RecipeError


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to a judge, all but the judge's name."""

    messages: tuple[Mapping[str, str], ...]
    temperature: float
    max_tokens: int

    def body(self, model: str) -> dict[str, Any]:
        """What is posted to /chat/completions."""
        return {
            "model": model,
            "messages": [dict(message) for message in self.messages],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }


@dataclass(frozen=True, slots=True)
class Judging:
    """A rule's talk with a judge about one answer.

    model  the judge that the published figures were made with; figures of two judges cannot be compared.
    ask    (item, the model's text, the replies so far) -> what to ask next, None where the replies are enough.
    read   (item, the model's text, all replies) -> Verdict.
    most   requests about one answer, at most.
    record (items, question_id -> replies, question_id -> the answer's own id) -> the benchmark's own file of what the
           judge said: a dictionary is written as JSON, a list as JSON lines.
    worth  (items, question_id -> the model's text) -> the ids that are asked about; about the others `read` is given no
           reply. None: all of them.
    """

    model: str
    ask: Callable[[Item, str, Sequence[str]], Ask | None]
    read: Callable[[Item, str, Sequence[str]], Verdict]
    most: int
    record: Callable[[Sequence[Item], Mapping[str, Sequence[str]], Mapping[str, Any]], Any]
    worth: Callable[[Sequence[Item], Mapping[str, str]], Collection[str]] | None = None


UNJUDGED = Verdict(0.0, None, readable=False, detail={"unjudged": 1.0})
"""An answer about which no judge said anything; counted, and named, wherever it occurs."""


NEEDED = (
    "its rule asks a language model to judge. Name one with --judge URL and --judge-model NAME, or give kept replies "
    "with --replay FILE; --dry-run writes the requests and what they cost. Answers are never compared word by word "
    "instead."
)


def unbound(item: Item, text: str) -> Verdict:
    """The `judge` of a rule that needs a judge, before it has one."""
    raise RecipeError(f"This task cannot be scored yet: {NEEDED}")


def bound(scorer: Scorer, replies: Mapping[str, Sequence[str]]) -> Scorer:
    """The rule with a judge's replies in it: question_id -> all replies about it. What is not there is UNJUDGED."""
    judging = scorer.judging
    assert judging is not None, "a rule without a judge needs no replies"

    def judge(item: Item, text: str) -> Verdict:
        said = replies.get(item.question_id)
        return UNJUDGED if said is None else judging.read(item, text, said)

    return replace(scorer, judge=judge)


@cache
def judge_text(name: str) -> str:
    """The wording that goes to a judge, to the letter as its authors have it; package data, for its lines are long."""
    file = resources.files("leveret.evaluate") / "judge_texts" / f"{name}.txt"
    return file.read_text(encoding="utf-8").removesuffix("\n")
