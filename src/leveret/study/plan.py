"""What a comparison of choices runs: the worlds, the arms, the measures, and the cells that follow from them.

A cell is one figure: (strength, seed, arm, measure, length). Fields that every figure depends on (`fixed`) bind a
folder for good; the others only say which cells are wanted, so that a plan may grow and finished cells stay.

The work goes in rounds, what answers most first: who stops early has a whole, smaller comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from leveret.runs import RecipeError, closest
from leveret.study.arms import ARMS, BASELINE
from leveret.study.measures import MEASURES
from leveret.world.captions import STRENGTHS
from leveret.world.write import WorldSize

GROWING = ("seeds", "strengths", "arms", "measures", "taught_strengths", "lengths", "long_arms")
"""Fields of a plan that say which cells are wanted, and change the figure of none."""
IN_RECIPE = ("align_steps", "tune_steps", "ranks")
"""Fields that the resolved train recipe holds: given or left out, what counts is what it then says."""
ROUNDS = PAYS, EVERY_WAY, OTHER_WEBS, LONGER = (
    "does choosing pay",
    "the other ways in the examination",
    "other strengths of the diseases",
    "longer tuning",
)
"""Questions, the most telling first; a round of work each."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure: what is measured on which arm of which world.

    length  times the recipe's tune steps; 0 where nothing is tuned.
    """

    strength: str
    seed: int
    arm: str
    measure: str
    length: int = 0

    @property
    def name(self) -> str:
        """The name under which it is remembered."""
        return f"{self.strength}-{self.seed}-{self.arm}-{self.measure}" + (f"-x{self.length}" if self.length else "")


@dataclass(frozen=True, slots=True)
class Plan:
    """Which choices are compared, where, and by what. The defaults are the study's own.

    seeds            of the world, the choice and the training; one seed is one paired observation.
    strengths        of the web's diseases (`world.captions.STRENGTHS`).
    arms, measures   rows of `arms.ARMS` and `measures.MEASURES`.
    taught_strengths where the dear measures, the loss and the suite, are taken.
    lengths          of tuning, as multiples of the recipe's steps; other lengths than 1 for `long_arms` alone.
    web, tune        pairs of the web, and conversations (`world.write.WorldSize`).
    test, captions   questions a kind, and held-out pairs that fit.
    budget           pairs that each arm keeps.
    encoder_steps    optimiser steps of the dual encoder, of `encoder_batch` pairs each.
    align_steps      instead of the recipe's; so with `tune_steps`.
    ranks            training processes, as in a train recipe.

    Raises RecipeError with every fault at once.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    strengths: tuple[str, ...] = tuple(STRENGTHS)
    arms: tuple[str, ...] = tuple(ARMS)
    measures: tuple[str, ...] = tuple(MEASURES)
    taught_strengths: tuple[str, ...] = ("usual",)
    lengths: tuple[int, ...] = (1, 4)
    long_arms: tuple[str, ...] = ("coreset", BASELINE)
    web: int = 75_000
    tune: int = 8_000
    test: int = 300
    captions: int = 512
    budget: int = 1_500
    encoder_steps: int = 300
    encoder_batch: int = 64
    align_steps: int | None = None
    tune_steps: int | None = None
    ranks: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        faults = [
            *_strangers("strengths", self.strengths, STRENGTHS),
            *_strangers("taught_strengths", self.taught_strengths, STRENGTHS, empty=True),
            *_strangers("arms", self.arms, ARMS),
            *_strangers("long_arms", self.long_arms, ARMS, empty=True),
            *_strangers("measures", self.measures, MEASURES),
            *_not_counts("seeds", self.seeds, least=0),
            *_not_counts("lengths", self.lengths),
        ]
        if BASELINE not in self.arms:
            faults.append(f"arms={','.join(self.arms)}: {BASELINE!r} must be one of them; differences are taken to it")
        for name in ("web", "tune", "test", "captions", "budget", "encoder_steps", "encoder_batch"):
            faults += _not_counts(name, (getattr(self, name),))
        for name in ("align_steps", "tune_steps"):
            given = getattr(self, name)
            faults += _not_counts(name, (given,)) if given is not None else []
        if not faults and self.budget > self.web:
            faults.append(
                f"budget={self.budget}: more than the web holds (web={self.web}); lower one or raise the other"
            )
        if not faults and self.tune < 4:
            faults.append(f"tune={self.tune}: the examination's training side asks about a quarter of these; 4 or more")
        if faults:
            raise RecipeError("this plan cannot run:\n  " + "\n  ".join(faults))

    @classmethod
    def read(cls, overrides: Iterable[str], *, prefix: str = "") -> Plan:
        """The plan that overrides such as `seeds=0,1` or `tune_steps=90` make of the default one.

        Raises RecipeError for a field that a plan does not have, or a value that it cannot take.
        """
        known = {name: getattr(cls(), name) for name in cls.__dataclass_fields__}
        changed: dict[str, Any] = {}
        for given in overrides:
            name, _, value = given.partition("=")
            if name not in known:
                near = closest(name, known)
                hint = f" Did you mean {prefix}{near[0]}?" if near else ""
                raise RecipeError(f"{prefix}{given}: the comparison has no {name!r}; it has {', '.join(known)}.{hint}")
            default = known[name]
            try:
                if isinstance(default, tuple):
                    whole = isinstance(default[0], int)
                    changed[name] = tuple(int(v) if whole else v for v in value.split(",") if v)
                else:
                    changed[name] = value if name == "ranks" and value == "auto" else int(value)
            except ValueError:
                raise RecipeError(f"{prefix}{given}: {name} takes whole numbers, such as {name}=1") from None
        return cls(**changed)

    def size(self, strength: str) -> WorldSize:
        """The world that is drawn for a strength."""
        return WorldSize(
            strength=strength, web=self.web, tune=self.tune, test=self.test, captions=self.captions, harder=0
        )

    def fixed(self) -> dict[str, Any]:
        """The fields that every figure depends on, but for those that the train recipe holds."""
        return {name: value for name, value in asdict(self).items() if name not in GROWING + IN_RECIPE}

    def rounds(self) -> dict[str, list[Cell]]:
        """The cells in the order of work, by the question that each round answers; a round without cells is left out.

        In a round world by world, in each the cheap measures first.
        """
        rounds: dict[str, list[Cell]] = {question: [] for question in ROUNDS}
        for seed in self.seeds:
            for strength in self.strengths:
                for cell in self._of(strength, seed):
                    rounds[self._round(cell)].append(cell)
        return {question: cells for question, cells in rounds.items() if cells}

    def cells(self) -> list[Cell]:
        """All cells in the order of work."""
        return [cell for cells in self.rounds().values() for cell in cells]

    def _of(self, strength: str, seed: int) -> Iterator[Cell]:
        for measure in [name for name in MEASURES if name in self.measures]:
            if MEASURES[measure].stages and strength not in self.taught_strengths:
                continue
            if not MEASURES[measure].tunes:
                yield from (Cell(strength, seed, arm, measure) for arm in self.arms)
                continue
            for length in self.lengths:
                arms = self.arms if length == 1 else [arm for arm in self.arms if arm in self.long_arms]
                yield from (Cell(strength, seed, arm, measure, length) for arm in arms)

    def _round(self, cell: Cell) -> str:
        if cell.strength not in self.taught_strengths:
            return OTHER_WEBS
        if cell.length > 1:
            return LONGER
        return EVERY_WAY if cell.length and cell.arm not in self.long_arms else PAYS


def _strangers(name: str, given: Iterable[str], known: Mapping[str, Any], *, empty: bool = False) -> list[str]:
    """What is wrong with a field of names."""
    given = tuple(given)
    faults = []
    for item in dict.fromkeys(given):
        if item not in known:
            near = closest(item, known)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            faults.append(f"{name}={item}: allowed are {', '.join(known)}{hint}")
    if len(set(given)) < len(given):
        faults.append(f"{name}={','.join(given)}: each only once")
    if not given and not empty:
        faults.append(f"{name}: give at least one of {', '.join(known)}")
    return faults


def _not_counts(name: str, given: Iterable[int], least: int = 1) -> list[str]:
    """What is wrong with a field of whole numbers."""
    given = tuple(given)
    faults = [f"{name}={item}: a whole number from {least} on" for item in given if item < least]
    if len(set(given)) < len(given):
        faults.append(f"{name}={','.join(map(str, given))}: each only once")
    return faults if given else [f"{name}: give at least one"]
