"""What the quickstart says when it is done: tables on the terminal, and a page with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leveret.runs import read_json

WHY = {
    "existence": "is it there? (POPE's three samplings)",
    "colour": "what colour is it?",
    "shape": "what shape is it?",
    "count": "how many are there?",
    "relation": "left, right, above, below",
    "choice": "multiple choice, four options",
    "box": "where is it? (IoU of at least 0.5)",
    "word": "read the drawn word",
}
READ = {"colour": "never asked", "word": "never asked", "count": "other words", "relation": "other words",
        "choice": "other words, the same options, no colours"}  # fmt: skip
"""What the language model had read of a kind before tuning; the rest it had read as it is examined."""
MORE = {
    "caption": "describe it: share of its things named (inventing costs nothing)",
    "reading": "describe it: is the word spelled right?",
    "unanswerable": "half are about what is not there (VizWiz)",
    "double": "two questions in one; nobody taught that",
    "text": "opposites, sums, facts, without a picture",
    "refusal": "requests to refuse, without a picture",
}
ANSWERS = {
    "start": "before aligning, to the eight kinds",
    "start-more": "before aligning, to these",
    "align": "after aligning, to the eight kinds",
    "align-more": "after aligning, to these",
    "tune-more": "after tuning, to these",
}
"""Pages of the stages, by folder."""
HEADER = ("task", "what is asked", "aligned", "tuned", "95 % interval", "majority", "blind")
LEGEND = (
    "aligned: before tuning, on a part of the questions. tuned: the score. blind: the same model and question with "
    "another scene's picture. majority: the best constant answer per wording, chosen on the training split."
)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """The table of the run, on the terminal and on the page."""
    aligned = results["stages"]["align"]
    return [
        [
            kind,
            WHY.get(kind, "") + (f"; before tuning: {READ[kind]}" if kind in READ else ""),
            _figure(aligned.get(kind)),
            _figure(row["score"]),
            f"{row['ci95'][0]:.3f} - {row['ci95'][1]:.3f}",
            _figure(row["majority"]),
            _figure(row["blind"]),
        ]
        for kind, row in results["tasks"].items()
    ]


def _stage_rows(results: dict[str, Any]) -> list[list[str]]:
    """What each stage taught: kinds that the eight leave out, before aligning, after it, after tuning."""
    stages = results["stages"]
    return [
        [kind, MORE[kind], *(_figure(stages[name].get(kind)) for name in ("start", "align", "tune"))]
        for kind in MORE
        if kind in stages["tune"]
    ]


def _harder_rows(results: dict[str, Any], *, intervals: bool = False) -> list[list[str]]:
    """Scores on harder pictures, a row a split; the first is the examination's own."""

    def cell(row: dict[str, Any]) -> str:
        low, high = row["ci95"]
        return f"{row['score']:.2f} ±{(high - low) / 2:.2f}" if intervals else _figure(row["score"])

    found = {"as taught": results["tasks"], **results["harder"]}
    return [
        [split, _figure(sum(row["score"] for row in rows.values()) / len(rows)), *(cell(rows[kind]) for kind in WHY)]
        for split, rows in found.items()
    ]


def say(root: Path, results: dict[str, Any]) -> None:
    """The tables and what to do next, on the terminal (80 columns)."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)

    def show(title: str, header: tuple[str, ...], rows: list[list[str]], bold: int) -> None:
        table = Table(
            title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False
        )
        for position, name in enumerate(header):
            table.add_column(name, justify="right" if position else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row[:bold], f"[bold]{row[bold]}[/]", *row[bold + 1 :])
        console.print()
        console.print(table)

    n = next(iter(results["tasks"].values()))["n"]
    rows = [[row[0], *row[2:]] for row in _rows(results)]  # what is asked stands on the page
    show(f"On scenes never seen, n = {n:,}", (HEADER[0], *HEADER[2:]), rows, 2)
    console.print(f"[dim]{LEGEND}[/]")
    if results["harder"]:
        show("What each stage teaches", ("task", "start", "aligned", "tuned"),
             [[row[0], *row[2:]] for row in _stage_rows(results)], 3)  # fmt: skip
        short = ("exist", "colour", "shape", "count", "rel", "choice", "box", "word")
        show("On harder pictures", ("pictures", "mean", *short),
             [[row[0], *(cell.lstrip("0") for cell in row[1:])] for row in _harder_rows(results)], 1)  # fmt: skip
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in results["seconds"].items() if name != "total")
    console.print(f"\n{results['seconds']['total']:.0f} s in all: {spent}.")
    console.print(f"\nEverything is in [bold]{root}[/]. Next:")
    called = _program()
    nexts = {
        f"open {root / 'report.html'}": "what happened, with pictures",
        f"{called} chat {root} {root / 'world/images/test/000003.jpg'}": "ask about any picture",
        f"{called} show {root / 'world/tune.json'} --model {root}": "one sample at every seam",
        f"{called} serve {root}": "a chat page in the browser, and OpenAI's API",
        f"{called} train bunny/v1.0-3b --dry-run": "the same kind of recipe with SigLIP and Phi-2",
    }
    width = max(map(len, nexts))
    for command, what in nexts.items():
        console.print(f"  {command:<{width}}  [dim]{what}[/]", highlight=False)
    console.print("Photos of your own: docs/tutorials/own-data.md.")


def _program() -> str:
    """How to call leveret from here: by name where it is on PATH (it is not after `make quickstart`), else by path."""
    import os
    import shutil
    import sys

    called = Path(sys.argv[0])
    if called.name != "leveret" or shutil.which("leveret"):
        return "leveret"
    near = os.path.relpath(called)
    return str(called) if near.startswith("..") else near


def write(root: Path, results: dict[str, Any], web: int, budget: int) -> None:
    """`report.html`: the story of the run on one page, with links to each station's own."""
    from leveret import pages
    from leveret.pool import open_source
    from leveret.records import IMAGE_MARK
    from leveret.runs import atomic_write, read_jsonl

    truth = {row["id"]: row for row in read_jsonl(root / "world" / "web_truth.jsonl")}
    marks = {"fits": "right", "wrong": "wrong", "dull": "dull"}

    def pictures(source: Path, n: int) -> Any:
        """The first `n` samples with a picture; web pairs with a badge that says whether their words are right."""
        pool = open_source(source, root / "world")
        shown: list[tuple[Path, str, str]] = []
        for index in range(len(pool)):
            sample = pool.sample(index)
            if sample.images and len(shown) < n:
                known = truth.get(sample.id)
                turns = sample.turns[1:] if known else sample.turns[:4]
                words = "\n".join(turn.text.replace(IMAGE_MARK, "").strip() for turn in turns)
                copied = f"\n(a copy, {known['copy']})" if known and known["copy"] != "new" else ""
                shown.append((Path(sample.images[0].path), words + copied, marks[known["words"]] if known else ""))
            if len(shown) == n:
                break
        return pages.gallery(shown)

    scores = [row["score"] for row in results["tasks"].values()]
    facts = [
        ("mean score", f"{sum(scores) / len(scores):.3f}", f"{len(scores)} kinds of question, scenes never seen"),
        ("pairs kept", f"{budget:,}", f"of {web:,} drawn"),
        ("time", f"{results['seconds']['total'] / 60:.1f} min", "the loop, install apart"),
    ]
    sections = [
        pages.Section(
            "What this is",
            [
                pages.paragraphs(
                    "A small vision-language model was made from drawings alone: a noisy web of image-text pairs "
                    "was drawn, a small clean part of it was chosen, a connector was aligned on that part, the whole "
                    "was tuned on conversations, and then examined on scenes that no step had seen. The same commands "
                    "do the same with real pictures and real backbones."
                ),
                pages.tiles(facts),
            ],
        ),
        pages.Section(
            "1. The web that was drawn",
            [
                pictures(root / "world" / "web.json", 10),
                pages.paragraphs(
                    "The badges come from `world/web_truth.jsonl`, which no station reads: the scorer has to find out."
                ),
            ],
            _diseases(truth),
        ),
        pages.Section(
            "2. What was chosen",
            [
                pictures(root / "coreset" / "coreset.json", 10),
                pages.paragraphs(_purity(root, truth)),
                pages.link("How it was chosen, with pictures at every cut", "coreset/report.html"),
            ],
            "Near copies were put together, and pairs whose words fit their picture best were kept.",
        ),
        pages.Section(
            "3. What tuning looks like",
            pictures(root / "world" / "tune.json", 5),
            "Conversations about clean scenes; only the answers are learned.",
        ),
        pages.Section(
            "4. The examination",
            [
                pages.table(_rows(results), HEADER),
                pages.paragraphs(LEGEND),
                pages.link("Every kind, with answers beside their pictures", "eval/report.html"),
            ],
            "Official rules of the benchmarks each kind is modelled on.",
        ),
        *(_stages_and_harder(root, results) if results["harder"] else ()),
        pages.Section(
            "Where the time went",
            pages.table([[name, value] for name, value in results["seconds"].items()], ("step", "seconds")),
        ),
    ]
    atomic_write(root / "report.html", pages.page("A small vision-language model, from data to answers", sections))


def _stages_and_harder(root: Path, results: dict[str, Any]) -> list[Any]:
    from leveret import pages
    from leveret.world.examination import SPLITS

    n = next(iter(next(iter(results["harder"].values())).values()))["n"]
    about = [[name, SPLITS[name].about] for name in results["harder"]]
    return [
        pages.Section(
            "5. What each stage teaches",
            [
                pages.table(_stage_rows(results), ("task", "what is asked", "start", "aligned", "tuned")),
                *(
                    pages.link(f"The answers {words}", f"stages/{name}/report.html")
                    for name, words in ANSWERS.items()
                    if (root / "stages" / name / "report.html").is_file()
                ),
            ],
            "start: the backbones with a fresh connector. Aligning teaches to see and to read, tuning what is asked.",
        ),
        pages.Section(
            "6. On harder pictures",
            [
                pages.table(_harder_rows(results, intervals=True), ("pictures", "mean", *WHY)),
                pages.paragraphs(
                    f"{n:,} questions a kind but for the first row; ± is half of a 95 % interval. Nothing of this was "
                    "trained on."
                ),
                pages.table(about, ("pictures", "what is new")),
                *(
                    pages.link(f"The answers on {name}", f"harder/{name}/report.html")
                    for name in results["harder"]
                    if (root / "harder" / name / "report.html").is_file()
                ),
            ],
        ),
    ]


def _diseases(truth: dict[str, dict[str, Any]]) -> str:
    """What ails the drawn web, counted."""
    rows, n = list(truth.values()), max(1, len(truth))
    wrong, dull = (sum(row["words"] == kind for row in rows) / n for kind in ("wrong", "dull"))
    copies = sum(row["copy"] != "new" for row in rows) / n
    return (
        f"{wrong:.0%} of the captions belong to another picture, {dull:.0%} say nothing, and {copies:.0%} of the "
        "pictures are copies."
    )


def _purity(root: Path, truth: dict[str, dict[str, Any]]) -> str:
    """How many of the kept pairs fit, against the whole web: the truth file makes it countable here."""
    fits = [row["words"] == "fits" for row in truth.values()]
    kept = [truth[row["id"]]["words"] == "fits" for row in read_json(root / "coreset" / "coreset.json")]
    return (
        f"Of the whole web {sum(fits) / len(fits):.0%} of the captions fit their picture; of the "
        f"{len(kept):,} pairs that were kept {sum(kept) / len(kept):.0%} do."
    )
