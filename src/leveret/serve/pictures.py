"""A picture that a request names -> checked bytes, as an `ImageRef`.

    data:image/png;base64,...   decoded strictly; what the bytes are decides, not what the URI calls them
    https://host/cat.jpg        fetched only from hosts on the server's own list (`outside`)

Paths, `file:` and every other scheme are refused: no request names a place on this machine. What comes back holds its
bytes, is a JPEG, PNG or WebP by its content, and says a size within the limits in its header; unpacking stays with
`leveret.images`, which looks once more. A refusal is an `ImageFault` with fixed words, fit for the client.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from leveret import images
from leveret.images import ImageFault
from leveret.records import ImageRef
from leveret.runs import RecipeError
from leveret.serve import outside

FORMATS = ("JPEG", "PNG", "WEBP")
"""Fewer than from one's own disk: those that pages and phones send. Of an animated one the first frame counts."""

_DATA = re.compile(
    r"data:(?P<type>[a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,80})(?P<rest>[^,]{0,200}),", re.ASCII | re.IGNORECASE
)
_TYPES = ("image/jpeg", "image/jpg", "image/png", "image/webp")

MOST_SCANS = 100
"""Of one JPEG; ten are usual. One scan of 50 bytes goes over all pixels once more (10 ms of 25 million), and 12 MB of
them are an hour's work: the bomb that no header tells of."""

MOST_PARTS = 16_384
"""Segments of a JPEG, chunks of a PNG. Pillow walks them in Python, holding up every other request: 12 MB of empty ones
take some 5 s. A PNG of that size as libpng writes it has 1,500."""

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)

_MENDING = {
    "damaged": "It breaks the rules of its format or is needlessly cut to pieces: save it once more",
    "truncated": "The file ends too early",
    "zero size": "The image has no pixels",
    "empty": "There are no bytes",
    "not a data URI": "The form is data:image/png;base64,... with padded standard base64, no blanks and no line ends",
    "type not allowed": "Send it as image/jpeg, image/png or image/webp",
    "scheme not allowed": "Send the image itself, as a data URI (data:image/png;base64,...)",
    "format not allowed": f"Send it as one of {', '.join(FORMATS)}",
    "not an image": f"Its content is none of {', '.join(FORMATS)}",
}


@dataclass(frozen=True, slots=True)
class Rules:
    """What a server takes. Made once, when it starts; `RecipeError` for values that mean nothing.

    domains     hosts that images may be fetched from, as `--allow-domain` gives them: `images.example.org`, or
                `*.example.org` for all names below it. None: only data URIs.
    max_bytes   of one image's file.
    max_pixels  of one image. The default is half of what is read from one's own disk: a PNG of one colour with so many
                pixels has 25 kB, and takes 100 MB while it is unpacked.
    max_side    pixels of the longer side.
    seconds     for one fetch: lookup, connection, TLS and every byte, all together.
    """

    domains: tuple[str, ...] = ()
    max_bytes: int = 12 * 2**20
    max_pixels: int = 25_000_000
    max_side: int = images.MAX_SIDE
    seconds: float = 5.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", tuple(dict.fromkeys(outside.domain(entry) for entry in self.domains)))
        for name, most in (
            ("max_bytes", images.MAX_BYTES),
            ("max_pixels", images.MAX_PIXELS),
            ("max_side", images.MAX_SIDE),
        ):
            if not 1 <= getattr(self, name) <= most:
                raise RecipeError(f"{name} {getattr(self, name)} of an image: between 1 and {most:,}.")
        if not 0 < self.seconds <= 600:
            raise RecipeError(f"{self.seconds} s for fetching an image: more than 0, at most 600.")


def picture(url: object, rules: Rules, net: outside.Net = outside.NET) -> ImageRef:
    """The picture that a request's `image_url.url` names; the reference holds its bytes (`kind` "data").

    Waits for the net up to `rules.seconds` where `url` is a web address: call it in a thread. Raises `ImageFault`.
    """
    if not isinstance(url, str):
        raise _refused("not a data URI")
    if url[:5].lower() == "data:":
        data = _decoded(url, rules)
    elif re.match("https?:", url[:6], re.IGNORECASE):
        data = outside.fetch(url, rules.domains, most=rules.max_bytes, seconds=rules.seconds, net=net)
    else:
        raise _refused("scheme not allowed")
    form = _check(data, rules)
    if url.startswith(f"data:image/{form.lower()};base64,"):
        return ImageRef(url, kind="data")
    return ImageRef(f"data:image/{form.lower()};base64,{base64.b64encode(data).decode('ascii')}", kind="data")


def _decoded(url: str, rules: Rules) -> bytes:
    head = _DATA.match(url)
    if head is None or head["rest"].lower() != ";base64":
        raise _refused("not a data URI")
    if head["type"].lower() not in _TYPES:
        raise _refused("type not allowed")
    length = len(url) - head.end()
    if length > -(-rules.max_bytes // 3) * 4:
        raise _too_large(rules)
    try:
        data = base64.b64decode(url[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise _refused("not a data URI") from None
    if len(data) > rules.max_bytes:
        raise _too_large(rules)
    return data


def _check(data: bytes, rules: Rules) -> str:
    """The format's name. Looks at the header as we read it and as Pillow does: files with two headers exist."""
    try:
        form = images.form_of(data)
        if form not in FORMATS:
            raise ImageFault("format not allowed", form)
        _WALKS.get(form, len)(data)
        for size in (images.declared_size, images.opened_size):
            width, height = size(data)
            if width * height > rules.max_pixels or max(width, height) > rules.max_side:
                raise ImageFault("too many pixels", f"{width} x {height}")
    except ImageFault as fault:
        mending = {
            **_MENDING,
            "too many pixels": f"At most {rules.max_pixels:,} pixels and {rules.max_side:,} a side: scale it down",
        }.get(fault.reason, "")
        raise ImageFault(fault.reason, fault.detail, mending=mending) from None
    return form


def _walk_jpeg(data: bytes) -> None:
    """Counts what makes work. ImageFault."""
    at, scans, parts = 2, 0, 0
    while (marker := _MARKER.search(data, at)) is not None:
        parts += 1
        if parts > MOST_PARTS or (not scans and marker.start() - at > MOST_PARTS):
            raise ImageFault("damaged", "JPEG of too many parts")
        kind, at = data[marker.end() - 1], marker.end()
        if kind == 0xD9:
            return
        if kind == 0xDA and (scans := scans + 1) > MOST_SCANS:
            raise ImageFault("damaged", "JPEG of too many scans")
        if kind not in (0x01, 0xD8):  # these have no length
            at += max(2, int.from_bytes(data[at : at + 2], "big"))


def _walk_png(data: bytes) -> None:
    at, parts = 8, 0
    while at + 8 <= len(data):
        parts += 1
        if parts > MOST_PARTS:
            raise ImageFault("damaged", "PNG of too many parts")
        at += 12 + struct.unpack_from(">I", data, at)[0]


_WALKS: dict[str, Callable[[bytes], object]] = {"JPEG": _walk_jpeg, "PNG": _walk_png}


def _refused(reason: str) -> ImageFault:
    return ImageFault(reason, mending=_MENDING[reason])


def _too_large(rules: Rules) -> ImageFault:
    return ImageFault("too large a file", mending=f"At most {rules.max_bytes:,} bytes: make it smaller")
