"""The page and the table of an examination: for the person who made the model, and for one who knows nothing of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from leveret import pages
from leveret.evaluate.findings import Example, confusion, examples, mistakes, overlaps, picture

if TYPE_CHECKING:
    from leveret.evaluate.run import Examined

HEADER = ["task", "score", "95 % interval", "n", "majority", "blind", "unreadable"]

MEANING = (
    (
        "score",
        "The share of questions answered rightly, from 0 to 1 (1.00 is every one). Where the benchmark's own rule says "
        "otherwise, the rule is named under the task.",
    ),
    (
        "95 % interval",
        "Another set of as many pictures would give a somewhat different score. The interval is how far it would move: "
        "two models whose intervals overlap widely may be equally good. Pictures are resampled, not questions, for "
        "questions about one picture fail together.",
    ),
    (
        "majority",
        "What a person would score who never looks and always gives the one best answer to each wording of question, "
        "learnt from the questions of the training side. A score near it shows no skill.",
    ),
    (
        "blind",
        "The same model and the same questions, but each with the picture of another scene. What is left of the score "
        "is guessed from the words alone; the distance from blind to score is what the eyes contribute.",
    ),
    (
        "unreadable",
        "Answers in which the rule found nothing to judge. They count as wrong (in existence, where the official rule "
        "reads everything that is not a no as yes, they count as yes).",
    ),
)


def markdown(results: Mapping[str, Any]) -> str:
    """The table of results.md."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(results)]
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in results["seconds"].items())
    notes = "\n".join(f"- **{name}**: {meaning}" for name, meaning in MEANING)
    rules = "\n".join(
        f"- {name}: {facts['headline']}; {facts['rule_says']}" for name, facts in results["tasks"].items()
    )
    return "\n".join([*lines, "", f"Time: {spent}.", "", notes, "", "Rules:", rules]) + "\n"


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            f"{facts['score']:.3f}",
            f"{facts['ci95'][0]:.3f} - {facts['ci95'][1]:.3f}",
            f"{facts['n']:,}",
            share(facts["majority"]),
            share(facts["blind"]),
            str(facts["unparsable"]),
        ]
        for name, facts in results["tasks"].items()
    ]


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def report(examined: Sequence[Examined], results: Mapping[str, Any], *, split: str) -> str:
    """The whole page, pictures embedded; nothing is loaded from anywhere."""
    tasks = results["tasks"]
    n = sum(facts["n"] for facts in tasks.values())
    sections = [
        pages.Section("Scores", [_bars(tasks), pages.table(_rows(results), HEADER)], lead=in_words(tasks)),
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
