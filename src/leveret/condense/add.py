"""New embeddings beside those of a finished coreset: as if all had been there, and the centroids had been given.

What was found of the old rows and cannot change is taken over: their columns, what they are to the benchmarks, and,
where nothing but benchmarks came before the clusters, their nearest centroids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from leveret.condense.columns import load
from leveret.condense.estimate import estimate
from leveret.condense.given import Given, is_given, open_given
from leveret.condense.pipeline import as_before, condense, finished
from leveret.condense.prepare import prepare
from leveret.condense.shards import ParquetShard
from leveret.condense.steps import AGAINST, CondenseRecipe, changed
from leveret.pool.mixed import QUARANTINE
from leveret.runs import DataError, RecipeError, RunFolder, atomic_file, each_jsonl, write_json


def add(
    path: str | Path, new: Sequence[str | Path], out: str | Path, *, workers: int | None = None, run_on: str = "local"
) -> Path:
    """Makes the coreset `out` of the rows of the finished one at `path` and of the embeddings `new`; returns `out`.

    It equals `condense` on all of them (the folder `out/.all`, which links their files) with the centroids of `path`.
    What was refused when they were embedded stands in its ledger too, after all rows.
    `out/added.json` says how near the old and the new rows lie to their centroids.

    Raises RecipeError (the recipe trains no centroids, or more than once) and DataError (`path` holds no finished
    coreset, its embeddings are gone or were changed, `new` are none or do not fit them, an id that stands twice).
    """
    path, out = Path(path).resolve(), Path(out).resolve()
    begun = _begun(path, new)
    together = _linked([begun.old, *begun.new], out / ".all")

    def begin(folder: Path) -> None:
        _take_over(path, folder, begun)

    condense(
        together,
        out,
        begun.after,
        memory=begun.manifest["memory"],
        workers=workers,
        run_on=run_on,
        begin=begin,
        **begun.given,
    )
    write_json(out / "added.json", _nearness(out, len(begun.old)))
    return out


def look_ahead(
    path: str | Path, new: Sequence[str | Path], out: str | Path, *, workers: int
) -> tuple[int, int, bool, dict[str, Any]]:
    """(old rows, new rows, whether all is done, what `estimate` tells of all rows together), for a dry run.

    Raises what `add` would before it begins; nothing is written but links in a temporary folder. The estimate is that
    of condensing all rows: what is taken over of the old ones makes it less.
    """
    path = Path(path).resolve()
    begun = _begun(path, new)
    with TemporaryDirectory() as place:
        together = _linked([begun.old, *begun.new], Path(place))
        ready = prepare(together, begun.after, **begun.given)
        done = RunFolder.peek(out, "condense", ready.bound())
        assert isinstance(ready.rows, Given)
        found = estimate(ready.rows, begun.after, workers=workers, memory=begun.manifest["memory"])
    return len(begun.old), sum(map(len, begun.new)), "condense" in done, found


@dataclass(frozen=True)
class _Begun:
    """A finished coreset, and the embeddings to add. recipe: the coreset's; after: with its centroids given to the step
    `label`. given: what `prepare` and `condense` take besides."""

    manifest: dict[str, Any]
    old: Given
    new: Sequence[Given]
    recipe: CondenseRecipe
    label: str
    after: CondenseRecipe
    given: dict[str, Any]


def _begun(path: Path, new: Sequence[str | Path]) -> _Begun:
    manifest = finished(path)
    recipe = CondenseRecipe.model_validate(manifest["recipe"])
    grouping = [label for label, config in recipe.steps.items() if config.step == "cluster"]
    if len(grouping) != 1:
        raise RecipeError(
            f"{path} groups its rows {len(grouping)} times; adding goes by the centroids of the one step `cluster`. "
            "Condense all the embeddings together instead."
        )
    old = open_given(manifest["embeddings"])
    if manifest["weights"] == "as given" and old.fingerprint() != manifest["source"]:
        raise DataError(f"{old.path} is not what {path} was made from: files there were changed since")
    if wrong := [place for place in new if not is_given(place)]:
        raise DataError(f"{wrong[0]} is no folder of embeddings; `leveret embed` makes one of a pool")
    label = grouping[0]
    given = as_before(manifest)
    if manifest["weights"] != "as given":  # its rows were a pool, and are embeddings now
        given["encoder"] = given["encoder"] or recipe.encoder
    after = changed(recipe, [f"steps.{label}.centroids={path / 'centroids.npy'}"])
    return _Begun(manifest, old, [open_given(place) for place in new], recipe, label, after, given)


def _linked(every: Sequence[Given], folder: Path) -> Path:
    """One folder of embeddings that links the files of several, in their order."""
    files = [file for given in every for file in given.files]
    kinds = {"parquet" if isinstance(file.shard, ParquetShard) else "npy" for file in files}
    if len(kinds) > 1:
        raise DataError("embeddings in parquet and in .npy cannot be one set; write the new ones like the old ones")
    beside = [(file.metadata is not None, file.text is not None) for file in files]
    if kinds == {"npy"} and len(set(beside)) > 1:
        raise DataError(
            "some of these embeddings have metadata or captions' vectors beside them and others have none; ids and "
            "scores would mean different things"
        )
    wanted: set[Path] = set()
    for number, file in enumerate(files):
        if kinds == {"parquet"}:
            links = {f"{number:06d}.parquet": file.shard.path}
        elif beside[0] == (False, False):
            links = {f"{number:06d}.npy": file.shard.path}
        else:
            links = {f"img_emb/img_emb_{number}.npy": file.shard.path}
            links |= {f"metadata/metadata_{number}.parquet": file.metadata} if file.metadata else {}
            links |= {f"text_emb/text_emb_{number}.npy": file.text.path} if file.text else {}
        for name, target in links.items():
            _link(target, folder / name)
            wanted.add(folder / name)
    for place in [path for path in folder.rglob("*") if path.is_symlink() and path not in wanted]:
        place.unlink()  # of an earlier call with other files
    _gather_refused(every, folder / QUARANTINE)
    return folder


def _gather_refused(every: Sequence[Given], path: Path) -> None:
    """What was refused when the sets were embedded, as one quarantine; numbered after all rows, for a row's number is
    its place among the vectors."""
    number = sum(map(len, every))
    with atomic_file(path) as out:
        for given in every:
            there = given.path / QUARANTINE
            for line in each_jsonl(there) if there.is_file() else ():
                out.write((json.dumps({**line, "index": number}, ensure_ascii=False) + "\n").encode())
                number += 1


def _link(target: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink() and place.resolve() != target.resolve():
        place.unlink()  # of an earlier call with other files: the run that it belongs to is told apart by its marks
    if not place.is_symlink():
        place.symlink_to(target.resolve())


def _take_over(path: Path, folder: Path, begun: _Begun) -> None:
    """Links what was found of the old rows, which stand first in both."""
    first = path / "work" / "rows" / "0"
    parts = sorted(first.glob("*.npz"))
    counted = 0
    for part in parts:  # our own embeddings number rows as the pool did; where some were refused the numbers differ
        (row,) = load(part, "row")
        if not np.array_equal(row, np.arange(counted, counted + len(row))):
            return
        counted += len(row)
    if counted != len(begun.old):
        return
    places = [Path("rows", "0")]
    before = list(begun.recipe.steps)[: list(begun.recipe.steps).index(begun.label)]
    if AGAINST in before:
        places.append(Path(AGAINST))
    if set(before) <= {AGAINST}:
        places.append(Path("runs", "1"))
    for place in places:
        for file in sorted((path / "work" / place).iterdir()):
            target = folder / "work" / place / file.name
            if not os.path.lexists(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file.resolve())
    if (path / "against").is_dir() and not (folder / "against").exists():
        (folder / "against").symlink_to((path / "against").resolve(), target_is_directory=True)


def _nearness(out: Path, before: int) -> dict[str, Any]:
    """Rows that came to the clusters, old and new: how many, and their mean similarity to their centroid."""
    sums, counts = np.zeros(2), np.zeros(2, np.int64)
    for part in sorted((out / "work" / "rows" / "1").glob("*.npz")):
        row, near = load(part, "row", "centroid_cosine")
        fresh = (row >= before).astype(np.int64)
        sums += np.bincount(fresh, near, 2)
        counts += np.bincount(fresh, minlength=2)
    means = [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]
    return {name: {"rows": int(counts[at]), "nearness": means[at]} for at, name in enumerate(("old", "new"))}


def in_words(found: dict[str, Any]) -> str:
    """For the terminal: how well the old centroids fit the new rows."""
    old, new = (found[name]["nearness"] for name in ("old", "new"))
    if old is None or new is None:
        return ""
    told = f"mean similarity to the centroid: old rows {old:.3f}, new rows {new:.3f}"
    if new < old - DRIFT * (1 - old):
        return f"{told}: the new rows lie elsewhere; condense all together, so that they have centroids of their own"
    return told


DRIFT = 0.1
"""How much farther from 1 than that of the old rows the new rows' similarity may be before it is said."""
