"""Hostile requests below JSON: targets, methods, headers, smuggling, and connections that never get to the point."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from abuse import Case, Reply, Target, read, reset, written
from abuse_cases import ANY, CHAT, HONEST, NOT_HERE, Act, said, with_model

REFUSED = frozenset({400, 403, 404, 405, 408, 413, 415, 431})

# --- targets and methods ---------------------------------------------------------------------------------------------


def paths() -> Iterator[Case]:
    outside = ["etc/passwd", "pyproject.toml", "settings", "config.json", "model.safetensors"]
    climbs = [
        "../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%5c", "..\\", "....//", "%252e%252e%252f", "..%c0%af", "..;/",
        "%00../", "./../",
    ]  # fmt: skip
    for climb in climbs:
        for name in outside:
            for base in ("/", "/page/", "/v1/", "/v1/models/", "/docs/"):
                yield Case("path/traversal", get(f"{base}{climb * 6}{name}"), NOT_HERE)
    odd = [
        "//etc/passwd", "/page//etc/passwd", "/page/", "/page", "/page/.", "/page/%00", "/page/index.html%00.js",
        "/.env", "/.git/config",
        "/v1/models/%2e%2e", "/v1/models/" + "a" * 5000, "/v1/models/%ff%fe", "/v1/models/{{7*7}}",
        "/v1/models/%0d%0aA:%20b", "/%",
        "/%zz", "/?" + "a=b&" * 2000, "/v1/chat/completions/", "/V1/models", "/v1/chat/completions?stream=true",
        "/metrics/", "/redoc",
        "/docs/oauth2-redirect", "/openapi.json/", "/openapi.yaml", "/debug", "/server-status", "/favicon.ico",
        "/robots.txt",
        "http://127.0.0.1/v1/models", "http://evil.net/", "127.0.0.1:80", "*", "", "v1/models", "?", "#", "/\x7f",
        "/\xc3\xa9", "/a b",
        "/" + "a" * 60_000, "/v1/models\t", "/page/..%2findex.html", "/%2fetc%2fpasswd", "file:///etc/passwd",
    ]  # fmt: skip
    for path in odd:
        yield Case(f"path/{path[:40]!r}", get(path), silent=True)
    methods = [
        "PUT",
        "DELETE",
        "PATCH",
        "OPTIONS",
        "HEAD",
        "TRACE",
        "CONNECT",
        "PROPFIND",
        "get",
        "GETS",
        "G" * 5000,
        "P\0ST",
        "GE/T",
        "é",
    ]
    for method in methods:
        for path in ("/v1/chat/completions", "/v1/models", "/", "/health", "/metrics", "/nothing"):
            yield Case(f"path/{method[:10]!r} {path}", partial(_method, method, path), silent=True)
    yield Case("path/get to chat", get(CHAT), frozenset({405}))
    for path in ("/v1/models", "/health", "/", "/nothing", "/metrics", "/docs"):
        yield Case(f"path/post to {path}", partial(_method, "POST", path), NOT_HERE)


def get(path: str) -> Act:
    return lambda target: target.request("GET", path)


def _method(method: str, path: str, target: Target) -> Reply:
    return target.request(method, path)


# --- headers ---------------------------------------------------------------------------------------------------------

BODY = written({**said("is there a square"), "model": "a"})


def heads() -> Iterator[Case]:
    length = str(len(BODY))
    for name, fields in {
        "host": [("Host", "evil.net")], "hosts": [("Host", "127.0.0.1"), ("Host", "evil.net")], "no host": [("Host",
        "")],
        "host port": [("Host", "127.0.0.1:99999999")], "host user": [("Host", "127.0.0.1@evil.net")],
        "host path": [("Host", "127.0.0.1/evil")],
        "host star": [("Host", "*")], "host rebound": [("Host", "127.0.0.1.nip.io")], "host long": [("Host",
        "a" * 5000)],
        "host odd": [("Host", "[::1")], "host byte": [("Host", "\udcff\udcfe")],
        "origin": [("Origin", "http://evil.net")], "forwarded": [("X-Forwarded-For", "1.1.1.1"), ("X-Forwarded-Host",
        "evil.net")],
        "token": [("Authorization", "Bearer " + "a" * 8000)], "token odd": [("Authorization", "Bearer \udcff\udc80")],
        "basic": [("Authorization", "Basic YTpi")], "tokens": [("Authorization", "Bearer a"), ("Authorization",
        "Bearer b")],
        "type": [("Content-Type", "text/plain")], "no type": [("Content-Type", "")], "form": [("Content-Type",
        "multipart/form-data; boundary=a")],
        "types": [("Content-Type", "application/json"), ("Content-Type", "text/plain")], "type odd": [("Content-Type",
        "application/json;\udcff")],
        "charset": [("Content-Type", "application/json; charset=utf-16")], "gzip": [("Content-Encoding", "gzip")],
        "br": [("Content-Encoding", "br, identity")], "length less": [("Content-Length", "5")],
        "length 0": [("Content-Length", "0")],
        "length minus": [("Content-Length", "-1")], "length plus": [("Content-Length", "+" + length)],
        "length hex": [("Content-Length", "0x10")],
        "length list": [("Content-Length", f"{length}, {length}")], "length two": [("Content-Length", length),
        ("Content-Length", "3")],
        "length same": [("Content-Length", length), ("Content-Length", length)], "length huge": [("Content-Length",
        "9" * 100)],
        "length large": [("Content-Length", str(2**34))], "length 2^63": [("Content-Length", str(2**63))],
        "length blank": [("Content-Length", "")],
        "length odd": [("Content-Length", "\udcb2")], "length under": [("Content-Length", "1_0")],
        "expect": [("Expect", "100-continue")], "expect odd": [("Expect", "the worst")], "upgrade": [("Upgrade",
        "websocket"), ("Connection", "Upgrade")],
        "h2c": [("Upgrade", "h2c"), ("Connection", "Upgrade, HTTP2-Settings"), ("HTTP2-Settings",
        "AAMAAABkAAQCAAAAAAIAAAAA")],
        "many": [(f"X-A{number}", "b") for number in range(2000)], "long": [("X-A", "b" * 60_000)],
        "cookie": [("Cookie", "a=" + "b" * 20_000)],
        "fold": [("X-A", "b\r\n c")], "name blank": [("X A", "b")], "name colon": [("Transfer-Encoding ", "chunked")],
        "nul": [("X-A", "a\0b")],
        "cr": [("X-A", "a\rb")], "lf": [("X-A", "a\nX-B: c")], "byte": [("X-A", "\udcff")], "range": [("Range",
        "bytes=0-1,5-9,9999999999-")],
        "accept": [("Accept", "text/html")], "if none": [("If-None-Match", "*")], "trailer": [("Trailer", "X-A"),
        ("TE", "trailers")],
    }.items():  # fmt: skip
        yield Case(f"head/{name}", partial(_with, fields), silent=True)
        yield Case(f"head/{name}, get", partial(_got, fields), silent=True)
    for name, data in smuggled().items():
        yield Case(f"smuggle/{name}", partial(_raw, data), silent=True)
    for name, data in no_http().items():
        yield Case(f"head/{name}", partial(_raw, data), REFUSED if not name[0].isdigit() else ANY, silent=True)


def _with(fields: list[tuple[str, str]], target: Target) -> Reply:
    return target.request("POST", CHAT, BODY, fields, half=True)


def _got(fields: list[tuple[str, str]], target: Target) -> Reply:
    return target.request("GET", "/v1/models", b"", fields, half=True)


def _raw(data: bytes, target: Target) -> Reply:
    host = f"{target.host}:{target.port}".encode()
    return target.raw(data.replace(b"HOST", host), half=True)


def smuggled() -> dict[str, bytes]:
    """Requests that two readers would cut in two places. One connection, one reply: `faults` counts."""
    second = b"GET /smuggled HTTP/1.1\r\nHost: HOST\r\n\r\n"
    start = b"POST /v1/chat/completions HTTP/1.1\r\nHost: HOST\r\nContent-Type: application/json\r\n"
    ended = b"0\r\n\r\n" + second
    closing = b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    tricks = {
        "both": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + ended,
        "both turned": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + ended,
        "lengths": b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + second,
        "odd coding": b"Transfer-Encoding: xchunked\r\nContent-Length: 5\r\n\r\n" + ended,
        "two codings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + ended,
        "coding list": b"Transfer-Encoding: identity, chunked\r\n\r\n" + ended,
        "gzip coding": b"Transfer-Encoding: gzip, chunked\r\n\r\n" + ended,
        "blank coding": b"Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n" + ended,
        "tab coding": b"Transfer-Encoding:\tchunked\r\nContent-Length: 5\r\n\r\n" + ended,
        "vertical": b"Transfer-Encoding:\x0bchunked\r\nContent-Length: 5\r\n\r\n" + ended,
        "folded": b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\n" + ended,
        "newline": b"X: y\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + ended,
        "upper": b"TRANSFER-ENCODING: CHUNKED\r\nContent-Length: 5\r\n\r\n" + ended,
        "quoted": b'Transfer-Encoding: "chunked"\r\nContent-Length: 5\r\n\r\n' + ended,
        "size plus": b"Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n" + second,
        "size hex": b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + second,
        "size under": b"Transfer-Encoding: chunked\r\n\r\n0_0\r\n\r\n" + second,
        "size blank": b"Transfer-Encoding: chunked\r\n\r\n 0\r\n\r\n" + second,
        "size minus": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n" + second,
        "size huge": b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + second,
        "size wraps": b"Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n" + second,
        "size long": b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 5000 + b"\r\n\r\n" + second,
        "extension": b"Transfer-Encoding: chunked\r\n\r\n0;a=\n\r\n\r\n" + second,
        "long extension": closing + b"1;" + b"a" * 100_000 + b"\r\nx\r\n0\r\n\r\n" + second,
        "bare lf": b"Transfer-Encoding: chunked\n\n0\n\n" + second,
        "no crlf": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcX0\r\n\r\n" + second,
        "trailers": closing + b"0\r\nContent-Length: 50\r\nHost: a\r\n\r\n" + second,
        "many trailers": closing + b"0\r\n" + b"A: b\r\n" * 20_000 + b"\r\n" + second,
        "old": b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + ended,
        "length first": b"Connection: close\r\nContent-Length: 2\r\n\r\n{}" + second,
        "get": b"",
    }  # fmt: skip
    made = {name: start + rest for name, rest in tricks.items()}
    made["get"] = b"GET /v1/models HTTP/1.1\r\nHost: HOST\r\nContent-Length: 43\r\nConnection: close\r\n\r\n" + second
    made["old version"] = made["both"].replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    made["refused"] = b"GET / HTTP/1.1\r\nHost: evil.net\r\nConnection: close\r\n\r\n" + second
    return made


def no_http() -> dict[str, bytes]:
    return {
        "nothing": b"", "newline": b"\r\n\r\n", "word": b"hello\r\n\r\n", "0.9": b"GET /\r\n\r\n",
        "2.0": b"GET / HTTP/2.0\r\nHost: HOST\r\n\r\n",
        "9.9": b"GET / HTTP/9.9\r\nHost: HOST\r\n\r\n", "no version": b"GET / \r\n\r\n",
        "ftp": b"USER a\r\nPASS b\r\n\r\n",
        "h2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        "tls": bytes.fromhex("16030100c8010000c40303") + bytes(200),
        "tls 2": bytes.fromhex("1603010200010001fc0303") + bytes(range(256)) * 2, "socks": b"\x05\x01\x00",
        "rdp": bytes.fromhex("0300002a25e0"),
        "ssh": b"SSH-2.0-a\r\n", "zeros": bytes(5000), "noise": bytes(range(256)) * 40,
        "redis": b"*1\r\n$4\r\nPING\r\n", "line": b"a" * 200_000,
        "no host": b"GET /v1/models HTTP/1.1\r\n\r\n", "no lines": b"GET / HTTP/1.1\r\nHost HOST\r\n\r\n",
        "blank first": b" GET / HTTP/1.1\r\n\r\n",
    }  # fmt: skip


# --- slow ------------------------------------------------------------------------------------------------------------


def slow() -> Iterator[Case]:
    """Each is refused or closed by a limit of the server's own, or is gone by itself."""
    drips: dict[str, Callable[[Target], tuple[bytes, bytes, float]]] = {
        "no word": lambda target: (b"", b"", 1.0),
        "headers": lambda target: (b"GET / HTTP/1.1\r\n", b"X: a\r\n", 0.5),
        "a header": lambda target: (b"GET / HTTP/1.1\r\nX: ", b"a", 0.5),
        "a body": lambda target: (target.written("POST", CHAT, b"", [("Content-Length", "1000000")]), b" ", 0.5),
        "no body": lambda target: (target.written("POST", CHAT, b"", [("Content-Length", "1000")]), b"", 1.0),
        "chunks": lambda target: (chunks(target), b"1\r\n \r\n", 0.5),
        "a chunk": lambda target: (chunks(target) + b"ffffff\r\n", b" ", 0.5),
        "refused body": lambda target: (target.written("POST", "/none", b"", [("Content-Length", "1000000")]), b" ",
        0.5),
        "after one": lambda target: (target.written("GET", "/health", b"", [("Connection", "keep-alive")]), b"", 1.0),
    }  # fmt: skip
    for name, make in drips.items():
        for _ in range(3):
            yield Case(
                f"slow/{name}", partial(_drip, make), frozenset({200, 400, 404, 405, 408}), silent=True, slow=True
            )
    for name, flood in {
        "chunks without end": b"10000\r\n" + b" " * 65536 + b"\r\n",
        "small chunks without end": b"1\r\n \r\n" * 10_000,
        "a chunk without end": b"ffffffff\r\n" + b" " * 65536,
        "trailers without end": b"0\r\n" + b"A: b\r\n" * 10_000,
    }.items():
        yield Case(f"flood/{name}", partial(_flood, flood), frozenset({400, 408, 413, 429}), silent=True)
    for name, act in {"half closed": _half, "gone": _gone, "reset": _reset, "gone in a body": _gone_in_body,
    "unread": _unread,
                      "gone in a stream": _gone_in_stream, "pipelined": _pipelined,
                      "idle many": _idle_many}.items():  # fmt: skip
        for _ in range(5):
            yield Case(f"gone/{name}", act, silent=True)


def chunks(target: Target) -> bytes:
    fields = [("Transfer-Encoding", "chunked"), ("X", "a")]
    return target.written("POST", CHAT, b"", fields).replace(b"Content-Length: 0\r\n", b"")


def _drip(make: Callable[[Target], tuple[bytes, bytes, float]], target: Target) -> Reply:
    first, then, pause = make(target)
    return target.raw(first, *[then] * 400, pause=pause)


def _flood(piece: bytes, target: Target) -> Reply:
    return target.raw(chunks(target), *[piece] * (20 * 2**20 // len(piece) + 1))


def _ask(target: Target, **more: Any) -> bytes:
    return target.written("POST", CHAT, written(with_model({**HONEST["picture"], "max_tokens": 200, **more}, target)))


def _half(target: Target) -> Reply:
    with target.line() as line:
        line.sendall(_ask(target, max_tokens=4))
        line.shutdown(socket.SHUT_WR)
        return read(line)


def _gone(target: Target) -> Reply:
    target.line().close()
    return Reply(how="cut")


def _reset(target: Target) -> Reply:
    line = target.line()
    line.sendall(_ask(target))
    reset(line)
    return Reply(how="cut")


def _gone_in_body(target: Target) -> Reply:
    line = target.line()
    line.sendall(_ask(target)[:-100])
    line.close()
    return Reply(how="cut")


def _gone_in_stream(target: Target) -> Reply:
    line = target.line()
    line.sendall(_ask(target, stream=True, n=4))
    line.recv(100)
    reset(line)
    return Reply(how="cut")


def _unread(target: Target) -> Reply:
    """Many answers are asked for on one connection, and none is read."""
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.settimeout(5)
        line.connect((target.host, target.port))
        try:
            for _ in range(20):
                line.sendall(_ask(target, stream=True, n=8, logprobs=True, top_logprobs=20))
        except OSError:
            pass
        time.sleep(1)
    return Reply(how="cut")


def _pipelined(target: Target) -> Reply:
    """Honest ones, one behind the other; all are answered, in turn."""
    one = target.written("GET", "/health", b"", [("Connection", "keep-alive")])
    with target.line() as line:
        line.sendall(one * 20 + target.written("GET", "/health"))
        line.settimeout(60)
        told = b""
        while piece := line.recv(65536):
            told += piece
    return Reply(200 if told.count(b"HTTP/1.1 200") == 21 else 500, "", {"content-type": "text/plain"}, told[:300])


def _idle_many(target: Target) -> Reply:
    lines = [target.line() for _ in range(20)]
    for line in lines:
        line.close()
    return Reply(how="cut")


# --- bytes -----------------------------------------------------------------------------------------------------------


def changed_bytes(rng: random.Random) -> Iterator[Case]:
    """An honest request with some bytes changed, dropped or doubled anywhere, for ever."""
    while True:
        yield Case(
            "bytes/changed", partial(_changed, rng.choice(list(HONEST.values())), rng.getrandbits(32)), silent=True
        )


def _changed(body: dict[str, Any], seed: int, target: Target) -> Reply:
    rng = random.Random(seed)
    data = bytearray(target.written("POST", CHAT, written(with_model(body, target))))
    head = data.index(b"\r\n\r\n")
    for _ in range(rng.choice((1, 2, 5, 30))):
        at = rng.randrange(head if rng.random() < 0.5 else len(data))
        what = rng.random()
        if what < 0.6:
            data[at] = rng.choice((0, 10, 13, 32, 34, 255, rng.randrange(256)))
        elif what < 0.8:
            del data[at : at + rng.randint(1, 10)]
        else:
            data[at:at] = data[at : at + rng.randint(1, 10)]
    return target.raw(bytes(data), half=True)
