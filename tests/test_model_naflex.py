"""Images at their own shape (SigLIP2's NaFlex), from pixels to answers: against transformers' own processor and tower,
and through every room they pass."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fakes import LLAMA, SIGLIP, _folder, loud, tiny_recipe
from leveret.cli import run
from leveret.generate.engine import Engine, Request
from leveret.generate.model import reference
from leveret.inputs import Item, collate, encode, prepare_all
from leveret.inputs.tiles import prepare_patches
from leveret.model import checkpoint
from leveret.model.build import build, build_meta
from leveret.model.connectors import CONNECTORS
from leveret.model.parts import count, parts_table, totals
from leveret.model.peers.write import LAYOUTS, write
from leveret.model.recipe import ModelRecipe
from leveret.model.towers import strip
from leveret.records import IMAGE_MARK, ImageSpec, NaFlex, TowerView, Turn
from leveret.runs import RecipeError
from test_model_tiles import SIZES, noise, rows_of
from train_fakes import recipe as stage_of
from train_fakes import toy_set

PATCHES = 12
"""At most; with the toy's patches of 16 pixels a square image is 3 x 3."""


@cache
def tower_folder() -> Path:
    """A NaFlex tower as transformers saves it, its positions a grid of 4 x 4."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    sizes = {key: value for key, value in SIGLIP.items() if key != "image_size"}
    torch.manual_seed(0)
    model = loud(Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16)))
    model.save_pretrained(_folder() / "naflex")
    return _folder() / "naflex"


def shaped(kind: str = "mlp2x_gelu", **vision: Any) -> ModelRecipe:
    """The tiny recipe with a NaFlex tower that sees images at their own shape."""
    plain = tiny_recipe(connector=kind)
    told = {"tower": str(tower_folder()), "patches": PATCHES, **vision}
    return ModelRecipe.model_validate(plain.model_dump() | {"vision": told})


def their_processor(patches: int, patch: int = 16) -> Any:
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    return Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=patches)


# --- the inputs -------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 2, 12, 64, 256, 729, 1024]),
    st.sampled_from([14, 16, 32]),
)  # fmt: skip
@example(1, 1, 256, 16)
@example(50_000, 1, 256, 16)
@example(1, 50_000, 1, 16)
@example(480, 640, 256, 16)
@example(4000, 6000, 1024, 16)
@settings(deadline=None, max_examples=200)
def test_the_grid_is_transformers(height: int, width: int, patches: int, patch: int) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    shape = NaFlex(patch, patches)
    assert shape.best(height, width) == get_image_size_for_max_num_patches(height, width, patch, patches)
    assert 1 <= shape.count(height, width) == len(shape.layout(height, width)) <= shape.most == patches


@pytest.mark.parametrize("patches", [1, 12, 256])
def test_pixels_are_transformers_to_the_last_bit(patches: int) -> None:
    shape, view = NaFlex(16, patches), TowerView("vision", 64, resample="bilinear")
    for width, height in [*SIZES, (1, 1), (1, 700), (2000, 3), (256, 256)]:
        image = noise(width, height)
        theirs = their_processor(patches)(image, return_tensors="pt")
        ours = torch.from_numpy(prepare_patches(image, view, shape))
        assert torch.equal(strip(ours[None]), theirs["pixel_values"])
        assert list(shape.grid(height, width)) == theirs["spatial_shapes"][0].tolist()
        assert shape.count(height, width) == int(theirs["pixel_attention_mask"].sum())


def test_pictures_of_any_mode_and_filter() -> None:
    view = TowerView("vision", 64, resample="bilinear")
    for mode in ("L", "RGBA", "P", "1"):
        assert prepare_patches(noise(30, 50).convert(mode), view, NaFlex(16, 12)).shape == (3, 16, 16 * 12)
    with pytest.raises(ValueError, match="lanczos"):
        prepare_patches(noise(3, 3), replace(view, resample="lanczos"), NaFlex(16, 12))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no patches"):
        NaFlex(16, 4).grid(0, 5)
    with pytest.raises(ValueError, match="at least 1"):
        NaFlex(0, 4)


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_features_are_siglip2_vision_models(norm: bool) -> None:
    """Of every image alone and of all in one batch; with the norm it is the class's own output."""
    from transformers import Siglip2VisionModel

    theirs = Siglip2VisionModel.from_pretrained(tower_folder()).eval()
    vlm = build(shaped(norm=norm, layer=-1))
    images = [noise(*size) for size in SIZES]
    seen = their_processor(PATCHES)(images, return_tensors="pt")
    layer = theirs.encoder.layers[-1]
    states: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _, args, out: states.append(out))
    expected = theirs(**seen).last_hidden_state if norm else (theirs(**seen), states[0])[1]
    assert len({tuple(grid) for grid in seen["spatial_shapes"].tolist()}) > 3
    batch = rows_of(vlm, images)
    together = vlm.see(batch.pixels, batch.image_sizes)
    for number, image in enumerate(images):
        real = int(seen["pixel_attention_mask"][number].sum())
        torch.testing.assert_close(together[number, :real], expected[number, :real], atol=3e-6, rtol=0)
        assert not together[number, real:].any()
        alone = rows_of(vlm, [image])
        torch.testing.assert_close(vlm.see(alone.pixels, alone.image_sizes)[0], together[number], atol=3e-6, rtol=0)


@torch.no_grad()
def test_what_stands_in_the_text_is_each_images_own_tokens() -> None:
    vlm = build(shaped())
    assert vlm.spec.tiling == NaFlex(16, PATCHES) and vlm.spec.tokens == PATCHES
    images = [noise(*size) for size in SIZES]
    batch = rows_of(vlm, images)
    visual = vlm.connector(vlm.see(batch.pixels, batch.image_sizes))
    kept = [visual[place, : vlm.spec.count(image.height, image.width)] for place, image in enumerate(images)]
    assert torch.equal(vlm.embed(batch)[batch.image_mask], torch.cat(kept))
    counts = [vlm.spec.count(image.height, image.width) for image in images]
    assert len(set(counts)) > 2 and int(batch.image_mask.sum()) == sum(counts)


@torch.no_grad()
def test_ragged_rows_together_are_each_row_alone() -> None:
    """Two images, none, three; padded on either side: logits to 1e-5, greedy ids equal."""
    vlm = build(shaped())
    vlm.language.generation_config.eos_token_id = None
    rows: list[list[Image.Image]] = [[noise(*SIZES[0]), noise(*SIZES[3])], [], [noise(*size) for size in SIZES[1:4]]]
    for side in ("right", "left"):
        batch = rows_of(vlm, *rows, side=side)
        together = vlm(batch, logits="last").logits
        for number, row in enumerate(rows):
            alone = vlm(rows_of(vlm, *([[]] * number), row), logits="last").logits[number]
            torch.testing.assert_close(alone, together[number], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_nothing_attends_to_padding(attention: str) -> None:
    """What stands behind an image's own patches does not change its tokens, whichever attention the tower has."""
    vlm = build(shaped())
    tower: Any = vlm.towers["vision"]
    tower.model.config._attn_implementation = attention
    batch = rows_of(vlm, [noise(70, 40), noise(33, 200)])
    first = vlm.see(batch.pixels, batch.image_sizes)
    pixels = batch.pixels["vision"].clone()
    for place, (height, width) in enumerate(batch.image_sizes.tolist()):  # type: ignore[union-attr]
        pixels[place, :, :, 16 * vlm.spec.count(height, width) :] = 7.0
    assert not torch.equal(pixels, batch.pixels["vision"])
    torch.testing.assert_close(vlm.see({"vision": pixels}, batch.image_sizes), first, atol=1e-6, rtol=0)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    vlm = build(shaped())
    batch = rows_of(vlm, [noise(70, 40)])
    with pytest.raises(ValueError, match="own shape, and is not told how large"):
        vlm(replace(batch, image_sizes=None))
    with pytest.raises(ValueError, match=r"images and marks disagree.* image"):
        vlm(replace(batch, image_mask=torch.zeros_like(batch.image_mask)))
    with pytest.raises(ValueError, match="own shape"):
        vlm.towers["vision"](batch.pixels["vision"])


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(CONNECTORS))
def test_connectors_take_ragged_tokens_or_are_refused_by_name(kind: str) -> None:
    told = shaped(kind)
    if kind in ("identity", "spp"):  # these want equal widths
        told = told.model_copy(update={"language": tiny_recipe().language})
    if CONNECTORS[kind].each and not CONNECTORS[kind].plain:
        vlm = build(told)
        batch = rows_of(vlm, [noise(70, 40), noise(33, 200)], [])
        output = vlm(replace(batch, labels=batch.input_ids))
        output.loss_sum.backward()
        assert output.loss_sum.isfinite() and all(p.grad is not None for p in vlm.connector.parameters())
    elif not CONNECTORS[kind].each:
        with pytest.raises(RecipeError, match=f"{kind} needs a fixed grid or number of tokens.*mlp2x_gelu"):
            build_meta(told)


def test_identity_takes_ragged_tokens_where_widths_agree() -> None:
    told = shaped("identity")
    plain = LLAMA | {"hidden_size": SIGLIP["hidden_size"], "num_attention_heads": 4}
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = _folder() / "llama-16-wide"
    LlamaForCausalLM(LlamaConfig(**plain)).save_pretrained(folder)  # type: ignore[arg-type]
    told = told.model_copy(update={"language": told.language.model_copy(update={"name": str(folder)})})
    assert build_meta(told).spec.tiling == NaFlex(16, PATCHES)


def test_a_connector_of_ones_own_says_that_it_takes_each_token(tmp_path: Path) -> None:
    lines = (
        "from torch import nn",
        "from leveret.model.connectors import ConnectorRow",
        "ONE = ConnectorRow(lambda w, d, n, s: nn.Linear(w, d), each=True)",
        "ALL = ConnectorRow(lambda w, d, n, s: nn.Linear(w, d))",
        "HALF = ConnectorRow(lambda w, d, n, s: nn.Linear(w, d), lambda count, s: count // 2, each=True)",
    )
    (tmp_path / "my.py").write_text("\n".join(lines))
    vlm = build(shaped(f"{tmp_path}/my.py:ONE"))
    batch = rows_of(vlm, [noise(70, 40), noise(33, 200)])
    assert vlm(batch, logits="last").logits.isfinite().all()
    for name, said in (("ALL", "needs a fixed grid or number"), ("HALF", "of 12 it makes 6")):
        with pytest.raises(RecipeError, match=said):
            build_meta(shaped(f"{tmp_path}/my.py:{name}"))


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({"size": 64}, "given beside size"),
        ({"s2": [32, 64]}, "given beside s2"),
        ({"resize": "pad"}, "given beside resize"),
        ({"crop": 0.9}, "given beside crop"),
        ({"tokens": "drop_first"}, "given beside tokens"),
        ({"tiles": {}}, "given beside `tiles`"),
        ({"split": {"side": 64}}, "given beside `split`"),
        ({"tower": "google/siglip-base-patch16-224"}, "sees squares; towers.*siglip2-base-patch16-naflex"),
        ({"tower": "world/vision"}, "sees squares"),
    ],
)
def test_what_wants_a_square_is_refused(vision: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        build_meta(shaped(**vision))


@pytest.mark.parametrize("patches", [0, -1, 2.5, "many", [256]])
def test_a_number_of_patches_that_is_none(patches: Any) -> None:
    with pytest.raises(ValueError, match="patches"):
        shaped(patches=patches)


def test_a_second_tower_is_refused() -> None:
    both = {"towers": [{"tower": str(tower_folder()), "patches": 12}, {"tower": str(tower_folder()), "size": 48}]}
    told = ModelRecipe.model_validate(tiny_recipe().model_dump() | {"vision": both})
    with pytest.raises(RecipeError, match=r"equally many tokens|for a tower alone"):
        build_meta(told)
    both["towers"][1] = {"tower": str(tower_folder()), "patches": 12}
    told = ModelRecipe.model_validate(tiny_recipe().model_dump() | {"vision": both})
    with pytest.raises(RecipeError, match="for a tower alone"):
        build_meta(told)


def test_the_published_tower_counts_its_tokens_before_it_is_built() -> None:
    """256 patches are the square's 256 tokens, and the same parameters."""
    told = tiny_recipe().model_dump()
    square = build_meta(ModelRecipe.model_validate(told | {"vision": {"tower": "google/siglip2-base-patch16-naflex"}}))
    told["vision"] = {"tower": "google/siglip2-base-patch16-naflex", "patches": 256}
    vlm = build_meta(ModelRecipe.model_validate(told))
    assert count(vlm) == count(square) and vlm.spec.tokens == square.spec.tokens == 256
    assert vlm.spec.count(480, 640) == 14 * 18 and vlm.spec.count(1, 9000) == 256
    assert "at most 256 image tokens" in totals(vlm)[0]
    assert "at most 256 tokens" in parts_table(vlm, {})[0].note


# --- folders ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_model_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    vlm = build(shaped())
    batch = rows_of(vlm, [noise(*size) for size in SIZES])
    checkpoint.save(vlm, tmp_path / "m")
    again = checkpoint.load(tmp_path / "m")
    assert again.spec == vlm.spec and ImageSpec.from_dict(json.loads(json.dumps(vlm.spec.to_dict()))) == vlm.spec
    assert torch.equal(again(batch, logits="all").logits, vlm(batch, logits="all").logits)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layouts_of_others_refuse_it_by_name(layout: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"own shape|siglip2_vision_model"):
        write(build(shaped()), tmp_path / "x", layout)
    assert not (tmp_path / "x").exists()


def test_no_transformers_processor_is_made_of_it() -> None:
    from leveret.model.hf_inputs import processor_for

    vlm = build(shaped())
    with pytest.raises(RecipeError, match="own shape"):
        processor_for(vlm.spec, vlm.chat, vlm.tokenizer)


# --- answering --------------------------------------------------------------------------------------------------------


def test_the_engine_answers_as_transformers_generate_does() -> None:
    """Several questions about one image, several images, none; in company and from a full and an empty shelf."""
    vlm = build(shaped())
    vlm.language.generation_config.eos_token_id = None
    pictures = [noise(*size) for size in SIZES]
    rows = [[pictures[0]], [pictures[0]], [pictures[1], pictures[2]], [], [pictures[3]], [pictures[4], pictures[4]]]
    expected, requests = [], []
    for number, images in enumerate(rows):
        turn = Turn("user", f"{IMAGE_MARK}\n" * len(images) + "how many ?" * (number + 1))
        sizes = [(image.height, image.width) for image in images]
        encoded = encode([turn], vlm.chat, vlm.tokenizer, vlm.spec, sizes, generate=True)
        item = Item(encoded, pixels=[prepare_all(image, vlm.spec) for image in images], sizes=sizes)
        ids = vlm.generate(collate([item], 0, "left"), do_sample=False, max_new_tokens=6, pad_token_id=0)
        expected.append(vlm.tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        requests.append(Request(str(number), tuple(filter(None, map(reference, images))), (turn,), max_new_tokens=6))
    for budget in (0, 2**20):
        engine = Engine(vlm, precision="fp32", slots=3, cache_bytes=budget)
        for _ in range(2):
            assert [one.text for one in engine.answer(requests)] == [text.strip() for text in expected]
    assert len(engine.eyes.shelf) == 5  # each image went through the tower once


def test_chat_says_how_an_image_is_seen(tmp_path: Path) -> None:
    from leveret.generate.model import Model
    from leveret.serve.chat import Talk

    noise(70, 40).save(tmp_path / "a.png")
    said = Talk(Model(build(shaped()), precision="fp32")).show(str(tmp_path / "a.png"))
    assert "70 x 40 pixels, seen as 3 x 4 patches of 16 x 16, 12 tokens" in said


# --- training, showing ------------------------------------------------------------------------------------------------


def shapes_set(folder: Path) -> Path:
    """The toy set, its pictures of many shapes."""
    path = toy_set(folder)
    for number in range(24):
        with Image.open(folder / f"{number}.png") as image:
            image.resize(SIZES[number % len(SIZES)]).save(folder / f"{number}.png")
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_training_is_the_same_from_pictures_and_from_kept_features(packed: bool, tmp_path: Path) -> None:
    from leveret.train.run import train

    data = shapes_set(tmp_path / "data")
    runs = []
    for cached in (True, False):
        learn = {"connector": {"lr": 5e-3}}
        recipe = stage_of(data, cache_features=cached, learn=learn, micro_batch=3, pack=packed)
        train(recipe.model_copy(update={"model": shaped()}), tmp_path / str(cached))
        runs.append(checkpoint.load(tmp_path / str(cached)))
    for name, value in build(shaped()).named_parameters():
        one, two = (vlm.get_parameter(name) for vlm in runs)
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
        assert torch.equal(one, value) != name.startswith("connector"), name


def test_the_tower_learns_at_every_shape(tmp_path: Path) -> None:
    from leveret.train.run import train

    recipe = stage_of(shapes_set(tmp_path / "data"), learn={"vision": {"lr": 1e-3}, "connector": {"lr": 1e-3}}, steps=2)
    train(recipe.model_copy(update={"model": shaped()}), tmp_path / "run")
    learned = checkpoint.load(tmp_path / "run").get_parameter(
        "towers.vision.model.embeddings.position_embedding.weight"
    )
    fresh = build(shaped()).get_parameter("towers.vision.model.embeddings.position_embedding.weight")
    assert learned.isfinite().all() and not torch.equal(learned, fresh)


def test_an_image_that_changed_its_shape_since_is_named(tmp_path: Path) -> None:
    """Features not kept: the picture is read again when it is shown, and no longer fills its positions."""
    from leveret.pool import open_source
    from leveret.train.data import prepare
    from leveret.train.strategy import blank_image, idle

    data = shapes_set(tmp_path / "data")
    vlm = build(shaped())
    prepared = prepare(
        open_source(str(data), None), vlm, tmp_path / "cache", chat=vlm.chat, max_tokens=128, bad_share=0.5, see=None,
        facts={},
    )  # fmt: skip
    noise(500, 10).save(tmp_path / "data/0.png")
    blank = blank_image(prepared, vlm)  # what a rank shows that has no image
    assert blank is not None and vlm(idle(), blank=blank).loss_sum == 0
    batch, failed = prepared.batch([0, 1], vlm.spec)
    assert [one.id for one in failed] == ["toy-0"] and "damaged" in failed[0].reason
    assert vlm(batch).loss_sum.isfinite()


def test_a_resize_of_a_stage_is_refused(tmp_path: Path) -> None:
    from leveret.train.run import train

    recipe = stage_of(shapes_set(tmp_path / "data"), resize="pad").model_copy(update={"model": shaped()})
    with pytest.raises(RecipeError, match="in tiles or in their own shape"):
        train(recipe, tmp_path / "run")


def test_show_and_plan_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shapes_set(tmp_path / "data")
    checkpoint.save(build(shaped()), tmp_path / "m")
    assert run(["show", str(data), "--model", str(tmp_path / "m"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["shapes"]["pixels[vision]"] == [1, 3, 16, 16 * PATCHES]
    assert told["shapes"]["image tokens (of their own shape)"][0] == 12  # 70 x 40: 3 x 4 patches
