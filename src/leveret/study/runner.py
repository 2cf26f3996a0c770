"""Runs what is missing of a study: its units in an order in which each finds what it is made from.

DIR/study.json              the study as it was last asked for
DIR/units.json              all units, for processes that make one of them
DIR/units/ID/               what a unit made; done.json last, with its seconds and facts. A link where several
                            studies fill one folder, so that what they have in common is made once
DIR/ledger.jsonl            a line for each unit of each cell: made for it, shared with an earlier cell, or found
DIR/results.json report.html

Units run in this process, in several, or by a command of one's own for each (a cluster's scheduler), which need only
see the same folder. One that fails costs the cells that need it, and no other.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from leveret.recipe import dump
from leveret.runs import (
    DataError,
    Interrupted,
    Progress,
    RecipeError,
    UserError,
    append_jsonl,
    claim,
    cores,
    graceful_stop,
    read_json,
    stop_requested,
    write_json,
)
from leveret.study.files import Cell, StudyRecipe, base_cell, cells
from leveret.study.units import CORESET, KINDS, Unit, Units, chain, of_cell

KIND = "study"
POLL = 0.2
"""Seconds between two looks at the processes."""
LOOK = 2.0
"""Seconds between two looks at how far they are."""
PARENT = "LEVERET_STUDY_PROCESS"
"""Tells a unit's process who started it here: it ends, with its work saved, when that is killed."""
LATELY = 4_000
"""Bytes of a log in which the last line of progress is looked for."""
TAIL = 400
"""Characters of a failed unit's log that are told."""


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
            if lacking := [name for name in study.measures if name not in measured[cell]]:
                if cell == base_cell(study, cell.seed) or lacking[0] == study.measures[0]:
                    faults[f"measures: {', '.join(lacking)}: no stage of {cell.name} learns from {CORESET}"] = None
        if faults:
            raise RecipeError(f"study {study.name} cannot run:\n" + "\n".join(faults))
        needed = chain(units, *(id for ends in measured.values() for id in ends.values()))
        return cls(study, {id: units[id] for id in needed}, measured)

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

    def users(self) -> dict[str, int]:
        """How many cells need each unit."""
        counts: dict[str, int] = {}
        for cell in self.measured:
            for id in self.needed(cell):
                counts[id] = counts.get(id, 0) + 1
        return counts


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
            if (there := read_json(self._mark)["name"]) != study.name:
                raise RecipeError(f"{self.path} holds the study {there!r}, not {study.name!r}; name another with -o")
        elif self.path.is_dir():
            if strangers := sorted(item.name for item in self.path.iterdir() if item.name[0] != "."):
                raise RecipeError(
                    f"{self.path} is not empty and holds no study (it holds {', '.join(strangers[:5])}); name a new or "
                    "empty folder with -o"
                )
        elif self.path.exists():
            raise RecipeError(f"{self.path} is a file, and a study fills a folder; name another with -o")
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
        if self.units is not None and not os.path.lexists(self.path / "units"):
            # Processes that make one look for it here.
            self.units.mkdir(parents=True, exist_ok=True)
            (self.path / "units").symlink_to(
                os.path.relpath(self.units.resolve(), self.path.resolve()), target_is_directory=True
            )
        write_json(self.path / "units.json", {id: unit.plain() for id, unit in matrix.units.items()})


def make(path: Path, id: str) -> dict[str, Any]:
    """Make one unit of a study's folder, in this process. Found again if it is done. DataError where what it is made
    from is not done, or the folder knows no such unit."""
    folder = Folder(path)
    if (done := folder.facts(id)) is not None:
        return done
    known = read_json(path / "units.json") if (path / "units.json").exists() else {}
    if id not in known:
        raise DataError(f"{path} holds no study with the unit {id}; `leveret study run` writes {path / 'units.json'}")
    unit = Unit(**known[id])
    if missing := [one for one in unit.inputs.values() if not folder.is_done(one)]:
        raise DataError(f"unit {id} is made from {', '.join(missing)}, which is not done")
    place = folder.unit(id)
    claim(place)  # one process a unit: one whose study was killed may still be at it
    spent = place / "seconds.json"
    before = float(read_json(spent)) if spent.exists() else 0.0
    worked = _clock()
    try:
        facts = KINDS[unit.kind].make(place, unit.settings, {k: folder.unit(v) for k, v in unit.inputs.items()})
    finally:
        write_json(spent, before + worked())
    found = {"unit": unit.plain(), "seconds": round(before + worked(), 1), **facts}
    write_json(place / "done.json", found)
    return found


def _clock() -> Callable[[], float]:
    """Seconds of work since now, so that costs can be compared that were not measured side by side: by the clock on the
    wall where a GPU works, else without the time that others had the cores (on several threads the wall's again)."""

    def cpu() -> float:
        return sum(os.times()[:4])  # with that of processes which ended

    began, busy = time.time(), cpu()

    def worked() -> float:
        torch = sys.modules.get("torch")
        passed = time.time() - began
        return passed if torch is not None and torch.cuda.is_initialized() else min(passed, cpu() - busy)

    return worked


def follow_parent() -> None:
    """In a unit's process: SIGTERM to itself when the study that started it is gone. By a scheduler's command nobody
    is followed."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def run(
    study: StudyRecipe,
    out: str | Path,
    *,
    jobs: int | None = None,
    command: str | None = None,
    keep: bool = False,
    units: str | Path | None = None,
) -> dict[str, Any]:
    """Run what is missing, or go on; returns what stands in `out/results.json` and writes the page.

    jobs     units at once, each in a process of one thread; None: as many as there are cores.
    command  instead of a process here: a line for the shell with `{}` where the unit's own command stands (such as
             `srun -c 4 {}`), which ends when that does.
    keep     keep drawn worlds and embeddings, which can be made again to the byte, when no missing unit needs them.
    units    a folder for the units that other studies fill too (one study at a time); by default one in `out`.

    Raises RecipeError (the study, or the folder), Interrupted (all that runs is stopped and saved; the same call goes
    on), and DataError where units failed, after all others were made.
    """
    from leveret.study.page import publish

    matrix, folder = Matrix.of(study), Folder(Path(out), None if units is None else Path(units))
    matrix.check()
    folder.open(matrix)
    ledger = _Ledger(folder, matrix)
    work = _Work(folder, matrix, jobs or cores(), command, keep, ledger)
    try:
        with graceful_stop():
            work.run()
    finally:
        results = publish(folder, matrix)
    if work.failed:
        told = "\n".join(
            f"  {matrix.units[id].kind} ({matrix.units[id].what}): {why}" for id, why in work.failed.items()
        )
        raise DataError(f"{len(work.failed)} of the study's units failed; the others are done.\n{told}")
    return results


@dataclass
class _Running:
    """A unit's process. began: where in the log its own words begin. told: seconds of it that the bar has counted."""

    id: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: int
    told: int = 0

    def share(self, unit: Unit) -> float:
        """How much of it is done, by the last line of its own `Progress` in the log; 0 before the first."""
        with open(self.log.name, "rb") as log:
            log.seek(max(self.began, log.seek(0, os.SEEK_END) - LATELY))
            said = log.read().decode("utf-8", "replace")
        name = KINDS[unit.kind].progress.format(what=unit.what)
        found = re.findall(rf"^{re.escape(name)}: ([\d,]+) of ([\d,]+) ", said, re.MULTILINE) if name else []
        if not found:
            return 0.0
        count, total = (int(number.replace(",", "")) for number in found[-1])
        return count / total if total else 0.0


@dataclass
class _Work:
    folder: Folder
    matrix: Matrix
    jobs: int
    command: str | None
    keep: bool
    ledger: _Ledger
    failed: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        order = self.matrix.order()
        wanted = self._wanted(order)
        done = [id for id in order if self.folder.is_done(id)]
        self.ledger.found(done)
        left = [id for id in order if id in wanted]
        if not left:
            return
        from leveret.study.costs import unit_seconds

        costs = unit_seconds({id: self.matrix.units[id] for id in left}, self.folder)
        running: list[_Running] = []
        with Progress(sum(round(cost) for cost in costs.values()), "study (seconds of work)") as bar:
            looked = time.monotonic()
            try:
                while left or running:
                    if stop_requested():
                        raise Interrupted("stopped as asked; the same command goes on from there")
                    ready = [id for id in left if self._ready(id)]
                    left = [id for id in left if not self._hopeless(id)]
                    while ready and len(running) < self.jobs:
                        id = ready.pop(0)
                        left.remove(id)
                        if self.jobs == 1 and self.command is None:
                            self._here(id)
                            self._ended(id, bar, costs)
                        else:
                            running.append(self._start(id))
                    for one in [one for one in running if one.process.poll() is not None]:
                        running.remove(one)
                        one.log.close()
                        if one.process.returncode or not self.folder.is_done(one.id):
                            self._fail(one.id, _last_words(self.folder.unit(one.id) / "log.txt"))
                        self._ended(one.id, bar, costs, one.told)
                    if running and time.monotonic() - looked >= LOOK:
                        looked = time.monotonic()
                        self._tell(running, bar, costs)
                    if running:
                        time.sleep(POLL)
            finally:
                _stop(running)

    def _wanted(self, order: Sequence[str]) -> set[str]:
        """Units that are not done and that a missing figure needs. What was thrown away is made again only for one."""
        wanted: set[str] = set()

        def need(id: str) -> None:
            if id in wanted or self._usable(id):
                return
            (self.folder.unit(id) / "done.json").unlink(missing_ok=True)
            wanted.add(id)
            for one in self.matrix.units[id].inputs.values():
                need(one)

        for ends in self.matrix.measured.values():
            for last in ends.values():
                if not self.folder.is_done(last):
                    need(last)
        return wanted

    def _usable(self, id: str) -> bool:
        heavy = KINDS[self.matrix.units[id].kind].heavy
        place = self.folder.unit(id)
        return self.folder.is_done(id) and all((place / name).exists() for name in heavy)

    def _ready(self, id: str) -> bool:
        return all(self.folder.is_done(one) for one in self.matrix.units[id].inputs.values())

    def _hopeless(self, id: str) -> bool:
        """Whether it needs what failed; told once."""
        lost = [one for one in self.matrix.units[id].inputs.values() if one in self.failed]
        if lost and id not in self.failed:
            self.failed[id] = f"needs {lost[0]}, which failed"
        return bool(lost)

    def _here(self, id: str) -> None:
        try:
            make(self.folder.path, id)
        except Interrupted:
            raise
        except UserError as fault:
            self._fail(id, " ".join(str(fault).split()))

    def _start(self, id: str) -> _Running:
        own = [sys.executable, "-m", "leveret.cli", "study", "unit", str(self.folder.path), id]
        log = open(_made(self.folder.unit(id)) / "log.txt", "ab")
        began = log.tell()  # before there is a process: it writes at the same place
        threads = str(max(1, cores() // self.jobs))
        ours = {"OMP_NUM_THREADS": threads, PARENT: str(os.getpid())}
        environment = {**os.environ, **ours} if self.command is None else dict(os.environ)
        what: Any = own if self.command is None else self.command.replace("{}", shlex.join(own))
        process = subprocess.Popen(
            what, shell=self.command is not None, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        return _Running(id, process, log, began)

    def _tell(self, running: Sequence[_Running], bar: Progress, costs: dict[str, float]) -> None:
        """What runs, how far each is, and its part of the bar."""
        words, more = [], 0
        for one in running:
            unit = self.matrix.units[one.id]
            share = one.share(unit)
            now = max(one.told, int(share * round(costs[one.id])))
            more, one.told = more + now - one.told, now
            cell = next(cell.name for cell in self.matrix.measured if one.id in self.matrix.needed(cell))
            words.append(f"{unit.kind} {unit.what} of {cell}" + (f" {share:.0%}" if share else ""))
        bar.advance(more, now=", ".join(words))

    def _fail(self, id: str, why: str) -> None:
        self.failed[id] = why or "it ended without a word"
        print(f"failed: {self.matrix.units[id].kind} ({self.matrix.units[id].what}): {self.failed[id]}",
              file=sys.stderr, flush=True)  # fmt: skip

    def _ended(self, id: str, bar: Progress, costs: dict[str, float], told: int = 0) -> None:
        bar.advance(round(costs[id]) - told)
        if id not in self.failed:
            self.ledger.made(id)
            if not self.keep:
                self._tidy()

    def _tidy(self) -> None:
        """Throw away what is large, can be made again, and is needed by nothing that is still to be made."""
        needed = {
            one
            for id, unit in self.matrix.units.items()
            if not self.folder.is_done(id) and id not in self.failed
            for one in unit.inputs.values()
        }
        for id, unit in self.matrix.units.items():
            if id not in needed and self.folder.is_done(id):
                for name in KINDS[unit.kind].heavy:
                    shutil.rmtree(self.folder.unit(id) / name, ignore_errors=True)


@dataclass
class _Ledger:
    """Who made what for whom: a line for each unit of each cell, when it is there for that cell the first time."""

    folder: Folder
    matrix: Matrix

    def found(self, ids: Sequence[str]) -> None:
        for id in ids:
            self._lines(id, "found")

    def made(self, id: str) -> None:
        self._lines(id, "made")

    def _lines(self, id: str, did: str) -> None:
        path = self.folder.path / "ledger.jsonl"
        told = self._told(path)
        facts = self.folder.facts(id) or {}
        for cell in self.matrix.measured:
            if id in self.matrix.needed(cell) and (id, cell.name) not in told:
                unit = self.matrix.units[id]
                line = {"unit": id, "kind": unit.kind, "what": unit.what, "cell": cell.name, "did": did}
                append_jsonl(path, {**line, "seconds": facts.get("seconds") if did == "made" else 0})
                did = "shared" if did == "made" else did

    def _told(self, path: Path) -> set[tuple[str, str]]:
        from leveret.runs import read_jsonl, repair_jsonl

        repair_jsonl(path)
        return {(row["unit"], row["cell"]) for row in read_jsonl(path)} if path.exists() else set()


def _made(place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    return place


def _last_words(log: Path) -> str:
    """The last line that says something: where a fault is told."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][-TAIL:] if lines else ""


def _stop(running: list[_Running]) -> None:
    """SIGTERM to what runs, which saves and ends; after a while SIGKILL, which costs what was not saved."""
    for one in running:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGTERM)
    for one in running:
        try:
            one.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
        one.log.close()


def reopen(path: str | Path) -> tuple[Folder, Matrix]:
    """A study's folder and the study that it was last run for. DataError where there is none."""
    mark = Path(path) / "study.json"
    if not mark.exists():
        raise DataError(f"{path} holds no study (no study.json); `leveret study run STUDY -o {path}` makes one")
    return Folder(Path(path)), Matrix.of(StudyRecipe.model_validate(read_json(mark)))


def describe(matrix: Matrix, out: str | Path, units: str | Path | None = None) -> dict[str, Any]:
    """What `run` would do: the cells, the units, what is shared and done, and about how long it takes (`timed`:
    whether that was measured, on the drawn world or in this folder). Refuses what `run` would refuse before it begins,
    with its RecipeError, and writes nothing."""
    from leveret.study.costs import sort_of, unit_seconds

    folder = Folder(Path(out), None if units is None else Path(units))
    folder.check(matrix.study)
    matrix.check()
    users, order = matrix.users(), matrix.order()
    done = {id for id in order if folder.is_done(id)}
    costs = unit_seconds(matrix.units, folder)
    kinds: dict[str, dict[str, Any]] = {}
    for id in order:
        row = kinds.setdefault(matrix.units[id].kind, {"units": 0, "done": 0, "alone": 0, "seconds": 0.0})
        row["units"] += 1
        row["alone"] += users[id]
        row["done"] += id in done
        row["seconds"] += 0.0 if id in done else costs[id]
    left = sum(row["seconds"] for row in kinds.values())
    measured = {sort_of(matrix.units[id]) for id in done}
    timed = matrix.study.world is not None or all(sort_of(unit) in measured for unit in matrix.units.values())
    apart = sum(costs[id] * users[id] for id in order)
    return {
        "study": matrix.study.name,
        "cells": [cell.name for cell in matrix.measured],
        "axes": {name: list(axis.levels) for name, axis in matrix.study.axes.items()},
        "seeds": list(matrix.study.seeds),
        "kinds": kinds,
        "seconds": round(left),
        "without_sharing": round(apart),
        "timed": timed,
        "cores": cores(),
    }


def as_plain(matrix: Matrix) -> list[dict[str, Any]]:
    """The cells and their units, for `--json`."""
    return [{**asdict(cell), "units": matrix.needed(cell)} for cell in matrix.measured]
