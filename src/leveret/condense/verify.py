"""A finished coreset looked at again in float64: some clusters, all pairs and all centroids; some rows beside all the
images of its benchmarks; and how close it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from leveret.condense.columns import Ids, load, order_of
from leveret.condense.groups import KEEPS
from leveret.condense.pipeline import Opened, open_coreset
from leveret.condense.ranks import hash_keys
from leveret.condense.rows import Array, Ints, spans, unit
from leveret.condense.steps import AGAINST
from leveret.condense.working import Part, Rows
from leveret.runs import DataError

LARGEST = 8_000
"""Rows of a cluster that are compared in float64 (512 MB of cosines); of a larger one, so many by the order of ids."""

MET = 256
"""Rows that are compared with the benchmarks' images: so many that were dropped for one, and so many that were not."""

SALT = 11


def verify(path: str | Path, clusters: int = 20, seed: int = 0) -> dict[str, Any]:
    """Replays `clusters` clusters of a coreset, drawn by a seed, by brute force in float64.

    Returns {"clusters", "rows", "pairs": how many were looked at, "partly": clusters that were too large to see whole,
    "labels_wrong", "groups_wrong", "keepers_wrong": rows that came out otherwise, "closest_pair": the smallest distance
    of a cosine from the threshold, "closest_centroid": the smallest lead of the nearest centroid over the next,
    "contaminated": rows compared with the benchmarks' images, "contaminated_wrong": those that came out otherwise}.
    The closest are None where there was nothing to compare. Benchmarks that are gone are not compared with. DataError
    where `path` is no finished coreset.
    """
    opened = open_coreset(path)
    grouped = [rows for rows in (*opened.state.earlier, opened.state.rows) if rows.generation > 0]
    found: dict[str, Any] = {"clusters": 0, "rows": 0, "pairs": 0, "partly": 0, "labels_wrong": 0, "groups_wrong": 0,
                             "keepers_wrong": 0, "closest_pair": None, "closest_centroid": None,
                             "contaminated": 0, "contaminated_wrong": 0}  # fmt: skip
    _contaminated(opened, seed, found)
    if not grouped or opened.state.centroids is None:
        return found
    rows = grouped[-1]
    whole = sorted(
        (int(hash_keys(np.array([cluster], np.uint64), seed, SALT)[0]), int(cluster), part.number)
        for part in rows.parts
        for cluster in np.unique(part.read("cluster")[0])
    )
    for _, cluster, number in whole[:clusters]:
        _one(opened, rows, rows.parts[number], cluster, found)
    return found


def _closer(known: float | None, value: float) -> float:
    return value if known is None else min(known, value)


def _one(opened: Opened, rows: Rows, part: Part, cluster: int, found: dict[str, Any]) -> None:
    centroids = opened.state.centroids
    assert centroids is not None
    labels, hashes = part.read("cluster", "hash")
    places = np.flatnonzero(labels == cluster)
    found["clusters"] += 1
    if len(places) > LARGEST:
        found["partly"] += 1
        places = np.sort(places[np.argsort(hash_keys(hashes[places], 0, SALT), kind="stable")[:LARGEST]])
        partly = True
    else:
        partly = False
    x = unit(part.reader()(places))
    found["rows"] += len(x)
    _labels(x, centroids, cluster, found)
    label = next((name for name in rows.judged if "component_id" in rows.made_by(name)), None)
    if label is None:
        return
    config: Any = opened.recipe.steps[label]
    cosines = x @ x.T
    above = np.triu_indices(len(x), 1)
    found["pairs"] += len(above[0])
    if len(above[0]):
        found["closest_pair"] = _closer(found["closest_pair"], float(np.abs(cosines[above] - config.threshold).min()))
    component, keeper = (rows.column(name, part)[places] for name in ("component", "keeper"))
    row, score = (column[places] for column in part.read("row", "score"))
    edges = cosines > config.threshold
    # Where rows sit in several clusters their components reach beyond this one.
    partly = partly or rows.per_row > 1
    _groups(x, edges, row, component, keeper, partly, config, centroids[np.full(len(x), cluster)], score, found)
    if rows.per_row > 1:
        _across(opened, rows, label, np.unique(component), found)


def _across(opened: Opened, rows: Rows, label: str, components: Ints, found: dict[str, Any]) -> None:
    """Whole components, wherever their members sit, and which of them stays."""
    assert opened.state.centroids is not None
    met: list[tuple[Any, ...]] = []
    for part in rows.parts:
        component = rows.column("component", part)
        inside = np.flatnonzero(np.isin(component, components) & (rows.column("component_size", part) > 1))
        if len(inside):
            ids, row, score, cluster, also = part.read("id", "row", "score", "cluster", "also")
            sits = np.concatenate([cluster[:, None], also], axis=1)[inside]
            keeper = rows.column("keeper", part)[inside]
            x = unit(part.reader()(inside))
            met.append((ids.take(inside), row[inside], score[inside], sits, component[inside], keeper, x))
    if not met:
        return
    order = order_of(Ids.join([some[0] for some in met]))
    row, score, sits, component, keeper, x = (np.concatenate([some[at] for some in met])[order] for at in range(1, 7))
    config: Any = opened.recipe.steps[label]
    for one in np.unique(component)[:LARGEST]:
        own = np.flatnonzero(component == one)
        if len(own) > LARGEST // 4:
            continue
        shared = (sits[own][:, None, :, None] == sits[own][None, :, None, :]).any((2, 3))
        edges = (x[own] @ x[own].T > config.threshold) & shared
        centroids = opened.state.centroids[sits[own, 0]]
        _groups(x[own], edges, row[own], component[own], keeper[own], False, config, centroids, score[own], found)


def _contaminated(opened: Opened, seed: int, found: dict[str, Any]) -> None:
    """Rows that were dropped for a benchmark's image, and rows that were not, beside all of these images."""
    if AGAINST not in opened.recipe.steps:
        return
    config: Any = opened.recipe.steps[AGAINST]
    rows = (*opened.state.earlier, opened.state.rows)[0]
    x: list[Array] = []  # unit vectors
    told: list[float] = []  # the cosines that were written down: NaN where a row was not dropped
    for wanted in (True, False):
        first: list[tuple[int, int, int]] = []  # (key, part, place)
        for number, part in enumerate(rows.parts):
            places = np.flatnonzero(load(rows.place(AGAINST, part), "dropped")[0] == wanted)
            keys = hash_keys(part.read("hash")[0][places], seed, SALT)
            for at in np.argsort(keys, kind="stable")[:MET].tolist():
                first.append((int(keys[at]), number, int(places[at])))
        chosen = sorted(first)[:MET]
        for number in sorted({number for _, number, _ in chosen}):
            places = np.array([place for _, of, place in chosen if of == number])
            x.extend(unit(rows.parts[number].reader()(places)))
            told.extend(load(rows.place(AGAINST, rows.parts[number]), "benchmark_cosine")[0][places])
    if not x:
        return
    chosen_rows, highest = np.stack(x), np.full(len(x), -np.inf)
    try:
        for part in [part for one in opened.benchmarks for part in one.parts()]:
            everything = part.reader()
            for some in spans(part.n, LARGEST // 2):
                images = unit(everything(np.arange(some.start, some.stop)))
                highest = np.maximum(highest, (chosen_rows @ images.T).max(1))
    except (DataError, OSError):
        return  # what is finished needs them no more
    found["contaminated"] = len(x)
    expected = np.where(highest > config.threshold, highest, np.nan)
    found["contaminated_wrong"] = int((~np.isclose(expected, told, rtol=0, atol=1e-12, equal_nan=True)).sum())


def _labels(x: Array, centroids: Array, cluster: int, found: dict[str, Any]) -> None:
    wide = centroids.astype(np.float64)
    for start in range(0, len(x), 256):
        away = _away(x[start : start + 256], wide)
        found["labels_wrong"] += int((away.argmin(1) != cluster).sum())
        if len(wide) > 1:
            two = np.partition(away, 1, axis=1)[:, :2]
            lead = float((two[:, 1] - two[:, 0]).min())
            found["closest_centroid"] = _closer(found["closest_centroid"], lead)


def _away(x: Array, centroids: Array) -> Array:
    """[n, k] distances, a centroid at a time: exact, and in little memory."""
    out = np.empty((len(x), len(centroids)))
    for place, centroid in enumerate(centroids):
        out[:, place] = np.sqrt(np.square(x - centroid).sum(1))
    return out


def _groups(
    x: Array,
    edges: Array,
    row: Ints,
    component: Ints,
    keeper: Ints,
    partly: bool,
    config: Any,
    centroids: Array,
    score: Array,
    found: dict[str, Any],
) -> None:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    _, group = connected_components(coo_matrix(edges), directed=False)
    first = np.full(group.max() + 1, len(x))
    np.minimum.at(first, group, np.arange(len(x)))
    if partly:  # what is seen of a component must at least lie in one
        found["groups_wrong"] += int((component != component[first[group]]).sum())
        return
    found["groups_wrong"] += int((component != row[first[group]]).sum())
    rule = KEEPS[config.keep]
    key = {
        "distance": lambda: np.sqrt(np.square(x - centroids.astype(np.float64)).sum(1)),
        "mean": lambda: np.round(np.sqrt(np.square(x - _means(x, group)).sum(1)), 12),
        "score": lambda: -score,
    }[rule.by]()
    order = np.lexsort((np.arange(len(x)), key, group))
    sizes = np.bincount(group)
    starts = np.r_[0, np.cumsum(sizes)[:-1]]
    chosen = row[order[starts + rule.place(sizes)]]
    found["keepers_wrong"] += int((keeper != chosen[group]).sum())


def _means(x: Array, group: Ints) -> Array:
    sums = np.zeros((group.max() + 1, x.shape[1]))
    np.add.at(sums, group, x)
    means: Array = (sums / np.bincount(group)[:, None])[group]
    return means
