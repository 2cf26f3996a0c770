"""`leveret coreset add`: the old rows and the new ones, as if all had been condensed with the old centroids."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leveret.cli import run
from leveret.condense import condense, embed
from leveret.condense.add import add
from leveret.runs import DataError, RecipeError

N, WIDTH = 1200, 24
STEPS = ["cluster.k=15", "score.low=0.1", "score.high=0.9", "centroid=null", "budget=300"]


def _rows(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N, WIDTH), dtype=np.float32)
    copies = rng.permutation(N)[: N // 3]
    x[copies] = x[rng.integers(0, N, N // 3)] + 0.15 * x[copies]
    return x


def _layout(folder: Path, x: np.ndarray, start: int, stop: int, files: int = 2) -> Path:
    """clip-retrieval's layout of rows [start, stop)."""
    for kind in ("img_emb", "metadata"):
        (folder / kind).mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(start, stop), files)):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", x[rows].astype(np.float16))
        table = pa.table({"key": [f"k{row * 7919 % 100_003}" for row in rows], "similarity": np.sin(rows)})
        pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def _results(out: Path) -> tuple[object, ...]:
    rows = [row for path in sorted((out / "ledger").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    ledger = sorted(rows, key=lambda row: row["index"])
    return ledger, (out / "coreset.parquet").read_bytes(), (out / "coreset.json").read_bytes()


@pytest.mark.parametrize("more", [[], ["cluster.clusters_per_row=2"]])
@pytest.mark.parametrize("benchmark", [False, True])
def test_adding_equals_condensing_all_with_the_old_centroids(tmp_path: Path, more: list[str], benchmark: bool) -> None:
    x, steps = _rows(), [*STEPS, *more]
    old = _layout(tmp_path / "old", x, 0, 900)
    new, newer = _layout(tmp_path / "new", x, 900, 1100), _layout(tmp_path / "newer", x, 1100, N, files=1)
    np.save(tmp_path / "benchmark.npy", x[::50])
    against = [tmp_path / "benchmark.npy"] if benchmark else []
    first = condense(old, tmp_path / "first", "bunny", steps, workers=1, against=against)
    assigned = {file: file.stat().st_mtime_ns for file in (first / "work" / "runs" / "1").iterdir()}
    out = add(first, [new, newer], tmp_path / "out", workers=2)
    fixed = [*steps, f"centroids={first / 'centroids.npy'}"]
    whole = condense(_layout(tmp_path / "all", x, 0, N, files=7), tmp_path / "whole", "bunny", fixed, against=against)
    assert _results(out) == _results(whole)
    assert _results(add(first, [new, newer], tmp_path / "out", workers=1)) == _results(whole)  # done: nothing changes
    linked = [file for file in (out / "work" / "runs" / "1").iterdir() if file.is_symlink()]
    assert {file.resolve() for file in linked} == set(assigned)  # old rows were not compared with centroids again
    assert {file: file.stat().st_mtime_ns for file in assigned} == assigned
    told = json.loads((out / "added.json").read_text())
    gone = len(pq.read_table(out / "contaminated.parquet")) if benchmark else 0
    assert told["old"]["rows"] + told["new"]["rows"] == N - gone


def test_rank_steps_before_the_clusters_are_done_again(tmp_path: Path) -> None:
    """Then which old rows come to the clusters hangs on the new ones."""
    x = _rows(1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps:\n  top: {by: score, share: 0.5}\n  cluster: {k: 9}\n  dedup: {threshold: 0.9}\n")
    first = condense(_layout(tmp_path / "old", x, 0, 900), tmp_path / "first", recipe, workers=1)
    out = add(first, [_layout(tmp_path / "new", x, 900, N)], tmp_path / "out", workers=1)
    fixed = [f"centroids={first / 'centroids.npy'}"]
    assert _results(out) == _results(condense(_layout(tmp_path / "all", x, 0, N), tmp_path / "w", recipe, fixed))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    x = _rows(2)
    first = condense(_layout(tmp_path / "old", x, 0, 600), tmp_path / "first", "bunny", STEPS, workers=1)
    with pytest.raises(DataError, match="stands twice"):
        add(first, [_layout(tmp_path / "again", x, 500, 700)], tmp_path / "a")
    with pytest.raises(DataError, match="width 12"):
        add(first, [_layout(tmp_path / "narrow", x[:, :12], 600, 700)], tmp_path / "b")
    np.save(tmp_path / "bare.npy", x[600:700].astype(np.float16))
    with pytest.raises(DataError, match="others have none"):
        add(first, [tmp_path / "bare.npy"], tmp_path / "c")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no folder of embeddings"):
        add(first, [tmp_path / "nothing"], tmp_path / "d")
    with pytest.raises(DataError, match="no finished coreset"):
        add(tmp_path / "old", [tmp_path / "again"], tmp_path / "e")
    alone = condense(tmp_path / "old", tmp_path / "random", "random", ["random.count=100", "random.share=null"])
    with pytest.raises(RecipeError, match="groups its rows 0 times"):
        add(alone, [_layout(tmp_path / "more", x, 600, 700)], tmp_path / "f")
    (tmp_path / "old" / "img_emb" / "img_emb_0.npy").write_bytes(b"")
    with pytest.raises(DataError, match="img_emb_0"):
        add(first, [tmp_path / "more"], tmp_path / "g")


def test_rows_that_lie_elsewhere_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = _rows(3)
    x[:900] = x[:900] * 0.2 + np.repeat(_rows(4)[:9], 100, axis=0)
    first = condense(_layout(tmp_path / "old", x, 0, 900), tmp_path / "first", "bunny", STEPS, workers=1)
    new = _layout(tmp_path / "new", x, 900, N)
    assert run(["coreset", "add", str(first), str(new), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "the new rows lie elsewhere" in said and "1,200 samples" in said


def test_a_dry_run_tells_what_adding_comes_to_and_refuses_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = _rows(5)
    first = condense(_layout(tmp_path / "old", x, 0, 900), tmp_path / "first", "bunny", STEPS, workers=1)
    new, out = _layout(tmp_path / "new", x, 900, N), tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    asked = ["coreset", "add", str(first), str(new), "-o", str(out)]
    assert run([*asked, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"rows before +900\n", said) and re.search(r"new rows +300\n", said)
    assert "1,200 rows; told from" in said and "done" not in said
    assert run([*asked, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == before
    assert run(asked) == 0
    kept = json.loads((out / "summary.json").read_text())["kept"]
    low, high = told["estimate"]["steps"]["budget"]["left"]
    assert low <= kept <= high
    capsys.readouterr()
    assert run([*asked, "--dry-run"]) == 0
    assert "all of it is done" in capsys.readouterr().out
    narrow, other = _layout(tmp_path / "narrow", x[:, :12], 600, 700), _layout(tmp_path / "other", x, 1000, N)
    for more, to, code, why in (
        (narrow, "n", 3, "width 12"),
        (tmp_path, "n", 3, "no folder of"),
        (other, "out", 2, ""),
    ):
        asked = ["coreset", "add", str(first), str(more), "-o", str(tmp_path / to)]
        codes = [run([*asked, *dry]) for dry in (["--dry-run"], [])]
        said = capsys.readouterr().err
        assert codes == [code, code] and said.count(why) >= 2, (codes, said)


def test_what_was_refused_stays_told(tmp_path: Path) -> None:
    """Of the old pool and of the new ones: nothing leaves in silence because it was added to."""
    rng = np.random.default_rng(1)
    embedded = {}
    for name, count, broken in (("old", 40, (3, 17)), ("new", 20, (5,)), ("newer", 10, ())):
        (tmp_path / name).mkdir()
        for stem in [f"{name}{i:02d}" for i in range(count)]:
            picture = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            picture.save(tmp_path / name / f"{stem}.png")
            (tmp_path / name / f"{stem}.txt").write_text("a word")
        for i in broken:
            (tmp_path / name / f"{name}{i:02d}.png").write_bytes(b"<html>")
        embedded[name] = embed(tmp_path / name, tmp_path / f"e-{name}", "pixels", workers=1)
    first = condense(embedded["old"], tmp_path / "first", "photos", ["cluster.k=3", "budget=20"], workers=1)
    out, names = first, ["old03.png", "old17.png"]
    for new, more in (("new", ["new05.png"]), ("newer", [])):  # what was added to is added to again
        out = add(out, [embedded[new]], tmp_path / f"with-{new}", workers=1)
        names += more
        summary = json.loads((out / "summary.json").read_text())
        assert summary["refused"] == 3 and summary["left_out"]["read"] == {"image not an image": 3}
        ledger = _results(out)[0]
        assert isinstance(ledger, list) and len(ledger) == summary["input"] == len({row["index"] for row in ledger})
        read = [row["id"] for row in ledger if row["verdict"] == "read"]
        assert [Path(name).name for name in read] == names
        assert "image not an image" in (out / "report.html").read_text()
