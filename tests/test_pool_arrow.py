"""pool/arrow: what `datasets` saved becomes samples, and what is broken in it is refused, in words."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leveret import cells, cli
from leveret.condense.worker import Job, pack_job, unpack_job
from leveret.images import ImageFault, load, read_bytes
from leveret.pool import SampleFault, Source, check, convert, open_source
from leveret.records import ImageRef, Turn
from leveret.runs import DataError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PART = pa.struct([("type", pa.string()), ("text", pa.string())])
LAYOUTS: dict[str, tuple[Any, Callable[[int], Any]]] = {
    "conversations": (
        pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())])),
        lambda n: [{"from": "human", "value": "Q"}, {"from": "gpt", "value": f"A{n}"}],
    ),
    "texts": (
        pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())])),
        lambda n: [{"user": "Q", "assistant": f"A{n}"}],
    ),
    "messages": (
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(PART))])),
        lambda n: [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"A{n}"}]},
        ],
    ),
    "caption": (pa.string(), lambda n: f"A{n}"),
    "text": (pa.string(), lambda n: f"A{n}"),
}


def png(shade: int = 0) -> bytes:
    held = BytesIO()
    Image.new("RGB", (6, 4), (shade % 256, 0, 0)).save(held, "PNG")
    return held.getvalue()


def cell(shade: int = 0) -> dict[str, Any]:
    return {"bytes": png(shade), "path": None}


def streamed(path: Path, table: pa.Table, rows: int = 2, **options: Any) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema, **options) as writer:
        writer.write_table(table, rows)
    return path


def saved(folder: Path, *tables: pa.Table, rows: int = 2, **state: Any) -> Path:
    """A folder as `Dataset.save_to_disk` writes it, a file for each table."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{number:05}-of-{len(tables):05}.arrow" for number in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        streamed(folder / name, table, rows)
    told = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps({**told, **state}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def captions(count: int, start: int = 0, layout: str = "caption") -> pa.Table:
    kind, words = LAYOUTS[layout]
    numbers = range(start, start + count)
    return pa.table(
        {
            "image": pa.array([cell(n) for n in numbers], IMAGE),
            layout: pa.array([words(n) for n in numbers], kind),
            "score": pa.array(numbers, pa.int64()),
        }
    )


def refusal(source: Source, index: int = 0) -> SampleFault:
    with pytest.raises(SampleFault) as caught:
        source.sample(index)
    return caught.value


def damaged(path: Path, old: bytes, new: bytes) -> None:
    """Other bytes, as many, in a file of another time."""
    data = path.read_bytes()
    assert len(old) == len(new) and old in data
    path.write_bytes(data.replace(old, new))
    os.utime(path, (1, 1))


# --- what it reads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_dataset(tmp_path: Path, layout: str) -> None:
    schema = {b"huggingface": b'{"info": {"features": {}}}'}
    tables = [captions(5, 0, layout).replace_schema_metadata(schema), captions(4, 5, layout)]
    source = open_source(saved(tmp_path / "train", *tables))
    assert (len(source), source.name, type(source).__name__) == (9, "train", "ArrowSource")
    samples = [source.sample(index) for index in range(9)]
    assert [sample.caption for sample in samples] == [f"A{n}" for n in range(9)]
    assert [samples[at].id for at in (0, 4, 5)] == [
        f"data-0000{n}-of-00002-{row}" for n, row in ((0, 0), (0, 4), (1, 0))
    ]
    assert {sample.turns[0] for sample in samples} <= {Turn("user", "<image>"), Turn("user", "<image>\nQ")}
    assert dict(samples[7].meta) == {"score": 7}
    assert [read_bytes(sample.images[0]) for sample in samples] == [png(n) for n in range(9)]
    assert load(samples[8].images[0]).size == (6, 4)
    assert source.root.name(samples[8].images[0]) == "data-00001-of-00002.arrow#3/image"
    assert [source.root.ref(source.root.name(sample.images[0])) for sample in samples] == [s.images[0] for s in samples]


def test_the_order_is_that_of_the_state(tmp_path: Path) -> None:
    names = ["data-00001-of-00003.arrow", "data-00000-of-00003.arrow"]
    tables = [captions(2, start) for start in (0, 2, 4)]
    source = open_source(saved(tmp_path, *tables, _data_files=[{"filename": name} for name in names]))
    assert [source.sample(index).caption for index in range(len(source))] == ["A2", "A3", "A0", "A1"]


@pytest.mark.parametrize("wide", [False, True])
def test_lists_of_images(tmp_path: Path, wide: bool) -> None:
    image = pa.struct([("bytes", pa.large_binary() if wide else pa.binary()), ("path", pa.string())])
    images = [[cell(1), cell(2)], [], None, [cell(3), None]]
    columns = {
        "images": pa.array(images, (pa.large_list if wide else pa.list_)(image)),
        "texts": pa.array([[{"user": "Q", "assistant": "A"}]] * 4, LAYOUTS["texts"][0]),
    }
    source = open_source(streamed(tmp_path / "a.arrow", pa.table(columns), rows=3))
    first = source.sample(0)
    assert first.turns[0].text == "<image>\n<image>\nQ"
    assert [read_bytes(ref) for ref in first.images] == [png(1), png(2)]
    assert [source.root.name(ref) for ref in first.images] == ["a.arrow#0/images[0]", "a.arrow#0/images[1]"]
    assert [source.sample(at).images for at in (1, 2)] == [(), ()]
    assert (refusal(source, 3).reason, refusal(source, 3).detail) == ("no image", "entry 1 of images is null")


def test_any_order_threads_and_pickles_give_the_same(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path, captions(20), captions(20, 20), rows=3))
    found = cells._stream.cache_info().misses
    wanted = [random.Random(0).randrange(40) for _ in range(300)]
    other = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 4000
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda n: (other.sample(n).caption, read_bytes(other.sample(n).images[0])), wanted))
    assert read == [(f"A{n}", png(n)) for n in wanted]
    assert cells._stream.cache_info().misses == found  # where batches lie was looked for once, at opening
    sample = source.sample(31)
    job = Job(0, [(0, sample.images[0], "x")])
    assert unpack_job(pack_job(job)) == job


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = streamed(tmp_path / "a.arrow", captions(3))
    ref = open_source(path).sample(0).images[0]
    assert read_bytes(ref) == png(0)
    streamed(path, captions(3, 7))
    os.utime(path, (1, 1))
    assert read_bytes(ref) == png(7)


def test_packed_batches_and_links_of_the_hubs_cache(tmp_path: Path) -> None:
    blob = streamed(tmp_path / "blob", captions(5), options=pa.ipc.IpcWriteOptions(compression="zstd"))
    folder = saved(tmp_path / "snapshot", captions(1))
    (folder / "data-00000-of-00001.arrow").unlink()
    (folder / "data-00000-of-00001.arrow").symlink_to(blob)
    source = open_source(folder)
    assert [read_bytes(source.sample(n).images[0]) for n in range(5)] == [png(n) for n in range(5)]
    assert source.sample(4).caption == "A4"


def test_commands_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "data", captions(4))
    assert cli.run(["pool", "check", str(folder), "-o", str(tmp_path / "c")]) == 0
    assert "4 samples: 4 good, 0 refused" in capsys.readouterr().out
    assert cli.run(["embed", str(folder), "--encoder", "pixels", "-o", str(tmp_path / "e")]) == 0
    rows = pq.read_table(tmp_path / "e" / "metadata" / "metadata_0.parquet").to_pylist()
    assert [row["image"] for row in rows] == [f"data-00000-of-00001.arrow#{n}/image" for n in range(4)]
    convert(open_source(folder), tmp_path / "store")
    store = open_source(tmp_path / "store")
    assert [store.sample(n).caption for n in range(4)] == [f"A{n}" for n in range(4)]
    assert read_bytes(store.sample(3).images[0]) == png(3)


# --- what is wrong -------------------------------------------------------------------------------------------------


def test_a_folder_of_splits_is_refused_with_their_paths(tmp_path: Path) -> None:
    for split in ("train", "test"):
        saved(tmp_path / split, captions(1))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test", "gone"]}')
    with pytest.raises(DataError) as caught:
        open_source(tmp_path)
    for words in ("DatasetDict", "train, test, gone", f"{tmp_path / 'train'} or {tmp_path / 'test'}."):
        assert words in str(caught.value)
    assert len(open_source(tmp_path / "test")) == 1
    (tmp_path / "dataset_dict.json").write_text('{"splits": []}')
    with pytest.raises(DataError, match="None of them is there"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("{", ["state.json is not a JSON object"]),
        ("[]", ["state.json is not a JSON object"]),
        ("{}", ["no list of .arrow files"]),
        ('{"_data_files": {}}', ["no list of .arrow files"]),
        ('{"_data_files": ["data-00000-of-00001.arrow"]}', ["no list of .arrow files"]),
        ('{"_data_files": [{"filename": "a.txt"}]}', ["no list of .arrow files"]),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', ["'../a.arrow'", "not a file beside it"]),
        ('{"_data_files": [{"filename": "b.arrow"}]}', ["names b.arrow", "not there"]),
        ('{"_data_files": []}', ["holds no rows"]),
        ('{"_data_files": [], "_indices_files": [{"filename": "indices.arrow"}]}', ["flatten_indices()"]),
        ('{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}', ["flatten_indices()"]),
    ],
)
def test_states_that_are_refused(tmp_path: Path, state: str, words: list[str]) -> None:
    folder = saved(tmp_path / "data", captions(1))
    (folder / "state.json").write_text(state)
    with pytest.raises(DataError) as caught:
        open_source(folder)
    assert all(word in str(caught.value) for word in [str(folder), *words]), caught.value


def test_arrow_files_without_a_state(tmp_path: Path) -> None:
    streamed(tmp_path / "a.arrow", captions(2))
    with pytest.raises(DataError, match=r"no state\.json.*Give one \.arrow file"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "a.arrow")) == 2
    with pytest.raises(DataError, match="holds its images itself"):
        open_source(tmp_path / "a.arrow", tmp_path.parent)


def test_files_that_are_none_or_cut_off(tmp_path: Path) -> None:
    path = streamed(tmp_path / "a.arrow", captions(6))
    whole = path.read_bytes()
    cuts = [whole[:end] for end in (*range(0, len(whole), 97), len(whole) - 8, len(whole) - 1)]
    for data in (*cuts, b"<html>" * 99, b"PAR1" * 9):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.arrow is not an Arrow stream that can be read, or its end is missing"):
            open_source(path)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, captions(1).schema) as writer:
        writer.write_table(captions(1))
    with pytest.raises(DataError, match="Feather"):
        open_source(path)
    table = captions(2)
    streamed(path, table.append_column("kind", pa.array(["x", "x"]).dictionary_encode()))
    with pytest.raises(DataError, match="dictionary"):
        open_source(path)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"picture": ([cell()], IMAGE), "caption": (["x"], pa.string())}, ["no column of images", "picture"]),
        (
            {"image": (["a.jpg"], pa.string()), "caption": (["x"], pa.string())},
            ["no column of images", "image: string"],
        ),
        ({"image": ([cell()], IMAGE), "messages": (["x"], pa.string())}, ["no column of words", "messages: string"]),
        ({"image": ([], IMAGE), "caption": ([], pa.string())}, ["no rows"]),
    ],
)
def test_columns_that_are_not_understood(tmp_path: Path, columns: Any, words: list[str]) -> None:
    table = pa.table({name: pa.array(values, kind) for name, (values, kind) in columns.items()})
    path = streamed(tmp_path / "a.arrow", table)
    with pytest.raises(DataError) as caught:
        open_source(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_files_that_do_not_go_together_and_columns_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="The files of one source have the same columns"):
        open_source(saved(tmp_path / "two", captions(1), captions(1, layout="texts")))
    table = captions(1)
    path = streamed(tmp_path / "a.arrow", table.append_column("score", table.column("score")))
    with pytest.raises(DataError, match="several columns are named 'score'"):
        open_source(path)


def test_rows_that_are_refused_alone(tmp_path: Path) -> None:
    images = [cell(), None, cell(), {"bytes": None, "path": "/x/a.png"}, {"bytes": b"<html>", "path": None}, cell()]
    words = ["good", "no image", None, "not embedded", "no image file", "ZZZZ"]
    path = streamed(tmp_path / "a.arrow", pa.table({"image": pa.array(images, IMAGE), "caption": words}), rows=6)
    damaged(path, b"ZZZZ", b"\xff\xfe\xff\xfe")
    found = check(open_source(path), tmp_path / "out", limit_share=1)
    lines = [json.loads(line) for line in found.quarantine.read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == [
        ("a-1", "no image"),
        ("a-2", "no caption"),
        ("a-3", "image not embedded"),
        ("a-4", "image not an image"),
        ("a-5", "text is not UTF-8"),
    ]


def test_a_batch_that_is_damaged_does_not_end_the_process(tmp_path: Path) -> None:
    table = pa.table(
        {"image": pa.array([cell(n) for n in range(8)], IMAGE), "caption": [f"caption {n}" for n in range(8)]}
    )
    path = streamed(tmp_path / "a.arrow", table, rows=4)
    ends = b"".join((9 * n).to_bytes(4, "little") for n in range(5))  # where the captions of a batch end
    wrong = ends[:8] + (2**31 - 1).to_bytes(4, "little") + ends[12:]
    damaged(path, ends, wrong)
    source = open_source(path)
    assert {refusal(source, index).reason for index in range(8)} == {"record batch is damaged"}
    with pytest.raises(ImageFault, match="damaged"):
        read_bytes(ImageRef(str(path), "arrow", 0, -1, "image"))
    source.fingerprint()
    path.unlink()
    assert refusal(source).reason == "file is unreadable"
    with pytest.raises(ImageFault, match="missing"):
        read_bytes(ImageRef(str(path), "arrow", 0, -1, "image"))


@pytest.mark.parametrize("row, column, place", [(3, "image", -1), (0, "gone", -1), (0, "caption", -1), (0, "score", 0)])
def test_references_to_what_is_not_there(tmp_path: Path, row: int, column: str, place: int) -> None:
    path = streamed(tmp_path / "a.arrow", captions(3))
    with pytest.raises(ImageFault, match="damaged"):
        read_bytes(ImageRef(str(path), "arrow", row, -1, column, place))


# --- fingerprint ---------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_data(tmp_path: Path) -> None:
    tables = {"a": captions(6), "b": captions(6), "c": captions(6, 1), "d": captions(5)}
    other = captions(6).to_pylist()
    other[4]["image"]["bytes"] += b"\0" * 50
    tables["e"] = pa.Table.from_pylist(other, captions(6).schema)
    other[4]["caption"] = "other"
    tables["f"] = pa.Table.from_pylist(other, captions(6).schema)
    prints = {name: open_source(saved(tmp_path / name, table)).fingerprint() for name, table in tables.items()}
    assert prints["a"] == prints["b"]
    assert len(set(prints.values())) == 5
