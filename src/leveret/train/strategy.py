"""How ranks hold a model: each of them whole (`Replicated`), or each a share of it (`Sharded`, torch's FSDP2).

              one rank, or DDP                     FSDP2
  weights     whole on every rank                  a share; a layer is gathered while it computes
  gradients   one flat buffer, one all-reduce      summed over ranks as they arise, each keeps its share
  moments     whole on every rank                  of the share
  a state     the same whole tensors               gathered one by one; rank 0 writes them

The optimiser sees plain tensors either way: of a share its flat buffer holds this rank's part of every gradient, and
FSDP2 adds into it. States are whole tensors, so a run goes on with other ranks and the other way of sharing.

With shares every pass is a conversation: all ranks must run the same modules in the same order, or they wait for each
other for ever. So a rank without rows makes a pass that teaches nothing, and a pass without images sends one blank
image through tower and connector with weight zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leveret.records import IGNORE, Batch
from leveret.runs import RecipeError
from leveret.train.data import MULTIPLE, pictures_of
from leveret.train.optim import Optimiser, Trainable
from leveret.train.order import micro_batches
from leveret.train.sharing import Sharing, units

if TYPE_CHECKING:
    from leveret.model.vlm import VLM
    from leveret.train.data import Prepared
    from leveret.train.ranks import Ranks

Model = tuple["VLM", list[Trainable]]


class Replicated:
    """Every rank has the whole model; gradients lie in the optimiser's buffer and are summed over ranks at once."""

    def __init__(self, vlm: VLM, trainables: Sequence[Trainable], ranks: Ranks) -> None:
        self.vlm, self.ranks = vlm, ranks
        self.trainables = list(trainables)
        """What the optimiser steps: the model's own parameters, or this rank's shares of them."""

    def bind(self, optimiser: Optimiser) -> None:
        """Let gradients arise where the optimiser looks for them."""

    def pieces(self, rows: Sequence[int], size: int | None) -> list[Sequence[int]]:
        """This rank's rows of a global batch, in passes of at most `size`. An empty one asks for `idle`."""
        return list(micro_batches(rows, self.ranks.rank, self.ranks.world, size))

    def loss(self, batch: Batch) -> Tensor:
        """Summed loss of one pass: a float32 scalar."""
        return self.vlm(batch).loss_sum

    def backward(self, loss: Tensor) -> None:
        """Gradients of a pass, added to those that are there."""
        loss.backward()

    def exchange(self, optimiser: Optimiser) -> Tensor | None:
        """Sum gradients and extras over all ranks. Norm of the whole gradient where the buffer does not tell it."""
        self.ranks.all_reduce(optimiser.buffer)
        return None

    def part_norms(self, optimiser: Optimiser) -> dict[str, float]:
        """Size of each part's gradient; zero only where it is zero everywhere."""
        return optimiser.part_norms()

    def gather(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What `Optimiser.tensors` gave, whole. All ranks call it; only rank 0 gets them."""
        return tensors

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back: whole tensors of a state, as `Optimiser.restore` takes them on this rank."""
        return dict(tensors)

    def whole(self) -> Model | None:
        """The model as it is now, to look at or to save. All ranks call it; only rank 0 gets one."""
        return self.vlm, self.trainables

    def looked(self) -> None:
        """After somebody looked at the model that `whole` gave."""


class _Root(nn.Module):
    """What FSDP2 takes for the model: its forward gives a tensor, so that torch sees where the way back begins."""

    def __init__(self, vlm: VLM, blank: Batch | None) -> None:
        super().__init__()
        self.vlm, self.blank = vlm, blank

    def forward(self, batch: Batch) -> Tensor:
        return self.vlm(batch, blank=self.blank).loss_sum


class Sharded(Replicated):
    """Every rank has a share of each parameter, cut along its first dimension."""

    def __init__(
        self,
        vlm: VLM,
        trainables: Sequence[Trainable],
        ranks: Ranks,
        sharing: Sharing,
        data: Prepared,
        again: Callable[[], Model],
        device: str,
        half: bool,
    ) -> None:
        """Cut `vlm` in place.

        again  makes the stage's model once more, whole and on the CPU, for rank 0 to fill and show.
        half   computes in bfloat16 with copies of the weights gathered in it; gradients are summed in float32.
        """
        super().__init__(vlm, trainables, ranks)
        self.device, self.sharing, self._again = device, sharing, again
        self._copy: Model | None = None
        self.blank = blank_image(data, vlm)
        if self.blank is not None:
            self.blank = self.blank.to(device)
        self.root = _Root(vlm, self.blank)
        self._cut(trainables, half)
        for t in trainables:  # the model has let go of the whole ones; the caller still holds them
            t.value.data = t.value.data.new_empty(0)
        cut: dict[str, Any] = dict(vlm.named_parameters())
        self._whole: dict[str, Any] = {t.name: cut[t.name] for t in trainables}
        # The same memory as FSDP's shares, as plain parameters: what the optimiser does to these, it does to those.
        self.trainables = [
            replace(t, value=nn.Parameter(self._whole[t.name].to_local().detach())) for t in self.trainables
        ]

    def _cut(self, trainables: Sequence[Trainable], half: bool) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
        from torch.distributed.fsdp import fully_shard as cut

        # Towers and connectors end in views; nobody here writes into those, which is what it warns of at every pass.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        single = {value for value in self.vlm.parameters() if value.ndim == 0}
        if faults := [t.name for t in trainables if t.value in single]:
            raise RecipeError(
                f"parallel: {', '.join(faults)} learn(s) and is a single number, which FSDP cannot share; "
                f"set parallel.kind=ddp"
            )
        for value in single:
            value.data = value.data.to(self.device)
        options: dict[str, Any] = {
            "mesh": self.ranks.mesh(self.device, self.sharing.shard),
            "reshard_after_forward": self.sharing.reshard,
            "offload_policy": CPUOffloadPolicy() if self.sharing.offload else OffloadPolicy(),
            "ignored_params": single,
        }
        if half:
            # Inputs stay as autocast makes them, on one GPU as on many.
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for module in units(self.vlm):
            cut(module, **options)
        # Embeddings and output layer stay gathered between the ways there and back: they are needed at both ends.
        cut(self.root, **options)
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                # A token weighs one over the tokens of the global batch already: ranks add up, they do not average.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def bind(self, optimiser: Optimiser) -> None:
        # FSDP2 adds to a gradient that is there: here to views into the flat buffer.
        for t in optimiser.trainables:
            assert t.value.grad is not None
            self._whole[t.name].grad = self._as_share(t.name, t.value.grad)

    def _as_share(self, name: str, local: Tensor) -> Any:
        from torch.distributed.tensor import DTensor

        like = self._whole[name]
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def pieces(self, rows: Sequence[int], size: int | None) -> list[Sequence[int]]:
        return even_pieces(rows, self.ranks.rank, self.ranks.world, size)

    def loss(self, batch: Batch) -> Tensor:
        with self.ranks.watched():
            return self.root(batch)

    def backward(self, loss: Tensor) -> None:
        with self.ranks.watched():
            loss.backward()

    def exchange(self, optimiser: Optimiser) -> Tensor:
        # Copies of the model hold the same shares; each square is counted once.
        copies = self.ranks.world // self.sharing.shard
        square = torch.linalg.vector_norm(optimiser.gradient, dtype=torch.float64).square() / copies
        self._parts = optimiser.part_norms()
        told = torch.cat([optimiser.extra.double(), square[None]]).cpu()
        told = torch.cat([told, torch.tensor(list(self._parts.values()), dtype=torch.float64)])
        self.ranks.all_reduce(told)
        count = len(optimiser.extra)
        optimiser.extra.copy_(told[:count])
        self._parts = dict(zip(self._parts, told[count + 1 :].tolist(), strict=True))
        return told[count].sqrt().float().to(optimiser.buffer.device)

    def part_norms(self, optimiser: Optimiser) -> dict[str, float]:
        return self._parts

    def gather(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = {}
        with self.ranks.watched():
            for key, local in tensors.items():
                share = self._as_share(key.partition(".")[2], local.detach().to(self.device))
                whole = share.full_tensor()
                if self.ranks.rank == 0:
                    found[key] = whole.cpu()
        return found

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: self._mine(key.partition(".")[2], whole) for key, whole in tensors.items()}

    def _mine(self, name: str, whole: Tensor) -> Tensor:
        mesh = self._whole[name].device_mesh
        pieces = torch.chunk(whole, mesh.size(mesh.ndim - 1))
        place = mesh.get_local_rank(mesh.ndim - 1)
        return pieces[place] if place < len(pieces) else whole[:0]

    def whole(self) -> Model | None:
        weights = self.gather({f"weight.{t.name}": t.value for t in self.trainables})
        if self.ranks.rank > 0:
            return None
        if self._copy is None:
            self._copy = self._again()
        with torch.no_grad():
            for t in self._copy[1]:
                t.value.copy_(weights[f"weight.{t.name}"])
        self._copy[0].to(self.device)
        return self._copy

    def looked(self) -> None:
        if self._copy is not None:
            self._copy[0].to("cpu")


def even_pieces(rows: Sequence[int], rank: int, world: int, size: int | None) -> list[Sequence[int]]:
    """`micro_batches` of one rank, and empty ones behind them, so that all ranks make as many passes."""
    most = max(len(list(micro_batches(rows, one, world, size))) for one in range(world))
    mine = list(micro_batches(rows, rank, world, size))
    return [*mine, *[()] * (most - len(mine))]


def blank_image(data: Prepared, vlm: VLM) -> Batch | None:
    """A batch that shows one image of nothing, of the size of the first one; None where no sample shows any."""
    if not len(data.images):
        return None
    spec, first = vlm.spec, int(data.images[0])
    count = int(pictures_of(spec.tiling, data.sizes[[first]])[0])
    features, pixels = None, {}
    if data.features is not None:
        kind = torch.bfloat16 if data.features.dtype.kind == "i" else torch.float32
        features = torch.zeros((count, *data.features.shape[1:]), dtype=kind)
    else:
        pixels = {view.name: torch.zeros(count, *spec.shape(view)) for view in spec.towers}
    return replace(
        idle(), pixels=pixels, features=features, tile_image=torch.zeros(count, dtype=torch.int64),
        image_sizes=torch.from_numpy(data.sizes[[first]]),
    )  # fmt: skip


def idle() -> Batch:
    """A batch that teaches nothing and shows nothing, for a rank without rows."""
    size = (1, MULTIPLE)
    return Batch(
        input_ids=torch.zeros(size, dtype=torch.int64),
        labels=torch.full(size, IGNORE),
        attention_mask=torch.ones(size, dtype=torch.bool),
        position_ids=torch.arange(MULTIPLE)[None],
        segments=torch.zeros(size, dtype=torch.int64),
        image_mask=torch.zeros(size, dtype=torch.bool),
        pixels={},
        tile_image=torch.zeros(0, dtype=torch.int64),
    )
