"""The page of a training run: of every kind of run, at every moment of it, looked at with a real browser."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import train_fakes
from leveret import cli
from leveret.model.vlm import VLM
from leveret.runs import DataError, Interrupted, RecipeError, claim, is_held
from leveret.train import report, story, train
from test_house_pages import Reader

LEARN: dict[str, Any] = {"connector": {"lr": 5e-3}, "language": {"lr": 5e-3}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two sources, as their records say; one of the pictures is missing, one record is no conversation."""
    path = train_fakes.toy_set(tmp_path_factory.mktemp("toy"), 30)
    records = json.loads(path.read_text())
    for number, record in enumerate(records):
        record["source"] = ("captions", "questions")[number % 3 == 0]
    records[3]["image"], records[5]["conversations"] = "gone.png", []
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, two sources, validations and answers, a best model; finished."""
    held = train_fakes.toy_set(tmp_path_factory.mktemp("held"), 6)
    common = {"learn": LEARN, "batch": 6, "validate_every": 4}
    tune = {
        "steps": 40,
        "held_out": {"data": str(held), "answers": 3, "max_answer": 6},
        "keep_best": {"metric": "loss"},
    }
    recipe = train_fakes.recipe(data, stages={"align": {**common, "steps": 6}, "tune": {**common, **tune}})
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(recipe, folder)
    return folder


def page_of(folder: Path, out: Path) -> Reader:
    return Reader(report.write_page(story.read(folder), out).read_text("utf-8"))


def test_the_page_tells_what_was_taught_and_how_it_went(run: Path, tmp_path: Path) -> None:
    read = page_of(run, tmp_path / "page.html")
    for words in (
        "Finished", "Align", "Tune: curves", "Tune: validations", "Tune: what it says", "mlp2x_gelu", "image missing",
        "no turns", "40\xa0of\xa040", "learning rate", "gradient norm", "tokens/s", "GiB", "waiting for data",
        "captions", "questions", "what colour is it ?", "right: the colour is red", "step 40:", "best/model",
        "keep_best:",
    ):  # fmt: skip
        assert words in read.text, words
    assert "Align: validations" not in read.text, "it had none"
    assert sum(tag == "img" for tag, _ in read.tags) == 3
    assert not [tag for tag, _ in read.tags if tag in ("script", "link", "iframe")]


def test_sources_are_counted_as_they_were_seen(run: Path) -> None:
    tune = story.read(run).stages[1]
    seen = [row["sources"] for row in tune.rows]
    assert all(sum(one.values()) == row["samples"] for one, row in zip(seen, tune.rows, strict=True))
    total = sum(one.get("questions", 0) for one in seen) / sum(sum(one.values()) for one in seen)
    assert 0.2 < total < 0.5


def test_figures_as_json_and_as_a_table(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["run", "report", str(run), "-o", str(tmp_path / "p.html"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["state"] == "finished" and (tmp_path / "p.html").is_file() and not (run / "report.html").exists()
    tune = facts["stages"]["tune"]
    assert tune["step"] == tune["steps"] == 40 and tune["left"] is None and 0 < tune["padding"] < 1
    # A missing file and a record that is no conversation; both counted once, however often they came.
    assert tune["quarantined"] == {"image missing": 1, "no turns": 1} and tune["best"]["metric"] == "loss"
    assert cli.run(["run", "report", str(run)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"tune +done +40\s?of\s?40", said) and "tune: 1 refused: image missing" in said
    assert "tune: best by loss" in said and (run / "report.html").is_file()
    (run / "report.html").unlink()


def test_a_run_without_validations_and_one_that_was_stopped(data: Path, tmp_path: Path) -> None:
    def stop(vlm: VLM, step: int) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"score": 1}

    stages = {"align": {"learn": LEARN, "steps": 6, "validate_every": 2}, "tune": {"learn": LEARN, "steps": 4}}
    with pytest.raises(Interrupted):
        train(train_fakes.recipe(data, stages=stages), tmp_path / "run", validators=[stop])
    told = story.read(tmp_path / "run")
    # Its lock is this process's until it ends, so it counts as running here; for others it is stopped (below).
    assert [stage.state for stage in told.stages] == ["running", "not begun"] and told.stages[0].step == 3
    assert told.stages[0].figures()["left"] > 0
    assert "Not begun yet." in page_of(tmp_path / "run", tmp_path / "page.html").text
    code = "import sys; from leveret.train import story; print(story.read(sys.argv[1]).state)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    asked = [sys.executable, "-c", code, str(tmp_path / "run")]
    assert subprocess.run(asked, capture_output=True, text=True, env=environment).stdout.strip() == "running"
    train(train_fakes.recipe(data, stages=stages), tmp_path / "run")
    assert story.read(tmp_path / "run").state == "finished"
    page_of(tmp_path / "run", tmp_path / "page.html")


def test_whether_a_folder_is_held_is_asked_without_taking_or_dropping_its_lock(tmp_path: Path) -> None:
    held = tmp_path / "held"
    assert not is_held(held)
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        claim(held)
        os.write(told, b".")
        signal.pause()
    try:
        assert os.read(heard, 1) == b"."
        assert is_held(held) and is_held(held), "asking does not drop it"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not is_held(held), "the system drops it with the process"
    claim(held)
    assert is_held(held)


def test_what_is_no_training_run_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no training run"):
        story.read(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: 1")
    (tmp_path / "environment.json").write_text('{"kind": "condense"}')
    with pytest.raises(RecipeError, match="holds a `condense` run"):
        story.read(tmp_path)
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        story.read(tmp_path)


def test_a_run_of_an_older_leveret_is_told_as_far_as_it_goes(run: Path, tmp_path: Path) -> None:
    """No command, no table of parts, and metrics without positions, waiting and memory."""
    old = tmp_path / "old"
    for name in ("recipe.yaml", "environment.json", "tune/metrics.jsonl", "tune/done"):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_bytes((run / name).read_bytes())
    lines = [json.loads(line) for line in (old / "tune/metrics.jsonl").read_text().splitlines()]
    kept = [
        {key: row[key] for key in ("step", "loss", "lr", "grad_norm", "samples", "tokens", "seconds")} for row in lines
    ]
    (old / "tune/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    figures = story.read(old).stages[1].figures()
    assert figures["padding"] is None and figures["memory"] is None and figures["tokens_per_second"] > 0
    assert "kept no table of parts" in page_of(old, tmp_path / "page.html").text
    assert cli.run(["run", "resume", str(old)]) == 2


def test_long_runs_make_short_pages_without_losing_a_spike(run: Path, tmp_path: Path) -> None:
    curve = [(float(step), 1.0) for step in range(1, 50_001)]
    curve[31_234] = (31_235.0, 99.0)
    thinned = report.thin(curve)
    assert len(thinned) <= report.POINTS + 2 and (31_235.0, 99.0) in thinned and thinned[-1] == curve[-1]
    assert thinned == sorted(thinned)


def test_smoothing_is_a_mean_of_what_came_before() -> None:
    assert story.smooth([2.0] * 40) == pytest.approx([2.0] * 40)
    assert story.smooth([]) == [] and story.smooth([3.0]) == [3.0]
    found = story.smooth([0.0] * 50 + [1.0] * 50)
    assert found == sorted(found) and found[-1] > 0.99


def test_whatever_a_model_says_is_text(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    for name in ("recipe.yaml", "environment.json", "command.json", "tune/metrics.jsonl", "tune/stage.json"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((run / name).read_bytes())
    evil = {
        "step": 4,
        "id": "<b>",
        "question": "<script>alert(1)</script>",
        "expected": "",
        "answer": "a\x00\x1b[31m" * 90,
    }
    (copy / "tune/samples.jsonl").write_text(json.dumps(evil) + "\n")
    read = page_of(copy, tmp_path / "page.html")
    assert "<script>alert(1)</script>" in read.text and not any(tag == "script" for tag, _ in read.tags)
    assert "\x00" not in read.text and "\x1b" not in read.text


def test_a_browser_shows_the_page_light_dark_and_on_a_telephone(
    run: Path, tmp_path: Path, chromium: Callable[..., Path]
) -> None:
    page = report.write_page(story.read(run), tmp_path / "page.html")

    def share(image: Image.Image, colour: tuple[int, int, int], near: int = 12) -> float:
        return float((np.abs(np.asarray(image, int) - colour) < near).all(axis=-1).mean())

    light = Image.open(chromium(page, "run-light", height=4000)).convert("RGB")
    dark = Image.open(chromium(page, "run-dark", height=4000, dark=True)).convert("RGB")
    phone = Image.open(chromium(page, "run-phone", width=500, height=4000)).convert("RGB")
    # Curves are drawn in the first colour of either setting; the ground fills the margins; no picture is wider.
    assert share(light, (0x1F, 0x6F, 0x8B)) > 5e-4 and share(dark, (0x6C, 0xB7, 0xD2)) > 5e-4
    assert sum(light.getpixel((3, 3900))) > 3 * 240 and sum(dark.getpixel((3, 3900))) < 3 * 40  # type: ignore[arg-type]
    assert share(phone, (0x1F, 0x6F, 0x8B)) > 5e-4
    right = phone.crop((492, 0, 500, 4000))
    assert share(right, (0xFB, 0xFB, 0xF9), 4) > 0.99, "nothing runs over the edge of a narrow screen"
