"""Where keys and values live while answers are made: one block of rows, where a column is a position.

    kv [layers, 2, rows, heads, columns, head width]        row r, column p: the token at position p of the answer in r

No row is padded on the left: a row starts at column 0, so a query at position p may look at columns 0..p and nowhere
else. What lies to the right of a row's last token is stale or zero, hence finite, and gets weight zero; the next
token overwrites it. Rows of any length stand side by side, join and leave, and nothing is ever shifted.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache


class SlotCache(Cache):
    """Keys and values of every row, handed to transformers' models as their `past_key_values`.

    layers  how many layers the language model has.
    dtype   what keys and values are stored as; None takes what the model computes. Under bfloat16 autocast the
            products read them as bfloat16 anyway, so storing them so changes nothing but the time.

    `aim` says, before every forward pass, which rows it is for and which columns it writes.
    """

    def __init__(self, layers: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(layers=[])
        self.depth = layers
        self.dtype = dtype
        self.kv: Tensor | None = None
        self.rows = self.columns = 0
        self._first = self._last = self._reach = 0
        self._at: int | Tensor = 0
        self._across = torch.zeros(1, 1, dtype=torch.long)

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for at least `rows` x `columns`, keeping what is there; grows by doubling, never shrinks."""
        if rows > self.rows:
            self.rows = max(rows, 2 * self.rows)
        if columns > self.columns:
            self.columns = -(-columns // 32) * 32
        if self.kv is not None and (self.kv.shape[2] < self.rows or self.kv.shape[4] < self.columns):
            self._allocate(self.kv.shape[3], self.kv.shape[5], self.kv, self.kv)

    def fit(self, rows: int, columns: int) -> None:
        """Be exactly of this size and hold nothing; what was held is given back first."""
        columns = -(-columns // 32) * 32
        if (rows, columns) == (self.rows, self.columns):
            return
        self.rows, self.columns = rows, columns
        if self.kv is not None:
            heads, width, like = self.kv.shape[3], self.kv.shape[5], self.kv.new_empty(0)
            self.kv = None
            self._allocate(heads, width, like)

    def reshape(self, rows: int, columns: int, used: int) -> None:
        """Be exactly of this size and keep what the first `used` rows hold."""
        columns = -(-columns // 32) * 32
        if (rows, columns) == (self.rows, self.columns):
            return
        before = self.rows, self.columns
        self.rows, self.columns = rows, columns
        try:
            if self.kv is not None:
                self._allocate(self.kv.shape[3], self.kv.shape[5], self.kv, self.kv[:, :, :used])
        except Exception:  # no memory: all is as it was
            self.rows, self.columns = before
            raise

    def release(self) -> None:
        """Hold nothing and take no memory until the next pass."""
        self.kv = None
        self.rows = self.columns = 0

    def aim(self, first: int, starts: list[int], length: int, at: Tensor) -> None:
        """The next pass is for rows `first`.. and writes `length` columns of each, from its start on.

        at  int64 [rows of the pass, length]: the same columns as a tensor, on the model's device.
        """
        self._reach = max(starts) + length
        self._first, self._last = first, first + len(starts)
        self.reserve(self._last, self._reach)
        # Equal starts (a batch of prefixes) are written as a slice, which is much cheaper than by index.
        self._at = starts[0] if len(set(starts)) == 1 else at
        self._across = torch.arange(len(starts), device=at.device)[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values [B, H, q, d]; give all that the rows hold, [B, H, reach, d]."""
        if self.kv is None:
            self.dtype = self.dtype or key_states.dtype
            self._allocate(key_states.shape[1], key_states.shape[3], key_states)
        assert self.kv is not None
        held = []
        for which, states in enumerate((key_states, value_states)):
            rows = self.kv[layer_idx, which, self._first : self._last]  # a view, [B, H, columns, d]
            if isinstance(self._at, int):
                rows[:, :, self._at : self._at + states.shape[2]] = states
            else:
                # Two index tensors around a slice: torch puts the indexed axes first, [B, q, H, d].
                rows[self._across, :, self._at] = states.transpose(1, 2).to(rows.dtype)
            held.append(rows[:, :, : self._reach])
        return held[0], held[1]

    def copy_out(self, row: int, length: int, first: int = 0) -> Tensor:
        """Columns `first` to `length` of a row, in memory of their own: [layers, 2, H, length - first, d]."""
        assert self.kv is not None
        return self.kv[:, :, row, :, first:length].clone()

    def copy_in(self, row: int, block: Tensor, first: int = 0) -> None:
        """Put what `copy_out` gave into a row, from column `first` on."""
        if self.kv is None:  # given back since
            self._allocate(block.shape[2], block.shape[4], block)
        assert self.kv is not None
        self.kv[:, :, row, :, first : first + block.shape[3]] = block

    def wipe(self, row: int) -> None:
        """Zeros for a whole row: one number that is none would spoil whatever comes to stand there."""
        if self.kv is not None:
            self.kv[:, :, row] = 0

    def move(self, sources: list[int], targets: list[int], length: int | Sequence[int]) -> None:
        """Copy the first `length` columns (of all, or of each) of whole rows over other rows, all at once: rows may
        change places."""
        assert self.kv is not None
        lengths = [length] * len(sources) if isinstance(length, int) else length
        if set(sources).isdisjoint(targets):  # nothing is overwritten that is still to be read
            for source, target, count in zip(sources, targets, lengths, strict=True):
                self.kv[:, :, target, :, :count] = self.kv[:, :, source, :, :count]
        elif (most := max(lengths)) > 0:
            self.kv[:, :, targets, :, :most] = self.kv[:, :, sources, :, :most]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that the pass finds filled; models ask only when they get no positions, and they always do."""
        return self._reach

    def _allocate(self, heads: int, width: int, like: Tensor, held: Tensor | None = None) -> None:
        """New memory, of the type and the device of `like`; `held`, [layers, 2, rows, heads, columns, d], is copied."""
        # Zeros, not empty memory: a NaN in a column with weight zero would still spoil the sum.
        shape = (self.depth, 2, self.rows, heads, self.columns, width)
        dtype = self.dtype or like.dtype
        if like.device.type == "cpu":
            # NumPy's zeros are pages that the system fills when they are first written to; torch writes them all now.
            # They begin at a multiple of 64 bytes, as torch's do: products may sum in another order elsewhere.
            size = math.prod(shape) * dtype.itemsize
            zeros = np.zeros(size + 64, np.uint8)
            begin = -zeros.ctypes.data % 64
            self.kv = torch.from_numpy(zeros[begin : begin + size]).view(dtype).view(shape)
        else:
            self.kv = torch.zeros(shape, dtype=dtype, device=like.device)
        if held is not None:
            rows, columns = min(self.rows, held.shape[2]), min(self.columns, held.shape[4])
            self.kv[:, :, :rows, :, :columns] = held[:, :, :rows, :, :columns]


class Shelf:
    """Tensors by key, the least recently used thrown away when they fill more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.most = 0  # bytes that were ever held at once
        self._held: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor, now the most recently used; None if it is not (or no longer) here."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor. It must own its memory, or throwing it away would free nothing."""
        if key in self._held:
            self.bytes -= self._held.pop(key).nbytes
        if tensor.nbytes > self.limit:
            return
        self._trim(self.limit - tensor.nbytes)
        self._held[key] = tensor
        self.bytes += tensor.nbytes
        self.most = max(self.most, self.bytes)

    def shrink(self, limit: int) -> None:
        """Another bound from now on."""
        self.limit = limit
        self._trim(limit)

    def _trim(self, limit: int) -> None:
        while self.bytes > limit:
            self.bytes -= self._held.popitem(last=False)[1].nbytes
