"""Every block of the tutorials runs as it stands: files are written under the names they bear, commands end well."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from docs_pages import REPO, blocks

TUTORIALS = sorted(path for path in (REPO / "docs" / "tutorials").glob("*.md") if path.stem != "index")
QUICK = (
    "world.web=1500 world.tune=120 world.test=24 world.harder=6 budget=30 "
    "stages.align.steps=4 stages.tune.steps=4 stages.align.batch=8 stages.tune.batch=8 ranks=1"
).split()


def leveret(folder: Path) -> dict[str, str]:
    """An environment in which `leveret` is this one."""
    place = folder / "bin"
    place.mkdir(exist_ok=True)
    (place / "leveret").write_text(f'#!/bin/sh\nexec {sys.executable} -m leveret.cli "$@"\n')
    (place / "leveret").chmod(0o755)
    return {**os.environ, "PATH": f"{place}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "leveret.cli", "quickstart", "-o", str(folder / "q"), *QUICK]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "q"


def test_every_tutorial_has_blocks_that_run() -> None:
    assert len(TUTORIALS) == 6
    for page in TUTORIALS:
        assert sum(block.language == "sh" for block in blocks(page)) >= 1, page


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda path: path.stem)
def test_every_block_of_a_tutorial_runs(page: Path, quickstart: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(quickstart)
    photos = tmp_path / "photos"
    photos.mkdir()
    records = []
    for number in range(30):
        name = "beach" if number == 1 else f"photo-{number}"
        cells = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((96, 72), Image.Resampling.BICUBIC).save(photos / f"{name}.jpg")
        (photos / f"{name}.txt").write_text(f"A picture, number {number}.")
        turns = [
            {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": f"Number {number}."},
        ]  # fmt: skip
        records.append({"id": name, "image": f"{name}.jpg", "conversations": turns})
    if page.stem != "own-data":  # there they are made
        (tmp_path / "my.json").write_text(json.dumps(records[3:]))
        (photos / "test.json").write_text(json.dumps(records[:3]))
    environment, said = leveret(tmp_path), ""
    for block in blocks(page):
        named = re.match(r"# (\S+\.(?:py|yaml))\n", block.text)
        if named:
            (tmp_path / named[1]).write_text(block.text + "\n")
        if block.language == "sh":
            command = ["sh", "-euc", block.text]
        elif block.language == "python" and named:
            command = [sys.executable, named[1]]
        else:
            continue
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (
            f"{block.page}:{block.line}\n{block.text}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        )
        said += done.stdout
    assert said
