"""The page of a comparison: differences with their intervals, and the answers that turned beside their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from leveret import pages
from leveret.evaluate.compare import p_value, verdict
from leveret.evaluate.findings import Example, picture
from leveret.evaluate.forms import Item
from leveret.evaluate.gallery import Card, browse, script
from leveret.evaluate.scorers import MISSING
from leveret.evaluate.tasks import asked, load_items
from leveret.runs import DataError, RecipeError, atomic_write, read_json

KINDS = {"right_to_wrong": "only a is right", "wrong_to_right": "only b is right"}
HEADER = ["task", "n", "a", "b", "b - a", "95 % interval", "lost", "won", "p, Holm", "verdict"]
TESTS = ["task", "pictures", "test", "p", "p, McNemar", "p, bootstrap", "p, Holm"]
LEAD = (
    "Both answered the same questions. The interval of the difference resamples pictures, the same for both; McNemar's "
    "exact test asks whether the answers that turned (lost: right in a, wrong in b; won: the other way) lean to one "
    "side more than a coin would; Holm's correction pays for the number of tasks. Told apart is what passes at 5 %, "
    "the corrected test and the interval."
)
INDEPENDENT = (
    "McNemar's test takes questions as independent. Where many share a picture it is too sure; the interval and the "
    "bootstrap's p, which resample pictures, are not."
)


def write_page(found: Mapping[str, Any], out: str | Path, data: str | Path | None = None) -> Path:
    """Write what `compare` found to `out` (a folder gets `compare.html`); returns the page.

    data  where the questions' files and pictures are; without it where results.json of the first side says. Where they
          are not found the answers stand without pictures, and the page says so."""
    path = Path(out)
    path = path if path.suffix == ".html" else path / "compare.html"
    if path.parent.exists() and not path.parent.is_dir():
        raise RecipeError(f"{path.parent} is a file. Name a folder, or a page that ends with .html, with -o.")
    path.parent.mkdir(parents=True, exist_ok=True)
    items, why = _items(found, data)
    rows = found["tasks"].items()
    body = [
        [
            task, row["n"], f"{row['a']:.3f}", f"{row['b']:.3f}", f"{row['difference']:+.3f}",
            f"{row['ci95'][0]:+.3f}, {row['ci95'][1]:+.3f}", len(row["flips"]["right_to_wrong"]),
            len(row["flips"]["wrong_to_right"]), p_value(row["p_holm"]), verdict(row),
        ]
        for task, row in rows
    ]  # fmt: skip
    tests = [
        [task, row["images"], row["test"]]
        + [None if row[p] is None else p_value(row[p]) for p in ("p", "p_mcnemar", "p_bootstrap", "p_holm")]
        for task, row in rows
    ]
    notes = [f"Only in {side}: {', '.join(found[f'only_{side}'])}." for side in "ab" if found[f"only_{side}"]]
    turned: list[Any] = browse(_cards(found, items), KINDS)
    sections = [
        pages.Section("Differences", [pages.table(body, HEADER), *notes], lead=LEAD),
        pages.Section("The answers that turned", [*([why] if why else []), *turned]),
        pages.Section("The tests", pages.table(tests, TESTS), lead=INDEPENDENT),
    ]
    atomic_write(path, pages.page("Comparison", sections, f"a: {found['a']}; b: {found['b']}", script()))
    return path


def _items(found: Mapping[str, Any], data: str | Path | None) -> tuple[dict[str, dict[str, Item]], str]:
    """task -> question_id -> its item, for the pictures; and why some are not there."""
    told: Mapping[str, Any] = {}
    results = Path(found["a"]) / "results.json"
    if results.is_file():
        told = read_json(results)
    root = data or told.get("root")
    if root is None:
        return {}, "No pictures: name the data folder (--data) to see them."
    items: dict[str, dict[str, Item]] = {}
    missing = []
    for task in found["tasks"]:
        split = told.get("tasks", {}).get(task, {}).get("split", "test")
        try:
            ((row, part),) = asked(task, split)
            items[task] = {item.question_id: item for item in load_items(row, root, part)}
        except (DataError, RecipeError):
            missing.append(task)
    return items, f"No pictures of {', '.join(missing)}: {root} does not hold them (--data)." if missing else ""


def _cards(found: Mapping[str, Any], items: Mapping[str, Mapping[str, Item]]) -> Iterator[Card]:
    for task, row in found["tasks"].items():
        for kind, turned in row["flips"].items():
            for flip in turned:
                item = items.get(task, {}).get(flip["question_id"])
                words = f"{flip['prompt']}\na: {flip['a']}\nb: {flip['b']}\nright: {flip['gold']}"
                there = item is not None and item.image is not None and Path(item.image.path).is_file()
                yield Card(
                    task=task,
                    kinds=(kind,),
                    words=words,
                    picture=partial(picture, Example(item, str(flip["b"]), MISSING, "")) if there and item else None,
                    key=flip["question_id"],
                )
