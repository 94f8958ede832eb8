"""The safetensors format: names of dtypes, and headers. Only conversions of dtypes need torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name; KeyError if there is none."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype | str) -> str | None:
    """The safetensors name of a torch dtype, or of one with this name; None if there is none."""
    wanted = str(dtype).removeprefix("torch.")
    return next((name for name, torch_name in _TORCH_NAMES.items() if torch_name == wanted), None)


def header_of(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int], int]:
    """The header of a file that holds tensors one after the other.

    Args:
        tensors: (name, safetensors name of the dtype, shape) of each tensor.

    Returns:
        The header, padded to 8 bytes; the byte of the file where each tensor starts; the length of
        the file.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    ends = [0]
    for name, dtype, shape in tensors:
        ends.append(ends[-1] + math.prod(shape) * ITEMSIZE[dtype])
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": ends[-2:]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    starts = [len(header) + end for end in ends]
    return header, starts[:-1], starts[-1]
