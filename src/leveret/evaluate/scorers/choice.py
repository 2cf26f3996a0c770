"""Rules over letters of options."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

from leveret.evaluate import text as rules
from leveret.evaluate.curves import auc_pr, auc_roc, probabilities
from leveret.evaluate.forms.base import Item
from leveret.evaluate.forms.choice import LETTERS
from leveret.evaluate.letters import can_infer, first_letter
from leveret.evaluate.scorers.base import Scorer, Verdict, mean
from leveret.evaluate.scorers.cmmmu import CMMMU
from leveret.evaluate.scorers.mmbench import MMBENCH
from leveret.evaluate.scorers.mmmu import MMMU


def _percent(verdicts: Sequence[Verdict]) -> float:
    return 100 * mean([verdict.score for verdict in verdicts])


def judge_inferred(gold: Callable[[Item], str]) -> Callable[[Item, str], Verdict]:
    """VLMEvalKit's can_infer over the item's `texts` (letter -> option); a refusal, which it reads as Z, is wrong."""

    def judge(item: Item, text: str) -> Verdict:
        said = can_infer(text, item.meta["texts"])
        return Verdict(float(said == gold(item)), said, said not in (None, "Z"))

    return judge


# --- ScienceQA ------------------------------------------------------------------------------------------------------


def _judge_scienceqa(item: Item, text: str) -> Verdict:
    said = rules.scienceqa_letter(text)
    offered = LETTERS[: item.meta["choices"]]
    right = said is not None and said in offered and offered.index(said) == item.gold
    return Verdict(float(right), said, said is not None)


def _summary_scienceqa(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """IMG is decided by problems.json. The official script decides by the prompt of the answer, so that a missing
    answer leaves its denominator: that figure is given as `answered_image_acc`."""
    pictured = [v for i, v in zip(items, verdicts, strict=True) if i.image is not None]
    answered = [v for v in pictured if not v.missing]
    return {
        "total": len(items),
        "correct": int(sum(v.score for v in verdicts)),
        "accuracy": _percent(verdicts),
        "img_accuracy": _percent(pictured),
        "acc": _percent(verdicts),
        "image_acc": _percent(pictured),
        "image_correct": int(sum(v.score for v in pictured)),
        "image_count": len(pictured),
        "answered_image_acc": _percent(answered),
        "answered_image_count": len(answered),
    }


def _judge_scienceqa_lmms(item: Item, text: str) -> Verdict:
    """The letter alone, in any case, or a capital and a period at the start."""
    said = text.upper() if len(text) == 1 and text.isalpha() else None
    if len(text) > 1 and text[0].isupper() and text[1] == ".":
        said = text[0]
    return Verdict(float(said == _nth(item)), said, said is not None)


def _nth(item: Item) -> str:
    return string.ascii_uppercase[item.gold]


# --- SEED-Bench -------------------------------------------------------------------------------------------------------


def _judge_seed(item: Item, text: str) -> Verdict:
    return Verdict(float(text == item.gold), text if text in tuple("ABCD") else None, text in tuple("ABCD"))


def _judge_seed_lmms(item: Item, text: str) -> Verdict:
    said = (first_letter(text) or "").upper()
    return Verdict(float(said == item.gold), said or None, said in tuple("ABCD"))


def _judge_seed_internvl(item: Item, text: str) -> Verdict:
    said = text[:1]
    return Verdict(float(said == item.gold), said or None, said in tuple("ABCD"))


def _summary_seed(image: str, video: str, total: str) -> Callable[[Sequence[Item], Sequence[Verdict]], dict[str, Any]]:
    """Percent by type of question, over all, and over the two halves (called as in the lineage)."""

    def summary(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
        pairs = list(zip(items, verdicts, strict=True))
        types = sorted({(i.meta["type_id"], i.meta["type"]) for i in items})
        table = {name: _percent([v for i, v in pairs if i.meta["type"] == name]) for _, name in types}
        halves = {
            name: _percent(part)
            for name, kind in ((image, "image"), (video, "video"))
            if (part := [v for i, v in pairs if i.meta["kind"] == kind])
        }
        return table | {total: _percent(verdicts)} | halves

    return summary


# --- AI2D -------------------------------------------------------------------------------------------------------------


def _judge_ai2d(item: Item, text: str) -> Verdict:
    shares = probabilities(text, len(item.meta["texts"]), item.question_id)
    said = shares.index(max(shares))  # the first of equal ones
    detail = {f"p_{letter}": share for letter, share in zip(string.ascii_uppercase, shares, strict=False)}
    return Verdict(float(said == item.gold), string.ascii_uppercase[said], readable=True, detail=detail)


def _summary_ai2d(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Accuracy and the areas under both curves, over Prismatic's two parts and over all."""
    summary: dict[str, Any] = {}
    for part in ("val", "test", "final"):
        rows = [(i, v) for i, v in zip(items, verdicts, strict=True) if part in ("final", i.meta["group"])]
        if not rows:
            continue
        there = [(i.gold, list(v.detail.values())) for i, v in rows if v.detail]
        labels, shares = [gold for gold, _ in there], [row for _, row in there]
        summary[f"accuracy__AI2D-{part}-Accuracy"] = mean([v.score for _, v in rows])
        summary[f"accuracy__AI2D-{part}-AUCROC"] = auc_roc(labels, shares) if there else None
        summary[f"accuracy__AI2D-{part}-AUCPR"] = auc_pr(labels, shares) if there else None
    return summary


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _judge_ai2d_lmms(item: Item, text: str) -> Verdict:
    """A capital and a period at the start are that letter; then the whole text, without punctuation and case, is
    compared."""
    head = text.lstrip()
    kept = head[0] if len(head) > 1 and "A" <= head[0] <= "Z" and head[1] == "." else text
    said = kept.translate(_NO_PUNCTUATION).lower()
    letter = said.upper() if said.upper() in item.meta["texts"] else None
    return Verdict(float(said == _nth(item).lower()), letter, letter is not None)


def _summary_ai2d_text(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    parts: dict[str, list[float]] = {"all": [v.score for v in verdicts]}
    for part in ("test", "val"):
        parts[part] = [v.score for i, v in zip(items, verdicts, strict=True) if i.meta["group"] == part]
    return {name: mean(scores) for name, scores in parts.items() if scores}


CHOICE = {
    "scienceqa": Scorer(
        "ScienceQA eval_science_qa.py as in Bunny",
        _judge_scienceqa,
        lambda i: LETTERS[i.gold],
        _summary_scienceqa,
    ),
    "scienceqa_lmms": Scorer(
        "ScienceQA as in lmms-eval: the letter alone, or a letter and a period at the start",
        _judge_scienceqa_lmms,
        _nth,
        _summary_scienceqa,
    ),
    "scienceqa_vlmevalkit": Scorer(
        "ScienceQA by VLMEvalKit's can_infer, without a judge",
        judge_inferred(_nth),
        _nth,
        _summary_scienceqa,
    ),
    "seed_bench": Scorer(
        "SEED-Bench as in Bunny and LLaVA: the answer is the letter and nothing else",
        _judge_seed,
        lambda i: str(i.gold),
        _summary_seed("image", "video", "Total"),
    ),
    "seed_bench_lmms": Scorer(
        "SEED-Bench as in lmms-eval: the first character, in any case",
        _judge_seed_lmms,
        lambda i: str(i.gold),
        _summary_seed("seed_image", "seed_video", "seed_all"),
    ),
    "seed_bench_internvl": Scorer(
        "SEED-Bench as in InternVL: the first character, a capital",
        _judge_seed_internvl,
        lambda i: str(i.gold),
        _summary_seed("Image", "Video", "Total"),
    ),
    "seed_bench_vlmevalkit": Scorer(
        "SEED-Bench by VLMEvalKit's can_infer, without a judge",
        judge_inferred(lambda i: str(i.gold)),
        lambda i: str(i.gold),
        _summary_seed("image", "video", "all"),
    ),
    "ai2d_probabilities": Scorer(
        "AI2D as in Prismatic: the likeliest of the options' letters",
        _judge_ai2d,
        lambda i: str([float(k == i.gold) for k in range(len(i.meta["texts"]))]),
        _summary_ai2d,
        reads="probabilities",
    ),
    "ai2d_lmms": Scorer(
        "AI2D as in lmms-eval: a letter and a period at the start, else the whole text, without case and punctuation",
        _judge_ai2d_lmms,
        _nth,
        _summary_ai2d_text,
    ),
    "ai2d_vlmevalkit": Scorer(
        "AI2D by VLMEvalKit's can_infer, without a judge",
        judge_inferred(_nth),
        _nth,
        _summary_ai2d_text,
    ),
    **MMBENCH,
    **MMMU,
    **CMMMU,
}
