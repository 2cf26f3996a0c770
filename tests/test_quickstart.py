"""The quickstart, small: it ends with what it promises, and killed at any moment it ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from leveret import quickstart
from leveret.runs import EnvironmentFault, RecipeError, RunFolder
from leveret.world.write import WorldSize

SMALL = (
    "world.web=1500 world.tune=120 world.test=24 world.harder=6 budget=60 "
    "stages.align.steps=24 stages.tune.steps=24 stages.align.save_every=5 stages.tune.save_every=5 "
    "stages.align.batch=8 stages.tune.batch=8 ranks=1"
).split()
KINDS = {"existence", "colour", "shape", "count", "relation", "choice", "box", "word"}


def launch(out: Path) -> subprocess.Popen[bytes]:
    log = open(out.parent / "log.txt", "ab")
    command = [sys.executable, "-m", "leveret.cli", "quickstart", "-o", str(out), *SMALL]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finish(out: Path) -> None:
    process = launch(out)
    assert process.wait(timeout=600) == 0, (out.parent / "log.txt").read_text()[-3000:]


def kill_when(out: Path, ready: Callable[[], bool]) -> None:
    """Starts the run and kills it, children and all, as soon as `ready`."""
    process = launch(out)
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, (out.parent / "log.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_unusable_settings_are_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    for given, named in (
        ("world.wbe=5", "world.web"),
        ("world.web=no", "whole number"),
        ("world.web=0", "1 or more"),
        ("world.harder=-1", "0 or more"),
        ("world.harder=3", "5 or more"),
        ("world.strength=awful", "allowed are mild"),
        ("world.text_share=2", "0 to 1"),
        ("budget=99999999", "more than the web holds"),
        ("stages.tune.stepz=3", "steps"),
        ("stages.alignn.steps=3", r"allowed are .*stages\.align.*Did you mean stages\.align"),
        ("budge=3", r"allowed are world\.web.*Did you mean budget"),
        ("web=3", r"Did you mean world\.web"),
    ):
        with pytest.raises(RecipeError, match=named):
            quickstart.run(tmp_path / "run", overrides=[given])
    assert not (tmp_path / "run").exists()


def test_a_dry_run_draws_nothing(tmp_path: Path) -> None:
    quickstart.run(tmp_path / "run", overrides=SMALL, dry_run=True)
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_missed_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for dry in (True, False):
        with pytest.raises(EnvironmentFault, match="torch finds no GPU here"):
            quickstart.run(tmp_path / "run", overrides=[*SMALL, "device=cuda"], dry_run=dry)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_is_done_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"seed": 0, "world": WorldSize().told(), "budget": quickstart.BUDGET, "overrides": []}
    folder = RunFolder.open(tmp_path / "run", "quickstart", recipe)
    folder.done("draw", seconds=1.0)
    quickstart.run(tmp_path / "run", dry_run=True)
    assert "done are draw." in capsys.readouterr().out
    for name in quickstart.STEPS:
        folder.done(name, seconds=1.0)
    quickstart.run(tmp_path / "run", dry_run=True)
    assert "nothing would be" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(RecipeError, match=r"budget: 1500 there, 7 now"):
        quickstart.run(tmp_path / "run", overrides=["budget=7"], dry_run=True)


@pytest.mark.slow
def test_killed_at_every_station_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "a" / "run", tmp_path / "b" / "run"
    whole.parent.mkdir()
    killed.parent.mkdir()
    finish(whole)

    results = json.loads((whole / "results.json").read_text())
    assert set(results["tasks"]) == KINDS
    for row in results["tasks"].values():
        assert {"score", "n", "ci95", "majority", "blind"} <= set(row)
        assert row["n"] == 24 and 0 <= row["ci95"][0] <= row["score"] <= row["ci95"][1] <= 1
    assert results["seconds"]["total"] > 0
    assert (whole / "report.html").stat().st_size > 10_000

    moments: dict[str, Callable[[], bool]] = {
        "draw": lambda: any((killed / "world" / "web").rglob("*.jpg")),
        "condense": lambda: (killed / "coreset").exists() and any((killed / "coreset").rglob("*.npy")),
        "align": lambda: lines(killed / "train" / "align" / "metrics.jsonl") >= 7,
        "tune": lambda: lines(killed / "train" / "tune" / "metrics.jsonl") >= 12,
        "eval": lambda: lines(killed / "eval" / "answers" / "existence.jsonl") >= 1,
    }
    for ready in moments.values():
        kill_when(killed, ready)
    finish(killed)

    same = [
        "coreset/coreset.json",
        "coreset/coreset.parquet",
        "train/align/model/model.safetensors",
        "train/model/model.safetensors",
        "model/model.safetensors",
        *(f"eval/answers/{kind}.jsonl" for kind in KINDS),
        *(f"eval/answers/blind/{kind}.jsonl" for kind in KINDS),
    ]
    for name in same:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    for stage in ("align", "tune"):
        steps = [
            json.loads(line)["step"] for line in (killed / "train" / stage / "metrics.jsonl").read_text().splitlines()
        ]
        assert steps == list(range(1, 25))


@pytest.mark.slow
def test_the_python_interface_takes_what_the_command_line_takes(tmp_path: Path) -> None:
    import leveret

    folder = quickstart.run(tmp_path / "run", overrides=SMALL)
    model = leveret.load(folder)
    picture = next((folder / "world" / "images" / "test").glob("*.jpg"))
    answer = model.ask(picture, "How many objects are there?")
    assert isinstance(answer, str) and answer
    again = leveret.evaluate(folder, folder / "world", suite="count", out=tmp_path / "again")
    assert (
        again["tasks"]["count"]["score"] == json.loads((folder / "results.json").read_text())["tasks"]["count"]["score"]
    )
