"""images.py: what is let in, what is refused and for which reason."""

from __future__ import annotations

import base64
import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leveret import images
from leveret.images import ImageFault, Root, declared_size, decode, load, read_bytes
from leveret.records import ImageRef
from leveret.runs import DataError

RED = (200, 30, 40)


def encoded(form: str, size: tuple[int, int] = (12, 8), mode: str = "RGB", color: Any = RED, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size, color).save(sink, form, **options)
    return sink.getvalue()


def noise(form: str, size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, form, **options)
    return sink.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing of it."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def reason(data: bytes) -> str:
    with pytest.raises(ImageFault) as caught:
        decode(data)
    return caught.value.reason


# --- what is let in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", images.FORMATS)
def test_every_allowed_format_becomes_rgb_of_its_size(form: str) -> None:
    data = encoded(form)
    image = decode(data)
    assert (image.mode, image.size) == ("RGB", (12, 8))
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 8
    assert declared_size(data) == (12, 8)


@pytest.mark.parametrize(
    "data",
    [
        encoded("WEBP", lossless=True),
        encoded("WEBP", mode="RGBA", color=(*RED, 255)),
        encoded("JPEG", progressive=True),
    ],
    ids=["VP8L", "alpha", "progressive"],
)
def test_size_is_known_before_unpacking(data: bytes) -> None:
    assert declared_size(data) == decode(data).size == (12, 8)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(images.FORMATS), st.integers(1, 70), st.integers(1, 70))
def test_declared_size_is_the_decoded_size(form: str, width: int, height: int) -> None:
    data = encoded(form, (width, height))
    assert declared_size(data) == decode(data).size == (width, height)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGBA", (*RED, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("I;16", 0x8012, (128, 128, 128)),
    ],
)
def test_modes_of_png(mode: str, color: Any, expected: tuple[int, int, int]) -> None:
    image = decode(encoded("PNG", mode=mode, color=color))
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == expected


def test_palette_with_transparency_lies_over_white() -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([10, 20, 30, 200, 0, 0] + [0] * 762)
    picture.putpixel((1, 1), 1)
    for transparency in (0, bytes([0, 255])):
        sink = io.BytesIO()
        picture.save(sink, "PNG", transparency=transparency)
        image = decode(sink.getvalue())
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((1, 1)) == (200, 0, 0)


def test_cmyk_jpeg() -> None:
    image = decode(encoded("JPEG", mode="CMYK", color=(0, 255, 255, 0), quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - (255, 0, 0)).max() <= 12


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turn_is_undone(turn: int) -> None:
    upright = Image.new("RGB", (24, 16))
    upright.paste((250, 250, 250), (0, 0, 8, 8))  # a light corner, upper left
    # The inverse of each turn, so that turning as EXIF says gives `upright` back.
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(inverse[turn])) if turn in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = turn
    sink = io.BytesIO()
    stored.save(sink, "JPEG", exif=exif, quality=95)
    image = decode(sink.getvalue())
    assert image.size == (24, 16)
    assert image.getpixel((3, 3))[0] > 200 and image.getpixel((20, 12))[0] < 60  # type: ignore[index]


def test_broken_exif_does_not_cost_the_image() -> None:
    data = encoded("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\xff" * 9)
    assert decode(data).size == (12, 8)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "blue")]
    sink = io.BytesIO()
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:])
    assert decode(sink.getvalue()).getpixel((2, 2)) == (255, 0, 0)


def test_real_photos(photos: Path) -> None:
    for path in sorted(photos.glob("*.jpg"))[:20]:
        with Image.open(path) as pillow:
            expected = np.asarray(pillow.convert("RGB"))
        assert np.array_equal(np.asarray(load(ImageRef(str(path)))), expected)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", images.FORMATS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_cut_files_are_found_out(form: str, kept: float) -> None:
    data = noise(form)
    assert reason(data[: int(len(data) * kept)]) in ("truncated", "damaged")


def test_cut_jpegs_and_pngs_are_called_truncated() -> None:
    for form in ("JPEG", "PNG", "WEBP", "BMP"):
        assert reason(noise(form)[:1500]) == "truncated", form


def test_cut_files_are_found_out_although_someone_told_pillow_to_bear_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert reason(noise("JPEG")[:1500]) == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
        (b"\xff", "not an image"),
        (b"just text", "not an image"),
        (encoded("TIFF"), "format not allowed"),
        (encoded("ICO", (16, 16)), "format not allowed"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "format not allowed"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format not allowed"),
        (b"\0\0\0\x1cftypheic\0\0\0\0", "format not allowed"),
        (png(0, 5), "zero size"),
        (png(100_000, 95_000), "too many pixels"),
        (png(9_000, 9_000), "too many pixels"),
        (png(1, 40_000_000), "too many pixels"),
        (png(20, 20), "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"\xff\xd8\xff", "truncated"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:8]),
)
def test_each_fault_has_its_own_reason(data: bytes, expected: str) -> None:
    assert reason(data) == expected


@pytest.mark.parametrize(("form", "at", "zeros"), [("GIF", 6, 4), ("BMP", 18, 4), ("JPEG", None, 4)])
def test_zero_size_in_other_formats(form: str, at: int | None, zeros: int) -> None:
    data = bytearray(encoded(form))
    at = data.find(b"\xff\xc0") + 5 if at is None else at
    data[at : at + zeros] = bytes(zeros)
    assert reason(bytes(data)) == "zero size"


def test_frame_of_a_gif_larger_than_its_screen_is_still_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(encoded("GIF", (100, 100)))
    data[6:10] = struct.pack("<HH", 1, 1)
    monkeypatch.setattr(images, "MAX_PIXELS", 5000)
    assert reason(bytes(data)) == "too many pixels"


def test_bombs_are_refused_without_a_warning_and_before_any_pixel() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for side in (10_000, 13_000, 16_000):
            assert reason(png(side, side)) == "too many pixels"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(images.FORMATS), st.data())
def test_no_bytes_make_anything_but_an_image_or_a_fault(form: str, data: st.DataObject) -> None:
    blob = bytearray(noise(form, (20, 14)))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(blob) - 1), st.integers(0, 255)), max_size=12)):
        blob[at] = byte
    blob = blob[: data.draw(st.integers(0, len(blob)))]
    try:
        assert decode(bytes(blob)).mode == "RGB"
    except ImageFault as fault:
        assert fault.reason in images.MENDING


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80))
def test_random_bytes_after_every_magic(tail: bytes) -> None:
    for head in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\1\0\0\0WEBPVP8 ", b"GIF89a", b"BM"):
        with pytest.raises(ImageFault):
            decode(head + tail)


def test_warnings_of_pillow_are_errors_and_the_rules_of_others_stay() -> None:
    data = bytearray(noise("PNG"))
    body = b"acTL" + struct.pack(">II", 0, 0)  # "Invalid APNG, will use default PNG image if possible"
    data[33:33] = struct.pack(">I", 8) + body + struct.pack(">I", zlib.crc32(body))
    before = list(warnings.filters)
    assert reason(bytes(data)) == "damaged"
    assert list(warnings.filters) == before


def test_decoding_in_threads_leaves_no_rule_behind() -> None:
    before, results = list(warnings.filters), []
    good, bad = noise("JPEG"), noise("JPEG")[:900]

    def work() -> None:
        for _ in range(20):
            results.append(decode(good).size)
            with pytest.raises(ImageFault):
                decode(bad)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(64, 48)] * 80
    assert list(warnings.filters) == before


def test_texts_are_fixed_and_say_how_to_mend() -> None:
    with pytest.raises(ImageFault) as caught:
        decode(noise("PNG")[:700])
    assert caught.value.exit_code == 3
    assert "0x" not in str(caught.value) and "BytesIO" not in str(caught.value)
    assert images.MENDING["truncated"] in str(caught.value)


# --- where bytes are -----------------------------------------------------------------------------------------------


def test_places_of_bytes(tmp_path: Path) -> None:
    data = noise("PNG")
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "shard.tar").write_bytes(b"x" * 512 + data + b"y" * 100)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    refs = [
        ImageRef(str(tmp_path / "a.png")),
        ImageRef(str(tmp_path / "shard.tar"), "tar", 512, len(data), "a.png"),
        ImageRef(uri, "data"),
    ]
    for ref in refs:
        assert read_bytes(ref) == data
        assert load(ref).size == (64, 48)


def test_faults_of_places(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "big.jpg").touch()
    os.truncate(tmp_path / "big.jpg", images.MAX_BYTES + 1)
    (tmp_path / "short.tar").write_bytes(b"abc")
    expected = {
        ImageRef(str(tmp_path / "none.jpg")): "missing",
        ImageRef(str(tmp_path / "empty.jpg" / "none.jpg")): "missing",
        ImageRef(str(tmp_path / "empty.jpg")): "empty",
        ImageRef(str(tmp_path / "folder.jpg")): "not a file",
        ImageRef(str(tmp_path / "pipe.jpg")): "not a file",
        ImageRef(str(tmp_path / "big.jpg")): "too large a file",
        ImageRef(str(tmp_path / ("n" * 400))): "unreadable",
        ImageRef(str(tmp_path / "short.tar"), "tar", 1, 10): "truncated",
        ImageRef("data:image/png,abc", "data"): "not a data URI",
        ImageRef("data:image/png;base64,@@@", "data"): "not a data URI",
        ImageRef("data:image/png;base64,", "data"): "empty",
    }
    for ref, reason in expected.items():
        with pytest.raises(ImageFault) as caught:
            load(ref)
        assert caught.value.reason == reason
        assert str(ref) in str(caught.value)


# --- the root ------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Root:
    inside = tmp_path / "inside"
    (inside / "deep").mkdir(parents=True)
    (inside / "a.jpg").write_bytes(encoded("JPEG"))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b.jpg").write_bytes(encoded("JPEG"))
    (tmp_path / "inside-not").mkdir()  # shares the first letters of the root's name
    (inside / "link.jpg").symlink_to(tmp_path / "outside" / "b.jpg")
    (inside / "folder").symlink_to(tmp_path / "outside")
    (inside / "twin").symlink_to(tmp_path / "inside-not")
    (inside / "dangling.jpg").symlink_to(tmp_path / "outside" / "none.jpg")
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "ok.jpg").symlink_to(inside / "a.jpg")
    (inside / "same").symlink_to(inside / "deep")
    return Root(inside)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/etc/hosts", "path is absolute"),
        ("C:\\images\\a.jpg", "path is absolute"),
        ("\\\\server\\share\\a.jpg", "path is absolute"),
        ("../outside/b.jpg", "path leaves the root"),
        ("deep/../../outside/b.jpg", "path leaves the root"),
        ("deep/../a.jpg", "path leaves the root"),
        ("deep\\..\\..\\b.jpg", "path leaves the root"),
        ("link.jpg", "path leaves the root"),
        ("dangling.jpg", "path leaves the root"),
        ("folder/b.jpg", "path leaves the root"),
        ("folder/none.jpg", "path leaves the root"),
        ("twin/b.jpg", "path leaves the root"),
        ("https://example.org/a.jpg", "is a URL"),
        ("file:///etc/hosts", "is a URL"),
        ("data:image/png;base64,AAAA", "is a URL"),
        ("", "not a path"),
        ("  ", "not a path"),
        (".", "not a path"),
        ("a\0.jpg", "not a path"),
        ("\ud83d.jpg", "not a path"),
        (None, "not a path"),
        (7, "not a path"),
        ({"path": "a.jpg"}, "not a path"),
    ],
    ids=repr,
)
def test_names_that_lead_out_are_refused(root: Root, name: object, expected: str) -> None:
    with pytest.raises(ImageFault) as caught:
        root.ref(name)
    assert caught.value.reason == expected


@pytest.mark.parametrize("name", ["a.jpg", "./a.jpg", "deep/none.jpg", "ok.jpg", "same/none.jpg", "a b.jpg", "..a.jpg"])
def test_names_inside_are_taken(root: Root, name: str) -> None:
    ref = root.ref(name)
    assert Path(ref.path).parent.resolve().is_relative_to(root.path)
    assert root.name(ref) == str(Path(name))


def test_links_in_a_circle_end_in_a_fault(root: Root) -> None:
    with pytest.raises(ImageFault):
        read_bytes(root.ref("loop"))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "deep", "folder", "a.jpg", "", "link.jpg", "same", "\\", "~"]), max_size=6))
def test_no_name_reads_outside(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    base = tmp_path_factory.getbasetemp() / "names"
    if not base.exists():
        (base / "in" / "deep").mkdir(parents=True)
        (base / "out").mkdir()
        (base / "in" / "folder").symlink_to(base / "out")
        (base / "in" / "link.jpg").symlink_to(base / "out" / "x.jpg")
        (base / "in" / "same").symlink_to(base / "in" / "deep")
    try:
        ref = Root(base / "in").ref("/".join(parts))
    except ImageFault:
        return
    assert Path(os.path.realpath(ref.path)).is_relative_to((base / "in").resolve())


def test_root_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, word in ((tmp_path / "none", "does not exist"), (tmp_path / "file", "is a file")):
        with pytest.raises(DataError, match=word):
            Root(path)
