"""Commands that teach: the quickstart, train, and those that look after runs."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from leveret.cli.common import AllowChange, DryRun, Json, Out, Overrides, Run, reporting, runs, tell, verb


@verb("quickstart", "leveret.quickstart")
def quickstart(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY.PATH=VALUE",
            help="world.web=9000 and other sizes, budget=300, stages.tune.steps=90, study.seeds=0 (with --full).",
        ),
    ] = None,
    out: Out = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(help="The world, and every draw.")] = 0,
    full: Annotated[
        bool, typer.Option(help="Then compare ways of choosing data: an hour to the first answer, three to all.")
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """The whole loop in minutes, on a world it draws."""
    from leveret import quickstart as station

    given = tuple(overrides or ())
    with reporting(json):
        folder = station.run(out, seed=seed, overrides=given, full=full, dry_run=dry_run)
    results = folder / "results.json"
    found = jsonlib.loads(results.read_text("utf-8")) if results.is_file() and not dry_run else {}
    tell(json, {"out": str(folder), **found})


@verb("train", "leveret.train")
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe: a name (bunny/v1.0-3b) or a path.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The run's folder; by default runs/RECIPE.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage; may be given again.")] = None,
    track: Annotated[list[str] | None, typer.Option(help="Also tell a dashboard: tensorboard, wandb.")] = None,
    allow_change: AllowChange = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Teach a model, stage by stage, as a recipe says."""
    from leveret.train import train as station

    name = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")
    folder = out or Path("runs", name)
    given = [*(overrides or []), *([f"track=[{','.join(track)}]"] if track else [])]
    if dry_run and json:
        from leveret.train.plan import facts

        return tell(json, {"out": str(folder), "dry_run": True, "stages": facts(recipe, given, stage)})
    with reporting(json):
        model = station(recipe, folder, given, dry_run=dry_run, stages=stage, allow_change=allow_change)
    tell(json, {"model": str(model)}, "" if dry_run else f"the model is in {model}")


@verb("report", "leveret.train.report", group=runs)
def run_report(
    path: Run,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The page to write; by default report.html in the run's folder.")
    ] = None,
    json: Json = False,
) -> None:
    """What is taught, how it goes, and a page with the curves."""
    from leveret.train.report import show, write_page
    from leveret.train.story import read

    story = read(path)
    page = write_page(story, out or path / "report.html")
    if not json:
        show(story)
    tell(json, {"page": str(page), **story.facts()}, f"the page is {page}")


@verb("resume", "leveret.train", group=runs)
def run_resume(path: Run, allow_change: AllowChange = False, json: Json = False) -> None:
    """Go on with a run: its own command again, in the folder it was given in."""
    from leveret.train.story import again

    with reporting(json):
        model = again(path, allow_change=allow_change)
    tell(json, {"model": str(model)}, f"the model is in {model}")
