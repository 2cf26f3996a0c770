"""A pool with one of every kind of broken sample: the run ends, each is named with its reason, none is lost."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_fakes
from leveret.runs import DataError, read_jsonl
from leveret.train import train

GOOD = 200
Record = dict[str, Any]


def say(record: Record, **turns: str) -> None:
    for turn in record["conversations"]:
        turn["value"] = turns.get(turn["from"], turn["value"])


def bomb(path: Path) -> None:
    """A PNG of 60,000 x 60,000 pixels in a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def picture(name: str, make: Callable[[Path], Any] | None) -> Callable[[Record, Path], None]:
    def spoil(record: Record, folder: Path) -> None:
        record["image"] = name
        if make is not None:
            make(folder / name)

    return spoil


def words(change: Callable[[Record], Any]) -> Callable[[Record, Path], None]:
    return lambda record, folder: change(record)


SPOILED: dict[str, tuple[Callable[[Record, Path], None], str]] = {
    "image is not there": (picture("gone.png", None), "image missing"),
    "image outside its root": (picture("../../etc/passwd", None), "image path leaves the root"),
    "image is text": (picture("words.png", lambda path: path.write_text("not a picture")), "image "),
    "image is cut": (
        picture("cut.png", lambda path: path.write_bytes((path.parent / "0.png").read_bytes()[:60])),
        "image ",
    ),
    "image is a bomb": (picture("bomb.png", bomb), "image "),
    "image is empty": (picture("empty.png", lambda path: path.write_bytes(b"")), "image "),
    "mark without image": (words(lambda r: r.pop("image")), "image marks"),
    "two marks": (words(lambda r: say(r, human="<image>\n<image>\nwhat colour ?")), "image marks"),
    "empty answer": (words(lambda r: say(r, gpt="  ")), "empty turn"),
    "only a question": (words(lambda r: r["conversations"].pop()), "no assistant turn"),
    "no turns": (words(lambda r: r.update(conversations=[])), "no turns"),
    "answers twice": (words(lambda r: r["conversations"].append(r["conversations"][1])), "roles do not alternate"),
    "unknown role": (words(lambda r: r["conversations"][0].update({"from": "narrator"})), ""),
    "value is a number": (words(lambda r: r["conversations"][1].update(value=7)), ""),
    "conversations is text": (words(lambda r: r.update(conversations="what ?")), ""),
    "a question of 60,000 words": (words(lambda r: say(r, human="<image>\n" + "what " * 60_000)), "no answer within"),
}
"""What is wrong -> how it is made, and how the reason begins."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "pool"
    records = json.loads(train_fakes.toy_set(folder, GOOD).read_text("utf-8"))
    for number, (name, (spoil, _)) in enumerate(SPOILED.items()):
        record = copy.deepcopy(records[0]) | {"id": name}
        spoil(record, folder)
        records.insert(12 * number, record)
    long = copy.deepcopy(records[-1]) | {"id": "an answer of 60,000 words"}  # is cut, and taught as far as it fits
    say(long, gpt="red " * 60_000)
    (folder / "toy.json").write_text(json.dumps([*records, long]), "utf-8")
    return folder / "toy.json"


@pytest.mark.parametrize("how", [{}, {"cache_features": False}, {"pack": True, "cache_features": False}])
def test_every_broken_sample_is_named_and_no_other_is_lost(pool: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    train(train_fakes.recipe(pool, steps=None, epochs=1.0, bad_share=0.15, **how), tmp_path)
    named = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "tune" / "quarantine.jsonl")}
    assert set(named) == set(SPOILED)
    assert all(named[name].startswith(reason) for name, (_, reason) in SPOILED.items()), named
    rows = read_jsonl(tmp_path / "tune" / "metrics.jsonl")
    late = sum("step" in row for row in read_jsonl(tmp_path / "tune" / "quarantine.jsonl"))
    assert sum(row["samples"] for row in rows) == GOOD + 1 + late, "a picture that fails in a step was counted in it"
    assert all(row["loss"] is not None for row in rows)


def test_an_image_root_that_lies_is_told_with_where_it_looked(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DataError, match=r"(?s)image missing.*elsewhere"):
        train(train_fakes.recipe(pool, images=str(tmp_path / "elsewhere")), tmp_path / "run")
