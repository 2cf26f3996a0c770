"""The arms: the ways of choosing that are compared, a row each, and what each choice turned out to hold.

A new way of choosing is a row of ARMS: a condense recipe and the overrides that set its budget.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import read_json

if TYPE_CHECKING:
    from leveret.study.site import Site

BASELINE = "random"
"""The arm that every difference is taken to."""
SHOWN = 5
"""Pairs of each choice that the page shows."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of choosing.

    about      the rule, in words.
    recipe     a condense recipe; None for the arm that reads the truth.
    overrides  of the recipe; `{budget}` stands for the number of pairs.
    """

    about: str
    recipe: str | None
    overrides: tuple[str, ...] = ()


ARMS: dict[str, Arm] = {
    "coreset": Arm(
        "leveret's recipe world: near copies put together, of each group the best described kept, of the rest the "
        "tenth whose words fit best, of those the budget at random",
        "world",
        ("steps.budget.count={budget}",),
    ),
    "random": Arm(
        "the budget at random: what every choice must beat",
        "random",
        ("steps.random.share=null", "steps.random.count={budget}"),
    ),
    "no-dedup": Arm(
        "as coreset, but near copies stay: what putting them together brings is the difference",
        "world",
        ("steps.cluster=null", "steps.dedup=null", "steps.budget.count={budget}"),
    ),
    "score-only": Arm(
        "the highest image-text scores, copies and all: the CLIP-score filter of DataComp (arXiv 2304.14108)",
        "clip-score-top",
        ("steps.top.share=null", "steps.top.count={budget}"),
    ),
    "dedup-only": Arm(
        "near copies put together as in coreset, then the budget at random",
        "world",
        ("steps.top=null", "steps.budget.count={budget}"),
    ),
    "windows": Arm(
        "Bunny's published windows as they are: dedup at 0.86, score ranks 40-60 %, centre ranks 15-35 %, budget",
        "bunny",
        ("steps.budget.count={budget}",),
    ),
    "oracle": Arm(
        "reads the truth: pairs that fit and are no copies, the budget at random. An upper bound, no method",
        None,
    ),
}
METHODS = tuple(name for name, arm in ARMS.items() if arm.recipe is not None)
"""The arms that a person could use on data of their own."""


def recipe_of(name: str, budget: int) -> dict[str, Any]:
    """The arm's resolved rule as plain data: two choices are of the same kind exactly where this is equal."""
    from leveret import recipe as recipes
    from leveret.condense.steps import read

    arm = ARMS[name]
    if arm.recipe is None:
        return {"truth": {"words": "fits", "copy": "new"}, "budget": budget}
    return recipes.dump(read(arm.recipe, _overrides(arm, budget)))


def _overrides(arm: Arm, budget: int) -> list[str]:
    return [override.format(budget=budget) for override in arm.overrides]


def choose(site: Site, name: str, budget: int) -> Path:
    """The arm's pairs, chosen now or found: LLaVA JSON, image paths relative to the site's world.

    Holds exactly `budget` pairs, or all that the arm's rule left where those are fewer. The records are the web's own,
    prompt and all, whatever the arm.
    """
    pairs = site.arm(name) / "pairs.json"
    if pairs.exists():
        return pairs
    from leveret.condense.ledger import write_coreset

    ids = _by_truth(site, budget) if ARMS[name].recipe is None else _by_recipe(site, name, budget)
    write_coreset([site.records[id] for id in ids], pairs)
    return pairs


def _by_recipe(site: Site, name: str, budget: int) -> list[str]:
    from leveret.condense import condense

    arm, out = ARMS[name], site.arm(name) / "choice"
    assert arm.recipe is not None
    overrides = [*_overrides(arm, budget), f"seed={site.seed}"]
    condense(site.embed(), out, arm.recipe, overrides, images=site.world)
    return [record["id"] for record in read_json(out / "coreset.json")]


def _by_truth(site: Site, budget: int) -> list[str]:
    """In the order of `budget`'s own draw, so that arms of one seed differ by their rules and not by their luck."""
    import numpy as np

    from leveret.condense.engine import SALT_DRAW
    from leveret.condense.ranks import hash_ids, hash_keys

    good = [id for id, row in site.truth.items() if row["words"] == "fits" and row["copy"] == "new"]
    keys = hash_keys(hash_ids(id.encode() for id in good), site.seed, SALT_DRAW)
    drawn = sorted(range(len(good)), key=lambda at: (int(keys[at]), good[at].encode()))[:budget]
    return [good[place] for place in np.sort(drawn)]


def contents(pairs: Sequence[Mapping[str, Any]], truth: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a choice holds, by the world's own truth.

    kept        pairs.
    fits        share whose caption is true of the picture.
    copies      share that show a scene which another kept pair shows too.
    scenes      distinct scenes.
    characters  of a caption, on average: long ones say more, and scores may favour them.

    Shares and the average are None of an empty choice.
    """
    n = len(pairs)
    rows = [truth[pair["id"]] for pair in pairs]
    shown = Counter(row["source"] for row in rows)
    return {
        "kept": n,
        "fits": sum(row["words"] == "fits" for row in rows) / n if n else None,
        "copies": sum(count for count in shown.values() if count > 1) / n if n else None,
        "scenes": len(shown),
        "characters": sum(len(_caption(pair)) for pair in pairs) / n if n else None,
    }


def _caption(pair: Mapping[str, Any]) -> str:
    return str(pair["conversations"][-1]["value"])


def keep_some(site: Site, name: str, pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Copies a few pictures, spread evenly over the choice, beside it: the page shows them when the world is gone."""
    folder = site.arm(name) / "shown"
    folder.mkdir(parents=True, exist_ok=True)
    some = pairs[:: -(-len(pairs) // SHOWN)] if pairs else []
    found = []
    for pair in some:
        picture = folder / f"{pair['id']}.jpg"
        shutil.copyfile(site.world / pair["image"], picture)
        row = site.truth[pair["id"]]
        found.append({"file": picture.name, "caption": _caption(pair), "words": row["words"], "copy": row["copy"]})
    return found
