"""A mixture on disk: where its files are, how it is read again, and how tars are written of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leveret.images import Root
from leveret.pool.base import Source
from leveret.pool.llava import LlavaSource
from leveret.records import Sample
from leveret.runs import DataError, RecipeError, RunFolder, atomic_write, check_parents, claim, differences, read_json

RECORDS, FACTS, QUARANTINE = "mixture.jsonl", "mix.json", "quarantine.jsonl"


@dataclass(frozen=True)
class Place:
    """given: what -o said. folder: where its files are. records, facts, quarantine: they."""

    given: Path
    folder: Path
    records: Path
    facts: Path
    quarantine: Path
    tars: bool

    @classmethod
    def of(cls, out: Path, tars: bool) -> Place:
        """From `-o`: a folder, or a list (.json, .jsonl) with the other two files beside it."""
        if out.suffix.lower() in (".json", ".jsonl"):
            if tars:
                raise RecipeError(f"{out}: tars are written into a folder; name one with -o")
            if out.is_dir():
                raise RecipeError(f"{out} is a folder; a list is a file. Name another with -o.")
            folder = out.parent
            return cls(out, folder, out, folder / f"{out.stem}.mix.json", folder / f"{out.stem}.{QUARANTINE}", tars)
        if out.exists() and not out.is_dir():
            raise RecipeError(f"{out} is a file; the output of `pool mix` is a folder, or OUT.json, OUT.jsonl.")
        refused = f"refused.{QUARANTINE}" if tars else QUARANTINE  # a store has a quarantine of its own
        return cls(out, out, out if tars else out / RECORDS, out / FACTS, out / refused, tars)

    def claim(self, key: Mapping[str, Any]) -> None:
        """RecipeError where something else is there; EnvironmentFault where another process writes."""
        self.check(key)
        if self.given == self.folder:
            claim(self.folder)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)

    def check(self, key: Mapping[str, Any]) -> None:
        """RecipeError where something else is there; nothing is written."""
        check_parents(self.folder)
        if self.facts.exists():
            if lines := differences(read_json(self.facts).get("key"), json.loads(json.dumps(key))):
                shown = "".join(f"\n  {line}" for line in lines[:12])
                raise RecipeError(f"{self.given} is another mixture:{shown}\nName another with -o, or delete this one.")
        elif self.tars and not (self.folder / "recipe.yaml").is_file():
            RunFolder.check_place(self.folder, "pool mix")
        elif self.given == self.folder and not self.tars:
            found = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
            if strangers := [name for name in found if name[0] != "." and name not in (RECORDS, QUARANTINE)]:
                raise RecipeError(
                    f"{self.given} holds no mixture (it holds {', '.join(strangers[:5])}). Name a new or empty folder."
                )
        elif not self.tars and self.records.exists():
            raise RecipeError(f"{self.records} is there already and was not mixed here; name another with -o")

    def forget(self) -> None:
        """Leave no folder behind in which nothing was written."""
        if self.given == self.folder and {path.name for path in self.folder.glob("*")} <= {".lock"}:
            (self.folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def finished(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What stands in mix.json, if the mixture is whole."""
        if not self.facts.exists() or not self.records.exists():
            return None
        made = read_json(self.facts)
        return {name: value for name, value in made.items() if name != "key"}

    def write_quarantine(self, entries: Sequence[Mapping[str, Any]]) -> None:
        atomic_write(self.quarantine, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def is_mixture(path: Path) -> bool:
    """Whether a folder is a mixture that was written as a list."""
    return (path / FACTS).is_file() and (path / RECORDS).is_file()


def open_mixture(path: Path, images: str | Path | None = None) -> LlavaSource:
    """A mixture's folder as data. images: instead of the folder that its images started from when it was made."""
    if images is None:
        told = read_json(path / FACTS).get("images")
        if not isinstance(told, str):
            raise DataError(f"{path / FACTS} does not say where the images start from; give the folder (--images)")
        images = path.resolve() / told
        if not images.is_dir():
            raise DataError(
                f"the images of {path} were at {images}, which is not there (any more); say where they are (--images)"
            )
    source = LlavaSource(path / RECORDS, images)
    source.name = path.resolve().name
    return source


class MixedSource(Source):
    """Chosen samples of several sources as one, in a given order; lives while tars are written of it."""

    def __init__(self, path: Path, root: Path, rows: Sequence[tuple[Source, int]]) -> None:
        super().__init__(path, Root(root))
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def _draft(self, index: int) -> Sample:
        source, at = self._rows[index]
        return source.sample(at)

    def _trace(self, index: int) -> tuple[bytes, Sequence[str]]:
        source, at = self._rows[index]
        return f"{source.path} {at}".encode("utf-8", "surrogatepass"), ()

    def fingerprint(self) -> str:
        """Of the sources as they are, and of the rows."""
        digest = hashlib.sha256()
        for source in dict.fromkeys(source for source, _ in self._rows):
            digest.update(source.fingerprint().encode())
        for index in range(len(self)):
            digest.update(self._trace(index)[0] + b"\n")
        return digest.hexdigest()
