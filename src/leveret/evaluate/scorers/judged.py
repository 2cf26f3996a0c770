"""Rules that ask a language model: MM-Vet's grades, LLaVA-Bench's reviews of two answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from leveret.evaluate.forms.base import Item
from leveret.evaluate.scorers.asking import Ask, Judging, judge_text, unbound
from leveret.evaluate.scorers.base import Scorer, Verdict, mean

# --- MM-Vet (mm-vet_evaluator.py) -----------------------------------------------------------------------------------

AGAIN = "\nPredict the correctness of the answer (digit): "
TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5, 2.0)
"""Of the first request and of the five that may follow."""


def _ask_mm_vet(item: Item, text: str, replies: Sequence[str]) -> Ask | None:
    """The table of examples and the answer's own line; asked again, hotter, as long as no grade is read."""
    if len(replies) == len(TEMPERATURES) or (replies and mm_vet_grade(replies[-1]) is not None):
        return None
    truth = item.gold.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    asked = f"{judge_text('mm_vet')}\n\n" + " | ".join([item.meta["question"], truth, text, ""])
    message = {"role": "user", "content": asked + (AGAIN if replies else "")}
    return Ask((message,), TEMPERATURES[len(replies)], max_tokens=3)


def mm_vet_grade(reply: str) -> float | None:
    """The first word as a number between 0 and 1; None where it is none (`0.3.`, `Correctness:`)."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    # The original would take "nan" for a grade, and every mean with it.
    return None if math.isnan(grade) or not 0 <= grade <= 1 else grade


def _read_mm_vet(item: Item, text: str, replies: Sequence[str]) -> Verdict:
    """The last reply's grade. A sixth reply is fetched and not read: five have failed, and the grade is 0."""
    grade = None if len(replies) == len(TEMPERATURES) else mm_vet_grade(replies[-1])
    said = replies[-1] if grade is None else replies[-1].split(" ")[0].strip()
    return Verdict(grade or 0.0, said, grade is not None, detail={"requests": float(len(replies))})


def _summary_mm_vet(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The two tables of the script: by capability, and by the set of capabilities that a question needs."""
    total = _per_cent([v.score for v in verdicts])
    # One run. The last column of the tables is a list of NumPy's numbers as text; the script writes no other.
    tail = {"total": total, "std": 0.0, "runs": str([np.float64(total)])}
    tables: dict[str, dict[str, list[float]]] = {"capability": {}, "integration": {}}
    for item, verdict in zip(items, verdicts, strict=True):
        needed = sorted(set(item.meta["capability"]))
        for name in needed:
            tables["capability"].setdefault(name, []).append(verdict.score)
        # The script joins a set, whose order changes from run to run.
        tables["integration"].setdefault("_".join(needed), []).append(verdict.score)
    return {
        title: {**{name: _per_cent(scores) for name, scores in table.items()}, **tail}
        for title, table in tables.items()
    }


def _per_cent(scores: Sequence[float]) -> float:
    return float(round(np.float64(sum(scores)) / len(scores) * 100, 1))


def _summary_mm_vet_kit(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """MMVet_acc. Its two tables share one set of sums, in which a question that needs a single capability is counted
    twice under that capability."""
    names = ("rec", "ocr", "know", "gen", "spat", "math")
    held: dict[str, list[float]] = {}
    for item, verdict in zip(items, verdicts, strict=True):
        needed = item.meta["capability"]
        for name in names:
            if name in needed:
                held.setdefault(name, []).append(verdict.score)
        if len(needed) == 1 and needed[0] in names:
            held[needed[0]].append(verdict.score)
    table = {name: 100 * mean(held[name]) for name in names if name in held}
    return {**table, "Overall": 100 * mean([v.score for v in verdicts])}


def grades(
    items: Sequence[Item], replies: Mapping[str, Sequence[str]], answer_ids: Mapping[str, Any] | None = None
) -> dict[str, dict[str, list[Any]]]:
    """MM-Vet's own file of grades, of one run: `{"v1_0": {"content": ["0.7"], "score": [0.7]}}`."""
    table: dict[str, dict[str, list[Any]]] = {}
    for item in items:
        if said := replies.get(item.question_id):
            verdict = _read_mm_vet(item, "", said)
            table[item.question_id] = {"content": [verdict.parsed], "score": [verdict.score]}
    return table


MM_VET = Judging("gpt-4-0613", _ask_mm_vet, _read_mm_vet, most=len(TEMPERATURES), record=grades)


# --- LLaVA-Bench in the wild (eval_gpt_review_bench.py, summarize_gpt_review.py) ------------------------------------

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
UNREAD = (-1.0, -1.0)
"""What a review counts as from which no two numbers were read: the original keeps it in every mean."""


def _ask_llava_bench(item: Item, text: str, replies: Sequence[str]) -> Ask | None:
    """One review of the reference (Assistant 1) and the answer (Assistant 2)."""
    if replies:
        return None
    user = (
        f"[Context]\n{item.meta['caption']}\n\n[Question]\n{item.meta['question']}\n\n"
        f"[Assistant 1]\n{item.gold}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{text}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{judge_text('llava_bench_w')}\n\n"
    )
    return Ask(({"role": "system", "content": SYSTEM}, {"role": "user", "content": user}), 0.2, max_tokens=1024)


def llava_bench_pair(reply: str) -> tuple[float, float] | None:
    """(the reference's, the answer's) points: the first line, a comma read as a blank, cut at every single blank,
    must be exactly two numbers; so `8 7 ` is none."""
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        pair = [float(word) for word in words]
    except ValueError:
        return None
    return (pair[0], pair[1]) if len(pair) == 2 and all(map(math.isfinite, pair)) else None


def _read_llava_bench(item: Item, text: str, replies: Sequence[str]) -> Verdict:
    pair = llava_bench_pair(replies[0])
    reference, answer = pair or UNREAD
    return Verdict(
        min(1.0, max(0.0, answer / 10)),
        replies[0].split("\n")[0] or None,
        pair is not None,
        detail={"gpt4": reference, "model": answer},
    )


def points(verdict: Verdict) -> tuple[float, float]:
    """(the reference's, the answer's) points of a review; of an answer that is missing or unjudged as of an unread
    review."""
    return verdict.detail.get("gpt4", UNREAD[0]), verdict.detail.get("model", UNREAD[1])


def _summary_llava_bench(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Per category and over all: 100 * the answers' mean / the reference's, both rounded to 3 digits before."""
    held: dict[str, list[tuple[float, float]]] = {"all": []}
    for item, verdict in zip(items, verdicts, strict=True):
        for name in ("all", f"llava_bench_{item.meta['category']}"):
            held.setdefault(name, []).append(points(verdict))
    table = {}
    for name, pairs in sorted(held.items()):
        reference, answer = (round(float(value), 3) for value in np.asarray(pairs).mean(0))
        table[name] = {
            "relative": round(answer / reference * 100, 1) if reference else None,
            "gpt4": round(reference * 10, 1),
            "model": round(answer * 10, 1),
        }
    return table


def _summary_llava_bench_kit(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """LLaVABench_score: the same ratio, nothing rounded."""
    held: dict[str, list[tuple[float, float]]] = {"overall": []}
    for item, verdict in zip(items, verdicts, strict=True):
        for name in ("overall", item.meta["category"]):
            held.setdefault(name, []).append(points(verdict))
    sums = {name: np.asarray(pairs).mean(0) for name, pairs in held.items()}
    return {name: float(pair[1] / pair[0] * 100) if pair[0] else None for name, pair in sums.items()}


def reviews(
    items: Sequence[Item], replies: Mapping[str, Sequence[str]], answer_ids: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """LLaVA's own review file, one record a judged question. answer_ids: question_id -> the answer's own id."""
    records = []
    for number, item in enumerate(items, 1):
        if said := replies.get(item.question_id):
            pair = llava_bench_pair(said[0])
            records.append(
                {
                    "id": number,
                    "question_id": item.meta["number"],
                    "answer1_id": item.meta["reference_id"],
                    "answer2_id": answer_ids.get(item.question_id, item.meta["number"]),
                    "category": f"llava_bench_{item.meta['category']}",
                    "content": said[0],
                    "tuple": list(pair) if pair else [-1, -1],
                }
            )
    return records


LLAVA_BENCH = Judging("gpt-4-0314", _ask_llava_bench, _read_llava_bench, most=1, record=reviews)


JUDGED = {
    "mm_vet": Scorer(
        "MM-Vet mm-vet_evaluator.py, one run: a judge's grade between 0 and 1; asked again up to 5 times where none is "
        "read, the fifth of which counts 0 whatever it says",
        unbound,
        lambda i: i.gold,
        _summary_mm_vet,
        judging=MM_VET,
    ),
    "mm_vet_vlmevalkit": Scorer(
        "the grades of mm-vet_evaluator.py summed up as VLMEvalKit's MMVet_acc does, which counts a question that "
        "needs a single capability twice under it",
        unbound,
        lambda i: i.gold,
        _summary_mm_vet_kit,
        judging=MM_VET,
    ),
    "llava_bench_w": Scorer(
        "LLaVA eval_gpt_review_bench.py and summarize_gpt_review.py: points for the answer in per cent of those for "
        "GPT-4's; a review that cannot be read counts as -1 for both",
        unbound,
        lambda i: i.gold,
        _summary_llava_bench,
        headline="points in relation to the reference's",
        judging=LLAVA_BENCH,
    ),
    "llava_bench_w_vlmevalkit": Scorer(
        "VLMEvalKit's LLaVABench_score on the reviews of eval_gpt_review_bench.py: as LLaVA's, nothing rounded",
        unbound,
        lambda i: i.gold,
        _summary_llava_bench_kit,
        headline="points in relation to the reference's",
        judging=LLAVA_BENCH,
    ),
}
