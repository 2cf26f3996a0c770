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


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean and two-sided 95 % interval, mean +- t(0.975, n - 1) * s / sqrt(n), s with n - 1 in its denominator.

    Student, "The probable error of a mean", Biometrika 6 (1908). No bounds of one value, nor of several that are alike
    to the last digit and not zero: shares of a few hundred questions may be so by chance, and how far they would spread
    is then not known. ValueError where there are no values.
    """
    n = len(values)
    if not n:
        raise ValueError("an interval needs at least one value")
    mean = math.fsum(values) / n
    if n == 1 or _alike(values):
        return Estimate(mean, None, None, n)
    from scipy.special import stdtrit

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def _alike(values: Sequence[float]) -> bool:
    """Whether they say nothing of their spread: all the same, and that is not zero."""
    return min(values) == max(values) != 0


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Seed -> ours minus theirs, at the seeds that both have, in order; equal scores differ by zero."""
    return {seed: round(ours[seed] - theirs[seed], DIGITS) + 0.0 for seed in sorted(ours.keys() & theirs.keys())}


def p_value(values: Sequence[float]) -> float | None:
    """Two-sided p of a mean that differs from zero, by Student's t with n - 1 degrees of freedom; 1 where all are zero,
    None where `t_interval` has no bounds. Source: as there."""
    n = len(values)
    if n < 2 or _alike(values):
        return None
    from scipy.special import stdtr

    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    if not deviation:
        return 1.0
    return float(2 * stdtr(n - 1, -abs(mean) / deviation * math.sqrt(n)))


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
