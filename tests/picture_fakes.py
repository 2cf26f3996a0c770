"""Pictures and addresses, good and bad, for the tests of what requests name."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image

HOST = "images.example.org"
OPEN = "93.184.215.14"
"""An address of the open net. Nothing is ever sent there: `Fake.dial` leads to a server of this test."""


def encoded(
    form: str, size: tuple[int, int] = (24, 16), mode: str = "RGB", color: Any = "red", **options: Any
) -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size, color).save(sink, form, **options)
    return sink.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


PNG, JPEG, WEBP = encoded("PNG"), encoded("JPEG"), encoded("WEBP")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def png(*parts: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


FRAMES = [Image.new("RGB", (24, 16), color) for color in ("red", "blue", "green")]


def animated(form: str) -> bytes:
    sink = io.BytesIO()
    FRAMES[0].save(
        sink, form, save_all=True, append_images=FRAMES[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    return sink.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


PALETTE = Image.new("P", (24, 16), 0)
PALETTE.putpalette([10, 20, 30] + [0] * 765)


def clear() -> bytes:
    sink = io.BytesIO()
    PALETTE.save(sink, "PNG", transparency=0)
    return sink.getvalue()


def scans(count: int) -> bytes:
    """A JPEG whose last scan comes `count` times more."""
    data = encoded("JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


TAKEN: dict[str, tuple[bytes, tuple[int, int], tuple[int, int, int]]] = {
    "1x1": (encoded("PNG", (1, 1)), (1, 1), (255, 0, 0)),
    "1x1 jpeg": (encoded("JPEG", (1, 1)), (1, 1), (254, 0, 0)),
    "cmyk": (encoded("JPEG", mode="CMYK", color=(0, 0, 0, 0)), (24, 16), (255, 255, 255)),
    "16 bit": (encoded("PNG", mode="I;16", color=0x8012), (24, 16), (128, 128, 128)),
    "clear palette": (clear(), (24, 16), (255, 255, 255)),
    "half clear": (encoded("PNG", mode="RGBA", color=(0, 0, 0, 128)), (24, 16), (127, 127, 127)),
    "turned": (turned(), (16, 24), (254, 0, 0)),
    "animated png": (animated("PNG"), (24, 16), (255, 0, 0)),
    "animated webp": (animated("WEBP"), (24, 16), (255, 0, 0)),
}
"""Unusual, and an image all the same: bytes, size and first pixel as they are seen."""

REFUSED: list[tuple[bytes, str]] = [
    (b"", "empty"),
    (b"hello", "not an image"),
    (b"<html><body>no</body></html>", "not an image"),
    (b" " * 1_000_000, "not an image"),
    (b"<!--" + b"--> " * 500_000, "not an image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "format not allowed"),
    (b"%!PS-Adobe-3.0 EPSF-3.0", "format not allowed"),
    (b"%PDF-1.7", "format not allowed"),
    (encoded("GIF"), "format not allowed"),
    (animated("GIF"), "format not allowed"),
    (encoded("BMP"), "format not allowed"),
    (encoded("TIFF"), "format not allowed"),
    (PNG[:20], "truncated"),
    (JPEG[:20], "truncated"),
    (WEBP[:-4], "truncated"),
    (png(header(0, 5), chunk(b"IDAT", b""), chunk(b"IEND", b"")), "zero size"),
    (png(header(10_000, 10_000), chunk(b"IDAT", b""), chunk(b"IEND", b"")), "too many pixels"),
    (png(header(20_000, 2), chunk(b"IDAT", b""), chunk(b"IEND", b"")), "too many pixels"),
    (png(header(2**31 - 1, 2**31 - 1), chunk(b"IDAT", b""), chunk(b"IEND", b"")), "too many pixels"),
    # The second header is the one that Pillow goes by.
    (png(header(8, 8), header(6000, 6000), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")),
    "too many pixels"),
    (JPEG.replace(struct.pack(">HH", 16, 24), struct.pack(">HH", 5000, 6000)), "too many pixels"),
    (WEBP.replace(struct.pack("<HH", 24, 16), struct.pack("<HH", 6000, 5000)), "too many pixels"),
    (PNG[:33] + chunk(b"abCd", b"") * 20_000 + PNG[33:], "damaged"),
    (PNG[:-12] + chunk(b"abCd", b"") * 20_000 + PNG[-12:], "damaged"),
    (JPEG[:2] + b"\xff\xe0\0\2" * 20_000 + JPEG[2:], "damaged"),
    (JPEG[:2] + b"\xff" * 1_000_000 + JPEG[2:], "damaged"),
    (JPEG[:2] + b"\xff\xe0\0\2" + b"\0" * 1_000_000 + JPEG[2:], "damaged"),
    (scans(200), "damaged"),
    (b"\xff\xd8\xff\xd9", "truncated"),
    (JPEG[:2] + b"\xff\xda\0\2", "damaged"),
]  # fmt: skip
"""What no server should unpack, and the reason it is refused for."""


SPELLINGS = {
    "not a web address": [
        "http://", "https://", "http:///a", "http:images.example.org/a", "http:/images.example.org/a",
        "http://images.example.org@127.0.0.1/", "http://127.0.0.1@images.example.org/", "http://user:pw@images.example.org/",
        "http://@images.example.org/", "http://images.example.org:80@127.0.0.1/", "http://images.example.org%40127.0.0.1/",
        "http://images.example.org\\@127.0.0.1/", "http://127.0.0.1\\@images.example.org/",
        "http:\\\\images.example.org\\a",
        "http://images.example.org\\.evil.net/", "http://images.example.org/\\evil", "http://images.example.org:8080/",
        "http://images.example.org:443/", "https://images.example.org:80/", "https://images.example.org:0/",
        "https://images.example.org:99999/", "https://images.example.org:/", "https://images.example.org:4 43/",
        "https://images.example.org:+443/", "https://images.example.org:-1/", "http://[::1]/", "http://[::ffff:127.0.0.1]/",
        "http://[fe80::1%25eth0]/", "http://[images.example.org]/", "https://images.example.org /a",
        "https://images.example.org/a b", "https://images.example.org/a\r\nHost: evil", "https://images.example.org/\n",
        "https://images.example.org\n", "https://images.example.org\t/", "https://images.exam\tple.org/",
        "https://images.example.org/é", "https://images\u3002example\u3002org/", "https://\u24d8mages.example.org/",
        "https://image\u017f.example.org/", "https://images.example.org\u200b/", "https://images.example.org\0/",
        "https://images.example.org/\0", "https://images.example.org/%zz", "https://images.example.org/%2",
        "https://images.example.org/<svg>", 'https://images.example.org/"', "https://images.example.org/{{7*7}}",
        "https://images.example.org/\udc80", "https://images.example.org/" + "a" * 5000, "https://images%2eexample.org/",
        "https://images_example.org/", "http\u017f://images.example.org/", "https://images.example.org;evil.net/",
        "https://127.0.0.1,images.example.org/", "https://images.example.org?a?b/\\@x",
    ],
    "host not allowed": [
        "http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://017700000001/", "http://0177.0.0.1/",
        "http://0x7f000001/", "http://0x7f.0.0.1/", "http://0x7F.1/", "http://0/", "http://0.0.0.0/", "http://127.000.000.001/",
        "http://169.254.169.254/latest/meta-data/", "http://2852039166/", "http://10.0.0.1/", "http://localhost/",
        "http://127.0.0.1.nip.io/", "http://images.example.org.evil.net/", "http://evilimages.example.org/",
        "http://evil.net/images.example.org", "http://evil.net/?https://images.example.org/", "http://evil.net/#images.example.org",
        "http://evil.net?@images.example.org/", "http://evil.net#@images.example.org/", "http://images.example.org./",
        "http://images.example.org../", "http://.images.example.org/", "http://images..example.org/", "http://example.org/",
        "http://images-example.org/", "http://images.example.org.127.0.0.1/", "http://xn--images-.example.org/",
        "http://metadata.google.internal/", "http://-/", "http://./", "http://a.images.example.org/", "HTTP://EXAMPLE.ORG/",
    ],
}  # fmt: skip
"""URLs that lead nowhere where only HOST is allowed, by the reason they are refused for."""


HIDDEN = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.9",
    "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "168.63.129.16", "192.88.99.1",
    "::", "::1", "fe80::1", "fe80::1%eth0", "2606:4700::1%1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1",
    "ff0e::1",
    "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:93.184.215.14", "::127.0.0.1", "::93.184.215.14", "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::169.254.169.254", "64:ff9b::10.0.0.1", "64:ff9b:1::1", "64:ff9b::a83f:8110",
    "2002:7f00:1::", "2002:a9fe:a9fe::", "2002:5db8:d70e::1", "2001::1", "2001:0:5ef5:79fb:0:59d:a0ff:fe8d",
    "2001:db8::1",
    "2001:10::1", "3fff::1", "100::1", "4000::1", "5f00::1", "", "images.example.org", "127.1", "0x7f.1",
    "2130706433", "[::1]",
]  # fmt: skip
"""Addresses that are not of the open net, or no addresses."""
