"""What condensing would do and cost, told from a hundredth of the rows before anything is spent.

Of a pool without vectors as many samples are embedded, for a minute at most; that also tells what embedding all takes.

Of near copies a sample shows few, so what dedup leaves is a range (sampled.py), and it passes on to the steps that
follow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from leveret.condense import screen
from leveret.condense.embed import Some, embed_some, refuse_many
from leveret.condense.given import Given
from leveret.condense.ranks import rank_of
from leveret.condense.rows import Array, floats
from leveret.condense.sampled import Range, Sample, after_dedup, cells_of, draw, places
from leveret.condense.shards import Shard
from leveret.condense.steps import (
    COLUMN_BYTES,
    Amount,
    Cluster,
    CondenseRecipe,
    Dedup,
    DropTop,
    ImageCluster,
    Pairs,
    RankBand,
    amount_of,
    check_columns,
    clusters_of,
)
from leveret.pool import Source
from leveret.runs import DataError, in_words

LIMIT = 60.0
"""Seconds after which no more of a pool is embedded."""
WRITTEN = 1e9
"""Bytes a second at which embeddings that were just written are read, roughly."""
THRESHOLDS = (0.80, 0.84, 0.86, 0.90, 0.945)
"""Where near copies are counted besides the recipe's own threshold."""
OVERHEAD = 4.5
"""Seconds of a whole run over those of its products at the best rate, as measured with 1,000,000 rows (docs/log.md)."""


def skew(x: Array, seed: int, per_row: int = 1) -> float:
    """k sum(n_c^2) / n^2 of a coarse grouping: how many times the pairs of equal clusters these have. Where rows sit in
    several, guests count: one centroid may be the second nearest of very many."""
    k = max(1, round(math.sqrt(len(x) / 8)))
    centroids = floats(x[np.random.default_rng(seed).permutation(len(x))[:k]])
    lengths = np.sqrt(np.square(centroids).sum(1, keepdims=True))
    labels = screen.Nearest(centroids / lengths).several(x, per_row)
    sizes = np.bincount(labels.ravel(), minlength=len(centroids))
    return float(len(centroids) * np.square(sizes / max(len(x), 1)).sum())


def product_rate(threads: int) -> float:
    """Operations a second of the products that screening makes here."""
    import torch

    from leveret.model.threads import torch_threads

    kind = torch.int8 if screen.has_int8() else torch.float32
    a = torch.randint(-127, 128, (1024, 1024), dtype=torch.int8).to(kind)
    best = 0.0
    with torch_threads(threads):
        for _ in range(8):
            began = time.perf_counter()
            _ = torch._int_mm(a, a.T) if kind == torch.int8 else torch.mm(a, a.T)
            best = max(best, 2 * 1024**3 / (time.perf_counter() - began))
    return best


def estimate_pool(
    source: Source,
    recipe: CondenseRecipe,
    encoder: str,
    *,
    workers: int,
    memory: int,
    device: str = "cpu",
    precision: str = "auto",
    limit_share: float = 1.0,
) -> dict[str, Any]:
    """As `estimate`, for a pool that is embedded first; and {"embed": as `estimate_embed`}, which "seconds" and "disk"
    of the whole include. Raises what that raises."""
    from leveret.model.encoders import load_encoder, precision_of

    scored = load_encoder(encoder, device, precision_of(encoder, device, precision)).has_texts
    check_columns(recipe, ("score",) if scored else (), f"the encoder {encoder!r}")
    facts, some = estimate_embed(
        source, encoder, seed=recipe.seed, workers=workers, device=device, precision=precision, limit_share=limit_share
    )
    found = _estimate(Sample(some.vectors, facts["rows"], WRITTEN, some.block), recipe, workers, memory)
    total = {name: found[name] + facts[name] for name in ("seconds", "disk")}
    return {**found, **total, "embed": facts}


def estimate_embed(
    source: Source,
    encoder: str,
    *,
    seed: int = 0,
    workers: int,
    device: str = "cpu",
    precision: str = "auto",
    limit_share: float = 1.0,
) -> tuple[dict[str, Any], Some]:
    """What embedding a pool would come to: {"samples", "looked", "refused": {reason: how many of those looked at},
    "rows": how many will have a vector, "seconds", "disk": bytes}; and those that were embedded to tell it.

    DataError where none of the samples that were looked at can be embedded, or more than `limit_share` are refused.
    """
    from leveret.model.encoders import is_light, load_encoder, precision_of

    computed = precision_of(encoder, device, precision)
    loaded = load_encoder(encoder, device, computed)
    n = len(source)
    blocks = [rows for _, rows in places([n], seed)]
    some = embed_some(source, encoder, blocks, LIMIT, workers=workers, device=device, precision=computed)
    if some.looked and not len(some.vectors):
        raise DataError(
            f"{source.name}: none of the {some.looked:,} samples that were looked at can be embedded: "
            f"{in_words(some.refused)}.{source.advice(some.refused, some.looked)}"
        )
    refuse_many(some.refused, some.looked, n, limit_share, source)
    of = round(n * len(some.vectors) / max(some.looked, 1))
    # A small encoder was looked at on one core; embedding all runs one on each.
    seconds = n * some.seconds / max(some.looked, 1) / (workers if is_light(encoder) and device == "cpu" else 1)
    disk = of * (2 * loaded.width + COLUMN_BYTES)
    refused = dict(sorted(some.refused.items()))
    facts = {"samples": n, "looked": some.looked, "refused": refused, "rows": of}
    return facts | {"seconds": round(seconds, 1), "disk": disk}, some


def estimate(given: Given, recipe: CondenseRecipe, *, workers: int, memory: int) -> dict[str, Any]:
    """Rows after each step, clusters, seconds, bytes of memory and of disk that `condense` would come to.

    {"rows", "sampled", "steps": {label: {"left": [least, most], ...}}, "thresholds": {threshold: [least, most]} after
    the first dedup, "seconds", "memory", "disk"}. Seconds are those of this machine; a machine that other work shares
    takes longer.
    """
    plain = all(type(shard) is Shard for shard in given.shards)
    return _estimate(draw(given, recipe.seed), recipe, workers, memory, plain)


def _estimate(sample: Sample, recipe: CondenseRecipe, workers: int, memory: int, plain: bool = True) -> dict[str, Any]:
    """plain: vectors lie in `.npy` files, as `regroup.stays` has it."""
    n, width, size = sample.of, sample.x.shape[1], sample.x.itemsize
    rate = product_rate(workers)
    left, k, flop, disk, per_row = Range(n, n), 1, 0.0, n * COLUMN_BYTES, 1
    cells: Array | None = None
    steps: dict[str, dict[str, Any]] = {}
    thresholds: dict[str, list[int]] = {}
    for label, config in recipe.steps.items():
        facts: dict[str, Any] = {}
        if isinstance(config, Cluster):
            k, trained = _clusters(config, left.high, width)
            per_row = config.clusters_per_row
            cells = cells_of(sample.x, k, per_row, recipe.seed)
            flop += 2.0 * width * (trained * k * (config.iterations if trained else 0) + left.high * k)
            copied = per_row > 1 or not plain or n * width * size > memory
            disk += left.high * (per_row * width * size * copied + COLUMN_BYTES)
            facts = {"clusters": k, "training_rows": trained}
        elif isinstance(config, Dedup | Pairs):
            uneven = skew(sample.x, recipe.seed, per_row) if len(sample.x) > 100 else float(per_row**2)
            flop += uneven * width * left.high**2 / k
            if not thresholds:
                asked = sorted({*THRESHOLDS, config.threshold})
                found = {one: after_dedup(sample, one, left, cells, seed=recipe.seed) for one in asked}
                thresholds = {f"{one:g}": [at.low, at.high] for one, at in found.items()}
                left = found[config.threshold]
            else:
                left = after_dedup(sample, config.threshold, left, cells, seed=recipe.seed, again=True)
        else:
            left = _counted(config, left)
        steps[label] = {**facts, "left": [left.low, left.high]}
    reading = n * width * size / max(sample.rate, 1.0)
    return {
        "rows": n,
        "sampled": len(sample.x),
        "steps": steps,
        "thresholds": thresholds,
        "seconds": round(OVERHEAD * flop / rate + 2 * reading + 3, 1),
        "memory": memory + (8 * n if per_row > 1 else 0),
        "disk": disk,
    }


def _clusters(config: Cluster, n: int, width: int) -> tuple[int, int]:
    """(k, training rows; 0 where the centroids are given)."""
    from leveret.condense import engine

    if config.centroids is not None:
        return len(engine.given_centroids(config.centroids, width)), 0
    k, wanted = clusters_of(config, n)
    return k, min(n, wanted)


def _counted(config: Any, left: Range) -> Range:
    """Steps that go by ranks alone."""
    if isinstance(config, RankBand):
        published = config.rank_rule == "published"
        ends = [rank_of(config.high, n) - rank_of(config.low, n) - published for n in (left.low, left.high)]
        return Range(max(0, ends[0]), max(0, ends[1]))
    if isinstance(config, DropTop):
        return Range(left.low - amount_of(config, left.low), left.high - amount_of(config, left.high))
    if isinstance(config, Amount):
        return Range(amount_of(config, left.low), amount_of(config, left.high))
    return Range(0, left.high) if isinstance(config, ImageCluster) else left


def lines_of(found: dict[str, Any]) -> Sequence[str]:
    """For the terminal."""
    lines = [*embed_lines(found["embed"])] if "embed" in found else []
    lines.append(f"{found['rows']:,} rows; told from {found['sampled']:,} of them")
    for label, facts in found["steps"].items():
        more = f" ({facts['clusters']:,} clusters)" if "clusters" in facts else ""
        lines.append(f"  after {label:<14} {Range(*facts['left'])}{more}")
    if found["thresholds"]:
        lines.append("left by dedup at other thresholds:")
        lines += [f"  {threshold:<20} {Range(*ends)}" for threshold, ends in found["thresholds"].items()]
    lines.append(
        f"about {_time(found['seconds'])} here, {found['memory'] / 1e9:.1f} GB of memory, "
        f"{found['disk'] / 1e9:.2f} GB of disk"
    )
    return lines


def embed_lines(facts: dict[str, Any]) -> Sequence[str]:
    """For the terminal: what embedding would come to."""
    told = f"{facts['samples']:,} samples: about {_time(facts['seconds'])} and {facts['disk'] / 1e9:.2f} GB"
    refused = [f"  of {facts['looked']:,} looked at {n:,} refused: {why}" for why, n in facts["refused"].items()]
    return [f"embedding {told}", *refused]


def _time(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"
