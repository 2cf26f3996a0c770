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
    """A mean over `n` seeds and its 95 % t-interval; without bounds where one seed cannot give them."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below zero, else 0: seeds do not tell."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean and two-sided 95 % interval, mean +- t(0.975, n - 1) * s / sqrt(n), s with n - 1 in its denominator.

    Student, "The probable error of a mean", Biometrika 6 (1908). ValueError where there are no values.
    """
    n = len(values)
    if not n:
        raise ValueError("an interval needs at least one value")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None, 1)
    from scipy.special import stdtrit

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Seed -> ours minus theirs, at the seeds that both have, in order; equal scores differ by zero."""
    return {seed: round(ours[seed] - theirs[seed], DIGITS) + 0.0 for seed in sorted(ours.keys() & theirs.keys())}


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Of ours minus theirs at the seeds that both have: what a seed does to both cancels. None without such a seed."""
    found = differences(ours, theirs)
    return t_interval(list(found.values())) if found else None


def p_value(values: Sequence[float]) -> float | None:
    """Two-sided p of a mean that differs from zero, by Student's t with n - 1 degrees of freedom; None for one value.

    Differences that are all alike have p 0, or 1 where they are zero. Source: as for `t_interval`.
    """
    n = len(values)
    if n < 2:
        return None
    from scipy.special import stdtr

    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    if not deviation:
        return 0.0 if mean else 1.0
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
