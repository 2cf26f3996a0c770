"""From what a peer's folder holds to a model of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from leveret.model import language as languages
from leveret.model import tower_keys, towers
from leveret.model.build import join
from leveret.model.checkpoint import fill, stored
from leveret.model.hub import quiet
from leveret.model.language import LanguageFacts
from leveret.model.peers.files import State
from leveret.model.peers.foreign import Foreign
from leveret.model.recipe import Kept, ModelRecipe
from leveret.model.tower_table import TowerFacts, describe_all
from leveret.model.vlm import VLM
from leveret.runs import DataError, EnvironmentFault, RecipeError


def assemble(foreign: Foreign, source: Path, dtype: torch.dtype | None = None) -> VLM:
    """The model, in evaluation mode, all of it in one type: `dtype`, else the one that most of the language model has.

    DataError where the tensors are not exactly the model's: missing and unexpected names are listed.
    """
    from transformers.initialization import no_init_weights

    with quiet():  # about a model type that transformers does not know
        tokenizer = _tokenizer(foreign, str(source))
    described, recipe, spoken = _settled(foreign, len(tokenizer))
    tables = dict(foreign.language)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        if foreign.cut and name in tables:
            tables[name] = tables[name][: spoken.vocab].clone()
    with no_init_weights():
        eyes = [
            towers.fill_tower(
                facts,
                foreign.seen[place],
                where=str(source),
                positions=foreign.positions if facts.family == "dinov2" else None,
            )
            if place in foreign.seen
            else towers.load_tower(facts)
            for place, facts in enumerate(described)
        ]
        language = languages.build_language(spoken)
        vlm = join(recipe, eyes, language, tokenizer=tokenizer)
    if dtype is None:
        dtype = saved_as(foreign)
    if language.get_output_embeddings().weight is language.get_input_embeddings().weight:
        tables.pop("lm_head.weight", None)  # a checkpoint may say twice what is one
    seen = {name: tensor for name, tensor in stored(vlm) if name.startswith("towers.")}
    state = seen | _under("connector.", foreign.connector) | _under("language.", tables)
    if foreign.newline is not None:
        state["tiles.newline"] = foreign.newline
    fill(vlm, {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}, source)
    _call(vlm, foreign.names)
    return vlm.eval()


def outline(foreign: Foreign) -> VLM:
    """The same on torch's meta device, where the tensors of `foreign` may be too; it has no tokenizer."""
    rows = foreign.facts.vocab
    with suppress(EnvironmentFault), quiet():  # without one the rows are those that were saved
        rows = len(_tokenizer(foreign))
    described, recipe, spoken = _settled(foreign, rows)
    with torch.device("meta"):
        eyes = [towers.build_tower(facts) for facts in described]
        vlm = join(recipe, eyes, languages.build_language(spoken), tokenizer=None)
    _call(vlm, foreign.names)
    return vlm.eval()


def _tokenizer(foreign: Foreign, where: str = "model.language.name") -> Any:
    """The tokenizer, with the tokens that the tool adds; those that it has keep their ids."""
    tokenizer = languages.load_tokenizer(str(foreign.tokenizer), where=where, as_saved=foreign.letter)
    tokenizer.add_tokens(list(foreign.extra), special_tokens=True)
    return tokenizer


def saved_as(foreign: Foreign) -> torch.dtype:
    """The type in which most of the language model was saved."""
    return Counter(tensor.dtype for tensor in foreign.language.values()).most_common(1)[0][0]


def _settled(foreign: Foreign, tokens: int) -> tuple[list[TowerFacts], ModelRecipe, LanguageFacts]:
    """What is built: towers with the parts that the checkpoint has, and the language model's rows, with a tokenizer of
    so many tokens. DataError where its config names a tower that is not known."""
    try:
        described = foreign.eyes or describe_all(foreign.recipe.vision)
    except RecipeError as fault:  # no user wrote that recipe
        raise DataError(f"the {foreign.tool} model's config.json asks for what is not known here: {fault}") from None
    kept = [
        parts_of(facts, foreign.seen[place]) if place in foreign.seen else [] for place, facts in enumerate(described)
    ]
    spoken = foreign.facts
    if foreign.cut and tokens < spoken.vocab:
        spoken = replace(spoken, vocab=tokens)
    language = foreign.recipe.language.model_copy(update={"vocab": spoken.vocab})
    recipe = foreign.recipe.model_copy(update={"vision": foreign.recipe.vision.keeping(kept), "language": language})
    return (
        [
            replace(facts, keep=tuple(kept[place])) if place in foreign.seen else facts
            for place, facts in enumerate(described)
        ],
        recipe,
        spoken,
    )


def _call(vlm: VLM, names: Sequence[str]) -> None:
    """Names the towers as the checkpoint does: paths of this machine have no place in a model that is saved."""
    for tower, name in zip(vlm.towers.values(), names, strict=False):
        assert isinstance(tower, towers.Tower)
        tower.facts = replace(tower.facts, source=name)
    vision = vlm.recipe.vision
    if vision.tower is not None and names:
        vision = vision.model_copy(update={"tower": names[0]})
    elif names:
        each = [one.model_copy(update={"tower": name}) for one, name in zip(vision.towers, names, strict=True)]
        vision = vision.model_copy(update={"towers": each})
    vlm.recipe = vlm.recipe.model_copy(update={"vision": vision})


def parts_of(facts: TowerFacts, state: State) -> list[Kept]:
    """Parts of a tower that do not run but are in the checkpoint, as `keep` names them."""
    family = towers.TOWER_FAMILIES[facts.family]
    names = tower_keys.to_ours(state, facts.family)
    blocks = {name.removeprefix(family.blocks + ".").split(".")[0] for name in names if name.startswith(family.blocks)}
    found: list[Kept] = ["layers"] if len(blocks) == int(facts.config["num_hidden_layers"]) > facts.depth else []
    found += ["norm"] if not facts.norm and any(name.startswith(family.norm + ".") for name in names) else []
    return found + (["head"] if family.head and any(name.startswith(family.head + ".") for name in names) else [])


def _under(prefix: str, state: Mapping[str, Any]) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}
