"""In which type parts are built: float32, whatever a folder's configuration says of how it was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fakes import save_dual_encoder, tiny_language_folder, tiny_recipe
from leveret.model.build import build, build_meta
from leveret.model.checkpoint import load, save
from leveret.model.encoders import load_encoder
from leveret.model.recipe import LanguageRecipe, VisionRecipe
from leveret.model.towers import build_tower, describe, fill_tower, load_tower
from tower_fakes import CLASSES, toy

SAID = pytest.mark.parametrize("said", ["float16", "bfloat16"])


def tell(folder: Path, said: str) -> None:
    """Its config.json says that it was saved so."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": said, "torch_dtype": said}))


@SAID
@pytest.mark.parametrize("family", CLASSES)
def test_a_tower_fresh_filled_or_loaded(family: str, said: str, tmp_path: Path) -> None:
    """No weight is rounded on the way."""
    model = toy(family)
    model.save_pretrained(tmp_path)
    tell(tmp_path, said)
    facts = describe(VisionRecipe(tower=str(tmp_path)))
    found = (build_tower(facts), fill_tower(facts, model.state_dict()), load_tower(facts))
    for tower in found:
        assert {x.dtype for x in tower.state_dict().values() if x.is_floating_point()} == {torch.float32}
    given = model.state_dict()
    for tower in found[1:]:
        assert all(torch.equal(given[name], x) for name, x in tower.model.state_dict().items())


@SAID
def test_a_language_model(said: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_language_folder(), tmp_path / "lm")
    tell(folder, said)
    recipe = tiny_recipe().model_copy(update={"language": LanguageRecipe(name=str(folder))})
    for vlm in (build(recipe), build(recipe, weights=False), build_meta(recipe)):
        assert {x.dtype for x in vlm.parameters()} == {torch.float32}
    state = load_file(folder / "model.safetensors")
    whole = build(recipe)
    assert all(torch.equal(state[name], x) for name, x in whole.language.state_dict().items() if name in state)
    assert {x.dtype for x in load(save(whole, tmp_path / "model")).parameters()} == {torch.float32}
    halved = whole.cast(torch.float16)  # what was saved in halves comes back so
    assert {x.dtype for x in load(save(halved, tmp_path / "half")).parameters()} == {torch.float16}


@SAID
def test_an_encoder(said: str, tmp_path: Path) -> None:
    save_dual_encoder(tmp_path / "plain", "siglip")
    shutil.copytree(tmp_path / "plain", tmp_path / "told")
    tell(tmp_path / "told", said)
    picture = Image.new("RGB", (40, 30), (200, 40, 90))
    one, two = (load_encoder(str(tmp_path / name)).images([picture]) for name in ("plain", "told"))
    assert np.array_equal(one, two)
