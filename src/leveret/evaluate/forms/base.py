"""What all forms share: a question, where files lie, and what a form must say of itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from leveret.records import ImageRef
from leveret.runs import DataError


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark.

    question_id  unique in its task.
    image        None for a question without a picture.
    prompt       the user's words, without the image mark.
    gold         the right answer in the form's own terms (text, integer, letter, box, ten texts).
    template     the wording's name, for the best constant answer per wording; "" where the file names none.
    meta         `image_id` (questions of one picture are one cluster), `group` (the part a headline averages over),
                 `whole` (items that only count together: the rotations of a question), and what the official summary
                 needs.
    """

    question_id: str
    image: ImageRef | None
    prompt: str
    gold: Any
    template: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a form's files are and how their questions are put.

    files   the files found, sorted by path.
    root    the folder that image names are relative to, once `images` is put before them.
    images  folder under `root`, "" for root itself.
    split   the split's official name, for files that hold several.
    prompt  a template over the form's fields.
    """

    files: tuple[Path, ...]
    root: Path
    images: str
    split: str
    prompt: str

    def image(self, name: str) -> ImageRef:
        """The picture called `name`; DataError when the name leads out of the image folder."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not name:
            raise DataError(
                f"{self.files[0]}: image {name!r} leads out of the image folder {self.root / self.images}. "
                "Image names must be relative and without '..'."
            )
        return ImageRef(str(self.root / self.images / name))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a published file; DataError names the first line that is not one (a torn last line too)."""
    records = []
    # Not splitlines: it also cuts at line separators that stand inside JSON strings.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as fault:
            raise DataError(f"{path}, line {number} is not JSON: {fault}. Fetch the file again.") from None
    return records


def _id(item: Item) -> tuple[str, ...]:
    return (item.question_id,)


def _answer_id(answer: Mapping[str, Any], name: str) -> tuple[str, ...]:
    return (name,)


@dataclass(frozen=True, slots=True)
class Form:
    """One official file form.

    load         files -> items.
    keys         names a question goes by, its own id first; a name that two questions share names neither.
    answer_keys  names an answer may mean, the likeliest first.
    identity     the key of an answer in words, for messages.
    read         answers that are not JSON lines or one list (a folder, one mapping) -> records; None: it is no such.
    """

    load: Callable[[Place], list[Item]]
    keys: Callable[[Item], tuple[str, ...]] = _id
    answer_keys: Callable[[Mapping[str, Any], str], tuple[str, ...]] = _answer_id
    identity: str = "question_id"
    read: Callable[[Path], list[dict[str, Any]] | None] | None = None


def check_ids(items: Iterable[Item], where: str) -> None:
    """DataError when two questions of one task share an id: answers could not be told apart."""
    repeated = [name for name, count in Counter(item.question_id for item in items).items() if count > 1]
    if repeated:
        raise DataError(
            f"{where}: {len(repeated)} question ids occur more than once, first {repeated[0]!r}. "
            "Answers are joined by id, so each must be unique."
        )
