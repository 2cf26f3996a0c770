"""pool/parquet: tables with the images in them become samples; rows that are wrong are refused one by one."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leveret import cells, cli
from leveret.condense.worker import Job, pack_job, unpack_job
from leveret.images import ImageFault, load, read_bytes
from leveret.pool import SampleFault, Source, check, open_source
from leveret.pool import parquet as module
from leveret.records import Turn
from leveret.runs import DataError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
PAIR = pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())])


def png(shade: int = 0, size: tuple[int, int] = (6, 4)) -> bytes:
    held = BytesIO()
    Image.new("RGB", size, (shade % 256, 0, 0)).save(held, "PNG")
    return held.getvalue()


def cell(shade: int = 0) -> dict[str, Any]:
    return {"bytes": png(shade), "path": f"{shade}.png"}


def written(path: Path, columns: dict[str, tuple[Any, list[Any]]], rows: int = 2) -> Path:
    """A file of `columns` (type, values), `rows` to a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(values, kind) for name, (kind, values) in columns.items()})
    pq.write_table(table, path, row_group_size=rows)
    return path


def captions(path: Path, count: int, start: int = 0, rows: int = 2) -> Path:
    words = [f"caption {start + n}" for n in range(count)]
    return written(
        path, {"image": (IMAGE, [cell(start + n) for n in range(count)]), "caption": (pa.string(), words)}, rows
    )


def refusal(source: Source, index: int = 0) -> SampleFault:
    with pytest.raises(SampleFault) as caught:
        source.sample(index)
    return caught.value


# --- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["caption", "text"])
def test_captions(tmp_path: Path, column: str) -> None:
    path = written(
        tmp_path / "a.parquet",
        {
            "image": (IMAGE, [cell(n) for n in range(5)]),
            column: (pa.string(), [f" number {n}\n" for n in range(5)]),
            "score": (pa.float32(), [n / 2 for n in range(5)]),
            "vector": (pa.binary(), [b"x"] * 5),
        },
    )
    source = open_source(path)
    assert (len(source), source.name) == (5, "a.parquet")
    samples = [source.sample(index) for index in range(5)]
    assert [sample.id for sample in samples] == [f"a-{n}" for n in range(5)]
    assert samples[3].turns == (Turn("user", "<image>"), Turn("assistant", "number 3"))
    assert (samples[3].source, dict(samples[3].meta)) == ("a.parquet", {"score": 1.5})
    assert [read_bytes(sample.images[0]) for sample in samples] == [png(n) for n in range(5)]
    assert load(samples[4].images[0]).size == (6, 4)
    assert source.root.name(samples[3].images[0]) == "a.parquet#3/image"
    assert str(samples[3].images[0]) == f"{path.resolve()}#3/image"
    for index in (-1, 5):
        with pytest.raises(IndexError):
            source.sample(index)


def test_llava_conversations(tmp_path: Path) -> None:
    talks = [
        [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
        [{"from": "human", "value": "see <image>?"}, {"from": "gpt", "value": "é 猫"}],
        [{"from": "human", "value": "only words"}, {"from": "gpt", "value": "yes"}],
    ]
    columns = {
        "id": (pa.int64(), [7, 8, None]),
        "image": (IMAGE, [cell(), cell(), None]),
        "conversations": (pa.list_(TURN), talks),
    }
    source = open_source(written(tmp_path / "a.parquet", columns))
    first, second, third = (source.sample(index) for index in range(3))
    assert (first.id, second.id, third.id) == ("7", "8", "a-2")
    assert [turn.text for turn in first.turns] == ["S", "<image>\nQ", "A"]
    assert [turn.text for turn in second.turns] == ["see <image>?", "é 猫"]
    assert (third.images, third.turns[0].text) == ((), "only words")


def test_the_cauldron_and_finevision(tmp_path: Path) -> None:
    texts = [
        [{"user": "Q1", "assistant": "A1", "source": "tqa"}, {"user": "Q2", "assistant": "A2", "source": "vqa"}],
        [{"user": "words", "assistant": "alone", "source": "x"}],
    ]
    columns = {
        "images": (pa.list_(IMAGE), [[cell(1), cell(2)], []]),
        "texts": (pa.list_(PAIR), texts),
        "relevance_ratings": (pa.list_(pa.int64()), [[5, 4], None]),
        "relevance_min": (pa.int64(), [4, None]),
    }
    source = open_source(written(tmp_path / "a.parquet", columns))
    first, second = source.sample(0), source.sample(1)
    assert [turn.text for turn in first.turns] == ["<image>\n<image>\nQ1", "A1", "Q2", "A2"]
    assert [turn.role for turn in first.turns] == ["user", "assistant"] * 2
    assert first.meta == {"source": ["tqa", "vqa"], "relevance_ratings": [5, 4], "relevance_min": 4}
    assert [read_bytes(ref) for ref in first.images] == [png(1), png(2)]
    assert source.root.name(first.images[1]) == "a.parquet#0/images[1]"
    assert [source.root.ref(source.root.name(ref)) for ref in first.images] == list(first.images)
    assert (second.images, second.turns[0].text) == ((), "words")


PART = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
PLAIN = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PARTS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(PART))]))


def chat(*contents: Any) -> list[Any]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def text(words: str | None) -> dict[str, Any]:
    return {"type": "text", "text": words}


def picture(index: int | None = None) -> dict[str, Any]:
    return {"type": "image", "index": index}


def test_messages(tmp_path: Path) -> None:
    talks = [
        chat([picture(), text("What?")], [text("A cat.")]),
        chat([text("First?\n"), picture(0)], [text("1")], [text("And"), picture(1), text("this?")], [text("2")]),
        [{"role": "system", "content": [text("S")]}, *chat([text("Q")], [text("A")])],
    ]
    columns = {
        "images": (pa.list_(IMAGE), [[cell(0)], [cell(1), cell(2)], [cell(3), cell(4)]]),
        "messages": (PARTS, talks),
        "text": (pa.string(), ["templated"] * 3),
    }
    source = open_source(written(tmp_path / "a.parquet", columns))
    assert [[turn.text for turn in source.sample(at).turns] for at in range(3)] == [
        ["<image>\nWhat?", "A cat."],
        ["First?\n<image>", "1", "And\n<image>\nthis?", "2"],
        ["S", "<image>\n<image>\nQ", "A"],
    ]
    assert source.sample(2).turns[0].role == "system"
    assert dict(source.sample(0).meta) == {"text": "templated"}
    columns = {"image": (IMAGE, [cell(), None]), "messages": (PLAIN, [chat("Q", "A"), chat("only words", "yes")])}
    source = open_source(written(tmp_path / "b.parquet", columns))
    assert [source.sample(at).turns[0].text for at in range(2)] == ["<image>\nQ", "only words"]


# --- order and access ----------------------------------------------------------------------------------------------


def folder_of_three(folder: Path) -> Source:
    captions(folder / "train-00002.parquet", 3, start=9)
    captions(folder / "train-00001.parquet", 4, start=5, rows=3)
    captions(folder / "train-00000.parquet", 5, rows=100)
    (folder / ".hidden.parquet").write_bytes(b"no")
    (folder / "README.md").write_text("no")
    return open_source(folder)


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    source = folder_of_three(tmp_path / "data")
    assert (len(source), source.name) == (12, "data")
    assert [source.sample(n).caption for n in range(12)] == [f"caption {n}" for n in range(12)]
    assert [source.sample(n).id for n in (0, 5, 11)] == ["train-00000-0", "train-00001-0", "train-00002-2"]
    assert source.root.name(source.sample(8).images[0]) == "train-00001.parquet#3/image"


def test_any_order_threads_and_pickles_give_the_same(tmp_path: Path) -> None:
    source = folder_of_three(tmp_path)
    expected = [(sample, read_bytes(sample.images[0])) for sample in map(source.sample, range(12))]
    assert [data for _, data in expected] == [png(n) for n in range(12)]
    for index in (7, 0, 11, 3, 11, 4):
        assert source.sample(index) == expected[index][0]
        assert read_bytes(source.sample(index).images[0]) == expected[index][1]
    other = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 4000
    with ThreadPoolExecutor(8) as pool:
        wanted = list(range(12)) * 20
        found = list(pool.map(lambda n: (other.sample(n), read_bytes(other.sample(n).images[0])), wanted))
    assert found == [expected[n] for n in wanted]


def test_a_row_group_is_read_once_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = captions(tmp_path / "a.parquet", 12, rows=4)
    monkeypatch.setattr(cells, "IMAGES", cells._Kept(1))  # of this size only the newest stays
    read: list[tuple[int, tuple[str, ...]]] = []
    real = cells._read

    def counted(file: str, group: int, columns: tuple[str, ...]) -> Any:
        read.append((group, columns))
        return real(file, group, columns)

    monkeypatch.setattr(cells, "_read", counted)
    source = open_source(path)
    assert read == []
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(source.sample, range(12)))
    assert sorted(read) == [(group, ("caption", "image.path")) for group in range(3)]
    read.clear()
    for index in (0, 1, 2, 3, 4, 5, 0):
        read_bytes(source.sample(index).images[0])
    assert read == [(group, ("image.bytes",)) for group in (0, 1, 0)]
    assert len(cells.IMAGES._slots) == 1


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = captions(tmp_path / "a.parquet", 3)
    ref = open_source(path).sample(0).images[0]
    assert read_bytes(ref) == png(0)
    captions(path, 3, start=7)
    os.utime(path, (1, 1))
    assert read_bytes(ref) == png(7)


def test_a_file_of_the_hubs_cache_keeps_its_name(tmp_path: Path) -> None:
    blob = captions(tmp_path / "blobs" / "0a1b", 2)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.parquet").symlink_to(blob)
    assert open_source(tmp_path / "snapshot").sample(1).id == "train-1"
    assert open_source(tmp_path / "snapshot" / "train.parquet").name == "train.parquet"


# --- what is wrong -------------------------------------------------------------------------------------------------


def conversation(*values: Any) -> list[Any]:
    return [{"from": who, "value": text} for who, text in zip(["human", "gpt"] * 9, values, strict=False)]


@pytest.mark.parametrize(
    ("images", "talk", "reason"),
    [
        ([cell()], None, "conversations is not a list"),
        ([cell()], [], "no turns"),
        ([cell()], [None], "turn has no from and value"),
        ([cell()], [{"from": "robot", "value": "x"}], "unknown role"),
        ([cell()], conversation("Q", None), "turn's value is not text"),
        ([cell()], conversation("Q", " "), "empty turn"),
        ([cell()], conversation("Q"), "no assistant turn"),
        ([cell()], conversation("<image><image>", "A"), "image marks do not match"),
        ([], conversation("<image>", "A"), "image marks do not match"),
        (None, conversation("<image>", "A"), "image marks do not match"),
        ([cell()], conversation("Q", "see <image>"), "an assistant turn holds <image>"),
        ([cell(), None], conversation("Q", "A"), "no image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_malformed_row_is_refused_alone(tmp_path: Path, images: Any, talk: Any, reason: str) -> None:
    columns = {
        "images": (pa.list_(IMAGE), [[cell()], images, [cell()]]),
        "conversations": (pa.list_(TURN), [conversation("Q", "A"), talk, conversation("Q", "A")]),
    }
    source = open_source(written(tmp_path / "a.parquet", columns))
    assert [source.sample(index).id for index in (0, 2)] == ["a-0", "a-2"]
    fault = refusal(source, 1)
    assert (fault.reason, fault.index, fault.id) == (reason, 1, "a-1")
    source.fingerprint()


@pytest.mark.parametrize(
    ("image", "caption", "reason"),
    [
        (cell(), None, "no caption"),
        (cell(), " \n", "empty caption"),
        (None, "words", "no image"),
        (cell(), "an <image>", "an assistant turn holds <image>"),
    ],
)
def test_captions_that_are_refused(tmp_path: Path, image: Any, caption: Any, reason: str) -> None:
    columns = {"image": (IMAGE, [image]), "caption": (pa.string(), [caption])}
    assert refusal(open_source(written(tmp_path / "a.parquet", columns))).reason == reason


def test_pairs_that_are_refused(tmp_path: Path) -> None:
    texts = [[{"user": None, "assistant": "A"}], [None], [], None]
    columns = {"images": (pa.list_(IMAGE), [[cell()]] * 4), "texts": (pa.list_(PAIR), texts)}
    source = open_source(written(tmp_path / "a.parquet", columns))
    assert [refusal(source, n).reason for n in range(4)] == ["turn's value is not text"] * 2 + ["no turns"] * 2


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        (None, "messages is not a list"),
        ([], "no turns"),
        ([None], "message has no role and content"),
        ([{"role": "tool", "content": [text("x")]}], "unknown role"),
        ([{"role": None, "content": [text("x")]}], "unknown role"),
        (chat(None, [text("A")]), "message's content is not text"),
        (chat([text(None)], [text("A")]), "message's content is not text"),
        (chat([text("Q")], []), "empty turn"),
        (chat([text("Q")]), "no assistant turn"),
        (chat([text("Q")], [text("A")])[::-1], "roles do not alternate"),
        (chat([{"type": "video"}], [text("A")]), "unknown part of a message"),
        (chat([None], [text("A")]), "unknown part of a message"),
        (chat([picture(), picture()], [text("A")]), "image marks do not match"),
        (chat([picture(1)], [text("A")]), "images are not in order"),
        (chat([text("Q")], [picture(), text("A")]), "image outside a user's message"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_messages_that_are_refused(tmp_path: Path, talk: Any, reason: str) -> None:
    columns = {"image": (IMAGE, [cell()] * 2), "messages": (PARTS, [talk, chat([text("Q")], [text("A")])])}
    source = open_source(written(tmp_path / "a.parquet", columns))
    assert refusal(source).reason == reason
    assert source.sample(1).caption == "A"


def test_images_are_judged_by_check(tmp_path: Path) -> None:
    images = [
        cell(),
        {"bytes": b"", "path": "e.png"},
        {"bytes": None, "path": "/elsewhere/c.png"},
        {"bytes": b"<html>", "path": None},
        {"bytes": png()[:40], "path": None},
    ]
    columns = {"image": (IMAGE, images), "caption": (pa.string(), ["x"] * 5)}
    found = check(open_source(written(tmp_path / "a.parquet", columns)), tmp_path / "out", limit_share=1)
    lines = [json.loads(line) for line in found.quarantine.read_text().splitlines()]
    assert [(line["image"], line["reason"]) for line in lines] == [
        ("a.parquet#1/image", "image empty"),
        ("a.parquet#2/image", "image not embedded"),
        ("a.parquet#3/image", "image not an image"),
        ("a.parquet#4/image", "image damaged"),
    ]
    index = pq.read_table(found.index).to_pylist()
    assert (index[0]["image"], index[0]["width"], index[0]["height"]) == ("a.parquet#0/image", 6, 4)
    assert check(open_source(tmp_path / "a.parquet"), tmp_path / "quick", decode=False).ok == 5


def test_a_file_that_is_damaged_inside(tmp_path: Path) -> None:
    path = captions(tmp_path / "a.parquet", 6)
    source = open_source(path)
    ref = source.sample(5).images[0]
    data = bytearray(path.read_bytes())
    facts = pq.ParquetFile(path).metadata
    for group in range(facts.num_row_groups):
        for number in range(facts.num_columns):
            column = facts.row_group(group).column(number)
            start = column.dictionary_page_offset or column.data_page_offset
            data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    assert refusal(source, 5).reason == "row group is damaged"
    with pytest.raises(ImageFault, match="damaged"):
        read_bytes(ref)
    path.unlink()
    assert refusal(source, 0).reason == "file is unreadable"
    with pytest.raises(ImageFault, match="missing"):
        read_bytes(ref)
    source.fingerprint()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"picture": (IMAGE, [cell()]), "caption": (pa.string(), ["x"])},
            ["no column of images", "picture", "caption:"],
        ),
        (
            {"image": (IMAGE, [cell()]), "label": (pa.int64(), [1])},
            ["no column of words", "label: int64", "FineVision"],
        ),
        (
            {"image": (pa.string(), ["a.jpg"]), "caption": (pa.string(), ["x"])},
            ["no column of images", "image: string"],
        ),
        ({"image": (IMAGE, [cell()]), "texts": (pa.string(), ["x"])}, ["no column of words", "texts: string"]),
        (
            {
                "image": (IMAGE, [cell()]),
                "messages": (pa.list_(pa.struct([("role", pa.string()), ("content", pa.int64())])), [[]]),
            },
            ["no column of words", "messages: list<", "list<struct<role, content>>"],
        ),
        ({"a": (pa.int8(), [1])}, ["no column of images and words"]),
        ({"image": (IMAGE, []), "caption": (pa.string(), [])}, ["no rows"]),
    ],
)
def test_columns_that_are_not_understood(tmp_path: Path, columns: Any, words: list[str]) -> None:
    path = written(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError) as caught:
        open_source(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_files_that_are_none_or_do_not_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = captions(tmp_path / "b.parquet", 3)
    whole = path.read_bytes()
    for data in (b"", b"PAR1", whole[:-9], b"<html>" * 99):
        path.write_bytes(data)
        with pytest.raises(DataError, match="not a parquet file"):
            open_source(path)
    path.write_bytes(whole)
    other = {"images": (pa.list_(IMAGE), [[cell()]]), "texts": (pa.list_(PAIR), [[]])}
    written(tmp_path / "c.parquet", other)
    with pytest.raises(DataError, match=r"c\.parquet has lists of images in images and words in texts, and b\.parquet"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="holds its images itself"):
        open_source(path, tmp_path.parent)
    assert len(open_source(path, tmp_path)) == 3
    monkeypatch.setattr(module, "MAX_GROUP", 100)
    with pytest.raises(DataError, match=r"row group 0 holds .* bytes of images in 2 rows"):
        open_source(path)


# --- fingerprint ---------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_data(tmp_path: Path) -> None:
    prints = {}
    for name, count, start, rows in (("a", 6, 0, 2), ("b", 6, 0, 2), ("c", 6, 1, 2), ("d", 5, 0, 2)):
        captions(tmp_path / name / "x.parquet", count, start, rows)
        prints[name] = open_source(tmp_path / name).fingerprint()
    assert prints["a"] == prints["b"]
    assert len(set(prints.values())) == 3
    columns = {
        "image": (IMAGE, [cell(n) for n in range(6)]),
        "caption": (pa.string(), [f"caption {n}" for n in range(6)]),
    }
    columns["image"][1][4] = {"bytes": png(4) + b"\0" * 50, "path": "4.png"}
    written(tmp_path / "e" / "x.parquet", columns)
    assert open_source(tmp_path / "e").fingerprint() != prints["a"]


# --- what others do with it ----------------------------------------------------------------------------------------


def test_references_travel_to_workers(tmp_path: Path) -> None:
    columns = {"images": (pa.list_(IMAGE), [[cell(1), cell(2)]]), "caption": (pa.string(), ["two"])}
    sample = open_source(written(tmp_path / "a.parquet", columns)).sample(0)
    job = Job(0, [(at, ref, "x") for at, ref in enumerate(sample.images)])
    assert unpack_job(pack_job(job)) == job


def test_commands_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions(tmp_path / "data" / "a.parquet", 4)
    assert cli.run(["pool", "check", str(tmp_path / "data"), "-o", str(tmp_path / "c")]) == 0
    assert "4 samples: 4 good, 0 refused" in capsys.readouterr().out
    assert cli.run(["show", str(tmp_path / "data"), "--id", "a-2"]) == 0
    shown = capsys.readouterr().out
    assert "caption 2" in shown and "a.parquet#2/image" in shown.replace("\n", "")
    assert cli.run(["embed", str(tmp_path / "data"), "--encoder", "pixels", "-o", str(tmp_path / "e")]) == 0
    rows = pq.read_table(tmp_path / "e" / "metadata" / "metadata_0.parquet").to_pylist()
    assert [row["image"] for row in rows] == [f"a.parquet#{n}/image" for n in range(4)]


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.lists(st.integers(0, 255), max_size=3), TEXT, TEXT), min_size=1, max_size=9),
    group=st.integers(1, 9),
)
def test_what_is_written_comes_back(tmp_path_factory: Any, rows: list[Any], group: int) -> None:
    path = tmp_path_factory.mktemp("p") / "a.parquet"
    columns = {
        "images": (pa.list_(IMAGE), [[cell(shade) for shade in shades] for shades, _, _ in rows]),
        "texts": (pa.list_(PAIR), [[{"user": asked, "assistant": said}] for _, asked, said in rows]),
    }
    source = open_source(written(path, columns, group))
    assert len(source) == len(rows)
    for index, (shades, asked, said) in reversed(list(enumerate(rows))):
        if "<image>" in asked + said:
            continue
        sample = source.sample(index)
        assert sample.turns == (Turn("user", "<image>\n" * len(shades) + asked), Turn("assistant", said))
        assert [read_bytes(ref) for ref in sample.images] == [png(shade) for shade in shades]
