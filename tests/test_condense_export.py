"""A finished coreset for its readers: tars, a filter, DataComp's form, a list."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leveret.cli import run
from leveret.condense import condense
from leveret.condense.export import Kept, export
from leveret.pool import open_source
from leveret.runs import DataError, RecipeError

RANDOM = ["random.count=25", "random.share=null"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures with captions, and a coreset of 25 beside them."""
    root = tmp_path_factory.mktemp("export")
    rng = np.random.default_rng(0)
    records = []
    (root / "pictures").mkdir()
    for number in range(40):
        name = f"{number:03d}.png"
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(root / "pictures" / name)
        said = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": f"picture {number}"}]
        records.append({"id": f"{number:032x}", "image": name, "conversations": said})
    (root / "pool.json").write_text(json.dumps(records))
    condense(root / "pool.json", root / "coreset", "random", RANDOM, images=root / "pictures", workers=1)
    return root


def _ids(coreset: Path) -> list[str]:
    return pq.read_table(coreset / "coreset.parquet").column("id").to_pylist()


def test_a_store_holds_the_kept_samples_with_their_images(pool: Path) -> None:
    made = export(pool / "coreset", pool / "store", workers=1)
    source = open_source(pool / "store")
    samples = [source.sample(index) for index in range(len(source))]
    assert [sample.id for sample in samples] == _ids(pool / "coreset") and made["samples"] == len(samples) == 25
    assert [sample.caption for sample in samples] == [f"picture {int(sample.id, 16)}" for sample in samples]


def test_a_filter_knows_the_kept_ids_and_no_others(pool: Path) -> None:
    export(pool / "coreset", pool / "kept.npy", "filter")
    kept, ids = Kept(pool / "kept.npy"), set(_ids(pool / "coreset"))
    every = [f"{number:032x}" for number in range(40)]
    assert kept.mask(every).tolist() == [id in ids for id in every] and len(kept) == 25
    assert next(iter(ids)) in kept and next(iter(ids)).encode() in kept and "" not in kept
    assert not kept.mask([]).size


def test_ids_whose_hashes_begin_alike_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poor(ids: object) -> np.ndarray:
        numbers = [int(id) for id in ids]  # type: ignore[attr-defined]
        return np.array([(number // 10, number % 10) for number in numbers], "u8,u8")

    monkeypatch.setattr("leveret.condense.export._hashes", poor)
    np.save(tmp_path / "k.npy", poor([10, 12, 15, 19, 31, 99]))
    kept = Kept(tmp_path / "k.npy")
    assert [n for n in range(120) if str(n) in kept] == [10, 12, 15, 19, 31, 99]


def test_datacomp_and_text(pool: Path) -> None:
    export(pool / "coreset", pool / "uids.npy", "datacomp")
    found = np.load(pool / "uids.npy")
    assert found.dtype == np.dtype("u8,u8")
    assert [f"{a:016x}{b:016x}" for a, b in found.tolist()] == sorted(_ids(pool / "coreset"))
    export(pool / "coreset", pool / "ids.txt", "text")
    assert (pool / "ids.txt").read_text().split() == _ids(pool / "coreset")


def test_what_cannot_be_exported_is_said(pool: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean filter"):
        export(pool / "coreset", tmp_path / "x", "filtre")
    folder = tmp_path / "e"
    folder.mkdir()
    np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((50, 8), dtype=np.float32))
    bare = condense(folder, tmp_path / "bare", "random", RANDOM, workers=1)
    with pytest.raises(DataError, match="without images"):
        export(bare, tmp_path / "s")
    with pytest.raises(DataError, match="no DataComp uid"):
        export(bare, tmp_path / "u.npy", "datacomp")
    with pytest.raises(DataError, match="not a filter"):
        Kept(pool / "pool.json")
    with pytest.raises(DataError, match="is no filter"):
        Kept(folder / "x.npy")
    pq.write_table(pa.table({"key": [f"a\nb{n}" for n in range(50)]}), folder / "m.parquet")
    (folder / "img_emb").mkdir()
    (folder / "metadata").mkdir()
    (folder / "x.npy").rename(folder / "img_emb" / "img_emb_0.npy")
    (folder / "m.parquet").rename(folder / "metadata" / "metadata_0.parquet")
    broken = condense(folder, tmp_path / "broken", "random", RANDOM, workers=1)
    with pytest.raises(DataError, match="line break"):
        export(broken, tmp_path / "t.txt", "text")
    assert not (tmp_path / "t.txt").exists()


def test_by_the_command_line(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["coreset", "export", str(pool / "coreset"), "--as", "filter", "-o", str(pool / "cli.npy")]) == 0
    assert "25 ids" in capsys.readouterr().out
    assert len(Kept(pool / "cli.npy")) == 25
