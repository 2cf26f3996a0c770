"""The dry run: what a hundredth of the rows says of all of them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leveret.cli import run as command
from leveret.condense import condense
from leveret.condense.estimate import estimate, estimate_pool
from leveret.condense.given import open_given
from leveret.condense.sampled import Range, Sample, after_dedup, cells_of, draw, near_copies
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


def _pairs(x: np.ndarray, rng: np.random.Generator) -> None:
    order = rng.permutation(len(x))
    copies, sources = np.split(order[: len(x) // 2], 2)
    x[copies] = x[sources] + 0.05 * x[copies]


def _neighbours(x: np.ndarray, rng: np.random.Generator) -> None:
    x[1::4] = x[::4] + 0.05 * x[1::4]


def _crowds(x: np.ndarray, rng: np.random.Generator) -> None:
    """Ten pictures that the web shows hundreds of times."""
    for rows in np.split(rng.permutation(len(x))[: len(x) // 2], 10):
        x[rows] = x[rows[0]] + 0.05 * x[rows]


def _crowd(x: np.ndarray, rng: np.random.Generator) -> None:
    """One placeholder, in runs as a crawler met it."""
    starts = rng.choice(len(x) // 32, 20, replace=False) * 32
    rows = (starts[:, None] + np.arange(32)).ravel()
    x[rows] = x[rows[0]] + 0.05 * x[rows]


@pytest.mark.parametrize("copies", [_pairs, _neighbours, _crowds, _crowd])
def test_the_range_of_dedup_holds_what_it_finds_whatever_the_copies_look_like(copies: Any) -> None:
    """Twenty samples of each pool; a range of two deviations may miss one."""
    n, size = 12_000, 64
    x = np.random.default_rng(11).standard_normal((n, 32), dtype=np.float32)
    copies(x, np.random.default_rng(12))
    whole = Sample(x, n, 1.0, np.arange(n) // size)
    left = len(np.unique(near_copies(whole, 0.9).group))
    held, narrow = 0, 0
    for seed in range(20):
        some = np.sort(np.random.default_rng(seed).permutation(n // size)[:32])
        rows = (some[:, None] * size + np.arange(size)).ravel()
        told = after_dedup(Sample(x[rows], n, 1.0, rows // size), 0.9, Range(n, n))
        held += told.low <= left <= told.high
        narrow += told.high - told.low < n / 2
    assert held >= 19
    assert narrow == 20, "it says something"
    assert after_dedup(whole, 0.9, Range(n, n)) == Range(left, left), "of all rows in one cluster it is no guess"


@pytest.mark.parametrize("steps", [
    {"cluster": {"k": "auto"}, "dedup": {"threshold": 0.86}},
    {"cluster": {"k": 9}, "dedup": {"threshold": 0.86}},
    {"cluster": {"k": 9, "clusters_per_row": 2}, "dedup": {"threshold": 0.86}},
    {"cluster": {"k": 1}, "dedup": {"threshold": 0.86}, "again": {"step": "dedup", "threshold": 0.86}},
    {"budget": {"count": 600}, "cluster": {"k": 1}, "dedup": {"threshold": 0.86}},
    {"top": {"share": 0.5}, "cluster": {"k": "auto"}, "dedup": {"threshold": 0.86}, "budget": {"count": 700}},
], ids=lambda steps: "-".join(steps))  # fmt: skip
@pytest.mark.parametrize("files", [1, 40])
def test_ranges_hold_where_borders_part_copies_and_steps_come_before(
    steps: dict[str, Any], files: int, tmp_path: Path
) -> None:
    """Noisy copies in threes, which clusters often part."""
    rng = np.random.default_rng(3)
    x = np.repeat(rng.standard_normal((600, 32), dtype=np.float32), 3, 0)
    x = (x + 0.28 * rng.standard_normal(x.shape, dtype=np.float32))[rng.permutation(len(x))]
    folder = tmp_path / "e"
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for number, rows in enumerate(np.array_split(np.arange(len(x)), files)):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", x[rows])
        told = pa.table({"id": [f"{row:05d}" for row in rows], "score": rng.random(len(rows))})
        pq.write_table(told, folder / "metadata" / f"metadata_{number}.parquet")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"steps": steps}))
    found = estimate(open_given(folder), read(str(recipe)), workers=1, memory=1 << 30)
    assert found["sampled"] == len(x)
    out = condense(folder, tmp_path / "out", recipe, workers=1)
    for stage in json.loads((out / "summary.json").read_text())["funnel"][1:]:
        low, high = found["steps"][stage["label"]]["left"]
        assert low <= stage["left"] <= high, stage["label"]


def test_few_rows_of_several_files_are_told(tmp_path: Path) -> None:
    """Some of them no whole block: what is drawn leaves one row of a block, and none of a file."""
    rng = np.random.default_rng(0)
    (tmp_path / "e").mkdir()
    for name, n in (("a", 65), ("b", 30), *((f"c{k}", 20) for k in range(40))):
        np.save(tmp_path / "e" / f"{name}.npy", rng.standard_normal((n, 16), dtype=np.float32))
    given = open_given(tmp_path / "e")
    assert len(draw(given, 0).x) == len(given) == 895
    with pytest.MonkeyPatch.context() as patch:
        for least in (1, 2, 65, 66, 300):
            patch.setattr("leveret.condense.sampled.LEAST", least)
            sample = draw(given, 1)
            assert least <= len(sample.x) < least + 65 and len(np.unique(sample.block)) >= least // 65
            told = after_dedup(sample, 0.9, Range(895, 895), cells_of(sample.x, 4, 1, 0))
            assert 1 <= told.low <= told.high <= 895


def test_every_preset_is_estimated_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = open_given(folder)
    for name in ("bunny", "semdedup-far", "clip-score-top", "density", "leveret", "random", "world", "photos"):
        found = estimate(given, read(name), workers=1, memory=1 << 30)
        ends = [facts["left"] for facts in found["steps"].values()]
        assert all(0 <= low <= high <= N for low, high in ends), name
    call = ["condense", str(folder), "--dry-run", "-o", str(tmp_path / "no"), "score=null"]
    assert command(call) == 0
    said = capsys.readouterr().out
    assert "after dedup" in said and "GB of disk" in said and not (tmp_path / "no").exists()
    assert command([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["estimate"]["rows"] == N


def test_few_rows_and_rows_without_a_direction(tmp_path: Path) -> None:
    for n in (0, 1, 2, 5):
        x = np.zeros((n, 8), np.float32)
        x[: n // 2] = 1
        np.save(tmp_path / f"{n}.npy", x)
        found = estimate(open_given(tmp_path / f"{n}.npy"), read("bunny"), workers=1, memory=1 << 20)
        assert found["rows"] == n


def test_a_pool_is_told_from_the_few_that_are_embedded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    call = ["condense", str(tmp_path / "pool.json"), "--dry-run", "-r", "photos", "-o", str(tmp_path / "no")]
    assert command([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["estimate"]
    assert found["embed"]["samples"] == found["embed"]["looked"] == 600
    assert found["embed"]["refused"] == {"image not an image": 120} and found["rows"] == found["sampled"] == 480
    out = condense(tmp_path / "pool.json", tmp_path / "out", "photos", limit_share=0.5, workers=1)
    for stage in json.loads((out / "summary.json").read_text())["funnel"][2:]:
        low, high = found["steps"][stage["label"]]["left"]
        assert low <= stage["left"] <= high, stage["label"]
    capsys.readouterr()
    assert command(call) == 0
    said = capsys.readouterr().out
    assert "embedding 600 samples: about" in said and "120 refused: image not an image" in said
    assert not (tmp_path / "no").exists()
    # Some of a larger pool: the share that can be read is told of all.
    pool = open_source(tmp_path / "pool.json")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEAST", 60), ("BLOCK", 10)):
            patch.setattr(f"leveret.condense.sampled.{name}", value)
        some = estimate_pool(pool, read("photos"), "pixels", workers=1, memory=1 << 20)
    assert (some["embed"]["looked"], some["sampled"], some["rows"]) == (60, 48, 480)
    with pytest.raises(RecipeError, match="ranks by image-text score"):
        estimate_pool(pool, read("bunny"), "pixels", workers=1, memory=1 << 20)
    for i in range(600):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(DataError, match="none of the 600 samples that were looked at"):
        estimate_pool(pool, read("photos"), "pixels", workers=1, memory=1 << 20)


# --- what a run refuses ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures that differ, of which the last three are broken."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(5)
    for i in range(12):
        image = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((40, 30))
        image.save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text("a word")
    for i in (9, 10, 11):
        (root / f"{i:02d}.png").write_bytes(b"<html>")
    return root


@pytest.mark.parametrize(
    "wrong",
    [
        ["--encoder", "no-such-encoder"],
        ["--texts", "--encoder", "pixels"],
        ["--limit-share", "0.1"],
        ["--executor", "lokal"],
        ["-o", "{there}"],
        ["-o", "{file}"],
        ["-o", "{other}"],
        ["-o", "{file}/x"],
        ["--executor", "ray"],
        ["--precision", "fp4"],
    ],
    ids=lambda given: " ".join(given[-2:]),
)
@pytest.mark.parametrize("verb", ["embed", "condense"])
def test_a_dry_run_refuses_what_the_run_refuses(
    photos: Path,
    tmp_path: Path,
    verb: str,
    wrong: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the same words: nothing that can be known before the work is left to the work."""
    if verb == "condense":
        if "--texts" in wrong:
            wrong = ["-r", "bunny", *wrong[1:]]  # it ranks by score, which this encoder has not
        else:
            wrong = ["-r", "photos", "budget=3", *wrong]
    if "ray" in wrong:
        monkeypatch.setitem(sys.modules, "ray", None)  # not installed
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "letter.txt").touch()
    (tmp_path / "file").touch()
    names = {name: str(tmp_path / name) for name in ("there", "file", "other")}
    given = [word.format(**names) for word in wrong]
    if "--encoder" not in given:
        given += ["--encoder", "pixels"]
    if "-o" not in given:
        given += ["-o", str(tmp_path / "out")]
    usual = [] if "--limit-share" in given else ["--limit-share", "0.5"]
    if names["other"] in given:  # a folder that the same command filled otherwise
        before = ["--shard", "5"] if verb == "embed" else ["seed=7"]
        assert command([verb, str(photos), *given, *usual, *before]) == 0
        capsys.readouterr()
    there = sorted(tmp_path.rglob("*"))
    told = []
    for more in (["--dry-run"], []):
        status = command([verb, str(photos), *given, *usual, *more])
        told.append((status, capsys.readouterr().err.splitlines()[-1].split(" Each is named in ")[0]))
        if more:
            assert sorted(tmp_path.rglob("*")) == there, "a dry run writes nothing"
    assert told[0][0] in (2, 3, 5) and told[0][0] == told[1][0], told
    if "--limit-share" in given:  # where they stand is known only of what was written
        assert all("3 of 12 samples are refused" in line for _, line in told)
    else:
        assert told[0] == told[1]


def test_a_recut_s_dry_run_refuses_what_the_recut_refuses(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = tmp_path / "pool"
    shutil.copytree(photos, pool)
    made = ["condense", str(pool), "-r", "photos", "budget=5", "--encoder", "pixels", "--limit-share", "0.5"]
    assert command([*made, "-o", str(tmp_path / "a")]) == 0
    again = ["coreset", "recut", str(tmp_path / "a"), "-o"]
    capsys.readouterr()
    assert command([*again, str(tmp_path / "b"), "budget=4", "--dry-run"]) == 0
    assert "budget" in capsys.readouterr().out and not (tmp_path / "b").exists()
    for out, budget, why in (("b", 5, "the recipe that"), ("pool", 4, "is not empty and holds no run")):
        for more in (["--dry-run"], []):
            assert command([*again, str(tmp_path / out), f"budget={budget}", *more]) == 2
            assert why in capsys.readouterr().err
    (pool / "00.txt").write_text("another word")
    for more in (["--dry-run"], []):
        assert command([*again, str(tmp_path / "b"), "budget=4", *more]) == 3
        assert "changed since that coreset was made" in capsys.readouterr().err


def test_an_embedding_is_told_before_it_is_made(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["embed", str(photos), "-o", str(tmp_path / "e"), "--encoder", "pixels", "--limit-share", "0.5"]
    told += ["--shard", "5"]
    assert command([*told, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["shards"], found["done"]) == (12, 3, 0)
    assert found["estimate"]["rows"] == 9 and found["estimate"]["refused"] == {"image not an image": 3}
    assert command([*told, "--dry-run"]) == 0
    assert "embedding 12 samples: about" in capsys.readouterr().out
    assert command(told) == 0 and command([*told, "--dry-run"]) == 0
    assert "all of it is done" in capsys.readouterr().out


def test_a_finished_embedding_is_judged_again_by_each_limit(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["embed", str(photos), "-o", str(tmp_path / "e"), "--encoder", "pixels", "--limit-share"]
    for limit, status in (("0.5", 0), ("0.1", 3), ("0.25", 0)):
        for more in (["--dry-run"], []):
            assert command([*told, limit, *more]) == status
            said = capsys.readouterr()
            assert ("3 of 12 samples are refused, more than the limit of 10%" in said.err) == (status == 3)
