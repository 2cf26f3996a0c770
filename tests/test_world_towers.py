"""The drawn world's other towers: how they are taught, what is shipped, what their tokens hold; pictures that are not
square, and the studies that ask about both."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fakes import world_tokenizer
from leveret.cli import run as command
from leveret.evaluate.forms.boxes import box_of
from leveret.inputs.resize import fit
from leveret.model.recipe import TowerRecipe, VisionRecipe
from leveret.model.tiny import TinyVisionTower, load_module
from leveret.model.tower_table import TOWERS as ROWS
from leveret.model.tower_table import describe
from leveret.model.towers import load_tower
from leveret.records import TowerView
from leveret.runs import RecipeError, read_json, sha256_of
from leveret.world import distil, probe, teachers
from leveret.world.backbones import wanted
from leveret.world.examination import ask, exam_scene
from leveret.world.languages import LANGUAGES
from leveret.world.scenes import HELD_OUT, OBLONG, USUAL, frames_with, sample_scene, stream, tune_scene
from leveret.world.towers import TOWERS, file_of
from leveret.world.write import WorldSize, draw, same_world

WEIGHTS = Path(str(files("leveret") / "world" / "weights"))
STUDIES = ("prismatic/encoder", "prismatic/resolution", "prismatic/resize", "tinyllava/encoder")


def quiet(*_: Any, **__: Any) -> None:
    pass


# --- teaching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["contrastive", "contrastive-32", "supervised", "self-supervised"])
def test_a_tower_is_taught_to_the_same_bits_however_often_it_is_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "BATCH", 3)
    monkeypatch.setattr(teachers, "probe", lambda tower, seed: {"seed": seed})

    def taught(out: Path, seed: int, stops: list[int | None]) -> bytes:
        for stop in stops:
            figures = teachers.train_tower(
                name,
                out,
                out / "state",
                world_tokenizer(),
                seed=seed,
                steps=3,
                log=quiet,
                save_every=1,
                stop_after=stop,
            )
            assert figures == ({"seed": seed} if stop is None else {})
            assert file_of(out, name).exists() == (stop is None)
        return file_of(out, name).read_bytes()

    whole = taught(tmp_path / "whole", 0, [None])
    assert taught(tmp_path / "stopped", 0, [1, 2, None]) == whole
    if name == "supervised":
        assert taught(tmp_path / "other", 1, [None]) != whole


def test_all_towers_see_the_same_scenes_and_none_sees_what_is_held_out() -> None:
    seen = [teachers.drawn(0, step, size, 40) for step in range(2) for size in (64, 32)]
    assert seen[0].scenes == seen[1].scenes and seen[0].captions == seen[1].captions and seen[0].seed == seen[1].seed
    assert seen[0].pixels.shape == (40, 3, 64, 64) and seen[1].pixels.shape == (40, 3, 32, 32)
    assert seen[0].scenes != seen[2].scenes
    assert not HELD_OUT & {
        (thing.colour, thing.shape) for one in seen for scene in one.scenes for thing in scene.things
    }
    assert not HELD_OUT & set(teachers.Labels.NAMES)


def test_labels_say_what_is_there_and_not_where() -> None:
    teacher = teachers.Labels(TinyVisionTower({"size": 64, **teachers.SHAPE}), None)
    scene = next(scene for i in range(99) if (scene := sample_scene(stream(0, "labels", i), word=1.0)).word)
    (row,) = teacher.truth([scene])
    said = {teacher.NAMES[i] for i in row.nonzero().flatten()}
    assert scene.word is not None
    assert said == {(thing.colour, thing.shape) for thing in scene.things} | set(scene.word.text)


@given(n=st.integers(2, 40), k=st.integers(2, 20), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_teachers_shares_sum_to_one_and_use_all_prototypes_alike(n: int, k: int, seed: int) -> None:
    said = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    shares = distil.balanced(said, rounds=400)
    assert torch.allclose(shares.sum(1), torch.ones(n), atol=1e-4) and (shares >= 0).all()
    assert torch.allclose(shares.sum(0), torch.full((k,), n / k), rtol=0.05)


def test_crops_lie_in_the_picture_and_hidden_cells_come_in_blocks() -> None:
    rng = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-0.2, 0.2, 64).expand(16, 3, 64, 64)
    cut = distil.crops(ramp, rng)
    assert cut.shape == ramp.shape and cut.isfinite().all() and cut.abs().max() <= 1
    assert len({round(float(one.mean()), 3) for one in cut}) > 10  # each its own
    for grid in (4, 7, 8):
        mask = distil.hidden(200, grid, rng)
        assert mask.shape == (200, grid, grid)
        shares = mask.float().mean((1, 2))
        assert 0.35 < float((shares > 0).float().mean()) < 0.65 and float(shares[shares > 0].mean()) < 0.6
        assert torch.equal(mask[:, 0, 0], mask[:, 1, 1])


# --- what is shipped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_a_shipped_tower_loads_by_its_name_and_gives_finite_tokens(name: str) -> None:
    facts = describe(TowerRecipe(tower=f"world/{name}"))
    assert facts.size == TOWERS[name].size and facts.source == f"world/{name}"
    tower = load_tower(facts)
    side = facts.size
    with torch.no_grad():
        made = tower(torch.rand(2, 3, side, side) * 2 - 1)
    assert made.shape == (2, (side // 8) ** 2, 128) and made.isfinite().all() and made.std() > 0.1


def test_the_table_names_all_towers_and_the_card_is_that_of_the_shipped_files() -> None:
    rows = {name.removeprefix("world/") for name, row in ROWS.items() if "towers/" in row.package}
    assert rows == set(TOWERS)
    card = read_json(WEIGHTS / "towers" / "card.json")
    assert set(card["files"]) == {f"{name}.safetensors" for name in TOWERS}
    for name, facts in card["files"].items():
        path = WEIGHTS / "towers" / name
        assert sha256_of(path) == facts["sha256"] and path.stat().st_size == facts["bytes"] < 1_500_000
    assert len(set(card["steps"].values())) == 1, "one budget"
    words = (WEIGHTS / "towers" / "CARD.md").read_text()
    assert all(f"**{name}** ({card['steps'][name]:,} steps" in words for name in TOWERS)
    assert {path.name for path in (WEIGHTS / "towers").iterdir()} == {*card["files"], "CARD.md", "card.json"}


def test_a_probe_tells_a_taught_tower_from_one_with_random_weights() -> None:
    torch.manual_seed(0)
    untaught = probe.probe(TinyVisionTower({"size": 64, **teachers.SHAPE}), 1, taught=128, asked=48)
    taught = load_module(TinyVisionTower, WEIGHTS / "vision.safetensors")
    figures = probe.probe(taught, 1, taught=128, asked=48)
    assert figures.keys() == untaught.keys() and all(0 <= v <= 1 and math.isfinite(v) for v in untaught.values())
    assert figures["shape"] > untaught["shape"] + 0.3 and figures["letter"] > untaught["letter"] + 0.3


def test_two_towers_side_by_side_are_as_wide_as_both() -> None:
    from leveret.model.build import build
    from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe

    both = [{"tower": "world/contrastive", "resize": "squash"}, {"tower": "world/self-supervised", "resize": "squash"}]
    recipe = ModelRecipe(
        vision=VisionRecipe.model_validate({"towers": both}),
        connector=ConnectorRecipe(kind="residual_2d"),
        language=LanguageRecipe(name="world/language"),
        chat="tiny",
    )
    model = build(recipe, seed=0).eval()
    assert [tower.facts.source for tower in model.towers.values()] == [one["tower"] for one in both]
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        seen = model.see({name: pixels for name in model.towers})
        single = [load_tower(describe(TowerRecipe.model_validate(one))).eval()(pixels) for one in both]
        assert model.connector(seen).shape[:2] == (2, 64)
    assert seen.shape == (2, 64, 256) and torch.allclose(seen, torch.cat(single, 2), atol=1e-5)


def test_only_the_backbones_that_are_asked_for_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wanted(()) == ("vision", "scorer", "language", *LANGUAGES, *TOWERS)
    assert wanted(["world/supervised", "vision"]) == ("vision", "supervised")
    with pytest.raises(RecipeError, match=r"--only contrastiv: .*Did you mean contrastive\?"):
        wanted(["contrastiv"])
    out = ["world", "backbones", "-o", str(tmp_path / "out"), "--dry-run", "--json"]
    assert command([*out, "--only", "supervised", "--only", "contrastive-32"]) == 0
    assert "contrastive-32, supervised" in json.loads(capsys.readouterr().out)["what"]
    assert command([*out, "--only", "resnet"]) == 2
    assert not (tmp_path / "out").exists()


# --- pictures that are not square -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_pictures_is_clearly_not_square(share: float) -> None:
    frames = frames_with(share)
    assert frames_with(0.0) is USUAL
    scenes = [sample_scene(stream(0, "oblong", i), frames=frames) for i in range(2000)]
    counts = Counter((scene.width, scene.height) for scene in scenes)
    assert abs(sum(counts[side] for side in OBLONG) / 2000 - share) < 0.04
    assert all(counts[side] > 0 for side in OBLONG)
    for width, height in OBLONG:
        assert 1.5 <= max(width, height) / min(width, height) <= 2
    for scene in (tune_scene(0, 3, frames_with(1.0)), exam_scene(0, "test", 3, frames_with(1.0))[0]):
        assert (scene.width, scene.height) in OBLONG


def test_worlds_that_agree_in_their_web_part_have_one_web(tmp_path: Path) -> None:
    """To the byte: what a study makes of the web alone is shared by them."""
    usual = WorldSize(web=40, tune=10, test=6, harder=0, captions=0)
    other = WorldSize(
        web=40, tune=12, turns=4, text_share=0.5, test=12, harder=6, captions=8, refusals=0.3, asked={"box": 0.1}
    )
    fields = {field.name for field in dataclasses.fields(WorldSize)}
    assert fields - {"web", "strength", "oblong", "plain"} == {
        field for field in fields if getattr(usual, field) != getattr(other, field)
    }
    assert usual.web_part() == other.web_part()
    roots = [draw(tmp_path / name, seed=3, size=size, workers=1) for name, size in (("a", usual), ("b", other))]
    for name in ("web.json", "web_truth.jsonl"):
        assert (roots[0] / name).read_bytes() == (roots[1] / name).read_bytes()
    pictures = [{path.name: path.read_bytes() for path in (root / "web").rglob("*.jpg")} for root in roots]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 40
    for change in ({"strength": "severe"}, {"oblong": 1.0}, {"plain": 1.0}, {"web": 41}):
        assert dataclasses.replace(usual, **change).web_part() != usual.web_part()


def test_an_oblong_world_tells_its_boxes_in_the_pictures_own_sides(tmp_path: Path) -> None:
    size = WorldSize(web=40, tune=30, test=12, harder=0, captions=8, oblong=1.0)
    root = draw(tmp_path / "world", seed=0, size=size, workers=1)
    for folder in ("web", "images/tune", "images/test", "images/captions"):
        sides = {Image.open(path).size for path in (root / folder).rglob("*.jpg")}
        assert sides <= set(OBLONG) and len(sides) > 2, folder
    refs = {ref["ann_id"]: ref for ref in read_json(root / "eval" / "box" / "refs(unc).json")}
    instances = read_json(root / "eval" / "box" / "instances.json")
    shown = {image["id"]: image for image in instances["images"]}
    for item in instances["annotations"]:
        image = shown[item["image_id"]]
        assert Image.open(root / "images" / image["file_name"]).size == (image["width"], image["height"])
        x, y, w, h = item["bbox"]
        assert x >= 0 and y >= 0 and x + w <= image["width"] and y + h <= image["height"] and w == h
        assert refs[item["id"]]["file_name"] == image["file_name"]
    asked = ask(0, "test", "box", 12, frames_with(1.0))
    for item, taught in zip(instances["annotations"][-12:], asked, strict=True):
        image = shown[item["image_id"]]
        scored = box_of(item["bbox"], image["width"], image["height"])
        told = json.loads(taught.question.answer)
        assert image["file_name"] == taught.image
        assert max(abs(a - b) for a, b in zip(scored, told, strict=True)) <= 0.5 / 32 + 0.011
    assert read_json(root / "world.json")["oblong"] == 1.0
    with pytest.raises(RecipeError, match=r"oblong 1.0 \(wanted 0.0\)"):
        same_world(root, 0, WorldSize(web=40, tune=30, test=12, harder=0, captions=8))


def test_a_usual_world_is_what_it_was_before_there_were_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = WorldSize(web=10, tune=10, test=5, harder=0, captions=0)
    assert "oblong" not in told.told() and "oblong" not in same_world(tmp_path, 0, told)
    assert WorldSize(oblong=0.5).told()["oblong"] == 0.5
    drawn = ["world", "draw", "-o", str(tmp_path / "w"), "--dry-run", "--json"]
    for share, said in ((None, None), ("0.5", 0.5)):
        assert command([*drawn, *(["--oblong", share] if share else [])]) == 0
        assert json.loads(capsys.readouterr().out).get("oblong") == said
    assert command([*drawn, "--oblong", "2"]) == 2
    with pytest.raises(RecipeError, match="oblong"):
        WorldSize(oblong=1.5)
    with pytest.raises(RecipeError, match="oblong"):
        WorldSize(oblong="all")  # type: ignore[arg-type]


@pytest.mark.parametrize(("resize", "shown"), [("squash", 1.0), ("pad", 0.5), ("crop", 1.0)])
def test_what_a_tower_is_shown_of_a_picture_twice_as_wide_as_high(resize: Any, shown: float) -> None:
    """Squashed all is there, padded all is there on half the square, cropped the middle half alone."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:96], pixels[:, 96:] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    view = TowerView("t", 64, resize=resize)
    seen = np.asarray(fit(Image.fromarray(pixels), view)).astype(int)
    ends = (seen[..., 0] > 150).mean() + (seen[..., 2] > 150).mean()
    middle = (seen[..., 1] > 150).mean()
    if resize == "crop":
        assert ends < 0.02 and middle > 0.95
    else:
        assert ends == pytest.approx(shown / 2, abs=0.05) and middle == pytest.approx(shown / 2, abs=0.05)


# --- the studies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_of_towers_and_pictures_build(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["study", "run", name, "--dry-run"]) == 0
    assert f"{name}: " in capsys.readouterr().out


def test_a_study_knows_the_weights_of_the_towers_that_it_names_and_of_no_others() -> None:
    from leveret.study.units import _weights

    named = {"vision": {"towers": [{"tower": "world/contrastive"}, {"tower": "world/self-supervised"}]}}
    assert _weights(named) == {
        name: sha256_of(file_of(WEIGHTS, name.removeprefix("world/")))
        for name in ("world/contrastive", "world/self-supervised")
    }
