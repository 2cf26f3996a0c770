"""Every connector computes what the published one computed, from the published weights.

Each folder below LEVERET_PARITY that holds cases.json is looked at: folders of models go from the tower's features to
the projected ones with the checkpoint's connector, folders of projectors from input to output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leveret.model import published
from leveret.model.connectors import build_connector, connector_tokens, find_connector, read_settings
from leveret.model.recipe import ConnectorRecipe

CLOSE = 1e-5
REPO = Path(__file__).resolve().parents[1]
PARITY = Path(os.environ.get("LEVERET_PARITY", REPO.parent / "shared" / "parity"))

pytestmark = pytest.mark.parity


def folders(wanted: Callable[[dict[str, Any]], bool]) -> list[Any]:
    """Folders with a case that is `wanted`, as parameters; one that skips and says why where there is none."""
    found = []
    for file in sorted(PARITY.glob("*/cases.json")):
        cases = json.loads(file.read_text("utf-8")).get("cases", [])
        if any(wanted(case) for case in cases):
            found.append(pytest.param(file.parent, id=file.parent.name))
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=f"no such folder in {PARITY}: LEVERET_PARITY"))]


def is_projector(case: dict[str, Any]) -> bool:
    return "type" in case and "mm_hidden_size" in case


def is_projected(case: dict[str, Any]) -> bool:
    return bool(case.get("projected_features"))


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor in a checkpoint's files, whatever their form; Prismatic's nested dictionaries laid flat."""
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors":
            weights |= load_file(file)
        elif file.suffix in (".bin", ".pt"):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            for part in loaded["model"].values() if "model" in loaded else [loaded]:
                weights |= part
    return weights


def recipe_of(folder: Path, checkpoint: Path) -> ConnectorRecipe:
    """What the checkpoint's own config.json says its connector is."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    if "arch_specifier" in config.get("model", {}):
        return published.of_prismatic(config["model"]["arch_specifier"])
    if "connector_type" in config:
        bert = folder / "hub/google-bert/bert-base-uncased/config.json"
        return published.of_factory(config, json.loads(bert.read_text("utf-8")) if bert.is_file() else None)
    return published.of_llava(config)


@pytest.mark.parametrize("folder", folders(is_projected))
def test_projected_features(folder: Path) -> None:
    said = json.loads((folder / "cases.json").read_text("utf-8"))
    meta = said["meta"]
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        for case in filter(is_projected, said["cases"]):
            checkpoint = folder / (case.get("checkpoint") or meta.get("checkpoint") or "checkpoint")
            recipe = recipe_of(folder, checkpoint)
            names = case["tower_features"]
            names = [names] if isinstance(names, str) else list(names.values() if isinstance(names, dict) else names)
            features = torch.from_numpy(np.concatenate([arrays[name] for name in names], axis=-1))[None].float()
            expected = torch.from_numpy(arrays[case["projected_features"]]).float()
            tokens = features.shape[1]
            width, hidden = features.shape[2], expected.shape[1]
            connector = build_connector(recipe.kind, width, hidden, tokens, recipe.options).eval()
            state = {name: tensor.float() for name, tensor in published.read_state(weights_in(checkpoint)).items()}
            connector.load_state_dict(state, strict=True)
            with torch.no_grad():
                got = connector(features)[0]
            assert connector_tokens(recipe.kind, tokens, recipe.options) == len(expected) == len(got)
            print(f"{folder.name} {case.get('name')} {recipe.kind}: {float((got - expected).abs().max()):.1e}")
            torch.testing.assert_close(got, expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("folder", folders(is_projector))
def test_projectors(folder: Path) -> None:
    said = json.loads((folder / "cases.json").read_text("utf-8"))
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        for case in filter(is_projector, said["cases"]):
            recipe = published.of_llava({"mm_projector_type": case["type"]})
            input, expected = (torch.from_numpy(arrays[case[side]]).float() for side in ("input", "output"))
            # the row itself: Bunny's `identity` and `spp` leave the width as it is, which no model can be built from
            row, settings = find_connector(recipe.kind), read_settings(recipe.kind, recipe.options)
            module = row.build(case["mm_hidden_size"], case["hidden_size"], input.shape[1], settings).eval()
            weights = torch.load(folder / case["weights"], weights_only=True) if case.get("weights") else {}
            state = published.read_state(weights)
            module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
            with torch.no_grad():
                got = module(input)
            assert list(published.write_state(recipe.kind, state, "model.mm_projector.")) == list(weights)
            assert row.tokens(input.shape[1], settings) == expected.shape[1]
            print(f"{folder.name} {case['type']}: {float((got - expected).abs().max()):.1e}")
            torch.testing.assert_close(got, expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("folder", folders(is_projected))
def test_published_names_come_back(folder: Path) -> None:
    """Read and written again, the connector has the names and numbers it was published with."""
    said = json.loads((folder / "cases.json").read_text("utf-8"))
    checkpoint = folder / (said["meta"].get("checkpoint") or "checkpoint")
    weights = weights_in(checkpoint)
    recipe, state = recipe_of(folder, checkpoint), published.read_state(weights)
    before = next(
        prefix
        for prefix in (
            "base_model.model.model.mm_projector.", "model.mm_projector.", "connector._connector.", "_connector.",
            "projector.",
        )
        if any(name.startswith(prefix) for name in weights)
    )  # fmt: skip
    theirs = {name: tensor for name, tensor in weights.items() if name.startswith(before)}
    positions = next((t.shape[-1] for name, t in theirs.items() if name.endswith("position_ids")), 512)
    again = published.write_state(recipe.kind, state, before, positions)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)
