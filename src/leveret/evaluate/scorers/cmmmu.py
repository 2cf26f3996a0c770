# ruff: noqa: RUF001 (full-width commas are CMMMU's own)
"""CMMMU: choices (of several letters too), true or false, and blanks, in Chinese."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from leveret.evaluate.forms.base import Item
from leveret.evaluate.forms.mmmu import CHOICE_TYPE, JUDGE_TYPE
from leveret.evaluate.scorers import draws
from leveret.evaluate.scorers.base import Scorer, Verdict
from leveret.evaluate.scorers.mmmu import Values, number, tails

CATEGORIES = {
    "艺术与设计": "Art & Design",
    "商业": "Business",
    "科学": "Science",
    "健康与医学": "Health & Medicine",
    "人文社会科学": "Humanities & Social Sciences",
    "技术与工程": "Technology & Engineering",
}
LETTERS = ("A", "B", "C", "D")
TRUE, FALSE = "对", "错"

# The contradictions are the original's: 不正确 and 不对 hold 正确 and 对, so both are read as true.
_POSITIVE = ("正确", "对", "准确", "肯定")
_NEGATIVE = ("错误", "不合适", "否定", "错")
_AMBIGUOUS = ("对错", "是否正确", "否正确", "或者", "是否", "正确性", "对不")
_JUDGE_TAILS = ("是", "为", "所以", "判断", "陈述", "说法", "表达", "答案", "结果")
_BLANK_TAILS = ("是", "为", "所以", "等于", "方案", "选择", "正确答案", "因此", "最后", "答案", "结果")
_NUMBERS = (
    re.compile(r"-?\d{1,3}(?:，\d{3})+"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+)(?![eE][+-]?\d+)(?!，\d)"),
)


def said_letters(text: str, options: Mapping[str, str]) -> str | None:
    """The most frequent letters in the order ABCD (several when they are equally frequent): `(B)`, else a bare `B`
    anywhere, in words too, else the option's text; None where there is none of these."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    shapes = ({x: f"({x})" for x in LETTERS}, {x: x for x in LETTERS}, {x: t for x, t in options.items() if t})
    for shape in shapes:
        counts = Counter({letter: text.count(form) for letter, form in shape.items()})
        if most := max(counts.values(), default=0):
            return "".join(letter for letter in LETTERS if counts[letter] == most)
    return None


def said_truth(text: str) -> str | None:
    """对 or 错, whichever more pieces of the answer mean; None for as many of one as of the other (and for none)."""
    bare = text.strip("。").strip()
    pieces = set(tails(re.split("。|\n", bare), _JUDGE_TAILS) or [bare])
    clear = [piece for piece in pieces if not any(word in piece for word in _AMBIGUOUS)]
    positive = [any(word in piece for word in _POSITIVE) for piece in clear]
    negative = sum(not yes and any(word in piece for word in _NEGATIVE)
                   for yes, piece in zip(positive, clear, strict=True))  # fmt: skip
    if sum(positive) == negative:
        return None
    return TRUE if sum(positive) > negative else FALSE


def _latin(text: str) -> int:
    return sum("a" <= letter <= "z" or "A" <= letter <= "Z" for letter in text)


def _normal(text: str, gold: str) -> Values:
    """A number, or the text, unless it is much longer than the right answer or has more Latin letters."""
    text = text.strip()
    value = number(text)
    if value is not None:
        return {value}
    return set() if len(text) > len(gold) + 20 or _latin(text) > _latin(gold) + 2 else {text}


def _blank_right(gold: str, said: Values) -> bool:
    wanted = _normal(gold, gold)
    texts = [value for value in wanted if isinstance(value, str)]
    return any(any(t in one for t in texts) if isinstance(one, str) else one in wanted for one in said)


def said_values(text: str, gold: str) -> Values:
    """All that an answer to a blank says: tails of its sentences, and their numbers."""
    bare = text.strip("。").strip()
    said = tails(re.split("。|\n", bare), _BLANK_TAILS, "=") or [bare]
    numbers = [found for part in said for rule in _NUMBERS for found in rule.findall(part)]
    return {value for part in (*said, *numbers) for value in _normal(part, gold)}


# --- rules ------------------------------------------------------------------------------------------------------------


def _judge(item: Item, text: str, draw: draws.Draw) -> Verdict:
    kind = item.meta["type"]
    if kind == CHOICE_TYPE:
        if not text:  # wrong without a draw
            return Verdict(0.0, None, readable=False)
        return _choice(item, text, draw)
    if kind == JUDGE_TYPE:
        truth = said_truth(text)
        if truth is None:
            return draws.drawn(item, (TRUE, FALSE), draw)
        return Verdict(float(truth == item.gold), truth, readable=True)
    said = said_values(text, item.gold)
    parsed = json.dumps(sorted(said, key=str), ensure_ascii=False)
    return Verdict(float(_blank_right(item.gold, said)), parsed, bool(text.strip()))


def _choice(item: Item, text: str, draw: draws.Draw) -> Verdict:
    letters = said_letters(text, item.meta["texts"])
    if letters is None:
        return draws.drawn(item, LETTERS, draw)
    return Verdict(float(letters == item.gold), letters, readable=True)


def _judge_answer(item: Item, text: str) -> Verdict:
    """Answers already parsed: compared as they stand, blanks by containment."""
    if item.meta["type"] in (CHOICE_TYPE, JUDGE_TYPE):
        return Verdict(float(text == item.gold), text or None, bool(text))
    return Verdict(float(_blank_right(item.gold, _normal(text, item.gold))), text or None, bool(text.strip()))


def _judge_lmms(item: Item, text: str, draw: draws.Draw) -> Verdict:
    """lmms-eval draws for an empty choice as well."""
    return _choice(item, text, draw) if item.meta["type"] == CHOICE_TYPE else _judge(item, text, draw)


def _order(items: Sequence[Item], texts: Mapping[str, str]) -> list[Item]:
    """The script's categories in turn; in each, the answer file's order."""
    place = {name: number for number, name in enumerate(CATEGORIES)}
    answered = draws.as_answered(items, texts)
    return sorted(answered, key=lambda item: place.get(item.meta["category"], len(place)))


def _order_lmms(items: Sequence[Item], texts: Mapping[str, str]) -> list[Item]:
    """Choices as they come; truths when they are counted, subject after subject."""
    subjects = {item.meta["subject"]: None for item in items}
    place = {name: number for number, name in enumerate(subjects)}
    late = [item for item in items if item.meta["type"] == JUDGE_TYPE]
    first = [item for item in items if item.meta["type"] != JUDGE_TYPE]
    return first + sorted(late, key=lambda item: place[item.meta["subject"]])


def _table(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """What eval_script.py prints: right ones, all, and their share by category (six decimals) and over all."""
    pairs = list(zip(items, verdicts, strict=True))
    names = [*CATEGORIES, *sorted({item.meta["category"] for item in items} - set(CATEGORIES))]
    rows = {CATEGORIES.get(name, name): [v for i, v in pairs if i.meta["category"] == name] for name in names}
    rows["Overall"] = list(verdicts)
    return {
        name: {"correct": int(sum(v.score for v in found)), "n": len(found), "acc": round(draws.share(found), 6)}
        for name, found in rows.items()
    }


def _summary(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return _table(items, verdicts) | draws.facts(items, verdicts)


def _summary_draws(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {"table": _table(items, verdicts)} | draws.facts(items, verdicts)


def _gold(item: Item) -> str:
    return str(item.gold)


CMMMU = {
    "cmmmu": Scorer(
        "CMMMU's eval_script.py as in Bunny; where it would draw at random, a hash of the question's id decides",
        lambda item, text: _judge(item, text, draws.by_id),
        _gold,
        _summary,
    ),
    "cmmmu_answers": Scorer(
        "CMMMU's eval_script.py on answers already parsed: choices and truths to the letter",
        _judge_answer,
        _gold,
        _table,
        reads="answer",
    ),
    "cmmmu_draws": Scorer(
        f"CMMMU's eval_script.py with its random draws: seed {draws.SEED}, category after category",
        lambda item, text: _judge(item, text, draws.by_id),
        _gold,
        _summary_draws,
        together=draws.in_order(_judge, _order),
    ),
    "cmmmu_strict": Scorer(
        "CMMMU's eval_script.py, but an answer in which it finds nothing is wrong",
        lambda item, text: _judge(item, text, draws.never),
        _gold,
        _summary,
    ),
    "cmmmu_lmms": Scorer(
        f"CMMMU as in lmms-eval (its random draws: seed {draws.SEED}, choices before truths)",
        lambda item, text: _judge_lmms(item, text, draws.by_id),
        _gold,
        lambda items, verdicts: {"acc": round(draws.share(verdicts), 3)},
        together=draws.in_order(_judge_lmms, _order_lmms),
    ),
}
