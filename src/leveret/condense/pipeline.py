"""From a pool, or a folder of its embeddings, to a coreset: every step in turn, each remembered when it is done.

    source -> embeddings -> step -> step -> ... -> ledger/, coreset.parquet, coreset.json, summary.json, report.html

Everything is a pure function of the data, the encoder and the recipe. A killed run that is started again goes on with
the first part that was not finished and ends with the same rows in the ledger and the same bytes in coreset.json.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from leveret import recipe as recipes
from leveret.condense import engine
from leveret.condense.against import LOT, Benchmark, open_benchmark
from leveret.condense.embed import embed
from leveret.condense.executors import executor
from leveret.condense.given import Given, let_go, open_given
from leveret.condense.ledger import Stage, records, write_contaminated, write_coreset, write_ids, write_ledger
from leveret.condense.lloyd import Map
from leveret.condense.prepare import RULES, prepare
from leveret.condense.ranks import hash_ids
from leveret.condense.steps import (
    STEPS,
    CondenseRecipe,
    Shop,
    State,
)
from leveret.condense.working import Part, Rows
from leveret.pool import Source
from leveret.pool.mixed import QUARANTINE
from leveret.runs import (
    DataError,
    Interrupted,
    RunFolder,
    atomic_write,
    cores,
    each_jsonl,
    graceful_stop,
    read_json,
    sha256_of,
    stop_requested,
    write_json,
)


def condense(
    source: Source | str | Path,
    out: str | Path,
    recipe: str | Path | CondenseRecipe = "bunny",
    overrides: Sequence[str] = (),
    *,
    images: str | Path | None = None,
    encoder: str | None = None,
    against: str | Path | Sequence[str | Path] = (),
    workers: int | None = None,
    device: str = "cpu",
    limit_share: float = 0.2,
    memory: int = 2 << 30,
    run_on: str = "local",
    precision: str = "auto",
    begin: Callable[[Path], None] | None = None,
    like: Mapping[str, Any] | None = None,
) -> Path:
    """Choose a coreset and write it, with the fate of every sample, into the folder `out`; returns `out`.

    source    a pool (anything `pool.open_source` opens), or embeddings (anything `given.open_given` opens).
    recipe    a name of `recipes/condense` or a path, under overrides such as `dedup.threshold=0.9`, `budget=1000`; or
              the recipe itself.
    images    the folder that image paths start from (for a folder of embeddings: where report pictures are).
    encoder   instead of the recipe's; for embeddings that do not name theirs, what embeds the images of `against`.
    against   benchmarks: what is an image of one is dropped first. Images, or embeddings by the same encoder.
    workers   threads and processes; changes no result.
    memory    bytes that vectors may take at once, roughly; changes no result.
    run_on    `local`, `ray` or `ray:ADDRESS` (`executors`); changes no result.
    precision of the encoder where a pool or a benchmark's images are embedded, as for `embed`.
    begin     called with the folder once it is known to be this run's, before any step: `recut` lays finished steps in.
    like      the manifest of a coreset whose steps these are: DataError where what they were made from has changed.

    Raises RecipeError (also when `out` holds another run, or a step needs scores and there are none), DataError.
    """
    workers = workers or cores()
    where = executor(run_on, workers)
    if run_on != "local":  # other machines know no working directory of ours
        out = Path(out).resolve()
        source = source if isinstance(source, Source) else Path(source).resolve()
    clock = Clock()
    ready = prepare(
        source, recipe, overrides, images=images, encoder=encoder, against=against, device=device, precision=precision,
        like=like,
    )  # fmt: skip
    chosen, sides, eyes = ready.recipe, ready.sides, ready.eyes
    pool = ready.rows if isinstance(ready.rows, Source) else None
    run = RunFolder.open(out, "condense", ready.bound())
    if begin is not None:
        begin(run.path)
    how: dict[str, Any] = {"workers": workers, "limit_share": limit_share, "device": device, "run_on": run_on}
    how["precision"] = precision
    with graceful_stop(), where as execute:
        met: list[dict[str, Any]] = []
        for number, side in enumerate(sides):
            with clock("embed benchmarks"):
                there = side.embedded(run.path / "against" / f"{number:02d}", eyes, **how)
            held = open_benchmark(there)
            counts = {"images": len(held), "refused": len(Refused.of(held))}
            paths = {"path": str(side.path.resolve()), "embeddings": str(there.resolve())}
            met.append({"name": side.name, **counts, **paths})
        if isinstance(ready.rows, Source):
            with clock("embed"):
                given = open_given(embed(ready.rows, run.path / "embeddings", chosen.encoder, **how))
        else:
            given = ready.rows
        benchmarks = _benchmarks(run, met, execute)
        state, stages = _run_steps(run, chosen, given, execute, memory, workers, clock, benchmarks)
        with clock("write"):
            refused = Refused.of(given)
            write_ledger(state, refused, run.path / "ledger", execute)
            write_ids(state, run.path / "coreset.parquet")
            if benchmarks:
                write_contaminated(state, [one.name for one in benchmarks], run.path / "contaminated.parquet")
    root = Path(images) if images is not None else None
    with clock("write"):
        write_coreset(records(state, given, pool, root), run.path / "coreset.json")
    _keep_times(run, clock)
    summary = _summary(run, chosen, given, state, stages, refused)
    write_json(run.path / "summary.json", summary)
    counts = {stage.label: stage.after for stage in stages}
    manifest = {"rules": RULES, "recipe": recipes.dump(chosen), **ready.mark, "input": summary["input"], "left": counts}
    hashes = {name: sha256_of(run.path / name) for name in ("coreset.parquet", "coreset.json")}
    place = {
        "embeddings": str(given.path.resolve()),
        "pool": None if pool is None else str(pool.path.resolve()),
        "images": None if images is None else str(Path(images).resolve()),
        "benchmarks": met,
        "encoder": encoder,
        "precision": precision,
        "memory": memory,
        "workers": workers,
    }
    write_json(run.path / "manifest.json", {**manifest, "kept": summary["kept"], "sha256": hashes, **place})
    from leveret.condense.report import write_report

    seconds = read_json(run.path / "timings.json")
    write_report(run.path, chosen, given, state, stages, pool, root, summary, seconds)
    run.done("condense", kept=summary["kept"])
    return run.path


@dataclass(frozen=True)
class Opened:
    """A finished coreset: its recipe, its embeddings, its rows with all that was decided of them, the stages, and the
    benchmarks that it was compared with."""

    path: Path
    recipe: CondenseRecipe
    given: Given
    state: State
    stages: list[Stage]
    benchmarks: tuple[Benchmark, ...] = ()


def as_before(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What `prepare` and `condense` were given beside rows and recipe when the coreset of this manifest was made."""
    return {
        "images": manifest["images"],
        "encoder": manifest.get("encoder"),
        "precision": manifest.get("precision", "fp32"),
        "against": [facts["path"] for facts in manifest.get("benchmarks", [])],
    }


def finished(path: Path) -> dict[str, Any]:
    """The manifest of a coreset that `condense` finished. DataError where there is none."""
    if not (path / "manifest.json").is_file() or not (path / "done" / "condense.json").is_file():
        raise DataError(f"{path} holds no finished coreset (no manifest.json); `leveret condense` makes one")
    found: dict[str, Any] = read_json(path / "manifest.json")
    return found


def open_coreset(path: str | Path) -> Opened:
    """Opens a coreset that `condense` finished; nothing is computed. DataError where it is none, or its embeddings are
    gone or were changed."""
    path = Path(path)
    manifest = finished(path)
    chosen = CondenseRecipe.model_validate(manifest["recipe"])
    given = open_given(manifest["embeddings"])
    if manifest["weights"] == "as given" and given.fingerprint() != manifest["source"]:
        raise DataError(f"{given.path} is not what {path} was made from: files there were changed since")
    run = RunFolder(path, "condense")
    with executor("local", 1) as execute:
        benchmarks = _benchmarks(run, manifest.get("benchmarks", []), execute)
        state, stages = _run_steps(
            run, chosen, given, execute, manifest["memory"], manifest["workers"], Clock(), benchmarks
        )
    return Opened(path, chosen, given, state, stages, benchmarks)


def _benchmarks(run: RunFolder, found: Sequence[Mapping[str, Any]], execute: Map) -> tuple[Benchmark, ...]:
    """Benchmarks whose vectors are read when they are asked for first. found: their entries in the manifest."""

    def parts(number: int, embeddings: str) -> Sequence[Part]:
        return _ingest(open_benchmark(embeddings), run.path / "against" / f"{number:02d}", execute, LOT).parts

    return tuple(
        Benchmark(facts["name"], facts["images"], facts["refused"], partial(parts, number, facts["embeddings"]))
        for number, facts in enumerate(found)
    )


@dataclass(frozen=True)
class Refused:
    """Samples of the pool that could not be embedded: the quarantine's lines, and how many there are by reason."""

    path: Path
    reasons: Counter[str]

    @classmethod
    def of(cls, given: Given) -> Refused:
        path = given.path / QUARANTINE
        lines = each_jsonl(path) if path.is_file() else ()
        return cls(path, Counter(str(line["reason"]) for line in lines))

    def __len__(self) -> int:
        return self.reasons.total()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return each_jsonl(self.path) if self.reasons else iter(())


def _run_steps(
    run: RunFolder,
    chosen: CondenseRecipe,
    given: Given,
    execute: Map,
    memory: int,
    workers: int,
    clock: Clock,
    benchmarks: tuple[Benchmark, ...],
) -> tuple[State, list[Stage]]:
    work = run.path / "work"
    with clock("read"):
        rows = _ingest(given, work, execute)
        _different_ids(rows, rename=(given.path / "manifest.json").is_file())
    width = max((shard.row_bytes for shard in given.shards), default=1)
    # A bucket is held as it lies on disk, once more in its new order, and as 8-bit codes.
    most = max(1024, int(memory / (4 * width * workers)))
    shop, state, stages = Shop(chosen.seed, most, memory, execute, benchmarks), State(rows), []
    before = rows.count()
    for position, (label, config) in enumerate(chosen.steps.items()):
        if stop_requested():
            raise Interrupted(f"stopped as asked before {label}; the same command goes on from there")
        with clock(label):
            state, notes = STEPS[config.step].run(state, label, config, shop)
        after = state.rows.count()
        stages.append(Stage(label, config.step, before, after, notes))
        run.done(f"step_{position:02d}", label=label, left=after)
        before = after
    if state.centroids is not None:
        buffer = io.BytesIO()
        np.save(buffer, state.centroids, allow_pickle=False)
        atomic_write(run.path / "centroids.npy", buffer.getvalue())
    return state, stages


def _ingest(given: Given, work: Path, execute: Map, size: int = engine.CHUNK) -> Rows:
    """The rows as they come, in parts of a file of at most `size`."""
    index = _index(given)
    pieces = engine.chunks_of(given.shards, work / "rows" / "0", size)
    starts = {file.shard.path: number for number, file in enumerate(given.files)}

    def take(piece: tuple[Part, int]) -> Part:
        part, first = piece
        if not part.path.exists():
            ((shard, start, stop),) = part.pieces
            ids, score = given.columns(starts[shard.path], start, stop)
            row = np.arange(first, first + part.n) if index is None else index[first : first + part.n]
            engine.ingest(part, row, ids, score)
        return part

    rows = Rows(work, 0, tuple(execute(take, pieces)))
    let_go()
    return rows


def _index(given: Given) -> Any:
    """[n] positions in the source, where our own embeddings say them."""
    import pyarrow.parquet as pq

    if not (given.path / "manifest.json").is_file() or any(file.metadata is None for file in given.files):
        return None
    found = []
    for file in given.files:
        table = pq.read_table(file.metadata)
        if "index" not in table.column_names:
            return None
        found.append(table.column("index").to_numpy())
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _free(name: bytes, row: int, hashes: np.ndarray, taken: Container[bytes]) -> bytes:
    """`name#row`, or with the row once more, until nobody is called so: an id may end in # and a number by itself."""
    while True:
        name += b"#%d" % row
        (own,) = hash_ids([name])
        at = int(np.searchsorted(hashes, own))
        if name not in taken and (at == len(hashes) or hashes[at] != own):
            return name


def _different_ids(rows: Rows, *, rename: bool) -> None:
    """Order and coreset go by ids, so an id may stand only once: DataError; or, where a pool's records share ids
    (conversations about one picture often do), all but the first become `id#index`."""
    hashes = [part.read("hash")[0] for part in rows.parts]
    whole = np.concatenate([np.zeros(0, np.uint64), *hashes])
    order = np.argsort(whole, kind="stable")
    near = np.flatnonzero(whole[order][1:] == whole[order][:-1])
    suspects = np.unique(np.concatenate([order[near], order[near + 1]]))
    if not len(suspects):
        return
    ends = np.cumsum([0, *(len(part) for part in hashes)])
    hashes_there = whole[order]
    seen: dict[bytes, int] = {}
    for part, start, stop in zip(rows.parts, ends[:-1], ends[1:], strict=True):
        inside = suspects[(suspects >= start) & (suspects < stop)] - start
        if not len(inside):
            continue
        ids, row = part.read("id", "row")
        again: dict[int, bytes] = {}
        for place, name in zip(inside.tolist(), ids.at(inside), strict=True):
            if name not in seen:
                seen[name] = int(row[place])
            elif rename:
                again[place] = _free(name, int(row[place]), hashes_there, seen)
                seen[again[place]] = int(row[place])
            else:
                raise DataError(
                    f"the id {name.decode('utf-8', 'replace')!r} stands twice (rows {seen[name]:,} and "
                    f"{int(row[place]):,}); every row needs an id of its own"
                )
        if again:
            engine.rename(part, again)


def _summary(
    run: RunFolder,
    chosen: CondenseRecipe,
    given: Given,
    state: State,
    stages: list[Stage],
    refused: Refused,
) -> dict[str, Any]:
    """The funnel in numbers. Holds no times, so that equal runs have equal summaries."""
    length = len(given) + len(refused)
    funnel: list[dict[str, Any]] = [{"label": "input", "step": "", "left": length}]
    if refused:
        funnel.append({"label": "read", "step": "read", "left": len(given)})
    left_out: dict[str, dict[str, int]] = {}
    if refused:
        left_out["read"] = dict(refused.reasons.most_common())
    for stage in stages:
        notes = {key: value for key, value in stage.notes.items() if key != "sizes"}
        funnel.append({"label": stage.label, "step": stage.step, "left": stage.after, **notes})
        if stage.before > stage.after:
            counts = {"near copy": stage.notes.get("near_copies"), "exact copy": stage.notes.get("exact_copies")}
            words = {name: count for name, count in counts.items() if count}
            left_out[stage.label] = words or {STEPS[stage.step].title: stage.before - stage.after}
    return {
        "name": chosen.name,
        "encoder": chosen.encoder,
        "seed": chosen.seed,
        "input": length,
        "refused": len(refused),
        "kept": state.rows.count(),
        "left_out": left_out,
        "funnel": funnel,
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
