"""The measures: what an arm's pairs are worth, a row each, from the cheapest to the dearest.

    encoder   pairs ----------------------------> dual encoder from random weights -> recall
    loss      pairs -> align stage -------------> loss on held-out captions
    suite     pairs -> align stage -> tune stage -> the world suite's mean score

The train recipe is `world`, the quickstart's. An arm is aligned once, whatever is measured after it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from leveret.runs import RunFolder

if TYPE_CHECKING:
    from leveret.study.plan import Cell, Plan
    from leveret.study.site import Site
    from leveret.train.stages import TrainRecipe

Figures = dict[str, Any]
"""`value`: the figure, None where the arm left no pairs; and what else is worth keeping."""

CHUNK = 64
"""Held-out pairs in one pass; they are alike in length, so little is padding."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One way to say what a choice is worth.

    run     (site, plan, cell, pairs) -> figures. Resumable, and a pure function of them.
    better  which way is better.
    stages  of training that it needs. With any it is dear, and with `tune` it is taken at several lengths.
    """

    title: str
    about: str
    better: Literal["higher", "lower"]
    run: Callable[[Site, Plan, Cell, Path], Figures]
    stages: tuple[str, ...] = ()

    @property
    def tunes(self) -> bool:
        return "tune" in self.stages


def _encoder(site: Site, plan: Plan, cell: Cell, pairs: Path) -> Figures:
    from leveret.study.encoder import judge

    folder = site.arm(cell.arm) / "encoder"
    found = judge(
        pairs,
        site.held_out,
        site.world,
        steps=plan.encoder_steps,
        batch=plan.encoder_batch,
        seed=site.seed,
        folder=folder,
    )
    shutil.rmtree(folder, ignore_errors=True)
    if found is None:
        return {"value": None}
    return {"value": found.mean, "image_to_text": found.image_to_text, "text_to_image": found.text_to_image}


def _loss(site: Site, plan: Plan, cell: Cell, pairs: Path) -> Figures:
    if is_empty(pairs):
        return {"value": None}
    limit = train_recipe(plan).stages["align"].max_tokens
    return held_out_loss(aligned(site, plan, cell.arm, pairs) / "model", site, limit)


def _suite(site: Site, plan: Plan, cell: Cell, pairs: Path) -> Figures:
    if is_empty(pairs):
        return {"value": None}
    from leveret.evaluate import evaluate

    model = tuned(site, plan, cell, pairs)
    out = site.arm(cell.arm) / f"eval-x{cell.length}"
    tasks = evaluate(model, site.world, suite="world", out=out, blind=False)["tasks"]
    scores = {name: facts["score"] for name, facts in tasks.items()}
    return {"value": sum(scores.values()) / len(scores), "tasks": scores}


MEASURES: dict[str, Measure] = {
    "encoder": Measure(
        "Recall of an encoder taught from nothing",
        "A small dual encoder learns from random weights on the arm's pairs alone (SigLIP loss, the same steps for "
        "all). How often is a held-out pair's own partner among the first five of all held-out pairs, from picture to "
        "words and from words to picture?",
        "higher",
        _encoder,
    ),
    "loss": Measure(
        "Loss on held-out captions after alignment",
        "The connector is aligned on the arm's pairs. How surprised is the model by the words of held-out pairs that "
        "fit? Mean next-token loss over the captions' tokens, in nats.",
        "lower",
        _loss,
        ("align",),
    ),
    "suite": Measure(
        "The examination after tuning",
        "Aligned on the arm's pairs, then tuned on the same clean conversations as every other arm: the mean score of "
        "the world suite's eight kinds of question. Tuning repairs a bad alignment where it is long enough, so it is "
        "taken at several lengths.",
        "higher",
        _suite,
        ("align", "tune"),
    ),
}


# --- teaching ------------------------------------------------------------------------------------------------------


def is_empty(pairs: Path) -> bool:
    """Whether a choice holds nothing: `write_coreset` then writes an empty list."""
    return pairs.read_bytes().strip() == b"[]"


def train_recipe(plan: Plan, length: int = 1, data: dict[str, str] | None = None, seed: int = 0) -> TrainRecipe:
    """The recipe `world` under a plan.

    length  times the recipe's tune steps. data: `pairs`, `world` and `tune`, the paths of what is learned from; left
    out, the recipe says what all cells share. RecipeError when it has lost a stage that the study needs.
    """
    from leveret.recipe import dump
    from leveret.runs import RecipeError
    from leveret.train.run import read
    from leveret.train.stages import TrainRecipe

    plain = dump(read("world"))
    stages = plain["stages"]
    if list(stages) != ["align", "tune"] or not stages["tune"]["steps"]:
        raise RecipeError(f"the recipe 'world' has the stages {', '.join(stages)}; a study needs align, tune by steps")
    stages["align"]["steps"] = plan.align_steps or stages["align"]["steps"]
    stages["tune"]["steps"] = length * (plan.tune_steps or stages["tune"]["steps"])
    if data is not None:
        stages["align"] |= {"data": data["pairs"], "images": data["world"]}
        stages["tune"] |= {"data": data["tune"]}
    return TrainRecipe.model_validate({**plain, "seed": seed, "ranks": plan.ranks})


def _recipe(site: Site, plan: Plan, pairs: Path, length: int = 1) -> TrainRecipe:
    data = {"pairs": str(pairs), "world": str(site.world), "tune": str(site.world / "tune.json")}
    return train_recipe(plan, length, data, site.seed)


def aligned(site: Site, plan: Plan, arm: str, pairs: Path) -> Path:
    """The run folder of the arm's align stage, run now or found; its `model` is the aligned model."""
    from leveret.train import train

    recipe, folder = _recipe(site, plan, pairs), site.arm(arm) / "align"
    train(recipe.model_copy(update={"stages": {"align": recipe.stages["align"]}}), folder)
    return folder


def tuned(site: Site, plan: Plan, cell: Cell, pairs: Path) -> Path:
    """The model of the arm after a tune stage of the cell's length. All lengths start from the one aligned model."""
    from leveret.train import train
    from leveret.train.stages import FREE, binding

    recipe, folder = _recipe(site, plan, pairs, cell.length), site.arm(cell.arm) / f"tune-x{cell.length}"
    begun = aligned(site, plan, cell.arm, pairs) / "align"
    RunFolder.open(folder, "train", binding(recipe.model_dump(mode="json")), FREE)
    if not (folder / "align").exists():
        half = folder / ".align"
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(begun, half)
        half.rename(folder / "align")
    return train(recipe, folder, stages=["tune"])


def held_out_loss(model: Path, site: Site, limit: int) -> Figures:
    """Mean next-token loss (nats) of a model over the supervised tokens of the held-out captions.

    Read, tokenised and masked by the code of `train`, in float32 on one thread, whatever it was taught in.
    limit  tokens after which a sample is cut, as in the align stage.
    """
    import torch

    from leveret.model.checkpoint import load
    from leveret.model.threads import torch_threads
    from leveret.pool import open_source
    from leveret.train.data import prepare
    from leveret.train.run import tokenizer_hash

    vlm = load(model)
    source = open_source(site.held_out, site.world)
    facts: dict[str, Any] = {"data": source.fingerprint(), "tokenizer": tokenizer_hash(vlm.tokenizer)}
    facts |= {"spec": vlm.spec.to_dict(), "chat": vlm.chat, "max_tokens": limit}
    cache = site.folder / "captions" / "cache"
    data = prepare(source, vlm, cache, chat=vlm.chat, max_tokens=limit, bad_share=0.0, see=None, facts=facts)
    total, tokens = 0.0, 0
    with torch_threads(1), torch.inference_mode():
        for start in range(0, len(data), CHUNK):
            batch, failed = data.batch(range(start, min(start + CHUNK, len(data))), vlm.spec)
            assert not failed, "the world's own pictures can be read"
            out = vlm(batch)
            total += float(out.loss_sum)
            tokens += out.supervised
    return {"value": total / tokens, "tokens": tokens}
