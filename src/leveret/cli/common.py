"""What all commands share: the command lines' tree, their options, and how they tell what they found."""

from __future__ import annotations

import contextlib
import json as jsonlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

Function = TypeVar("Function", bound=Callable[..., Any])

_HELP = "Build small vision-language models by choosing their data well."
_OPTIONS: dict[str, Any] = {"add_completion": False, "no_args_is_help": True, "pretty_exceptions_enable": False}

app = typer.Typer(
    help=_HELP, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}, **_OPTIONS
)
pool = typer.Typer(help="Look after pools of image-text pairs.", **_OPTIONS)
world = typer.Typer(help="The drawn world and its tiny backbones.", **_OPTIONS)
coreset = typer.Typer(help="Coresets that were made.", **_OPTIONS)
runs = typer.Typer(help="Training runs: finished, stopped, or still going.", **_OPTIONS)
tasks = typer.Typer(help="What models can be examined on, and whether its files are here.", **_OPTIONS)
study = typer.Typer(help="Designs side by side, over seeds, beside what papers found.", **_OPTIONS)

MAKE, LOOK, NOUNS = "Make", "Look and ask", "Look after"

Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to fill; the same command goes on where it stopped.")]
Images = Annotated[Path | None, typer.Option("--images", help="The one folder that image paths start from.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Changes to the recipe.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, the rest on stderr.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes or threads; all cores by default.")]
Executor = Annotated[str, typer.Option(help="Where tasks run: local, ray, or ray:ADDRESS; changes no result.")]
LimitShare = Annotated[float, typer.Option(min=0, max=1, help="Stop when a larger share of the samples is unusable.")]
Source = Annotated[
    str, typer.Argument(help="LLaVA JSON, tars, parquet, a folder of save_to_disk, or of images with captions.")
]
Own = Annotated[
    list[Path] | None,
    typer.Option("--own", help="A Python file that a part of the model is built by: it may run. Also LEVERET_OWN."),
]
AllowChange = Annotated[
    bool, typer.Option("--allow-change", help="Go on although recipe, data or tokenizer changed; each is noted.")
]
Run = Annotated[Path, typer.Argument(help="The folder of a training run.")]
JudgeUrl = Annotated[str | None, typer.Option("--judge", help="An OpenAI-compatible endpoint: http://HOST/v1.")]
JudgeModel = Annotated[str | None, typer.Option(help="The judge's name there; by default the published one.")]
JudgeKey = Annotated[str | None, typer.Option(help="The environment variable that holds the key.")]
JudgeCache = Annotated[Path | None, typer.Option(help="Where replies are kept; by default beside the answers.")]
Replay = Annotated[Path | None, typer.Option(help="Replies on disk: ours, a batch's, or the benchmark's own.")]
AtOnce = Annotated[int, typer.Option(min=1, help="Requests to an endpoint at once.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
LoadIn = Annotated[
    str | None, typer.Option("--load-in", help="8bit or 4bit: the language model in few bits, on a GPU (bitsandbytes).")
]
EmbedPrecision = Annotated[
    str, typer.Option("--precision", help="Of the encoder: auto (bf16 where native), fp32, bf16.")
]


def present(module: str) -> bool:
    """Whether a module of ours is there, found by its file: asking the import system would import its package."""
    place = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def verb(name: str, needs: str, panel: str = MAKE, group: typer.Typer = app) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        if present(needs):
            group.command(name, rich_help_panel=None if group is not app else panel)(function)
        return function

    return register


@contextlib.contextmanager
def reporting(json: bool) -> Iterator[None]:
    """Keep stdout for the one JSON object: whatever a station prints meanwhile goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        yield


def tell(json: bool, facts: dict[str, Any], text: str = "") -> None:
    if json:
        print(jsonlib.dumps(facts, indent=2, default=str))
    elif text:
        print(text)


def tell_plan(json: bool, facts: dict[str, Any], more: Sequence[str] = ()) -> None:
    """What a dry run found out, one fact a line; and `more`, which is the fact `estimate` in words."""
    lines = ["would do, but this is a dry run:"]

    def add(facts: dict[str, Any], indent: str) -> None:
        width = max((len(name) for name in facts), default=0)
        for name, value in facts.items():
            if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
                lines.append(f"{indent}{name}")
                add(value, indent + "  ")
                continue
            if isinstance(value, dict):
                value = ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
            elif isinstance(value, int):
                value = f"{value:,}"
            lines.append(f"{indent}{name:<{width}}  {value}")

    add({name: value for name, value in facts.items() if name != "estimate"}, "  ")
    tell(json, facts, "\n".join([*lines, *more]))


def allow_own(files: list[Path] | None) -> None:
    """The person says that these files of their own may run."""
    if files:
        from leveret.own import allow

        allow(files)


def _version(asked: bool) -> None:
    if asked:
        from leveret import __version__

        print(f"leveret {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    pass


def left_out(reasons: dict[str, int], label: str = "refused") -> list[str]:
    """One line for each reason, the most frequent first: nothing leaves a pool in silence."""
    return [f"  {count:,} {label}: {reason}" for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1])]
