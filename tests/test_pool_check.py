"""pool.check: nothing stops the walk, nothing is dropped in silence, and a killed walk goes on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from leveret import images
from leveret.pool import Source, check, open_source
from leveret.runs import DataError, Interrupted, read_jsonl

module = sys.modules["leveret.pool.check"]  # in the package, the name belongs to the function


def jpeg(shade: int = 0, size: tuple[int, int] = (20, 14)) -> bytes:
    sink = io.BytesIO()
    Image.effect_noise(size, 40 + shade % 50).convert("RGB").save(sink, "JPEG")
    return sink.getvalue()


def bomb() -> bytes:
    sink = io.BytesIO()
    Image.new("1", (8, 8)).save(sink, "PNG")
    data = bytearray(sink.getvalue())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    return bytes(data)


def zero() -> bytes:
    data = bytearray(bomb())
    data[16:24] = bytes(8)
    return bytes(data)


def tiff() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (4, 4)).save(sink, "TIFF")
    return sink.getvalue()


BROKEN: dict[str, bytes | None] = {
    "image missing": None,
    "image empty": b"",
    "image truncated": jpeg()[:300],
    "image not an image": b"<html>404 Not Found</html>",
    "image format not allowed": tiff(),
    "image too many pixels": bomb(),
    "image zero size": zero(),
}


def dataset(folder: Path, good: int, broken: int = 1, records: list[Any] | None = None) -> Source:
    """A LLaVA list of `good` photos with `broken` of each kind spread among them, and `records` at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(good):
        names.append(f"{number:04d}.jpg")
        (folder / names[-1]).write_bytes(jpeg(number))
    for kind, data in BROKEN.items():
        for number in range(broken):
            name = f"{kind.replace(' ', '_')}_{number}.jpg"
            if data is not None:
                (folder / name).write_bytes(data)
            names.insert((len(names) * 7919) % len(names), name)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A photo."}]
    entries = [{"id": name, "image": name, "conversations": turns} for name in names] + (records or [])
    (folder / "data.json").write_text(json.dumps(entries))
    return open_source(folder / "data.json")


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def test_three_percent_of_broken_files_each_with_its_own_reason(tmp_path: Path) -> None:
    source = dataset(tmp_path / "data", 226)
    checked = check(source, tmp_path / "out", workers=2)
    assert (checked.total, checked.ok, checked.quarantined) == (233, 226, 7)
    assert checked.share == pytest.approx(0.03, abs=0.001)
    assert checked.reasons == dict.fromkeys(BROKEN, 1)
    entries = read_jsonl(checked.quarantine)
    assert {entry["image"].removesuffix("_0.jpg").replace("_", " "): entry["reason"] for entry in entries} == {
        reason: reason for reason in BROKEN
    }
    assert [set(entry) for entry in entries] == [{"index", "id", "image", "reason", "detail"}] * 7
    assert all(source.sample(entry["index"]).id == entry["id"] for entry in entries)
    index = rows(checked.index)
    assert [row["index"] for row in index] == list(range(233))
    assert {row["index"] for row in index if not row["ok"]} == {entry["index"] for entry in entries}
    good = next(row for row in index if row["ok"])
    assert (good["width"], good["height"], good["modality"]) == (20, 14, "image")
    assert good["sha256"] == hashlib.sha256((tmp_path / "data" / good["image"]).read_bytes()).hexdigest()
    assert not (tmp_path / "out" / "parts").exists()


def test_folders_of_photos_run_through_too(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    dataset(folder, 40)
    for path in folder.glob("*.jpg"):
        path.with_suffix(".txt").write_text("A photo.")
    (folder / "uncaptioned.jpg").write_bytes(jpeg())
    checked = check(open_source(folder), tmp_path / "out", workers=2)
    expected = {**dict.fromkeys(BROKEN, 1), "no caption": 1}
    del expected["image missing"]  # a folder lists what is there
    assert checked.reasons == expected


def test_malformed_records_texts_and_several_images(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    two = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "Two."}]
    records = [
        {"id": "text", "conversations": talk},
        {"id": "two", "image": ["0000.jpg", "0001.jpg"], "conversations": two},
        {"id": "half", "image": ["0000.jpg", "gone.jpg"], "conversations": two},
        {"id": "half", "image": "0000.jpg", "conversations": talk},
        "nonsense",
        {"id": "0001.jpg", "conversations": talk},
        {"id": "out", "image": "../x.jpg", "conversations": two[:1] + talk[1:]},
    ]
    source = dataset(tmp_path / "data", 20, 0, records)
    checked = check(source, tmp_path / "out")
    assert (checked.total, checked.ok, checked.images, checked.text_only) == (27, 23, 22, 2)
    assert checked.duplicates == 2  # "half" and "0001.jpg" come twice; both stay
    assert checked.reasons == {
        "image missing": 1,
        "image marks do not match": 1,
        "record is not an object": 1,
        "image path leaves the root": 1,
    }
    by_id = [(row["id"], row["position"], row["image"], row["modality"], row["ok"]) for row in rows(checked.index)[20:]]
    assert by_id == [
        ("text", 0, None, "text", True),
        ("two", 0, "0000.jpg", "image", True),
        ("two", 1, "0001.jpg", "image", True),
        ("half", 0, "0000.jpg", "image", False),
        ("half", 1, "gone.jpg", "image", False),
        ("half", 0, "0000.jpg", "image", False),
        ("", 0, None, "image", False),
        ("0001.jpg", 0, None, "text", True),
        ("out", 0, "../x.jpg", "image", False),
    ]


def test_without_decoding_only_records_and_presence_are_judged(tmp_path: Path) -> None:
    source = dataset(tmp_path / "data", 20)
    checked = check(source, tmp_path / "out", decode=False)
    assert checked.reasons == {"image missing": 1}
    assert all(row["sha256"] is None and row["width"] is None for row in rows(checked.index))
    assert check(source, tmp_path / "out", limit_share=1).quarantined == 7  # the other question is asked anew


def test_results_do_not_depend_on_workers_or_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dataset(tmp_path / "data", 60)
    check(source, tmp_path / "one", workers=1)
    monkeypatch.setattr(module, "BLOCK", 7)
    check(source, tmp_path / "four", workers=4)
    for name in ("quarantine.jsonl", "checked.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "four" / name).read_bytes()
    assert rows(tmp_path / "one" / "index.parquet") == rows(tmp_path / "four" / "index.parquet")


def test_too_many_broken_files_stop_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 10)
    source = dataset(tmp_path / "data", 60, 4)
    with pytest.raises(DataError) as caught:
        check(source, tmp_path / "out", limit_share=0.1)
    words = str(caught.value)
    assert "10%" in words and "quarantine.jsonl" in words and "image " in words and "of 88" in words
    written = read_jsonl(tmp_path / "out" / "quarantine.jsonl")
    assert 9 <= len(written) < 28  # stopped as soon as it was certain
    assert not (tmp_path / "out" / "checked.json").exists()
    assert check(source, tmp_path / "out", limit_share=0.5).quarantined == 28
    with pytest.raises(DataError):  # the limit holds for what was checked before, too
        check(source, tmp_path / "out", limit_share=0.3)


def test_a_share_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="limit_share is 20"):
        check(dataset(tmp_path / "data", 2, 0), tmp_path / "out", limit_share=20)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often images were decoded."""
    calls: Counter[str] = Counter()

    def decode(data: bytes) -> Any:
        calls["decode"] += 1
        return images.decode(data)

    monkeypatch.setattr(module, "decode", decode)
    return calls


def test_the_same_data_is_not_walked_twice(tmp_path: Path, counted: Counter[str]) -> None:
    source = dataset(tmp_path / "data", 30)
    first = check(source, tmp_path / "out")
    decoded = counted["decode"]
    assert decoded >= 30
    assert check(open_source(tmp_path / "data" / "data.json"), tmp_path / "out") == first
    assert counted["decode"] == decoded
    (tmp_path / "data" / "image_missing_0.jpg").write_bytes(jpeg())
    again = check(open_source(tmp_path / "data" / "data.json"), tmp_path / "out")
    assert "image missing" not in again.reasons and again.ok == first.ok + 1
    (tmp_path / "out" / "index.parquet").unlink()
    assert check(open_source(tmp_path / "data" / "data.json"), tmp_path / "out") == again
    assert again.index.exists()


def test_a_stopped_walk_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counter[str]
) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)
    source = dataset(tmp_path / "data", 64)
    check(source, tmp_path / "whole")
    whole = counted["decode"]
    polls = iter([False, False, True])
    monkeypatch.setattr(module, "stop_requested", lambda: next(polls, False))
    with pytest.raises(Interrupted, match="run it again"):
        check(source, tmp_path / "cut", workers=1)
    assert not (tmp_path / "cut" / "checked.json").exists()
    counted.clear()
    check(source, tmp_path / "cut", workers=1)
    assert 0 < counted["decode"] <= whole - 25
    for name in ("quarantine.jsonl", "checked.json", "index.parquet"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


SCRIPT = """
import os, signal, sys
from leveret.pool import check, open_source
module = sys.modules["leveret.pool.check"]  # in the package, the name belongs to the function
module.BLOCK = 16
before, done = module.write_json, []
def write_json(path, obj):
    before(path, obj)
    done.append(path)
    if len(done) == 4:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
module.write_json = write_json
check(open_source(sys.argv[1]), sys.argv[2], workers=2)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_killed_walk_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)
    source = dataset(tmp_path / "data", 80)
    check(source, tmp_path / "whole")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "data" / "data.json"), str(tmp_path / "cut"), name]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if name == "SIGKILL":
        assert done.returncode == -signal.SIGKILL
    else:
        assert "Interrupted" in done.stderr
    assert len(list((tmp_path / "cut" / "parts").glob("0*.json"))) == 3
    check(source, tmp_path / "cut")
    for file in ("quarantine.jsonl", "checked.json", "index.parquet"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


def test_what_is_left_of_other_data_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)
    first, second = dataset(tmp_path / "a", 40), dataset(tmp_path / "b", 30)
    polls = iter([False, False, True])
    monkeypatch.setattr(module, "stop_requested", lambda: next(polls, False))
    with pytest.raises(Interrupted):
        check(first, tmp_path / "out", workers=1)
    assert check(second, tmp_path / "out").total == 37
    check(second, tmp_path / "fresh")
    assert (tmp_path / "out" / "index.parquet").read_bytes() == (tmp_path / "fresh" / "index.parquet").read_bytes()


def test_real_photos_pass(tmp_path: Path, photos: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(photos.glob("*.jpg"))[:40]:
        shutil.copy(path, folder)
        (folder / path.name).with_suffix(".txt").write_text(path.stem.replace("_", " "))
    checked = check(open_source(folder), tmp_path / "out")
    assert (checked.ok, checked.quarantined, checked.images) == (40, 0, 40)
    assert checked.quarantine.read_bytes() == b""
