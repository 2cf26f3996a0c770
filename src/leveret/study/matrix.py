"""A study taken apart into cells and units, and the folder that holds what is made of them.

DIR/study.json              the study as it was last asked for
DIR/units.json              all units, for processes that make one of them, and which of them give a cell its figures
DIR/units/ID/               what a unit made; done.json last, with its seconds and facts. A link where several
                            studies fill one folder, so that what they have in common is made once
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leveret.recipe import dump
from leveret.runs import DataError, RecipeError, claim, read_json, write_json
from leveret.study.files import Cell, StudyRecipe, base_cell, cells
from leveret.study.kinds import KINDS
from leveret.study.units import CORESET, Unit, Units, chain, is_average, of_cell


@dataclass(frozen=True)
class Matrix:
    """A study taken apart. measured: cell -> measure -> the unit that takes it."""

    study: StudyRecipe
    units: Units
    measured: dict[Cell, dict[str, str]]

    @classmethod
    def of(cls, study: StudyRecipe) -> Matrix:
        """RecipeError with every cell whose recipe cannot be, at once."""
        units: Units = {}
        measured: dict[Cell, dict[str, str]] = {}
        faults: dict[str, None] = {}
        for cell in cells(study):
            try:
                measured[cell] = of_cell(study, cell, units)
            except RecipeError as fault:
                where = ",".join(f"{axis}={level}" for axis, level in cell.levels)
                faults[f"{where}: {fault}"] = None
                continue
            faults |= dict.fromkeys(_faults(study, cell, units, measured[cell]))
        if faults:
            raise RecipeError(f"study {study.name} cannot run:\n" + "\n".join(faults))
        needed = chain(units, *(id for ends in measured.values() for id in ends.values()))
        return cls(study, {id: units[id] for id in needed}, measured)

    def plain(self) -> dict[str, Any]:
        """As `units.json` has it: for processes that make a unit, and for reports, which ask no recipe of today."""
        cells = [{"levels": cell.levels, "seed": cell.seed, "measures": ends} for cell, ends in self.measured.items()]
        return {"cells": cells, "units": {id: unit.plain() for id, unit in self.units.items()}}

    @classmethod
    def again(cls, study: StudyRecipe, plain: Mapping[str, Any]) -> Matrix:
        """From what `plain` gave."""
        units = {id: Unit(**row) for id, row in plain["units"].items()}
        cells = {
            Cell(tuple((axis, level) for axis, level in row["levels"]), row["seed"]): row["measures"]
            for row in plain["cells"]
        }
        return cls(study, units, cells)

    def check(self) -> None:
        """RecipeError with every model that cannot be built, before anything is made. Imports torch."""
        from leveret.model.build import build_meta
        from leveret.model.recipe import ModelRecipe

        faults: dict[str, None] = {}
        models = {
            json.dumps(unit.settings["recipe"]["model"]): unit for unit in self.units.values() if unit.kind == "teach"
        }
        for unit in models.values():
            try:
                build_meta(ModelRecipe.model_validate(unit.settings["recipe"]["model"]))
            except RecipeError as fault:
                faults[str(fault)] = None
        if faults:
            raise RecipeError(f"study {self.study.name} cannot run:\n" + "\n".join(faults))

    def needed(self, cell: Cell) -> list[str]:
        """All units behind a cell's figures, in the order of work."""
        return chain(self.units, *self.measured[cell].values())

    def order(self) -> list[str]:
        """All units, those of the first cells first."""
        return list(dict.fromkeys(id for cell in self.measured for id in self.needed(cell)))

    def wanted(self, folder: Folder) -> set[str]:
        """Units that a missing figure needs and that are not there; of what was thrown away only what it needs."""
        found: set[str] = set()

        def need(id: str) -> None:
            read = KINDS[self.units[id].kind].read
            if id in found or (folder.is_done(id) and (not read or (folder.unit(id) / read).exists())):
                return
            found.add(id)
            for one in self.units[id].inputs.values():
                need(one)

        for ends in self.measured.values():
            for last in ends.values():
                if not folder.is_done(last):
                    need(last)
        return found

    def users(self) -> dict[str, int]:
        """How many cells need each unit."""
        counts: dict[str, int] = {}
        for cell in self.measured:
            for id in self.needed(cell):
                counts[id] = counts.get(id, 0) + 1
        return counts


def _faults(study: StudyRecipe, cell: Cell, units: Units, ends: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with a cell that can be made and will not tell what it should."""
    lacking = [name for name in study.measures if name not in ends]
    if lacking and (cell == base_cell(study, cell.seed) or lacking[0] == study.measures[0]):
        why = "is an average" if is_average(study, cell) else f"has not exactly one stage that learns from {CORESET}"
        yield f"measures: {', '.join(lacking)}: cannot be taken of {cell.name}, which {why}"
    base = base_cell(study, cell.seed)
    for place, one in enumerate(study.claims):
        of_this = cell in [base.at(one.axis, level) for level in (one.level, one.than or study.axes[one.axis].base)]
        if of_this and (missing := [name for name in one.by if name in lacking]):
            yield f"claims.{place}.by: {', '.join(missing)} cannot be measured of {cell.name}"
    chosen = any(units[id].kind == "choose" for id in chain(units, *ends.values()))
    for axis, level in cell.levels:
        if study.axes[axis].levels[level].choose is not None and not chosen:
            yield f"axes.{axis}.levels.{level}.choose: no stage of {cell.name} learns from {CORESET}"


@dataclass
class Folder:
    """A study's folder. units: where its units lie, if not in it."""

    path: Path
    units: Path | None = None

    def unit(self, id: str) -> Path:
        return (self.units or self.path / "units") / id

    def is_done(self, id: str) -> bool:
        return (self.unit(id) / "done.json").exists()

    def facts(self, id: str) -> dict[str, Any] | None:
        """What a finished unit found; None where it is not finished."""
        found: dict[str, Any] | None = read_json(self.unit(id) / "done.json") if self.is_done(id) else None
        return found

    @property
    def _mark(self) -> Path:
        return self.path / "study.json"

    def check(self, study: StudyRecipe) -> None:
        """RecipeError where the folder is none for this study: it holds another, something else, or other units. Writes
        nothing."""
        if self._mark.exists():
            if (there := _name_in(self._mark)) != study.name:
                raise RecipeError(f"{self.path} holds the study {there!r}, not {study.name!r}; name another with -o")
        elif self.path.is_dir():
            if strangers := sorted(item.name for item in self.path.iterdir() if item.name[0] != "."):
                raise RecipeError(
                    f"{self.path} is not empty and holds no study (it holds {', '.join(strangers[:5])}); name a new or "
                    "empty folder with -o"
                )
        elif self.path.exists():
            raise RecipeError(f"{self.path} is a file, and a study fills a folder; name another with -o")
        if self.units is not None and self.units.exists() and not self.units.is_dir():
            raise RecipeError(f"--units {self.units} is a file, and pieces fill a folder; name another")
        here = self.path / "units"
        if self.units is not None and os.path.lexists(here) and here.resolve() != self.units.resolve():
            raise RecipeError(
                f"{here} is there already and is not {self.units}; leave --units out, or name another folder with -o"
            )

    def open(self, matrix: Matrix) -> None:
        """Begin the folder, or go on in it: with the same study, or one of that name that grew or changed."""
        self.check(matrix.study)
        claim(self.path)
        write_json(self._mark, dump(matrix.study))  # first: what else is here is then known to be a study's
        claim(self.units or self.path / "units")  # two studies would throw away what the other works from
        if self.units is not None and not os.path.lexists(self.path / "units"):
            # Processes that make one look for it here.
            (self.path / "units").symlink_to(
                os.path.relpath(self.units.resolve(), self.path.resolve()), target_is_directory=True
            )
        write_json(self.path / "units.json", matrix.plain())


def reopen(path: str | Path) -> tuple[Folder, Matrix]:
    """A study's folder and the study that it was last run for, as it was then. DataError where there is none."""
    place = Path(path)
    if not (place / "study.json").exists():
        raise DataError(f"{path} holds no study (no study.json); `leveret study run STUDY -o {path}` makes one")
    study = _study_in(place)
    try:
        return Folder(place), Matrix.again(study, read_json(place / "units.json"))
    except (OSError, KeyError, TypeError, ValueError):
        raise DataError(
            f"{place / 'units.json'} is not what a study writes; `leveret study run` writes it again"
        ) from None


def _name_in(mark: Path) -> str:
    """Of the study of a folder. DataError where `study.json` is not what a study writes."""
    there = read_json(mark)
    if not isinstance(there, dict) or not isinstance(there.get("name"), str):
        raise DataError(f"{mark} holds no study; name another folder, or delete this one")
    return str(there["name"])


def _study_in(path: Path) -> StudyRecipe:
    """What `study.json` holds. DataError where that is no study, or one that this version cannot read."""
    try:
        return StudyRecipe.model_validate(read_json(path / "study.json"))
    except ValueError as fault:
        first = str(fault).splitlines()[0]
        raise DataError(
            f"{path / 'study.json'} holds no study ({first}); name another folder, or delete this one"
        ) from None


def as_plain(matrix: Matrix) -> list[dict[str, Any]]:
    """The cells and their units, for `--json`."""
    return [{**asdict(cell), "units": matrix.needed(cell)} for cell in matrix.measured]
