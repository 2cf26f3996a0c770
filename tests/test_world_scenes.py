"""The drawn world: scenes are pure functions of their address, answers are true, withheld things stay withheld."""

from __future__ import annotations

import ast
import io
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leveret.world import captions, questions
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
    """The answer by a second way: read off the scene, not made with the question."""
    things, text = scene.things, question.text
    kind, form = question.template.split("/") if "/" in question.template else (question.template, "")

    def named(name: str) -> list[Thing]:
        return [t for t in things if name in (t.name, t.shape, f"{t.colour} object")]

    if kind == "existence":
        return "Yes" if named(text.split(" ", 3)[3].removesuffix(" in the image?")) else "No"
    if kind == "colour":
        (thing,) = named(text.removesuffix("?").split()[-1])
        return thing.colour
    if kind == "shape":
        (thing,) = [t for t in things if f" {t.colour} object" in text]
        return thing.shape
    if kind == "count":
        if form == "all":
            return str(len(things))
        return str(
            sum(
                f"How many {questions.plural(t.shape)} are" in text or f"many {t.colour} objects" in text
                for t in things
            )
        )
    if kind == "relation":
        relation = next(r for r in questions.OPPOSITE if f" is {r} the " in text)
        one, other = text.removeprefix("True or false? The ").removesuffix(".").split(f" is {relation} the ")
        (a,), (b,) = named(one), named(other)
        return str(bool(questions.holds(relation, a, b)))
    if kind == "choice":
        options = dict(line.split(". ", 1) for line in text.split("\n")[1:])
        if form == "object":
            (letter,) = [key for key, value in options.items() if named(value)]
        elif form == "colour":
            (thing,) = named(text.split("\n")[0].removesuffix("?").split()[-1])
            (letter,) = [key for key, value in options.items() if value == thing.colour]
        else:
            relation = next(r for r in questions.OPPOSITE if f" is {r} the " in text)
            (b,) = named(text.split("\n")[0].split(f" is {relation} the ")[1].removesuffix("?"))
            (letter,) = [
                k for k, v in options.items() if any(t is not b and questions.holds(relation, t, b) for t in named(v))
            ]
        return letter
    if kind == "box":
        (thing,) = named(text.removeprefix("Where is the ").removesuffix("?"))
        return questions.box_text(scene, thing.box)
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
        (a,), (b,) = named(one), named(other)
        return next(
            r
            for r in words.replace(" of", "").split(" or ")
            if questions.holds(r if form == "tall" else r + " of", a, b)
        )
    if kind == "extreme":
        axis, sign = questions.EXTREMES[form]
        return min(things, key=lambda t: sign * t.centre[axis]).name
    return questions.told(scene)


@given(INDICES, st.sampled_from(sorted(questions.KINDS)))
@settings(max_examples=800, deadline=None)
def test_every_answer_is_true(index: int, kind: str) -> None:
    scene = scene_at(index, "truth", word=0.6)
    question = questions.KINDS[kind](scene, stream(1, kind, index))
    if question is not None:
        assert question.answer == truth(scene, question)


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
    for kind, rate in captions.RATES.items():
        assert abs(copies[kind] / len(web) - rate) < 0.015
    words = Counter(pair.words for pair in web)
    for kind, rate in captions.WORDS.items():
        assert abs(words[kind] / len(web) - rate) < 0.035


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
