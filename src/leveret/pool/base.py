"""What a source is: a length and `sample(i)`."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from leveret.images import ImageFault, Root
from leveret.records import ImageRef, Sample
from leveret.runs import DataError, each_jsonl

_HALF = re.compile("[\ud800-\udfff]")


class SampleFault(DataError):
    """A record that is refused; the rest of its source is not.

    reason  fixed words, fit for counting.
    detail  what was found in this record, or "".
    """

    def __init__(self, index: int, id: str, image: str, reason: str, detail: str = "", source: str = "") -> None:
        self.index, self.id, self.image, self.reason, self.detail = index, id, image, reason, detail
        place = f"sample {index}{f' ({id})' if id else ''}{f' of {source}' if source else ''}"
        super().__init__(f"{place} is refused: {reason}{f': {detail}' if detail else ''}")


def first_of(quarantine: Path) -> str:
    """A sentence that begins with a blank: the first refused sample by name, and what was found in it. The counts by
    reason beside it do not tell that."""
    row = next(each_jsonl(quarantine), None) if quarantine.exists() else None
    if row is None:
        return ""
    return f" The first is {row['id']}: {row['reason']}{' (' + str(row['detail']) + ')' if row.get('detail') else ''}."


class Source(ABC):
    """Samples in a fixed order, read when asked for. Safe to share between threads and to pickle.

    path  what was given. root: the one folder that images are named under. name: for messages and `Sample.source`.
    """

    def __init__(self, path: Path, root: Root) -> None:
        self.path = path
        # Of a file its own name: the Hub's cache is made of links to files that are named by hashes.
        self.name = path.resolve().name if path.is_dir() else path.name
        self.root = root
        self._fingerprint: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _draft(self, index: int) -> Sample:
        """The sample as it is recorded; its structure is judged by `sample`. `SampleFault` if it cannot be read."""

    @abstractmethod
    def _trace(self, index: int) -> tuple[bytes, Sequence[str]]:
        """What a fingerprint covers of one sample: its recorded bytes and the names of its images. Never raises."""

    def sample(self, index: int) -> Sample:
        """Sample `index` (0 <= index < len). `SampleFault` (a DataError) if its record is malformed; its image files
        are not looked at. `IndexError` outside the range."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}: it holds samples 0 to {len(self) - 1}")
        sample = self._draft(index)
        if fault := sample.fault():
            reason, _, detail = fault.partition(": ")
            image = ", ".join(self.root.name(ref) for ref in sample.images)
            raise SampleFault(index, sample.id, image, reason, detail, self.name)
        if any(_HALF.search(text) for text in (sample.id, *(turn.text for turn in sample.turns)) if not text.isascii()):
            # Legal in JSON ("\\ud83d"), but no character: neither tokenizers nor files can hold it.
            raise SampleFault(index, sample.id, "", "text is not Unicode", "half a surrogate pair", self.name)
        return sample

    def fingerprint(self) -> str:
        """Hex digest that changes when the data does.

        Covers, in order, the recorded bytes of every sample (JSON or caption) and the name and size in bytes of every
        image they name (-1 where it is missing). Does not cover: image bytes that changed without changing their
        number, whitespace between records, where the folders lie. Takes seconds for each million samples (of tars a
        minute: words lie between images). Sources that hold their images say in `_trace` what is covered.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(f"leveret source 1 {type(self).__name__} {len(self)}\n".encode())
            for index in range(len(self)):
                recorded, names = self._trace(index)
                sizes = "".join(f"{name}\0{self._size(name)}\0" for name in names)
                # Lengths first, so that no two different samples give the same bytes.
                tail = sizes.encode("utf-8", "surrogatepass")
                digest.update(f"{len(recorded)} {len(tail)}\n".encode() + recorded + tail)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def advice(self, reasons: Mapping[str, int], seen: int) -> str:
        """A sentence that begins with a blank, for when half or more of `seen` samples are refused because their image
        is not there; else nothing. It is nearly always the wrong image folder."""
        if not seen or 2 * reasons.get("image missing", 0) < seen:
            return ""
        return (
            f" Image paths start from {self.root.path}; if that is the wrong folder, name the right one "
            "(--images; for train stages.STAGE.images=DIR)."
        )

    def _within(self, images: str | Path | None, what: str) -> None:
        """Refuse an image folder for a source that holds its images. `what`: how the sentence goes on."""
        if images is not None and Root(images).path != self.root.path:
            raise DataError(
                f"{self.path} {what}; {images} was given. Leave it out, or give a LLaVA JSON file as the source."
            )

    def _size(self, name: str) -> int:
        try:
            return os.stat(self.root.ref(name).path).st_size
        except (OSError, ImageFault):
            return -1

    def _ref(self, name: object, index: int, id: str) -> ImageRef:
        try:
            return self.root.ref(name)
        except ImageFault as fault:
            shown = ascii(name)[:200] if not isinstance(name, str) or not name.isprintable() else name
            raise SampleFault(index, id, shown, f"image {fault.reason}", fault.detail, self.name) from None
