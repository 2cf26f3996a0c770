"""Paired differences over seeds, with Student's interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95
DIGITS = 12
"""Behind the point; what lies beyond is how sums round, and would be told as a difference that is sure."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` seeds and its 95 % t-interval; without bounds where the seeds cannot give them."""

    mean: float
    low: float | None
    high: float | None
    n: int


def t_interval(values: Sequence[float], least: float = 0.0) -> Estimate:
    """Mean and two-sided 95 % interval, mean +- t(0.975, n - 1) * s / sqrt(n), s with n - 1 in its denominator.

    Student, "The probable error of a mean", Biometrika 6 (1908). No bounds of one value. Values that are alike to the
    last digit (shares of a few hundred questions may be so by chance, or lie at an end of the scale) are taken to
    spread as if `least`, the smallest step that they can show, were their s; where that is 0 and they are not zero, how
    far they would spread is not known, and there are no bounds. ValueError where there are no values.
    """
    n = len(values)
    if not n:
        raise ValueError("an interval needs at least one value")
    mean = math.fsum(values) / n
    deviation = _deviation(values, least)
    if deviation is None:
        return Estimate(mean, None, None, n)
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def _deviation(values: Sequence[float], least: float) -> float | None:
    """s, or what stands for it; None where the values say nothing of it."""
    if len(values) < 2:
        return None
    if min(values) == max(values):
        return least if least or not values[0] else None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Seed -> ours minus theirs, at the seeds that both have, in order; equal scores differ by zero."""
    return {seed: round(ours[seed] - theirs[seed], DIGITS) + 0.0 for seed in sorted(ours.keys() & theirs.keys())}


def p_value(values: Sequence[float], least: float = 0.0) -> float | None:
    """Two-sided p of a mean that differs from zero, by Student's t with n - 1 degrees of freedom; 1 where all are zero,
    None where `t_interval` has no bounds. Source: as there."""
    deviation, n = _deviation(values, least), len(values)
    if deviation is None:
        return None
    if not deviation:
        return 1.0
    from scipy.special import stdtr

    return float(2 * stdtr(n - 1, -abs(math.fsum(values) / n) / deviation * math.sqrt(n)))


def holm(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """p-values corrected for how many there are, so that the chance of any false one is what each says.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979): the
    i-th smallest of m (from 0) times m - i, never below the one before it, at most 1. None stays None and counts not.
    """
    known = sorted((p, name) for name, p in values.items() if p is not None)
    out: dict[str, float | None] = dict.fromkeys(values)
    highest = 0.0
    for place, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - place)))
        out[name] = highest
    return out
