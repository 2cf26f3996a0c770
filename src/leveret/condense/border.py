"""What the borders of clusters hide: near copies of a few rows are looked for everywhere, and counted where they are.

Near copies are looked for inside clusters alone. A pair that a border parts is not found, and how many such pairs there
are depends on the data, so every run measures it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from leveret.condense import groups, ranks, screen
from leveret.condense.columns import load, save
from leveret.condense.lloyd import Map
from leveret.condense.rows import Ints
from leveret.condense.working import ALIVE, Part, Rows

SAMPLE = 256
"""Rows whose near copies are counted."""

TOGETHER = 8192
"""Rows they are compared with at once."""

SALT = 3
COUNTS = ("sampled", "with_copies", "hidden", "pairs", "pairs_hidden")


def measure(rows: Rows, label: str, threshold: float, seed: int, run: Map) -> dict[str, int]:
    """Of the first SAMPLE alive rows in the seeded order of id hashes (ties by id), as the step `label` meets them:

    sampled, with_copies (rows that have a near copy, cosine above the threshold), hidden (those of them that have none
    in a cluster of theirs), pairs (of a sampled row and a near copy), pairs_hidden (those that share no cluster).
    """
    path = rows.work / label / "border.npz"
    if path.exists():
        return dict(zip(COUNTS, load(path, "counts")[0].tolist(), strict=True))
    found = _measure(rows, threshold, seed, run)
    save(path, {"counts": np.array([found[name] for name in COUNTS])})
    return found


def _measure(rows: Rows, threshold: float, seed: int, run: Map) -> dict[str, int]:
    keys = rows.keys("hash", lambda hashes: ranks.hash_keys(hashes, seed, SALT))
    cut = ranks.cut_at(keys, min(SAMPLE, rows.count()))
    taken = []
    for part, (key, at) in zip(rows.parts, keys(), strict=True):
        places = rows.alive(part)[np.flatnonzero(cut.before(key, at))]
        if len(places):
            taken.append((part.vectors(places), part.read("row")[0][places], _clusters(rows, part)[places]))
    if not taken:
        return dict.fromkeys(COUNTS, 0)
    x, row, cluster = (np.concatenate(column) for column in zip(*taken, strict=True))
    middle = screen.middle_of(x)
    one = screen.prepare(x, middle)

    # Vectors that stayed in the order of their files are read in that order, once.
    read_from, known = (rows, None) if rows.origin is None else (rows.origin, _by_row(rows))

    def count(part: Part) -> tuple[Ints, Ints]:
        """[sample] near copies of each row among the part's, and those of its own cluster."""
        everywhere, inside = np.zeros(len(x), np.int64), np.zeros(len(x), np.int64)
        others = part.read("row")[0]
        clusters = _clusters(rows, part) if known is None else known[others][:, None]
        dead = rows.fate(part) != ALIVE if known is None else clusters[:, 0] < 0
        for places, y in part.blocks(TOGETHER):
            if (gone := dead[places]).any():
                places, y = places[~gone], y[~gone]
            for i, j, sure in screen.candidates(one, screen.prepare(y, middle), threshold):
                near = sure.copy()
                near[~sure] = groups.is_edge(x, i[~sure], y, j[~sure], threshold)
                near &= row[i] != others[places[j]]
                np.add.at(everywhere, i[near], 1)
                own = np.flatnonzero(near)
                mine, theirs = cluster[i[own]], clusters[places[j[own]]]
                own = own[(mine[:, :, None] == theirs[:, None, :]).any((1, 2))]
                np.add.at(inside, i[own], 1)
        return everywhere, inside

    everywhere, inside = np.zeros(len(x), np.int64), np.zeros(len(x), np.int64)
    for some, own in run(count, read_from.parts):
        everywhere += some
        inside += own
    return {
        "sampled": len(x),
        "with_copies": int((everywhere > 0).sum()),
        "hidden": int(((everywhere > 0) & (inside == 0)).sum()),
        "pairs": int(everywhere.sum()),
        "pairs_hidden": int((everywhere - inside).sum()),
    }


def _by_row(rows: Rows) -> NDArray[np.int32]:
    """The cluster of each row of the origin by its number; -1 for rows that are not alive."""
    assert rows.origin is not None
    most = max((int(part.read("row")[0].max(initial=-1)) for part in rows.origin.parts), default=-1)
    found = np.full(1 + most, -1, np.int32)
    for part in rows.parts:
        (row, cluster), alive = part.read("row", "cluster"), rows.alive(part)
        found[row[alive]] = cluster[alive]
    return found


def _clusters(rows: Rows, part: Part) -> Ints:
    """[n, m] the clusters that each row sits in."""
    own = part.read("cluster")[0][:, None]
    return np.concatenate([own, part.read("also")[0]], axis=1) if rows.per_row > 1 else own


def in_words(found: dict[str, int]) -> str:
    """For the terminal and the report."""
    if not found["with_copies"]:
        return f"of {found['sampled']:,} sampled rows none has a near copy in any cluster"
    return (
        f"of {found['sampled']:,} sampled rows {found['with_copies']:,} have near copies; borders of clusters hide all "
        f"of them from {found['hidden']:,} of these ({found['hidden'] / found['with_copies']:.1%}), and "
        f"{found['pairs_hidden'] / found['pairs']:.1%} of the {found['pairs']:,} pairs"
    )
