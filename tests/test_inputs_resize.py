"""The picture a tower sees: equal to the originals' processors, and sane for any picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leveret.inputs import resize
from leveret.inputs.resize import fit, prepare
from leveret.records import TowerView

SIGLIP = TowerView("siglip", 56)
CLIP = TowerView(
    "clip",
    56,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    resize="crop",
)
SIZES = [(56, 56), (64, 48), (48, 64), (333, 57), (57, 333), (20, 31), (1, 300), (300, 1), (113, 113), (57, 56)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def expand2square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """LLaVA's function, as published (llava/mm_utils.py)."""
    width, height = image.size
    if width == height:
        return image
    if width > height:
        result = Image.new(image.mode, (width, width), colour)
        result.paste(image, (0, (width - height) // 2))
        return result
    result = Image.new(image.mode, (height, height), colour)
    result.paste(image, ((height - width) // 2, 0))
    return result


def of_transformers(image: Image.Image, view: TowerView) -> np.ndarray:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    resample = Image.Resampling[view.resample.upper()]
    common = {"image_mean": list(view.mean), "image_std": list(view.std), "resample": resample}
    if view.resize == "crop":
        crop = {"height": view.size, "width": view.size}
        processor = CLIPImageProcessorPil(size={"shortest_edge": view.size}, crop_size=crop, **common)
    else:
        processor = SiglipImageProcessorPil(size={"height": view.size, "width": view.size}, **common)
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_squash_and_crop_equal_transformers_to_the_last_bit(size: tuple[int, int], resample: str) -> None:
    for view in (SIGLIP, CLIP):
        view = replace(view, resample=resample)
        ours = prepare(noise(*size), view)
        assert ours.dtype == np.float32 and ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, of_transformers(noise(*size), view))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("view", [SIGLIP, CLIP], ids=lambda v: v.name)
def test_pad_equals_llava_then_the_processor(size: tuple[int, int], view: TowerView) -> None:
    image = noise(*size)
    squared = expand2square(image, tuple(int(255 * m) for m in view.mean))
    np.testing.assert_array_equal(prepare(image, replace(view, resize="pad")), of_transformers(squared, view))


def test_photos_equal_transformers(photos: Path) -> None:
    for path in sorted(photos.glob("*.jpg"))[:6]:
        image = Image.open(path).convert("RGB")
        for view in (replace(SIGLIP, size=384), replace(CLIP, size=224)):
            np.testing.assert_array_equal(prepare(image, view), of_transformers(image, view))


def test_every_value_is_normalised_as_transformers_does() -> None:
    """The float32 division by 255 equals transformers' float64 product for all 256 values."""
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3))
    for view in (replace(SIGLIP, size=16), replace(CLIP, size=16)):
        np.testing.assert_array_equal(prepare(ramp, view), of_transformers(ramp, view))


def test_an_image_of_the_towers_size_is_not_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(56, 56)
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("resized"))
    for kind in ("squash", "pad", "crop", "centre", "letterbox"):
        assert fit(image, replace(SIGLIP, resize=kind)) is image


def test_pad_puts_the_odd_pixel_below_and_keeps_the_mean_colour() -> None:
    image = Image.new("RGB", (5, 2), (255, 0, 0))
    seen = np.asarray(fit(image, TowerView("t", 5, resize="pad", resample="nearest")))
    rows = [tuple(row[0]) for row in seen.tolist()]
    grey = (127, 127, 127)
    assert [tuple(p) for p in rows] == [grey, (255, 0, 0), (255, 0, 0), grey, grey]


def test_crop_keeps_the_centre() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    seen = np.asarray(fit(Image.fromarray(pixels), TowerView("t", 10, resize="crop")))
    assert seen.shape == (10, 10, 3) and (seen == 255).all()


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    size=st.integers(1, 70),
    kind=st.sampled_from(["squash", "pad", "crop", "centre", "letterbox"]),
    more=st.integers(0, 9),
    clip=st.booleans(),
)
def test_any_picture_gives_finite_values_in_range(
    width: int, height: int, size: int, kind: str, clip: bool, more: int
) -> None:
    view = replace(CLIP if clip else SIGLIP, size=size, resize=kind, short=size + more)
    pixels = prepare(noise(width, height), view)
    assert pixels.shape == (3, size, size) and pixels.dtype == np.float32 and np.isfinite(pixels).all()
    for channel, mean, std in zip(pixels, view.mean, view.std, strict=True):
        assert channel.min() >= (0 - mean) / std - 1e-6 and channel.max() <= (1 - mean) / std + 1e-6


@pytest.mark.parametrize("kind", ["squash", "pad", "crop", "centre", "letterbox"])
@pytest.mark.parametrize("size", [(40_000, 2), (1, 30_000)])
def test_ribbons_do_not_ask_for_gigabytes(kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original, new = Image.Image.resize, Image.new

    def resize_(self: Image.Image, to: tuple[int, int], *args: object, **kw: object) -> Image.Image:
        nonlocal largest
        largest = max(largest, to[0] * to[1])
        return original(self, to, *args, **kw)

    def new_(mode: str, to: tuple[int, int], *args: object) -> Image.Image:
        nonlocal largest
        largest = max(largest, to[0] * to[1])
        return new(mode, to, *args)

    image = Image.new("RGB", size, (10, 200, 30))
    monkeypatch.setattr(Image.Image, "resize", resize_)
    monkeypatch.setattr(Image, "new", new_)
    seen = np.asarray(fit(image, TowerView("t", 32, resize=kind)))
    assert seen.shape == (32, 32, 3) and largest <= resize.LARGEST_CANVAS
    assert (np.abs(seen[16, 16].astype(int) - (10, 200, 30)) <= (255 if kind in ("pad", "letterbox") else 0)).all()


def test_the_bounded_paths_agree_with_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((60, 900, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, 900).astype(np.uint8)
    image = Image.fromarray(pixels)
    for kind, tolerance in (("crop", 1), ("centre", 1), ("pad", 12), ("letterbox", 12)):
        view = TowerView("t", 32, resize=kind)
        exact = np.asarray(fit(image, view)).astype(int)
        monkeypatch.setattr(resize, "LARGEST_CANVAS", 1000)
        bounded = np.asarray(fit(image, view)).astype(int)
        monkeypatch.undo()
        assert np.abs(exact - bounded).mean() <= tolerance


@pytest.mark.parametrize("size", SIZES)
def test_a_short_side_longer_than_the_cut_equals_transformers(size: tuple[int, int]) -> None:
    """DINOv2's 256 and 224: also for an image that has the cut's size already."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    view = replace(CLIP, short=62)
    common = {"image_mean": list(view.mean), "image_std": list(view.std), "resample": Image.Resampling.BICUBIC}
    processor = BitImageProcessorPil(size={"shortest_edge": 62}, crop_size={"height": 56, "width": 56}, **common)
    theirs = np.asarray(processor(noise(*size), return_tensors="np")["pixel_values"][0])
    np.testing.assert_array_equal(prepare(noise(*size), view), theirs)


def test_the_two_ways_to_halve_an_odd_remainder() -> None:
    """transformers rounds down, torchvision to the even side: 3 spare pixels give 1 and 2, 1 spare pixel 0 and 0."""
    for spare, lefts in ((3, {"crop": 1, "centre": 2}), (1, {"crop": 0, "centre": 0}), (5, {"crop": 2, "centre": 2})):
        image = Image.fromarray(np.arange(8 + spare, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2))
        for kind, left in lefts.items():
            assert int(np.asarray(fit(image, TowerView("t", 8, resize=kind)))[0, 0, 0]) == left


def test_letterbox_drops_half_pixels() -> None:
    """5 x 2 becomes 5 x 4, one row short of square: scaled to 5 on the short side, one column is cut off."""
    image = Image.new("RGB", (5, 2), (255, 0, 0))
    seen = np.asarray(fit(image, TowerView("t", 4, resize="letterbox", resample="nearest")))
    assert seen.shape == (4, 4, 3)
    assert [tuple(row[0]) for row in seen.tolist()] == [(127,) * 3, (255, 0, 0), (255, 0, 0), (127,) * 3]


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="short of siglip: 50 is below its size, 56"):
        fit(noise(3, 4), replace(SIGLIP, resize="crop", short=50))
    with pytest.raises(ValueError, match="stretch"):
        fit(noise(3, 4), replace(SIGLIP, resize="stretch"))
    with pytest.raises(ValueError, match="lanczos"):
        fit(noise(3, 4), replace(SIGLIP, resample="lanczos"))


def test_grey_and_alpha_become_rgb() -> None:
    assert prepare(Image.new("L", (9, 7), 128), SIGLIP).shape == (3, 56, 56)
    assert prepare(Image.new("RGBA", (9, 7)), SIGLIP).shape == (3, 56, 56)
