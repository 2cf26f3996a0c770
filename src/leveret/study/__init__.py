"""Compare: designs side by side on the same worlds, over seeds, with intervals."""

from leveret.study.files import read
from leveret.study.runner import run

__all__ = ["read", "run"]
