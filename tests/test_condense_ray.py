"""The chain on a Ray cluster of this machine: the bits of threads. By the command line, as a user runs it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leveret.cli import run
from leveret.condense import condense

pytest.importorskip("ray", reason="Ray is not installed (pip install 'leveret[ray]')")

STEPS = ["score=null", "centroid.low=0.1", "centroid.high=0.9", "budget=600", "cluster.k=30", "cluster.iterations=4"]


def _command(source: Path, out: Path, *more: str) -> list[str]:
    call = "from leveret.cli import main; main()"
    return [sys.executable, "-c", call, "condense", str(source), "-o", str(out), "--executor", "ray",
            "--workers", "2", *more]  # fmt: skip


def _run(source: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(source, out, *more), capture_output=True, text=True, timeout=300)


def _results(out: Path) -> tuple[object, ...]:
    rows = [row for path in sorted((out / "ledger").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    names = ("coreset.parquet", "coreset.json", "summary.json", "centroids.npy")
    return sorted(rows, key=lambda row: row["index"]), *((out / name).read_bytes() for name in names)


@pytest.mark.slow
def test_a_cluster_gives_the_bits_of_threads_also_where_it_was_killed(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((5000, 32), dtype=np.float32)
    copies = rng.permutation(5000)[:1500]
    x[copies] = x[rng.integers(0, 5000, 1500)] + 0.1 * x[copies]
    folder = tmp_path / "e"
    folder.mkdir()
    for number, part in enumerate(np.split(x, 5)):
        np.save(folder / f"{number}.npy", part)
    np.save(tmp_path / "benchmark.npy", x[40:60] + np.float32(0.01))
    for name, more in (("alone", []), ("two", ["cluster.clusters_per_row=2"])):
        steps = [*STEPS, *more]
        expected = _results(
            condense(folder, tmp_path / f"{name}-here", "bunny", steps, workers=2, against=tmp_path / "benchmark.npy")
        )
        out = tmp_path / f"{name}-ray"
        told = ["--recipe", "bunny", *steps, "--against", str(tmp_path / "benchmark.npy"), "--memory", "1MB"]
        if name == "alone":  # killed once its rows were read, and gone on with
            child = subprocess.Popen(_command(folder, out, *told), stderr=subprocess.DEVNULL)
            while not (out / "work" / "rows" / "0").exists() and child.poll() is None:
                time.sleep(0.01)
            time.sleep(0.5)
            child.send_signal(signal.SIGKILL)
            child.wait()
        done = _run(folder, out, *told)
        assert done.returncode == 0, done.stderr[-2000:]
        assert _results(out) == expected


@pytest.mark.slow
def test_images_are_embedded_on_the_cluster(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    records = []
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(pictures / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": f"picture {number}"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    shutil.copy(pictures / "3.png", pictures / "4.png")
    (pictures / "5.png").write_bytes(b"no picture")
    (tmp_path / "pool.json").write_text(json.dumps(records))
    told = ["photos", ["cluster.k=2"]]
    here = condense(tmp_path / "pool.json", tmp_path / "here", *told, images=pictures, workers=1)
    done = _run(
        tmp_path / "pool.json", tmp_path / "ray", "--recipe", "photos", "cluster.k=2", "--images", str(pictures)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert _results(tmp_path / "ray") == _results(here)
    assert "1 refused" in done.stdout


@pytest.mark.slow
def test_faults_come_back_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    x = np.ones((200, 8), np.float32)
    x[150] = np.nan
    np.save(tmp_path / "e" / "0.npy", x)
    done = _run(tmp_path / "e", tmp_path / "out", *STEPS)
    assert done.returncode == 3 and "row 150 is not finite" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_name_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "e.npy", np.ones((4, 8), np.float32))
    assert run(["condense", str(tmp_path / "e.npy"), "-o", str(tmp_path / "no"), "--executor", "rey"]) == 2
    assert "Did you mean ray?" in capsys.readouterr().err
