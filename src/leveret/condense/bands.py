"""Steps that rank what is left, and steps that draw from it.

One order serves them all: the stable ascending argsort of the column, read from its end. So rank 0 is the HIGHEST
value, and of equal values the row with the higher number stands higher.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from leveret.condense.table import Array, Ints, Shop, Table, Verdict, hash_order

SALT = 2
ABOVE, BELOW = "ranks above the cut", "ranks below the cut"


def ascending(values: Array) -> Ints:
    """Positions from the lowest to the highest value; equal values by position."""
    return np.argsort(values, kind="stable").astype(np.int64)


def band(n: int, lo: float, hi: float) -> slice:
    """The slice of an ascending order of n that holds ranks lo to hi, counted from the highest.

    The published one, [-int(hi * n) : -int(lo * n + 1)]: it holds one row fewer than int(hi * n) - int(lo * n) (with
    lo = 0 the highest row is cut). Where int(hi * n) is 0 the published text would read [0:...] and keep nearly
    everything; here it keeps nothing.
    """
    begin, end = int(hi * n), int(lo * n + 1)
    return slice(n - min(begin, n), max(n - end, n - min(begin, n)))


def rank_band(table: Table, config: Any, shop: Shop) -> Verdict:
    """Keeps the ranks from lo to hi of the column `by`."""
    n = len(table)
    return _slice(table, config.by, band(n, config.lo, config.hi))


def top(table: Table, config: Any, shop: Shop) -> Verdict:
    """Keeps the highest: `count` rows, or int(share * n)."""
    n = len(table)
    return _slice(table, config.by, slice(n - _amount(config, n), n))


def drop_top(table: Table, config: Any, shop: Shop) -> Verdict:
    """Drops the highest: `count` rows, or int(share * n)."""
    n = len(table)
    return _slice(table, config.by, slice(0, n - _amount(config, n)))


def draw(table: Table, config: Any, shop: Shop) -> Verdict:
    """Keeps `count` rows, or int(share * n): the first in the seeded order of id hashes.

    Independent of where rows stand and of what else is in the pool: a larger budget holds the smaller one.
    """
    n = len(table)
    keep = np.zeros(n, bool)
    keep[hash_order(table.columns["hash"], shop.seed, SALT)[: _amount(config, n)]] = True
    return Verdict(keep, (~keep).astype(np.uint8), ("", "not drawn"))


def _amount(config: Any, n: int) -> int:
    return min(n, int(config.count if config.count is not None else config.share * n))


def _slice(table: Table, by: str, kept: slice) -> Verdict:
    values = table.columns[by]
    order = ascending(values)
    reason = np.zeros(len(table), np.uint8)
    reason[order[kept.stop :]] = 1
    reason[order[: kept.start]] = 2
    inside = values[order[kept]]
    cuts = {"by": by, "lowest": float(inside[0]), "highest": float(inside[-1])} if len(inside) else {"by": by}
    return Verdict(reason == 0, reason, ("", ABOVE, BELOW), notes=cuts)
