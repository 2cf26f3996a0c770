"""Every stage of the systems we read teaches the same parameters here, in the same groups of the optimiser.

Each stages.json below LEVERET_PARITY is looked at. A stage's `settings`, in the words of the system that wrote them,
become a stage of a recipe; what then learns is renamed by the key tables and held against the file.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from leveret.model import peers, tower_keys
from leveret.model.peers import merged, prismatic, tinyllava
from leveret.model.published import write_state
from leveret.model.towers import Tower, build_tower
from leveret.model.vlm import VLM
from leveret.runs import RecipeError
from leveret.train import learning
from leveret.train.stages import Learn, StageRecipe

PARITY = Path(os.environ.get("LEVERET_PARITY", Path(__file__).resolve().parents[2] / "shared" / "parity"))

pytestmark = pytest.mark.stages

Groups = dict[tuple[float, float], set[str]]


def stages() -> list[Any]:
    """Every stage of every folder, as parameters; one that skips and says why where there is none."""
    found = [
        pytest.param(file.parent, name, id=f"{file.parent.name}:{name}")
        for file in sorted(PARITY.glob("*/stages.json"))
        for name in json.loads(file.read_text("utf-8"))
    ]
    why = pytest.mark.skip(reason=f"no stages.json in {PARITY}: LEVERET_PARITY names another place")
    return found or [pytest.param(None, "", marks=why)]


# --- their settings as a stage of ours --------------------------------------------------------------------------------


def by_llava(settings: dict[str, Any], bunny: bool) -> dict[str, Any]:
    """Bunny's and LLaVA's arguments (train/train.py, train/llava_trainer.py): the projector learns in every stage, with
    a rate of its own where there is one; Bunny's tower shares that rate (bunny_trainer.py asks for either name)."""
    rate = settings["learning_rate"]
    near = settings.get("proj_lr") or rate
    learn: dict[str, Any] = {"connector": {"lr": near}}
    if settings["stage"] == "finetune":
        learn["language"] = {"lr": rate, "lora": adapters(settings) if settings.get("lora") else None}
    if settings.get("unfreeze"):
        learn["vision"] = {"lr": near if bunny else rate}
    known = {"stage", "learning_rate", "weight_decay", "lora", "unfreeze", "proj_lr", "lora_r", "lora_alpha"}
    return {"learn": learn, "unknown": set(settings) - known}


def by_factory(settings: dict[str, Any], vlm: VLM) -> dict[str, Any]:
    """TinyLLaVA Factory's arguments (tinyllava/utils/arguments.py). Its optimiser knows a rate of the connector, and
    does not read the tower's (train/tinyllava_trainer.py). From a layer on it knows blocks by `vision_model.encoder`
    alone, which CLIP's and SigLIP's are called (training_recipe/base.py)."""
    rate = settings["learning_rate"]
    learn: dict[str, Any] = {}
    if settings["tune_type_llm"] != "frozen":
        learn["language"] = {"lr": rate, "lora": adapters(settings) if "lora" in settings["tune_type_llm"] else None}
    if settings["tune_type_connector"] != "frozen":
        learn["connector"] = {"lr": settings.get("mm_projector_lr") or rate}
    if settings["tune_type_vision_tower"] != "frozen":
        partly = settings["tune_type_vision_tower"] == "partially-tune"
        learn["vision"] = {"lr": rate}
        if partly:
            known_to_it = ("siglip_vision_model", "clip_vision_model")
            towers = [name for name, tower in vlm.towers.items() if tower.facts.family in known_to_it]  # type: ignore[union-attr]
            learn["vision"] |= {"from_layer": settings["tune_vision_tower_from_layer"], "towers": towers}
    known = {"tune_type_llm", "tune_type_connector", "tune_type_vision_tower", "tune_vision_tower_from_layer"}
    known |= {"learning_rate", "weight_decay", "mm_projector_lr", "vision_tower_lr", "training_recipe", "lora_r"}
    return {"learn": learn, "unknown": set(settings) - known - {"lora_alpha", "lora_dropout"}}


def by_prismatic(stage: str) -> dict[str, Any]:
    """Prismatic's stages are names (prismatic/models/vlms/prismatic.py, freeze_backbones)."""
    parts = {
        "align": ["connector"],
        "finetune": ["connector", "language"],
        "full-finetune": ["vision", "connector", "language"],
    }
    return {"learn": {part: {"lr": 2e-5} for part in parts[stage]}, "unknown": set()}


def adapters(settings: dict[str, Any]) -> dict[str, Any]:
    return {"rank": settings.get("lora_r", 4), "alpha": settings.get("lora_alpha", 8)}


def recipe_of(tool: str, vlm: VLM, name: str, told: dict[str, Any]) -> StageRecipe:
    """The stage as a faithful recipe has it."""
    settings = told.get("settings", {})
    if tool == "Prismatic":
        found = by_prismatic(name.rpartition("/")[2])
    else:
        found = by_factory(settings, vlm) if tool == "TinyLLaVA Factory" else by_llava(settings, tool == "Bunny")
    assert not found["unknown"], f"settings that no field of a recipe stands for: {found['unknown']}"
    # where the settings are silent, the groups say what was given
    decay = max((group["weight_decay"] for group in told.get("optimizer_groups", ())), default=0.0)
    return StageRecipe.model_validate(
        {
            "data": "none.json",
            "steps": 1,
            "learn": found["learn"],
            "weight_decay": settings.get("weight_decay", decay),
            "decays": "matrices" if tool == "Prismatic" else "trainer",
        }
    )


# --- our names as theirs ----------------------------------------------------------------------------------------------

INSIDE = {"eva02_clip": "model.", "dinov2": "", "dinov2_with_registers": "", "vit": ""}
"""What transformers (and Bunny's EVA) put between a tower and its layers, where it is not `vision_model.`."""


def of_tower(tool: str, name: str, tower: Tower, names: Iterable[str], alone: bool) -> dict[str, tuple[str, ...]]:
    """Names inside a tower -> those in their model."""
    family = tower.facts.family
    if tool == "Prismatic":
        layout, before = "timm", prismatic.ONE if alone else prismatic.PREFIXES[name]
        before = f"vision_backbone.{before}"
    else:
        layout = "eva" if family == "eva02_clip" else "transformers"
        before = tinyllava.TOWER if tool == "TinyLLaVA Factory" else merged.TOWER
        before += ("" if alone else f"{name}.") + INSIDE.get(family, "vision_model.")
    found = tower_keys.their_names(names, family, layout)
    return {ours: tuple(before + one for one in theirs) for ours, theirs in found.items()}


def theirs(tool: str, vlm: VLM, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Our names of parameters -> theirs, without what PEFT puts in front."""
    language = {"Prismatic": "llm_backbone.llm.", "TinyLLaVA Factory": tinyllava.LANGUAGE}.get(tool, "")
    connector = {"Prismatic": "projector.projector.", "TinyLLaVA Factory": tinyllava.CONNECTOR}
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        part, _, rest = name.partition(".")
        if part == "language":
            found[name] = (language + rest,)
        elif part == "connector":
            said = write_state(vlm.recipe.connector.kind, {rest: torch.zeros(0)}, "", 0)
            said.pop("bert.embeddings.position_ids", None)
            found[name] = (connector.get(tool, merged.CONNECTOR) + next(iter(said)),)
        else:
            view, _, inner = rest.partition(".model.")
            tower = vlm.towers[view]
            assert isinstance(tower, Tower)
            found[name] = of_tower(tool, view, tower, [inner], len(vlm.towers) == 1)[inner]
    return found


def idle(tool: str, vlm: VLM, how: Learn) -> Iterator[str]:
    """Their names of what they mark in a tower though it does not run: it never gets a gradient, so here it is no part
    of what learns. Of a tower that learns from a layer on these are blocks alone."""
    from_layer = how.from_layer
    for view, tower in vlm.towers.items():
        assert isinstance(tower, Tower)
        if how.towers is not None and view not in how.towers:
            continue
        with torch.device("meta"):
            whole = build_tower(replace(tower.facts, keep=("layers", "norm", "head")))
        names = [name.removeprefix("model.") for name, _ in whole.unused()]
        for ours, said in of_tower(tool, view, tower, names, len(vlm.towers) == 1).items():
            block = whole._block_of(ours)
            if from_layer is None or (block is not None and block >= from_layer):
                yield from said


# --- the model, and the test ------------------------------------------------------------------------------------------


@cache
def model_in(folder: Path) -> tuple[str, VLM]:
    """The tool that wrote a folder, and the model in it."""
    meta = json.loads((folder / "cases.json").read_text("utf-8"))["meta"]
    place = folder / (meta.get("checkpoint") or "checkpoint")
    from leveret.model.peers.assemble import assemble

    foreign = peers.read(place, hub=folder / "hub", size=meta.get("default_image_size"))
    return foreign.tool, assemble(foreign, place)


def grouped(groups: Iterable[dict[str, Any]]) -> Groups:
    found: Groups = {}
    for group in groups:
        if group["names"]:
            found.setdefault((group["lr"], group["weight_decay"]), set()).update(map(unwrapped, group["names"]))
    return found


def unwrapped(name: str) -> str:
    """A name without what PEFT puts before it."""
    return name.removeprefix(merged.ADAPTED)


@pytest.mark.parametrize(("folder", "name"), stages())
def test_a_stage_teaches_what_theirs_does(folder: Path, name: str) -> None:
    told = json.loads((folder / "stages.json").read_text("utf-8"))[name]
    tool, vlm = model_in(folder)
    vlm = copy.deepcopy(vlm)
    if "trainable" not in told:  # it fails there as it stands: then it must not pass here
        with pytest.raises((RecipeError, ValidationError)) as caught:
            stage = recipe_of(tool, vlm, name, told)
            learning.ready(vlm, stage, seed=0)
        print(f"{folder.name} {name}: refused here ({caught.value}), as there ({told.get('note')})")
        return
    stage = recipe_of(tool, vlm, name, told)
    assert learning.faults(vlm, stage) == []
    trainables = learning.ready(vlm, stage, seed=0)
    names = theirs(tool, vlm, [one.name for one in trainables])
    still: set[str] = set()
    if "vision" in stage.learn:
        still = set(idle(tool, vlm, stage.learn["vision"]))
    ours = {said for several in names.values() for said in several}
    due = set(map(unwrapped, told["trainable"]))
    assert ours - due == set(), "learns here and not there"
    assert due - ours - still == set(), "learns there, runs, and does not learn here"
    if "trainable_module_keys" in told:
        keys = {"vision": "vision_backbone", "connector": "projector", "language": "llm_backbone"}
        assert {keys[part] for part in stage.learn} == set(told["trainable_module_keys"])
    if "optimizer_groups" in told:
        found: Groups = {}
        for one in trainables:
            found.setdefault((one.lr, one.weight_decay), set()).update(names[one.name])
        expected = {key: rest for key, group in grouped(told["optimizer_groups"]).items() if (rest := group - still)}
        assert found == expected
    print(f"{folder.name} {name}: {len(ours)} names, {len(due & still)} of theirs that never run")
    assert all(one.value.requires_grad for one in trainables)
    assert sum(value.requires_grad for value in vlm.parameters()) == len(trainables)
