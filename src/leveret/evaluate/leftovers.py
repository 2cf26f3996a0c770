"""Answers to choice questions from which the rule read no letter, put to a judge as VLMEvalKit does (MMBench).

    undecided(...)  which of them can still change a score
    letters(...)    what a judge made of them

multiple_choice.py, `extract_answer_from_item`. Where three replies name no option VLMEvalKit draws one by chance; here
such an answer names none, and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from leveret.evaluate.forms import Item
from leveret.evaluate.judges import Judge, settled
from leveret.evaluate.scorers.asking import Ask, Judging, judge_text
from leveret.evaluate.scorers.base import Verdict
from leveret.evaluate.tasks import TaskRow

TRIES = 3
NONE = "Z"
"""What a judge says, and `letters` gives, where an answer means no option."""

Options = Callable[[Item], Mapping[str, str]]
Infer = Callable[[str, Mapping[str, str]], str | None]


def undecided(groups: Iterable[Sequence[str]], read: Mapping[str, str | None], gold: Mapping[str, str]) -> list[str]:
    """The ids a judge must be asked about, where a question is right only if each of its rotations is.

    groups  the ids of each question's rotations. read: id -> the letter that the rule read, None for none.

    A question with one wrong letter is wrong whatever the others mean; one without leftovers is settled.
    """
    asked: list[str] = []
    for group in groups:
        if all(not read.get(name) or read[name] == gold[name] for name in group):
            asked += [name for name in group if not read.get(name)]
    return asked


def judging(question: Callable[[Item], str], options: Options, infer: Infer) -> Judging:
    """The talk about one answer: the same request, up to three times, until a reply names an option or Z.

    question  an item's question, without a hint and without its options.
    options   an item's options, letter -> text.
    infer     the rule that reads a letter from a text, the answers' own.
    """

    def named(item: Item, reply: str) -> str | None:
        return NONE if reply.strip() == NONE else infer(reply, options(item)) or None

    def ask(item: Item, text: str, replies: Sequence[str]) -> Ask | None:
        if len(replies) == TRIES or (replies and named(item, replies[-1])):
            return None
        asked = question(item)
        chinese = re.search("[\u4e00-\u9fff]", asked) is not None
        listed = "".join(f"{letter}. {option}\n" for letter, option in options(item).items())
        content = judge_text("mmbench_cn" if chinese else "mmbench").format(
            question=asked, options=f"There are several options: \n{listed}", answer=text.strip()
        )
        return Ask(({"role": "user", "content": content},), 0.0, max_tokens=2048)

    def read(item: Item, text: str, replies: Sequence[str]) -> Verdict:
        letter = named(item, replies[-1]) or NONE
        return Verdict(float(letter == item.gold), letter, letter != NONE)

    def record(items: Sequence[Item], replies: Mapping[str, Sequence[str]], ids: Mapping[str, Any]) -> Any:
        there = [item for item in items if item.question_id in replies]
        return [{"question_id": i.question_id, "content": replies[i.question_id][-1]} for i in there]

    return Judging("gpt-3.5-turbo-0125", ask, read, most=TRIES, record=record)


def letters(
    judge: Judge,
    row: TaskRow,
    items: Sequence[Item],
    texts: Mapping[str, str],
    *,
    question: Callable[[Item], str],
    options: Options,
    infer: Infer,
    allow: bool = False,
) -> tuple[dict[str, str], dict[str, Any]]:
    """(question_id -> the letter that a judge found, NONE for none, of the answers that were judged; facts).

    items  the leftovers alone. allow: answers that stay unjudged are left out (and counted in the facts); else they
           are a DataError that names them.

    The facts are `Judge.facts`, and `no_option`: how many answers mean none, or got three replies that name none.
    Raises as `Judge.talks`.
    """
    talk = judging(question, options, infer)
    talks = judge.talks(row, talk, items, texts)
    replies = settled(row, talks, allow=allow)
    found = {i.question_id: talk.read(i, "", replies[i.question_id]).parsed for i in items if i.question_id in replies}
    facts = judge.facts(talk, talks) | {"no_option": sum(letter == NONE for letter in found.values())}
    return {name: letter or NONE for name, letter in found.items()}, facts
