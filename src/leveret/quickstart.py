"""The whole way in one command, on the drawn world: draw, choose, align, tune, examine.

This file only calls the stations in order; each of them can be called alone with the same arguments. Every step
leaves its work in one folder and a mark when it is finished, so the same command continues where it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import RunFolder, read_json, write_json

if TYPE_CHECKING:
    from leveret.world.write import WorldSize

BUDGET = 1_500
"""Pairs the coreset keeps; the drawn web is fifty times as large."""
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


def run(
    out: str | Path = "runs/quickstart",
    *,
    seed: int = 0,
    overrides: Sequence[str] = (),
    dry_run: bool = False,
) -> Path:
    """Runs, or continues, the quickstart in `out`; returns that folder.

    overrides  `world.FIELD=n` (sizes of world.write.WorldSize), `budget=n` (pairs the coreset keeps); anything else
               changes the train recipe `world`, e.g. `stages.tune.steps=100`.

    `out/results.json` holds {"tasks": {kind: {"score", "n", "ci95", "majority", "blind"}}, "seconds": {step: s}}.
    Raises RecipeError for an unknown or unusable override, and when `out` holds another quickstart.
    """
    from leveret.train.run import read as read_recipe

    size, budget, changes = _settings(overrides)
    read_recipe("world", changes)  # its faults are told now, not after minutes of drawing
    recipe = {"seed": seed, "world": asdict(size), "budget": budget, "overrides": changes}
    if dry_run:
        _say_plan(Path(out), recipe)
        return Path(out)
    folder = RunFolder.open(out, "quickstart", recipe)
    root = folder.path
    world, coreset = root / "world", root / "coreset"

    def draw() -> None:
        from leveret.world.write import draw as draw_world

        draw_world(world, seed=seed, size=size)

    def condense() -> None:
        from leveret.condense import condense as choose

        choose(world / "web.json", coreset, "world", [f"seed={seed}", f"steps.budget.count={budget}"])

    def train(stage: str) -> Callable[[], None]:
        def teach() -> None:
            from leveret.train import train as teach_stages

            data = [f"stages.align.data={coreset / 'coreset.json'}", f"stages.align.images={world}"]
            data += [f"stages.tune.data={world / 'tune.json'}", f"seed={seed}"]
            teach_stages("world", root / "train", [*data, *changes], stages=[stage])

        return teach

    def examine() -> None:
        from leveret.evaluate import evaluate

        evaluate(root / "train" / "model", world, suite="world", out=root / "eval", blind=True)

    steps: dict[str, Callable[[], None]] = {
        "draw": draw,
        "condense": condense,
        "align": train("align"),
        "tune": train("tune"),
        "examine": examine,
    }
    seconds: dict[str, float] = {}
    for name, step in steps.items():
        if not folder.is_done(name):
            began = time.perf_counter()
            step()
            folder.done(name, seconds=round(time.perf_counter() - began, 1))
        seconds[name] = float(folder.facts(name)["seconds"])
    seconds["total"] = round(sum(seconds.values()), 1)
    _publish(root / "train" / "model", root / "model")
    results = {"tasks": read_json(root / "eval" / "results.json")["tasks"], "seconds": seconds}
    write_json(root / "results.json", results)
    _report(root, results, size.web, budget)
    _say_results(root, results)
    return root


def _settings(overrides: Sequence[str]) -> tuple[WorldSize, int, list[str]]:
    """The world's size, the budget, and what is left for the train recipe."""
    from leveret.runs import RecipeError, closest
    from leveret.world.write import WorldSize

    sizes: dict[str, Any] = {}
    budget, left = BUDGET, []
    allowed = {name: type(value) for name, value in asdict(WorldSize()).items()}
    for given in overrides:
        key, _, value = given.partition("=")
        name = key.removeprefix("world.")
        if key != "budget" and name == key:
            left.append(given)
            continue
        if key != "budget" and name not in allowed:
            near = closest(name, allowed)
            hint = f" Did you mean world.{near[0]}?" if near else ""
            raise RecipeError(f"{given}: the world has no {name!r}; allowed are {', '.join(allowed)}.{hint}")
        try:
            number = int(value) if key == "budget" else allowed[name](value)
            if name != "strength" and number < (
                1 if key == "budget" or name in ("web", "tune", "turns", "test") else 0
            ):
                raise ValueError
        except ValueError:
            raise RecipeError(f"{given}: {key} takes a positive number, such as {key}=1000") from None
        if key == "budget":
            budget = int(number)
        else:
            sizes[name] = number
    return WorldSize(**sizes), budget, left


def _say_plan(root: Path, recipe: dict[str, Any]) -> None:
    from rich.console import Console

    size = recipe["world"]
    Console().print(
        f"Would draw {size['web']:,} web pairs and {size['tune']:,} conversations into {root / 'world'}, keep "
        f"{recipe['budget']:,} pairs, align and tune the recipe 'world', and ask {size['test']:,} questions of each of "
        f"{len(WHY)} kinds, twice (seeing and blind). About 4 to 6 minutes on 2 quiet cores, 0.6 GB of disk."
    )


def _publish(model: Path, place: Path) -> None:
    """Copies the final model beside the results, so that the run folder itself can be loaded."""
    import shutil

    if place.exists():
        return
    half = place.with_name(".model.new")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(model, half)
    half.rename(place)


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """The table of the run, on the terminal and on the page."""
    return [
        [
            kind,
            WHY.get(kind, ""),
            f"{row['score']:.3f}",
            f"{row['ci95'][0]:.3f} - {row['ci95'][1]:.3f}",
            *("-" if row[name] is None else f"{row[name]:.3f}" for name in ("majority", "blind")),
            f"{row['n']:,}",
        ]
        for kind, row in results["tasks"].items()
    ]


HEADER = ("task", "what is asked", "score", "95 % interval", "majority", "blind", "n")
LEGEND = (
    "blind: the same model and question with another scene's picture. "
    "majority: the best constant answer per question template, chosen on the training split."
)


def _say_results(root: Path, results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="On scenes never seen", title_justify="left")
    for position, name in enumerate(HEADER):
        if position != 1:  # what is asked stands on the page; a terminal has 80 columns
            table.add_column(name, justify="right" if position else "left")
    for row in _rows(results):
        table.add_row(row[0], f"[bold]{row[2]}[/]", *row[3:])
    console = Console(soft_wrap=True)
    console.print()
    console.print(table)
    console.print(f"[dim]{LEGEND}[/]")
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in results["seconds"].items() if name != "total")
    console.print(f"\n{results['seconds']['total']:.0f} s in all: {spent}.")
    console.print(f"\nEverything is in [bold]{root}[/]. Next:")
    called = _program()
    nexts = {
        f"open {root / 'report.html'}": "what happened, with pictures",
        f"{called} chat {root} {root / 'world/images/test/000003.jpg'}": "ask about any picture",
        f"{called} show {root / 'world/tune.json'} --model {root}": "one sample at every seam",
        f"{called} train bunny/v1.0-3b --dry-run": "the same kind of recipe with SigLIP and Phi-2",
    }
    width = max(map(len, nexts))
    for command, what in nexts.items():
        console.print(f"  {command:<{width}}  [dim]{what}[/]", highlight=False)


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


def _report(root: Path, results: dict[str, Any], web: int, budget: int) -> None:
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
            "Almost half of the captions belong elsewhere, some say nothing, and a fifth of the pictures are copies.",
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
        pages.Section(
            "5. Where the time went",
            pages.table([[name, value] for name, value in results["seconds"].items()], ("step", "seconds")),
        ),
    ]
    atomic_write(root / "report.html", pages.page("A small vision-language model, from data to answers", sections))


def _purity(root: Path, truth: dict[str, dict[str, Any]]) -> str:
    """How many of the kept pairs fit, against the whole web: the truth file makes it countable here."""
    fits = [row["words"] == "fits" for row in truth.values()]
    kept = [truth[row["id"]]["words"] == "fits" for row in read_json(root / "coreset" / "coreset.json")]
    return (
        f"Of the whole web {sum(fits) / len(fits):.0%} of the captions fit their picture; of the "
        f"{len(kept):,} pairs that were kept {sum(kept) / len(kept):.0%} do."
    )
