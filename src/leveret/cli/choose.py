"""Commands that choose: embed, condense, and those that look after coresets."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from leveret.cli.common import (
    Device,
    DryRun,
    EmbedPrecision,
    Executor,
    Images,
    Json,
    LimitShare,
    Out,
    Overrides,
    Source,
    Workers,
    coreset,
    left_out,
    reporting,
    tell,
    tell_plan,
    verb,
)


@verb("embed", "leveret.condense")
def embed(
    source: Source,
    out: Out,
    encoder: Annotated[str, typer.Option(help="An id of the encoder table, a folder, or a hub id.")] = "world/scorer",
    images: Images = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in one pass.")] = 256,
    shard: Annotated[int, typer.Option(min=1, help="Samples in one file.")] = 20000,
    workers: Workers = None,
    executor: Executor = "local",
    texts: Annotated[bool, typer.Option("--texts", help="Keep the captions' vectors too.")] = False,
    limit_share: LimitShare = 0.2,
    device: Device = "cpu",
    precision: EmbedPrecision = "auto",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Embed a pool of image-text pairs, shard by shard."""
    if dry_run:
        with reporting(json):
            told = _embed_plan(
                source, out, encoder, images, batch, shard, texts, limit_share, workers, executor, device, precision
            )
        return tell_plan(json, *told)
    from leveret.condense import embed as station

    with reporting(json):
        folder = station(
            source,
            out,
            encoder,
            images=images,
            batch=batch,
            shard=shard,
            workers=workers,
            limit_share=limit_share,
            device=device,
            run_on=executor,
            texts=texts,
            precision=precision,
        )
    made = jsonlib.loads((folder / "manifest.json").read_text("utf-8"))
    refused = made["refused"]
    lines = [f"{made['length']:,} samples: {made['length'] - sum(refused.values()):,} embedded", *left_out(refused)]
    lines += [f"the refused ones stand in {folder / 'quarantine.jsonl'}"] if refused else []
    facts = {"out": str(folder), "samples": made["length"], "refused": refused}
    tell(json, facts, "\n".join([*lines, f"the embeddings are in {folder}"]))


def _embed_plan(
    source: str,
    out: Path,
    encoder: str,
    images: Path | None,
    batch: int,
    shard: int,
    texts: bool,
    limit_share: float,
    workers: int | None,
    run_on: str,
    device: str,
    precision: str,
) -> tuple[dict[str, Any], Sequence[str]]:
    """What would be done, and what it would come to."""
    from leveret.condense.embed import look_ahead, refuse_many
    from leveret.condense.estimate import embed_lines, estimate_embed
    from leveret.condense.executors import executor
    from leveret.pool import open_source
    from leveret.runs import cores

    pool, workers = open_source(source, images), workers or cores()
    executor(run_on, workers)  # refuses a name that is none
    how: dict[str, Any] = {"device": device, "precision": precision}
    done, refused = look_ahead(pool, out, encoder, batch=batch, shard=shard, texts=texts, **how)
    refuse_many(refused, min(done * shard, len(pool)), len(pool), limit_share, pool)
    shards = -(-len(pool) // shard)
    facts = {"samples": len(pool), "shards": shards, "done": done, "encoder": encoder, "out": str(out)}
    if done == shards:
        return facts, ["all of it is done"]
    found = estimate_embed(pool, encoder, workers=workers, limit_share=limit_share, **how)[0]
    return facts | {"estimate": found}, embed_lines(found)


@verb("condense", "leveret.condense")
def condense(
    source: Annotated[str, typer.Argument(help="A pool (as for `embed`), or a folder of embeddings.")],
    out: Out,
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option("-r", "--recipe", help="A condensation recipe: a name or a path.")] = "bunny",
    images: Images = None,
    encoder: Annotated[str | None, typer.Option(help="Instead of the recipe's.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="A benchmark's images, or their embeddings: no row may be one of them.")
    ] = None,
    workers: Workers = None,
    executor: Executor = "local",
    limit_share: LimitShare = 0.2,
    device: Device = "cpu",
    precision: EmbedPrecision = "auto",
    memory: Annotated[str, typer.Option(help="What the run may hold at once; changes no id.")] = "2GB",
    clusters_per_row: Annotated[
        int | None, typer.Option(help="Clusters a row sits in; 2 finds near copies that borders of clusters hide.")
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Choose a coreset, with a ledger and a report."""
    from leveret.runs import bytes_of, cores

    allowed = bytes_of(memory)
    if clusters_per_row is not None:
        from leveret.condense.steps import sitting_in

        overrides = [*(overrides or []), *sitting_in(clusters_per_row, recipe, overrides or [])]
    if dry_run:
        with reporting(json):
            told = _condense_plan(
                source,
                out,
                overrides or [],
                recipe,
                images,
                encoder,
                against or [],
                workers=workers or cores(),
                memory=allowed,
                device=device,
                precision=precision,
                limit_share=limit_share,
                run_on=executor,
            )
        return tell_plan(json, *told)
    from leveret.condense import condense as station

    with reporting(json):
        folder = station(
            source,
            out,
            recipe,
            overrides or [],
            images=images,
            encoder=encoder,
            against=against or [],
            workers=workers,
            limit_share=limit_share,
            device=device,
            memory=allowed,
            run_on=executor,
            precision=precision,
        )
    facts = jsonlib.loads((folder / "summary.json").read_text("utf-8"))
    lines = [f"{facts['input']:,} samples: {facts['kept']:,} kept"]
    for label, reasons in facts["left_out"].items():
        lines += left_out(reasons, "refused" if label == "read" else f"left out by {label}")
    for name, met in next((stage["against"] for stage in facts["funnel"] if "against" in stage), {}).items():
        lines += [
            f"  {met['met']:,} near one of the {met['images']:,} images of {name}: {folder / 'contaminated.parquet'}"
        ]
        lines += [f"  {met['refused']:,} images of {name} could not be read"] if met["refused"] else []
    from leveret.condense.border import in_words

    lines += [f"borders of clusters: {in_words(step['border'])}" for step in facts["funnel"] if "border" in step]
    lines += [f"the fate of each stands in {folder / 'ledger'}"]
    lines += [f"the coreset is {folder / 'coreset.json'}, the report {folder / 'report.html'}"]
    tell(json, {"out": str(folder), **facts}, "\n".join(lines))


def _condense_plan(
    source: str,
    out: Path,
    overrides: Sequence[str],
    recipe: str,
    images: Path | None,
    encoder: str | None,
    against: Sequence[str],
    *,
    workers: int,
    memory: int,
    device: str,
    precision: str,
    limit_share: float,
    run_on: str,
) -> tuple[dict[str, Any], Sequence[str]]:
    """What would be done, and what it would come to."""
    from leveret.condense.estimate import estimate, estimate_pool, lines_of
    from leveret.condense.executors import executor
    from leveret.condense.prepare import prepare
    from leveret.pool import Source
    from leveret.recipe import dump
    from leveret.runs import RunFolder

    executor(run_on, workers)  # refuses a name that is none
    how: dict[str, Any] = {"device": device, "precision": precision}
    ready = prepare(source, recipe, overrides, images=images, encoder=encoder, against=against, **how)
    done = RunFolder.peek(out, "condense", ready.bound())
    facts: dict[str, Any] = {"recipe": recipe, "out": str(out)}
    if ready.sides:
        facts["against"] = {side.name: len(side.source) for side in ready.sides}
    steps, how = ready.recipe, how | {"workers": workers, "memory": memory}
    if isinstance(ready.rows, Source):
        facts |= {"samples": len(ready.rows), "encoder": steps.encoder}
        facts["estimate"] = estimate_pool(ready.rows, steps, steps.encoder, limit_share=limit_share, **how)
    else:
        facts["embeddings"] = source
        facts["estimate"] = estimate(ready.rows, steps, workers=workers, memory=memory)
    told = lines_of(facts["estimate"])
    return facts | {"steps": dump(steps)["steps"]}, [*told, *["all of it is done"] * ("condense" in done)]


@verb("recut", "leveret.condense.recut", group=coreset)
def coreset_recut(
    path: Annotated[Path, typer.Argument(help="A finished coreset's folder.")],
    out: Out,
    overrides: Overrides = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Another threshold, window or budget; only what hangs on it is done again."""
    from leveret.condense.recut import check, recut, redone

    again = redone(path, overrides or [])
    if dry_run:
        with reporting(json):
            check(path, out, overrides or [])
        return tell_plan(json, {"out": str(out), "done again": again})
    with reporting(json):
        folder = recut(path, out, overrides or [], workers=workers)
    facts = jsonlib.loads((folder / "summary.json").read_text("utf-8"))
    lines = [f"done again: {', '.join(again) or 'nothing'}; the steps before are those of {path}"]
    lines += [f"{facts['input']:,} samples: {facts['kept']:,} kept", f"the coreset is in {folder}"]
    tell(json, {"out": str(folder), "redone": again, **facts}, "\n".join(lines))


@verb("add", "leveret.condense.add", group=coreset)
def coreset_add(
    path: Annotated[Path, typer.Argument(help="A finished coreset's folder.")],
    new: Annotated[list[Path], typer.Argument(help="Folders or files of embeddings that are new.")],
    out: Out,
    workers: Workers = None,
    executor: Executor = "local",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Add new embeddings: what condensing all together with the old centroids would give."""
    from leveret.condense.add import add, in_words

    if dry_run:
        with reporting(json):
            told = _add_plan(path, new, out, workers, executor)
        return tell_plan(json, *told)
    with reporting(json):
        folder = add(path, new, out, workers=workers, run_on=executor)
    facts = jsonlib.loads((folder / "summary.json").read_text("utf-8"))
    added = jsonlib.loads((folder / "added.json").read_text("utf-8"))
    lines = [f"{facts['input']:,} samples: {facts['kept']:,} kept", in_words(added), f"the coreset is in {folder}"]
    tell(json, {"out": str(folder), "added": added, **facts}, "\n".join(filter(None, lines)))


def _add_plan(
    path: Path, new: list[Path], out: Path, workers: int | None, run_on: str
) -> tuple[dict[str, Any], Sequence[str]]:
    """What would be done, and what it would come to."""
    from leveret.condense.add import look_ahead
    from leveret.condense.estimate import lines_of
    from leveret.condense.executors import executor
    from leveret.runs import cores

    workers = workers or cores()
    executor(run_on, workers)  # refuses a name that is none
    before, fresh, done, found = look_ahead(path, new, out, workers=workers)
    facts = {"coreset": str(path), "rows before": before, "new rows": fresh, "out": str(out), "estimate": found}
    lines = [*lines_of(found), "all of it is done" if done else "(less: what was found of the old rows is taken over)"]
    return facts, lines


@verb("export", "leveret.condense.export", group=coreset)
def coreset_export(
    path: Annotated[Path, typer.Argument(help="A finished coreset's folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder for a store, a file for the others.")],
    kind: Annotated[str, typer.Option("--as", help="store, filter, datacomp or text.")] = "store",
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Write a coreset as tars ready for training, or as a filter for a loader that exists."""
    from leveret.condense.export import KINDS, export

    with reporting(json):
        made = export(path, out, kind, **({"workers": workers} if workers else {}))
    counts = ", ".join(f"{value:,} {name}" for name, value in made.items() if name != "out")
    tell(json, made, f"{counts}: {made['out']} ({KINDS[kind].about})")


@verb("verify", "leveret.condense.verify", group=coreset)
def coreset_verify(
    path: Annotated[Path, typer.Argument(help="A coreset's folder.")],
    clusters: Annotated[int, typer.Option(min=1, help="How many clusters to look at again.")] = 20,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 0,
    json: Json = False,
) -> None:
    """Look at some clusters again in float64, all pairs and all centroids, and say how close it was."""
    from leveret.condense.verify import verify

    with reporting(json):
        found = verify(path, clusters, seed)
    wrong = {name: found[name] for name in ("labels_wrong", "groups_wrong", "keepers_wrong", "contaminated_wrong")}
    lines = [
        f"{found['clusters']:,} clusters, {found['rows']:,} rows, {found['pairs']:,} pairs looked at again in float64"
    ]
    if found["contaminated"]:
        lines.append(f"{found['contaminated']:,} rows beside all images of the benchmarks")
    else:
        wrong.pop("contaminated_wrong")
    lines += [f"  {count:,} {name.replace('_', ' ')}" for name, count in wrong.items()]
    close = {"pair": found["closest_pair"], "centroid": found["closest_centroid"]}
    lines += [
        f"  closest {name}: {value:.3g} from being decided otherwise"
        for name, value in close.items()
        if value is not None
    ]
    tell(json, found, "\n".join(lines))
    if any(wrong.values()):
        raise typer.Exit(1)
