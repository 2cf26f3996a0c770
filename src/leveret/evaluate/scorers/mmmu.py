"""MMMU: letters out of prose, and open answers by containment."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from leveret.evaluate.forms.base import Item
from leveret.evaluate.letters import mmmu_letter
from leveret.evaluate.scorers import draws
from leveret.evaluate.scorers.base import Scorer, Verdict
from leveret.runs import DataError

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip

Values = set[str | float]

# --- open answers -----------------------------------------------------------------------------------------------------

TRIVIAL = frozenset(":,.!?;'")
_TAILS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_POWERS = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


def tails(parts: Sequence[str], marks: Sequence[str], last: str = "") -> list[str]:
    """Of each part of an answer what follows a mark, the shortest such tail; `last` is a mark of the last part only.

    Parts without a mark, and tails that are one punctuation mark, are left out."""
    found = []
    for number, part in enumerate(parts, 1):
        used = (*marks, last) if last and number == len(parts) else marks
        shortest = ""
        for mark in used:
            if mark in part:
                tail = part.split(mark)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in TRIVIAL:
            found.append(shortest)
    return found


def number(text: str) -> float | None:
    """A text that is a number, rounded to two decimals; commas are left out. None for any other."""
    try:
        return round(float(text.replace(",", "")), 2)
    except ValueError:
        return None


def _normal(text: str) -> Values:
    """A number, or the lower-case text; one character alone is padded, so that it is no part of a word."""
    text = text.strip()
    value = number(text)
    if value is not None:
        return {value}
    text = text.lower()
    return {f" {text}", f"{text} "} if len(text) == 1 else {text}


def open_values(text: str) -> Values:
    """All that MMMU's `parse_open_response` takes an open answer to say: tails of its lines, and their numbers.

    Lines only: the original lower-cases first and then splits sentences before a capital."""
    low = text.strip().strip(".").lower()
    said = tails(low.split("\n"), _TAILS, "=") or [low]
    numbers = [found for part in said for rule in (_COMMAS, _POWERS, _PLAIN) for found in rule.findall(part)]
    return {value for part in (*said, *numbers) for value in _normal(part)}


def open_right(gold: Any, said: Values) -> bool:
    """`eval_open`: a right text lies in a said one, or a right number is a said one."""
    golds = gold if isinstance(gold, list) else [gold]
    wanted = {value for one in golds for value in _normal(str(one))}
    texts = [value for value in wanted if isinstance(value, str)]
    return any(any(t in one for t in texts) if isinstance(one, str) else one in wanted for one in said)


# --- rules ------------------------------------------------------------------------------------------------------------


def _judge(item: Item, text: str, draw: draws.Draw, *, loose: bool = False) -> Verdict:
    if not item.meta["choice"]:
        return _judge_open(item, text)
    options = item.meta["texts"]
    if not options:
        raise DataError(
            f"MMMU, {item.question_id!r}: answer_dict_val.json holds no options, so answers in prose cannot be read. "
            "Give the folder of <Subject>/output.json or the dataset, or take the rule eval_only."
        )
    said = mmmu_letter(text, options, loose=loose)
    if said is None:
        return draws.drawn(item, list(options), draw)
    golds = item.gold if isinstance(item.gold, list) else [item.gold]
    return Verdict(float(said in golds), said, readable=True)


def _judge_open(item: Item, text: str) -> Verdict:
    said = open_values(text)
    parsed = json.dumps(sorted(said, key=str), ensure_ascii=False)
    return Verdict(float(open_right(item.gold, said)), parsed, bool(text.strip()))


def _judge_parsed(item: Item, text: str) -> Verdict:
    """main_eval_only.py: a choice is compared as it stands, an open answer is parsed."""
    if not item.meta["choice"]:
        return _judge_open(item, text)
    golds = item.gold if isinstance(item.gold, list) else [item.gold]
    return Verdict(float(text in golds), text or None, bool(text))


def _judge_lmms(item: Item, text: str, draw: draws.Draw) -> Verdict:
    """The later lmms-eval keeps one text of an open answer's values and compares its characters: never right."""
    if not item.meta["choice"]:
        return Verdict(0.0, None, readable=False)
    return _judge(item, text, draw, loose=True)


def _gold(item: Item) -> str:
    return str(item.gold[0] if isinstance(item.gold, list) else item.gold)


def by_subject(items: Sequence[Item], texts: Mapping[str, str]) -> list[Item]:
    """Subjects in alphabetical order, which is that of the script's table; in each, the answer file's order."""
    return sorted(draws.as_answered(items, texts), key=lambda item: item.meta["subject"])


def table(items: Sequence[Item], verdicts: Sequence[Verdict], digits: int = 3) -> dict[str, dict[str, float]]:
    """What print_results.py prints: num and acc of each domain, of its subjects, and of all."""
    rows: dict[str, dict[str, float]] = {}
    pairs = list(zip(items, verdicts, strict=True))

    def row(name: str, found: list[Verdict], always: bool = False) -> None:
        if found or always:
            rows[name] = {"num": len(found), "acc": round(draws.share(found), digits)}

    for domain, subjects in DOMAINS.items():
        row(f"Overall-{domain}", [v for i, v in pairs if i.meta["subject"] in subjects], always=True)
        for subject in subjects:
            row(subject, [v for i, v in pairs if i.meta["subject"] == subject])
    known = {subject for subjects in DOMAINS.values() for subject in subjects}
    for subject in sorted({item.meta["subject"] for item in items} - known):
        row(subject, [v for i, v in pairs if i.meta["subject"] == subject])
    row("Overall", list(verdicts))
    return rows


def _summary(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    exact = {"overall_exact": draws.share(verdicts), "table": table(items, verdicts)}
    return exact | draws.facts(items, verdicts)


MMMU = {
    "mmmu": Scorer(
        "MMMU's main_parse_and_eval.py; where it would draw a letter at random, a hash of the question's id decides",
        lambda item, text: _judge(item, text, draws.by_id),
        _gold,
        _summary,
    ),
    "mmmu_draws": Scorer(
        f"MMMU's main_parse_and_eval.py with its random letters: seed {draws.SEED}, subjects in alphabetical order",
        lambda item, text: _judge(item, text, draws.by_id),
        _gold,
        _summary,
        together=draws.in_order(_judge, by_subject),
    ),
    "mmmu_strict": Scorer(
        "MMMU's main_parse_and_eval.py, but an answer without a letter is wrong",
        lambda item, text: _judge(item, text, draws.never),
        _gold,
        _summary,
    ),
    "mmmu_eval_only": Scorer(
        "MMMU's main_eval_only.py as in Bunny: answers already parsed, letters to the letter",
        _judge_parsed,
        _gold,
        table,
    ),
    "mmmu_lmms": Scorer(
        f"MMMU as in lmms-eval 75571cf (its random letters: seed {draws.SEED}): letters at the end of words count, and "
        "open answers are compared by character, so none is right",
        lambda item, text: _judge_lmms(item, text, draws.by_id),
        _gold,
        lambda items, verdicts: draws.share(verdicts),
        together=draws.in_order(_judge_lmms, lambda items, texts: list(items)),
    ),
}
