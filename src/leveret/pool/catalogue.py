"""Known data sets and mixtures: what they hold, where each file is, under which licence, what is wrong with them.

They are package data, `recipes/data/*.yaml`, called by name (`llava/665k`), or a YAML of your own in the same form. A
set has `files` to fetch, or `sources` it is mixed of (`leveret.pool.mix`). Paths start from one data root, laid out as
the recipes of the published models name it: `leveret pool get llava/665k data` makes `data/llava_v1_5_mix665k.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from leveret import recipe
from leveret.runs import RecipeError, bytes_of

UNKNOWN = "unknown"

Form = Literal["llava", "answers", "other", "zip", "tar", "tar.gz"]
ARCHIVES: tuple[Form, ...] = ("zip", "tar", "tar.gz")
Text = Annotated[str, StringConstraints(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _relative(path: str) -> str:
    """A path below the data root, or a fault in words. `.` is the root itself."""
    parts = PurePosixPath(path).parts
    if not path or path.startswith("/") or "\\" in path or ".." in parts or ":" in path:
        raise ValueError("a path below the data root, with / between its parts and without ..")
    return path


class File(_Strict):
    """One file, or the numbered parts of one (`{}` in `path` and `name` stands for each of `parts`).

    bytes and sha256 are exact and checked; `about` is a size as its page rounds it, for plans only.
    """

    path: Text = Field(description="Where it lies below the data root.")
    hub: str | None = Field(None, description="The data set of the Hugging Face hub that holds it: OWNER/NAME.")
    name: str | None = Field(None, description="Its name there; the last part of `path` when left out.")
    revision: str = Field("main", description="Branch, tag or commit there.")
    url: str | None = Field(None, description="Or its address, http or https.")
    by_hand: str | None = Field(None, description="Or what a person has to do, where no program may fetch it.")
    bytes: int | None = Field(None, ge=0, description="Its exact size.")
    about: str | None = Field(None, description="Its size as it is told: 27.4 GB. Of parts, all together.")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="Its digest.")
    form: Form = Field("llava", description="What it is: a LLaVA list, other answers, or an archive.")
    parts: tuple[Text, ...] = Field((), description="What stands for {} in path and name, in the order of joining.")
    strip: str | None = Field(None, description="Unpacking: a first folder that is left out of its members' names.")

    @field_validator("path")
    @classmethod
    def _below(cls, path: str) -> str:
        return _relative(path)

    @field_validator("url")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"https?://[^/\s]+", url):
            raise ValueError("allowed: an address that begins with http:// or https://")
        return url

    @field_validator("hub")
    @classmethod
    def _repository(cls, hub: str | None) -> str | None:
        if hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
            raise ValueError("allowed: OWNER/NAME")
        return hub

    @field_validator("about")
    @classmethod
    def _size(cls, about: str | None) -> str | None:
        try:
            if about is not None:
                bytes_of(about)
        except RecipeError:
            raise ValueError("allowed: a size such as 27.4 GB") from None
        return about

    @model_validator(mode="after")
    def _one_place(self) -> File:
        if sum(place is not None for place in (self.hub, self.url, self.by_hand)) != 1:
            raise ValueError("give one of hub, url, by_hand")
        if self.parts and ("{}" not in self.path or self.bytes is not None or self.sha256 is not None):
            raise ValueError("of parts, `path` holds {} and only `about` tells the size")
        return self

    @property
    def size(self) -> int | None:
        """Its bytes, exact or as they are told; None if nobody tells."""
        return self.bytes if self.bytes is not None or self.about is None else bytes_of(self.about)

    def each(self) -> list[File]:
        """The parts as files of their own; itself where it has none."""
        if not self.parts:
            return [self]
        told = None if self.about is None else f"{bytes_of(self.about) // len(self.parts)} B"
        here = self.name or PurePosixPath(self.path).name
        change = {"parts": (), "about": told}
        return [
            self.model_copy(update=change | {"path": self.path.replace("{}", part), "name": here.replace("{}", part)})
            for part in self.parts
        ]


class Licence(_Strict):
    """Of the words and of the pictures apart, in the words of whoever gives it; `unknown` where nobody tells."""

    annotations: Text = UNKNOWN
    images: Text = UNKNOWN


class Counts(_Strict):
    """samples and images are exact, and what a download is checked against; `about` is what the name or the page says.

    parts: prefix of ids, or of image paths, -> samples.
    """

    samples: int | None = Field(None, ge=0)
    about: str | None = None
    images: int | None = Field(None, ge=0)
    by: Literal["id", "image", "source"] | None = None
    parts: dict[str, int] = Field(default_factory=dict)

    @property
    def shown(self) -> str:
        return f"{self.samples:,}" if self.samples is not None else f"about {self.about}" if self.about else UNKNOWN


class Addresses(_Strict):
    """Where the pictures' addresses stand: keys of the records of a JSON list, for img2dataset."""

    file: Text
    url: Text = "url"
    caption: Text | None = None
    key: Text = "id"
    only: bool = Field(False, description="The pictures themselves are not public, only their addresses.")


class Range(_Strict):
    min: int = Field(0, ge=0)
    max: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"min {self.min} is above max {self.max}: nothing would be left")
        return self


class Where(_Strict):
    """Which samples of a source; all conditions hold at once, of several prefixes or values any one."""

    id_prefix: tuple[Text, ...] = Field((), description="The id begins with one of these.")
    not_id_prefix: tuple[Text, ...] = Field((), description="The id begins with none of these.")
    image_prefix: tuple[Text, ...] = Field((), description="The first image's path begins with one of these.")
    not_image_prefix: tuple[Text, ...] = Field((), description="No image, or its path begins with none of these.")
    modality: Literal["image", "text"] | None = Field(None, description="With a picture, or without.")
    turns: Range | None = Field(None, description="Turns of user and assistant together.")
    field: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="Another key of the record -> the values it may have, as text."
    )


class Mapped(_Strict):
    """How a record that is no conversation becomes one: texts in which {key} stands for the record's value."""

    user: Text
    assistant: Text
    id: Text | None = Field(None, description="The record's own id, or its number, when left out.")
    image: str | None = None

    @model_validator(mode="after")
    def _of_the_record(self) -> Mapped:
        for name in ("user", "assistant", "id"):
            text = getattr(self, name)
            if text is not None and "{" not in text:
                raise ValueError(
                    f"{name}: {text!r} would be the same for every record; write {{{text}}} for a key's value"
                )
        return self


class Part(_Strict):
    """One source of a mixture."""

    data: Text = Field(description="Anything that is read as data, or a set of the catalogue that was fetched.")
    images: str | None = Field(None, description="Root of its images, as for `train`.")
    name: str | None = Field(None, description="What it is called in the counts.")
    mapped: Mapped | None = Field(None, description="For a JSON list of questions and answers.")
    where: Where = Field(default_factory=lambda: Where.model_validate({}))
    count: int | None = Field(None, ge=1, description="Exactly so many; all that fit when neither is given.")
    weight: float | None = Field(None, gt=0, description="Or a share of what `total` leaves to those with weights.")

    @model_validator(mode="after")
    def _one_measure(self) -> Part:
        if self.count is not None and self.weight is not None:
            raise ValueError("give count or weight, not both")
        return self


class DataSet(_Strict):
    """A row of the catalogue, or a mixture of your own."""

    name: str = ""
    title: str = ""
    data: str | None = Field(None, description="What `data:` of a recipe names, below the data root.")
    images: str = Field(".", description="What `images:` of a recipe names, below the data root.")
    counts: Counts = Field(default_factory=lambda: Counts.model_validate({}))
    licence: Licence = Licence()
    files: tuple[File, ...] = ()
    needs: dict[str, str] = Field(default_factory=dict, description="Set of images -> its place below `images`.")
    addresses: Addresses | None = None
    mapped: Mapped | None = Field(None, description="How its records become conversations, where they are none.")
    made_of: tuple[Text, ...] = Field((), description="What its authors put together, in words.")
    defects: tuple[Text, ...] = Field((), description="What is known to be wrong with it.")

    root: str = Field("data", description="The data root that names of the catalogue are looked for in.")
    sources: tuple[Part, ...] = Field((), description="What it is mixed of.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of the choice and of the order.")
    total: int | None = Field(None, ge=1, description="All samples together; needed where a source has a weight.")
    duplicates: Literal["refuse", "drop", "keep"] = Field(
        "refuse", description="The same record twice (id, words and images): a fault, the first alone, or allowed."
    )
    order: Literal["shuffled", "given"] = "shuffled"
    decode: bool = Field(False, description="Unpack every image that is looked at, not only see that it is there.")
    limit_share: float = Field(0.2, ge=0, le=1, description="A source with more refused records stops the mixing.")

    @field_validator("data", "images")
    @classmethod
    def _below(cls, path: str | None) -> str | None:
        return path if path is None else _relative(path)

    @field_validator("needs")
    @classmethod
    def _places(cls, needs: dict[str, str]) -> dict[str, str]:
        for place in needs.values():
            _relative(place)
        return needs

    @model_validator(mode="after")
    def _adds_up(self) -> DataSet:
        if not self.files and not self.sources:
            raise ValueError("neither files to fetch nor sources to mix; give `sources`")
        weighted = [part for part in self.sources if part.weight is not None]
        if weighted and self.total is None:
            raise ValueError("sources have weights: give `total`, all samples together")
        if self.total is not None:
            if any(part.weight is None and part.count is None for part in self.sources):
                raise ValueError("with a `total`, every source has a count or a weight")
            exact = sum(part.count or 0 for part in self.sources)
            if exact > self.total or (not weighted and exact != self.total):
                raise ValueError(f"the counts add up to {exact:,}, `total` is {self.total:,}")
        return self

    def file_of(self, path: str) -> File | None:
        return next((file for file in self.files if file.path == path), None)


def names() -> list[str]:
    """Every set that comes with leveret, sorted."""
    return recipe.names("data")


def load(name: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> DataSet:
    """A set by name or path. `RecipeError` with every fault of it."""
    return recipe.load(name, DataSet, "data", overrides)


def is_known(name: str) -> bool:
    return name in names()


def wanted(one: DataSet, root: Path, pictures: bool = True) -> Iterator[tuple[DataSet, File, Path]]:
    """Every file of a set and of the image sets it needs, parts one by one: (set, file, where it is unpacked)."""
    images = root / one.images
    for file in one.files:
        for part in file.each():
            yield one, part, images
    for name, place in one.needs.items() if pictures else ():
        need = load(name)
        for file in need.files:
            for part in file.each():
                yield need, part, images / place


def licence_of(one: DataSet) -> dict[str, str]:
    """Of its words and of its pictures, as far as it has them."""
    told = one.licence.model_dump()
    return {"images": told["images"]} if one.data is None else told


def state(file: File, root: Path) -> str:
    """`there`, `begun`, `missing`, or `wrong size` (of a file that has an exact one)."""
    path = root / file.path
    if path.is_file():
        return "there" if file.bytes in (None, path.stat().st_size) else "wrong size"
    from leveret.pool.fetch import begun

    return "begun" if begun(path) else "missing"


def overview(root: Path) -> list[dict[str, Any]]:
    """What `pool list` tells: a row a set, with what of it lies below `root`."""
    rows = []
    for name in names():
        one = load(name)
        mine = [part for file in one.files for part in file.each()]
        sizes = [part.size for part in mine]
        states = [state(part, root) for part in mine]
        rows.append(
            {
                "name": name,
                "title": one.title,
                "samples": one.counts.samples,
                "counted": one.counts.shown,
                "images": one.counts.images,
                "bytes": sum(size or 0 for size in sizes),
                "bytes_known": bool(sizes) and None not in sizes,
                "licence": licence_of(one),
                "needs": list(one.needs),
                "data": one.data,
                "files": len(mine),
                "there": states.count("there"),
                "begun": states.count("begun"),
                "wrong_size": states.count("wrong size"),
                "built": bool(one.data) and not mine and (root / str(one.data)).exists(),
                "mixture": bool(one.sources),
            }
        )
    return rows


def on_disk(row: Mapping[str, Any]) -> str:
    """The last column of that list, in words."""
    if not row["files"]:
        return "mixed" if row["built"] else "to mix"
    told = "all" if row["there"] == row["files"] else f"{row['there']} of {row['files']}" if row["there"] else "-"
    told += f", {row['begun']} begun" if row["begun"] else ""
    return told + (f", {row['wrong_size']} of a wrong size" if row["wrong_size"] else "")
