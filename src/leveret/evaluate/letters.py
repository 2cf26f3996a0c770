"""Which option an answer in prose means: one reader per lineage, each exactly as its source has it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_SAID = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def can_infer(text: str, choices: Mapping[str, str]) -> str | None:
    """VLMEvalKit's `can_infer` (vlmeval/utils/matching_util.py): a letter of `choices` (letter -> the option's text),
    "Z" for a refusal, None where it would ask a judge.

    In turn: the one option letter that stands alone among the words, if it comes within the last four of them; a
    letter after "answer is" (which takes the article of "the answer is a cat" for an A); the one option whose text
    lies in the answer, unless the answer is longer than all options together twice.
    """
    letter = None if "Failed to obtain answer via API" in text else _letter(text, choices)
    return letter or _by_text(text, choices)


def _letter(text: str, choices: Mapping[str, str]) -> str | None:
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = text.translate(_MARKS).split()
    there = [letter for letter in choices if letter in words]
    if len(there) == 1 and words.index(there[0]) > len(words) - 5:
        return there[0]
    if not there and "Z" in words:
        return "Z"
    said = _SAID.search(text)
    return said[1].upper() if said and said[1].upper() in choices else None


def _by_text(text: str, choices: Mapping[str, str]) -> str | None:
    if len(text) > 2 * sum(len(option) for option in choices.values()):
        return None
    there = [letter for letter, option in choices.items() if option.lower() in text.lower()]
    return there[0] if len(there) == 1 else None


_PHRASES = (
    *(f"{whose}{kind} is" for kind in ("answer", "choice") for whose in ("", "the ", "my ")),
    *(f"{the}{good} is" for good in ("correct answer", "best answer", "correct option", "best option", "correct choice")
      for the in ("", "the ")),
    *("i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)  # fmt: skip


def by_priority(text: str, letters: Sequence[str]) -> str | None:
    """lmms-eval's rule without a judge (`_task_utils/mcq_extract.py`, as merged with `mmbench_en_dev_static`).

    Every letter is looked for in every shape; the most trusted shape decides, and within it the last place: the answer
    begins with the letter, ends with it, names it after a phrase such as "the answer is" (anywhere after, inside words
    too), then `(B)`, `B.`, `B:`, `B)`, `B` before a blank; if there is none of these, the letter anywhere.
    """
    bare = text.strip()
    for mark in ",.!?;:'\"":
        bare = bare.strip(mark)
    padded = f" {bare} "
    bare = bare.strip()
    low = padded.lower()
    after = [low.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in low]
    found: list[tuple[int, int, str]] = []
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((7, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((6, 0, letter))
        found += [(5, at, letter) for start in after if (at := padded.find(letter, start)) >= 0]
        for trust, shape in enumerate((f"{letter} ", f"{letter})", f"{letter}:", f"{letter}.", f"({letter})"), 0):
            if (at := padded.rfind(shape)) >= 0:
                found.append((trust, at, letter))
    if not found:
        found = [(-1, at, letter) for letter in letters if (at := padded.rfind(letter)) >= 0]
    # The first of equals, in the order of the letters.
    return max(found, key=lambda one: one[:2])[2] if found else None


_SHAPES = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def can_infer_earlier(text: str, choices: Mapping[str, str]) -> str | None:
    """The earlier `can_infer`, which lmms-eval keeps for MMBench: over the letters A to E, whatever is offered.

    The one letter that is a word, unless an A could be an article (a word A among more than three); then the one letter
    that is a word in one of twelve shapes (`B.`, `(B)`, `:B`, ...), tried in turn; then the one option whose text lies
    in the answer."""
    words = text.split()
    if "Failed to obtain answer via API" not in text:
        shapes = _SHAPES if "A" in words and len(words) > 3 else ("{}", *_SHAPES)
        for shape in shapes:
            there = [letter for letter in "ABCDE" if shape.format(letter) in words]
            if len(there) == 1:
                return there[0]
    options = [letter for letter, option in choices.items() if option.lower() in text.lower()]
    return options[0] if len(options) == 1 else None


def mmmu_letter(text: str, choices: Mapping[str, str], *, loose: bool = False) -> str | None:
    """MMMU's `parse_multi_choice_response`; None where the original draws a letter at random.

    In turn, over all letters: `(B)`; ` B ` between blanks; the option's text, when the answer has more than five words.
    The last of several wins. `loose` is lmms-eval's, which also takes `B ` and `B.` at the end of any word.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    padded = f" {text} "
    shapes = ["({})", "{} ", "{}."] if loose else ["({})", " {} "]
    for shape in shapes:
        there = [letter for letter in choices if shape.format(letter) in padded]
        if there:
            where = "({})" if shape == "({})" else " {} "
            return max(there, key=lambda letter: padded.rfind(where.format(letter)))
    if len(padded.split()) > 5:
        low = padded.lower()
        there = [letter for letter, option in choices.items() if option.lower() in low]
        if there:
            return max(there, key=lambda letter: low.rfind(choices[letter].lower()))
    return None


def first_letter(text: str) -> str | None:
    """The first character that is no blank (lmms-eval and InternVL on SEED-Bench); None where there is none."""
    return text.strip()[:1] or None
