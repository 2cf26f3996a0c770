"""The page that shows what was chosen and why, for a person who knows none of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leveret import pages
from leveret.condense.ledger import KEPT, Ledger, Stage
from leveret.condense.ranks import hash_keys
from leveret.condense.rows import Ints, cosines
from leveret.condense.steps import STEPS, CondenseRecipe
from leveret.images import ImageFault, Root, load
from leveret.pool import Source
from leveret.records import ImageRef
from leveret.runs import DataError, atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

GROUPS, MEMBERS, NEAR_A_CUT, POINTS, SIDE = 6, 5, 5, 2500, 200
"""How many groups of copies, members of each, pictures on each side of a cut, points of the map; side of a picture."""

_NAMES = {"score": "image-text score", "centroid_cosine": "closeness to the group's centre"}
_SHORT = {"score": "score", "centroid_cosine": "closeness"}


def write_report(
    folder: Path,
    recipe: CondenseRecipe,
    ledger: Ledger,
    source: Source | None,
    images: Path | None,
    seconds: Mapping[str, float],
) -> None:
    """Writes `report.html` into `folder`."""
    gallery = Pictures(ledger, source, images)
    reached = _reached(ledger)
    sections: list[pages.Section | None] = [_funnel(recipe, ledger)]
    for position, stage in enumerate(ledger.stages):
        config = recipe.steps[stage.label]
        if stage.step == "dedup":
            sections.append(_groups(stage, ledger, gallery, config))
        elif by := getattr(config, "by", None):
            sections.append(_cut(stage, ledger, gallery, reached > position, reached >= position, by))
    sections += [_kept(ledger, gallery), _map(ledger), _refused(ledger), _recipe(recipe, ledger), _times(seconds)]
    n, kept = ledger.embeddings.length, int((ledger.fate == KEPT).sum())
    share = f" ({kept / n:.1%})" if n else ""
    subtitle = f"{kept:,} of {n:,} samples were kept{share}; what happened to the others, and why."
    title = f"Coreset: {recipe.name}" if recipe.name else "Coreset"
    atomic_write(folder / "report.html", pages.page(title, [part for part in sections if part is not None], subtitle))


def _reached(ledger: Ledger) -> Ints:
    """For each row, the position of the step that dropped it; the number of steps for what was kept."""
    labels = [stage.label for stage in ledger.stages]
    where = np.array([len(labels), *(labels.index(label) for label, _ in ledger.words)], np.int64)
    return where[ledger.fate]


class Pictures:
    """Pictures and words of rows; a picture that cannot be read any more is left out."""

    def __init__(self, ledger: Ledger, source: Source | None, images: Path | None) -> None:
        self.embeddings, self.source = ledger.embeddings, source
        self.root = Root(images) if source is None and images is not None and images.is_dir() else None

    def item(self, row: int, words: str, mark: str) -> tuple[Image, str, str] | None:
        """What `pages.gallery` takes, or None."""
        picture = self._picture(row)
        if picture is None:
            return None
        caption = self.embeddings.captions[row] or self.embeddings.ids[row]
        caption = caption if len(caption) <= 90 else caption[:88] + "..."
        return picture, f"{caption}\n{words}" if words else caption, mark

    def _picture(self, row: int) -> Image | None:
        try:
            picture = load(self._ref(row))
        except (ImageFault, DataError):
            return None
        picture.thumbnail((SIDE, SIDE))
        return picture

    def _ref(self, row: int) -> ImageRef:
        if self.source is not None:
            return self.source.sample(int(self.embeddings.index[row])).images[0]
        name = self.embeddings.images[row]
        if self.root is not None:
            path = Path(name)
            if path.is_absolute() and path.is_relative_to(self.root.path):
                name = path.relative_to(self.root.path).as_posix()
            return self.root.ref(name)
        # A folder made elsewhere names any path; without a root that was declared, nothing is opened.
        raise DataError("no folder of images was given")


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
        f"'{config.keep}' keeps one"
    )


def _told_pairs(stage: Stage, config: Any) -> tuple[str, str]:
    return "Without what has an earlier near neighbour", (
        f"{stage.before - stage.after:,} rows with a cosine above {config.threshold:g} to a row that comes before them "
        f"({config.first} first): SemDeDup's rule"
    )


def _told_band(stage: Stage, config: Any) -> tuple[str, str]:
    return f"A band of {_NAMES[config.by]}", (
        f"ranks {config.low:.0%} to {config.high:.0%}, counted from the highest{_values(stage)}"
    )


def _told_top(stage: Stage, config: Any) -> tuple[str, str]:
    return f"Highest {_NAMES[config.by]}", f"the highest {_amount(config)} kept{_values(stage)}"


def _told_drop_top(stage: Stage, config: Any) -> tuple[str, str]:
    return f"Without the highest {_NAMES[config.by]}", f"the highest {_amount(config)} left out{_values(stage)}"


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
    "top": _told_top,
    "drop_top": _told_drop_top,
    "random": _told_draw,
    "budget": _told_draw,
}
assert _TOLD.keys() == STEPS.keys(), "every step can be told"


def _funnel(recipe: CondenseRecipe, ledger: Ledger) -> pages.Section:
    embeddings = ledger.embeddings
    steps: list[tuple[str, int, str]] = [("Samples in the pool", embeddings.length, "")]
    if embeddings.refused:
        steps.append(("Readable", len(embeddings), f"{len(embeddings.refused):,} could not be used"))
    for stage in ledger.stages:
        label, note = _TOLD[stage.step](stage, recipe.steps[stage.label])
        steps.append((label, stage.after, note))
    return pages.Section(
        "What was left after each step",
        pages.funnel(steps),
        "Each step looks only at what the step before it left. Every sample's fate is in the ledger.",
    )


# --- groups of copies ----------------------------------------------------------------------------------------------


def _groups(stage: Stage, ledger: Ledger, gallery: Pictures, config: Any) -> pages.Section:
    component, kept = ledger.columns["component"], ledger.columns["representative"]
    size = ledger.columns["component_size"]
    body: list[Any] = []
    for first in _some_groups(component, size):
        rows = np.flatnonzero(component == component[first])
        chosen = int(kept[first])
        others = rows[rows != chosen]
        vectors = ledger.embeddings.vectors
        near = cosines(vectors.take(others), np.repeat(vectors.take(np.array([chosen])), len(others), axis=0))
        # The least alike are shown: they are where a group could be wrong.
        shown = others[np.argsort(near, kind="stable")[: MEMBERS - 1]]
        likeness = dict(zip(others.tolist(), near.tolist(), strict=True))
        items = [gallery.item(chosen, "", "kept")]
        for row in shown.tolist():
            items.append(gallery.item(row, f"cosine {likeness[row]:.3f} to the kept one", "dropped"))
        found = [item for item in items if item is not None]
        if found:
            more = f", of which the {len(found) - 1} least alike are shown" if len(rows) > len(found) else ""
            body += [f"A group of {len(rows):,}{more}.", pages.gallery(found)]
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


def _some_groups(component: Ints, size: Ints) -> list[int]:
    """First rows of the two largest groups and of some spread over the rest."""
    firsts = np.flatnonzero((component == np.arange(len(component))) & (size > 1))
    order = firsts[np.lexsort((firsts, -size[firsts]))]
    if len(order) <= GROUPS:
        return [int(row) for row in order]
    spread = np.linspace(2, len(order) - 1, GROUPS - 2).astype(int)
    return [int(row) for row in [*order[:2], *order[spread]]]


# --- cuts ----------------------------------------------------------------------------------------------------------


def _cut(stage: Stage, ledger: Ledger, gallery: Pictures, stays: Any, came: Any, by: str) -> pages.Section:
    """A histogram of what came to the step with its band drawn in, and pictures on both sides of each border."""
    values = ledger.columns[by]
    name = _NAMES[by]
    body: list[Any] = []
    inside = values[came]
    if len(inside):
        low, high = float(inside.min()), float(inside.max())
        edges = np.linspace(low, high if high > low else low + 1e-6, 41)
        counts = np.histogram(inside, edges)[0].tolist()
        notes = stage.notes
        bands = [(float(notes["lowest"]), float(notes["highest"]), "kept")] if "lowest" in notes else []
        caption = f"All {len(inside):,} samples that came to this step; {stage.after:,} lie in the band and stay."
        body.append(pages.histogram(counts, edges.tolist(), bands, caption, name))
    rows = np.flatnonzero(came)
    order = rows[np.argsort(-values[rows], kind="stable")]  # from the highest
    alive = stays[order]
    for words, border in (("upper", np.flatnonzero(alive)[:1]), ("lower", np.flatnonzero(alive)[-1:] + 1)):
        if not len(border) or not 0 < border[0] < len(order):
            continue
        at = int(border[0])
        near = order[max(0, at - NEAR_A_CUT) : at + NEAR_A_CUT]
        items = [
            gallery.item(row, f"{_SHORT[by]} {values[row]:.4f}", "kept" if stays[row] else "dropped")
            for row in near.tolist()
        ]
        found = [item for item in items if item is not None]
        if found:
            body += [f"Around the {words} border, from higher to lower:", pages.gallery(found)]
    if not body:
        body.append("Nothing came to this step.")
    lead = f"Step {stage.label}: {stage.before:,} came, {stage.after:,} stay."
    return pages.Section(f"The cut by {name}", body, lead)


# --- the rest ------------------------------------------------------------------------------------------------------


def _kept(ledger: Ledger, gallery: Pictures) -> pages.Section | None:
    rows = np.flatnonzero(ledger.fate == KEPT)
    some = rows[np.sort(np.argsort(hash_keys(ledger.columns["hash"][rows], 0, 7), kind="stable")[:12])]
    found = [item for row in some.tolist() if (item := gallery.item(row, "", "")) is not None]
    return pages.Section("Some of what was kept", pages.gallery(found), "Drawn at random.") if found else None


def _map(ledger: Ledger) -> pages.Section | None:
    n = len(ledger.fate)
    if n < 3:
        return None
    rows = np.sort(np.argsort(hash_keys(ledger.columns["hash"], 0, 8), kind="stable")[:POINTS])
    x = ledger.embeddings.vectors.take(rows).astype(np.float64)
    x -= x.mean(0)
    _, directions = np.linalg.eigh(x.T @ x)
    axes = directions[:, -2:][:, ::-1] if directions.shape[1] > 1 else np.repeat(directions, 2, axis=1)
    # An eigenvector's sign is arbitrary: the largest part of each is made positive.
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    labels = ["kept", *(f"dropped by {label}" for label, _ in ledger.words)]
    fates = ledger.fate[rows].tolist()
    places = [(float(a), float(b), labels[fate]) for (a, b), fate in zip(x @ axes, fates, strict=True)]
    # Kept ones first in the legend; the order of the points is the order of the steps.
    places.sort(key=lambda place: labels.index(place[2]))
    chart = pages.scatter([place[:2] for place in places], [place[2] for place in places])
    lead = (
        f"{len(rows):,} samples, drawn at random, along the two directions in which their vectors differ most "
        "(principal components). Near on this map means somewhat alike; far means unlike."
    )
    return pages.Section("A map", chart, lead)


def _refused(ledger: Ledger) -> pages.Section | None:
    if not ledger.embeddings.refused:
        return None
    counts: dict[str, int] = {}
    for line in ledger.embeddings.refused:
        counts[line["reason"]] = counts.get(line["reason"], 0) + 1
    rows = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return pages.Section(
        "What could not be used",
        pages.table(rows, ["reason", "samples"]),
        f"Each is named in {ledger.embeddings.path.name}/quarantine.jsonl.",
    )


def _recipe(recipe: CondenseRecipe, ledger: Ledger) -> pages.Section:
    rows: list[Sequence[Any]] = []
    for label, config in recipe.steps.items():
        settings = config.model_dump(exclude={"step"}, exclude_none=True)
        said = ", ".join(f"{key} = {value}" for key, value in settings.items()) or "no settings"
        rows.append([label, config.step, STEPS[config.step].title, said])
    encoder = ledger.embeddings.encoder
    lead = f"Vectors by {encoder}; seed {recipe.seed}. The same recipe on the same pool gives the same ids."
    return pages.Section("The recipe", pages.table(rows, ["label", "step", "what it does", "settings"]), lead)


def _times(seconds: Mapping[str, float]) -> pages.Section | None:
    rows = [[name, f"{value:,.1f}"] for name, value in seconds.items()]
    return pages.Section("Where the time went", pages.table(rows, ["part", "seconds"])) if rows else None
