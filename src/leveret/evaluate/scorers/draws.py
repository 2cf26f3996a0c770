"""What becomes of an answer in which a rule finds nothing, where the original draws one at random."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from leveret.evaluate.forms.base import Item
from leveret.evaluate.scorers.base import Verdict, mean

SEED = 42
"""The seed of both MMMU's and CMMMU's scripts."""

Draw = Callable[[Item, Sequence[str]], str | None]
"""(item, what is drawn from) -> one of them; None leaves the answer unread, and wrong."""


def by_id(item: Item, offered: Sequence[str]) -> str | None:
    """Decided by a hash of the question's id: no order, no company and no other answer changes it."""
    digest = hashlib.sha256(f"{SEED}/{item.question_id}".encode()).digest()
    return offered[int.from_bytes(digest[:8], "big") % len(offered)] if offered else None


def never(item: Item, offered: Sequence[str]) -> str | None:
    return None


def official(seed: int = SEED) -> Draw:
    """Python's generator, seeded once: the draws depend on the order of the calls."""
    generator = random.Random(seed)

    def draw(item: Item, offered: Sequence[str]) -> str | None:
        return generator.choice(list(offered)) if offered else None

    return draw


def drawn(item: Item, offered: Sequence[str], draw: Draw) -> Verdict:
    """The verdict on an unreadable answer. `fallback` counts it; `possible`: some draw would be right."""
    said = draw(item, offered)
    golds = item.gold if isinstance(item.gold, list) else [item.gold]
    detail = {"fallback": 1.0, "possible": float(any(gold in offered for gold in golds))}
    return Verdict(float(said is not None and said in golds), said, readable=False, detail=detail)


def facts(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Which answers fell back, and between which scores all draws lie."""
    fallen = [(i, v) for i, v in zip(items, verdicts, strict=True) if v.detail.get("fallback")]
    sure = sum(v.score for v in verdicts) - sum(v.score for _, v in fallen)
    most = sure + sum(v.detail["possible"] for _, v in fallen)
    n = max(len(verdicts), 1)
    return {"fallback_ids": sorted(i.question_id for i, _ in fallen), "any_seed_bounds": [sure / n, most / n]}


def in_order(
    judge: Callable[[Item, str, Draw], Verdict], order: Callable[[Sequence[Item], Mapping[str, str]], list[Item]]
) -> Callable[[Sequence[Item], Mapping[str, str]], list[Verdict]]:
    """A rule that draws as the original does, in the order in which it comes to the answers."""

    def together(items: Sequence[Item], texts: Mapping[str, str]) -> list[Verdict]:
        draw = official()
        answered = [item for item in items if item.question_id in texts]
        found = {item.question_id: judge(item, texts[item.question_id], draw) for item in order(answered, texts)}
        missing = Verdict(0.0, None, readable=False, missing=True)
        return [found.get(item.question_id, missing) for item in items]

    return together


def as_answered(items: Sequence[Item], texts: Mapping[str, str]) -> list[Item]:
    """The order of the answer file."""
    place = {name: number for number, name in enumerate(texts)}
    return sorted(items, key=lambda item: place[item.question_id])


def share(verdicts: Sequence[Verdict]) -> float:
    return mean([verdict.score for verdict in verdicts])
