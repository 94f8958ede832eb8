"""The safetensors format: names of dtypes, and headers."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from dist_ema.core.layout import Shape

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


class TensorSpec(NamedTuple):
    """A tensor in a file."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def safetensors_header(
    specs: Iterable[tuple[str, Shape, torch.dtype]], metadata: dict[str, str]
) -> bytes:
    """The start of a safetensors file: length, names, shapes, offsets, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape, dtype in specs:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entry = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
