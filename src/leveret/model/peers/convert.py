"""A peer's model becomes a folder of ours, and a model of ours one of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leveret.model import checkpoint, parts
from leveret.model.peers import Folder, read
from leveret.model.peers.assemble import assemble
from leveret.model.peers.write import LAYOUTS, write
from leveret.runs import DataError, RecipeError, closest

if TYPE_CHECKING:
    from leveret.model.vlm import VLM

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OURS = "leveret"


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = OURS,
    hub: str | Path | None = None,
    base: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Writes the model in `source` (ours, or a peer's as `peers.read` reads it) as a folder of the layout `to`: ours,
    or a row of `write.LAYOUTS`.

    dtype  a key of TYPES; by default as it was saved.

    Returns {"out", "kind", "to", "parts": {part: in words}, "parameters", "image_tokens" (of a tile, where
    images are seen in tiles), "seen" (that in words), "chat", "notes"}. Raises as
    reading and writing do, and RecipeError for another layout or dtype, or where `out` lies in `source`.
    """
    if to != OURS and to not in LAYOUTS:
        near = closest(to, [OURS, *LAYOUTS])
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise RecipeError(f"--to {to}: allowed are {OURS}, {', '.join(LAYOUTS)}{hint}")
    if dtype is not None and dtype not in TYPES:
        raise RecipeError(f"--dtype {dtype}: allowed are {', '.join(TYPES)}")
    source, out = Path(source), Path(out)
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise RecipeError(f"{out} lies in the folder that is read; give another place for the result")
    vlm, kind, notes = _open(source, to, hub, base, TYPES[dtype] if dtype else None)
    facts = {
        "out": str(out),
        "kind": kind,
        "to": to,
        "parts": {row.part: row.note for row in parts.parts_table(vlm, {})} | {"chat": vlm.chat},
        "parameters": parts.count(vlm),
        "image_tokens": vlm.spec.tokens,
        "seen": f"{vlm.spec.tokens} tokens an image" if vlm.spec.tiling is None else parts.tokens_of(vlm),
        "chat": vlm.chat,
        "notes": notes,
    }
    if to == OURS:
        checkpoint.save(vlm, out)
    else:
        facts["notes"] = notes + write(vlm, out, to)
    return facts


def _open(
    source: Path, to: str, hub: str | Path | None, base: str | None, dtype: torch.dtype | None
) -> tuple[VLM, str, list[str]]:
    """(the model, whose it was, notes)."""
    try:
        own = checkpoint.find(source)
    except DataError:
        own = None
    if own is not None and "format" in Folder(own).config:
        if to == OURS and "auto_map" not in Folder(own).config:
            raise RecipeError(f"{source} is a model of ours already; say with --to what it shall become")
        vlm = checkpoint.load(own)
        return (vlm.cast(dtype) if dtype is not None else vlm), OURS, []
    foreign = read(source, hub=hub, base=base)
    return assemble(foreign, source, dtype), foreign.tool, foreign.notes
