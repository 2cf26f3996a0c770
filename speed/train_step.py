"""One training step of the drawn world's language model, in turn: as transformers writes it, with attention in blocks
of queries, with the last layer on the supervised rows only, and with both.

    python speed/train_step.py [--pair]      # --pair: two processes at once, as the quickstart trains
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from leveret.model import rows
from leveret.model.attention import trained_in_blocks
from leveret.model.language import build_language, describe
from leveret.model.recipe import LanguageRecipe

KINDS = {"tune": (206, 0.2, True), "align": (96, 0.6, False)}
"""Name -> tokens of a sample, share of the text that is supervised, whether the language model learns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", action="store_true", help="two processes at once")
    parser.add_argument("--rounds", type=int, default=24)
    given = parser.parse_args()
    twin = subprocess.Popen([sys.executable, __file__, "--rounds", str(given.rounds)]) if given.pair else None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    language = build_language(describe(LanguageRecipe(name="world/language"))).train()
    whole = rows.last_of

    def step(inputs: Any, wanted: Any, blocks: bool, some: bool) -> float:
        rows.last_of = whole if some else lambda _: []
        began = time.perf_counter()
        language.zero_grad(set_to_none=True)
        with (
            torch.autocast("cpu", torch.bfloat16),
            trained_in_blocks(language) if blocks else contextlib.nullcontext(),
            rows.only_rows(language, wanted),
        ):
            logits = language(inputs_embeds=inputs, attention_mask=torch.ones_like(wanted), use_cache=False).logits
        torch.logsumexp(logits.float(), -1).sum().backward()
        return time.perf_counter() - began

    for name, (length, share, learns) in KINDS.items():
        language.requires_grad_(learns)
        inputs = torch.randn(8, length, 128, requires_grad=True)
        wanted = torch.rand(8, length) < share
        wanted[:, :64] = False
        seconds: dict[str, list[float]] = {"plain": [], "blocks": [], "rows": [], "both": []}
        for turn in range(given.rounds):
            for place, found in enumerate(seconds.values()):
                took = step(inputs, wanted, bool(place % 2), place > 1)
                if turn > 3:
                    found.append(took)
        medians = {kind: statistics.median(found) * 1e3 for kind, found in seconds.items()}
        print(
            name, *(f"{kind} {took:.1f} ms ({took / medians['plain']:.2f})" for kind, took in medians.items()), sep="  "
        )
    if twin is not None:
        twin.wait()


if __name__ == "__main__":
    main()
