"""How surprised a model is by true captions that nothing has learned from: what an alignment is worth before tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHUNK = 64
"""Held-out pairs in one pass; they are alike in length, so little is padding."""


def held_out_loss(model: Path, pairs: Path, images: Path, limit: int, cache: Path) -> dict[str, Any]:
    """Mean next-token loss (nats) of a model over the supervised tokens of held-out pairs: {value, tokens}.

    Read, tokenised and masked by the code of `train`, in float32 on one thread, whatever it was taught in.
    pairs  LLaVA JSON, pictures below `images`. limit: tokens after which a sample is cut, as in the align stage.
    """
    import torch

    from leveret.model.checkpoint import load
    from leveret.model.threads import torch_threads
    from leveret.pool import open_source
    from leveret.train.data import prepare
    from leveret.train.run import tokenizer_hash

    vlm = load(model)
    source = open_source(pairs, images)
    facts: dict[str, Any] = {"data": source.fingerprint(), "tokenizer": tokenizer_hash(vlm.tokenizer)}
    facts |= {"spec": vlm.spec.to_dict(), "chat": vlm.chat, "max_tokens": limit}
    data = prepare(source, vlm, cache, chat=vlm.chat, max_tokens=limit, bad_share=0.0, see=None, facts=facts)
    total, tokens = 0.0, 0
    with torch_threads(1), torch.inference_mode():
        for start in range(0, len(data), CHUNK):
            batch, failed = data.batch(range(start, min(start + CHUNK, len(data))), vlm.spec)
            assert not failed, "the world's own pictures can be read"
            out = vlm(batch)
            total += float(out.loss_sum)
            tokens += out.supervised
    return {"value": total / tokens, "tokens": tokens}
