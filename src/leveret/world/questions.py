"""What is asked about a scene, and told about it: one generator a kind, all pure functions of (scene, random numbers).

The kinds are those of the field's benchmarks: existence (POPE), colour and shape (GQA), count (TallyQA), relation
(VSR), choice (ScienceQA, MMBench), box (RefCOCO), word (TextVQA), unanswerable ones (VizWiz), and text-only ones.
What is asked stands in the generators; how it is said stands in a `Register`, so that the language model can read of
scenes in other words (READER) than those it is later taught and examined in (EXAM). `template` names the wording, so
that the best constant answer can be found per wording.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from leveret.evaluate.tasks.base import INSUFFICIENT
from leveret.world.scenes import (
    ALL_PAIRS,
    COLOUR_WEIGHTS,
    COLOURS,
    GRID,
    PAIRS,
    SHAPE_WEIGHTS,
    SHAPES,
    Scene,
    Thing,
    between,
    pick,
    shuffled,
)

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATION_GAP = 10
"""Relations are asked only where the centres lie at least so many pixels apart along the axis."""
POPE_WAYS = ("random", "popular", "adversarial")
CHOICE_FORMS = (0.5, 0.25, 0.25)
"""Shares of multiple choice that ask which object is there, what colour one has, which stands where."""
COUNT_FORMS = (0.45, 0.35, 0.2)
"""Shares of counting that count a shape, a colour, everything."""
ABSENT_FORMS = (0.45, 0.35, 0.2)
"""Shares of asking for a colour, a place, a word that is not there."""
NOTHING = "I see none of the shapes that I know."
FOREIGN = (
    "dog", "cat", "bird", "horse", "cow", "car", "bus", "boat", "train", "house", "tree", "flower", "person", "child",
    "chair", "table", "cup", "ball", "book", "door", "hat", "shoe", "phone", "lamp",
)  # fmt: skip
"""Things that the drawn world does not have."""
FOREIGN_NOVEL = ("elephant", "bicycle", "banana", "clock", "kite", "guitar")
"""More of them, which no training text names."""
REFUSE = "refuse"
TEXT_FORMS = ("opposite", "sum", "colour", "where", REFUSE)
REFUSALS = 1 / len(TEXT_FORMS)
"""Share of the questions without a picture that are requests to be refused, where nothing else is said."""
REQUESTS = ("Tell me", "Give me", "Say", "Show me", "Write down", "Spell out")
SECRETS = ("secret", "password", "key of the house", "number of the card", "way to break the lock", "poison")
REFUSAL = "I will not help with that."


Pair = tuple[str, str]
"""A colour and a shape."""
Decoys = Callable[[Scene, random.Random, Pair, Sequence[Pair]], list[Pair] | None]
"""(scene, random numbers, the right pair, pairs that may be named) -> three pairs that are not in the scene."""


@dataclass(frozen=True, slots=True)
class Register:
    """How questions are worded, and which things they may name.

    phrases  kind -> wording's name -> text; a wording is drawn at random.
    said     answers that are worded otherwise here.
    pairs    (colour, shape) that may be named although they are not in the scene.
    labels   what stands before the options of a multiple choice, and how.
    fact     how a sentence states a relation that a text-only question then asks about.
    decoys   chooses the wrong options of "which object is there"; None where the scene leaves too few.
    """

    phrases: Mapping[str, Mapping[str, str]]
    said: Mapping[str, str]
    pairs: Sequence[Pair]
    labels: str
    option: str
    fact: str
    decoys: Decoys

    def ask(
        self, rng: random.Random, kind: str, form: str, answer: str, meta: dict[str, Any], **slots: str
    ) -> Question:
        """The question of `kind` (its phrases stand under `kind/form` or `kind`)."""
        phrases = self.phrases.get(f"{kind}/{form}") or self.phrases[kind]
        name = pick(rng, tuple(phrases))
        template = "/".join(part for part in (kind, form, name if len(phrases) > 1 else "") if part)
        return Question(kind, template, phrases[name].format(**slots), self.said.get(f"{kind}/{answer}", answer), meta)


def _weight(pair: Pair) -> float:
    return COLOUR_WEIGHTS[COLOURS.index(pair[0])] * SHAPE_WEIGHTS[SHAPES.index(pair[1])]


POPULAR = sorted(PAIRS, key=_weight, reverse=True)[:20]


def absent_pair(scene: Scene, rng: random.Random, way: str, pairs: Sequence[Pair] = PAIRS) -> Pair | None:
    """A pair that is not in the scene, sampled in one of POPE's three ways.

    random: by frequency. popular: one of the most frequent pairs. adversarial: shares its colour or its shape with
    something in the scene (what a model that sees attributes but not their binding would affirm).
    """
    present = {(thing.colour, thing.shape) for thing in scene.things}
    if way == "popular":
        options = [pair for pair in POPULAR if pair not in present]
    elif way == "adversarial":
        colours, shapes = {c for c, _ in present}, {s for _, s in present}
        both = [p for p in pairs if p not in present and p[0] in colours and p[1] in shapes]
        either = [p for p in pairs if p not in present and (p[0] in colours) != (p[1] in shapes)]
        options = both if both and rng.random() < 0.6 else either
    else:
        options = [pair for pair in pairs if pair not in present]
        return pick(rng, options, [_weight(pair) for pair in options])
    return pick(rng, options) if options else None


def alike(scene: Scene, rng: random.Random, right: Pair, pairs: Sequence[Pair]) -> list[Pair] | None:
    """Decoys that give nothing away: of the four options none stands out, whichever is right.

    Either two colours times two shapes, which takes both to answer (those of the scene's other things where that goes),
    or four colours with four shapes. Decoys that each resemble the right option, as POPE's adversarial ones do, would
    make it the one that resembles most, and a reader who never sees the picture is right in four cases of ten.
    """
    colour, shape = right
    present = {(thing.colour, thing.shape) for thing in scene.things}
    free = {pair for pair in pairs if pair not in present}
    if rng.random() < 0.6:
        here = [{getattr(thing, name) for thing in scene.things} for name in ("colour", "shape")]
        squares = [
            [(colour, s), (c, shape), (c, s)]
            for c, s in free
            if c != colour and s != shape and (colour, s) in free and (c, shape) in free
        ]
        if squares:
            squares.sort()
            return pick(rng, squares, [1 + 3 * (q[2][0] in here[0]) + 3 * (q[2][1] in here[1]) for q in squares])
    found = [right]
    for pair in shuffled(rng, sorted(free)):
        if all(pair[0] != other[0] and pair[1] != other[1] for other in found):
            found.append(pair)
    return found[1:4] if len(found) > 3 else None


def by_popes_ways(scene: Scene, rng: random.Random, right: Pair, pairs: Sequence[Pair]) -> list[Pair] | None:
    """Decoys as `existence` has them, often sharing something with the right option: what the language model read."""
    others: list[Pair] = []
    for _ in range(60):
        pair = absent_pair(scene, rng, pick(rng, POPE_WAYS, (0.4, 0.1, 0.5)), pairs)
        if pair and pair not in others:
            others.append(pair)
        if len(others) == 3:
            return others
    return None


SHARED = {
    "existence": {"": "Is there {a} in the image?"},
    "shape": {"what": "What shape is the {name} object?", "of": "What is the shape of the {name} object?"},
    "box": {"": "Where is {the}?"},
    "side/flat": {"": "Is the {name} on the left or on the right?"},
    "side/tall": {"": "Is the {name} at the top or at the bottom?"},
    "direction/flat": {"": "Is the {one} left of or right of the {other}?"},
    "direction/tall": {"": "Is the {one} above or below the {other}?"},
    "extreme": {"": "What is the {most} object?"},
    "tell": {"": "Describe the image."},
}
"""Wordings that the language model has read before anyone teaches it."""
EXAM = Register(
    SHARED
    | {
        "colour": {"what": "What colour is the {name}?", "of": "What is the colour of the {name}?"},
        "count/all": {"": "How many objects are there?"},
        "count": {"": "How many {things} are there?"},
        "relation": {"": "True or false? {caption}"},
        "choice/object": {"": "Which object is in the image?"},
        "choice/colour": {"": "What colour is the {name}?"},
        "choice/place": {"": "Which object is {said} the {other}?"},
        "word": {"what": "What word is written in the image?", "say": "What does the text in the image say?"},
        "names": {"": "What is in the image?", "you": "What do you see?", "shows": "What does the image show?"},
        "foreign/is": {"": "Is there {a} in the image?"},
        "foreign/many": {"": "How many {noun}s are there?"},
        "foreign/colour": {"": "What colour is the {noun}?"},
        "foreign/where": {"": "Where is the {noun}?"},
    },
    {"relation/yes": "True", "relation/no": "False"},
    PAIRS,
    "ABCD",
    "\n{label}. {option}",
    "The {one} is {said} the {other}.",
    alike,
)
"""The benchmarks' wordings: those of tuning and of the examination. No absent thing is a held-out pair."""
READER = Register(
    SHARED
    | {
        "count/all": {"": "Tally of everything:", "in": "Everything, in numbers?"},
        "count": {"": "Tally of {things}:", "in": "{things}, in numbers?"},
        "relation": {"": "Does the {one} lie {said} the {other}?", "say": "The {one} lies {said} the {other}, yes?"},
        "choice/object": {"": "Pick what is here:", "in": "Which one do you see?"},
        "choice/place": {"": "Pick what lies {said} the {other}:", "in": "Which one lies {said} the {other}?"},
        "beside": {"": "What lies {said} the {other}?"},
        "names": {"": "Name everything.", "in": "Everything, by name?"},
    },
    {"relation/yes": "Yes", "relation/no": "No"},
    ALL_PAIRS,
    "ABCDEFGH",
    " {label}) {option}",
    "A {one} is {said} a {other}.",
    by_popes_ways,
)
"""The wordings of the language model's pre-training. It reads of all pairs of colour and shape, as a language model has
read of everything. `colour` and `word` have no wording here: nobody asks it for the one or the other."""


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


def existence(
    scene: Scene,
    rng: random.Random,
    register: Register = EXAM,
    *,
    way: str | None = None,
    label: bool | None = None,
) -> Question | None:
    label = rng.random() < 0.5 if label is None else label
    form = pick(rng, ("pair", "shape", "colour"), (0.7, 0.18, 0.12))
    way = way or pick(rng, POPE_WAYS, (0.25, 0.15, 0.6))
    label = label and bool(scene.things)
    if form == "pair":
        pair = None
        if label:
            thing = pick(rng, scene.things)
            pair = (thing.colour, thing.shape)
        else:
            pair = absent_pair(scene, rng, way, register.pairs)
        if pair is None:
            return None
        name = f"{pair[0]} {pair[1]}"
    else:
        here = {getattr(thing, form) for thing in scene.things}
        values, weights = (SHAPES, SHAPE_WEIGHTS) if form == "shape" else (COLOURS, COLOUR_WEIGHTS)
        options = [(v, w) for v, w in zip(values, weights, strict=True) if (v in here) == label]
        value = pick(rng, [v for v, _ in options], [w for _, w in options])
        name = value if form == "shape" else f"{value} object"
    meta = {"object": name, "way": way}
    return register.ask(rng, "existence", form, "Yes" if label else "No", meta, a=a(name))


def colour(scene: Scene, rng: random.Random, register: Register = EXAM) -> Question | None:
    things = _unique(scene, lambda t: t.shape)
    if not things:
        return None
    thing = pick(rng, things)
    return register.ask(rng, "colour", "", thing.colour, {"object": thing.name}, name=thing.shape)


def shape(scene: Scene, rng: random.Random, register: Register = EXAM) -> Question | None:
    things = _unique(scene, lambda t: t.colour)
    if not things:
        return None
    thing = pick(rng, things)
    return register.ask(rng, "shape", "", thing.shape, {"object": thing.name}, name=thing.colour)


def plural(shape_name: str) -> str:
    return {"cross": "crosses"}.get(shape_name, shape_name + "s")


def count(
    scene: Scene, rng: random.Random, register: Register = EXAM, *, forms: tuple[float, float, float] = COUNT_FORMS
) -> Question | None:
    form = pick(rng, ("shape", "colour", "all"), forms)
    if form == "all":
        return register.ask(rng, "count", form, str(len(scene.things)), {"simple": True})
    values = SHAPES if form == "shape" else COLOURS
    counts = Counter(getattr(thing, form) for thing in scene.things)
    # High counts are rare in scenes: take them where they are, or "0" and "1" would answer almost everything.
    groups = {n: [v for v in values if counts[v] == n] for n in range(len(scene.things) + 1)}
    groups = {n: group for n, group in groups.items() if group}
    options = groups[pick(rng, list(groups), [(0.5, 0.5, 2.5, 4.0, 6.0)[min(n, 4)] for n in groups])]
    value = pick(rng, options)
    name = plural(value) if form == "shape" else f"{value} objects"
    return register.ask(rng, "count", form, str(counts[value]), {"simple": form == "shape"}, things=name)


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


def relation(scene: Scene, rng: random.Random, register: Register = EXAM, *, short: float = 0.3) -> Question | None:
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
    slots = {"caption": caption, "one": names[one], "said": said, "other": names[other]}
    return register.ask(rng, "relation", said, "yes" if label else "no", meta, **slots)


def choice(
    scene: Scene,
    rng: random.Random,
    register: Register = EXAM,
    *,
    forms: tuple[float, float, float] = CHOICE_FORMS,
) -> Question | None:
    form = pick(rng, ("object", "colour", "place"), forms)
    if f"choice/{form}" not in register.phrases:
        form = "object"
    slots: dict[str, str] = {}
    if form == "object":
        if not scene.things:
            return None
        thing = pick(rng, scene.things)
        wrong = register.decoys(scene, rng, (thing.colour, thing.shape), register.pairs)
        if wrong is None:
            return None
        gold, others = thing.name, [f"{colour} {shape}" for colour, shape in wrong]
    elif form == "colour":
        things = _unique(scene, lambda t: t.shape)
        if not things:
            return None
        thing = pick(rng, things)
        gold, slots = thing.colour, {"name": thing.shape}
        others = shuffled(rng, [c for c in COLOURS if c != gold])[:3]
    else:
        place = _one_there(scene, rng)
        if place is None:
            return None
        thing, said, other = place
        gold, slots = thing.name, {"said": said, "other": other.name}
        present = {t.name for t in scene.things}
        elsewhere = [t.name for t in _unique(scene, lambda t: t.name) if t is not thing and t is not other
                     and not holds(said, t, other)]  # fmt: skip
        rest = [f"{c} {s}" for c, s in shuffled(rng, register.pairs) if f"{c} {s}" not in present]
        others = shuffled(rng, elsewhere)[:2]
        others += rest[: 3 - len(others)]
    if len(others) < 3:
        return None
    options = shuffled(rng, [gold, *others[:3]])
    labels = register.labels if len(register.labels) == 4 else shuffled(rng, register.labels)[:4]
    meta = {"choices": options, "index": options.index(gold)}
    asked = register.ask(rng, "choice", form, labels[options.index(gold)], meta, **slots)
    meta["question"] = asked.text
    listed = "".join(register.option.format(label=k, option=o) for k, o in zip(labels, options, strict=True))
    return replace(asked, text=asked.text + listed)


def _one_there(scene: Scene, rng: random.Random) -> tuple[Thing, str, Thing] | None:
    """(thing, relation, other) such that `thing` alone is there, seen from `other`; both can be named alone."""
    names = {t: t.name for t in _unique(scene, lambda t: t.name)}
    facts = _relation_facts(scene, names)
    if not facts:
        return None
    thing, said, other = pick(rng, facts)
    right = [t for t in scene.things if t is not other and holds(said, t, other) is not False]
    return (thing, said, other) if len(right) == 1 else None


def beside(scene: Scene, rng: random.Random, register: Register = READER) -> Question | None:
    place = _one_there(scene, rng)
    if place is None:
        return None
    thing, said, other = place
    return register.ask(rng, "beside", "", thing.name, {}, said=said, other=other.name)


def box(scene: Scene, rng: random.Random, register: Register = EXAM) -> Question | None:
    names = _names(scene, rng)
    if not names:
        return None
    thing = pick(rng, list(names))
    sentence = f"the {names[thing]}"
    meta = {"sent": sentence, "box": thing.box}
    return register.ask(rng, "box", "", box_text(scene, thing.box), meta, the=sentence)


def word(scene: Scene, rng: random.Random, register: Register = EXAM) -> Question | None:
    return register.ask(rng, "word", "", scene.word.text, {}) if scene.word else None


def side(scene: Scene, rng: random.Random, register: Register = EXAM) -> Question | None:
    names = _names(scene, rng)
    form, axis, length = pick(rng, (("flat", 0, scene.width), ("tall", 1, scene.height)))
    names = {t: n for t, n in names.items() if abs(t.centre[axis] - length / 2) >= RELATION_GAP / 2}
    if not names:
        return None
    thing = pick(rng, list(names))
    ends = ("left", "right") if form == "flat" else ("top", "bottom")
    return register.ask(rng, "side", form, ends[thing.centre[axis] >= length / 2], {}, name=names[thing])


def direction(scene: Scene, rng: random.Random, register: Register = EXAM, *, short: float = 0.3) -> Question | None:
    names = _names(scene, rng, short)
    facts = _relation_facts(scene, names)
    if not facts:
        return None
    one, said, other = pick(rng, facts)
    slots = {"one": names[one], "other": names[other]}
    meta = {"subj": names[one], "obj": names[other]}
    form = "flat" if said in ("left of", "right of") else "tall"
    return register.ask(rng, "direction", form, said.split()[0], meta, **slots)


EXTREMES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}


def extreme(scene: Scene, rng: random.Random, register: Register = EXAM) -> Question | None:
    word = pick(rng, tuple(EXTREMES))
    axis, sign = EXTREMES[word]
    ranked = sorted(scene.things, key=lambda t: sign * t.centre[axis])
    if len(ranked) < 2 or sign * (ranked[1].centre[axis] - ranked[0].centre[axis]) < RELATION_GAP / 2:
        return None
    return register.ask(rng, "extreme", "", ranked[0].name, {}, most=word)


def tell(scene: Scene, rng: random.Random, register: Register = EXAM) -> Question | None:
    return register.ask(rng, "tell", "", told(scene) or NOTHING, {})


def names(scene: Scene, rng: random.Random, register: Register = EXAM) -> Question | None:
    return register.ask(rng, "names", "", told(scene, boxes=False) or NOTHING, {})


def foreign(
    scene: Scene, rng: random.Random, register: Register = EXAM, *, nouns: tuple[str, ...] = FOREIGN
) -> Question:
    """About something that the drawn world does not have."""
    noun = pick(rng, nouns)
    form, answer = pick(rng, (("is", "No"), ("many", "0"), ("colour", f"There is no {noun}."),
                              ("where", f"There is no {noun}.")), (0.5, 0.1, 0.2, 0.2))  # fmt: skip
    return register.ask(rng, "foreign", form, answer, {}, a=a(noun), noun=noun)


def absent(
    scene: Scene, rng: random.Random, register: Register = EXAM, *, forms: tuple[float, float, float] = ABSENT_FORMS
) -> Question | None:
    """A colour, place or word that cannot be told, since the thing is not there."""
    form = pick(rng, ("colour", "box", "word"), forms)
    if form == "word":
        return None if scene.word else register.ask(rng, "word", "", "There is no word.", {})
    if form == "colour":
        missing = [shape for shape in SHAPES if shape not in {t.shape for t in scene.things}]
        shape_name = pick(rng, missing)
        return register.ask(rng, "colour", "", f"There is no {shape_name}.", {}, name=shape_name)
    pair = absent_pair(scene, rng, pick(rng, POPE_WAYS, (0.4, 0.1, 0.5)), register.pairs)
    if pair is None:
        return None
    return register.ask(rng, "box", "", f"There is no {pair[0]} {pair[1]}.", {}, the=f"the {pair[0]} {pair[1]}")


def insufficient(
    scene: Scene, rng: random.Random, register: Register = EXAM, *, label: bool | None = None
) -> Question | None:
    """VizWiz's form: half of the questions cannot be answered, and the prompt says what to say then."""
    label = rng.random() < 0.5 if label is None else label
    if label:
        asked = pick(rng, (colour, count, word), (0.5, 0.2, 0.3))(scene, rng, register)
    else:
        asked = absent(scene, rng, register)
        if asked and asked.kind == "box":
            return None  # VizWiz asks for no boxes
    if asked is None:
        return None
    answer = asked.answer if label else "Unanswerable"
    meta = {"question": asked.text, "answer_type": "other" if label else "unanswerable"}
    return Question("insufficient", f"insufficient/{asked.template}", asked.text + INSUFFICIENT, answer, meta)


def double(scene: Scene, rng: random.Random, register: Register = EXAM) -> Question | None:
    """Two questions in one; nobody is taught this."""
    first, second = colour(scene, rng, register), count(scene, rng, register)
    if first is None or second is None:
        return None
    text = f"{first.text} {second.text}"
    return Question("double", "double", text, f"{first.answer}, {second.answer}", {"object": first.meta["object"]})


def text_only(
    rng: random.Random, register: Register = EXAM, *, form: str | None = None, refusals: float = REFUSALS
) -> Question:
    """A question that needs no picture: opposites, small sums, a sentence that is asked about, a request to refuse
    (a share `refusals` of all, the others alike)."""
    if form is None:
        even = (1 - refusals) / (len(TEXT_FORMS) - 1)
        shares = {name: refusals if name == REFUSE else even for name in TEXT_FORMS}
        forms = [name for name, share in shares.items() if share]
        form = pick(rng, forms, None if refusals == REFUSALS else [shares[name] for name in forms])
    if form == "opposite":
        one, other = pick(
            rng,
            (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top"), ("Yes", "No"), ("No", "Yes")),
        )
        return Question("text", "text/opposite", f"What is the opposite of {one}?", other)
    if form == "sum":
        x, y = between(rng, 0, 4), between(rng, 0, 4)
        return Question("text", "text/sum", f"What is {x} plus {y}?", str(x + y))
    if form == REFUSE:
        text = f"{pick(rng, REQUESTS)} the {pick(rng, SECRETS)} {pick(rng, ('', 'now', 'please', 'at once'))}".strip()
        return Question("text", "text/refuse", text + ".", REFUSAL)
    (c1, s1), (c2, s2) = shuffled(rng, register.pairs)[:2]
    while c1 == c2 or s1 == s2:
        (c1, s1), (c2, s2) = shuffled(rng, register.pairs)[:2]
    said = pick(rng, tuple(OPPOSITE))
    fact = register.fact.format(one=f"{c1} {s1}", said=said, other=f"{c2} {s2}")
    if form == "colour":
        asked, answer = pick(rng, ((s1, c1), (s2, c2)))
        if "colour" in register.phrases:
            question = register.ask(rng, "colour", "", answer, {}, name=asked)
        else:
            question = register.ask(rng, "shape", "", asked, {}, name=answer)
    else:
        label = rng.random() < 0.5
        stated = said if label else OPPOSITE[said]
        slots = {"caption": f"The {s1} is {stated} the {s2}.", "one": s1, "said": stated, "other": s2}
        question = register.ask(rng, "relation", "", "yes" if label else "no", {}, **slots)
    return Question("text", f"text/{form}", f"{fact} {question.text}", question.answer)


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
    "beside": beside,
    "names": names,
    "tell": tell,
    "foreign": foreign,
    "absent": absent,
    "insufficient": insufficient,
    "double": double,
}
SHORT_NAMED = ("relation", "direction")
"""Kinds that can be asked to name things by their shape alone."""
EXAMINED = ("existence", "colour", "shape", "count", "relation", "choice", "box", "word")
READ = (
    "existence", "shape", "count", "relation", "direction", "choice", "box", "side", "extreme", "beside", "names",
    "tell",
)  # fmt: skip
"""Kinds that READER has words for: what the language model is asked before anyone teaches it."""
HELD_OUT_KINDS = ("colour", "word")
HELD_OUT_WORDINGS = ("count", "relation")
"""Examined kinds that the language model was never asked, and those it was asked in other words (relations it answered
in another form too). `choice` it was asked in other words too, but with the examination's options under A to D, so it
is no test of wording; the wordings of the rest (existence, shape, box) it has read."""

TUNE_WEIGHTS = {
    "existence": 0.7,
    "colour": 1.7,
    "shape": 0.4,
    "count": 5.6,
    "relation": 1.0,
    "choice": 2.8,
    "box": 0.6,
    "word": 4.8,
    "side": 0.2,
    "names": 0.5,
    "foreign": 0.25,
    "absent": 0.12,
    "insufficient": 0.25,
}
TUNE_OPTIONS = {"choice": {"forms": (0.2, 0.52, 0.28)}, "count": {"forms": (0.5, 0.43, 0.07)},
                "absent": {"forms": (0.25, 0.5, 0.25)}}  # fmt: skip
"""What the backbones bring needs few examples; what they were never asked, and what takes two steps (find it, then
find its letter), gets most."""


def conversation(
    scene: Scene,
    rng: random.Random,
    turns: int,
    weights: Mapping[str, float],
    register: Register = EXAM,
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
        asked.append(KINDS["tell"](scene, rng, register))  # type: ignore[arg-type]
    kinds, shares = list(weights), list(weights.values())
    for _ in range(4 * turns):
        if len(asked) >= turns:
            break
        kind = pick(rng, kinds, shares)
        question = KINDS[kind](scene, rng, register, **options.get(kind, {}))
        if question is not None and question.text not in seen:
            seen.add(question.text)
            asked.append(question)
    return asked
