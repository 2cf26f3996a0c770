"""Compare: designs side by side on the same worlds, with intervals. `compare` asks whether choosing data pays."""

from leveret.study.plan import Plan
from leveret.study.selection import compare, describe

__all__ = ["Plan", "compare", "describe"]
