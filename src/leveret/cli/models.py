"""Commands about whole models: convert, merge, push, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leveret.cli.common import LOOK, DryRun, Json, Own, allow_own, reporting, tell, verb


@verb("convert", "leveret.model.peers")
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A model of Bunny, LLaVA, TinyLLaVA, Prismatic, nanoVLM, or of ours: a folder, or OWNER/NAME."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[
        str, typer.Option(help="leveret, hf-llava, bunny, llava, tinyllava, prismatic, nanovlm, gguf, remote-code.")
    ] = "leveret",
    hub: Annotated[
        Path | None, typer.Option(help="A folder with OWNER/NAME folders, looked at before the model hub.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The language model that adapters or a projector stand on, if not the one named.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by default as it was saved.")] = None,
    own: Own = None,
    json: Json = False,
) -> None:
    """Turn another tool's model into one of ours, or one of ours into another's layout."""
    allow_own(own)
    from leveret.model.peers.convert import convert as station

    with reporting(json):
        found = station(source, out, to=to, hub=hub, base=base, dtype=dtype)
    lines = [f"{found['kind']}: {found['parameters']:,} parameters, {found['seen']}"]
    lines += [f"  {name:<10} {what}" for name, what in found["parts"].items()]
    lines += [f"  note: {note}" for note in found["notes"]]
    tell(json, found, "\n".join([*lines, f"the model is in {out}"]))


@verb("merge", "leveret.model.merge")
def merge(
    models: Annotated[
        list[str], typer.Argument(help="Two or more models of one shape; or, with --base, a folder of LoRA adapters.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")],
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="W [W ...]", help="One for each model; equal ones by default."),
    ] = None,
    normalise: Annotated[bool, typer.Option("--normalise", help="Divide the weights by their sum.")] = False,
    base: Annotated[
        str | None, typer.Option(help="The whole model that adapters are added to, if not the one they name.")
    ] = None,
    hub: Annotated[
        Path | None, typer.Option(help="A folder with OWNER/NAME folders, looked at before the model hub.")
    ] = None,
    json: Json = False,
) -> None:
    """Average models of one shape, or add LoRA adapters to the model they stand on."""
    from leveret.model import merge as station

    with reporting(json):
        found = station.merge(models, out, weights or [], normalise=normalise, base=base, hub=hub)
    tell(json, found, f"{station.in_words(found)}\nthe model is in {out}")


@verb("push", "leveret.model.push")
def push(
    model: Annotated[Path, typer.Argument(help="A model's folder, or a finished run's.")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Seen by its owner alone, if it is new.")] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Put a model on the Hugging Face hub, with a card."""
    from leveret.model.push import push as station

    with reporting(json):
        found = station(model, name, private=private, dry_run=dry_run)
    lines = [f"{size:>16,} bytes  {file}" for file, size in found["files"].items()]
    if dry_run:
        lines = ["would upload, but this is a dry run:", *lines, "", found["card"]]
    else:
        lines += [f"the model is at {found['url']}; anyone who may see it loads it by leveret.load({name!r})"]
    tell(json, found, "\n".join(lines))


@verb("doctor", "leveret.doctor", LOOK)
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A model's folder or a run's, a recipe (bunny/v1.0-3b), or an id of the hub.")
    ] = None,
    json: Json = False,
) -> None:
    """What is installed, and what fits on this machine; of a model, what it needs."""
    from leveret import doctor as station

    facts = station.doctor(model) if model is not None else station.doctor()
    if not json:
        station.show(facts)
    tell(json, facts)
