"""Encoders give unit vectors; `pixels` finds copies and keeps strangers apart; CLIP and SigLIP equal transformers."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fakes import save_dual_encoder
from leveret.inputs.resize import prepare
from leveret.model.encoders import ENCODERS, PixelEncoder, TinyEncoder, _stack, load_encoder, precision_of
from leveret.records import TowerView
from leveret.runs import RecipeError


def _scenes(n: int, seed: int = 0) -> list[Image.Image]:
    """Smooth random pictures with a few edges: nothing like each other."""
    random = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        small = Image.fromarray(random.integers(0, 255, (7, 9, 3), dtype=np.uint8))
        image = small.resize((192, 150), Image.Resampling.BICUBIC)
        box = sorted(random.integers(0, 150, 2).tolist()) + sorted(random.integers(0, 150, 2).tolist())
        ImageDraw.Draw(image).rectangle((box[0], box[2], box[1], box[3]), tuple(random.integers(0, 255, 3).tolist()))
        out.append(image)
    return out


def _saved(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _copies(image: Image.Image) -> list[Image.Image]:
    w, h = image.size
    return [
        _saved(image, 30),
        image.resize((w // 2, h // 2)),
        image.resize((2 * w, 2 * h), Image.Resampling.NEAREST),
        image.crop((w // 20, h // 20, w - w // 20, h - h // 20)),
        image.crop((w // 20, 0, w, h)),
        _saved(image.crop((0, 0, w - w // 20, h - h // 20)).resize((w, h)), 40),
    ]


def _lowest_and_highest(images: list[Image.Image]) -> tuple[float, float]:
    encoder = load_encoder("pixels")
    base = encoder.images(images)
    strangers = base @ base.T - 2 * np.eye(len(base), dtype=np.float32)
    lowest = min(
        float((encoder.images(list(copies)) * base).sum(1).min()) for copies in zip(*map(_copies, images), strict=True)
    )
    return lowest, float(strangers.max())


def test_pixels_tell_copies_from_strangers():
    lowest, highest = _lowest_and_highest(_scenes(40))
    assert lowest > 0.70 > highest


def test_pixels_tell_copies_of_photographs_from_strangers(photos: Path):
    images = [Image.open(path).convert("RGB") for path in sorted(photos.glob("*.jpg"))[:100]]
    lowest, highest = _lowest_and_highest(images)
    assert lowest > 0.70 > highest


def test_flat_pictures_have_vectors_too():
    encoder = PixelEncoder()
    colours = ["black", "white", "red", "blue", (128, 128, 128)]
    found = encoder.images([Image.new("RGB", (40, 30), colour) for colour in colours])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert (found @ found.T - np.eye(5)).max() < 0.70
    np.testing.assert_array_equal(found[0], encoder.images([Image.new("RGB", (7, 99), "black")])[0])


def test_a_vector_does_not_depend_on_its_neighbours():
    encoder, images = PixelEncoder(), _scenes(5)
    np.testing.assert_array_equal(encoder.images(images)[3], encoder.images(images[3:4])[0])


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_a_batch_is_prepared_as_each_image_is(resize):
    view = TowerView("v", 48, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), resize)
    images = [*_scenes(3), Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3))]
    np.testing.assert_array_equal(_stack(images, view).numpy(), np.stack([prepare(image, view) for image in images]))


def tiny_scorer() -> TinyEncoder:
    """The world's architecture with random weights and a vocabulary of letters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    from leveret.model.tiny import TinyDualEncoder

    letters = {letter: at for at, letter in enumerate("?abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    torch.manual_seed(0)
    text = {"width": 16, "heads": 2, "length": 12, "vocabulary": 32, "out": 16}
    config = {"size": 32, "widths": [8, 16], "dim": 16, "text": text, "tokenizer": tokenizer.to_str()}
    return TinyEncoder("tiny", TinyDualEncoder(config).eval())


def test_the_worlds_scorer_gives_unit_vectors_in_one_space():
    encoder = tiny_scorer()
    images, texts = encoder.images(_scenes(3)), encoder.texts(["a red box", "", "two"])
    assert images.shape == (3, 16) and texts is not None and texts.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([images, texts]), axis=1), 1, atol=1e-6)
    assert encoder.images([]).shape == (0, 16)
    assert tiny_scorer().fingerprint == encoder.fingerprint


@pytest.mark.parametrize(("kind", "width", "resize"), [("clip", 12, "crop"), ("siglip", 16, "squash")])
def test_clip_and_siglip_equal_transformers(tmp_path, kind, width, resize):
    import torch
    from transformers import AutoModel

    save_dual_encoder(tmp_path, kind)
    encoder = load_encoder(str(tmp_path))
    assert (encoder.width, encoder.view.size, encoder.view.resize, encoder.has_texts) == (width, 32, resize, True)
    images = _scenes(20)  # more than one micro-batch
    found, texts = encoder.images(images), encoder.texts(["a cat", "a longer caption of a dog"])
    model = AutoModel.from_pretrained(tmp_path).eval()
    pixels = torch.from_numpy(np.stack([prepare(image, encoder.view) for image in images]))
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels)
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    np.testing.assert_allclose(found, torch.nn.functional.normalize(expected, dim=1).numpy(), atol=1e-5)
    assert texts is not None and texts.shape == (2, width)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_bf16_is_near_fp32_and_has_the_weights_of_fp32(tmp_path, kind):
    save_dual_encoder(tmp_path, kind)
    whole, halves = load_encoder(str(tmp_path)), load_encoder(str(tmp_path), "cpu", "bf16")
    words = ["a cat", "a longer caption of a dog"]
    for one, two in ((whole.images(_scenes(5)), halves.images(_scenes(5))), (whole.texts(words), halves.texts(words))):
        assert one is not None and two is not None and (one != two).any()
        assert two.dtype == np.float32 and ((one * two).sum(1) > 0.999).all()
    assert whole.fingerprint == halves.fingerprint


def test_which_precision_an_encoder_computes_in(tmp_path, monkeypatch):
    for native in (False, True):
        monkeypatch.setattr("leveret.model.precision.native_bf16", lambda device, native=native: native)
        assert precision_of(str(tmp_path), "cpu", "auto") == ("bf16" if native else "fp32")
        assert precision_of("world/scorer", "cpu", "auto") == "fp32"  # small: bf16 would only add casts
    assert [precision_of("a/b", "cpu", name) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    with pytest.raises(RecipeError, match="computes in fp32"):
        precision_of("pixels", "cpu", "bf16")
    with pytest.raises(RecipeError, match="allowed are auto, fp32 and bf16"):
        precision_of("a/b", "cpu", "fp16")


CUT = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}


@pytest.mark.parametrize(
    ("kind", "said", "view"),
    [
        ("siglip", {"resample": 2}, {"resample": "bilinear"}),
        ("siglip", {"size": {"height": 32, "width": 32}, "crop_size": 224, "resample": 3}, {}),
        ("siglip", {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}, {"mean": (0, 0, 0), "std": (1, 1, 1)}),
        ("siglip", CUT, {"short": 40, "resize": "crop"}),
        ("clip", CUT | {"resample": 2}, {"short": 40, "resample": "bilinear"}),
        ("clip", {"size": 32, "crop_size": 32, "do_center_crop": True}, {}),
        ("clip", {"size": {"height": 32, "width": 32}, "do_center_crop": False}, {"resize": "squash"}),
        ("clip", {"resample": 2}, {"resample": "bilinear"}),
        ("clip", {}, {}),
    ],
)
def test_what_a_processor_says_is_done(tmp_path, kind, said, view):
    """Size, crop, filter, mean and std; what it leaves out is the family's."""
    save_dual_encoder(tmp_path, kind)
    plain = load_encoder(str(tmp_path)).view
    told = {"image_processor_type": f"{kind.upper().replace('SIGLIP', 'Siglip')}ImageProcessor", **said}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    load_encoder.cache_clear()
    encoder = load_encoder(str(tmp_path))
    assert encoder.view == replace(plain, **view)
    images = _scenes(3)
    assert encoder.images(images).shape == (3, encoder.width)


@pytest.mark.parametrize(
    ("kind", "said", "told"),
    [
        ("siglip", {"size": {"height": 48, "width": 48}}, "makes 48 pixels, but the model takes 32 and no other size"),
        ("siglip", {"size": {"height": 32, "width": 24}}, "is no square"),
        ("clip", {**CUT, "crop_size": {"height": 32, "width": 24}}, "crop_size .* is no square"),
        ("clip", {"size": {"shortest_edge": 32}, "do_center_crop": False}, "gives no square"),
        ("clip", {**CUT, "crop_size": {}}, "cannot be read"),
        ("clip", {**CUT, "resample": 5}, "resample is 5"),
        ("clip", {**CUT, "do_resize": False}, "do_resize and do_normalize must be on"),
        ("siglip", {"do_rescale": False}, "do_rescale must be on"),
        ("siglip", {"rescale_factor": 1}, "rescale_factor 1/255"),
        ("siglip", {"image_mean": 0.5}, "cannot be read"),
        ("siglip", "not JSON", "cannot be read"),
    ],
)
def test_what_a_processor_says_and_cannot_be_done_is_refused(tmp_path, kind, said, told):
    save_dual_encoder(tmp_path, kind)
    text = said if isinstance(said, str) else json.dumps(said)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(RecipeError, match=told) as refused:
        load_encoder(str(tmp_path))
    assert "\n" not in str(refused.value) and str(refused.value).startswith("encoder '")


def test_a_naflex_model_is_no_encoder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(RecipeError, match="SigLIP2 of a fixed size"):
        load_encoder(str(tmp_path))


def test_an_unknown_encoder_names_the_closest():
    with pytest.raises(RecipeError, match="Did you mean 'pixels'"):
        load_encoder("pixel")
    with pytest.raises(RecipeError, match="world/scorer"):
        load_encoder("./nowhere")
    assert set(ENCODERS) == {"pixels", "world/scorer"}
