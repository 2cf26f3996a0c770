"""What a score is worth: intervals, the best constant answer, and the pairing of questions with other pictures."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np

from leveret.evaluate.forms import Item
from leveret.evaluate.headlines import HEADLINES, Array
from leveret.evaluate.scorers import Scorer, Verdict
from leveret.records import ImageRef

RESAMPLES = 2000
CONSTANT_SAMPLE = 400
"""Train questions on which candidate constant answers are tried where answers are nearly all different (boxes)."""

COMMON, TRIED, LOOKED_AT = 64, 8, 8
"""Commonest answers whose questions are looked at, those of them that may be the best constant, and how many questions
of each answer are looked at, to find texts that a rule takes for one."""


def headline(name: str, items: Sequence[Item], verdicts: Sequence[Verdict]) -> float:
    """The figure that a task is known by, 0..1."""
    row = HEADLINES[name]
    return float(row.figure(row.columns(items, verdicts).sum(0)))


def interval(
    name: str, items: Sequence[Item], verdicts: Sequence[Verdict], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % bootstrap interval of the headline, resampling pictures, not questions.

    Questions on one picture fail together, so they are drawn together: the spread between pictures is what another
    test set would show. Percentiles 2.5 and 97.5 of `resamples` draws. Where all pictures earn the same every draw is
    the same and would claim certainty; there it goes as far as pictures that were not met could move it, by Clopper
    and Pearson's (1934) bound for none of so many. Where all are right, or all wrong, that is their exact interval.
    """
    row = HEADLINES[name]
    images = [item.meta["image_id"] for item in items]
    some = draws(images, [row.columns(items, verdicts)], resamples=resamples, seed=seed)
    figures = [row.figure(sums) for (sums,) in some]
    places = set(images)
    moved = np.concatenate(figures)
    low, high = np.percentile(moved, [2.5, 97.5])
    if len({verdict.score for verdict in verdicts}) == 1:  # a draw without any yes has no F1, and tells nothing
        low = high = headline(name, items, verdicts)
    if high - low < 1e-12:  # sums of the same parts differ in their last bits
        unseen = 1 - 0.025 ** (1 / len(places))
        most = max(1.0, high)  # a ratio to reference answers may pass 1
        low, high = max(0.0, low - unseen), min(most, high + unseen)
    return float(low), float(high)


def draws(
    images: Sequence[str], columns: Sequence[Array], *, resamples: int = RESAMPLES, seed: int = 0
) -> Iterator[list[Array]]:
    """Bootstrap sums, pictures drawn with all their questions: per chunk of draws one [draws, k] for each of `columns`.

    images   the picture of each question, [n] names.
    columns  what each question adds, [n, k]; all of them go through the same draws, so that they stay paired.
    """
    # By name: the order of the questions in their file moves no digit.
    places = {name: place for place, name in enumerate(sorted(set(images)))}
    cluster = np.array([places[name] for name in images])
    grouped = []
    for added in columns:
        sums = np.zeros((len(places), added.shape[1]))
        np.add.at(sums, cluster, added)
        grouped.append(sums)
    rng = np.random.Generator(np.random.Philox(seed))
    shares = np.full(len(places), 1 / len(places))
    chunk = max(1, 8_000_000 // len(places))  # 64 MB of counts at a time
    for start in range(0, resamples, chunk):
        times = rng.multinomial(len(places), shares, size=min(chunk, resamples - start)).astype(np.float64)
        yield [times @ sums for sums in grouped]


def best_constants(train: Sequence[Item], scorer: Scorer, *, seed: int = 0) -> dict[str, str]:
    """template -> the one answer that scores best on the train questions of this wording; "" -> best over all.

    Candidates are the train golds. Where they repeat, the commonest is taken; where nearly all differ (boxes), each
    of a seeded sample of them is tried on another seeded sample, for the commonest box need not be the best one.
    """
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in train:
        groups[item.template].append(item)
    constants = {name: _best(group, scorer, seed) for name, group in sorted(groups.items())}
    if train:
        constants[""] = _best(list(train), scorer, seed)
    return constants


def _best(items: list[Item], scorer: Scorer, seed: int) -> str:
    counts = Counter(scorer.gold(item) for item in items)
    if not isinstance(items[0].gold, list) or isinstance(items[0].gold[0], str):
        # Ties go to the first in alphabetical order, so that the order of the file does not matter.
        common = sorted(counts, key=lambda answer: (-counts[answer], answer))
        earned = _with_equals(items, common, counts, scorer)
        return min(earned, key=lambda answer: (-earned[answer], answer))
    return _best_box(items, sorted(counts), seed)


def _with_equals(items: list[Item], common: list[str], counts: Counter[str], scorer: Scorer) -> dict[str, int]:
    """For the commonest answers how many questions each is right for, where a rule takes several texts for one ("2" and
    "two"): those that have it, and those of every other common answer whose questions, a few looked at, it is always
    right for."""
    asked: dict[str, list[Item]] = {answer: [] for answer in common[:COMMON]}
    for item in sorted(items, key=lambda item: item.question_id):
        some = asked.get(scorer.gold(item))
        if some is not None and len(some) < LOOKED_AT:
            some.append(item)

    def right(answer: str, other: str) -> bool:
        return answer == other or all(scorer.judge(item, answer).score == 1 for item in asked[other])

    return {answer: sum(counts[other] for other in asked if right(answer, other)) for answer in common[:TRIED]}


def _best_box(items: list[Item], candidates: list[str], seed: int) -> str:
    rng = Random(seed)
    rng.shuffle(candidates)
    tried = candidates[:CONSTANT_SAMPLE]
    boxes = np.array([ast.literal_eval(text) for text in tried], dtype=np.float64)[:, None]
    sample = sorted(items, key=lambda item: item.question_id)
    rng.shuffle(sample)
    gold = np.array([item.gold for item in sample[:CONSTANT_SAMPLE]], dtype=np.float64)[None]
    sides = np.minimum(boxes[..., 2:], gold[..., 2:]) - np.maximum(boxes[..., :2], gold[..., :2])
    inside = np.clip(sides, 0, None).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1) + (gold[..., 2:] - gold[..., :2]).prod(-1)
    overlap = inside / np.maximum(area - inside, 1e-9)
    # Most boxes hit wins; between equals the greater mean overlap, then the text.
    keys = zip((overlap >= 0.5).mean(1), overlap.mean(1), tried, strict=True)
    return max(keys)[2]


def deranged(items: Sequence[Item], *, seed: int = 0) -> list[ImageRef | None] | None:
    """For each item, the picture of another image id of the same task; None when there is only one picture.

    One seeded cycle through all pictures: every picture goes to exactly one other, and all questions of a picture
    get the same wrong one. Questions without a picture keep none.
    """
    pictures = {item.meta["image_id"]: item.image for item in items if item.image is not None}
    if len(pictures) < 2:
        return None
    cycle = sorted(pictures)
    Random(seed).shuffle(cycle)
    following = {name: pictures[cycle[(at + 1) % len(cycle)]] for at, name in enumerate(cycle)}
    return [following[item.meta["image_id"]] if item.image is not None else None for item in items]
