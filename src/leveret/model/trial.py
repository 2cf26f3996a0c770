"""A module of a user's own is tried before it is used: does it give what its row promises?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from leveret import own
from leveret.runs import RecipeError


def build_own(
    reference: str,
    where: str,
    build: Callable[[], nn.Module],
    given: Sequence[int],
    due: Sequence[int],
    read: Callable[[torch.Tensor], torch.Tensor] = lambda found: found,
) -> nn.Module:
    """The module that a row in a user's own file builds, on the current default device.

    A second one is made on torch's `meta` device, given a tensor of shape `given`, and must give shape `due`. One that
    cannot run there (it looks at values) is not tried.

    read is done to what comes out before its shape is compared.

    RecipeError in one line, with the line of the user's file, when it fails, is no module or gives another shape.
    """
    found = _tried(reference, where, build, given, "meta")
    if found is not None:
        found = read(found) if isinstance(found, torch.Tensor) else found
        if tuple(getattr(found, "shape", ())) != tuple(due):
            raise RecipeError(
                f"{where}: {reference} makes {_words(found)} of {list(given)}; its row promises {list(due)}"
            )
    with own.guard(reference, where):
        return build()


def shape_of(reference: str, where: str, build: Callable[[], nn.Module], given: Sequence[int]) -> list[int]:
    """The shape that the module gives for a tensor of shape `given`: found without memory, or, where it looks at
    values, by running it on zeros. RecipeError in one line when it fails, is no module or gives no tensor."""
    found = _tried(reference, where, build, given, "meta")
    if found is None:
        found = _tried(reference, where, build, given, "cpu")
    if not isinstance(found, torch.Tensor):
        raise RecipeError(f"{where}: {reference} makes {_words(found)} of {list(given)}; it must make a tensor")
    return list(found.shape)


def _tried(reference: str, where: str, build: Callable[[], nn.Module], given: Sequence[int], device: str) -> Any:
    """What a module gives for zeros; None where it cannot run on the meta device. The random state stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad(), own.guard(reference, where):
        trial = build()
        if not isinstance(trial, nn.Module):
            raise RecipeError(f"{where}: `build` of {reference} gave a {type(trial).__name__}; it must give a module")
        try:
            return trial.eval()(torch.zeros(tuple(given)))
        except NotImplementedError:
            if device != "meta":
                raise
        except RuntimeError as fault:
            if device != "meta" or "meta" not in str(fault):
                raise
    return None


def _words(found: Any) -> str:
    return str(list(found.shape)) if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
