"""What the tiny language models read before anyone teaches them: rows of token ids, how much each weighs, and when.

A row is a told scene and what is asked about it, or (`plain`) stated in running text. Most scenes are told as compound
rows (see `perceive`): sixteen positions, mostly empty, one position a thing or a letter, each the sum of the embeddings
of what it is. The rest are told in words, or are text-only. No picture is seen here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leveret.world.perceive import CELLS, percepts
from leveret.world.plain import PLAIN, stated
from leveret.world.questions import (
    EXAM,
    NOTHING,
    READER,
    SHORT_NAMED,
    Question,
    Register,
    conversation,
    text_only,
    told,
)
from leveret.world.scenes import COLOURS, LETTERS, SHAPES, Scene, sample_scene
from leveret.world.tokens import ASSISTANT, END, USER

SLOTS = (16, 64)
"""Positions of a scene in a compound row: few, so that rows are short, and as many as a vision tower's tokens, so that
the model is not surprised by them. WIDE is the share of batches with the latter, things in their own cells."""
NOISE, WIDE = 0.1, 0.25
"""NOISE is added to each compound, in its own root mean square: a connector will not hit it exactly."""
BATCH = 16
FIRST_WEIGHTS = {
    "existence": 2.2,
    "shape": 2.5,
    "count": 1.7,
    "relation": 1.0,
    "direction": 3.0,
    "choice": 1.7,
    "box": 1.7,
    "side": 1.3,
    "extreme": 0.6,
    "beside": 0.8,
    "names": 1.5,
}
WEIGHTS = {
    "existence": 1.7,
    "shape": 0.8,
    "count": 2.5,
    "relation": 1.5,
    "direction": 1.5,
    "choice": 2.5,
    "box": 3.0,
    "side": 0.7,
    "extreme": 1.2,
    "beside": 1.5,
    "names": 1.8,
}
"""What is asked, how often: first what binding and directions come with, then what is still hard. That a said relation
holds is an exclusive-or of the said direction and the real one: it is learned only by a model that can tell the
direction itself, which is therefore asked for too."""
LAST_WEIGHTS = WEIGHTS | {
    "existence": 1.2,
    "shape": 0.5,
    "relation": 1.0,
    "direction": 0.8,
    "box": 5.0,
    "side": 0.4,
    "names": 3.0,
}
BETWEEN_WEIGHTS = FIRST_WEIGHTS | {
    "existence": 1.7,
    "shape": 1.7,
    "relation": 2.0,
    "choice": 2.2,
    "extreme": 1.0,
    "beside": 1.3,
}


@dataclass(frozen=True, slots=True)
class Phase:
    """What holds from a step on: weights of the kinds, noise on compounds, share of batches with wide scenes, and how
    the options of a multiple choice are listed."""

    start: int
    weights: Mapping[str, float]
    noise: float
    wide: float
    register: Register


LISTED = replace(READER, labels=EXAM.labels, option=EXAM.option)
FULL = 12_000
PHASES = (
    Phase(0, FIRST_WEIGHTS, 0.0, 0.0, READER),
    Phase(6000, BETWEEN_WEIGHTS, 0.15, WIDE, READER),
    Phase(6165, WEIGHTS, NOISE, WIDE, LISTED),
    Phase(7500, LAST_WEIGHTS, NOISE, WIDE, LISTED),
)
"""Binding (which colour goes with which shape) comes first, from clean and short scenes; then the rest. Options under
random letters, all in one line, were answered at chance for 6,000 steps; since then they are listed under A to D. (The
shipped model's run was stopped at 6,165 to change that.) The starts are those of a reading of FULL steps; a shorter one
comes to each phase as much earlier."""
OPTIONS = {"relation": {"short": 0.6}, "direction": {"short": 0.6}}
HINTED = {"relation": 1.0, "direction": 2.0}
HINTED_ROWS, HINTED_TURNS = 0.08, 0.25
"""This share of rows are without a scene, with the coordinates at the very words that name the things (so comparing can
be learned before finding); in this share of the other rows' relations they stand there too."""
DESCRIBE = 0.2
EMPTY = 0.04
"""Share of scenes without a thing."""
CURRICULUM = ((270, 1), (720, 2))
"""Up to a step, at most so many things in a scene; after that four."""
COMPOUND, IN_WORDS = 0.8, 0.13
FIRST, REST, STOP, OTHER = 3.0, 1.0, 0.2, 0.1
"""Loss weights: an answer's first token, its other tokens, the end of a turn, everything else."""


Numbers = tuple[int, int, int, int]


def named_places(scene: Scene, question: Question) -> list[tuple[str, Numbers]]:
    """The two things a relation names, with their coordinates."""
    found = []
    for name in (question.meta["subj"], question.meta["obj"]):
        (thing,) = [t for t in scene.things if name in (t.name, t.shape)]
        found.append((name, scene.numbers(thing.box)))
    return found


class Writer:
    """Turns scenes and questions into rows of ids, loss weights and compound slots; keeps what it has tokenized.

    plain  writes running text: statements, one after the other, between two end tokens, and none of a conversation's
           marks. The words of a fact weigh what those of an answer do.
    """

    def __init__(self, tokenizer: Any, *, plain: bool = False) -> None:
        self.tokenizer = tokenizer
        self.plain = plain
        self.cache: dict[str, list[int]] = {}
        self.user, self.assistant, self.end = (tokenizer.convert_tokens_to_ids(t) for t in (USER, ASSISTANT, END))
        self.pad = tokenizer.pad_token_id
        self.newline, self.stop = self.ids("\n"), self.ids(".")

        def one(text: str) -> int:
            (token,) = self.ids(text)
            return token

        self.colours, self.shapes = [one(" " + c) for c in COLOURS], [one(" " + s) for s in SHAPES]
        self.letters = [one(letter) for letter in LETTERS]

    def ids(self, text: str) -> list[int]:
        found = self.cache.get(text)
        if found is None:
            found = self.cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def row(
        self,
        scene: Scene | None,
        opening: str | None,
        turns: list[tuple[str, str]],
        hints: dict[int, list[tuple[str, Numbers]]] | None = None,
        slots: int = SLOTS[0],
    ) -> dict[str, Any]:
        """A row of turns about a scene that is told as compounds, in words (`opening`), or not at all.

        turns  questions with their answers; of a plain row, leads with their facts.
        slots  positions of a compound scene.
        hints  turn -> names in its question and the coordinates that are added at each name's last word.
        """
        scene = scene if turns else None
        ids: list[int] = []
        weights: list[float] = []
        hinted: list[tuple[int, Numbers]] = []
        words, numbers = np.full((slots, 2), -1), np.full((slots, 4), -1)
        before, after = ([], self.stop) if self.plain else ([self.assistant], [self.end])
        for position, (question, answer) in enumerate(turns):
            head = [self.end] * (position == 0) if self.plain else [self.user]
            asked = " " + question if self.plain and position else question
            if position == 0 and scene is not None and opening is None:
                head += [self.pad] * slots + self.newline
            elif position == 0 and opening is not None:
                head += self.tokenizer(opening, add_special_tokens=False).input_ids + self.newline
            if hints and position in hints:
                start = len(ids) + len(head)
                hinted += [(start + i, n) for i, n in self._ends(asked, hints[position])]
            head += [*self.ids(asked), *before]
            said = self.ids(" " + answer) if len(answer) < 40 else self.tokenizer(" " + answer).input_ids
            ids += head + said + after
            weights += [OTHER] * len(head) + [FIRST] + [REST] * (len(said) - 1) + [STOP]
        if self.plain and turns:
            ids, weights = [*ids, self.end], [*weights, STOP]
        if scene is not None and opening is None:
            found = percepts(scene)[:slots]
            rng = random.Random(scene.background)
            wide = slots == CELLS * CELLS
            places = [p.cell for p in found] if wide else sorted(rng.sample(range(slots), len(found)))
            for slot, p in zip(places, found, strict=True):
                words[slot] = (
                    (self.letters[p.letter], -1) if p.letter >= 0 else (self.colours[p.colour], self.shapes[p.shape])
                )
                numbers[slot] = p.numbers
            weights[1 : 1 + slots] = [0.0] * slots
        return {
            "ids": ids,
            "weights": weights,
            "words": words,
            "numbers": numbers,
            "compound": scene is not None and opening is None,
            "hinted": hinted,
        }

    def _ends(self, question: str, names: list[tuple[str, Numbers]]) -> list[tuple[int, Numbers]]:
        """Where, in the question's tokens, each name's last word stands. The names come in the question's order."""
        found, at = [], 0
        for name, numbers in names:
            at = question.index(name, at) + len(name)
            found.append((len(self.ids(question[:at])) - 1, numbers))
        return found

    def training_row(self, rng: random.Random, step: int, steps: int = FULL, slots: int = SLOTS[0]) -> dict[str, Any]:
        kind = rng.random()
        if kind > COMPOUND + IN_WORDS:
            return self.row(None, None, self.said([text_only(rng, self.words(READER)) for _ in range(9)]), slots=slots)
        most = next((things for until, things in CURRICULUM if step < until), 4)
        counts = (0, 0) if rng.random() < EMPTY else (1, most)
        scene = sample_scene(rng, counts=counts, word=0.45, novel_pairs=None)
        if rng.random() < HINTED_ROWS:
            # A scene of one thing has no relations: such a row is empty and weighs nothing.
            questions = conversation(scene, rng, 10, HINTED, self.words(READER), options=OPTIONS)
            turns = self.said(questions)
            return self.row(None, None, turns, {i: named_places(scene, q) for i, q in enumerate(questions)}, slots)
        phase = phase_at(step, steps)
        questions = conversation(
            scene, rng, 10, phase.weights, self.words(phase.register), describe=DESCRIBE, options=OPTIONS
        )
        hints = {
            i: named_places(scene, q)
            for i, q in enumerate(questions)
            if q.kind in SHORT_NAMED and rng.random() < HINTED_TURNS
        }
        return self.row(scene, None if kind < COMPOUND else in_words(scene), self.said(questions), hints, slots)

    def words(self, register: Register) -> Register:
        """The register that rows are worded in, where a conversation's would be `register`."""
        return replace(PLAIN, labels=register.labels) if self.plain else register

    def said(self, questions: list[Question]) -> list[tuple[str, str]]:
        """What a row of them holds; of a plain row only what can be stated."""
        if not self.plain:
            return [(q.text, q.answer) for q in questions]
        return [pair for pair in map(stated, questions) if pair is not None]

    def training_batch(self, rng: random.Random, step: int, steps: int = FULL) -> dict[str, Tensor]:
        slots = SLOTS[rng.random() < phase_at(step, steps).wide]
        return self.batch([self.training_row(rng, step, steps, slots) for _ in range(BATCH)])

    def batch(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        slots = len(rows[0]["words"])
        length = max(1 + slots, *(len(row["ids"]) for row in rows))
        ids = np.full((len(rows), length), self.pad)
        weights = np.zeros((len(rows), length), np.float32)
        for i, row in enumerate(rows):
            ids[i, : len(row["ids"])] = row["ids"]
            weights[i, : len(row["ids"])] = row["weights"]
        places = [(i, at, numbers) for i, row in enumerate(rows) for at, numbers in row["hinted"]]
        return {
            "hint_at": torch.tensor([(i, at) for i, at, _ in places], dtype=torch.long).reshape(-1, 2),
            "hint_numbers": torch.tensor([n for _, _, n in places], dtype=torch.long).reshape(-1, 4),
            "ids": torch.from_numpy(ids),
            "weights": torch.from_numpy(weights),
            "words": torch.from_numpy(np.stack([row["words"] for row in rows])),
            "numbers": torch.from_numpy(np.stack([row["numbers"] for row in rows])),
            "compound": torch.tensor([row["compound"] for row in rows]),
        }


def phase_at(step: int, steps: int = FULL) -> Phase:
    """What holds at a step of a reading of `steps`."""
    return next(phase for phase in reversed(PHASES) if step * FULL >= phase.start * steps)


def in_words(scene: Scene) -> str:
    return f"Scene: {told(scene) or NOTHING}."
