"""Loaders of the benchmarks' own files: one row per official form, each giving the same `Item`.

A loader reads the files as their authors publish them (sources: the repositories named in each docstring) and gives
every question an id that is unique in its task. Where official ids repeat, or where answer files of the field use
another id, the row says so in `keys` (what a question is known by) and `answer_keys` (what an answer may name).
"""

from __future__ import annotations

from leveret.evaluate.forms.base import Form, Item, Place, check_ids
from leveret.evaluate.forms.boxes import BOXES
from leveret.evaluate.forms.choice import CHOICE
from leveret.evaluate.forms.judged import JUDGED
from leveret.evaluate.forms.own import OWN
from leveret.evaluate.forms.words import WORDS
from leveret.evaluate.forms.yes_no import YES_NO

FORMS: dict[str, Form] = {**YES_NO, **CHOICE, **WORDS, **BOXES, **JUDGED, **OWN}

__all__ = ["FORMS", "Form", "Item", "Place", "check_ids"]
