"""Who judges, and what it said: replies of an endpoint, kept on disk by what was asked, or read back without a network.

    answers -> Judging.ask (a rule) -> known replies (replay, cache) -> endpoint -> cache -> Judging.read

The cache is a file of JSON lines, one a reply, each with its request: it is only added to, a torn last line is cut, and
a request that stands in it is not sent again. What no judge said anything about is counted and named, never guessed.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leveret.evaluate.forms import FORMS, Item
from leveret.evaluate.scorers.asking import Ask, Judging
from leveret.evaluate.tasks import TaskRow
from leveret.generate.endpoint import Completion, Endpoint, Filtered, at_once
from leveret.runs import (
    DataError,
    Progress,
    RecipeError,
    append_jsonl,
    atomic_write,
    disk_faults,
    graceful_stop,
    read_json,
    read_jsonl,
    repair_jsonl,
    sha256_of,
)

NAMED = 20
"""Unjudged answers that are named; the rest is counted."""


def key_of(body: Mapping[str, Any], repeat: int = 0) -> str:
    """What a reply is kept under: the request to the letter, and how often the same one was sent about this answer."""
    return sha256_of({"request": body, "repeat": repeat})


@dataclass(slots=True)
class Talk:
    """What was asked about one answer, and replied; `done` where the rule needs no more, else `why` it stopped."""

    item: Item
    text: str
    asks: list[Ask] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    done: bool = False
    why: str = ""


class Replay:
    """Replies from a file, whatever wrote it.

    A cache of ours, or the output of a batch (OpenAI's form, of the requests that `--dry-run` wrote): joined by what
    was asked. JSON lines with `question_id` and `content` (LLaVA's reviews), or a JSON object of question_id -> reply
    or successive replies: joined by id; where replies run out they begin again. A JSON list: one reply per question, in
    the order of the questions' file.

    Raises DataError where it is none of these, or does not fit the questions.
    """

    def __init__(self, path: Path, row: TaskRow, items: Sequence[Item]) -> None:
        self.path = path
        self.by_key: dict[str, str] = {}
        self.by_id: dict[str, list[str]] = {}
        self.models: set[str] = set()
        if path.suffix == ".json":
            given = read_json(path)
            if isinstance(given, list):
                given = self._in_order(given, items)
        else:
            given = self._lines()
        if not isinstance(given, dict):
            raise DataError(f"{path}: replies are an object or a list, not a {type(given).__name__}.")
        names = {name: item.question_id for item in reversed(items) for name in FORMS[row.form].keys(item)}
        names |= {item.question_id: item.question_id for item in items}
        foreign = [name for name in given if name not in names]
        if foreign:
            raise DataError(
                f"{path}: {len(foreign)} of {len(given)} replies are about no question of {row.id!r}, "
                f"first {foreign[0]!r}. Replies are joined by question_id."
            )
        for name, said in given.items():
            replies = [said] if isinstance(said, str) else said
            if not isinstance(replies, list) or not replies or not all(isinstance(reply, str) for reply in replies):
                raise DataError(f"{path}, {name!r}: a reply is a text, or a list of at least one.")
            self.by_id.setdefault(names[name], []).extend(replies)

    def _in_order(self, given: list[Any], items: Sequence[Item]) -> dict[str, Any]:
        if len(given) != len(items):
            raise DataError(
                f"{self.path}: {len(given)} replies without ids for {len(items)} questions: which belongs to which "
                "cannot be told. Give an object of question_id -> reply."
            )
        return {item.question_id: reply for item, reply in zip(items, given, strict=True)}

    def _lines(self) -> dict[str, Any]:
        """Replies by id; those by what was asked go to `by_key`."""
        named: dict[str, list[str]] = {}
        for number, record in enumerate(read_jsonl(self.path), 1):
            if isinstance(record, dict) and "key" in record and "reply" in record:
                self.by_key.setdefault(str(record["key"]), str(record["reply"]))
                self.models |= {str((record.get("request") or {}).get("model", "")) or "?"} - {"?"}
            elif isinstance(record, dict) and "custom_id" in record:
                body = (record.get("response") or {}).get("body") or {}
                if choices := body.get("choices"):  # a request of the batch that failed is asked about nowhere
                    key = str(record["custom_id"]).rpartition("/")[2]
                    self.by_key.setdefault(key, choices[0]["message"].get("content") or "")
            elif isinstance(record, dict) and "question_id" in record and isinstance(record.get("content"), str):
                named.setdefault(str(record["question_id"]), []).append(record["content"])
            else:
                raise DataError(
                    f"{self.path}, line {number}: no reply. A line has `key` and `reply` (our cache), `custom_id` and "
                    "`response` (a batch), or `question_id` and `content`."
                )
        return named

    def find(self, item: Item, key: str, number: int) -> str | None:
        """The reply to request `number` about an answer, counted from 0."""
        if (said := self.by_key.get(key, self.by_key.get(key[:SHORT_KEY]))) is not None:
            return said
        replies = self.by_id.get(item.question_id)
        return replies[number % len(replies)] if replies else None

    def is_again(self, item: Item, key: str, number: int) -> bool:
        """Whether that reply was given before, since there are no more about this answer."""
        by_key = key in self.by_key or key[:SHORT_KEY] in self.by_key
        return not by_key and number >= len(self.by_id.get(item.question_id, ()))


SHORT_KEY = 32
"""Letters of a key that go into the id of a request in a batch, where ids are short."""


class Judge:
    """Answers requests of rules, from what is known first.

    endpoint  None asks nobody: what is not known is unjudged.
    model     the judge's name; None takes the endpoint's, and where that has none the one that the published figures
              were made with.
    cache     file of replies, made where it is missing; None keeps nothing.
    replay    file of replies, only read.
    parallel  requests at once.
    """

    def __init__(
        self,
        *,
        endpoint: Endpoint | None = None,
        model: str | None = None,
        cache: str | Path | None = None,
        replay: str | Path | None = None,
        parallel: int = 8,
    ) -> None:
        if parallel < 1:
            raise RecipeError(f"{parallel} requests at once: at least one is needed.")
        self.endpoint, self.parallel = endpoint, parallel
        self.model = model or (endpoint.model if endpoint is not None else "") or None
        self.cache = Path(cache) if cache is not None else None
        self.replay = Path(replay) if replay is not None else None
        self._known: dict[tuple[str, str], str] = {}
        self._models: set[str] = set()
        self._found: str | None = None
        self._read = False
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def name(self, judging: Judging) -> str:
        """Who judges: as it was given, as the replies on disk say where they agree, else as the rule's authors did."""
        return self.model or self._found or judging.model

    def talks(
        self, row: TaskRow, judging: Judging, items: Sequence[Item], texts: Mapping[str, str], *, send: bool = True
    ) -> list[Talk]:
        """Every talk about the answers there are, as far as it came; in the order of `items`.

        send  False asks nobody.

        Raises:
            DataError: the replay or the cache is not what it should be.
            EnvironmentFault: the endpoint refuses, or is silent after all tries; what came is in the cache.
            Interrupted: stopped by Ctrl-C or SIGTERM; what came is in the cache.
        """
        self.counts = Counter()
        replay = Replay(self.replay, row, items) if self.replay is not None else None
        self._load()
        asked = {*self._models, *(replay.models if replay is not None else ())}
        self._found = asked.pop() if len(asked) == 1 and self.endpoint is None else None
        talks = [Talk(item, texts[item.question_id]) for item in items if item.question_id in texts]
        if judging.worth is not None:
            worth = set(judging.worth(items, texts))
            for talk in talks:
                talk.done = talk.item.question_id not in worth
        for talk in [talk for talk in talks if not talk.done]:
            self._advance(talk, judging, replay)
        waiting = [talk for talk in talks if not talk.done]
        if send and self.endpoint is not None and waiting:
            with graceful_stop(), Progress(len(waiting), f"judging {row.id}", "answers") as progress:
                for _ in at_once(waiting, lambda talk: self._ask_on(talk, row, judging), self.parallel):
                    progress.advance()
        return talks

    def next_ask(self, talk: Talk, judging: Judging) -> tuple[Ask, dict[str, Any], int] | None:
        """(what to ask next, the request's body, how often it was sent about this answer); None where all is said."""
        ask = judging.ask(talk.item, talk.text, talk.replies)
        if ask is None:
            return None
        return ask, ask.body(self.name(judging)), talk.asks[: len(talk.replies)].count(ask)

    def _load(self) -> None:
        if self._read or self.cache is None:
            return
        self._read = True
        with disk_faults(self.cache, "Name another file for the judge's replies."):
            repair_jsonl(self.cache)
        for number, record in enumerate(read_jsonl(self.cache) if self.cache.exists() else [], 1):
            try:
                self._remember(record["judge"], record["key"], record["reply"])
                self._models.add(record["request"]["model"])
            except (KeyError, TypeError):
                raise DataError(
                    f"{self.cache}, line {number}: no reply of a judge (it needs judge, key, request and reply). Is "
                    "it another file? Name one of its own, or delete the line."
                ) from None

    def _remember(self, url: str, key: str, reply: str) -> None:
        self._known.setdefault((url, key), reply)
        self._known.setdefault(("", key), reply)

    def _find(self, talk: Talk, key: str, replay: Replay | None) -> str | None:
        number = len(talk.replies)
        if replay is not None and (said := replay.find(talk.item, key, number)) is not None:
            self.counts["replayed"] += 1
            self.counts["begun_again"] += replay.is_again(talk.item, key, number)
            return said
        # Without an endpoint any judge of that name will do: its replies were kept to be read again.
        said = self._known.get((self.endpoint.url if self.endpoint is not None else "", key))
        self.counts["cached"] += said is not None
        return said

    def _advance(self, talk: Talk, judging: Judging, replay: Replay | None) -> None:
        """Go on with a talk as far as what is known reaches."""
        while (asked := self.next_ask(talk, judging)) is not None:
            ask, body, repeat = asked
            said = self._find(talk, key_of(body, repeat), replay)
            if said is None:
                talk.why = f"no reply is known to request {len(talk.replies) + 1}"
                return
            talk.asks.append(ask)
            talk.replies.append(said)
        talk.done, talk.why = True, ""

    def _ask_on(self, talk: Talk, row: TaskRow, judging: Judging) -> None:
        """Go on with a talk to its end; in a thread of its own."""
        assert self.endpoint is not None
        while (asked := self.next_ask(talk, judging)) is not None:
            ask, body, repeat = asked
            try:
                reply = self.endpoint.complete(body)
            except Filtered as fault:
                talk.why = str(fault)
                return
            self._keep(talk, row, body, repeat, reply)
            talk.asks.append(ask)
            talk.replies.append(reply.text)
        talk.done, talk.why = True, ""

    def _keep(self, talk: Talk, row: TaskRow, body: dict[str, Any], repeat: int, reply: Completion) -> None:
        assert self.endpoint is not None
        key = key_of(body, repeat)
        record = {
            "key": key,
            "judge": self.endpoint.url,
            "task": row.id,
            "question_id": talk.item.question_id,
            "number": len(talk.replies),
            "repeat": repeat,
            "request": body,
            "reply": reply.text,
            "said_by": reply.model,
            "finish": reply.finish,
            "usage": reply.usage,
        }
        with self._lock:
            self.counts["asked"] += 1
            for name in ("prompt_tokens", "completion_tokens"):
                self.counts[name] += reply.usage.get(name, 0)
            if self.cache is not None:
                with disk_faults(self.cache, "What came before is kept; the same command asks only what is missing."):
                    append_jsonl(self.cache, record)
            self._remember(self.endpoint.url, key, reply.text)

    def facts(self, judging: Judging, talks: Sequence[Talk]) -> dict[str, Any]:
        """What a score must say of its judge: who, how often, from where; which answers nobody judged."""
        unjudged = {talk.item.question_id: talk.why for talk in talks if not talk.done}
        facts: dict[str, Any] = {
            "model": self.name(judging),
            "published_with": judging.model,
            "from": self.endpoint.url if self.endpoint is not None else str(self.replay or self.cache),
            "requests": sum(len(talk.replies) for talk in talks),
            "asked_again": sum(len(talk.replies) > 1 for talk in talks),
            **{name: self.counts[name] for name in ("asked", "cached", "replayed")},
            "unjudged": len(unjudged),
            "unjudged_ids": dict(list(unjudged.items())[:NAMED]),
        }
        if self.counts["begun_again"]:
            facts["begun_again"] = self.counts["begun_again"]
        if self.counts["asked"]:
            facts["tokens"] = {name: self.counts[name] for name in ("prompt_tokens", "completion_tokens")}
        return facts


def settled(row: TaskRow, talks: Sequence[Talk], *, allow: bool) -> dict[str, list[str]]:
    """question_id -> all replies, of the talks that are done. DataError where some are not, unless that is allowed."""
    open_ = [talk for talk in talks if not talk.done]
    if open_ and not allow:
        named = ", ".join(talk.item.question_id for talk in open_[:NAMED])
        raise DataError(
            f"{len(open_)} of {len(talks)} answers to {row.id!r} are unjudged ({open_[0].why}): {named}"
            f"{', ...' if len(open_) > NAMED else ''}. Give --judge URL to ask about them (what is known is not asked "
            "again), or count them as wrong with --allow-missing."
        )
    return {talk.item.question_id: list(talk.replies) for talk in talks if talk.done}


def open_judge(
    answers: str | Path,
    *,
    url: str | None = None,
    model: str | None = None,
    key_env: str | None = None,
    cache: str | Path | None = None,
    replay: str | Path | None = None,
    parallel: int = 8,
) -> Judge | None:
    """The judge that a command line means, whose replies are kept beside the answers; None where it names none.

    Replies that were kept for these answers are read without an endpoint too.
    """
    answers = Path(answers)
    kept = Path(cache) if cache is not None else answers.with_name(f"{answers.stem}.judge.jsonl")
    if url is None and replay is None and not kept.exists():
        if cache is not None:
            raise DataError(f"{kept}: there are no replies, and --judge names nobody who could be asked.")
        return None
    endpoint = Endpoint(url, model or "", key_env=key_env) if url is not None else None
    return Judge(endpoint=endpoint, model=model, cache=kept, replay=replay, parallel=parallel)


def price_of(text: str) -> tuple[float, float]:
    """`2.5,10` -> the prices of a million tokens asked and replied; one number for both."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 <= number < float("inf") for number in numbers):
        raise RecipeError(f"--price {text}: give what a million tokens cost, as 2.5,10 (those asked, those replied)")
    return numbers[0], numbers[-1]


# --- before anything is spent ---------------------------------------------------------------------------------------


def tokens_of(text: str) -> int:
    """About how many tokens a judge counts: four letters each in ASCII, one each beyond."""
    plain = sum(letter.isascii() for letter in text)
    return -(-plain // 4) + len(text) - plain


def plan(
    judge: Judge,
    row: TaskRow,
    judging: Judging,
    items: Sequence[Item],
    texts: Mapping[str, str],
    path: str | Path,
    price: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Write the requests that would be sent now, and say how many, how long and how dear they are. Sends nothing.

    path   one JSON line a request, in the form of OpenAI's batches: what a batch gives back can be replayed.
    price  of a million tokens, of what is asked and of what is replied, in any currency.

    Returns `{"answers", "known", "model", "requests", "requests_at_most", "input_tokens", "output_tokens_at_most",
    "cost_at_most", "file"}`; tokens are estimates; the cost is there with a price. What follows a reply that cannot be
    read is in `requests_at_most` and in no other figure.
    """
    talks = judge.talks(row, judging, items, texts, send=False)
    lines, read, said, most = [], 0, 0, 0
    for talk in talks:
        if talk.done or (asked := judge.next_ask(talk, judging)) is None:
            continue
        _, body, repeat = asked
        name = f"{talk.item.question_id[:20]}/{len(talk.replies)}/{key_of(body, repeat)[:SHORT_KEY]}"
        lines.append({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})
        read += sum(tokens_of(message["content"]) + 4 for message in body["messages"])
        said += body["max_tokens"]
        most += judging.most - len(talk.replies)
    atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    facts: dict[str, Any] = {
        "answers": len(talks),
        "known": len(talks) - len(lines),
        "model": judge.name(judging),
        "requests": len(lines),
        "requests_at_most": most,
        "input_tokens": read,
        "output_tokens_at_most": said,
    }
    if price is not None:
        facts["cost_at_most"] = round((read * price[0] + said * price[1]) / 1e6, 4)
    return {**facts, "file": str(path)}
