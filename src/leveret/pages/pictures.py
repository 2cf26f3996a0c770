"""Pictures inside a page: as data, no larger than they are shown."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from markupsafe import Markup

from leveret.pages.words import join

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = "bytes | str | Path | Image"
"""An encoded image's bytes, the path of a file, or a PIL image."""

_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}

GOOD = frozenset({"kept", "right", "correct", "yes", "ok", "representative", "pass"})
BAD = frozenset({"dropped", "wrong", "incorrect", "no", "bad", "duplicate", "fail"})


def _data_uri(picture: Picture, side: int) -> tuple[str, int, int]:
    """A data URI no larger than `side` pixels, with the size of what was embedded."""
    from PIL import Image

    if isinstance(picture, (str, Path)):
        picture = Path(picture).read_bytes()
    data = picture if isinstance(picture, bytes) else None
    image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
    if max(image.size) > side or (data is not None and not any(data.startswith(magic) for magic in _MAGIC)):
        image = image.convert("RGB")
        image.thumbnail((side, side))
        data = None
    if data is None:
        stream = io.BytesIO()
        # Drawn and tiny pictures stay exact and small as PNG; photographs would be ten times the size.
        if max(image.size) <= 128:
            image.save(stream, "PNG")
        else:
            image.convert("RGB").save(stream, "JPEG", quality=82)
        data = stream.getvalue()
    kind = next(name for magic, name in _MAGIC.items() if data.startswith(magic))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", image.width, image.height


def _img(picture: Picture, words: str, side: int) -> Markup:
    uri, width, height = _data_uri(picture, side)
    pixel = Markup(' class="pixel"') if max(width, height) <= 128 else ""
    return Markup('<img src="{}" width="{}" height="{}" alt="{}"{} loading="lazy">').format(
        uri, width, height, words, pixel
    )


def thumbnail(picture: Picture, words: str, side: int = 160) -> Markup:
    """A picture by itself, at most `side` pixels wide or high, with the words for who cannot see it."""
    return _img(picture, words, side)


def figure(picture: Picture, caption: str, side: int = 1200) -> Markup:
    """One picture, at most `side` pixels wide or high, with its caption."""
    return Markup('<figure class="picture">{}<figcaption>{}</figcaption></figure>').format(
        _img(picture, caption, side), caption
    )


def gallery(items: Sequence[tuple[Picture, str, str]], side: int = 240) -> Markup:
    """Pictures side by side: (picture, caption, mark). The mark ("kept", "wrong", ...) is shown as a badge; those in
    GOOD and BAD are coloured, and always named too. Line breaks in captions are kept."""
    out = []
    for picture, caption, mark in items:
        tone = "good" if mark.lower() in GOOD else "bad" if mark.lower() in BAD else ""
        badge = Markup('<span class="badge {}">{}</span><br>').format(tone, mark) if mark else ""
        image = _img(picture, caption.split("\n")[0] or "picture", side)
        out.append(
            Markup('<li class="{}"><div class="pic">{}</div><div class="words">{}{}</div></li>').format(
                tone, image, badge, caption
            )
        )
    return Markup('<ul class="gallery">{}</ul>').format(join(out, "\n"))
