"""Answers to look through beside their pictures: filters, search and paging in one small script of the page's own.

The cards stand in the page as they are; the script (`gallery.js`) only hides and shows them, so that nothing is missing
without it. A link keeps what is shown: `report.html#answers?task=pope&show=wrong`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from leveret import pages

CARDS = 480
"""Cards of one page, over all tasks."""
BYTES = 2_500_000
"""Of the pictures in them, as they stand in the page: a page with the rest stays under a few megabytes."""
SIDE = 160
"""Pixels of a thumbnail's longer side."""


@dataclass(frozen=True, slots=True)
class Card:
    """One answer.

    kinds    keys of the filter that it passes, the first is shown as its badge in colour.
    words    what is told under the picture, lines apart.
    picture  makes the picture, once the card is chosen; None for a question without one.
    key      what decides which cards are shown where there are too many: the question's id.
    """

    task: str
    kinds: tuple[str, ...]
    words: str
    picture: Callable[[], Any] | None
    key: str


@cache
def script() -> str:
    """What the page must run: `pages.page(..., script=script())`."""
    return (Path(__file__).parent / "gallery.js").read_text("utf-8")


def browse(cards: Iterable[Card], kinds: Mapping[str, str], name: str = "answers") -> list[Markup | str]:
    """A sentence on how many are shown of how many, and the cards with their filters.

    kinds  key -> its words in the filter and on the badges.
    name   the part of the page, in links to it.

    At most CARDS cards, whose pictures take at most BYTES: shared out over tasks, then over the kinds of answers, then
    by the hash of the id; a picture is made only of what is shown."""
    every = list(cards)
    taken: list[tuple[Card, Markup]] = []
    spent = 0
    for card in _chosen(every, min(CARDS, len(every))):
        image = Markup()
        if card.picture is not None:
            image = pages.thumbnail(card.picture(), card.words.split("\n")[0] or "picture", SIDE)
            spent += len(image)
            if spent > BYTES:
                break
        taken.append((card, image))
    order = {card.task: number for number, card in reversed(list(enumerate(every)))}
    taken.sort(key=lambda pair: order[pair[0].task])
    told = (
        (f"All {len(every):,} answers." if every else "There are none.")
        if len(taken) == len(every)
        else f"{len(taken):,} of {len(every):,} answers, chosen by kind and question id; all are in items/."
    )
    inner = Markup("\n").join(_card(card, image, kinds) for card, image in taken)
    box = Markup('<div class="browse" id="{}" data-kinds="{}"><ul class="gallery">{}</ul></div>')
    present = {kind for card, _ in taken for kind in card.kinds}
    return [told, box.format(name, json.dumps({key: kinds[key] for key in kinds if key in present}), inner)]


def _chosen(cards: Sequence[Card], n: int) -> list[Card]:
    """Turn about over tasks, inside a task over its kinds, inside a kind by the hash of the id."""
    queues: dict[str, dict[tuple[str, ...], list[Card]]] = {}
    for card in sorted(cards, key=lambda card: hashlib.sha256(card.key.encode()).digest()):
        queues.setdefault(card.task, {}).setdefault(card.kinds, []).append(card)
    chosen: list[Card] = []
    while len(chosen) < n:
        for task in sorted(queues):
            kinds = queues[task]
            if kinds and len(chosen) < n:
                kind = next(iter(kinds))
                queue = kinds.pop(kind)
                chosen.append(queue.pop(0))
                if queue:
                    kinds[kind] = queue  # to the end of the line
    return chosen


SILENT = ("flip",)
"""Kinds to filter by that other badges tell already."""
GOOD, BAD = ("right", "wrong_to_right"), ("wrong", "right_to_wrong")


def _card(card: Card, image: Markup, kinds: Mapping[str, str]) -> Markup:
    tone = "good" if card.kinds[0] in GOOD else "bad" if card.kinds[0] in BAD else ""
    badges = Markup(" ").join(
        Markup('<span class="badge {}">{}</span>').format("" if number else tone, kinds[kind])
        for number, kind in enumerate(card.kinds)
        if kind in kinds and kind not in SILENT
    )
    picture = Markup('<div class="pic">{}</div>').format(image) if image else Markup()
    return Markup(
        '<li class="{}" data-task="{}" data-kinds="{}">{}<div class="words">{}<br><small>{}</small>\n{}</div></li>'
    ).format(tone, card.task, " ".join(card.kinds), picture, badges, card.task, card.words)
