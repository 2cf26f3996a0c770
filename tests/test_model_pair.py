"""TinyLLaVA Factory's MoF, CLIP and DINOv2 in turn, as a target: what is written is what the Factory would run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fakes
import tower_fakes
from leveret.model import peers
from leveret.model.build import build
from leveret.model.peers.write import write
from leveret.model.recipe import ModelRecipe
from leveret.model.vlm import VLM
from leveret.runs import RecipeError

PARITY = Path(os.environ.get("LEVERET_PARITY", Path(__file__).resolve().parents[2] / "shared" / "parity"))
FOLDER = PARITY / "tinyllava-phi2-mof"


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no parity data in {PARITY}; LEVERET_PARITY names another place")
@pytest.mark.parity
def test_the_factorys_pair_of_towers_is_written_name_for_name(tmp_path: Path) -> None:
    from safetensors import safe_open

    source = FOLDER / "checkpoint-finetune"
    vlm = peers.load(source, hub=FOLDER / "hub", dtype=torch.float32)
    write(vlm, tmp_path / "theirs", "tinyllava")
    shapes = []
    for place in (source, tmp_path / "theirs"):
        with safe_open(place / "model.safetensors", "pt") as file:
            shapes.append({name: file.get_slice(name).get_shape() for name in file.keys()})
    assert shapes[0] == shapes[1]
    was, now = (json.loads((place / "config.json").read_text()) for place in (source, tmp_path / "theirs"))
    for name in ("connector_type", "vision_hidden_size", "vision_feature_layer", "vision_feature_select_strategy",
                 "vision_model_name_or_path", "vision_model_name_or_path2", "image_aspect_ratio"):  # fmt: skip
        assert was[name] == now[name], name
    for name, value in was["vision_config"].items():
        assert now["vision_config"][name] == value, name


def pair(tmp_path: Path, **second: Any) -> VLM:
    """CLIP (64 pixels, 4 x 4 patches) and DINOv2 (published at 7 x 7, run at 4 x 4) with the Factory's connector."""
    for name, side in (("clip", 64), ("dinov2", 112)):
        family = {"clip": "clip_vision_model"}.get(name, name)
        config, kind, extra, _ = tower_fakes.CLASSES[family]
        sizes = {**fakes.SIGLIP, **extra, "image_size": side}
        torch.manual_seed(len(name))
        fakes.loud(getattr(transformers, kind)(getattr(transformers, config)(**sizes))).save_pretrained(tmp_path / name)
    towers = [
        {"tower": str(tmp_path / "clip"), "name": "clip"},
        {"tower": str(tmp_path / "dinov2"), "name": "dinov2", "size": 64, "normalise": "clip", **second},
    ]
    plain = fakes.tiny_recipe(connector="mof_mlp").model_dump() | {"vision": {"towers": towers}}
    return build(ModelRecipe.model_validate(plain))


def test_a_pair_of_towers_is_written_so_that_the_factory_would_see_the_same(tmp_path: Path) -> None:
    """It builds DINOv2 at its published size, and interpolates the positions by DINOv2's rule while it runs."""
    from safetensors.torch import load_file

    vlm = pair(tmp_path)
    batch = fakes.tiny_batch(vlm, lengths=(40, 37))
    with torch.no_grad():
        expected = vlm(batch, logits="all").logits
        write(vlm, tmp_path / "theirs", "tinyllava")
        again = peers.load(tmp_path / "theirs", dtype=torch.float32)
        torch.testing.assert_close(again(batch, logits="all").logits, expected, atol=1e-5, rtol=0)
        write(again, tmp_path / "twice", "tinyllava")
        last = peers.load(tmp_path / "twice", dtype=torch.float32)
        torch.testing.assert_close(last(batch, logits="all").logits, expected, atol=1e-5, rtol=0)
    held = load_file(tmp_path / "theirs/model.safetensors")
    under = "vision_tower._vision_tower.dinov2."
    positions = held[under + "embeddings.position_embeddings"]
    assert positions.shape == (1, 50, fakes.WIDTH)
    # as transformers 4.40 computed it (Dinov2Embeddings.interpolate_pos_encoding)
    patches = positions[:, 1:].reshape(1, 7, 7, -1).permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(patches, scale_factor=4.1 / 7, mode="bicubic", align_corners=False)
    eyes = vlm.towers["dinov2"].model.embeddings
    due = eyes.interpolate_pos_encoding(torch.zeros(1, 17, fakes.WIDTH), 64, 64)
    torch.testing.assert_close(scaled.flatten(2).mT, due[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(positions[:, :1], due[:, :1])
    # no further from what was published than that asks for
    assert float((positions - eyes.position_embeddings).detach().norm()) < float(positions.norm())


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"normalise": "imagenet"}, "pixels that CLIP's processor makes .*this model's differ: pixels 64 crop"),
        ({"layer": -1}, "differ: layer -2 and -1"),
        ({"resize": "pad"}, "differ: pixels"),
        ({"tokens": "drop_first"}, ""),
    ],
)
def test_a_pair_that_the_factory_cannot_hold_is_named(second: dict[str, Any], told: str, tmp_path: Path) -> None:
    vlm = pair(tmp_path, **second)
    if not told:
        write(vlm, tmp_path / "out", "tinyllava")
        return
    with pytest.raises(RecipeError, match=told):
        write(vlm, tmp_path / "out", "tinyllava")
    assert not (tmp_path / "out").exists()


def test_two_other_towers_or_another_way_to_join_them_is_named(tmp_path: Path) -> None:
    vlm = pair(tmp_path)
    plain = vlm.recipe.model_dump()
    plain["vision"]["towers"].reverse()
    plain["vision"]["towers"][0] |= {"tower": str(tmp_path / "dinov2")}
    plain["vision"]["towers"][1] |= {"tower": str(tmp_path / "clip")}
    turned = build(ModelRecipe.model_validate(plain))
    with pytest.raises(RecipeError, match="joins two towers, CLIP and DINOv2 in that order"):
        write(turned, tmp_path / "out", "tinyllava")
    vlm.recipe = vlm.recipe.model_copy(update={"connector": vlm.recipe.connector.model_copy(update={"kind": "linear"})})
    with pytest.raises(RecipeError, match="by the connector mof_mlp behind fusion: channel, and this model has linear"):
        write(vlm, tmp_path / "out", "tinyllava")
