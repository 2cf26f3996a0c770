"""Images in tiles, from pixels to answers: against transformers' own LLaVA 1.6, and through every room they pass."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate_fakes import tiny_world
from fakes import LLAMA, SIGLIP, loud, tiny_recipe
from leveret.cli import run
from leveret.generate.engine import Engine, Request
from leveret.generate.live import Ask, Live, answer
from leveret.generate.model import Model, reference
from leveret.images import decode, upright_size
from leveret.inputs import Item, collate, encode, prepare_all
from leveret.inputs.tiles import cut
from leveret.model import checkpoint, peers
from leveret.model.build import build, build_meta
from leveret.model.peers.write import LAYOUTS, write
from leveret.model.recipe import ModelRecipe, TilesRecipe, VisionRecipe
from leveret.model.vlm import VLM
from leveret.records import IMAGE_MARK, Batch, Turn
from leveret.runs import DataError, RecipeError
from test_model_hfllava import tokenizer_of
from train_fakes import recipe as stage_of
from train_fakes import toy_set

SIDE, CELLS = 32, 4
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]  # (height, width), as llava-hf writes them
SIZES = [(70, 40), (40, 70), (64, 64), (3, 5), (300, 61), (33, 200)]
"""(width, height): landscape, portrait, square, tiny, very wide, very high."""


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8))


def next_toy(place: Path, tower: str = "clip", chat: str = "vicuna_v1", **more: Any) -> tuple[Any, Any, Path]:
    """(transformers' own toy LLaVA 1.6, its processor, the folder that both saved)."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        SiglipVisionConfig,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    torch.manual_seed(0)
    tokenizer, strategy = tokenizer_of(chat), "default" if tower == "clip" else "full"
    vision = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(**(SIGLIP | {"patch_size": SIDE // CELLS}))
    text = LlamaConfig(**(LLAMA | {"vocab_size": len(tokenizer) + 5, "max_position_embeddings": 2048}))
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=PINPOINTS, vision_feature_select_strategy=strategy,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), **more,
    )  # fmt: skip
    model = loud(LlavaNextForConditionalGeneration(config)).eval()
    torch.nn.init.normal_(model.model.image_newline, std=0.5)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=SIDE // CELLS, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if tower == "clip" else 0,
    )  # fmt: skip
    folder = place / "next"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


def rows_of(vlm: VLM, *rows: list[Image.Image], side: Any = "right") -> Batch:
    """One row of text per list of images, with all of them in its question."""
    items = []
    for number, images in enumerate(rows):
        sizes = [(image.height, image.width) for image in images]
        turns = [Turn("user", f"{IMAGE_MARK}\n" * len(images) + "how many ?" * (number + 1))]
        encoded = encode(turns, vlm.chat, vlm.tokenizer, vlm.spec, sizes, generate=True)
        items.append(Item(encoded, str(number), [prepare_all(image, vlm.spec) for image in images], sizes=sizes))
    return collate(items, vlm.tokenizer.pad_token_id or 0, side)


def tiled(**tiles: Any) -> ModelRecipe:
    """The tiny recipe, its images in tiles."""
    plain = tiny_recipe()
    vision = plain.vision.model_copy(update={"tiles": TilesRecipe(**tiles)})
    return plain.model_copy(update={"vision": vision})


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_pixels_features_logits_and_answers_are_transformers(tower: str, tmp_path: Path) -> None:
    model, processor, folder = next_toy(tmp_path, tower)
    vlm = peers.load(folder)
    assert vlm.spec.tiling is not None and [list(grid) for grid in vlm.spec.tiling.grids] == PINPOINTS
    model.generation_config.eos_token_id = vlm.language.generation_config.eos_token_id = None
    token = model.config.image_token_id
    for width, height in SIZES:
        image = noise(width, height)
        theirs = processor(text="<image>", images=image, return_tensors="pt")
        ours = prepare_all(image, vlm.spec)["vision"]
        np.testing.assert_array_equal(ours, theirs["pixel_values"][0][: len(ours)].numpy())
        assert int((theirs["input_ids"] == token).sum()) == vlm.spec.count(height, width)
        batch = rows_of(vlm, [image])
        packed = model.get_image_features(theirs["pixel_values"], theirs["image_sizes"]).pooler_output[0]
        assert vlm.tiles is not None
        features = vlm.tiles(vlm.connector(vlm.see(batch.pixels)), batch.tile_image, batch.image_sizes)
        torch.testing.assert_close(features, packed, atol=1e-5, rtol=0)
        given = {key: theirs[key] for key in ("pixel_values", "image_sizes")}
        given["input_ids"] = batch.input_ids.masked_fill(batch.image_mask, token)
        expected = model(**given).logits
        torch.testing.assert_close(vlm(batch, logits="all").logits, expected, atol=1e-5, rtol=0)
        said = model.generate(**given, do_sample=False, max_new_tokens=6, pad_token_id=0)
        found = vlm.generate(batch, do_sample=False, max_new_tokens=6, pad_token_id=0)
        assert found[0].tolist() == said[0, batch.input_ids.shape[1] :].tolist()


@torch.no_grad()
def test_several_images_of_several_shapes_in_one_batch(tmp_path: Path) -> None:
    """Three rows: two images, none, three; each row alone gives the same, and so does transformers."""
    model, processor, folder = next_toy(tmp_path)
    vlm = peers.load(folder)
    rows: list[list[Image.Image]] = [[noise(*SIZES[0]), noise(*SIZES[3])], [], [noise(*size) for size in SIZES[1:4]]]
    batch = rows_of(vlm, *rows)
    assert batch.image_sizes is not None and batch.image_sizes.tolist() == [
        [h, w] for w, h in [*SIZES[:1], SIZES[3], *SIZES[1:4]]
    ]
    together = vlm(batch, logits="all").logits
    for number, row in enumerate(rows):
        alone = rows_of(vlm, *([[]] * number), row)
        length = int(batch.attention_mask[number].sum())
        torch.testing.assert_close(
            vlm(alone, logits="all").logits[number, :length], together[number, :length], atol=1e-5, rtol=0
        )
        if row:
            seen = processor.image_processor(row, return_tensors="pt")
            ids = batch.input_ids[number, :length].masked_fill(
                batch.image_mask[number, :length], model.config.image_token_id
            )
            expected = model(input_ids=ids[None], **seen).logits[0]
            torch.testing.assert_close(together[number, :length], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_there_and_back_in_every_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """llava_next -> ours -> folder -> ours, bit for bit; -> hf-llava -> transformers; -> LLaVA's own -> ours."""
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    _, _, folder = next_toy(tmp_path)
    assert run(["convert", str(folder), str(tmp_path / "ours"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "HF LLaVA (LLaVA 1.6)"
    ours = checkpoint.load(tmp_path / "ours")
    batch = rows_of(ours, [noise(*size) for size in SIZES])
    expected = ours(batch, logits="all").logits
    checkpoint.save(ours, tmp_path / "again")
    again = checkpoint.load(tmp_path / "again")
    assert again.spec == ours.spec and torch.equal(again(batch, logits="all").logits, expected)

    assert run(["convert", str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf-llava"]) == 0
    theirs, report = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    processor = LlavaNextProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    seen = processor.image_processor([noise(*size) for size in SIZES], return_tensors="pt")
    ids = batch.input_ids.masked_fill(batch.image_mask, theirs.config.image_token_id)
    torch.testing.assert_close(theirs.eval()(input_ids=ids, **seen).logits, expected, atol=1e-5, rtol=0)
    back = peers.load(tmp_path / "hf")
    assert back.spec == ours.spec
    torch.testing.assert_close(back(batch, logits="all").logits, expected, atol=1e-5, rtol=0)

    original(ours, tmp_path)
    llava = peers.load(tmp_path / "llava", hub=tmp_path / "hub")
    config = json.loads((tmp_path / "llava/config.json").read_text())
    assert config["image_aspect_ratio"] == "anyres" and config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["image_grid_pinpoints"] == [[width, height] for height, width in PINPOINTS]
    assert llava.spec.tiling == ours.spec.tiling
    rows = llava.language.get_input_embeddings().weight.shape[0]  # cut to the tokenizer, as LLaVA's own tool does
    torch.testing.assert_close(llava(batch, logits="all").logits, expected[..., :rows], atol=1e-5, rtol=0)


def original(vlm: VLM, place: Path) -> None:
    """The model in LLaVA's own layout at place/llava, and its tower where LLaVA's config names it, at place/hub."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    name = "openai/clip-vit-large-patch14-336"
    tower: Any = vlm.towers["vision"]
    CLIPVisionModel(CLIPVisionConfig(**(SIGLIP | {"patch_size": SIDE // CELLS}))).save_pretrained(place / "hub" / name)
    tower.facts = replace(tower.facts, source=name)
    write(vlm, place / "llava", "llava")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_aspect_ratio": "anyres_max_9"}, "shrink large images once more"),
        ({"image_grid_pinpoints": [[32, 50]]}, "all multiples of the tile"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "all multiples of the tile"),
        ({"image_grid_pinpoints": None}, "all multiples of the tile"),
        ({"mm_patch_merge_type": "unpad_flat"}, "mm_patch_merge_type is 'unpad_flat'"),
        ({"mm_patch_merge_type": "spatial"}, "unexpected: tiles.newline"),
        ({"mm_vision_select_feature": "cls_patch"}, "no grid of patches"),
    ],
)
def test_tiles_of_llava_that_are_not_known_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    _, _, folder = next_toy(tmp_path)
    original(peers.load(folder), tmp_path)
    place = tmp_path / "llava/config.json"
    config = json.loads(place.read_text())
    text = {"image_grid_pinpoints": str(config["image_grid_pinpoints"])}  # some write it as text
    place.write_text(json.dumps(config | text))
    assert peers.read(tmp_path / "llava", hub=tmp_path / "hub").recipe.vision.tiles is not None
    place.write_text(json.dumps(config | change))
    with pytest.raises((DataError, RecipeError), match=said):
        peers.load(tmp_path / "llava", hub=tmp_path / "hub")


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"vision_feature_select_strategy": "full"}, "no square grid of patches"),
        ("config.json", {"image_grid_pinpoints": [[32, 32]]}, "its processor's"),
        ("config.json", {"image_grid_pinpoints": []}, "its processor's"),
        ("config.json", {"model_type": "llava"}, "unexpected: tiles.newline"),
    ],
)
def test_tiles_of_transformers_that_do_not_fit_are_refused(
    file: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    _, _, folder = next_toy(tmp_path)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(DataError, match=said):
        peers.load(folder)


def test_the_chat_format_follows_the_language_model(tmp_path: Path) -> None:
    """LLaVA 1.6 as its own tool writes it says it nowhere: Mistral's, ChatML's where turns end so, else Vicuna's."""
    _, _, folder = next_toy(tmp_path)
    original(peers.load(folder), tmp_path)
    place, names = tmp_path / "llava/config.json", tmp_path / "llava/tokenizer_config.json"
    told = json.loads(place.read_text())
    (tmp_path / "llava/chat_template.jinja").unlink()
    assert peers.read(tmp_path / "llava", hub=tmp_path / "hub").recipe.chat == "vicuna_v1"
    place.write_text(json.dumps(told | {"model_type": "llava_mistral"}))
    assert peers.read(tmp_path / "llava", hub=tmp_path / "hub").recipe.chat == "mistral_instruct"
    place.write_text(json.dumps(told))
    names.write_text(json.dumps(json.loads(names.read_text()) | {"eos_token": "<|im_end|>"}))
    assert peers.read(tmp_path / "llava", hub=tmp_path / "hub").recipe.chat == "chatml_direct"


def test_layouts_without_tiles_refuse_them(tmp_path: Path) -> None:
    vlm = build(tiled())
    for layout in set(LAYOUTS) - {"hf-llava", "llava"}:
        with pytest.raises(RecipeError, match="tiles"):
            write(vlm, tmp_path / "x", layout)
    with pytest.raises(RecipeError, match="puts tiles together as unpad"):
        write(build(tiled(merge="flat")), tmp_path / "x", "hf-llava")
    assert not (tmp_path / "x").exists()


# --- the model and its recipe -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["unpad", "spatial", "flat"])
@torch.no_grad()
def test_tokens_stand_where_the_layout_says(merge: Any) -> None:
    vlm = build(tiled(merge=merge))
    images = [noise(70, 40), noise(9, 200)]
    batch = rows_of(vlm, images)
    visual = vlm.connector(vlm.see(batch.pixels))
    embedded, first, wanted = vlm.embed(batch)[0][batch.image_mask[0]], 0, []
    assert vlm.spec.tiling is not None and vlm.tiles is not None
    assert (vlm.tiles.newline is not None) == (merge == "unpad")
    for image in images:
        count = vlm.spec.tiling.tiles(image.height, image.width)
        tokens = visual[first : first + count].flatten(0, 1)
        for place in vlm.spec.tiling.layout(image.height, image.width):
            wanted.append(tokens[place] if place >= 0 else vlm.tiles.newline)
        first += count
    assert torch.equal(embedded, torch.stack(wanted))  # type: ignore[arg-type]


def test_a_batch_that_does_not_fit_is_refused() -> None:
    vlm = build(tiled())
    batch = rows_of(vlm, [noise(70, 40)], [])
    with pytest.raises(ValueError, match="how large the images are"):
        vlm(replace(batch, image_sizes=None))
    with pytest.raises(ValueError, match=r"have \[3\] tiles, but \[5\] are given"):
        vlm(replace(batch, image_sizes=torch.tensor([[32, 64]])))
    with pytest.raises(ValueError, match=r"images and marks disagree.* tile"):
        vlm(replace(batch, image_mask=torch.zeros_like(batch.image_mask)))
    with pytest.raises(ValueError, match="sizes of 1"):
        item = Item(encode([Turn("user", "a")], vlm.chat, vlm.tokenizer, vlm.spec, [], generate=True), sizes=[(1, 1)])
        collate([item], 0)
    vlm.towers["vision"].forward = lambda pixels: pytest.fail("the tower ran")  # type: ignore[method-assign]
    assert vlm(rows_of(vlm, []), logits="last").logits.shape[0] == 1  # text alone


@pytest.mark.parametrize(
    ("vision", "connector", "said"),
    [
        ({"tokens": "cls_patch"}, "mlp2x_gelu", "no grid of patches"),
        ({}, "resampler", "no square grid"),
        ({}, "minigpt", "no square grid"),
    ],
)
def test_what_leaves_no_grid_cannot_be_put_together(vision: dict[str, Any], connector: str, said: str) -> None:
    recipe = tiled()
    changed = recipe.vision.model_copy(update=vision)
    told = recipe.model_copy(
        update={"vision": changed, "connector": recipe.connector.model_copy(update={"kind": connector})}
    )
    with pytest.raises(RecipeError, match=said):
        build_meta(told)


def test_two_towers_see_the_same_tiles() -> None:
    name = tiny_recipe().vision.tower
    both: dict[str, Any] = {"towers": [{"tower": name, "name": "one"}, {"tower": name, "name": "two"}], "tiles": {}}
    vlm = build(tiny_recipe().model_copy(update={"vision": VisionRecipe.model_validate(both)}))
    batch = rows_of(vlm, [noise(70, 40)])
    assert set(batch.pixels) == {"one", "two"} and vlm(batch, logits="last").logits.isfinite().all()
    both |= {"fusion": "interleave"}
    with pytest.raises(RecipeError, match="interleaved"):
        build_meta(tiny_recipe().model_copy(update={"vision": VisionRecipe.model_validate(both)}))
    both = {"towers": [{"tower": name, "name": "one"}, {"tower": name, "name": "two", "s2": [32, 64]}], "tiles": {}}
    with pytest.raises(RecipeError, match="cannot see the same tiles"):
        build_meta(tiny_recipe().model_copy(update={"vision": VisionRecipe.model_validate(both)}))


# --- answering --------------------------------------------------------------------------------------------------------


def test_the_engine_answers_as_transformers_generate_does() -> None:
    """Several questions about one image, several images, none; in company and from a full and an empty shelf."""
    vlm = build(tiled())
    vlm.language.generation_config.eos_token_id = None
    pictures = [noise(*size) for size in SIZES]
    rows = [[pictures[0]], [pictures[0]], [pictures[1], pictures[2]], [], [pictures[3]], [pictures[4], pictures[4]]]
    expected = []
    for number, images in enumerate(rows):
        batch = rows_of(vlm, *([[]] * number), images)
        batch = collate([_item(vlm, number, images)], 0, "left")
        ids = vlm.generate(batch, do_sample=False, max_new_tokens=6, pad_token_id=0)
        expected.append(vlm.tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    requests = [
        Request(str(number), tuple(filter(None, map(reference, images))), (_asked(number, images),), max_new_tokens=6)
        for number, images in enumerate(rows)
    ]
    for budget in (0, 2**20):
        engine = Engine(vlm, precision="fp32", slots=3, cache_bytes=budget)
        for _ in range(2):
            said = engine.answer(requests)
            assert [one.text for one in said] == [text.strip() for text in expected]
    assert len(engine.eyes.shelf) == 5


@pytest.mark.parametrize("positions", [7, 1024])
def test_a_server_answers_as_the_engine_does(positions: int) -> None:
    """Prompts in passes that cut images, and images of several sizes behind what was said before."""
    vlm = build(tiled())
    pictures = [noise(*size) for size in SIZES]
    rows = [[pictures[0]], [pictures[1], pictures[2]], [pictures[0], pictures[3]], [], [pictures[4], pictures[4]]]
    requests = [
        Request(str(number), tuple(filter(None, map(reference, images))), (_asked(number, images),), max_new_tokens=6)
        for number, images in enumerate(rows)
    ]
    want = [one.text for one in Engine(vlm, precision="fp32").answer(requests)]
    live = Live(Engine(vlm, precision="fp32", slots=3))
    live.lanes.pass_tokens = positions
    try:
        for _ in range(2):
            assert [answer(live, Ask(request))[0] for request in requests] == want
        assert live.figures()["image_misses"] == 5 and live.figures()["reused_tokens"] > 0
    finally:
        live.close()


def _asked(number: int, images: list[Image.Image]) -> Turn:
    return Turn("user", f"{IMAGE_MARK}\n" * len(images) + "how many ?" * (number + 1))


def _item(vlm: VLM, number: int, images: list[Image.Image]) -> Item:
    sizes = [(image.height, image.width) for image in images]
    encoded = encode([_asked(number, images)], vlm.chat, vlm.tokenizer, vlm.spec, sizes, generate=True)
    return Item(encoded, pixels=[prepare_all(image, vlm.spec) for image in images], sizes=sizes)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("turn", [1, 3, 6])
def test_a_turned_photo_is_cut_as_it_is_seen(form: str, turn: int) -> None:
    image, out = noise(70, 40), BytesIO()
    exif = image.getexif()
    exif[0x0112] = turn
    image.save(out, form, **({"exif": exif} if form in ("JPEG", "PNG", "WEBP") else {}))
    data = out.getvalue()
    assert upright_size(data) == decode(data).size
    vlm = build(tiled())
    assert isinstance(Model(vlm, precision="fp32").ask(data, "how many ?", max_new_tokens=2), str)


# --- training, showing, chatting --------------------------------------------------------------------------------------


def shapes_set(folder: Path) -> Path:
    """The toy set, its pictures of many shapes."""
    path = toy_set(folder)
    for number in range(24):
        with Image.open(folder / f"{number}.png") as image:
            image.resize(SIZES[number % len(SIZES)]).save(folder / f"{number}.png")
    return path


def test_training_is_the_same_from_pictures_and_from_kept_features(tmp_path: Path) -> None:
    from leveret.train.run import train

    data = shapes_set(tmp_path / "data")
    runs = []
    for cached in (True, False):
        recipe = stage_of(data, cache_features=cached, learn={"connector": {"lr": 5e-3}}, micro_batch=3)
        recipe = recipe.model_copy(update={"model": tiled()})
        train(recipe, tmp_path / str(cached))
        runs.append(checkpoint.load(tmp_path / str(cached)))
    fresh = build(tiled())
    for name, value in fresh.named_parameters():
        one, two = (vlm.get_parameter(name) for vlm in runs)
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
        assert torch.equal(one, value) != name.startswith(("connector", "tiles")), name  # the newline learns too
    losses = [json.loads(line)["loss"] for line in (tmp_path / "True/tune/metrics.jsonl").read_text().splitlines()
              if "loss" in line]  # fmt: skip
    assert losses[-1] < losses[0]


def test_bad_pictures_are_named_before_the_first_step(tmp_path: Path) -> None:
    from leveret.train.run import train

    data = shapes_set(tmp_path / "data")
    (tmp_path / "data/3.png").write_bytes(b"no image")
    (tmp_path / "data/5.png").unlink()
    recipe = stage_of(data, bad_share=0.2, steps=1).model_copy(update={"model": tiled()})
    train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/tune/quarantine.jsonl").read_text().splitlines()]
    assert [(line["id"], line["image"], line["reason"]) for line in lines] == [
        ("toy-3", "3.png", "image not an image"), ("toy-5", "5.png", "image missing"),
    ]  # fmt: skip


def test_resize_has_no_say_in_tiles(tmp_path: Path) -> None:
    from leveret.train.run import train

    recipe = stage_of(shapes_set(tmp_path / "data"), resize="pad").model_copy(update={"model": tiled()})
    with pytest.raises(RecipeError, match="sees images in tiles"):
        train(recipe, tmp_path / "run")


def test_show_and_chat_tell_of_tiles(tmp_path: Path) -> None:
    from leveret.serve.chat import Talk
    from leveret.show import show

    vlm = build(tiled())
    checkpoint.save(vlm, tmp_path / "model")
    data = shapes_set(tmp_path / "data")
    facts = show(data, index=5, model=tmp_path / "model", out=tmp_path / "png")  # 33 x 200: a column of three tiles
    tokens = vlm.spec.count(200, 33)
    assert facts["tokens"]["images"] == tokens == facts["shapes"]["image tokens (tiles put together)"][0]
    assert facts["shapes"]["pixels[vision]"] == [4, 3, SIDE, SIDE] and len(list((tmp_path / "png").iterdir())) == 4
    with Image.open(data.parent / "5.png") as picture, Image.open(tmp_path / "png/sample-5-2.png") as second:
        assert vlm.spec.tiling is not None
        np.testing.assert_array_equal(np.asarray(second), np.asarray(cut(picture, vlm.spec.tiling)[1]))
    told = Talk(Model(vlm, precision="fp32")).show(str(tmp_path / "data/5.png"))
    assert f"4 tiles of 32 x 32, {tokens} tokens" in told


def test_a_model_that_sees_tiles_is_examined(tmp_path: Path) -> None:
    checkpoint.save(build(tiled()), tmp_path / "model")
    world = tiny_world(tmp_path / "world", 2)
    assert run(["eval", str(tmp_path / "model"), str(world), "-o", str(tmp_path / "out"), "--json"]) == 0
    assert (tmp_path / "out/report.html").is_file()
