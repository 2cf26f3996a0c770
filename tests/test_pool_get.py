"""pool/get and pool/unpack: told first, fetched whole, laid out where recipes look, and checked."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from leveret import cli
from leveret.pool import get as station
from leveret.pool import open_source
from leveret.pool.unpack import unpack
from leveret.runs import DataError, EnvironmentFault, Interrupted
from pool_server import Server

unpacking = sys.modules["leveret.pool.unpack"]


def picture(shade: int) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 9, 9)).save(held, "PNG")
    return held.getvalue()


def zipped(members: dict[str, bytes], mode: int = 0) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, data)
    return held.getvalue()


def tarred(members: dict[str, bytes | None], form: str = "gz") -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode=f"w:{form}") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(data or b"")
            archive.addfile(info, io.BytesIO(data or b""))
    return held.getvalue()


PICTURES = {f"images/coco/{n}.png": picture(n) for n in range(6)}
RECORDS = [
    {"id": str(n), "image": f"coco/{n}.png", "url": f"http://x/{n}.png", "alt": f"alt {n}",
     "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"{n}"}]}
    for n in range(6)
]  # fmt: skip


@pytest.fixture
def server() -> Iterator[Server]:
    archive = tarred(PICTURES)
    with Server() as standin:
        standin.files["/words.json"] = json.dumps(RECORDS).encode()
        cuts = (0, 100, 200, len(archive))
        for part, (begin, end) in zip(("aa", "ab", "ac"), itertools.pairwise(cuts), strict=True):
            standin.files[f"/images.tar.gz.part-{part}"] = archive[begin:end]
        yield standin


def recipe(folder: Path, server: Server, **more: Any) -> str:
    """A set of two files: words, and pictures in three parts."""
    parts = [
        {"path": f"archives/images.tar.gz.part-{part}", "url": f"{server.url}/images.tar.gz.part-{part}",
         "form": "tar.gz", "strip": "images"}
        for part in ("aa", "ab", "ac")
    ]  # fmt: skip
    words = {
        "path": "words.json",
        "url": f"{server.url}/words.json",
        "bytes": len(server.files["/words.json"]),
        "sha256": hashlib.sha256(server.files["/words.json"]).hexdigest(),
    }
    row: dict[str, Any] = {
        "title": "six pictures",
        "data": "words.json",
        "images": "finetune/images",
        "counts": {"samples": 6},
        "licence": {"annotations": "CC0", "images": "of nobody"},
        "files": [words, *parts],
        "defects": ["none is known"],
    }
    (folder / "set.yaml").write_text(yaml.safe_dump(row | more))
    return str(folder / "set.yaml")


def test_words_and_pictures_are_where_a_recipe_looks_for_them(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, root = recipe(tmp_path, server), tmp_path / "data"
    server.breaks["/words.json"] = [10]
    assert cli.run(["pool", "get", name, str(root), "--unpack", "--yes"]) == 0
    out, err = capsys.readouterr()
    assert "six pictures (6 samples)" in out and "words.json  [missing]" in out, err
    assert "annotations: CC0" in out and "images: of nobody" in out and "known: none is known" in out
    assert "4 files fetched" in out and "6 files in" in out and "6 records" in out
    source = open_source(root / "words.json", root / "finetune/images")
    assert [Path(source.sample(n).images[0].path).read_bytes() for n in range(6)] == list(PICTURES.values())
    asked = len(server.asked)
    assert cli.run(["pool", "get", name, str(root), "--unpack", "--json"]) == 0, "nothing to agree to any more"
    facts = json.loads(capsys.readouterr().out)
    assert len(server.asked) == asked and facts["fetched"] == []
    assert next(iter(facts["unpacked"].values()))["written"] == 0


def test_nothing_is_fetched_before_somebody_agrees(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, root = recipe(tmp_path, server), tmp_path / "data"
    assert cli.run(["pool", "get", name, str(root)]) == 2
    assert "--yes" in capsys.readouterr().err
    assert cli.run(["pool", "get", name, str(root), "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["dry_run"] and facts["missing_bytes"] == len(server.files["/words.json"])
    assert facts["unknown_sizes"] == 3 and facts["licences"][""]["annotations"] == "CC0"
    assert not server.asked and not root.exists()


def test_one_fault_does_not_keep_the_others_from_coming(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, root = recipe(tmp_path, server), tmp_path / "data"
    gone = server.files.pop("/images.tar.gz.part-ab")
    server.files["/words.json"] = server.files["/words.json"].replace(b"What", b"That")
    assert cli.run(["pool", "get", name, str(root), "--unpack", "--yes"]) == 3
    err = capsys.readouterr().err
    assert "2 of the files" in err and "part-ab: there is no such file (any more) (404)" in err and "sha256" in err
    assert (root / "archives/images.tar.gz.part-ac").exists() and not (root / "finetune").exists()
    server.files["/images.tar.gz.part-ab"] = gone
    server.files["/words.json"] = json.dumps(RECORDS).encode()
    assert cli.run(["pool", "get", name, str(root), "--unpack", "--yes"]) == 0
    assert len(list((root / "finetune/images/coco").iterdir())) == 6


def test_the_records_are_counted(server: Server, tmp_path: Path) -> None:
    name = recipe(tmp_path, server, counts={"samples": 7})
    with pytest.raises(DataError, match="holds 6 records, the catalogue tells 7"):
        station.get(name, tmp_path / "data", pause=0)


def test_the_disk_is_asked_before_the_net(server: Server, tmp_path: Path) -> None:
    name = recipe(tmp_path, server)
    row = yaml.safe_load(Path(name).read_text())
    row["files"][1]["about"] = "900000 TB"
    Path(name).write_text(yaml.safe_dump(row))
    with pytest.raises(EnvironmentFault, match="are needed, the disk has"):
        station.get(name, tmp_path / "data")
    assert not server.asked


def test_what_a_person_must_fetch_is_left_to_them(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = recipe(tmp_path, server, files=[{"path": "words.json", "by_hand": "ask your aunt"}])
    assert cli.run(["pool", "get", name, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "left to you" in out and "ask your aunt" in out
    (tmp_path / "words.json").write_bytes(server.files["/words.json"])
    assert cli.run(["pool", "get", name, str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["checked"]["records"] == 6 and not facts["by_hand"]


def test_addresses_become_a_list_for_img2dataset(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"file": "words.json", "url": "url", "caption": "alt", "only": True}
    server.files["/words.json"] = json.dumps([*RECORDS, {"id": "x"}, {"url": "file:///etc/passwd"}, 7]).encode()
    name = recipe(tmp_path, server, addresses=told, counts={})
    assert cli.run(["pool", "get", name, str(tmp_path / "d"), "--yes", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["urls"]["rows"] == 6 and facts["urls"]["without"] == 3
    table = pq.read_table(tmp_path / "d" / "words.urls.parquet").to_pylist()
    assert table[2] == {"url": "http://x/2.png", "caption": "alt 2", "key": "2"}
    name = recipe(tmp_path, server, addresses=told | {"url": "nowhere"}, counts={})
    assert cli.run(["pool", "get", name, str(tmp_path / "d")]) == 3
    assert "none of its 9 records has an address" in capsys.readouterr().err


def test_parts_are_joined_and_archives_are_not(tmp_path: Path) -> None:
    for name, groups in (
        ("images/bunny-laion-2m", 1),
        ("images/allava-laion", 10),
        ("images/vg", 2),
        ("images/sam", 51),
    ):
        assert len(list(station._archives(station.plan(name, tmp_path)[1]))) == groups


def test_another_number_of_pictures_is_worth_a_note(server: Server, tmp_path: Path) -> None:
    name = recipe(tmp_path, server, counts={"images": 7}, data=None)
    made = station.get(name, tmp_path / "data", lay_out=True)
    assert made["notes"] == [": 6 files, the catalogue tells 7 pictures"]


def test_a_disk_that_fills_up_while_unpacking_is_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def filled(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    name = recipe(tmp_path, server)
    monkeypatch.setattr(unpacking, "atomic_file", filled)
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        station.get(name, tmp_path / "data", lay_out=True)
    monkeypatch.undo()
    assert next(iter(station.get(name, tmp_path / "data", lay_out=True)["unpacked"].values()))["written"] == 6


def test_without_a_hub_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["pool", "get", "llava/665k", str(tmp_path), "--no-images", "--yes"]) == 5
    assert "the hub cannot be reached" in capsys.readouterr().err


def test_a_mixture_is_not_fetched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["pool", "get", "prismatic/llava-lvis4v", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "get llava/665k, prismatic/lvis4v" in err and "pool mix prismatic/llava-lvis4v -o" in err
    assert cli.run(["pool", "get", "lava/665k", str(tmp_path)]) == 2
    assert "llava/665k" in capsys.readouterr().err


# --- archives ------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".unpacked")
    }


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("parts", [1, 3])
def test_archives_are_laid_out(form: str, parts: int, tmp_path: Path) -> None:
    members = {"top/a/1.png": picture(1), "top/2.png": picture(2), "other.txt": b"x" * 5000, "top/empty": b""}
    data = zipped(members) if form == "zip" else tarred(dict(members), "gz" if form == "tar.gz" else "")
    size = -(-len(data) // parts)
    paths = []
    for number in range(parts):
        paths.append(tmp_path / f"archive.part-{number}")
        paths[-1].write_bytes(data[number * size : (number + 1) * size])
    found = unpack(paths, tmp_path / "out", form, strip="top")
    assert (found.files, found.written, found.refused) == (4, 4, {})
    stripped = {name.removeprefix("top/"): content for name, content in members.items()}
    assert files(tmp_path / "out") == stripped
    (tmp_path / "out" / "2.png").write_bytes(b"torn")
    assert unpack(paths, tmp_path / "out", form, strip="top").written == 0, "laid out once, it is not looked at"
    (tmp_path / "out" / ".unpacked-archive.part-0.json").unlink()
    assert unpack(paths, tmp_path / "out", form, strip="top").written == 1, "only what is missing or torn"
    assert files(tmp_path / "out") == stripped


def test_nothing_leaves_the_folder(tmp_path: Path) -> None:
    evil = {"../up.txt": b"x", "/abs.txt": b"x", "a/../../b.txt": b"x", "c:\\d.txt": b"x", "good.txt": b"y"}
    (tmp_path / "e.zip").write_bytes(zipped(evil))
    (tmp_path / "e.tar").write_bytes(tarred(evil | {"link": None, "link/x.txt": b"z"}))
    (tmp_path / "l.zip").write_bytes(zipped({"link": b"/etc", "x": b"1"}, mode=0o120777))
    found = unpack([tmp_path / "e.zip"], tmp_path / "z", "zip")
    assert files(tmp_path / "z") == {"good.txt": b"y"} and sum(found.refused.values()) == 4
    found = unpack([tmp_path / "e.tar"], tmp_path / "t", "tar.gz")
    assert files(tmp_path / "t") == {"good.txt": b"y", "link/x.txt": b"z"} and found.refused["link"] == 1
    with pytest.raises(DataError, match="holds no files but 2 link"):
        unpack([tmp_path / "l.zip"], tmp_path / "l", "zip")
    (tmp_path / "out").mkdir()
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "good").symlink_to(tmp_path / "out")
    (tmp_path / "g.zip").write_bytes(zipped({"good/x.txt": b"1", "fine.txt": b"2"}))
    assert unpack([tmp_path / "g.zip"], tmp_path / "s", "zip").refused == {"leaves the folder by a link": 1}
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
def test_a_cut_archive_is_an_error_in_words(form: str, tmp_path: Path) -> None:
    members = {f"{n}.bin": bytes([n]) * 3000 + picture(n) for n in range(20)}
    data = zipped(members) if form == "zip" else tarred(dict(members), "gz" if form == "tar.gz" else "")
    end = len(data) - 6 if form != "tar" else 20 * (512 + 3584)  # of a tar: the last whole member
    cuts = {"cut": data[: len(data) // 2], "end": data[:end], "page": b"<html>not here</html>", "none": b""}
    for name, content in cuts.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"damaged or cut off|holds no files"):
            unpack([tmp_path / name], tmp_path / f"out-{name}", form)
    (tmp_path / "cut").write_bytes(data)
    unpack([tmp_path / "cut"], tmp_path / "out-cut", form)
    assert files(tmp_path / "out-cut") == members


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(zipped({f"{n}": b"x" * n for n in range(1, 9)}))
    asked = iter([False] * 4 + [True])
    monkeypatch.setattr(unpacking, "stop_requested", lambda: next(asked))
    with pytest.raises(Interrupted, match="after 4 files"):
        unpack([tmp_path / "a.zip"], tmp_path / "o", "zip")
    monkeypatch.setattr(unpacking, "stop_requested", lambda: False)
    assert unpack([tmp_path / "a.zip"], tmp_path / "o", "zip").written == 4
