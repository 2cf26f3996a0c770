"""The page and the table of an examination: for the person who made the model, and for one who knows nothing of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from leveret import pages
from leveret.evaluate.findings import RIGHT, Example, confusion, examples, mistakes, overlaps, picture
from leveret.evaluate.gallery import Card, browse, script
from leveret.evaluate.radar import radar
from leveret.evaluate.tables import HEADER, MEANING, OTHER, beside, not_scored, rows, share

if TYPE_CHECKING:
    from leveret.evaluate.run import Examined
    from leveret.evaluate.scorers import Verdict


def report(examined: Sequence[Examined], results: Mapping[str, Any], *, split: str) -> str:
    """The whole page, pictures embedded; nothing is loaded from anywhere."""
    tasks = results["tasks"]
    n = sum(facts["n"] for facts in tasks.values())
    scores = [_bars(tasks), _radar(tasks), pages.table(_shown_rows(results), HEADER)]
    sections = [
        pages.Section("Scores", [block for block in scores if block], lead=in_words(tasks)),
        *([pages.Section("Not scored", left)] if (left := not_scored(results)) else []),
        pages.Section("What the numbers mean", [pages.table(MEANING, ["word", "meaning"])]),
        *_published(results),
        pages.Section("Look through the answers", browse(_cards(examined), KINDS), lead=LOOK),
        *(_task(task) for task in examined),
    ]
    parts = dict.fromkeys(facts["split"] for facts in tasks.values()) or (split,)
    subtitle = f"{n:,} questions of {len(tasks)} task{'s' * (len(tasks) != 1)}, split {' and '.join(parts)}"
    return pages.page("Examination", sections, subtitle=subtitle, script=script())


LOOK = (
    "Filter by task and by how the answer was judged, search in questions and answers. What turned when the question "
    "was asked with another picture: wrong when blind, the answer needed eyes; right when blind, it was guessed."
)
KINDS = {
    "right": "right",
    "partly": "partly right",
    "wrong": "wrong",
    "unreadable": "unreadable",
    "flip": "turned when blind",
    "seen": "wrong when blind",
    "guessed": "right when blind",
}


def _shown_rows(results: Mapping[str, Any]) -> list[list[str | None]]:
    """The rows of the table; nothing where there is none, so that columns of numbers stay such."""
    return [[None if cell == "-" else cell for cell in row] for row in rows(results)]


def _cards(examined: Sequence[Examined]) -> Iterator[Card]:
    """Every answer as a card of the gallery."""
    for task in examined:
        blind: Sequence[Verdict | None] = task.blind or [None] * len(task.items)
        for item, verdict, other in zip(task.items, task.verdicts, blind, strict=True):
            right = verdict.score >= RIGHT
            kinds = ["right" if right else "partly" if verdict.score else "wrong"]
            kinds += ["unreadable"] * (not verdict.readable)
            if other is not None and item.image is not None and right != (other.score >= RIGHT):
                kinds += ["flip", "seen" if right else "guessed"]
            example = Example(item, task.texts.get(item.question_id, ""), verdict, task.scorer.gold(item))
            yield Card(
                task=task.row.id,
                kinds=tuple(kinds),
                words=_words(example),
                picture=partial(picture, example) if item.image is not None else None,
                key=item.question_id,
            )


def _radar(tasks: Mapping[str, Mapping[str, Any]]) -> Any:
    kept = {name: [facts.get(name) for facts in tasks.values()] for name in ("score", "blind", "majority")}
    series = {name: values for name, values in kept.items() if any(value is not None for value in values)}
    return radar(
        list(tasks), series, "The same scores around a circle; a task without a baseline has it at the centre."
    )


def _published(results: Mapping[str, Any]) -> list[pages.Section]:
    blocks: list[Any] = []
    for table, header, body in beside(results):
        marked = f" \u2020: {OTHER}." if any("\u2020" in cell for cell in body[0]) else ""
        caption = f"{table.name}: {table.source}; scored by {table.scored}.{marked}"
        blocks.append(pages.table(body, header, caption=caption))
    lead = "This model in the units of published tables. Read how each was scored before comparing."
    return [pages.Section("Beside published figures", blocks, lead=lead)] if blocks else []


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
    return pages.bars(bars, caption=f"Score per task, with its 95 % interval{marked}.")


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
    if eyes[best] <= 0:
        lead = "Nothing is above guessing; nearest is the score"
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
    return picture(example), _words(example), mark


def _words(example: Example) -> str:
    def short(text: str, most: int = 240) -> str:
        return text if len(text) <= most else text[: most - 3] + "..."

    said = short(example.text.strip()) or "(nothing)"
    return f"{short(example.item.prompt, 400)}\nsaid: {said}\nright: {short(str(example.gold))}"
