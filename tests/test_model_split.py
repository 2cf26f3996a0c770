"""Images that keep their shape and are cut (`split`), and the norm behind a tower's last block, in any recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evaluate_fakes import tiny_world
from fakes import tiny_recipe, tiny_vlm
from leveret.cli import run
from leveret.generate.model import Model
from leveret.inputs import encode
from leveret.inputs.tiles import cut, prepare_all
from leveret.model import checkpoint
from leveret.model.build import build, build_meta
from leveret.model.peers.write import LAYOUTS, write
from leveret.model.recipe import ModelRecipe, SplitRecipe, VisionRecipe
from leveret.records import IMAGE_MARK, ImageSpec, Split, TowerView, Turn
from leveret.runs import RecipeError
from nanovlm_fakes import Nano
from test_model_tiles import SIZES, noise, rows_of, shapes_set
from train_fakes import recipe as stage_of

SIDE = 32


def cutting(**split: Any) -> ModelRecipe:
    """The tiny recipe, its images cut: at most 3 tiles to a side."""
    plain = tiny_recipe()
    vision = plain.vision.model_copy(update={"split": SplitRecipe(**({"side": 96} | split))})
    return plain.model_copy(update={"vision": vision})


def normed(**vision: Any) -> ModelRecipe:
    plain = tiny_recipe()
    changed = plain.vision.model_copy(update={"layer": -1, "norm": True} | vision)
    return plain.model_copy(update={"vision": changed})


# --- what is cut ------------------------------------------------------------------------------------------------------


@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), most=st.integers(1, 6), grow=st.booleans(),
    whole=st.sampled_from([None, "", "<w>"]), tile=st.sampled_from(["", "<{row}x{column}>"]),
)  # fmt: skip
def test_grid_counts_and_runs_agree(
    height: int, width: int, most: int, grow: bool, whole: str | None, tile: str
) -> None:
    split = Split(SIDE, 4, SIDE * most, grow, whole, tile)
    rows, columns = (side // SIDE for side in split.best(height, width))
    assert 1 <= min(rows, columns) and max(rows, columns) <= most
    if grow:
        assert max(rows, columns) == most
    assert (columns >= rows) if width >= height else (rows >= columns)
    runs = split.runs(height, width)
    assert len(runs) == split.tiles(height, width)
    assert sum(count for _, count in runs) == split.count(height, width) <= split.most
    assert split.layout(height, width) == list(range(split.count(height, width)))
    marks = [mark for mark, _ in runs]
    if whole is not None:
        assert marks[0] == whole and len(marks) == (1 if rows * columns == 1 else 1 + rows * columns)
    else:
        assert len(marks) == rows * columns and marks[-1] == tile.format(row=rows, column=columns)
    spec = ImageSpec((TowerView("vision", SIDE),), 4, split)
    assert ImageSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec and spec.runs(height, width) == runs


@pytest.mark.parametrize(("size", "form"), [(size, form) for size in SIZES for form in ("global", "grown", "tiles")])
def test_pictures_are_those_of_the_arithmetic(size: tuple[int, int], form: str, tmp_path: Path) -> None:
    """Any mode and shape; mean and std on top. The whole is float, so no value of it is rounded."""
    nano, image = Nano(tmp_path, form), noise(*size)
    split = Split(SIDE, 16, nano.config["max_img_size"], form == "grown", None if form == "tiles" else "")
    view = TowerView("vision", SIDE, mean=(0.5, 0.25, 0.0), std=(0.5, 0.125, 1.0))
    pictures, (rows, columns) = nano.pictures(image)
    wanted = (pictures - torch.tensor(view.mean)[:, None, None]) / torch.tensor(view.std)[:, None, None]
    found = prepare_all(image, ImageSpec((view,), 16, split))["vision"]
    assert split.best(image.height, image.width) == (rows * SIDE, columns * SIDE)
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=0)
    shown = np.stack([np.asarray(tile) for tile in cut(image, split)]).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(shown, pictures.numpy(), atol=1.01 / 255)  # Pillow rounds after each axis
    np.testing.assert_array_equal(prepare_all(image.convert("RGBA"), ImageSpec((view,), 16, split))["vision"], found)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Split(32, 4, 100), "side is 100; it must be a multiple of the tile's 32"),
        (lambda: Split(32, 4, 0), "side is 0"),
        (lambda: Split(32, 4, 64, tile="{line}"), "only {row} and {column}"),
        (lambda: Split(32, 4, 64, tile="{"), "only {row} and {column}"),
        (lambda: Split(32, 4, 64).best(0, 5), "an image of 0 x 5 pixels has no tiles"),
    ],
)
def test_faults_say_what_is_wrong(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert said in str(caught.value)


def test_a_recipe_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.vision\.split: side is 100"):
        build_meta(cutting(side=100))
    with pytest.raises(ValueError, match="both of `tiles` and `split` given"):
        VisionRecipe(tower="x", tiles={}, split={"side": 64})  # type: ignore[arg-type]


def test_tokens_before_tiles_must_be_tokens() -> None:
    vlm = build(cutting(whole="<|user|>", tile="<tile_{row}_{column}>"))
    asked = [Turn("user", IMAGE_MARK + "\nhow many ?")]
    with pytest.raises(RecipeError, match="puts '<tile_1_1>' before what it sees"):
        encode(asked, vlm.chat, vlm.tokenizer, vlm.spec, [(64, 64)], generate=True)
    small = encode(asked, vlm.chat, vlm.tokenizer, vlm.spec, [(9, 9)], generate=True)  # one tile is the whole
    first = small.image_mask.index(True)
    assert vlm.tokenizer.convert_ids_to_tokens(small.input_ids[first - 1]) == "<|user|>"
    with pytest.raises(RecipeError, match="no system it comes from has tokens before tiles"):
        encode(asked, "plain/faithful", vlm.tokenizer, vlm.spec, [(9, 9)], generate=True)


def test_an_image_is_never_cut_off() -> None:
    vlm = build(cutting())
    asked = [Turn("user", IMAGE_MARK + "\nhow many ?"), Turn("assistant", "two")]
    encoded = encode(asked, vlm.chat, vlm.tokenizer, vlm.spec, [(96, 96)])
    end = max(place for place, seen in enumerate(encoded.image_mask) if seen) + 1
    assert sum(encoded.image_mask) == 10 * 4
    from leveret.runs import DataError

    with pytest.raises(DataError, match=f"ends at position {end}"):
        encode(asked, vlm.chat, vlm.tokenizer, vlm.spec, [(96, 96)], max_tokens=end - 1)
    assert encode(asked, vlm.chat, vlm.tokenizer, vlm.spec, [(96, 96)], max_tokens=end).cut


# --- through the rooms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connector", ["mlp2x_gelu", "resampler"])
@torch.no_grad()
def test_each_picture_gives_its_tokens_in_order(connector: str) -> None:
    recipe = cutting()
    told = recipe.model_copy(update={"connector": recipe.connector.model_copy(update={"kind": connector})})
    vlm = build(told)
    images = [noise(70, 40), noise(9, 200), noise(5, 5)]
    batch = rows_of(vlm, images, [], [images[1]])
    visual = vlm.connector(vlm.see(batch.pixels)).flatten(0, 1)
    assert torch.equal(vlm.embed(batch)[batch.image_mask], visual)
    with pytest.raises(ValueError, match=r"tiles, but"):
        vlm(replace(batch, image_sizes=batch.image_sizes.flip(0)))  # type: ignore[union-attr]


def test_training_is_the_same_from_pictures_and_from_kept_features(tmp_path: Path) -> None:
    from leveret.train.run import train

    data = shapes_set(tmp_path / "data")
    runs = []
    for cached in (True, False):
        recipe = stage_of(data, cache_features=cached, learn={"connector": {"lr": 5e-3}}, micro_batch=3)
        train(recipe.model_copy(update={"model": cutting(whole="<|user|>")}), tmp_path / str(cached))
        runs.append(checkpoint.load(tmp_path / str(cached)))
    for name, value in build(cutting()).named_parameters():
        one, two = (vlm.get_parameter(name) for vlm in runs)
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
        assert torch.equal(one, value) != name.startswith("connector"), name
    assert runs[0].spec == build(cutting(whole="<|user|>")).spec


def test_show_and_chat_tell_of_tiles_and_it_is_examined(tmp_path: Path) -> None:
    from leveret.serve.chat import Talk
    from leveret.show import show

    vlm = build(cutting(whole=None))
    checkpoint.save(vlm, tmp_path / "model")
    data = shapes_set(tmp_path / "data")
    facts = show(data, index=5, model=tmp_path / "model", out=tmp_path / "png")  # 33 x 200: a column of three tiles
    tokens = vlm.spec.count(200, 33)
    assert facts["tokens"]["images"] == tokens == facts["shapes"]["image tokens (tiles put together)"][0] == 12
    with Image.open(data.parent / "5.png") as picture, Image.open(tmp_path / "png/sample-5-2.png") as second:
        assert vlm.spec.tiling is not None
        np.testing.assert_array_equal(np.asarray(second), np.asarray(cut(picture, vlm.spec.tiling)[1]))
    told = Talk(Model(vlm, precision="fp32")).show(str(tmp_path / "data/5.png"))
    assert f"3 tiles of 32 x 32, {tokens} tokens" in told
    world = tiny_world(tmp_path / "world", 2)
    assert run(["eval", str(tmp_path / "model"), str(world), "-o", str(tmp_path / "out"), "--json"]) == 0


def test_layouts_without_it_refuse_it(tmp_path: Path) -> None:
    for layout in set(LAYOUTS) - {"remote-code"}:
        with pytest.raises(RecipeError, match="tiles"):
            write(build(cutting()), tmp_path / "x", layout)
    assert not (tmp_path / "x").exists()


# --- the norm behind the last block -----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_norm_runs(tmp_path: Path) -> None:
    """What transformers calls last_hidden_state; saved and read again bit for bit."""
    from transformers import SiglipVisionModel

    vlm, pixels = build(normed()), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tower = vlm.towers["vision"]
    theirs = SiglipVisionModel.from_pretrained(str(tiny_recipe().vision.tower))
    torch.testing.assert_close(vlm.see({"vision": pixels}), theirs(pixels).last_hidden_state, atol=1e-5, rtol=0)
    assert not list(tower.unused()) and tower.model.post_layernorm.weight.requires_grad
    assert not [name for name in tower.before(1) if "post_layernorm" in name]  # type: ignore[operator]
    checkpoint.save(vlm, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert torch.equal(again.see({"vision": pixels}), vlm.see({"vision": pixels}))
    plain = build(normed(norm=False)).see({"vision": pixels})
    torch.testing.assert_close(tower.model.post_layernorm(plain), vlm.see({"vision": pixels}), atol=1e-6, rtol=0)


def test_where_there_is_no_norm_to_run_it_is_refused() -> None:
    with pytest.raises(RecipeError, match="the norm stands behind block 3"):
        build_meta(normed(layer=-2))
    with pytest.raises(RecipeError, match="it runs whole, its norm with it"):
        build_meta(normed(tower="world/vision"))


def test_layouts_that_run_no_norm_refuse_it(tmp_path: Path) -> None:
    for layout in set(LAYOUTS) - {"remote-code", "nanovlm"}:
        with pytest.raises(RecipeError, match="runs no norm behind the tower's last block"):
            write(build(normed()), tmp_path / "x", layout)
    assert not (tmp_path / "x").exists()


def test_pixels_may_stay_from_0_to_1() -> None:
    vlm = build(normed(normalise="none"))
    pixels = prepare_all(noise(32, 32), vlm.spec)["vision"]
    np.testing.assert_array_equal(pixels, np.asarray(noise(32, 32), np.float32).transpose(2, 0, 1) / np.float32(255))
    assert prepare_all(noise(32, 32), tiny_vlm().spec)["vision"].min() < 0
