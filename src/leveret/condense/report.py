"""The page that shows what was chosen and why, for a person who knows none of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leveret import pages
from leveret.condense.border import in_words
from leveret.condense.columns import load as load_columns
from leveret.condense.given import Given
from leveret.condense.ledger import Excerpt, Stage, places, under
from leveret.condense.ranks import hash_keys
from leveret.condense.rows import Doubles, Ints, cosines, spans
from leveret.condense.steps import STEPS, CondenseRecipe, State
from leveret.condense.working import Part, Rows
from leveret.images import ImageFault, Root, load
from leveret.pool import Source
from leveret.records import ImageRef
from leveret.runs import DataError, atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

GROUPS, MEMBERS, NEAR_A_CUT, KEPT, POINTS, SIDE = 6, 5, 5, 12, 2500, 200
"""How many groups of copies, members of each, pictures on each side of a cut, pictures of what is kept, points of the
map; side of a picture."""

LOOKED_AT = 300_000
"""Rows that a page looks at: all of so many, a sample of more. So the memory it takes does not grow with the rows."""

_NAMES = {"score": "image-text score", "centroid_cosine": "closeness to the group's centre"}
_SHORT = {"score": "score", "centroid_cosine": "closeness"}


def write_report(
    folder: Path,
    recipe: CondenseRecipe,
    given: Given,
    state: State,
    stages: Sequence[Stage],
    source: Source | None,
    images: Path | None,
    summary: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> None:
    """Writes `report.html` into `folder`.

    Counts are of all rows: they are the stages' and the summary's. Histograms, the map, and pictures at a cut are of at
    most LOOKED_AT rows; the page says so where that is a sample.
    """
    excerpt = Excerpt.of(state, stages, LOOKED_AT)
    gallery = Pictures(state, given, source, images)
    sections: list[pages.Section | None] = [_funnel(recipe, stages, summary)]
    for position, stage in enumerate(stages):
        config = recipe.steps[stage.label]
        if stage.step == "dedup":
            sections.append(_groups(stage, excerpt, gallery, config))
        elif by := getattr(config, "by", None):
            sections.append(_cut(stage, position, excerpt, gallery, by))
    sections += [
        _kept(state, gallery),
        _map(excerpt, given),
        _refused(given, summary),
        _recipe(recipe),
        _times(seconds),
    ]
    n, kept = summary["input"], summary["kept"]
    share = f" ({kept / n:.1%})" if n else ""
    subtitle = f"{kept:,} of {n:,} samples were kept{share}; what happened to the others, and why."
    if not excerpt.whole:
        subtitle += (
            f" Counts are of all samples; histograms, the map and the pictures around a cut are of a sample of "
            f"{len(excerpt):,} of {excerpt.total:,} rows, drawn by their ids."
        )
    title = f"Coreset: {recipe.name}" if recipe.name else "Coreset"
    atomic_write(folder / "report.html", pages.page(title, [part for part in sections if part is not None], subtitle))


class Pictures:
    """Pictures and words of rows, looked up when they are shown; a picture that cannot be read any more is left out.

    at_hand  whether there is anything to show: a pool, or a folder of images that was declared.
    """

    def __init__(self, state: State, given: Given, source: Source | None, images: Path | None) -> None:
        self.state, self.given, self.source = state, given, source
        # A folder made elsewhere names any path; without a root that was declared, nothing is opened.
        self.root = Root(images) if source is None and images is not None and images.is_dir() else None
        self.at_hand = source is not None or self.root is not None

    def items(self, rows: Sequence[int], words: Sequence[str], marks: Sequence[str]) -> list[tuple[Image, str, str]]:
        """What `pages.gallery` takes, of rows (numbers in the source) in any order, each once."""
        if not self.at_hand:
            return []
        order = sorted(rows)
        told = dict(zip(order, self.given.words(places(self.state, np.array(order, np.int64))), strict=True))
        found = []
        for row, word, mark in zip(rows, words, marks, strict=True):
            picture = self._picture(row, told[row].image)
            if picture is not None:
                caption = told[row].caption or told[row].id
                caption = caption if len(caption) <= 90 else caption[:88] + "..."
                found.append((picture, f"{caption}\n{word}" if word else caption, mark))
        return found

    def _picture(self, row: int, name: str) -> Image | None:
        try:
            picture = load(self._ref(row, name))
        except (ImageFault, DataError):
            return None
        picture.thumbnail((SIDE, SIDE))
        return picture

    def _ref(self, row: int, name: str) -> ImageRef:
        if self.root is not None:
            return self.root.ref(under(self.root.path, name))
        assert self.source is not None, "asked only where pictures are at hand"
        return self.source.sample(row).images[0]


# --- the funnel ----------------------------------------------------------------------------------------------------


def _told_contaminated(stage: Stage, config: Any) -> tuple[str, str]:
    told = [
        f"{facts['met']:,} near one of the {facts['images']:,} of {name}"
        + (f" ({facts['refused']:,} more could not be read)" if facts["refused"] else "")
        for name, facts in stage.notes["against"].items()
    ]
    return "Without images of benchmarks", f"cosine above {config.threshold:g}: {', '.join(told)}"


def _told_cluster(stage: Stage, config: Any) -> tuple[str, str]:
    notes = stage.notes
    if notes.get("clusters") == 1:
        return "Grouped by likeness", "all in one group: every sample is compared with every other"
    groups = f"{notes.get('clusters', 0):,} groups of samples that look alike"
    return "Grouped by likeness", f"{groups}, the largest of {notes.get('largest', 0):,}; nothing is dropped here"


def _told_dedup(stage: Stage, config: Any) -> tuple[str, str]:
    notes = stage.notes
    return "One of each group of copies", (
        f"{notes.get('near_copies', 0):,} near copies (cosine above {config.threshold:g}) and "
        f"{notes.get('exact_copies', 0):,} with the very vector of the one that stays left out; of each group the rule "
        f"'{config.keep}' keeps one{_borders(stage)}"
    )


def _told_pairs(stage: Stage, config: Any) -> tuple[str, str]:
    return "Without what has an earlier near neighbour", (
        f"{stage.before - stage.after:,} rows with a cosine above {config.threshold:g} to a row that comes before them "
        f"({config.first} first): SemDeDup's rule{_borders(stage)}"
    )


def _borders(stage: Stage) -> str:
    return f"; {in_words(stage.notes['border'])}"


def _told_band(stage: Stage, config: Any) -> tuple[str, str]:
    return f"A band of {_NAMES[config.by]}", (
        f"ranks {config.low:.0%} to {config.high:.0%}, counted from the highest{_values(stage)}"
    )


def _told_top(stage: Stage, config: Any) -> tuple[str, str]:
    return f"Highest {_NAMES[config.by]}", f"the highest {_amount(config)} kept{_values(stage)}"


def _told_drop_top(stage: Stage, config: Any) -> tuple[str, str]:
    return f"Without the highest {_NAMES[config.by]}", f"the highest {_amount(config)} left out{_values(stage)}"


def _told_density(stage: Stage, config: Any) -> tuple[str, str]:
    notes, first = stage.notes, {"hard": "the least typical first", "easy": "the most typical first", "random": "any"}
    shares = f"; of a cluster between {notes['least']:.1%} and {notes['most']:.1%}" if "least" in notes else ""
    return "More of what is varied", (
        f"{_amount(config)}, more of clusters that are wide and stand apart (density-based pruning), "
        f"{first[config.keep]}{shares}"
    )


def _told_image_cluster(stage: Stage, config: Any) -> tuple[str, str]:
    notes = stage.notes
    return "Clusters that hold a target", (
        f"{notes['clusters']:,} clusters are the nearest of at least one of {notes['targets']:,} target images"
    )


def _told_draw(stage: Stage, config: Any) -> tuple[str, str]:
    return "Drawn at random", f"{_amount(config)}, in an order that only the ids and the seed decide"


def _values(stage: Stage) -> str:
    notes = stage.notes
    return f" (from {notes['lowest']:.4g} to {notes['highest']:.4g})" if "lowest" in notes else ""


def _amount(config: Any) -> str:
    return f"{100 * config.share:.3g} %" if config.share is not None else f"{config.count:,}"


_TOLD: dict[str, Callable[[Stage, Any], tuple[str, str]]] = {
    "contaminated": _told_contaminated,
    "cluster": _told_cluster,
    "dedup": _told_dedup,
    "pairs": _told_pairs,
    "score": _told_band,
    "centroid": _told_band,
    "density": _told_density,
    "image_cluster": _told_image_cluster,
    "top": _told_top,
    "drop_top": _told_drop_top,
    "random": _told_draw,
    "budget": _told_draw,
}
assert _TOLD.keys() == STEPS.keys(), "every step can be told"


def _funnel(recipe: CondenseRecipe, stages: Sequence[Stage], summary: Mapping[str, Any]) -> pages.Section:
    n, refused = summary["input"], summary["refused"]
    steps: list[tuple[str, int, str]] = [("Samples in the pool", n, "")]
    if refused:
        steps.append(("Readable", n - refused, f"{refused:,} could not be used"))
    for stage in stages:
        label, note = _TOLD[stage.step](stage, recipe.steps[stage.label])
        steps.append((label, stage.after, note))
    return pages.Section(
        "What was left after each step",
        pages.funnel(steps),
        "Each step looks only at what the step before it left. Every sample's fate is in the ledger.",
    )


# --- groups of copies ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """A component of near copies. component, keeper: rows that name it and that stay of it. part: where its first
    member is, and all others too unless rows sit in several clusters."""

    part: Part
    component: int
    keeper: int


def _groups(stage: Stage, excerpt: Excerpt, gallery: Pictures, config: Any) -> pages.Section:
    body: list[Any] = []
    rows = excerpt.judged_by(stage.label)
    for group in _some_groups(rows, stage.label, excerpt) if gallery.at_hand else []:
        others, near = _others(rows, stage.label, group)
        # The least alike are shown: they are where a group could be wrong.
        shown = np.argsort(near, kind="stable")[: MEMBERS - 1]
        told = [f"cosine {cosine:.3f} to the kept one" for cosine in near[shown].tolist()]
        found = gallery.items([group.keeper, *others[shown].tolist()], ["", *told], ["kept", *["dropped"] * len(shown)])
        if found:
            size = len(others) + 1
            more = f", of which the {len(found) - 1} least alike are shown" if size > len(found) else ""
            body += [f"A group of {size:,}{more}.", pages.gallery(found)]
    sizes = [(int(a), int(b)) for a, b in stage.notes.get("sizes", []) if int(a) > 1]
    if sizes:
        rows_ = [[f"{a:,}", f"{b:,}", f"{(a - 1) * b:,}"] for a, b in sizes[:20]]
        if len(sizes) > 20:
            rest = sizes[20:]
            words = f"{rest[0][0]:,} to {rest[-1][0]:,}"
            rows_.append([words, f"{sum(b for _, b in rest):,}", f"{sum((a - 1) * b for a, b in rest):,}"])
        body.append(pages.table(rows_, ["members", "groups", "left out"], "Groups by their size"))
    else:
        body.append("No two samples are near copies of each other.")
    lead = (
        f"Samples whose vectors have a cosine above {config.threshold:g} count as copies of each other, and so do "
        "copies of copies: it is the encoder that finds them alike. One of each group stays. The largest groups come "
        "first: they are chains, whose ends may differ (what the rule costs; a higher threshold makes them shorter). "
        "Then some of the others."
    )
    return pages.Section("Copies", body, lead)


def _some_groups(rows: Rows, label: str, excerpt: Excerpt) -> list[_Group]:
    """The two largest groups, and some spread over the rest of those that the excerpt holds the first member of."""
    found: list[tuple[int, int, int, Part, bool]] = []  # (-size, component, keeper, part, whether it is in the excerpt)
    for part in rows.parts:
        component, size, keeper = load_columns(rows.place(label, part), "component", "component_size", "keeper")
        (row,) = part.read("row")
        heads = np.flatnonzero((component == row) & (size > 1))
        heads = heads[np.lexsort((row[heads], -size[heads]))]
        seen = np.zeros(len(heads), np.bool_)
        seen[excerpt.find(row[heads])[0]] = True
        taken = seen | (np.arange(len(heads)) < 2)
        columns = (-size, row, keeper)
        told = (column[heads[taken]].tolist() for column in columns)
        found += zip(*told, [part] * int(taken.sum()), seen[taken].tolist(), strict=True)
    found.sort(key=lambda group: group[:2])
    groups = [
        _Group(part, row, keeper) for place, (_, row, keeper, part, seen) in enumerate(found) if seen or place < 2
    ]
    if len(groups) <= GROUPS:
        return groups
    return [*groups[:2], *(groups[at] for at in np.linspace(2, len(groups) - 1, GROUPS - 2).astype(int))]


def _others(rows: Rows, label: str, group: _Group) -> tuple[Ints, Doubles]:
    """Members of a group but the one that stays, ascending, and the cosine of each with that one."""
    found: list[tuple[Part, Ints, Ints]] = []
    for part in rows.parts if rows.per_row > 1 else [group.part]:
        places = np.flatnonzero(load_columns(rows.place(label, part), "component")[0] == group.component)
        if len(places):
            found.append((part, places, part.read("row")[0][places]))
    kept = next(part.reader()(places[row == group.keeper]) for part, places, row in found if group.keeper in row)
    others, near = [], []
    for part, places, row in found:
        read = part.reader()
        for span in spans(len(row), 4096):  # a chain may be long
            others.append(row[span])
            near.append(cosines(read(places[span]), np.repeat(kept, len(row[span]), axis=0)))
    number, cosine = np.concatenate(others), np.concatenate(near)
    order = np.argsort(number, kind="stable")
    order = order[number[order] != group.keeper]
    return number[order], cosine[order]


# --- cuts ----------------------------------------------------------------------------------------------------------


def _cut(stage: Stage, position: int, excerpt: Excerpt, gallery: Pictures, by: str) -> pages.Section:
    """A histogram of what came to the step with its band drawn in, and pictures on both sides of each border."""
    name = _NAMES[by]
    body: list[Any] = []
    came = np.flatnonzero(excerpt.reached >= position)
    rows, values = excerpt.row[came], excerpt.column(by, stage.label)[came]
    if len(values):
        low, high = float(values.min()), float(values.max())
        edges = np.linspace(low, high if high > low else low + 1e-6, 41)
        counts = np.histogram(values, edges)[0].tolist()
        notes = stage.notes
        bands = [(float(notes["lowest"]), float(notes["highest"]), "kept")] if "lowest" in notes else []
        caption = f"All {stage.before:,} samples that came to this step; {stage.after:,} lie in the band and stay."
        if not excerpt.whole:
            caption = (
                f"A sample: {len(values):,} of the {stage.before:,} that came to this step; of all, {stage.after:,} "
                "lie in the band and stay."
            )
        body.append(pages.histogram(counts, edges.tolist(), bands, caption, name))
    order = np.argsort(-values, kind="stable")  # from the highest
    stays = excerpt.reached[came[order]] > position
    for words, border in (("upper", np.flatnonzero(stays)[:1]), ("lower", np.flatnonzero(stays)[-1:] + 1)):
        if not len(border) or not 0 < border[0] < len(order):
            continue
        near = slice(max(0, int(border[0]) - NEAR_A_CUT), int(border[0]) + NEAR_A_CUT)
        found = gallery.items(
            rows[order[near]].tolist(),
            [f"{_SHORT[by]} {value:.4f}" for value in values[order[near]].tolist()],
            ["kept" if stay else "dropped" for stay in stays[near].tolist()],
        )
        if found:
            body += [f"Around the {words} border, from higher to lower:", pages.gallery(found)]
    if not body:
        body.append("Nothing came to this step.")
    lead = f"Step {stage.label}: {stage.before:,} came, {stage.after:,} stay."
    return pages.Section(f"The cut by {name}", body, lead)


# --- the rest ------------------------------------------------------------------------------------------------------


def _kept(state: State, gallery: Pictures) -> pages.Section | None:
    if not gallery.at_hand:
        return None
    row, key = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    for part in state.rows.parts:
        alive = state.rows.alive(part)
        rows, hashes = part.read("row", "hash")
        row, key = np.append(row, rows[alive]), np.append(key, hash_keys(hashes[alive], 0, 7))
        first = np.lexsort((row, key))[:KEPT]
        row, key = row[first], key[first]
    found = gallery.items(np.sort(row).tolist(), [""] * len(row), [""] * len(row))
    return pages.Section("Some of what was kept", pages.gallery(found), "Drawn at random.") if found else None


def _map(excerpt: Excerpt, given: Given) -> pages.Section | None:
    if len(excerpt) < 3:
        return None
    rows = np.sort(np.argsort(hash_keys(excerpt.hash, 0, 8), kind="stable")[:POINTS])
    x = given.vectors(excerpt.place[rows]).astype(np.float64)
    x -= x.mean(0)
    _, directions = np.linalg.eigh(x.T @ x)
    axes = directions[:, -2:][:, ::-1] if directions.shape[1] > 1 else np.repeat(directions, 2, axis=1)
    # An eigenvector's sign is arbitrary: the largest part of each is made positive.
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    reached, labels = excerpt.reached[rows], [*(f"dropped by {stage.label}" for stage in excerpt.stages), "kept"]
    # Kept ones first in the legend; the order of the points is the order of the steps.
    order = np.lexsort((reached, reached < len(excerpt.stages)))
    points = [(float(a), float(b)) for a, b in (x @ axes)[order]]
    chart = pages.scatter(points, [labels[fate] for fate in reached[order].tolist()])
    lead = (
        f"{len(rows):,} samples, drawn at random, along the two directions in which their vectors differ most "
        "(principal components). Near on this map means somewhat alike; far means unlike."
    )
    return pages.Section("A map", chart, lead)


def _refused(given: Given, summary: Mapping[str, Any]) -> pages.Section | None:
    if not summary["refused"]:
        return None
    rows = sorted(summary["left_out"]["read"].items(), key=lambda pair: (-pair[1], pair[0]))
    return pages.Section(
        "What could not be used",
        pages.table(rows, ["reason", "samples"]),
        f"Each is named in {given.path.name}/quarantine.jsonl.",
    )


def _recipe(recipe: CondenseRecipe) -> pages.Section:
    rows: list[Sequence[Any]] = []
    for label, config in recipe.steps.items():
        settings = config.model_dump(exclude={"step"}, exclude_none=True)
        said = ", ".join(f"{key} = {value}" for key, value in settings.items()) or "no settings"
        rows.append([label, config.step, STEPS[config.step].title, said])
    lead = f"Vectors by {recipe.encoder}; seed {recipe.seed}. The same recipe on the same pool gives the same ids."
    return pages.Section("The recipe", pages.table(rows, ["label", "step", "what it does", "settings"]), lead)


def _times(seconds: Mapping[str, float]) -> pages.Section | None:
    rows = [[name, f"{value:,.1f}"] for name, value in seconds.items()]
    return pages.Section("Where the time went", pages.table(rows, ["part", "seconds"])) if rows else None
