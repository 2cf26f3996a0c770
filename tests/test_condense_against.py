"""Decontamination: what is an image of a benchmark is dropped, exactly, and named with the nearest one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leveret.cli import run
from leveret.condense import against, condense, embed
from leveret.condense.pipeline import open_coreset
from leveret.condense.recut import recut, redone
from leveret.condense.steps import read
from leveret.condense.verify import verify
from leveret.runs import DataError, RecipeError

Array = Any
WIDTH = 24

# --- both ways -----------------------------------------------------------------------------------------------------


def _unit(x: Array) -> Array:
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.square(wide).sum(1))[:, None]


def rows(kind: str, n: int = 300, m: int = 200, seed: int = 0) -> tuple[Array, Array]:
    """Rows of a pool and of a benchmark; some of the first are near some of the second."""
    rng = np.random.default_rng(seed)
    pool, bench = rng.standard_normal((n, WIDTH)), rng.standard_normal((m, WIDTH))
    near = n // 2
    at = rng.integers(0, m, near)
    pool[:near] = bench[at] + rng.uniform(0, 0.8, (near, 1)) * rng.standard_normal((near, WIDTH))
    pool[:5] = bench[at[:5]]
    bench[m // 2 : m // 2 + 9] = bench[at[1]]  # a placeholder under many names
    if kind == "threshold":  # cosines within 1e-3 of 0.86, on both sides
        unit = _unit(bench)[at]
        for place in range(near):
            away = rng.standard_normal(WIDTH)
            away -= away @ unit[place] * unit[place]
            cosine = 0.86 + rng.uniform(-1e-3, 1e-3) * rng.choice([1, 1e-3, 1e-6])
            pool[place] = cosine * unit[place] + np.sqrt(1 - cosine**2) * away / np.linalg.norm(away)
    if kind == "outlier":  # a dimension that is large in every row, as encoders have them
        pool[:, 3] += 9
        bench[:, 3] += 9
    dtype = np.float16 if kind == "float16" else np.float32
    return pool.astype(dtype), bench.astype(np.float16 if kind in ("float16", "mixed") else np.float32)


def given(folder: Path, x: Array, ids: list[str], shards: int = 3, **columns: Any) -> Path:
    """Embeddings in clip-retrieval's layout."""
    for kind in ("img_emb", "metadata"):
        (folder / kind).mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(len(x)), shards)):
        np.save(folder / f"img_emb/img_emb_{number}.npy", x[part])
        table = {"id": [ids[i] for i in part]} | {name: [values[i] for i in part] for name, values in columns.items()}
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{number}.parquet")
    return folder


def brute(pool: Array, benches: list[tuple[str, Array, list[str]]], threshold: float) -> dict[int, tuple]:
    """Place of a dropped row -> (benchmark, id, cosine) of the nearest image, all pairs in float64."""
    u = _unit(pool)
    found: dict[int, tuple] = {}
    for place, row in enumerate(u):
        every = [
            (-cosine, number, id.encode(), name)
            for number, (name, x, ids) in enumerate(benches)
            for cosine, id in zip((row * _unit(x)).sum(1).tolist(), ids, strict=True)
        ]
        cosine, _, id, name = min(every)
        if -cosine > threshold:
            found[place] = (name, id.decode(), -cosine)
    return found


def names(n: int, mark: str, seed: int = 5) -> list[str]:
    return [f"{mark}{i}" for i in np.random.default_rng(seed).permutation(n)]


RECIPE = "encoder: made elsewhere\nsteps: {cluster: {k: 4}, dedup: {threshold: 0.9}}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def told(out: Path) -> dict[str, tuple]:
    """What contaminated.parquet says, by id."""
    return {
        row["id"]: (row["benchmark"], row["benchmark_id"], row["cosine"])
        for row in pq.read_table(out / "contaminated.parquet").to_pylist()
    }


def ledger(out: Path) -> list[dict[str, Any]]:
    return sorted(pq.read_table(out / "ledger").to_pylist(), key=lambda row: row["id"])


@pytest.mark.parametrize("kind", ["ordinary", "threshold", "float16", "mixed", "outlier"])
def test_what_is_dropped_and_what_it_met_is_what_float64_says(
    kind: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leveret.condense.pipeline.LOT", 32)  # the benchmarks and the pool are larger than a lot
    monkeypatch.setattr("leveret.condense.against.LOT", 41)
    pool, bench = rows(kind)
    ids, first, second = names(len(pool), "p"), names(120, "b"), names(80, "a")
    given(tmp_path / "pool", pool, ids)
    benches = [("one", bench[:120], first), ("two", bench[120:], second)]
    for name, x, own in benches:
        given(tmp_path / name, x, own)
    for threshold in (0.86, 0.6) if kind != "outlier" else (0.97,):
        out = condense(
            tmp_path / "pool", tmp_path / f"out{threshold}", recipe, [f"contaminated.threshold={threshold}"],
            against=[tmp_path / "one", tmp_path / "two"], workers=2,
        )  # fmt: skip
        expected = {ids[place]: met for place, met in brute(pool, benches, threshold).items()}
        assert told(out) == expected and 10 < len(expected) < len(pool)
        table = pq.read_table(out / "contaminated.parquet")
        assert table.column_names == ["id", "benchmark", "benchmark_id", "cosine"]
        assert [id for id in ids if id in expected] == table.column("id").to_pylist()  # in the order of the source
        by_id = {row["id"]: row for row in ledger(out)}
        assert {id for id, row in by_id.items() if row["verdict"] == "contaminated"} == set(expected)
        assert all(row["cluster"] is not None for id, row in by_id.items() if id not in expected)
        summary = json.loads((out / "summary.json").read_text())
        stage = summary["funnel"][1]
        assert (stage["label"], stage["left"]) == ("contaminated", len(pool) - len(expected))
        met = {name: sum(one == name for one, _, _ in expected.values()) for name in ("one", "two")}
        counts = {"one": 120, "two": 80}
        assert stage["against"] == {
            name: {"images": count, "refused": 0, "met": met[name]} for name, count in counts.items()
        }
        assert sum(summary["left_out"]["contaminated"].values()) == len(expected)
        assert "Without images of benchmarks" in (out / "report.html").read_text()


def test_files_memory_and_workers_change_no_id(recipe: Path, tmp_path: Path) -> None:
    pool, bench = rows("ordinary")
    ids, own = names(len(pool), "p"), names(len(bench), "b")
    order, other = np.random.default_rng(1).permutation(len(pool)), np.random.default_rng(2).permutation(len(bench))
    given(tmp_path / "a/pool", pool, ids)
    given(tmp_path / "a/bench", bench, own)
    given(tmp_path / "b/pool", pool[order], [ids[i] for i in order], shards=7)
    given(tmp_path / "b/bench", bench[other], [own[i] for i in other], shards=5)
    one = condense(tmp_path / "a/pool", tmp_path / "one", recipe, against=[tmp_path / "a/bench"], workers=1)
    two = condense(tmp_path / "b/pool", tmp_path / "two", recipe, against=[tmp_path / "b/bench"], workers=2, memory=1)
    assert told(one) == told(two) and len(told(one)) > 20
    drop = ("index",)
    assert [{k: v for k, v in row.items() if k not in drop} for row in ledger(one)] == [
        {k: v for k, v in row.items() if k not in drop} for row in ledger(two)
    ]


def test_a_row_that_no_step_needs_a_cluster_for_is_dropped_too(tmp_path: Path) -> None:
    pool, bench = rows("ordinary")
    ids = names(len(pool), "p")
    given(tmp_path / "pool", pool, ids, score=np.linspace(0, 1, len(pool)))
    np.save(tmp_path / "bench.npy", bench)
    out = condense(tmp_path / "pool", tmp_path / "out", "clip-score-top", against=[tmp_path / "bench.npy"])
    gone = {ids[place] for place in brute(pool, [("b", bench, [""] * len(bench))], 0.86)}
    assert set(told(out)) == gone
    left = [id for id in ids if id not in gone]  # scores rise with the place
    kept = set(left[-int(0.3 * len(left)) :])
    assert {row["id"] for row in ledger(out) if row["verdict"] == "kept"} == kept


# --- runs ----------------------------------------------------------------------------------------------------------


def photos(folder: Path, n: int, seed: int = 0) -> Path:
    """Smooth pictures that have nothing in common, without captions."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 255, (7, 7, 3), dtype=np.uint8))
        small.resize((96, 80), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


def contaminated_pool(folder: Path, bench: Path) -> Path:
    """Captioned photos; 3, 5 and 8 are re-encoded copies of the benchmark's 1, 4 and 7."""
    photos(folder, 12, seed=1)
    for mine, theirs in ((3, 1), (5, 4), (8, 7)):
        (folder / f"{mine:02d}.png").unlink()
        copy = Image.open(bench / f"{theirs:02d}.png").resize((70, 60))
        copy.save(folder / f"{mine:02d}.jpg", quality=60)
    for photo in list(folder.iterdir()):
        photo.with_suffix(".txt").write_text("a photo")
    return folder


COPIES = {"03.jpg": "01.png", "05.jpg": "04.png", "08.jpg": "07.png"}


def test_copies_of_a_folder_of_bare_photos_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = photos(tmp_path / "bench", 10)
    (bench / "09.png").write_bytes(b"<html>")
    (bench / "notes.txt").write_text("where the photos are from")
    (bench / "00.txt").write_text("")  # an empty caption: the picture counts all the same
    pool = contaminated_pool(tmp_path / "pool", bench)
    command = ["condense", str(pool), "-o", str(tmp_path / "out"), "-r", "photos", "--against", str(bench), "--json"]
    assert run([*command, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["against"] == {"bench": 11} and next(iter(plan["steps"])) == "contaminated"
    assert run(command[:-1]) == 0
    said = capsys.readouterr().out
    assert "3 near one of the 9 images of bench" in said and "2 images of bench could not be read" in said
    assert run(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["funnel"][1]["against"] == {"bench": {"images": 9, "refused": 2, "met": 3}} and facts["kept"] == 9
    found = told(tmp_path / "out")
    assert {id: met[1] for id, met in found.items()} == COPIES and all(met[2] > 0.7 for met in found.values())
    refused = (tmp_path / "out/against/00/quarantine.jsonl").read_text()
    assert "09.png" in refused and "notes.txt" in refused and len(refused.splitlines()) == 2
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["against"][0]["name"] == "bench" and manifest["left"] == {
        "contaminated": 9,
        "cluster": 9,
        "dedup": 9,
    }
    # The same from embeddings of both, and of either.
    ours, theirs = (
        embed(pool, tmp_path / "e", "pixels"),
        embed(against.Pictures(_source(bench)), tmp_path / "f", "pixels"),
    )
    for number, (source, other) in enumerate(((ours, theirs), (ours, bench), (pool, theirs))):
        out = condense(source, tmp_path / f"o{number}", "photos", against=[other])
        assert {id: met[1:] for id, met in told(out).items()} == {id: met[1:] for id, met in found.items()}


def _source(path: Path) -> Any:
    from leveret.pool import open_source

    return open_source(path)


def test_every_image_of_a_record_counts_once(tmp_path: Path) -> None:
    photos(tmp_path / "b", 4)
    turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "yes"}]
    one = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "no"}]
    records = [
        {"id": "two", "image": ["00.png", "01.png"], "conversations": turns},
        {"id": "again", "image": "01.png", "conversations": one},
        {"id": "silent", "image": "02.png", "conversations": []},
        {"id": "text", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "no"}]},
    ]
    (tmp_path / "b/list.json").write_text(json.dumps(records))
    found = against.Pictures(_source(tmp_path / "b/list.json"))
    assert [found.sample(at).id for at in range(len(found))] == ["two", "two#1", "silent"]
    (tmp_path / "b/list.json").write_text(json.dumps(records[-1:]))
    with pytest.raises(DataError, match="none of its 1 samples has an image"):
        against.Pictures(_source(tmp_path / "b/list.json"))


def results(out: Path) -> list[Any]:
    files = ("coreset.json", "coreset.parquet", "contaminated.parquet", "summary.json")
    return [ledger(out), *((out / name).read_bytes() for name in files)]


def test_a_crash_at_any_write_changes_nothing(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = photos(tmp_path / "bench", 10)
    pool = embed(contaminated_pool(tmp_path / "pool", bench), tmp_path / "e", "pixels", shard=5)
    monkeypatch.setattr("leveret.condense.report.write_report", lambda *args: None)
    monkeypatch.setattr("leveret.condense.pipeline.LOT", 4)
    whole = condense(pool, tmp_path / "whole", recipe, against=[bench])
    real, count = os.replace, [0, 0]

    def failing(source: Any, target: Any) -> None:
        count[0] += Path(target).name not in ("environment.json", "recipe.yaml")  # RunFolder's own, tested there
        if count[0] == count[1]:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    for count[1] in range(1, 200):
        count[0] = 0
        try:
            condense(pool, tmp_path / "out", recipe, against=[bench], workers=1)
            break
        except KeyboardInterrupt:
            pass
    assert count[1] > 8 and results(tmp_path / "out") == results(whole)


def test_a_coreset_is_opened_verified_and_recut(recipe: Path, tmp_path: Path) -> None:
    pool, bench = rows("ordinary")
    given(tmp_path / "pool", pool, names(len(pool), "p"))
    given(tmp_path / "bench", bench, names(len(bench), "b"))
    out = condense(tmp_path / "pool", tmp_path / "out", recipe, against=[tmp_path / "bench"])
    found = verify(out)
    assert found["clusters"] == 4 and found["rows"] == len(pool) - len(told(out))
    assert (found["labels_wrong"], found["groups_wrong"], found["keepers_wrong"]) == (0, 0, 0)
    assert found["contaminated"] > 100 and found["contaminated_wrong"] == 0
    written = {part: part.read_bytes() for part in (out / "work" / "contaminated").glob("0*.npz")}
    for part in written:
        with np.load(part) as file:
            columns = dict(file)
        columns["benchmark_cosine"] += 0.001  # as if they had met other images
        np.savez(part, **columns)
    assert verify(out)["contaminated_wrong"] == min(len(told(out)), 256) > 0
    for part, right in written.items():
        part.write_bytes(right)
    for changes, again in (
        (["contaminated.threshold=0.5"], ["contaminated", "cluster", "dedup"]),
        (["dedup.threshold=0.8"], ["dedup"]),
    ):
        assert redone(out, changes) == again
        whole = condense(tmp_path / "pool", tmp_path / f"w{again[0]}", recipe, changes, against=[tmp_path / "bench"])
        made = recut(out, tmp_path / f"r{again[0]}", changes)
        assert results(made) == results(whole)
    with pytest.raises(RecipeError, match="leaves out the step"):
        recut(out, tmp_path / "none", ["contaminated=null"])
    plain = condense(tmp_path / "pool", tmp_path / "plain", recipe)
    assert not (plain / "contaminated.parquet").exists() and not (plain / "against").exists()
    with pytest.raises(RecipeError, match="needs a benchmark"):
        recut(plain, tmp_path / "none", ["contaminated.threshold=0.5"])
    for file in (tmp_path / "bench/img_emb").iterdir():  # what is finished needs it no more
        file.unlink()
    assert [stage.label for stage in open_coreset(out).stages] == ["contaminated", "cluster", "dedup"]
    assert verify(out)["contaminated"] == 0


def test_a_recut_embeds_no_benchmark_again(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = photos(tmp_path / "bench", 10)
    pool = embed(contaminated_pool(tmp_path / "pool", bench), tmp_path / "e", "pixels")
    (pool / "manifest.json").unlink()  # nothing says any more what made it
    (pool / "done/embed.json").unlink()
    (pool / "recipe.yaml").unlink()
    out = condense(pool, tmp_path / "out", recipe, ["contaminated.threshold=0.7"], against=[bench], encoder="pixels")
    monkeypatch.setattr(sys.modules[embed.__module__], "_embed_shard", None)
    made = recut(out, tmp_path / "cut", ["contaminated.threshold=0.998"])
    assert set(told(out)) == set(COPIES) and set(told(made)) == {"03.jpg"}


# --- what cannot be ------------------------------------------------------------------------------------------------


def test_another_benchmark_is_another_run(recipe: Path, tmp_path: Path) -> None:
    pool, bench = rows("ordinary")
    given(tmp_path / "pool", pool, names(len(pool), "p"))
    np.save(tmp_path / "one.npy", bench)
    np.save(tmp_path / "two.npy", -bench)
    condense(tmp_path / "pool", tmp_path / "out", recipe, against=[tmp_path / "one.npy"])
    with pytest.raises(RecipeError, match=r'against.0.name: "one.npy" there, "two.npy" now'):
        condense(tmp_path / "pool", tmp_path / "out", recipe, against=[tmp_path / "two.npy"])
    np.save(tmp_path / "one.npy", -bench)
    with pytest.raises(RecipeError, match=r"against.0.data: fingerprint"):
        condense(tmp_path / "pool", tmp_path / "out", recipe, against=[tmp_path / "one.npy"])
    with pytest.raises(RecipeError, match=r"steps.contaminated"):
        condense(tmp_path / "pool", tmp_path / "out", recipe)


def test_benchmarks_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("coco/test", "flickr/test", "other"):
        (tmp_path / name).mkdir(parents=True)
        np.save(tmp_path / name / "x.npy", np.ones((2, 4), np.float32))
    sides = against.look_at([tmp_path / "coco/test", tmp_path / "flickr/test", tmp_path / "other"])
    assert [side.name for side in sides][:2] == ["coco/test", "flickr/test"]
    with pytest.raises(RecipeError, match="is given twice"):
        against.look_at([tmp_path / "other", tmp_path / "coco/../other"])


def test_a_recipe_says_what_holds_when_there_is_a_benchmark(recipe: Path) -> None:
    recipe.write_text("steps: {cluster: {k: 1}, contaminated: {threshold: 0.7}}")
    assert list(read(recipe).steps) == ["cluster"]
    chosen: Any = read(recipe, against=True).steps
    assert list(chosen) == ["contaminated", "cluster"] and chosen["contaminated"].threshold == 0.7
    chosen = read(recipe, ["contaminated.threshold=0.8"], against=True).steps
    assert list(chosen) == ["contaminated", "cluster"] and chosen["contaminated"].threshold == 0.8
    assert read("bunny", against=True).steps["contaminated"].model_dump() == {"step": "contaminated", "threshold": 0.86}
    for override in ("contaminated.threshold=0.9", "steps.contaminated.threshold=0.9", "contaminated=null"):
        with pytest.raises(RecipeError, match=r"contaminated needs a benchmark.*--against"):
            read("bunny", [override])
    with pytest.raises(RecipeError, match="leaves out the step that --against asks for"):
        read("bunny", ["contaminated=null"], against=True)
    for steps in ("{other: {step: contaminated}}", "{contaminated: {step: cluster}}"):
        recipe.write_text(f"steps: {steps}")
        with pytest.raises(RecipeError, match="runs once and first"):
            read(recipe, against=True)


def test_a_benchmark_that_does_not_fit_is_refused(recipe: Path, tmp_path: Path) -> None:
    pool, bench = rows("ordinary")
    given(tmp_path / "pool", pool, names(len(pool), "p"))
    np.save(tmp_path / "empty.npy", bench[:0])
    np.save(tmp_path / "narrow.npy", bench[:, :20])
    broken = bench.copy()
    broken[7] = np.nan
    np.save(tmp_path / "nan.npy", broken)
    photos(tmp_path / "photos", 2)
    (tmp_path / "nothing").mkdir()
    for path, kind, said in (
        ("empty.npy", DataError, r"empty.npy is empty"),
        ("narrow.npy", DataError, r"narrow.npy has vectors of width 20, and .*pool has width 24"),
        ("nan.npy", DataError, r"nan.npy: row 7 is not finite"),
        ("unknown", DataError, r"unknown does not exist"),
        ("nothing", DataError, r"holds no photos"),
        ("photos", RecipeError, r"does not say which encoder made its vectors.*--encoder"),
    ):
        with pytest.raises(kind, match=said):
            condense(tmp_path / "pool", tmp_path / f"out-{path}", recipe, against=[tmp_path / path])
    with pytest.raises(DataError, match=r"'pixels' makes vectors of width \d+, and .* has width 24"):
        condense(tmp_path / "pool", tmp_path / "o", recipe, against=tmp_path / "photos", encoder="pixels")


def test_vectors_of_two_encoders_are_not_compared(tmp_path: Path) -> None:
    bench = photos(tmp_path / "bench", 3)
    pool = contaminated_pool(tmp_path / "pool", photos(tmp_path / "other", 10))
    made = embed(pool, tmp_path / "e", "pixels")
    with pytest.raises(RecipeError, match="was made by 'pixels'; leave the option out"):
        condense(made, tmp_path / "out", "photos", against=[bench], encoder="world/scorer")
    theirs = embed(against.Pictures(_source(bench)), tmp_path / "f", "pixels")
    manifest = json.loads((theirs / "manifest.json").read_text())
    (theirs / "manifest.json").write_text(json.dumps({**manifest, "weights": "0" * 64}))
    for source in (pool, made):
        with pytest.raises(DataError, match="was embedded by 'pixels' with other weights"):
            condense(source, tmp_path / "out", "photos", against=[theirs])
    (theirs / "manifest.json").write_text(json.dumps(manifest))
    (made / "manifest.json").write_text(json.dumps({**manifest, "weights": "0" * 64}))
    with pytest.raises(DataError, match="has other weights here"):
        condense(made, tmp_path / "out", "photos", against=[bench])
