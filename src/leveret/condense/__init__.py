"""Choose: from a pool of pairs to a coreset, by rules that are stated to the last tie (docs/condense.md)."""
