"""pool/fetch: whole files or none, whatever the server does."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_fakes import Hub
from leveret.pool import fetch as module
from leveret.pool.fetch import begun, enough, fetch, part_of
from leveret.runs import DataError, EnvironmentFault, Interrupted
from pool_server import Server

BODY = bytes(range(256)) * 40
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as standin:
        standin.files["/a.bin"] = BODY
        yield standin


def got(server: Server, path: Path, name: str = "/a.bin", **more: Any) -> int:
    return fetch(server.url + name, path, pause=0, timeout=5, **more)


def clean(path: Path) -> bool:
    return [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_file_comes_whole_and_checked(server: Server, tmp_path: Path) -> None:
    told: list[int] = []
    path = tmp_path / "deep" / "a.bin"
    assert got(server, path, size=len(BODY), sha256=SHA, told=told.append) == len(BODY)
    assert path.read_bytes() == BODY and clean(path) and sum(told) == len(BODY)
    assert got(server, path, size=len(BODY)) == len(BODY) and len(server.asked) == 1, "what is there is not asked for"


def test_broken_in_the_middle_it_goes_on(server: Server, tmp_path: Path) -> None:
    server.breaks["/a.bin"] = [1000, 1, 3000]
    told: list[int] = []
    path = tmp_path / "a.bin"
    got(server, path, sha256=SHA, told=told.append)
    assert path.read_bytes() == BODY and clean(path) and sum(told) == len(BODY)
    assert [span for _, span in server.asked] == ["", "bytes=1000-", "bytes=1001-", "bytes=4001-"]


@given(cuts=st.lists(st.integers(0, 3000), max_size=5))
def test_however_it_is_cut_the_bytes_are_the_same(cuts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.bin"
    with Server() as server:
        server.files["/a.bin"] = BODY
        server.breaks["/a.bin"] = list(cuts)
        got(server, path, size=len(BODY), sha256=SHA)
    assert path.read_bytes() == BODY


def test_a_killed_run_is_gone_on_with(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    monkeypatch.setattr(module, "CHUNK", 1024)
    asked = iter([False] * 3 + [True] * 9)
    monkeypatch.setattr(module, "stop_requested", lambda: next(asked))
    with pytest.raises(Interrupted):
        got(server, path)
    assert not path.exists() and begun(path) == 3072
    monkeypatch.setattr(module, "stop_requested", lambda: False)
    got(server, path, sha256=SHA)
    assert server.asked[-1] == ("/a.bin", "bytes=3072-") and clean(path)


def test_a_server_without_ranges_begins_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.breaks["/a.bin"] = [5000]
    told: list[int] = []
    path = tmp_path / "a.bin"
    got(server, path, sha256=SHA, told=told.append)
    assert path.read_bytes() == BODY and sum(told) == len(BODY)


def test_without_lengths_the_size_of_the_catalogue_tells_what_is_whole(server: Server, tmp_path: Path) -> None:
    server.lengths = False
    got(server, tmp_path / "a.bin", size=len(BODY))
    server.breaks["/a.bin"] = [100]
    with pytest.raises(DataError, match="it has 100 bytes, it should have 10,240"):
        got(server, tmp_path / "b.bin", size=len(BODY))


@pytest.mark.parametrize("marks", [True, False])
def test_two_versions_are_never_joined(server: Server, tmp_path: Path, marks: bool) -> None:
    server.marks = marks
    path = tmp_path / "a.bin"
    part_of(path).write_bytes(b"old" * 100)
    (tmp_path / "a.bin.part.json").write_text(
        json.dumps({"url": server.url + "/a.bin", "mark": '"old"' if marks else "", "total": 777})
    )
    got(server, path)
    assert path.read_bytes() == BODY


def test_a_part_of_another_address_is_not_gone_on_with(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    part_of(path).write_bytes(b"x" * 50)
    got(server, path)
    assert path.read_bytes() == BODY and server.asked == [("/a.bin", "")]


def test_a_part_that_is_whole_is_taken_and_a_longer_one_is_not(server: Server, tmp_path: Path) -> None:
    for length, asked in ((len(BODY), 1), (len(BODY) + 9, 2)):
        server.asked.clear()
        path = tmp_path / f"{length}.bin"
        part_of(path).write_bytes((BODY + b"123456789")[:length])
        note = {"url": server.url + "/a.bin", "mark": "", "total": len(BODY)}
        path.with_name(path.name + ".part.json").write_text(json.dumps(note))
        got(server, path, sha256=SHA)
        assert path.read_bytes() == BODY and len(server.asked) == asked


def test_a_wrong_digest_or_size_leaves_nothing(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(DataError, match="its sha256 is"):
        got(server, path, sha256="0" * 64)
    with pytest.raises(DataError, match="has 10,240 bytes, the catalogue's 3: it was changed there"):
        got(server, path, size=3)
    assert not [item for item in tmp_path.iterdir() if item.suffix != ".json"]
    path.write_bytes(b"mine")
    with pytest.raises(DataError, match="another file: move it away"):
        got(server, path, size=len(BODY))
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("code", "said"), [(404, "no such file"), (403, "not given out"), (401, "log in"), (410, "taken")]
)
def test_a_refusal_is_told_at_once(server: Server, tmp_path: Path, code: int, said: str) -> None:
    server.status["/a.bin"] = [code]
    with pytest.raises(EnvironmentFault, match=said):
        got(server, tmp_path / "a.bin")
    assert len(server.asked) == 1


def test_a_busy_server_is_asked_again_and_not_for_ever(server: Server, tmp_path: Path) -> None:
    server.status["/a.bin"] = [503, 429, 500]
    got(server, tmp_path / "a.bin", sha256=SHA)
    server.status["/a.bin"] = [503] * 99
    with pytest.raises(EnvironmentFault, match=f"no answer in {module.TRIES} tries .the server answers 503"):
        got(server, tmp_path / "b.bin")
    assert len(server.asked) == 4 + module.TRIES


def test_no_server_is_no_traceback(tmp_path: Path) -> None:
    with Server() as server:
        url = server.url
    with pytest.raises(EnvironmentFault, match="run the same command again"):
        fetch(f"{url}/a", tmp_path / "a", pause=0)


def test_it_is_sent_on_to_the_web_alone(server: Server, tmp_path: Path) -> None:
    server.moved["/old"] = server.url + "/a.bin"
    server.breaks["/a.bin"] = [500]
    got(server, tmp_path / "a.bin", "/old", sha256=SHA)
    assert ("/a.bin", "bytes=500-") in server.asked
    server.moved["/evil"] = (tmp_path / "a.bin").as_uri()
    with pytest.raises(EnvironmentFault, match="302"):
        got(server, tmp_path / "b.bin", "/evil")
    assert not (tmp_path / "b.bin").exists()


def test_a_full_disk_keeps_what_came(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    pieces = module._pieces

    def filling(answer: http.client.HTTPResponse) -> Iterator[bytes]:
        data = next(iter(pieces(answer)))
        yield data[:4000]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_pieces", filling)
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        got(server, path)
    assert begun(path) == 4000
    monkeypatch.setattr(module, "_pieces", pieces)
    got(server, path, sha256=SHA)
    assert server.asked[-1][1] == "bytes=4000-"


def test_room_is_looked_for_first(tmp_path: Path) -> None:
    enough(tmp_path / "not" / "yet", 1)
    with pytest.raises(EnvironmentFault, match="are needed, the disk has"):
        enough(tmp_path / "not" / "yet", 1 << 60)


def test_two_files_at_once_do_not_meet(server: Server, tmp_path: Path) -> None:
    server.files |= {f"/{n}": bytes([n]) * 5000 for n in range(8)}
    jobs = [threading.Thread(target=got, args=(server, tmp_path / f"{n}", f"/{n}")) for n in range(8)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [(tmp_path / f"{n}").read_bytes() for n in range(8)] == [bytes([n]) * 5000 for n in range(8)]


def test_the_hub_is_asked_by_its_own_library(tmp_path: Path) -> None:
    held = tmp_path / "hub" / "owner" / "set" / "sub"
    held.mkdir(parents=True)
    (held / "words.json").write_text('[{"id": 1}]')
    sha = hashlib.sha256(b'[{"id": 1}]').hexdigest()
    row = "files:\n  - {path: words.json, hub: owner/set, name: sub/words.json, sha256: SHA}\ndata: words.json\n"
    (tmp_path / "good.yaml").write_text(row.replace("SHA", sha))
    (tmp_path / "bad.yaml").write_text(row.replace("SHA", "f" * 64))
    (tmp_path / "gone.yaml").write_text(row.replace("sub/", "").replace(", sha256: SHA", ""))
    (tmp_path / "none.yaml").write_text(row.replace("owner/set", "owner/none").replace(", sha256: SHA", ""))
    (tmp_path / "gated.yaml").write_text(row.replace("owner/set", "gated/model").replace(", sha256: SHA", ""))
    with Hub(tmp_path / "hub") as hub, hub.seat() as leveret:
        done = leveret("pool", "get", str(tmp_path / "good.yaml"), str(tmp_path / "data"), "--yes", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["checked"] == {"records": 1, "expected": None}
        assert (tmp_path / "data" / "words.json").read_text() == '[{"id": 1}]'
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["words.json"]
        expected = {
            "bad": "3 its sha256 is",
            "gone": "5 no such file",
            "none": "5 no such data set",
            "gated": "5 agree",
        }
        for name, told in expected.items():
            code, said = int(told[0]), told[2:]
            done = leveret("pool", "get", str(tmp_path / f"{name}.yaml"), str(tmp_path / name), "--yes")
            assert done.code == code and said in done.err, done.err
            assert not (tmp_path / name / "words.json").exists()
