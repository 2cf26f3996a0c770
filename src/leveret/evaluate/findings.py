"""What the page shows of one task: chosen examples, their pictures, and which answers are confused."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leveret.evaluate import text as rules
from leveret.evaluate.forms import Item
from leveret.evaluate.scorers import Verdict

if TYPE_CHECKING:
    from PIL.Image import Image

    from leveret.evaluate.run import Examined

KINDS_SHOWN = 12
"""A confusion table has at most so many right answers; tasks with more show their commonest mistakes."""
RIGHT = 0.9
"""An answer that earns less is shown as a failure. Soft rules give .9 to what three of ten people said."""
PICTURE = 256
"""Pixels of the longer side of a picture with boxes: drawn on 64 pixels, their lines would hide the objects."""
GOLD, SAID, RIM = (0, 160, 70), (225, 40, 30), (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its answer, chosen to be looked at."""

    item: Item
    text: str
    verdict: Verdict
    gold: str


def examples(task: Examined, failures: int = 8, successes: int = 4) -> tuple[list[Example], list[Example]]:
    """Failures and successes with a picture, chosen by their ids alone: wordings in turn, no picture twice.

    What is not wholly right is a failure, where the rule is soft (TextVQA's) what most people's answers earn is right.
    """
    rule = task.scorer
    found: tuple[list[Example], list[Example]] = ([], [])
    for item, verdict in zip(task.items, task.verdicts, strict=True):
        if item.image is None:
            continue
        example = Example(item, task.texts.get(item.question_id, ""), verdict, rule.gold(item))
        found[verdict.score >= RIGHT].append(example)
    return _spread(found[False], failures), _spread(found[True], successes)


def _spread(some: Sequence[Example], n: int) -> list[Example]:
    ordered = sorted(some, key=lambda e: hashlib.sha256(e.item.question_id.encode()).digest())
    first: dict[str, Example] = {}
    for example in ordered:
        first.setdefault(example.item.meta["image_id"], example)
    queues: dict[str, list[Example]] = {}
    for example in first.values():
        queues.setdefault(example.item.template, []).append(example)
    chosen: list[Example] = []
    while queues and len(chosen) < n:
        for template in sorted(queues):
            if len(chosen) < n:
                chosen.append(queues[template].pop(0))
            if not queues[template]:
                del queues[template]
    return chosen


def picture(example: Example) -> Image:
    """The example's picture; for box tasks with the right box (green) and the said one (red) drawn in."""
    from PIL import Image, ImageDraw

    from leveret.images import load

    assert example.item.image is not None, "examples() only chooses questions with a picture"
    image = load(example.item.image)
    gold = example.item.gold
    if not (isinstance(gold, list) and len(gold) == 4 and all(isinstance(number, (int, float)) for number in gold)):
        return image
    scale = PICTURE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(image)
    for box, colour in ((gold, GOLD), (rules.box(example.text), SAID)):
        if box is not None:
            x0, y0, x1, y1 = (n * side for n, side in zip(box, (*size, *size), strict=True))
            # A light rim keeps the line apart from objects of its own colour.
            pen.rectangle([x0 - 2, y0 - 2, max(x0, x1 - 1) + 2, max(y0, y1 - 1) + 2], outline=RIM, width=7)
            pen.rectangle([x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)], outline=colour, width=3)
    return image


def confusion(task: Examined) -> tuple[list[str], list[list[Any]]] | None:
    """Header and rows of right answers against said ones, commonest first; None where there are too many kinds."""
    rule = task.scorer
    spelling = {rule.gold(item).lower(): rule.gold(item) for item in task.items}
    if not 2 <= len(spelling) <= KINDS_SHOWN:
        return None
    pairs = Counter((rule.gold(i).lower(), said(v)) for i, v in zip(task.items, task.verdicts, strict=True))
    golds = Counter(rule.gold(item).lower() for item in task.items)
    if all(name.isdecimal() for name in golds):
        names = sorted(golds, key=int)
    elif all(len(name) == 1 for name in golds):
        names = sorted(golds)
    else:
        names = sorted(golds, key=lambda name: (-golds[name], name))
    rows: list[list[Any]] = []
    for name in names:
        found = [pairs[name, answer] for answer in names]
        rows.append([spelling[name], *found, golds[name] - sum(found), golds[name]])
    return ["right answer", *(spelling[name] for name in names), "other", "in all"], rows


def said(verdict: Verdict) -> str:
    return "(nothing readable)" if verdict.parsed is None else verdict.parsed.lower()


def mistakes(task: Examined, n: int = 8) -> list[list[Any]]:
    """The commonest (right answer, said instead, how often)."""
    rule = task.scorer
    wrong = Counter(
        (rule.gold(item), said(verdict))
        for item, verdict in zip(task.items, task.verdicts, strict=True)
        if verdict.score < RIGHT
    )
    return [[gold, answer, count] for (gold, answer), count in sorted(wrong.items(), key=lambda p: (-p[1], p[0]))[:n]]


def overlaps(task: Examined) -> list[float]:
    """IoU of every readable box with the right one; empty for tasks without boxes."""
    return [verdict.detail["iou"] for verdict in task.verdicts if "iou" in verdict.detail]
