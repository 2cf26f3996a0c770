"""Files that the servers of judged benchmarks take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from leveret.evaluate.forms import Item
from leveret.runs import DataError, atomic_write


def mm_vet(items: Sequence[Item], texts: Mapping[str, str], path: Path) -> None:
    """MM-Vet's server: `{"v1_0": text}`, every question once, in the order of its file (convert_mmvet_for_eval.py).

    Raises DataError where a question has no answer: the server would not say which."""
    missing = [item.question_id for item in items if item.question_id not in texts]
    if missing:
        raise DataError(
            f"MM-Vet's server takes {len(items)} answers; {len(missing)} are missing, first {missing[0]!r}."
        )
    atomic_write(path, json.dumps({item.question_id: texts[item.question_id] for item in items}, indent=1) + "\n")


SUBMISSIONS: dict[str, tuple[str, Callable[[Sequence[Item], Mapping[str, str], Path], None]]] = {
    "mm_vet": ("mm-vet.json", mm_vet),
}
