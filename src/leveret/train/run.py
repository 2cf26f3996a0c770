"""A whole run: stages in order, each from the model of the one before, every one of them resumable.

What lies in a run folder:
RUN/recipe.yaml environment.json            what is done, and on what
RUN/command.json changes.jsonl              the last command; what changed under the run (changes.py)
RUN/STAGE/stage.json                        what is taught, on which data: the table of parts, refused samples
RUN/STAGE/cache/                            the stage's data, prepared (removed when the stage is done)
RUN/STAGE/quarantine.jsonl                  samples that cannot be used, with reasons
RUN/STAGE/metrics.jsonl validation.jsonl    one line per step; one line per validation (watch.py)
RUN/STAGE/samples.jsonl held-out/           answers to held-out questions at each validation (held_out.py)
RUN/STAGE/state/step-N/                     weights that learn, moments, step (removed when the stage is done)
RUN/STAGE/best/                             the best model by `keep_best` (best.py)
RUN/STAGE/model/ adapter/ done              the stage's model; adapters in PEFT's format, and what else learned; facts
RUN/STAGE/adapter-NAME/                     adapters of a tower, or of the connector
RUN/model/                                  the last stage's model
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import (
    DataError,
    EnvironmentFault,
    RecipeError,
    RunFolder,
    claim,
    closest,
    disk_faults,
    graceful_stop,
    link_folder,
    read_json,
    sha256_of,
    write_json,
)
from leveret.train.stages import FREE, StageRecipe, TrainRecipe, binding, given, total_steps

if TYPE_CHECKING:
    import numpy as np

    from leveret.model.vlm import VLM
    from leveret.pool.base import Source
    from leveret.train.changes import Changes
    from leveret.train.held_out import Some
    from leveret.train.loop import Validator
    from leveret.train.ranks import Ranks


REFUSED = ".refused"
"""In a run's folder: its data were refused before the first step, and there is nothing to go on with."""


def read(recipe: str | Path | TrainRecipe, overrides: Sequence[str] = ()) -> TrainRecipe:
    """The recipe by name, path or as it is, with overrides. RecipeError with all faults at once."""
    if isinstance(recipe, TrainRecipe):
        if overrides:
            raise RecipeError("overrides go with a recipe's name or path; change the given TrainRecipe itself")
        return given(recipe)
    from leveret.recipe import load

    return given(load(recipe, TrainRecipe, "models", overrides))


def train(
    recipe: str | Path | TrainRecipe,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
    validators: Sequence[Validator] = (),
    stages: Sequence[str] | None = None,
    allow_change: bool = False,
) -> Path:
    """Teach a model as the recipe says, in the run folder `out`; returns the folder of the final model.

    The same call goes on where a stopped or killed one ended, and gives the same weights, bit for bit on a CPU.

    recipe      name of a packaged recipe, path of a YAML file, or the recipe itself; `overrides` are `a.b=c`.
    dry_run     print what would be done, with real sizes but without weights, and return `out`; data may be missing.
    validators  called as `validator(vlm, step) -> dict` at every stage's end, and every `validate_every` steps.
    stages      only these (in the recipe's order); those before them must be done.
    allow_change  go on although the recipe, data or tokenizer changed; each change is told and kept in changes.jsonl.

    Raises RecipeError (also when the recipe, tokenizer or starting model changed since the run was begun), DataError
    (data missing, changed, or too much of it bad; loss not finite too often), Interrupted after SIGTERM or Ctrl-C
    with the state saved, EnvironmentFault when a worker process or the disk fails.
    """
    mend = "What was saved before stands: mend the disk or free some space, and run the same command again to go on."
    with disk_faults(out, mend):
        return _train(read(recipe, overrides), Path(out), dry_run, validators, stages, allow_change)


def _train(
    recipe: TrainRecipe,
    out: Path,
    dry_run: bool,
    validators: Sequence[Validator],
    stages: Sequence[str] | None,
    allow_change: bool,
) -> Path:
    chosen = choose(recipe, stages)
    if dry_run:
        from leveret.train.plan import plan, show

        show(plan(recipe, chosen))
        return out
    from leveret.train import held_out, starts, track
    from leveret.train import ranks as members
    from leveret.train.changes import Changes

    final = out / "model" if chosen[-1] == list(recipe.stages)[-1] else out / chosen[-1] / "model"
    if members.under_torchrun():
        members.follow_torchrun()
        return final
    track.check(recipe.track)
    sources = open_sources(recipe, chosen)
    starts.look(recipe, chosen)
    if not validators and (blind := [name for name in chosen if _keeps_blindly(recipe.stages[name])]):
        why = "nothing validates this stage, so no model is the best; give it `held_out` data"
        raise RecipeError("\n".join(f"stages.{name}.keep_best: {why}" for name in blind))
    others = {name: held_out.open_held_out(recipe.stages[name], name, sources[name]) for name in chosen}
    _begin_anew(out)
    if (out / ".lock").exists():
        claim(out)  # told before the data are read, if another process has it
    whole = recipe.model_dump(mode="json")
    changes = Changes(out, allow_change)
    changes.recipe(binding(whole))
    run = RunFolder.open(out, "train", binding(whole), FREE)
    _sweep(run.path)
    for name in chosen:
        if (run.path / name / "done").exists():
            _tidy(run.path / name)  # a run may have ended between its last mark and this
    write_json(run.path / "command.json", {"recipe": whole, "stages": stages, "folder": str(Path.cwd())})
    for name in chosen:
        _still_same(run.path, recipe, name, sources[name], changes)
    todo = [name for name in chosen if not (run.path / name / "done").exists()]
    if todo:
        import torch

        device = resolve_device(recipe)
        world = members.resolve(recipe.ranks, device)
        from leveret.model.precision import resolve_precision

        precision = {name: resolve_precision(recipe.stages[name].precision, device) for name in todo}
        share = max(1, torch.get_num_threads() // world) if "TORCHELASTIC_RUN_ID" not in os.environ else 1
        with _unless_refused(run), graceful_stop(), members.Ranks.lead(world) as ranks:
            for name in todo:
                _stage(
                    run.path, recipe, name, sources[name], others[name], ranks, device, precision[name], share,
                    validators, changes,
                )  # fmt: skip
    if final.parent == out:
        _show_last(out / chosen[-1] / "model", final)
    return final


@contextlib.contextmanager
def _unless_refused(run: RunFolder) -> Iterator[None]:
    """Leaves nothing in the way of the mended run where a fresh one is refused before its first step: no folder where
    the recipe was at fault; of bad data what was wrong with them, and a mark that no more than that is in it."""
    try:
        yield
    except (RecipeError, DataError) as fault:
        if run.fresh and not any(metrics.stat().st_size for metrics in run.path.glob("*/metrics.jsonl")):
            if isinstance(fault, RecipeError):
                shutil.rmtree(run.path, ignore_errors=True)
            else:
                (run.path / REFUSED).touch()
        raise


def _begin_anew(out: Path) -> None:
    """Clears a folder whose run was refused for its data before it taught anything."""
    if not (out / REFUSED).exists():
        return
    claim(out)
    for item in out.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        elif item.name not in (".lock", REFUSED):
            item.unlink()
    (out / REFUSED).unlink()  # last: a kill in between leaves the mark


def _keeps_blindly(stage: StageRecipe) -> bool:
    return stage.keep_best is not None and stage.held_out is None


def choose(recipe: TrainRecipe, stages: Sequence[str] | None) -> list[str]:
    unknown = [name for name in stages or () if name not in recipe.stages]
    if unknown or (stages is not None and not stages):
        near = ", ".join(closest(unknown[0], recipe.stages) if unknown else []) or ", ".join(recipe.stages)
        raise RecipeError(f"stages: {', '.join(unknown) or 'none'} given; this recipe has {near}")
    return [name for name in recipe.stages if stages is None or name in stages]


def open_sources(recipe: TrainRecipe, chosen: Sequence[str]) -> dict[str, Source]:
    """The data of every chosen stage. DataError with all that is missing at once."""
    from leveret.pool import open_source

    sources, faults = {}, []
    for name in chosen:
        stage = recipe.stages[name]
        try:
            sources[name] = open_source(stage.data, stage.images)
        except DataError as error:
            faults.append(f"stages.{name}.data: {error} To use other data: stages.{name}.data=PATH")
    if faults:
        raise DataError("\n".join(faults))
    return sources


def _still_same(run: Path, recipe: TrainRecipe, name: str, source: Source, changes: Changes) -> None:
    """A finished stage stands only while its data does, and what it was started from."""
    from leveret.train.starts import of_stage

    if (run / name / "done").exists():
        old = read_json(run / name / "done")["facts"]
        now = {**old, "data": source.fingerprint()}
        if of_stage(recipe, name):
            now["start"] = _begun_from(recipe, name, _start(run, recipe, name))
        changes.stage(run / name, old, now, None)


def _begun_from(recipe: TrainRecipe, name: str, start: Path | None) -> str:
    """The fingerprint of the weights that a stage begins with."""
    from leveret.train.starts import fingerprint

    return fingerprint(recipe, name, sha256_of(start / "model.safetensors") if start else "backbones")


_HALF_DONE = re.compile(r"\.writing-.*|\..*\.(tmp|new|old)|\..*-writing")


def _sweep(run: Path) -> None:
    """Remove what a killed process was writing under temporary names. The folder is this process's own by now."""
    for path in sorted(run.rglob(".*"), reverse=True):
        if _HALF_DONE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def resolve_device(recipe: TrainRecipe) -> str:
    import torch

    if recipe.device != "cpu" and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if recipe.device == "cuda":
        raise EnvironmentFault("device is cuda, but torch finds no GPU here; set device=auto or device=cpu")
    return "cpu"


def tokenizer_hash(tokenizer: Any) -> str:
    """Changes when the tokenizer would give other ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return sha256_of(backend.to_str() if backend is not None else dict(sorted(tokenizer.get_vocab().items())))


def _start(run: Path, recipe: TrainRecipe, name: str) -> Path | None:
    """The model a stage begins with: the one of the stage before, or None for the recipe's backbones."""
    names = list(recipe.stages)
    if name == names[0]:
        return None
    before = names[names.index(name) - 1]
    if not (run / before / "done").exists():
        raise RecipeError(f"stage {name!r} starts from {before!r}, which is not done in {run}; run that stage first")
    return run / before / "model"


def _stage(
    run: Path,
    recipe: TrainRecipe,
    name: str,
    source: Source,
    other: Some | None,
    ranks: Ranks,
    device: str,
    precision: str,
    share: int,
    validators: Sequence[Validator],
    changes: Changes,
) -> None:
    """One stage from wherever it stands to its end. other: its held-out samples."""
    from leveret.model import checkpoint
    from leveret.model.threads import torch_threads
    from leveret.train import best, learning, lora, plan, starts, state
    from leveret.train.loop import Job, Teacher, arrange, as_json, begin, beginning
    from leveret.train.order import order_of

    stage, folder, start = recipe.stages[name], run / name, _start(run, recipe, name)
    folder.mkdir(parents=True, exist_ok=True)
    # A model that may be cut must not lie on one GPU whole before; `plan.sharing` looks at how large it is.
    vlm = begin(recipe, start, device if ranks.world == 1 and not recipe.parallel.offload else "cpu", name)
    sharing = plan.sharing(recipe, stage, vlm, ranks.world, device)
    if not sharing.sharded:
        vlm.to(device)
    if faults := [
        f"stages.{key}.{fault}" for key in recipe.stages for fault in learning.faults(vlm, recipe.stages[key])
    ]:
        raise RecipeError("\n".join(faults))
    facts = {
        "data": source.fingerprint(),
        "tokenizer": tokenizer_hash(vlm.tokenizer),
        "start": _begun_from(recipe, name, start),
        "recipe": binding(recipe.model_dump(mode="json"))["stages"][name],
        "precision": precision,
        "ranks": ranks.world,
        "sharing": sharing.to_dict(),
    }
    resume = state.latest(folder / "state")
    begun = {} if resume is None else read_json(resume / "state.json")
    if begun:
        changes.stage(folder, begun["facts"], facts, begun["step"])
    seed = recipe.seed if stage.seed is None else stage.seed
    trainables = arrange(vlm, stage, seed, name, device, precision)
    data = _data(vlm, stage, folder, source, device, precision, facts)
    learns_from_images = {"vision", "connector"} & set(stage.learn)
    if learns_from_images and not len(data.images):
        raise RecipeError(
            f"stages.{name}.learn: {' and '.join(sorted(learns_from_images))} would get no gradient, "
            f"because no sample of {stage.data} has an image"
        )
    total = total_steps(stage, order_of(data, stage, name, seed).per_epoch)
    assert begun.get("total", total) == total or changes.allowed, (
        "the data and the recipe are the same, so are the steps"
    )
    if begun.get("step", 0) > total:
        raise RecipeError(
            f"stages.{name}: {total:,} steps are asked for, and step {begun['step']:,} is done already; ask for as "
            "many at least, or begin another run folder"
        )
    if other is not None:
        validators = [*validators, _held_out(vlm, stage, folder, other, device, precision, facts)]
    job = Job(
        recipe=recipe.model_dump(mode="json"), stage=name, folder=str(folder), start=str(start) if start else None,
        total=total, resume=str(resume) if resume else None, precision=precision, device=device, threads=share,
        facts=facts, sharing=sharing.to_dict(), validates=bool(validators),
    )  # fmt: skip
    told = plan.describe(vlm, name, stage, data=data, total=total, job=job, world=ranks.world)
    told.lines[:0] = plan.beginnings(recipe, name)
    plan.show_stage(told)
    write_json(folder / "stage.json", _facts(told, data, source, total))
    ranks.tell(as_json(job))
    with torch_threads(share):
        teacher = Teacher(job, stage, vlm, trainables, data, ranks, validators)
        teacher.run()
        assert teacher.finished is not None, "this rank leads"
        vlm, trainables = teacher.finished
        vlm.eval()
        lora.finish(vlm, stage, trainables, folder, *starts.base_of(recipe, name, start))
        checkpoint.save(vlm, folder / "model")
        done: dict[str, Any] = {"stage": name, "steps": total, "facts": facts}
        if stage.keep_best is not None:
            del vlm, trainables, told  # the best model takes their place in memory

            def again() -> Any:
                fresh, learns = beginning(job, device)
                return fresh, learns, lambda: lora.merge_all(fresh)

            done["best"] = best.finish(folder, stage.keep_best, total, again)
    write_json(folder / "done", done)
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove what a finished stage no longer needs."""
    from leveret.train import state

    for spent in (folder / "state", folder / "cache", folder / "held-out" / "cache"):
        shutil.rmtree(spent, ignore_errors=True)
    state.prune(folder / "best", ())


def _facts(told: Any, data: Any, source: Source, total: int) -> dict[str, Any]:
    """What a run's page says of a stage: the table of parts, the notes under it, and what the data came to."""
    from dataclasses import asdict

    return {
        "steps": total,
        "parts": [asdict(part) for part in told.parts],
        "notes": dict(told.lines),
        "samples": len(data),
        "refused": data.meta.get("reasons", {}),
        "source": source.name,
    }


def _held_out(
    vlm: VLM, stage: StageRecipe, folder: Path, other: Some, device: str, precision: str, facts: Mapping[str, Any]
) -> Validator:
    """The validator of the stage's held-out samples."""
    from leveret.train.held_out import HeldOut
    from leveret.train.loop import autocast

    here = folder / "held-out"
    bound = {**facts, "data": other.fingerprint()}
    return HeldOut(
        stage, other, _data(vlm, stage, here, other, device, precision, bound), here,
        lambda: autocast(device, precision),
    )  # fmt: skip


def _data(
    vlm: VLM, stage: StageRecipe, folder: Path, source: Source, device: str, precision: str, facts: dict[str, Any]
) -> Any:
    """The stage's prepared data, with features where the tower is frozen and the recipe asks for them."""
    import torch

    from leveret.train.data import Pixels, prepare
    from leveret.train.loop import autocast

    def see(pixels: Pixels, sizes: np.ndarray) -> torch.Tensor:
        with torch.no_grad(), autocast(device, precision):
            given = {name: torch.from_numpy(array).to(device) for name, array in pixels.items()}
            seen = vlm.see(given, torch.from_numpy(sizes))
        return seen.to(torch.bfloat16 if precision == "bf16" else torch.float32)

    cached = stage.cache_features and "vision" not in stage.learn
    if cached:
        vlm.towers.to(device)
    bound = {key: facts[key] for key in ("data", "tokenizer", "start", "precision")}
    chat = stage.chat or vlm.chat
    bound |= {"chat": chat, "max_tokens": stage.max_tokens, "spec": vlm.spec.to_dict(), "cached": cached}
    return prepare(
        source, vlm, folder / "cache", chat=chat, max_tokens=stage.max_tokens, bad_share=stage.bad_share,
        see=see if cached else None, facts=bound,
    )  # fmt: skip


def _show_last(model: Path, final: Path) -> None:
    """The last stage's model once more under the run's own name."""
    weights = "model.safetensors"
    if not ((final / weights).exists() and os.path.samefile(final / weights, model / weights)):
        link_folder(model, final)
