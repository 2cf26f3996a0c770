"""The whole way in one command, on the drawn world: draw, choose, align, tune, examine.

This file only calls the stations in order; each of them can be called alone with the same arguments. Every step
leaves its work in one folder and a mark when it is finished, so the same command continues where it was stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import RecipeError, RunFolder, read_json, write_json

if TYPE_CHECKING:
    from leveret.study.files import StudyRecipe
    from leveret.world.write import WorldSize

BUDGET = 1_500
"""Pairs the coreset keeps; the drawn web is fifty times as large."""
STEPS = ("draw", "condense", "align", "tune", "examine", "stages", "harder")
"""The last two only where the world has questions on harder pictures."""
BRIEF = 150
"""Questions a kind before and after aligning."""
STUDY = "bunny/selection"
_CHEAPEST = ("measures=[encoder]", "claims=[]")
_LONGER = ("measures=[suite]", "claims=[]", "train=[stages.tune.steps=3120]")
_LEFT_OUT = ("no-dedup", "score-only", "dedup-only", "windows", "everything", "oracle")
ROUNDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "severe": ("Does choosing pay, on a severely diseased web?", ()),
    "usual": ("And on the usual web, by the cheapest measure?", ("world.strength=usual", *_CHEAPEST)),
    "mild": ("And on a mildly diseased one?", ("world.strength=mild", *_CHEAPEST)),
    "longer": (
        "Does four times the tuning make up for it?",
        (*_LONGER, *(f"axes.choice.levels.{name}=null" for name in _LEFT_OUT)),
    ),
}
"""What `full` asks of STUDY, the most telling first: a folder's name -> the question, overrides of the study."""


def run(
    out: str | Path = "runs/quickstart",
    *,
    seed: int = 0,
    overrides: Sequence[str] = (),
    full: bool = False,
    dry_run: bool = False,
) -> Path:
    """Runs, or continues, the quickstart in `out`; returns that folder.

    full       then ask whether choosing data pays (ROUNDS, of the study `bunny/selection`), in `out/selection`.
    overrides  `world.FIELD=n` (sizes of world.write.WorldSize), `budget=n` (pairs the coreset keeps),
               `study.FIELD=value` (of that study, for `full`); anything else
               changes the train recipe `world`, e.g. `stages.tune.steps=100`.

    `out/results.json` holds {"tasks": {kind: {"score", "n", "ci95", "majority", "blind"}}, "seconds": {step: s},
    "stages": {"start" | "align" | "tune": {kind: score}}, "harder": {split: {kind: {"score", "n", "ci95"}}}}: the
    eight kinds after tuning; the same and six more before aligning, after it and after tuning; and the harder splits.
    Raises RecipeError for an unknown or unusable override, and when `out` holds another quickstart.
    """
    from leveret.generate.helpers import Helpers
    from leveret.train.run import read as read_recipe
    from leveret.train.run import resolve_device

    studied = [given.removeprefix("study.") for given in overrides if given.startswith("study.")]
    if studied and not full:
        raise RecipeError(f"study.{studied[0]}: the comparison runs only with --full; add it, or leave this out.")
    compared = studies(studied) if full else {}
    size, budget, changes = _settings([given for given in overrides if not given.startswith("study.")])
    taught = read_recipe("world", changes)  # its faults are told now, not after minutes of drawing
    if taught.device == "cuda":
        resolve_device(taught)
    recipe = {"seed": seed, "world": size.told(), "budget": budget, "overrides": changes}
    if dry_run:
        _say_plan(Path(out), recipe, RunFolder.peek(out, "quickstart", recipe))
        _say_studies(compared, Path(out) / "selection")
        return Path(out)
    folder = RunFolder.open(out, "quickstart", recipe)
    root = folder.path
    world, coreset = root / "world", root / "coreset"

    def draw() -> None:
        from leveret.world.write import draw as draw_world

        draw_world(world, seed=seed, size=size)

    def condense() -> None:
        from leveret.condense import condense as choose

        choose(world / "web.json", coreset, "world", [f"seed={seed}", f"steps.budget.count={budget}"])

    def train(stage: str) -> Callable[[], None]:
        def teach() -> None:
            from leveret.train import train as teach_stages

            data = [f"stages.align.data={coreset / 'coreset.json'}", f"stages.align.images={world}"]
            data += [f"stages.tune.data={world / 'tune.json'}", f"seed={seed}"]
            teach_stages("world", root / "train", [*data, *changes], stages=[stage])

        return teach

    helpers = Helpers()

    def examined(model: Path, *, out: Path, suite: str, blind: bool = False, **options: Any) -> None:
        from leveret.evaluate import evaluate

        evaluate(model, world, suite=suite, out=out, blind=blind, helpers=helpers, **options)

    def examine() -> None:
        examined(root / "train" / "model", suite="world", out=root / "eval", blind=True)

    def compare_stages() -> None:
        from leveret.model.checkpoint import save
        from leveret.train.loop import begin

        start = root / "stages" / "start-model"
        save(begin(read_recipe("world", [f"seed={seed}", *changes]), None, "cpu"), start)
        stages = {"start": start, "align": root / "train" / "align" / "model", "tune": root / "train" / "model"}
        for name, model in stages.items():
            if name != "tune":  # the whole examination has these
                examined(model, suite="world", out=root / "stages" / name, n=BRIEF)
            examined(model, suite="world-more", out=root / "stages" / f"{name}-more")

    def go_harder() -> None:
        from leveret.world.examination import HARDER

        for split in HARDER:
            examined(root / "train" / "model", suite="world", out=root / "harder" / split, split=split)

    doings = (draw, condense, train("align"), train("tune"), examine, compare_stages, go_harder)
    steps = dict(zip(STEPS, doings, strict=True))
    if not size.harder:
        del steps["stages"], steps["harder"]
    seconds: dict[str, float] = {}
    with helpers:  # they end when the last examination is over, or when this is stopped
        for name, step in steps.items():
            if not folder.is_done(name):
                began = time.perf_counter()
                step()
                folder.done(name, seconds=round(time.perf_counter() - began, 1))
            seconds[name] = float(folder.facts(name)["seconds"])
    seconds["total"] = round(sum(seconds.values()), 1)
    _publish(root / "train" / "model", root / "model")
    results = {**_collected(root), "seconds": seconds}
    write_json(root / "results.json", results)
    from leveret import quickstart_page

    quickstart_page.write(root, results, size.web, budget)
    quickstart_page.say(root, results)
    if full:
        compare(root / "selection", compared)
    return root


def compare(root: Path, asked: Mapping[str, StudyRecipe]) -> None:
    """Runs studies in folders of their names below `root`, where they share what they make, and shows their tables."""
    from leveret.study import page, run

    for name, study in asked.items():
        print(f"\n{study.title}", file=sys.stderr, flush=True)
        page.say(run(study, root / name, units=root / "units"), root / name)


def studies(overrides: Sequence[str]) -> dict[str, StudyRecipe]:
    """The studies of ROUNDS under overrides that hold for all of them. RecipeError for one that is a round's own."""
    from leveret.study import read

    own = {change.partition("=")[0] for _, changes in ROUNDS.values() for change in changes} | {"world"}
    for given in overrides:
        if (key := given.partition("=")[0]) in own:
            raise RecipeError(
                f"study.{given}: the rounds say {key} themselves; `leveret study run {STUDY} {given}` asks one"
            )
    return {
        name: read(STUDY, [*changes, *overrides]).model_copy(update={"title": question})
        for name, (question, changes) in ROUNDS.items()
    }


def _say_studies(asked: Mapping[str, StudyRecipe], root: Path) -> None:
    from leveret.study.costs import describe, outline
    from leveret.study.matrix import Matrix

    for name, study in asked.items():
        facts = describe(Matrix.of(study), root / name, root / "units")
        print(f"\n{study.title}\n{outline(facts)}")


def _collected(root: Path) -> dict[str, Any]:
    """What the examinations found, from their folders."""
    from leveret.world.examination import HARDER

    def tasks(*place: str) -> dict[str, Any]:
        file = root.joinpath(*place, "results.json")
        found: dict[str, Any] = read_json(file)["tasks"] if file.exists() else {}
        return found

    final = tasks("eval")
    stages = {name: tasks("stages", name) | tasks("stages", f"{name}-more") for name in ("start", "align", "tune")}
    stages["tune"] = {**final, **stages["tune"]}
    keep = ("score", "n", "ci95")
    return {
        "tasks": final,
        "stages": {name: {kind: row["score"] for kind, row in found.items()} for name, found in stages.items()},
        "more": {kind: {key: row[key] for key in keep} for kind, row in stages["tune"].items() if kind not in final},
        "harder": {
            split: {kind: {key: row[key] for key in keep} for kind, row in found.items()}
            for split in HARDER
            if (found := tasks("harder", split))
        },
    }


def _settings(overrides: Sequence[str]) -> tuple[WorldSize, int, list[str]]:
    """The world's size, the budget, and what is left for the train recipe."""
    import yaml

    from leveret.runs import closest
    from leveret.world.write import WorldSize

    sizes: dict[str, Any] = {}
    budget, left = BUDGET, []
    allowed = tuple(WorldSize.__dataclass_fields__)
    for given in overrides:
        key, _, value = given.partition("=")
        name = key.removeprefix("world.")
        if key != "budget" and name == key:
            _known(given, [*(f"world.{field}" for field in allowed), "budget"])
            left.append(given)
            continue
        if key != "budget" and name not in allowed:
            near = closest(name, allowed)
            hint = f" Did you mean world.{near[0]}?" if near else ""
            raise RecipeError(f"{given}: the world has no {name!r}; allowed are {', '.join(allowed)}.{hint}")
        try:
            plain = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"{given}: what stands behind the = is not YAML") from None
        if key == "budget":
            if type(plain) is not int or plain < 1:
                raise RecipeError(f"{given}: budget takes a positive number, such as budget=1000")
            budget = plain
        else:
            sizes[name] = plain
    size = WorldSize(**sizes)
    if budget > size.web:
        raise RecipeError(
            f"budget={budget}: more than the web holds (world.web={size.web}); lower one or raise the other"
        )
    return size, budget, left


def _known(given: str, ours: Sequence[str]) -> None:
    """RecipeError for an override of the train recipe whose first words are not there, naming all that may be given."""
    from leveret.runs import closest
    from leveret.train.stages import TrainRecipe

    stages = [f"stages.{name}" for name in ("align", "tune")]
    fields = [name for name in TrainRecipe.model_fields if name != "stages"]
    key = given.partition("=")[0]
    first = ".".join(key.split(".")[:2]) if key.startswith("stages.") else key.split(".")[0]
    if first in fields or first in stages:
        return
    allowed = [*ours, "study.FIELD", *stages, *fields]
    near = closest(first, [*allowed, *(name.removeprefix("world.") for name in ours)])
    meant = next((name for name in ours if near and name.removeprefix("world.") == near[0]), near[0] if near else "")
    hint = f" Did you mean {meant}?" if meant else ""
    raise RecipeError(f"{given}: the quickstart has no {first!r}; allowed are {', '.join(allowed)}.{hint}")


def _say_plan(root: Path, recipe: dict[str, Any], done: Sequence[str]) -> None:
    from rich.console import Console

    size = recipe["world"]
    steps = STEPS if size["harder"] else STEPS[:-2]
    left = [name for name in steps if name not in done]
    begun = f"{root} holds this quickstart; " if done else ""
    if begun and not left:
        Console().print(f"{begun}all of its steps are done, so nothing would be.")
        return
    begun += f"done are {', '.join(name for name in steps if name in done)}. " if done else ""
    more = ", and some before and after aligning and on harder pictures" if size["harder"] else ""
    Console().print(
        f"{begun}{'In all it draws' if done else 'Would draw'} {size['web']:,} web pairs and {size['tune']:,} "
        f"conversations into {root / 'world'}, {'keeps' if done else 'keep'} {recipe['budget']:,} pairs, "
        f"{'aligns and tunes' if done else 'align and tune'} the recipe 'world', and {'asks' if done else 'ask'} "
        f"{size['test']:,} questions of each of eight kinds, twice (seeing and blind){more}. "
        "At the sizes of the recipe about 6 minutes on 2 quiet cores, 0.6 GB of disk."
    )


def _publish(model: Path, place: Path) -> None:
    """Copies the final model beside the results, so that the run folder itself can be loaded."""
    import shutil

    if place.exists():
        return
    half = place.with_name(".model.new")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(model, half)
    half.rename(place)
