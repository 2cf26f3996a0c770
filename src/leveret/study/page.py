"""A study's page, table and results file: what varies, what it costs, and what the papers found beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from leveret import pages
from leveret.evaluate.radar import radar
from leveret.runs import atomic_write, write_json
from leveret.study.figures import (
    difference_in_words,
    gather,
    mean_in_words,
    pareto,
)
from leveret.study.files import MEASURES, Level
from leveret.study.matrix import Folder, Matrix

Row = Mapping[str, Any]
ACROSS = 5
"""Levels beside the base in one table of tasks, at most: more are wider than a page."""
MARKS = {"fits": "right", "wrong": "wrong", "dull": "dull"}
"""How a shown pair's words are."""


def publish(folder: Folder, matrix: Matrix) -> dict[str, Any]:
    """Writes results.json and report.html of what is known by now; returns the results."""
    results = gather(folder, matrix)
    write_json(folder.path / "results.json", results)
    write_page(folder.path / "report.html", results, matrix)
    return results


def write_page(path: Path, results: Row, matrix: Matrix) -> None:
    done, asked, seeds = results["whole"], results["asked"], len(results["seeds"])
    state = "" if done == asked else f" {done} of {asked} models are done."
    subtitle = f"{results['name']}: {asked} models, of {seeds} seed{'s' if seeds > 1 else ''}.{state}"
    sections = [_claims(results), *(_axis(name, axis, matrix) for name, axis in results["axes"].items())]
    sections += [_crossed(results)] if results["crossed"] else []
    sections += [_choices(name, rows, path.parent / "units") for name, rows in results["choices"].items()]
    sections += [_cost(results), _shared(results)]
    if matrix.study.about:
        sections.insert(0, pages.Section("What this is", matrix.study.about))
    atomic_write(path, pages.page(results["title"], [section for section in sections if section], subtitle))


def _claims(results: Row) -> pages.Section:
    rows = [
        [
            _over(claim["verdict"] + (f" ({claim['at_most']})" if claim["at_most"] else "")),
            _under(claim["says"], f"{claim['level']} less {claim['base']}, {' + '.join(claim['by'])}"),
            _over(_with_seeds(claim["difference"])),
            _under(claim["paper"], claim["figures"]),
        ]
        for claim in results["claims"]
    ]
    lead = (
        "Agrees, disagrees: the whole 95 % interval of our difference lies where the finding would have it, or on the "
        "other side. Not decided: neither. Intervals are Student's over seeds, paired; the drawn world is "
        "small, so what it says of large models is a hint."
    )
    header = ["verdict", "the finding, and what is compared", "difference (95 %)", "the paper, its figures"]
    body: Any = pages.table(rows, header) if rows else "This study takes up no paper's finding."
    return pages.Section("What the papers found", body, lead if rows else "")


def _axis(name: str, axis: Row, matrix: Matrix) -> pages.Section:
    levels, base = axis["levels"], axis["base"]
    known = {level: row for level, row in levels.items() if row["n"]}
    words = [row["words"] for row in known.values() if row["words"] is not None]
    told = bool(words) and max(words) - min(words) >= 0.1
    first = matrix.study.measures[0]
    rows = [
        [
            _under(
                f"{level} (base)" if level == base else level,
                row["about"] or _changes(matrix.study.axes[name].levels[level]),
            ),
            _over(mean_in_words(row, first != "loss")),
            _over(difference_in_words(row["difference"])),
            _over(_p(row["difference"])),
            row["n"],
            *([None if row["words"] is None else round(row["words"], 2)] if told else []),
            None if row["seconds"] is None else round(row["seconds"]),
            row["trainable"],
        ]
        for level, row in levels.items()
    ]
    header = [
        "level",
        f"{_headline(first)} (95 %)",
        f"less {base}",
        "p (Holm)",
        "seeds",
        *(["words an answer"] if told else []),
        "seconds",
        "weights taught",
    ]
    most = max((row["n"] for row in known.values()), default=0)
    bars = [
        pages.Bar(level + (f" (n = {row['n']})" if row["n"] < most else ""), row["mean"], row["low"], row["high"])
        for level, row in known.items()
    ]
    tasks = list(dict.fromkeys(task for row in known.values() for task in row["tasks"]))
    body: list[Markup | str] = [pages.table(rows, header)]
    if bars:
        highest = max(max(bar.value, bar.high or 0.0) for bar in bars)
        told_of = f"Mean {_headline(first)} over seeds, and its 95 % interval."
        body.append(pages.bars(bars, maximum=1.0 if first != "loss" else 1.05 * highest, caption=told_of))
        caption = f"Mean and interval of each, and the difference to {base} with its own."
        for columns in _across(list(known), base) if tasks else []:
            cells = [
                [task, *(_task(known[one]["tasks"].get(task), task != "loss") for one in columns)] for task in tasks
            ]
            body.append(pages.table(cells, ["", *columns], caption=caption))
        body += [f"`{one}`: {MEASURES[one]}." for one in matrix.study.measures if one != "suite"]
        body += [_radar(known, asked, matrix)] if (asked := [task for task in tasks if task not in MEASURES]) else []
    return pages.Section(name, body, axis["question"])


def _across(levels: list[str], base: str) -> list[list[str]]:
    """The columns of tables that are no wider than a page, alike in number, the base in each."""
    others = [level for level in levels if level != base]
    size = -(-len(others) // max(1, -(-len(others) // ACROSS))) or 1
    parts = [others[at : at + size] for at in range(0, len(others), size)] or [[]]
    return [[level for level in levels if level == base or level in part] for part in parts]


def _headline(measure: str) -> str:
    """What a table calls a study's first measure."""
    return "score" if measure == "suite" else measure


def _under(name: str, more: str) -> Markup:
    """A cell of two lines."""
    return Markup('{}<span class="under">{}</span>').format(name, more)


def _over(figure: str | None) -> Markup | None:
    """A figure, and what stands behind it in brackets on a line of its own."""
    if figure is None:
        return None
    value, _, more = figure.partition(" (")
    return Markup('{}<span class="range">{}</span>').format(value, more.removesuffix(")"))


def _task(row: Row | None, share: bool) -> Markup | None:
    """What a level scores in one task, over the difference to the base."""
    cell = _over(mean_in_words(row, share))
    if cell is None or not row or not (told := difference_in_words(row["difference"])):
        return cell
    return cell + (_over(told) or "")


def _choices(axis: str, rows: Row, units: Path) -> pages.Section:
    """What each level's choice of pairs holds, and some of it."""
    body: list[Markup | str] = []
    table = [
        [
            level,
            f"{row['kept']:,.0f}",
            *(None if row[name] is None else f"{row[name]:.1%}" for name in ("fits", "copies")),
            f"{row['scenes']:,.0f}",
            None if row["characters"] is None else f"{row['characters']:.0f}",
        ]
        for level, row in rows.items()
    ]
    seeds = sorted({row["n"] for row in rows.values()})
    unequal = "; of some levels fewer seeds are done" if len(seeds) > 1 else ""
    header = ["level", "kept", "fits", "copies", "scenes", "characters"]
    body.append(pages.table(table, header, f"Mean over {seeds[-1]} seed{'s' if seeds[-1] > 1 else ''}{unequal}."))
    for level, row in rows.items():
        items = [
            (units / row["unit"] / "shown" / one["file"], _words(one), MARKS[one["words"]]) for one in row["shown"]
        ]
        there = [item for item in items if item[0].is_file()]
        body += [f"`{level}`", pages.gallery(there)] if there else []
    lead = (
        "By the world's own truth, which no method reads. fits: captions that are true of their picture. copies: pairs "
        "whose scene another kept pair shows too. scenes: distinct ones. characters: of a caption, on average. "
        "Pictures are spread evenly over one seed's choice."
    )
    return pages.Section(f"What each {axis} chose", body, lead)


def _words(shown: Mapping[str, str]) -> str:
    return shown["caption"] + (f"\n(a copy, {shown['copy']})" if shown["copy"] != "new" else "")


def _changes(level: Level) -> str:
    """What a level is that says nothing of itself: what it changes of the base."""
    if level.average is not None:
        return f"the mean of {' and '.join(level.average.levels)}"
    told = [*level.train, *(f"world.{key}={value}" for key, value in level.world.items())]
    if (how := level.choose) is not None:
        told.append("pairs chosen by " + ("the truth" if how.oracle else " ".join([how.recipe, *how.set])))
    return ", ".join(told) or "as the study has it"


def _radar(known: Row, tasks: list[str], matrix: Matrix) -> Markup:
    groups = dict(matrix.study.radar) or {task: (task,) for task in tasks}
    series = {}
    for level, row in list(known.items())[:6]:
        values = []
        for members in groups.values():
            own = [row["tasks"][task]["mean"] for task in members if task in row["tasks"]]
            values.append(sum(own) / len(own) if own else None)
        series[level] = values
    return radar(list(groups), series, "Mean score over seeds, one spoke a kind of question.")


def _cost(results: Row) -> pages.Section:
    if not results["costs"]:
        over = "Nothing was taught." if results["whole"] == results["asked"] else "Nothing is taught yet."
        return pages.Section("Cost beside score", over)
    first = results["measures"][0]
    points = {label: (row["seconds"], row["score"]) for label, row in results["costs"].items()}
    good = {label: (cost, -score if first == "loss" else score) for label, (cost, score) in points.items()}
    best, head = set(pareto(good)), _headline(first)
    rows = [
        [label, round(cost), score, "nothing is cheaper and as good" if label in best else ""]
        for label, (cost, score) in sorted(points.items(), key=lambda item: item[1])
    ]
    body = [
        pages.plot(points, "seconds taught", head, "The line joins what nothing beats on both.", front=best),
        pages.table(rows, ["level", "seconds taught, mean", f"{head}, mean", ""]),
    ]
    lead = (
        "Seconds are this machine's, of every stage, as if nothing were shared; without the time that other work had "
        "its cores. Over the seeds that all levels have."
    )
    return pages.Section("Cost beside score", body, lead)


def _crossed(results: Row) -> pages.Section:
    """All combinations, where a study has them."""
    first, rows = results["measures"][0], results["crossed"]
    table = []
    for row in rows:
        figures = (mean_in_words(row, first != "loss"), difference_in_words(row["difference"]))
        table.append([*row["levels"].values(), *map(_over, figures), row["n"]])
    header = [*rows[0]["levels"], f"{_headline(first)} (95 %)", "less the base", "seeds"]
    lead = "Above each axis is told with the others at their base; here is every combination."
    return pages.Section("All combinations", pages.table(table, header), lead)


def _shared(results: Row) -> pages.Section:
    rows = [
        [kind, row["made"], row["needed"], round(row["seconds"]), round(row["saved"])]
        for kind, row in results["ledger"].items()
    ]
    lead = "Each piece of work is known by what goes into it, and serves all models that need it."
    return pages.Section(
        "What was shared", pages.table(rows, ["work", "made", "needed", "seconds", "seconds saved"]), lead
    )


def _with_seeds(found: Row | None) -> str | None:
    told = difference_in_words(found)
    if told is None or found is None:
        return told
    return f"{told.removesuffix(')')}, n = {found['n']})" if told.endswith(")") else f"{told} (n = {found['n']})"


def _p(found: Row | None) -> str | None:
    if not found or found.get("p_holm") is None:
        return None
    return f"{found['p']:.3f} ({found['p_holm']:.3f})"


def say(results: Row, out: Path) -> None:
    """The tables in the terminal."""
    from rich.console import Console
    from rich.table import Table

    console, first = Console(), results["measures"][0]
    for name, axis in results["axes"].items():
        table = Table(title=f"{name}: {axis['question']}", title_justify="left")
        for head in ("level", f"{_headline(first)} (95 %)", f"less {axis['base']}", "p (Holm)", "seeds"):
            table.add_column(head)
        for level, row in axis["levels"].items():
            found = row["difference"]
            cells = (mean_in_words(row, first != "loss"), difference_in_words(found), _p(found), str(row["n"]))
            table.add_row(level, *(cell or "" for cell in cells))
        console.print(table)
    for claim in results["claims"]:
        found = difference_in_words(claim["difference"]) or "-"
        bound = f", {claim['at_most']}" if claim["at_most"] else ""
        console.print(f"{claim['verdict']}: {claim['says']} [{claim['paper']}]; here {found}{bound}", markup=False)
    console.print(f"{out / 'report.html'}", markup=False)
