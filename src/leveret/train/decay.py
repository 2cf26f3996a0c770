"""Which parameters weight decay touches: a rule of ours, and the one of the trainer that others used.

Published recipes decay nothing in most stages; where one does, two rules differ in embeddings of single tokens, layer
scales, and the norms of some language models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

Rule = Literal["matrices", "trainer"]

TRAINERS_NORMS = frozenset({"LlamaRMSNorm", "GemmaRMSNorm", "CohereLayerNorm", "GraniteRMSNorm", "T5LayerNorm"})
"""Norms that transformers 4.37 to 4.40 told its Trainer of (ALL_LAYERNORM_LAYERS), besides torch's own LayerNorm:
those of Qwen-2, Phi-3 and Mistral are not among them, and their weights decay there. Granite's stands for MiniCPM's,
which tells of itself (Bunny's modeling_minicpm.py) and is built as Granite here."""


def _matrices(module: nn.Module) -> set[str]:
    """As Prismatic does (prismatic/training/strategies/fsdp.py): what has two dimensions or more and is no bias. CLIP's
    class token, which has one with us and three there, is a row like the others."""
    return {
        name
        for name, value in module.named_parameters()
        if (value.ndim > 1 or name.endswith("class_embedding")) and not name.endswith(".bias")
    }


def _trainer(module: nn.Module) -> set[str]:
    """As transformers' Trainer does (get_decay_parameter_names, 4.37 to 4.40): all but what lies in a norm it was told
    of, and what has `bias` in its name."""
    normed = {
        f"{place}.{name}" if place else name
        for place, part in module.named_modules()
        if isinstance(part, nn.LayerNorm) or type(part).__name__ in TRAINERS_NORMS
        for name, _ in part.named_parameters()
    }
    return {name for name, _ in module.named_parameters() if name not in normed and "bias" not in name}


RULES: dict[str, Callable[[nn.Module], set[str]]] = {"matrices": _matrices, "trainer": _trainer}
"""Name of a rule -> (a model) -> the names of its parameters that decay."""
