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
        from leveret.pool import open_source

        n = len(open_source(source, images))
        return tell_plan(json, {"samples": n, "shards": -(-n // shard), "encoder": encoder, "out": str(out)})
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
        how = {"workers": workers or cores(), "memory": allowed, "device": device, "precision": precision}
        with reporting(json):
            told = _condense_plan(source, out, overrides or [], recipe, images, encoder, against or [], how)
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
    how: dict[str, Any],
) -> tuple[dict[str, Any], Sequence[str]]:
    """What would be done, and what it would come to. how: `workers` and `memory`, and what an encoder runs on."""
    from leveret.condense.estimate import estimate, estimate_pool, lines_of
    from leveret.condense.given import is_given, open_given
    from leveret.condense.steps import check_columns, read
    from leveret.recipe import dump

    steps = read(recipe, overrides, against=bool(against))
    facts: dict[str, Any] = {"recipe": recipe, "out": str(out)}
    if against:
        from leveret.condense.against import look_at

        facts["against"] = {side.name: len(side.source) for side in look_at(against)}
    if is_given(source):
        given = open_given(source)
        check_columns(steps, ("score",) if given.has_scores else (), f"the embeddings {given.path}")
        facts["embeddings"] = source
        facts["estimate"] = estimate(given, steps, workers=how["workers"], memory=how["memory"])
    else:
        from leveret.pool import open_source

        pool, eyes = open_source(source, images), encoder or steps.encoder
        facts |= {"samples": len(pool), "encoder": eyes}
        facts["estimate"] = estimate_pool(pool, steps, eyes, **how)
    return facts | {"steps": dump(steps)["steps"]}, lines_of(facts["estimate"])


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
    from leveret.condense.recut import recut, redone

    again = redone(path, overrides or [])
    if dry_run:
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
    json: Json = False,
) -> None:
    """Add new embeddings: what condensing all together with the old centroids would give."""
    from leveret.condense.add import add, in_words

    with reporting(json):
        folder = add(path, new, out, workers=workers, run_on=executor)
    facts = jsonlib.loads((folder / "summary.json").read_text("utf-8"))
    added = jsonlib.loads((folder / "added.json").read_text("utf-8"))
    lines = [f"{facts['input']:,} samples: {facts['kept']:,} kept", in_words(added), f"the coreset is in {folder}"]
    tell(json, {"out": str(folder), "added": added, **facts}, "\n".join(filter(None, lines)))


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
