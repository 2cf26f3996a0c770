"""From a recipe to a model: describe the parts, build or load each, join them."""

from __future__ import annotations

from typing import Any

import torch

from leveret.model import language as languages
from leveret.model import towers
from leveret.model.connectors import build_connector, connector_tokens, settle
from leveret.model.language import LanguageFacts
from leveret.model.recipe import ModelRecipe
from leveret.model.tables import unknown
from leveret.model.towers import TowerFacts
from leveret.model.vlm import VLM
from leveret.records import ImageSpec
from leveret.runs import RecipeError


def build(recipe: ModelRecipe, *, weights: bool = True, device: str | torch.device = "cpu", seed: int = 0) -> VLM:
    """The model a recipe describes, in float32.

    Tower and language model get their published weights (`weights=False`: random ones); the connector is always
    fresh. What is random depends on `seed` alone, and torch's global generator is left as it was.
    Raises RecipeError listing every fault of the recipe at once, EnvironmentFault when weights cannot be had.
    """
    seen, spoken = check(recipe)
    if weights:
        build_meta(recipe)  # parts that do not fit each other are refused before any weight is fetched
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = towers.load_tower(seen) if weights else towers.build_tower(seen)
        language = languages.load_language(spoken) if weights else languages.build_language(spoken)
        # seeded again: the connector shall not depend on how the others came by their weights
        torch.manual_seed(seed)
        vlm = join(recipe, tower, language, tokenizer=languages.load_tokenizer(spoken.source) if weights else None)
    return vlm.to(device).eval()


def build_meta(recipe: ModelRecipe) -> VLM:
    """The same without memory, on torch's `meta` device: for counting and for `--dry-run`. It has no tokenizer."""
    seen, spoken = check(recipe)
    with torch.device("meta"):
        tower, language = towers.build_tower(seen), languages.build_language(spoken)
        return join(recipe, tower, language, tokenizer=None).eval()


def check(recipe: ModelRecipe) -> tuple[TowerFacts, LanguageFacts]:
    """The facts of both backbones. RecipeError listing every unknown id and impossible choice at once."""
    from leveret.inputs.chat import CHATS

    faults: list[str] = []
    found: list[Any] = []
    describers = (
        lambda: towers.describe(recipe.vision),
        lambda: languages.describe(recipe.language),
        lambda: settle(recipe.connector),
    )
    for describe in describers:
        try:
            found.append(describe())
        except RecipeError as fault:
            faults.append(str(fault))
    if recipe.chat not in CHATS:
        faults.append(unknown(CHATS, recipe.chat, "model.chat"))
    if faults:
        raise RecipeError("\n".join(faults))
    return found[0], found[1]


def join(recipe: ModelRecipe, tower: towers.Tower, language: Any, *, tokenizer: Any) -> VLM:
    """Tower and language model with a fresh connector between them, on the current default device."""
    width = language.get_input_embeddings().weight.shape[1]
    if tokenizer is not None and len(tokenizer) > (rows := language.get_input_embeddings().weight.shape[0]):
        raise RecipeError(
            f"model.language.vocab: the tokenizer has {len(tokenizer)} tokens but the token table {rows} rows; "
            f"set model.language.vocab={len(tokenizer)}"
        )
    # every setting of the connector is written out, so that a saved model does not depend on today's defaults
    recipe = recipe.model_copy(update={"connector": settle(recipe.connector)})
    kind, options = recipe.connector.kind, recipe.connector.options
    spec = ImageSpec(towers=(tower.view,), tokens=connector_tokens(kind, tower.tokens, options))
    connector = build_connector(kind, tower.width, width, tower.tokens, options)
    return VLM({tower.view.name: tower}, connector, language, spec=spec, recipe=recipe, tokenizer=tokenizer)
