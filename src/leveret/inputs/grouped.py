"""In which order LLaVA, Bunny, TinyLLaVA Factory and Prismatic visit samples, to the index.

All draw permutations from torch's generators, cut them into global batches, and lay a batch's long rows beside each
other. Lengths are words, not tokens (`Prepared.words`). Where an original stops with an error (Prismatic without images,
or with fewer samples of a kind than a batch that is not a whole number of ranks), a ValueError says why.

Sources: LLaVA llava/train/llava_trainer.py (c121f04), Bunny bunny/train/bunny_trainer.py (08273ac; the same rule),
TinyLLaVA Factory tinyllava/train/tinyllava_trainer.py (53f12c7), Prismatic prismatic/util/batching_utils.py (874c5bb).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Generator


def evenly(rows: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """`rows` dealt to `parts`, each as many: every row goes to the part that has least length and still has room.

    Where they cannot be dealt evenly, every parts-th row goes to the same part.
    """
    if len(rows) % parts:
        return [list(rows[part::parts]) for part in range(parts)]
    room = len(rows) // parts
    dealt: list[list[int]] = [[] for _ in range(parts)]
    weight: list[float] = [0] * parts
    for row in rows:
        least = weight.index(min(weight))
        dealt[least].append(row)
        weight[least] = weight[least] + lengths[row] if len(dealt[least]) < room else float("inf")
    return dealt


def length_grouped(lengths: Sequence[int], batch: int, ranks: int, rows: Generator | None = None) -> list[int]:
    """LLaVA's `get_length_grouped_indices`: a permutation of the rows, sorted and dealt inside each global batch.

    batch, ranks  samples of one pass on one rank, and ranks (LLaVA and Bunny: times passes that add up to a step).
    rows          generator of the permutation; torch's global one when left out, as there.
    """
    import torch

    drawn = torch.randperm(len(lengths), generator=rows).tolist()
    whole, order = batch * ranks, []
    for at in range(0, len(drawn), whole):
        by_length = sorted(drawn[at : at + whole], key=lambda row: lengths[row], reverse=True)
        order += [row for part in evenly(by_length, lengths, ranks) for row in part]
    return order


def modality_grouped(
    lengths: Sequence[int],
    batch: int,
    ranks: int,
    *,
    rows: Generator | None = None,
    batches: Generator | None = None,
    rest: Literal["last", "first"] = "last",
) -> list[int]:
    """LLaVA's `get_modality_length_grouped_indices`: global batches of samples with images, and of text alone.

    lengths  above 0 of samples with images, below 0 of others.
    rows     generator of the two permutations, batches of the batches' order; torch's global one when left out.
    rest     where the two incomplete batches go, joined: "last", sorted by index (LLaVA, Bunny); "first" as far as they
             make a whole one, what is then left last (TinyLLaVA Factory, which also refuses data of one kind only).
    """
    import torch

    if any(length == 0 for length in lengths):
        raise ValueError("a sample of no words has no modality here")
    images = [row for row, length in enumerate(lengths) if length > 0]
    texts = [row for row, length in enumerate(lengths) if length < 0]
    if not images or not texts:
        if rest == "first":
            raise ValueError(f"this order needs samples with and without images; all {len(lengths)} are of one kind")
        return length_grouped(lengths, batch, ranks, batches)
    whole, full, left = batch * ranks, [], []
    for kind in (images, texts):
        order = length_grouped([abs(lengths[row]) for row in kind], batch, ranks, rows)
        cut = [[kind[place] for place in order[at : at + whole]] for at in range(0, len(order), whole)]
        full += cut[:-1]
        left += cut[-1]
    mixed = [full[place] for place in torch.randperm(len(full), generator=batches).tolist()]
    if rest == "first":
        ends = [left[:whole], *mixed, left[whole:]] if len(left) >= whole else [*mixed, left]
        return [row for group in ends for row in group]
    return [row for group in mixed for row in group] + sorted(left)


PATCHES = 24 * 24
"""Tokens that Prismatic counts for an image, whatever its tower, when it looks for the longest batch."""


def split_modality(lengths: Sequence[int], batch: int, ranks: int, seed: int, epoch: int) -> list[list[int]]:
    """Prismatic's `SplitModalitySampler`: the global batches of one epoch, rank after rank in each.

    lengths  above 0 of samples with images, below 0 of others. A kind's last batch is filled up from its first, so that
             some samples come twice; the batch with the longest row comes first, so that too little memory shows at once.
    """
    import torch

    generator = torch.Generator().manual_seed(seed + epoch)
    images = [row for row, length in enumerate(lengths) if length > 0]
    texts = [row for row, length in enumerate(lengths) if length < 0]
    if not images:
        raise ValueError("this order needs samples with images; there are none")
    drawn = [torch.randperm(len(kind), generator=generator).tolist() for kind in (images, texts)]
    groups: list[list[int]] = []
    for kind, order in zip((images, texts), drawn, strict=True):
        sizes = [abs(lengths[row]) for row in kind]
        cut = [order[at : at + batch] for at in range(0, len(order), batch)]
        if cut:
            cut[-1] = cut[-1] + cut[0][: batch - len(cut[-1])]
        for rows in cut:
            if len(rows) % ranks:
                raise ValueError(f"{len(rows)} samples of one kind cannot be dealt evenly to {ranks} ranks")
            by_length = sorted(rows, key=lambda place, sizes=sizes: sizes[place], reverse=True)  # type: ignore[misc]
            groups.append([kind[place] for part in evenly(by_length, sizes, ranks) for place in part])
    mixed = [groups[place] for place in torch.randperm(len(groups), generator=generator).tolist()]
    longest = [max(abs(lengths[row]) + PATCHES * (lengths[row] > 0) for row in group) for group in mixed]
    first = longest.index(max(longest))
    mixed[0], mixed[first] = mixed[first], mixed[0]
    return mixed
