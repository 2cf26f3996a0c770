"""The chain at any size keeps the ids of a float64 brute force, whatever files, chunks, buckets and workers it had."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from leveret.condense import border, engine, groups, linked, lloyd, ranks, screen
from leveret.condense.columns import Ids, order_of
from leveret.condense.rows import Array, first_of_equal, unit
from leveret.condense.shards import Shard, open_npy, open_parquet
from leveret.condense.working import Part, Rows
from leveret.runs import DataError

Pool = tuple[Array, list[str], Array]

# --- pools ----------------------------------------------------------------------------------------------------------


def _unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def pool(kind: str, n: int = 1500, width: int = 48, seed: int = 0) -> Pool:
    """Rows, ids and scores; scores have many ties."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, width))
    x = centres[rng.integers(0, 12, n)] + 0.8 * rng.standard_normal((n, width))
    some = n // 3
    x[:some] = x[rng.integers(0, n, some)] + rng.uniform(0, 0.6, (some, 1)) * rng.standard_normal((some, width))
    if kind == "hub":
        x[some : 2 * some] = x[0]  # a placeholder, bit for bit
        x[2 * some : 2 * some + 100] = x[0] + 1e-3 * rng.standard_normal((100, width))
    if kind == "chains":  # each row near the next one alone
        angle = np.arange(some) * 0.4
        x[:some] = 0
        x[:some, 0], x[:some, 1] = np.cos(angle[:, None] * 0.05)[:, 0], np.sin(angle[:, None] * 0.05)[:, 0]
        x[:some] += 0.02 * rng.standard_normal((some, width))
    x = _unit(x)
    if kind == "threshold":  # pairs whose cosine is within 1e-3 of 0.86, on both sides
        for at in range(0, some - 1, 2):
            away = rng.standard_normal(width)
            away = _unit((away - away @ x[at] * x[at])[None])[0]
            cosine = 0.86 + rng.uniform(-1e-3, 1e-3) * rng.choice([1, 1e-3, 1e-6])
            x[at + 1] = cosine * x[at] + np.sqrt(1 - cosine**2) * away
    if kind == "outlier":  # a dimension that is large in every row, as encoders have them
        x[:, 3] += 1.5
    if kind == "lengths":  # rows are taken by their direction
        x *= rng.uniform(0.1, 9, (n, 1))
    dtype = np.float16 if kind == "float16" else np.float32
    ids = [f"id{int(v)}" for v in rng.permutation(n)]
    return x.astype(dtype), ids, rng.choice(np.linspace(0, 1, 40), n)


KINDS = ("ordinary", "hub", "chains", "threshold", "float16", "outlier", "lengths")


# --- both ways ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    k: int
    iterations: int = 4
    sample: int = 600
    threshold: float = 0.86
    keep: str = "middle"
    score: tuple[str, str] | None = ("0.40", "0.60")
    centroid: tuple[str, str] | None = ("0.15", "0.35")
    budget: int | None = None
    seed: int = 0
    per_row: int = 1


def brute(given: Pool, rules: Rules, centroids: Array) -> set[bytes]:
    """All in float64, all pairs, by the rules of docs/condense.md."""
    x, ids, score = given
    u = x.astype(np.float64)
    u /= np.sqrt(np.square(u).sum(1))[:, None]
    c = centroids.astype(np.float64)
    away = np.stack([np.sqrt(np.square(row - c).sum(1)) for row in u])
    label = away.argmin(1)
    sits = np.zeros(away.shape, np.bool_)
    np.put_along_axis(sits, np.argsort(away, axis=1, kind="stable")[:, : rules.per_row], True, axis=1)
    edges = (u @ u.T > rules.threshold) & (sits.astype(np.float32) @ sits.T.astype(np.float32) > 0)
    count, group = connected_components(coo_matrix(edges), directed=False)
    rule = groups.KEEPS[rules.keep]
    kept: list[int] = []
    for g in range(count):
        members = np.array(sorted(np.flatnonzero(group == g), key=lambda i: ids[i].encode()))
        middle = u[members].sum(0) / len(members)
        key = {
            "distance": lambda i: away[i, label[i]],
            "mean": lambda i, middle=middle: round(float(np.sqrt(np.square(u[i] - middle).sum())), 12),
            "score": lambda i: -score[i],
        }[rule.by]
        inside = sorted(members, key=lambda i: (key(i), ids[i].encode()))
        kept.append(inside[int(rule.place(np.array(len(inside))))])
    length = np.sqrt(np.square(c).sum(1))
    near = np.array([(u[i] * (c[label[i]] / (length[label[i]] or 1.0))).sum() for i in range(len(u))])
    for values, window in ((score, rules.score), (near, rules.centroid)):
        if window is not None:
            kept.sort(key=lambda i: (-values[i], ids[i].encode()))
            kept = kept[ranks.rank_of(window[0], len(kept)) : ranks.rank_of(window[1], len(kept))]
    if rules.budget is not None:
        drawn = ranks.hash_keys(ranks.hash_ids(ids[i].encode() for i in kept), rules.seed, engine.SALT_DRAW)
        order = sorted(range(len(kept)), key=lambda at: (int(drawn[at]), ids[kept[at]].encode()))
        kept = [kept[at] for at in order[: rules.budget]]
    return {ids[i].encode() for i in kept}


def grouped(
    given: Pool, rules: Rules, work: Path, *, shards: int = 3, chunk: int = 400, most: int = 300, run: lloyd.Map = map
) -> tuple[Rows, Array]:
    """The rows in files, by clusters, and the centroids that were trained."""
    x, ids, score = given
    work.mkdir(parents=True)
    files = []
    cuts = np.linspace(0, len(x), shards + 1).astype(int)
    for number, (a, b) in enumerate(pairwise(cuts.tolist())):
        np.save(work / f"{number}.npy", x[a:b])
        files.append(open_npy(work / f"{number}.npy"))

    def take(piece: tuple[Part, int]) -> Part:
        part, first = piece
        inside = slice(first, first + part.n)
        return engine.ingest(part, np.arange(first, first + part.n), Ids.of(ids[inside]), score[inside])

    rows = Rows(work, 0, tuple(run(take, engine.chunks_of(files, work / "rows" / "0", chunk))))
    training = engine.training_rows(rows, rules.sample, rules.seed, work / "training.rows", run)
    centroids, _ = engine.train(training, rules.k, rules.iterations, run)
    return engine.group(rows, centroids, most, run, rules.per_row), centroids


def chain(
    given: Pool,
    rules: Rules,
    work: Path,
    *,
    shards: int = 3,
    chunk: int = 400,
    most: int = 700,
    workers: int = 1,
    memory: int = 1 << 30,
) -> tuple[set[bytes], Array]:
    """By the engine, in files; the ids kept, and the centroids it trained."""
    with ThreadPoolExecutor(workers) as threads:

        def run(function: Callable[[Any], Any], items: Any) -> Iterator[Any]:
            return threads.map(function, items)

        rows, centroids = grouped(given, rules, work, shards=shards, chunk=chunk, most=most, run=run)
        told = (rows, "dedup", rules.threshold, rules.keep, centroids, most)
        rows, sizes = engine.dedup(*told, run) if rules.per_row == 1 else linked.dedup(*told, memory, run)
        assert sum(int(size) * count for size, count in sizes.items()) == len(given[0])
        for label, by, window in (("score", "score", rules.score), ("centroid", "centroid_cosine", rules.centroid)):
            rows = rows if window is None else engine.band(rows, label, by, *window)
        rows = rows if rules.budget is None else engine.draw(rows, "budget", rules.budget, rules.seed)
    kept = [name for _, names in engine.kept(rows) for name in names.at(np.arange(len(names)))]
    assert len(kept) == len(set(kept)) == rows.count()
    return set(kept), centroids


# --- the chain ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["int8", "float32"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As on a machine that multiplies 8-bit numbers well, and as on one that does not."""
    monkeypatch.setattr(screen, "has_int8", lambda: request.param == "int8")
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 9, 60])
def test_the_kept_ids_are_those_of_a_float64_brute_force(kind: str, k: int, tmp_path: Path, products: str) -> None:
    given, rules = pool(kind), Rules(k=k)
    kept, centroids = chain(given, rules, tmp_path / "w")
    assert kept == brute(given, rules, centroids)
    assert kept or (kind, k) == ("outlier", 1)  # there all is one component, and a window of one row holds none
    deduplicated = replace(rules, score=None, centroid=None, keep="far")
    kept, again = chain(given, deduplicated, tmp_path / "v")
    assert np.array_equal(again, centroids) and kept == brute(given, deduplicated, centroids)


@pytest.mark.parametrize("kind", ["ordinary", "hub", "float16"])
def test_files_chunks_buckets_and_workers_change_no_id(kind: str, tmp_path: Path) -> None:
    x, ids, score = pool(kind, n=600)
    rules = Rules(k=7, budget=40, score=None, centroid=None)
    expected, centroids = chain((x, ids, score), rules, tmp_path / "a")
    assert len(expected) == 40
    shuffled = np.random.default_rng(1).permutation(len(x))
    other = x[shuffled], [ids[i] for i in shuffled], score[shuffled]
    ways: list[dict[str, int]] = [
        {"shards": 1, "chunk": 5000, "most": 5000},
        {"shards": 7, "chunk": 33, "most": 40, "workers": 2},
    ]
    for place, way in enumerate(ways):
        kept, same = chain(other, rules, tmp_path / f"b{place}", **way)
        assert np.array_equal(same, centroids) and kept == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "keep"), [(9, "middle"), (60, "inner-middle"), (60, "best-score"), (2, "far")])
def test_rows_that_sit_in_two_clusters_keep_the_ids_of_a_brute_force(
    kind: str, k: int, keep: str, tmp_path: Path
) -> None:
    given, rules = pool(kind, n=400), Rules(k=k, keep=keep, score=None, centroid=None, per_row=2)
    kept, centroids = chain(given, rules, tmp_path / "a")
    assert kept == brute(given, rules, centroids)
    # Other files, a cluster that no task can hold, parents on disk and members settled in several shares.
    x, ids, score = given
    shuffled = np.random.default_rng(1).permutation(len(x))
    other = x[shuffled], [ids[i] for i in shuffled], score[shuffled]
    again, same = chain(other, rules, tmp_path / "b", shards=5, chunk=70, most=50, workers=2, memory=20_000)
    assert np.array_equal(same, centroids) and again == kept
    if k == 60 and kind in ("ordinary", "float16"):  # what the borders hid is found
        alone, _ = chain(given, replace(rules, per_row=1), tmp_path / "c")
        assert len(alone) > len(kept)


def test_rows_dropped_before_link_nothing(tmp_path: Path) -> None:
    """A step between the clusters and the copies: who is gone joins nobody, in one cluster or in two."""
    given = pool("ordinary", n=900)
    for per_row in (1, 2):
        work = tmp_path / str(per_row)
        rules = Rules(k=9, per_row=per_row)
        rows, centroids = grouped(given, rules, work)
        rows = engine.band(rows, "score", "score", "0.2", "0.9")
        told = (rows, "dedup", 0.86, "middle", centroids, 300)
        rows, _ = engine.dedup(*told, map) if per_row == 1 else linked.dedup(*told, 1 << 30, map)
        x, ids, score = given
        order = sorted(range(len(x)), key=lambda i: (-score[i], ids[i].encode()))[180:810]
        left = x[order], [ids[i] for i in order], score[order]
        kept = {name for _, names in engine.kept(rows) for name in names}
        assert kept == brute(left, replace(rules, score=None, centroid=None), centroids)


def test_a_row_without_a_direction_is_named(tmp_path: Path) -> None:
    x, ids, _ = pool("ordinary", n=60)
    for value, said in ((np.nan, "row 57 is not finite"), (0.0, "row 57 is all zeros")):
        broken = x.copy()
        broken[57] = value
        np.save(tmp_path / "x.npy", broken)
        ((part, first),) = engine.chunks_of([open_npy(tmp_path / "x.npy")], tmp_path / "in")
        with pytest.raises(DataError, match=said):
            engine.ingest(part, first + np.arange(60), Ids.of(ids), None)
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-900])
    with pytest.raises(DataError, match="cut off; it should hold 60 rows and holds 5"):
        open_npy(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", x.astype(np.float64))
    with pytest.raises(DataError, match="allowed are float16 or float32"):
        open_npy(tmp_path / "x.npy")


# --- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "float32"])
@pytest.mark.parametrize("pool_kind", ["ordinary", "threshold", "outlier", "hub"])
def test_a_screen_loses_no_pair_and_is_never_wrongly_sure(kind: str, pool_kind: str) -> None:
    x, _, _ = pool(pool_kind, n=700)
    u = x.astype(np.float64)
    u /= np.sqrt(np.square(u).sum(1))[:, None]
    true = u @ u.T
    for middle in (None, x[:50].mean(0)):
        whole = screen.prepare(x, middle, kind)
        for threshold in (0.86, 0.3, -0.2, 0.999):
            may, sure = np.zeros(true.shape, bool), np.zeros(true.shape, bool)
            for i, j, certain in screen.candidates(whole, whole, threshold, same=True):
                assert (i < j).all()
                may[i, j] = True
                sure[i[certain], j[certain]] = True
            above = np.triu(true > threshold, 1)
            assert not (above & ~may).any() and not (sure & ~above).any()
        one, two = screen.prepare(x[:300], middle, kind), screen.prepare(x[300:], middle, "float32")
        for a, b in ((one, two), (two, one)):
            may = np.zeros((len(a), len(b)), bool)
            for i, j, _ in screen.candidates(a, b, 0.86):
                may[i, j] = True
            cosines = true[:300, 300:] if a is one else true[300:, :300]
            assert not ((cosines > 0.86) & ~may).any()


def test_8_bit_products_that_are_slow_or_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.float() @ b.float()).to(torch.int32)

    def slow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return wide(a, b)

    def cut(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return wide(a, b).clamp(-32768, 32767)

    def none(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("_int_mm is not for this machine")

    for multiply in (slow, cut, none):
        monkeypatch.setattr(torch, "_int_mm", multiply)
        assert not screen.has_int8.__wrapped__()


@pytest.mark.parametrize("spread", [0.05, 1.0, 30.0])
def test_the_nearest_centroid_is_the_nearest_also_among_equal_ones(spread: float, products: str) -> None:
    rng = np.random.default_rng(0)
    x, _, _ = pool("ordinary", n=600)
    centroids = np.concatenate([x[:40] * 0.7, x[:40] * 0.7, spread * rng.standard_normal((30, 48)), np.zeros((1, 48))])
    centroids = centroids.astype(np.float32)
    u = x.astype(np.float64)
    u /= np.sqrt(np.square(u).sum(1))[:, None]
    expected = [np.sqrt(np.square(row - centroids.astype(np.float64)).sum(1)).argmin() for row in u]
    found = screen.Nearest(centroids).of(x)
    assert np.array_equal(found, expected) and not ((found >= 40) & (found < 80)).any()  # the lower of two equal ones


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_cluster_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _ = pool(kind, n=700)
    rank = np.random.default_rng(2).permutation(700)
    bounds = [0, 400, 401, 700]
    whole = groups.components(x, bounds, 0.86), groups.with_earlier_neighbour(x, bounds, 0.86, rank)
    monkeypatch.setattr(groups, "BLOCK", 37)
    parted = groups.components(x, bounds, 0.86), groups.with_earlier_neighbour(x, bounds, 0.86, rank)
    assert all(np.array_equal(one, two) for one, two in zip(whole, parted, strict=True))
    assert len(np.unique(whole[0])) < 700 and whole[1].any()


def test_components_of_a_cluster_that_does_not_fit_are_the_same() -> None:
    for kind in KINDS:
        x, _, _ = pool(kind, n=300)
        expected = groups.components(x, [0, len(x)], 0.86)
        for size in (300, 70, 7):
            found = groups.components_apart(lambda places, x=x: x[places], len(x), 0.86, size)
            assert np.array_equal(found, expected)
        joined = groups.Joined(len(x))
        for turn in range(5):
            part = groups.components_apart(lambda places, x=x: x[places], len(x), 0.86, 70, turn)
            joined.add(part, np.arange(len(x)))
        assert np.array_equal(joined.settle(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_semdedups_rule_is_the_column_maximum_of_the_upper_triangle(kind: str) -> None:
    x, _, _ = pool(kind, n=600)
    bounds, rng = [0, 200, 200, 201, 600], np.random.default_rng(3)
    u = x.astype(np.float64)
    u /= np.sqrt(np.square(u).sum(1))[:, None]
    rank = rng.permutation(len(x))
    for threshold in (0.86, 0.5, 0.97):
        expected = np.zeros(len(x), bool)
        for a, b in pairwise(bounds):
            order = a + np.argsort(rank[a:b])
            above = np.triu(u[order] @ u[order].T, 1)
            expected[order] = (above > threshold).any(0)
        assert np.array_equal(groups.with_earlier_neighbour(x, bounds, threshold, rank), expected)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_cut_has_as_many_rows_before_it_as_its_rank(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 120))
    values = data.draw(
        st.lists(st.sampled_from([0.0, -0.0, 0.5, -1.0, 3e-9, 1.0, 7.25]) | st.floats(-2, 2), min_size=n, max_size=n)
    )
    ids = [f"{i:x}".encode() for i in random.Random(n).sample(range(4 * n), n)]
    order = sorted(range(n), key=lambda i: (-(values[i] + 0.0), ids[i]))
    keys = ranks.descending(np.array(values))
    bounds = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    edges = [0, *bounds, n]

    def parts() -> Iterator[tuple[Array, Callable[[Array], list[bytes]]]]:
        for a, b in pairwise(edges):
            yield keys[a:b], lambda places, a=a: [ids[a + i] for i in places]

    rank, fetched = data.draw(st.integers(0, n)), data.draw(st.sampled_from([1, 3, 1 << 20]))
    cut = ranks.cut_at(parts, rank, fetched)
    before = np.concatenate([cut.before(key, at) for key, at in parts()])
    assert set(np.flatnonzero(before)) == set(order[:rank])


def test_shares_of_ranks_are_taken_as_they_were_written() -> None:
    assert [ranks.rank_of(share, 100) for share in ("0.57", 0.57, "0.29", 0.29)] == [57, 57, 29, 29]
    assert int(0.57 * 100) == 56  # what floats would say
    assert ranks.rank_of("0.35", 190_300_001) == 66_605_000


@given(st.lists(st.binary(max_size=6), max_size=30), st.randoms())
@settings(max_examples=80, deadline=None)
def test_ids_are_ordered_bytewise_and_taken_whole(names: list[bytes], rng: Any) -> None:
    ids = Ids.of(names)
    assert ids.at(np.arange(len(names))) == names
    places = np.array([rng.randrange(len(names)) for _ in range(5)] if names else [], np.int64)
    assert ids.take(places).at(np.arange(len(places))) == [names[at] for at in places]
    groups_ = np.array([rng.randrange(3) for _ in names], np.int64)
    order = order_of(ids, groups_)
    expected = sorted(range(len(names)), key=lambda at: (groups_[at], names[at]))
    assert [(groups_[a], names[a]) for a in order] == [(groups_[a], names[a]) for a in expected]


def test_equal_rows_are_found_though_their_marks_agree() -> None:
    x = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    x[9] = x[3]
    x[20] = x[3]
    x[30] = x[4]
    x[31] = x[30]
    x[31, 5] += 1  # differs where the mark does not look
    first = first_of_equal(x)
    expected = np.arange(50)
    expected[[9, 20]] = 3
    expected[30] = 4
    assert np.array_equal(first, expected)
    assert len(first_of_equal(x[:0])) == 0


def test_a_shard_is_read_in_pieces_without_mapping_it(tmp_path: Path) -> None:
    x = np.arange(60, dtype=np.float16).reshape(20, 3)
    np.save(tmp_path / "x.npy", x)
    shard = open_npy(tmp_path / "x.npy")
    assert (shard.n, shard.width) == (20, 3) and np.array_equal(shard.read(4, 9), x[4:9])
    raw = Shard(tmp_path / "x.npy", 20, 3, "<f2", shard.offset)
    assert np.array_equal(raw.read(0, 20), x) and not isinstance(shard.read(0, 2).base, np.memmap)


@pytest.mark.parametrize("form", ["list", "large list", "fixed list", "fixed bytes", "bytes", "large bytes"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_in_parquet_are_taken_as_they_are(form: str, dtype: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    x = np.random.default_rng(0).standard_normal((53, 6)).astype(dtype)
    number = pa.float16() if dtype == "float16" else pa.float32()
    kinds = {
        "list": pa.list_(number), "large list": pa.large_list(number), "fixed list": pa.list_(number, 6),
        "fixed bytes": pa.binary(x[0].nbytes), "bytes": pa.binary(), "large bytes": pa.large_binary(),
    }  # fmt: skip
    column = pa.array([row.tobytes() for row in x] if "bytes" in form else list(x), kinds[form])
    field = pa.field("embedding", kinds[form], metadata={"dtype": dtype} if form == "bytes" else None)
    pq.write_table(pa.table([column], pa.schema([field])), tmp_path / "x.parquet", row_group_size=10)
    given = dtype if form in ("fixed bytes", "large bytes") else None
    shard = open_parquet(tmp_path / "x.parquet", dtype=given)
    assert (shard.n, shard.width, np.dtype(shard.dtype)) == (53, 6, np.dtype(dtype))
    for a, b in ((0, 53), (0, 1), (9, 11), (10, 20), (38, 53), (52, 53)):
        assert np.array_equal(shard.read(a, b), x[a:b])


def test_a_parquet_file_that_holds_no_vectors_is_told_why(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for column, said in (
        (pa.array(["a", "b"]), "allowed are lists of floats"),
        (pa.array([b"abcd", b"efgh"]), "name them"),
        (pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32())), "row 1 of 'embedding' is 1 long, the first is 2"),
        (pa.array([[1.0, 2.0], None], pa.list_(pa.float32())), "row 1 of 'embedding' is null"),
    ):
        pq.write_table(pa.table({"embedding": column}), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=said):
            open_parquet(tmp_path / "x.parquet").read(0, 2)
    pq.write_table(pa.table({"url": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column embedding or .*it has url"):
        open_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a readable parquet file"):
        open_parquet(tmp_path / "x.parquet")


# --- k-means --------------------------------------------------------------------------------------------------------


class Held:
    def __init__(self, x: Array) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def read(self, start: int, stop: int) -> Array:
        return self.x[start:stop]


def plain_round(x: Array, centroids: Array) -> Array:
    """Lloyd's round as docs/condense.md has it: everything is looked at."""
    c, u = centroids.astype(np.float64), unit(x)
    away = np.stack([np.sqrt(np.square(row - c).sum(1)) for row in u])
    labels = away.argmin(1)
    sums = np.zeros(c.shape)
    for start in range(0, len(x), lloyd.CHUNK):
        part = np.zeros(c.shape)
        for row, label in zip(x[start : start + lloyd.CHUNK], labels[start : start + lloyd.CHUNK], strict=True):
            part[label] += row.astype(np.float64)
        sums += part
    counts = np.bincount(labels, minlength=len(c))
    new = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    far = np.lexsort((np.arange(len(x)), -away[np.arange(len(x)), labels]))
    for place, row in zip(np.flatnonzero(counts == 0), far, strict=False):
        new[place] = x[row]
    return new


@pytest.mark.parametrize("memory", [0, 1 << 30])
@pytest.mark.parametrize("kind", ["ordinary", "hub", "chains", "outlier"])
def test_rounds_that_look_only_at_what_moved_are_rounds_that_look_at_everything(
    kind: str, memory: int, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lloyd, "CHUNK", 300)
    x = unit(pool(kind, 900, 24, 7)[0]).astype(np.float32)
    x[450:470] = x[3]
    begin = lloyd.start(Held(x), 40)
    rounds, centroids = lloyd.Lloyd(Held(x), begin, map, memory), begin
    stayed = 0
    for _ in range(12):
        found, wanted = rounds.step(), plain_round(x, centroids)
        np.testing.assert_array_equal(found, wanted)
        stayed += int((found == centroids).all(1).sum())
        centroids = wanted
        if not rounds.moved.any():
            break
    assert stayed, "no centroid ever stayed: the short way was not taken"
    again = lloyd.Lloyd(Held(x), begin, map, memory)
    again.step()
    resumed = lloyd.Lloyd(Held(x), again.centroids, map, memory)  # as after a kill: it knows only the centroids
    for _ in range(3):
        np.testing.assert_array_equal(again.step(), resumed.step())


def test_what_borders_hide_is_counted_as_all_pairs_count_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(border, "TOGETHER", 100)
    x, ids, score = pool("chains", 700, 32, 3)
    np.save(tmp_path / "0.npy", x)
    part, _ = engine.chunks_of([open_npy(tmp_path / "0.npy")], tmp_path / "rows" / "0", 1000)[0]
    rows = Rows(tmp_path, 0, (engine.ingest(part, np.arange(700), Ids.of(ids), score),))
    rows = engine.group(rows, lloyd.start(Held(unit(x).astype(np.float32)), 12), 300, map)
    dead = np.arange(700) % 9 == 4  # what an earlier step dropped is neither sampled nor met
    for part in rows.parts:
        rows.judge("early", part, dead[part.read("row")[0]])
    rows = rows.after("early")
    found = border.measure(rows, "dedup", 0.86, 0, map)
    cluster = np.empty(700, np.int64)
    for part in rows.parts:
        row, label = part.read("row", "cluster")
        cluster[row] = label
    drawn = ranks.hash_keys(ranks.hash_ids(name.encode() for name in ids), 0, border.SALT)
    sample = sorted(np.flatnonzero(~dead), key=lambda at: (int(drawn[at]), ids[at]))[: border.SAMPLE]
    near = (unit(x) @ unit(x).T > 0.86) & ~dead
    np.fill_diagonal(near, False)
    own = near & (cluster[:, None] == cluster[None])
    assert found == {
        "sampled": len(sample),
        "with_copies": int(near[sample].any(1).sum()),
        "hidden": int((near[sample].any(1) & ~own[sample].any(1)).sum()),
        "pairs": int(near[sample].sum()),
        "pairs_hidden": int((near & ~own)[sample].sum()),
    }
    assert found["hidden"] and found["pairs_hidden"] < found["pairs"]
    assert border.measure(Rows(tmp_path, 0, ()), "dedup", 0.86, 0, map) == found  # remembered
