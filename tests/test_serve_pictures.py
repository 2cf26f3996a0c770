"""Pictures that requests name: what is taken, what is refused and why, and that no fetch goes where it should not."""

from __future__ import annotations

import base64
import ipaddress
import random
import shutil
import socket
import ssl
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.images import MAX_BYTES, ImageFault, load
from leveret.runs import RecipeError
from leveret.serve import outside, pictures
from leveret.serve.pictures import Rules, picture
from picture_fakes import (
    HIDDEN,
    HOST,
    JPEG,
    OPEN,
    PNG,
    REFUSED,
    SPELLINGS,
    TAKEN,
    WEBP,
    chunk,
    encoded,
    header,
    png,
    scans,
    uri,
)

ALLOWING = Rules(domains=(HOST,), seconds=20.0)


def reason(url: object, rules: Rules = ALLOWING, net: outside.Net | None = None) -> str:
    with pytest.raises(ImageFault) as caught:
        picture(url, rules, net or Fake())
    assert caught.value.mending in str(caught.value)
    return caught.value.reason


# --- data URIs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "data"), [("png", PNG), ("jpeg", JPEG), ("jpg", JPEG), ("webp", WEBP)])
def test_a_data_uri_comes_back_with_its_bytes(kind: str, data: bytes) -> None:
    for spelling in (f"image/{kind}", f"IMAGE/{kind.upper()}"):
        assert load(picture(uri(data, spelling), Rules())).size == (24, 16)


def test_the_bytes_decide_and_not_the_declared_type() -> None:
    ref = picture(uri(JPEG, "image/png"), Rules())
    assert ref.kind == "data" and ref.path.startswith("data:image/jpeg;base64,")
    assert ref == picture(uri(JPEG, "image/jpeg"), Rules())


WHOLE = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "url",
    [
        "data:", "data:,", "data:image/png", "data:image/png,abc", "data:image/png;base64", f"data:;base64,{WHOLE}",
        f"data:image/png;charset=utf-8;base64,{WHOLE}", f"data:image/png;base64;base64,{WHOLE}",
        f"data:image/png;base64,\n{WHOLE}", f"data:image/png;base64,{WHOLE}\n", f"data:image/png;base64, {WHOLE}",
        f"data:image/png;base64,{WHOLE[:40]} {WHOLE[40:]}", f"data:image/png;base64,{WHOLE[:41]}",
        f"data:image/png;base64,{WHOLE[:40]}-_{WHOLE[42:]}", f"data:image/png;base64,{WHOLE[:40]}=={WHOLE[40:]}",
        f"data:image/png;base64,{WHOLE}é", f"data:image/png;base64,{WHOLE}\udc80", f"data:image/png;base64,%41{WHOLE}",
        f"data: image/png;base64,{WHOLE}", f"data:image/png ;base64,{WHOLE}", f"data:image/png;base64,{WHOLE}#a",
        f"data:{'a' * 5000}/png;base64,{WHOLE}", None, 7, ["data:image/png"], {"url": "x"}, b"data:image/png;base64,",
    ],
)  # fmt: skip
def test_what_is_no_data_uri(url: object) -> None:
    assert reason(url) == "not a data URI"


@pytest.mark.parametrize(
    "kind",
    ["image/svg+xml", "image/gif", "image/bmp", "image/tiff", "image/x", "image/avif", "text/html", "video/jpeg",
     "application/octet-stream", "image/png2"],
)  # fmt: skip
def test_declared_types_that_are_not_taken(kind: str) -> None:
    assert reason(uri(PNG, kind)) == "type not allowed"


@pytest.mark.parametrize(
    "url",
    ["", "cat.jpg", "/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "file:/etc/passwd", "ftp://images.example.org/a",
     "gopher://127.0.0.1:6379/_x", "blob:https://images.example.org/a", "about:blank", "javascript:alert(1)",
     "//images.example.org/a", " https://images.example.org/a", "\thttps://images.example.org/a", "s3://bucket/a",
     "https//images.example.org", "C:\\cat.jpg", "\\\\host\\share\\a.png", "http", "ws://images.example.org/", "\0",
     "jar:https://images.example.org/a!/b", "unix:/run/docker.sock", "dict://127.0.0.1/", "ldap://x", "\udcff"],
)  # fmt: skip
def test_other_schemes_and_paths(url: str) -> None:
    net = Fake()
    assert reason(url, net=net) == "scheme not allowed"
    assert not net.looked and not net.dialled


@pytest.mark.parametrize(("data", "size", "pixel"), TAKEN.values(), ids=TAKEN.keys())
def test_unusual_pictures_are_taken_as_images_takes_them(
    data: bytes, size: tuple[int, int], pixel: tuple[int, int, int]
) -> None:
    image = load(picture(uri(data), Rules()))
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", size, pixel)


@pytest.mark.parametrize(("data", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_is_refused_before_a_pixel_is_unpacked(data: bytes, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("unpacked"))
    assert reason(uri(data)) == why


def test_a_jpeg_of_many_scans_and_parts_is_still_one() -> None:
    assert load(picture(uri(scans(20)), Rules())).size == (24, 16)
    assert load(picture(uri(JPEG[:2] + b"\xff\xfe\0\6note" * 1000 + JPEG[2:]), Rules())).size == (24, 16)
    assert load(picture(uri(PNG[:33] + chunk(b"tEXt", b"a\0b") * 1000 + PNG[33:]), Rules())).size == (24, 16)


def test_limits_are_told_as_they_are() -> None:
    rules = Rules(max_bytes=1000, max_pixels=400, max_side=30)
    assert picture(uri(encoded("PNG", (20, 20))), rules)
    for size in ((20, 21), (31, 1)):
        with pytest.raises(ImageFault, match=r"too many pixels.*At most 400 pixels and 30 a side"):
            picture(uri(encoded("PNG", size)), rules)
    # 1,001 bytes and 1,002 have as many letters of base64: both the letters and the bytes are counted.
    for extra in (1001, 1002, 1003, 5000):
        with pytest.raises(ImageFault, match=r"too large a file.*At most 1,000 bytes"):
            picture(uri(PNG.ljust(extra, b"\0")), rules)
    assert picture(uri(PNG.ljust(1000, b"\0")), rules)


@pytest.mark.parametrize(
    "values",
    [{"max_bytes": 0}, {"max_bytes": MAX_BYTES + 1}, {"max_pixels": 0}, {"max_pixels": 10**9}, {"max_side": 0},
     {"seconds": 0}, {"seconds": -1.0}, {"seconds": float("nan")}, {"seconds": 1e9}],
)  # fmt: skip
def test_rules_that_mean_nothing(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        Rules(**values)


@given(st.binary(max_size=300), st.sampled_from([b"", PNG[:33], JPEG[:25], WEBP[:30], PNG, JPEG, WEBP]))
def test_any_bytes_are_a_picture_or_a_fault(tail: bytes, head: bytes) -> None:
    with suppress(ImageFault):
        load(picture(uri(head + tail), Rules()))


@given(st.one_of(st.text(), st.text().map("data:".__add__), st.text().map("data:image/png;base64,".__add__)))
def test_any_text_is_a_fault(text: str) -> None:
    reason(text, Rules())


# --- the list of hosts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_as", "written"),
    [("Images.Example.ORG", "images.example.org"), ("bücher.example", "xn--bcher-kva.example"), ("*.Example.org",
    "*.example.org"),
     ("localhost", "localhost"), ("a-b.c1", "a-b.c1")],
)  # fmt: skip
def test_a_host_is_written_as_the_net_does(given_as: str, written: str) -> None:
    assert Rules(domains=(given_as, given_as)).domains == (written,)


@pytest.mark.parametrize(
    "entry",
    ["", "*", "*.", "*.org", "**.example.org", "https://example.org", "example.org/", "example.org:443", "example.org.",
     ".example.org", "a..b", "127.0.0.1", "10.1", "2130706433", "0x7f000001", "0x7f.1", "[::1]", "::1",
     "exa mple.org", "a_b.org",
     "-a.org", "a-.org", "user@example.org", "example.org\\", "example.org\n", "a" * 64 + ".org",
     ".".join(["abc"] * 80) + ".org"],
)  # fmt: skip
def test_entries_that_are_no_host(entry: str) -> None:
    with pytest.raises(RecipeError, match="--allow-domain"):
        Rules(domains=(entry,))


def test_a_star_stands_for_names_below_and_not_beside() -> None:
    rules = Rules(domains=("*.example.org",))
    for host in ("a.example.org", "a.b.example.org"):
        assert outside.target(f"https://{host}/", rules.domains).host == host
    for host in ("example.org", "badexample.org", "a.example.org.evil.net", "example.org.evil.net", "*.example.org"):
        with pytest.raises(ImageFault):
            outside.target(f"https://{host}/", rules.domains)


# --- where a URL leads ---------------------------------------------------------------------------------------------


class Fake(outside.Net):
    """A net in which each name has the addresses it is told, one list a lookup, and every line leads to `port` of this
    machine. Without a port, every line is refused."""

    def __init__(self, *answers: Sequence[str], port: int | None = None) -> None:
        self.answers = list(answers) or [[OPEN]]
        self.port = port
        self.looked: list[tuple[str, int]] = []
        self.dialled: list[tuple[str, int]] = []

    def lookup(self, host: str, port: int) -> list[str]:
        self.looked.append((host, port))
        return list(self.answers[min(len(self.looked), len(self.answers)) - 1])

    def dial(self, address: str, port: int, seconds: float) -> socket.socket:
        self.dialled.append((address, port))
        if self.port is None:
            raise ConnectionRefusedError
        return super().dial("127.0.0.1", self.port, seconds)


@pytest.mark.parametrize(("why", "url"), [(why, url) for why, urls in SPELLINGS.items() for url in urls])
def test_spellings_that_lead_nowhere(why: str, url: str) -> None:
    net = Fake()
    assert reason(url, net=net) == why
    assert not net.looked and not net.dialled


def test_without_a_list_nothing_is_fetched() -> None:
    net = Fake()
    assert reason("https://images.example.org/a.png", Rules(), net) == "fetching is off"
    assert not net.looked


@pytest.mark.parametrize(
    ("url", "scheme", "path"),
    [
        ("https://images.example.org", "https", "/"),
        ("HTTPS://Images.Example.Org/A.png", "https", "/A.png"),
        ("http://images.example.org:80/a/../b?x=1&y=%20#top", "http", "/a/../b?x=1&y=%20"),
        ("https://images.example.org:443?x", "https", "/?x"),
        ("https://images.example.org/#@127.0.0.1/", "https", "/"),
    ],
)
def test_a_url_is_read_once(url: str, scheme: str, path: str) -> None:
    port = {"http": 80, "https": 443}[scheme]
    assert outside.target(url, (HOST,)) == outside.Target(scheme, HOST, port, path)


@pytest.mark.parametrize("address", HIDDEN)
def test_addresses_that_are_not_of_the_open_net(address: str) -> None:
    """Alone, and hidden among good ones."""
    for answer in ([address], [OPEN, address], [address, OPEN], ["2606:4700::6810:85e5", OPEN, address]):
        net = Fake(answer)
        assert reason("https://images.example.org/a.png", net=net) == "address not allowed"
        assert not net.dialled


@pytest.mark.parametrize("address", [OPEN, "8.8.8.8", "2606:4700::6810:85e5", "2a00:1450:4001::1", "64:ff9b::808:808"])
def test_addresses_of_the_open_net(address: str) -> None:
    net = Fake([address])
    assert reason("https://images.example.org/a.png", net=net) == "not fetched"
    assert net.dialled == [(address, 443)]


@given(st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address))
def test_no_address_is_open_that_python_calls_closed(number: ipaddress.IPv4Address) -> None:
    closed = (
        number.is_private or number.is_loopback or number.is_link_local or number.is_multicast or number.is_reserved
    )
    hidden = int(number)
    assert not (closed and outside.public(str(number)))
    assert outside.public(str(ipaddress.IPv6Address((0x64FF9B << 96) | hidden))) == outside.public(str(number))
    for prefix in (0, 0xFFFF << 32, 0xFFFF0000 << 16):
        assert not outside.public(str(ipaddress.IPv6Address(prefix | hidden)))
    assert not outside.public(str(ipaddress.IPv6Address((0x2002 << 112) | (hidden << 80))))


@given(st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address))
def test_no_wide_address_is_open_that_python_calls_closed(number: ipaddress.IPv6Address) -> None:
    closed = (
        number.is_private or number.is_loopback or number.is_link_local or number.is_multicast or number.is_reserved
    )
    assert not (closed and outside.public(str(number)))


def test_a_name_that_answers_otherwise_the_second_time() -> None:
    with serving(reply(PNG)) as port:
        net = Fake([OPEN], ["127.0.0.1"], port=port)
        picture("http://images.example.org/a.png", ALLOWING, net)
    assert net.looked == [(HOST, 80)] and net.dialled == [(OPEN, 80)]


def test_addresses_are_tried_in_turn_and_looked_up_once() -> None:
    net = Fake([OPEN, "8.8.8.8", "2606:4700::1"])
    assert reason("http://images.example.org/a.png", net=net) == "not fetched"
    assert net.dialled == [(OPEN, 80), ("8.8.8.8", 80), ("2606:4700::1", 80)] and len(net.looked) == 1


def test_a_name_that_is_not_there() -> None:
    class Nowhere(Fake):
        def lookup(self, host: str, port: int) -> list[str]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert reason("http://images.example.org/a.png", net=Nowhere()) == "not fetched"
    assert reason("http://images.example.org/a.png", net=Fake([])) == "address not allowed"


def test_a_lookup_that_never_ends_is_left_behind() -> None:
    done = threading.Event()

    class Stuck(Fake):
        def lookup(self, host: str, port: int) -> list[str]:
            done.wait(60)
            return [OPEN]

    rules = Rules(domains=(HOST,), seconds=0.1)
    net = Stuck()
    # More than may be looked up at once: the others wait no longer than they may, either.
    reasons = {reason("http://images.example.org/a.png", rules, net) for _ in range(outside.LOOKUPS + 3)}
    assert reasons == {"too slow"}
    done.set()
    with serving(reply(PNG)) as port:
        picture("http://images.example.org/a.png", ALLOWING, Fake(port=port))
    assert not net.dialled


PARTS = st.one_of(
    st.sampled_from(
        [HOST, "http", "https", "://", ":", "/", "//", "\\", "@", "#", "?", ".", "%", "%2e", "%00", "[", "]",
        "127.0.0.1",
         "[::1]", "localhost", "evil.net", "169.254.169.254", "80", "443", "22", " ", "\t", "\r\n", "\0", "\u3002",
         "0x7f.1",
         "2130706433", "user", ";", ",", "&", "=", "{{", "é", "\u017f", "\udc80"]
    ),
    st.text(max_size=3),
)  # fmt: skip
URLS = st.one_of(
    st.lists(PARTS, max_size=9).map("".join),
    st.tuples(st.sampled_from(["http://", "https://"]), st.lists(PARTS, max_size=7).map("".join)).map("".join),
    st.tuples(st.sampled_from([f"http://{HOST}", f"https://{HOST}"]), st.lists(PARTS, max_size=5).map("".join)).map(
        "".join
    ),
)
ADDRESSES = st.lists(st.sampled_from([OPEN, "8.8.8.8", "2606:4700::1", *HIDDEN]), max_size=3)


@given(URLS, st.lists(ADDRESSES, min_size=1, max_size=3))
def test_only_a_checked_address_of_an_allowed_host_is_ever_dialled(url: str, answers: list[list[str]]) -> None:
    net = Fake(*answers)
    reason(url, net=net)  # the line is refused, so that there is always a reason
    assert set(net.looked) <= {(HOST, 80), (HOST, 443)} and len(net.looked) <= 1
    assert [address for address, _ in net.dialled] in ([], answers[0])
    assert all(outside.public(address) for address, _ in net.dialled)
    assert {port for _, port in net.dialled} <= {port for _, port in net.looked}


# --- what the host sends -------------------------------------------------------------------------------------------

Answerer = Callable[[socket.socket, bytes], None]


@contextmanager
def serving(answer: Answerer) -> Iterator[int]:
    """A server on this machine; `answer` gets each connection, and the request's head."""
    door = socket.create_server(("127.0.0.1", 0))
    lines: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def one(line: socket.socket) -> None:
        with suppress(OSError), line:
            head = b""
            while b"\r\n\r\n" not in head and (piece := line.recv(65536)):
                head += piece
            answer(line, head)

    def accept() -> None:
        with suppress(OSError):
            while True:
                line, _ = door.accept()
                lines.append(line)
                threads.append(threading.Thread(target=one, args=(line,), daemon=True))
                threads[-1].start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield door.getsockname()[1]
    finally:
        for open_socket in (door, *lines):
            with suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
            open_socket.close()
        for thread in (accepting, *threads):
            thread.join(10)


def head(status: str = "200 OK", **fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def reply(body: bytes, status: str = "200 OK", **fields: str) -> Answerer:
    return lambda line, _: line.sendall(head(status, **fields) + body)


def fetched(answer: Answerer, rules: Rules = ALLOWING, url: str = "http://images.example.org/a.png") -> str:
    """The reason it is refused for; "" where it is taken."""
    with serving(answer) as port:
        try:
            assert load(picture(url, rules, Fake(port=port))).size == (24, 16)
        except ImageFault as fault:
            return fault.reason
    return ""


def chunked(data: bytes, size: int = 7) -> bytes:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (PNG, {"Content_Type": "image/png", "Content_Length": str(len(PNG))}),
        (PNG, {"Content_Type": "image/png"}),
        (PNG, {}),
        (JPEG, {"Content_Type": "image/png; charset=binary"}),  # the bytes decide here, too
        (WEBP, {"Content_Type": "APPLICATION/octet-stream"}),
        (WEBP, {"Content_Encoding": "identity"}),
        (chunked(JPEG), {"Transfer_Encoding": "chunked", "Content_Type": "image/jpg"}),
        (PNG + b"more", {"Content_Length": str(len(PNG))}),
    ],
)
def test_honest_answers(body: bytes, fields: Mapping[str, str]) -> None:
    assert fetched(reply(body, **fields)) == ""


def test_what_is_asked_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    def answer(line: socket.socket, request: bytes) -> None:
        asked.append(request)
        line.sendall(head() + PNG)

    assert fetched(answer, url="http://Images.Example.org/a.png?b=1#c") == ""
    lines = asked[0].split(b"\r\n")
    assert lines[0] == b"GET /a.png?b=1 HTTP/1.1" and b"Host: images.example.org" in lines
    assert b"Accept-Encoding: identity" in lines and not any(line.lower().startswith(b"cookie") for line in lines)


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent", "300 Many"]
)
@pytest.mark.parametrize(
    "to", ["http://127.0.0.1/", "https://images.example.org/b.png", "/b.png", "file:///etc/passwd"]
)
def test_redirects_are_not_followed(status: str, to: str) -> None:
    with serving(reply(b"", status, Location=to)) as port:
        net = Fake(port=port)
        assert reason("http://images.example.org/a.png", net=net) == "redirected"
        assert len(net.dialled) == 1


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (reply(b"no", "404 Not Found"), "not fetched"),
        (reply(PNG, "206 Partial Content"), "not fetched"),
        (reply(PNG, "401 Unauthorized"), "not fetched"),
        (reply(PNG, "500 Oh"), "not fetched"),
        (reply(b"", "204 No Content"), "not fetched"),
        (reply(zlib.compress(PNG), Content_Encoding="gzip"), "compressed"),
        (reply(PNG, Content_Encoding="identity, br"), "compressed"),
        (reply(PNG, Content_Type="text/html"), "type not allowed"),
        (reply(PNG, Content_Type="image/svg+xml"), "type not allowed"),
        (reply(b"<html>", Content_Type="image/png"), "not an image"),
        (reply(b"<svg>", Content_Type="image/png"), "format not allowed"),
        (reply(encoded("GIF"), Content_Type="image/png"), "format not allowed"),
        (reply(png(header(9000, 9000), chunk(b"IDAT", b"")), Content_Type="image/png"), "too many pixels"),
        (reply(b""), "empty"),
        (reply(PNG, Content_Length=str(len(PNG) + 1)), "not fetched"),
        (reply(PNG[:-30], Transfer_Encoding="chunked"), "not fetched"),
        (reply(chunked(PNG)[:-20], Transfer_Encoding="chunked"), "not fetched"),
        (reply(b"-5\r\n" + PNG, Transfer_Encoding="chunked"), "not fetched"),
        (reply(b"zz\r\n" + PNG, Transfer_Encoding="chunked"), "not fetched"),
        (reply(b"f" * 70_000, Transfer_Encoding="chunked"), "not fetched"),
        (lambda line, _: line.sendall(PNG), "not fetched"),
        (lambda line, _: line.sendall(b"SSH-2.0-OpenSSH_9.6\r\n"), "not fetched"),
        (lambda line, _: None, "not fetched"),
        (lambda line, _: line.sendall(b"HTTP/1.1 200 OK\r\nA: b\r\n"), "empty"),
        (lambda line, _: line.sendall(b"HTTP/1.1 -200 OK\r\n\r\n"), "not fetched"),
        (lambda line, _: line.sendall(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n"), "not fetched"),
        (lambda line, _: line.sendall(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n"), "not fetched"),
    ],
)  # fmt: skip
def test_answers_that_are_not_taken(answer: Answerer, why: str) -> None:
    assert fetched(answer) == why


def endless(*parts: bytes, gap: float = 0.0) -> Answerer:
    """The first part, then the others for ever."""

    def answer(line: socket.socket, _: bytes) -> None:
        stop = threading.Event()
        line.sendall(parts[0])
        while True:
            for part in parts[1:]:
                line.sendall(part)
                stop.wait(gap)

    return answer


SMALL = Rules(domains=(HOST,), max_bytes=100_000, seconds=20.0)


@pytest.mark.parametrize(
    "answer",
    [
        reply(PNG, Content_Length="100001"),
        reply(b"", Content_Length="9" * 30),
        reply(PNG.ljust(100_001, b"\0")),
        endless(head(Content_Type="image/png"), b"\0" * 4096),
        endless(head(Transfer_Encoding="chunked"), b"1000\r\n" + b"\0" * 4096 + b"\r\n"),
        endless(head(Transfer_Encoding="chunked"), b"1;" + b"x" * 4000 + b"\r\n\0\r\n"),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        endless(head("100 Continue"), b"HTTP/1.1 100 Continue\r\nA: " + b"b" * 4000 + b"\r\n\r\n"),
    ],
    ids=[
        "told",
        "told absurdly",
        "untold",
        "endless",
        "endless chunks",
        "chunks of words",
        "continue",
        "long continue",
    ],
)
def test_too_large(answer: Answerer) -> None:
    assert fetched(answer, SMALL) == "too large a file"


@pytest.mark.parametrize(
    "answer",
    [
        endless(b"", b"", gap=0.05),
        endless(b"HTTP/1.1 200 OK\r\nA: ", b"b", gap=0.02),
        endless(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n", gap=0.02),
        endless(head(Content_Length="50000"), b"\0", gap=0.02),
        endless(head(Transfer_Encoding="chunked"), b"1\r\n\0\r\n", gap=0.02),
    ],
    ids=["silence", "a line's drip", "headers' drip", "the body's drip", "chunks' drip"],
)
def test_too_slow_though_every_byte_comes_soon(answer: Answerer) -> None:
    assert fetched(answer, Rules(domains=(HOST,), seconds=0.4)) == "too slow"


def test_an_exact_fit_is_taken() -> None:
    assert fetched(reply(PNG.ljust(100_000, b"\0")), SMALL) == ""
    assert fetched(reply(chunked(PNG.ljust(100_000, b"\0"), 999), Transfer_Encoding="chunked"), SMALL) == ""


def test_nothing_of_the_inside_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """What the net said, and which address a name has, are in the log alone."""
    with pytest.raises(ImageFault) as caught, caplog.at_level("INFO", "leveret.serve"):
        picture("https://images.example.org/a.png", ALLOWING, Fake(["10.1.2.3"]))
    assert "10.1.2.3" in caplog.text and "10.1.2.3" not in str(caught.value)
    assert caught.value.__cause__ is None and "images.example.org" not in str(caught.value)
    with pytest.raises(ImageFault) as caught:
        picture("https://images.example.org/a.png", ALLOWING, Fake())
    assert "Refused" not in str(caught.value)


# --- TLS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of HOST and its key, in one file; it vouches for itself."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
            "2",
            "-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}", "-addext",
            "keyUsage=critical,keyCertSign,digitalSignature",
            "-keyout", folder / "key.pem", "-out", folder / "cert.pem",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    both = folder / "both.pem"
    both.write_bytes((folder / "cert.pem").read_bytes() + (folder / "key.pem").read_bytes())
    return both


class OverTLS:
    """Answers with a picture over TLS, and keeps the name that was asked for."""

    def __init__(self, certificate: Path) -> None:
        self.names: list[str | None] = []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)
        self.context.sni_callback = lambda _line, name, _context: self.names.append(name)

    @contextmanager
    def serving(self) -> Iterator[int]:
        door = socket.create_server(("127.0.0.1", 0))

        def accept() -> None:
            with suppress(OSError):
                while True:
                    line, _ = door.accept()
                    with suppress(OSError), self.context.wrap_socket(line, server_side=True) as safe:
                        safe.recv(65536)
                        safe.sendall(head(Content_Length=str(len(PNG))) + PNG)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield door.getsockname()[1]
        finally:
            door.shutdown(socket.SHUT_RDWR)
            door.close()
            thread.join(10)


def test_tls_is_held_against_the_name(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = OverTLS(certificate)
    rules = Rules(domains=(HOST, "other.example.org"), seconds=20.0)
    with server.serving() as port:
        # No authority we know has signed it.
        assert reason(f"https://{HOST}/a.png", rules, Fake(port=port)) == "not fetched"
        trusting = ssl.create_default_context(cafile=str(certificate))
        monkeypatch.setattr(outside, "_tls", lambda: trusting)
        assert load(picture(f"https://{HOST}/a.png", rules, Fake(port=port))).size == (24, 16)
        # The same server under another name.
        assert reason("https://other.example.org/a.png", rules, Fake(port=port)) == "not fetched"
    assert server.names == [HOST, HOST, "other.example.org"]


def test_tls_by_default_checks_certificate_and_name() -> None:
    context = outside._tls()
    assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname


def test_a_handshake_that_never_ends() -> None:
    with serving(endless(b"", b"\x16", gap=0.02)) as port:
        rules = Rules(domains=(HOST,), seconds=0.4)
        assert reason(f"https://{HOST}/a.png", rules, Fake(port=port)) == "too slow"


def test_many_at_once() -> None:
    """Threads share nothing but the bound on lookups."""
    order = random.Random(0)
    kinds = [(reply(PNG), ""), (reply(b"", "302 Found"), "redirected"), (reply(b"x"), "not an image")]
    wanted = [order.choice(kinds) for _ in range(24)]
    got: list[str | None] = [None] * len(wanted)

    def one(place: int) -> None:
        got[place] = fetched(wanted[place][0])

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == [why for _, why in wanted]


def test_every_reason_has_its_mending() -> None:
    for table in (outside.REASONS, pictures._MENDING):
        assert all(mending and not mending.endswith(".") for mending in table.values())
