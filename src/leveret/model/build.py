"""From a recipe to a model: describe the parts, build or load each, join them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from leveret.model import language as languages
from leveret.model import towers
from leveret.model.connectors import build_connector, connector_tokens, settle
from leveret.model.fusion import fused
from leveret.model.language import LanguageFacts
from leveret.model.recipe import ConnectorRecipe, ModelRecipe, VisionRecipe, named
from leveret.model.tiles import check_shapes, tiling_of
from leveret.model.towers import TowerFacts
from leveret.model.vlm import VLM
from leveret.records import ImageSpec
from leveret.runs import RecipeError


def build(
    recipe: ModelRecipe,
    *,
    weights: bool = True,
    device: str | torch.device = "cpu",
    seed: int = 0,
    empty: Collection[str] = (),
) -> VLM:
    """The model a recipe describes, in float32.

    Tower and language model get their published weights (`weights=False`: random ones); the connector is always
    fresh. `empty` names parts (vision, language) that the caller fills: nothing is fetched for them, what they hold is
    no number to count on, and without the language model there is no tokenizer. What is random depends on `seed` alone,
    and torch's global generator is left as it was.
    Raises RecipeError listing every fault of the recipe at once, EnvironmentFault when weights cannot be had.
    """
    from transformers.initialization import no_init_weights

    recipe = named(recipe)
    seen, spoken = check(recipe)
    if weights:
        build_meta(recipe)  # parts that do not fit each other are refused before any weight is fetched
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fetched = [weights and part not in empty for part in ("vision", "language")]
        with no_init_weights() if "vision" in empty else nullcontext():
            eyes = [towers.load_tower(facts) if fetched[0] else towers.build_tower(facts) for facts in seen]
        with no_init_weights() if "language" in empty else nullcontext():
            language = languages.load_language(spoken) if fetched[1] else languages.build_language(spoken)
        # seeded again: the connector shall not depend on how the others came by their weights
        torch.manual_seed(seed)
        tokenizer = languages.load_tokenizer(spoken.source) if fetched[1] else None
        vlm = join(recipe, eyes, language, tokenizer=tokenizer)
    return vlm.to(device).eval()


def build_meta(recipe: ModelRecipe) -> VLM:
    """The same without memory, on torch's `meta` device: for counting and for `--dry-run`. It has no tokenizer."""
    recipe = named(recipe)
    seen, spoken = check(recipe)
    with torch.device("meta"):
        eyes, language = [towers.build_tower(facts) for facts in seen], languages.build_language(spoken)
        return join(recipe, eyes, language, tokenizer=None).eval()


def check(recipe: ModelRecipe) -> tuple[tuple[TowerFacts, ...], LanguageFacts]:
    """The facts of every tower and of the language model. RecipeError listing every unknown id and impossible choice
    at once."""
    from leveret.inputs.formats import find_chat

    recipe = named(recipe)
    faults: list[str] = []
    found: list[Any] = []
    describers = (
        lambda: towers.describe_all(recipe.vision),
        lambda: languages.describe(recipe.language),
        lambda: settle(recipe.connector),
    )
    for describe in describers:
        try:
            found.append(describe())
        except RecipeError as fault:
            faults.append(str(fault))
    try:
        find_chat(recipe.chat)
    except RecipeError as fault:
        faults.append(f"model.{fault}")
    if faults:
        raise RecipeError("\n".join(faults))
    return found[0], found[1]


def _parted(connector: ConnectorRecipe, vision: VisionRecipe, eyes: Sequence[towers.Tower]) -> ConnectorRecipe:
    """The connector; of two towers side by side `mof_mlp` is cut between them, where no option says otherwise."""
    widths = [eye.width for eye in eyes]
    halves = len(set(widths)) == 1 or len(widths) != 2 or vision.fusion != "channel"
    if connector.kind != "mof_mlp" or connector.options.get("first") is not None or halves:
        return connector
    return connector.model_copy(update={"options": {**connector.options, "first": widths[0]}})


def join(recipe: ModelRecipe, eyes: Sequence[towers.Tower], language: Any, *, tokenizer: Any) -> VLM:
    """Towers (in fusion order) and language model with a fresh connector between them, on the current default device.

    RecipeError when the towers cannot be fused, the connector does not fit, or the token table is too small.
    """
    width = language.get_input_embeddings().weight.shape[1]
    if tokenizer is not None and len(tokenizer) > (rows := language.get_input_embeddings().weight.shape[0]):
        raise RecipeError(
            f"model.language.vocab: the tokenizer has {len(tokenizer)} tokens but the token table {rows} rows; "
            f"set model.language.vocab={len(tokenizer)}"
        )
    # every setting of the connector is written out, so that a saved model does not depend on today's defaults
    recipe = recipe.model_copy(update={"connector": _parted(settle(recipe.connector), recipe.vision, eyes)})
    kind, options = recipe.connector.kind, recipe.connector.options
    if any(eye.facts.patches for eye in eyes):
        check_shapes(recipe.vision, eyes, kind, options)
    tokens, seen = fused([(eye.facts.name, eye.tokens, eye.width) for eye in eyes], recipe.vision.fusion)
    connector = build_connector(kind, seen, width, tokens, options)
    given = connector_tokens(kind, tokens, options)
    tiling = tiling_of(recipe.vision, eyes, kind, given)
    spec = ImageSpec(towers=tuple(eye.view for eye in eyes), tokens=given, tiling=tiling)
    named = {eye.view.name: eye for eye in eyes}
    return VLM(named, connector, language, spec=spec, recipe=recipe, tokenizer=tokenizer)
