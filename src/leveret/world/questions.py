"""What is asked about a scene, and told about it: one generator a kind, all pure functions of (scene, random numbers).

The kinds are those of the field's benchmarks: existence (POPE), colour and shape (GQA), count (TallyQA), relation
(VSR), choice (ScienceQA, MMBench), box (RefCOCO), word (TextVQA), and text-only ones. `template` names the wording,
so that the best constant answer can be found per wording.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from leveret.world.scenes import (
    COLOUR_WEIGHTS,
    COLOURS,
    GRID,
    HELD_OUT,
    SHAPE_WEIGHTS,
    SHAPES,
    Scene,
    Thing,
    between,
    pick,
    shuffled,
)

LETTERS = "ABCD"
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATION_GAP = 10
"""Relations are asked only where the centres lie at least so many pixels apart along the axis."""
POPE_WAYS = ("random", "popular", "adversarial")


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its answer; `meta` holds what the official file forms want beside them."""

    kind: str
    template: str
    text: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)


def a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def number(value: int) -> str:
    """A coordinate of 1/GRID as it is written: two decimals."""
    return f"{value / GRID:.2f}"


def box_text(scene: Scene, box: tuple[int, int, int, int]) -> str:
    return "[" + ", ".join(number(v) for v in scene.numbers(box)) + "]"


def told(scene: Scene, *, boxes: bool = True) -> str:
    """The whole scene in words, in reading order: `a red ring [0.25, 0.22, 0.53, 0.53], the word CXK [...]`."""
    parts = []
    for item in scene.in_reading_order():
        name = a(item.name) if isinstance(item, Thing) else f"the word {item.text}"
        parts.append(f"{name} {box_text(scene, item.box)}" if boxes else name)
    return ", ".join(parts)


def _unique(scene: Scene, key: Callable[[Thing], str]) -> list[Thing]:
    counts = Counter(key(thing) for thing in scene.things)
    return [thing for thing in scene.things if counts[key(thing)] == 1]


def _weight(pair: tuple[str, str]) -> float:
    return COLOUR_WEIGHTS[COLOURS.index(pair[0])] * SHAPE_WEIGHTS[SHAPES.index(pair[1])]


PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT]
POPULAR = sorted(PAIRS, key=_weight, reverse=True)[:20]


def absent_pair(scene: Scene, rng: random.Random, way: str) -> tuple[str, str] | None:
    """A pair that is not in the scene, sampled in one of POPE's three ways (never a held-out one).

    random: by frequency. popular: one of the most frequent pairs. adversarial: shares its colour or its shape with
    something in the scene (what a model that sees attributes but not their binding would affirm).
    """
    present = {(thing.colour, thing.shape) for thing in scene.things}
    if way == "popular":
        options = [pair for pair in POPULAR if pair not in present]
    elif way == "adversarial":
        colours, shapes = {c for c, _ in present}, {s for _, s in present}
        both = [p for p in PAIRS if p not in present and p[0] in colours and p[1] in shapes]
        either = [p for p in PAIRS if p not in present and (p[0] in colours) != (p[1] in shapes)]
        options = both if both and rng.random() < 0.6 else either
    else:
        options = [pair for pair in PAIRS if pair not in present]
        return pick(rng, options, [_weight(pair) for pair in options])
    return pick(rng, options) if options else None


def existence(
    scene: Scene, rng: random.Random, *, way: str | None = None, label: bool | None = None
) -> Question | None:
    label = rng.random() < 0.5 if label is None else label
    form = pick(rng, ("pair", "shape", "colour"), (0.7, 0.18, 0.12))
    way = way or pick(rng, POPE_WAYS, (0.25, 0.15, 0.6))
    if form == "pair":
        pair = None
        if label:
            thing = pick(rng, scene.things)
            pair = (thing.colour, thing.shape)
        else:
            pair = absent_pair(scene, rng, way)
        if pair is None:
            return None
        name = f"{pair[0]} {pair[1]}"
    else:
        here = {getattr(thing, form) for thing in scene.things}
        values, weights = (SHAPES, SHAPE_WEIGHTS) if form == "shape" else (COLOURS, COLOUR_WEIGHTS)
        options = [(v, w) for v, w in zip(values, weights, strict=True) if (v in here) == label]
        value = pick(rng, [v for v, _ in options], [w for _, w in options])
        name = value if form == "shape" else f"{value} object"
    text = f"Is there {a(name)} in the image?"
    return Question("existence", f"existence/{form}", text, "Yes" if label else "No", {"object": name, "way": way})


def colour(scene: Scene, rng: random.Random) -> Question | None:
    things = _unique(scene, lambda t: t.shape)
    if not things:
        return None
    thing = pick(rng, things)
    form, text = pick(
        rng,
        (
            ("what", f"What colour is the {thing.shape}?"),
            ("of", f"What is the colour of the {thing.shape}?"),
        ),
    )
    return Question("colour", f"colour/{form}", text, thing.colour, {"object": thing.name})


def shape(scene: Scene, rng: random.Random) -> Question | None:
    things = _unique(scene, lambda t: t.colour)
    if not things:
        return None
    thing = pick(rng, things)
    form, text = pick(
        rng,
        (
            ("what", f"What shape is the {thing.colour} object?"),
            ("of", f"What is the shape of the {thing.colour} object?"),
        ),
    )
    return Question("shape", f"shape/{form}", text, thing.shape, {"object": thing.name})


def plural(shape_name: str) -> str:
    return {"cross": "crosses"}.get(shape_name, shape_name + "s")


def count(scene: Scene, rng: random.Random) -> Question | None:
    form = pick(rng, ("shape", "colour", "all"), (0.45, 0.35, 0.2))
    if form == "all":
        return Question("count", "count/all", "How many objects are there?", str(len(scene.things)), {"simple": True})
    values = SHAPES if form == "shape" else COLOURS
    counts = Counter(getattr(thing, form) for thing in scene.things)
    # High counts are rare in scenes: take them where they are, or "0" and "1" would answer almost everything.
    groups = {n: [v for v in values if counts[v] == n] for n in range(5)}
    groups = {n: group for n, group in groups.items() if group}
    options = groups[pick(rng, list(groups), [(0.5, 0.5, 2.5, 4.0, 6.0)[n] for n in groups])]
    value = pick(rng, options)
    name = plural(value) if form == "shape" else f"{value} objects"
    return Question(
        "count", f"count/{form}", f"How many {name} are there?", str(counts[value]), {"simple": form == "shape"}
    )


def holds(relation: str, one: Thing, other: Thing) -> bool | None:
    """Whether `one` is `relation` `other`; None where the centres are too close to tell."""
    axis = 0 if relation in ("left of", "right of") else 1
    gap = other.centre[axis] - one.centre[axis]
    if abs(gap) < RELATION_GAP:
        return None
    return gap > 0 if relation in ("left of", "above") else gap < 0


def _relation_facts(scene: Scene, names: dict[Thing, str]) -> list[tuple[Thing, str, Thing]]:
    return [
        (one, relation, other)
        for one in names
        for other in names
        if one is not other
        for relation in OPPOSITE
        if holds(relation, one, other)
    ]


def _names(scene: Scene, rng: random.Random, short: float = 0.3) -> dict[Thing, str]:
    """A name for each thing that can be named alone: colour and shape, or (a share `short`) its shape where that is
    unique."""
    by_shape = set(_unique(scene, lambda t: t.shape)) if rng.random() < short else set()
    return {
        thing: thing.shape if thing in by_shape else thing.name
        for thing in scene.things
        if thing in by_shape or sum(other.name == thing.name for other in scene.things) == 1
    }


def relation(scene: Scene, rng: random.Random, short: float = 0.3) -> Question | None:
    names = _names(scene, rng, short)
    facts = _relation_facts(scene, names)
    if not facts:
        return None
    one, said, other = pick(rng, facts)
    label = rng.random() < 0.5
    if not label:
        said = OPPOSITE[said]
    caption = f"The {names[one]} is {said} the {names[other]}."
    meta = {"caption": caption, "relation": said, "subj": names[one], "obj": names[other], "label": int(label)}
    return Question("relation", f"relation/{said}", f"True or false? {caption}", "True" if label else "False", meta)


def choice(scene: Scene, rng: random.Random, forms: tuple[float, float, float] = (0.5, 0.2, 0.3)) -> Question | None:
    form = pick(rng, ("object", "colour", "place"), forms)
    if form == "object":
        gold = pick(rng, scene.things).name
        question, present = "Which object is in the image?", {thing.name for thing in scene.things}
        others: list[str] = []
        for _ in range(60):
            pair = absent_pair(scene, rng, pick(rng, POPE_WAYS, (0.4, 0.1, 0.5)))
            name = f"{pair[0]} {pair[1]}" if pair else ""
            if name and name not in others and name not in present:
                others.append(name)
            if len(others) == 3:
                break
    elif form == "colour":
        things = _unique(scene, lambda t: t.shape)
        if not things:
            return None
        thing = pick(rng, things)
        gold, question = thing.colour, f"What colour is the {thing.shape}?"
        others = shuffled(rng, [c for c in COLOURS if c != gold])[:3]
    else:
        names = {t: t.name for t in _unique(scene, lambda t: t.name)}
        facts = _relation_facts(scene, names)
        if not facts:
            return None
        thing, said, other = pick(rng, facts)
        right = {one.name for one, rel, two in facts if two is other and rel == said}
        if len(right) != 1:
            return None
        gold, question = thing.name, f"Which object is {said} the {other.name}?"
        wrong = [t.name for t in names if t.name not in right]
        rest = [f"{c} {s}" for c, s in shuffled(rng, PAIRS) if f"{c} {s}" not in {t.name for t in scene.things}]
        others = [name for name in shuffled(rng, wrong) if name != other.name][:2]
        others += rest[: 3 - len(others)]
    if len(others) < 3:
        return None
    options = shuffled(rng, [gold, *others[:3]])
    text = question + "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    meta = {"question": question, "choices": options, "index": options.index(gold)}
    return Question("choice", f"choice/{form}", text, LETTERS[options.index(gold)], meta)


def box(scene: Scene, rng: random.Random) -> Question | None:
    names = _names(scene, rng)
    if not names:
        return None
    thing = pick(rng, list(names))
    sentence = f"the {names[thing]}"
    return Question(
        "box", "box/where", f"Where is {sentence}?", box_text(scene, thing.box), {"sent": sentence, "box": thing.box}
    )


def word(scene: Scene, rng: random.Random) -> Question | None:
    if scene.word is None:
        return None
    form, text = pick(
        rng, (("what", "What word is written in the image?"), ("say", "What does the text in the image say?"))
    )
    return Question("word", f"word/{form}", text, scene.word.text)


def side(scene: Scene, rng: random.Random) -> Question | None:
    names = {thing: name for thing, name in _names(scene, rng).items()}
    flat = pick(rng, (True, False))
    axis, length = (0, scene.width) if flat else (1, scene.height)
    names = {t: n for t, n in names.items() if abs(t.centre[axis] - length / 2) >= RELATION_GAP / 2}
    if not names:
        return None
    thing = pick(rng, list(names))
    first = thing.centre[axis] < length / 2
    if flat:
        text, answer = f"Is the {names[thing]} on the left or on the right?", "left" if first else "right"
    else:
        text, answer = f"Is the {names[thing]} at the top or at the bottom?", "top" if first else "bottom"
    return Question("side", "side/" + ("flat" if flat else "tall"), text, answer)


def direction(scene: Scene, rng: random.Random, short: float = 0.3) -> Question | None:
    names = _names(scene, rng, short)
    facts = _relation_facts(scene, names)
    if not facts:
        return None
    one, said, other = pick(rng, facts)
    flat = said in ("left of", "right of")
    words = "left of or right of" if flat else "above or below"
    text = f"Is the {names[one]} {words} the {names[other]}?"
    return Question(
        "direction",
        "direction/" + ("flat" if flat else "tall"),
        text,
        said.split()[0],
        {"subj": names[one], "obj": names[other]},
    )


EXTREMES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}


def extreme(scene: Scene, rng: random.Random) -> Question | None:
    word = pick(rng, tuple(EXTREMES))
    axis, sign = EXTREMES[word]
    ranked = sorted(scene.things, key=lambda t: sign * t.centre[axis])
    if len(ranked) < 2 or sign * (ranked[1].centre[axis] - ranked[0].centre[axis]) < RELATION_GAP / 2:
        return None
    return Question("extreme", "extreme/" + word, f"What is the {word} object?", ranked[0].name)


def tell(scene: Scene, rng: random.Random) -> Question | None:
    return Question("tell", "tell", "Describe the image.", told(scene))


def text_only(rng: random.Random) -> Question:
    """A question that needs no picture: opposites, small sums, and a sentence that is asked about."""
    form = pick(rng, ("opposite", "sum", "colour", "where"))
    if form == "opposite":
        one, other = pick(
            rng,
            (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top"), ("Yes", "No"), ("No", "Yes")),
        )
        return Question("text", "text/opposite", f"What is the opposite of {one}?", other)
    if form == "sum":
        x, y = between(rng, 0, 4), between(rng, 0, 4)
        return Question("text", "text/sum", f"What is {x} plus {y}?", str(x + y))
    (c1, s1), (c2, s2) = shuffled(rng, PAIRS)[:2]
    while c1 == c2 or s1 == s2:
        (c1, s1), (c2, s2) = shuffled(rng, PAIRS)[:2]
    said = pick(rng, tuple(OPPOSITE))
    fact = f"A {c1} {s1} is {said} a {c2} {s2}."
    if form == "colour":
        asked, answer = pick(rng, ((s1, c1), (s2, c2)))
        return Question("text", "text/colour", f"{fact} What colour is the {asked}?", answer)
    label = rng.random() < 0.5
    stated = said if label else OPPOSITE[said]
    return Question(
        "text", "text/where", f"{fact} True or false? The {s1} is {stated} the {s2}.", "True" if label else "False"
    )


KINDS: dict[str, Callable[..., Question | None]] = {
    "existence": existence,
    "colour": colour,
    "shape": shape,
    "count": count,
    "relation": relation,
    "choice": choice,
    "box": box,
    "word": word,
    "side": side,
    "extreme": extreme,
    "direction": direction,
    "tell": tell,
}
SHORT_NAMED = ("relation", "direction")
"""Kinds that can be asked to name things by their shape alone."""
EXAMINED = ("existence", "colour", "shape", "count", "relation", "choice", "box", "word")

TUNE_WEIGHTS = {
    "existence": 1.0,
    "colour": 0.8,
    "shape": 0.8,
    "count": 1.8,
    "relation": 1.0,
    "choice": 3.0,
    "box": 1.2,
    "word": 1.4,
    "side": 0.3,
}
EXAM_OPTIONS = {"choice": {"forms": (0.75, 0.15, 0.1)}}
TUNE_OPTIONS = {"choice": {"forms": (0.4, 0.35, 0.25)}}
"""What the backbones bring needs few examples; what takes two steps (find it, then find its letter) gets most."""


def conversation(
    scene: Scene,
    rng: random.Random,
    turns: int,
    weights: dict[str, float],
    *,
    describe: float = 0.0,
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> list[Question]:
    """`turns` questions on one scene, kinds drawn by weight, no question twice.

    describe  probability that the conversation opens with the whole scene told.
    options   arguments for the generator of a kind, such as {"relation": {"short": 0.6}}.
    """
    asked: list[Question] = []
    seen: set[str] = set()
    if rng.random() < describe:
        asked.append(KINDS["tell"](scene, rng))  # type: ignore[arg-type]
    kinds, shares = list(weights), list(weights.values())
    for _ in range(4 * turns):
        if len(asked) >= turns:
            break
        kind = pick(rng, kinds, shares)
        question = KINDS[kind](scene, rng, **options.get(kind, {}))
        if question is not None and question.text not in seen:
            seen.add(question.text)
            asked.append(question)
    return asked
