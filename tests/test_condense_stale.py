"""Pieces that were made from something else are not taken, and no name is given twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from leveret.condense import condense
from leveret.condense.add import add
from leveret.condense.embed import _refusal
from leveret.condense.given import open_given
from leveret.condense.pipeline import _free
from leveret.condense.ranks import hash_ids
from leveret.condense.recut import recut
from leveret.runs import DataError

RECIPE: dict[str, Any] = {
    "name": "stale", "encoder": "given", "seed": 0,
    "steps": {"cluster": {"k": 20}, "dedup": {"threshold": 0.95, "keep": "middle"}, "budget": {"count": 300}},
}  # fmt: skip


def vectors(n: int, seed: int = 0) -> np.ndarray:
    """Rows of which a third are near another."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, 16)).astype(np.float32)
    rows[::3] = rows[1::3][: len(rows[::3])] + 0.01 * rng.normal(size=rows[::3].shape).astype(np.float32)
    return rows


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows" / "a.npy"
    path.parent.mkdir()
    np.save(path, vectors(5999))
    return path


def kept(folder: Path) -> dict[str, list[Any]]:
    return {
        "ledger": pq.read_table(folder / "ledger").to_pylist(),
        "kept": pq.read_table(folder / "coreset.parquet").to_pylist(),
    }


@pytest.mark.parametrize(
    ("first", "then", "change"), [(1, 2, "dedup.threshold=0.9"), (2, 1, "budget=100"), (1, None, "budget=100")]
)
def test_a_recut_is_a_fresh_run_however_many_workers_there_were(
    rows: Path, recipe: Path, tmp_path: Path, first: int, then: int | None, change: str
) -> None:
    whole = condense(rows.parent, tmp_path / "whole", recipe, memory=1_000_000, workers=first)
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    cut = recut(whole, tmp_path / "cut", [change], workers=then)
    fresh = condense(rows.parent, tmp_path / "fresh", recipe, [change], memory=1_000_000, workers=2)
    assert kept(cut) == kept(fresh) and len(kept(cut)["ledger"]) == 5999
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_a_recut_of_rows_that_changed_is_refused(rows: Path, recipe: Path, tmp_path: Path) -> None:
    whole = condense(rows.parent, tmp_path / "whole", recipe)
    np.save(rows, vectors(5999, seed=1))
    with pytest.raises(DataError, match="the pool or embeddings changed since that coreset was made"):
        recut(whole, tmp_path / "cut", ["budget=100"])
    assert not (tmp_path / "cut").exists()


def test_a_recut_with_centroids_that_changed_is_refused(rows: Path, recipe: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", vectors(20, seed=5))
    whole = condense(rows.parent, tmp_path / "whole", recipe, [f"cluster.centroids={tmp_path / 'c.npy'}"])
    np.save(tmp_path / "c.npy", vectors(20, seed=6))
    with pytest.raises(DataError, match=r"the file of steps\.cluster changed"):
        recut(whole, tmp_path / "cut", ["budget=100"])


def test_half_an_embedding_is_no_pool(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    (folder / "img_emb").mkdir(parents=True)
    (folder / "done").mkdir()
    np.save(folder / "img_emb/img_emb_0.npy", vectors(5))
    assert len(open_given(folder)) == 5, "as clip-retrieval writes it"
    (folder / "recipe.yaml").write_text("{}")
    (folder / "done/shard_000000.json").write_text("{}")
    with pytest.raises(DataError, match="was not embedded to its end"):
        open_given(folder)
    (folder / "done/embed.json").write_text("{}")
    assert len(open_given(folder)) == 5


def test_a_new_name_is_nobody_s() -> None:
    there = np.sort(hash_ids([b"a", b"a#1", b"a#3"]))
    assert _free(b"a", 2, there, {}) == b"a#2"
    assert _free(b"a", 1, there, {}) == b"a#1#1" and _free(b"a", 2, there, {b"a#2": 0}) == b"a#2#2"


def test_a_refusal_can_always_be_written() -> None:
    line = _refusal(3, "\ud83d", "a\ud83d.png", "no image", "\ud83d")
    assert json.dumps(line, ensure_ascii=False).encode() and line["id"] == "\\ud83d"


def test_adding_other_files_in_the_same_folder_takes_only_these(rows: Path, recipe: Path, tmp_path: Path) -> None:
    whole = condense(rows.parent, tmp_path / "whole", recipe)
    for name, seed, width in (("b", 1, 16), ("c", 2, 16), ("wrong", 3, 8)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", vectors(60, seed)[:, :width])
    with pytest.raises(DataError, match="width"):
        add(whole, [tmp_path / "b", tmp_path / "wrong"], tmp_path / "out")
    out = add(whole, [tmp_path / "b"], tmp_path / "out")
    assert len(kept(out)["ledger"]) == 5999 + 60


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"score": pa.array(["high"] * 4)}, "the column score is string; scores are numbers"),
        ({"id": pa.array([[1], [2], [3], [4]])}, "ids are texts or numbers"),
    ],
)
def test_columns_of_another_type_are_told(columns: dict[str, Any], said: str, tmp_path: Path, recipe: Path) -> None:
    for kind in ("img_emb", "metadata"):
        (tmp_path / "e" / kind).mkdir(parents=True)
    np.save(tmp_path / "e/img_emb/img_emb_0.npy", vectors(4))
    pq.write_table(pa.table(columns), tmp_path / "e/metadata/metadata_0.parquet")
    with pytest.raises(DataError, match=said):
        condense(tmp_path / "e", tmp_path / "out", recipe, ["cluster.k=2", "budget=2"])


def test_files_that_name_their_rows_otherwise_are_told(tmp_path: Path) -> None:
    for kind in ("img_emb", "metadata"):
        (tmp_path / kind).mkdir()
    for number, name in enumerate(("id", "key")):
        np.save(tmp_path / f"img_emb/img_emb_{number}.npy", vectors(4))
        pq.write_table(pa.table({name: list("abcd")}), tmp_path / f"metadata/metadata_{number}.parquet")
    with pytest.raises(DataError, match="2 of 2 files have ids"):
        open_given(tmp_path)
