"""Near copies where rows sit in several clusters, so that no border between two clusters hides a pair.

    clusters with their guests  --links-->    pairs that hold each component of a bucket together
    links of all buckets        --join-->     parent of every row, one array (8 bytes a row; on disk where that is much)
    members of components       --resolve-->  who comes first and who is kept, a share of the components at a time
    parts                       --write-->    the columns that `engine.dedup` makes where rows sit in one cluster

An edge is a cosine above the threshold between two rows that share a cluster. Distance to the centroid is to each row's
own, nearest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from leveret.condense import engine, groups, regroup
from leveret.condense.columns import Ids, load, order_of, save
from leveret.condense.lloyd import Map, finish
from leveret.condense.rows import Array, Floats, Ints, distances, spans
from leveret.condense.shards import Shard
from leveret.condense.working import Part, Rows

SHARED = 32_768
"""Rows and guests of a cluster beyond which its pairs are shared between tasks."""
TASKS = 16
"""How many there are then, at least."""
ROW_BYTES = 160
"""What a member of a component takes while its component is settled, roughly; its vector comes on top where needed."""


def dedup(
    rows: Rows, label: str, threshold: float, keep: str, centroids: Floats, most: int, memory: int, run: Map
) -> tuple[Rows, dict[str, int]]:
    """One row of each component stays; as `engine.dedup`, for rows that sit in `rows.per_row` clusters.

    memory  bytes that the parents of rows, and the members that are settled together, may take.
    """
    if not all(rows.place(label, part).exists() for part in rows.parts):
        folder = rows.work / label
        parents = Parents(folder / "parents.bin", rows, memory // 4)
        linked = [np.zeros(0, np.int64)]
        for path in _links(rows, folder, threshold, len(centroids), most, run):
            one, two = load(path, "one", "two")
            parents.join(one, two)
            linked.append(one)
        _settle(rows, label, keep, centroids, parents, np.unique(np.concatenate(linked)), memory // 4, run)
        parents.close()
    return rows.after(label, engine.DEDUPED), engine.component_sizes(rows, label)


# --- components ----------------------------------------------------------------------------------------------------


class Parents:
    """A forest over row numbers: rows of one tree are of one component.

    In memory where it takes at most `memory` bytes, else in a file.
    """

    def __init__(self, path: Path, rows: Rows, memory: int) -> None:
        n = max((int(part.read("row")[0].max(initial=-1)) for part in rows.parts), default=-1) + 1
        self.path: Path | None = None
        if 8 * n <= memory:
            self.parent: Array = np.empty(n, np.int64)
        else:
            self.path = path
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:  # a mapped file with holes kills the process when the disk is full
                for part in spans(n, groups.PENDING):
                    file.write(np.arange(part.start, part.stop).data)
            self.parent = np.memmap(path, np.int64, "r+", shape=(n,))
            return
        for part in spans(n, groups.PENDING):
            self.parent[part] = np.arange(part.start, part.stop)

    def root(self, row: Ints) -> Ints:
        """The root of each row's tree; the way there is shortened."""
        found = self.parent[row]
        while True:
            above = self.parent[found]
            if np.array_equal(above, found):
                break
            found = above
        self.parent[row] = found
        return found

    def join(self, one: Ints, two: Ints) -> None:
        """Makes the trees of each pair one, under its lowest root."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        for part in spans(len(one), groups.PENDING):
            a, b = self.root(one[part]), self.root(two[part])
            apart = a != b
            roots, ends = np.unique(np.concatenate([a[apart], b[apart]]), return_inverse=True)
            if not len(roots):
                continue
            a, b = np.split(ends, 2)
            _, group = connected_components(coo_matrix((np.ones(len(a), np.bool_), (a, b)), (len(roots),) * 2), False)
            lowest = np.full(group.max() + 1, roots[-1])
            np.minimum.at(lowest, group, roots)
            self.parent[roots] = lowest[group]

    def close(self) -> None:
        if self.path is not None:
            del self.parent
            self.path.unlink()


def _dead(rows: Rows, folder: Path) -> Path | None:
    """A file of the sorted numbers of rows that a step dropped since they were grouped; None where none did."""
    gone = [part.read("row")[0][np.flatnonzero(rows.fate(part))] for part in rows.parts]
    whole = np.sort(np.concatenate([np.zeros(0, np.int64), *gone]))
    if not len(whole):
        return None
    save(folder / "dead.npz", {"row": whole})
    return folder / "dead.npz"


def _links(rows: Rows, folder: Path, threshold: float, k: int, most: int, run: Map) -> Iterator[Path]:
    """Files of pairs (one, two) of row numbers: trees that hold the components of all clusters together."""
    dead = _dead(rows, folder)
    runs_folder = rows.work / "runs" / str(rows.generation)
    runs = [regroup.Run(runs_folder, number) for number in range(len(list(runs_folder.glob("*.npz"))))]
    shard = rows.parts[0].pieces[0][0] if rows.parts else None
    most = min(most, SHARED)
    found = folder / "links" / str(most)  # a run that goes on with other memory has other buckets, and begins anew
    buckets = regroup.plan(found / "plan.npz", runs, k, most, ("starts", "guest_starts"))

    def gathered(bucket: regroup.Bucket) -> tuple[Part, Ints, Ints, Ints]:
        """The bucket's rows, the places of those that are alive, their clusters and numbers."""
        assert shard is not None
        part = _with_guests(bucket, runs, shard, found / f"{bucket.number:06d}.rows.npz")
        row, cluster = part.read("row", "cluster")
        gone = load(dead, "row")[0] if dead is not None else np.zeros(0, np.int64)
        alive = np.flatnonzero(~np.isin(row, gone))
        return part, alive, cluster[alive], row[alive]

    def link(bucket: regroup.Bucket) -> Path:
        path = found / f"{bucket.number:06d}.npz"
        if not path.exists():
            part, alive, cluster, row = gathered(bucket)
            starts = np.flatnonzero(np.r_[True, np.diff(cluster) != 0][: len(cluster)])
            x = part.vectors(alive, lent=True)
            _write_links(path, row, groups.components(x, np.r_[starts, len(alive)], threshold))
            part.path.unlink()
        return path

    yield from run(link, [bucket for bucket in buckets if bucket.n <= most])
    for bucket in buckets:
        if bucket.n > most:  # one cluster, and its pairs are shared out
            yield from _shared_out(*gathered(bucket), found / f"{bucket.number:06d}", threshold, most, run)


def _shared_out(
    part: Part, alive: Ints, cluster: Ints, row: Ints, folder: Path, threshold: float, most: int, run: Map
) -> Iterator[Path]:
    """The links of a cluster that is too large for one task: a file for each of its blocks and all that come after."""
    size = max(1, min(most // 2, max(groups.BLOCK, len(alive) // TASKS)))

    def link(turn: int) -> Path:
        path = folder / f"{turn:06d}.npz"
        if not path.exists():
            everywhere = part.reader()
            found = groups.components_apart(lambda places: everywhere(alive[places]), len(alive), threshold, size, turn)
            _write_links(path, row, found)
        return path

    yield from run(link, range(-(-len(alive) // size)))
    part.path.unlink()


def _write_links(path: Path, row: Ints, component: Ints) -> None:
    others = np.flatnonzero(component != np.arange(len(row)))
    save(path, {"one": row[component[others]], "two": row[others]})


def _with_guests(bucket: regroup.Bucket, runs: Sequence[regroup.Run], shard: Shard, path: Path) -> Part:
    """The bucket's own rows and its guests, cluster after cluster."""
    pieces, row, cluster = [], [], []
    for run in runs:
        starts, guest_starts, own, guests = load(run.columns, "starts", "guest_starts", "row", "guest_row")
        for file, begins, numbers in ((run.vectors, starts, own), (run.guests, guest_starts, guests)):
            a, b = int(begins[bucket.first]), int(begins[bucket.last])
            if a < b:
                pieces.append((Shard(file, int(begins[-1]), shard.width, shard.dtype), a, b))
                row.append(numbers[a:b])
                inside = np.diff(begins[bucket.first : bucket.last + 1])
                cluster.append(np.repeat(np.arange(bucket.first, bucket.last), inside))
    labels = np.concatenate(cluster)
    order = np.lexsort((np.concatenate(row), labels))
    save(path, {"row": np.concatenate(row)[order], "cluster": labels[order], "source": order})
    return Part(bucket.number, path, bucket.n, tuple(pieces))


# --- who stays -----------------------------------------------------------------------------------------------------


def _settle(
    rows: Rows, label: str, keep: str, centroids: Floats, parents: Parents, linked: Ints, memory: int, run: Map
) -> None:
    """Writes what is decided of every row. linked: rows that are the end of a link, at least one of each component."""
    roots = np.unique(parents.root(linked))
    rule = groups.KEEPS[keep]
    width = rows.parts[0].pieces[0][0].width if rule.by == "mean" and rows.parts else 0
    members = sum(len(one.places) for one in _members(rows, parents, roots))
    shares = max(1, -(-members * (ROW_BYTES + 4 * width) // max(memory, 1)))
    folder = rows.work / label / "settled"
    for share in range(shares):
        found = list(_members(rows, parents, roots[share::shares]))
        if found:
            _share(found, rule, centroids, folder / f"{share:06d}", run)

    def write(part: Part) -> None:
        if not rows.place(label, part).exists():
            _write(rows, label, part, [folder / f"{share:06d}" / f"{part.number:06d}.npz" for share in range(shares)])

    finish(run(write, rows.parts))


@dataclass(frozen=True)
class _Some:
    """Members of components in one part. places, root: [n]."""

    part: Part
    places: Ints
    root: Ints


def _members(rows: Rows, parents: Parents, roots: Ints) -> Iterator[_Some]:
    """The alive rows whose root is one of some (sorted), part by part."""
    for part in rows.parts:
        alive = rows.alive(part)
        root = parents.root(part.read("row")[0][alive])
        inside = np.flatnonzero(np.isin(root, roots))
        if len(inside):
            yield _Some(part, alive[inside], root[inside])


def _share(found: Sequence[_Some], rule: groups.KeepRow, centroids: Floats, folder: Path, run: Map) -> None:
    """Settles whole components: for each part, a file of its members with their component's head, keeper and size."""

    def look(some: _Some) -> tuple[Ids, Ints, Array]:
        ids, row, cluster, score = some.part.read("id", "row", "cluster", "score")
        key: Array = -score[some.places]
        if rule.by == "distance":
            key = distances(some.part.vectors(some.places, lent=True), centroids, cluster[some.places])
        elif rule.by == "mean":
            key = some.part.vectors(some.places)
        return ids.take(some.places), row[some.places], key

    looked = list(run(look, found))
    ids = Ids.join([names for names, _, _ in looked])
    row, key = (np.concatenate([one[column] for one in looked]) for column in (1, 2))
    order = order_of(ids, np.concatenate([some.root for some in found]))  # members of a component by id, bytewise
    root = np.concatenate([some.root for some in found])[order]
    first = np.flatnonzero(np.r_[True, np.diff(root) != 0])
    sizes = np.diff(np.r_[first, len(root)])
    component = np.repeat(np.arange(len(first)), sizes)
    if rule.by == "mean":
        vectors = key
        key = groups.by_mean(lambda places: vectors[order[places]], np.arange(len(order)), component)
    else:
        key = key[order]
    head, keeper, size = np.empty_like(order), np.empty_like(order), np.empty_like(order)
    head[order] = order[first][component]
    keeper[order] = order[groups.kept_of(component, key, rule.place)]
    size[order] = sizes[component]
    ends = np.cumsum([0, *(len(some.places) for some in found)])
    for some, start, stop in zip(found, ends[:-1], ends[1:], strict=True):
        heads, keepers = head[start:stop], keeper[start:stop]
        save(
            folder / f"{some.part.number:06d}.npz",
            {
                "places": some.places, "component_size": size[start:stop],
                "component": row[heads], "component_id": ids.take(heads),
                "keeper": row[keepers], "keeper_id": ids.take(keepers),
            },
        )  # fmt: skip


def _write(rows: Rows, label: str, part: Part, settled: Sequence[Path]) -> None:
    """The columns of a part: of members what was settled, of others that they are alone."""
    row, ids = part.read("row", "id")
    alive = rows.alive(part)
    columns = {name: np.full(part.n, -1, np.int64) for name in ("component", "component_size", "keeper")}
    columns["component"][alive] = columns["keeper"][alive] = row[alive]
    columns["component_size"][alive] = 1
    heads, keepers = (np.arange(part.n) for _ in range(2))
    names = [ids]
    for path in settled:
        if path.exists():
            places, *found = load(path, "places", *columns)
            for name, column in zip(columns, found, strict=True):
                columns[name][places] = column
            for number, name in ((heads, "component_id"), (keepers, "keeper_id")):
                number[places] = sum(map(len, names)) + np.arange(len(places))
                names += load(path, name)
    every = Ids.join(names)
    gone = columns["keeper"] != row
    gone[columns["keeper"] < 0] = False
    same = np.zeros(part.n, np.bool_)
    same[alive] = ~gone[alive]
    _same_bits(part, row, np.flatnonzero(gone), columns["keeper"], same)
    rows.judge(label, part, gone, **columns, same=same, component_id=every.take(heads), keeper_id=every.take(keepers))


def _same_bits(part: Part, row: Ints, gone: Ints, keeper: Ints, same: Array) -> None:
    """Marks rows that hold their keeper's bits. Equal rows have the same nearest centroid, so both are in one part."""
    order = np.argsort(row)
    at = np.minimum(np.searchsorted(row[order], keeper[gone]), len(row) - 1)
    here = row[order[at]] == keeper[gone]
    ours, theirs = gone[here], order[at[here]]
    if len(ours):
        places, back = np.unique(np.concatenate([ours, theirs]), return_inverse=True)
        data = np.ascontiguousarray(part.vectors(places, lent=True)).view(np.uint8).reshape(len(places), -1)
        one, two = np.split(back, 2)
        for some in spans(len(ours), 4096):
            same[ours[some]] = (data[one[some]] == data[two[some]]).all(1)
