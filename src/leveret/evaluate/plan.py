"""What an examination asks of whom, known before anybody is asked: the same for a run and a dry run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from leveret.evaluate.desk import Desk
from leveret.evaluate.forms import Item
from leveret.evaluate.options import Options, options_of
from leveret.evaluate.prepare import load_suite
from leveret.evaluate.scoring import rehearse
from leveret.evaluate.tasks import TaskRow, base, rule_of, subset, task_row, wording
from leveret.evaluate.tasks import asked as asked_of
from leveret.records import ImageRef
from leveret.runs import RecipeError, RunFolder, kept_recipe, sha256_of


@dataclass(frozen=True)
class Plan:
    """name: the suite's, or the one task's. rows: the tasks that are asked, each in its part (`splits`) and by its rule
    (`rules`; where none was given, its own). loaded: all questions of each, and asked: those that are put. options:
    what is chosen from where a rule reads probabilities. judged: tasks that a judge scores. skipped: why others are
    left out."""

    name: str
    split: str
    rows: Sequence[TaskRow]
    splits: Mapping[str, str]
    rules: Mapping[str, str]
    loaded: Mapping[str, list[Item]]
    asked: Mapping[str, list[Item]]
    options: Mapping[str, Options | None]
    judged: frozenset[str]
    skipped: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(
        cls,
        root: str | Path,
        suite: str | TaskRow = "world",
        *,
        n: int | None = None,
        split: str = "test",
        rules: Mapping[str, str] = MappingProxyType({}),
        prompts: str | None = None,
        how: str = "hash",
        skip_missing: bool = False,
    ) -> Plan:
        """Load and check; the arguments are those of `evaluate`. RecipeError, DataError as there."""
        pairs = asked_of(suite, split)
        rows, splits = [row for row, _ in pairs], {row.id: part for row, part in pairs}
        # An own task is known by its id and its questions, wherever its file lies.
        name = rows[0].id if not isinstance(suite, str) or suite.endswith((".yaml", ".yml")) else suite
        by = _rules(rows, rules, name)
        judged = frozenset(row.id for row in rows if rule_of(row, by.get(row.id))[1].judging is not None)
        options = {row.id: options_of(row, by.get(row.id)) for row in rows}
        words = {row.id: wording(row, by.get(row.id), prompts) for row in rows}
        loaded, skipped = load_suite(name, pairs, root, words, skip=skip_missing)
        rows = [row for row in rows if row.id in loaded]
        for row in rows:
            rehearse(row, by.get(row.id), loaded[row.id])
        asked = {row.id: subset(loaded[row.id], n, how) for row in rows}
        return cls(name, split, rows, splits, by, loaded, asked, options, judged, skipped)

    def unscored(self) -> list[TaskRow]:
        """Tasks whose right answers are not public."""
        return [row for row in self.rows if any(item.gold is None for item in self.loaded[row.id])]

    def bound(self, model: str) -> dict[str, Any]:
        """What the folder is held to. model: what tells it from others."""
        sizes: dict[str, int] = {}
        questions = {
            row.id: _questions_hash(row, self.loaded[row.id], self.options[row.id], sizes) for row in self.rows
        }
        return {"suite": self.name, "split": self.split, "model": model, "questions": questions}

    def desks(self, folder: Path, model: str, blind: bool) -> list[Desk]:
        """Where the answers gather, those to questions with other pictures last: nobody could judge these where a judge
        scores, or right answers are not public."""
        unscored = self.unscored()
        sighted = [row for row in self.rows if row.id not in self.judged and row not in unscored]
        return [
            Desk(row, self.loaded[row.id], self.asked[row.id], model, folder, swapped, self.options[row.id])
            for swapped, some in ((False, self.rows), (True, sighted if blind else []))
            for row in some
        ]

    def open(self, out: str | Path, model: str) -> RunFolder:
        """The folder of this examination. Tasks of the suite that were skipped before, or are now, change nothing in
        the others, so the folder goes on with them: it remembers the questions of all that were ever asked."""
        recipe, more = self._merged(out, model)
        if more:
            RunFolder.adopt(out, "evaluate", recipe)
        return RunFolder.open(out, "evaluate", recipe)

    def look_ahead(self, out: str | Path, model: str | None, blind: bool) -> dict[str, dict[str, int]]:
        """Task -> how many questions would be asked, how many with another picture, and how many answers to both are
        there already. Nothing is written; RecipeError where `open` would refuse the folder. model: None where what
        tells it from others is not known, so that its folder's is taken."""
        if model is None and (Path(out) / "recipe.yaml").is_file():
            model = str(kept_recipe(Path(out)).get("model"))
        recipe, more = self._merged(out, model or "")
        RunFolder.peek(out, "evaluate", kept_recipe(Path(out)) if more else recipe)
        found = {row.id: {"questions": len(self.asked[row.id]), "with other pictures": 0} for row in self.rows}
        for desk in self.desks(Path(out), model or "", blind):
            if desk.blind:
                found[desk.row.id]["with other pictures"] = len(desk.items)
            if there := desk.there():
                found[desk.row.id]["answered"] = found[desk.row.id].get("answered", 0) + there
        return found

    def _merged(self, out: str | Path, model: str) -> tuple[dict[str, Any], bool]:
        """(what the folder is to be held to, whether that is more than it holds itself to)."""
        recipe = self.bound(model)
        if (Path(out) / "recipe.yaml").is_file():
            there = kept_recipe(Path(out))
            before, now = there.get("questions", {}), recipe["questions"]
            for row in self.rows:  # of a version that knew pictures by their ids alone
                known = before.get(row.id, now[row.id])
                if known != now[row.id] and known == _questions_hash(
                    row, self.loaded[row.id], self.options[row.id], None
                ):
                    now[row.id] = known
            same = all(there.get(key) == recipe[key] for key in ("suite", "split", "model"))
            if same and before.keys() != now.keys() and all(before.get(task, now[task]) == now[task] for task in now):
                return recipe | {"questions": {**before, **now}}, True
        return recipe, False


def _rules(rows: Sequence[TaskRow], rules: Mapping[str, str], suite: str) -> dict[str, str]:
    """Row id -> the name of its rule, where one was given; a rule of `mmbench` is one of `mmbench.dev` too."""
    by: dict[str, str] = {}
    strange = []
    for task, rule in rules.items():
        meant = [row for row in rows if task in (row.id, base(row.id))] or [
            row for row in rows if not task.endswith((".yaml", ".yml")) and task_row(task).id == base(row.id)
        ]
        strange += [] if meant else [task]
        by |= {row.id: rule_of(row, rule)[0] for row in meant}
    if strange:
        raise RecipeError(f"A rule is given for {', '.join(sorted(strange))}, which {suite!r} does not ask.")
    return by


def _questions_hash(row: TaskRow, items: Sequence[Item], options: Options | None, sizes: dict[str, int] | None) -> str:
    """Of all that is asked. Of a picture its id and its bytes' count: another picture under the same name is another
    question, and to read them all would take as long as a suite's answers may. sizes: path -> that count, filled; None
    for the id alone."""

    def picture(item: Item) -> Any:
        told = item.image and item.meta["image_id"]
        return told if sizes is None or item.image is None else [told, _size(item.image, sizes)]

    asked = [[i.question_id, i.prompt, picture(i), i.gold, i.template] for i in items]
    # Answers that were generated and answers that were chosen are not the same answers.
    chosen = [] if options is None else [[options(item) for item in items]]
    return sha256_of([row.id, row.max_new_tokens, asked, *chosen])[:16]


def _size(image: ImageRef, known: dict[str, int]) -> int:
    if image.kind == "data":
        return len(image.path)
    if image.path not in known:
        known[image.path] = Path(image.path).stat().st_size
    return known[image.path]
