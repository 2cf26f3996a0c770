"""The comparison to look at: a self-contained page, and a table for the terminal. Both draw `results.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from leveret import pages
from leveret.runs import atomic_write
from leveret.study.arms import ARMS, BASELINE, METHODS
from leveret.study.findings import OURS, Row, best_method, by_seed, estimate, gain, groups
from leveret.study.measures import MEASURES

TITLE = "Does choosing data pay?"
MARKS = {"fits": "right", "wrong": "wrong", "dull": "dull"}
LIMITS = (
    "An interval is Student's, over seeds: the world, the choice and the training change with the seed, and all arms "
    "of a seed share them, so differences are paired. With three seeds it is wide, and rightly so. Many intervals "
    "stand on this page; of a hundred, five miss.\n\n"
    "The world is drawn, and its diseases are stated rates; a real web has others. The oracle reads the truth that no "
    "method may read. The windows are Bunny's, made for LAION-2B and CLIP ViT-L/14; here they meet another web and a "
    "scorer of another scale, and nothing was fitted for them. Nor was anything fitted for the other arms: each is its "
    "recipe as it is shipped, with the budget set."
)


# --- the page ------------------------------------------------------------------------------------------------------


def write_page(out: Path, results: Mapping[str, Any]) -> None:
    """Writes `report.html` into `out`."""
    sections = [_answer(results), _arms(results), _chosen(results)]
    sections += [_measure(name, results) for name in MEASURES if _has(name, results)]
    sections += _pictures(out, results)
    sections += [pages.Section("How to read it", pages.paragraphs(LIMITS)), _times(results)]
    done, missing = len(results["cells"]), len(results["missing"])
    subtitle = f"The same budget chosen in {len(_names(results))} ways from one drawn web; {done} figures"
    subtitle += f", {missing} still missing." if missing else "."
    atomic_write(out / "report.html", pages.page(TITLE, sections, subtitle))


def _has(measure: str, results: Mapping[str, Any]) -> bool:
    return any(row["measure"] == measure for row in results["comparisons"])


def _names(results: Mapping[str, Any]) -> list[str]:
    """The arms that were chosen, in the table's order."""
    there = {row["arm"] for row in results["arms"]}
    return [name for name in ARMS if name in there]


def _answer(results: Mapping[str, Any]) -> pages.Section:
    facts: list[tuple[str, Any, str]] = []
    for (measure, length, strength), arms in groups(results).items():
        if (
            strength == "usual"
            and OURS in arms
            and arms[OURS]["mean"] is not None
            and arms[BASELINE]["mean"] is not None
        ):
            label = f"{measure}{f' x{length}' if length else ''}"
            facts.append((label, f"{arms[OURS]['mean']:.3f}", f"{OURS}; {BASELINE} {arms[BASELINE]['mean']:.3f}"))
    body: list[Markup | str] = [pages.tiles(facts)] if facts else []
    body.append(pages.paragraphs("\n\n".join(results["verdict"]) or "No comparison is finished yet."))
    return pages.Section(
        "What came out", body, "At the usual strength of the web's diseases; below, at every strength."
    )


def _arms(results: Mapping[str, Any]) -> pages.Section:
    rows = [[name, ARMS[name].about] for name in _names(results)]
    lead = "Every arm keeps as many pairs of the same web. What is taught with them, and how, is the same for all."
    return pages.Section("The arms", pages.table(rows, ["arm", "how it chooses"]), lead)


# --- what was chosen -----------------------------------------------------------------------------------------------


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def contents_of(results: Mapping[str, Any], strength: str, arm: str) -> Row | None:
    """What an arm's choices hold at a strength, averaged over seeds; `budget` is what was asked for."""
    rows = [row for row in results["arms"] if row["strength"] == strength and row["arm"] == arm]
    names = ("kept", "budget", "fits", "copies", "scenes", "characters")
    return {name: _mean([row[name] for row in rows]) for name in names} if rows else None


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _whole(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


CONTENTS = ("fits", "copies", "scenes")


def _explained(found: Row | None) -> list[str | None]:
    if found is None:
        return [None, None, None]
    return [_share(found["fits"]), _share(found["copies"]), _whole(found["scenes"])]


def _chosen(results: Mapping[str, Any]) -> pages.Section:
    body: list[Markup | str] = []
    for strength in dict.fromkeys(row["strength"] for row in results["arms"]):
        rows, short = [], []
        for name in _names(results):
            if (found := contents_of(results, strength, name)) is None:
                continue
            rows.append([name, _whole(found["kept"]), *_explained(found), _whole(found["characters"])])
            if found["kept"] < found["budget"]:
                short.append(
                    f"{name} left {found['kept']:,.0f} of {found['budget']:,.0f} pairs, and uses what is there"
                )
        header = ["arm", "kept", *CONTENTS, "characters"]
        body.append(pages.table(rows, header, f"{strength} diseases, mean over seeds"))
        body += [f"{'; '.join(short)}."] if short else []
    lead = (
        "By the world's own truth, which no method reads. fits: captions that are true of their picture. copies: pairs "
        "whose scene another kept pair shows too. scenes: distinct ones. characters: of a caption, on average."
    )
    return pages.Section("What each arm chose", body, lead)


def _pictures(out: Path, results: Mapping[str, Any]) -> list[pages.Section]:
    """Some pairs of each arm, from one world: the usual one where it is there."""
    worlds = sorted((row["strength"] != "usual", row["strength"], row["seed"]) for row in results["arms"])
    body: list[Markup | str] = []
    for row in results["arms"]:
        _, strength, seed = worlds[0]
        if (row["strength"], row["seed"]) == (strength, seed):
            folder = out / "worlds" / f"{strength}-{seed}" / "arms" / row["arm"] / "shown"
            items = [(folder / item["file"], _words(item), MARKS[item["words"]]) for item in row["shown"]]
            body += [f"`{row['arm']}`", pages.gallery([item for item in items if item[0].is_file()])]
    if not body:
        return []
    lead = f"Spread evenly over each choice ({strength} diseases, seed {seed}). The badges are the world's own truth."
    return [pages.Section("Some of what each arm chose", body, lead)]


def _words(item: Mapping[str, str]) -> str:
    return item["caption"] + (f"\n(a copy, {item['copy']})" if item["copy"] != "new" else "")


# --- what it was worth ---------------------------------------------------------------------------------------------


def _measure(measure: str, results: Mapping[str, Any]) -> pages.Section:
    body: list[Markup | str] = []
    for (name, length, strength), arms in groups(results).items():
        if name == measure:
            place = f"{strength} diseases" + (f", tuned for {length} x the recipe's steps" if length else "")
            body += [_bars(arms, place), _table(results, measure, strength, arms, place)]
            body += _by_kind(results, length, strength) if MEASURES[measure].tunes else []
    row = MEASURES[measure]
    return pages.Section(row.title, body, f"{row.about} {row.better.capitalize()} is better.")


def _bars(arms: Mapping[str, Row], place: str) -> Markup:
    known = {name: row for name, row in arms.items() if row["mean"] is not None}
    baseline = known.get(BASELINE)
    items = []
    for name, row in known.items():
        values = list(row["values"].values())
        low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
        marks = {BASELINE: baseline["mean"]} if baseline and name != BASELINE else {}
        note = "" if name in METHODS else "reads the truth: an upper bound"
        items.append(pages.Bar(name, row["mean"], low, high, marks, note))
    highest = max((value for row in known.values() for value in row["values"].values()), default=1.0)
    caption = f"{place}: mean over seeds; the interval drawn is from the lowest seed to the highest."
    return pages.bars(items, maximum=max(1.0, 1.05 * highest), caption=caption)


def _table(results: Mapping[str, Any], measure: str, strength: str, arms: Mapping[str, Row], place: str) -> Markup:
    seeds = sorted({seed for row in arms.values() for seed in by_seed(row)})
    rows = []
    for name, row in arms.items():
        own, paired = by_seed(row), row["to_random"]
        rows.append(
            [
                name,
                _figure(row["mean"]),
                *(_figure(own.get(seed)) for seed in seeds),
                f"{paired['mean']:+.3f}" if paired else None,
                f"{paired['low']:+.3f} to {paired['high']:+.3f}" if paired and paired["low"] is not None else None,
                _side(measure, paired),
                *_explained(contents_of(results, strength, name)),
            ]
        )
    names = ["arm", "mean", *(f"seed {seed}" for seed in seeds), f"minus {BASELINE}", "95 % interval", "so", *CONTENTS]
    return pages.table(rows, names, f"{place}. {_best(measure, arms)}")


def _by_kind(results: Mapping[str, Any], length: int, strength: str) -> list[Markup]:
    """Scores by kind of question, mean over seeds."""
    scores: dict[str, list[Mapping[str, float]]] = {}
    for row in results["cells"]:
        if (row["length"], row["strength"]) == (length, strength) and "tasks" in row:
            scores.setdefault(row["arm"], []).append(row["tasks"])
    if not scores:
        return []
    kinds = list(next(iter(scores.values()))[0])
    rows = [[arm, *(_figure(_mean([each[kind] for each in found])) for kind in kinds)] for arm, found in scores.items()]
    return [pages.table(rows, ["arm", *kinds], "The same by kind of question, mean over seeds")]


def _best(measure: str, arms: Mapping[str, Row]) -> str:
    best = best_method(measure, arms)
    return f"Best of the methods: {best}." if best else "No arm left pairs to measure."


def _side(measure: str, paired: Mapping[str, Any] | None) -> str:
    return "" if not paired else {1: "better", -1: "worse", 0: ""}[gain(measure, estimate(paired))]


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


# --- what it cost --------------------------------------------------------------------------------------------------


def _times(results: Mapping[str, Any]) -> pages.Section:
    spent: dict[str, list[float]] = {}
    for row in results["worlds"]:
        for name, value in row["seconds"].items():
            spent.setdefault(name, []).append(value)
    for row in results["arms"]:
        spent.setdefault("choose", []).append(row["seconds"])
    for row in results["cells"]:
        spent.setdefault(f"{row['measure']}{' x' + str(row['length']) if row['length'] else ''}", []).append(
            row["seconds"]
        )
    rows = [[name, len(each), sum(each) / len(each), sum(each)] for name, each in spent.items()]
    total = sum(sum(each) for each in spent.values())
    lead = f"{total / 60:,.0f} minutes in all. An arm's first loss or examination bears its align stage."
    table = pages.table(
        [[n, k, f"{a:.1f}", f"{b:,.0f}"] for n, k, a, b in rows], ["part", "times", "seconds each", "in all"]
    )
    return pages.Section("Where the time went", table, lead)


# --- the terminal --------------------------------------------------------------------------------------------------


def say(results: Mapping[str, Any], out: Path) -> None:
    """The means in one table, the verdict's first sentence, and where the rest is."""
    from rich.console import Console
    from rich.table import Table

    names = _names(results)
    table = Table(title=TITLE, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for position, name in enumerate(["", *names]):
        table.add_column(name, justify="right" if position else "left", no_wrap=True)
    for (measure, length, strength), arms in groups(results).items():
        best = best_method(measure, arms)
        label = f"{measure}{f' x{length}' if length else ''}, {strength}"
        table.add_row(label, *(_shown(arms.get(name), name == best) for name in names))
    console = Console(soft_wrap=True, highlight=False)
    console.print()
    console.print(table)
    console.print("[dim]Means over seeds; loss: lower is better. Bold: the best that does not read the truth.[/]")
    for sentence in results["verdict"][:1]:
        console.print(sentence)
    console.print(f"\nEverything is in [bold]{out}[/]: open {out / 'report.html'}")


def _shown(row: Row | None, best: bool) -> str:
    if row is None or row["mean"] is None:
        return "-"
    return f"[bold]{row['mean']:.3f}[/]" if best else f"{row['mean']:.3f}"
