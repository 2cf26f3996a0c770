"""Leave out what nobody reads: the output layer, and most of the last layer, only at the rows that are asked for.

In training the loss stands at the supervised positions, in answering at the last one; behind the last layer's keys and
values nothing looks at any other position. So its queries, its output projection and its MLP run on those rows
alone, and zeros stand for the rest, which only goes on into rows that are left out. Of a language model of L layers
this saves up to a (1.2 L)-th of the work: a fifth of a model of four layers, a thirtieth of one of thirty.

By hooks, not by calls of our own: what a family does around its layers (Gemma's soft cap, Granite's scale) is then done
by the family's code, and so is what peft has wrapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FEW = 0.6
"""Share of the rows up to which picking them out is worth it."""
MULTIPLE = 64
"""Rows are picked in such numbers, the last one again where there are fewer, so that products have few shapes: oneDNN
compiles each that it meets."""


@contextmanager
def only_rows(language: Any, rows: Tensor | None, multiple: int = MULTIPLE) -> Iterator[None]:
    """Let a causal language model give logits [1, K, V] for the K hidden rows where `rows` [B, T] is True, in order.

    None asks for all of them, [B, T, V].

    multiple  1 where products are not compiled by shape (float32), and few rows are wanted.
    """
    if rows is None:
        yield
        return
    index = rows.flatten().nonzero().squeeze(1)
    some = torch.nn.functional.pad(index, (0, -len(index) % multiple), value=int(index[-1]) if len(index) else 0)

    def pick(_: nn.Module, args: Any) -> Any:
        return args[0].flatten(0, 1).index_select(0, some)[None], *args[1:]

    def cut(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out[:, : len(index)]

    def spread(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        zeros = out.new_zeros(rows.numel(), out.shape[-1])
        return zeros.index_copy(0, index, out[0, : len(index)]).unflatten(0, rows.shape)

    head = language.get_output_embeddings()
    hooks = [head.register_forward_pre_hook(pick), head.register_forward_hook(cut)]
    if len(index) <= FEW * rows.numel():
        for module in last_of(language):
            hooks += [module.register_forward_pre_hook(pick), module.register_forward_hook(spread)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last_of(language: Any) -> list[nn.Module]:
    """The parts of the last layer that look at one position each and are read there only: its MLP, the projection of
    its queries and that of its output.

    None of a family whose layers are not `layers` with `self_attn` and a dense `mlp` (mixtures of experts choose over
    the whole batch), and none of layers that are computed again on the way back: the hooks are gone by then.
    """
    layers = getattr(language.get_decoder(), "layers", None)
    if not layers or getattr(layers[-1], "gradient_checkpointing", False):
        return []
    mlp, attention = getattr(layers[-1], "mlp", None), getattr(layers[-1], "self_attn", None)
    found = [mlp] if mlp is not None and _dense(mlp) else []
    return found + [part for name in ("q_proj", "o_proj") if (part := getattr(attention, name, None)) is not None]


def _dense(mlp: nn.Module) -> bool:
    return all(isinstance(part, nn.Linear) or not list(part.parameters(recurse=False)) for part in mlp.modules())
