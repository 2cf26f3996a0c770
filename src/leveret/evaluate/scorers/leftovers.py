"""Answers to choice questions from which a rule read no letter, put to a judge as VLMEvalKit does.

multiple_choice.py: `prefetch_circular_group`, `extract_answer_from_item`. Where three replies name no option VLMEvalKit
draws one by chance; here such an answer names none, and counts as unreadable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from leveret.evaluate.forms.base import Item
from leveret.evaluate.scorers.asking import Ask, Judging, judge_text
from leveret.evaluate.scorers.base import Verdict

TRIES = 3
NONE = "Z"
"""What a judge says where an answer means no option."""

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


def judging(
    question: Callable[[Item], str],
    options: Options,
    infer: Infer,
    worth: Callable[[Sequence[Item], Mapping[str, str]], Collection[str]],
) -> Judging:
    """The talk about one answer: the same request, up to three times, until a reply names an option or Z.

    question  an item's question, without a hint and without its options.
    options   an item's options, letter -> text.
    infer     the rule that reads a letter from a text, the answers' own.
    worth     the leftovers that can change a score.
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
        said = named(item, replies[-1]) if replies else infer(text, options(item))
        return Verdict(
            float(said == item.gold), said, said not in (None, NONE), detail={"requests": float(len(replies))}
        )

    def record(items: Sequence[Item], replies: Mapping[str, Sequence[str]], ids: Mapping[str, Any]) -> Any:
        asked = [item for item in items if replies.get(item.question_id)]
        return [{"question_id": i.question_id, "content": reply} for i in asked for reply in replies[i.question_id]]

    return Judging("gpt-3.5-turbo-0125", ask, read, most=TRIES, record=record, worth=worth)
