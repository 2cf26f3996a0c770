"""The rules to the letter, the joins to the id, the statistics to the resample."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluate_fakes import tiny_world
from leveret.evaluate import TASKS, load_items, rule_of, score
from leveret.evaluate.forms import FORMS, Item
from leveret.evaluate.forms.boxes import box_of
from leveret.evaluate.headlines import HEADLINES
from leveret.evaluate.scorers import SCORERS, Verdict
from leveret.evaluate.scoring import answered
from leveret.evaluate.stats import best_constants, deranged, headline, interval
from leveret.evaluate.text import box, integer, iou, m4c, one_of, scienceqa_letter, strip_punctuation
from leveret.records import ImageRef
from leveret.runs import DataError, RecipeError

# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No", "no"),
        ("no.", "no"),
        ("Yes, no doubt", "no"),
        ("It is not there", "no"),
        ("NO", "yes"),
        ("Nope", "yes"),
        ("no\nthere", "yes"),
        ("no,thanks", "yes"),
        ("", "yes"),
        ("Yes. There is no dog", "yes"),
    ],
)
def test_pope_reads_what_is_not_a_no_as_yes(text: str, expected: str) -> None:
    verdict = SCORERS["pope"].judge(Item("1", None, "", "yes"), text)
    assert verdict.parsed == expected and verdict.readable == (expected == "no" or text.startswith("Yes"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000 t-shirts", "1000 t shirts"),
        ("red,white", "redwhite"),
        ("it's", "it 's"),
        ("a - b-c", "bc"),  # one spaced hyphen deletes them all, and the article goes
        ("2.", "2"),
        ("2.30", "2.30"),
        ("None", "0"),
        ("The Ten dogs", "10 dogs"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("a\nb\tan", "b"),
    ],
)
def test_m4c(text: str, expected: str) -> None:
    assert m4c(text) == expected


def test_the_period_rule_stops_after_thirty_two() -> None:
    assert strip_punctuation("a." * 40).count(".") == 40 - 32


@given(st.text(max_size=40))
def test_normalisers_take_anything(text: str) -> None:
    assert m4c(m4c(text)) is not None and isinstance(strip_punctuation(text), str)
    assert one_of(text, "yes", "no") in ("yes", "no", None)
    assert scienceqa_letter(text) is None or scienceqa_letter(text) in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    parsed = box(text)
    assert parsed is None or len(parsed) == 4
    assert integer(text) is None or isinstance(integer(text), int)
    for name, gold in (
        ("gqa", "x"),
        ("pope", "no"),
        ("textvqa", ["x"] * 10),
        ("tally_qa_integers", 2),
        ("vsr_yes_no", True),
    ):
        verdict = SCORERS[name].judge(Item("1", None, "", gold), text)
        assert 0 <= verdict.score <= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", 3), (" 3.", 3), ("two", 2), ("There are two dogs", 2), ("2 or 3", None), ("2, two", 2), ("", None),
     ("many", None), ("2.5", None), ("-1", -1), ("Twenty", 20), ("none", 0)],
)  # fmt: skip
def test_integers_never_guess(text: str, expected: int | None) -> None:
    assert integer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("B", "B"), ("b", None), ("B.", None), ("(B)", None), ("B. blue", "B"), ("The answer is C.", "C"),
     ("The answer is C", None), ("The answer is Paris.", "P"), ("F", None),
     ("The answer is A. The answer is B.", None)],
)  # fmt: skip
def test_scienceqa_letters(text: str, expected: str | None) -> None:
    assert scienceqa_letter(text) == expected


def test_a_letter_beyond_the_choices_is_wrong() -> None:
    judge = SCORERS["scienceqa"].judge
    assert judge(Item("1", None, "", 1, meta={"choices": 2}), "B").score == 1
    assert judge(Item("1", None, "", 3, meta={"choices": 2}), "D").score == 0


@pytest.mark.parametrize(
    "text",
    ["", "[0, 0, 0, 0]", "(0.1, 0.1, 0.5, 0.5)", "[0.1, 0.1, 0.5, 0.5].", "[[0.1, 0.1, 0.5, 0.5]]", "[0.5, 0, 0.1, 1]",
     "[0.1, 0.1, 0.5]", "[0, 0, 1, 1.01]", "['0', '0', '1', '1']", "[nan, 0, 1, 1]", "[" * 500, "{}", "[1j, 0, 1, 1]"],
)  # fmt: skip
def test_boxes_that_prismatic_refuses(text: str) -> None:
    assert box(text) is None


def test_half_an_overlap_is_enough() -> None:
    judge = SCORERS["refcoco"].judge
    item = Item("1", None, "", [0.0, 0.0, 0.5, 0.5])
    assert judge(item, "[0.0, 0.0, 0.5, 0.25]").score == 1.0
    assert judge(item, "[0.0, 0.0, 0.5, 0.24]").score == 0.0
    assert iou([0, 0, 0.2, 0.2], [0.5, 0.5, 1, 1]) == 0


def test_gold_boxes_are_rounded() -> None:
    assert box_of([108.32, 186.67, 153.04, 159.72], 333, 500) == [0.33, 0.37, 0.78, 0.69]


@pytest.mark.parametrize(("said", "expected"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0), (0, 0.0)])
def test_textvqa_soft_accuracy(said: int, expected: float) -> None:
    gold = ["cat"] * said + ["dog"] * (10 - said)
    assert SCORERS["textvqa"].judge(Item("1", None, "", gold), "Cat!").score == pytest.approx(expected)


def test_gold_answers_earn_everything(tmp_path: Path) -> None:
    root = tiny_world(tmp_path, scenes=4)
    for task in ("existence", "colour", "shape", "count", "relation", "choice", "box", "word"):
        _, rule = rule_of(TASKS[task])
        answers = [{"question_id": i.question_id, "text": rule.gold(i), "task": task} for i in load_items(task, root)]
        assert score(task, answers, root)["score"] == 1.0, task


# --- joining --------------------------------------------------------------------------------------------------------


def test_missing_repeated_and_foreign_ids_are_counted_at_once(tmp_path: Path) -> None:
    root = tiny_world(tmp_path, scenes=4)
    answers = [{"question_id": f"c{k}", "text": "red"} for k in (0, 1, 1, 7, 8)]
    with pytest.raises(DataError) as fault:
        score("colour", answers, root)
    for words in ("2 foreign ids", "1 repeated ids", "2 questions without an answer", "allow_missing"):
        assert words in str(fault.value)
    with pytest.raises(DataError, match="foreign"):
        score("colour", answers, root, allow_missing=True)
    found = score("colour", answers[:2], root, allow_missing=True)
    assert (found["n"], found["missing"]) == (4, 2) and found["score"] <= 0.5
    with pytest.raises(DataError, match="there is no answer in it"):
        score("colour", [], root, allow_missing=True)


def test_answers_to_another_task_or_split_are_refused_though_their_ids_fit(tmp_path: Path) -> None:
    root = tiny_world(tmp_path, scenes=4)

    def answers(task: str, split: str = "test") -> list[dict[str, Any]]:
        return [
            {"question_id": i.question_id, "prompt": i.prompt, "text": "yes", "answer_id": "a", "task": task}
            for i in load_items(task, root, split)
        ]

    assert score("existence", answers("existence"), root)["n"] == 24
    theirs = [{**answer, "task": "colour"} for answer in answers("existence")]
    with pytest.raises(DataError, match=r"answers to 'colour', and 'existence' was to be scored"):
        score("existence", theirs, root)
    with pytest.raises(DataError, match=r"other questions than those that split 'test' of 'existence' has.*--split"):
        score("existence", answers("existence", "train"), root)
    with pytest.raises(DataError, match=r"other questions than those"):
        answered("existence", answers("existence", "train"), root)  # what is handed in to a server
    bare = [{"question_id": a["question_id"], "text": "yes"} for a in answers("existence", "train")]
    assert score("existence", bare, root)["n"] == 24, "answers of others say nothing of their questions"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("lines", [True, False])
def test_answers_may_be_lines_or_one_list_whatever_the_file_is_called(tmp_path: Path, name: str, lines: bool) -> None:
    root = tiny_world(tmp_path, scenes=4)
    answers = [{"question_id": f"c{k}", "text": "red"} for k in range(4)]
    text = "\n".join(map(json.dumps, answers)) if lines else json.dumps(answers, indent=1)
    (tmp_path / name).write_text(text)
    assert score("colour", tmp_path / name, root)["n"] == 4
    (tmp_path / name).write_text(json.dumps(answers[0]) + "\n")
    if name != "a.json":
        assert score("colour", tmp_path / name, root, allow_missing=True)["missing"] == 3, "one line is one answer"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question_id,text\nc0,red\n", r"line 1 is not JSON.*JSON lines or one JSON list"),
        ("[" * 100_000, "nested too deep"),
        ("null", "a table of fields is expected"),
    ],
)
def test_files_that_hold_no_answers(tmp_path: Path, text: str, said: str) -> None:
    root = tiny_world(tmp_path, scenes=4)
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        score("colour", tmp_path / "a.jsonl", root)
    with pytest.raises(DataError, match="is a folder; a file of answers is wanted"):
        score("colour", tmp_path, root)


@given(st.randoms(use_true_random=False))
def test_the_order_of_answers_does_not_matter(rng: random.Random) -> None:
    items = [Item(str(k), None, "q", "red", meta=GQA_META) for k in range(12)]
    texts = {item.question_id: rng.choice(["red", "blue"]) for item in items}
    verdicts = [SCORERS["gqa"].judge(item, texts[item.question_id]) for item in items]
    order = list(range(12))
    rng.shuffle(order)
    again = headline("accuracy", [items[k] for k in order], [verdicts[k] for k in order])
    assert again == pytest.approx(headline("accuracy", items, verdicts))


GQA_META = {"image_id": "1", "structural": "query", "semantic": "", "global": None, "steps": 1, "words": 1}


def test_textvqa_does_not_mistake_an_image_for_a_question() -> None:
    """An image's id may be another question's id: a prompt that is there must agree."""
    form = FORMS["textvqa"]
    meta = {"image_id": "2", "question": "what is it?"}
    assert form.keys(Item("1", None, "", [], meta=meta)) == ("1", "image 2\nwhat is it?", "question 1\nwhat is it?")
    llava = {"question_id": "2", "prompt": "What is it?\nAnswer the question using a single word or phrase."}
    assert "2" not in form.answer_keys(llava, "2") and "image 2\nwhat is it?" in form.answer_keys(llava, "2")
    assert form.answer_keys({"question_id": "2"}, "2") == ("2",)


def test_pope_ids_restart_in_each_file(tmp_path: Path) -> None:
    root = tiny_world(tmp_path, scenes=3)
    items = load_items("existence", root)
    assert len({item.question_id for item in items}) == 18
    # The bare id names three questions, so it can only mean the adversarial one, whose id it is.
    with pytest.raises(DataError, match="repeated"):
        score("existence", [{"question_id": i.meta["raw_id"], "text": "yes"} for i in items], root)


def test_unknown_names_and_absent_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no task 'popes'.*Did you mean pope"):
        load_items("popes", tmp_path)
    with pytest.raises(DataError, match=r"no eval/box/refs"):
        load_items("box", tmp_path)
    with pytest.raises(RecipeError, match="'gqa' has no rule 'exact'; it has: official"):
        score("gqa", [], tmp_path, rule="exact")
    (tmp_path / "test.jsonl").write_text('{"image": "a.jpg", "caption": "x"}\n')
    with pytest.raises(DataError, match="not in the form 'vsr'"):
        load_items("vsr", tmp_path)
    with pytest.raises(DataError, match="There are the splits test, train"):
        load_items("existence", tiny_world(tmp_path / "world", scenes=3), "tests")
    (tmp_path / "test.jsonl").write_text('{"image": "../../etc/x.jpg", "caption": "x", "label": 1}\n')
    with pytest.raises(DataError, match="leads out of the image folder"):
        load_items("vsr", tmp_path)


def test_another_rule_can_be_chosen(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "caption": "x", "label": label} for label in (1, 0)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"example_id": 0, "text": "True."}, {"example_id": 1, "text": "False, it is not true"}]
    assert score("vsr", answers, tmp_path)["score"] == 0.0
    found = score("vsr", answers, tmp_path, rule="vlmevalkit-true-false")
    assert (found["score"], found["unparsable"]) == (0.5, 1)


@pytest.mark.parametrize("row", TASKS.values(), ids=TASKS)
def test_every_row_names_rows_that_exist(row: Any) -> None:
    assert row.form in FORMS and set(row.rules.values()) <= set(SCORERS) and row.headline in HEADLINES and row.about


# --- statistics -----------------------------------------------------------------------------------------------------


def verdicts_of(scores: list[float]) -> list[Verdict]:
    return [Verdict(value, "x", readable=True) for value in scores]


def test_the_interval_resamples_pictures_not_questions() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 2, 100).astype(float)
    scores = [value for value in pictures for _ in range(10)]  # ten questions a picture, all right or all wrong
    together = [Item(str(k), None, "", "", meta={"image_id": str(k // 10)}) for k in range(1000)]
    apart = [Item(str(k), None, "", "", meta={"image_id": str(k)}) for k in range(1000)]
    low, high = interval("accuracy", together, verdicts_of(scores))
    near_low, near_high = interval("accuracy", apart, verdicts_of(scores))
    assert (high - low) / (near_high - near_low) == pytest.approx(10**0.5, rel=0.15)
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 100) ** 0.5, rel=0.15)
    assert interval("accuracy", together, verdicts_of(scores)) == (low, high)
    order = rng.permutation(1000).tolist()
    shuffled = [together[k] for k in order], verdicts_of([scores[k] for k in order])
    assert interval("accuracy", *shuffled) == (low, high), "the order in the file is of no account"


def test_a_score_without_a_mistake_claims_no_certainty() -> None:
    """Clopper and Pearson, n = 100: 0.9638 to 1 and 0 to 0.0362, as in printed tables."""
    items = [Item(str(k), None, "", "", meta={"image_id": str(k)}) for k in range(100)]
    assert interval("accuracy", items, verdicts_of([1.0] * 100)) == pytest.approx((0.9638, 1.0), abs=5e-5)
    assert interval("accuracy", items, verdicts_of([0.0] * 100)) == pytest.approx((0.0, 0.0362), abs=5e-5)
    # Nor are a hundred pictures that all earn a third.
    assert interval("accuracy", items, verdicts_of([1 / 3] * 100)) == pytest.approx((0.2971, 0.36955), abs=5e-5)


def test_f1_is_the_f1_of_the_sums() -> None:
    rng = random.Random(1)
    meta = {"image_id": "1", "group": "random"}
    items = [Item(str(k), None, "", rng.choice(["yes", "no"]), meta=meta) for k in range(50)]
    verdicts = [SCORERS["pope"].judge(item, rng.choice(["yes", "no"])) for item in items]
    summary = SCORERS["pope"].summary(items, verdicts)
    part = summary["random"]
    precision, recall = part["precision"], part["recall"]
    assert part["f1_score"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert headline("F1, mean of parts", items, verdicts) == pytest.approx(summary["average_f1"])


def test_constants_never_crash_a_rule() -> None:
    meta = {"image_id": "1", "group": "random"}
    items = [Item(gold, None, "", gold, meta=meta) for gold in ("yes", "no")]
    for text in ("", "yes", "no", "\n", "."):
        summary = SCORERS["pope"].summary(items, [SCORERS["pope"].judge(item, text) for item in items])
        assert 0 <= summary["average_f1"] <= 1


def test_the_best_constant_is_chosen_per_template_on_train() -> None:
    train = [Item(str(k), None, "", gold, template) for k, (gold, template) in enumerate(
        [("red", "a"), ("red", "a"), ("blue", "a"), ("blue", "b"), ("blue", "b"), ("green", "b")]
    )]  # fmt: skip
    assert best_constants(train, SCORERS["gqa"]) == {"a": "red", "b": "blue", "": "blue"}


def test_texts_that_a_rule_takes_for_one_are_one_constant() -> None:
    def golds(*some: str) -> list[Item]:
        return [Item(str(k), None, "", [text] * 10, meta={"image_id": str(k)}) for k, text in enumerate(some)]

    train = golds("red", "red", "red", "2", "2", "two", "two")
    assert best_constants(train, SCORERS["textvqa"])[""] == "2"  # right for four, red for three
    rare = golds(*["red"] * 9, *["2"] * 5, *["blue"] * 8, "two", "two", "two", "two", "two")
    assert (
        best_constants(rare, SCORERS["textvqa"])[""] == "2"
        and best_constants(rare[:22], SCORERS["textvqa"])[""] == "red"
    )
    # Some people's other answer to one question does not make two answers one.
    split = golds(*["no"] * 9, *["yes"] * 8)
    mixed = [Item("m", None, "", ["yes"] * 6 + ["no"] * 4, meta={"image_id": "m"})]
    assert best_constants([*split, *mixed, *golds("yes", "yes")], SCORERS["textvqa"])[""] == "yes"


def test_the_best_box_is_the_one_that_hits_most_not_the_commonest() -> None:
    corner = [[0.0, 0.0, 0.1, 0.1]] * 3
    around = [[round(0.40 + 0.01 * k, 2), 0.40, round(0.80 + 0.01 * k, 2), 0.80] for k in range(6)]
    train = [Item(str(k), None, "", gold) for k, gold in enumerate(corner + around)]
    best = json.loads(best_constants(train, SCORERS["refcoco"])[""])
    assert best in around
    hits = [sum(iou(candidate, gold) >= 0.5 for gold in corner + around) for candidate in corner + around]
    assert hits[(corner + around).index(best)] == max(hits)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 3))
def test_derangement(pictures: list[int], seed: int) -> None:
    items = [
        Item(str(k), ImageRef(f"{name}.jpg"), "", "", meta={"image_id": str(name)}) for k, name in enumerate(pictures)
    ]
    swapped = deranged(items, seed=seed)
    if len(set(pictures)) < 2:
        assert swapped is None
        return
    assert swapped is not None and swapped == deranged(items, seed=seed)
    moved = {(item.image.path, ref.path) for item, ref in zip(items, swapped, strict=True) if item.image and ref}
    assert all(old != new for old, new in moved)
    assert max(Counter(old for old, _ in moved).values()) == 1 and max(Counter(new for _, new in moved).values()) == 1
