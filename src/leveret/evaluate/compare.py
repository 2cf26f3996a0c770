"""Two examinations beside each other: which questions both were asked, who is better, and which answers turned.

The two are paired question by question. The interval of a difference resamples pictures, and every resample is the same
for both; McNemar's exact test looks at the answers that turned; Holm's correction pays for the number of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leveret.evaluate.headlines import HEADLINES, PLAIN, Array
from leveret.evaluate.stats import draws
from leveret.runs import DataError, RecipeError, each_jsonl, read_json

RESAMPLES = 4000
RIGHT = 0.9
"""An answer that earns less is not right. Soft rules give .9 to what three of ten people said."""
NEEDED = ("question_id", "image", "prompt", "gold", "score", "task", "rule", "headline", "adds")


@dataclass(frozen=True, slots=True)
class Side:
    """One side's answers to one task: by which rule they were judged, and question_id -> its line of the items file."""

    where: Path
    rule: str
    headline: str
    lines: Mapping[str, Mapping[str, Any]]


def compare(a: str | Path, b: str | Path, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Hold `b` against `a`: two folders that `evaluate` filled, or two of their items files.

    Per task, over the questions that both were asked:
        n, images     how many questions, on how many pictures; `left_out`: what only one side was asked.
        a, b          the scores, 0..1; `difference` (b - a), its `ci95` by a paired bootstrap over pictures.
        p_mcnemar     exact, two-sided; None where answers are not plainly right or wrong. `p_bootstrap`: two-sided.
        test, p       McNemar's where the score is a share of right answers, else the bootstrap's; `p_holm`: of `p`,
                      over the tasks.
        differs       `p_holm` is under .05 and zero lies outside the interval. Both, because McNemar's test is too sure
                      where questions share pictures, and the interval is not.
        flips         `right_to_wrong` and `wrong_to_right`: id, picture, prompt, right answer, both answers.

    Returns `{"a", "b", "tasks": {id: {...}}, "only_a": [ids], "only_b": [ids]}`.

    Raises:
        RecipeError: the two were asked different questions, judged by different rules, or share no task.
        DataError: a file is missing, torn, or no items file.
    """
    one, other = read_sides(a), read_sides(b)
    both = [task for task in one if task in other]
    if not both:
        raise RecipeError(
            f"{a} and {b} share no task: the first has {', '.join(one)}, the second {', '.join(other)}. "
            "Examine both on the same suite."
        )
    tasks = {task: _task(task, one[task], other[task], resamples, seed) for task in both}
    for task, corrected in zip(both, holm([tasks[task]["p"] for task in both]), strict=True):
        low, high = tasks[task]["ci95"]
        tasks[task]["p_holm"] = corrected
        tasks[task]["differs"] = corrected < 0.05 and not low <= 0 <= high
    return {
        "a": str(a),
        "b": str(b),
        "tasks": tasks,
        "only_a": [task for task in one if task not in other],
        "only_b": [task for task in other if task not in one],
    }


def read_sides(path: str | Path) -> dict[str, Side]:
    """task -> its answers, of a folder of `evaluate` or of one items file, in the order that they were examined in."""
    path = Path(path)
    if path.is_dir():
        files = sorted((path / "items").glob("*.jsonl"))
        if (path / "results.json").exists():
            order = list(read_json(path / "results.json").get("tasks", {}))
            files.sort(key=lambda file: order.index(file.stem) if file.stem in order else len(order))
        if not files:
            raise DataError(
                f"{path}: no items/*.jsonl in it. Give a folder that `leveret eval` finished, or an items file."
            )
    elif path.is_file():
        files = [path]
    else:
        raise DataError(f"{path} is not there. Give a folder that `leveret eval` finished, or an items file.")
    sides: dict[str, Side] = {}
    for file in files:
        side, task = _side(file)
        sides[task] = side
    return sides


def _side(file: Path) -> tuple[Side, str]:
    lines: dict[str, Mapping[str, Any]] = {}
    first: Mapping[str, Any] = {}
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - 1))
        if size and stream.read() != b"\n":  # written whole or not at all: somebody cut it
            raise DataError(f"{file}: the last line is torn. Copy it again.")
    for number, line in enumerate(each_jsonl(file), 1):
        if missing := [key for key in NEEDED if key not in line]:
            raise DataError(
                f"{file}, line {number}: no {', '.join(missing)}. An items file of `leveret eval` is wanted, not one "
                "of answers; one from before `compare` was there is written anew by the same `leveret eval` (no "
                "question is asked again)."
            )
        first = first or line
        if line["question_id"] in lines:
            raise DataError(f"{file}, line {number}: the question {line['question_id']!r} stands twice.")
        if (line["task"], line["rule"], line["headline"]) != (first["task"], first["rule"], first["headline"]):
            raise DataError(f"{file}, line {number}: another task or rule than in line 1.")
        lines[str(line["question_id"])] = line
    if not first:
        raise DataError(f"{file} is empty.")
    if first["headline"] not in HEADLINES:
        raise DataError(f"{file}: the headline {first['headline']!r} is not known; known are {', '.join(HEADLINES)}.")
    return Side(file, first["rule"], first["headline"], lines), str(first["task"])


def _task(task: str, one: Side, other: Side, resamples: int, seed: int) -> dict[str, Any]:
    common = [name for name in one.lines if name in other.lines]
    _check_same(task, one, other, common)
    pairs = [(one.lines[name], other.lines[name]) for name in common]
    figure = HEADLINES[one.headline].figure
    left, right = (np.array([pair[k]["adds"] for pair in pairs], dtype=np.float64) for k in (0, 1))
    images = [str(line["image"]) for line, _ in pairs]
    scores = [float(figure(sums.sum(0))) for sums in (left, right)]
    difference = scores[1] - scores[0]
    moved = np.concatenate(
        [figure(b) - figure(a) for a, b in draws(images, [left, right], resamples=resamples, seed=seed)]
    )
    turned = {
        "right_to_wrong": [_flip(a, b) for a, b in pairs if a["score"] >= RIGHT > b["score"]],
        "wrong_to_right": [_flip(a, b) for a, b in pairs if b["score"] >= RIGHT > a["score"]],
    }
    plain = all(line["score"] in (0, 1) for pair in pairs for line in pair)
    exact = mcnemar(len(turned["right_to_wrong"]), len(turned["wrong_to_right"])) if plain else None
    drawn = _two_sided(moved)
    by_turns = plain and one.headline in PLAIN
    return {
        "n": len(common),
        "images": len(set(images)),
        "left_out": {"a": len(one.lines) - len(common), "b": len(other.lines) - len(common)},
        "headline": one.headline,
        "rule": one.rule,
        "a": scores[0],
        "b": scores[1],
        "difference": difference,
        "ci95": list(_interval(moved, len(set(images)))),
        "test": "McNemar, exact" if by_turns else "bootstrap",
        "p": exact if by_turns else drawn,
        "p_mcnemar": exact,
        "p_bootstrap": drawn,
        "flips": turned,
    }


def _check_same(task: str, one: Side, other: Side, common: Sequence[str]) -> None:
    if not common:
        raise RecipeError(
            f"The two were asked different questions of {task!r}: no id of {one.where} (first "
            f"{next(iter(one.lines))!r}) is in {other.where} (first {next(iter(other.lines))!r}). "
            "Examine both on the same split of the same files."
        )
    if (one.rule, one.headline) != (other.rule, other.headline):
        raise RecipeError(
            f"The two were judged by different rules in {task!r}: {one.rule} ({one.headline}) in {one.where}, "
            f"{other.rule} ({other.headline}) in {other.where}. Judge both by one: leveret eval ... --rule "
            f"{task}={one.rule} (no question is asked again)."
        )
    for key, what in (("prompt", "asked in other words"), ("gold", "with another right answer"), ("image", "pictured")):
        strange = [name for name in common if one.lines[name][key] != other.lines[name][key]]
        if strange:
            name = strange[0]
            raise RecipeError(
                f"The two were asked different questions of {task!r}: {len(strange)} of {len(common)} are {what}"
                f"{' otherwise' if key == 'image' else ''}, first {name!r}: {one.lines[name][key]!r} in {one.where}, "
                f"{other.lines[name][key]!r} in {other.where}. Examine both on the same files and prompts."
            )
    wide = {len(line["adds"]) for side in (one, other) for line in side.lines.values()}
    if len(wide) > 1:
        raise RecipeError(f"The two were asked different parts of {task!r}: their sums have {sorted(wide)} columns.")


def _flip(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: a[key] for key in ("question_id", "image", "prompt", "gold")}
    return {**told, "a": a.get("text"), "b": b.get("text")}


def lines(found: Mapping[str, Any], flips: int = 3) -> list[str]:
    """What `compare` found, for a terminal: a table, then per task some of the answers that turned."""
    told = [f"a: {found['a']}", f"b: {found['b']}", ""]
    header = ["task", "n", "a", "b", "b - a", "95 % interval", "lost", "won", "p", "p (Holm)", "test", ""]
    body = [
        [
            task,
            f"{row['n']:,}",
            f"{row['a']:.3f}",
            f"{row['b']:.3f}",
            f"{row['difference']:+.3f}",
            f"{row['ci95'][0]:+.3f} to {row['ci95'][1]:+.3f}",
            str(len(row["flips"]["right_to_wrong"])),
            str(len(row["flips"]["wrong_to_right"])),
            p_value(row["p"]),
            p_value(row["p_holm"]),
            row["test"],
            verdict(row),
        ]
        for task, row in found["tasks"].items()
    ]
    wide = [max(len(row[k]) for row in [header, *body]) for k in range(len(header))]
    for row in [header, *body]:
        cells = [cell.ljust(wide[k]) if k in (0, 10, 11) else cell.rjust(wide[k]) for k, cell in enumerate(row)]
        told.append("  ".join(cells).rstrip())
    for task, row in found["tasks"].items():
        for kind, turned in row["flips"].items():
            if turned:
                more = f" (of {len(turned):,})" if len(turned) > flips else ""
                told += ["", f"{task}, {kind.replace('_', ' ')}{more}:"]
                told += [f"  {_one_line(flip)}" for flip in turned[:flips]]
    for side in ("a", "b"):
        if found[f"only_{side}"]:
            told += ["", f"only in {side}: {', '.join(found[f'only_{side}'])}"]
    return told


def p_value(value: float) -> str:
    """A p-value for reading."""
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.0e}"


def verdict(row: Mapping[str, Any]) -> str:
    """One word on a task."""
    return ("b is better" if row["difference"] > 0 else "a is better") if row["differs"] else "not told apart"


def _one_line(flip: Mapping[str, Any]) -> str:
    def short(text: Any, most: int) -> str:
        words = " ".join(str(text).split())
        return words if len(words) <= most else words[: most - 3] + "..."

    said = f"right {short(flip['gold'], 30)!r}, a {short(flip['a'], 30)!r}, b {short(flip['b'], 30)!r}"
    return f"{flip['question_id']} ({flip['image']}): {short(flip['prompt'], 60)} {said}"


# --- statistics -----------------------------------------------------------------------------------------------------


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p-value of McNemar's test (1947): of the answers that turned, is half the right way?

    The binomial test at 1/2, as `scipy.stats.binomtest(lost, lost + won)`; 1 where none turned.
    """
    n = lost + won
    tail = term = 1
    for j in range(min(lost, won)):  # binomial coefficients one from the other: whole numbers, however many turned
        term = term * (n - j) // (j + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n) if n else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down corrected p-values, in the order given."""
    order = sorted(range(len(values)), key=lambda k: values[k])
    corrected, highest = [0.0] * len(values), 0.0
    for rank, k in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[k]))
        corrected[k] = highest
    return corrected


def _two_sided(moved: Array) -> float:
    """How rarely a resample falls on the other side of zero, twice; never 0, for the draws are finitely many."""
    n = len(moved) + 1
    return min(1.0, 2 * min((1 + int((moved <= 0).sum())) / n, (1 + int((moved >= 0).sum())) / n))


def _interval(moved: Array, images: int) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5. Where every draw is the same, nothing was seen to vary: then as far as pictures that
    were not met could move it (Clopper and Pearson's bound for none of `images`)."""
    low, high = (float(value) for value in np.percentile(moved, [2.5, 97.5]))
    if moved.min() == moved.max():
        unseen = 1 - 0.025 ** (1 / images)
        return max(-1.0, low - unseen), min(1.0, high + unseen)
    return low, high
