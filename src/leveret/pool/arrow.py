"""What Hugging Face's `datasets` writes: a folder of `Dataset.save_to_disk`, or one .arrow file of it.

    dataset_info.json   state.json   data-00000-of-00002.arrow   data-00001-of-00002.arrow

`state.json` says which files, in which order. They are Arrow streams and are mapped, so that random access is as fast
as access in order. What the columns say is told in `leveret.pool.table`; `datasets` itself is not needed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leveret import cells
from leveret.pool.table import Plan, TableSource, understood
from leveret.runs import DataError

FILES = re.compile(r"(?i)\.arrow$")

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"

INDICES = ("_indices_files", "_indices_data_files")
"""Where a state names an order of rows that is kept beside them."""


def is_saved(path: Path) -> bool:
    """Whether `datasets` wrote this folder, whatever is left of it."""
    return (path / SPLITS).is_file() or ((path / STATE).is_file() and (path / INFO).is_file())


class ArrowSource(TableSource):
    """Rows of Arrow streams. Opening hops over every record batch's header once (some 100,000 a second where the disk
    is not what is waited for; `datasets` writes 100 to 1,000 rows a batch)."""

    kind = "arrow"
    group = "record batch"

    def _list(self) -> list[str]:
        if self.path.is_file():
            return [self.path.name]
        if (self.path / SPLITS).is_file():
            raise DataError(_splits(self.path))
        if not (self.path / STATE).is_file():
            raise DataError(
                f"{self.path} holds .arrow files and no {STATE}, which says which of them belong together. Give one "
                ".arrow file, or a folder that `Dataset.save_to_disk` wrote."
            )
        state = _json(self.path / STATE)
        if any(state.get(key) for key in INDICES):
            raise DataError(
                f"{self.path} keeps the order of its rows in a file of its own, as old versions of `datasets` did; "
                "that is not read. Write it anew: `load_from_disk(...).flatten_indices().save_to_disk(...)`."
            )
        listed = state.get("_data_files")
        files = [
            entry["filename"]
            for entry in (listed if isinstance(listed, list) else [])
            if isinstance(entry, dict) and isinstance(entry.get("filename"), str) and FILES.search(entry["filename"])
        ]
        if not isinstance(listed, list) or len(files) < len(listed):
            raise DataError(
                f"{self.path / STATE} has no list of .arrow files in `_data_files`: fetch the folder again."
            )
        for name in files:
            # Not `Root.ref`: the Hub's cache is made of links that lead out of the folder.
            if Path(name).name != name:
                raise DataError(f"{self.path / STATE} names {ascii(name)[:200]}, which is not a file beside it.")
            if not os.path.isfile(self.root.path / name):
                raise DataError(f"{self.path / STATE} names {name}, which is not there: fetch the folder again.")
        return files

    def _plan(self, path: Path) -> tuple[Plan, list[int]]:
        try:
            found = cells.stream(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}. Check its permissions and the disk.") from None
        except cells.Unreadable as fault:
            with open(path, "rb") as handle:
                form = handle.read(6) == b"ARROW1"
            what = (
                "is in Arrow's file format (Feather), not in the stream format that `datasets` writes"
                if form
                else f"is not an Arrow stream that can be read, or its end is missing ({fault}; "
                f"{os.path.getsize(path):,} bytes): fetch it again"
            )
            raise DataError(f"{path} {what}.") from None
        return understood(path, found.schema), (found.starts[1:] - found.starts[:-1]).tolist()

    def _rows(self, path: Path, group: int, plan: Plan) -> Any:
        return cells.batch(path, group).select(list(plan.read))

    def _packed(self, path: Path, group: int, plan: Plan) -> Iterator[bytes]:
        batch = cells.batch(path, group)
        for name in plan.read:
            column = batch.column(name)
            images = column
            if name == plan.images and plan.many:
                images = images.values
            # Of the images where each ends, but not what they hold.
            left = _place(images.field("bytes").buffers()[-1]) if name == plan.images else None
            yield f"{name}\0{len(column)}\0".encode()
            for buffer in column.buffers():
                if buffer is not None and _place(buffer) != left:
                    yield f"{buffer.size}\0".encode() + buffer.to_pybytes()


def _place(buffer: Any) -> tuple[int, int] | None:
    return None if buffer is None else (buffer.address, buffer.size)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check its permissions.") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object: fetch the folder again.")
    return found


def _splits(path: Path) -> str:
    """What to say of a folder of splits."""
    named = _json(path / SPLITS).get("splits")
    splits = [str(name) for name in named] if isinstance(named, list) else []
    paths = [str(path / name) for name in splits if is_saved(path / name)]
    give = f"Give one of them: {' or '.join(paths)}" if paths else "None of them is there: fetch the folder again"
    return f"{path} is a DatasetDict with the splits {', '.join(splits) or '(none)'}, and data is one split. {give}."
