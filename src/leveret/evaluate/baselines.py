"""What a score is held against: chance, and the best constant answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from leveret.evaluate.forms import Item
from leveret.evaluate.headlines import HEADLINES, PLAIN
from leveret.evaluate.scorers import Scorer, Verdict
from leveret.evaluate.stats import TRIED, best_constants
from leveret.evaluate.tasks import TaskRow, load_items
from leveret.runs import DataError

WORDS = ({"yes", "no"}, {"true", "false"})
"""Right answers that are one of two words: who guesses says either."""
DRAWS = 64
"""Guesses a question, where the headline is no plain share (F1, both questions of a picture right)."""


@dataclass(frozen=True, slots=True)
class Constants:
    """The best constant answers of a task.

    answers  wording -> answer, "" -> over all wordings; empty where there are none.
    of       "train": chosen on the train twin. "test": on the very questions that are scored, for want of a twin, so
             it is about the most that a constant answer gets, and a little more than one could have known.
    why      why they are not of the train twin.
    """

    answers: Mapping[str, str] = field(default_factory=dict)
    of: str | None = None
    why: str | None = None


def constants(row: TaskRow, root: str | Path, scorer: Scorer, items: Sequence[Item]) -> Constants:
    """The best constant answer per wording, chosen on the train twin where there is one, else on `items`."""
    try:
        train = load_items(row, root, "train")
        if any(map(_unknown, train)):
            raise DataError(f"The split train of {row.id!r} has questions without a known answer.")
        # Files whose names tell no split are found for every split.
        if {_asked(item) for item in items} <= {_asked(item) for item in train}:
            why = f"what is found as the split train of {row.id!r} holds questions that are scored"
        else:
            return Constants(_best(row, scorer, train), "train")
    except DataError as fault:
        why = str(fault)
    if any(_unknown(item) or not scorer.gold(item) for item in items):
        return Constants(why=f"{why} And not every question has a known answer.")
    return Constants(_best(row, scorer, items), "test", why)


def _best(row: TaskRow, scorer: Scorer, items: Sequence[Item]) -> dict[str, str]:
    """Per wording the commonest right answer; where the headline is no share of right answers, the one of the commonest
    that it is highest for (always yes has an F1 of two thirds, always no has none)."""
    found = best_constants(items, scorer)
    headline = HEADLINES[scorer.headline or row.headline]
    if (scorer.headline or row.headline) in PLAIN:
        return found

    def figure(answer: str) -> float:
        columns = headline.columns(items, [scorer.judge(item, answer) for item in items])
        return float(headline.figure(columns.sum(0)))

    common = Counter(scorer.gold(item) for item in items).most_common(TRIED)
    best = max(sorted(answer for answer, _ in common), key=figure)
    return dict.fromkeys(found, best)


def _unknown(item: Item) -> bool:
    """Whether the right answer is not published (a test split that a server scores)."""
    return item.gold is None or (isinstance(item.gold, str | list) and not item.gold)


def _asked(item: Item) -> tuple[str, str, str]:
    """What tells a question from those of another split, whose ids may be the same."""
    return item.question_id, item.meta["image_id"], item.prompt


def chance(headline: str, items: Sequence[Item], scorer: Scorer, *, seed: int = 0) -> float | None:
    """What somebody scores who picks one of the offered answers blindly, 0..1; None where nothing is offered.

    Offered are the item's options (`meta["choices"]`: how many; `meta["texts"]`: letter -> text), or the two words
    where all right answers are yes and no, or true and false. A question without options among others that have some
    (MMMU's open ones) is never guessed right. Exact where the headline is a share of right answers, else the headline
    of 64 seeded guesses a question, taken together.
    """
    offered = [_options(item, scorer) for item in items]
    words_only = not any(offered) and not any(map(_unknown, items))
    golds = {scorer.gold(item).lower() for item in items} if words_only else set()
    for words in WORDS:
        if golds and golds <= words:
            offered = [tuple(sorted({scorer.gold(item) for item in items} | _other(golds, words)))] * len(items)
    if sum(map(bool, offered)) * 2 < len(items):
        return None
    row = HEADLINES[headline]
    if headline in PLAIN:
        verdicts = [Verdict(1 / len(names) if names else 0.0, None, True) for names in offered]
        return float(row.figure(row.columns(items, verdicts).sum(0)))
    judged = [
        [scorer.judge(item, text) for text in _texts(names, scorer)] or [Verdict(0.0, None, False)]
        for item, names in zip(items, offered, strict=True)
    ]
    rng = Random(seed)
    sums = [row.columns(items, [rng.choice(some) for some in judged]).sum(0) for _ in range(DRAWS)]
    return float(row.figure(np.mean(sums, axis=0)))


def _options(item: Item, scorer: Scorer) -> tuple[str, ...]:
    if scorer.reads == "probabilities":  # its right answer is written as the probabilities of all options
        return tuple(map(str, range(len(json.loads(scorer.gold(item))))))
    choices = item.meta.get("choices") or item.meta.get("texts")
    if isinstance(choices, Mapping):
        return tuple(map(str, choices))
    count = len(choices) if isinstance(choices, Collection) and not isinstance(choices, str) else choices
    return tuple(chr(ord("A") + k) for k in range(count)) if isinstance(count, int) and count > 1 else ()


def _other(golds: set[str], words: set[str]) -> set[str]:
    """The second word, where every right answer happens to be the first."""
    return words - golds if len(golds) == 1 else set()


def _texts(names: Sequence[str], scorer: Scorer) -> list[str]:
    if scorer.reads == "probabilities":
        return [json.dumps([float(k == at) for k in range(len(names))]) for at in range(len(names))]
    return list(names)
