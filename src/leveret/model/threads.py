"""How many threads torch computes with.

For small models one is best: threads inside small products cost more than they bring, and a team that spins while a
core is wanted elsewhere makes everything many times slower. One thread also gives the same bits on every machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

LIGHT = 20_000_000
"""Parameters up to which a model counts as small."""


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many torch threads inside, as many as before outside; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_for(module: nn.Module) -> int | None:
    """One thread for a small model on the CPU, else torch's own choice (None)."""
    first = next(module.parameters(), None)
    if first is None or first.device.type != "cpu":
        return None
    return 1 if sum(parameter.numel() for parameter in module.parameters()) <= LIGHT else None


HEAVY = 2_000_000_000
"""Products of a weight and a position from which a pass of a small model is shared between threads after all."""


def threads_for_pass(module_threads: int | None, parameters: int, positions: int) -> int | None:
    """Threads for one pass: those of `threads_for`, or torch's own where a small model meets very many positions (an
    image of hundreds of tokens)."""
    return None if parameters * positions >= HEAVY else module_threads
