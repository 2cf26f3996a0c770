"""Rules of the yes/no and choice benchmarks to the letter: extraction, draws, curves; and a model asked by them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from choice_fakes import RED, mmbench, mme, png, put, rotations, table
from evaluate_fakes import FakeEngine, FakeModel
from leveret.evaluate import TASKS, evaluate, load_items, score
from leveret.evaluate.curves import auc_pr, auc_roc
from leveret.evaluate.forms import Item
from leveret.evaluate.judges import Judge
from leveret.evaluate.letters import by_priority, can_infer, can_infer_earlier, mmmu_letter
from leveret.evaluate.scorers import SCORERS, draws
from leveret.evaluate.scorers.asking import bound
from leveret.evaluate.scorers.cmmmu import said_letters, said_truth, said_values
from leveret.evaluate.scorers.mmmu import open_right, open_values
from leveret.evaluate.tasks import subset
from leveret.images import load
from leveret.runs import DataError, read_jsonl

PETS = {"A": "cat", "B": "a big dog", "C": "cow", "D": "cat fish"}

# --- letters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("(B)", "B"), ("B.", "B"), ("Answer: B", "B"), ("B: a big dog", "B"), ("b", None), ("", None),
        ("A or B", None), ("(A) is wrong, (B) is right", None),
        ("A big dog and some other things", "B"),  # an A early on is no letter, and the text decides
        ("B is what I would say here", None),  # not among the last four words
        ("The correct answer is **B**. Here is why: it fits best.", "B"),
        ("The answer is a mystery", "A"),  # the article, taken for a letter
        ("I see the COW.", "C"), ("cat fish", None),  # two options' texts
        ("cow " * 12, None),  # longer than all options twice
        ("Cannot determine the answer, B", "Z"), ("Z", "Z"), ("E", None),
        ("Failed to obtain answer via API: B", None),
    ],
)  # fmt: skip
def test_can_infer(text: str, letter: str | None) -> None:
    assert can_infer(text, PETS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("(B)", "B"), ("B)", "B"), ("answer :B.", "B"), ("A bird is it", None), ("A is it", "A"),
        ("A. is it I say", "A"), ("E", "E"), ("**B**", None), ("", None), ("a cow", "C"),
    ],
)  # fmt: skip
def test_the_earlier_can_infer(text: str, letter: str | None) -> None:
    assert can_infer_earlier(text, PETS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("**B**", "B"), ("The correct answer is **B**. It fits.", "B"), ("I would choose C", "C"), ("B or C", "B"),
        ("First A, then (C)", "C"), ("neither", None), ("", None), ("  ", None), ("D: yes", "D"), ("CAB", "B"),
        ("答案是C", "C"), ("DNA helix", "A"),
    ],
)  # fmt: skip
def test_letters_by_priority(text: str, letter: str | None) -> None:
    assert by_priority(text, "ABCD") == letter


@pytest.mark.parametrize(
    ("text", "letter", "loose"),
    [
        ("(B)", "B", "B"), ("B.", "B", "B"), ("the answer is (A) or (C)", "C", "C"), ("A blue bus", "A", "A"),
        ("B: text", None, None), ("B) text", None, None), ("**B**", None, None), ("b", None, None),
        ("B\nso it is", None, None), ("answer:B", None, "B"), ("", None, None), ("B. a big dog", None, "B"),
        ("it must be a COW, or so it seems", "C", "C"), ("a cow", None, None), ("CAB it", None, "B"),
    ],
)  # fmt: skip
def test_mmmu_letters(text: str, letter: str | None, loose: str | None) -> None:
    assert mmmu_letter(text, PETS) == letter and mmmu_letter(text, PETS, loose=True) == loose


@given(st.text(max_size=60))
def test_no_text_stops_a_reader(text: str) -> None:
    assert can_infer(text, PETS) in (None, "Z", *PETS)
    for found in (by_priority(text, "ABCD"), mmmu_letter(text, PETS), mmmu_letter(text, PETS, loose=True)):
        assert found is None or found in PETS
    assert can_infer_earlier(text, PETS) in (None, *"ABCDE")
    assert said_truth(text) in (None, "对", "错")
    letters = said_letters(text, PETS)
    assert letters is None or letters == "".join(sorted(set(letters)))
    assert isinstance(open_values(text), set) and isinstance(said_values(text, "3"), set)


# --- open answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("3.75", "The value is 3.754 volts", True), ("3.75", "3,75", False), ("C", "It is point C.", True),
        ("C", "C", True), ("C", "chlorine", False), ("9876.5", "it came to 9,876.5", False),
        ("9876", "it came to 9,876.5", True), ("9876.5", "9,876.5", True),
        ("transformation", "It is a linear Transformation.", True), ("5", "x = 5", True), ("5", "", False),
        (["0.4", "2/5"], "so it is 2/5", True), ("-2e3", "result -2e3 J", True),
        ("all", "The end is 3\nThat is all.", True),
    ],
)  # fmt: skip
def test_open_answers_of_mmmu(gold: Any, text: str, right: bool) -> None:
    assert open_right(gold, open_values(text)) is right


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("对", "对"), ("错误", "错"), ("这个说法是错误的。", "错"), ("不正确", "对"), ("不对", "对"),
        ("是否正确", None), ("", None),
        ("答案是对\n答案是错", None),
    ],
)  # fmt: skip
def test_truths_of_cmmmu(text: str, truth: str | None) -> None:
    assert said_truth(text) == truth


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("(A)和(C)", "AC"), ("(A)(B)(B)", "B"), ("答案:BD", "BD"), ("AI", "A"), ("是猫", None),
        ("古埃及", "C"), ("DAD", "D"),
    ],
)  # fmt: skip
def test_choices_of_cmmmu(text: str, letters: str | None) -> None:
    assert said_letters(text, {"A": "巴比伦", "C": "古埃及"}) == letters


# --- what cannot be read ---------------------------------------------------------------------------------------------


def outputs(root: Path, texts: dict[str, list[str]]) -> Path:
    for subject, said in texts.items():
        records = [
            {"id": f"validation_{subject}_{k}", "question_type": "multiple-choice", "answer": "B", "response": text,
             "all_choices": list(PETS), "index2ans": PETS}
            for k, text in enumerate(said)
        ]  # fmt: skip
        put(root / subject / "output.json", json.dumps(records))
    return root


def test_mmmu_fallbacks_are_counted_and_bounded(tmp_path: Path) -> None:
    root = outputs(tmp_path, {"Sociology": ["B", "?", "A"], "Art": ["?", "(B)", "?", "?"]})
    found = {rule: score("mmmu", root, root, rule=rule) for rule in TASKS["mmmu"].rules if rule != "eval_only"}
    strict = found["official_fallback_wrong"]
    assert strict["score"] == pytest.approx(2 / 7) and strict["unparsable"] == 4
    assert strict["metrics"]["any_seed_bounds"] == pytest.approx([2 / 7, 6 / 7])
    assert strict["metrics"]["fallback_ids"] == [
        f"validation_{s}_{k}" for s, k in (("Art", 0), ("Art", 2), ("Art", 3), ("Sociology", 1))
    ]
    rng = random.Random(42)  # subjects in alphabetical order
    drawn = sum(rng.choice("ABCD") == "B" for _ in range(4))
    assert found["official_with_fallback"]["score"] == pytest.approx((2 + drawn) / 7)
    low, high = strict["metrics"]["any_seed_bounds"]
    assert all(low <= one["score"] <= high for one in found.values())
    # By the id alone: neither the company nor the order of an answer changes what is drawn for it.
    parts = {"Art": ["?", "(B)", "?", "?"], "Sociology": ["B", "?", "A"]}
    alone = [outputs(tmp_path / "alone" / name, {name: said}) for name, said in parts.items()]
    right = sum(round(score("mmmu", part, part)["score"] * len(parts[part.name])) for part in alone)
    assert found["official_no_fallback"]["score"] == pytest.approx(right / 7)


def test_draws_are_spread_over_the_options() -> None:
    said = [draws.by_id(Item(str(k), None, "", "A"), "ABCD") for k in range(2000)]
    assert all(430 < said.count(letter) < 570 for letter in "ABCD")


def test_mmmu_answers_without_options_name_the_rule_that_fits(tmp_path: Path) -> None:
    gold = {"validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "B"},
            "validation_Art_2": {"question_type": "short-answer", "ground_truth": ["2", "two"]}}  # fmt: skip
    put(tmp_path / "answer_dict_val.json", json.dumps(gold))
    put(tmp_path / "said.json", json.dumps({"validation_Art_2": "two of them", "validation_Art_1": "B"}))
    with pytest.raises(DataError, match="eval_only"):
        score("mmmu", tmp_path / "said.json", tmp_path)
    assert score("mmmu", tmp_path / "said.json", tmp_path, rule="eval-only")["score"] == 1.0
    with pytest.raises(DataError, match=r"no <Subject>/output\.json"):
        (tmp_path / "empty").mkdir()
        score("mmmu", tmp_path / "empty", tmp_path)
    put(tmp_path / "other/X/output.json", json.dumps([{"id": "mmmu-1", "question_type": "open", "answer": "1"}]))
    with pytest.raises(DataError, match="'mmmu-1'"):
        load_items("mmmu", tmp_path / "other")
    with pytest.raises(DataError, match="hold right answers but no questions"):
        evaluate(FakeModel(), tmp_path, "mmmu", out=tmp_path / "out", engine=FakeEngine(lambda _: "B"))


def cmmmu(root: Path) -> Path:
    options = {"option1": "甲", "option2": "乙", "option3": "丙"}
    base = {"category": "商业", "subcategory": "会计", "img_list": ["a.png", "b.png"], "option4": None}
    rows = [base | {"id": 1, "type": "选择", "question": "问", "answer": "AC"} | options,
            base | {"id": 2, "type": "判断", "question": "问", "answer": "错"},
            base | {"id": 3, "type": "填空", "question": "问", "answer": "12"}]  # fmt: skip
    put(root / "cmmmu-data-val-answer.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return root


def test_cmmmu_kinds_of_answers(tmp_path: Path) -> None:
    root = cmmmu(tmp_path)
    items = load_items("cmmmu", root)
    assert items[0].image is not None and items[0].image.path.endswith("images/a.png")
    said = [{"id": "1", "response": "甲" + "丙"}, {"id": 2, "response": "错"}, {"id": 3, "response": "是12。"}]
    found = score("cmmmu", said, root)
    assert found["score"] == 1.0 and found["metrics"]["Business"] == {"correct": 3, "n": 3, "acc": 1.0}
    blank = [{"id": k, "response": ""} for k in (1, 2, 3)]
    found = score("cmmmu", blank, root, rule="official_with_fallback")
    assert found["metrics"]["fallback_ids"] == ["2"] and found["metrics"]["any_seed_bounds"] == [
        0.0,
        pytest.approx(1 / 3),
    ]
    parsed = [{"id": 1, "type": "选择", "answer": "AC"}, {"id": 2, "type": "判断", "answer": "错"},
              {"id": 3, "type": "填空", "answer": "12.0"}]  # fmt: skip
    found = score("cmmmu", parsed, root)
    assert found["rule"] == "official_answer_mode" and found["score"] == 1.0
    assert score("cmmmu", [{"id": 1, "answer": "A"}], root, allow_missing=True)["missing"] == 2


# --- probabilities ---------------------------------------------------------------------------------------------------


def roc_by_pairs(labels: list[int], scores: list[float]) -> float:
    pairs = [(x, y) for x, a in zip(scores, labels, strict=True) for y, b in zip(scores, labels, strict=True) if a > b]
    return sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in pairs) / len(pairs)


def precision_by_thresholds(labels: list[int], scores: list[float]) -> float:
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [label for label, value in zip(labels, scores, strict=True) if value >= threshold]
        recall = sum(taken) / sum(labels)
        total += (recall - before) * sum(taken) / len(taken)
        before = recall
    return total


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=2, max_size=30))
def test_curves_equal_their_definitions(rows: list[tuple[int, int]]) -> None:
    labels, scores = [a for a, _ in rows], [b / 5 for _, b in rows]
    roc, pr = auc_roc(labels, scores), auc_pr(labels, scores)
    assert (roc is None) == (len(set(labels)) < 2) and (pr is None) == (1 not in labels)
    if roc is not None:
        assert roc == pytest.approx(roc_by_pairs(labels, scores))
    if pr is not None:
        assert pr == pytest.approx(precision_by_thresholds(labels, scores))


def test_curves_of_several_classes() -> None:
    rng = np.random.default_rng(1)
    labels, shares = rng.integers(0, 4, 40).tolist(), rng.dirichlet(np.ones(4), 40)
    pairs = []
    for a in range(4):
        for b in range(a + 1, 4):
            rows = [k for k, label in enumerate(labels) if label in (a, b)]
            sides = [
                roc_by_pairs([int(labels[k] == s) for k in rows], [float(shares[k, s]) for k in rows]) for s in (a, b)
            ]
            pairs.append(sum(sides) / 2)
    assert auc_roc(labels, shares) == pytest.approx(sum(pairs) / 6)
    rest = [precision_by_thresholds([int(x == c) for x in labels], shares[:, c].tolist()) for c in range(4)]
    assert auc_pr(labels, shares) == pytest.approx(sum(rest) / 4)
    assert auc_roc([2, 2], [[0, 0, 1], [0, 0, 1]]) is None and auc_pr([], []) is None


# --- a model is asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["mme", "mmbench"])
def test_a_part_of_a_benchmark_keeps_what_belongs_together(tmp_path: Path, task: str) -> None:
    items = load_items(task, (mme if task == "mme" else mmbench)(tmp_path))
    some = subset(items, 1)
    wholes = {item.meta["whole"] for item in some}
    assert len(wholes) == 1 and some == [item for item in items if item.meta["whole"] in wholes]
    assert set(i.question_id for i in some) <= set(i.question_id for i in subset(items, 4))


def test_a_model_is_asked_about_pictures_inside_tables(tmp_path: Path) -> None:
    root = mmbench(tmp_path)

    def say(request: Any) -> str:
        colour = load(request.images[0]).getpixel((0, 0))
        wanted = "dog" if colour == (255, 0, 0) else "up"
        fitting = (line[0] for line in request.turns[0].text.split("\n") if line.endswith(f". {wanted}"))
        return next(fitting, "?")

    engine = FakeEngine(say)
    found = evaluate(FakeModel(), root, "mmbench", out=tmp_path / "out", engine=engine)["tasks"]["mmbench"]
    assert found["score"] == 1.0 and found["headline"] == "circular accuracy" and found["majority"] == 0.0
    assert found["majority_of"] == "test", "no one letter is right in every order"
    assert found["blind"] == 0.0 and len(engine.asked) == 10
    answers = tmp_path / "out/answers/mmbench.jsonl"
    assert score("mmbench", answers, root)["score"] == 1.0
    assert all(len(line) < 1000 for line in answers.read_text(encoding="utf-8").split("\n"))  # no picture in it


def test_a_model_is_asked_about_pictures_in_parquet(tmp_path: Path) -> None:
    questions = [("validation_Art_1", "What is <image 1>?", "['red', 'blue']", "A", "multiple-choice", png("red")),
                 ("validation_Art_2", "Name it.", "[]", "['x', 'blue']", "open", png("blue")),
                 ("validation_Art_3", "No picture?", "['no', 'yes']", "A", "multiple-choice", None)]  # fmt: skip
    names = ("id", "question", "options", "answer", "question_type")
    table: dict[str, Any] = {name: [row[k] for row in questions] for k, name in enumerate(names)}
    table["image_1"] = [{"bytes": row[5], "path": "p.png"} if row[5] else None for row in questions]
    (tmp_path / "Art").mkdir()
    pq.write_table(pa.table(table), tmp_path / "Art/validation-00000-of-00001.parquet", row_group_size=2)
    items = load_items("mmmu", tmp_path)
    assert [item.gold for item in items] == ["A", ["x", "blue"], "A"] and items[2].image is None
    assert [item.image.offset for item in items if item.image] == [0, 1]

    def say(request: Any) -> str:
        red = request.images and load(request.images[0]).getpixel((0, 0)) == (255, 0, 0)
        return "(A)" if red or not request.images else "blue"

    found = evaluate(FakeModel(), tmp_path, "mmmu", out=tmp_path / "out", engine=FakeEngine(say), blind=False)
    assert found["tasks"]["mmmu"]["score"] == 1.0
    put(tmp_path / "Art/test-0.parquet", "torn")
    with pytest.raises(DataError, match="no parquet file"):
        load_items("mmmu", tmp_path, "server")
    pq.write_table(pa.table({"id": ["test_Art_1"]}), tmp_path / "Art/test-0.parquet")
    with pytest.raises(DataError, match="no column question, options"):
        load_items("mmmu", tmp_path, "server")


@pytest.mark.parametrize("task", ["mme", "mmbench"])
@pytest.mark.parametrize("text", ["", "Yes", "A", "\t\n", "unsure"])
def test_a_constant_answer_stops_no_rule(tmp_path: Path, task: str, text: str) -> None:
    root = (mme if task == "mme" else mmbench)(tmp_path)
    items = load_items(task, root)
    answers = [{"question_id": item.question_id, "text": text, "task": task} for item in items]
    for rule, name in TASKS[task].rules.items():
        # Rules with a judge: test_evaluate_judges.py. This one has no replies, so what is unread counts as wrong.
        judge = Judge() if SCORERS[name].judging is not None else None
        found = score(task, answers, root, rule=rule, judge=judge, allow_missing=judge is not None)
        assert 0.0 <= found["ci95"][0] <= found["score"] <= found["ci95"][1] <= 1.0
        assert found["parsed"] + found["unparsable"] == found["n"]
    if task == "mme" and text == "Yes":  # 50 points in each subtask, whatever the constant
        assert score(task, answers, root)["metrics"]["Perception"]["subtasks"] == {"count": 50.0, "artwork": 50.0}


def test_every_rule_accepts_its_own_right_answer(tmp_path: Path) -> None:
    for task, make in (("mme", mme), ("mmbench", mmbench), ("cmmmu", cmmmu)):
        root = make(tmp_path / task)
        for scorer in (SCORERS[name] for name in sorted(set(TASKS[task].rules.values()))):
            for item in load_items(task, root):
                # Where a rule may ask a judge, none is needed about its own right answer.
                scorer = scorer if scorer.judging is None else bound(scorer, {item.question_id: []})
                assert scorer.judge(item, scorer.gold(item)).score == 1.0, (task, scorer.rule, item.question_id)


def test_a_split_that_only_its_server_knows_is_asked_beside_others(tmp_path: Path) -> None:
    root = mmbench(tmp_path)
    rows = [row | {"split": "test", "answer": ""} for row in rotations(9, ["a", "b"], 1, RED)]
    table(root / "MMBench_TEST_EN_legacy.tsv", rows)
    found = evaluate(FakeModel(), root, "mmbench", out=tmp_path / "a", engine=FakeEngine(lambda _: "A"), split="server")
    assert found["tasks"] == {} and found["unscored"]["mmbench"]["n"] == 2
    answers = read_jsonl(Path(found["unscored"]["mmbench"]["answers"]))
    assert [answer["text"] for answer in answers] == ["A", "A"] and (tmp_path / "a/report.html").is_file()
