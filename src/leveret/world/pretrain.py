"""The loop that the tiny backbones share: AdamW, warm-up / plateau / fall, a saved state to continue from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leveret.model.precision import native_bf16
from leveret.runs import Interrupted, stop_requested
from leveret.train import state

Log = Callable[..., None]
"""Called as log(step, steps, **figures) after every step."""


def halves() -> torch.autocast:
    """bfloat16 where the CPU multiplies it natively, else float32: emulated it takes many times as long. So backbones
    are remade to the bit on a machine that is alike in this."""
    return torch.autocast("cpu", torch.bfloat16, enabled=native_bf16("cpu"))


def rate_at(step: int, steps: int, warmup: int, decay: float = 0.3) -> float:
    """Share of the peak rate: `warmup` steps up, a plateau, then a linear fall to nothing (WSD)."""
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, (steps - step) / (decay * steps))


def pretrain(
    modules: Mapping[str, nn.Module],
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    rate: float,
    clip: float,
    warmup: int,
    folder: Path,
    log: Log,
    save_every: int = 500,
    stop_after: int | None = None,
) -> None:
    """Teaches `modules` for `steps` steps of `loss_of(step)`, a pure function of the step and the weights.

    Matrices decay by 0.05, biases and norms do not. A state is kept in `folder` every `save_every` steps and at the
    end; a call with the same arguments continues from it to the bit. `stop_after` leaves the loop early (the schedule
    stays that of `steps`). Raises Interrupted, with the state saved, when a stop is asked for.
    """
    named = {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}
    parameters = list(named.values())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    start = 0
    found = state.latest(folder)
    if found:
        start = _restore(found, modules, named, optimizer)
    for step in range(start, stop_after or steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, steps, warmup)
        loss, figures = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log(step + 1, steps, loss=loss.item(), **figures)
        asked = stop_requested()
        if asked or (step + 1) % save_every == 0 or step + 1 == steps:
            _keep(folder, step + 1, modules, named, optimizer)
        if asked:
            raise Interrupted(f"stopped after step {step + 1} of {steps}; the same command continues")


def _keep(
    folder: Path, step: int, modules: Mapping[str, nn.Module], named: Mapping[str, nn.Parameter], optimizer: Any
) -> None:
    tensors = {
        f"weights/{m}.{key}": value for m, module in modules.items() for key, value in module.state_dict().items()
    }
    for key, parameter in named.items():
        for moment, value in optimizer.state[parameter].items():
            tensors[f"{moment}/{key}"] = value
    # safetensors refuses tensors that share memory (tied embeddings): one copy each
    state.save(folder, step, {key: value.clone() for key, value in tensors.items()}, {})


def _restore(found: Path, modules: Mapping[str, nn.Module], named: Mapping[str, nn.Parameter], optimizer: Any) -> int:
    tensors, facts = state.load(found)
    _fill(modules, tensors)
    for key, parameter in named.items():
        optimizer.state[parameter] = {
            moment: tensors[f"{moment}/{key}"]
            for moment in ("step", "exp_avg", "exp_avg_sq")
            if f"{moment}/{key}" in tensors
        }
    return int(facts["step"])


def _fill(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    for m, module in modules.items():
        prefix = f"weights/{m}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def begin_from(folder: Path, modules: Mapping[str, nn.Module]) -> int:
    """Fills `modules` with the weights of the last state that another training left in `folder`; returns its step."""
    found = state.latest(folder)
    assert found is not None, f"{folder}: what comes before was trained"
    tensors, facts = state.load(found)
    _fill(modules, tensors)
    return int(facts["step"])
