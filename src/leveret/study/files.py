"""A study as a file: a base, what is varied and how, over which seeds, and what a paper says of it.

    base: world                    a train recipe
    axes: {stages: {base: two, levels: {two: {}, one: {train: [stages.align=null]}}}}
    claims: [{paper: ..., axis: stages, level: one, expect: not lower}]

A cell is one level on every axis, at one seed. All axes at their base is the base cell; the others differ from it on
one axis, or, where `crossed`, are all combinations. No heavy import here: a study's faults are told before work begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from leveret import recipe as recipes
from leveret.runs import RecipeError, closest

if TYPE_CHECKING:
    from collections.abc import Sequence

SCORE = "score"
"""A study's first measure, where a claim names none: the mean of the suite's tasks, if the suite is asked."""
WORDS = "words"
"""How many words an answer has: the mean over the questions of each task, then over the tasks."""
MEASURES = {
    "suite": "the suite, asked of the model",
    "loss": "loss on held-out captions, in nats a token, of the model that learned from the chosen pairs; low is good",
    "encoder": "recall at 5 of held-out pairs, by a dual encoder that learned from nothing but the chosen pairs",
}
"""What can be measured of a cell, the dearest first. The last two want held-out captions of the drawn world."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Choose(_Strict):
    """How the pairs of the align stage are chosen from the web."""

    recipe: str = Field("world", description="A condense recipe, by name or path.")
    set: tuple[str, ...] = Field(("steps.budget.count=1500",), description="Overrides of it, `a.b=c`.")
    oracle: int | None = Field(
        None, ge=1, strict=True,
        description="Instead: so many pairs by the drawn world's own truth. A bound, no method.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _whole(self) -> Choose:
        usual = (Choose.model_fields["recipe"].default, Choose.model_fields["set"].default)
        if self.oracle is not None and (self.recipe, self.set) != usual:
            raise ValueError("oracle: it reads the truth and follows no recipe; leave out recipe and set")
        _no_seed("set", self.set)
        return self


def _no_seed(place: str, overrides: Sequence[str]) -> None:
    if given := [one for one in overrides if one.partition("=")[0].strip() == "seed"]:
        raise ValueError(
            f"{place}: {given[0]!r} is without effect: the seed is the cell's own, one of the study's `seeds`"
        )


class Averaged(_Strict):
    """A level whose model is the mean of those of other levels of its axis, not a taught one."""

    levels: tuple[str, ...] = Field(min_length=2, description="Their names.")
    weights: tuple[float, ...] | None = Field(None, description="Their shares; equal ones when left out.")


class Level(_Strict):
    """One way to be on an axis: what it changes of the base."""

    about: str = Field("", description="In words, for the page.")
    train: tuple[str, ...] = Field((), description="Overrides of the train recipe, `a.b=c`.")
    choose: Choose | None = Field(
        None, description="Another choice of pairs, whole: what it does not say is usual, not the study's."
    )
    world: dict[str, Any] = Field(default_factory=dict, description="Other fields of the drawn world.")
    average: Averaged | None = Field(None, description="Instead of teaching: the mean of other levels' models.")

    @model_validator(mode="after")
    def _whole(self) -> Level:
        _no_seed("train", self.train)
        return self


class Axis(_Strict):
    """One thing that is varied."""

    question: str = Field(description="What it answers.")
    base: str = Field(description="The level that the others are compared with.")
    levels: dict[str, Level] = Field(min_length=2, description="Its levels, by name.")

    @field_validator("levels", mode="before")
    @classmethod
    def _left_out(cls, levels: Any) -> Any:
        """`NAME: null` takes away a level that the file has."""
        return {name: how for name, how in levels.items() if how is not None} if isinstance(levels, dict) else levels

    @model_validator(mode="after")
    def _whole(self) -> Axis:
        if self.base not in self.levels:
            raise ValueError(f"base {self.base!r} is none of its levels: {', '.join(self.levels)}")
        if self.levels[self.base].average is not None:
            raise ValueError(f"base {self.base!r}: an average of other levels cannot be the base")
        for name, level in self.levels.items():
            if level.average is None:
                continue
            if level.train or level.choose or level.world:
                raise ValueError(f"levels.{name}: an average teaches nothing; leave out train, choose and world")
            strange = [one for one in level.average.levels if one not in self.levels or self.levels[one].average]
            if strange:
                raise ValueError(f"levels.{name}.average: {', '.join(strange)} is no level of this axis that is taught")
            if level.average.weights is not None and len(level.average.weights) != len(level.average.levels):
                raise ValueError(f"levels.{name}.average: as many weights as levels, or none")
            if any(
                self.levels[one].world != self.levels[level.average.levels[0]].world for one in level.average.levels
            ):
                raise ValueError(f"levels.{name}.average: its levels are of different worlds; in which is it examined?")
            shares = level.average.weights
            if shares is not None and (min(shares) < 0 or not abs(sum(shares) - 1) < 1e-6):
                raise ValueError(f"levels.{name}.average: weights are from 0 on, and sum to 1")
        return self


class Claim(_Strict):
    """What a paper found, and how our figure would agree with it."""

    paper: str = Field(description="Which paper, and where in it.")
    says: str = Field(description="Its finding, in words.")
    figures: str = Field("", description="Its own figures, as printed there.")
    axis: str = Field(description="The axis that asks the same.")
    level: str = Field(description="The level that is compared.")
    than: str | None = Field(None, description="The level that it is compared with; null for the axis' base.")
    expect: Literal["higher", "lower", "same", "not lower", "not higher"] = Field(
        description="What the finding would have our difference (`level` less `than`) be."
    )
    by: tuple[str, ...] = Field(
        (SCORE,), min_length=1, description="`score`, `words` (of an answer), or tasks whose mean is compared."
    )
    margin: float = Field(0.01, gt=0, description="How small a difference counts as none (`same`, `not ...`).")


class StudyRecipe(_Strict):
    """What is compared with what."""

    name: str = Field(min_length=1, description="Name of the study, for people.")
    title: str = Field(description="Its question, as a heading.")
    about: str = Field("", description="What stands behind it; what the drawn world can and cannot say.")
    base: str = Field("world", description="The train recipe that all cells start from.")
    train: tuple[str, ...] = Field((), description="Overrides of it for all cells.")
    world: dict[str, Any] | None = Field(
        default_factory=dict, description="Fields of the drawn world; null where the recipe names data of its own."
    )
    choose: Choose = Field(
        default_factory=lambda: Choose.model_validate({}), description="How the align stage's pairs are chosen."
    )
    measures: tuple[Literal["suite", "loss", "encoder"], ...] = Field(
        ("suite",), min_length=1, description="What is measured of each cell; the first is its score."
    )
    suite: str = Field("world", description="What the models are examined on.")
    questions: str | None = Field(None, description="Folder of the suite's files, where no world is drawn.")
    n: int | None = Field(None, ge=1, description="At most so many questions a task.")
    blind: bool = Field(False, description="Also ask with another picture.")
    seeds: tuple[Annotated[int, Field(strict=True)], ...] = Field(
        (0, 1, 2), min_length=1, description="Of world, choice and training."
    )
    axes: dict[str, Axis] = Field(min_length=1, description="What is varied.")
    crossed: bool = Field(False, description="All combinations of levels, instead of one change at a time.")
    claims: tuple[Claim, ...] = Field((), description="What papers found.")
    radar: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="Questions of the page's radar: name -> tasks whose mean it shows."
    )

    @model_validator(mode="after")
    def _whole(self) -> StudyRecipe:
        faults = []
        if self.name.startswith("/") or {"..", "."} & set(self.name.split("/")) or not self.name.isprintable():
            faults.append(f"name: {self.name!r}; its folder is called so: no / in front, no .., no control characters")
        for word in (*self.axes, *(level for axis in self.axes.values() for level in axis.levels)):
            if not word or set(word) & set("=,@") or not word.isprintable():
                faults.append(
                    f"axes: {word!r}: names of axes and levels are words without = , @, for cells are named by them"
                )
        _no_seed("train", self.train)
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            faults.append("seeds: different whole numbers, 0 or more")
        for place, claim in enumerate(self.claims):
            axis = self.axes.get(claim.axis)
            if axis is None:
                faults.append(f"claims.{place}.axis: {claim.axis!r}; the axes are {', '.join(self.axes)}")
                continue
            than = claim.than or axis.base
            if than not in axis.levels:
                faults.append(f"claims.{place}.than: {than!r}; allowed are {', '.join(axis.levels)}")
            if claim.level not in axis.levels or claim.level == than:
                others = [name for name in axis.levels if name != than]
                faults.append(f"claims.{place}.level: {claim.level!r}; allowed are {', '.join(others)}")
        if self.world is None and self.questions is None:
            faults.append("questions: without a drawn world the suite's files need a folder")
        if len(set(self.measures)) < len(self.measures):
            faults.append("measures: each only once")
        if more := [name for name in self.measures if name != "suite"]:
            if self.world is None:
                faults.append(
                    f"measures: {', '.join(more)} is measured on the drawn world only, and this study has none"
                )
            else:
                faults += [
                    f"measures: {', '.join(more)} needs held-out captions; {place}captions is 0"
                    for place, world in self._worlds().items()
                    if world.get("captions") == 0
                ]
        if self.world is None:
            faults += [
                f"axes.{axis}.levels.{name}: changes the drawn world, or a choice from it, and this study draws none"
                for axis, row in self.axes.items()
                for name, level in row.levels.items()
                if level.world or level.choose is not None
            ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _worlds(self) -> dict[str, dict[str, Any]]:
        """Where fields of the world stand -> these fields over the study's own."""
        own = self.world or {}
        levels = ((f"axes.{a}.levels.{n}", level) for a, axis in self.axes.items() for n, level in axis.levels.items())
        return {"world.": own} | {f"{place}.world.": {**own, **level.world} for place, level in levels if level.world}


@dataclass(frozen=True, slots=True)
class Cell:
    """One model to be: a level on every axis, and a seed."""

    levels: tuple[tuple[str, str], ...]
    seed: int

    @property
    def name(self) -> str:
        return ",".join(f"{axis}={level}" for axis, level in self.levels) + f"@{self.seed}"

    def at(self, axis: str, level: str) -> Cell:
        """The same, but on one axis at another level."""
        return Cell(tuple((one, level if one == axis else own) for one, own in self.levels), self.seed)


def read(name_or_path: str | Path, overrides: Sequence[str] = ()) -> StudyRecipe:
    """A study by its name or its file, with overrides. RecipeError with all faults at once."""
    study = recipes.load(name_or_path, StudyRecipe, "studies", overrides)
    if study.world is not None:
        from leveret.world.write import WorldSize

        known = WorldSize.__dataclass_fields__
        for one in study._worlds().values():
            for field in one:
                if field not in known:
                    near = closest(field, known)
                    hint = f" Did you mean {near[0]}?" if near else ""
                    raise RecipeError(f"{study.name}: the world has no {field!r}; it has {', '.join(known)}.{hint}")
    _asked(study)
    return study


def _asked(study: StudyRecipe) -> None:
    """RecipeError where the suite is none or asks what the world has no questions for, or where a task is named that it
    does not ask."""
    from leveret.evaluate.tasks import asked

    try:
        tasks = [row.id for row, _ in asked(study.suite)] if "suite" in study.measures else []
    except RecipeError as fault:
        raise RecipeError(f"{study.name}: suite: {fault}") from None
    if study.world is None:  # what a benchmark's table calls its columns is known when it was asked
        return
    from leveret.world.examination import MORE

    for place, world in study._worlds().items():
        if world.get("harder", 0) == 0 and (more := [task for task in tasks if task in MORE]):
            raise RecipeError(
                f"{study.name}: the suite {study.suite} asks {', '.join(more)}, of which a world has as many questions "
                f"as {place}harder says, and that is 0; give it a number"
            )
    others = [name for name in study.measures if name != "suite"]
    named = [(f"claims.{at}.by", claim.by, [SCORE, WORDS, *others, *tasks]) for at, claim in enumerate(study.claims)]
    named += [(f"radar.{spoke}", by, tasks) for spoke, by in study.radar.items()]
    for place, by, known in named:
        for one in by:
            if one not in known:
                near = closest(one, known)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise RecipeError(
                    f"{study.name}: {place}: {one!r} is no task of the suite {study.suite}, and nothing else that is "
                    f"measured; allowed are {', '.join(known)}.{hint}"
                )


def base_cell(study: StudyRecipe, seed: int) -> Cell:
    return Cell(tuple((name, axis.base) for name, axis in study.axes.items()), seed)


def cells(study: StudyRecipe) -> list[Cell]:
    """All cells in the order of work: a seed after the other, the base first, so that an early stop leaves pairs."""
    return [cell for seed in study.seeds for cell in _of_seed(study, seed)]


def _of_seed(study: StudyRecipe, seed: int) -> Iterator[Cell]:
    base = base_cell(study, seed)
    if study.crossed:
        names = list(study.axes)
        everything = product(*(study.axes[name].levels for name in names))
        whole = [Cell(tuple(zip(names, levels, strict=True)), seed) for levels in everything]
        yield base
        yield from (cell for cell in whole if cell != base)
        return
    yield base
    for name, axis in study.axes.items():
        yield from (base.at(name, level) for level in axis.levels if level != axis.base)
