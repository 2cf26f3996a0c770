"""Commands that look and ask: chat, serve, show, look."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leveret.cli.common import LOOK, Images, Json, LoadIn, Own, Source, allow_own, verb
from leveret.runs import RecipeError


@verb("chat", "leveret.serve.chat", LOOK)
def chat(
    model: Annotated[str, typer.Argument(help="A model's folder, a run's, or an id of the hub (OWNER/NAME).")],
    image: Annotated[Path | None, typer.Argument(help="The picture to talk about.")] = None,
    question: Annotated[str | None, typer.Argument(help="Ask it, print the answer, and end; as -p.")] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Ask once, print the answer, and end.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, mps.")] = "auto",
    load_in: LoadIn = None,
    own: Own = None,
) -> None:
    """Talk with a model about a picture."""
    allow_own(own)
    from leveret.serve.chat import chat as station

    if question is not None and prompt is not None:
        raise RecipeError("the question is given twice, behind the picture and with -p; give it once")
    station(model, image=image, prompt=prompt if question is None else question, device=device, load_in=load_in)


@verb("serve", "leveret.serve.run", LOOK)
def serve(
    model: Annotated[str, typer.Argument(help="A model's folder, a run's, or an id of the hub (OWNER/NAME).")],
    host: Annotated[str, typer.Option(help="Where to listen: 127.0.0.1 is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; by default its folder.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Answers made at once.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer, at most.")] = 1024,
    waiting: Annotated[int, typer.Option(min=1, help="Answers that may wait for a slot; more get 429.")] = 256,
    images: Annotated[int, typer.Option(min=1, help="Images in a conversation, at most.")] = 8,
    rate: Annotated[float, typer.Option(min=0, help="Requests a minute for one address; 0: no limit.")] = 0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for answers in the making after SIGTERM.")] = 8,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the token that clients must send. Also LEVERET_TOKEN.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name of this server, as browsers may write it.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin whose scripts may ask: https://app.example.")
    ] = None,
    allow_domain: Annotated[
        list[str] | None, typer.Option(help="A host that images may be fetched from; by default none are.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="What may be held for answers, beside the weights: 2GB.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto (bf16 where native), fp32, bf16.")] = "auto",
    load_in: LoadIn = None,
    own: Own = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON line on stdout when it is ready.")] = False,
) -> None:
    """Answer over HTTP: OpenAI's chat completions, and a chat page."""
    import time

    begun = time.perf_counter()
    allow_own(own)
    from leveret.runs import bytes_of
    from leveret.serve.limits import Limits
    from leveret.serve.run import Where, token_from
    from leveret.serve.run import serve as station

    limits = Limits(answer_tokens=max_tokens, waiting=waiting, images=images, rate=rate, drain_seconds=drain)
    where = Where(host, port, token_from(token_file), tuple(allow_host or ()), tuple(allow_origin or ()))
    station(
        model, where, limits, name=name, domains=tuple(allow_domain or ()), device=device, precision=precision,
        slots=slots, memory=None if memory is None else bytes_of(memory), load_in=load_in, json_line=json, begun=begun,
    )  # fmt: skip


@verb("show", "leveret.show", LOOK)
def show(
    source: Source,
    index: Annotated[int, typer.Option(min=0, help="Which sample, from 0.")] = 0,
    id: Annotated[str | None, typer.Option(help="Or its id.")] = None,
    images: Images = None,
    model: Annotated[str | None, typer.Option(help="Also follow it through this model.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Save the pictures here: a .png or a folder.")] = None,
    own: Own = None,
    json: Json = False,
) -> None:
    """One sample at every seam, from record to answer."""
    allow_own(own)
    from leveret.show import show as station

    station(source, index=index, id=id, images=images, model=model, out=out, json=json)


@verb("look", "leveret.generate.look_terminal", LOOK)
def look(
    model: Annotated[str, typer.Argument(help="A model's folder, a run's, or an id of the hub (OWNER/NAME).")],
    image: Annotated[Path, typer.Argument(help="The picture.")],
    question: Annotated[str, typer.Argument(help="What is asked about it.")],
    answer: Annotated[str | None, typer.Option(help="Look inside this answer instead of the model's own.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write a page here instead of a summary.")] = None,
    layer: Annotated[
        int | None, typer.Option(help="Of the summary's maps, from 1; by default the mean of all.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of the model's own answer.")] = 64,
    own: Own = None,
    json: Json = False,
) -> None:
    """Where each word of an answer looked on the picture, and what else it might have been."""
    allow_own(own)
    from leveret.generate.look_terminal import run as station

    station(model, image, question, answer=answer, out=out, layer=layer, max_new_tokens=max_new_tokens, json=json)
