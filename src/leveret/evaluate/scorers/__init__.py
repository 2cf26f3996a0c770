"""The official scoring rules, one row per rule: how one answer is judged, and what the official script prints.

Where an official script joins by position, we join by id; where it counts an unreadable answer as one of the answers,
we do too, and say how many there were. Which rules a task may be scored by, and their names there, stand in its row.
"""

from __future__ import annotations

from leveret.evaluate.scorers.base import MISSING, Scorer, Verdict
from leveret.evaluate.scorers.boxes import BOXES
from leveret.evaluate.scorers.choice import CHOICE
from leveret.evaluate.scorers.judged import JUDGED
from leveret.evaluate.scorers.own import OWN
from leveret.evaluate.scorers.words import WORDS
from leveret.evaluate.scorers.yes_no import YES_NO

SCORERS: dict[str, Scorer] = {**YES_NO, **CHOICE, **WORDS, **BOXES, **JUDGED, **OWN}

__all__ = ["MISSING", "SCORERS", "Scorer", "Verdict"]
