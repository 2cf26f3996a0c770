"""A mixture: sources with filters, exact counts or weights, and a seed, written as one data set that `train` reads.

    OUT/mixture.jsonl     LLaVA's records, one a line; image paths start from the sources' common folder
    OUT/quarantine.jsonl  {source, index, id, image, reason, detail}: every record that is refused
    OUT/mix.json          what was mixed, the counts of every source, and where the images start from

`open_source(OUT)` reads it as it stands. With OUT.json or OUT.jsonl as the output there is that one file, and the two
others beside it. Which samples are chosen, and their order, hang on the seed and on the records alone, not on where
they stand in their files: with the same seed, the choice of 100 is part of the choice of 200.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.images import Root
from leveret.pool import catalogue, mixed
from leveret.pool.base import SampleFault, Source
from leveret.pool.catalogue import DataSet, Mapped, Part, Where
from leveret.pool.check import entry_of, look_at
from leveret.pool.choice import counts, occurrence, shuffled
from leveret.pool.llava import record_of
from leveret.pool.mapped import MappedSource
from leveret.pool.sources import open_source
from leveret.records import ImageRef, Sample
from leveret.runs import (
    DataError,
    Interrupted,
    Progress,
    RecipeError,
    UserError,
    atomic_file,
    graceful_stop,
    in_words,
    stop_requested,
    write_json,
)

if TYPE_CHECKING:
    import numpy as np

_RULES = 1
"""Raise when the same sources would be mixed differently, so that no two mixtures of one name differ in silence."""

SHOWN = 5
"""Ids of repeated records that are named."""


@dataclass
class Opened:
    """A source of a mixture while it is walked.

    records: of it. refused: reason -> records that cannot be used. left_out: good ones that no filter lets through.
    """

    part: Part
    name: str
    source: Source
    records: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    left_out: int = 0
    fitting: int = 0
    dropped: int = 0
    taken: int = 0
    text_only: int = 0


def mix(
    recipe: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    form: str = "list",
    dry_run: bool = False,
    workers: int | None = None,
) -> dict[str, Any]:
    """Mix what `recipe` (a name of the catalogue or a path) says into `out`. Returns what stands in mix.json.

    form     "list": LLaVA's records with paths to the images. "tars": a store with the images in it, as `convert`
             writes; every image that is looked at is unpacked then.
    dry_run  walk and choose, look at no image, write nothing.

    Memory: some 100 bytes a record that fits; no record is held. What is written appears whole or not at all; a
    mixture that is there already is not made again.

    Raises:
        RecipeError: the recipe's faults, all at once; or `out` holds something else.
        DataError: a source cannot be read or is too broken, has fewer samples than it shall give (all such are named),
            or the same record stands twice and the recipe does not allow it.
        Interrupted: nothing was written.
    """
    wanted = catalogue.load(recipe, list(overrides))
    if not wanted.sources:
        raise RecipeError(
            f"{recipe} is a data set to fetch (leveret pool get {recipe} DIR), not a mixture: it has no `sources`"
        )
    if form not in ("list", "tars"):
        raise RecipeError(f"form is {form!r}; allowed: list, tars")
    place = mixed.Place.of(Path(out), tars=form == "tars")
    with graceful_stop():
        opened = open_all(wanted)
        root = common_root([one.source for one in opened])
        if root.parent == root and form == "list":
            raise RecipeError(
                f"the sources' image folders ({', '.join(sorted({str(one.source.root.path) for one in opened}))}) have "
                "no folder in common; lay them (or links to them) below one, or write tars with --as tars"
            )
        key = {
            "rules": _RULES,
            "form": form,
            "recipe": wanted.model_dump(mode="json", include=_MADE_BY),
            "sources": [[one.name, one.source.fingerprint()] for one in opened],
        }
        if dry_run:
            place.check(key)
        else:
            place.claim(key)
            if (made := place.finished(key)) is not None:
                return made
        quarantined: list[dict[str, Any]] = []
        unpack = None if dry_run else wanted.decode or form == "tars"
        try:
            chosen = _choose(wanted, opened, _walk(wanted, opened, unpack, quarantined))
        except DataError:
            if not dry_run:
                place.forget()
            raise
        facts = _facts(wanted, opened, chosen, quarantined, place, root)
        if dry_run:
            return facts | {"dry_run": True}
        if form == "tars":
            from leveret.pool.convert import convert

            pairs = [(opened[part].source, index) for part, index in zip(*chosen.rows, strict=True)]
            store = convert(mixed.MixedSource(place.folder, root, pairs), place.folder, workers=workers, limit_share=0)
            facts |= {"shards": store.shards, "bytes": store.size}
        else:
            _write(opened, chosen, place, root)
        place.write_quarantine(quarantined)
        write_json(place.facts, {"key": key, **facts})
    return facts


_MADE_BY = {"sources", "seed", "total", "duplicates", "order", "decode"}
"""Fields of the recipe that decide what is written."""


# --- sources -------------------------------------------------------------------------------------------------------


def open_all(wanted: DataSet) -> list[Opened]:
    """Every source of a mixture, opened. RecipeError with all that cannot be, each with its place in the recipe."""
    opened: list[Opened] = []
    faults: list[str] = []
    taken: set[str] = set()
    known: dict[str, Source] = {}  # a source that stands twice is read once
    for number, part in enumerate(wanted.sources):
        try:
            same = part.model_dump_json(include={"data", "images", "mapped"})
            source = known[same] if same in known else known.setdefault(same, _open(part, Path(wanted.root)))
        except UserError as fault:
            faults.append(f"  sources.{number}.data: {fault}")
            continue
        name = part.name or part.data
        while name in taken:
            name = f"{name} ({number + 1})"
        taken.add(name)
        opened.append(Opened(part, name, source))
    if faults:
        count = "one source" if len(faults) == 1 else f"{len(faults)} sources"
        raise DataError("\n".join([f"{count} of the mixture cannot be read:", *faults]))
    return opened


def _open(part: Part, root: Path) -> Source:
    """A source: a path, or a set of the catalogue below the data root."""
    path, images, mapped = Path(part.data), part.images, part.mapped
    if not path.exists() and catalogue.is_known(part.data):
        known = catalogue.load(part.data)
        if known.data is None:
            raise DataError(f"{part.data} is a set of images, without words")
        path = root / known.data
        if not path.exists():
            verb = f"pool get {part.data} {root}" if known.files else f"pool mix {part.data} -o {path}"
            raise DataError(
                f"{part.data} is not at {path}. Make it: leveret {verb}; or give another data root: root=DIR"
            )
        images = images or str(root / known.images)
        mapped = mapped or known.mapped
    if mapped is not None:
        return _mapped(path, images, mapped)
    return open_source(path, images)


def _mapped(path: Path, images: str | None, how: Mapped) -> Source:
    if not path.is_file():
        raise DataError(f"the data {path} does not exist; `mapped` is for a JSON list of records, one file")
    return MappedSource(path, images, **how.model_dump())


def common_root(sources: Sequence[Source]) -> Path:
    """The deepest folder that holds every source's images."""
    return Path(os.path.commonpath([source.root.path for source in sources]))


def fits(sample: Sample, where: Where, image: str) -> bool:
    """Whether a sample passes all filters. image: the path of its first image from its source's root, "" without."""
    if where.id_prefix and not sample.id.startswith(where.id_prefix):
        return False
    if where.not_id_prefix and sample.id.startswith(where.not_id_prefix):
        return False
    if where.image_prefix and not image.startswith(where.image_prefix):
        return False
    if where.not_image_prefix and image and image.startswith(where.not_image_prefix):
        return False
    if where.modality is not None and (where.modality == "image") != bool(sample.images):
        return False
    if where.turns is not None:
        turns = sum(turn.role != "system" for turn in sample.turns)
        if turns < where.turns.min or (where.turns.max is not None and turns > where.turns.max):
            return False
    return all(str(sample.meta.get(key, "")) in values for key, values in where.field.items())


# --- walking and choosing ------------------------------------------------------------------------------------------


@dataclass
class _Candidates:
    """Every record that fits.

    record, id   uint64 [n, 2] digests: of id, texts and images' paths in their own folder; of the id alone.
    word         uint64 [n] digest of id and texts, which choice and order hang on: the same for a list and for tars.
    part, index  int64 [n]: of which source, and where in it. text: bool [n], without a picture.
    """

    record: np.ndarray
    word: np.ndarray
    id: np.ndarray
    part: np.ndarray
    index: np.ndarray
    text: np.ndarray


def _walk(
    wanted: DataSet, opened: Sequence[Opened], unpack: bool | None, quarantined: list[dict[str, Any]]
) -> _Candidates:
    """Read every record once, filter it, look at its images (`unpack`; None: not), and keep its digests."""
    from array import array

    import numpy as np

    digests, words, ids = bytearray(), bytearray(), bytearray()
    parts, indices, texts = array("q"), array("q"), array("b")
    total = sum(len(one.source) for one in opened)
    with Progress(total, "looking at the sources", "records") as progress:
        for number, one in enumerate(opened):
            source, where = one.source, one.part.where
            one.records = len(source)
            for index in range(len(source)):
                if index % 256 == 0 and stop_requested():
                    raise Interrupted("mixing stopped as asked, before anything was written; run it again")
                progress.advance(1, refused=len(quarantined))
                try:
                    sample = source.sample(index)
                except SampleFault as fault:
                    _refuse(one, wanted, entry_of(index, fault), quarantined)
                    continue
                names = [_name(ref, source.root) for ref in sample.images]
                if not fits(sample, where, names[0] if names else ""):
                    one.left_out += 1
                    continue
                if names and unpack is not None and (refused := look_at(source, index, sample, unpack).refused):
                    _refuse(one, wanted, refused[0], quarantined)
                    continue
                told = _json([sample.id, [[turn.role, turn.text] for turn in sample.turns]])
                words += hashlib.blake2b(told, digest_size=8).digest()
                digests += hashlib.blake2b(told + _json(names), digest_size=16).digest()
                ids += hashlib.blake2b(_json(sample.id), digest_size=16).digest()
                parts.append(number)
                indices.append(index)
                texts.append(not names)
                one.fitting += 1
    return _Candidates(
        np.frombuffer(bytes(digests), "<u8").reshape(-1, 2),
        np.frombuffer(bytes(words), "<u8"),
        np.frombuffer(bytes(ids), "<u8").reshape(-1, 2),
        np.array(parts, dtype=np.int64),
        np.array(indices, dtype=np.int64),
        np.array(texts, dtype=bool),
    )


def _json(told: Any) -> bytes:
    return json.dumps(told, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _refuse(one: Opened, wanted: DataSet, entry: dict[str, Any], quarantined: list[dict[str, Any]]) -> None:
    one.refused[entry["reason"]] = one.refused.get(entry["reason"], 0) + 1
    quarantined.append({"source": one.name, **entry})
    if sum(one.refused.values()) > wanted.limit_share * one.records:
        advice = one.source.advice(one.refused, entry["index"] + 1)
        raise DataError(
            f"{one.name}: {sum(one.refused.values()):,} of its {one.records:,} records are refused, more than the "
            f"limit of {wanted.limit_share:.0%}: {in_words(one.refused)}.{advice} Look at them (leveret pool check "
            f"{one.source.path} -o DIR), or raise limit_share."
        )


def _name(ref: ImageRef, root: Root | None, under: Path | None = None) -> str:
    """An image's path from the root of its source, or from the folder `under`."""
    if ref.kind == "data":
        return ref.path
    if root is not None:
        return root.name(ref)
    file = os.path.relpath(ref.path, under).replace(os.sep, "/")
    return f"{file}#{ref.inside}" if ref.inside else file


@dataclass
class _Chosen:
    """rows: part and index of every sample, in their order. repeated: records (ids) that stand in it again."""

    rows: tuple[list[int], list[int]]
    repeated: int
    repeated_ids: int
    examples: list[str]


def _choose(wanted: DataSet, opened: Sequence[Opened], found: _Candidates) -> _Chosen:
    import numpy as np

    alive = np.ones(len(found.part), dtype=bool)
    if wanted.duplicates == "drop":
        alive = occurrence(found.record) == 0
        for number, one in enumerate(opened):
            one.dropped = int((~alive & (found.part == number)).sum())
    kept: list[np.ndarray] = []
    short: list[str] = []
    for number, (one, count) in enumerate(zip(opened, counts(wanted), strict=True)):
        rows = np.flatnonzero(alive & (found.part == number))
        if count is not None and count > len(rows):
            short.append(f"  {one.name}: {len(rows):,} of its {one.records:,} records fit, {count:,} shall be taken")
            continue
        if count is not None:
            rows = np.sort(rows[shuffled(found.word[rows], found.record[rows], wanted.seed, "choose")[:count]])
        one.taken = len(rows)
        one.text_only = int(found.text[rows].sum())
        kept.append(rows)
    if short:
        raise DataError("\n".join(["there are too few samples in the mixture's sources:", *short]))
    rows = np.concatenate(kept)
    if not len(rows):
        raise DataError(f"nothing is left of {sum(one.records for one in opened):,} records: no one passes the filters")
    again = occurrence(found.record[rows]) > 0
    examples = [
        opened[found.part[row]].source.sample(int(found.index[row])).id for row in rows[np.flatnonzero(again)[:SHOWN]]
    ]
    if again.any() and wanted.duplicates == "refuse":
        raise DataError(
            f"{int(again.sum()):,} records stand in the mixture twice, with the same id, words and images "
            f"({', '.join(examples)}{', ...' * (int(again.sum()) > SHOWN)}). Say `duplicates: keep` to allow it, or "
            "`duplicates: drop` to take the first alone."
        )
    repeated_ids = int((occurrence(found.id[rows]) > 0).sum())
    if wanted.order == "shuffled":
        rows = rows[shuffled(found.word[rows], found.record[rows], wanted.seed, "order")]
    return _Chosen((found.part[rows].tolist(), found.index[rows].tolist()), int(again.sum()), repeated_ids, examples)


# --- writing -------------------------------------------------------------------------------------------------------


def _write(opened: Sequence[Opened], chosen: _Chosen, place: mixed.Place, root: Path) -> None:
    def name(ref: ImageRef) -> str:
        return _name(ref, None, root)

    with (
        Progress(len(chosen.rows[0]), f"writing {place.records.name}", "samples") as progress,
        atomic_file(place.records) as file,
    ):
        listed = place.records.suffix == ".json"
        for number, record in enumerate(_records(opened, chosen, name)):
            head = ("[\n" if number == 0 else ",\n") if listed else ""
            file.write((head + json.dumps(record, ensure_ascii=False) + "\n" * (not listed)).encode())
            progress.advance(1)
        if listed:
            file.write(b"\n]\n")


def _records(opened: Sequence[Opened], chosen: _Chosen, name: Callable[[ImageRef], str]) -> Iterator[Mapping[str, Any]]:
    for part, index in zip(*chosen.rows, strict=True):
        if stop_requested():
            raise Interrupted("mixing stopped as asked; nothing was written, run the same command again")
        sample = opened[part].source.sample(index)
        images = [name(ref) for ref in sample.images]
        record: dict[str, Any] = {"id": sample.id}
        if images:
            record["image"] = images[0] if len(images) == 1 else images
        yield record | {key: value for key, value in record_of(sample).items() if key not in record}


def _facts(
    wanted: DataSet,
    opened: Sequence[Opened],
    chosen: _Chosen,
    quarantined: Sequence[Mapping[str, Any]],
    place: mixed.Place,
    root: Path,
) -> dict[str, Any]:
    return {
        "name": wanted.name,
        "seed": wanted.seed,
        "samples": len(chosen.rows[0]),
        "out": str(place.given),
        "data": str(place.records),
        "images": os.path.relpath(root, place.folder.resolve()),
        "images_root": str(root),
        "quarantine": str(place.quarantine),
        "refused": len(quarantined),
        "sources": [
            {
                "name": one.name,
                "data": str(one.source.path),
                "images": str(one.source.root.path),
                "records": one.records,
                "refused": one.refused,
                "left_out": one.left_out,
                "fit": one.fitting,
                "dropped": one.dropped,
                "taken": one.taken,
                "text_only": one.text_only,
            }
            for one in opened
        ],
        "duplicates": {
            "allowed": wanted.duplicates,
            "same_record": chosen.repeated,
            "same_id": chosen.repeated_ids,
            "examples": chosen.examples,
        },
    }
