"""The page of a training run, and its table for the terminal: what is taught, how it goes, what it says meanwhile."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from leveret import pages
from leveret.runs import atomic_write, in_bytes
from leveret.train.best import names_of, value_of
from leveret.train.story import StageStory, Story, smooth

POINTS = 300
"""Points of a curve on the page; of a longer one the smallest and largest of each stretch are drawn."""
SHOWN = 6
"""Answers to one question that are shown, spread over the validations."""

Curve = list[tuple[float, float]]


def clock(seconds: float | None) -> str | None:
    """Seconds for people: 42 s, 7 min, 3 h 20 min."""
    if seconds is None:
        return None
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _speed(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


HEADER = ("stage", "state", "steps", "loss", "samples/s", "tokens/s", "padding", "waiting", "memory", "took", "left")


def table(story: Story) -> list[list[str | None]]:
    """One row for each stage, under HEADER."""
    rows = []
    for stage in story.stages:
        f = stage.figures()
        steps = f"{f['step']:,}\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}{f['steps']:,}" if f["steps"] else f"{f['step']:,}"
        rows.append(
            [stage.name, f["state"], steps, _figure(f["loss"]), _speed(f["samples_per_second"]),
             _speed(f["tokens_per_second"]), _share(f["padding"]), _share(f["waiting"]),
             in_bytes(f["memory"]) if f["memory"] else None, clock(f["seconds"]), clock(f["left"])]
        )  # fmt: skip
    return rows


def show(story: Story) -> None:
    """The table on the terminal, and under it what was refused, validated and changed."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    # Where nobody watches (a log, a pipe) lines need not fit 80 columns.
    console = console if console.is_terminal else Console(highlight=False, width=140)
    drawn = Table(box=None, header_style="dim", pad_edge=False)
    for place, name in enumerate(HEADER):
        drawn.add_column(name, justify="left" if place < 2 else "right")
    for row in table(story):
        drawn.add_row(*(cell or "-" for cell in row))
    console.print(f"[bold]{story.name}[/bold], {story.state}")
    console.print(drawn)
    for stage in story.stages:
        for reason, count in sorted(stage.quarantined.items(), key=lambda pair: -pair[1]):
            console.print(f"{stage.name}: {count:,} refused: {reason}", markup=False, soft_wrap=True)
        if stage.validations:
            last = stage.validations[-1]
            words = ", ".join(f"{name} {_figure(value_of(last, name))}" for name in names_of(last)[:8])
            console.print(f"{stage.name}: validated at step {last['step']:,}: {words}", markup=False, soft_wrap=True)
        if stage.best:
            console.print(f"{stage.name}: {_best(stage)}", markup=False, soft_wrap=True)
    for change in story.changes:
        console.print(_change(change), markup=False, soft_wrap=True)


def _best(stage: StageStory) -> str:
    assert stage.best is not None
    best = stage.best
    return f"best by {best['metric']}: {best['value']:.4g} at step {best['step']:,}, in {stage.folder / best['model']}"


def _change(change: Mapping[str, Any]) -> str:
    where = f"stage {change['stage']}, " if change.get("stage") else ""
    return f"{change['when']}: {where}{change['what']}: {'; '.join(change['changes'])}"


# --- the page ------------------------------------------------------------------------------------------------------


def write_page(story: Story, out: str | Path) -> Path:
    """Write the page: self-contained, pictures embedded. Returns its path."""
    out = Path(out)
    if out.is_dir():
        out = out / "report.html"
    sections = [_overview(story)]
    for stage in story.stages:
        sections += _stage(stage)
    sections.append(_how(story))
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    state = {"finished": "Finished", "running": "Running", "stopped": "Stopped, and can go on"}[story.state]
    subtitle = f"{state}. {len(story.stages)} stage{'s' * (len(story.stages) > 1)}; as it stood on {now}."
    atomic_write(out, pages.page(f"Training run: {story.name}", sections, subtitle))
    return out


def _overview(story: Story) -> pages.Section:
    seconds = [stage.figures()["seconds"] for stage in story.stages]
    now = next((stage for stage in reversed(story.stages) if stage.rows), None)
    facts: list[tuple[str, Any, str]] = [("state", story.state, now.name if now and story.state != "finished" else "")]
    if now is not None:
        f = now.figures()
        facts += [
            (f"loss in {now.name}", _figure(f["loss"]), "smoothed, of the last steps"),
            ("time in steps", clock(sum(one or 0 for one in seconds)), "without preparing, validating and saving"),
            ("peak memory", in_bytes(f["memory"]) if f["memory"] else None, "of the first process"),
        ]
        if f["left"]:
            facts.insert(
                1, (f"left of {now.name}", clock(f["left"]), f"at the pace of the last {min(50, f['step'])} steps")
            )
    body: list[Any] = [pages.tiles(facts), pages.table(table(story), HEADER)]
    if story.changes:
        rows = [
            [change["when"], change.get("stage") or "the run", change["what"], "; ".join(change["changes"])]
            for change in story.changes
        ]
        body.append(pages.table(rows, ["when", "where", "what", "how"], "Changed on the way, and gone on with"))
    lead = "Padding is the share of computed positions that hold nothing; waiting, the share of time without a batch."
    return pages.Section("How it stands", body, lead)


def _stage(stage: StageStory) -> list[pages.Section]:
    """Sections of one stage; one without a step has only its first."""
    title = stage.name.capitalize()
    body: list[Any] = []
    if parts := stage.about.get("parts"):
        rows = [
            [row["part"], row["parameters"], row["trainable"] or "frozen", f"{row['lr']:g}" if row["lr"] else None,
             row["dtype"], row["note"]]
            for row in parts
        ]  # fmt: skip
        body.append(pages.table(rows, ["part", "parameters", "learn", "rate", "type", "what it is"]))
    if notes := stage.about.get("notes"):
        body.append(pages.table(list(notes.items()), ["what", "how"]))
    if stage.quarantined:
        refused = sorted(stage.quarantined.items(), key=lambda pair: -pair[1])
        body.append(pages.table(refused, ["not used because", "samples"], "Each is named in quarantine.jsonl."))
    if not stage.rows:
        words = "Not begun yet." if stage.state == "not begun" else "No step is done yet."
        return [pages.Section(title, [*body, words])]
    sections = [pages.Section(title, body or ["An older leveret kept no table of parts."], _lead(stage))]
    sections.append(pages.Section(f"{title}: curves", _curves(stage)))
    if stage.validations:
        sections.append(_validations(stage, title))
    if stage.samples:
        sections.append(_samples(stage, title))
    sections.append(_data(stage, title))
    return sections


def _lead(stage: StageStory) -> str:
    f = stage.figures()
    words = f"{f['step']:,} of {f['steps']:,} steps" if f["steps"] else f"{f['step']:,} steps"
    words += f", {f['samples']:,} samples" if f["samples"] else ""
    if f["skipped"]:
        words += f"; {f['skipped']:,} steps were skipped, because the loss was not finite"
    return f"{words[0].upper()}{words[1:]}: {stage.state}."


def thin(curve: Curve) -> Curve:
    """At most about POINTS points: of each stretch its smallest and its largest, so that no spike is lost."""
    if len(curve) <= POINTS:
        return curve
    size = math.ceil(2 * len(curve) / POINTS)
    out: Curve = []
    for at in range(0, len(curve), size):
        piece = curve[at : at + size]
        out += sorted({min(piece, key=lambda point: point[1]), max(piece, key=lambda point: point[1])})
    if out[-1] != curve[-1]:
        out.append(curve[-1])
    return out


def _column(stage: StageStory, of: Callable[[Mapping[str, Any]], float | None]) -> Curve:
    found = [(float(row["step"]), of(row)) for row in stage.rows]
    return [(step, value) for step, value in found if value is not None and math.isfinite(value)]


def _both(curve: Curve) -> dict[str, Curve]:
    """A curve as it is, faint, and smoothed."""
    steps, values = [step for step, _ in curve], [value for _, value in curve]
    return {"each step": thin(curve), "smoothed": thin(list(zip(steps, smooth(values), strict=True)))}


def _curves(stage: StageStory) -> list[Markup]:
    """Loss first and wide; the rest two beside each other."""

    def per_second(row: Mapping[str, Any]) -> float | None:
        return row["tokens"] / row["seconds"] if row.get("seconds") and row.get("tokens") else None

    faint = {"each step"}
    loss = _column(stage, lambda row: row.get("loss"))
    wide = pages.lines(_both(loss), "step", "loss", "Mean over the supervised tokens of each step.", faint=faint)
    small = []
    parts = sorted({part for row in stage.rows for part in row.get("lr", {})})
    rates = {
        part: thin([(float(row["step"]), value_of(row, f"lr.{part}") or 0.0) for row in stage.rows]) for part in parts
    }
    if rates:
        small.append(pages.lines(rates, "step", "learning rate", "Learning rate of each part."))
    clip = stage.recipe.get("clip")
    if norm := _column(stage, lambda row: row.get("grad_norm")):
        words = f"Before it is cut to {clip:g}." if clip else "It is never cut."
        small.append(pages.lines(_both(norm), "step", "gradient norm", f"Gradient norm. {words}", faint=faint))
    if speed := _column(stage, per_second):
        small.append(
            pages.lines(
                _both(speed), "step", "tokens/s", "Tokens a second, padding not counted.", faint=faint, zero=True
            )
        )
    if memory := _column(stage, lambda row: row["memory"] / 2**30 if row.get("memory") else None):
        small.append(
            pages.lines({"memory": thin(memory)}, "step", "GiB", "Peak memory of the first process.", zero=True)
        )
    shares = {
        "padding": _column(stage, lambda r: 100 - 100 * r["tokens"] / r["positions"] if r.get("positions") else None),
        "waiting for data": _column(stage, lambda r: _of(r.get("waiting"), r.get("seconds"))),
    }
    shares = {
        name: thin(list(zip([x for x, _ in curve], smooth([y for _, y in curve]), strict=True)))
        for name, curve in shares.items()
        if curve
    }
    if shares:
        small.append(
            pages.lines(shares, "step", "%", "Positions that are padding, time without a batch; smoothed.", zero=True)
        )
    return [wide, pages.beside(small)]


def _of(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else 100 * part / whole


def _validations(stage: StageStory, title: str) -> pages.Section:
    names = list(dict.fromkeys(name for row in stage.validations for name in names_of(row)))
    charts = []
    for name in names[:8] if len(stage.validations) > 1 else []:
        found = [(float(row["step"]), value_of(row, name)) for row in stage.validations]
        charts.append(pages.lines({name: thin([(x, y) for x, y in found if y is not None])}, "step", name))
    last = stage.validations[-1]
    body: list[Any] = [
        pages.tiles([(name, _figure(value_of(last, name)), f"step {last['step']:,}") for name in names[:8]])
    ]
    body += [pages.beside(charts)] if charts else []
    if stage.best:
        best = stage.best
        words = f"The best by `{best['metric']}` is that of step {best['step']:,}, with {best['value']:.4g}:"
        body.append(f"{words} `{stage.folder / best['model']}`.")
    if len(names) > 1 and charts:
        rows = [[f"{row['step']:,}", *(value_of(row, name) for name in names[:8])] for row in stage.validations[-12:]]
        body.append(pages.table(rows, ["step", *names[:8]], "The last validations"))
    return pages.Section(f"{title}: validations", body)


def _clean(text: Any, most: int = 160) -> str:
    """Text of a model, which may hold anything: control characters become a mark, long texts are cut."""
    shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(text)).strip()
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def _samples(stage: StageStory, title: str) -> pages.Section:
    """What the model says to held-out questions, from the first validation to the last."""
    by: dict[str, list[Mapping[str, Any]]] = {}
    for row in stage.samples:
        by.setdefault(str(row.get("id", row.get("question", ""))), []).append(row)
    shown, plain = [], []
    for rows in by.values():
        count = min(SHOWN, len(rows))
        some = [rows[round(place * (len(rows) - 1) / max(1, count - 1))] for place in range(count)]
        said = [(row["step"], _clean(row.get("answer", "")) or "(nothing)") for row in some]
        head = rows[-1]
        expected = _clean(head.get("expected", ""))
        picture = stage.folder / str(head["picture"]) if head.get("picture") else None
        if picture is not None and picture.is_file():
            lines = [_clean(head.get("question", "")) or "(no question)", f"right: {expected}", ""]
            lines += [f"step {step:,}: {text}" for step, text in said]
            right = bool(expected) and said[-1][1].casefold().strip(" .") == expected.casefold().strip(" .")
            shown.append((picture, "\n".join(lines), "right" if right else ""))
        else:
            plain += [[_clean(head.get("question", "")), expected, f"{step:,}", text] for step, text in said]
    body: list[Any] = [pages.gallery(shown)] if shown else []
    if plain:
        body.append(pages.table(plain, ["question", "right", "step", "answer"]))
    lead = "The model's own answers to questions it does not learn from; it says the likeliest word each time."
    return pages.Section(f"{title}: what it says", body, lead)


def _data(stage: StageStory, title: str) -> pages.Section:
    """Shares of the sources as they were seen, over the steps."""
    seen: Counter[str] = Counter()
    for row in stage.rows:
        seen.update(row.get("sources") or {})
    if not seen:
        samples = stage.figures()["samples"] or 0
        source = stage.about.get("source") or stage.recipe.get("data", "one source")
        return pages.Section(f"{title}: data", f"All {samples:,} samples that were seen come from `{source}`.")
    names = [name for name, _ in seen.most_common(7)]
    size = max(1, math.ceil(len(stage.rows) / 60))
    curves: dict[str, Curve] = {name: [] for name in names}
    for at in range(0, len(stage.rows), size):
        piece = stage.rows[at : at + size]
        counts: Counter[str] = Counter()
        for row in piece:
            counts.update(row.get("sources") or {})
        middle = statistics.fmean(row["step"] for row in piece)
        for name in names:
            curves[name].append((middle, 100 * counts[name] / max(1, counts.total())))
    rows = [[name, count, f"{count / seen.total():.1%}"] for name, count in seen.most_common()]
    body = [
        pages.lines(curves, "step", "% of the samples", "Share of each source, as it was seen.", zero=True),
        pages.table(rows, ["source", "samples seen", "share"]),
    ]
    return pages.Section(f"{title}: data", body)


def _how(story: Story) -> pages.Section:
    import yaml

    machine = story.environment
    packages = machine.get("packages", {})
    said = ", ".join(f"{name} {packages[name]}" for name in ("leveret", "torch", "transformers") if name in packages)
    rows = [
        ["machine", f"{machine.get('platform')}, {machine.get('cores')} cores, Python {machine.get('python')}"],
        ["packages", said],
        ["gone on elsewhere", str(len(machine.get("resumed", []))) + " time(s)"],
    ]
    recipe = yaml.safe_dump(_given(story.recipe), sort_keys=False, allow_unicode=True, width=100)
    return pages.Section("Recipe and machine", [pages.table(rows, ["what", "which"]), pages.code(recipe)])


def _given(value: Any) -> Any:
    """A recipe without what was left out."""
    if isinstance(value, Mapping):
        kept = {key: _given(item) for key, item in value.items() if item not in (None, [], {})}
        return {key: item for key, item in kept.items() if item != {}}
    return [_given(item) for item in value] if isinstance(value, (list, tuple)) else value
