"""Questions that are answered by the probabilities of their options, in one pass over the prompt.

Prismatic's rule (TRI-ML's vlm-evaluation): the softmax of the first answer token's logits, over the options alone.
There every option is one token. Here it is the first token in which all options differ (`generate.Request.choices`),
which is the same where they are one token each, and works where a tokenizer writes a blank of its own before a letter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from leveret.evaluate.forms import Item
from leveret.evaluate.tasks import TaskRow, rule_of
from leveret.records import Prediction
from leveret.runs import RecipeError

Options = Callable[[Item], tuple[str, ...]]


def options_of(row: TaskRow, rule: str | None) -> Options | None:
    """What an item's probabilities are asked for, where the rule reads them; None where it reads what was said.

    RecipeError where the task names no options, or has no such rule.
    """
    name, scorer = rule_of(row, rule)
    if scorer.reads != "probabilities":
        return None
    given = row.options
    if not given:
        raise RecipeError(
            f"The rule {name!r} of {row.id!r} judges probabilities, and the task names no options to choose between; "
            "answers that hold probabilities can be scored by `leveret score`."
        )
    return given if callable(given) else lambda item: given


def chosen(prediction: Prediction, options: tuple[str, ...]) -> dict[str, Any]:
    """What an answer file holds besides: the options, and their probabilities in this order."""
    if prediction.choices is None:
        raise RuntimeError(f"the engine gave no probabilities for {prediction.question_id!r}")
    return {"probabilities": [prediction.choices[option] for option in options], "options": list(options)}


@dataclass(frozen=True, slots=True)
class Answered:
    """What came to the questions: question_id -> text for people, and what the rule reads."""

    texts: dict[str, str]
    read: dict[str, str]

    @classmethod
    def of(cls, answers: Iterable[Mapping[str, Any]], names: Iterable[str], by_options: bool) -> Answered:
        """From the lines of an answer file."""
        by = {str(answer["question_id"]): answer for answer in answers}
        texts = {name: str(by[name]["text"]) for name in names}
        return cls(texts, {name: json.dumps(by[name]["probabilities"]) for name in texts} if by_options else texts)
