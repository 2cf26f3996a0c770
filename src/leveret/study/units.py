"""The pieces of work that a study's cells are made of, each known by what goes into it.

    draw --> embed --> choose --> teach (align) --> teach (tune) --> examine
                                        \\--> teach (another tune)    average

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
from leveret.study.files import Cell, Choose, StudyRecipe
from leveret.study.site import SCORER, web_records

VERSION = 1
"""Of the way units are made; another one finds none of the old."""
WEB, CORESET, DRAWN = "web.json", "world/coreset.json", "world/"
"""Data of a stage that begin with DRAWN are files of the drawn world; CORESET is the cell's own choice."""

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


def of_cell(study: StudyRecipe, cell: Cell, units: Units) -> str:
    """The id of the cell's examination; it and all that it needs are put into `units`."""
    world = _world(study, cell, units)
    inputs = {"model": _model(study, cell, units)} | ({"world": world} if world else {})
    settings = {"suite": study.suite, "n": study.n, "blind": study.blind, "questions": study.questions}
    return _put(units, Unit("examine", study.suite, settings, inputs))


def chain(units: Units, last: str) -> list[str]:
    """A unit and all that it is made from, in the order of work."""
    found: dict[str, None] = {}

    def visit(id: str) -> None:
        for one in units[id].inputs.values():
            visit(one)
        found.setdefault(id)

    visit(last)
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
    recipe = place / "recipe.yaml"
    place.mkdir(parents=True, exist_ok=True)
    write_json(recipe, settings["recipe"])  # JSON is YAML
    out = condense(inputs["embeddings"] / "embeddings", place / "coreset", str(recipe), images=world)
    chosen, records = read_json(out / "coreset.json"), web_records(world)
    write_coreset([records[record["id"]] for record in chosen], place / "pairs.json")
    return {"kept": len(chosen)}


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
}
