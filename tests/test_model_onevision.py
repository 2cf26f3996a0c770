"""LLaVA-OneVision's tiles (anyres_max_N): large images are scaled down once more, behind the connector. Against
transformers' own processor, class and folders, and through the rooms they pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fakes import LLAMA, SIGLIP, loud
from leveret.cli import run
from leveret.generate.engine import Engine, Request
from leveret.generate.model import reference
from leveret.inputs import prepare_all
from leveret.model import checkpoint, peers
from leveret.model.build import build, build_meta
from leveret.model.peers.write import write
from leveret.model.recipe import TilesRecipe
from leveret.records import IMAGE_MARK, ImageSpec, Tiling, Turn
from leveret.runs import DataError, RecipeError
from test_model_hfllava import tokenizer_of
from test_model_tiles import noise, original, rows_of, tiled
from train_fakes import recipe as stage_of
from train_fakes import toy_set

SIDE, CELLS, LIMIT = 32, 4, 3
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows in range(1, 7) for columns in range(1, 7)]
SIZES = [(70, 40), (40, 70), (64, 64), (3, 5), (300, 61), (33, 200), (190, 180), (128, 90), (500, 20), (96, 100)]
"""(width, height): some fill at most three tiles' tokens, most fill more."""


def toy(place: Path, tower: str = "siglip", chat: str = "chatml_direct", **more: Any) -> tuple[Any, Any, Path]:
    """(transformers' own toy LLaVA-OneVision, its processor, the folder of what both saved)."""
    from transformers import (
        CLIPVisionConfig,
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    torch.manual_seed(0)
    tokenizer, clip = tokenizer_of(chat), tower == "clip"
    vision = (CLIPVisionConfig if clip else SiglipVisionConfig)(**(SIGLIP | {"patch_size": SIDE // CELLS}))
    text = Qwen2Config(**(LLAMA | {"vocab_size": len(tokenizer) + 5, "max_position_embeddings": 2048}))
    strategy = "default" if clip else "full"
    config = LlavaOnevisionConfig(**{
        "vision_config": vision, "text_config": text, "image_grid_pinpoints": PINPOINTS,
        "vision_feature_select_strategy": strategy, "vision_aspect_ratio": f"anyres_max_{LIMIT}",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"), **more,
    })  # fmt: skip
    model = loud(LlavaOnevisionForConditionalGeneration(config)).eval()
    torch.nn.init.normal_(model.model.image_newline, std=0.5)
    images = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = object.__new__(LlavaOnevisionProcessor)  # its video part needs torchvision; pictures do not
    processor.image_processor, processor.num_image_tokens = images, CELLS**2 + clip
    processor.vision_feature_select_strategy = strategy
    processor.vision_aspect_ratio = config.vision_aspect_ratio
    folder = place / "onevision"
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, processor, folder


def their_count(processor: Any, height: int, width: int) -> int:
    """How many positions their processor leaves for an image."""
    count = processor._get_number_of_features(height, width, SIDE, SIDE)
    return int(count) - (processor.vision_feature_select_strategy == "default")


def limited(**more: Any) -> Any:
    return tiled(**({"grids": "6x6", "limit": LIMIT} | more))


# --- counts -----------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([(384, 27, 9), (384, 27, 4), (32, 4, 3), (336, 24, 1)])
)
@example(384 * 6, 384 * 6, (384, 27, 9))
@example(1152, 1152, (384, 27, 9))
@example(1, 4000, (384, 27, 9))
@settings(deadline=None, max_examples=300)
def test_token_counts_are_transformers(height: int, width: int, sizes: tuple[int, int, int]) -> None:
    from transformers import LlavaOnevisionProcessor

    size, cells, limit = sizes
    grids = [[rows * size, columns * size] for rows in range(1, 7) for columns in range(1, 7)]
    processor: Any = object.__new__(LlavaOnevisionProcessor)
    processor.image_processor = type("Images", (), {"image_grid_pinpoints": grids})
    processor.num_image_tokens, processor.vision_aspect_ratio = cells**2, f"anyres_max_{limit}"
    tiling = Tiling(size, cells, tuple((a, b) for a, b in grids), limit=limit)
    expected = processor._get_number_of_features(height, width, size, size)
    assert tiling.count(height, width) == expected <= tiling.most
    if tiling.shrunk(height, width) is None:
        assert len(tiling.layout(height, width)) == expected


def test_the_most_is_reached_and_no_more_than_the_limit_and_a_fifth() -> None:
    grids = tuple((rows * 384, columns * 384) for rows in range(1, 7) for columns in range(1, 7))
    tiling = Tiling(384, 27, grids, limit=9)
    assert 10 * 27**2 < tiling.most < 27**2 * (1 + 9 * 1.21) + 6 * 27
    assert replace(tiling, limit=0).most == 37 * 27**2 + 6 * 27
    assert ImageSpec.from_dict(json.loads(json.dumps(ImageSpec((), 729, tiling).to_dict()))).tiling == tiling


@pytest.mark.parametrize("more", [{"limit": -1}, {"limit": 2, "merge": "flat"}, {"limit": 2, "merge": "spatial"}])
def test_limits_that_are_none(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="limit"):
        Tiling(32, 4, ((32, 32),), **more)
    with pytest.raises(ValueError, match="limit"):
        TilesRecipe(**more)


def test_grids_in_short() -> None:
    assert TilesRecipe(grids="2x3").grids == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]  # type: ignore[arg-type]
    for odd in ("0x3", "x", "6", "2x-1", "2 x 3 x 4", "100x100"):
        with pytest.raises(ValueError, match="grids"):
            TilesRecipe(grids=odd)  # type: ignore[arg-type]


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tower", "layer"), [("siglip", -1), ("siglip", -2), ("clip", -2)])
@torch.no_grad()
def test_pixels_features_logits_and_answers_are_transformers(tower: str, layer: int, tmp_path: Path) -> None:
    model, processor, folder = toy(tmp_path, tower, vision_feature_layer=layer)
    vlm = peers.load(folder)
    tiling = vlm.spec.tiling
    assert isinstance(tiling, Tiling) and tiling.limit == LIMIT and [list(grid) for grid in tiling.grids] == PINPOINTS
    model.generation_config.eos_token_id = vlm.language.generation_config.eos_token_id = None
    token, held = model.config.image_token_id, []
    for width, height in SIZES:
        image = noise(width, height)
        theirs = processor.image_processor(image, return_tensors="pt")
        ours = prepare_all(image, vlm.spec)["vision"]
        np.testing.assert_array_equal(ours, theirs["pixel_values"][0][: len(ours)].numpy())
        batch = rows_of(vlm, [image])
        packed = model.get_image_features(theirs["pixel_values"], theirs["image_sizes"]).pooler_output[0]
        assert vlm.tiles is not None
        features = vlm.tiles(vlm.connector(vlm.see(batch.pixels)), batch.tile_image, batch.image_sizes)
        torch.testing.assert_close(features, packed, atol=1e-5, rtol=0)
        assert len(features) == vlm.spec.count(height, width) == their_count(processor, height, width)
        held.append(tiling.shrunk(height, width))
        given = {key: theirs[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
        given["input_ids"] = batch.input_ids.masked_fill(batch.image_mask, token)
        expected = model(**given).logits
        torch.testing.assert_close(vlm(batch, logits="all").logits, expected, atol=1e-5, rtol=0)
        said = model.generate(**given, do_sample=False, max_new_tokens=6, pad_token_id=0)
        found = vlm.generate(batch, do_sample=False, max_new_tokens=6, pad_token_id=0)
        assert found[0].tolist() == said[0, batch.input_ids.shape[1] :].tolist()
    assert None in held and len({one for one in held if one}) > 2  # both kinds were among them


@torch.no_grad()
def test_several_images_of_several_shapes_in_one_batch() -> None:
    """Large and small ones, a row without: each row alone gives the same."""
    vlm = build(limited())
    rows: list[list[Image.Image]] = [[noise(*SIZES[6]), noise(*SIZES[3])], [], [noise(*size) for size in SIZES[:3]]]
    for side in ("right", "left"):
        together = vlm(rows_of(vlm, *rows, side=side), logits="last").logits
        for number, row in enumerate(rows):
            alone = vlm(rows_of(vlm, *([[]] * number), row), logits="last").logits[number]
            torch.testing.assert_close(alone, together[number], atol=1e-5, rtol=0)


def test_the_newline_and_the_connector_learn_through_the_scaling(tmp_path: Path) -> None:
    vlm = build(limited())
    batch = rows_of(vlm, [noise(*SIZES[6])])
    vlm(replace(batch, labels=batch.input_ids)).loss_sum.backward()
    assert vlm.tiles is not None and vlm.tiles.newline is not None
    for parameter in (vlm.tiles.newline, *vlm.connector.parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()


# --- folders ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """llava_onevision -> ours -> folder -> ours, bit for bit; -> LLaVA's own layout -> ours; hf-llava says no."""
    _, _, folder = toy(tmp_path, "clip")
    assert run(["convert", str(folder), str(tmp_path / "ours"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "HF LLaVA (LLaVA-OneVision)" and any("videos" in note for note in told["notes"])
    ours = checkpoint.load(tmp_path / "ours")
    batch = rows_of(ours, [noise(*size) for size in SIZES])
    expected = ours(batch, logits="all").logits
    checkpoint.save(ours, tmp_path / "again")
    again = checkpoint.load(tmp_path / "again")
    assert again.spec == ours.spec and torch.equal(again(batch, logits="all").logits, expected)
    assert run(["convert", str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf-llava"]) == 2
    assert "read here and not written" in capsys.readouterr().err

    original(ours, tmp_path)
    config = json.loads((tmp_path / "llava/config.json").read_text())
    assert config["image_aspect_ratio"] == f"anyres_max_{LIMIT}"
    llava = peers.load(tmp_path / "llava", hub=tmp_path / "hub")
    assert isinstance(ours.spec.tiling, Tiling) and isinstance(llava.spec.tiling, Tiling)
    assert llava.spec.tiling == ours.spec.tiling
    rows = llava.language.get_input_embeddings().weight.shape[0]  # cut to the tokenizer, as LLaVA's own tool does
    torch.testing.assert_close(llava(batch, logits="all").logits, expected[..., :rows], atol=1e-5, rtol=0)
    config["image_grid_pinpoints"] = "(1x1),...,(6x6)"  # LLaVA's own short form
    (tmp_path / "llava/config.json").write_text(json.dumps(config))
    short = peers.load(tmp_path / "llava", hub=tmp_path / "hub").spec.tiling
    assert isinstance(short, Tiling) and sorted(short.grids) == sorted(ours.spec.tiling.grids)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_aspect_ratio": "anyres"}, "known is anyres_max_N"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "known is anyres_max_N"),
        ({"vision_aspect_ratio": "pad"}, "known is anyres_max_N"),
        ({"image_grid_pinpoints": [[32, 32]]}, "its processor's"),
        ({"image_grid_pinpoints": [[32, 50]]}, "its processor's"),
        ({"vision_feature_layer": [-1, -2]}, "several layers"),
    ],
)
def test_folders_that_say_something_else_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    _, _, folder = toy(tmp_path)
    place = folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(DataError, match=said):
        peers.load(folder)


def test_layouts_that_cannot_say_it_refuse_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="OneVision"):
        write(build(limited()), tmp_path / "x", "hf-llava")
    assert not (tmp_path / "x").exists()


# --- answering and teaching -------------------------------------------------------------------------------------------


def test_the_engine_answers_as_transformers_generate_does() -> None:
    vlm = build(limited())
    vlm.language.generation_config.eos_token_id = None
    rows = [[noise(*SIZES[6])], [noise(*SIZES[6])], [noise(*SIZES[4]), noise(*SIZES[3])], []]
    expected, requests = [], []
    for number, images in enumerate(rows):
        batch = rows_of(vlm, *([[]] * number), images, side="left")
        alone = replace(
            batch, input_ids=batch.input_ids[number:], attention_mask=batch.attention_mask[number:],
            image_mask=batch.image_mask[number:],
        )  # fmt: skip
        ids = vlm.generate(alone, do_sample=False, max_new_tokens=6, pad_token_id=0)
        expected.append(vlm.tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        turn = Turn("user", f"{IMAGE_MARK}\n" * len(images) + "how many ?" * (number + 1))
        requests.append(Request(str(number), tuple(filter(None, map(reference, images))), (turn,), max_new_tokens=6))
    for budget in (0, 2**20):
        engine = Engine(vlm, precision="fp32", slots=3, cache_bytes=budget)
        assert [one.text for one in engine.answer(requests)] == [text.strip() for text in expected]


def test_training_is_the_same_from_pictures_and_from_kept_features(tmp_path: Path) -> None:
    from leveret.train.run import train

    data = toy_set(tmp_path / "data")
    for number in range(24):
        with Image.open(tmp_path / f"data/{number}.png") as image:
            image.resize(SIZES[number % len(SIZES)]).save(tmp_path / f"data/{number}.png")
    runs = []
    for cached in (True, False):
        recipe = stage_of(data, cache_features=cached, learn={"connector": {"lr": 5e-3}}, micro_batch=3, max_tokens=512)
        train(recipe.model_copy(update={"model": limited(limit=1)}), tmp_path / str(cached))
        runs.append(checkpoint.load(tmp_path / str(cached)))
    for name, value in build(limited(limit=1)).named_parameters():
        one, two = (vlm.get_parameter(name) for vlm in runs)
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
        assert torch.equal(one, value) != name.startswith(("connector", "tiles")), name


def test_the_published_shape_counts_its_tokens() -> None:
    """SigLIP-SO400M-384 with OneVision's tiles: the counts of the paper's figure, before anything is built."""
    plain = tiled()
    tower = {"tower": "google/siglip-so400m-patch14-384", "tiles": TilesRecipe(grids="6x6", limit=9)}  # type: ignore[arg-type]
    vlm = build_meta(plain.model_copy(update={"vision": plain.vision.model_copy(update=tower)}))
    assert vlm.spec.count(384, 384) == 2 * 729 + 27 and vlm.spec.tokens == 729
    assert vlm.spec.count(1152, 1152) == 10 * 729 + 81
    assert vlm.spec.count(2304, 2304) == 10 * 729 + 81  # 36 tiles, scaled down to nine
