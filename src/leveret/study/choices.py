"""What a choice of pairs from a drawn web is, by the world's own truth, which no method reads but the oracle."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leveret.runs import read_json, read_jsonl

SCORER = "world/scorer"
"""Judges every pair. It learned from another noisy draw of the web (its card says so), never from a pool it judges."""
SHOWN = 5
"""Pairs of each choice that a page shows."""

Truth = Mapping[str, Mapping[str, Any]]
"""What is wrong with which pair, by id: `words` (fits, wrong, dull), `copy`, `source` (the scene's first)."""


def web_records(world: Path) -> dict[str, dict[str, Any]]:
    """The pairs of a drawn web by id, prompt and all: what chooses pairs by embeddings knows only their ids."""
    return {record["id"]: record for record in read_json(world / "web.json")}


def truth_of(world: Path) -> Truth:
    """The truth about a drawn web."""
    return {row["id"]: row for row in read_jsonl(world / "web_truth.jsonl")}


def by_truth(truth: Truth, count: int, seed: int) -> list[str]:
    """Ids of `count` pairs that fit and are no copies, in the web's order. They are drawn in the order of a `budget`
    step's own draw, so that choices of one seed differ by their rules and not by their luck."""
    import numpy as np

    from leveret.condense.engine import SALT_DRAW
    from leveret.condense.ranks import hash_ids, hash_keys

    good = [id for id, row in truth.items() if row["words"] == "fits" and row["copy"] == "new"]
    keys = hash_keys(hash_ids(id.encode() for id in good), seed, SALT_DRAW)
    drawn = sorted(range(len(good)), key=lambda at: (int(keys[at]), good[at].encode()))[:count]
    return [good[place] for place in np.sort(drawn)]


def contents(pairs: Sequence[Mapping[str, Any]], truth: Truth) -> dict[str, Any]:
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


def keep_some(folder: Path, world: Path, pairs: Sequence[Mapping[str, Any]], truth: Truth) -> list[dict[str, str]]:
    """Copies a few pictures, spread evenly over the choice, into `folder`: a page shows them when the world is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for pair in pairs[:: -(-len(pairs) // SHOWN)] if pairs else []:
        picture = folder / f"{pair['id']}.jpg"
        shutil.copyfile(world / pair["image"], picture)
        row = truth[pair["id"]]
        found.append({"file": picture.name, "caption": _caption(pair), "words": row["words"], "copy": row["copy"]})
    return found
