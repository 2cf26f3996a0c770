"""The command line: thin verbs, one place that turns exceptions into a clear line and an exit code.

    leveret VERB thing key.path=value ... -o OUT

Exit codes: 0 done; 1 our fault (with a traceback and a request to report it); 2 usage or recipe; 3 data;
4 interrupted and resumable, Ctrl-C too; 5 environment (disk, memory, network, a missing extra).
A station is imported inside its verb, so `--help` is quick; a verb whose station is not installed does not appear.
`--json` puts one JSON object on stdout and everything else on stderr.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json as jsonlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import typer

from leveret.runs import DataError, EnvironmentFault, RecipeError, UserError

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
EmbedPrecision = Annotated[
    str, typer.Option("--precision", help="Of the encoder: auto (bf16 where native), fp32, bf16.")
]


def _present(module: str) -> bool:
    """Whether a module of ours is there, found by its file: asking the import system would import its package."""
    place = Path(__file__).parent.joinpath(*module.split(".")[1:])
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def _verb(name: str, needs: str, panel: str = MAKE, group: typer.Typer = app) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        if _present(needs):
            group.command(name, rich_help_panel=None if group is not app else panel)(function)
        return function

    return register


@contextlib.contextmanager
def _reporting(json: bool) -> Iterator[None]:
    """Keep stdout for the one JSON object: whatever a station prints meanwhile goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        yield


def _report(json: bool, facts: dict[str, Any], text: str = "") -> None:
    if json:
        print(jsonlib.dumps(facts, indent=2, default=str))
    elif text:
        print(text)


def _plan(json: bool, facts: dict[str, Any], more: Sequence[str] = ()) -> None:
    """What a dry run found out, one fact a line; and `more`, which is the fact `estimate` in words."""
    lines = ["would do, but this is a dry run:"]

    def tell(facts: dict[str, Any], indent: str) -> None:
        width = max((len(name) for name in facts), default=0)
        for name, value in facts.items():
            if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
                lines.append(f"{indent}{name}")
                tell(value, indent + "  ")
                continue
            if isinstance(value, dict):
                value = ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
            elif isinstance(value, int):
                value = f"{value:,}"
            lines.append(f"{indent}{name:<{width}}  {value}")

    tell({name: value for name, value in facts.items() if name != "estimate"}, "  ")
    _report(json, facts, "\n".join([*lines, *more]))


def _allow(files: list[Path] | None) -> None:
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


# --- verbs that make ------------------------------------------------------------------------------------------------


@_verb("quickstart", "leveret.quickstart")
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
    with _reporting(json):
        folder = station.run(out, seed=seed, overrides=given, full=full, dry_run=dry_run)
    results = folder / "results.json"
    found = jsonlib.loads(results.read_text("utf-8")) if results.is_file() and not dry_run else {}
    _report(json, {"out": str(folder), **found})


@_verb("embed", "leveret.condense")
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
        return _plan(json, {"samples": n, "shards": -(-n // shard), "encoder": encoder, "out": str(out)})
    from leveret.condense import embed as station

    with _reporting(json):
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
    lines = [f"{made['length']:,} samples: {made['length'] - sum(refused.values()):,} embedded", *_left_out(refused)]
    lines += [f"the refused ones stand in {folder / 'quarantine.jsonl'}"] if refused else []
    facts = {"out": str(folder), "samples": made["length"], "refused": refused}
    _report(json, facts, "\n".join([*lines, f"the embeddings are in {folder}"]))


def _left_out(reasons: dict[str, int], label: str = "refused") -> list[str]:
    """One line for each reason, the most frequent first: nothing leaves a pool in silence."""
    return [f"  {count:,} {label}: {reason}" for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1])]


@_verb("condense", "leveret.condense")
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
        with _reporting(json):
            told = _condense_plan(source, out, overrides or [], recipe, images, encoder, against or [], how)
        return _plan(json, *told)
    from leveret.condense import condense as station

    with _reporting(json):
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
        lines += _left_out(reasons, "refused" if label == "read" else f"left out by {label}")
    for name, met in next((stage["against"] for stage in facts["funnel"] if "against" in stage), {}).items():
        lines += [
            f"  {met['met']:,} near one of the {met['images']:,} images of {name}: {folder / 'contaminated.parquet'}"
        ]
        lines += [f"  {met['refused']:,} images of {name} could not be read"] if met["refused"] else []
    from leveret.condense.border import in_words

    lines += [f"borders of clusters: {in_words(step['border'])}" for step in facts["funnel"] if "border" in step]
    lines += [f"the fate of each stands in {folder / 'ledger'}"]
    lines += [f"the coreset is {folder / 'coreset.json'}, the report {folder / 'report.html'}"]
    _report(json, {"out": str(folder), **facts}, "\n".join(lines))


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


@_verb("train", "leveret.train")
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

        return _report(json, {"out": str(folder), "dry_run": True, "stages": facts(recipe, given, stage)})
    with _reporting(json):
        model = station(recipe, folder, given, dry_run=dry_run, stages=stage, allow_change=allow_change)
    _report(json, {"model": str(model)}, "" if dry_run else f"the model is in {model}")


@_verb("eval", "leveret.evaluate")
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A model's folder, a run's, an id of the hub, openai:URL#MODEL, or hf:FOLDER.")
    ],
    data: Annotated[Path, typer.Argument(help="The folder with the suite's official files and pictures.")],
    out: Out,
    suite: Annotated[str | None, typer.Option(help="A suite, or one task.", show_default="world")] = None,
    task: Annotated[str | None, typer.Option(help="One task: its id, or a YAML file of your own (my.yaml).")] = None,
    split: Annotated[str, typer.Option(help="The part that is asked about.")] = "test",
    n: Annotated[int | None, typer.Option("-n", min=1, help="At most so many questions a task.")] = None,
    blind: Annotated[bool, typer.Option(help="Ask every question with another picture too.")] = True,
    prompts: Annotated[str | None, typer.Option(help="Ask in the words of another lineage: prismatic.")] = None,
    how: Annotated[str, typer.Option("--subset", help="Which -n: hash, or prismatic for its slim sets.")] = "hash",
    rule: Annotated[
        list[str] | None, typer.Option(help="Score a task by another of its rules: pope=lmms_eval (again for more).")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What answering may take beside the weights, such as 2GB; changes no answer.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that answer, on a CPU; one a core where there are many questions."),
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Ask a suite without the tasks whose files are not here.")
    ] = False,
    own: Own = None,
    model_key: Annotated[str | None, typer.Option(help="The environment variable with the key of openai:URL.")] = None,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_key: JudgeKey = None,
    judge_cache: JudgeCache = None,
    replay: Replay = None,
    at_once: AtOnce = 8,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Examine a model: scores, intervals, baselines, a page."""
    _allow(own)
    rules = dict(_pair(given) for given in rule or ())
    if task is not None and suite is not None:
        raise RecipeError(f"--suite {suite} and --task {task}: give one of the two")
    suite = task or suite or "world"
    from leveret.runs import bytes_of

    allowed = None if memory is None else bytes_of(memory)
    if dry_run:
        from leveret.evaluate.prepare import questions_of

        counts, skipped = questions_of(suite, data, split, skip=skip_missing)
        facts: dict[str, Any] = {task: count if n is None else min(n, count) for task, count in counts.items()}
        return _plan(json, facts | {task: f"skipped, {record['state']}" for task, record in skipped.items()})
    from leveret.evaluate import evaluate as station
    from leveret.evaluate.judges import open_judge
    from leveret.generate.helpers import Helpers
    from leveret.generate.others import open_other

    if int(os.environ.get("RANK", "0")):  # started by torchrun: its first process answers, with helpers of its own
        return
    workers = workers or int(os.environ.get("WORLD_SIZE", "0")) or None
    helpers = Helpers() if workers is None else Helpers(workers - 1, least=1)
    judging = open_judge(
        out / "answers", url=judge, model=judge_model, key_env=judge_key, cache=judge_cache, replay=replay,
        parallel=at_once,
    )  # fmt: skip
    with _reporting(json), helpers:
        other = open_other(model, key_env=model_key, parallel=at_once)
        results = station(
            other or model, data, suite, out=out, blind=blind, engine=other, n=n, split=split, rules=rules,
            judge=judging, memory=allowed, prompts=prompts, how=how, helpers=helpers, skip_missing=skip_missing,
        )  # fmt: skip
    if not json:
        _print_scores(results)
        _print_memory(results.get("memory"))
    for task, record in results.get("skipped", {}).items():
        print(f"{task} was skipped: {record['state']}: {record['mend']}", file=sys.stderr)
    for task, left in results.get("unscored", {}).items():
        print(
            f"{task}: {left['n']:,} answers are in {left['answers']}; the right ones are not public. For the server: "
            f"leveret score {task} {left['answers']} --data {data} --split {split} --submission FILE",
            file=sys.stderr,
        )
    for task, left in results.get("unjudged", {}).items():
        print(
            f"{task}: {left['n']:,} answers are in {left['answers']} and wait for a judge (--judge URL)",
            file=sys.stderr,
        )
    _report(json, results, f"everything is in {out}; the page is {out / 'report.html'}")


def _pair(given: str) -> tuple[str, str]:
    """`pope=lmms_eval` -> its two sides."""
    task, equals, name = given.partition("=")
    if not (task and equals and name):
        raise RecipeError(f"--rule {given}: give TASK=RULE, such as pope=lmms_eval")
    return task, name


def _print_memory(held: dict[str, Any] | None) -> None:
    if held is None:
        return
    size = {name: f"{value / 2**20:,.0f} MiB" for name, value in held.items() if isinstance(value, int)}
    each = "" if held["processes"] == 1 else f" in each of {held['processes']} processes"
    print(
        f"memory: at most {size['total']}{each}, beside {size['weights']} of weights: {held['slots']} answers at once "
        f"of {held['positions']} positions ({size['rows']}), a pass ({size['passes']}), images kept "
        f"({size['prefixes']} and {size['features']})"
    )


def _print_scores(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("task")
    for name in ("score", "95 % interval", "chance", "majority", "blind", "n"):
        table.add_column(name, justify="right")
    for task, row in results["tasks"].items():
        low, high = row["ci95"]
        others = ["-" if row.get(name) is None else f"{row[name]:.3f}" for name in ("chance", "majority", "blind")]
        others[1] += "*" * (row.get("majority_of") == "test")
        table.add_row(task, f"{row['score']:.3f}", f"{low:.3f} - {high:.3f}", *others, f"{row['n']:,}")
    Console().print(table)


@_verb("score", "leveret.evaluate")
def score(
    task: Annotated[str, typer.Argument(help="The task whose rule applies: its id, or a YAML file of your own.")],
    answers: Annotated[Path, typer.Argument(help="Answers: JSON lines, one JSON list, or the task's own form.")],
    data: Annotated[Path, typer.Option(help="The folder with the official files.")],
    split: Annotated[str, typer.Option(help="The part that was asked about.")] = "test",
    rule: Annotated[str | None, typer.Option(help="Another of the task's rules, by its lineage: lmms_eval.")] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Missing answers are wrong, not a fault.")
    ] = False,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_key: JudgeKey = None,
    judge_cache: JudgeCache = None,
    replay: Replay = None,
    at_once: AtOnce = 8,
    grades: Annotated[Path | None, typer.Option(help="Write what the judge said in the benchmark's own form.")] = None,
    submission: Annotated[
        Path | None, typer.Option(help="Write the file that the benchmark's server takes, and score nothing.")
    ] = None,
    price: Annotated[
        str | None, typer.Option(help="Of a million tokens asked and replied, for --dry-run: 2.5,10")
    ] = None,
    requests: Annotated[Path | None, typer.Option(help="Where --dry-run writes the requests to the judge.")] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Score a file of answers by the official rule; needs no model, but for a judge where the rule asks one."""
    from leveret.evaluate import score as station
    from leveret.evaluate.judges import Judge, open_judge, price_of

    if submission is not None:
        from leveret.evaluate.submissions import submit

        with _reporting(json):
            written = submit(task, answers, data, submission, split=split)
        return _report(json, {"task": task, "submission": str(written)}, f"{written}: the file for {task}'s server")
    judging = open_judge(
        answers, url=judge, model=judge_model, key_env=judge_key, cache=judge_cache, replay=replay, parallel=at_once
    )
    if dry_run:
        from leveret.evaluate.scoring import plan_judge

        facts = plan_judge(
            task,
            answers,
            data,
            judging or Judge(model=judge_model),
            requests or answers.with_name(f"{answers.stem}.requests.jsonl"),
            price=price_of(price) if price else None,
            split=split,
            rule=rule,
            allow_missing=allow_missing,
        )
        return _plan(json, facts)
    with _reporting(json):
        result = station(
            task, answers, data, split=split, rule=rule, allow_missing=allow_missing, judge=judging, grades_path=grades
        )
    low, high = result["ci95"]
    lines = [f"{task}: {result['score']:.4f}  (95 % interval {low:.4f} - {high:.4f}, n = {result['n']:,})"]
    odd = {name: result.get(name) for name in ("unparsable", "missing") if result.get(name)}
    lines += [f"  {name}: {count:,} of {result['n']:,}" for name, count in odd.items()]
    if told := result.get("judge"):
        which = f" ({', '.join(told['unjudged_ids'])})" if told["unjudged"] else ""
        lines.append(
            f"  judged by {told['model']} (published with {told['published_with']}): {told['requests']:,} requests, "
            f"{told['asked']:,} sent now, {told['unjudged']:,} answers unjudged{which}"
        )
    metrics = result.get("metrics", {})
    named = metrics if isinstance(metrics, dict) else {"metrics": metrics}
    lines += [f"  {name}: {_figure(value)}" for name, value in named.items()]
    _report(json, result, "\n".join(lines))


def _figure(value: Any) -> str:
    """A metric for reading: rounded, and a table of them on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_figure(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(_figure(item) for item in value)
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@_verb("compare", "leveret.evaluate")
def compare(
    a: Annotated[Path, typer.Argument(help="A folder that leveret eval filled, or one of its items files.")],
    b: Annotated[Path, typer.Argument(help="Another, of the same questions.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write a page with the answers that turned.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where the page finds pictures; by default where the first was asked.")
    ] = None,
    json: Json = False,
) -> None:
    """Is B better than A? Paired differences, tests, and the answers that turned."""
    from leveret.evaluate.compare import compare as station
    from leveret.evaluate.compare import lines

    with _reporting(json):
        found = station(a, b)
        if out is not None:
            from leveret.evaluate.compare_page import write_page

            found["page"] = str(write_page(found, out, data))
    _report(json, found, "\n".join([*lines(found), *([f"the page is {found['page']}"] if out else [])]))


# --- verbs that look ------------------------------------------------------------------------------------------------


@_verb("chat", "leveret.serve.chat", LOOK)
def chat(
    model: Annotated[str, typer.Argument(help="A model's folder, a run's, or an id of the hub (OWNER/NAME).")],
    image: Annotated[Path | None, typer.Argument(help="The picture to talk about.")] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Ask once, print the answer, and end.")] = None,
    own: Own = None,
) -> None:
    """Talk with a model about a picture."""
    _allow(own)
    from leveret.serve.chat import chat as station

    station(model, image=image, prompt=prompt)


@_verb("show", "leveret.show", LOOK)
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
    _allow(own)
    from leveret.show import show as station

    station(source, index=index, id=id, images=images, model=model, out=out, json=json)


@_verb("convert", "leveret.model.peers")
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A model of Bunny, LLaVA, TinyLLaVA, Prismatic, nanoVLM, or of ours: a folder, or OWNER/NAME."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[
        str, typer.Option(help="leveret, hf-llava, bunny, llava, tinyllava, prismatic, gguf, remote-code.")
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
    _allow(own)
    from leveret.model.peers.convert import convert as station

    with _reporting(json):
        found = station(source, out, to=to, hub=hub, base=base, dtype=dtype)
    lines = [f"{found['kind']}: {found['parameters']:,} parameters, {found['seen']}"]
    lines += [f"  {name:<10} {what}" for name, what in found["parts"].items()]
    lines += [f"  note: {note}" for note in found["notes"]]
    _report(json, found, "\n".join([*lines, f"the model is in {out}"]))


@_verb("merge", "leveret.model.merge")
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

    with _reporting(json):
        found = station.merge(models, out, weights or [], normalise=normalise, base=base, hub=hub)
    _report(json, found, f"{station.in_words(found)}\nthe model is in {out}")


@_verb("push", "leveret.model.push")
def push(
    model: Annotated[Path, typer.Argument(help="A model's folder, or a finished run's.")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Seen by its owner alone, if it is new.")] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Put a model on the Hugging Face hub, with a card."""
    from leveret.model.push import push as station

    with _reporting(json):
        found = station(model, name, private=private, dry_run=dry_run)
    lines = [f"{size:>16,} bytes  {file}" for file, size in found["files"].items()]
    if dry_run:
        lines = ["would upload, but this is a dry run:", *lines, "", found["card"]]
    else:
        lines += [f"the model is at {found['url']}; anyone who may see it loads it by leveret.load({name!r})"]
    _report(json, found, "\n".join(lines))


@_verb("doctor", "leveret.doctor", LOOK)
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
    _report(json, facts)


# --- nouns ----------------------------------------------------------------------------------------------------------


@_verb("check", "leveret.pool", group=pool)
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
        return _plan(json, {"samples": len(opened), "decode": decode, "out": str(out)})
    with _reporting(json):
        found = check(opened, out, decode=decode, limit_share=limit_share, workers=workers)
    reasons = dict(found.reasons)
    names = ("total", "ok", "quarantined", "reasons", "images", "text_only", "duplicates", "index", "quarantine")
    facts = {name: getattr(found, name) for name in names} | {"reasons": reasons}
    lines = [f"{found.total:,} samples: {found.ok:,} good, {found.quarantined:,} refused"]
    lines += [f"  {count:,}  {reason}" for reason, count in reasons.items()]
    lines += [f"the index is {found.index}, the refused ones stand in {found.quarantine}"]
    _report(json, facts, "\n".join(lines))


@_verb("convert", "leveret.pool", group=pool)
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
        return _plan(json, {"samples": len(opened), "shards": -(-len(opened) // shard_size), "out": str(out)})
    with _reporting(json):
        made = convert(opened, out, shard_size=shard_size, limit_share=limit_share, workers=workers)
    reasons = dict(made.reasons)
    names = ("total", "ok", "quarantined", "images", "shards", "size", "store")
    lines = [f"{made.total:,} samples: {made.ok:,} written, {made.quarantined:,} refused", *_left_out(reasons)]
    lines += [f"{made.images:,} images, {made.size:,} bytes in {made.shards:,} tars; the store is {made.store}"]
    _report(json, {name: getattr(made, name) for name in names} | {"reasons": reasons}, "\n".join(lines))


@_verb("list", "leveret.pool.catalogue", group=pool)
def pool_list(
    root: Annotated[Path, typer.Option("--root", help="The data root that is looked at.")] = Path("data"),
    json: Json = False,
) -> None:
    """The known data sets: samples, bytes, licences, and what is there."""
    from leveret.pool.catalogue import overview

    with _reporting(json):
        rows = overview(root)
    if not json:
        _print_sets(rows)
    _report(
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


@_verb("get", "leveret.pool.get", group=pool)
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
        return _report(json, facts | {"dry_run": True}, "nothing was fetched: this is a dry run")
    if facts["missing_bytes"] or facts["unknown_sizes"]:
        if not yes and (json or not sys.stdin.isatty()):
            raise RecipeError("nobody is there to agree to these licences and sizes; say so with --yes")
        if not yes and not typer.confirm("Fetch it, under these licences?"):
            raise typer.Exit(2)
    with _reporting(json):
        facts = station.get(name, root, pictures=pictures, lay_out=lay_out, urls=urls)
    lines = [f"{len(facts['fetched']):,} files fetched"]
    lines += [f"  {name}: {done['files']:,} files in {done['into']}" for name, done in facts["unpacked"].items()
              if "into" in done]  # fmt: skip
    lines += [f"{facts['checked']['records']:,} records in {facts['data']}"] if facts["checked"] else []
    lines += [f"{facts['urls']['rows']:,} addresses in {facts['urls']['path']}"] if "urls" in facts else []
    lines += [f"note: {note}" for note in facts["notes"]]
    lines += [f"left to you: {root / item['path']}: {item['how']}" for item in facts["by_hand"]]
    _report(json, facts, "\n".join(lines))


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


@_verb("mix", "leveret.pool.mix", group=pool)
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

    with _reporting(json):
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
    _report(json, facts, "\n".join(lines))


@_verb("recut", "leveret.condense.recut", group=coreset)
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
        return _plan(json, {"out": str(out), "done again": again})
    with _reporting(json):
        folder = recut(path, out, overrides or [], workers=workers)
    facts = jsonlib.loads((folder / "summary.json").read_text("utf-8"))
    lines = [f"done again: {', '.join(again) or 'nothing'}; the steps before are those of {path}"]
    lines += [f"{facts['input']:,} samples: {facts['kept']:,} kept", f"the coreset is in {folder}"]
    _report(json, {"out": str(folder), "redone": again, **facts}, "\n".join(lines))


@_verb("add", "leveret.condense.add", group=coreset)
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

    with _reporting(json):
        folder = add(path, new, out, workers=workers, run_on=executor)
    facts = jsonlib.loads((folder / "summary.json").read_text("utf-8"))
    added = jsonlib.loads((folder / "added.json").read_text("utf-8"))
    lines = [f"{facts['input']:,} samples: {facts['kept']:,} kept", in_words(added), f"the coreset is in {folder}"]
    _report(json, {"out": str(folder), "added": added, **facts}, "\n".join(filter(None, lines)))


@_verb("export", "leveret.condense.export", group=coreset)
def coreset_export(
    path: Annotated[Path, typer.Argument(help="A finished coreset's folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder for a store, a file for the others.")],
    kind: Annotated[str, typer.Option("--as", help="store, filter, datacomp or text.")] = "store",
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Write a coreset as tars ready for training, or as a filter for a loader that exists."""
    from leveret.condense.export import KINDS, export

    with _reporting(json):
        made = export(path, out, kind, **({"workers": workers} if workers else {}))
    counts = ", ".join(f"{value:,} {name}" for name, value in made.items() if name != "out")
    _report(json, made, f"{counts}: {made['out']} ({KINDS[kind].about})")


@_verb("verify", "leveret.condense.verify", group=coreset)
def coreset_verify(
    path: Annotated[Path, typer.Argument(help="A coreset's folder.")],
    clusters: Annotated[int, typer.Option(min=1, help="How many clusters to look at again.")] = 20,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 0,
    json: Json = False,
) -> None:
    """Look at some clusters again in float64, all pairs and all centroids, and say how close it was."""
    from leveret.condense.verify import verify

    with _reporting(json):
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
    _report(json, found, "\n".join(lines))
    if any(wrong.values()):
        raise typer.Exit(1)


@_verb("report", "leveret.train.report", group=runs)
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
    _report(json, {"page": str(page), **story.facts()}, f"the page is {page}")


@_verb("resume", "leveret.train", group=runs)
def run_resume(path: Run, allow_change: AllowChange = False, json: Json = False) -> None:
    """Go on with a run: its own command again, in the folder it was given in."""
    from leveret.train.story import again

    with _reporting(json):
        model = again(path, allow_change=allow_change)
    _report(json, {"model": str(model)}, f"the model is in {model}")


@_verb("list", "leveret.evaluate.prepare", group=tasks)
def tasks_list(
    data: Annotated[Path | None, typer.Option(help="The folder that is looked at.")] = None,
    task: Annotated[str | None, typer.Option(help="A task of your own too: my.yaml.")] = None,
    json: Json = False,
) -> None:
    """All tasks and suites: what each asks, its rules, what is on disk."""
    from leveret.evaluate.prepare import overview

    with _reporting(json):
        found = overview(data, task)
    if json:
        return _report(json, found)
    for row in found["tasks"]:
        here = "" if row["here"] is None else f"  [{', '.join(row['here']) or 'not here'}]"
        print(f"{row['id']:<14} {row['asks']}{here}")
        print(f"{'':<14} rules: {', '.join(row['rules'])}" + (f"; in {', '.join(row['suites'])}" * bool(row["suites"])))
    print("\nsuites")
    for name, entries in found["suites"].items():
        print(f"  {name:<12} {', '.join(entries)}")


@_verb("prepare", "leveret.evaluate.prepare", group=tasks)
def tasks_prepare(
    data: Annotated[Path, typer.Argument(help="The folder with the official files; each task in a folder of its id.")],
    suite: Annotated[str, typer.Option(help="A suite, or one task.")] = "bunny",
    split: Annotated[str, typer.Option(help="The part that is asked about.")] = "test",
    json: Json = False,
) -> None:
    """Check the official files that you fetched: what is missing, where it is published, where it belongs.

    Exit code 3 where something is not ready."""
    from leveret.evaluate.prepare import check

    with _reporting(json):
        found = check(data, suite, split)
    ready = all(record["state"] == "ready" for record in found)
    lines = []
    for record in found:
        size = f"  {record['questions']:,} questions, {record['pictures']:,} pictures" if "questions" in record else ""
        lines.append(f"{record['task']:<16} {record['state']}{size}")
        lines += [f"  {record['mend']}"] if "mend" in record else []
    _report(json, {"data": str(data), "suite": suite, "ready": ready, "tasks": found}, "\n".join(lines))
    if not ready:
        raise typer.Exit(DataError.exit_code)


@_verb("draw", "leveret.world.write", group=world)
def world_draw(
    out: Out,
    seed: Annotated[int, typer.Option(help="Another seed is another world.")] = 0,
    web: Annotated[int | None, typer.Option(min=1, help="Image-text pairs of the web pool.")] = None,
    tune: Annotated[int | None, typer.Option(min=1, help="Conversations to tune with.")] = None,
    test: Annotated[int | None, typer.Option(min=1, help="Questions a task in the examination.")] = None,
    harder: Annotated[int | None, typer.Option(min=0, help="Questions a task on each kind of harder picture.")] = None,
    strength: Annotated[str, typer.Option(help="Of the web's diseases: mild, usual or severe.")] = "usual",
    workers: Workers = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Draw a web pool, conversations and an examination."""
    from dataclasses import asdict

    from leveret.world.write import WorldSize, draw, same_world

    counts = {"web": web, "tune": tune, "test": test, "harder": harder}
    given = {name: value for name, value in counts.items() if value is not None}
    size = WorldSize(strength=strength, **given)  # type: ignore[arg-type]
    if dry_run:
        same_world(out, seed, size)
        return _plan(json, {"out": str(out), "seed": seed, **asdict(size)})
    with _reporting(json):
        folder = draw(out, seed=seed, size=size, workers=workers)
    _report(json, {"out": str(folder), "seed": seed, **asdict(size)}, f"the world is in {folder}")


@_verb("backbones", "leveret.world.backbones", group=world)
def world_backbones(
    out: Out,
    seed: Annotated[int, typer.Option(help="Of the world and the weights.")] = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train the tiny encoders and language model anew."""
    if dry_run:
        return _plan(
            json, {"out": str(out), "seed": seed, "what": "train the tiny encoders and the tiny language model"}
        )
    from leveret.world.backbones import build

    with _reporting(json):
        folder = build(out, seed=seed)
    _report(json, {"out": str(folder), "seed": seed}, f"the backbones are in {folder}")


for _group, _name in ((pool, "pool"), (coreset, "coreset"), (runs, "run"), (tasks, "tasks"), (world, "world")):
    if _group.registered_commands:
        app.add_typer(_group, name=_name, rich_help_panel=NOUNS)


# --- exceptions -> one line and an exit code ------------------------------------------------------------------------

_EXTRAS = {
    "fastapi": "serve",
    "uvicorn": "serve",
    "ray": "ray",
    "tensorboard": "track",
    "wandb": "track",
    "bitsandbytes": "quant",
    "gguf": "gguf",
}
_NETWORK = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp")
_AGAIN = "interrupted; what was finished is kept, run the same command again to go on"


def explain(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the line for a person; None when the fault is ours."""
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 4, _AGAIN
    if isinstance(error, BrokenPipeError):
        return 4, ""  # whoever read our output has gone; there is nobody to tell
    if any(kind.__name__ == "StrictDataclassError" for kind in type(error).__mro__):  # how transformers reads configs
        return DataError.exit_code, f"a model's config.json holds what it may not: {' '.join(str(error).split())}"
    homes = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if homes & set(_NETWORK):
        return EnvironmentFault.exit_code, f"the model hub or the network did not answer as hoped: {_first_line(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "leveret":
        package = error.name.partition(".")[0]
        extra = _EXTRAS.get(package)
        mend = f"pip install 'leveret[{extra}]'" if extra else "install leveret again: pip install leveret"
        return EnvironmentFault.exit_code, f"the package {package!r} is not installed. To mend it: {mend}"
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        return _explain_os(error)
    if isinstance(error, (ConnectionError, TimeoutError)):
        return EnvironmentFault.exit_code, f"no connection: {_first_line(error)}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            EnvironmentFault.exit_code,
            f"out of memory: {_first_line(error)}. A smaller batch or micro_batch needs less.",
        )
    if type(error).__name__ == "BrokenProcessPool":
        return (
            EnvironmentFault.exit_code,
            "a worker process was killed, most often for want of memory; try fewer workers",
        )
    return None


def _explain_os(error: OSError) -> tuple[int, str]:
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentFault.exit_code, f"the disk is full{where}. Free some space and run the same command again."
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)) and error.filename:
        return DataError.exit_code, f"{(error.strerror or 'not usable').lower()}{where}"
    if isinstance(error, PermissionError):
        return EnvironmentFault.exit_code, f"not allowed{where} ({error.strerror})"
    return EnvironmentFault.exit_code, f"{_first_line(error)}{where if error.strerror is None else ''}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _say(text: str) -> None:
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    head = "\033[31merror:\033[0m" if colour else "error:"
    print(f"{head} {text}", file=sys.stderr, flush=True)


def _say_our_fault(error: BaseException, args: Sequence[str]) -> None:
    import platform
    import shlex
    import traceback

    from leveret import __version__

    traceback.print_exception(error, file=sys.stderr)
    _say(
        "this is a fault in leveret, not in what you gave. Please report it with the lines above, and with:\n"
        f"  leveret {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"  leveret {shlex.join(args)}"
    )


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code. Every exception ends here."""
    try:
        command = typer.main.get_command(app)
        # Not `command.main`: it has its own ideas about Ctrl-C and broken pipes.
        with command.make_context("leveret", list(args)) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as end:
        return end.exit_code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except BaseException as error:
        if hasattr(error, "format_message") and hasattr(error, "show"):  # a usage error, of whichever click typer uses
            error.show(sys.stderr)
            return 2
        if isinstance(error, typer.Abort):
            error = KeyboardInterrupt()
        explained = explain(error)
        if explained is None:
            _say_our_fault(error, args)
            return 1
        code, text = explained
        if isinstance(error, BrokenPipeError):
            # Python flushes stdout once more as it ends; give it somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif text:
            if os.environ.get("LEVERET_TRACEBACK"):
                import traceback

                traceback.print_exception(error, file=sys.stderr)
            _say(text)
        return code


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The console script."""
    code = 1
    # Registered first, so it runs last. What else an interpreter does at its end is to free every object one by one,
    # which takes most of a second once torch is there.
    atexit.register(lambda: _leave(code))
    signal.signal(signal.SIGTERM, _terminated)
    # Idle OpenMP threads sleep instead of spinning: no slower alone, and many times faster when cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # a second Ctrl-C while the first was being told
        code = 4
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nor may one cut short the end, and with it the exit code
    sys.exit(code)


def _leave(code: int) -> None:
    """Ends the process at once; what was said is out."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
