"""Kept rows equal a float64 brute-force computation on the same centroids, to the last tie."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.condense import cluster as cluster_module
from leveret.condense.bands import ascending, band
from leveret.condense.cluster import Search
from leveret.condense.copies import first_of_equal, row_hash
from leveret.condense.dedup import KEEPS, components
from leveret.condense.steps import STEPS
from leveret.condense.table import Shop, Table, Vectors, Verdict, hash_ids, hash_order, screen_error

# A handful of unit vectors whose products repeat: ties in cosine, in distance and in score come up all the time.
_PAIRS = [(1.0, 0.0), (0.6, 0.8), (0.8, 0.6), (-0.6, 0.8), (0.0, 1.0), (0.96, 0.28), (0.28, 0.96)]
_BASE = np.array(
    [[*pair, 0, 0] for pair in _PAIRS] + [[0, 0, *pair] for pair in _PAIRS[:3]] + [[0.5, 0.5, 0.5, 0.5]], np.float16
)
_DOTS = sorted({float(a @ b) for a, b in itertools.product(_BASE.astype(np.float64), repeat=2)})


def _table(x: np.ndarray, score: np.ndarray, shards: int = 2) -> Table:
    cuts = np.linspace(0, len(x), shards + 1).astype(int)
    vectors = Vectors([x[a:b] for a, b in itertools.pairwise(cuts)])
    columns = {"hash": hash_ids([f"row {i}" for i in range(len(x))]), "score": score}
    return Table(np.arange(len(x)), columns, vectors)


def _run(table: Table, *steps: tuple[str, dict], shop: Shop | None = None) -> tuple[Table, list[Verdict]]:
    """The steps in turn on one table (no step before the last drops anything)."""
    verdicts = []
    for name, settings in steps:
        config = STEPS[name].config.model_validate({"step": name, **settings})
        verdict = STEPS[name].run(table, config, shop or Shop())
        verdicts.append(verdict)
        columns, facts = {**table.columns, **verdict.columns}, {**table.facts, **verdict.facts}
        table = Table(table.rows, columns, table.vectors, facts)
    return table, verdicts


def _brute_labels(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    away = np.square(x.astype(np.float64)[:, None] - centroids.astype(np.float64)[None]).sum(2)
    return away.argmin(1)


def _brute_components(x: np.ndarray, threshold: float) -> np.ndarray:
    x = x.astype(np.float64)
    edge = np.array([[float(np.dot(a, b)) > threshold for b in x] for a in x]).reshape(len(x), len(x))
    label = np.arange(len(x))
    for i in range(len(x)):
        if label[i] == i:
            todo = [i]
            while todo:
                for j in np.flatnonzero(edge[todo.pop()] & (label != i)):
                    if j > i:
                        label[j] = i
                        todo.append(int(j))
    return label


def _brute_keep(x, rows, centroid, score, keep) -> int:
    x = x.astype(np.float64)
    to = x.sum(0) / len(x) if keep == "inner-middle" else centroid.astype(np.float64)
    key = -score if keep == "best-score" else np.square(x - to).sum(1)
    order = sorted(range(len(rows)), key=lambda i: (key[i], rows[i]))
    place = {"middle": len(rows) // 2, "inner-middle": len(rows) // 2, "far": -1, "near": 0, "best-score": 0}[keep]
    return int(rows[order[place]])


pools = st.lists(st.tuples(st.integers(0, len(_BASE) - 1), st.integers(0, 3)), max_size=40)


@given(pools, st.sampled_from([0.86, *_DOTS]), st.sampled_from(sorted(KEEPS)), st.sampled_from([1, 2, 3, "auto"]))
def test_kept_rows_equal_brute_force(pool, threshold, keep, k):
    threshold = min(threshold, 1.0)
    x = _BASE[[row for row, _ in pool]] if pool else np.zeros((0, 4), np.float16)
    score = np.array([value for _, value in pool], np.float64)
    steps = [("cluster", {"k": k}), ("dedup", {"threshold": threshold, "keep": keep})]
    table, verdicts = _run(_table(x, score), ("collapse", {}), *steps)
    plain, without = _run(_table(x, score), *steps)
    centroids = table.facts["centroids"]
    np.testing.assert_array_equal(centroids, plain.facts["centroids"])
    if not pool:
        assert len(verdicts[-1].keep) == 0
        return
    np.testing.assert_array_equal(table.columns["cluster"], _brute_labels(x, centroids))
    expected = np.zeros(len(x), bool)
    for number in np.unique(table.columns["cluster"]):
        rows = np.flatnonzero(table.columns["cluster"] == number)
        label = rows[_brute_components(x[rows], threshold)]
        np.testing.assert_array_equal(table.columns["component"][rows], label)
        for component in np.unique(label):
            members = rows[label == component]
            expected[_brute_keep(x[members], members, centroids[number], score[members], keep)] = True
            assert set(table.columns["component_size"][members]) == {len(members)}
    np.testing.assert_array_equal(verdicts[-1].keep, expected)
    # Collapsing copies first changes no component, no size and no kept row.
    for name in ("cluster", "component", "component_size", "representative", "centroid_cosine"):
        np.testing.assert_array_equal(table.columns[name], plain.columns[name])
    np.testing.assert_array_equal(verdicts[-1].keep, without[-1].keep)


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([1, 3, 7, 64]), st.sampled_from([2, 33]))
def test_components_in_blocks_equal_brute_force(seed, n, block, width):
    random = np.random.default_rng(seed)
    x = random.normal(size=(max(1, n // 4), width))[random.integers(0, max(1, n // 4), n)]
    x = x + 0.25 * random.normal(size=x.shape)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    found = components(lambda positions: x[positions], n, 0.86, block)
    np.testing.assert_array_equal(found, _brute_components(x, 0.86))
    shared = components(lambda positions: x[positions], n, 0.86, block, Shop(workers=3))
    np.testing.assert_array_equal(found, shared)


def test_a_pair_at_the_threshold_itself_is_no_edge():
    x = np.array([[1, 0], [0.75, 0.66]], np.float32)
    assert components(lambda at: x[at], 2, 0.75).tolist() == [0, 1]
    assert components(lambda at: x[at], 2, float(np.nextafter(0.75, 0))).tolist() == [0, 0]


def test_a_float32_product_on_the_wrong_side_is_decided_in_float64():
    random = np.random.default_rng(3)
    x = random.normal(size=(300, 384))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    exact = x.astype(np.float64) @ x.T.astype(np.float64)
    rough = (x @ x.T).astype(np.float64)
    assert np.abs(exact - rough).max() < screen_error(384)
    # A threshold between the two values of the pair on which they differ most.
    i, j = np.unravel_index(np.abs(np.triu(exact - rough, 1)).argmax(), exact.shape)
    threshold = (exact[i, j] + rough[i, j]) / 2
    assert (exact[i, j] > threshold) != (rough[i, j] > threshold)
    pair = x[[i, j]]
    assert (components(lambda at: pair[at], 2, threshold)[1] == 0) == (exact[i, j] > threshold)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_nearest_centroid_equals_float64_also_between_two(seed, k):
    random = np.random.default_rng(seed)
    centroids = random.normal(size=(k, 6)).astype(np.float32)
    centroids = np.concatenate([centroids, centroids[: k // 2], -centroids])  # equal ones: the lower number wins
    between = (centroids[random.integers(0, k, 50)] + centroids[random.integers(0, k, 50)]) / 2
    x = np.concatenate([between, random.normal(size=(50, 6))]).astype(np.float32)
    np.testing.assert_array_equal(Search(centroids).nearest(x), _brute_labels(x, centroids))


def test_same_bits_for_any_number_of_workers_and_shards():
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 24))[random.integers(0, 40, 3000)] + 0.4 * random.normal(size=(3000, 24))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    x[random.integers(0, 3000, 500)] = x[random.integers(0, 3000, 500)]
    steps = [("collapse", {}), ("cluster", {"k": 30}), ("dedup", {})]
    results = []
    original = cluster_module.CHUNK
    cluster_module.CHUNK = 512  # several chunks
    try:
        for workers, shards in ((1, 1), (3, 1), (2, 5)):
            table, verdicts = _run(_table(x, np.zeros(3000), shards), *steps, shop=Shop(workers=workers))
            results.append((table.facts["centroids"].tobytes(), verdicts[-1].keep.tobytes()))
    finally:
        cluster_module.CHUNK = original
    assert len(set(results)) == 1


def test_an_empty_cluster_takes_the_farthest_row():
    x = np.array([[1, 0], [0.96, 0.28], [0, 1]], np.float32)
    table, _ = _run(_table(x, np.zeros(3)), ("cluster", {"k": 3}))
    assert sorted(table.columns["cluster"].tolist()) == [0, 1, 2]
    moved = cluster_module._round(Vectors([x]), np.arange(3), np.array([[1, 0], [9, 9]], np.float32), Shop())
    np.testing.assert_array_equal(moved[1], x[2])


def test_fewer_distinct_rows_than_clusters():
    x = np.repeat(_BASE[:2], 5, axis=0)
    table, verdicts = _run(_table(x, np.zeros(10)), ("cluster", {"k": 7}))
    assert len(table.facts["centroids"]) == verdicts[0].notes["clusters"] == 2


def test_training_rows_depend_on_ids_and_seed_not_on_places():
    hashes = hash_ids([f"id {i}" for i in range(100)])
    shuffled = np.random.default_rng(0).permutation(100)
    chosen = set(hash_order(hashes, 5, 1)[:10].tolist())
    assert {int(shuffled[at]) for at in hash_order(hashes[shuffled], 5, 1)[:10]} == chosen
    assert set(hash_order(hashes, 6, 1)[:10].tolist()) != chosen


# --- ranks ---------------------------------------------------------------------------------------------------------


_ENDS = [(0.4, 0.6), (0.15, 0.35), (0, 0.5), (0.5, 1), (0, 1)]


@given(st.lists(st.integers(0, 6), max_size=60), st.sampled_from(_ENDS))
def test_a_band_is_the_published_slice(values, ends):
    lo, hi = ends
    n = len(values)
    order = ascending(np.array(values, np.float64))
    expected = order[-int(hi * n) : -int(lo * n + 1)] if int(hi * n) else order[:0]
    np.testing.assert_array_equal(order[band(n, lo, hi)], expected)


@pytest.mark.parametrize(
    ("n", "lo", "hi", "count"),
    [(1000, 0.4, 0.6, 199), (1000, 0.15, 0.35, 199), (10, 0, 1, 9), (3, 0.4, 0.6, 0), (1, 0.4, 0.6, 0), (0, 0, 1, 0)],
)
def test_a_band_holds_one_row_fewer(n, lo, hi, count):
    assert len(np.arange(n)[band(n, lo, hi)]) == count


def test_bands_count_from_the_highest():
    table = _table(np.zeros((10, 2), np.float32), np.arange(10.0))
    _, (verdict,) = _run(table, ("rank_band", {"lo": 0.2, "hi": 0.5}))
    # Ranks from the top: 9 8 | 7 6 5 | 4 ...; of the three in the band the published slice leaves out the highest.
    assert np.flatnonzero(verdict.keep).tolist() == [5, 6]
    assert [verdict.reasons[code] for code in verdict.reason[[9, 0]]] == ["ranks above the cut", "ranks below the cut"]


@pytest.mark.parametrize(("step", "settings", "kept"), [
    ("top", {"count": 3}, [1, 3, 4]), ("top", {"share": 0.5}, [3, 4]), ("top", {"count": 99}, [0, 1, 2, 3, 4]),
    ("drop_top", {"count": 2}, [0, 1, 2]), ("drop_top", {"share": 0.0}, [0, 1, 2, 3, 4]), ("top", {"count": 0}, []),
])  # fmt: skip
def test_highest_values_and_their_ties(step, settings, kept):
    # Of the equal 2s the higher row numbers stand higher, as in the reversed stable argsort that bands use.
    table = _table(np.zeros((5, 2), np.float32), np.array([1.0, 2, 0, 2, 2]))
    assert np.flatnonzero(_run(table, (step, settings))[1][0].keep).tolist() == kept


def test_a_larger_budget_holds_the_smaller_one():
    table = _table(np.zeros((50, 2), np.float32), np.zeros(50))
    small, large = (set(np.flatnonzero(_run(table, ("budget", {"count": n}))[1][0].keep)) for n in (7, 20))
    assert len(small) == 7 and len(large) == 20 and small < large
    other = set(np.flatnonzero(_run(table, ("budget", {"count": 7}), shop=Shop(seed=1))[1][0].keep))
    assert other != small


# --- copies --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), max_size=30), st.sampled_from([np.float16, np.float32]))
def test_copies_are_found_by_their_bits(pool, dtype):
    base = np.array([[0.0, 1, 0], [-0.0, 1, 0], [1, 0, 0], [0.6, 0.8, 0], [0.6, 0.8, 1e-7]], dtype)
    x = base[pool] if pool else np.zeros((0, 3), dtype)
    table, _ = _run(_table(x, np.zeros(len(x))), ("collapse", {}))
    expected = [next(i for i in range(len(x)) if x[i].tobytes() == row.tobytes()) for row in x]
    assert table.columns["copy_of"].tolist() == expected
    assert first_of_equal(x).tolist() == expected if len(x) else True


def test_rows_that_share_a_hash_are_still_told_apart(monkeypatch):
    monkeypatch.setattr("leveret.condense.copies.row_hash", lambda x: np.zeros(len(x), np.uint64))
    x = _BASE[[0, 1, 0, 2, 1, 0]]
    table, _ = _run(_table(x, np.zeros(6)), ("collapse", {}))
    assert table.columns["copy_of"].tolist() == [0, 1, 0, 3, 1, 0]
    assert len(row_hash(x)) == 6
