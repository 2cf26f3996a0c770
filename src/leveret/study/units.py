"""The pieces of work that a study's cells are made of, each known by what goes into it.

    draw --> embed --> choose --> teach (align) --> teach (tune) --> examine
                         \\               \\--> teach (another tune)    average
                          \\--> encoder   \\--> loss

A unit's id is a hash of its kind, its settings and the ids of what it is made from. So cells that begin alike share
what they share, studies that grow keep what they have, and nothing is ever made from something else than it says.
Settings say what differs from the defaults, so that a package that learns something new still finds what it made (where
a default or a rule changes, VERSION does). Files of a user's that they name are known by what is in them, models and
questions in folders by what lies there; a folder of data stands for itself, as do names of a hub. How each kind is
made: study/kinds.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import RecipeError, sha256_of
from leveret.study.choices import SCORER
from leveret.study.files import Cell, Choose, StudyRecipe, cells

if TYPE_CHECKING:
    from leveret.world.write import WorldSize

VERSION = 1
"""Of the way units are made; another one finds none of the old."""
WEB, CORESET, DRAWN = "web.json", "world/coreset.json", "world/"
"""Data of a stage that begin with DRAWN are files of the drawn world; CORESET is the cell's own choice."""

HELD_OUT = "captions.json"
"""Pairs of a drawn world that fit, of scenes that nothing else shows."""
ENCODER_STEPS, ENCODER_BATCH = 300, 64
"""Optimiser steps of a dual encoder that is taught from nothing, and pairs in each."""
HASHED = 1 << 26
"""Bytes up to which a user's file is known by its hash."""
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

    @cached_property
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


def is_average(study: StudyRecipe, cell: Cell) -> bool:
    """Whether the cell's model is a mean of others, and nothing of its own was chosen or taught."""
    return any(study.axes[axis].levels[level].average is not None for axis, level in cell.levels)


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

    usual, size = asdict(WorldSize()), asdict(_size(study, cell))
    settings = {
        "seed": cell.seed,
        "size": {name: value for name, value in size.items() if value != usual[name]},
        "drawn": drawn,
    }
    return _put(units, Unit("draw", f"world {cell.seed}", settings))


def _size(study: StudyRecipe, cell: Cell) -> WorldSize:
    from leveret.world.write import WorldSize

    fields = {"harder": 0, **(study.world or {})}
    for axis, level in cell.levels:
        fields |= study.axes[axis].levels[level].world
    return WorldSize(**fields)


def _web_of(study: StudyRecipe, cell: Cell, units: Units) -> str | None:
    """The world whose web a cell's pairs are chosen from: of cells whose worlds have the same web, and otherwise other
    conversations or questions, that of the first, so that what is made of the web alone is made once."""
    if study.world is None:
        return None
    web = _size(study, cell).web_part()

    def alike(other: Cell) -> bool:
        try:
            return other.seed == cell.seed and _size(study, other).web_part() == web
        except RecipeError:
            return False  # told where that cell is taken apart

    return _world(study, next(filter(alike, cells(study))), units)


def _choice(study: StudyRecipe, cell: Cell, world: str, units: Units) -> str:
    from leveret.condense.prepare import RULES
    from leveret.condense.steps import check_columns, read
    from leveret.model.hub import package_file

    how: Choose = study.choose
    for axis, level in cell.levels:
        how = study.axes[axis].levels[level].choose or how
    if how.oracle is not None:
        rule = {"oracle": how.oracle, "seed": cell.seed}
        return _put(units, Unit("choose", "by the truth", rule, {"world": world}))
    scorer = {"encoder": SCORER, "weights": sha256_of(package_file(SCORER_FILE, SCORER))}
    embedded = _put(units, Unit("embed", f"web of world {cell.seed}", scorer, {"world": world}))
    rules = read(how.recipe, [*how.set, f"seed={cell.seed}"])
    check_columns(rules, ("score",), "the drawn web")
    recipe = rules.model_dump(mode="json", exclude_defaults=True)
    settings = {"rules": RULES, "recipe": recipe, **_files_of(recipe)}
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
        if before is not None and stage.get("start") is not None:
            raise RecipeError(f"stages.{name}.start: a stage of a study starts from the one before it; leave it out")
        told = [stage["data"], (stage.get("held_out") or {}).get("data", "")]
        drawn = {data for data in told if data.startswith(DRAWN)}
        web = _web_of(study, cell, units) if CORESET in drawn else None
        if world is not None and drawn:
            inputs["world"] = web if web is not None and drawn == {CORESET} else world
        if web is not None:
            inputs["pairs"] = _choice(study, cell, web, units)
        # What came before says what the model is; a later stage that asks for another one would be told by `start`.
        own = {
            key: value for key, value in recipe.items() if key not in ("stages", "name", "average", "track", "ranks")
        }
        settings: dict[str, Any] = {"recipe": own, "stage": name, "how": stage, "weights": weights}
        settings |= _files_of({"how": stage, "recipe": own})
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


def _files_of(settings: Any) -> dict[str, Any]:
    """{"files": place -> what lies there} of the user's files and models that settings name; {} where there is none."""
    found: dict[str, Any] = {}

    def visit(value: Any) -> None:
        if isinstance(value, str) and value.isprintable() and 0 < len(value) < 1_000 and not value.startswith(DRAWN):
            path = Path(value)
            if path.is_file():
                found[value] = _stamp(path)
            elif (path / "config.json").is_file():
                found[value] = {one.name: _stamp(one) for one in sorted(path.iterdir()) if one.is_file()}
        for one in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
            visit(one)

    visit(settings)
    return {"files": found} if found else {}


def _stamp(path: Path) -> str:
    """A file's hash, or of one so large that this would take its time its size and time."""
    facts = path.stat()
    return _hash(path, facts.st_size, facts.st_mtime_ns)


@lru_cache
def _hash(path: Path, size: int, time: int) -> str:
    return sha256_of(path) if size <= HASHED else f"{size} bytes of {time}"


def _suite(study: StudyRecipe, cell: Cell, units: Units) -> str:
    world = _world(study, cell, units)
    inputs = {"model": _model(study, cell, units)} | ({"world": world} if world else {})
    settings: dict[str, Any] = {"suite": study.suite, "n": study.n, "blind": study.blind, "questions": None}
    if world is None and study.questions is not None:
        place = Path(study.questions)
        listed = sorted(one for one in place.iterdir() if one.is_file()) if place.is_dir() else []
        settings |= {"questions": study.questions, "files": {one.name: _stamp(one) for one in listed}}
    return _put(units, Unit("examine", study.suite, settings, inputs))


def _loss_of(study: StudyRecipe, cell: Cell, units: Units) -> str | None:
    from leveret.train.stages import StageRecipe

    world, last = _world(study, cell, units), _model(study, cell, units)
    learned = [id for id in chain(units, last) if "pairs" in units[id].inputs and units[id].kind == "teach"]
    if world is None or len(learned) != 1:
        return None
    tokens = StageRecipe.model_validate(units[learned[0]].settings["how"]).max_tokens
    return _put(units, Unit("loss", "captions", {"max_tokens": tokens}, {"model": learned[0], "world": world}))


def _encoder_of(study: StudyRecipe, cell: Cell, units: Units) -> str | None:
    world, web = _world(study, cell, units), _web_of(study, cell, units)
    if world is None or web is None or is_average(study, cell):
        return None
    settings = {"steps": ENCODER_STEPS, "batch": ENCODER_BATCH, "seed": cell.seed}
    pairs = _choice(study, cell, web, units)
    return _put(units, Unit("encoder", "encoder", settings, {"world": world, "pairs": pairs}))


MEASURED: dict[str, Callable[[StudyRecipe, Cell, Units], str | None]] = {
    "suite": _suite,
    "loss": _loss_of,
    "encoder": _encoder_of,
}
"""How each of `files.MEASURES` is taken."""
