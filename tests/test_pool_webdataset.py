"""pool/webdataset and pool/tar: tars become samples; what is wrong in them is refused one by one."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leveret import cli
from leveret.images import ImageFault, Root, load, read_bytes
from leveret.pool import SampleFault, Source, check, open_source, tar
from leveret.pool import webdataset as module
from leveret.records import Turn
from leveret.runs import DataError


def png(shade: int = 0, size: tuple[int, int] = (6, 4)) -> bytes:
    held = BytesIO()
    Image.new("RGB", size, (shade % 256, 0, 0)).save(held, "PNG")
    return held.getvalue()


def said(question: str = "<image>\nQ", answer: str = "A", **more: Any) -> bytes:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": turns} | more).encode()


def written(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as held:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            held.addfile(info, BytesIO(data))
    return path


def refusal(source: Source, index: int = 0) -> SampleFault:
    with pytest.raises(SampleFault) as caught:
        source.sample(index)
    return caught.value


# --- forms ---------------------------------------------------------------------------------------------------------


def test_every_form_of_words(tmp_path: Path) -> None:
    members = [
        ("a.jpg", png(1)),
        ("a.txt", "\ufeffé 猫\n".encode()),
        ("b.PNG", png(2)),
        ("b.json", b'{"caption": " from json ", "url": "u", "width": 3}'),
        ("b.txt", b"passed over"),
        ("c.webp", png(3)),
        ("c.json", b'{"text": "as text", "id": 12}'),
        ("d.gif", png(4)),
        ("d.json", said(id="x", image="coco/1.jpg", model="m")),
        ("e.jpeg", png(5)),
        ("e.json", b'{"caption": null, "key": "e"}'),
        ("e.txt", b"from txt"),
        ("sub/f.0.jpg", png(6)),
        ("sub/f.1.png", png(7)),
        ("sub/f.json", said("<image> or <image>?", "both")),
        ("g.json", said("only words")),
        ("h.first.png", png(8)),
        ("h.txt", b"h"),
    ]
    source = open_source(written(tmp_path / "a.tar", members))
    samples = [source.sample(index) for index in range(len(source))]
    assert [sample.id for sample in samples] == ["a", "b", "12", "x", "e", "sub/f", "g", "h"]
    assert [sample.caption for sample in samples[:5]] == ["é 猫", "from json", "as text", "A", "from txt"]
    assert [dict(sample.meta) for sample in samples[:5]] == [
        {},
        {"url": "u", "width": 3},
        {},
        {"model": "m"},
        {"caption": None, "key": "e"},
    ]
    assert samples[0].turns == (Turn("user", "<image>"), Turn("assistant", "é 猫"))
    assert samples[3].turns == (Turn("user", "<image>\nQ"), Turn("assistant", "A"))
    assert [len(sample.images) for sample in samples] == [1, 1, 1, 1, 1, 2, 0, 1]
    refs = [ref for sample in samples for ref in sample.images]
    assert [read_bytes(ref) for ref in refs] == [png(n) for n in range(1, 9)]
    assert load(refs[0]).size == (6, 4)
    assert source.root.name(samples[5].images[1]) == f"a.tar#{refs[6].offset}+{len(png(7))}/sub/f.1.png"
    assert str(refs[0]) == f"{(tmp_path / 'a.tar').resolve()}#512+{len(png(1))}/a.jpg"
    assert [source.root.ref(source.root.name(ref)) for ref in refs] == refs
    for index in (-1, 8):
        with pytest.raises(IndexError):
            source.sample(index)


def test_numbered_images_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    members = [(f"k.{n}.png", png(n)) for n in (10, 2, 0, 1, 9, 3, 4, 5, 6, 7, 8)]
    sample = open_source(written(tmp_path / "a.tar", [*members, ("k.txt", b"eleven")])).sample(0)
    assert [read_bytes(ref) for ref in sample.images] == [png(n) for n in range(11)]
    assert sample.turns[0].text == "\n".join(["<image>"] * 11)


def test_members_need_not_lie_side_by_side(tmp_path: Path) -> None:
    names = ["c", "a", "b"]
    members = [(f"./{key}.png", png(ord(key))) for key in names]
    members += [(f"./{key}.txt", key.encode()) for key in sorted(names)]
    source = open_source(written(tmp_path / "a.tar", members))
    samples = [source.sample(index) for index in range(3)]
    assert [(sample.id, sample.caption) for sample in samples] == [(key, key) for key in names]
    assert [read_bytes(sample.images[0]) for sample in samples] == [png(ord(key)) for key in names]


def test_what_is_no_member_of_a_sample_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as held:
        for name, kind in (("dir.d", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            held.addfile(info)
        for name in ("README", ".hidden.jpg", "d/._a.jpg", "__meta__/x.json", "a.png", "a.cls", "a.b.npy"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            held.addfile(info, BytesIO(png()))
        info = tarfile.TarInfo("a.txt")
        info.size = 1
        held.addfile(info, BytesIO(b"x"))
    source = open_source(path)
    assert (len(source), source.sample(0).caption) == (1, "x")


# --- the tar itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_walk_finds_what_tarfile_finds(tmp_path: Path, form: int) -> None:
    names = ["a.jpg", "d/" * 40 + "x.txt", f"{'n' * 90}.jpg", "empty.txt"]
    if form != tarfile.USTAR_FORMAT:
        names += ["long/" * 60 + "猫.jpg", f"{'m' * 200}.json"]
    path = written(tmp_path / "a.tar", [(name, bytes(at * 300)) for at, name in enumerate(reversed(names))], form)
    with tarfile.open(path) as held:
        wanted = [(member.name.encode(), member.offset_data, member.size) for member in held]
    assert list(tar.members(path)) == wanted


def test_tars_joined_end_to_end(tmp_path: Path) -> None:
    one, two = (written(tmp_path / f"{n}.tar", [(f"{n}.png", png()), (f"{n}.txt", b"x")]) for n in "12")
    (tmp_path / "both.tar").write_bytes(one.read_bytes() + two.read_bytes())
    source = open_source(tmp_path / "both.tar")
    assert [source.sample(index).id for index in range(len(source))] == ["1", "2"]


def test_large_sizes_are_read_as_gnu_and_pax_write_them(tmp_path: Path) -> None:
    assert tar._number(b"\x80" + (2**40).to_bytes(11, "big")) == 2**40
    assert tar._number(b"00000000017\0") == 15
    assert [tar._number(field) for field in (b"9999\0", b"\xff" * 12, b"abc")] == [-1, -1, -1]
    assert tar._pax(b"19 size=8589934592\n11 path=ab\n") == {b"size": b"8589934592", b"path": b"ab"}


def whole(count: int = 4) -> list[tuple[str, bytes]]:
    return [member for n in range(count) for member in ((f"{n}.png", png(n)), (f"{n}.txt", b"%d" % n))]


@pytest.mark.parametrize("lost", ["end", "padding", "data", "header"])
def test_a_tar_that_is_cut_off_is_one_refused_sample(tmp_path: Path, lost: str) -> None:
    path = written(tmp_path / "a.tar", whole())
    with tarfile.open(path) as held:
        last = held.getmembers()[-1]
    at = {"end": last.offset_data + 512, "padding": last.offset_data + 99, "data": last.offset_data, "header": 1}[lost]
    at = last.offset + 100 if lost == "header" else at
    path.write_bytes(path.read_bytes()[:at])
    source = open_source(path)
    there = 4 if lost in ("end", "padding") else 3
    assert [source.sample(index).caption for index in range(there)] == ["0", "1", "2", "3"][:there]
    faults = [refusal(source, index) for index in range(there, len(source))]
    assert [fault.reason for fault in faults] == ["no caption"] * (4 - there) + ["tar is cut off"]
    assert (faults[-1].id, f"ends at byte {at:,}" in faults[-1].detail) == ("a.tar", True)
    source.fingerprint()


def test_a_tar_with_a_broken_header_inside(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", whole())
    with tarfile.open(path) as held:
        at = held.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    written(tmp_path / "b.tar", [("x.png", png()), ("x.txt", b"x")])
    source = open_source(tmp_path)
    assert [source.sample(index).id for index in (0, 1, 3)] == ["0", "1", "x"]
    fault = refusal(source, 2)
    assert (fault.id, fault.reason, fault.detail) == (
        "a.tar",
        "tar is damaged",
        f"no header at byte {at:,}, after 1.txt",
    )


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.tar", b"", ["is empty"]),
        ("a.tar", b"<html>" * 500, ["is not a tar"]),
        ("a.tar", b"\0" * 1024, ["no samples"]),
        ("a.tar", gzip.compress(b"x", mtime=0), ["compressed (gzip)", "gunzip"]),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), ["compressed (gzip)", "gunzip"]),
        ("a.tgz", gzip.compress(b"x", mtime=0), ["compressed (gzip)"]),
        ("a.tar.zst", b"(\xb5/\xfd....", ["compressed (zstd)", "zstd -d"]),
        ("a.tar", b"PK\3\4" + b"x" * 600, ["compressed (zip)"]),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_files_that_are_no_tars(tmp_path: Path, name: str, data: bytes, words: list[str], folder: bool) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        open_source(tmp_path if folder else tmp_path / name)
    assert not isinstance(caught.value, SampleFault)
    assert all(word in str(caught.value) for word in words), caught.value


def test_which_folders_are_tars(tmp_path: Path) -> None:
    written(tmp_path / "backup.tar", whole())
    assert type(open_source(tmp_path)).__name__ == "WebdatasetSource"
    assert len(open_source(tmp_path, tmp_path)) == 4
    with pytest.raises(DataError, match="holds its images itself"):
        open_source(tmp_path, tmp_path.parent)
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a photo")
    assert type(open_source(tmp_path)).__name__ == "FolderSource"


# --- samples that are wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("k.png", png())], "no caption"),
        ([("k.png", png()), ("k.json", b'{"url": "u"}')], "no caption"),
        ([("k.png", png()), ("k.txt", b" \n")], "empty caption"),
        ([("k.png", png()), ("k.txt", b"\xff\xfe")], "caption is not UTF-8"),
        ([("k.png", png()), ("k.json", b'{"caption": 7}')], "caption is not text"),
        ([("k.png", png()), ("k.json", b'{"caption": ')], "record is not JSON"),
        ([("k.png", png()), ("k.json", b'{"caption": "\xff"}')], "record is not JSON"),
        ([("k.png", png()), ("k.json", b"")], "record is not JSON"),
        ([("k.png", png()), ("k.json", b"[1]")], "record is not an object"),
        ([("k.png", png()), ("k.json", b'{"id": [], "text": "x"}')], "id is not text"),
        ([("k.png", png()), ("k.json", said("no mark"))], "image marks do not match"),
        ([("k.png", png()), ("k.json", b'{"conversations": 3}')], "conversations is not a list"),
        ([("k.png", png()), ("k.json", b'{"text": "\\ud83d"}')], "text is not Unicode"),
        ([("k.txt", b"words")], "no image"),
        ([("k.json", said())], "no image"),
        ([("k.json", said("Q", image="1.jpg"))], "no image"),
        ([("k.json", b'{"caption": "c"}')], "no image"),
        ([("k.mp4", b"x")], "no image"),
        ([("k.txt", b"c"), ("k.json", b'{"caption": "c", "status": "failed_to_download"}')], "image was not fetched"),
        ([("k.png", png()), ("k.jpg", png()), ("k.txt", b"x")], "several images of one key"),
        ([("k.png", png()), ("k.0.jpg", png()), ("k.txt", b"x")], "several images of one key"),
        ([("k.png", png()), ("k.mask.png", png()), ("k.txt", b"x")], "several images of one key"),
        ([("k.0.png", png()), ("k.2.png", png()), ("k.txt", b"x")], "images are not numbered from 0"),
        ([("k.0.png", png()), ("k.0.jpg", png()), ("k.txt", b"x")], "images are not numbered from 0"),
        ([("k.1.png", png()), ("k.2.jpg", png()), ("k.txt", b"x")], "images are not numbered from 0"),
        ([("k.png", png()), ("k.png", png(1)), ("k.txt", b"x")], "member is there twice"),
        ([("k.png", png()), ("k.txt", b"x"), ("k.TXT", b"y")], "member is there twice"),
        ([("k.tiff", b"II*\0"), ("k.txt", b"x")], "image format not allowed"),
        ([("k\udcff.png", png()), ("k\udcff.txt", b"x")], "member name is not UTF-8"),
        ([("k.\udcff.png", png()), ("k.txt", b"x")], "member name is not UTF-8"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_each_malformed_sample_is_refused_alone(tmp_path: Path, members: Any, reason: str) -> None:
    around = [("a.png", png()), ("a.txt", b"a")], [("z.png", png()), ("z.txt", b"z")]
    source = open_source(written(tmp_path / "t.tar", [*around[0], *members, *around[1]], tarfile.GNU_FORMAT))
    assert [source.sample(index).id for index in (0, 2)] == ["a", "z"]
    fault = refusal(source, 1)
    assert (fault.reason, fault.index) == (reason, 1)
    assert "sample 1" in str(fault) and "t.tar" in str(fault)
    str(fault).encode()
    source.fingerprint()


def test_words_that_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WORDS", 9)
    source = open_source(written(tmp_path / "a.tar", [("k.png", png()), ("k.txt", b"x" * 10)]))
    assert refusal(source).reason == "words are too long"


def test_a_tar_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", whole())
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:1024])
    assert refusal(source, 3).reason == "tar is cut off"
    path.unlink()
    assert refusal(source, 3).reason == "tar is unreadable"
    source.fingerprint()


def test_img2dataset_output_and_images_that_are_judged_by_check(tmp_path: Path) -> None:
    members = []
    for n, data in enumerate((png(), b"", b"<html>", png()[:40], None)):
        facts = {"caption": f"c{n}", "status": "success" if data is not None else "failed_to_download", "key": str(n)}
        if data is None:
            facts["error_message"] = "HTTP Error 404: Not Found"
        else:
            members.append((f"{n:09d}.jpg", data))
        members += [(f"{n:09d}.json", json.dumps(facts).encode()), (f"{n:09d}.txt", f"c{n}".encode())]
    written(tmp_path / "out" / "00000.tar", members)
    (tmp_path / "out" / "00000.parquet").write_bytes(b"its own table, which is not read")
    (tmp_path / "out" / "00000_stats.json").write_text("{}")
    found = check(open_source(tmp_path / "out"), tmp_path / "check", limit_share=1)
    lines = [json.loads(line) for line in found.quarantine.read_text().splitlines()]
    assert [(re.sub(r"#\d+\+\d+/", ":", line["image"]), line["reason"]) for line in lines] == [
        ("00000.tar:000000001.jpg", "image empty"),
        ("00000.tar:000000002.jpg", "image not an image"),
        ("00000.tar:000000003.jpg", "image damaged"),
        ("", "image was not fetched"),
    ]
    assert lines[3]["detail"] == "failed_to_download: HTTP Error 404: Not Found"
    index = pq.read_table(found.index).to_pylist()
    assert (index[0]["image"], index[0]["width"]) == (f"00000.tar#512+{len(png())}/000000000.jpg", 6)
    assert check(open_source(tmp_path / "out"), tmp_path / "quick", decode=False).ok == 4


def test_names_of_images_inside_files_obey_the_root(tmp_path: Path) -> None:
    written(tmp_path / "in" / "a.tar", [("a.png", png())])
    written(tmp_path / "out.tar", [("a.png", png())])
    root = Root(tmp_path / "in")
    name = f"a.tar#512+{len(png())}/../a.png"  # what lies behind the first / is a name and no path
    assert read_bytes(root.ref(name)) == png()
    assert root.name(root.ref(name)) == name
    for wrong in ("../out.tar#512+9/a.png", "/out.tar#512+9/a.png", "https://x/a.tar#1+2/a"):
        with pytest.raises(ImageFault):
            root.ref(wrong)
    assert root.ref("a.tar#512/a.png").kind == "file"
    os.mkfifo(tmp_path / "in" / "pipe.tar")
    os.mkfifo(tmp_path / "in" / "pipe.parquet")
    (tmp_path / "in" / "sub.tar").mkdir()
    for wrong in ("pipe.tar#0+9/x", "pipe.parquet#0/image", "sub.tar#0+9/x"):
        with pytest.raises(ImageFault, match="not a file"):
            read_bytes(root.ref(wrong))
    with pytest.raises(ImageFault, match="truncated"):
        read_bytes(root.ref("a.tar#512+99999/a.png"))
    with pytest.raises(ImageFault, match="too large"):
        read_bytes(root.ref("a.tar#0+999999999999999999/a.png"))
    with pytest.raises(ImageFault, match="missing"):
        read_bytes(root.ref("b.tar#0+9/a.png"))


# --- order and access ----------------------------------------------------------------------------------------------


def three(folder: Path) -> Source:
    for shard, start in ((2, 9), (0, 0), (1, 5)):
        count = {0: 5, 1: 4, 2: 3}[shard]
        members = [
            member
            for n in range(start, start + count)
            for member in ((f"{n:04d}.png", png(n)), (f"{n:04d}.json", json.dumps({"caption": f"c{n}"}).encode()))
        ]
        written(folder / f"{shard:05d}.tar", members)
    written(folder / "00003.tar", [])
    (folder / ".hidden.tar").write_bytes(b"no")
    return open_source(folder)


def test_shards_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    source = three(tmp_path / "shards")
    assert (len(source), source.name) == (12, "shards")
    assert [source.sample(n).caption for n in range(12)] == [f"c{n}" for n in range(12)]
    assert source.root.name(source.sample(5).images[0]) == f"00001.tar#512+{len(png(5))}/0005.png"


def test_one_key_in_two_shards_is_two_samples(tmp_path: Path) -> None:
    for name in "ab":
        written(tmp_path / f"{name}.tar", [("0.png", png()), ("0.txt", name.encode())])
    source = open_source(tmp_path)
    assert [(source.sample(n).id, source.sample(n).caption) for n in range(2)] == [("0", "a"), ("0", "b")]


def test_any_order_threads_and_pickles_give_the_same(tmp_path: Path) -> None:
    source = three(tmp_path)
    expected = [(sample, read_bytes(sample.images[0])) for sample in map(source.sample, range(12))]
    for index in (7, 0, 11, 3, 11, 4):
        assert (source.sample(index), read_bytes(source.sample(index).images[0])) == expected[index]
    other = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        wanted = list(range(12)) * 20
        found = list(pool.map(lambda n: (other.sample(n), read_bytes(other.sample(n).images[0])), wanted))
    assert found == [expected[n] for n in wanted]


def test_the_index_is_small(tmp_path: Path) -> None:
    count = 2000
    written(tmp_path / "a.tar", [(f"{n:06d}.{end}", b"x") for n in range(count) for end in ("jpg", "txt", "json")])
    source = open_source(tmp_path / "a.tar")
    assert len(source) == count
    assert len(pickle.dumps(source)) < 2000 + count * (3 * 20 + 16 + 6)


def test_the_fingerprint_is_of_the_data(tmp_path: Path) -> None:
    base = [("a.png", png()), ("a.json", b'{"caption": "x"}'), ("b.png", png(1)), ("b.txt", b"y")]
    changed = {
        "same": base,
        "words": [base[0], ("a.json", b'{"caption": "z"}'), *base[2:]],
        "text": [*base[:3], ("b.txt", b"z")],
        "size": [("a.png", png() + b"\0"), *base[1:]],
        "name": [*base[:2], ("c.png", png(1)), ("c.txt", b"y")],
        "order": [*base[2:], *base[:2]],
        "more": [*base, ("c.png", png()), ("c.txt", b"")],
    }
    first = open_source(written(tmp_path / "base" / "x.tar", base)).fingerprint()
    prints = {name: open_source(written(tmp_path / name / "x.tar", of)).fingerprint() for name, of in changed.items()}
    assert prints.pop("same") == first
    assert len({first, *prints.values()}) == len(changed)


def test_commands_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three(tmp_path / "shards")
    assert cli.run(["pool", "check", str(tmp_path / "shards"), "-o", str(tmp_path / "c")]) == 0
    assert "12 samples: 12 good, 0 refused" in capsys.readouterr().out
    assert cli.run(["show", str(tmp_path / "shards"), "--id", "0007"]) == 0
    shown = capsys.readouterr().out
    assert "c7" in shown and "00001.tar#" in shown and "/0007.png" in shown
    assert cli.run(["embed", str(tmp_path / "shards"), "--encoder", "pixels", "-o", str(tmp_path / "e")]) == 0
    rows = pq.read_table(tmp_path / "e" / "metadata" / "metadata_0.parquet").to_pylist()
    source = open_source(tmp_path / "shards")
    assert [source.root.ref(row["image"]) for row in rows] == [source.sample(n).images[0] for n in range(12)]


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1).filter(str.strip)
NAME = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="./\0"), min_size=1, max_size=120)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(NAME, st.integers(0, 255), TEXT, st.booleans(), st.binary(max_size=2000)),
        min_size=1,
        max_size=8,
        unique_by=lambda row: row[0],
    ),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    mixed=st.randoms(use_true_random=False),
)
def test_what_is_written_comes_back(tmp_path_factory: Any, rows: list[Any], form: int, mixed: Any) -> None:
    members = []
    for key, shade, text, plain, other in rows:
        words = ("txt", text.encode()) if plain else ("json", json.dumps({"caption": text}).encode())
        members += [(f"{key}.{end}", data) for end, data in (("png", png(shade)), words, ("npy", other))]
    mixed.shuffle(members)
    first = list(dict.fromkeys(name.partition(".")[0] for name, _ in members))
    source = open_source(written(tmp_path_factory.mktemp("w") / "a.tar", members, form))
    wanted = {row[0]: row for row in rows}
    assert len(source) == len(rows)
    for index, key in enumerate(first):
        if key.startswith("__") or "<image>" in wanted[key][2]:
            continue
        sample = source.sample(index)
        assert sample.id == key
        # A BOM at a file's start is none of its text.
        text = wanted[key][2].removeprefix("\ufeff") if wanted[key][3] else wanted[key][2]
        assert sample.caption == text.strip()
        assert read_bytes(sample.images[0]) == png(wanted[key][1])


@settings(max_examples=150, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, 2**20),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_whatever_is_broken_is_refused_in_our_words(tmp_path_factory: Any, flips: Any, cut: Any, form: int) -> None:
    long = "long/" * 60 + "猫"
    members = [*whole(2), (f"{long}.png", png()), (f"{long}.json", said())]
    path = written(tmp_path_factory.mktemp("w") / "a.tar", members, form)
    data = bytearray(path.read_bytes())
    for at, value in flips:
        data[at % len(data)] = value
    path.write_bytes(data if cut is None else data[: cut % len(data)])
    try:
        source = open_source(path)
    except DataError:
        return
    source.fingerprint()
    for index in range(len(source)):
        try:
            for ref in source.sample(index).images:
                read_bytes(ref)
        except (SampleFault, ImageFault) as fault:
            str(fault).encode()
