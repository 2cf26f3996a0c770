"""Which kind of source a path is. A new kind is a class with `len` and `sample`, and a row here."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from leveret.pool import arrow, jsonfile, mixed
from leveret.pool.base import Source
from leveret.pool.folder import ENDINGS, TABLES, FolderSource
from leveret.pool.llava import LlavaSource
from leveret.pool.parquet import FILES, ParquetSource
from leveret.pool.webdataset import TARS, WebdatasetSource
from leveret.runs import DataError, closest


@dataclass(frozen=True)
class SourceRow:
    """One kind of source: how its path is told, how it is opened, and how it is described to a user."""

    id: str
    fits: Callable[[Path], bool]
    open: Callable[[Path, str | Path | None], Source]
    shape: str


def _made_of(ending: re.Pattern[str]) -> Callable[[Path], bool]:
    """Whether a path is a file that ends so, or a folder with such files at its top and neither photos nor a captions
    table there: a folder of photos may hold anything beside them."""

    def fits(path: Path) -> bool:
        if not path.is_dir():
            return path.is_file() and bool(ending.search(path.name))
        found = False
        try:
            with os.scandir(path) as entries:
                for name in (entry.name for entry in entries if entry.name[0] != "."):
                    if name in TABLES or os.path.splitext(name)[1].lower() in ENDINGS:
                        return False
                    found = found or bool(ending.search(name))
        except OSError:
            return False  # the folder's own reader says what is the matter
        return found

    return fits


SOURCES: tuple[SourceRow, ...] = (
    SourceRow(
        "llava",
        lambda path: path.is_file() and path.suffix.lower() in (".json", *jsonfile.LINES),
        LlavaSource,
        "a LLaVA list (.json, or .jsonl with one record a line), with the folder of its images",
    ),
    SourceRow(
        "mixture",
        mixed.is_mixture,
        mixed.open_mixture,
        "a folder that `leveret pool mix` wrote",
    ),
    SourceRow(
        "webdataset",
        _made_of(TARS),
        WebdatasetSource,
        "a .tar, or a folder of .tar shards (WebDataset, img2dataset), with key.jpg beside key.json or key.txt",
    ),
    SourceRow(
        "parquet",
        _made_of(FILES),
        ParquetSource,
        "a .parquet, or a folder of them, with the images in it",
    ),
    SourceRow(
        "arrow",
        lambda path: arrow.is_saved(path) or _made_of(arrow.FILES)(path),
        arrow.ArrowSource,
        "a folder that Hugging Face's `Dataset.save_to_disk` wrote, or an .arrow file of it, with the images in it",
    ),
    SourceRow(
        "folder",
        lambda path: path.is_dir(),
        FolderSource,
        f"a folder of photos ({', '.join(ENDINGS)}) with a .txt beside each or one of {', '.join(TABLES)}",
    ),
)
"""Tried in order."""


def open_source(path: str | Path, images: str | Path | None = None) -> Source:
    """Open the data at `path`. `images`: the one folder that image paths start from (default: where the file lies).

    `DataError` if the path does not exist or is of no known kind, or if the file as a whole cannot be read. Single
    malformed records are not an error here: `Source.sample` raises for each of them, and `check` collects them.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"the data {path} does not exist{_near(path)}")
    allowed = "; or ".join(row.shape for row in SOURCES)
    for row in SOURCES:
        if row.fits(path):
            return row.open(path, images)
    raise DataError(f"the data {path} is of no known kind (ending {path.suffix or 'none'!r}). Allowed: {allowed}.")


def _near(path: Path) -> str:
    """The end of the sentence that says a path is not there: what lies beside it and looks like it, or where it was
    looked for."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f" (nor does the folder {folder})."
    some = itertools.islice(folder.iterdir(), 2000)  # of a folder of a million photos, comparing all takes minutes
    near = closest(path.name, sorted(found.name for found in some if found.name[0] != "."))
    beside = [str(path.parent / name) for name in near]
    return f" in {folder}." if not beside else f". Did you mean {' or '.join(beside)}?"
