"""The hostile requests of `abuse`: families of them, each known by `family/what`.

mutated   an honest body with one place changed: every place x every nasty value, then several at random
json      texts that are no JSON, or JSON that readers disagree about
picture   bombs, liars, cut and damaged files, and unusual ones that are to be answered
url       places that a request must not make this server reach
text      templates, marks, paths and control characters in what people type
path      traversal, odd methods, odd targets
head      headers that contradict each other, smuggling, what is no HTTP
slow      drips, silence, half-closed and abandoned connections, replies that nobody reads
bytes     an honest request with bytes changed at random
"""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import chain, islice
from typing import Any

from abuse import Case, Reply, Target, bare, written
from picture_fakes import (
    HIDDEN,
    JPEG,
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

PICTURE = encoded("PNG", (32, 32), color="blue")
CHAT, LOOK = "/v1/chat/completions", "/v1/look"
NO = frozenset({400})
NOT_HERE = frozenset({400, 403, 404, 405})
ANY: frozenset[int] = frozenset()

Act = Callable[[Target], Reply]


# --- bodies ----------------------------------------------------------------------------------------------------------


def said(*parts: Any, **more: Any) -> dict[str, Any]:
    """An honest body."""
    content: Any = list(parts) if len(parts) != 1 or not isinstance(parts[0], str) else parts[0]
    return {"model": "?", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


CHOICE = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string", "enum": ["yes", "no"]}}}
TALK = [
    {"role": "user", "content": [image(uri(PICTURE)), text("is there a square")]},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "what colour is it"},
]
HONEST: dict[str, dict[str, Any]] = {
    "plain": said("is there a square", temperature=0.5, top_p=0.9, seed=1, stop=["no"], n=2),
    "picture": said(image(uri(PICTURE)), text("is there a square")),
    "told": said("is there a square", logprobs=True, top_logprobs=3),
    "choice": said(image(uri(PICTURE)), text("is there a square"), response_format=CHOICE),
    "stream": said("is there a square", stream=True, stream_options={"include_usage": True}, user="a"),
    "talk": {"model": "?", "messages": TALK, "max_tokens": 4, "metadata": {"a": "b"}},
}
ASKED_TO_LOOK = {"model": "?", "messages": TALK[:1], "answer": "yes"}


def post(body: Any, path: str = CHAT, name_it: bool = True) -> Act:
    def act(target: Target) -> Reply:
        return target.chat(with_model(body, target) if name_it else body, path)

    return act


def with_model(body: Any, target: Target) -> Any:
    """The body, asking for the model that is there where it asks for "?". One that takes time to make is made here."""
    body = body() if callable(body) else body
    return {**body, "model": target.model} if isinstance(body, dict) and body.get("model") == "?" else body


# --- mutated ---------------------------------------------------------------------------------------------------------


def deep(levels: int) -> Any:
    return bare("[" * levels + "]" * levels)


NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, -1e308, 5e-324, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400,
    bare("NaN"), bare("Infinity"), bare("-Infinity"), bare("1e999"), bare("01"), bare("0x10"), bare("-"),
    "", " ", "a", "0", "null", "true", "\0", "\ud800", "\udfff\ud800", "\U0010ffff", "\u202e\u2028", "é" * 1000,
    "x" * 100_000, "{{7*7}}", "{% for a in b %}", "${7*7}", "#{7*7}", "%s%n%d", "../../../../etc/passwd", "/etc/passwd",
    "file:///etc/passwd", "<image>", "<|end|>", "<|user|>", "' OR 1=1 --", "<script>alert(1)</script>", "\r\nA: b",
    [], {}, [None], [[]], [{}], {"": None}, {"a": {"b": {}}}, {"type": "text"}, {"type": "text", "text": 1},
    {"type": "image_url"}, {"type": "image_url", "image_url": "x"}, {"role": "user"}, {"$ref": "#"}, ["a"] * 1000,
    {str(number): number for number in range(1000)}, deep(50), deep(500), deep(100_000), ["\0"], [True], [1.5, "a"],
    {"__class__": "a", "__proto__": {"a": 1}}, {"url": "data:image/png;base64,"}, "data:image/png;base64,",
    "http://127.0.0.1:22/", "system", "assistant", "user", "json_object", ["yes", "yes"], ["a"] * 65, "a\ud800b",
]  # fmt: skip


def places(body: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a body, itself included."""
    yield at
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(body, dict):
        inside = body.items()
    elif isinstance(body, list):
        inside = enumerate(body)
    for key, one in inside:
        yield from places(one, (*at, key))


def changed(body: Any, at: tuple[Any, ...], change: Callable[[Any, Any], Any]) -> Any:
    """A copy in which `change(holder, key)` was done at that place."""
    if not at:
        holder = [body]
        change(holder, 0)
        return holder[0] if holder else None
    made = copy.deepcopy(body)
    holder = made
    for key in at[:-1]:
        holder = holder[key]
    change(holder, at[-1])
    return made


def put(value: Any) -> Callable[[Any, Any], Any]:
    return lambda holder, key: holder.__setitem__(key, value)


def drop(holder: Any, key: Any) -> None:
    del holder[key]


def double(holder: Any, key: Any) -> None:
    if isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[key + "_"] = holder[key]


def wrap(holder: Any, key: Any) -> None:
    holder[key] = [holder[key]]


def mutated(rng: random.Random) -> Iterator[Case]:
    """One place at a time, every nasty value there; in no order."""
    bodies = [(name, body, CHAT) for name, body in HONEST.items()] + [("look", ASKED_TO_LOOK, LOOK)]
    spots = [(name, body, path, at) for name, body, path in bodies for at in places(body)]
    changes: list[Any] = [put(value) for value in NASTY] + [drop, double, wrap]
    every = [(spot, change) for spot in spots for change in changes]
    rng.shuffle(every)
    for (name, body, path, at), change in every:
        label = "mutated/" + ".".join([name, *map(str, at)])
        yield Case(label, post(changed(body, at, change), path))


def mixed(rng: random.Random) -> Iterator[Case]:
    """Several places at once, for ever."""
    while True:
        name, body = rng.choice(list(HONEST.items()))
        for _ in range(rng.randint(2, 5)):
            spots = list(places(body))
            change = rng.choice([put(rng.choice(NASTY)), put(rng.choice(NASTY)), drop, double, wrap])
            body = changed(body, rng.choice(spots), change)
        yield Case(f"mutated/{name}, several", post(body))


# --- json ------------------------------------------------------------------------------------------------------------


def texts_of_json() -> Iterator[tuple[str, bytes]]:
    whole = written(said("is there a square"))
    yield from {
        "nothing": b"", "blank": b" \n", "word": b"hello", "number": b"7", "text": b'"a"', "list": b"[]",
        "null": b"null",
        "open": b"{", "half": whole[: len(whole) // 2], "two": whole + whole, "tail": whole + b"x",
        "comma": whole[:-1] + b",}",
        "comment": b"/* a */" + whole, "single": whole.replace(b'"', b"'"), "bom": b"\xef\xbb\xbf" + whole,
        "utf16": whole.decode().encode("utf-16"), "utf32": whole.decode().encode("utf-32"),
        "latin": b'{"model":"\xe9"}',
        "overlong": b'{"model":"\xc0\xaf"}', "surrogate": b'{"model":"\xed\xa0\x80"}',
        "high": b'{"model":"\xf5\x80\x80\x80"}',
        "cut letter": b'{"model":"\xe2\x82', "nul": whole.replace(b"square", b"squ\0are"),
        "raw newline": whole.replace(b"square", b"a\nb"),
        "bad escape": whole.replace(b"square", b"\\x41"), "short escape": whole.replace(b"square", b"\\u12"),
        "lone": whole.replace(b"square", b"\\ud800"), "reversed": whole.replace(b"square", b"\\udc00\\ud800"),
        "twice": b'{"model":"a","model":"b",' + whole[1:], "twice messages": whole[:-1] + b',"messages":[]}',
        "empty key": whole[:-1] + b',"":1}', "proto": whole[:-1] + b',"__proto__":{"a":1}}',
        "open list": b"[" * 100_000,
        "open object": b'{"a":' * 100_000, "deep": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "many keys": json.dumps({str(n): n for n in range(200_000)}).encode(),
        "long key": whole[:-1] + b',"' + b"k" * 1_000_000 + b'":1}',
        "long number": whole[:-1] + b',"seed":' + b"9" * 1_000_000 + b"}",
        "long fraction": whole[:-1] + b',"top_p":0.' + b"0" * 1_000_000 + b"1}",
        "exponent": whole[:-1] + b',"top_p":1e-999999999}',
        "huge": whole[:-1] + b',"temperature":1e999999999}', "nan": whole[:-1] + b',"temperature":NaN}',
        "infinity": whole[:-1] + b',"temperature":-Infinity}', "plus": whole[:-1] + b',"seed":+1}',
        "hex": whole[:-1] + b',"seed":0x1}',
        "point": whole[:-1] + b',"temperature":1.}', "blanks": b" " * 5_000_000 + whole,
        "escapes": whole.replace(b"square", b"\\u0041" * 300_000),
        "long text": whole.replace(b"square", b"square " * 1_000_000),
        "many messages": json.dumps(said("a") | {"messages": TALK * 5000}).encode(),
        "many parts": written(said(*[text("a")] * 50_000)), "many images": written(said(*[image(uri(PICTURE))] * 5000)),
        "deep parts": b'{"model":"a","messages":[{"role":"user","content":' + b"[" * 5000 + b"]" * 5000 + b"}]}",
        "form": b"model=a&messages=b", "xml": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
        "pickle": b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        "zip": b"PK\x03\x04" + b"\0" * 100, "gzip": zlib.compress(whole, wbits=31), "too large": b" " * (17 * 2**20),
    }.items()  # fmt: skip


def of_json() -> Iterator[Case]:
    for name, body in texts_of_json():
        named = body.replace(b'"model": "?"', b'"model": "??"')
        yield Case(f"json/{name}", post(named), frozenset({400, 404, 413}))
    big = b'{"model":"' + b"a" * (33 * 2**20)
    yield Case("json/twice too large", post(big), frozenset({413}), silent=True)


# --- pictures --------------------------------------------------------------------------------------------------------


def about(data: bytes, kind: str = "image/png", **more: Any) -> dict[str, Any]:
    return said(image(uri(data, kind)), text("what is it"), **more)


def bomb(mode: int, depth: int, channels: int, side: int = 5000, **more: bytes) -> bytes:
    """A PNG of one colour, as many pixels as are allowed, in some 50 kB."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, mode, 0, 0, 0))
    row = -(-side * depth * channels // 8) + 1
    packer = zlib.compressobj(9)
    packed = packer.compress(bytes(row)) + b"".join(packer.compress(bytes(row)) for _ in range(side - 1))
    rest = [chunk(kind.encode(), data) for kind, data in more.items()]
    return png(head, *rest, chunk(b"IDAT", packed + packer.flush()), chunk(b"IEND", b""))


def pictures() -> Iterator[Case]:
    for name, (data, _, _) in TAKEN.items():
        yield Case(f"picture/{name}", post(about(data)), frozenset({200}))
    for data, why in REFUSED:
        for kind in ("image/png", "image/jpeg", "image/webp"):
            yield Case(f"picture/{why}", post(about(data, kind)), NO)
    for kind in ("image/gif", "image/svg+xml", "image/tiff", "text/html", "image/*", "", "application/pdf"):
        yield Case(f"picture/as {kind}", post(about(PNG, kind)), NO)
    for name, data in {
        "long strip": encoded("PNG", (16_000, 1)), "tall strip": encoded("PNG", (1, 16_000)),
        "long jpeg": encoded("JPEG", (16_000, 2)),
    }.items():  # fmt: skip
        yield Case(f"picture/{name}", post(about(data)), frozenset({200, 400}))
    for name, data in {
        "lying IDAT": png(header(24, 16), chunk(b"IDAT", zlib.compress(b"\0" * 10)), chunk(b"IEND", b"")),
        "long IDAT": png(header(24, 16), chunk(b"IDAT", zlib.compress(bytes(50_000_000))), chunk(b"IEND", b"")),
        "no IDAT": png(header(24, 16), chunk(b"IEND", b"")),
        "bad depth": png(chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 7, 9, 9, 9, 9)), chunk(b"IEND", b"")),
        "no palette": png(chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 3, 0, 0, 0)), chunk(b"IDAT",
        zlib.compress(bytes(20)))),
        "long chunk": PNG[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt" + PNG[33:],
        "text bomb": PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))) + PNG[33:],
        "profile bomb": PNG[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000))) + PNG[33:],
        "bad crc": PNG[:40] + b"\0\0\0\0" + PNG[44:],
        "bad exif": PNG[:33] + chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 500) + PNG[33:],
        "wide exif": PNG[:33] + chunk(b"eXIf", wide_exif()) + PNG[33:],
        "polyglot": PNG + b"<html><script>alert(1)</script>", "png in jpeg": JPEG[:20] + PNG,
        "arithmetic": JPEG.replace(b"\xff\xc0", b"\xff\xc9"),
        "lossless jpeg": JPEG.replace(b"\xff\xc0", b"\xff\xc3"), "two frames": JPEG.replace(b"\xff\xc4", b"\xff\xc0",
        1),
        "no tables": JPEG.replace(b"\xff\xdb", b"\xff\xfe"), "webp lies": WEBP.replace(b"VP8 ", b"VP8L"),
        "riff": b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 50, "small riff": WEBP[:4] + b"\0\0\0\0" + WEBP[8:],
    }.items():  # fmt: skip
        yield Case(f"picture/{name}", post(about(data)), frozenset({200, 400}))
    yield Case("picture/eight", post(said(*[image(uri(PICTURE))] * 8, text("?"))), frozenset({200, 400}))
    yield Case("picture/nine", post(said(*[image(uri(PICTURE))] * 9, text("?"))), NO)
    yield Case("picture/too large", post(about(PNG + bytes(11 * 2**20 + 2**20 // 2))), frozenset({200, 400, 413}))


def wide_exif() -> bytes:
    """Sixty thousand entries, each of which says that all of the block is its value."""
    entries = b"".join(struct.pack("<HHII", 0x9000 + number % 0x4000, 1, 700_000, 8) for number in range(60_000))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + entries + bytes(4)


BOMBS: dict[str, Callable[[], bytes]] = {
    "rgb": partial(bomb, 2, 8, 3), "clear": partial(bomb, 6, 8, 4), "16 bit": partial(bomb, 0, 16, 1),
    "16 bit rgb": partial(bomb, 2, 16, 3), "one bit": partial(bomb, 0, 1, 1),
    "palette": partial(bomb, 3, 8, 1, PLTE=bytes(768), tRNS=bytes(256)),
    "progressive": partial(encoded, "JPEG", (5000, 5000), progressive=True),
    "cmyk": partial(encoded, "JPEG", (5000, 5000), "CMYK", 0),
}  # fmt: skip


def bombs() -> Iterator[Case]:
    """As large as is allowed: each takes 75 to 200 MB while it is unpacked."""
    for name, make in BOMBS.items():
        yield Case(f"bomb/{name}", post(lambda make=make: about(made(make), max_tokens=1)), frozenset({200}))
        yield Case(f"bomb/{name}, n", post(lambda make=make: about(made(make), max_tokens=1, n=8)), frozenset({200}))


@cache
def made(make: Callable[[], bytes]) -> bytes:
    return make()


def damaged(rng: random.Random) -> Iterator[Case]:
    """Cut, or with bytes changed, for ever."""
    whole = [PNG, JPEG, WEBP, scans(5), *(data for data, _, _ in TAKEN.values())]
    while True:
        data = bytearray(rng.choice(whole))
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.choice((0, 1, 2, 5, 20)) if data else 0):
            data[rng.randrange(len(data))] = rng.choice((0, 255, rng.randrange(256)))
        yield Case("picture/damaged", post(about(bytes(data), max_tokens=1)), frozenset({200, 400}))


# --- urls ------------------------------------------------------------------------------------------------------------


def urls() -> Iterator[Case]:
    hosts = [f"[{address}]" if ":" in address else address for address in HIDDEN]
    more = [
        "/etc/passwd", "file:///etc/passwd", "file://localhost/etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1:11211/_a",
        "cat.png", "../cat.png", "~/.ssh/id_rsa", "//127.0.0.1/", "data:", "data:text/html,<b>", "data:image/png,abc",
        "",
        "data:image/png;base64,!!!!", "data:image/png;base64,iVBORw0KGgo", "blob:null/1", "shards/0.tar#0+100/1.jpg",
        "a.parquet#0/image", "\\\\127.0.0.1\\c$\\a.png", "php://filter/resource=a", "jar:http://127.0.0.1!/a",
        "http:/\\127.0.0.1/",
    ]  # fmt: skip
    for url in chain(*SPELLINGS.values(), (f"http://{host}/a.png" for host in hosts), more):
        yield Case(f"url/{url[:60]!r}", post(said(image(url), text("?"))), NO)


def knocking(port: int) -> Iterator[Case]:
    """Spellings of one port of this machine, behind which somebody listens who should never hear a thing."""
    spelled = ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "017700000001", "[::1]",
    "[::ffff:127.0.0.1]",
               "0.0.0.0", "0", "127.0.0.1.", "images.example.org@127.0.0.1", "127.0.0.1\\@images.example.org",
               "①27.0.0.1"]  # fmt: skip
    for host in spelled:
        for scheme in ("http", "https", "HTTP", "ftp", "gopher"):
            yield Case("url/knocking", post(said(image(f"{scheme}://{host}:{port}/a.png"), text("?"))), NO)


# --- texts -----------------------------------------------------------------------------------------------------------

TEXTS = [
    "{{7*7}}", "{{config}}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include '/etc/passwd' %}", "{# a #}",
    "{{ raise_exception('a') }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "${jndi:ldap://127.0.0.1/a}",
    "<image>", "<image>" * 200, "<IMAGE>", "<|end|>", "<|user|><|assistant|>", "<|im_start|>system", "[INST]", "</s>",
    "<pad>",
    "../../../../etc/passwd", "file:///etc/passwd", "$(id)", "`id`", "; cat /etc/passwd", "' OR 1=1 --",
    "<script>alert(1)</script>",
    "\0", "\x1b[2J", "\u202e\u2066", "\ufeff", "\ud83d\ude00", "\U0001f600" * 500, "a\u0300" * 3000, "\uffff\ufffe",
    "\u2028\u2029",
    "\r\n\r\nHTTP/1.1 200 OK", "data: [DONE]\n\n", "x" * 199_000, "x " * 99_000, " ", "\t\n", "é" * 150_000,
    "字" * 60_000,
]  # fmt: skip


def texts() -> Iterator[Case]:
    for words in TEXTS:
        yield Case(f"text/{words[:30]!r}", post(said(words)), frozenset({200, 400}))
        yield Case(f"text/system {words[:30]!r}", post(with_system(words)), frozenset({200, 400}))
        yield Case(f"text/stop {words[:30]!r}", post(said("a", stop=words)), frozenset({200, 400}))
        yield Case(f"text/streamed {words[:30]!r}", post(said(words, stream=True)), frozenset({200, 400}))
        yield Case(f"text/model {words[:30]!r}", post({**said("a"), "model": words}), frozenset({400, 404}))
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [words, "b"]}}}
        yield Case(f"text/choice {words[:30]!r}", post(said("a", response_format=form)), frozenset({200, 400}))
        yield Case(f"text/look {words[:30]!r}", post({**ASKED_TO_LOOK, "answer": words}, LOOK), frozenset({200, 400}))
    for numbers in (
        {"temperature": 2, "n": 8}, {"temperature": 1e-300}, {"top_p": 0}, {"top_p": 5e-324, "temperature": 2},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1, "n": 8, "temperature": 1}, {"max_tokens": 2**31 - 1, "stop": ["e"]}, {"max_tokens": 1},
        {"stop": ["a"] * 4},
        {"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 0}, {"logprobs": True, "n": 8},
    ):  # fmt: skip
        yield Case(f"text/{numbers}", post(said("is there", **numbers)), frozenset({200}))


def with_system(words: str) -> dict[str, Any]:
    body = said("a")
    return {**body, "messages": [{"role": "system", "content": words}, *body["messages"]]}


# --- all of them -----------------------------------------------------------------------------------------------------


def warm(rng: random.Random) -> list[Case]:
    """Enough of all that takes memory, so that what the allocators keep is kept before one looks."""
    return [*bombs(), *pictures(), *texts(), *of_json(), *islice(damaged(rng), 100), *islice(mutated(rng), 200)]


def cases(rng: random.Random, count: int) -> Iterator[Case]:
    """`count` of them: all that are written down, then changed ones at random; in no order, the slow first."""
    from abuse_lines import changed_bytes, heads, paths, slow

    fixed = [*of_json(), *pictures(), *urls(), *texts(), *paths(), *heads(), *bombs()]
    rng.shuffle(fixed)
    dripping = list(slow())
    rng.shuffle(dripping)
    if count < 5 * (len(fixed) + len(dripping)):
        dripping = dripping[: count // 20]
        fixed = fixed[: count // 2]
    left = count - len(fixed) - len(dripping)
    grown = [
        *islice(mutated(rng), left * 5 // 10), *islice(mixed(rng), left // 10), *islice(damaged(rng), left * 2 // 10),
    ]  # fmt: skip
    grown += islice(changed_bytes(rng), left - len(grown))
    rest = fixed + grown
    rng.shuffle(rest)
    yield from dripping
    yield from rest
