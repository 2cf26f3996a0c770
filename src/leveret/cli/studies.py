"""Commands about studies and the drawn world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leveret.cli.common import (
    DryRun,
    Json,
    Out,
    Overrides,
    Workers,
    reporting,
    study,
    tell,
    tell_plan,
    verb,
    world,
)
from leveret.runs import RecipeError


@verb("list", "leveret.study.runner", group=study)
def study_list(json: Json = False) -> None:
    """The studies that come with leveret: what each asks."""
    from leveret.recipe import names
    from leveret.study.files import cells, read

    found = []
    for name in names("studies"):
        one = read(name)
        found.append({"name": name, "title": one.title, "models": len(cells(one)), "axes": list(one.axes)})
    lines = [line for row in found for line in (f"{row['name']}  ({row['models']} models)", f"  {row['title']}")]
    tell(json, {"studies": found}, "\n".join(lines))


@verb("run", "leveret.study.runner", group=study)
def study_run(
    recipe: Annotated[str, typer.Argument(metavar="STUDY", help="A study's name (`leveret study list`) or file.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder to fill; by default runs/study/NAME.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Pieces of work at once; by default one a core.")] = None,
    command: Annotated[
        str | None, typer.Option(help="A shell line to run each piece with, {} for its own: 'srun -c 4 {}'.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep drawn worlds and embeddings.")] = False,
    units: Annotated[
        Path | None, typer.Option(help="Folder for the pieces, which several studies share: one after the other.")
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Teach and examine what is missing of a study, and write its page."""
    from leveret.study.files import read
    from leveret.study.matrix import Matrix, as_plain
    from leveret.study.runner import run

    with reporting(json):
        one = read(recipe, overrides or [])
        place = out or Path("runs/study") / one.name
        if command is not None and "{}" not in command:
            raise RecipeError(f"--command {command!r}: nothing says where a piece's own command goes; write {{}} there")
        if dry_run:
            from leveret.study.costs import describe, outline

            matrix = Matrix.of(one)
            facts = describe(matrix, place, units)
        else:
            results = run(one, place, jobs=jobs, command=command, keep=keep, units=units)
    if dry_run:
        return tell(json, {**facts, "plan": as_plain(matrix)}, outline(facts, jobs))
    if not json:
        from leveret.study.page import say

        say(results, place)
    tell(json, {"out": str(place), "page": str(place / "report.html"), **results})


@verb("report", "leveret.study.runner", group=study)
def study_report(
    path: Annotated[Path, typer.Argument(help="The folder of `leveret study run`.")],
    json: Json = False,
) -> None:
    """Write a study's page again, of what is done by now."""
    from leveret.study.matrix import reopen
    from leveret.study.page import publish, say

    with reporting(json):
        folder, matrix = reopen(path)
        results = publish(folder, matrix)
    if not json:
        say(results, path)
    tell(json, {"page": str(path / "report.html"), **results})


@study.command("unit", hidden=True)
def study_unit(path: Path, unit: str) -> None:
    """Make one piece of a study: what `study run` starts, here or by --command."""
    from leveret.runs import graceful_stop
    from leveret.study.runner import follow_parent, make

    follow_parent()
    with graceful_stop():
        make(path, unit)


@verb("draw", "leveret.world.write", group=world)
def world_draw(
    out: Out,
    seed: Annotated[int, typer.Option(help="Another seed is another world.")] = 0,
    web: Annotated[int | None, typer.Option(min=1, help="Image-text pairs of the web pool.")] = None,
    tune: Annotated[int | None, typer.Option(min=1, help="Conversations to tune with.")] = None,
    test: Annotated[int | None, typer.Option(min=1, help="Questions a task in the examination.")] = None,
    harder: Annotated[int | None, typer.Option(min=0, help="Questions a task on each kind of harder picture.")] = None,
    strength: Annotated[str, typer.Option(help="Of the web's diseases: mild, usual or severe.")] = "usual",
    oblong: Annotated[float, typer.Option(min=0, max=1, help="Share of pictures that are clearly not square.")] = 0.0,
    workers: Workers = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Draw a web pool, conversations and an examination."""
    from leveret.world.write import WorldSize, draw, same_world

    counts = {"web": web, "tune": tune, "test": test, "harder": harder}
    given = {name: value for name, value in counts.items() if value is not None}
    size = WorldSize(strength=strength, oblong=oblong, **given)  # type: ignore[arg-type]
    if dry_run:
        same_world(out, seed, size)
        return tell_plan(json, {"out": str(out), "seed": seed, **size.told()})
    with reporting(json):
        folder = draw(out, seed=seed, size=size, workers=workers)
    tell(json, {"out": str(folder), "seed": seed, **size.told()}, f"the world is in {folder}")


@verb("backbones", "leveret.world.backbones", group=world)
def world_backbones(
    out: Out,
    seed: Annotated[int, typer.Option(help="Of the world and the weights.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="This one alone, may be given often; by default all.")] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train the tiny encoders and language models anew."""
    from leveret.world.backbones import build, wanted

    names = wanted(only or ())
    if dry_run:
        return tell_plan(json, {"out": str(out), "seed": seed, "what": f"train {', '.join(names)}"})
    with reporting(json):
        folder = build(out, seed=seed, only=names)
    tell(json, {"out": str(folder), "seed": seed}, f"the backbones are in {folder}")
