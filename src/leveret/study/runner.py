"""Runs what is missing of a study: its units in an order in which each finds what it is made from.

DIR/units/ID/               made here, or found (study/matrix.py)
DIR/ledger.jsonl            a line for each unit of each cell: made for it, shared with an earlier cell, or found
DIR/results.json report.html

Units run in this process, in several, or by a command of one's own for each (a cluster's scheduler), which need only
see the same folder. One that fails costs the cells that need it, and no other.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from leveret.runs import (
    DataError,
    EnvironmentFault,
    Interrupted,
    OtherRecipe,
    Progress,
    UserError,
    append_jsonl,
    claim,
    cores,
    graceful_stop,
    is_held,
    read_json,
    stop_requested,
    write_json,
)
from leveret.study.files import StudyRecipe
from leveret.study.kinds import KINDS
from leveret.study.matrix import Folder, Matrix
from leveret.study.units import Unit

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
OURS, LINES = "error: this is a fault in leveret", 3
"""How a log tells that we are at fault, in its last so many lines: the fault itself stands before them."""
GONE = ".gone-"
"""How what is being thrown away is called, so that half of it is never taken for all of it."""


def make(path: Path, id: str) -> dict[str, Any]:
    """Make one unit of a study's folder, in this process. Found again if it is done. DataError where what it is made
    from is not done, or the folder knows no such unit."""
    folder = Folder(path)
    if (done := folder.facts(id)) is not None:
        return done
    known = read_json(path / "units.json")["units"] if (path / "units.json").exists() else {}
    if id not in known:
        raise DataError(f"{path} holds no study with the unit {id}; `leveret study run` writes {path / 'units.json'}")
    unit = Unit(**known[id])
    if missing := [one for one in unit.inputs.values() if not folder.is_done(one)]:
        raise DataError(f"unit {id} is made from {', '.join(missing)}, which is not done")
    place = folder.unit(id)
    _claim_in_turn(place)
    if (done := folder.facts(id)) is not None:
        return done
    spent = place / "seconds.json"
    before = float(read_json(spent)) if spent.exists() else 0.0
    worked = _clock()
    try:
        # However the folder is called today: a stage that goes on is bound to where its data lie.
        inputs = {role: folder.unit(one).resolve() for role, one in unit.inputs.items()}
        try:
            facts = KINDS[unit.kind].make(place, unit.settings, inputs)
        except OtherRecipe:
            print(f"{place}: begun by another version of leveret; begun anew", file=sys.stderr, flush=True)
            for begun in [item for item in place.iterdir() if item.is_dir()]:
                _throw_away(begun)
            facts = KINDS[unit.kind].make(place, unit.settings, inputs)
    finally:
        write_json(spent, before + worked())
    found = {"unit": unit.plain(), "seconds": round(before + worked(), 1), **facts}
    write_json(place / "done.json", found)
    spent.unlink(missing_ok=True)  # what is made again later costs what that costs
    return found


def _claim_in_turn(place: Path) -> None:
    """One process a unit. One whose study was killed may still be at it: it saves its work, or ends it."""
    told = free = False
    while True:
        try:
            return claim(place)
        except EnvironmentFault:
            if free:
                raise  # it is not that somebody holds it
            free = not is_held(place)
        if stop_requested():
            raise Interrupted("stopped as asked; the same command goes on from there")
        if not free and not told:
            print(f"{place}: another process is still at this; waiting for it", file=sys.stderr, flush=True)
            told = True
        time.sleep(POLL)


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

    jobs     units at once, each in a process with its share of the cores, or, when it is 1, in this one; None: as many
             as there are cores.
    command  instead of a process here: a line for the shell with `{}` where the unit's own command stands (such as
             `srun -c 4 {}`), which ends when that does.
    keep     keep drawn worlds and embeddings, which can be made again to the byte, when no missing unit needs them.
    units    a folder for the units that other studies fill too (one study at a time); by default one in `out`.

    Raises RecipeError (the study, or the folder), EnvironmentFault (another study is at work there), Interrupted (all
    that runs is stopped and saved; the same call goes on), and DataError where units failed, after all others were
    made.
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
        wanted = self.matrix.wanted(self.folder)
        for id in wanted:
            if self.folder.is_done(id):  # what was thrown away is made again
                (self.folder.unit(id) / "done.json").unlink()
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
                            break  # what it makes possible may come before what was possible already
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
        except Exception as fault:  # as where it runs in a process of its own: it costs what needs it, and no more
            log = self.folder.unit(id) / "log.txt"
            with open(log, "a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
            self._fail(id, f"{type(fault).__name__}: {' '.join(str(fault).split())} (see {log})"[-TAIL:])

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
                    _throw_away(self.folder.unit(id) / name)


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


def _throw_away(place: Path) -> None:
    """At once, for whoever looks; what an earlier one left behind goes too."""
    gone = place.with_name(GONE + place.name)
    shutil.rmtree(gone, ignore_errors=True)
    if place.exists():
        place.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _made(place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    return place


def _last_words(log: Path) -> str:
    """The last line that says something: where a fault is told. Of a fault of ours the line that names it."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    ours = [at for at, line in enumerate(lines) if line.startswith(OURS)]
    if ours and ours[-1] > 0 and len(lines) - ours[-1] <= LINES:
        return f"{lines[ours[-1] - 1]} (see {log})"[-TAIL:]
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
