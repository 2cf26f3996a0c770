"""What people are told: errors with exit codes, reasons, sizes and near names in words."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import ClassVar


class UserError(ValueError):
    """Something a person can mend. The text says what was given, what is allowed, where from, and how to mend it."""

    exit_code: ClassVar[int] = 2


class RecipeError(UserError):
    """A recipe, an override or an argument is not usable."""

    exit_code: ClassVar[int] = 2


class OtherRecipe(RecipeError):
    """A folder was begun with another recipe than the one given."""


class DataError(UserError):
    """Data on disk is missing, malformed, or too much of it is."""

    exit_code: ClassVar[int] = 3


class Interrupted(UserError):
    """Stopped as asked. Everything needed to go on is saved; the same command continues."""

    exit_code: ClassVar[int] = 4


class EnvironmentFault(UserError):
    """The machine cannot do it: disk, memory, network, a missing package."""

    exit_code: ClassVar[int] = 5


def in_words(reasons: Mapping[str, int]) -> str:
    """How many samples were refused why, the most frequent first."""
    some = Counter(reasons).most_common(8)
    return "; ".join([*(f"{count:,} {reason}" for reason, count in some), *["..."] * (len(reasons) > len(some))])


def in_bytes(size: float) -> str:
    """Bytes for people: `412 MiB`, `3.2 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def bytes_of(text: str) -> int:
    """Bytes that a person wrote as `3GB`, `500 MiB` or `1000000`. RecipeError says what is allowed."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in _UNITS or float(found[1]) <= 0:
        raise RecipeError(f"{text!r} is no amount of memory; write it as 3GB, 500MB or 1.5GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def closest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that look like `name`, the likeliest first; for "did you mean"."""
    folded: dict[str, str] = {}
    for known in names:
        folded.setdefault(str(known).lower(), str(known))
    wanted = str(name).lower()
    found = difflib.get_close_matches(wanted, folded, n=3, cutoff=0.55)
    # Ids are hierarchical ("bunny/v1.0-3b"): what holds the given word, or lies in it, is near however long it is.
    holding = [key for key in folded if len(wanted) > 2 and (wanted in key or (len(key) > 2 and key in wanted))]
    return [folded[key] for key in dict.fromkeys([*found, *holding])][:3]
