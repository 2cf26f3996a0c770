"""Tiles: the grid, the pixels and the tokens of LLaVA-1.6, against transformers' own processor and packing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from leveret.inputs import Encoded, Item, collate, encode, prepare_tiles
from leveret.records import ImageSpec, Tiling, TowerView, Turn

SIDE, CELLS = 28, 4
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]  # LLaVA-1.6's, at a twelfth of their size
VIEW = TowerView("clip", SIDE, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), resize="crop")
SIZES = [(20, 20), (28, 28), (60, 30), (30, 60), (200, 61), (61, 200), (57, 56), (333, 10), (10, 333), (1, 1), (84, 29)]


def tiling_of(merge: Any = "unpad") -> Tiling:
    return Tiling(SIDE, CELLS, tuple((height, width) for height, width in PINPOINTS), merge)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_tiles_equal_transformers_to_the_last_bit(size: tuple[int, int], resample: Any) -> None:
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=list(VIEW.mean),
        image_std=list(VIEW.std),
        resample=Image.Resampling[resample.upper()],
    )
    image, tiling = noise(*size), tiling_of()
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    view = TowerView("clip", SIDE, VIEW.mean, VIEW.std, resample=resample)
    ours = prepare_tiles(image, view, tiling)
    assert len(ours) == tiling.tiles(size[1], size[0]) and ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
@settings(max_examples=300)
def test_grid_and_count_are_transformers(height: int, width: int) -> None:
    tiling = tiling_of()
    assert tiling.best(height, width) == select_best_resolution((height, width), PINPOINTS)
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = type("P", (), {"image_grid_pinpoints": PINPOINTS})()  # type: ignore[assignment]
    processor.patch_size, processor.num_additional_image_tokens = SIDE // CELLS, 0
    assert tiling.count(height, width) == processor._get_number_of_features(height, width, SIDE, SIDE)


@pytest.mark.parametrize("size", SIZES)
def test_the_layout_is_transformers_packing(size: tuple[int, int]) -> None:
    """Each token carries its own number; transformers packs them, newlines as -1, and ours must read the same."""
    tiling, (width, height) = tiling_of(), size
    config = type("C", (), {})()
    config.vision_config = type("V", (), {"image_size": SIDE, "patch_size": SIDE // CELLS})()
    config.image_grid_pinpoints = PINPOINTS
    model = type("M", (), {"config": config})()
    count = tiling.tiles(height, width)
    numbers = torch.arange(count * CELLS**2, dtype=torch.float32).view(count, CELLS**2, 1)
    packed, lengths = LlavaNextModel.pack_image_features(
        model, [numbers], torch.tensor([[height, width]]), "full", torch.tensor([-1.0])
    )
    layout = tiling.layout(height, width)
    assert layout == packed[0][:, 0].int().tolist()
    assert len(layout) == int(lengths[0]) == tiling.count(height, width)


def test_the_other_two_merges() -> None:
    """LLaVA's "spatial" keeps the borders and has no newlines; "flat" goes tile by tile."""
    spatial, flat = tiling_of("spatial"), tiling_of("flat")
    assert flat.layout(56, 56) == list(range(5 * CELLS**2)) and len(flat.layout(56, 56)) == flat.count(56, 56)
    layout = spatial.layout(28, 56)
    assert len(layout) == spatial.count(28, 56) == 3 * CELLS**2
    assert layout[CELLS**2 :][: 2 * CELLS] == [*range(16, 20), *range(32, 36)]  # a row goes through both tiles
    assert sorted(layout) == list(range(3 * CELLS**2))


def test_llavas_pinpoints_are_width_first() -> None:
    """A small square image fits two grids alike; the order of the list decides, and LLaVA's pairs are turned."""
    ours = Tiling.from_llava(SIDE, CELLS, PINPOINTS)
    assert ours.best(20, 20) == (56, 28) and tiling_of().best(20, 20) == (28, 56)
    assert ours.merge == "unpad" and Tiling.from_llava(SIDE, CELLS, PINPOINTS, "flat").merge == "flat"


def test_a_spec_with_tiles_travels_and_counts() -> None:
    spec = ImageSpec((VIEW,), CELLS**2, tiling_of())
    assert ImageSpec.from_dict(spec.to_dict()) == spec
    assert spec.count(56, 56) == 16 + 8 * (8 + 1)
    tokenizer = Tokenizer(models.WordLevel({"<image>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
    turns = [Turn("user", "<image>\na"), Turn("assistant", "a")]
    encoded = encode(turns, "plain", fast, spec, [(28, 56)])
    assert sum(encoded.image_mask) == tiling_of().count(28, 56) == 16 + 4 * 9


def test_a_batch_knows_whose_tile_is_whose() -> None:
    def item(*tiles: int) -> Item:
        pixels = [{"clip": np.full((count, 3, SIDE, SIDE), count, np.float32)} for count in tiles]
        return Item(Encoded([0], [0], [False], ""), pixels=pixels)

    batch = collate([item(3, 2), item(), item(1)], 0)
    assert batch.pixels["clip"].shape == (6, 3, SIDE, SIDE)
    assert batch.tile_image.tolist() == [0, 0, 0, 1, 1, 2]
    assert batch.pixels["clip"][:, 0, 0, 0].tolist() == [3, 3, 3, 2, 2, 1]


def test_faults_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"grids \[\(28, 30\)\].*multiples of the tile's 28"):
        Tiling(28, 4, ((28, 56), (28, 30)))
    with pytest.raises(ValueError, match="at least one"):
        Tiling(28, 4, ())
    with pytest.raises(ValueError, match="allowed: unpad, spatial, flat"):
        Tiling(28, 4, ((28, 28),), "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="spatial_unpad"):
        Tiling.from_llava(28, 4, PINPOINTS, "maxpool")
    with pytest.raises(ValueError, match="tower clip sees 28 pixels, but tiles have 14"):
        prepare_tiles(noise(9, 9), VIEW, Tiling(14, 2, ((14, 14),)))
    with pytest.raises(ValueError, match="has no tiles"):
        tiling_of().best(0, 4)
