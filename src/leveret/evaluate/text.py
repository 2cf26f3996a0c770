"""Normalisers of answers, one per lineage, each exactly as its source has it (oddities included)."""

from __future__ import annotations

import ast
import math
import re
import string
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache

REMEMBERED = 1 << 16
"""Answers whose normal form is remembered: VQAv2 has ten to a question, and mostly the same few words."""
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
LATER_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split(), 11
    )
}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()

# A contraction is recognised where one of its apostrophes is missing; the published table has one entry of its own.
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}

# VizWiz's evaluation writes most of its apostrophes as back-ticks, which its own punctuation rule takes out of every
# answer: what is left of its table are these keys.
_STRAIGHT = frozenset("ain't aren't can't could've couldn't we've where's who've".split())
VIZWIZ_CONTRACTIONS = {
    word.replace("'", ""): word if word in _STRAIGHT else word.replace("'", "`")
    for word in _CONTRACTED
    if word.count("'") == 1
} | {"couldn'tve": "couldn`t`ve", "hadn'tve": "hadn`t`ve"}

_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# Python 2, for which the official evaluation is written, knows ASCII digits alone.
_PERIOD_ASCII = re.compile(_PERIOD.pattern, re.ASCII)
_DIGIT_COMMA_DIGIT_ASCII = re.compile(_DIGIT_COMMA_DIGIT.pattern, re.ASCII)
_NO_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGIT_COMMAS_DIGIT = re.compile(r"\d,+\d")
_PERIOD_ALONE = re.compile(r"(?<!\d)\.(?!\d)")


def strip_punctuation(text: str, *, period: re.Pattern[str] = _PERIOD, comma: re.Pattern[str] | None = None) -> str:
    """The VQA evaluation's punctuation rule.

    A mark is deleted where the ORIGINAL text has it next to a blank anywhere, or has a digit, comma, digit anywhere;
    otherwise it becomes a blank. Then every period that no digit follows goes: the published expression means a
    look-behind but does not write one, and its flag lands in the argument that limits the number of removals to 32.

    period, comma  another lineage's expressions: which periods go, and what deletes all marks.
    """
    delete_all = (comma or _DIGIT_COMMA_DIGIT).search(text) is not None
    out = text
    for mark in PUNCTUATION:
        spaced = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if spaced or delete_all else " ")
    return period.sub("", out, count=int(re.UNICODE))


def one_line(text: str) -> str:
    """Line ends and tabs as blanks, and no blanks around: the first step of every VQA evaluation."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def plain_words(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """The VQA evaluation's last step: lower case, numbers up to ten as digits, no articles, apostrophes put back."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=REMEMBERED)
def vqa(text: str) -> str:
    """All steps of the VQA evaluation on a text that is already one line (vqaEval.py under Python 2)."""
    return plain_words(strip_punctuation(text, period=_PERIOD_ASCII, comma=_DIGIT_COMMA_DIGIT_ASCII))


@lru_cache(maxsize=REMEMBERED)
def lavis(text: str) -> str:
    """What the LAVIS lineage (Qwen-VL, TRI-ML) makes of a prediction: the same steps under Python 3."""
    return plain_words(strip_punctuation(one_line(text)))


@lru_cache(maxsize=REMEMBERED)
def vizwiz_api(text: str) -> str:
    """What VizWiz's own evaluation makes of a prediction (vizwiz/eval.py): contractions come out with back-ticks."""
    return plain_words(strip_punctuation(one_line(text)), VIZWIZ_CONTRACTIONS)


@lru_cache(maxsize=REMEMBERED)
def vlmevalkit(text: str) -> str:
    """VLMEvalKit's process_answer: as LAVIS, but a period after a digit stays ("2." is not "2")."""
    return plain_words(strip_punctuation(one_line(text), period=_PERIOD_ALONE))


@lru_cache(maxsize=REMEMBERED)
def m4c(text: str) -> str:
    """TextVQA's normaliser (EvalAIAnswerProcessor of m4c_evaluator.py, as LLaVA, Bunny and lmms-eval ship it)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(strip_punctuation(one_line(text)))


@lru_cache(maxsize=REMEMBERED)
def lmms_vqa(text: str) -> str:
    """The VQA evaluation's steps as lmms-eval's vqav2 takes them on a text that is already one line: several commas
    between two digits delete all marks too."""
    return plain_words(strip_punctuation(text, comma=_DIGIT_COMMAS_DIGIT))


def no_punctuation(text: str) -> str:
    """Lower case without ASCII punctuation (Prismatic's GQA scorer; exact_match of lmms-eval)."""
    return text.translate(_NO_ASCII_PUNCTUATION).lower()


def one_of(text: str, yes: str, no: str) -> str | None:
    """Whichever of two words stands in the text as a whole word; None for neither and for both.

    VLMEvalKit's YOrN_Extraction, with the two words as arguments.
    """
    words = strip_punctuation(text.lower()).split()
    found = [word for word in (yes, no) if word in words]
    return found[0] if len(found) == 1 else None


DIGITS = 18
"""Of a number that is read, at most."""


def integer(text: str) -> int | None:
    """The one number that a text names, in digits or as a word up to twenty; None for none or several.

    TallyQA's own code compares integers and has no rule for prose; this one is ours, and never guesses.
    """
    tokens = re.findall(r"-?\d+(?:[.,]\d+)*|[a-z]+", text.lower())
    words = NUMBERS | LATER_NUMBERS
    found = {words.get(token, token) for token in tokens if token in words or not token.isalpha()}
    if len(found) != 1:
        return None
    number = str(found.pop())
    if len(number) > DIGITS:  # a model that goes on and on counts nothing
        return None
    try:
        return int(number)
    except ValueError:  # 2.5 or 1,000: not an integer as it stands
        return None


def scienceqa_letter(text: str) -> str | None:
    """The letter that eval_science_qa.py reads: the text is a letter A-E, or begins with "B. ", or says once
    "The answer is B" followed by any character. None where it reads nothing."""
    if text in tuple("ABCDE"):
        return text
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def box(text: str) -> list[float] | None:
    """Prismatic's parse_bbox: the WHOLE text is a Python list of four numbers in 0..1 with x0 < x1 and y0 < y1."""
    if len(text) > 1000:  # nobody's box; the parser below recurses
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
        if not isinstance(value, list) or len(value) != 4 or not all(0 <= number <= 1 for number in value):
            return None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if value[0] < value[2] and value[1] < value[3] else None


_FOUR_NUMBERS = re.compile(r"\[\s*" + r",\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")


def first_box(text: str) -> list[float] | None:
    """lmms-eval's parse_float_sequence_within: the first "[a, b, c, d]" of plain numbers anywhere, in any range and
    order. None where there is none (the original reads a box of four zeros there)."""
    found = _FOUR_NUMBERS.search(text)
    return [float(number) for number in found.groups()] if found else None


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes [x0, y0, x1, y1]; 0 where no area is left to divide by (a box turned round
    has a negative one) or where numbers are beyond all bounds."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    inside = max(0, width) * max(0, height)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    union = areas[0] + areas[1] - inside
    return inside / union if union and math.isfinite(union) else 0.0
