"""From a pool, or a folder of its embeddings, to a coreset: every step in turn, each remembered when it is done.

    source -> embeddings -> step -> step -> ... -> ledger.parquet, coreset.json, summary.json, report.html

Everything is a pure function of the data, the encoder and the recipe. A killed run that is started again goes on with
the first part that was not finished and ends with the same bytes in ledger.parquet and coreset.json.
"""

from __future__ import annotations

import io
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leveret import recipe as recipes
from leveret.condense.embed import embed
from leveret.condense.folder import Embeddings, check_vectors, fingerprint, is_embeddings, open_embeddings
from leveret.condense.ledger import Ledger, records, write_coreset, write_ledger
from leveret.condense.steps import STEPS, CondenseRecipe, check_columns
from leveret.condense.table import Array, Shop, Verdict, hash_ids
from leveret.pool import Source, open_source
from leveret.runs import (
    DataError,
    Interrupted,
    RunFolder,
    atomic_write,
    cores,
    graceful_stop,
    read_json,
    sha256_of,
    stop_requested,
    write_json,
)

RULES = 1
"""Version of the rules in docs/condense.md. A change of any kept id raises it, so that old folders are not gone on."""


class Notebook(Shop):
    """A shop with a folder: finished parts are `.npy` files, each whole or absent."""

    def __init__(self, folder: Path, seed: int, workers: int) -> None:
        super().__init__(seed, workers)
        self.folder = folder

    def memo(self, name: str, make: Callable[[], Array]) -> Array:
        path = self.folder / f"{name}.npy"
        if path.exists():
            found: Array = np.load(path, allow_pickle=False)
            return found
        if stop_requested():
            raise Interrupted(f"stopped as asked before {path.stem}; the same command goes on from there")
        made = make()
        save(path, made)
        return made


def save(path: Path, array: Array) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    atomic_write(path, buffer.getvalue())


def condense(
    source: Source | str | Path,
    out: str | Path,
    recipe: str | Path = "bunny",
    overrides: Sequence[str] = (),
    *,
    images: str | Path | None = None,
    encoder: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    limit_share: float = 0.2,
) -> Path:
    """Choose a coreset and write it, with the fate of every sample, into the folder `out`; returns `out`.

    source    a pool (anything `pool.open_source` opens), or a folder of embeddings in clip-retrieval's layout.
    recipe    a name of `recipes/condense` or a path; overrides such as `steps.dedup.threshold=0.9`.
    images    the folder that image paths start from (for a folder of embeddings: where report pictures are).
    encoder   instead of the recipe's.
    workers   threads and processes; changes no result.

    Raises RecipeError (also when `out` holds another run, or a step needs scores and there are none), DataError.
    """
    chosen = recipes.load(recipe, CondenseRecipe, "condense", overrides)
    workers = workers or cores()
    clock = Clock()
    pool: Source | None = None
    if isinstance(source, Source):
        pool = source
    elif not is_embeddings(source):
        pool = open_source(source, images)
    if pool is not None:
        from leveret.model.encoders import load_encoder

        chosen = chosen.model_copy(update={"encoder": encoder or chosen.encoder})
        loaded = load_encoder(chosen.encoder, device)
        present = ("score",) if loaded.has_texts else ()
        check_columns(chosen, present, f"the encoder {chosen.encoder!r}")
        mark = {"source": pool.fingerprint(), "weights": loaded.fingerprint}
    else:
        folder = Path(str(source))
        opened = open_embeddings(folder)
        check_columns(chosen, ("score",) if opened.score is not None else (), f"the folder {folder}")
        chosen = chosen.model_copy(update={"encoder": opened.encoder})
        mark = {"source": fingerprint(folder), "weights": "as given"}
    run = RunFolder.open(out, "condense", {**recipes.dump(chosen), **mark, "rules": RULES})
    with graceful_stop():
        if pool is not None:
            with clock("embed"):
                folder = embed(
                    pool,
                    run.path / "embeddings",
                    chosen.encoder,
                    workers=workers,
                    limit_share=limit_share,
                    device=device,
                )
                opened = open_embeddings(folder)
        ledger = _run_steps(run, chosen, opened, workers, clock)
    root = Path(images) if images is not None else None
    with clock("write"):
        kept = records(ledger, pool, root)
        write_ledger(ledger, run.path / "ledger.parquet")
        write_coreset(kept, run.path / "coreset.json")
    _keep_times(run, clock)
    summary = _summary(run, chosen, ledger)
    write_json(run.path / "summary.json", summary)
    from leveret.condense.report import write_report

    write_report(run.path, chosen, ledger, pool, root, read_json(run.path / "timings.json"))
    run.done("condense", kept=len(kept))
    return run.path


def _run_steps(run: RunFolder, chosen: CondenseRecipe, opened: Embeddings, workers: int, clock: Clock) -> Ledger:
    if not run.is_done("check"):
        with clock("check"):
            check_vectors(opened.vectors, Shop(workers=workers))
            if opened.score is not None and not np.isfinite(opened.score).all():
                row = int(np.flatnonzero(~np.isfinite(opened.score))[0])
                raise DataError(f"{opened.path}: row {row} has score {opened.score[row]}; every row needs a number")
        run.done("check")
    ledger = Ledger.begin(opened, hash_ids(opened.ids))
    for position, (label, config) in enumerate(chosen.steps.items()):
        folder = run.path / "steps" / f"{position:02d}-{_plain(label)}"
        table = ledger.table()
        name = f"step_{position:02d}"
        if run.is_done(name):
            verdict = _load(folder, run.facts(name))
        else:
            with clock(label):
                shop = Notebook(folder / "parts", chosen.seed, workers)
                verdict = STEPS[config.step].run(table, config, shop)
                facts = _store(folder, verdict)
            run.done(name, **facts)
            shutil.rmtree(folder / "parts", ignore_errors=True)
        if "centroids" in verdict.facts:
            save(run.path / "centroids.npy", verdict.facts["centroids"])
        ledger.enter(label, config.step, table, verdict)
    return ledger


def _plain(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in label)[:40]


def _store(folder: Path, verdict: Verdict) -> dict[str, Any]:
    """Writes a verdict's arrays; returns what else must be remembered of it."""
    save(folder / "keep.npy", verdict.keep)
    save(folder / "reason.npy", verdict.reason)
    for kind, arrays in (("columns", verdict.columns), ("facts", verdict.facts)):
        for name, array in arrays.items():
            save(folder / kind / f"{name}.npy", array)
    return {
        "reasons": list(verdict.reasons),
        "columns": list(verdict.columns),
        "facts": list(verdict.facts),
        "notes": dict(verdict.notes),
    }


def _load(folder: Path, done: Mapping[str, Any]) -> Verdict:
    def read(kind: str, names: Sequence[str]) -> dict[str, Array]:
        return {name: np.load(folder / kind / f"{name}.npy", allow_pickle=False) for name in names}

    return Verdict(
        np.load(folder / "keep.npy", allow_pickle=False),
        np.load(folder / "reason.npy", allow_pickle=False),
        tuple(done["reasons"]),
        read("columns", done["columns"]),
        read("facts", done["facts"]),
        done["notes"],
    )


def _summary(run: RunFolder, chosen: CondenseRecipe, ledger: Ledger) -> dict[str, Any]:
    """The funnel in numbers. Holds no times, so that equal runs have equal summaries."""
    embeddings = ledger.embeddings
    funnel = [{"label": "input", "step": "", "left": embeddings.length}]
    if embeddings.length != len(embeddings):
        funnel.append({"label": "read", "step": "read", "left": len(embeddings)})
    for stage in ledger.stages:
        notes = {key: value for key, value in stage.notes.items() if key != "sizes"}
        funnel.append({"label": stage.label, "step": stage.step, "left": stage.after, **notes})
    left_out = {"read": Counter(str(line["reason"]) for line in embeddings.refused)} if embeddings.refused else {}
    for fate, count in zip(*np.unique(ledger.fate[ledger.fate > 0], return_counts=True), strict=True):
        label, reason = ledger.words[int(fate) - 1]
        left_out.setdefault(label, Counter())[reason] += int(count)
    return {
        "name": chosen.name,
        "encoder": embeddings.encoder,
        "seed": chosen.seed,
        "input": embeddings.length,
        "refused": len(embeddings.refused),
        "kept": int((ledger.fate == 0).sum()),
        "left_out": {label: dict(reasons.most_common()) for label, reasons in left_out.items()},
        "funnel": funnel,
        "ledger_sha256": sha256_of(run.path / "ledger.parquet"),
        "coreset_sha256": sha256_of(run.path / "coreset.json"),
    }


# --- times ---------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by name: `with clock("embed"): ...`"""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._start = "", 0.0

    def __call__(self, name: str) -> Clock:
        self._name, self._start = name, time.monotonic()
        return self

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + time.monotonic() - self._start


def _keep_times(run: RunFolder, clock: Clock) -> None:
    """Adds this run's seconds to those of the runs that were killed before; what was only read again counts little."""
    path = run.path / "timings.json"
    before = read_json(path) if path.exists() else {}
    now = {name: round(max(value, before.get(name, 0)), 3) for name, value in clock.seconds.items()}
    write_json(path, {**before, **now})
