"""A peer's model becomes a folder of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from leveret.model import checkpoint, parts
from leveret.model.peers import PEERS, Folder, read, recognise
from leveret.model.peers.assemble import assemble
from leveret.runs import RecipeError

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert(
    source: str | Path,
    out: str | Path,
    *,
    hub: str | Path | None = None,
    base: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Writes the model in a peer's folder as a folder of ours, as `peers.read` and `checkpoint.save` do.

    dtype  a key of TYPES; by default as it was saved.

    Returns {"out", "kind", "parts": {part: in words}, "parameters", "image_tokens", "chat", "notes"}. Raises as they
    do, and RecipeError for another dtype, or where `out` lies in `source`.
    """
    if dtype is not None and dtype not in TYPES:
        raise RecipeError(f"--dtype {dtype}: allowed are {', '.join(TYPES)}")
    source, out = Path(source), Path(out)
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise RecipeError(f"{out} lies in the folder that is read; give another place for the result")
    foreign = read(source, hub=hub, base=base)
    vlm = assemble(foreign, source, TYPES[dtype] if dtype else None)
    checkpoint.save(vlm, out)
    return {
        "out": str(out),
        "kind": PEERS[str(recognise(Folder(source)))].name,
        "parts": {row.part: row.note for row in parts.parts_table(vlm, {})} | {"chat": vlm.chat},
        "parameters": parts.count(vlm),
        "image_tokens": vlm.spec.tokens,
        "chat": vlm.chat,
        "notes": foreign.notes,
    }
