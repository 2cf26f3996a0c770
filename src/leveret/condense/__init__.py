"""Choose: from a pool of pairs to a coreset, by rules that are stated to the last tie (docs/condense.md)."""

from leveret.condense.embed import embed
from leveret.condense.pipeline import condense

__all__ = ["condense", "embed"]
