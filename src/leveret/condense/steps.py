"""The steps as rows of one table, and the recipe that puts them in sequence.

    steps:
      cluster: {k: auto}
      dedup: {threshold: 0.86, keep: middle}
      score: {low: 0.40, high: 0.60}

A key is the step's label (in the ledger, the funnel and overrides) and, unless `step` says otherwise, the row of STEPS.
Steps run in their order, each on what the one before it left. In overrides `steps.` may be left out
(`dedup.threshold=0.9`; `score=null` leaves that step out), `budget=1000` is `budget.count`, `centroids=FILE` is
`cluster.centroids`.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from leveret.condense import border, concepts, engine, linked, regroup
from leveret.condense.against import Benchmark, contaminated
from leveret.condense.columns import load, save
from leveret.condense.groups import KEEPS
from leveret.condense.lloyd import Map
from leveret.condense.ranks import rank_of
from leveret.condense.rows import Floats
from leveret.condense.working import Rows
from leveret.runs import EnvironmentFault, RecipeError, closest


class StepConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    step: str
    """Which row of STEPS this is; the key itself where it is left out."""


class Contaminated(StepConfig):
    """Drop what is an image of a benchmark (`--against`)."""

    threshold: float = Field(0.86, ge=-1, le=1)
    """A row goes when its cosine with any image of a benchmark is greater than this. The default is dedup's: what would
    count as a copy of a benchmark image, were that in the pool. An encoder of another scale needs another number."""


class Cluster(StepConfig):
    """k-means on the vectors (L2, raw centroids)."""

    k: int | Literal["auto"] = "auto"
    """Clusters; auto = sqrt(n / 2). 1 compares every row with every other."""
    iterations: int = Field(20, ge=1, le=1000)
    """Most rounds; fewer when no centroid moves any more."""
    rows_per_centroid: int = Field(256, ge=1)
    """Training rows for each centroid, chosen by the hash of their ids."""
    centroids: str | None = None
    """A .npy file [k, width] to take instead of training."""
    clusters_per_row: int = Field(1, ge=1, le=8)
    """Clusters that a row sits in for `dedup`: its nearest ones. 2 finds nearly all near copies that borders part, for
    twice the disk and four times the pairs, or more where one centroid is the second nearest of very many rows."""

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


class Pairs(StepConfig):
    """SemDeDup's own rule: drop a row when an earlier one of its cluster is near, whether that one stays or not."""

    threshold: float = Field(0.86, ge=-1, le=1)
    """A row is near when its cosine is greater than this; SemDeDup's epsilon is 1 minus it."""
    first: Literal["far", "near", "random"] = "far"
    """What comes first: the farthest from the centroid, the nearest, or a seeded order."""


class RankBand(StepConfig):
    """Keep a band of ranks, counted from the highest value."""

    by: Literal["score", "centroid_cosine"] = "score"
    low: float = Field(ge=0, le=1)
    """Share of the ranks above the band."""
    high: float = Field(ge=0, le=1)
    """Share of the ranks above the band's lower end."""
    rank_rule: Literal["exact", "published"] = "exact"
    """published keeps one row fewer, without the first, as the released code of Dataset-Pruning."""

    @model_validator(mode="after")
    def _ordered(self) -> RankBand:
        if self.low >= self.high:
            raise ValueError(
                f"low ({self.low}) must be less than high ({self.high}): both count from the highest value"
            )
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


class Density(Amount):
    """Keep more of clusters that are wide and stand apart (Density-Based Pruning)."""

    temperature: float = Field(0.1, gt=0)
    """Of the softmax over clusters' complexities: small numbers favour the complex ones more."""
    neighbours: int = Field(20, ge=1)
    """Nearest other centroids that say how far a cluster stands apart."""
    keep: Literal["hard", "easy", "random"] = "hard"
    """Which rows of a cluster: the least similar to its centroid, the most similar, or a seeded order."""


class ImageCluster(StepConfig):
    """Keep clusters that a target image falls into (DataComp's image-based filter)."""

    targets: str | None = None
    """Embeddings of the target images, by the encoder of the rows: a folder or file as `leveret condense` takes."""


# --- what a step does ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """Where a chain is. rows: those that are looked at. earlier: generations that `cluster` left behind."""

    rows: Rows
    centroids: Floats | None = None
    earlier: tuple[Rows, ...] = ()


@dataclass(frozen=True)
class Shop:
    """Where steps work. seed: the recipe's. most: rows whose vectors are held at once by a task. memory: bytes that all
    may hold. run: executes tasks, results in the order of the items. benchmarks: what no row may be an image of."""

    seed: int
    most: int
    memory: int
    run: Map
    benchmarks: tuple[Benchmark, ...] = ()


Notes = dict[str, Any]
COLUMN_BYTES = 120
"""What a row's columns take on disk, roughly, besides its vector."""


def _contaminated(state: State, label: str, config: Any, shop: Shop) -> tuple[State, Notes]:
    """What no benchmark holds."""
    rows, notes = contaminated(
        state.rows, label, config.threshold, shop.benchmarks, shop.most, shop.memory // 4, shop.run
    )
    return replace(state, rows=rows), notes


def clusters_of(config: Cluster, n: int) -> tuple[int, int]:
    """How many clusters n rows are to have, and the rows to train them with (all, where there are fewer)."""
    k = max(1, round(math.sqrt(n / 2))) if config.k == "auto" else min(int(config.k), n)
    return k, max(engine.LEAST, k * config.rows_per_centroid)


def _cluster(state: State, label: str, config: Any, shop: Shop) -> tuple[State, Notes]:
    """A new generation, grouped by nearest centroid; the centroids are trained, or given."""
    import numpy as np

    rows = state.rows
    n, width = rows.count(), rows.parts[0].pieces[0][0].width if rows.parts else 0
    folder = rows.work / label
    notes: Notes = {}
    if not n:
        empty = Rows(rows.work, rows.generation + 1, ())
        return State(empty, np.zeros((0, width), np.float32), (*state.earlier, rows)), {"clusters": 0, "largest": 0}
    if config.centroids is not None:
        centroids = engine.given_centroids(config.centroids, width)
    elif (folder / "centroids.npz").exists():
        centroids, made, trained = load(folder / "centroids.npz", "centroids", "rounds", "training_rows")
        notes = {"iterations": int(made), "training_rows": int(trained)}
    else:
        k, wanted = clusters_of(config, n)
        training = engine.training_rows(rows, wanted, shop.seed, folder / "training.rows", shop.run, shop.memory // 2)
        centroids, rounds = engine.train(training, k, config.iterations, shop.run, folder, shop.memory // 4)
        counts = {"rounds": np.array(rounds), "training_rows": np.array(len(training))}
        save(folder / "centroids.npz", {"centroids": centroids, **counts})
        training.path.unlink(missing_ok=True)
        notes = {"iterations": rounds, "training_rows": len(training)}
    copied = config.clusters_per_row > 1 or not regroup.stays(rows, shop.memory)
    _room(rows, n, config.clusters_per_row if copied else 0)
    grouped = engine.group(rows, centroids, shop.most, shop.run, config.clusters_per_row, copied=copied)
    sizes = engine.cluster_sizes(grouped, len(centroids))
    notes |= {"clusters": len(centroids), "empty": int((sizes == 0).sum()), "largest": int(sizes.max(initial=0))}
    return State(grouped, centroids, (*state.earlier, rows)), notes


def _room(rows: Rows, n: int, copies: int) -> None:
    """EnvironmentFault where the disk cannot hold the rows in the order of their clusters, vectors so many times."""
    runs = rows.work / "runs" / str(rows.generation + 1)
    there = sum(file.stat().st_size for file in runs.glob("*")) if runs.is_dir() else 0
    needed = n * (copies * rows.parts[0].pieces[0][0].row_bytes + COLUMN_BYTES) - there
    free = shutil.disk_usage(rows.work).free
    if needed > free:
        raise EnvironmentFault(
            f"grouping {n:,} rows by cluster writes about {needed / 1e9:.1f} GB, and {rows.work} has "
            f"{free / 1e9:.1f} GB free. Make room, or give -o a folder on a larger disk; what is done is kept."
        )


def _dedup(state: State, label: str, config: Any, shop: Shop) -> tuple[State, Notes]:
    """One row of each component of near copies."""
    assert state.centroids is not None, "check_columns lets no dedup through before a cluster"
    hidden = border.measure(state.rows, label, config.threshold, shop.seed, shop.run)
    told = (state.rows, label, config.threshold, config.keep, state.centroids, shop.most)
    several = state.rows.per_row > 1
    rows, sizes = linked.dedup(*told, shop.memory, shop.run) if several else engine.dedup(*told, shop.run)
    exact, near = engine.copies(rows, label)
    notes = {
        "components": sum(sizes.values()),
        "largest_component": max(map(int, sizes), default=0),
        "sizes": [[int(size), count] for size, count in sizes.items()],
        "exact_copies": exact,
        "near_copies": near,
        "border": hidden,
    }
    return replace(state, rows=rows), notes


def _pairs(state: State, label: str, config: Any, shop: Shop) -> tuple[State, Notes]:
    """SemDeDup's rule."""
    assert state.centroids is not None, "check_columns lets no pairs through before a cluster"
    hidden = border.measure(state.rows, label, config.threshold, shop.seed, shop.run)
    told = (state.rows, label, config.threshold, config.first, shop.seed, state.centroids, shop.most)
    rows = engine.pairs(*told, shop.run)
    return replace(state, rows=rows), {"border": hidden}


def _band(state: State, label: str, config: Any, shop: Shop) -> tuple[State, Notes]:
    published = config.rank_rule == "published"
    rows = engine.band(state.rows, label, config.by, config.low, config.high, published=published)
    return replace(state, rows=rows), engine.extent(rows, config.by)


def amount_of(config: Any, n: int) -> int:
    """How many of n rows a step with a share or a count speaks of."""
    return min(n, int(config.count if config.count is not None else rank_of(config.share, n)))


def _top(state: State, label: str, config: Any, shop: Shop) -> tuple[State, Notes]:
    rows = engine.ranked(state.rows, label, config.by, 0, amount_of(config, state.rows.count()))
    return replace(state, rows=rows), engine.extent(rows, config.by)


def _drop_top(state: State, label: str, config: Any, shop: Shop) -> tuple[State, Notes]:
    n = state.rows.count()
    rows = engine.ranked(state.rows, label, config.by, amount_of(config, n), n)
    return replace(state, rows=rows), engine.extent(rows, config.by)


def _draw(state: State, label: str, config: Any, shop: Shop) -> tuple[State, Notes]:
    count = amount_of(config, state.rows.count())
    return replace(state, rows=engine.draw(state.rows, label, count, shop.seed)), {}


def _density(state: State, label: str, config: Any, shop: Shop) -> tuple[State, Notes]:
    assert state.centroids is not None, "check_columns lets no density through before a cluster"
    settings = {"temperature": config.temperature, "neighbours": config.neighbours, "keep": config.keep}
    amount = amount_of(config, state.rows.count())
    rows, notes = concepts.density(state.rows, label, amount, state.centroids, **settings, seed=shop.seed, run=shop.run)
    return replace(state, rows=rows), notes


def _image_cluster(state: State, label: str, config: Any, shop: Shop) -> tuple[State, Notes]:
    from leveret.condense.given import open_given

    assert state.centroids is not None, "check_columns lets no image_cluster through before a cluster"
    rows, notes = concepts.image_cluster(state.rows, label, open_given(config.targets), state.centroids, shop.run)
    return replace(state, rows=rows), notes


@dataclass(frozen=True)
class StepRow:
    """A step: what it does, its settings, the columns it reads and those it makes.

    run     (state, label, settings, shop) -> (the state after it, what the summary and the report should say).
    title   what it does, for the funnel of a report. verdict: word for a row that it drops, besides the label.
    """

    run: Callable[[State, str, Any, Shop], tuple[State, Notes]]
    config: type[StepConfig]
    needs: Callable[[Any], tuple[str, ...]]
    makes: tuple[str, ...]
    title: str


def _nothing(config: Any) -> tuple[str, ...]:
    return ()


def _by(config: Any) -> tuple[str, ...]:
    return (config.by,)


def _of_dedup(config: Any) -> tuple[str, ...]:
    return ("cluster", "score") if KEEPS[config.keep].by == "score" else ("cluster",)


def _clusters(config: Any) -> tuple[str, ...]:
    return ("cluster",)


AGAINST = "contaminated"
"""The step that `--against` puts first; it has this label and no other."""

STEPS: dict[str, StepRow] = {
    AGAINST: StepRow(_contaminated, Contaminated, _nothing, (), "drop what is an image of a benchmark"),
    "cluster": StepRow(_cluster, Cluster, _nothing, ("cluster", "centroid_cosine"), "group by likeness"),
    "dedup": StepRow(_dedup, Dedup, _of_dedup, ("component",), "keep one of each group of near copies"),
    "pairs": StepRow(_pairs, Pairs, _clusters, (), "drop what has an earlier near neighbour"),
    "score": StepRow(_band, RankBand, _by, (), "keep a band of image-text scores"),
    "centroid": StepRow(_band, CentroidBand, _by, (), "keep a band of closeness to the centre"),
    "density": StepRow(_density, Density, _clusters, (), "keep more of clusters that are wide and stand apart"),
    "image_cluster": StepRow(_image_cluster, ImageCluster, _clusters, (), "keep clusters that a target falls into"),
    "top": StepRow(_top, Top, _by, (), "keep the highest"),
    "drop_top": StepRow(_drop_top, DropTop, _by, (), "drop the highest"),
    "random": StepRow(_draw, Draw, _nothing, (), "draw at random"),
    "budget": StepRow(_draw, Draw, _nothing, (), "draw the budget at random"),
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
    have, faults, per_row = set(present), [], 1
    for label, config in recipe.steps.items():
        row = STEPS[config.step]
        if isinstance(config, Cluster):
            per_row = config.clusters_per_row
        elif isinstance(config, ImageCluster) and config.targets is None:
            faults.append(
                f"steps.{label} (image_cluster) needs targets, the embeddings of the images whose clusters are kept: "
                f"{label}.targets=FOLDER"
            )
        elif isinstance(config, Pairs) and per_row > 1:
            faults.append(
                f"steps.{label} (pairs): SemDeDup's rule goes by the order inside one cluster, and there "
                f"clusters_per_row is {per_row}; set it to 1, or use dedup instead of pairs"
            )
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
    if faults:
        raise RecipeError("this recipe cannot run:\n  " + "\n  ".join(faults))


def read(name_or_path: str | Path, overrides: Sequence[str] = (), *, against: bool = False) -> CondenseRecipe:
    """A recipe of `recipes/condense`, or of a file, under overrides in their short or their long form.

    against  whether there are benchmarks to compare with (`decontaminated`). RecipeError also where an override speaks
             of that step and there are none, or leaves it out though there are.
    """
    from leveret import recipe as recipes

    labels = set(recipes.load(name_or_path, CondenseRecipe, "condense").steps) | set(STEPS)
    long = [_long(given, labels) for given in overrides]
    found = recipes.load(name_or_path, CondenseRecipe, "condense", long)
    asked = [given for given, key in zip(overrides, long, strict=True) if re.match(rf"steps\.{AGAINST}[.=]", key)]
    if asked and not against:
        raise RecipeError(
            f"{asked[0]}: the step {AGAINST} needs a benchmark to compare with. Give one (--against BENCHMARK), or "
            "leave this override out."
        )
    if asked and AGAINST not in found.steps:
        raise RecipeError(f"{asked[0]} leaves out the step that --against asks for; give one of the two")
    return decontaminated(found, against=against)


def sitting_in(clusters: int, name_or_path: str | Path, overrides: Sequence[str]) -> list[str]:
    """Overrides that let rows sit in so many clusters. RecipeError where the recipe makes no clusters."""
    from leveret import recipe as recipes

    steps = recipes.load(name_or_path, CondenseRecipe, "condense").steps
    labels = [label for label, config in steps.items() if isinstance(config, Cluster)]
    if not labels and not any(given.startswith(("cluster", "steps.cluster")) for given in overrides):
        raise RecipeError(f"--clusters-per-row {clusters}: the recipe {name_or_path} has no step that makes clusters")
    return [f"steps.{label}.clusters_per_row={clusters}" for label in labels or ["cluster"]]


def decontaminated(recipe: CondenseRecipe, *, against: bool) -> CondenseRecipe:
    """The recipe as it runs: where there are benchmarks the step `contaminated` comes first, with the recipe's settings
    or the default ones; where there are none it is left out, for what a recipe says of it is said for that case."""
    for label, config in recipe.steps.items():
        if (label == AGAINST) != (config.step == AGAINST):
            raise RecipeError(
                f"steps.{label}: {config.step}; the step {AGAINST} runs once and first, and has no other label"
            )
    others = {label: config for label, config in recipe.steps.items() if label != AGAINST}
    first = {AGAINST: recipe.steps.get(AGAINST, Contaminated.model_validate({"step": AGAINST}))} if against else {}
    return recipe.model_copy(update={"steps": first | others})


def _long(given: str, labels: set[str]) -> str:
    """An override as the recipe's own keys say it."""
    key, equals, value = given.partition("=")
    head = key.split(".")[0]
    if head in CondenseRecipe.model_fields:
        return given
    if key == "centroids":
        return f"steps.cluster.centroids={value}"
    if key in ("budget", "random") and value.strip() not in ("null", "~", ""):
        return f"steps.{key}={{count: {value}}}" if value.strip().isdigit() else f"steps.{given}"
    return f"steps.{key}{equals}{value}" if head in labels else given


def changed(recipe: CondenseRecipe, overrides: Sequence[str]) -> CondenseRecipe:
    """A resolved recipe under overrides, in their short or their long form."""
    from tempfile import TemporaryDirectory

    import yaml

    from leveret import recipe as recipes

    with TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        file.write_text(yaml.safe_dump(recipes.dump(recipe), sort_keys=False), "utf-8")
        return read(file, overrides, against=AGAINST in recipe.steps)
