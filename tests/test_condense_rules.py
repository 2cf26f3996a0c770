"""Every step against a plain definition, on embeddings of a few hundred rows; and what a recipe may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leveret.cli import run
from leveret.condense import condense
from leveret.condense.groups import KEEPS
from leveret.condense.ranks import hash_ids, hash_keys, rank_of
from leveret.condense.recut import recut, redone
from leveret.condense.steps import STEPS, read
from leveret.condense.verify import verify
from leveret.recipe import names
from leveret.runs import DataError, RecipeError

N = 240
EMPTY = "encoder: made elsewhere\nsteps: {}\n"


def embeddings(folder: Path, seed: int = 0) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Rows with near copies and equal ones, ids in no order, scores with ties; written in clip-retrieval's layout."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N, 16))
    x[: N // 2] = x[rng.integers(N // 2, N, N // 2)] + rng.uniform(0, 0.5, (N // 2, 1)) * rng.standard_normal(
        (N // 2, 16)
    )
    x[10:16] = x[9]
    x = x.astype(np.float32)
    ids = [f"r{i}" for i in rng.permutation(N)]
    score = rng.choice(np.linspace(0, 1, 25), N)
    for kind in ("img_emb", "metadata"):
        (folder / kind).mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(N), 3)):
        np.save(folder / f"img_emb/img_emb_{number}.npy", x[part])
        table = {"id": [ids[i] for i in part], "score": score[part]}
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{number}.parquet")
    return x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True), ids, score


def chosen(tmp_path: Path, steps: str, *overrides: str) -> dict[str, dict[str, Any]]:
    """The ledger of a run of these steps, by id."""
    (tmp_path / "r.yaml").write_text(f"encoder: made elsewhere\nsteps: {steps}\n")
    out = condense(tmp_path / "e", tmp_path / "out", tmp_path / "r.yaml", overrides, workers=1)
    return {row["id"]: row for row in pq.read_table(out / "ledger").to_pylist()}


def kept(rows: dict[str, dict[str, Any]]) -> set[str]:
    return {id for id, row in rows.items() if row["verdict"] == "kept"}


def by_rank(ids: list[str], values: np.ndarray) -> list[str]:
    return [ids[i] for i in sorted(range(len(ids)), key=lambda i: (-values[i], ids[i].encode()))]


@pytest.mark.parametrize("keep", KEEPS)
def test_every_rule_keeps_the_member_that_its_definition_names(keep: str, tmp_path: Path) -> None:
    from scipy.sparse.csgraph import connected_components

    u, ids, score = embeddings(tmp_path / "e")
    rows = chosen(tmp_path, f"{{cluster: {{k: 1}}, dedup: {{threshold: 0.8, keep: {keep}}}}}")
    centroid = np.load(tmp_path / "out/centroids.npy")[0].astype(np.float64)
    _, group = connected_components(u @ u.T > 0.8, directed=False)
    expected = set()
    for g in np.unique(group):
        members = np.flatnonzero(group == g)
        key = {
            "distance": np.linalg.norm(u[members] - centroid, axis=1),
            "mean": np.linalg.norm(u[members] - u[members].mean(0), axis=1),
            "score": -score[members],
        }[KEEPS[keep].by]
        if KEEPS[keep].by == "mean":
            key = np.round(key, 12)  # the rule's own: of two, both are equally far
        inside = members[sorted(range(len(members)), key=lambda at: (key[at], ids[members[at]].encode()))]
        keeper = inside[{"middle": len(members) // 2, "inner-middle": len(members) // 2, "far": -1}.get(keep, 0)]
        expected.add(ids[keeper])
        for member in members:
            row = rows[ids[member]]
            assert (row["keeper"], row["component_size"]) == (ids[keeper], len(members))
            assert row["component"] == min((ids[i] for i in members), key=str.encode)
    assert kept(rows) == expected and len(expected) < N
    exact = {id for id, row in rows.items() if row["reason"] == "exact copy"}
    assert exact <= {ids[i] for i in range(9, 16)}


def test_ranks_count_from_the_highest_and_shares_are_decimals(tmp_path: Path) -> None:
    _, ids, score = embeddings(tmp_path / "e")
    order = by_rank(ids, score)
    assert kept(chosen(tmp_path / ".", "{score: {low: 0.29, high: 0.57}}")) == set(order[69:136])
    assert rank_of(0.29, N) == 69 and rank_of(0.57, N) == 136


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        ("{top: {share: 0.3}}", slice(0, 72)),
        ("{top: {count: 7}}", slice(0, 7)),
        ("{drop_top: {share: 0.3}}", slice(72, N)),
        ("{drop_top: {count: 7}}", slice(7, N)),
        ("{score: {low: 0.4, high: 0.6, rank_rule: published}}", slice(97, 144)),
        ("{score: {low: 0.4, high: 0.6}}", slice(96, 144)),
        ("{top: {count: 9999}}", slice(0, N)),
        ("{top: {count: 0}}", slice(0, 0)),
    ],
)
def test_cuts_by_rank(steps: str, wanted: slice, tmp_path: Path) -> None:
    _, ids, score = embeddings(tmp_path / "e")
    rows = chosen(tmp_path, steps)
    assert kept(rows) == set(by_rank(ids, score)[wanted])
    label = steps[1 : steps.index(":")]
    assert {row["verdict"] for row in rows.values()} <= {"kept", label}


def test_a_draw_is_a_seeded_hash_of_ids_and_a_larger_budget_holds_the_smaller_one(tmp_path: Path) -> None:
    _, ids, _ = embeddings(tmp_path / "e")
    key = dict(zip(ids, hash_keys(hash_ids(id.encode() for id in ids), 5, 2).tolist(), strict=True))
    found = []
    for place, count in enumerate((10, 60)):
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / "e").symlink_to(tmp_path / "e")
        found.append(kept(chosen(folder, f"{{budget: {{count: {count}}}}}", "seed=5")))
        assert found[-1] == set(sorted(ids, key=key.__getitem__)[:count])
    assert found[0] < found[1]


@pytest.mark.parametrize("first", ["far", "near", "random"])
def test_semdedups_rule_drops_what_has_an_earlier_neighbour(first: str, tmp_path: Path) -> None:
    u, ids, _ = embeddings(tmp_path / "e")
    rows = chosen(tmp_path, f"{{cluster: {{k: 1}}, pairs: {{threshold: 0.8, first: {first}}}}}")
    away = np.linalg.norm(u - np.load(tmp_path / "out/centroids.npy")[0].astype(np.float64), axis=1)
    drawn = hash_keys(hash_ids(id.encode() for id in ids), 0, 2)
    key = {"far": -away, "near": away, "random": drawn}[first]
    order = sorted(range(N), key=lambda i: (key[i], ids[i].encode()))
    above = np.triu((u @ u.T)[np.ix_(order, order)], 1) > 0.8
    assert kept(rows) == {ids[i] for i, gone in zip(order, above.any(0), strict=True) if not gone}


def test_steps_may_follow_one_another_in_any_order_and_the_ledger_tells_all(tmp_path: Path) -> None:
    _, ids, score = embeddings(tmp_path / "e")
    steps = (
        "{top: {count: 200}, cluster: {k: 3}, dedup: {threshold: 0.8}, again: {step: cluster, k: 2}, "
        "centroid: {low: 0, high: 0.5}, budget: {count: 20}}"
    )
    rows = chosen(tmp_path, steps)
    assert len(rows) == N and len(kept(rows)) == 20
    assert {id for id, row in rows.items() if row["verdict"] == "top"} == set(by_rank(ids, score)[200:])
    assert all(row["cluster"] is None for row in rows.values() if row["verdict"] == "top")
    assert all(
        row["cluster"] in (0, 1) and row["component"] is None for row in rows.values() if row["verdict"] == "budget"
    )
    assert all(row["component"] is not None for row in rows.values() if row["verdict"] == "dedup")


def test_own_centroids_are_taken(tmp_path: Path) -> None:
    u, ids, _ = embeddings(tmp_path / "e")
    np.save(tmp_path / "c.npy", np.stack([u[3], u[200], 5 * u[100]]).astype(np.float32))
    rows = chosen(tmp_path, "{cluster: {}, budget: {count: 5}}", f"centroids={tmp_path / 'c.npy'}")
    c = np.load(tmp_path / "c.npy").astype(np.float64)
    expected = np.linalg.norm(u[:, None] - c, axis=2).argmin(1)
    assert [rows[id]["cluster"] for id in ids] == expected.tolist()
    for wrong, said in (
        (np.zeros((2, 3)), r"centroids for these vectors are \[k, 16\]"),
        (np.full((1, 16), np.nan), "not finite"),
    ):
        np.save(tmp_path / "wrong.npy", wrong)
        with pytest.raises(DataError, match=said):
            (tmp_path / "r.yaml").write_text("encoder: x\nsteps: {cluster: {}}\n")
            condense(tmp_path / "e", tmp_path / "other", tmp_path / "r.yaml", [f"centroids={tmp_path / 'wrong.npy'}"])


def test_memory_and_workers_change_no_row_of_the_ledger(tmp_path: Path) -> None:
    embeddings(tmp_path / "e")
    (tmp_path / "r.yaml").write_text(
        "encoder: x\nsteps: {cluster: {k: 5}, dedup: {threshold: 0.8}, budget: {count: 50}}\n"
    )
    ways = [{"workers": 1}, {"workers": 2}, {"workers": 2, "memory": 1}]
    found = []
    for place, way in enumerate(ways):
        out = condense(tmp_path / "e", tmp_path / f"o{place}", tmp_path / "r.yaml", **way)
        found.append(sorted(pq.read_table(out / "ledger").to_pylist(), key=lambda row: row["id"]))
    assert found[0] == found[1] == found[2]
    manifest = json.loads((tmp_path / "o0/manifest.json").read_text())
    assert (
        manifest["left"] == {"cluster": N, "dedup": manifest["left"]["dedup"], "budget": 50} and manifest["kept"] == 50
    )


def test_overrides_may_leave_out_what_is_understood() -> None:
    short = ["dedup.threshold=0.9", "score.low=0.3", "centroid=null", "budget=77", "centroids=c.npy", "seed=3"]
    recipe = read("bunny", short)
    steps: Any = recipe.steps
    assert (steps["dedup"].threshold, steps["score"].low, steps["budget"].count, recipe.seed) == (0.9, 0.3, 77, 3)
    assert "centroid" not in steps and steps["cluster"].centroids == "c.npy"
    assert read("bunny", ["steps.dedup.threshold=0.9"]) == read("bunny", ["dedup.threshold=0.9"])
    for wrong, said in (
        ("dedup.treshold=1", "did you mean threshold"), ("dedup.threshold=2", "less than or equal to 1"),
        ("score.low=0.7", "must be less than high"), ("dedupe=3", "dedupe"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=said):
            read("bunny", [wrong])


@pytest.mark.parametrize("name", names("condense"))
def test_every_recipe_is_made_of_rows_of_the_table(name: str) -> None:
    assert {config.step for config in read(name).steps.values()} <= set(STEPS)


@pytest.mark.parametrize("per_row", [1, 2])
@pytest.mark.parametrize("keep", KEEPS)
def test_a_finished_coreset_is_verified_and_a_wrong_one_is_not(keep: str, per_row: int, tmp_path: Path) -> None:
    embeddings(tmp_path / "e")
    chosen(
        tmp_path,
        f"{{cluster: {{k: 6, clusters_per_row: {per_row}}}, dedup: {{threshold: 0.8, keep: {keep}}}, "
        "budget: {count: 30}}",
    )
    found = verify(tmp_path / "out")
    assert found["clusters"] == 6 and found["rows"] == N and found["pairs"] > 1000
    assert (found["labels_wrong"], found["groups_wrong"], found["keepers_wrong"]) == (0, 0, 0)
    assert 0 < found["closest_pair"] < 0.1 and found["closest_centroid"] > 0
    for part in (tmp_path / "out" / "work" / "dedup").glob("0*.npz"):
        with np.load(part) as file:
            columns = dict(file)
        columns["keeper"] = np.roll(columns["keeper"], 1)
        np.savez(part, **columns)
    assert verify(tmp_path / "out")["keepers_wrong"] > 0
    assert run(["coreset", "verify", str(tmp_path / "out")]) == 1
    with pytest.raises(DataError, match="holds no finished coreset"):
        verify(tmp_path / "e")
    np.save(tmp_path / "e/img_emb/img_emb_0.npy", np.ones((80, 16), np.float32))
    with pytest.raises(DataError, match="files there were changed since"):
        verify(tmp_path / "out")


RECUT = "{cluster: {k: 6}, dedup: {threshold: 0.8}, score: {low: 0.1, high: 0.9}, budget: {count: 30}}"


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        (["budget=50"], ["budget"]),
        (["score.low=0.3"], ["score", "budget"]),
        (["score=null"], ["budget"]),
        (["dedup.threshold=0.9"], ["dedup", "score", "budget"]),
        (["dedup.keep=near", "budget=9"], ["dedup", "score", "budget"]),
        (["cluster.k=3"], ["cluster", "dedup", "score", "budget"]),
    ],
)
def test_a_recut_equals_a_whole_run(
    changes: list[str], again: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings(tmp_path / "e")
    before = chosen(tmp_path, RECUT)
    whole = condense(tmp_path / "e", tmp_path / "whole", tmp_path / "r.yaml", changes, workers=1)
    assert redone(tmp_path / "out", changes) == again
    if "dedup" not in again:  # no step reads a vector
        monkeypatch.setattr("leveret.condense.working.Part.vectors", None)
        monkeypatch.setattr("leveret.condense.working.Part.reader", None)
    made = recut(tmp_path / "out", tmp_path / "cut", changes, workers=1)
    for name in ("coreset.parquet", "summary.json", "centroids.npy"):
        assert (made / name).read_bytes() == (whole / name).read_bytes()
    rows = [sorted(pq.read_table(out / "ledger").to_pylist(), key=lambda row: row["id"]) for out in (made, whole)]
    assert rows[0] == rows[1] and {row["id"]: row for row in rows[0]} != before
    assert recut(tmp_path / "out", tmp_path / "cut", changes, workers=1) == made  # and once more


def test_a_recut_that_cannot_be_is_refused(tmp_path: Path) -> None:
    embeddings(tmp_path / "e")
    chosen(tmp_path, RECUT)
    for changes, said in (([], "say what is to differ"), (["seed=4"], "seed: every step hangs on it")):
        with pytest.raises(RecipeError, match=said):
            recut(tmp_path / "out", tmp_path / "cut", changes)
    with pytest.raises(DataError, match="holds no finished coreset"):
        recut(tmp_path / "e", tmp_path / "cut", ["budget=3"])
    assert run(["coreset", "recut", str(tmp_path / "out"), "-o", str(tmp_path / "cut"), "budget=3", "--json"]) == 0
