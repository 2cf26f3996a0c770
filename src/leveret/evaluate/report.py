"""The page and the table of an examination: for the person who made the model, and for one who knows nothing of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from leveret import pages
from leveret.evaluate.findings import Example, confusion, examples, mistakes, overlaps, picture
from leveret.evaluate.tables import HEADER, MEANING, rows, share

if TYPE_CHECKING:
    from leveret.evaluate.run import Examined


def report(examined: Sequence[Examined], results: Mapping[str, Any], *, split: str) -> str:
    """The whole page, pictures embedded; nothing is loaded from anywhere."""
    tasks = results["tasks"]
    n = sum(facts["n"] for facts in tasks.values())
    sections = [
        pages.Section("Scores", [_bars(tasks), pages.table(rows(results), HEADER)], lead=in_words(tasks)),
        pages.Section("What the numbers mean", [pages.table(MEANING, ["word", "meaning"])]),
        *(_task(task) for task in examined),
    ]
    return pages.page("Examination", sections, subtitle=f"{n:,} questions of {len(tasks)} tasks, split {split}")


def _bars(tasks: Mapping[str, Mapping[str, Any]]) -> Any:
    bars = [
        pages.Bar(
            label=name,
            value=facts["score"],
            low=facts["ci95"][0],
            high=facts["ci95"][1],
            marks={mark: facts[mark] for mark in ("majority", "blind") if facts[mark] is not None},
        )
        for name, facts in tasks.items()
    ]
    marked = " and its baselines" if any(bar.marks for bar in bars) else ""
    return pages.bars(bars, caption=f"Share of right answers per task, with its 95 % interval{marked}.")


def in_words(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence on what stands out."""
    eyes = {
        name: facts["score"] - max(facts["blind"] or 0.0, facts["majority"] or 0.0)
        for name, facts in tasks.items()
        if facts["blind"] is not None or facts["majority"] is not None
    }
    if not eyes:
        return "No baseline was computed, so the scores stand alone."
    seen = any(facts["blind"] is not None for facts in tasks.values())
    best, worst = max(eyes, key=lambda name: eyes[name]), min(eyes, key=lambda name: eyes[name])
    blindish = [name for name in eyes if tasks[name]["ci95"][0] <= tasks[name]["score"] - eyes[name]]
    over = "the better of blind and majority" if seen else "the best constant answer"
    lead = "Sight helps most" if seen else "Farthest above guessing is the score"
    words = f"{lead} in {best} ({eyes[best]:+.2f} over {over})"
    if worst != best:
        words += f" and least in {worst} ({eyes[worst]:+.2f})"
    if blindish:
        words += f". Not better than guessing beyond chance: {', '.join(blindish)}"
    return words + "."


def _task(task: Examined) -> pages.Section:
    facts = task.facts
    blocks: list[Any] = []
    if len(facts["templates"]) > 1:
        rows = [
            [name, f"{row['n']:,}", share(row["accuracy"]), share(row["majority"]), row["majority_answer"] or "-",
             share(row["blind"])]
            for name, row in facts["templates"].items()
        ]  # fmt: skip
        header = ["wording", "n", "accuracy", "majority", "always answering", "blind"]
        blocks.append(pages.table(rows, header, caption="By wording of the question"))
    if table := confusion(task):
        header, body = table
        blocks.append(pages.table(body, header, caption="Right answer (row) against what was said (column)"))
    elif not overlaps(task) and (wrong := mistakes(task)):
        header = ["right answer", "said instead", "times"]
        blocks.append(pages.table(wrong, header, caption="The commonest mistakes"))
    if found := overlaps(task):
        edges = [k / 20 for k in range(21)]
        blocks.append(
            pages.histogram(
                found,
                edges,
                bands=[(0.5, 1.0, "counts as right")],
                name="overlap with the true box",
                caption="Overlap (intersection over union) of each readable box with the true one. "
                "In the pictures the true box is green and the said one red.",
            )
        )
    failures, successes = examples(task)
    blocks.append(f"{len(failures)} failures, then {len(successes)} successes, chosen by question id alone:")
    shown = [_shown(example, "partly" if example.verdict.score else "wrong") for example in failures]
    shown += [_shown(example, "right") for example in successes]
    blocks.append(pages.gallery(shown))
    lead = f"{task.row.about} {facts['headline'].capitalize()} {facts['score']:.3f}. Rule: {facts['rule_says']}."
    return pages.Section(task.row.id, blocks, lead=lead)


def _shown(example: Example, mark: str) -> tuple[Any, str, str]:
    said = example.text.strip() or "(nothing)"
    if len(said) > 240:
        said = said[:237] + "..."
    caption = f"{example.item.prompt}\nsaid: {said}\nright: {example.gold}"
    return picture(example), caption, mark
