"""pool/convert: any source becomes tars that hold the same samples, killed or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leveret import cli
from leveret.images import read_bytes
from leveret.pool import Source, convert, open_source
from leveret.runs import DataError, Interrupted, RecipeError

module = sys.modules["leveret.pool.convert"]


def picture(shade: int, form: str = "PNG") -> bytes:
    held = BytesIO()
    Image.new("RGB", (8, 5), (shade % 256, 0, 9)).save(held, form)
    return held.getvalue()


def llava(folder: Path, count: int = 12, broken: bool = True) -> Source:
    """Records of every kind, and some that are refused."""
    folder.mkdir(parents=True, exist_ok=True)
    records: list[Any] = []
    for n in range(count):
        form = ("PNG", "JPEG", "WEBP", "BMP", "GIF")[n % 5]
        (folder / f"{n}.img").write_bytes(picture(n, form))
        turns = [{"from": "human", "value": f"<image>\nQ{n}"}, {"from": "gpt", "value": f"é {n}"}]
        records.append({"id": f"s/{n}", "image": f"{n}.img", "conversations": turns, "model": "m", "caption": "meta"})
    records[1] = {"id": 7, "conversations": [{"from": "system", "value": "S"}, *_talk("words", "alone")]}
    records[2] |= {"image": ["2.img", "3.img"], "conversations": _talk("<image> or <image>?", "both")}
    if broken:
        (folder / "4.img").write_bytes(b"<html>")
        (folder / "5.img").unlink()
        records[6]["conversations"] = []
    (folder / "data.json").write_text(json.dumps(records))
    return open_source(folder / "data.json")


def _talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def told(source: Source, index: int) -> Any:
    sample = source.sample(index)
    return sample.id, sample.turns, dict(sample.meta), [read_bytes(ref) for ref in sample.images]


def held(folder: Path) -> dict[str, bytes]:
    """What a store is, without the record of where it was made."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".tar", ".parquet", ".jsonl")}


def test_a_store_holds_the_same_samples(tmp_path: Path) -> None:
    source = llava(tmp_path / "data")
    made = convert(source, tmp_path / "store", shard_size=5, limit_share=0.5)
    assert (made.total, made.ok, made.quarantined, made.images, made.shards) == (12, 9, 3, 9, 3)
    assert made.reasons == {"image not an image": 1, "image missing": 1, "no turns": 1}
    store = open_source(made.store)
    good = [n for n in range(12) if n not in (4, 5, 6)]
    assert [told(store, at) for at in range(9)] == [told(source, n) for n in good]
    assert made.size == sum(path.stat().st_size for path in made.store.glob("*.tar"))
    lines = [json.loads(line) for line in (made.store / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["index"], line["reason"]) for line in lines] == [
        (4, "image not an image"),
        (5, "image missing"),
        (6, "no turns"),
    ]
    with tarfile.open(made.store / "000000.tar") as tar:
        assert tar.getnames() == [
            "000000000.png", "000000000.json", "000000001.json", "000000002.0.webp", "000000002.1.bmp",
            "000000002.json", "000000003.bmp", "000000003.json",
        ]  # fmt: skip


def test_the_index_says_where_everything_is(tmp_path: Path) -> None:
    made = convert(llava(tmp_path / "data"), tmp_path / "store", shard_size=5, limit_share=0.5)
    store = open_source(made.store)
    rows = pq.read_table(made.store / "index.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["s/0", "7", "s/2", "s/2", "s/3", *(f"s/{n}" for n in range(7, 12))]
    refs = [ref for n in range(9) for ref in store.sample(n).images]
    images = [row for row in rows if row["modality"] == "image"]
    for row, ref in zip(images, refs, strict=True):
        assert (row["shard"], row["offset"], row["length"]) == (Path(ref.path).name, ref.offset, ref.length)
        assert ref.member.startswith(row["key"]) and (row["width"], row["height"]) == (8, 5)
        import hashlib

        assert row["sha256"] == hashlib.sha256(read_bytes(ref)).hexdigest()
    (text,) = [row for row in rows if row["modality"] == "text"]
    assert (text["id"], text["offset"], text["sha256"]) == ("7", None, None)
    for row in rows:
        data = (made.store / row["shard"]).read_bytes()[row["json_offset"] :][: row["json_length"]]
        assert json.loads(data)["id"] == row["id"]


def test_tars_parquet_and_folders_convert_too(tmp_path: Path) -> None:
    convert(llava(tmp_path / "data", broken=False), tmp_path / "tars")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([[{"bytes": picture(n), "path": "x"}] * (n % 3) for n in range(6)], pa.list_(kind))
    texts = [[{"user": f"Q{n}", "assistant": "A"}] for n in range(6)]
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"images": cells, "texts": texts, "rating": [1.5] * 6}), tmp_path / "p" / "a.parquet")
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(picture(3, "JPEG"))
        (tmp_path / "photos" / f"{name}.txt").write_text(name)
    for name in ("tars", "p", "photos"):
        source = open_source(tmp_path / name)
        store = open_source(convert(source, tmp_path / f"{name}-store").store)
        assert [told(store, n) for n in range(len(store))] == [told(source, n) for n in range(len(source))]


def test_results_do_not_depend_on_workers_or_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llava(tmp_path / "data")
    convert(source, tmp_path / "a", shard_size=5, limit_share=0.5, workers=1)
    monkeypatch.setattr(module, "WINDOW", 2)
    convert(source, tmp_path / "b", shard_size=5, limit_share=0.5, workers=7)
    assert held(tmp_path / "a") == held(tmp_path / "b")


@pytest.mark.parametrize("polls", [0, 1, 3, 5])
def test_a_stopped_run_goes_on_and_its_store_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, polls: int
) -> None:
    source = llava(tmp_path / "data")
    convert(source, tmp_path / "whole", shard_size=5, limit_share=0.5)
    monkeypatch.setattr(module, "WINDOW", 2)
    left = iter([False] * polls)
    monkeypatch.setattr(module, "stop_requested", lambda: next(left, True))
    with pytest.raises(Interrupted, match="run it again"):
        convert(source, tmp_path / "store", shard_size=5, limit_share=0.5)
    assert not list((tmp_path / "store").glob(".*.tmp"))
    if list((tmp_path / "store").glob("*.tar")):
        with pytest.raises(DataError, match="is not finished"):
            open_source(tmp_path / "store")
    monkeypatch.setattr(module, "stop_requested", lambda: False)
    written = []
    real = module._Shard
    monkeypatch.setattr(module, "_Shard", lambda folder, number: written.append(number) or real(folder, number))
    convert(source, tmp_path / "store", shard_size=5, limit_share=0.5)
    assert written == {0: [0, 1, 2], 1: [0, 1, 2], 3: [1, 2], 5: [1, 2]}[polls]
    assert held(tmp_path / "store") == held(tmp_path / "whole")
    assert not (tmp_path / "store" / "parts").exists()
    convert(source, tmp_path / "store", shard_size=5, limit_share=0.5)
    assert written[-1] == 2 and len(written) <= 3


KILL = """
import os, signal, sys
from leveret.pool import open_source, convert
module = sys.modules["leveret.pool.convert"]
calls = iter(range(int(sys.argv[1])))
name = sys.argv[2]
real = getattr(module, name)
def dying(*args, **kwargs):
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(module, name, dying)
convert(open_source("data/data.json"), "store", shard_size=5, limit_share=0.5)
"""


@pytest.mark.parametrize(("calls", "name"), [(1, "write_json"), (7, "look"), (0, "atomic_write"), (1, "atomic_write")])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, calls: int, name: str) -> None:
    source = llava(tmp_path / "data")
    convert(source, tmp_path / "whole", shard_size=5, limit_share=0.5)
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(calls), name], cwd=tmp_path, capture_output=True, env=os.environ
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    convert(source, tmp_path / "store", shard_size=5, limit_share=0.5)
    assert held(tmp_path / "store") == held(tmp_path / "whole")


def test_what_is_refused(tmp_path: Path) -> None:
    source = llava(tmp_path / "data")
    with pytest.raises(DataError, match=r"3 of 12 samples are refused|refused, more than the limit of 20%"):
        convert(source, tmp_path / "store", shard_size=5)
    assert len((tmp_path / "store" / "quarantine.jsonl").read_text().splitlines()) == 3
    made = convert(source, tmp_path / "store", shard_size=5, limit_share=0.25)
    assert made.ok == 9
    with pytest.raises(DataError, match="more than the limit of 20%"):
        convert(source, tmp_path / "store", shard_size=5)
    with pytest.raises(RecipeError, match="shard_size"):
        convert(source, tmp_path / "store", shard_size=6)
    with pytest.raises(RecipeError, match="holds no run"):
        convert(source, tmp_path / "data")
    other = llava(tmp_path / "other", count=11)
    with pytest.raises(RecipeError):
        convert(other, tmp_path / "store", shard_size=5)


def test_where_nothing_is_good(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"id": "1"}]))
    with pytest.raises(DataError, match="1 of 1 samples"):
        convert(open_source(tmp_path / "a.json"), tmp_path / "store", limit_share=1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llava(tmp_path / "data")
    data, store = str(tmp_path / "data" / "data.json"), str(tmp_path / "store")
    assert cli.run(["pool", "convert", data, "-o", store, "--shard-size", "5", "--dry-run"]) == 0
    assert "3" in capsys.readouterr().out and not (tmp_path / "store").exists()
    assert cli.run(["pool", "convert", data, "-o", store, "--shard-size", "5"]) == 3
    capsys.readouterr()
    assert cli.run(["pool", "convert", data, "-o", store, "--shard-size", "5", "--limit-share", "0.5", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["ok"], facts["reasons"]["image missing"], facts["store"]) == (9, 1, store)
    assert cli.run(["pool", "check", store, "-o", str(tmp_path / "check")]) == 0
    assert "9 samples: 9 good" in capsys.readouterr().out


def test_a_coreset_of_tars_is_read_and_converted(tmp_path: Path) -> None:
    """What condense leaves names images inside tars; with the store as the image folder it is a list like any other."""
    source = open_source(convert(llava(tmp_path / "data", broken=False), tmp_path / "store", shard_size=5).store)
    assert cli.run(["condense", str(tmp_path / "store"), "-r", "photos", "-o", str(tmp_path / "core")]) == 0
    core = open_source(tmp_path / "core" / "coreset.json", tmp_path / "store")
    there = {source.sample(n).id: told(source, n) for n in range(len(source))}
    assert len(core) > 0
    for n in range(len(core)):
        assert told(core, n) == there[core.sample(n).id]
    small = open_source(convert(core, tmp_path / "small").store)
    assert [told(small, n) for n in range(len(small))] == [told(core, n) for n in range(len(core))]
