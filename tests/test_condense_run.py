"""From a pool to a coreset: what is written, resuming after any crash, errors, foreign folders of embeddings."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fakes import save_dual_encoder
from leveret.cli import explain, run
from leveret.condense import condense, embed
from leveret.condense import embed as embed_function
from leveret.condense.given import Given
from leveret.condense.ledger import Excerpt, records, write_coreset
from leveret.condense.pipeline import open_coreset
from leveret.condense.recut import recut
from leveret.model import encoders
from leveret.pool import open_source
from leveret.runs import DataError, EnvironmentFault, Interrupted, RecipeError


class _Fake:
    """An encoder for tests: coarse colours for pictures, letters for captions."""

    id, width, has_texts, fingerprint = "fake", 12, True, "fake 1"
    view = encoders.PixelEncoder.view

    def images(self, images):
        rows = [np.asarray(image.resize((2, 2), Image.Resampling.BOX), np.float32).ravel() - 100 for image in images]
        return encoders._unit(np.stack(rows)) if rows else np.zeros((0, 12), np.float32)

    def texts(self, texts):
        rows = [[1 + text.count(letter) for letter in "abcdefghijkl"] for text in texts]
        return encoders._unit(np.array(rows, np.float32))


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    row = encoders.EncoderRow(lambda device: _Fake(), False, "for tests")
    monkeypatch.setitem(encoders.ENCODERS, "fake", row)
    encoders.load_encoder.cache_clear()


def _pool(folder: Path, n: int = 60, *, broken: bool = True) -> Path:
    """A LLaVA list: every third picture is a copy of the one before; two samples cannot be read."""
    random = np.random.default_rng(1)
    (folder / "pictures").mkdir(parents=True)
    records = []
    for i in range(n):
        if i % 3 != 1 or not records:
            image = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((40, 30))
        image.save(folder / "pictures" / f"{i}.png")
        caption = "".join(random.choice(list("abcdefghijkl "), 12)) + "x"
        turns = [{"from": "human", "value": "<image>\nSay."}, {"from": "gpt", "value": caption}]
        records.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns, "extra": i})
    if broken:
        (folder / "pictures" / "7.png").write_bytes(b"<html>")
        records[9] = {"id": "s9", "image": "9.png", "conversations": []}
        records[11].pop("image")
        records[11]["conversations"][0]["value"] = "Say."
    (folder / "pool.json").write_text(json.dumps(records))
    return folder / "pool.json"


RECIPE = """
encoder: fake
steps:
  cluster: {k: 3, iterations: 4}
  dedup: {threshold: 0.86}
  score: {low: 0.1, high: 0.9}
  centroid: {low: 0.0, high: 0.8}
  budget: {count: 12}
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def _ledger(out: Path) -> list[dict]:
    """All rows of the ledger, in the order of the source."""
    rows = [row for path in sorted((out / "ledger").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: row["index"])


def _results(out: Path) -> tuple:
    """What a run found: the ledger's rows, and the bytes of what does not hang on the order of parts."""
    names = ("coreset.json", "summary.json", "coreset.parquet")
    return _ledger(out), *((out / name).read_bytes() for name in names)


def _condense(pool: Path, out: Path, recipe: Path, *overrides: str, **more):
    return condense(pool, out, recipe, overrides, images=pool.parent / "pictures", workers=2, **more)


def test_the_ledger_tells_the_fate_of_every_sample(tmp_path, recipe):
    pool = _pool(tmp_path / "pool")
    out = _condense(pool, tmp_path / "out", recipe)
    rows = _ledger(out)
    assert [row["index"] for row in rows] == list(range(60))
    by_id = {row["id"]: row for row in rows}
    assert by_id["s7"]["verdict"] == "read" and by_id["s7"]["reason"] == "image not an image"
    assert by_id["s9"]["reason"] == "no turns" and by_id["s11"]["reason"] == "no image"
    assert by_id["s7"]["cluster"] is None and by_id["s7"]["keeper"] is None
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row["component"] is not None:
            groups.setdefault(row["component"], []).append(row["id"])
        if row["verdict"] == "dedup":
            assert row["reason"] in ("exact copy", "near copy") and row["component_size"] > 1
            keeper = by_id[row["keeper"]]
            assert keeper["component"] == row["component"] and keeper["verdict"] != "dedup"
            assert keeper["keeper"] == keeper["id"]
        else:
            assert row["verdict"] == "read" or row["reason"] == ""
    assert all(first == min(members) for first, members in groups.items())
    assert all(by_id[id]["component_size"] == len(members) for members in groups.values() for id in members)
    assert {row["verdict"] for row in rows} == {"dedup", "score", "centroid", "budget", "read", "kept"}
    kept = [row["id"] for row in rows if row["verdict"] == "kept"]
    assert pq.read_table(out / "coreset.parquet").column("id").to_pylist() == kept
    coreset = json.loads((out / "coreset.json").read_text())
    assert [record["id"] for record in coreset] == kept and len(kept) == 12
    source = json.loads(pool.read_text())
    assert coreset == [source[int(name[1:])] for name in kept]  # whole records, paths as they were
    summary = json.loads((out / "summary.json").read_text())
    assert summary["input"] == 60 and summary["refused"] == 3 and summary["kept"] == 12
    lefts = [stage["left"] for stage in summary["funnel"]]
    assert lefts == sorted(lefts, reverse=True) and lefts[-1] == 12
    page = (out / "report.html").read_text()
    for words in ("12 of 60 samples were kept", "near copies", "Around the upper border", "A map", "no image"):
        assert words in page
    assert page.count('class="badge bad"') > 5 and page.count("<img") > 20


ALONE_OR_TWO = pytest.mark.parametrize("more", [(), ("cluster.clusters_per_row=2", "cluster.k=4")])
"""Rows that sit in one cluster, and in two."""


@ALONE_OR_TWO
def test_a_rerun_and_other_workers_and_shards_give_the_same_bytes(tmp_path, recipe, more):
    pool = _pool(tmp_path / "pool")
    out = _condense(pool, tmp_path / "one", recipe, *more)
    first = _results(out)
    assert _results(_condense(pool, tmp_path / "one", recipe, *more)) == first
    made = embed(pool, tmp_path / "emb", "fake", images=pool.parent / "pictures", shard=7, batch=4, workers=1)
    again = condense(made, tmp_path / "two", recipe, more, images=pool.parent / "pictures", workers=1)
    assert _ledger(again) == first[0] and (again / "coreset.parquet").read_bytes() == first[3]


@ALONE_OR_TWO
def test_a_crash_at_any_write_changes_nothing(tmp_path, recipe, monkeypatch, more):
    pool = _pool(tmp_path / "pool", 30)
    expected = _results(_condense(pool, tmp_path / "whole", recipe, *more))
    real, count = os.replace, [0, 0]

    def failing(source, target):
        count[0] += Path(target).name not in ("environment.json", "recipe.yaml")  # RunFolder's own, tested there
        if count[0] == count[1]:
            raise KeyboardInterrupt  # as good as kill -9: what is on disk is all that stays
        return real(source, target)

    monkeypatch.setattr("leveret.condense.report.write_report", lambda *args: None)
    monkeypatch.setattr(os, "replace", failing)
    # In one folder, over and over: each run dies a few writes further on than the one before.
    for count[1] in range(1, 200):
        count[0] = 0
        try:
            _condense(pool, tmp_path / "out", recipe, *more)
            break
        except KeyboardInterrupt:
            pass
    assert count[1] > 6
    assert _results(tmp_path / "out") == expected


@ALONE_OR_TWO
def test_a_full_disk_stops_the_run_and_what_was_done_is_kept(tmp_path, recipe, monkeypatch, more):
    folder = _foreign(tmp_path / "emb")
    expected = _results(condense(folder, tmp_path / "whole", recipe, more))
    real, writes = os.replace, [0]

    def full(source, target):
        writes[0] += 1
        if writes[0] > 12:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left") as caught:
            condense(folder, tmp_path / "out", recipe, more)
    code, said = explain(caught.value)
    assert code == 5 and "the disk is full" in said and not list((tmp_path / "out").rglob("*.tmp*"))
    assert _results(condense(folder, tmp_path / "out", recipe, more)) == expected
    # Where it can be known beforehand it is said before hours of work.
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(EnvironmentFault, match="by cluster writes about 0"):
        condense(folder, tmp_path / "other", recipe, more)


def test_kill_minus_nine_and_again(tmp_path):
    pool = _pool(tmp_path / "pool", 60, broken=False)
    code = (
        "import sys; from leveret.condense import condense; "
        "condense(sys.argv[1], sys.argv[2], 'photos', ['cluster.k=4'], images=sys.argv[3], workers=1)"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", code, str(pool), str(killed), str(pool.parent / "pictures")]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (killed / "embeddings" / "metadata").exists() and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    condense(pool, killed, "photos", ["cluster.k=4"], images=pool.parent / "pictures")
    condense(pool, whole, "photos", ["cluster.k=4"], images=pool.parent / "pictures")
    assert _results(killed) == _results(whole)


def test_ten_kills_at_random_moments(tmp_path):
    """Of a chain on embeddings, with two workers and parts that do not fit together; each run goes on from the last."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((6000, 32), dtype=np.float32)
    x[1::3] = x[::3] + 0.1 * x[2::3]
    (tmp_path / "e").mkdir()
    for number, part in enumerate(np.split(x, 6)):
        np.save(tmp_path / f"e/{number}.npy", part)
    steps = ["score=null", "centroid.low=0.1", "centroid.high=0.9", "budget=800", "cluster.k=40"]
    steps.append("cluster.iterations=60")

    def run(out):
        return condense(tmp_path / "e", out, "bunny", steps, workers=2, memory=1 << 20)

    run(tmp_path / "first")  # so that the next one imports nothing
    began = time.monotonic()
    expected = _results(run(tmp_path / "whole"))
    took = time.monotonic() - began
    kills = 0
    while kills < 10:
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 2)
            try:
                run(tmp_path / "killed")
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, took / 2))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
            kills += 1
        else:  # it came to its end: once more from the beginning
            assert _results(tmp_path / "killed") == expected
            shutil.rmtree(tmp_path / "killed")
    assert _results(run(tmp_path / "killed")) == expected


@pytest.mark.parametrize("rule", ["components", "clusters_per_row", "semdedup"])
@pytest.mark.parametrize("first", ["4GB", "256KB"])
def test_a_run_may_go_on_with_other_memory_and_workers(tmp_path, monkeypatch, first, rule):
    """With much memory vectors stay in their files, with little they are copied; a run stopped under the one ends
    under the other, at any of its tasks, with the same results."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((4000, 32), dtype=np.float32)
    x[1::3] = x[:-1:3] + 0.1 * x[2::3]
    # Two large clusters among small ones: these alone are more than a task of the second kind may hold.
    x[:1500], x[1500:2600] = x[:1500] + 3 * x[7], x[1500:2600] + 3 * x[8]
    (tmp_path / "e").mkdir()
    for number, part in enumerate(np.split(x, 4)):
        np.save(tmp_path / f"e/{number}.npy", part)
    steps = ["cluster.k=30", "cluster.iterations=4"]
    if rule != "semdedup":
        steps += ["score=null", "centroid.low=0.1", "centroid.high=0.9", "budget=800"]
    if rule == "clusters_per_row":
        steps.append("cluster.clusters_per_row=2")
    recipe = "semdedup-random" if rule == "semdedup" else "bunny"
    sizes = {"4GB": (4 << 30, 1), "256KB": (1 << 18, 2)}

    def run(out, memory, workers):
        return condense(tmp_path / "e", tmp_path / out, recipe, steps, workers=workers, memory=memory)

    whole = run("whole", *sizes[first])
    expected, second = _results(whole), next(size for name, size in sizes.items() if name != first)
    assert _results(run("other", *second)) == expected
    kept = {folder: len(list((tmp_path / folder / "work/runs/1").glob("*.rows"))) for folder in ("whole", "other")}
    assert sorted(map(bool, kept.values())) == ([True, True] if rule == "clusters_per_row" else [False, True])
    written, real = [0], os.replace
    tasks = len(list((whole / "work").rglob("*.npz")))
    for stop in range(8, tasks, tasks // 3):

        def replace(source, target, stop=stop):
            written[0] += str(target).endswith(".npz")
            if written[0] > stop:
                raise OSError(errno.EIO, "stopped by the test")
            return real(source, target)

        written[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(OSError, match="stopped by the test"):
                run(f"stopped-{stop}", *sizes[first])
        assert _results(run(f"stopped-{stop}", *second)) == expected


@pytest.mark.parametrize("torn", ["*.rows", "*.guests"])
def test_vectors_that_a_power_cut_left_short_are_written_again(tmp_path, monkeypatch, torn):
    """The vectors of a run are not synced, its columns are: so these may be there when those are not whole."""
    folder, more = _foreign(tmp_path / "emb"), ["cluster.clusters_per_row=2", "score=null"]
    expected = _results(condense(folder, tmp_path / "whole", "bunny", more))
    with monkeypatch.context() as patch:
        patch.setattr("leveret.condense.border.measure", _cut)
        with pytest.raises(KeyboardInterrupt):
            condense(folder, tmp_path / "out", "bunny", more)
    run = next((tmp_path / "out" / "work" / "runs" / "1").glob(torn))
    os.truncate(run, run.stat().st_size - 7)
    assert _results(condense(folder, tmp_path / "out", "bunny", more)) == expected


def _cut(*args):
    raise KeyboardInterrupt


def test_a_stop_is_heeded_between_parts(tmp_path, recipe, monkeypatch):
    pool = _pool(tmp_path / "pool")
    monkeypatch.setattr("leveret.condense.pipeline.stop_requested", lambda: True)
    with pytest.raises(Interrupted):
        _condense(pool, tmp_path / "out", recipe)


def test_captions_vectors_are_kept_on_wish(tmp_path, monkeypatch):
    pool = _pool(tmp_path / "pool", 30)
    plain = embed(pool, tmp_path / "plain", "world/scorer", images=pool.parent / "pictures", workers=1)
    monkeypatch.setattr(sys.modules["leveret.condense.embed"], "PROCESSES_FROM", 0)
    both = [
        embed(pool, tmp_path / f"w{n}", "world/scorer", images=pool.parent / "pictures", shard=8, workers=n, texts=True)
        for n in (1, 2)
    ]
    for folder in both:
        shards = range(len(list((folder / "img_emb").iterdir())))
        x, y = (np.concatenate([np.load(folder / k / f"{k}_{n}.npy") for n in shards]) for k in ("img_emb", "text_emb"))
        score = np.concatenate([pq.read_table(folder / "metadata" / f"metadata_{n}.parquet")["score"] for n in shards])
        assert x.shape == y.shape and y.dtype == np.float16 and np.allclose((x * 1.0 * y).sum(1), score, atol=2e-3)
    assert not (plain / "text_emb").exists()
    with pytest.raises(RecipeError, match="has no text side"):
        embed(pool, tmp_path / "no", "pixels", images=pool.parent / "pictures", texts=True)
    with pytest.raises(RecipeError, match="texts"):  # another folder, not half of one and half of the other
        embed(pool, plain, "world/scorer", images=pool.parent / "pictures", texts=True)


def test_a_folder_of_embeddings_holds_one_precision(tmp_path):
    pool, clip = _pool(tmp_path / "pool", 12, broken=False), tmp_path / "clip"
    save_dual_encoder(clip, "clip")
    made = {}
    for precision in ("fp32", "bf16"):
        made[precision] = embed(
            pool, tmp_path / precision, str(clip), images=pool.parent / "pictures", precision=precision, workers=1
        )
    x, y = (np.load(made[name] / "img_emb/img_emb_0.npy").astype(np.float32) for name in ("fp32", "bf16"))
    assert (x != y).any() and ((x * y).sum(1) > 0.99).all()
    assert json.loads((made["bf16"] / "manifest.json").read_text())["precision"] == "bf16"
    assert "precision" not in json.loads((made["fp32"] / "manifest.json").read_text())
    with pytest.raises(RecipeError, match="precision"):
        embed(pool, made["bf16"], str(clip), images=pool.parent / "pictures", precision="fp32", workers=1)
    for precision in made:  # what is condensed again stays in the precision it was made in
        told = {"encoder": str(clip), "precision": precision, "workers": 1}
        out = condense(pool, tmp_path / f"o-{precision}", "photos", images=pool.parent / "pictures", **told)
        again = recut(out, tmp_path / f"r-{precision}", ["dedup.threshold=0.5"], workers=1)
        kept = (out / "embeddings/img_emb/img_emb_0.npy", again / "embeddings/img_emb/img_emb_0.npy")
        assert len({file.read_bytes() for file in kept}) == 1


def test_worker_processes_give_the_bits_of_one_process(tmp_path, monkeypatch):
    pool = _pool(tmp_path / "pool", 40)
    pictures = pool.parent / "pictures"
    module = sys.modules[embed_function.__module__]
    one = embed(pool, tmp_path / "one", "pixels", images=pictures, batch=8, shard=24, workers=1)
    monkeypatch.setattr(module, "PROCESSES_FROM", 0)
    two = embed(pool, tmp_path / "two", "pixels", images=pictures, batch=8, shard=24, workers=2)
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.suffix in (".npy", ".parquet", ".jsonl"))
    assert len(names) == 7
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()


# --- embeddings made elsewhere -------------------------------------------------------------------------------------


def _foreign(folder: Path, n: int = 40, *, texts: bool = True, length: float = 1.0) -> Path:
    """clip-retrieval's layout: two shards, no index, ids or scores."""
    random = np.random.default_rng(2)
    for kind in ("img_emb", "text_emb", "metadata"):
        (folder / kind).mkdir(parents=True)
    for shard in range(2):
        for kind in ("img_emb", "text_emb")[: 2 if texts else 1]:
            x = random.normal(size=(n // 2, 8))
            x *= length / np.linalg.norm(x, axis=1, keepdims=True)
            np.save(folder / kind / f"{kind}_{shard}.npy", x.astype(np.float16))
        paths = [f"/data/photos/{shard}/{i}.jpg" for i in range(n // 2)]
        table = pa.table({"image_path": paths, "caption": [f"caption {shard} {i}" for i in range(n // 2)]})
        pq.write_table(table, folder / "metadata" / f"metadata_{shard}.parquet")
    return folder


def test_a_folder_made_elsewhere_is_taken_as_it_is(tmp_path, recipe):
    folder = _foreign(tmp_path / "emb")
    out = condense(folder, tmp_path / "out", recipe, images="/data/photos")
    rows = _ledger(out)
    x, text = (
        np.concatenate([np.load(folder / kind / f"{kind}_{i}.npy") for i in range(2)]).astype(np.float64)
        for kind in ("img_emb", "text_emb")
    )
    x, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, text))
    np.testing.assert_allclose([row["score"] for row in rows], (x * text).sum(1), rtol=0, atol=1e-14)
    assert len(rows) == 40 and rows[21]["id"] == "/data/photos/1/1.jpg"
    record = json.loads((out / "coreset.json").read_text())[0]
    assert record["image"][1:] == record["id"].removeprefix("/data/photos/")[1:]
    assert record["conversations"][0] == {"from": "human", "value": "<image>"}
    assert record["conversations"][1]["value"].startswith("caption ")


def test_vectors_in_parquet_or_alone_come_through_to_the_report(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "encoder: made elsewhere\nsteps: {cluster: {k: 2}, dedup: {}, budget: {count: 5}}\n"
    )
    x = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    words = {"id": [f"n{i}" for i in range(30)], "text": [f"c{i}" for i in range(30)]}
    pq.write_table(pa.table({"emb": pa.array(list(x)), **words}), tmp_path / "x.parquet", row_group_size=8)
    for name, id, caption in (("x.npy", "", ""), ("x.parquet", "n", "c")):
        out = condense(tmp_path / name, tmp_path / f"out {name}", tmp_path / "r.yaml", workers=1)
        kept = pq.read_table(out / "coreset.parquet")
        records = json.loads((out / "coreset.json").read_text())
        assert [record["id"] for record in records] == kept.column("id").to_pylist()
        rows = kept.column("index").to_pylist()
        assert [record["id"] for record in records] == [f"{id}{row}" for row in rows] and len(rows) == 5
        assert [record["conversations"][1]["value"] for record in records] == [
            f"{caption}{row}" if caption else "" for row in rows
        ]
        assert "A map" in (out / "report.html").read_text()


def test_a_folder_with_faults_is_refused_by_name(tmp_path, recipe):
    long = condense(_foreign(tmp_path / "long", length=3.0), tmp_path / "out", recipe)  # a row is a direction
    assert len(_ledger(long)) == 40
    twice = _foreign(tmp_path / "twice")
    table = pq.read_table(twice / "metadata" / "metadata_0.parquet")
    pq.write_table(table, twice / "metadata" / "metadata_1.parquet")
    with pytest.raises(DataError, match=r"the id '/data/photos/0/\d+.jpg' stands twice"):
        condense(twice, tmp_path / "out1", recipe)
    short = _foreign(tmp_path / "short")
    pq.write_table(pa.table({"caption": ["one"]}), short / "metadata" / "metadata_1.parquet")
    with pytest.raises(DataError, match=r"metadata_1\.parquet has 1 rows"):
        condense(short, tmp_path / "out2", recipe)
    (short / "img_emb" / "img_emb_0.npy").write_bytes(b"no")
    with pytest.raises(DataError, match=r"img_emb_0\.npy: not a readable"):
        condense(short, tmp_path / "out3", recipe)


# --- what is written at the end, in memory that does not grow ------------------------------------------------------


def test_the_coreset_is_one_record_a_line_in_the_order_of_the_source(tmp_path, recipe):
    pool = _pool(tmp_path / "pool")
    kept = pq.read_table(_condense(pool, tmp_path / "out", recipe) / "coreset.parquet").column("index").to_pylist()
    source = json.loads(pool.read_text())
    lines = ",\n".join(json.dumps(source[index], ensure_ascii=False) for index in kept)
    assert (tmp_path / "out" / "coreset.json").read_text() == f"[\n{lines}\n]\n"
    folder = _foreign(tmp_path / "emb")
    for file in (folder / "metadata").iterdir():  # rows that are kept lie in several row groups
        pq.write_table(pq.read_table(file), file, row_group_size=7)
    out = condense(folder, tmp_path / "given", recipe, images="/data/photos")
    ids = pq.read_table(out / "coreset.parquet").column("id").to_pylist()
    assert len({id.split("/")[3] for id in ids}) == 2
    expected = []
    for id in ids:
        shard, number = id.removesuffix(".jpg").split("/")[3:]
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"caption {shard} {number}"}]
        expected.append({"id": id, "image": f"{shard}/{number}.jpg", "conversations": turns})
    assert (out / "coreset.json").read_text() == "[\n" + ",\n".join(map(json.dumps, expected)) + "\n]\n"


def test_records_are_read_when_they_are_written_and_a_fault_leaves_the_old_file(tmp_path, recipe, monkeypatch):
    pool = _pool(tmp_path / "pool")
    opened = open_coreset(_condense(pool, tmp_path / "out", recipe))
    source, asked = open_source(pool, pool.parent / "pictures"), []
    sample = source.sample
    monkeypatch.setattr(source, "sample", lambda index: asked.append(index) or sample(index))
    found = records(opened.state, opened.given, source, None)
    assert next(found)["id"] == f"s{asked[0]}" and len(asked) == 1

    def torn():
        yield {"id": "a"}
        raise DataError("lost")

    path = tmp_path / "c" / "coreset.json"
    write_coreset([{"id": "é"}], path)
    with pytest.raises(DataError, match="lost"):
        write_coreset(torn(), path)
    assert path.read_text("utf-8") == '[\n{"id": "é"}\n]\n' and list(path.parent.iterdir()) == [path]


def _section(page: str, title: str) -> str:
    return page.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_the_report_of_many_rows_looks_at_a_sample_and_says_so(tmp_path, recipe, monkeypatch):
    pool = _pool(tmp_path / "pool", 300, broken=False)
    whole = (_condense(pool, tmp_path / "whole", recipe) / "report.html").read_text()
    assert "sample of" not in whole and "samples that came to this step" in whole
    words, vectors = Given.words, Given.vectors
    read = {"words": 0, "vectors": 0}
    kept = len(json.loads((tmp_path / "whole" / "coreset.json").read_text()))

    def counted(given, places):
        read["words"] += len(places)
        return words(given, places)

    def counted_vectors(given, places):
        read["vectors"] += len(places)
        return vectors(given, places)

    monkeypatch.setattr(Given, "words", counted)
    monkeypatch.setattr(Given, "vectors", counted_vectors)
    monkeypatch.setattr("leveret.condense.report.LOOKED_AT", 50)
    page = (_condense(pool, tmp_path / "some", recipe) / "report.html").read_text()
    assert f"{kept} of 300 samples were kept" in page and "a sample of 50 of 300 rows" in page
    assert [part.split("<")[0] for part in page.split("<h2>")] == [part.split("<")[0] for part in whole.split("<h2>")]
    for title in ("What was left after each step", "Some of what was kept"):  # counted and drawn from all rows
        assert _section(page, title) == _section(whole, title)
    assert _section(page, "Copies").split("<table")[1] == _section(whole, "Copies").split("<table")[1]
    assert "Around the upper border" in page and "A sample: " in page
    # Groups of copies, both borders of two cuts, what is kept; points of the map. Pools bring their own records.
    assert 0 < read["words"] <= 6 * 5 + 2 * 2 * 10 + 12 and read["vectors"] == 50


def test_no_pictures_no_words(tmp_path, recipe, monkeypatch):
    folder = _foreign(tmp_path / "emb", texts=True)
    asked = []
    words = Given.words
    monkeypatch.setattr(Given, "words", lambda given, places: asked.append(len(places)) or words(given, places))
    out = condense(folder, tmp_path / "out", recipe)
    assert asked == [len(json.loads((out / "coreset.json").read_text()))]  # the coreset's own
    assert "A map" in (out / "report.html").read_text()


def test_an_excerpt_hangs_on_ids_alone_and_tells_what_the_ledger_tells(tmp_path, recipe):
    pool = _pool(tmp_path / "pool")
    found = []
    for shard in (7, 50):
        made = embed(pool, tmp_path / f"emb{shard}", "fake", images=pool.parent / "pictures", shard=shard, workers=1)
        opened = open_coreset(condense(made, tmp_path / f"out{shard}", recipe))
        excerpt = Excerpt.of(opened.state, opened.stages, 20)
        assert len(excerpt) == 20 and excerpt.total == 57 and not excerpt.whole
        verdicts = {row["index"]: row["verdict"] for row in _ledger(opened.path)}
        labels = [*(stage.label for stage in opened.stages), "kept"]
        assert [labels[at] for at in excerpt.reached] == [verdicts[row] for row in excerpt.row.tolist()]
        names = [told.id for told in opened.given.words(excerpt.place)]
        assert names == [f"s{row}" for row in excerpt.row.tolist()]
        found.append(excerpt)
        assert set(excerpt.row) < set(Excerpt.of(opened.state, opened.stages, 30).row)
        assert Excerpt.of(opened.state, opened.stages, 57).whole
    assert found[0].row.tolist() == found[1].row.tolist()
    closeness = [excerpt.column("centroid_cosine", "centroid") for excerpt in found]
    np.testing.assert_array_equal(*closeness)


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_recipe_that_needs_scores_says_so_before_work_begins(tmp_path):
    pool = _pool(tmp_path / "pool", 6, broken=False)
    with pytest.raises(RecipeError, match=r"steps.score \(score\) ranks by image-text score.*'pixels' has none"):
        condense(pool, tmp_path / "out", "bunny", encoder="pixels", images=pool.parent / "pictures")
    assert not (tmp_path / "out").exists()
    bare = _foreign(tmp_path / "bare", texts=False)
    with pytest.raises(RecipeError, match=r"steps\.top .*has none"):
        condense(bare, tmp_path / "out", "clip-score-top")


def test_faults_of_steps_are_reported_together(tmp_path):
    changes = ["steps.dedup.treshold=0.9", "steps.dedupe={}", "steps.budget.share=0.5", "score.low=0.8"]
    with pytest.raises(RecipeError) as caught:
        condense(tmp_path, tmp_path / "out", "bunny", changes)
    text = str(caught.value)
    for word in ("treshold", "did you mean threshold", "no step 'dedupe'", "share or count", "must be less"):
        assert word in text


@pytest.mark.parametrize(("change", "word"), [
    ("cluster=null", "needs 'cluster'"), ("steps.cluster=null", "needs 'cluster'"),
    ("steps={cluster: {clusters_per_row: 2}, pairs: {}}", "clusters_per_row is 2"),
])  # fmt: skip
def test_steps_in_an_order_that_cannot_work(tmp_path, recipe, change, word):
    with pytest.raises(RecipeError, match=word):
        condense(_foreign(tmp_path / "emb"), tmp_path / "out", recipe, [change])


def test_clusters_per_row_on_the_command_line(tmp_path, capsys):
    folder = _foreign(tmp_path / "emb")
    for more, code, said in (
        (["2", "-r", "bunny", "cluster.k=4"], 0, "kept"),
        (["2", "-r", "random"], 2, "no step that makes clusters"),
        (["9", "-r", "bunny"], 2, "less than or equal to 8"),
        (["2", "-r", "semdedup-far"], 2, "clusters_per_row is 2"),
    ):
        out = tmp_path / "-".join(more)
        assert run(["condense", str(folder), "--clusters-per-row", *more, "-o", str(out)]) == code
        assert said in "".join(capsys.readouterr())


def test_another_recipe_in_the_same_folder_is_refused(tmp_path, recipe):
    folder = _foreign(tmp_path / "emb")
    condense(folder, tmp_path / "out", recipe)
    with pytest.raises(RecipeError, match=r"steps.dedup.threshold: 0.86 there, 0.9 now"):
        condense(folder, tmp_path / "out", recipe, ["steps.dedup.threshold=0.9"])


def test_too_many_bad_samples_stop_the_run(tmp_path):
    pool = _pool(tmp_path / "pool", 12)
    with pytest.raises(DataError, match="3 of 12 samples are refused"):
        embed(pool, tmp_path / "out", "fake", images=pool.parent / "pictures")


@pytest.mark.parametrize("n", [1, 2])
def test_tiny_pools_come_through(tmp_path, recipe, n):
    pool = _pool(tmp_path / "pool", n, broken=False)
    out = _condense(pool, tmp_path / "out", recipe, "score=null", "centroid=null")
    assert len(json.loads((out / "coreset.json").read_text())) == 1


def test_an_empty_folder_has_an_empty_coreset(tmp_path, recipe):
    out = condense(_foreign(tmp_path / "emb", 0), tmp_path / "out", recipe)
    assert json.loads((out / "coreset.json").read_text()) == []
    assert _ledger(out) == []


def test_a_band_may_leave_nothing(tmp_path, recipe):
    out = _condense(_pool(tmp_path / "pool", 1, broken=False), tmp_path / "out", recipe)
    assert json.loads((out / "coreset.json").read_text()) == []
    assert _ledger(out)[0]["verdict"] == "score"


def test_records_of_a_pool_may_share_an_id(tmp_path, recipe):
    pool = _pool(tmp_path / "pool", broken=False)
    records = json.loads(pool.read_text())
    for place in (5, 6, 40):
        records[place]["id"] = "same"
    pool.write_text(json.dumps(records))
    out = _condense(pool, tmp_path / "out", recipe)
    names = {row["index"]: row["id"] for row in _ledger(out)}
    assert (names[5], names[6], names[40]) == ("same", "same#6", "same#40") and len(set(names.values())) == 60
    kept = json.loads((out / "coreset.json").read_text())
    assert [record["extra"] for record in kept] == pq.read_table(out / "coreset.parquet").column("index").to_pylist()
    assert _results(_condense(pool, tmp_path / "out", recipe)) == _results(out)
