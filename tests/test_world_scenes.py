"""The drawn world: scenes are pure functions of their address, answers are true, withheld things stay withheld."""

from __future__ import annotations

import ast
import io
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leveret.world import captions, examination, questions
from leveret.world.draw import PALETTE, jpeg, render, thing_mask
from leveret.world.perceive import percepts
from leveret.world.scenes import (
    COLOURS,
    GAP,
    HELD_OUT,
    SHAPES,
    Scene,
    Thing,
    Word,
    is_novel_word,
    sample_scene,
    stream,
)

INDICES = st.integers(0, 10**6)


def scene_at(index: int, split: str = "t", **options) -> Scene:
    return sample_scene(stream(0, split, index), **options)


@given(INDICES)
@settings(max_examples=50, deadline=None)
def test_a_scene_is_a_pure_function_of_its_address_and_so_are_its_pixels(index: int) -> None:
    one, two = scene_at(index), scene_at(index)
    assert one == two
    assert np.array_equal(render(one), render(two))
    assert jpeg(render(one)) == jpeg(render(two))
    assert render(one).shape == (one.height, one.width, 3)


@given(INDICES)
@settings(max_examples=200, deadline=None)
def test_things_lie_inside_and_apart(index: int) -> None:
    scene = scene_at(index)
    boxes = [thing.box for thing in scene.things] + ([scene.word.box] if scene.word else [])
    assert 1 <= len(scene.things) <= 4
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        assert 0 <= x0 < x1 <= scene.width
        assert 0 <= y0 < y1 <= scene.height
        for u0, v0, u1, v1 in boxes[:i]:
            assert x0 >= u1 + GAP or x1 + GAP <= u0 or y0 >= v1 + GAP or y1 + GAP <= v0


def test_held_out_pairs_and_words_are_in_no_training_scene_and_in_every_novel_one() -> None:
    for index in range(1500):
        scene = scene_at(index, "tune")
        assert not {(t.colour, t.shape) for t in scene.things} & HELD_OUT
        assert scene.word is None or not is_novel_word(scene.word.text)
        novel = scene_at(index, "novel-pairs", novel_pairs=True)
        assert (novel.things[0].colour, novel.things[0].shape) in HELD_OUT
    assert {c for c, _ in HELD_OUT} == set(COLOURS)
    assert {s for _, s in HELD_OUT} == set(SHAPES)
    share = np.mean(
        [is_novel_word(f"{a}{b}{c}") for a in "ACEHKLOTUXZN" for b in "ACEHKLOTUXZN" for c in "ACEHKLOTUXZN"]
    )
    assert 0.07 < share < 0.13


def test_the_colour_a_question_names_is_the_colour_that_is_drawn() -> None:
    for colour in COLOURS:
        scene = Scene(64, 64, (Thing("square", colour, 20, 20, 38, 38),), None, 5)
        middle = render(scene)[24:34, 24:34].reshape(-1, 3).mean(0)
        nearest = min(PALETTE, key=lambda name: float(np.abs(middle - np.array(PALETTE[name])).sum()))
        assert nearest == colour


def test_shapes_fill_their_box_and_differ() -> None:
    masks = {shape: thing_mask(shape, 16)[:, :, 0] for shape in SHAPES}
    for mask in masks.values():
        assert mask.max() == 1.0
        assert mask[:, 0].max() > 0 and mask[:, -1].max() > 0 and mask[0].max() > 0 and mask[-1].max() > 0
    for one in SHAPES:
        for two in SHAPES:
            assert one == two or np.abs(masks[one] - masks[two]).mean() > 0.05


def truth(scene: Scene, question: questions.Question) -> str:
    """The answer by a second way: read off the scene and the question's words, not made with the question."""
    things, text = scene.things, question.text
    kind, form = [*question.template.split("/"), ""][:2]

    def named(name: str) -> list[Thing]:
        return [t for t in things if name in (t.name, t.shape, f"{t.colour} object")]

    def only(name: str) -> Thing:
        (thing,) = named(name)
        return thing

    def related(sentence: str) -> tuple[str, str, str]:
        """(one, relation, other) of a sentence that says how two things lie."""
        relation = next(r for r in questions.OPPOSITE if f" {r} the " in sentence)
        one, other = sentence.split(f" {relation} the ")
        for piece in ("True or false? ", "Does ", "The ", "the ", " is", " lies", " lie"):
            one = one.removeprefix(piece).removesuffix(piece)
        return one, relation, other.split("?")[0].removesuffix(".").removesuffix(", yes").removesuffix(":")

    if kind == "existence":
        return "Yes" if named(text.split(" ", 3)[3].removesuffix(" in the image?")) else "No"
    if kind == "colour":
        return only(text.removesuffix("?").split()[-1]).colour
    if kind == "shape":
        (thing,) = [t for t in things if f" {t.colour} object" in text]
        return thing.shape
    if kind == "count":
        if form == "all":
            return str(len(things))
        what = re.sub(r"^(How many|Tally of) | are there\?$|:$|, in numbers\?$", "", text)
        return str(sum(what in (questions.plural(t.shape), f"{t.colour} objects") for t in things))
    if kind == "relation":
        one, relation, other = related(text)
        holds = bool(questions.holds(relation, only(one), only(other)))
        return str(holds) if text.startswith("True") else ("Yes" if holds else "No")
    if kind == "choice":
        asked = re.split(r"[?:]", text)[0]
        options = dict(re.findall(r"([A-H])[.)] (.+?)(?= [A-H]\) |\n|$)", text))
        assert len(options) == 4
        if form == "object":
            (letter,) = [key for key, value in options.items() if named(value)]
        elif form == "colour":
            (letter,) = [key for key, value in options.items() if value == only(asked.split()[-1]).colour]
        else:
            _, relation, other = related(asked)
            (letter,) = [
                key
                for key, value in options.items()
                if any(t is not only(other) and questions.holds(relation, t, only(other)) for t in named(value))
            ]
        return letter
    if kind == "beside":
        _, relation, other = related(text)
        (name,) = [t.name for t in things if t is not only(other) and questions.holds(relation, t, only(other))]
        return name
    if kind == "box":
        return questions.box_text(scene, only(text.removeprefix("Where is the ").removesuffix("?")).box)
    if kind == "word":
        assert scene.word is not None
        return scene.word.text
    if kind == "side":
        (thing,) = [t for t in things if f"the {t.name} " in text] or [t for t in things if f"the {t.shape} " in text]
        x, y = thing.centre
        if form == "flat":
            return "left" if x < scene.width / 2 else "right"
        return "top" if y < scene.height / 2 else "bottom"
    if kind == "direction":
        words = "left of or right of" if form == "flat" else "above or below"
        one, other = text.removeprefix("Is the ").removesuffix("?").split(f" {words} the ")
        return next(
            r
            for r in words.replace(" of", "").split(" or ")
            if questions.holds(r if form == "tall" else r + " of", only(one), only(other))
        )
    if kind == "extreme":
        axis, sign = next(value for word, value in questions.EXTREMES.items() if word in text)
        return min(things, key=lambda t: sign * t.centre[axis]).name
    if kind == "double":
        first, second = (half + "?" for half in text.removesuffix("?").split("? "))
        form = "all" if second == "How many objects are there?" else ""
        parts = (
            questions.Question("colour", "colour", first, ""),
            questions.Question("count", f"count/{form}", second, ""),
        )
        return ", ".join(truth(scene, part) for part in parts)
    told = questions.told(scene, boxes=kind == "tell")
    return told or questions.NOTHING


@given(INDICES, st.sampled_from(sorted(set(questions.KINDS) - {"foreign", "absent", "insufficient"})), st.booleans())
@settings(max_examples=1200, deadline=None)
def test_every_answer_is_true(index: int, kind: str, reader: bool) -> None:
    scene = scene_at(index, "truth", word=0.6, counts=(0, 0) if index % 20 == 0 else (1, 4))
    if kind not in questions.READ if reader else kind == "beside":
        return
    register = questions.READER if reader else questions.EXAM
    question = questions.KINDS[kind](scene, stream(1, kind, index), register)
    if question is not None:
        assert question.answer == truth(scene, question)


@given(INDICES)
@settings(max_examples=300, deadline=None)
def test_what_is_not_there_is_said_not_to_be_there(index: int) -> None:
    scene, rng = scene_at(index, "truth", word=0.5), stream(1, "absent", index)
    names = {t.name for t in scene.things} | {t.shape for t in scene.things}
    absent = questions.absent(scene, rng)
    if absent is not None:
        missing = absent.answer.removeprefix("There is no ").removesuffix(".")
        assert missing not in names and (missing != "word" or scene.word is None)
        assert missing == "word" or missing in absent.text
    foreign = questions.foreign(scene, rng)
    assert foreign.answer in ("No", "0") or foreign.answer.startswith("There is no ")
    for label in (True, False):
        question = questions.insufficient(scene, rng, label=label)
        if question is not None:
            assert question.text.endswith("respond with 'Unanswerable'.")
            assert (question.answer != "Unanswerable") == label


def test_the_language_model_never_reads_what_is_held_out() -> None:
    """Held-out kinds have no wording; held-out wordings share none with the examination."""
    reader, exam = questions.READER.phrases, questions.EXAM.phrases
    for kind in questions.HELD_OUT_KINDS:
        assert not any(key.split("/")[0] == kind for key in reader)
    for kind in questions.HELD_OUT_WORDINGS:
        read, asked = (
            {text for key, texts in phrases.items() if key.split("/")[0] == kind for text in texts.values()}
            for phrases in (reader, exam)
        )
        assert read and asked and not read & asked
    assert not set(questions.HELD_OUT_KINDS + questions.HELD_OUT_WORDINGS) & {"existence", "shape", "box"}


def test_no_training_question_names_a_held_out_pair() -> None:
    banned = [f"{c} {s}" for c, s in HELD_OUT]
    for index in range(1500):
        scene = scene_at(index, "tune")
        for question in questions.conversation(scene, stream(0, "q", index), 10, questions.TUNE_WEIGHTS, describe=0.2):
            assert not any(name in question.text or name in question.answer for name in banned)
        assert not any(name in questions.text_only(stream(0, "x", index)).text for name in banned)


def test_constant_answers_do_not_pay() -> None:
    answers: dict[str, Counter[str]] = {}
    for index in range(3000):
        rng = stream(3, "balance", index)
        scene = sample_scene(rng)
        for kind in questions.EXAMINED:
            question = questions.KINDS[kind](scene, rng)
            if question:
                answers.setdefault(question.template, Counter())[question.answer] += 1
    for template, counts in answers.items():
        share = counts.most_common(1)[0][1] / counts.total()
        limit = {"existence": 0.56, "relation": 0.57, "choice": 0.32, "count": 0.42}.get(template.split("/")[0], 0.22)
        assert share < limit, (template, counts.most_common(3))


def test_the_options_of_a_choice_do_not_tell_which_is_right() -> None:
    """Whoever takes the option that has most, or least, in common with the others is right by chance only; of the
    wrong options that adversarial sampling makes, the one with most in common is right far more often."""
    picked: dict[str, list[float]] = {"exam most": [], "exam least": [], "reader most": []}
    for index in range(6000):
        rng = stream(5, "options", index)
        scene = sample_scene(rng, flat=True)
        for name, register in (("exam", questions.EXAM), ("reader", questions.READER)):
            asked = questions.choice(scene, rng, register, forms=(1, 0, 0))
            if asked is None:
                continue
            options = [tuple(option.split()) for option in asked.meta["choices"]]
            here = {thing.name for thing in scene.things}
            assert [" ".join(option) in here for option in options].count(True) == 1
            shared = [sum((a[0] == b[0]) != (a[1] == b[1]) for b in options) for a in options]
            for extreme, found in (("most", max(shared)), ("least", min(shared))):
                if f"{name} {extreme}" in picked:
                    best = [place for place, value in enumerate(shared) if value == found]
                    picked[f"{name} {extreme}"].append((asked.meta["index"] in best) / len(best))
    assert len(picked["exam most"]) > 5000
    assert np.mean(picked["exam most"]) == np.mean(picked["exam least"]) == 0.25
    assert np.mean(picked["reader most"]) > 0.33


def test_absent_objects_are_sampled_in_three_ways() -> None:
    for way in questions.POPE_WAYS:
        for index in range(300):
            rng = stream(0, way, index)
            scene = sample_scene(rng)
            pair = questions.absent_pair(scene, rng, way)
            present = {(t.colour, t.shape) for t in scene.things}
            assert pair not in present
            if way == "adversarial" and pair:
                assert pair[0] in {c for c, _ in present} or pair[1] in {s for _, s in present}
            if way == "popular":
                assert pair in questions.POPULAR


@given(INDICES)
@settings(max_examples=200, deadline=None)
def test_percepts_are_the_scene_cell_by_cell(index: int) -> None:
    scene = scene_at(index)
    found = percepts(scene)
    letters = len(scene.word.text) if scene.word else 0
    assert len(found) == len(scene.things) + letters
    assert len({p.cell for p in found}) == len(found)
    assert [p.cell for p in found] == sorted(p.cell for p in found)
    shapes = sorted(SHAPES[p.shape] for p in found if p.letter < 0)
    assert shapes == sorted(t.shape for t in scene.things)


def test_boxes_are_told_in_the_form_that_the_scorer_reads() -> None:
    scene = Scene(80, 64, (Thing("ring", "red", 8, 0, 26, 18),), Word("TEN", True, 0, 40), 1)
    box = ast.literal_eval(questions.box_text(scene, scene.things[0].box))
    assert box == [0.09, 0.0, 0.31, 0.28]
    assert questions.told(scene).startswith("a red ring [0.09, 0.00, 0.31, 0.28], the word TEN [")


# --- the web ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web() -> list[captions.WebPair]:
    return [captions.web_pair(0, "web", index) for index in range(3000)]


def test_the_web_has_its_diseases_at_the_stated_rates(web: list[captions.WebPair]) -> None:
    copies = Counter(pair.copy for pair in web)
    ill = captions.STRENGTHS["usual"]
    for kind, rate in ill.copies.items():
        assert abs(copies[kind] / len(web) - rate) < 0.015
    words = Counter(pair.words for pair in web)
    for kind, rate in (("wrong", ill.wrong), ("dull", ill.dull)):
        assert abs(words[kind] / len(web) - rate) < 0.04


def test_a_severe_web_crowds_on_few_scenes() -> None:
    def top(strength: str) -> float:
        shown = Counter(captions.web_pair(0, "web", i, captions.STRENGTHS[strength]).source for i in range(3000))
        return sum(count for _, count in shown.most_common(10)) / 3000

    assert top("mild") < 0.05 < 0.15 < top("severe")


def test_exact_copies_are_exact_and_near_duplicates_are_not(web: list[captions.WebPair]) -> None:
    for pair in web[:800]:
        if pair.copy == "new":
            continue
        source = captions.web_pair(0, "web", pair.source)
        assert pair.scene == source.scene and pair.source < pair.index
        same = np.array_equal(
            np.asarray(Image.open(io.BytesIO(pair.image()))), np.asarray(Image.open(io.BytesIO(source.image())))
        )
        if pair.copy != "exact":
            assert not same
            near = np.abs(
                render(pair.scene, shift=pair.shift, jitter=pair.jitter).astype(int) - render(source.scene)
            ).mean()
            assert near < 90


def test_a_fitting_caption_is_true_and_a_wrong_one_is_another_scenes(web: list[captions.WebPair]) -> None:
    for pair in web:
        names = [thing.name for thing in pair.scene.things]
        if pair.words == "fits":
            assert all(name in pair.caption for name in names)
        elif pair.words == "dull":
            assert not any(name in pair.caption for name in names)


def test_the_split_of_held_out_pairs_asks_about_them() -> None:
    """The scene's first thing is the new one; were the others asked about too, they would hide how it fares."""
    for kind in ("existence", "colour", "shape", "box", "relation", "choice"):
        for item in examination.ask(0, "novel-pairs", kind, 20):
            new, question = item.scene.things[0], item.question
            assert (new.colour, new.shape) in HELD_OUT
            if question.answer == "No" and kind == "existence":
                continue  # what is absent is no held-out pair
            if kind == "box":
                assert question.meta["box"] == new.box
            else:
                assert new.shape in question.text or new.colour in question.text
