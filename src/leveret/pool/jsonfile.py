"""Where the records of a JSON list or a JSON Lines file lie, found without holding the records.

A list of 665,000 conversations is about 1 GB of text and 4 GB of Python objects. Kept here are 16 bytes a record (where
it starts and ends); a record is read again when it is asked for.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from leveret.runs import DataError

if TYPE_CHECKING:
    import numpy as np

LINES = (".jsonl", ".ndjson")
WINDOW = 4 * 2**20
"""Bytes read at a time; a longer record makes the window grow until it fits."""

_SPACE = re.compile(r"[ \t\n\r]*")
_CUT = 12
"""An error this close to the end of the window may be a token that the window cut (`-Infinity`, `\\u00e9`)."""

_TAIL = 3
"""Characters a number may have dropped as incomplete (`e+` without digits), and one to spare."""


def index(path: Path) -> np.ndarray:
    """First byte and end of every record: int64 [n, 2].

    The file holds a JSON list, or one JSON value a line (told by the name's ending, or by its content where that is
    plain). `DataError` naming line and column if it is neither; a single line that is not JSON is left to the caller.
    """
    import numpy as np

    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: expected a JSON list of records, or one record a line.")
    with open(path, "rb") as handle:
        head = handle.read(1 << 16)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{path} is UTF-16 text; JSON is read as UTF-8. Save it as UTF-8.")
        start = 3 if head.startswith(codecs.BOM_UTF8) else 0
        first = head[start:].lstrip()[:1]
        handle.seek(start)
        if path.suffix.lower() in LINES and first != b"[":
            spans = _lines(handle, start, path)
        elif first == b"{":
            spans = _lines(handle, start, path) if _starts_with_a_record(handle, start) else _one_object(handle, path)
        else:
            spans = _list(handle, start, path)
    if not spans:
        raise DataError(f"{path} holds no records.")
    return np.frombuffer(spans, dtype=np.int64).reshape(-1, 2)


def read(path: Path, span: np.ndarray) -> bytes:
    """The bytes of one record."""
    with open(path, "rb") as handle:
        handle.seek(int(span[0]))
        return handle.read(int(span[1]) - int(span[0]))


# --- JSON Lines ----------------------------------------------------------------------------------------------------


def _lines(handle: BinaryIO, offset: int, path: Path) -> array[int]:
    spans: array[int] = array("q")
    fault: ValueError | None = None
    tried = good = 0
    for number, line in enumerate(handle, start=1):
        if not line.isspace():
            spans.extend((offset, offset + len(line)))
            if good == 0 and tried < 100:
                # One broken line is one broken record; a hundred and no good one is another kind of file.
                tried += 1
                try:
                    json.loads(line)
                    good = 1
                except (ValueError, RecursionError) as error:
                    fault = fault or ValueError(f"line {number}, {_words(error)}")
        offset += len(line)
    if spans and good == 0:
        raise DataError(
            f"{path} is not JSON Lines: {fault}. None of its first {tried} lines is JSON; expected one record a line."
        )
    return spans


def _words(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: {error.msg}"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else type(error).__name__


def _starts_with_a_record(handle: BinaryIO, start: int) -> bool:
    """Whether the first line is one whole object and another line follows (POPE's files are JSON Lines named .json)."""
    try:
        while not (line := handle.readline()).strip():
            pass
        json.loads(line)
        return any(not later.isspace() for later in handle)
    except (ValueError, RecursionError):
        return False
    finally:
        handle.seek(start)


def _one_object(handle: BinaryIO, path: Path) -> array[int]:
    # Parsed only to tell a broken file from one of another kind.
    window = _Window(handle, handle.tell(), path)
    keys = list(window.value(keep=True))[:6]
    raise DataError(
        f"{path} holds one JSON object (keys: {', '.join(map(repr, keys)) or 'none'}), not a list of records. Expected "
        '[{"id": ..., "image": ..., "conversations": [{"from": "human", "value": ...}, ...]}, ...] or one such record '
        "a line."
    )


# --- a JSON list ---------------------------------------------------------------------------------------------------


def _list(handle: BinaryIO, start: int, path: Path) -> array[int]:
    spans: array[int] = array("q")
    window = _Window(handle, start, path)
    if window.peek() != "[":
        window.value()
        raise DataError(f"{path} is not a list of records: it holds a single {window.kind}. Expected a JSON list.")
    window.skip(1)
    if window.peek() == "]":
        window.skip(1)
    else:
        while True:
            window.peek()
            begin = window.at
            window.value()
            spans.extend((begin, window.at))
            mark = window.peek()
            if mark not in (",", "]"):
                raise window.fault("expected ',' or ']' after a record", len(spans) // 2)
            window.skip(1)
            if mark == "]":
                break
    if window.peek():
        raise window.fault("the list is closed, but text follows")
    return spans


class _Window:
    """A few megabytes of the file as text, with the byte offset of the reading position."""

    def __init__(self, handle: BinaryIO, start: int, path: Path) -> None:
        self.handle, self.path = handle, path
        self.text, self.pos, self.at = "", 0, start
        self.ended = False
        self.kind = ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()

    def skip(self, characters: int) -> None:
        """Move on."""
        passed = self.text[self.pos : self.pos + characters]
        self.at += len(passed) if passed.isascii() else len(passed.encode("utf-8"))
        self.pos += characters

    def peek(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.pos)
            assert match is not None
            self.skip(match.end() - self.pos)
            if self.pos < len(self.text) or not self._more():
                return self.text[self.pos : self.pos + 1]

    def value(self, keep: bool = False) -> dict[str, object]:
        """Pass over one JSON value; returns it if it is an object and `keep` is set."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.pos)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _CUT
                if cut and self._more():
                    continue
                self.skip(error.pos - self.pos)
                raise self.fault(error.msg) from None
            except (RecursionError, ValueError) as error:
                raise self.fault(f"a value that cannot be read ({type(error).__name__})") from None
            if end >= len(self.text) - _TAIL and self._more():
                continue  # the number 12 may be the start of 123 or of 12.5e+3
            break
        self.skip(end - self.pos)
        self.kind = type(value).__name__
        return value if keep and isinstance(value, dict) else {}

    def _more(self) -> bool:
        """Read on, dropping what was passed; at least doubles what is left, so long records cost linear time."""
        if self.ended:
            return False
        rest = self.text[self.pos :]
        data = self.handle.read(max(WINDOW, len(rest)))
        self.ended = not data
        try:
            self.text = rest + self._utf8.decode(data, final=self.ended)
        except UnicodeDecodeError:
            raise DataError(f"{self.path} is not UTF-8 text near byte {self.handle.tell():,}.") from None
        self.pos = 0
        return True

    def fault(self, what: str, record: int | None = None) -> DataError:
        """A DataError that names line and column of the reading position."""
        line, column = _place(self.path, self.at)
        if self.ended and (self.pos >= len(self.text) or what.startswith("Unterminated string")):
            what = f"the file ends too early ({what}); was a download or a copy cut short?"
        after = f" (after record {record - 1})" if record else ""
        return DataError(f"{self.path} is not JSON: line {line}, column {column}{after}: {what}")


def _place(path: Path, offset: int) -> tuple[int, int]:
    """Line and column (in characters), from 1, of a byte offset."""
    line, last, seen = 1, 0, 0
    with open(path, "rb") as handle:
        while seen < offset and (data := handle.read(min(WINDOW, offset - seen))):
            line += data.count(b"\n")
            newline = data.rfind(b"\n")
            if newline >= 0:
                last = seen + newline + 1
            seen += len(data)
        handle.seek(last)
        before = handle.read(offset - last)
    return line, 1 + len(before.decode("utf-8", "replace"))
