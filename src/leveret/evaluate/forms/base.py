"""What all forms share: a question, where files lie, and what a form must say of itself."""

from __future__ import annotations

import codecs
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
    gold         the right answer in the form's own terms (text, integer, letter, box, ten texts); None where it is not
                 public: such a question can be asked, and its answer submitted.
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


# The longer mark first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """A file's text: UTF-8, or what the mark at its beginning says (UTF-16, UTF-32). DataError where it is neither: an
    old eight-bit encoding does not say which it is, and guessing would change answers."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as fault:
        raise DataError(
            f"{path}: not {encoding.removesuffix('-sig').upper()} text (byte {fault.start}). Save it as UTF-8, for one "
            f"in Latin-1: iconv -f LATIN1 -t UTF-8 {path.name} > fixed{path.suffix}"
        ) from None


class Repeated(DataError):
    """A table in which a name stands twice."""


def read_whole(path: Path, *, once: bool = False) -> Any:
    """One JSON value of a published file, in any encoding that `read_text` reads; DataError says where it is not.

    once  refuse a table in which a name stands twice: JSON would keep the last of them in silence."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if once and len(found) < len(pairs):
            again = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise Repeated(f"{path}: {again!r} stands in it twice.")
        return found

    try:
        return json.loads(read_text(path), object_pairs_hook=table)
    except json.JSONDecodeError as fault:
        raise DataError(f"{path}: not JSON: {fault.msg} at line {fault.lineno}, column {fault.colno}") from None
    except DataError:
        raise
    except ValueError as fault:  # a number of thousands of digits
        raise DataError(f"{path}: {fault}") from None
    except RecursionError:
        raise DataError(f"{path}: not JSON that can be read: its brackets are nested too deep") from None


def read_lines(path: Path, *, torn: bool = False) -> list[dict[str, Any]]:
    """JSON lines of a published file, in any encoding that `read_text` reads; DataError names the first line that is
    not one.

    torn  a last line without its end, which a killed writer left, is no fault and is dropped."""
    records = []
    # Not splitlines: it also cuts at line separators that stand inside JSON strings.
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except RecursionError:
            raise DataError(f"{path}, line {number}: its brackets are nested too deep to be read.") from None
        except json.JSONDecodeError as fault:
            if torn and number == len(lines):
                break
            raise DataError(f"{path}, line {number} is not JSON: {fault}. Fetch the file again.") from None
        except ValueError as fault:  # a number of thousands of digits
            raise DataError(f"{path}, line {number}: {fault}") from None
    return records


def asked(place: Place, path: Path, folder: Callable[[str], str] = str) -> list[Item]:
    """LLaVA's and Bunny's question files: JSON lines `question_id, image, text, category`, the text being the whole
    prompt. They hold no right answers: such questions can be asked and submitted, not scored.

    folder  image's name -> its path under the folder of the pictures.
    """
    return [
        Item(
            question_id=str(record["question_id"]),
            image=place.image(folder(record["image"])),
            prompt=record["text"],
            gold=None,
            meta={"image_id": record["image"]},
        )
        for record in read_lines(path)
    ]


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
    ids, texts   more fields that name the question, or hold the text, in answers of this benchmark.
    read         answers that are not JSON lines or one list (a folder, one mapping) -> records; None: it is no such.
    """

    load: Callable[[Place], list[Item]]
    keys: Callable[[Item], tuple[str, ...]] = _id
    answer_keys: Callable[[Mapping[str, Any], str], tuple[str, ...]] = _answer_id
    identity: str = "question_id"
    ids: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    read: Callable[[Path], list[dict[str, Any]] | None] | None = None


def check_ids(items: Iterable[Item], where: str) -> None:
    """DataError when two questions of one task share an id: answers could not be told apart."""
    repeated = [name for name, count in Counter(item.question_id for item in items).items() if count > 1]
    if repeated:
        raise DataError(
            f"{where}: {len(repeated)} question ids occur more than once, first {repeated[0]!r}. "
            "Answers are joined by id, so each must be unique."
        )
