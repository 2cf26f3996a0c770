"""pool/: LLaVA files and folders of photos become samples; what is malformed is refused one by one."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leveret.images import load
from leveret.pool import SampleFault, Source, jsonfile, open_source
from leveret.records import Turn
from leveret.runs import DataError


def record(id: Any = "1", image: Any = "a.jpg", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    return {"id": id, "image": image, "conversations": turns} | more


def talk(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": who, "value": text} for who, text in turns]


def written(folder: Path, records: Any, name: str = "data.json") -> Path:
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    else:
        path.write_text(json.dumps(records))
    return path


def refusal(source: Source, index: int = 0) -> SampleFault:
    with pytest.raises(SampleFault) as caught:
        source.sample(index)
    assert isinstance(caught.value, DataError)
    return caught.value


# --- LLaVA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_llava_file(tmp_path: Path, name: str) -> None:
    images = tmp_path / "images"
    (images / "coco").mkdir(parents=True)
    Image.new("RGB", (5, 4)).save(images / "coco" / "1.jpg")
    records = [
        record("x", "coco/1.jpg", model="m", template="t"),
        {"id": 7, "conversations": talk(("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello é 猫 🐇"))},
        {"conversations": talk(("human", "<image> or <image>?"), ("gpt", "Both.")), "image": ["b.jpg", "coco/1.jpg"]},
        record("n", None, conversations=talk(("human", "Hi"), ("gpt", "Hello"))),
    ]
    source = open_source(written(tmp_path, records, name), images)
    assert (len(source), source.name) == (4, name)
    first, second, third, fourth = (source.sample(index) for index in range(4))
    assert (first.id, first.source, dict(first.meta)) == ("x", name, {"model": "m", "template": "t"})
    assert first.turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))
    assert load(first.images[0]).size == (5, 4)
    assert source.root.name(first.images[0]) == "coco/1.jpg"
    assert (second.id, second.images) == ("7", ())
    assert [turn.role for turn in second.turns] == ["system", "user", "assistant"]
    assert second.caption == "Hello é 猫 🐇"
    assert (third.id, [source.root.name(ref) for ref in third.images]) == ("2", ["b.jpg", "coco/1.jpg"])
    assert fourth.images == ()
    with pytest.raises(IndexError):
        source.sample(4)
    with pytest.raises(IndexError):
        source.sample(-1)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_messages_in_place_of_conversations(tmp_path: Path, name: str) -> None:
    parts = [{"type": "text", "text": "One:"}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]
    answer = {"role": "assistant", "content": "A cat."}
    records = [
        {"id": "0", "image": "a.jpg", "messages": [{"role": "user", "content": "What?"}, answer], "model": "m"},
        {"images": ["a.jpg", "b/c.jpg"], "messages": [{"role": "user", "content": parts}, answer]},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}, answer]},
        {"image": "a.jpg", "messages": [{"role": "user", "content": "this <image>?"}, answer]},
        record("4", messages=[]),
    ]
    source = open_source(written(tmp_path, records, name))
    samples = [source.sample(index) for index in range(5)]
    assert [[turn.text for turn in sample.turns][-2] for sample in samples] == [
        "<image>\nWhat?",
        "One:\n<image>\n<image>\nwhat?",
        "Hi",
        "this <image>?",
        "<image>\nWhat?",
    ]
    assert [source.root.name(ref) for ref in samples[1].images] == ["a.jpg", "b/c.jpg"]
    assert [dict(sample.meta) for sample in samples] == [{"model": "m"}, {}, {}, {}, {"messages": []}]
    assert samples[2].turns[0] == Turn("system", "S")
    before = source.fingerprint()
    (tmp_path / "a.jpg").write_bytes(b"now there")
    assert open_source(source.path).fingerprint() != before


def test_the_image_folder_is_the_files_own_by_default(tmp_path: Path) -> None:
    source = open_source(written(tmp_path, [record()]))
    assert source.sample(0).images[0].path == str(tmp_path.resolve() / "a.jpg")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (["not", "an", "object"], "record is not an object"),
        (17, "record is not an object"),
        (None, "record is not an object"),
        ({"id": "1", "image": "a.jpg"}, "no conversations"),
        (record(conversations={}), "conversations is not a list"),
        (record(conversations=[]), "no turns"),
        (record(conversations=["hello"]), "turn has no from and value"),
        (record(conversations=[{"from": "human"}]), "turn has no from and value"),
        (record(conversations=talk(("robot", "<image>"), ("gpt", "x"))), "unknown role"),
        (record(conversations=[{"from": ["human"], "value": "x"}]), "unknown role"),
        (record(conversations=talk(("human", "<image>"), ("gpt", 5))), "turn's value is not text"),
        (record(conversations=talk(("human", None), ("gpt", "x"))), "turn's value is not text"),
        (record(conversations=talk(("human", "<image>"), ("gpt", " "))), "empty turn"),
        (record(conversations=talk(("human", "<image>"))), "no assistant turn"),
        (record(conversations=talk(("gpt", "x"), ("human", "<image>"))), "roles do not alternate"),
        (record(conversations=talk(("human", "no mark"), ("gpt", "x"))), "image marks do not match"),
        (record(conversations=talk(("human", "<image><image>"), ("gpt", "x"))), "image marks do not match"),
        (record(conversations=talk(("human", "<image>"), ("gpt", "See <image>"))), "an assistant turn holds <image>"),
        (record(image=None), "image marks do not match"),
        ({"messages": None}, "messages is not a list"),
        ({"messages": ["hello"]}, "message has no role and content"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "human", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": 5}]}, "message's content is not text"),
        ({"messages": [{"role": "user", "content": {"type": "text"}}]}, "message's content is not text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "message's content is not text"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "unknown part of a message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unknown part of a message"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "roles do not alternate"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "no assistant turn"),
        ({"image": "../a.jpg", "messages": []}, "image path leaves the root"),
        ({"images": [7], "messages": []}, "image not a path"),
        (record(conversations=talk(("human", "<image>"), ("gpt", "\ud83d"))), "text is not Unicode"),
        (record(id="\ud83d"), "text is not Unicode"),
        (record(id=["1"]), "id is not text"),
        (record(id=True), "id is not text"),
        (record(image=7), "image not a path"),
        (record(image=""), "image not a path"),
        (record(image=["a.jpg", None]), "image not a path"),
        (record(image="\ud83d.jpg"), "image not a path"),
        (record(image="/etc/hosts"), "image path is absolute"),
        (record(image="../a.jpg"), "image path leaves the root"),
        (record(image="http://x/a.jpg"), "image is a URL"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_each_malformed_record_is_refused_alone(tmp_path: Path, bad: Any, reason: str, name: str) -> None:
    source = open_source(written(tmp_path, [record("0"), bad, record("2")], name))
    assert [source.sample(index).id for index in (0, 2)] == ["0", "2"]
    fault = refusal(source, 1)
    assert (fault.reason, fault.index) == (reason, 1)
    assert "sample 1" in str(fault) and name in str(fault)
    source.fingerprint()


def test_a_broken_line_of_json_lines_is_refused_alone(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(record()).encode()
    path.write_bytes(b"\n".join([good, b"", b'{"id": "2", ', b'{"id": "\xff"}', good + b" \r", b"", b"[" * 5000, good]))
    source = open_source(path)
    assert len(source) == 6
    assert [refusal(source, index).reason for index in (1, 2, 4)] == ["record is not JSON"] * 3
    assert [source.sample(index).id for index in (0, 3, 5)] == ["1"] * 3
    source.fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"", ["is empty"]),
        ("a.json", b"  \n ", ["not JSON", "ends too early"]),
        ("a.json", b"[]", ["no records"]),
        ("a.jsonl", b"\n\n", ["no records"]),
        ("a.json", b"<html>\n", ["line 1, column 1"]),
        ("a.json", b'[\n  {"id": 1},\n  {"id": oops}\n]', ["line 3, column 10", "Expecting value"]),
        ("a.json", '[\n{"猫": "é"} {"id": 2}]'.encode(), ["line 2, column 12", "after record 0", "','"]),
        ("a.json", b'[{"id": 1},]', ["line 1, column 12"]),
        ("a.json", b'[{"id": 1}, {"id": "cut sh', ["ends too early", "cut short"]),
        ("a.json", b'[{"id": 1}', ["ends too early"]),
        ("a.json", b'[{"id": 1}] x', ["line 1, column 13", "text follows"]),
        ("a.json", b'[{"id": "\xff"}]', ["not UTF-8"]),
        ("a.json", '[{"id": 1}]'.encode("utf-16"), ["UTF-16"]),
        ("a.json", b'{"questions": [], "info": {}}', ["one JSON object", "'questions'", "conversations"]),
        ("a.json", b'{"id": \n oops}', ["line 2, column 2"]),
        ("a.json", b'"text"', ["not a list"]),
        ("a.json", b"[" * 100_000, ["line 1", "cannot be read"]),
        ("a.jsonl", b"one\ntwo\n", ["not JSON Lines", "line 1", "column 1"]),
    ],
    ids=repr,
)
def test_a_file_of_another_kind_gives_one_clear_error(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_source(path)
    assert not isinstance(caught.value, SampleFault)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_json_lines_named_json_and_a_list_named_jsonl(tmp_path: Path) -> None:
    lines = written(tmp_path, [record("0"), record("1")], "a.jsonl").rename(tmp_path / "b.json")
    as_list = written(tmp_path, [record("0"), record("1")], "c.json").rename(tmp_path / "d.jsonl")
    for path in (lines, as_list):
        assert [open_source(path).sample(index).id for index in range(2)] == ["0", "1"]


def test_byte_order_mark_and_odd_whitespace(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    body = json.dumps(record()).encode()
    path.write_bytes(b"\xef\xbb\xbf\r\n [\t" + body + b" \n,\n" + body + b"\n]\n\n")
    assert [open_source(path).sample(index).id for index in range(2)] == ["1", "1"]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.lists(_VALUES, min_size=1, max_size=8), st.integers(1, 40), st.booleans(), st.sampled_from([None, 1]))
def test_records_are_found_wherever_windows_end(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], window: int, ascii: bool, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("windows") / "a.json"
    # Lone surrogates can be escaped in JSON, but not be written as UTF-8.
    text = json.dumps(values, ensure_ascii=ascii, indent=indent).encode("utf-8", "replace")
    path.write_bytes(text)
    before, jsonfile.WINDOW = jsonfile.WINDOW, window
    try:
        spans = jsonfile.index(path)
    finally:
        jsonfile.WINDOW = before
    assert [json.loads(jsonfile.read(path, span)) for span in spans] == json.loads(text)


def test_a_large_list_is_held_as_offsets(tmp_path: Path) -> None:
    records = [record(str(index), f"{index % 100}/{index}.jpg") for index in range(100_000)]
    path = written(tmp_path, records)
    source = open_source(path)
    assert len(source) == 100_000
    for index in (0, 1, 54_321, 99_999):
        assert source.sample(index).id == str(index)
    assert len(pickle.dumps(source)) < 2_000_000 < path.stat().st_size


def test_a_source_travels_between_processes(tmp_path: Path) -> None:
    source = open_source(written(tmp_path, [record("0"), record("1")]))
    assert pickle.loads(pickle.dumps(source)).sample(1) == source.sample(1)


# --- folders -------------------------------------------------------------------------------------------------------


def photo(path: Path, caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), "teal").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def test_photos_with_a_text_beside_each(tmp_path: Path) -> None:
    photo(tmp_path / "b" / "deep" / "2.png", "two\n")
    photo(tmp_path / "a.jpg", "\ufeffone")
    photo(tmp_path / "B.JPG", "three")
    photo(tmp_path / ".hidden" / "x.jpg", "no")
    photo(tmp_path / "._a.jpg", "no")
    (tmp_path / "notes.md").write_text("not a photo")
    source = open_source(tmp_path)
    samples = [source.sample(index) for index in range(len(source))]
    assert [sample.id for sample in samples] == ["B.JPG", "a.jpg", "b/deep/2.png"]  # POSIX order: capitals first
    assert [sample.caption for sample in samples] == ["three", "one", "two"]
    assert samples[0].turns[0] == Turn("user", "<image>")
    assert all(load(sample.images[0]).size == (6, 4) for sample in samples)


def test_what_is_wrong_in_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    outside = tmp_path / "outside"
    photo(outside / "o.jpg", "outside")
    for name in ("bare", "empty", "latin", "long", "marked", "leak"):
        photo(folder / f"{name}.jpg")
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "long.txt").write_text("x" * (2**20 + 1))
    (folder / "marked.txt").write_text("an <image> mark")
    (folder / "leak.txt").symlink_to(outside / "o.txt")
    (folder / "link.jpg").symlink_to(outside / "o.jpg")
    (folder / "link.txt").write_text("a link")
    (folder / "sub").symlink_to(outside)
    (folder / "scan.tif").write_bytes(b"II*\0")
    source = open_source(folder)
    found = {refusal(source, index).id: refusal(source, index).reason for index in range(len(source))}
    assert found == {
        "bare.jpg": "no caption",
        "empty.jpg": "empty caption",
        "latin.jpg": "caption is not UTF-8",
        "leak.jpg": "no caption",
        "link.jpg": "image path leaves the root",
        "long.jpg": "caption is too long",
        "marked.jpg": "an assistant turn holds <image>",
        "scan.tif": "image format not allowed",
        "sub": "linked folder is not entered",
    }


TABLES = {
    "captions.json": '[{"file": "a.jpg", "caption": "one"}, {"file": "d/b.jpg", "caption": "two, \\"quoted\\""}]',
    "captions.jsonl": '{"image": "d/b.jpg", "text": "two, \\"quoted\\""}\n{"image": "./a.jpg", "text": "one"}\n',
    "captions.csv": 'file_name,caption,other\na.jpg,one,1\nd/b.jpg,"two, ""quoted""",2\n',
    "metadata.jsonl": '{"file_name": "d/b.jpg", "text": "two, \\"quoted\\""}\n{"file_name": "a.jpg", "text": "one"}\n',
    "metadata.csv": 'file_name,text\na.jpg,one\nd/b.jpg,"two, ""quoted"""\n',
    "captions.tsv": 'text\timage\none\ta.jpg\n"two, ""quoted"""\td/b.jpg\n',
}


@pytest.mark.parametrize("name", [*TABLES, "object"])
def test_captions_from_a_table(tmp_path: Path, name: str) -> None:
    photo(tmp_path / "d" / "b.jpg", "the table wins")
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "c.jpg", "beside")
    photo(tmp_path / "e.jpg")
    if name == "object":
        (tmp_path / "captions.json").write_text('{"a.jpg": "one", "d/b.jpg": "two, \\"quoted\\""}')
    else:
        (tmp_path / name).write_text(TABLES[name])
    source = open_source(tmp_path, tmp_path)
    assert [source.sample(index).caption for index in (0, 1, 2)] == ["one", "beside", 'two, "quoted"']
    assert refusal(source, 3).reason == "no caption"


def test_rows_of_a_table_are_refused_one_by_one(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    rows = [
        {"file": "a.jpg", "caption": "one"},
        {"file": "a.jpg", "caption": "another"},
        {"file": "b.jpg", "caption": 5},
        {"caption": "no photo"},
        {"file": "c.jpg"},
        {"file": "../x.jpg", "caption": "x"},
        {"file": "gone.jpg", "caption": "not there"},
        "text",
    ]
    lines = [json.dumps(row) for row in rows] + ["{broken"]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    source = open_source(tmp_path)
    found: dict[str, str] = {}
    for index in range(len(source)):
        try:
            sample = source.sample(index)
            found[sample.id] = sample.caption
        except SampleFault as fault:
            found[fault.id] = fault.reason
    assert found == {
        "../x.jpg": "image path leaves the root",
        "a.jpg": "one",
        "a.jpg#1": "another",
        "b.jpg": "caption is not text",
        "c.jpg": "empty caption",
        "captions.jsonl row 4": "row names no photo",
        "captions.jsonl row 8": "row is not an object",
        "captions.jsonl row 9": "row is not JSON",
        "gone.jpg": "not there",
    }
    source.fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("captions.csv", b"photo,words\na.jpg,one\n", "'photo', 'words'"),
        ("captions.csv", b"", "(none)"),
        ("captions.csv", b"file,caption\na.jpg,\xff\n", "not UTF-8"),
        ("captions.csv", b'file,caption\na.jpg,"one\n', "line"),
        ("captions.json", b'{"a.jpg": "one"', "is not JSON"),
        ("captions.json", b"[oops]", "line 1, column 2"),
    ],
)
def test_a_table_of_another_kind_gives_one_clear_error(tmp_path: Path, name: str, content: bytes, word: str) -> None:
    photo(tmp_path / "a.jpg")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_source(tmp_path)
    assert word in str(caught.value) and name in str(caught.value)


def test_surplus_cells_of_a_row_are_not_lost_in_silence(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    (tmp_path / "captions.csv").write_text("file,caption\na.jpg,one, and more\n")
    source = open_source(tmp_path)
    assert {refusal(source, index).reason for index in range(2)} == {"row has too many cells", "no caption"}


def test_metadata_of_something_else_is_no_table(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg", "beside")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.jpg,3\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": 3}\n')
    assert open_source(tmp_path).sample(0).caption == "beside"


def test_two_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("file,caption\n")
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(DataError, match="several captions tables"):
        open_source(tmp_path)


# --- choosing a source ---------------------------------------------------------------------------------------------


def test_paths_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "a.zip").touch()
    (tmp_path / "llava.jsonl").touch()
    (tmp_path / "bare").mkdir()
    written(tmp_path / "bare", [record()], "llava.json")
    cases = {
        tmp_path / "none.json": ["does not exist in"],
        tmp_path / "llava.json": ["does not exist. Did you mean", "llava.jsonl"],
        tmp_path / "a.zip": ["'.zip'", "LLaVA list", "folder of photos"],
        tmp_path / "bare": ["no photos", "llava.json"],
    }
    for path, words in cases.items():
        with pytest.raises(DataError) as caught:
            open_source(path)
        assert caught.value.exit_code == 3
        assert all(word in str(caught.value) for word in [str(path), *words])
    photo(tmp_path / "bare" / "a.jpg", "one")
    with pytest.raises(DataError, match="is a folder of photos"):
        open_source(tmp_path / "bare", tmp_path)


# --- fingerprints --------------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_the_data_and_not_with_its_place(tmp_path: Path) -> None:
    here = tmp_path / "here"
    photo(here / "a.jpg", "one")
    photo(here / "b.jpg", "two")
    path = written(here, [record("0"), record("1", "b.jpg")])

    def prints() -> tuple[str, str]:
        return open_source(path).fingerprint(), open_source(here).fingerprint()

    first = prints()
    assert prints() == first
    there = shutil.copytree(here, tmp_path / "there")
    assert open_source(there / "data.json").fingerprint() == first[0]
    assert open_source(there).fingerprint() == first[1]
    seen = [first]
    (here / "notes.md").write_text("not data")
    assert prints() == first
    (here / "b.txt").write_text("due")
    assert prints()[0] == first[0] and prints()[1] != first[1]
    seen.append(prints())
    (here / "b.jpg").write_bytes(b"another size")
    seen.append(prints())
    (here / "b.jpg").unlink()
    seen.append(prints())
    written(here, [record("1", "b.jpg"), record("0")])
    assert prints()[0] not in [json_print for json_print, _ in seen]
    assert len({json_print for json_print, _ in seen}) == 3 and len({folder for _, folder in seen}) == 4


def test_order_of_a_folder_does_not_hang_on_the_file_system(photos: Path) -> None:
    source = open_source(photos)
    ids = [refusal(source, index).id for index in range(len(source))]  # photographs without captions
    assert ids == sorted(path.name for path in photos.glob("*.jpg"))
    assert np.unique([refusal(source, index).reason for index in range(len(source))]).tolist() == ["no caption"]
