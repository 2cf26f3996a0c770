"""Compositions: every kind of tower with every connector, and each of both with every family of language models.

The whole product would be thousands of models. Here every pair meets at least once (`test_every_pair_meets`), which is
where parts that do not fit each other show, and in few more models than that takes: each kind of tower goes once
through the families, and meanwhile through the connectors, one step ahead of the tower before. Rows of towers that are
one network at toy size are one kind; its other rows are composed where a connector and a family have not met.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from fakes import HIDDEN, VOCAB, loud, tiny_batch, tiny_tokenizer
from language_fakes import FAMILIES, toy_language
from leveret.generate import Engine, Request
from leveret.model.build import join
from leveret.model.connectors import CONNECTORS
from leveret.model.recipe import ConnectorRecipe, LanguageRecipe, ModelRecipe, VisionRecipe
from leveret.model.towers import TOWERS, TowerFacts, build_tower, describe
from leveret.model.vlm import VLM
from leveret.records import Turn
from test_generate_engine import picture
from tower_fakes import small

LANGUAGES = tuple(FAMILIES.values())
STEPS = range(max(len(LANGUAGES), len(CONNECTORS)))


def kinds() -> dict[str, str]:
    """Row of TOWERS -> the first row that is the same network at toy size, and sees pictures in the same way."""
    first: dict[str, str] = {}
    return {row: first.setdefault(repr(replace(eyes_of(row), name="", source="")), row) for row in TOWERS}


def eyes_of(tower: str) -> TowerFacts:
    return small(describe(VisionRecipe(tower=tower)), HIDDEN)


KINDS = kinds()
LEADERS = tuple(dict.fromkeys(KINDS.values()))
GRID = [
    (tower, list(CONNECTORS)[step % len(CONNECTORS)], LANGUAGES[(place + step) % len(LANGUAGES)])
    for (place, tower), step in product(enumerate(LEADERS), STEPS)
]
MISSING = sorted(set(product(CONNECTORS, LANGUAGES)) - {(connector, name) for _, connector, name in GRID})
OTHERS = [tower for tower in TOWERS if tower not in LEADERS]
GRID += [(OTHERS[place % len(OTHERS)], *pair) for place, pair in enumerate(MISSING)]

# settings at toy size, and the share of 16 patches that comes out
OPTIONS: dict[str, dict[str, Any]] = {
    "resampler": {"queries": 3, "layers": 1, "heads": 2, "head_width": 8},
    "resampler_paper": {"queries": 3, "layers": 1, "width": 16, "heads": 2},
    "qformer": {"queries": 3, "layers": 2, "width": 16, "heads": 2, "hidden": 32},
}
TOKENS = {
    **dict.fromkeys(CONNECTORS, 16), **dict.fromkeys(OPTIONS, 3), "mof_mlp": 32,
    **dict.fromkeys(("ldp", "spp_v1", "spp_v2", "spp_v3", "minigpt", "vanilla", "pixel_shuffle"), 4),
}  # fmt: skip


def test_every_pair_meets() -> None:
    assert {(tower, connector) for tower, connector, _ in GRID} >= set(product(LEADERS, CONNECTORS))
    assert {(tower, name) for tower, _, name in GRID} >= set(product(LEADERS, LANGUAGES))
    assert {(connector, name) for _, connector, name in GRID} == set(product(CONNECTORS, LANGUAGES))
    assert {tower for tower, _, _ in GRID} == set(TOWERS) and 9 < len(LEADERS) < len(TOWERS)
    assert len(GRID) < 1.2 * len(CONNECTORS) * len(LANGUAGES), "few more than that takes"


@cache
def eyes(tower: str) -> Any:
    torch.manual_seed(0)
    return loud(build_tower(eyes_of(tower)), 0.2)


language = cache(toy_language)
tokenizer = cache(tiny_tokenizer)


def compose(tower: str, connector: str, name: str) -> VLM:
    recipe = ModelRecipe(
        vision=VisionRecipe(tower=tower),
        connector=ConnectorRecipe(kind=connector, options=OPTIONS.get(connector, {})),
        language=LanguageRecipe(name=name),
        chat="tiny",
    )
    torch.manual_seed(1)
    return join(recipe, [eyes(tower)], language(name), tokenizer=tokenizer()).eval()


@pytest.mark.parametrize("tower", TOWERS)
def test_compositions(tower: str) -> None:
    """Finite logits of the right shape; a finite gradient wherever one belongs; an answer from the engine."""
    for _, connector, name in (cell for cell in GRID if cell[0] == tower):
        where = f"{tower}, {connector}, {name}"
        vlm = compose(tower, connector, name)
        assert vlm.spec.tokens == TOKENS[connector], where
        batch = tiny_batch(vlm, (vlm.spec.tokens + 8, 6), (True, False))
        out = vlm(batch)
        assert out.logits.shape == (6, VOCAB) and out.logits.isfinite().all(), where
        out.loss_sum.backward()
        idle = {f"towers.vision.{part}" for part, _ in vlm.towers["vision"].unused()}
        idle |= {f"connector.{part}" for part, p in vlm.connector.named_parameters() if not p.requires_grad}
        for part, parameter in vlm.named_parameters():
            assert part in idle or parameter.grad is not None, f"{where}: no gradient at {part}"
            assert parameter.grad is None or parameter.grad.isfinite().all(), f"{where}: {part}"
        for learns in (vlm.towers, vlm.connector, vlm.language):
            held = list(learns.parameters())
            assert not held or any(p.grad is not None and p.grad.any() for p in held), where
        vlm.zero_grad(set_to_none=True)
        request = Request("q", (picture(0),), (Turn("user", "<image>\nhow many ?"),), max_new_tokens=2)
        (answer,) = Engine(vlm, slots=1, precision="fp32").answer([request])
        assert answer.meta["tokens"] <= 2 and isinstance(answer.text, str), where
