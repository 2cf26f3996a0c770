"""Who holds what: how a run's ranks share the model, decided from the recipe, and in which pieces it is shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from leveret.model.towers import Tower
from leveret.runs import RecipeError

if TYPE_CHECKING:
    from leveret.model.vlm import VLM
    from leveret.train.stages import TrainRecipe

ROOM = 0.8
"""Share of a GPU's memory that a whole model may be expected to need before `parallel.kind: auto` shares it."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a run's ranks share the model: `parallel` of the recipe, decided. Plain JSON as a dict.

    kind     ddp (whole on every rank) or fsdp.
    shard    ranks that hold one copy together; there are world / shard copies.
    offload  shares lie in the host's memory. reshard: layers are given up after the forward pass.
    """

    kind: str = "ddp"
    shard: int = 1
    offload: bool = False
    reshard: bool = True

    @property
    def sharded(self) -> bool:
        return self.kind == "fsdp"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def words(self, world: int) -> str:
        if not self.sharded:
            return "1 rank" if world == 1 else f"{world} ranks, each with the whole model (ddp)"
        copies = "one copy" if self.shard == world else f"{world // self.shard} copies, {self.shard} ranks to each"
        told = f"{world} rank(s) that share {copies} (fsdp)" + (", in the host's memory" if self.offload else "")
        return told + ("" if self.reshard else "; layers stay gathered until the way back")


def held(facts: Mapping[str, Any]) -> str:
    """How the ranks held the model, in words, by the facts of a state; an older leveret's says nothing of sharing."""
    return Sharing(**(facts.get("sharing") or {})).words(facts.get("ranks", 1))


def decide(recipe: TrainRecipe, world: int, device: str, needed: int = 0, room: int | None = None) -> Sharing:
    """What `parallel` means for so many ranks.

    needed  bytes of a whole model with gradients and moments on one device; room: bytes one device has. `auto` shares
            the model between GPUs when it needs more than ROOM of one.
    RecipeError when `shard` does not divide the ranks.
    """
    how = recipe.parallel
    gpu = not device.startswith("cpu")
    kind = how.kind
    if kind == "auto":
        kind = "fsdp" if gpu and world > 1 and room is not None and needed > ROOM * room else "ddp"
    offload = how.offload and gpu
    if kind == "ddp" or (world == 1 and not offload):
        return Sharing()
    shard = world if how.shard == "all" else how.shard
    if world % shard:
        raise RecipeError(
            f"parallel.shard: {shard} ranks are to hold a copy together, but {world} ranks are no multiple of that; "
            f"set parallel.shard to a divisor of {world}, or to all"
        )
    return Sharing("fsdp", shard, offload, how.reshard)


def units(vlm: VLM) -> Iterator[nn.Module]:
    """What is gathered at a time, inner ones first: a tower's blocks and its rest, the connector, the newline of tiles,
    a decoder's layers. What is left (embeddings, norm, output layer) belongs to the whole."""
    for tower in vlm.towers.values():
        assert isinstance(tower, Tower)
        yield from (part for part in (*tower.blocks, tower) if list(part.parameters()))
    yield from (part for part in (vlm.connector, vlm.tiles) if part is not None and list(part.parameters()))
    yield from getattr(vlm.language.get_decoder(), "layers", None) or ()
