"""What a layout of others cannot hold is refused by name: whatever is written is the same model when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fakes
from leveret.cli import run
from leveret.model import checkpoint, peers
from leveret.model.build import build
from leveret.model.merge import average
from leveret.model.peers.convert import convert
from leveret.model.peers.write import write
from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, TilesRecipe, TowerRecipe, VisionRecipe
from leveret.model.vlm import VLM
from leveret.runs import DataError, RecipeError

FAMILIES = {
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
}


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("eyes")
    for name, (model, config) in FAMILIES.items():
        torch.manual_seed(0)
        fakes.loud(model(config(**fakes.SIGLIP))).save_pretrained(folder / name)
    return {name: str(folder / name) for name in FAMILIES}


def made(vision: dict[str, Any], connector: str = "mlp2x_gelu", chat: str = "tiny", **options: Any) -> VLM:
    return build(
        ModelRecipe(
            vision=VisionRecipe(**vision), connector=ConnectorRecipe(kind=connector, options=options),
            language=LanguageRecipe(name=str(fakes.tiny_language_folder(0))), chat=chat,
        )
    )  # fmt: skip


CHOICES: dict[str, dict[str, Any]] = {
    "plain": {}, "pad": {"resize": "pad"}, "squash": {"resize": "squash"}, "crop": {"resize": "crop"},
    "centre": {"resize": "centre"}, "half": {"resize": "crop", "crop": 0.5}, "size": {"size": 48},
    "activation": {"activation": "relu"}, "normalise": {"normalise": "imagenet"}, "layer": {"layer": -1},
    "cls": {"tokens": "cls_patch"},
}  # fmt: skip
TOLD = {"normalise": "mean", "half": "short side"}
HELD = {  # what is written, beside what every layout holds
    "bunny": {"siglip": {"squash"}, "clip": {"crop", "cls"}},
    "llava": {"siglip": {"squash"}, "clip": {"crop", "cls"}},
    "tinyllava": {"siglip": {"squash"}, "clip": {"crop", "cls"}},
    "hf-llava": {
        "siglip": {"squash", "crop", "size", "activation", "normalise", "half"},
        "clip": {"squash", "crop", "size", "activation", "normalise", "half", "cls"},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", HELD)
@torch.no_grad()
def test_a_choice_of_a_recipe_comes_back_or_is_refused(
    layout: str, family: str, eyes: dict[str, str], tmp_path: Path
) -> None:
    written = set()
    for name, choice in CHOICES.items():
        if family == "siglip" and name == "cls":
            continue
        vlm = made({"tower": eyes[family], **choice})
        try:
            write(vlm, tmp_path / name, layout)
        except RecipeError as fault:
            assert any(word in str(fault) for word in (name, TOLD.get(name, name), *map(str, choice.values()))), fault
            continue
        written.add(name)
        again = peers.load(tmp_path / name)
        assert again.chat == vlm.chat
        views = [
            (v.size, v.mean, v.std, v.resize, v.short or v.size) for v in (vlm.spec.towers[0], again.spec.towers[0])
        ]
        assert views[0] == views[1], (name, views)
        batch = fakes.tiny_batch(vlm, lengths=(vlm.spec.tokens + 8, vlm.spec.tokens + 6))
        ours, theirs = vlm(batch, logits="all").logits, again(batch, logits="all").logits
        torch.testing.assert_close(theirs[..., : ours.shape[-1]], ours, atol=1e-4, rtol=0)
    assert written == {"plain", "pad", "layer"} | HELD[layout][family]


@pytest.mark.parametrize(
    ("layout", "connector", "options"),
    [("bunny", "minigpt", {"group": 2}), ("bunny", "spp_v1", {"pool": 1}), ("tinyllava", "resampler", {"heads": 2})],
)
def test_a_connector_of_other_settings_is_refused(
    layout: str, connector: str, options: dict[str, Any], eyes: dict[str, str], tmp_path: Path
) -> None:
    vlm = made({"tower": eyes["siglip"]}, connector, **options)
    with pytest.raises(RecipeError, match=f"builds {connector} in one way"):
        write(vlm, tmp_path / "out", layout)


def test_tiles_of_another_size_are_held_by_transformers(eyes: dict[str, str], tmp_path: Path) -> None:
    vlm = made({"tower": eyes["clip"], "size": 48, "tiles": TilesRecipe()}, chat="tiny")
    write(vlm, tmp_path / "out", "hf-llava")
    again = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out")
    (table,) = (x for name, x in again.named_parameters() if name.endswith("embeddings.position_embedding.weight"))
    assert table.shape[0] == 1 + (48 // fakes.SIGLIP["patch_size"]) ** 2


def test_a_chat_format_that_a_tool_does_not_speak_comes_back_and_is_told(eyes: dict[str, str], tmp_path: Path) -> None:
    for layout in ("bunny", "tinyllava"):
        (note,) = write(made({"tower": eyes["siglip"]}), tmp_path / layout, layout)
        assert "taught in tiny" in note
        assert peers.load(tmp_path / layout).chat == "tiny"


def test_a_result_takes_no_place_that_holds_what_is_read(eyes: dict[str, str], tmp_path: Path) -> None:
    outer, inner = tmp_path / "x", tmp_path / "x" / "inner"
    vlm = made({"tower": eyes["siglip"]})
    checkpoint.save(vlm, outer)
    checkpoint.save(vlm, inner)
    for work in (lambda: average([inner, inner], outer), lambda: convert(inner, outer, to="hf-llava")):
        with pytest.raises(RecipeError, match="holds the folder that is read"):
            work()
    assert checkpoint.load(inner).spec == vlm.spec


def test_parts_in_several_types_answer(eyes: dict[str, str], tmp_path: Path) -> None:
    """As a GPU leaves them: what learned in float32, what was frozen in bfloat16."""
    photo = fakes.tiny_batch(vlm := made({"tower": eyes["siglip"]}), lengths=(30, 28))
    for halves in ("language", "connector", "towers"):
        mixed = made({"tower": eyes["siglip"]})
        getattr(mixed, halves).to(torch.bfloat16)
        again = checkpoint.load(checkpoint.save(mixed, tmp_path / halves))
        with torch.no_grad():
            logits = again(photo, logits="all").logits.float()
            torch.testing.assert_close(logits, vlm(photo, logits="all").logits, atol=0.5, rtol=0.2)
        if halves == "language":
            convert(tmp_path / halves, tmp_path / "published", to="remote-code")


def test_all_ends_of_an_answer_are_there_after_loading(tmp_path: Path) -> None:
    from leveret.generate import Engine

    vlm = fakes.tiny_vlm()
    vlm.language.generation_config.eos_token_id = [1, 7]
    again = checkpoint.load(checkpoint.save(vlm, tmp_path / "m"))
    assert {1, 7} <= Engine(vlm).stops.ids == Engine(again).stops.ids


def test_attention_that_is_not_here_stops_nobody_from_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint.save(fakes.tiny_vlm(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["language"]["attention"] = "flash_attention_2"
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint.load(folder)
    assert run(["train", "nano", "model.language.attention=flash_attention_2", "--dry-run"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: None, lambda config: 3, lambda config: {**config, "spec": None},
        lambda config: {key: value for key, value in config.items() if key != "spec"},
        lambda config: {**config, "language": {}}, lambda config: {**config, "vision": [{}]},
        lambda config: {**config, "vision": [{**config["vision"][0], "family": None}]},
    ],
)  # fmt: skip
def test_a_config_that_is_not_whole_is_told_in_one_line(tmp_path: Path, spoil: Any) -> None:
    folder = checkpoint.save(fakes.tiny_vlm(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(spoil(config)))
    with pytest.raises(DataError, match=r"config\.json"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("layout", "key", "value"),
    [
        ("tinyllava", "vision_feature_select_strategy", "default"), ("tinyllava", "vision_feature_layer", [-2, -5]),
        ("llava", "mm_vision_select_layer", [-2, -5]), ("llava", "mm_vision_select_feature", "foo"),
        ("llava", "image_aspect_ratio", "highres"), ("bunny", "s2_scales", "a,b"),
    ],
)  # fmt: skip
def test_a_peers_config_with_other_words_is_told_in_one_line(
    layout: str, key: str, value: Any, eyes: dict[str, str], tmp_path: Path
) -> None:
    write(made({"tower": eyes["siglip"]}), tmp_path / "m", layout)
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {key: value}
    config |= {"use_s2": True} if key == "s2_scales" else {}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError):
        peers.load(tmp_path / "m")


def test_a_base_for_what_is_whole_is_refused(eyes: dict[str, str], tmp_path: Path) -> None:
    vlm = made({"tower": eyes["siglip"]})
    checkpoint.save(vlm, tmp_path / "ours")
    for layout in ("llava", "tinyllava", "hf-llava"):
        write(vlm, tmp_path / layout, layout)
        with pytest.raises(DataError, match="stands on nothing"):
            convert(tmp_path / layout, tmp_path / "out", base="/nowhere")
    with pytest.raises(RecipeError, match="stands on nothing"):
        convert(tmp_path / "ours", tmp_path / "out", to="llava", base="/nowhere")


def test_mof_parts_two_towers_between_them(eyes: dict[str, str], tmp_path: Path) -> None:
    wide = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**{**fakes.SIGLIP, "hidden_size": 32}))
    fakes.loud(wide).save_pretrained(tmp_path / "wide")
    pair = [TowerRecipe(tower=eyes["siglip"]), TowerRecipe(tower=str(tmp_path / "wide"))]
    vlm = made({"towers": pair}, "mof_mlp")
    assert vlm.recipe.connector.options["first"] == fakes.SIGLIP["hidden_size"] != 32
    assert checkpoint.load(checkpoint.save(vlm, tmp_path / "m")).recipe == vlm.recipe
