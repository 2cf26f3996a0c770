"""What changed between a stop and going on: refused by name, or, where the person says so, noted and gone on with.

RUN/changes.jsonl    one line each time: when, which stage at which step, what was there and what is now
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leveret.runs import OtherRecipe, RunFolder, append_jsonl, differences, fixed, kept_recipe, repair_jsonl
from leveret.train import state
from leveret.train.stages import FREE, filled, filled_stage


class Changes:
    """The changes of one run. allowed: whether to go on all the same."""

    def __init__(self, run: Path, allowed: bool) -> None:
        self.run, self.allowed = run, allowed

    def recipe(self, bound: Mapping[str, Any]) -> None:
        """Hold the run's recipe against that of its folder; where allowed, it becomes the folder's own. Fields that the
        folder's has not, since there were none when it was begun, are at their defaults there."""
        if (self.run / "recipe.yaml").exists():
            kept = filled(kept_recipe(self.run))
            if not differences(*fixed(FREE, kept, bound)):
                RunFolder.adopt(self.run, "train", kept, FREE)
        if self.allowed:
            if lines := RunFolder.adopt(self.run, "train", bound, FREE):
                self._note("the recipe changed", lines, None, None)
            return
        try:
            RunFolder.peek(self.run, "train", bound, FREE)
        except OtherRecipe as error:
            raise OtherRecipe(f"{error} --allow-change goes on all the same, and notes every change.") from None

    def stage(self, folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], step: int | None) -> None:
        """Hold the facts of a stage against those it was begun with. step: where it goes on; None when it is done.

        RecipeError or DataError naming what changed, unless changes are allowed.
        """
        old = {**old, "recipe": filled_stage(old.get("recipe"))}
        if not self.allowed:
            state.refuse_change(folder, old, new)
            return
        for name, lines in state.changes(old, new).items():
            # A recipe's change was told when its folder was opened.
            words = state.NAMES[name][1] + (", and the stage stays as it was done" if step is None else "")
            self._note(words, lines, folder.name, step)

    def _note(self, words: str, lines: Sequence[str], stage: str | None, step: int | None) -> None:
        where = f"stage {stage}" + (f", step {step}" if step is not None else "") if stage else str(self.run)
        print(f"{where}: {words}, and goes on as it was told: {'; '.join(lines)}", file=sys.stderr, flush=True)
        path = self.run / "changes.jsonl"
        repair_jsonl(path)
        row = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "stage": stage, "step": step, "what": words}
        append_jsonl(path, row | {"changes": list(lines)})
