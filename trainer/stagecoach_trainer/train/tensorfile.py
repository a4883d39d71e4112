"""Writing safetensors files as a stream: no second copy of the tensors in memory, hashed on the way out.

The format: https://huggingface.co/docs/safetensors, eight bytes of header length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from stagecoach_api.artifacts import StoredObject

FORMAT_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint8: "U8",
}
HEADER_ALIGNMENT = 8
CHUNK_BYTES = 1 << 24


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> StoredObject:
    """Write contiguous CPU tensors to a safetensors file and on to the disk; return its name, size and sha256."""
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        for part in _parts(tensors):
            for start in range(0, len(part), CHUNK_BYTES):
                chunk = part[start : start + CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return StoredObject(path=path.name, size=size, sha256=digest.hexdigest())


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": FORMAT_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    yield memoryview(len(text).to_bytes(8, "little"))
    yield memoryview(text)
    for tensor in tensors.values():
        yield memoryview(tensor.contiguous().reshape(-1).numpy()).cast("B")  # type: ignore[arg-type]
