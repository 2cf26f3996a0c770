"""Examine a model: ask every question once, ask it again with another picture, score both, write what came out.

    out/answers/<task>.jsonl         answers as they come, in LLaVA's form; a rerun asks only what is missing. Where the
                                     rule reads probabilities, they are what is asked for, and stand in it too
    out/answers/blind/<task>.jsonl   the same questions with another scene's picture
    out/items/<task>.jsonl           one line per question: gold, text, how it was read, what it earned
    out/results.json, results.md, results.tex, report.html

The order is answer, then judge: nothing is lost when the scoring or the page fails, and `score` judges the same files.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from leveret import __version__
from leveret.evaluate.baselines import Constants, chance, constants
from leveret.evaluate.desk import Answers, ask
from leveret.evaluate.forms import Item
from leveret.evaluate.judges import Judge
from leveret.evaluate.options import Answered
from leveret.evaluate.plan import Plan
from leveret.evaluate.scorers import Scorer, Verdict
from leveret.evaluate.scorers.asking import bound
from leveret.evaluate.scoring import figures, judge_all, judged, write_items
from leveret.evaluate.stats import headline
from leveret.evaluate.tasks import TaskRow, find_files, rule_of
from leveret.generate.helpers import Helpers
from leveret.runs import (
    RunFolder,
    atomic_write,
    read_jsonl,
    sha256_of,
    write_json,
)


@dataclass(frozen=True, slots=True)
class Examined:
    """One task with everything that was found out about it; what the report is drawn from.

    texts     question_id -> answer. blind: the same with another picture, or None where it was not asked.
    constants template -> the best constant answer, empty where there is none.
    """

    row: TaskRow
    scorer: Scorer
    items: list[Item]
    texts: dict[str, str]
    verdicts: list[Verdict]
    blind: list[Verdict] | None
    constants: dict[str, str]
    facts: dict[str, Any]


def evaluate(
    model: Any,
    root: str | Path,
    suite: str | TaskRow = "world",
    *,
    out: str | Path,
    blind: bool = True,
    engine: Answers | None = None,
    helpers: Helpers | None = None,
    n: int | None = None,
    split: str = "test",
    rules: Mapping[str, str] = MappingProxyType({}),
    judge: Judge | None = None,
    memory: int | None = None,
    prompts: str | None = None,
    how: str = "hash",
    skip_missing: bool = False,
) -> dict[str, Any]:
    """Examine a model on a suite (or one task) and write answers, scores, tables and a page into `out`.

    model   a model's folder or run folder, an id of the hub, or a loaded model; also what `generate.others` names
            (`openai:URL#NAME`, `hf:FOLDER`).
    root    the folder with the suite's official files and pictures.
    blind   also ask every question with another scene's picture: what is left of the score needs no eyes.
    engine  what answers; None builds `generate.Engine` on the model.
    helpers processes that answer beside this one, for a small model's folder on the CPU; None starts some when there
            are many questions. They change no answer.
    n       at most so many questions a task (always the same ones; more later continues).
    split   the part that is asked about; the best constant answer is chosen on `train`.
    rules   task -> another of its rules, by the name of its lineage. One that reads probabilities is asked for by the
            task's options, in one pass over the prompt: Prismatic's rule (vlm-evaluation, `*Scorer`), the softmax of
            the first answer token's logits over the options alone.
    judge   who judges where a rule asks a language model. Without one such a task is asked and not scored: it stands
            under `unjudged`. It has neither blind nor constant answers, for each would have to be judged too; answers
            that the judge would not judge count as wrong, and are named under `judge`.
    prompts the lineage in whose words the questions are put (`prismatic`); without it the task's own, but a rule over
            probabilities asks in its lineage's, which offer the options.
    how     which `n`: see `tasks.subset` ("hash", or "prismatic" for its slim sets).
    skip_missing
            ask a suite without those of its tasks whose files or pictures are not there (or not readable); they stand
            under `skipped`, each with what would mend it. Once they are there, the same call asks them too.
    memory  bytes that answering may take beside the weights, of all processes together; see `generate.memory`.

    Questions whose right answers are not public are asked and not scored: their task stands under `unscored`, and
    `submissions.submit` writes the file for the benchmark's server.

    Returns what is in results.json: `{"tasks": {id: {"score", "n", "ci95", "majority", "blind", ...}}, "seconds"}`.
    `majority` is of the train twin where `majority_of` says "train", else the best constant over the scored questions
    ("test"). `chance`, `majority` and `blind` are None where nothing is offered, no answer is known, nothing to swap.
    A task's `version` is the hash of its row, `prompts` of the words asked, `data` of the official files; `model` tells
    models apart, `root` is where the pictures were, and `memory` (`generate.memory.Plan`, of one process, and how many
    `processes`) is there where the engine tells it.

    Raises:
        RecipeError: unknown suite, `out` holds answers of another model or to other questions, a rule reads
            probabilities and the task has no options, or `memory` is too little for one answer.
        DataError: files or pictures are missing or malformed.
        Interrupted: stopped by Ctrl-C or SIGTERM; the same command continues.
    """
    plan = Plan.of(root, suite, n=n, split=split, rules=rules, prompts=prompts, how=how, skip_missing=skip_missing)
    if isinstance(model, (str, Path)) and engine is None:
        from leveret.generate.others import open_other

        if (other := open_other(str(model))) is not None:
            model = engine = other
    if isinstance(model, (str, Path)):
        from leveret.model.source import locate

        model = locate(model).folder
    fingerprint = fingerprint_of(model)
    folder = plan.open(out, fingerprint)
    rows, asked, unscored = plan.rows, plan.asked, plan.unscored()
    desks = plan.desks(folder.path, fingerprint, blind)
    held: list[Any] = []
    with Helpers() if helpers is None else nullcontext(helpers) as crew:

        def answers() -> Answers:
            held[:] = held or [engine or _engine(model, crew, memory)]
            return held[0]

        for swapped in (False, True):
            ask([desk for desk in desks if desk.blind is swapped], answers, folder)
    for desk in desks:
        desk.settle()

    start = time.perf_counter()
    answered = {(desk.row.id, desk.blind): desk.answered() for desk in desks}
    unjudged = [row for row in rows if row.id in plan.judged and judge is None]
    examined = [
        _examine(
            row,
            plan.rules.get(row.id),
            root,
            plan.splits[row.id],
            asked[row.id],
            answered[row.id, False],
            answered.get((row.id, True)),
            judge,
        )
        for row in rows
        if row not in unjudged and row not in unscored
    ]
    seconds = _seconds(folder)
    results: dict[str, Any] = {
        "tasks": {task.row.id: task.facts for task in examined},
        "seconds": seconds,
        "suite": plan.name,
        "model": fingerprint,
        "root": str(Path(root).absolute()),
        "leveret": __version__,
    }
    if plan.skipped:
        results["skipped"] = plan.skipped
    for kind, some in (("unjudged", unjudged), ("unscored", unscored)):
        if some:
            results[kind] = {
                row.id: {"n": len(asked[row.id]), "answers": str(folder.path / "answers" / f"{row.id}.jsonl")}
                for row in some
            }
    if memory_plan := getattr(held[0], "plan", None) if held else None:
        results["memory"] = {**memory_plan.facts(), "processes": getattr(held[0], "processes", 1), "allowed": memory}
    for task in examined:
        write_items(
            folder.path / "items" / f"{task.row.id}.jsonl",
            task.scorer,
            task.items,
            task.texts,
            task.verdicts,
            task=task.row.id,
            rule=task.facts["rule"],
            headline=task.facts["headline"],
        )
    from leveret.evaluate.report import report
    from leveret.evaluate.tables import latex, markdown

    seconds["score"] = round(time.perf_counter() - start, 3)
    write_json(folder.path / "results.json", results)
    atomic_write(folder.path / "results.md", markdown(results))
    atomic_write(folder.path / "results.tex", latex(results))
    atomic_write(folder.path / "report.html", report(examined, results, split=split))
    return results


def fingerprint_of(model: Any) -> str:
    """What tells two models apart: the bytes of a model folder, or of a loaded model's weights."""
    if isinstance(model, (str, Path)):
        return sha256_of(Path(model))[:16]
    known = getattr(model, "fingerprint", None)
    if isinstance(known, str):
        return known
    import hashlib

    import torch

    vlm = getattr(model, "vlm", model)
    digest = hashlib.sha256(repr((vlm.chat, vlm.spec)).encode())
    for name, tensor in sorted(vlm.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _engine(model: Any, helpers: Helpers, memory: int | None) -> Answers:
    from leveret.generate import Engine, Model, load
    from leveret.generate.crew import Crew
    from leveret.model.threads import threads_for

    loaded = load(model) if isinstance(model, (str, Path)) else model
    vlm = loaded.vlm if isinstance(loaded, Model) else loaded
    # In float32 an answer does not depend on its company in a batch, so a run that was stopped and continued gives the
    # same answers. Small models on the CPU lose little by it; large ones keep the precision they were loaded with.
    if threads_for(vlm) != 1:
        return loaded.engine if isinstance(loaded, Model) and memory is None else Engine(vlm, memory=memory)
    alone = Engine(vlm, precision="fp32", memory=memory, threads=1)  # a helper stands on every other core
    return Crew(alone, model, helpers) if isinstance(model, (str, Path)) else alone


def _seconds(folder: RunFolder) -> dict[str, float]:
    """Time spent answering, over all runs that filled this folder (a killed run's own time is not known)."""
    metrics = folder.path / "metrics.jsonl"
    lines = read_jsonl(metrics) if metrics.exists() else []
    spent = {"answer": 0.0, "blind": 0.0}
    for line in lines:
        spent["blind" if line["blind"] else "answer"] += line["seconds"]
    return {name: round(value, 3) for name, value in spent.items()}


def _examine(
    row: TaskRow,
    rule: str | None,
    root: str | Path,
    split: str,
    items: list[Item],
    answered: Answered | None,
    blind: Answered | None,
    judge: Judge | None,
) -> Examined:
    assert answered is not None
    name, scorer = rule_of(row, rule)
    read = answered.read
    told: dict[str, Any] = {}
    if scorer.judging is not None:
        replies, told = judged(row, scorer.judging, items, read, judge, allow_missing=True)
        scorer = bound(scorer, replies)
    verdicts = judge_all(scorer, items, read)
    facts = figures(row, name, items, verdicts)
    head = {name: facts.pop(name) for name in ("score", "n", "ci95")}

    if scorer.judging is None:
        best = constants(row, root, scorer, items)
    else:
        best = Constants(why="a judge would have to be asked about every constant answer")
    guesses = {i.question_id: best.answers.get(i.template, best.answers[""]) for i in items} if best.answers else {}
    guessed = judge_all(scorer, items, guesses) if guesses else None

    blind_verdicts = None
    if blind is not None:
        # A question without a picture was not asked again: it has no eyes to lose.
        blind_verdicts = judge_all(scorer, items, {**read, **blind.read})
    facts = {
        **head,
        "majority": headline(facts["headline"], items, guessed) if guessed else None,
        "blind": headline(facts["headline"], items, blind_verdicts) if blind_verdicts else None,
        "chance": chance(facts["headline"], items, scorer),
        "majority_of": best.of,
        **facts,
        "words": sum(len(answered.texts[item.question_id].split()) for item in items) / len(items),
        **told,
        "version": _version(row),
        "prompts": sha256_of([[item.question_id, item.prompt] for item in items])[:16],
        "data": _data_hash(row, root, split),
        "split": split,
        "templates": _by_template(items, verdicts, guessed, blind_verdicts, best.answers),
    }
    if best.why is not None:
        facts["majority_absent"] = best.why
    return Examined(row, scorer, items, answered.texts, verdicts, blind_verdicts, dict(best.answers), facts)


def _version(row: TaskRow) -> str:
    """Of all that the row says; a function that tells options is known by its name."""
    options = row.options
    return sha256_of(asdict(replace(row, options=(options.__qualname__,) if callable(options) else options)))[:16]


def _data_hash(row: TaskRow, root: str | Path, split: str) -> str:
    """Of the names and bytes of the files that hold the questions; pictures are not in it."""
    home, files = find_files(row, root, split)
    return sha256_of([[path.relative_to(home).as_posix(), sha256_of(path)] for path in files])[:16]


def _by_template(
    items: Sequence[Item],
    verdicts: Sequence[Verdict],
    guessed: Sequence[Verdict] | None,
    blind: Sequence[Verdict] | None,
    constants: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """Per wording: how many, accuracy, and what the constant answer and the blind model get there."""
    table = {}
    for name in sorted({item.template for item in items}):
        at = [k for k, item in enumerate(items) if item.template == name]

        def over(some: Sequence[Verdict] | None, at: list[int] = at) -> float | None:
            return None if some is None else sum(some[k].score for k in at) / len(at)

        table[name or "all"] = {
            "n": len(at),
            "accuracy": over(verdicts),
            "majority": over(guessed),
            "majority_answer": constants.get(name, constants.get("")),
            "blind": over(blind),
        }
    return table
