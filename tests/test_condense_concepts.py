"""Steps that look at whole clusters, against their definitions in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leveret.condense import condense
from leveret.condense.concepts import apart, quotas
from leveret.runs import DataError, RecipeError

N, WIDTH, K = 900, 20, 12
RECIPE = """
steps:
  cluster: {{k: {k}}}
  density: {{share: 0.4, temperature: 0.1, neighbours: 3, keep: {keep}}}
"""


def _layout(folder: Path, x: np.ndarray, files: int = 2) -> Path:
    for kind in ("img_emb", "metadata"):
        (folder / kind).mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(len(x)), files)):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", x[rows])
        table = pa.table({"key": [f"k{row * 7919 % 100_003}" for row in rows], "similarity": np.sin(rows)})
        pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def _rows(seed: int = 0) -> np.ndarray:
    """Blobs of different widths."""
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((K, WIDTH))
    at = rng.choice(K, N, p=np.arange(1, K + 1) / (K * (K + 1) / 2))
    spread = np.linspace(0.3, 2.5, K)
    return (centres[at] + spread[at][:, None] * rng.standard_normal((N, WIDTH))).astype(np.float32)


def _ledger(out: Path) -> list[dict]:
    rows = [row for path in sorted((out / "ledger").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: row["index"])


def _normal(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt(np.square(x).sum(1, keepdims=True))


@pytest.mark.parametrize("keep", ["hard", "easy"])
def test_density_keeps_what_its_definition_says(keep: str, tmp_path: Path) -> None:
    x = _rows()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(k=K, keep=keep))
    out = condense(_layout(tmp_path / "e", x), tmp_path / "out", recipe, workers=2)
    u, c = _normal(x), _normal(np.load(out / "centroids.npy"))
    rows = _ledger(out)
    label = np.array([row["cluster"] for row in rows])
    own = (u * c[label]).sum(1)
    between = 1 - c @ c.T
    complexity = np.array(
        [np.sort(np.delete(between[j], j))[:3].mean() * (1 - own[label == j]).mean() for j in range(K)]
    )
    weight = np.exp(complexity / 0.1)
    sizes = np.bincount(label, minlength=K)
    wanted = quotas(weight / weight.sum(), sizes, int(0.4 * N))
    assert wanted.sum() == int(0.4 * N) and wanted.std() > 3
    kept = {row["index"] for row in rows if row["verdict"] == "kept"}
    expected: set[int] = set()
    for j in range(K):
        members = np.flatnonzero(label == j)
        key = own if keep == "hard" else -own
        order = sorted(members, key=lambda i, key=key: (key[i], rows[i]["id"].encode()))
        expected |= set(order[: wanted[j]])
    assert kept == expected
    other = condense(_layout(tmp_path / "f", x, files=5), tmp_path / "again", recipe, workers=1, memory=1 << 20)
    assert [row["verdict"] for row in _ledger(other)] == [row["verdict"] for row in rows]
    assert "More of what is varied" in (out / "report.html").read_text()


def test_density_at_random_is_a_seeded_order(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(k=K, keep="random"))
    folder = _layout(tmp_path / "e", _rows())
    kept = []
    for seed in (0, 1):
        rows = _ledger(condense(folder, tmp_path / str(seed), recipe, [f"seed={seed}"]))
        kept.append({row["id"] for row in rows if row["verdict"] == "kept"})
    assert len(kept[0]) == len(kept[1]) == int(0.4 * N) and kept[0] != kept[1]


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.001, 1)), min_size=1, max_size=12),
    st.integers(0, 300),
)
def test_quotas_are_the_nearest_whole_numbers(clusters: list[tuple[int, float]], amount: int) -> None:
    sizes = np.array([size for size, _ in clusters])
    share = np.array([weight for _, weight in clusters])
    share /= share.sum()
    found = quotas(share, sizes, amount)
    total = min(amount, int(sizes.sum()))
    least = np.minimum(1, sizes - 1)
    least = least if least.sum() <= total else 0 * least
    assert found.sum() == total and (found >= least).all() and (found <= sizes).all()
    # No row moved from one cluster to another comes nearer in squares, but for the rounding of fractions to 1e-6.
    wanted = share * total
    cost = np.square(found - wanted)
    for i in range(len(sizes)):
        for j in range(len(sizes)):
            if i != j and found[i] > least[i] and found[j] < sizes[j]:
                moved = np.square(found[i] - 1 - wanted[i]) + np.square(found[j] + 1 - wanted[j])
                assert moved >= cost[i] + cost[j] - 1e-3


def test_how_far_centroids_stand_apart() -> None:
    x = np.random.default_rng(0).standard_normal((600, 16)).astype(np.float32)
    between = 1 - _normal(x) @ _normal(x).T
    np.fill_diagonal(between, np.inf)
    assert np.allclose(apart(x, 20), np.sort(between, axis=1)[:, :20].mean(1))
    assert apart(x[:1], 20).tolist() == [0.0] and np.allclose(apart(x[:2], 20), between[0, 1])


def test_clusters_that_a_target_falls_into_are_kept(tmp_path: Path) -> None:
    x, rng = _rows(), np.random.default_rng(1)
    targets = x[:40] + 0.05 * rng.standard_normal((40, WIDTH)).astype(np.float32)
    targets = targets[targets[:, 0] > 1.5]  # a few clusters only
    np.save(tmp_path / "targets.npy", targets)
    told = ["cluster.k=12", f"image_cluster.targets={tmp_path / 'targets.npy'}"]
    out = condense(_layout(tmp_path / "e", x), tmp_path / "out", "image-cluster", told, workers=1)
    rows, c = _ledger(out), np.load(out / "centroids.npy").astype(np.float64)
    near = {int(np.square(_normal(t[None])[0] - c).sum(1).argmin()) for t in targets}
    came = [row for row in rows if row["verdict"] != "top"]
    assert len(came) == int(0.3 * N) and 0 < len(near) < 12
    assert {row["id"] for row in came if row["cluster"] in near} == {r["id"] for r in rows if r["verdict"] == "kept"}
    assert "Clusters that hold a target" in (out / "report.html").read_text()
    # Other targets under the same name are another run.
    np.save(tmp_path / "targets.npy", x[:3])
    with pytest.raises(RecipeError, match="files"):
        condense(tmp_path / "e", tmp_path / "out", "image-cluster", told, workers=1)


def test_faults_are_told_before_work_begins(tmp_path: Path) -> None:
    folder = _layout(tmp_path / "e", _rows())
    with pytest.raises(RecipeError, match=r"needs targets, .* image_cluster.targets=FOLDER"):
        condense(folder, tmp_path / "a", "image-cluster")
    np.save(tmp_path / "narrow.npy", np.ones((3, 5), np.float32))
    with pytest.raises(DataError, match="targets of width 5, and the rows have 20"):
        condense(folder, tmp_path / "b", "image-cluster", [f"image_cluster.targets={tmp_path / 'narrow.npy'}"])
    with pytest.raises(DataError, match="there is no file"):
        condense(folder, tmp_path / "c", "bunny", ["centroids=nowhere.npy"])


def test_the_published_recipe_runs(tmp_path: Path) -> None:
    out = condense(_layout(tmp_path / "e", _rows()), tmp_path / "out", "density", ["concepts.k=9"], workers=1)
    rows = _ledger(out)
    left = sum(row["verdict"] in ("kept", "density") for row in rows)
    assert sum(row["verdict"] == "kept" for row in rows) == int(0.6 * left)
