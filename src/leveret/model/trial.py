"""A module of a user's own is tried before it is used: does it give what its row promises?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from leveret import own
from leveret.runs import RecipeError


def build_own(
    reference: str, where: str, build: Callable[[], nn.Module], given: Sequence[int], due: Sequence[int]
) -> nn.Module:
    """The module that a row in a user's own file builds, on the current default device.

    A second one is made on torch's `meta` device, given a tensor of shape `given`, and must give shape `due`. One that
    cannot run there (it looks at values) is not tried.

    RecipeError in one line, with the line of the user's file, when it fails, is no module or gives another shape.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad(), own.guard(reference, where):
        trial = build()
        if not isinstance(trial, nn.Module):
            raise RecipeError(f"{where}: `build` of {reference} gave a {type(trial).__name__}; it must give a module")
        try:
            found = trial.eval()(torch.empty(tuple(given)))
        except NotImplementedError:
            found = None
        except RuntimeError as fault:
            if "meta" not in str(fault):
                raise
            found = None
    if found is not None and tuple(getattr(found, "shape", ())) != tuple(due):
        shape = list(found.shape) if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise RecipeError(f"{where}: {reference} makes {shape} of {list(given)}; its row promises {list(due)}")
    with own.guard(reference, where):
        return build()
