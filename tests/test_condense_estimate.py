"""The dry run: what a hundredth of the rows says of all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leveret.condense import condense
from leveret.condense.estimate import estimate, estimate_pool
from leveret.condense.given import open_given
from leveret.condense.steps import read
from leveret.pool import open_source
from leveret.runs import DataError, RecipeError

N, WIDTH = 60_000, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fifth of the rows are near copies of others, in pairs; in three files."""
    place = tmp_path_factory.mktemp("estimate") / "e"
    place.mkdir()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, WIDTH), dtype=np.float32)
    order = rng.permutation(N)
    copies, sources = order[: N // 5], order[N // 5 : 2 * (N // 5)]
    x[copies] = x[sources] + 0.05 * x[copies]
    for number, part in enumerate(np.array_split(x, 3)):
        np.save(place / f"{number}.npy", part.astype(np.float16))
    return place


def test_ranges_hold_what_a_run_finds(folder: Path, tmp_path: Path) -> None:
    told = ["score=null", "dedup.threshold=0.95", "budget=500", "cluster.k=20", "cluster.iterations=3"]
    found = estimate(open_given(folder), read("bunny", told), workers=2, memory=1 << 30)
    assert found["rows"] == N and found["sampled"] == pytest.approx(2000, abs=64)
    out = condense(folder, tmp_path / "out", "bunny", told, workers=2)
    summary = json.loads((out / "summary.json").read_text())
    for stage in summary["funnel"][1:]:
        low, high = found["steps"][stage["label"]]["left"]
        assert low <= stage["left"] <= high, stage["label"]
    low, high = found["thresholds"]["0.95"]
    assert high - low < N / 2 and found["thresholds"]["0.8"][0] <= low
    assert found["steps"]["cluster"]["clusters"] == 20 and found["steps"]["budget"]["left"] == [500, 500]
    work = sum(file.stat().st_size for file in (out / "work").rglob("*") if file.is_file())
    assert found["disk"] / 3 < work < found["disk"] * 3
    assert found["memory"] == 1 << 30 and found["seconds"] > 0


def test_every_preset_is_estimated_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    given = open_given(folder)
    for name in ("bunny", "semdedup-far", "clip-score-top", "density", "leveret", "random", "world", "photos"):
        found = estimate(given, read(name), workers=1, memory=1 << 30)
        ends = [facts["left"] for facts in found["steps"].values()]
        assert all(0 <= low <= high <= N for low, high in ends), name
    call = [sys.executable, "-c", "from leveret.cli import main; main()", "condense", str(folder), "--dry-run"]
    done = subprocess.run([*call, "-o", str(tmp_path / "no"), "score=null"], capture_output=True, text=True)
    assert done.returncode == 0 and "after dedup" in done.stdout and "GB of disk" in done.stdout, done.stderr
    assert not (tmp_path / "no").exists()
    told = subprocess.run([*call, "-o", str(tmp_path / "no"), "score=null", "--json"], capture_output=True, text=True)
    assert json.loads(told.stdout)["estimate"]["rows"] == N


def test_few_rows_and_rows_without_a_direction(tmp_path: Path) -> None:
    for n in (0, 1, 2, 5):
        x = np.zeros((n, 8), np.float32)
        x[: n // 2] = 1
        np.save(tmp_path / f"{n}.npy", x)
        found = estimate(open_given(tmp_path / f"{n}.npy"), read("bunny"), workers=1, memory=1 << 20)
        assert found["rows"] == n


def test_a_pool_is_told_from_the_few_that_are_embedded(tmp_path: Path) -> None:
    """Every fifth picture is broken and every third another's copy; a tenth of the pool is looked at."""
    rng = np.random.default_rng(3)
    records = []
    for i in range(600):
        if i % 3 != 1:
            image = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((40, 30))
        image.save(tmp_path / f"{i}.png")
        if i % 5 == 2:
            (tmp_path / f"{i}.png").write_bytes(b"<html>")
        turns = [{"from": "human", "value": "<image>\nSay."}, {"from": "gpt", "value": "a word"}]
        records.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns})
    (tmp_path / "pool.json").write_text(json.dumps(records))
    call = [sys.executable, "-c", "from leveret.cli import main; main()", "condense", str(tmp_path / "pool.json")]
    call += ["--dry-run", "-r", "photos", "-o", str(tmp_path / "no")]
    done = subprocess.run([*call, "--json"], capture_output=True, text=True)
    found = json.loads(done.stdout)["estimate"]
    assert found["embed"]["samples"] == found["embed"]["looked"] == 600
    assert found["embed"]["refused"] == {"image not an image": 120} and found["rows"] == found["sampled"] == 480
    out = condense(tmp_path / "pool.json", tmp_path / "out", "photos", limit_share=0.5, workers=1)
    for stage in json.loads((out / "summary.json").read_text())["funnel"][2:]:
        low, high = found["steps"][stage["label"]]["left"]
        assert low <= stage["left"] <= high, stage["label"]
    said = subprocess.run(call, capture_output=True, text=True).stdout
    assert "embedding 600 samples: about" in said and "120 refused: image not an image" in said
    assert not (tmp_path / "no").exists()
    # Some of a larger pool: the share that can be read is told of all.
    pool = open_source(tmp_path / "pool.json")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEAST", 60), ("BLOCK", 10)):
            patch.setattr(f"leveret.condense.estimate.{name}", value)
        some = estimate_pool(pool, read("photos"), "pixels", workers=1, memory=1 << 20)
    assert (some["embed"]["looked"], some["sampled"], some["rows"]) == (60, 48, 480)
    with pytest.raises(RecipeError, match="ranks by image-text score"):
        estimate_pool(pool, read("bunny"), "pixels", workers=1, memory=1 << 20)
    for i in range(600):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(DataError, match="none of the 600 samples that were looked at"):
        estimate_pool(pool, read("photos"), "pixels", workers=1, memory=1 << 20)
