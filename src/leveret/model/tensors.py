"""Safetensors written tensor by tensor: the library's bytes, without a second copy of the model in memory.

The library's own writer wants every tensor on the CPU at once and says a full disk in an error of its own kind. Here a
tensor leaves its device when its turn comes, each fault of the disk is the OSError it was, and the hash of the file is
that of what was meant to be written, not of what a failing disk may give back.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

PIECE = 1 << 24
"""Bytes in one write."""

# In the library's order: it lays wide types first, so that everything stays aligned.
_KINDS = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
_PLACE = {dtype: place for place, dtype in enumerate(_KINDS)}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a new safetensors file, flush it to the disk, and return the hex SHA-256 of its bytes.

    Raises OSError as the disk gives it; a file that is there already is written over. ValueError for a type that the
    format does not know.
    """
    if odd := sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in _KINDS}):
        raise ValueError(f"safetensors has no {', '.join(odd)}")
    order = sorted(tensors, key=lambda name: (-_PLACE[tensors[name].dtype], name.encode()))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for start in (len(head).to_bytes(8, "little"), head):
            digest.update(start)
            file.write(start)
        for name in order:
            plain = tensors[name].detach().cpu().contiguous().reshape(-1)
            data: memoryview = memoryview(plain.view(torch.uint8).numpy()) if plain.numel() else memoryview(b"")  # type: ignore[arg-type]
            for place in range(0, len(data), PIECE):
                digest.update(data[place : place + PIECE])
                file.write(data[place : place + PIECE])
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
