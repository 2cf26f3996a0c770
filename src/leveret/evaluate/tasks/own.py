"""A user's own task: a row in a YAML file, over the forms and rules that are here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator

from leveret import recipe
from leveret.evaluate.forms import FORMS
from leveret.evaluate.headlines import HEADLINES
from leveret.evaluate.scorers import SCORERS
from leveret.evaluate.tasks.base import TaskRow
from leveret.runs import RecipeError

if TYPE_CHECKING:
    Form: TypeAlias = str
    Rule: TypeAlias = str
    Headline: TypeAlias = str
else:  # so that a misspelt one is told with the nearest that is there
    Form, Rule, Headline = (Literal[tuple(known)] for known in (FORMS, SCORERS, HEADLINES))


class OwnTask(BaseModel):
    """What such a file may say; `TaskRow` tells what each means."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(default="", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$|^$", description="by default the file's name")
    form: Form
    files: tuple[str, ...] = Field(min_length=1)
    images: str = ""
    prompt: str = "{question}"
    rule: Rule | None = Field(
        default=None, description="the one rule; or `rules`, name -> rule, the first is the usual"
    )
    rules: dict[str, Rule] = {}
    max_new_tokens: int = Field(default=128, ge=1)
    headline: Headline = "accuracy"
    splits: dict[str, str] = {}
    about: str = ""

    @field_validator("files", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("files", "images")
    @classmethod
    def _inside(cls, value: Any) -> Any:
        for path in (value,) if isinstance(value, str) else value:
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise ValueError("allowed: paths and patterns below the data folder, without '..'")
            try:
                str(path).format(split="test")
            except (KeyError, ValueError, IndexError, AttributeError):
                raise ValueError(f"{path!r}: the only thing in braces is {{split}}") from None
        return value


def read_task(path: str | Path) -> TaskRow:
    """The row that a YAML file describes; RecipeError names every fault in it, with the nearest key or value.

    The id is the file's name unless it says another; a rule's lineage is called `own` where only one is given."""
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path} is not there. Give the YAML file of a task, or the id of one that is known.")
    told = recipe.load(path, OwnTask, "data")
    if bool(told.rule) == bool(told.rules):
        there = "both are" if told.rule else "neither is"
        known = ", ".join(SCORERS)
        raise RecipeError(f"{path}: give `rule`, or `rules` (name -> rule); {there} there. Rules: {known}.")
    return TaskRow(
        id=told.id or path.stem,
        form=told.form,
        rules=told.rules or {"own": told.rule or ""},
        files=told.files,
        images=told.images,
        prompt=told.prompt,
        max_new_tokens=told.max_new_tokens,
        headline=told.headline,
        splits=told.splits,
        about=told.about,
    )
