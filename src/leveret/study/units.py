"""The pieces of work that a study's cells are made of, each known by what goes into it.

    draw --> embed --> choose --> teach (align) --> teach (tune) --> examine
                         \\               \\--> teach (another tune)    average
                          \\--> encoder   \\--> loss

A unit's id is a hash of its kind, its settings and the ids of what it is made from. So cells that begin alike share
what they share, studies that grow keep what they have, and nothing is ever made from something else than it says.
Settings say what differs from the defaults, so that a package that learns something new still finds what it made (where
a default or a rule changes, VERSION does), and hold no place on a disk. Each kind is a row of KINDS: a function of
folders to a folder, resumable.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leveret.runs import read_json, sha256_of, write_json
from leveret.study.choices import SCORER, by_truth, contents, keep_some, truth_of, web_records
from leveret.study.files import Cell, Choose, StudyRecipe

VERSION = 1
"""Of the way units are made; another one finds none of the old."""
WEB, CORESET, DRAWN = "web.json", "world/coreset.json", "world/"
"""Data of a stage that begin with DRAWN are files of the drawn world; CORESET is the cell's own choice."""

HELD_OUT = "captions.json"
"""Pairs of a drawn world that fit, of scenes that nothing else shows."""
ENCODER_STEPS, ENCODER_BATCH = 300, 64
"""Optimiser steps of a dual encoder that is taught from nothing, and pairs in each."""
SCORER_FILE = "world/weights/scorer.safetensors"


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    what    for people: what it is.
    inputs  role -> id of another unit.
    """

    kind: str
    what: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        plain = {"version": VERSION, "kind": self.kind, "settings": self.settings, "inputs": self.inputs}
        return f"{self.kind}-{sha256_of(plain)[:16]}"

    def plain(self) -> dict[str, Any]:
        return {"kind": self.kind, "what": self.what, "settings": dict(self.settings), "inputs": dict(self.inputs)}


Units = dict[str, Unit]
"""By id, each behind what it is made from."""


def of_cell(study: StudyRecipe, cell: Cell, units: Units) -> dict[str, str]:
    """Measure -> id of the unit that takes it; these and all that they need are put into `units`. A measure that the
    cell cannot have (the loss where no stage of its own learned from the chosen pairs) is left out."""
    found = {name: MEASURED[name](study, cell, units) for name in study.measures}
    return {name: id for name, id in found.items() if id is not None}


def chain(units: Units, *last: str) -> list[str]:
    """Units and all that they are made from, in the order of work."""
    found: dict[str, None] = {}

    def visit(id: str) -> None:
        for one in units[id].inputs.values():
            visit(one)
        found.setdefault(id)

    for id in last:
        visit(id)
    return list(found)


def _put(units: Units, unit: Unit) -> str:
    units.setdefault(unit.id, unit)
    return unit.id


def _world(study: StudyRecipe, cell: Cell, units: Units) -> str | None:
    if study.world is None:
        return None
    from dataclasses import asdict

    from leveret.world.write import VERSION as drawn
    from leveret.world.write import WorldSize

    fields = {"harder": 0, **study.world}
    for axis, level in cell.levels:
        fields |= study.axes[axis].levels[level].world
    usual, size = asdict(WorldSize()), asdict(WorldSize(**fields))
    settings = {
        "seed": cell.seed,
        "size": {name: value for name, value in size.items() if value != usual[name]},
        "drawn": drawn,
    }
    return _put(units, Unit("draw", f"world {cell.seed}", settings))


def _choice(study: StudyRecipe, cell: Cell, world: str, units: Units) -> str:
    from leveret.condense.pipeline import RULES
    from leveret.condense.steps import read
    from leveret.model.hub import package_file

    how: Choose = study.choose
    for axis, level in cell.levels:
        how = study.axes[axis].levels[level].choose or how
    if how.oracle is not None:
        rule = {"oracle": how.oracle, "seed": cell.seed}
        return _put(units, Unit("choose", "by the truth", rule, {"world": world}))
    scorer = {"encoder": SCORER, "weights": sha256_of(package_file(SCORER_FILE, SCORER))}
    embedded = _put(units, Unit("embed", f"web of world {cell.seed}", scorer, {"world": world}))
    recipe = read(how.recipe, [*how.set, f"seed={cell.seed}"]).model_dump(mode="json", exclude_defaults=True)
    settings = {"rules": RULES, "recipe": recipe}
    return _put(units, Unit("choose", how.recipe, settings, {"world": world, "embeddings": embedded}))


def _model(study: StudyRecipe, cell: Cell, units: Units) -> str:
    """The id of the unit that makes the cell's model."""
    for axis, level in cell.levels:
        mean = study.axes[axis].levels[level].average
        if mean is not None:
            made = [_model(study, cell.at(axis, one), units) for one in mean.levels]
            shares = mean.weights or (1 / len(made),) * len(made)
            return _put(
                units, Unit("average", level, {"weights": list(shares)}, {f"{at}": id for at, id in enumerate(made)})
            )
    from leveret.train.run import read

    overrides = list(study.train)
    for axis, level in cell.levels:
        overrides += study.axes[axis].levels[level].train
    recipe = read(study.base, [*overrides, f"seed={cell.seed}"]).model_dump(mode="json", exclude_defaults=True)
    world = _world(study, cell, units)
    weights = _weights(recipe["model"])
    before: str | None = None
    for name, stage in recipe["stages"].items():
        inputs: dict[str, str] = {} if before is None else {"before": before}
        if stage["data"].startswith(DRAWN) and world is not None:
            inputs["world"] = world
            if stage["data"] == CORESET:
                inputs["pairs"] = _choice(study, cell, world, units)
        # What came before says what the model is; a later stage that asks for another one would be told by `start`.
        own = {
            key: value for key, value in recipe.items() if key not in ("stages", "name", "average", "track", "ranks")
        }
        settings: dict[str, Any] = {"recipe": own, "stage": name, "how": stage, "weights": weights}
        before = _put(units, Unit("teach", name, settings, inputs))
    assert before is not None, "a recipe has at least one stage"
    return before


def _weights(model: Any) -> dict[str, str]:
    """Fingerprints of the package's own weights that a model names: with newer ones it is another model."""
    from leveret.model.hub import package_file
    from leveret.model.language import LANGUAGES
    from leveret.model.tower_table import TOWERS

    if isinstance(model, str):
        row = TOWERS.get(model) or LANGUAGES.get(model)
        return {model: sha256_of(package_file(row.package, model))} if row and row.package else {}
    parts = model.values() if isinstance(model, Mapping) else model if isinstance(model, list) else ()
    return {name: found for part in parts for name, found in _weights(part).items()}


def _suite(study: StudyRecipe, cell: Cell, units: Units) -> str:
    world = _world(study, cell, units)
    inputs = {"model": _model(study, cell, units)} | ({"world": world} if world else {})
    settings = {"suite": study.suite, "n": study.n, "blind": study.blind, "questions": study.questions}
    return _put(units, Unit("examine", study.suite, settings, inputs))


def _loss_of(study: StudyRecipe, cell: Cell, units: Units) -> str | None:
    world, last = _world(study, cell, units), _model(study, cell, units)
    learned = [id for id in chain(units, last) if "pairs" in units[id].inputs and units[id].kind == "teach"]
    if world is None or len(learned) != 1:
        return None
    tokens = units[learned[0]].settings["how"]["max_tokens"]
    return _put(units, Unit("loss", "captions", {"max_tokens": tokens}, {"model": learned[0], "world": world}))


def _encoder_of(study: StudyRecipe, cell: Cell, units: Units) -> str | None:
    if (world := _world(study, cell, units)) is None:
        return None
    settings = {"steps": ENCODER_STEPS, "batch": ENCODER_BATCH, "seed": cell.seed}
    pairs = _choice(study, cell, world, units)
    return _put(units, Unit("encoder", "encoder", settings, {"world": world, "pairs": pairs}))


MEASURED: dict[str, Callable[[StudyRecipe, Cell, Units], str | None]] = {
    "suite": _suite,
    "loss": _loss_of,
    "encoder": _encoder_of,
}
"""How each of `files.MEASURES` is taken."""


# --- making them ---------------------------------------------------------------------------------------------------

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


def _teach(place: Path, settings: Mapping[str, Any], inputs: Places) -> dict[str, Any]:
    from leveret.train import train
    from leveret.train.stages import TrainRecipe

    stage = dict(settings["how"])
    if "pairs" in inputs:
        stage |= {"data": str(inputs["pairs"] / "pairs.json"), "images": str(inputs["world"] / "world")}
    elif "world" in inputs:
        stage["data"] = str(inputs["world"] / "world" / stage["data"].removeprefix(DRAWN))
    if "before" in inputs:
        stage["start"] = {"from": str(inputs["before"] / "run" / "model"), "parts": None}
    # One process: units run beside each other, and the sums of one do not hang on how many there are.
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
    """make: (folder, settings, folders of the inputs) -> facts. heavy: names in its folder that a study which keeps
    little removes when nothing asks for them any more. progress: what it calls its long part while it runs, with the
    unit's `{what}`; a study reads there how far it is."""

    make: Callable[[Path, Mapping[str, Any], Places], dict[str, Any]]
    heavy: tuple[str, ...] = ()
    progress: str = ""


KINDS: dict[str, Kind] = {
    "draw": Kind(_draw, ("world",), "draw the world"),
    "embed": Kind(_embed, ("embeddings",), "embedding"),
    "choose": Kind(_choose, ("coreset",)),
    "teach": Kind(_teach, progress="{what}"),
    "average": Kind(_average),
    "examine": Kind(_examine, progress="asking"),
    "loss": Kind(_loss),
    "encoder": Kind(_encoder, progress="teaching an encoder"),
}
