"""How much memory answers take: told before it is taken, and kept within a bound.

    slots     rows of keys and values, one an answer, as long as the longest prompt and its answer
    prefixes  keys and values of images, kept for later questions about them
    features  what towers gave for images, kept for later questions too
    a pass    what one pass over prompts holds: pixels, activations, attention, logits, prefixes on their way to rows

The first three are exact. A pass is an estimate from the model's widths, on the high side. The weights come on top.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leveret.runs import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from leveret.generate.slots import Reply
    from leveret.model.vlm import VLM

PASS_TOKENS = {"cpu": 1024}
"""Padded positions of one prompt pass, at most (one row may have more): bounds memory, and on a CPU keeps its caches
warm (four images of 729 tokens one by one take two thirds of the time that they take together)."""
MANY_TOKENS = 8192
"""The same on any other device."""

COLUMNS = 32
"""Rows are allocated in multiples of so many positions."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call may hold, in bytes where nothing else is said.

    slots, positions  answers made at once, and positions of each.
    pass_tokens       padded positions of one prompt pass.
    rows              keys and values of all slots.
    prefixes          of images, kept.
    features          of images, kept.
    passes            one pass, at most.
    weights           of the model, beside all that.
    """

    slots: int
    positions: int
    pass_tokens: int
    rows: int
    prefixes: int
    features: int
    passes: int
    weights: int

    @property
    def total(self) -> int:
        """Everything but the weights: what a bound is put on."""
        return self.rows + self.prefixes + self.features + self.passes

    def facts(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


class Costs:
    """Bytes that a model takes for a position, an image and an answer.

    halves  keys and values are kept in bfloat16.
    """

    def __init__(self, vlm: VLM, halves: bool) -> None:
        config = vlm.language.config.get_text_config()
        heads = int(config.num_attention_heads)
        width = int(config.hidden_size)
        head = int(getattr(config, "head_dim", None) or width // heads)
        size = vlm.dtype.itemsize
        shared = int(getattr(config, "num_key_value_heads", None) or heads)
        self.kv = int(config.num_hidden_layers) * 2 * shared * head * (2 if halves else size)
        inner = int(getattr(config, "intermediate_size", None) or 4 * width)
        eager = str(getattr(config, "_attn_implementation", "eager")) == "eager"
        self.position = size * (8 * width + 3 * inner + 4 * heads * head) + self.kv
        self.pair = (
            heads * size * 3 if eager else 5
        )  # of a query and a key: scores; or a mask, as it is given and as used
        self.logits = 2 * 4 * int(config.vocab_size)
        self.image = sum(self._tower(tower, view.size) for tower, view in _pairs(vlm))
        self.weights = sum(tensor.nbytes for tensor in vlm.state_dict().values())
        self.tokens = max(vlm.spec.tokens, 1)
        self.pass_tokens = pass_tokens(vlm)

    @staticmethod
    def _tower(tower: Any, side: int) -> int:
        """One picture in a tower: its pixels twice, and the activations of a layer."""
        config = getattr(tower, "config", None) or getattr(getattr(tower, "model", None), "config", None)
        width = int(getattr(config, "hidden_size", None) or getattr(tower, "width", None) or 1024)
        tokens = int(getattr(tower, "tokens", None) or 1024)
        return 4 * (2 * 3 * side * side + 16 * tokens * width + 2 * tokens * tokens * max(width // 64, 1))

    def one_pass(self, tokens: int, reach: int) -> int:
        """A pass over `tokens` positions that look back over `reach`."""
        return tokens * (self.position + self.pair * reach) + (-(-tokens // self.tokens)) * self.image

    def plan(self, replies: Sequence[Reply], slots: int, kept: int, budget: int | None) -> Plan:
        """What answering `replies` will hold.

        slots  answers at once, at most. kept  bytes of prefixes, and again of features, that may be kept.

        Raises RecipeError, naming the least that is enough, when one answer alone needs more than `budget`.
        """
        longest = max((len(reply.ids) + reply.limit for reply in replies), default=1)
        # Prompts of one pass are padded to the longest of them, behind prefixes of several lengths.
        behind = max((len(reply.ids) - reply.prefix for reply in replies), default=1)
        longest = max(longest, behind + max((reply.prefix for reply in replies), default=0))
        positions = -(-longest // COLUMNS) * COLUMNS
        widest = max((max(reply.prefix, len(reply.ids) - reply.prefix) for reply in replies), default=1)
        row = positions * self.kv
        slots = max(1, min(slots, len(replies)))
        tokens = self.pass_tokens
        if budget is not None:
            each = self.one_pass(tokens, longest) / tokens
            tokens = max(widest, min(tokens, int(budget / 4 / each)))
            left = budget - self.one_pass(tokens, longest)
            if left < row + self.logits:
                least = self.one_pass(widest, longest) + row + self.logits
                raise RecipeError(
                    f"the memory allowed is {budget:,} bytes, and one answer of {positions} positions needs {least:,} "
                    f"beside the weights; allow at least {least / 1e6 + 1:,.0f}MB"
                )
            kept = min(kept, max(0, left - row - self.logits) // 8)
            slots = max(1, min(slots, (left - 2 * kept) // (row + self.logits)))
        passes = self.one_pass(max(tokens, widest), longest) + slots * self.logits
        return Plan(slots, positions, tokens, slots * row, kept, kept, passes, self.weights)


def pass_tokens(vlm: VLM) -> int:
    return PASS_TOKENS.get(vlm.device.type, MANY_TOKENS)


def spare(device: torch.device) -> int:
    """Bytes that are free where a model computes; on a CPU, of the machine's memory."""
    import os

    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # a system that does not tell
        free = 4 * 2**30
    return free_of(Path("/proc/meminfo"), Path("/sys/fs/cgroup"), free)


def free_of(meminfo: Path, group: Path, free: int) -> int:
    """What Linux says could be had: MemAvailable, with the pages of files that it keeps as long as nobody wants the
    room (`free`, which is what is told elsewhere, leaves these out); in a container no more than its limit leaves.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":", 1) for line in meminfo.read_text("ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else free
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        limit = int((group / "memory.max").read_text("ascii"))
        used = int((group / "memory.current").read_text("ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())
        free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    return max(0, free)


def _pairs(vlm: VLM) -> list[tuple[Any, Any]]:
    return list(zip(vlm.towers.values(), vlm.spec.towers, strict=True))
