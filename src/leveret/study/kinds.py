"""What each kind of unit is: a function of folders to a folder, resumable. The table is KINDS."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leveret.runs import read_json, write_json
from leveret.study.choices import by_truth, contents, keep_some, truth_of, web_records
from leveret.study.units import CORESET, DRAWN, HELD_OUT, WEB

Places = Mapping[str, Path]
"""Role -> folder of the unit that an input is."""


def _draw(place: Path, settings: Mapping[str, Any], inputs: Places) -> dict[str, Any]:
    from leveret.world.write import WorldSize, draw

    draw(place / "world", seed=settings["seed"], size=WorldSize(**settings["size"]))
    return {}


def _embed(place: Path, settings: Mapping[str, Any], inputs: Places) -> dict[str, Any]:
    from leveret.condense import embed

    embed(inputs["world"] / "world" / WEB, place / "embeddings", settings["encoder"])
    return {}


def _choose(place: Path, settings: Mapping[str, Any], inputs: Places) -> dict[str, Any]:
    from leveret.condense import condense
    from leveret.condense.ledger import write_coreset

    world = inputs["world"] / "world"
    place.mkdir(parents=True, exist_ok=True)
    records, truth = web_records(world), truth_of(world)
    if "oracle" in settings:
        ids = by_truth(truth, settings["oracle"], settings["seed"])
    else:
        recipe = place / "recipe.yaml"
        write_json(recipe, settings["recipe"])  # JSON is YAML
        out = condense(inputs["embeddings"] / "embeddings", place / "coreset", str(recipe), images=world)
        ids = [record["id"] for record in read_json(out / "coreset.json")]
    chosen = [records[id] for id in ids]
    write_coreset(chosen, place / "pairs.json")
    return {**contents(chosen, truth), "shown": keep_some(place / "shown", world, chosen, truth)}


def _data(told: Mapping[str, Any], inputs: Places) -> dict[str, str]:
    """Where data of the drawn world and the cell's own choice lie."""
    if "pairs" in inputs and told["data"] == CORESET:
        return {"data": str(inputs["pairs"] / "pairs.json"), "images": str(inputs["world"] / "world")}
    if "world" in inputs and told["data"].startswith(DRAWN):
        return {"data": str(inputs["world"] / "world" / told["data"].removeprefix(DRAWN))}
    return {}


def _teach(place: Path, settings: Mapping[str, Any], inputs: Places) -> dict[str, Any]:
    from leveret.train import train
    from leveret.train.stages import TrainRecipe

    stage = {**settings["how"], **_data(settings["how"], inputs)}
    if stage.get("held_out"):
        stage["held_out"] = {**stage["held_out"], **_data(stage["held_out"], inputs)}
    if "before" in inputs:
        stage["start"] = {"from": str(inputs["before"] / "run" / "model"), "parts": None}
    # One process: units run beside each other, and no sum hangs on how many processes there are.
    plain = {**settings["recipe"], "name": settings["stage"], "ranks": 1, "stages": {settings["stage"]: stage}}
    run = place / "run"
    train(TrainRecipe.model_validate(plain), run)
    parts = read_json(run / settings["stage"] / "stage.json")["parts"]
    return {name: sum(part[name] for part in parts) for name in ("parameters", "trainable")}


def _average(place: Path, settings: Mapping[str, Any], inputs: Places) -> dict[str, Any]:
    from leveret.model.merge import average

    models = [inputs[str(at)] / "run" / "model" for at in range(len(inputs))]
    shutil.rmtree(place / "run", ignore_errors=True)
    average([str(model) for model in models], place / "run" / "model", weights=settings["weights"])
    return {}


def _examine(place: Path, settings: Mapping[str, Any], inputs: Places) -> dict[str, Any]:
    from leveret.evaluate import evaluate
    from leveret.generate.helpers import Helpers

    root = inputs["world"] / "world" if "world" in inputs else Path(settings["questions"])
    with Helpers(count=0) as helpers:
        found = evaluate(
            inputs["model"] / "run" / "model", root, suite=settings["suite"], out=place / "eval", n=settings["n"],
            blind=settings["blind"], helpers=helpers,
        )  # fmt: skip
    keep = ("score", "n", "ci95", "blind", "majority", "words")
    return {
        "tasks": {name: {key: row[key] for key in keep if key in row} for name, row in found["tasks"].items()},
    }


def _loss(place: Path, settings: Mapping[str, Any], inputs: Places) -> dict[str, Any]:
    from leveret.study.loss import held_out_loss

    world = inputs["world"] / "world"
    model, cache = inputs["model"] / "run" / "model", place / "cache"
    found = held_out_loss(model, world / HELD_OUT, world, settings["max_tokens"], cache)
    shutil.rmtree(cache, ignore_errors=True)
    return found


def _encoder(place: Path, settings: Mapping[str, Any], inputs: Places) -> dict[str, Any]:
    from leveret.study.encoder import judge

    world = inputs["world"] / "world"
    how = {name: settings[name] for name in ("steps", "batch", "seed")}
    found = judge(inputs["pairs"] / "pairs.json", world / HELD_OUT, world, folder=place / "state", **how)
    shutil.rmtree(place / "state", ignore_errors=True)
    if found is None:
        return {"value": None}
    return {"value": found.mean, "image_to_text": found.image_to_text, "text_to_image": found.text_to_image}


@dataclass(frozen=True, slots=True)
class Kind:
    """make: (folder, settings, folders of the inputs) -> facts. read: the name in its folder that other units are made
    from. heavy: names there that a study which keeps little removes when nothing asks for them any more. progress: what
    it calls its long part while it runs, with the unit's `{what}`; a study reads there how far it is."""

    make: Callable[[Path, Mapping[str, Any], Places], dict[str, Any]]
    read: str = ""
    heavy: tuple[str, ...] = ()
    progress: str = ""


KINDS: dict[str, Kind] = {
    "draw": Kind(_draw, "world", ("world",), "draw the world"),
    "embed": Kind(_embed, "embeddings", ("embeddings",), "embedding"),
    "choose": Kind(_choose, "pairs.json", ("coreset",)),
    "teach": Kind(_teach, "run", progress="{what}"),
    "average": Kind(_average, "run"),
    "examine": Kind(_examine, progress="asking"),
    "loss": Kind(_loss),
    "encoder": Kind(_encoder, progress="teaching an encoder"),
}
