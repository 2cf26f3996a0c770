"""The tables of an examination, for reading and for papers: our scores, then ours beside published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leveret.evaluate.published import PUBLISHED, Table

HEADER = ["task", "score", "95 % interval", "n", "chance", "majority", "blind", "unreadable"]

MEANING = (
    (
        "score",
        "The share of questions answered rightly, from 0 to 1 (1.00 is every one). Where the benchmark's own rule says "
        "otherwise, the rule is named under the task.",
    ),
    (
        "95 % interval",
        "Another set of as many pictures would give a somewhat different score. The interval is how far it would move: "
        "two models whose intervals overlap widely may be equally good (leveret compare tells). Pictures are "
        "resampled, not questions, for questions about one picture fail together.",
    ),
    (
        "chance",
        "What somebody would score who picks one of the offered answers blindly; there is none where answers are free.",
    ),
    (
        "majority",
        "What a person would score who never looks and always gives the one best answer to each wording of question, "
        "learnt from the questions of the training side. A score near it shows no skill. With a star it was chosen on "
        "the very questions that are scored, for want of a training side: about the most a constant answer can get.",
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

OTHER = "scored here by another rule than there, on another split, or not on all of its questions"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """One row a task, under HEADER."""
    return [
        [
            name,
            f"{facts['score']:.3f}",
            f"{facts['ci95'][0]:.3f} - {facts['ci95'][1]:.3f}",
            f"{facts['n']:,}",
            share(facts.get("chance")),
            share(facts["majority"]) + "*" * (facts.get("majority_of") == "test"),
            share(facts["blind"]),
            str(facts["unparsable"]),
        ]
        for name, facts in results["tasks"].items()
    ]


def not_scored(results: Mapping[str, Any]) -> list[str]:
    """A line for every task of the suite that has no score here, and why."""
    lines = [f"{task}: skipped, {left['state']}: {left['mend']}" for task, left in results.get("skipped", {}).items()]
    for kind, why in (("unjudged", "wait for a judge"), ("unscored", "are for the benchmark's server")):
        lines += [f"{task}: {left['n']:,} answers, which {why}" for task, left in results.get(kind, {}).items()]
    return lines


def beside(results: Mapping[str, Any]) -> list[tuple[Table, list[str], list[list[str]]]]:
    """Published tables that have a column of ours: (table, header, rows), ours first, only the columns we have.

    A figure of ours that is no like quantity carries a dagger; an empty cell was not published."""
    found = []
    for table in PUBLISHED:
        ours = [column.ours(results["tasks"]) for column in table.columns]
        at = [k for k, value in enumerate(ours) if value is not None]
        if not at:
            continue
        first = ["this model"]
        for k in at:
            value, like = ours[k]  # type: ignore[misc]
            first.append(f"{value:.1f}" + "\u2020" * (not like))
        body = [
            [name, *("" if figures[k] is None else f"{figures[k]:.1f}" for k in at)]
            for name, figures in table.models.items()
        ]
        found.append((table, ["model", *(table.columns[k].title for k in at)], [first, *body]))
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of results.md."""
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in results["seconds"].items())
    notes = "\n".join(f"- **{name}**: {meaning}" for name, meaning in MEANING)
    rules = "\n".join(
        f"- {name}: {facts['headline']}; {facts['rule_says']}" for name, facts in results["tasks"].items()
    )
    parts = [_grid(HEADER, rows(results)), f"Time: {spent}.", notes, f"Rules:\n{rules}"]
    if left := not_scored(results):
        parts.insert(1, "Not scored:\n" + "\n".join(f"- {line}" for line in left))
    for table, header, body in beside(results):
        marked = f" \u2020: {OTHER}." if any("\u2020" in cell for cell in body[0]) else ""
        parts += [f"Beside {table.name} ({table.source}; scored by {table.scored}):", _grid(header, body)]
        parts += [marked.strip()] if marked else []
    return "\n\n".join(parts) + "\n"


def _grid(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


# --- LaTeX ----------------------------------------------------------------------------------------------------------

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\u2020": r"$^\dagger$", "*": r"$^*$",
    }
)  # fmt: skip


def latex(results: Mapping[str, Any]) -> str:
    """The tables of results.tex: `booktabs` tables, to be read in by a paper."""
    shown = [[cell.replace(" - ", "--") for cell in row] for row in rows(results)]
    notes = (
        "Score with its 95\\,\\% interval (bootstrap over pictures), chance, the best constant answer ($^*$: chosen on "
        "the scored questions) and the score with other pictures (blind)."
    )
    parts = [_tabular(HEADER, shown, notes)]
    for table, header, body in beside(results):
        marked = f" $^\\dagger$: {OTHER}." if any("\u2020" in cell for cell in body[0]) else ""
        told = f"Beside {table.name}: {table.source}; scored by {table.scored}."
        parts.append(_tabular(header, body, told.translate(_LATEX) + marked))
    return "% needs \\usepackage{booktabs}\n" + "\n".join(parts)


def _tabular(header: Sequence[str], body: Sequence[Sequence[str]], caption: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return "  " + " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"

    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            line(header),
            r"\midrule",
            *(line(row) for row in body),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
