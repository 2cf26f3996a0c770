"""Commands that look after pools of image-text pairs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from leveret.cli.common import (
    DryRun,
    Images,
    Json,
    LimitShare,
    Out,
    Overrides,
    Source,
    Workers,
    left_out,
    pool,
    reporting,
    tell,
    tell_plan,
    verb,
)
from leveret.runs import RecipeError


@verb("check", "leveret.pool", group=pool)
def pool_check(
    source: Source,
    out: Out,
    images: Images = None,
    decode: Annotated[bool, typer.Option(help="Unpack every image.")] = True,
    limit_share: LimitShare = 0.2,
    workers: Workers = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Index the good samples, quarantine the others."""
    from leveret.pool import check, open_source

    opened = open_source(source, images)
    if dry_run:
        return tell_plan(json, {"samples": len(opened), "decode": decode, "out": str(out)})
    with reporting(json):
        found = check(opened, out, decode=decode, limit_share=limit_share, workers=workers)
    reasons = dict(found.reasons)
    names = ("total", "ok", "quarantined", "reasons", "images", "text_only", "duplicates", "index", "quarantine")
    facts = {name: getattr(found, name) for name in names} | {"reasons": reasons}
    lines = [f"{found.total:,} samples: {found.ok:,} good, {found.quarantined:,} refused"]
    lines += [f"  {count:,}  {reason}" for reason, count in reasons.items()]
    lines += [f"the index is {found.index}, the refused ones stand in {found.quarantine}"]
    tell(json, facts, "\n".join(lines))


@verb("convert", "leveret.pool", group=pool)
def pool_convert(
    source: Source,
    out: Out,
    images: Images = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples in one tar.")] = 4096,
    limit_share: LimitShare = 0.2,
    workers: Workers = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Write any data as tars that are read fast in any order."""
    from leveret.pool import convert, open_source

    opened = open_source(source, images)
    if dry_run:
        return tell_plan(json, {"samples": len(opened), "shards": -(-len(opened) // shard_size), "out": str(out)})
    with reporting(json):
        made = convert(opened, out, shard_size=shard_size, limit_share=limit_share, workers=workers)
    reasons = dict(made.reasons)
    names = ("total", "ok", "quarantined", "images", "shards", "size", "store")
    lines = [f"{made.total:,} samples: {made.ok:,} written, {made.quarantined:,} refused", *left_out(reasons)]
    lines += [f"{made.images:,} images, {made.size:,} bytes in {made.shards:,} tars; the store is {made.store}"]
    tell(json, {name: getattr(made, name) for name in names} | {"reasons": reasons}, "\n".join(lines))


@verb("list", "leveret.pool.catalogue", group=pool)
def pool_list(
    root: Annotated[Path, typer.Option("--root", help="The data root that is looked at.")] = Path("data"),
    json: Json = False,
) -> None:
    """The known data sets: samples, bytes, licences, and what is there."""
    from leveret.pool.catalogue import overview

    with reporting(json):
        rows = overview(root)
    if not json:
        _print_sets(rows)
    tell(
        json,
        {"root": str(root), "sets": rows},
        f"here: in {root}. Files, licences, defects: leveret pool get NAME {root} --dry-run",
    )


def _print_sets(rows: list[dict[str, Any]]) -> None:
    from textwrap import shorten

    from rich.console import Console
    from rich.table import Table

    from leveret.pool.catalogue import on_disk
    from leveret.runs import in_bytes

    console = Console() if sys.stdout.isatty() else Console(width=140)
    wide = max(0, console.width - 84) // 2  # what the licences get, of the rest of a line
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("name", no_wrap=True)
    for name in ("samples", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("here")
    for name in ("words' licence", "pictures' licence") if wide > 15 else ():
        table.add_column(name, no_wrap=True)
    for row in rows:
        size = in_bytes(row["bytes"]) if row["bytes"] else "-" if row["mixture"] else "unknown"
        size += " or more" if row["bytes"] and not row["bytes_known"] else ""
        counted = row["counted"] if row["data"] else f"{row['images']:,} images" if row["images"] else "images"
        told = [shorten(row["licence"].get(kind, ""), wide, placeholder=" ...") for kind in ("annotations", "images")]
        table.add_row(row["name"], counted, size, on_disk(row), *(told if wide > 15 else ()))
    console.print(table)


@verb("get", "leveret.pool.get", group=pool)
def pool_get(
    name: Annotated[str, typer.Argument(help="A set of the catalogue (leveret pool list), or a YAML in its form.")],
    root: Annotated[Path, typer.Argument(metavar="DIR", help="The data root: recipes call it data.")],
    pictures: Annotated[
        bool, typer.Option("--images/--no-images", help="Also the archives of its images, or its words alone.")
    ] = True,
    lay_out: Annotated[bool, typer.Option("--unpack", help="Lay the archives out where recipes look for images.")] = (
        False
    ),
    urls: Annotated[bool, typer.Option("--urls", help="Write the pictures' addresses for img2dataset.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Fetch a published data set, after telling its size and licences."""
    from leveret.pool import get as station

    one, rows = station.plan(name, root, pictures)
    facts = station.facts_of(name, root, one, rows)
    if not json:
        print("\n".join(_told(facts)))
    if dry_run:
        return tell(json, facts | {"dry_run": True}, "nothing was fetched: this is a dry run")
    if facts["missing_bytes"] or facts["unknown_sizes"]:
        if not yes and (json or not sys.stdin.isatty()):
            raise RecipeError("nobody is there to agree to these licences and sizes; say so with --yes")
        if not yes and not typer.confirm("Fetch it, under these licences?"):
            raise typer.Exit(2)
    with reporting(json):
        facts = station.get(name, root, pictures=pictures, lay_out=lay_out, urls=urls)
    lines = [f"{len(facts['fetched']):,} files fetched"]
    lines += [f"  {name}: {done['files']:,} files in {done['into']}" for name, done in facts["unpacked"].items()
              if "into" in done]  # fmt: skip
    lines += [f"{facts['checked']['records']:,} records in {facts['data']}"] if facts["checked"] else []
    lines += [f"{facts['urls']['rows']:,} addresses in {facts['urls']['path']}"] if "urls" in facts else []
    lines += [f"note: {note}" for note in facts["notes"]]
    lines += [f"left to you: {root / item['path']}: {item['how']}" for item in facts["by_hand"]]
    tell(json, facts, "\n".join(lines))


def _told(facts: dict[str, Any]) -> list[str]:
    """A set as it is told before it is fetched: files, licences, defects, and what is still to come."""
    from leveret.runs import in_bytes

    lines = [f"{facts['name']}: {facts['title']} ({facts['counted']} samples)"]
    for file in facts["files"]:
        size = "size unknown" if file["bytes"] is None else in_bytes(file["bytes"])
        lines.append(f"  {size:>12}  {file['path']}  [{file['state']}]  {'by hand: ' * file['by_hand']}{file['from']}")
    for name, licence in facts["licences"].items():
        lines += [f"  {name}, {what}: {said}" for what, said in licence.items()]
    lines += [f"  known: {defect}" for defect in facts["defects"]]
    more = f", and {facts['unknown_sizes']} files of unknown size" if facts["unknown_sizes"] else ""
    return [*lines, f"to come: {in_bytes(facts['missing_bytes'])}{more}, into {facts['root']}"]


@verb("mix", "leveret.pool.mix", group=pool)
def pool_mix(
    recipe: Annotated[str, typer.Argument(help="A mixture: a YAML, or a name (leveret pool list).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder, or OUT.json, OUT.jsonl for the list alone.")],
    overrides: Overrides = None,
    form: Annotated[str, typer.Option("--as", help="list (with paths to the images) or tars (with them).")] = "list",
    workers: Workers = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Mix data sets: filters, exact counts or weights, a seed."""
    from leveret.pool.mix import mix

    with reporting(json):
        facts = mix(recipe, out, overrides or [], form=form, dry_run=dry_run, workers=workers)
    lines = ["would mix, but this is a dry run:"] if dry_run else []
    width = max(len(row["name"]) for row in facts["sources"])
    for row in facts["sources"]:
        left = {"left out by filters": row["left_out"], "refused": sum(row["refused"].values())}
        left |= {"dropped": row["dropped"]} if row["dropped"] else {}
        told = ", ".join(f"{count:,} {what}" for what, count in left.items())
        lines.append(f"  {row['name']:<{width}}  {row['taken']:>11,} of {row['records']:,}  ({told})")
        lines += [f"    {count:,} refused: {reason}" for reason, count in row["refused"].items()]
    twice = facts["duplicates"]
    again = f"{twice['same_record']:,} records stand in it again, {twice['same_id']:,} samples have an id of another"
    lines += [f"{facts['samples']:,} samples, seed {facts['seed']}", again]
    if not dry_run:
        lines.append(f"the mixture is {facts['out']}; its images start from {facts['images_root']}")
        lines += [f"the refused ones stand in {facts['quarantine']}"] if facts["refused"] else []
    tell(json, facts, "\n".join(lines))
