"""The steps as rows of one table, and the recipe that puts them in sequence.

    steps:
      cluster: {k: auto}
      dedup: {threshold: 0.86, keep: middle}
      band: {step: rank_band, by: score, lo: 0.40, hi: 0.60}

A key is the step's label (in the ledger, the funnel and overrides: `steps.dedup.threshold=0.9`) and, unless `step` says
otherwise, the row of STEPS. `steps.dedup=null` leaves a step out. Steps run in their order, each on what the one before
it left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from leveret.condense.bands import draw, drop_top, rank_band, top
from leveret.condense.cluster import cluster
from leveret.condense.copies import collapse
from leveret.condense.dedup import KEEPS, dedup
from leveret.condense.table import Shop, Table, Verdict
from leveret.runs import RecipeError, closest


class StepConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    step: str
    """Which row of STEPS this is; the key itself where it is left out."""


class Collapse(StepConfig):
    """Mark bit-identical vectors, so that the next steps work on one of each and count it as often as it occurs."""


class Cluster(StepConfig):
    """k-means on the vectors (L2, raw centroids)."""

    k: int | Literal["auto"] = "auto"
    """Clusters; auto = sqrt(n / 2). 1 compares every row with every other."""
    iterations: int = Field(20, ge=1, le=1000)
    """Most rounds; fewer when no centroid moves any more."""
    rows_per_centroid: int = Field(256, ge=1)
    """Training rows for each centroid, chosen by the hash of their ids."""

    @model_validator(mode="after")
    def _positive(self) -> Cluster:
        if self.k != "auto" and self.k < 1:
            raise ValueError("k must be 1 or more, or auto")
        return self


class Dedup(StepConfig):
    """Keep one row of each group of near copies."""

    threshold: float = Field(0.86, ge=-1, le=1)
    """Two rows are near copies when their cosine is greater than this."""
    keep: Literal["middle", "far", "near", "inner-middle", "best-score"] = "middle"
    """Which member stays: by distance to the centroid, to the group's own mean, or by image-text score."""


class RankBand(StepConfig):
    """Keep a band of ranks, counted from the highest value."""

    by: Literal["score", "centroid_cosine"] = "score"
    lo: float = Field(ge=0, le=1)
    """Share of the ranks above the band."""
    hi: float = Field(ge=0, le=1)
    """Share of the ranks above the band's lower end."""

    @model_validator(mode="after")
    def _ordered(self) -> RankBand:
        if self.lo >= self.hi:
            raise ValueError(f"lo ({self.lo}) must be smaller than hi ({self.hi}): both count from the highest value")
        return self


class CentroidBand(RankBand):
    """Keep a band of ranks of the similarity to the row's own centroid."""

    by: Literal["score", "centroid_cosine"] = "centroid_cosine"


class Amount(StepConfig):
    share: float | None = Field(None, ge=0, le=1)
    """Of what the step before left, rounded down. Give this or count."""
    count: int | None = Field(None, ge=0)
    """Rows (all, where there are fewer). Give this or share."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Amount:
        if (self.share is None) == (self.count is None):
            raise ValueError("give share or count, and not both")
        return self


class Top(Amount):
    """Keep the highest values."""

    by: Literal["score", "centroid_cosine"] = "score"


class DropTop(Amount):
    """Drop the highest values."""

    by: Literal["score", "centroid_cosine"] = "score"


class Draw(Amount):
    """Keep rows drawn by the seeded hash of their ids."""


@dataclass(frozen=True)
class StepRow:
    """A step: its function, its settings, the columns it reads and those it makes.

    title  what it does, for the funnel of a report.
    """

    run: Callable[[Table, Any, Shop], Verdict]
    config: type[StepConfig]
    needs: Callable[[Any], tuple[str, ...]]
    makes: tuple[str, ...]
    title: str


def _nothing(config: Any) -> tuple[str, ...]:
    return ()


def _by(config: Any) -> tuple[str, ...]:
    return (config.by,)


def _of_dedup(config: Any) -> tuple[str, ...]:
    return ("cluster", "score") if KEEPS[config.keep].needs_score else ("cluster",)


_COMPONENTS = ("component", "component_size", "representative")

STEPS: dict[str, StepRow] = {
    "collapse": StepRow(collapse, Collapse, _nothing, ("copy_of",), "mark exact copies"),
    "cluster": StepRow(cluster, Cluster, _nothing, ("cluster", "centroid_cosine"), "group by likeness"),
    "dedup": StepRow(dedup, Dedup, _of_dedup, _COMPONENTS, "keep one of each group of near copies"),
    "rank_band": StepRow(rank_band, RankBand, _by, (), "keep a band of ranks"),
    "centroid_band": StepRow(rank_band, CentroidBand, _by, (), "keep a band of closeness to the centre"),
    "top": StepRow(top, Top, _by, (), "keep the highest"),
    "drop_top": StepRow(drop_top, DropTop, _by, (), "drop the highest"),
    "random": StepRow(draw, Draw, _nothing, (), "draw at random"),
    "budget": StepRow(draw, Draw, _nothing, (), "draw the budget at random"),
}


# --- the recipe ----------------------------------------------------------------------------------------------------


def _read_steps(given: Any) -> Any:
    """Each value becomes the settings of its row; all faults of all steps are reported together."""
    if not isinstance(given, Mapping):
        return given
    found: dict[str, StepConfig] = {}
    faults: list[InitErrorDetails] = []
    for label, value in given.items():
        if value is None:
            continue
        if isinstance(value, StepConfig):
            found[label] = value
            continue
        if not isinstance(value, Mapping):
            text = f"settings of a step are a mapping such as {{}}, not {value!r}"
            faults.append({"type": PydanticCustomError("step_settings", text), "loc": (label,), "input": value})  # type: ignore[arg-type]
            continue
        name = str(value.get("step", label))
        if name not in STEPS:
            near = closest(name, STEPS)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            text = f"there is no step {name!r}; allowed are {', '.join(STEPS)}{hint}"
            faults.append({"type": PydanticCustomError("unknown_step", text), "loc": (label,), "input": name})  # type: ignore[arg-type]
            continue
        try:
            found[label] = STEPS[name].config.model_validate({**value, "step": name})
        except ValidationError as fault:
            for line in fault.errors(include_url=False):
                entry: InitErrorDetails = {"type": line["type"], "loc": (label, *line["loc"]), "input": line["input"]}
                if line["type"] == "extra_forbidden":
                    # Said here, because only here it is known which settings this step has.
                    allowed = [key for key in STEPS[name].config.model_fields if key != "step"]
                    near = closest(str(line["loc"][-1]), allowed)
                    hint = f"; did you mean {' or '.join(near)}?" if near else ""
                    text = f"{name} has no such setting; allowed are {', '.join(allowed) or 'none'}{hint}"
                    entry["type"] = PydanticCustomError("unknown_setting", text)  # type: ignore[arg-type]
                elif line["type"] == "value_error":
                    text = line["msg"].removeprefix("Value error, ").replace("{", "(").replace("}", ")")
                    entry["type"] = PydanticCustomError("value_error", text)  # type: ignore[arg-type]
                elif "ctx" in line:
                    entry["ctx"] = line["ctx"]
                faults.append(entry)
    if faults:
        raise ValidationError.from_exception_data("steps", faults)
    return found


class CondenseRecipe(BaseModel):
    """Which rows of a pool are kept, and why."""

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    """For the report's title."""
    encoder: str = "world/scorer"
    """What embeds a pool that has no vectors yet; not used on a folder of embeddings."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides the order of id hashes: the training rows of k-means, and what random and budget draw."""
    steps: Annotated[dict[str, SerializeAsAny[StepConfig]], BeforeValidator(_read_steps)]


def check_columns(recipe: CondenseRecipe, present: tuple[str, ...], source: str) -> None:
    """RecipeError when a step needs a column that neither the source nor an earlier step makes.

    present  columns of the source ("score" or nothing). source: what it is, for the text.
    """
    have, faults = set(present), []
    for label, config in recipe.steps.items():
        row = STEPS[config.step]
        for column in row.needs(config):
            if column in have:
                continue
            if column == "score":
                faults.append(
                    f"steps.{label} ({config.step}) ranks by image-text score, and {source} has none. Use an encoder "
                    "with a text side (world/scorer, or a CLIP or SigLIP), or leave the step out "
                    f"(steps.{label}=null)"
                )
            else:
                makers = [name for name, maker in STEPS.items() if column in maker.makes]
                faults.append(f"steps.{label} ({config.step}) needs {column!r}: put {' or '.join(makers)} before it")
        have.update(row.makes)
        if "copy_of" in row.makes and not any(later.step == "dedup" for later in _after(recipe, label)):
            faults.append(f"steps.{label} ({config.step}) only marks copies: put dedup after it, or leave it out")
    if faults:
        raise RecipeError("this recipe cannot run:\n  " + "\n  ".join(faults))


def _after(recipe: CondenseRecipe, label: str) -> list[StepConfig]:
    labels = list(recipe.steps)
    return [recipe.steps[later] for later in labels[labels.index(label) + 1 :]]
