"""Commands that examine: eval, score, compare, and those about tasks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from leveret.cli.common import (
    AtOnce,
    DryRun,
    Json,
    JudgeCache,
    JudgeKey,
    JudgeModel,
    JudgeUrl,
    LoadIn,
    Out,
    Own,
    Replay,
    allow_own,
    reporting,
    tasks,
    tell,
    tell_plan,
    verb,
)
from leveret.runs import DataError, RecipeError


@verb("eval", "leveret.evaluate")
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
    load_in: LoadIn = None,
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
    allow_own(own)
    rules = dict(_pair(given) for given in rule or ())
    if task is not None and suite is not None:
        raise RecipeError(f"--suite {suite} and --task {task}: give one of the two")
    suite = task or suite or "world"
    from leveret.runs import bytes_of

    allowed = None if memory is None else bytes_of(memory)
    chosen: dict[str, Any] = {
        "n": n, "split": split, "rules": rules, "prompts": prompts, "how": how, "skip_missing": skip_missing,
    }  # fmt: skip
    from leveret.evaluate import evaluate as station
    from leveret.evaluate.judges import open_judge
    from leveret.generate.helpers import Helpers
    from leveret.generate.others import open_other

    if int(os.environ.get("RANK", "0")):  # started by torchrun: its first process answers, with helpers of its own
        return
    workers = workers or int(os.environ.get("WORLD_SIZE", "0")) or None
    judging = open_judge(
        out / "answers", url=judge, model=judge_model, key_env=judge_key, cache=judge_cache, replay=replay,
        parallel=at_once,
    )  # fmt: skip
    if dry_run:
        with reporting(json):
            facts = _look_ahead(model, model_key, at_once, data, suite, out, blind, load_in, chosen)
        return tell_plan(json, facts)
    helpers = Helpers() if workers is None else Helpers(workers - 1, least=1)
    with reporting(json), helpers:
        other = open_other(model, key_env=model_key, parallel=at_once)
        subject = _examined(model, other, load_in)
        results = station(
            subject, data, suite, out=out, blind=blind, engine=other, judge=judging, memory=allowed, helpers=helpers,
            **chosen,
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
    tell(json, results, f"everything is in {out}; the page is {out / 'report.html'}")


def _look_ahead(
    model: str,
    model_key: str | None,
    at_once: int,
    data: Path,
    suite: str,
    out: Path,
    blind: bool,
    load_in: str | None,
    chosen: dict[str, Any],
) -> dict[str, Any]:
    """What would be asked. What the examination would refuse before it loads the model is refused; no model is loaded
    or downloaded for a look."""
    from leveret.evaluate.plan import Plan
    from leveret.evaluate.run import fingerprint_of
    from leveret.generate.others import look_ahead, open_other
    from leveret.model import hub
    from leveret.model.source import locate

    plan, name = Plan.of(data, suite, **chosen), None
    foreign = look_ahead(model)
    other = None if foreign else open_other(model, key_env=model_key, parallel=at_once)
    if load_in is not None:
        _check_bits(model, load_in, foreign or other is not None)
    if other is not None:
        name = fingerprint_of(other)
    elif not foreign and (Path(model).expanduser().exists() or hub.as_id(model) is None):
        folder = locate(model).folder
        # Weights in few bits are told apart by what they are loaded as.
        name = None if load_in else fingerprint_of(folder)
    facts: dict[str, Any] = plan.look_ahead(out, name, blind)
    return facts | {task: f"skipped, {record['state']}" for task, record in plan.skipped.items()}


def _examined(model: str, other: Any, load_in: str | None) -> Any:
    """What is examined: a folder's name, what answers for another's, or a model that is loaded in few bits already."""
    if load_in is None:
        return other or model
    _check_bits(model, load_in, other is not None)
    from leveret.generate import load

    return load(model, load_in=load_in)


def _check_bits(model: str, load_in: str, others: bool) -> None:
    """RecipeError or EnvironmentFault where the model cannot be loaded in so few bits here."""
    if others:
        raise RecipeError(f"--load-in {load_in}: {model} is not run by leveret itself; leave it out")
    from leveret.generate.model import check_bits

    check_bits(load_in)


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


@verb("score", "leveret.evaluate")
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

        with reporting(json):
            written = submit(task, answers, data, submission, split=split)
        return tell(json, {"task": task, "submission": str(written)}, f"{written}: the file for {task}'s server")
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
        return tell_plan(json, facts)
    with reporting(json):
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
    tell(json, result, "\n".join(lines))


def _figure(value: Any) -> str:
    """A metric for reading: rounded, and a table of them on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_figure(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(_figure(item) for item in value)
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@verb("compare", "leveret.evaluate")
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

    with reporting(json):
        found = station(a, b)
        if out is not None:
            from leveret.evaluate.compare_page import write_page

            found["page"] = str(write_page(found, out, data))
    tell(json, found, "\n".join([*lines(found), *([f"the page is {found['page']}"] if out else [])]))


@verb("list", "leveret.evaluate.prepare", group=tasks)
def tasks_list(
    data: Annotated[Path | None, typer.Option(help="The folder that is looked at.")] = None,
    task: Annotated[str | None, typer.Option(help="A task of your own too: my.yaml.")] = None,
    json: Json = False,
) -> None:
    """All tasks and suites: what each asks, its rules, what is on disk."""
    from leveret.evaluate.prepare import overview

    with reporting(json):
        found = overview(data, task)
    if json:
        return tell(json, found)
    for row in found["tasks"]:
        here = "" if row["here"] is None else f"  [{', '.join(row['here']) or 'not here'}]"
        print(f"{row['id']:<14} {row['asks']}{here}")
        print(f"{'':<14} rules: {', '.join(row['rules'])}" + (f"; in {', '.join(row['suites'])}" * bool(row["suites"])))
    print("\nsuites")
    for name, entries in found["suites"].items():
        print(f"  {name:<12} {', '.join(entries)}")


@verb("prepare", "leveret.evaluate.prepare", group=tasks)
def tasks_prepare(
    data: Annotated[Path, typer.Argument(help="The folder with the official files; each task in a folder of its id.")],
    suite: Annotated[str, typer.Option(help="A suite, or one task.")] = "bunny",
    split: Annotated[str, typer.Option(help="The part that is asked about.")] = "test",
    json: Json = False,
) -> None:
    """Check the official files that you fetched: what is missing, where it is published, where it belongs.

    Exit code 3 where something is not ready."""
    from leveret.evaluate.prepare import check

    with reporting(json):
        found = check(data, suite, split)
    ready = all(record["state"] == "ready" for record in found)
    lines = []
    for record in found:
        size = f"  {record['questions']:,} questions, {record['pictures']:,} pictures" if "questions" in record else ""
        lines.append(f"{record['task']:<16} {record['state']}{size}")
        lines += [f"  {record['mend']}"] if "mend" in record else []
    tell(json, {"data": str(data), "suite": suite, "ready": ready, "tasks": found}, "\n".join(lines))
    if not ready:
        raise typer.Exit(DataError.exit_code)
