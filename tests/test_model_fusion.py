"""Several towers in one model: fused as Prismatic and the Factory fuse, saved, taught and asked like one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fakes import SIGLIP, tiny_batch, tiny_recipe, tiny_vlm
from leveret.model.build import build, build_meta, check
from leveret.model.checkpoint import load, save
from leveret.model.fusion import fuse
from leveret.model.parts import count, count_whole, learnable, parts_table
from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, VisionRecipe
from leveret.model.towers import TowerFacts, whole
from leveret.records import ImageSpec
from leveret.runs import RecipeError
from leveret.train.stages import Learn
from tower_fakes import CLASSES, eva_file, states_of, toy
from train_fakes import toy_set


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every family's toy tower as a place a recipe can name."""
    root = tmp_path_factory.mktemp("towers")
    for family in CLASSES:
        toy(family).save_pretrained(root / family)
    named = {family: str(root / family) for family in CLASSES}
    return {**named, "eva02_clip": str(eva_file(root / "eva.pt"))}


def two(folders: dict[str, str], fusion: str = "channel", **extra: Any) -> ModelRecipe:
    """DINOv2 with registers and SigLIP, DINOv2 first as in Prismatic."""
    towers = [{"tower": folders["dinov2_with_registers"]}, {"tower": folders["siglip_vision_model"], **extra}]
    vision = VisionRecipe.model_validate({"towers": towers, "fusion": fusion})
    return tiny_recipe().model_copy(update={"vision": vision})


@pytest.mark.parametrize("fusion", ["channel", "interleave"])
def test_two_towers_are_seen_saved_and_loaded(fusion: str, folders: dict[str, str], tmp_path: Path) -> None:
    vlm = build(two(folders, fusion))
    assert list(vlm.towers) == [view.name for view in vlm.spec.towers] == ["dinov2", "siglip"]
    assert [view.mean[0] for view in vlm.spec.towers] == [0.485, 0.5], "each tower has its own normalisation"
    assert vlm.spec.tokens == (4 if fusion == "channel" else 8)
    batch = tiny_batch(vlm, (16, 14))
    left, right = (vlm.towers[name](batch.pixels[name]) for name in ("dinov2", "siglip"))
    seen = vlm.see(batch.pixels)
    if fusion == "channel":
        assert torch.equal(seen, torch.cat([left, right], dim=2))
    else:
        assert torch.equal(seen[:, 0::2], left) and torch.equal(seen[:, 1::2], right)
    with torch.no_grad():
        logits = vlm(batch).logits
        back = load(save(vlm, tmp_path / "m"))
        assert torch.equal(back(batch).logits, logits)
    assert back.spec == vlm.spec == ImageSpec.from_dict(json.loads(json.dumps(vlm.spec.to_dict())))
    assert back.recipe == vlm.recipe
    one, other = (
        [json.dumps(tower.facts.to_dict(), sort_keys=True) for tower in model.towers.values()]  # type: ignore[union-attr, operator]
        for model in (vlm, back)
    )
    assert one == other
    out = vlm(batch)
    out.loss_sum.backward()
    idle = {f"towers.{name}.{key}" for name, tower in vlm.towers.items() for key, _ in tower.unused()}  # type: ignore[union-attr, operator]
    assert idle == {"towers.dinov2.model.embeddings.mask_token"}
    for name, parameter in vlm.named_parameters():
        assert (parameter.grad is None) == (name in idle), name
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("family", [*CLASSES, "eva02_clip"])
def test_a_model_of_every_family(family: str, folders: dict[str, str], tmp_path: Path) -> None:
    """One tower and two: forward, backward, and the same bits from a saved folder that knows nothing of its source."""
    one = {"tower": folders[family], "keep": ["norm"]}
    for vision in ({**one}, {"towers": [one, {"tower": folders["clip_vision_model"], "s2": [32, 64]}]}):
        recipe = tiny_recipe().model_copy(update={"vision": VisionRecipe.model_validate(vision)})
        vlm = build(recipe)
        batch = tiny_batch(vlm)
        folder = save(vlm, tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        for facts in config["vision"]:
            facts["source"] = "/gone"
        (folder / "config.json").write_text(json.dumps(config))
        with torch.no_grad():
            assert torch.equal(load(folder)(batch).logits, vlm(batch).logits)
        vlm(batch).loss_sum.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in vlm.parameters())
        assert all(p.grad is not None for _, p in learnable(vlm, "vision"))
        assert count(build_meta(recipe)) == count(vlm) < count_whole(vlm)


def test_parts_of_several_towers(folders: dict[str, str]) -> None:
    vlm = build(two(folders))
    learn = {"vision": Learn(lr=1e-6, from_layer=1), "connector": Learn(lr=1e-3)}
    rows = {row.part: row for row in parts_table(vlm, learn)}
    blocks = [p.numel() for tower in vlm.towers.values() for p in tower.blocks[1].parameters()]  # type: ignore[union-attr, index]
    assert rows["vision"].trainable == sum(blocks)
    assert rows["vision"].parameters == sum(p.numel() for p in vlm.towers.parameters())
    note = rows["vision"].note
    assert note.count("2 of 3 layers, 4 tokens x 16") == 2
    assert note.endswith("channel fusion, from layer 1") and "16 kept but idle" in note
    learnt = [name for name, _ in learnable(vlm, "vision")]
    assert {name.split(".")[1] for name in learnt} == {"dinov2", "siglip"}
    assert not any(name.endswith("mask_token") for name in learnt)


def test_names_are_unique(folders: dict[str, str]) -> None:
    clip = {"tower": folders["clip_vision_model"]}
    vision = VisionRecipe.model_validate({"towers": [clip, clip, {**clip, "name": "third"}, clip]})
    facts, _ = check(tiny_recipe().model_copy(update={"vision": vision}))
    assert [one.name for one in facts] == ["clip", "clip_2", "third", "clip_3"]
    for name, words in (("third", "another tower's"), ("keys", "a word of torch's")):
        bad = VisionRecipe.model_validate({"towers": [{**clip, "name": "third"}, {**clip, "name": name}]})
        with pytest.raises(RecipeError, match=rf"model\.vision\.towers\.1\.name: '{name}' is {words}"):
            check(tiny_recipe().model_copy(update={"vision": bad}))


def test_towers_that_do_not_fit(folders: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="dinov2 gives 4, siglip gives 9; set `size`"):
        build_meta(two(folders, size=48))
    with pytest.raises(RecipeError, match="dinov2 is 16 wide, siglip is 32 wide; choose fusion: channel"):
        build_meta(two(folders, "interleave", s2=[32, 64]))
    bad = VisionRecipe.model_validate({"towers": [{"tower": "nowhere"}, {"tower": folders["vit"], "layer": 9}]})
    with pytest.raises(RecipeError) as caught:
        check(tiny_recipe().model_copy(update={"vision": bad}))
    assert "model.vision.towers.0.tower: 'nowhere'" in str(caught.value)
    assert "model.vision.towers.1.layer: 9 given" in str(caught.value)
    for data, words in (
        ({}, "neither of `tower` and `towers`"),
        ({"tower": "a", "towers": [{"tower": "b"}]}, "both of `tower` and `towers`"),
        ({"towers": [{"tower": "b"}], "layer": -1, "s2": [32]}, "layer, s2 given beside `towers`"),
        ({"towers": [{"tower": "b", "name": "A.b"}]}, "should match pattern"),
    ):
        with pytest.raises(ValidationError, match=words):
            VisionRecipe.model_validate(data)


def test_fuse_keeps_the_towers_in_order() -> None:
    one, two_, three = (torch.full((1, 2, 1), value) for value in (1.0, 2.0, 3.0))
    assert fuse([one, two_, three], "interleave").flatten().tolist() == [1, 2, 3, 1, 2, 3]
    assert fuse([one, two_], "channel").tolist() == [[[1.0, 2.0], [1.0, 2.0]]]
    assert fuse([one], "interleave") is one


def test_a_resize_for_all_and_for_each(folders: dict[str, str]) -> None:
    recipe = two(folders, resize="crop")
    shared = recipe.vision.model_copy(update={"resize": "pad"})
    assert [one.resize for one in shared.each()] == ["pad", "crop"]
    assert [one.resize for one in shared.resized("squash").each()] == ["squash", "squash"]


def test_folders_of_the_first_format_still_load(tmp_path: Path) -> None:
    """What an earlier leveret wrote: one tower, and none of the words that came later."""
    vlm = tiny_vlm()
    folder = save(vlm, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (vision,) = config["vision"]
    config |= {
        "format": 1,
        "vision": {key: vision[key] for key in vision if key not in ("name", "tokens", "s2", "resample")},
    }
    said = config["recipe"]["vision"]
    config["recipe"]["vision"] = {key: said[key] for key in ("tower", "layer", "resize", "keep")}
    (folder / "config.json").write_text(json.dumps(config))
    back, batch = load(folder), tiny_batch(vlm)
    with torch.no_grad():
        assert torch.equal(back(batch).logits, vlm(batch).logits)
    assert TowerFacts.from_dict(config["vision"]) == back.towers["vision"].facts  # type: ignore[union-attr]


def test_the_engine_answers_with_two_towers(folders: dict[str, str]) -> None:
    """What the engine says of a picture is what the model's own forward continues with, token by token."""
    import numpy as np
    from PIL import Image

    from leveret.generate.model import Model
    from leveret.inputs import Item, collate, encode, prepare
    from leveret.records import Turn

    vlm = build(two(folders, "interleave"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    said = Model(vlm, precision="fp32").ask(picture, "what colour is it ?", max_new_tokens=6)
    turns = (Turn("user", "<image>\nwhat colour is it ?"),)
    encoded = encode(turns, vlm.chat, vlm.tokenizer, vlm.spec, [(40, 56)], generate=True)
    row = Item(encoded, pixels=[{view.name: prepare(picture, view) for view in vlm.spec.towers}])
    ids = vlm.generate(collate([row], 0), max_new_tokens=6, do_sample=False)
    assert said == vlm.tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


@pytest.mark.parametrize("learn", ["connector", "vision"])
def test_two_towers_learn(learn: str, folders: dict[str, str], tmp_path: Path) -> None:
    """A stage on pictures: with frozen towers (their features are cached) and with towers that learn."""
    from leveret.train.run import train
    from train_fakes import recipe

    stage = recipe(toy_set(tmp_path / "data"), learn={"connector": {"lr": 1e-3}, learn: {"lr": 1e-3}}, resize="pad")
    stage = stage.model_copy(update={"model": two(folders, "interleave")})
    train(stage, tmp_path / "run")
    vlm = load(tmp_path / "run")
    assert [view.resize for view in vlm.spec.towers] == ["pad", "pad"]
    fresh = build(two(folders, "interleave"))
    changed = [name for name, p in fresh.named_parameters() if not torch.equal(p, vlm.get_parameter(name))]
    assert changed and {name.split(".")[0] for name in changed} == {
        "connector",
        *(["towers"] if learn == "vision" else []),
    }


def test_published_compositions_without_memory() -> None:
    """Prism-DINOSigLIP (384 px) and DINOCLIP (336 px): 729 x 2176 and 576 x 2048; MoF: 512 x 1024."""
    language = LanguageRecipe(name="microsoft/phi-2")

    def seen(*towers: dict[str, Any], fusion: str = "channel") -> tuple[int, int, int]:
        vision = VisionRecipe.model_validate({"towers": list(towers), "fusion": fusion})
        vlm = build_meta(
            ModelRecipe(vision=vision, connector=ConnectorRecipe(kind="linear"), language=language, chat="bunny")
        )
        kept = [tower.facts for tower in vlm.towers.values()]  # type: ignore[union-attr]

        return vlm.spec.tokens, vlm.connector.weight.shape[1], sum(whole(facts) for facts in kept)  # type: ignore[union-attr, index, misc, return-value, arg-type]

    dino = "timm/vit_large_patch14_reg4_dinov2.lvd142m"
    tokens, width, total = seen({"tower": dino, "size": 384}, {"tower": "timm/vit_so400m_patch14_siglip_384"})
    # published: 303,715,328 + 428,225,600; with us DINOv2 also holds a class position and a mask token, both zeros
    assert (tokens, width, total) == (729, 2176, 303_715_328 + 2048 + 428_225_600)
    tokens, width, _ = seen({"tower": dino, "size": 224}, {"tower": "timm/vit_so400m_patch14_siglip_224"})
    assert (tokens, width) == (256, 2176)
    tokens, width, total = seen({"tower": dino, "size": 336}, {"tower": "timm/vit_large_patch14_clip_336.openai"})
    assert (tokens, width, total) == (576, 2048, 303_558_656 + 2048 + 303_507_456)
    mof = {"tower": "openai/clip-vit-large-patch14"}, {"tower": "facebook/dinov2-large", "normalise": "clip"}
    assert seen(*mof, fusion="interleave")[:2] == (512, 1024)


def test_the_page_about_towers_holds(tmp_path: Path) -> None:
    """Every recipe of docs/towers.md composes, and the rows it shows can be added."""
    import re

    import transformers
    import yaml

    from leveret.model import tower_facts, tower_table
    from leveret.model.towers import build_tower, describe, describe_all, load_tower

    page = (Path(__file__).resolve().parents[1] / "docs" / "towers.md").read_text("utf-8")
    shapes = []
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        vision = VisionRecipe.model_validate(yaml.safe_load(block)["vision"])
        with torch.device("meta"):
            eyes = [build_tower(facts) for facts in describe_all(vision)]
        shapes.append((eyes[0].tokens, sum(eye.width for eye in eyes)))
    assert shapes == [(729, 1152), (729, 2176), (729, 3456), (576, 1024), (1024, 768), (256, 1152)]
    names: dict[str, Any] = {
        "TOWERS": tower_table.TOWERS, "TowerRow": tower_table.TowerRow, "Family": tower_facts.Family,
        "TOWER_FAMILIES": tower_facts.TOWER_FAMILIES,
    }  # fmt: skip
    before = [dict(names[table]) for table in ("TOWERS", "TOWER_FAMILIES")]
    try:
        for block in re.findall(r"```python\n(?!# \w+\.py)(.*?)```", page, re.DOTALL):  # the others: test_own_parts.py
            exec(block, names)
        torch.manual_seed(0)
        model = transformers.IJepaModel(transformers.IJepaConfig(**SIGLIP)).eval()
        model.save_pretrained(tmp_path)
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            got = load_tower(describe(VisionRecipe(tower=str(tmp_path))))(pixels)
            torch.testing.assert_close(got, states_of(model, "ijepa", pixels)[2])
        assert "facebook/dinov2-small" in names["TOWERS"]
    finally:
        for table, rows in zip(("TOWERS", "TOWER_FAMILIES"), before, strict=True):
            names[table].clear()
            names[table].update(rows)
