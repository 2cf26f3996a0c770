"""Judged benchmarks: what is asked to the letter, replies kept and read back, what nobody judged named."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint_fakes import Step, refused, said, serving
from evaluate_fakes import FakeModel
from judged_fakes import ASKED, lines, llava_bench, mm_vet
from leveret.cli import run
from leveret.evaluate import evaluate, load_items, score, task_row
from leveret.evaluate.judges import Judge, Replay, open_judge, plan, price_of, tokens_of
from leveret.evaluate.scorers import SCORERS
from leveret.evaluate.scorers.judged import AGAIN, TEMPERATURES, llava_bench_pair, mm_vet_grade
from leveret.evaluate.scorers.leftovers import undecided
from leveret.evaluate.submissions.judged import SUBMISSIONS
from leveret.generate.endpoint import Endpoint
from leveret.records import Prediction
from leveret.runs import DataError, EnvironmentFault, Interrupted, RecipeError, read_jsonl


def asking(url: str, model: str = "judge-1", cache: Path | None = None, **more: Any) -> Judge:
    told: list[str] = []
    endpoint = Endpoint(url, model, first_wait=0.01, tries=4, timeout=5, tell=told.append)
    return Judge(endpoint=endpoint, model=model, cache=cache, **more)


def replayed(path: Path, replies: Any) -> Judge:
    path.write_text(json.dumps(replies), encoding="utf-8")
    return Judge(replay=path)


# --- the published figures ------------------------------------------------------------------------------------------


def golden(goldens: Path, task: str) -> tuple[Path, dict[str, Any]]:
    root = goldens / "eval" / task
    if not root.is_dir():
        pytest.skip(f"{root} is not here")
    return root, json.loads((root / "expected.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", ["mm_vet", "llava_bench_w"])
def test_scores_of_replayed_judges_equal_the_official(goldens: Path, task: str) -> None:
    root, expected = golden(goldens, task)
    judge = Judge(replay=root / "judge_replies.json")
    for rule, entry in expected["scores"].items():
        found = score(task, root / "predictions.jsonl", root, rule=rule, judge=judge)
        assert set(entry["metrics"]) <= set(found["metrics"])
        for name, value in entry["metrics"].items():
            assert found["metrics"][name] == pytest.approx(value, abs=1e-9)
        assert found["items"] == expected["n_items"] and found["judge"]["unjudged"] == 0
    first = score(task, root / "predictions.jsonl", root, judge=judge)
    assert first["rule"] == expected["primary"]


def test_requests_to_mm_vets_judge_equal_the_official(goldens: Path, tmp_path: Path) -> None:
    root, expected = golden(goldens, "mm_vet")
    row, items = task_row("mm_vet"), load_items("mm_vet", root)
    texts = {f"v1_{r['question_id']}": r["text"] for r in read_jsonl(root / "predictions.jsonl")}
    judging = SCORERS["mm_vet"].judging
    assert judging is not None
    talks = Judge(replay=root / "judge_replies.json").talks(row, judging, items, texts)
    made = [
        {
            "id": talk.item.question_id,
            "attempt": number,
            "model": judging.model,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "prompt_sha256": hashlib.sha256(ask.messages[0]["content"].encode()).hexdigest(),
            "reply": reply,
        }
        for talk in talks
        for number, (ask, reply) in enumerate(zip(talk.asks, talk.replies, strict=True))
    ]
    wanted = [
        {k: v for k, v in r.items() if k != "prompt_tail"} for r in read_jsonl(root / "judge_requests_expected.jsonl")
    ]
    assert made == wanted and len(made) == expected["judge_requests"]
    first = (root / "judge_first_prompt_expected.txt").read_text(encoding="utf-8")
    assert talks[0].asks[0].body("gpt-4-0613") == {
        "model": "gpt-4-0613",
        "messages": [{"role": "user", "content": first}],
        "temperature": 0.0,
        "max_tokens": 3,
    }
    score("mm_vet", root / "predictions.jsonl", root, judge=Judge(replay=root / "judge_replies.json"),
          grades_path=tmp_path / "grades.json")  # fmt: skip
    grades = json.loads((tmp_path / "grades.json").read_text(encoding="utf-8"))
    assert grades == json.loads((root / "grades_expected.json").read_text(encoding="utf-8"))


def test_requests_to_llava_benchs_judge_equal_the_official(goldens: Path, tmp_path: Path) -> None:
    root, _ = golden(goldens, "llava_bench_w")
    row, items = task_row("llava_bench_w"), load_items("llava_bench_w", root)
    texts = {str(r["question_id"]): r["text"] for r in read_jsonl(root / "predictions.jsonl")}
    judging = SCORERS["llava_bench_w"].judging
    assert judging is not None
    talks = Judge(replay=root / "judge_replies.json").talks(row, judging, items, texts)
    wanted = read_jsonl(root / "judge_requests_expected.jsonl")
    assert len(talks) == len(wanted)
    for talk, record in zip(talks, wanted, strict=True):
        body = talk.asks[0].body(judging.model)
        assert {name: body[name] for name in ("model", "temperature", "max_tokens")} == {
            name: record[name] for name in ("model", "temperature", "max_tokens")
        }
        told = json.dumps(body["messages"], sort_keys=True).encode()
        assert hashlib.sha256(told).hexdigest() == record["messages_sha256"]
        assert record["user"] in (None, body["messages"][1]["content"])
    score("llava_bench_w", root / "predictions.jsonl", root, judge=Judge(replay=root / "judge_replies.json"),
          grades_path=tmp_path / "reviews.jsonl")  # fmt: skip
    assert read_jsonl(tmp_path / "reviews.jsonl") == read_jsonl(root / "reviews_expected.jsonl")


def test_the_file_for_mm_vets_server_equals_the_official(goldens: Path, tmp_path: Path) -> None:
    root, _ = golden(goldens, "mm_vet")
    items = load_items("mm_vet", root)
    texts = {f"v1_{r['question_id']}": r["text"] for r in read_jsonl(root / "predictions.jsonl")}
    name, write = SUBMISSIONS["mm_vet"]
    write(items, texts, tmp_path / name)
    made = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    expected = json.loads((root / "submission_expected.json").read_text(encoding="utf-8"))
    assert made == expected and list(made) == list(expected)
    found = score("mm_vet", tmp_path / name, root, judge=Judge(replay=root / "judge_replies.json"))
    assert found["score"] == pytest.approx(0.36875)  # the server's own file is a file of answers too
    with pytest.raises(DataError, match="1 are missing"):
        write(items, {k: v for k, v in texts.items() if k != items[3].question_id}, tmp_path / name)


# --- rules, without goldens -----------------------------------------------------------------------------------------


@given(st.text(max_size=12))
def test_any_reply_is_a_grade_or_none(reply: str) -> None:
    grade = mm_vet_grade(reply)
    assert grade is None or 0 <= grade <= 1
    pair = llava_bench_pair(reply)
    assert pair is None or all(map(math.isfinite, pair))


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("0.7", 0.7), ("1", 1.0), ("0.0 | done", 0.0), ("0.3.", None), (" 0.5", None), ("0.5\n", 0.5), ("1.5", None),
     ("-0.1", None), ("", None), ("nan", None), ("inf", None), ("Correctness: 0.2", None)],
)  # fmt: skip
def test_grades(reply: str, grade: float | None) -> None:
    assert mm_vet_grade(reply) == grade


@pytest.mark.parametrize(
    ("reply", "pair"),
    [("8 9\nmore", (8, 9)), ("7.5 8.5", (7.5, 8.5)), ("10,2", (10, 2)), ("10, 2", None), ("8 7 ", None),
     ("\n7 9", None), ("7/10 2/10", None), ("8", None), ("", None), ("8 9 10", None), ("nan 3", None)],
)  # fmt: skip
def test_pairs(reply: str, pair: tuple[float, float] | None) -> None:
    assert llava_bench_pair(reply) == pair


def test_mm_vet_is_asked_again_and_hotter_until_a_grade_is_read(tmp_path: Path) -> None:
    root, answers = mm_vet(tmp_path)
    script = {"v1_0": ["bad"] * 5 + ["0.9"], "v1_1": ["2", "0.4"], "v1_7": ["1.0"], "v1_12": ["", "", "0.5"]}
    found = score("mm_vet", answers, root, judge=replayed(tmp_path / "replies.json", script),
                  items_path=tmp_path / "items.jsonl")  # fmt: skip
    told = {r["question_id"]: (r["score"], r["parsed"], r["requests"]) for r in read_jsonl(tmp_path / "items.jsonl")}
    # The fifth retry comes too late: the original fetches it and does not read it.
    assert told == {"v1_0": (0.0, "0.9", 6), "v1_1": (0.4, "0.4", 2), "v1_7": (1.0, "1.0", 1), "v1_12": (0.5, "0.5", 3)}
    assert found["metrics"]["capability"]["rec"] == round(100 * (0.4 + 1.0 + 0.5) / 3, 1)
    assert found["metrics"]["integration"] == {
        "math_ocr": 0.0, "rec": 45.0, "gen_know_rec": 100.0, "total": 47.5, "std": 0.0, "runs": "[np.float64(47.5)]"
    }  # fmt: skip
    assert found["unparsable"] == 1 and found["judge"]["requests"] == 12 and found["judge"]["asked_again"] == 3
    row, items = task_row("mm_vet"), load_items("mm_vet", root)
    judging = SCORERS["mm_vet"].judging
    assert judging is not None
    asks = [judging.ask(items[0], "x = 3", ["bad"] * n) for n in range(7)]
    assert asks.pop() is None and [ask.temperature for ask in asks if ask] == list(TEMPERATURES)
    prompts = [ask.messages[0]["content"] for ask in asks if ask]
    assert prompts[0].endswith("\n\nWhat is x? | -1 <AND> -5 | x = 3 | ")
    assert prompts[1:] == [prompts[0] + AGAIN] * 5
    assert "begun_again" not in found["judge"]
    short = {name: said if name != "v1_0" else ["bad"] for name, said in script.items()}
    again = score("mm_vet", answers, root, judge=replayed(tmp_path / "short.json", short))
    assert again["metrics"] == found["metrics"] and again["judge"]["begun_again"] == 5
    kit = score("mm_vet", answers, root, rule="vlmevalkit-aggregation", judge=Judge(replay=tmp_path / "replies.json"))
    assert kit["metrics"]["rec"] == pytest.approx(100 * (0.4 + 1.0 + 0.5 + 0.4 + 0.5) / 5)  # the two alone count twice
    assert row.id == "mm_vet"


def test_llava_bench_joins_by_id_and_keeps_unread_reviews(tmp_path: Path) -> None:
    root, answers = llava_bench(tmp_path)
    replies = {str(n): f"8 {n}" for n in range(5)} | {"5": "nothing"}
    found = score("llava_bench_w", answers, root, judge=replayed(tmp_path / "r.json", replies),
                  grades_path=tmp_path / "reviews.jsonl")  # fmt: skip
    assert found["metrics"]["llava_bench_conv"] == {"relative": 18.8, "gpt4": 80.0, "model": 15.0}
    assert found["metrics"]["llava_bench_complex"] == {"relative": 14.3, "gpt4": 35.0, "model": 5.0}
    assert found["metrics"]["all"]["relative"] == round(1.5 / 6.5 * 100, 1)
    assert found["score"] == pytest.approx(9 / 39) and found["unparsable"] == 1
    reviews = read_jsonl(tmp_path / "reviews.jsonl")
    assert [(r["answer1_id"], r["answer2_id"], r["category"]) for r in reviews][:2] == [
        ("r0", "a0", "llava_bench_conv"),
        ("r1", "a1", "llava_bench_detail"),
    ]
    assert reviews[5]["tuple"] == [-1, -1]
    # LLaVA's own reviews, and a plain list in the questions' order, are replays too.
    for replay in (tmp_path / "reviews.jsonl", tmp_path / "list.json"):
        if replay.suffix == ".json":
            replay.write_text(json.dumps(list(replies.values())), encoding="utf-8")
        assert score("llava_bench_w", answers, root, judge=Judge(replay=replay))["metrics"] == found["metrics"]
    items = load_items("llava_bench_w", root)
    judging = SCORERS["llava_bench_w"].judging
    assert judging is not None
    ask = judging.ask(items[3], "answer 3", [])
    assert ask is not None and ask.messages[1]["content"].startswith(
        "[Context]\none.\ntwo.\n\n[Question]\nquestion 3?\n\n[Assistant 1]\nreference 3\n\n"
    )


def test_a_judge_that_reads_nothing_gives_no_ratio(tmp_path: Path) -> None:
    root, answers = llava_bench(tmp_path)
    found = score(
        "llava_bench_w", answers, root, judge=replayed(tmp_path / "r.json", {str(n): "0 5" for n in range(6)})
    )
    assert found["metrics"]["all"]["relative"] is None and found["score"] == 0.0
    kit = score("llava_bench_w", answers, root, rule="vlmevalkit_aggregation", judge=Judge(replay=tmp_path / "r.json"))
    assert kit["metrics"]["overall"] is None


# --- official files that are not as they should be ------------------------------------------------------------------


def test_faults_of_the_official_files_are_named(tmp_path: Path) -> None:
    root, _ = llava_bench(tmp_path / "a")
    questions = (root / "questions.jsonl").read_text(encoding="utf-8")
    lines(root / "context.jsonl", [{"image": "001.jpg", "caption": "x"}])
    with pytest.raises(DataError, match=r"3 of 6 questions have no caption, first question 0 \(image '000.jpg'\)"):
        load_items("llava_bench_w", root)
    root, _ = llava_bench(tmp_path / "b")
    lines(root / "answers_gpt4.jsonl", [{"question_id": 0, "text": "x"}] * 2)
    with pytest.raises(DataError, match="question_id 0 occurs more than once"):
        load_items("llava_bench_w", root)
    (root / "answers_gpt4.jsonl").unlink()
    with pytest.raises(DataError, match=r"answers_gpt4\.jsonl: there is no such file"):
        load_items("llava_bench_w", root)
    (root / "questions.jsonl").write_text(questions.replace("000.jpg", "../000.jpg"), encoding="utf-8")
    with pytest.raises(DataError):
        load_items("llava_bench_w", root)
    root, _ = mm_vet(tmp_path / "c")
    for bad in ({"v1_0": {"imagename": "a.png", "question": "?", "answer": "x", "capability": []}}, {"v1_0": {}}, []):
        (root / "mm-vet.json").write_text(json.dumps(bad), encoding="utf-8")
        with pytest.raises(DataError, match=r"mm-vet\.json"):
            load_items("mm_vet", root)


# --- replays and caches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"v1_9": "0.1"}, "about no question of 'mm_vet', first 'v1_9'"),
        (["0.1"], "1 replies without ids for 4 questions"),
        ({"v1_0": []}, "'v1_0': a reply is a text, or a list of at least one"),
        ({"v1_0": [1]}, "a reply is a text"),
        ({"v1_0": 0.5}, "a reply is a text"),
        ("0.5", "an object or a list"),
    ],
)
def test_replays_that_are_none(tmp_path: Path, content: Any, words: str) -> None:
    root, answers = mm_vet(tmp_path)
    with pytest.raises(DataError, match=re.escape(words)):
        score("mm_vet", answers, root, judge=replayed(tmp_path / "replies.json", content))


def test_replays_of_lines(tmp_path: Path) -> None:
    root, answers = mm_vet(tmp_path)
    path = lines(tmp_path / "r.jsonl", [{"question_id": n, "content": c} for n, c in ((0, "x"), (1, ".5"), (0, "1"))])
    with pytest.raises(DataError, match=r"2 of 4 answers to 'mm_vet' are unjudged .* v1_7, v1_12. Give --judge"):
        score("mm_vet", answers, root, judge=Judge(replay=path))
    found = score("mm_vet", answers, root, judge=Judge(replay=path), allow_missing=True)
    assert found["judge"]["unjudged"] == 2 and list(found["judge"]["unjudged_ids"]) == ["v1_7", "v1_12"]
    assert found["score"] == 1.5 / 4 and found["unparsable"] == 2
    lines(path, [{"question_id": 0}])
    with pytest.raises(DataError, match="line 1: no reply"):
        score("mm_vet", answers, root, judge=Judge(replay=path))
    with pytest.raises(DataError, match="no such file"):
        score("mm_vet", answers, root, judge=Judge(replay=tmp_path / "none.jsonl"))


def grade(body: dict[str, Any], number: int) -> Step:
    """What a test's judge says: by the question, unreadable at first about v1_1."""
    prompt = body["messages"][0]["content"]
    if "What is it?" in prompt and AGAIN not in prompt:
        return said("It is")
    return said("0.25" if "Explain." in prompt else "1.0")


def test_replies_are_kept_and_asked_for_once(tmp_path: Path) -> None:
    root, answers = mm_vet(tmp_path)
    cache = tmp_path / "kept" / "judge.jsonl"
    with serving(grade) as server:
        server.slow = 0.05
        first = score("mm_vet", answers, root, judge=asking(server.url, cache=cache, parallel=3))
        assert len(server.seen) == 5 and 1 < server.most_at_once <= 3
        again = score("mm_vet", answers, root, judge=asking(server.url, cache=cache))
        assert len(server.seen) == 5 and again["metrics"] == first["metrics"]
        assert (first["judge"]["asked"], again["judge"]["asked"], again["judge"]["cached"]) == (5, 0, 5)
        assert first["judge"]["tokens"] == {"prompt_tokens": 50, "completion_tokens": 10}
        assert first["judge"]["model"] == "judge-1" and first["judge"]["published_with"] == "gpt-4-0613"
        # Another answer, another judge, another address: asked again, and only that.
        changed = [r | {"text": "new"} if r["question_id"] == 0 else r for r in read_jsonl(answers)]
        score("mm_vet", changed, root, judge=asking(server.url, cache=cache))
        assert len(server.seen) == 6
        score("mm_vet", answers, root, judge=asking(server.url, "judge-2", cache=cache))
        assert len(server.seen) == 11
    kept = cache.read_bytes()
    assert kept.count(b"\n") == 11 and b"Bearer" not in kept
    # A torn last line is cut, and only its request is sent again.
    cache.write_bytes(b"".join(kept.splitlines(keepends=True)[:4]) + kept.splitlines(keepends=True)[4][:-30])
    with serving(grade) as server:
        moved = [r | {"judge": server.url} for r in read_jsonl(cache)]
        torn = cache.read_bytes().rpartition(b"\n")[2]
        lines(cache, moved)
        cache.write_bytes(cache.read_bytes() + torn)
        found = score("mm_vet", answers, root, judge=asking(server.url, cache=cache))
        assert len(server.seen) == 1 and found["metrics"] == first["metrics"]
    assert len(read_jsonl(cache)) == 5
    # Kept replies are read without anybody to ask, also as a replay, whatever the judge was called.
    for judge in (Judge(cache=cache), Judge(replay=cache), Judge(replay=cache, model="judge-1")):
        told = score("mm_vet", answers, root, judge=judge)
        assert told["metrics"] == first["metrics"] and told["judge"]["model"] == "judge-1"
    with pytest.raises(DataError, match="4 of 4 answers"):
        score("mm_vet", answers, root, judge=Judge(replay=cache, model="another"))


def test_a_cache_that_is_another_file(tmp_path: Path) -> None:
    root, answers = mm_vet(tmp_path)
    before = answers.read_bytes()
    with pytest.raises(DataError, match=r"answers\.jsonl, line 1: no reply of a judge"):
        score("mm_vet", answers, root, judge=asking("http://127.0.0.1:9", cache=answers))
    assert answers.read_bytes() == before
    broken = tmp_path / "judge.jsonl"
    broken.write_text('{"key": \n{"key": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"judge\.jsonl, line 1: not JSON"):
        score("mm_vet", answers, root, judge=Judge(cache=broken))


@pytest.mark.parametrize(
    "bad",
    [refused(429, Retry_After="0"), refused(500), {"status": 200, "body": b"garbage"}, said("x") | {"cut": 5}],
)
def test_a_judge_that_is_busy_at_first(tmp_path: Path, bad: Step) -> None:
    root, answers = mm_vet(tmp_path)
    with serving(lambda body, n: bad if n < 3 else said("0.5")) as server:
        assert score("mm_vet", answers, root, judge=asking(server.url, parallel=2))["score"] == 0.5


def test_what_came_before_a_fault_is_kept(tmp_path: Path) -> None:
    root, answers = mm_vet(tmp_path)
    cache = tmp_path / "judge.jsonl"
    with serving(lambda body, n: said("1.0") if n < 2 else refused(401, "expired")) as server:
        with pytest.raises(EnvironmentFault, match="expired"):
            score("mm_vet", answers, root, judge=asking(server.url, cache=cache, parallel=1))
        assert len(read_jsonl(cache)) == 2
        server.answer = grade
        found = score("mm_vet", answers, root, judge=asking(server.url, cache=cache))
    assert found["judge"]["cached"] == 2 and found["judge"]["unjudged"] == 0


def test_what_a_judge_refuses_is_named_and_never_guessed(tmp_path: Path) -> None:
    root, answers = mm_vet(tmp_path)

    def picky(body: dict[str, Any], n: int) -> Step:
        return refused(400, "no", "content_filter") if "Who?" in body["messages"][0]["content"] else said("1.0")

    with serving(picky) as server:
        with pytest.raises(DataError, match=r"1 of 4 answers .* content filter.*: v1_12"):
            score("mm_vet", answers, root, judge=asking(server.url))
        found = score("mm_vet", answers, root, judge=asking(server.url), allow_missing=True)
    assert found["score"] == 0.75 and list(found["judge"]["unjudged_ids"]) == ["v1_12"]


def test_ctrl_c_keeps_what_came(tmp_path: Path) -> None:
    root, answers = mm_vet(tmp_path)
    cache = tmp_path / "judge.jsonl"

    def stopping(body: dict[str, Any], n: int) -> Step:
        if n == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return said("1.0")

    with serving(stopping) as server:
        with pytest.raises(Interrupted):
            score("mm_vet", answers, root, judge=asking(server.url, cache=cache, parallel=1))
        assert 2 <= len(read_jsonl(cache)) < 4
        found = score("mm_vet", answers, root, judge=asking(server.url, cache=cache))
        assert found["score"] == 1.0 and len(server.seen) == 4


def test_no_judge_is_a_refusal(tmp_path: Path) -> None:
    root, answers = mm_vet(tmp_path)
    with pytest.raises(RecipeError, match=r"'mm_vet': its rule asks a language model .* --replay .* never compared"):
        score("mm_vet", answers, root)
    with pytest.raises(RecipeError, match="at least one"):
        Judge(parallel=0)
    assert open_judge(answers) is None
    with pytest.raises(DataError, match="there are no replies"):
        open_judge(answers, cache=tmp_path / "none.jsonl")


# --- before anything is spent ---------------------------------------------------------------------------------------


def test_a_plan_is_written_as_a_batch_and_its_output_replayed(tmp_path: Path) -> None:
    root, answers = mm_vet(tmp_path)
    row, items = task_row("mm_vet"), load_items("mm_vet", root)
    judging = SCORERS["mm_vet"].judging
    assert judging is not None
    texts = {name: f"answer to {name}" for name in ASKED}
    facts = plan(Judge(), row, judging, items, texts, tmp_path / "ask.jsonl", (30.0, 60.0))
    batch = read_jsonl(tmp_path / "ask.jsonl")
    assert facts["requests"] == len(batch) == 4 and facts["requests_at_most"] == 24 and facts["known"] == 0
    assert facts["output_tokens_at_most"] == 12 and 4 * 550 < facts["input_tokens"] < 4 * 650
    assert facts["cost_at_most"] == pytest.approx((facts["input_tokens"] * 30 + 12 * 60) / 1e6, abs=1e-4)
    assert batch[0]["body"]["model"] == "gpt-4-0613" and batch[0]["url"] == "/v1/chat/completions"
    assert len({r["custom_id"] for r in batch}) == 4 and all(len(r["custom_id"]) <= 64 for r in batch)

    def output(asked: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
        reply = said(text)["body"]
        return [{"custom_id": r["custom_id"], "response": {"status_code": 200, "body": reply}} for r in asked]

    out = [
        *output(batch[:2], "1.0"),
        *output(batch[2:3], "bad"),
        {"custom_id": batch[3]["custom_id"], "response": None},
    ]
    lines(tmp_path / "out.jsonl", out)
    # What a batch left open is what the next plan writes: here one retry, and the one that failed.
    facts = plan(Judge(replay=tmp_path / "out.jsonl"), row, judging, items, texts, tmp_path / "ask2.jsonl")
    assert facts["known"] == 2 and facts["requests"] == 2 and "cost_at_most" not in facts
    lines(tmp_path / "out.jsonl", [*out, *output(read_jsonl(tmp_path / "ask2.jsonl"), "0.5")])
    assert score("mm_vet", answers, root, judge=Judge(replay=tmp_path / "out.jsonl"))["score"] == 0.75
    # Replies are joined by what was asked: other answers find none.
    changed = [r | {"text": "other"} for r in read_jsonl(answers)]
    with pytest.raises(DataError, match="4 of 4"):
        score("mm_vet", changed, root, judge=Judge(replay=tmp_path / "out.jsonl"))


@pytest.mark.parametrize(("text", "prices"), [("30", (30, 30)), ("2.5,10", (2.5, 10)), ("0,0", (0, 0))])
def test_prices(text: str, prices: tuple[float, float]) -> None:
    assert price_of(text) == prices


@pytest.mark.parametrize("text", ["", "a", "1,2,3", "-1", "1,-2", "nan", "inf,1"])
def test_prices_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="--price"):
        price_of(text)


def test_tokens_are_estimated() -> None:
    assert tokens_of("") == 0 and tokens_of("four") == 1 and tokens_of("图中") == 2


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = run([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root, answers = mm_vet(tmp_path)
    base = ("score", "mm_vet", answers, "--data", root)
    code, out, err = told(capsys, *base)
    assert code == 2 and "--judge URL" in err
    code, out, err = told(capsys, *base, "--dry-run", "--price", "30,60", "--json")
    assert code == 0 and json.loads(out)["requests"] == 4 and len(read_jsonl(tmp_path / "answers.requests.jsonl")) == 4
    assert not (tmp_path / "answers.judge.jsonl").exists()
    monkeypatch.setenv("MY_KEY", "sk-1")
    with serving(grade) as server:
        told_ = ("--judge", server.url, "--judge-model", "j", "--judge-key", "MY_KEY", "--at-once", "2")
        code, out, err = told(capsys, *base, *told_)
        assert code == 0 and "judged by j (published with gpt-4-0613): 5 requests, 5 sent now, 0 answers" in out
        assert set(server.keys) == {"Bearer sk-1"}
        code, out, err = told(capsys, *base, *told_, "--json")
        result = json.loads(out)
        assert code == 0 and len(server.seen) == 5 and result["score"] == 0.8125
        assert {"task", "rule", "metrics", "items"} <= set(result) and result["items"] == 4
        code, out, err = told(capsys, *base, *told_, "--dry-run", "--json")
        assert json.loads(out)["requests"] == 0 and json.loads(out)["known"] == 4
    code, out, err = told(capsys, *base, "--json")  # what was kept beside the answers needs no judge
    assert code == 0 and json.loads(out)["metrics"] == result["metrics"]
    code, out, err = told(capsys, *base, "--judge", "http://u:p@h", "--judge-model", "j")
    assert code == 2 and "environment variable" in err and "u:p" not in err
    code, out, err = told(capsys, *base, "--judge", "http://h", "--judge-key", "NOT_THERE")
    assert code == 2 and "NOT_THERE is empty or not set" in err
    (tmp_path / "r.json").write_text('{"v1_0": ["0.5"]}', encoding="utf-8")
    (tmp_path / "answers.judge.jsonl").unlink()
    code, out, err = told(capsys, *base, "--replay", tmp_path / "r.json")
    assert code == 3 and "3 of 4 answers" in err and "v1_1, v1_7, v1_12" in err
    code, out, err = told(
        capsys, *base, "--replay", tmp_path / "r.json", "--allow-missing", "--grades", tmp_path / "g.json"
    )
    assert code == 0 and "3 answers unjudged (v1_1, v1_7, v1_12)" in out
    assert json.loads((tmp_path / "g.json").read_text()) == {"v1_0": {"content": ["0.5"], "score": [0.5]}}


def test_scoring_with_a_judge_imports_no_torch(tmp_path: Path) -> None:
    root, answers = mm_vet(tmp_path)
    (tmp_path / "r.json").write_text(json.dumps({name: "1" for name in ASKED}), encoding="utf-8")
    code = f"""
        import sys
        from leveret.evaluate import score
        from leveret.evaluate.judges import open_judge
        judge = open_judge({str(answers)!r}, url="http://127.0.0.1:9", replay={str(tmp_path / "r.json")!r})
        assert score("mm_vet", {str(answers)!r}, {str(root)!r}, judge=judge)["score"] == 1.0
        assert not {{"torch", "transformers", "PIL"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


# --- a whole examination --------------------------------------------------------------------------------------------


class Echo:
    """A model that answers with its question."""

    def answer(self, requests: Any, on_prediction: Any = None) -> list[Prediction]:
        made = [Prediction(r.question_id, f"answer to {r.question_id.split('/')[1]}") for r in requests]
        for prediction in made:
            on_prediction(prediction)
        return made


def test_an_examination_judges_its_answers(tmp_path: Path) -> None:
    root, _ = mm_vet(tmp_path / "data")
    out = tmp_path / "out"
    waiting = evaluate(FakeModel(), root, "mm_vet", out=out, engine=Echo())
    assert waiting["tasks"] == {} and waiting["unjudged"]["mm_vet"]["n"] == 4
    assert len(read_jsonl(Path(waiting["unjudged"]["mm_vet"]["answers"]))) == 4
    assert not (out / "answers/blind/mm_vet.jsonl").exists()
    with serving(grade) as server:
        judged = evaluate(FakeModel(), root, "mm_vet", out=out, engine=Echo(), judge=asking(server.url))
    facts = judged["tasks"]["mm_vet"]
    assert facts["score"] == 0.8125 and facts["judge"]["requests"] == 5
    assert facts["blind"] is None and facts["majority"] is None and "judge" in facts["majority_absent"]
    assert "unjudged" not in judged and (out / "report.html").stat().st_size > 500


def test_a_model_behind_an_endpoint_is_examined_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, _ = mm_vet(tmp_path / "data")

    def both(body: dict[str, Any], n: int) -> Step:
        return grade(body, n) if body["model"] == "judge" else said("a long answer")

    with serving(both) as server:
        words = ("eval", f"openai:{server.url}#tested", root, "--suite", "mm_vet", "-o", tmp_path / "out", "--json")
        code, out, err = told(capsys, *words)
        assert code == 0 and "mm_vet: 4 answers are in" in err and "--judge URL" in err
        assert len(server.seen) == 4 and {body["max_tokens"] for body in server.seen} == {1024}
        code, out, err = told(capsys, *words, "--judge", server.url, "--judge-model", "judge")
        assert code == 0 and json.loads(out)["tasks"]["mm_vet"]["score"] == 0.8125
        assert len(server.seen) == 9  # the answers of the first run were kept
        code, out, err = told(capsys, *words, "--judge", server.url, "--judge-model", "judge")
        assert code == 0 and len(server.seen) == 9


# --- leftovers ------------------------------------------------------------------------------------------------------


def mmbench(root: Path, question: str = "What is it?") -> tuple[Path, list[dict[str, Any]]]:
    """Four questions, the first three in two orders; (the data folder, answers)."""
    import base64
    import io

    from PIL import Image

    held = io.BytesIO()
    Image.new("RGB", (8, 8)).save(held, "JPEG")
    image = base64.b64encode(held.getvalue()).decode()
    rows = ["index question hint A B answer category image l2-category split".split()]
    for n, turns in ((1, 2), (2, 2), (3, 2), (4, 1)):
        for turn in range(turns):
            options = ["a {cat}", "a dog"][:: 1 if turn == 0 else -1]
            ability = ["animals", image, "attribute_reasoning", "dev"]
            rows.append([str(n + turn * 10**6), question, "", *options, "AB"[turn], *ability])
    root.mkdir(parents=True, exist_ok=True)
    (root / "MMBench_DEV_EN_legacy.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n", encoding="utf-8")
    texts = {1: "A", 1000001: " Meow! ", 2: "no idea", 1000002: "A", 3: "purring", 1000003: "purrs", 4: "woof"}
    return root, [{"question_id": n, "text": text} for n, text in reversed(texts.items())]


def test_leftovers_go_to_a_judge(tmp_path: Path) -> None:
    root, answers = mmbench(tmp_path)
    exact = score("mmbench", answers, root)
    assert exact["metrics"]["Overall"] == 0.0

    def answer(body: dict[str, Any], n: int) -> Step:
        prompt = body["messages"][0]["content"]
        if "Meow!" in prompt:
            assert prompt.endswith(
                "Example 3: \nQuestion: What is it??\nOptions: There are several options: \nA. a dog\nB. a {cat}\n\n"
                "Answer: Meow!\nYour output: "
            )
            return said("B")
        return said("Z") if "woof" in prompt else said("A" if "purring" in prompt else "both, I think")

    with serving(answer) as server:
        told_: dict[str, Any] = {"rule": "vlmevalkit_circular_judged", "items_path": tmp_path / "items.jsonl"}
        judge = asking(server.url, cache=tmp_path / "judge.jsonl")
        found = score("mmbench", answers, root, judge=judge, **told_)
        # 1: read and judged right. 2: wrong in one order, so not asked. 3: three replies without a letter. 4: Z.
        assert found["metrics"]["Overall"] == 0.25 and found["metrics"]["AR"] == 0.25
        assert len(server.seen) == 1 + 0 + (1 + 3) + 1
        items = {r["question_id"]: (r["score"], r["parsed"]) for r in read_jsonl(tmp_path / "items.jsonl")}
        assert items["1000001"] == (1.0, "B") and items["2"] == (0.0, None) and items["1000003"] == (0.0, None)
        assert items["4"] == (0.0, "Z") and items["1"] == (1.0, "A")
        again = score("mmbench", answers, root, judge=asking(server.url, cache=tmp_path / "judge.jsonl"), **told_)
        assert again["metrics"] == found["metrics"]
        assert len(server.seen) == 6  # the three same requests have three places in the cache
    with pytest.raises(DataError, match=r"4 of 7 answers to 'mmbench' are unjudged"):
        score("mmbench", answers, root, judge=Judge(), **told_)
    assert score("mmbench", answers, root, judge=Judge(), allow_missing=True, **told_)["metrics"] == exact["metrics"]
    with pytest.raises(RecipeError, match="its rule asks a language model"):
        score("mmbench", answers, root, **told_)


def test_chinese_leftovers_are_asked_in_chinese(tmp_path: Path) -> None:
    root, answers = mmbench(tmp_path, "谁")
    with serving(lambda body, n: said("A")) as server:
        score("mmbench", answers, root, rule="vlmevalkit_circular_judged", judge=asking(server.url))
    assert any(
        body["messages"][0]["content"].endswith(
            "例 3: \n问题: 谁?\n选项: There are several options: \nA. a {cat}\nB. a dog\n\n答案: woof\n输出: "
        )
        for body in server.seen
    )


def test_answers_to_what_is_not_public_are_not_judged(tmp_path: Path) -> None:
    root, answers = mmbench(tmp_path)
    table = root / "MMBench_DEV_EN_legacy.tsv"
    table.write_text(table.read_text("utf-8").replace("a dog\tA\t", "a dog\t\t"), encoding="utf-8")
    with serving(lambda body, n: said("A")) as server, pytest.raises(DataError, match="not public"):
        score("mmbench", answers, root, rule="vlmevalkit_circular_judged", judge=asking(server.url))
    assert server.seen == []


def test_only_what_can_change_a_score_is_asked() -> None:
    gold = {"a": "A", "a1": "B", "b": "A", "b1": "B", "c": "A", "d": "C", "d1": "D"}
    read = {"a": "A", "a1": None, "b": None, "b1": "C", "c": "A", "d": None, "d1": ""}
    assert undecided([("a", "a1"), ("b", "b1"), ("c",), ("d", "d1")], read, gold) == ["a1", "d", "d1"]


def test_a_replay_finds_replies_by_any_name_of_a_question(tmp_path: Path) -> None:
    root, _ = mm_vet(tmp_path)
    items = load_items("mm_vet", root)
    path = tmp_path / "r.json"
    path.write_text('{"12": ["x", "0.1"]}', encoding="utf-8")
    replay = Replay(path, task_row("mm_vet"), items)
    assert [replay.find(items[3], "k", n) for n in range(3)] == ["x", "0.1", "x"]
    assert replay.find(items[0], "k", 0) is None
