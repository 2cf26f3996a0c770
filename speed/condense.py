"""The whole chain against its floor: embeddings -> clusters -> near copies -> windows -> budget, on this machine.

    python speed/condense.py FOLDER [--rows 1000000] [--width 512] [--shard 250000] [--memory 2GB] [--workers N]

Makes float16 embeddings in FOLDER/emb (skewed clusters, 30 % near copies; kept for the next time) and condenses them by
Bunny's recipe into FOLDER/out in a process of its own. Prints the seconds of each step; the most memory that the
process tree held, anonymous and shared, sampled ten times a second; and the ratio to the floor: the FLOP of training,
assignment and pairs at the k that was used, over the best rate of a matrix product measured here, before and after.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def make(folder: Path, n: int, width: int, shard: int, seed: int = 0) -> None:
    """clip-retrieval's layout; a row near one of sqrt(n / 2) centres, whose shares fall off, or near an earlier row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    k = max(2, round((n / 2) ** 0.5))
    for kind in ("img_emb", "metadata"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    centres = np.random.default_rng(seed).standard_normal((k, width), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    shares = 1 / np.arange(1, k + 1) ** 0.6
    for number, start in enumerate(range(0, n, shard)):
        rng = np.random.default_rng((seed, number))
        count = min(shard, n - start)
        noise = rng.standard_normal((count, width), dtype=np.float32)
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        x = centres[rng.choice(k, count, p=shares / shares.sum())] + noise
        copies = rng.permutation(count)[: int(0.3 * count)]
        x[copies] = x[rng.integers(0, count, len(copies))] + 0.4 * noise[copies] * rng.random(
            (len(copies), 1), np.float32
        )
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        np.save(folder / f"img_emb/img_emb_{number}.npy", x.astype(np.float16))
        ids = [f"{row:010d}" for row in range(start, start + count)]
        table = pa.table({"key": ids, "similarity": rng.random(count, np.float32)})
        pq.write_table(table, folder / f"metadata/metadata_{number}.parquet")


def best_rate(threads: int) -> float:
    """FLOP a second of the fastest large matrix product here, of float32, bfloat16 and 8-bit numbers."""
    torch.set_num_threads(threads)
    found = []
    for kind in (torch.float32, torch.bfloat16, torch.int8):
        a = torch.randint(-127, 128, (2048, 2048), dtype=torch.int8).to(kind)
        multiply = torch._int_mm if kind == torch.int8 else torch.mm
        for _ in range(5):
            began = time.perf_counter()
            multiply(a, a.T)
            found.append(2 * 2048**3 / (time.perf_counter() - began))
    return max(found)


class Watch:
    """The most anonymous and shared memory that a process and its children held."""

    def __init__(self, pid: int) -> None:
        self.pid, self.most, self.going = pid, 0, True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while self.going:
            self.most = max(self.most, sum(map(_held, _tree(self.pid))))
            time.sleep(0.1)


def _tree(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def _held(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(1024 * int(values.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--shard", type=int, default=250_000)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    data, out = given.folder / "emb", given.folder / "out"
    if not (data / "ready").exists():
        make(data, given.rows, given.width, given.shard)
        (data / "ready").touch()
    shutil.rmtree(out, ignore_errors=True)
    rates = [best_rate(given.workers)]
    command = [sys.executable, "-m", "leveret.cli", "condense", str(data), "-o", str(out), "-r", "bunny", "--json"]
    command += ["--memory", given.memory, "--workers", str(given.workers), f"budget={given.rows // 1000}"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = Watch(process.pid)
    said, _ = process.communicate()
    wall = time.perf_counter() - began
    watch.going = False
    if process.returncode:
        raise SystemExit(process.returncode)
    rates.append(best_rate(given.workers))
    facts: dict[str, Any] = json.loads(said)
    funnel = {stage["label"]: stage for stage in facts["funnel"]}
    k, trained, rounds = (funnel["cluster"][name] for name in ("clusters", "training_rows", "iterations"))
    sizes = np.zeros(k, np.int64)
    for part in (out / "work/rows/1").glob("*.npz"):
        with np.load(part) as file:
            sizes += np.bincount(file["cluster"], minlength=k)
    pairs = float(np.square(sizes.astype(np.float64)).sum()) / 2
    flop = 2 * given.width * (float(trained) * k * rounds + float(given.rows) * k + pairs)
    floor = flop / max(rates)
    print(
        f"{given.rows:,} rows of {given.width}; k = {k:,}, {rounds} rounds of {trained:,} rows; kept {facts['kept']:,}"
    )
    for name, seconds in json.loads((out / "timings.json").read_text()).items():
        print(f"  {name:<12} {seconds:8.1f} s  {seconds / wall:4.0%}")
    print(f"  {'in all':<12} {wall:8.1f} s, with starting and the report")
    print(
        f"floor {floor:.1f} s ({flop / 1e12:.2f} TFLOP at {max(rates) / 1e12:.2f} TFLOP/s): {wall / floor:.2f} times it"
    )
    print(f"most memory held: {watch.most / 1e9:.2f} GB, of {given.memory}")


if __name__ == "__main__":
    main()
