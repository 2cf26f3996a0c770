"""Bytes -> checked RGB. Every image of every station comes in through here.

    Root(folder).ref("a/b.jpg") -> ImageRef -> read_bytes -> decode -> PIL.Image (RGB, upright)

Nothing about a file is believed before it is checked: its path stays inside one declared folder, its format is on a
short list (Pillow would otherwise reach Ghostscript and friends), and its size is known from the header before any
pixel is unpacked. A file that fails raises `ImageFault` with one of the fixed reasons in `MENDING`: reasons can be
counted, and Pillow's own texts (which have leaked addresses of memory: CVE-2026-22778) never reach a user.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret import cells
from leveret.records import ImageRef
from leveret.runs import DataError

if TYPE_CHECKING:
    from types import ModuleType

    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What is read, by content and not by the name's ending. Of a GIF (and an animated WebP or PNG) the first frame."""

MAX_PIXELS = 50_000_000
"""Pixels of one image, checked before it is unpacked."""

MAX_SIDE = 16_384
"""Longest side. Towers that pad to a square would make 2.5e15 pixels of a strip that is 50,000,000 x 1."""

MAX_BYTES = 64 * 2**20
"""Bytes of one image file."""

MENDING = {
    "not a path": "An image is named by a path relative to the image folder, such as `coco/1.jpg`",
    "is a URL": "Images are never fetched: download them first and name them by relative paths",
    "path is absolute": "Give the path relative to the image folder",
    "path leaves the root": "Name a folder of images that holds everything the data names; `..` and links that lead"
    " outside are refused",
    "missing": "There is no such file: check its name and the image folder",
    "not a file": "Folders, pipes and devices are not read",
    "unreadable": "Check the permissions and the disk",
    "empty": "The file has no bytes: fetch it again",
    "too large a file": f"At most {MAX_BYTES // 2**20} MiB: make it smaller",
    "not an image": f"Its content is none of {', '.join(FORMATS)} (often a web page saved as .jpg): fetch it again",
    "format not allowed": f"Convert it to one of {', '.join(FORMATS)}",
    "zero size": "The image has no pixels: fetch it again",
    "too many pixels": f"At most {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side: scale it down",
    "truncated": "The file ends too early: fetch it again",
    "damaged": "Its content breaks the rules of its format: fetch or encode it again",
    "not embedded": "The table names a file and does not hold its bytes: write it again with the images in it",
    "not a data URI": "The form is data:image/png;base64,...",
}
"""Every reason an image can be refused for, and how to mend it."""


class ImageFault(DataError):
    """An image that is refused.

    reason  a key of `MENDING`, or of the table `mending` was read from: fixed words, fit for counting.
    detail  what was found (sizes, the format), or "". Holds nothing that Pillow said.
    mending what helps, where other limits or reasons than those of `MENDING` hold (`serve.pictures`).
    """

    def __init__(self, reason: str, detail: str = "", where: str = "", mending: str = "") -> None:
        assert mending or reason in MENDING, reason
        self.reason, self.detail, self.mending = reason, detail, mending or MENDING[reason]
        text = f"image {where}: {reason}" if where else f"image refused: {reason}"
        super().__init__(f"{text}{f' ({detail})' if detail else ''}. {self.mending}.")

    def at(self, where: str) -> ImageFault:
        """The same fault with the place in its text."""
        return ImageFault(self.reason, self.detail, where, self.mending)


_NO_PATH = re.compile("[\0\ud800-\udfff]")
_URL = re.compile(r"(?i)(data:|[a-z][a-z0-9+.-]*://)")
_BETWEEN = re.compile("/" if os.sep == "/" else r"[/\\]")
_INSIDE: dict[Any, re.Pattern[str]] = {
    "tar": re.compile(r"(?is)(?P<file>.*?\.tar)#(?P<offset>\d{1,18})\+(?P<length>\d{1,18})/(?P<member>.*)"),
    **{
        kind: re.compile(
            rf"(?is)(?P<file>.*?\.{kind})#(?P<offset>\d{{1,18}})/(?P<member>[^/\[]*)(\[(?P<place>\d{{1,9}})\])?"
        )
        for kind in ("parquet", "arrow")
    },
}
"""How an image is named that lies inside a file."""


# --- where the bytes are -------------------------------------------------------------------------------------------


class Root:
    """The one folder under which images may be named.

    path  absolute, links resolved. `DataError` if it is not a folder.
    """

    def __init__(self, folder: str | Path) -> None:
        given = Path(folder)
        if not given.is_dir():
            what = "is a file" if given.exists() else "does not exist"
            raise DataError(f"the image folder {folder} {what}. Give the folder that the image paths start from.")
        self.path = given.resolve()
        self._inside: dict[str, bool] = {}

    def ref(self, name: object) -> ImageRef:
        """The image that data calls `name`: a relative path with `/` (or, on old lists, `\\`) between its parts.

        An image inside a file is named as `name` names it: `shards/0.tar#512+2303/1.jpg` (first byte, length, member),
        `a.parquet#7/images[1]` (row, column, entry).

        The file need not exist; where it would lie must be inside the folder, links followed. `ImageFault` otherwise.
        """
        if not isinstance(name, str):
            raise ImageFault("not a path", type(name).__name__)
        if not name.strip() or _NO_PATH.search(name):
            raise ImageFault("not a path")
        if ":" in name and _URL.match(name):
            raise ImageFault("is a URL")
        for kind, form in _INSIDE.items() if "#" in name else ():
            if found := form.fullmatch(name):
                told: dict[str, Any] = {key: text for key, text in found.groupdict().items() if text is not None}
                told |= {key: int(told[key]) for key in ("offset", "length", "place") if key in told}
                return replace(self.ref(told.pop("file")), kind=kind, **told)
        # Text in hand, not Path objects: this is asked of every image of every pool, twice.
        if name[0] in "/\\" or name[1:2] == ":":
            raise ImageFault("path is absolute")
        # Lists written on Windows hold backslashes; `..` between them is refused even where `\` is a plain character.
        if ".." in name and ".." in re.split(r"[/\\]", name):
            raise ImageFault("path leaves the root")
        parts = [part for part in _BETWEEN.split(name) if part not in ("", ".")]
        if not parts:
            raise ImageFault("not a path")
        path = os.path.join(self.path, *parts)
        # Folders repeat and files do not: the walk over links is paid once per folder, one lstat per file.
        parent = os.path.dirname(path)
        if parent not in self._inside:
            self._inside[parent] = self._holds(parent)
        if not self._inside[parent] or (os.path.islink(path) and not self._holds(path)):
            raise ImageFault("path leaves the root", "a link leads outside")
        return ImageRef(path)

    def name(self, ref: ImageRef) -> str:
        """The relative POSIX path that data calls `ref`, and where it lies in that file; `ref` takes it back."""
        within = os.path.join(self.path, "")
        if not ref.path.startswith(within):
            raise ValueError(f"{ref.path} is not in {self.path}")
        file = ref.path[len(within) :].replace(os.sep, "/")
        return f"{file}#{ref.inside}" if ref.inside else file

    def _holds(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == str(self.path) or Path(real).is_relative_to(self.path)


def read_bytes(ref: ImageRef) -> bytes:
    """The bytes of an image as they are stored. `ImageFault` if they are missing, empty or too many."""
    try:
        data = _READERS[ref.kind](ref)
    except FileNotFoundError:
        raise ImageFault("missing", where=str(ref)) from None
    except NotADirectoryError:
        raise ImageFault("missing", where=str(ref)) from None
    except OSError as error:
        raise ImageFault("unreadable", os.strerror(error.errno) if error.errno else "", str(ref)) from None
    except ImageFault as fault:
        raise fault.at(str(ref)) from None
    if not data:
        raise ImageFault("empty", where=str(ref))
    return data


def _file_size(path: str) -> int:
    """Looked at before opening: opening a pipe would wait for ever."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ImageFault("not a file")
    return status.st_size


def _read_file(ref: ImageRef) -> bytes:
    if (size := _file_size(ref.path)) > MAX_BYTES:
        raise ImageFault("too large a file", f"{size:,} bytes")
    with open(ref.path, "rb") as handle:
        return handle.read(size)  # a buffer of MAX_BYTES costs more than the reading


def _read_tar(ref: ImageRef) -> bytes:
    if ref.length > MAX_BYTES:
        raise ImageFault("too large a file", f"{ref.length:,} bytes")
    _file_size(ref.path)
    with open(ref.path, "rb") as handle:
        handle.seek(ref.offset)
        data = handle.read(max(ref.length, 0))
    if len(data) < ref.length:
        raise ImageFault("truncated", f"{len(data):,} of {ref.length:,} bytes")
    return data


def _read_data(ref: ImageRef) -> bytes:
    head, comma, body = ref.path.partition(",")
    if not comma or not re.fullmatch(r"(?i)data:[\w.+/-]*;base64", head):
        raise ImageFault("not a data URI")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ImageFault("too large a file", f"{len(body):,} characters of base64")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ImageFault("not a data URI") from None


def _cell(image: Callable[[str, str, int, int], bytes | None]) -> Callable[[ImageRef], bytes]:
    def read(ref: ImageRef) -> bytes:
        _file_size(ref.path)
        try:
            data = image(ref.path, ref.member, ref.offset, ref.place)
        except cells.Unreadable:
            raise ImageFault("damaged") from None
        if data is None:
            raise ImageFault("not embedded")
        if len(data) > MAX_BYTES:
            raise ImageFault("too large a file", f"{len(data):,} bytes")
        return data

    return read


_READERS: dict[str, Callable[[ImageRef], bytes]] = {
    "file": _read_file,
    "tar": _read_tar,
    "parquet": _cell(cells.image),
    "arrow": _cell(cells.mapped_image),
    "data": _read_data,
}


# --- what the bytes are --------------------------------------------------------------------------------------------


def load(ref: ImageRef) -> Image:
    """The image at `ref`: RGB, upright. `ImageFault` (which names the place) if it is refused."""
    data = read_bytes(ref)
    try:
        return decode(data)
    except ImageFault as fault:
        raise fault.at(str(ref)) from None


def decode(data: bytes) -> Image:
    """Unpack an image: mode RGB, EXIF turn applied, transparency laid over white, 16-bit greys scaled to 8 bits.

    Grey, palette and CMYK images are converted. `ImageFault` if the bytes are refused.
    """
    with _opened(data) as image:
        image.load()
        return as_rgb(image)


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) of what `decode` would give: of the first frame, after the EXIF turn. Only a GIF is unpacked (and
    a PNG, unless it says first how it lies). `ImageFault` if the bytes are refused so far."""
    with _opened(data) as image:
        if image.format == "GIF":
            image.load()
        width, height = image.size
        try:
            turn = image.getexif().get(0x0112, 1)
        except Exception:  # as in `_upright`
            turn = 1
    return (height, width) if turn in (5, 6, 7, 8) else (width, height)


def opened_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels as Pillow reads the header, before the EXIF turn; nothing is unpacked. Another size
    than `declared_size` only where a file has two headers. `ImageFault` if the bytes are refused so far."""
    with _opened(data) as image:
        return image.size


@contextmanager
def _opened(data: bytes) -> Iterator[Image]:
    """The image with its size checked and nothing unpacked; what Pillow raises, also later on, becomes a fault."""
    _check_size(declared_size(data))
    from io import BytesIO

    from PIL import Image as pil

    with _strict:
        try:
            with pil.open(BytesIO(data), formats=FORMATS) as image:
                # Once more: the first frame of a GIF may be larger than the screen that its header declares.
                _check_size(image.size)
                yield image
        except (MemoryError, ImageFault):
            raise
        except (pil.DecompressionBombError, pil.DecompressionBombWarning):
            raise ImageFault("too many pixels") from None
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
            raise _broken(error) from None


def form_of(data: bytes) -> str:
    """Which of `FORMATS` an image's first bytes are of. `ImageFault` if of none."""
    if not data:
        raise ImageFault("empty")
    head = data[:4096]  # blanks and comments before an <svg> have no end
    form = next((form for form, magic in _MAGIC if magic.match(head)), None)
    if form is None:
        raise ImageFault("not an image")
    if form not in FORMATS:
        raise ImageFault("format not allowed", form)
    return form


def declared_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels as the header says, before the EXIF turn; nothing is unpacked. `ImageFault` if none."""
    form = form_of(data)
    try:
        return _SIZES[form](data)
    except (struct.error, IndexError):
        raise ImageFault("truncated", form) from None


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageFault("zero size", f"{width} x {height}")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageFault("too many pixels", f"{width} x {height}")


def _broken(error: Exception) -> ImageFault:
    # The words are read here and go no further.
    return ImageFault("truncated" if "truncated" in str(error).lower() else "damaged")


_MAGIC: tuple[tuple[str, re.Pattern[bytes]], ...] = tuple(
    (form, re.compile(pattern, re.DOTALL))
    for form, pattern in (
        ("JPEG", rb"\xff\xd8\xff"),
        ("PNG", rb"\x89PNG\r\n\x1a\n"),
        ("WEBP", rb"RIFF....WEBP"),
        ("GIF", rb"GIF8[79]a"),
        ("BMP", rb"BM.{12}"),
        # Known, and refused by name: a better word for the reader than "not an image".
        ("TIFF", rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]"),
        ("AVIF", rb"....ftypavi[fs]"),
        ("HEIC", rb"....ftyp(hei[cfmsx]|hev[cx]|mif1|msf1)"),
        ("JPEG 2000", rb"\0\0\0\x0cjP  \r\n|\xff\x4f\xff\x51"),
        ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL "),
        ("ICO", rb"\0\0[\1\2]\0[^\0]"),
        ("PSD", rb"8BPS"),
        ("EPS", rb"%!PS|\xc5\xd0\xd3\xc6"),
        ("PDF", rb"%PDF"),
        ("SVG", rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg[\s>]"),
    )
)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walks the segments to the frame header (SOF0..SOF15 without DHT, JPG and DAC)."""
    at = 2
    while True:
        if (at := data.find(b"\xff", at)) < 0:  # bytes between segments are padding
            raise IndexError
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
        if marker == 0xDA:
            raise ImageFault("damaged", "JPEG without a frame header")
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:  # these have no length
            at += max(2, struct.unpack_from(">H", data, at)[0])


def _webp_size(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise ImageFault("truncated", "WEBP")
    kind = data[12:16]
    if kind == b"VP8X":
        low, high = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return low, high
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ImageFault("damaged", "WEBP of an unknown kind")


def _bmp_size(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:  # OS/2's header
        width, height = struct.unpack_from("<HH", data, 18)
        return width, height
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)  # a negative height means rows from the top


def _pair(form: str, at: int) -> Callable[[bytes], tuple[int, int]]:
    def read(data: bytes) -> tuple[int, int]:
        width, height = struct.unpack_from(form, data, at)
        return width, height

    return read


_SIZES: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "JPEG": _jpeg_size,
    "PNG": _pair(">II", 16),
    "WEBP": _webp_size,
    "GIF": _pair("<HH", 6),
    "BMP": _bmp_size,
}


def as_rgb(image: Image) -> Image:
    """An open image as every station sees it: RGB, EXIF turn applied, transparency over white, 16-bit greys scaled."""
    from PIL import Image as pil

    return _rgb(_upright(image, pil), pil)


def _upright(image: Image, pil: ModuleType) -> Image:
    try:
        turn = image.getexif().get(0x0112, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels: the image is taken as it lies
        return image
    flips = pil.Transpose
    turns = {
        2: flips.FLIP_LEFT_RIGHT,
        3: flips.ROTATE_180,
        4: flips.FLIP_TOP_BOTTOM,
        5: flips.TRANSPOSE,
        6: flips.ROTATE_270,
        7: flips.TRANSVERSE,
        8: flips.ROTATE_90,
    }
    return image.transpose(turns[turn]) if turn in turns else image


def _rgb(image: Image, pil: ModuleType) -> Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which makes nearly every 16-bit image white.
        import numpy as np

        return pil.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return pil.alpha_composite(pil.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class _Strict:
    """While any thread decodes, Pillow's warnings are errors and its tolerance of cut files is off.

    `warnings.catch_warnings` is no help here: two threads that overlap in it can leave each other's rules behind.

    Two warnings are about what lies beside the pixels and are silenced: a broken EXIF block (its reader is Pillow's
    TIFF plugin; TIFF files themselves are refused), and the second picture some phones hang behind a whole JPEG.
    """

    RULES: tuple[dict[str, Any], ...] = (
        {"action": "error", "module": r"PIL\."},
        {"action": "ignore", "module": r"PIL\.TiffImagePlugin"},
        {"action": "ignore", "module": r"PIL\.JpegImagePlugin", "message": r".*malformed MPO"},
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._rules: list[Any] = []
        self._tolerant = False

    def __enter__(self) -> None:
        from PIL import ImageFile

        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._rules = []
                for rule in self.RULES:
                    warnings.filterwarnings(**rule)
                    self._rules.append(warnings.filters[0])
                self._tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False

    def __exit__(self, *_: object) -> None:
        from PIL import ImageFile

        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._tolerant
                for rule in self._rules:
                    if rule in warnings.filters:
                        warnings.filters.remove(rule)  # type: ignore[attr-defined]


_strict = _Strict()
