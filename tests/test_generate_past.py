"""The tree of earlier conversations gives the longest known beginning, and keeps to its bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leveret.generate.past import Past, alike, image_trace

traces = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=20)


def block(trace: Any, first: int, last: int) -> Tensor:
    """Keys and values that say which conversation's beginning they belong to: a running number of the tokens."""
    sums = np.cumsum(np.asarray(trace, np.int64) * 3 ** np.arange(len(trace)))
    return torch.tensor(sums[first:last], dtype=torch.float64).view(1, 1, 1, -1, 1).expand(2, 2, 1, -1, 1).clone()


EACH = 2 * 2 * 8


def kept(past: Past, trace: list[int]) -> Tensor:
    found = [held[:, :, :, :count] for held, count in past.match(np.asarray(trace, np.int64))]
    return torch.cat(found, 3) if found else torch.empty(2, 2, 1, 0, 1, dtype=torch.float64)


@given(traces, traces)
def test_the_longest_known_beginning_is_found(said: list[list[int]], asked: list[list[int]]) -> None:
    past = Past(10**9)
    for trace in said:
        past.put(np.asarray(trace, np.int64), lambda first, last, t=trace: block(t, first, last), EACH)
    for trace in [*asked, *said]:
        best = max(alike(np.asarray(trace), np.asarray(other)) for other in said)
        found = kept(past, trace)
        assert found.shape[3] == best
        assert torch.equal(found, block(trace, 0, best))
    different = {tuple(trace[:length]) for trace in said for length in range(1, len(trace) + 1)}
    assert past.bytes == EACH * len(different), "what is shared is kept once"


@given(traces, st.integers(0, 30))
def test_it_keeps_to_its_bytes_and_stays_a_tree(said: list[list[int]], most: int) -> None:
    past = Past(most * EACH)
    for trace in said:
        past.put(np.asarray(trace, np.int64), lambda first, last, t=trace: block(t, first, last), EACH)
        assert past.bytes <= past.limit and past.most <= past.limit
        found = kept(past, trace)
        assert torch.equal(found, block(trace, 0, found.shape[3]))
        if len(trace) <= most:
            assert found.shape[3] == len(trace), "what was said last is kept if there is room for it"
        assert past.bytes == sum(run.block.nbytes for run in past._order.values())
    past.clear()
    assert past.bytes == len(past) == 0 and not past._first


def test_images_have_numbers_of_their_own() -> None:
    one, other = image_trace("a" * 64, 50), image_trace("b" * 64, 50)
    assert len({*one.tolist(), *other.tolist()}) == 100
    assert (one < 0).all() and np.array_equal(one[:20], image_trace("a" * 64, 20))
