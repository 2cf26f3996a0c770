"""Running text about scenes, for a language model that never sees a question or a conversation.

It states what READER asks (`world/questions.py`): drawn with the same random numbers, it is about the same scenes and
the same facts, each a lead that ends where the fact begins (`The shape of the red object is` ... `ring.`). What READER
has no words for (`colour`, `word`) has none here, and refusals are what only conversations teach.
"""

from __future__ import annotations

from dataclasses import replace

from leveret.world.questions import NOTHING, READER, Question

PLAIN = replace(
    READER,
    phrases={
        "existence": {"": "In the image {a} is"},
        "shape": {"what": "The {name} object has the shape", "of": "The shape of the {name} object is"},
        "box": {"": "In the image {the} lies at"},
        "side/flat": {"": "Of left and right, the {name} is on the"},
        "side/tall": {"": "Of top and bottom, the {name} is at the"},
        "direction/flat": {"": "The {one}, left or right of the {other}, lies"},
        "direction/tall": {"": "The {one}, above or below the {other}, lies"},
        "extreme": {"": "The {most} object is the"},
        "tell": {"": "In full, the image shows"},
        "count/all": {"": "The number of all objects is", "in": "Of everything there are"},
        "count": {"": "The number of {things} is", "in": "Of {things} there are"},
        "relation": {
            "": "That the {one} lies {said} the {other} is",
            "say": "The {one} lies {said} the {other}: this is",
        },
        "choice/object": {"": "One of these is in the image", "in": "Of these the image shows one"},
        "choice/place": {"": "One of these lies {said} the {other}", "in": "Of these one lies {said} the {other}"},
        "beside": {"": "What lies {said} the {other} is the"},
        "names": {"": "The image shows", "in": "In the image one sees"},
    },
    said={
        "existence/Yes": "here",
        "existence/No": "not here",
        "relation/yes": "so",
        "relation/no": "not so",
        f"tell/{NOTHING}": "nothing",
        f"names/{NOTHING}": "nothing",
    },
    option=", {option}",
)  # fmt: skip
"""As many wordings as READER has, so that drawing one takes the same random numbers."""


def stated(question: Question) -> tuple[str, str] | None:
    """A question of PLAIN as a statement: its lead and its fact; None for what text states to nobody (a request)."""
    if question.template == "text/refuse":
        return None
    if question.kind == "choice":
        return question.text + ", and it is the", question.meta["choices"][question.meta["index"]]
    if question.template in ("text/opposite", "text/sum"):
        lead = question.text.removeprefix("What is ").removesuffix("?") + " is"
        return lead[0].upper() + lead[1:], question.answer
    return question.text, question.answer
