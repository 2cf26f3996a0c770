"""Keys and values of what was said before, as a tree: conversations that begin alike share what they share.

    root -- system + image -- question A -- answer -- next question -- ...
                          \\- question B -- answer

A place in the tree is a run of tokens with its keys and values, [layers, 2, H, tokens, d]. A later prompt starts behind
the longest way from the root that it begins with, also where that ends inside a run.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Trace = NDArray[np.int64]
"""What a row of tokens is told by: an ordinary token by its id, one of an image by a number that only this place of
this image has."""


def image_trace(key: str, count: int) -> Trace:
    """`count` numbers for the tokens of the image with this key (a hash of its bytes): negative ones in a row, which
    begin at a hash of 63 bits, so that another image's are never the same."""
    seed = hashlib.blake2b(key.encode(), digest_size=8).digest()
    first = int.from_bytes(seed, "big") >> 1
    return -1 - (np.arange(count, dtype=np.int64) + np.int64(first % (2**63 - 1 - count)))


def alike(one: Trace, other: Trace) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    at = int(differs.argmax()) if length else 0
    return at if length and differs[at] else length


@dataclass(slots=True, eq=False)
class Run:
    """Tokens that follow each other in the tree, their keys and values, and what was said next, by its first token."""

    trace: Trace
    block: Tensor
    parent: Run | None
    next: dict[int, Run] = field(default_factory=dict)


class Past:
    """The tree, within `limit` bytes of keys and values: what was used least recently is thrown away, ends first.

    A run is always used later than what follows it (`_touch`), so the one used least recently has nothing behind it.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.most = 0  # bytes that were ever held at once
        self._first: dict[int, Run] = {}
        self._order: OrderedDict[int, Run] = OrderedDict()  # by id, the least recently used first

    def __len__(self) -> int:
        return len(self._order)

    def match(self, trace: Trace) -> list[tuple[Tensor, int]]:
        """The longest known beginning of `trace`: blocks in order, and how many tokens of each."""
        found, path = [], []
        for run, shared in self._walk(trace):
            found.append((run.block, shared))
            path.append(run)
        self._touch(path)
        return found

    def put(self, trace: Trace, copy: Callable[[int, int], Tensor], each: int) -> None:
        """Keep a conversation, unless what is new of it is more than may be kept.

        copy(first, last) gives its keys and values from one token to before another, in memory of their own; only what
        is not known yet is asked for. each: bytes of one token's.
        """
        path, at = [], 0
        for run, shared in self._walk(trace):
            at += shared
            if shared < len(run.trace) and at < len(trace):
                run = self._split(run, shared)
            path.append(run)
        self._touch(path)
        size = (len(trace) - at) * each
        if at == len(trace) or size > self.limit:
            return
        behind = path[-1] if path else None
        self._trim(self.limit - size)
        if behind is not None and id(behind) not in self._order:
            return  # the conversation's own beginning had to go: what follows it is of no use
        block = copy(at, len(trace))
        assert block.nbytes == size, "a block is not as large as was said"
        new = Run(trace[at:].copy(), block, behind)
        self._children(behind)[int(new.trace[0])] = new
        self._order[id(new)] = new
        self.bytes += block.nbytes
        self.most = max(self.most, self.bytes)
        self._touch([*path, new])

    def clear(self) -> None:
        """Forget everything."""
        self._trim(0)

    def _walk(self, trace: Trace) -> list[tuple[Run, int]]:
        """The runs that `trace` begins with, and how many tokens of each it shares: all of them, but of the last."""
        found: list[tuple[Run, int]] = []
        children, at = self._first, 0
        while at < len(trace) and (run := children.get(int(trace[at]))) is not None:
            shared = alike(run.trace, trace[at:])
            found.append((run, shared))
            if shared < len(run.trace):
                break
            children, at = run.next, at + shared
        return found

    def _split(self, run: Run, at: int) -> Run:
        """Cut a run in two; gives its first part."""
        head = Run(run.trace[:at].copy(), run.block[:, :, :, :at].clone(), run.parent, {int(run.trace[at]): run})
        self._children(run.parent)[int(head.trace[0])] = head
        run.trace, run.block, run.parent = run.trace[at:].copy(), run.block[:, :, :, at:].clone(), head
        self._order[id(head)] = head
        return head

    def _touch(self, path: Sequence[Run]) -> None:
        """Used now; what is nearer the root counts as used later."""
        for run in reversed(path):
            if id(run) in self._order:
                self._order.move_to_end(id(run))

    def _trim(self, limit: int) -> None:
        while self.bytes > limit:
            _, run = self._order.popitem(last=False)
            assert not run.next, "something follows what was used least recently"
            del self._children(run.parent)[int(run.trace[0])]
            self.bytes -= run.block.nbytes

    def _children(self, run: Run | None) -> dict[int, Run]:
        return self._first if run is None else run.next
