"""MME: yes or no, twice a picture, in points."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from leveret.evaluate import text as rules
from leveret.evaluate.forms.base import Item
from leveret.evaluate.forms.mme import COGNITION, PERCEPTION, SUBTASKS
from leveret.evaluate.scorers.base import Scorer, Verdict, mean


def mme_word(text: str) -> str | None:
    """calculation.py of MME: in lower case, yes or no within the first four characters, yes first; None is "other".

    So "know", "none" and "nope" are no, and "the answer is yes" is neither."""
    head = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in head), None)


def first_line(text: str) -> str:
    """All that is left of an answer of several lines in the file that Bunny writes for MME's tool."""
    return text.replace("\r", "\n").split("\n")[0]


def one_line(text: str) -> str:
    return text.replace("\r", " ").replace("\n", " ").strip()


def lmms_word(text: str) -> str | None:
    """lmms-eval: blanks at the ends and all periods go; "y" and "n" alone count."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) if len(text) == 1 else mme_word(text)


def _judge(word: Callable[[str], str | None]) -> Callable[[Item, str], Verdict]:
    def judge(item: Item, text: str) -> Verdict:
        said = word(text)
        return Verdict(float(said == item.gold), said or "other", said is not None)

    return judge


def points(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Subtask -> 0..200: 100 x the share of right answers + 100 x the share of pictures with both right.

    Pairs are the two questions of a picture, wherever they stand; originals take consecutive lines."""
    by_picture: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item, verdict in zip(items, verdicts, strict=True):
        by_picture[item.meta["group"]][item.meta["image_id"]].append(verdict.score)
    return {
        subtask: 100 * mean([score for scores in pictures.values() for score in scores])
        + 100 * mean([float(min(scores)) for scores in pictures.values()])
        for subtask in SUBTASKS
        if (pictures := by_picture.get(subtask))
    }


def _summary(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    table = points(items, verdicts)
    return {
        name: {"total": sum(part.values()), "subtasks": part}
        for name, subtasks in (("Perception", PERCEPTION), ("Cognition", COGNITION))
        if (part := {subtask: table[subtask] for subtask in subtasks if subtask in table})
    }


def _summary_vlmevalkit(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    table = points(items, verdicts)
    groups = (("perception", PERCEPTION), ("reasoning", COGNITION))
    return {name: sum(table.get(subtask, 0.0) for subtask in subtasks) for name, subtasks in groups} | table


def _gold(item: Item) -> str:
    return "Yes" if item.gold == "yes" else "No"


MME = {
    "mme": Scorer(
        "MME's calculation.py as in Bunny: yes or no in the first four characters of the first line",
        _judge(lambda text: mme_word(first_line(text))),
        _gold,
        _summary,
    ),
    "mme_one_line": Scorer(
        "MME's tool on answers made one line each: yes or no in the first four characters",
        _judge(lambda text: mme_word(one_line(text))),
        _gold,
        _summary,
    ),
    "mme_lmms": Scorer(
        "MME as in lmms-eval: blanks and periods stripped first, y and n count",
        _judge(lmms_word),
        _gold,
        _summary,
    ),
    "mme_vlmevalkit": Scorer(
        "MME as in VLMEvalKit without a judge: the word yes or the word no anywhere, not both",
        _judge(lambda text: rules.one_of(text, "yes", "no")),
        _gold,
        _summary_vlmevalkit,
    ),
}
