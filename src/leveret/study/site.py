"""One drawn world, and what all arms share of it: the pictures and one pass of the scorer over the web."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import read_json, read_jsonl

if TYPE_CHECKING:
    from leveret.world.write import WorldSize

SCORER = "world/scorer"
"""Judges every pair. It learned from another noisy draw of the web (its card says so), never from a pool it judges."""


def web_records(world: Path) -> dict[str, dict[str, Any]]:
    """The pairs of a drawn web by id, prompt and all: what chooses pairs by embeddings knows only their ids."""
    return {record["id"]: record for record in read_json(world / "web.json")}


@dataclass(frozen=True)
class Site:
    """A world of one (strength, seed) in a folder of its own.

    FOLDER/world/        what `world.write.draw` draws
    FOLDER/embeddings/   the web's vectors and scores, made once for all arms
    FOLDER/captions/     the held-out pairs, tokenised once
    FOLDER/arms/ARM/     the arm's choice, its pairs, and what was taught with them

    All of it is made when it is first asked for, and found again by a later run.
    """

    folder: Path
    strength: str
    seed: int
    size: WorldSize

    @property
    def world(self) -> Path:
        return self.folder / "world"

    @property
    def held_out(self) -> Path:
        """Pairs that fit, of scenes that nothing else shows (LLaVA JSON)."""
        return self.world / "captions.json"

    def arm(self, name: str) -> Path:
        return self.folder / "arms" / name

    def draw(self) -> None:
        from leveret.world.write import draw

        draw(self.world, seed=self.seed, size=self.size)

    def embed(self) -> Path:
        """The folder of the web's embeddings; one pass of the scorer, made now or found."""
        from leveret.condense import embed

        return embed(self.world / "web.json", self.folder / "embeddings", SCORER)

    @cached_property
    def records(self) -> dict[str, dict[str, Any]]:
        """The web's pairs as they are recorded, by id, in their order."""
        return web_records(self.world)

    @cached_property
    def truth(self) -> dict[str, dict[str, Any]]:
        """What is wrong with which pair, by id: `words` (fits, wrong, dull), `copy`, `source` (the scene's first)."""
        return {row["id"]: row for row in read_jsonl(self.world / "web_truth.jsonl")}

    def clear(self) -> None:
        """Removes what is large and can be made again."""
        for name in ("world", "embeddings", "captions"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
