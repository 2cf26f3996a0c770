"""The dry run: what a hundredth of the rows says of all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from leveret.condense import condense
from leveret.condense.estimate import estimate
from leveret.condense.given import open_given
from leveret.condense.steps import read

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
    told = subprocess.run([*call, "-o", str(tmp_path / "no"), "--json"], capture_output=True, text=True)
    assert json.loads(told.stdout)["estimate"]["rows"] == N


def test_few_rows_and_rows_without_a_direction(tmp_path: Path) -> None:
    for n in (0, 1, 2, 5):
        x = np.zeros((n, 8), np.float32)
        x[: n // 2] = 1
        np.save(tmp_path / f"{n}.npy", x)
        found = estimate(open_given(tmp_path / f"{n}.npy"), read("bunny"), workers=1, memory=1 << 20)
        assert found["rows"] == n
