"""The safetensors format: names of dtypes, headers, and how tensors are shared out among files."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dist_ema.core.layout import Shape

_SIZE_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
SUFFIX = ".safetensors"
WRITTEN_BY = {"written_by": "dist_ema.export"}  # in the metadata of weights files and indices


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor in a file."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class OutFile:
    """A file to be written: its header, and where each tensor starts."""

    header: bytes
    starts: dict[str, int]  # by tensor name, in bytes from the start of the file
    nbytes: int  # header and tensors


def safetensors_header(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> bytes:
    """The start of a safetensors file: length, names, shapes, offsets, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def out_files(
    specs: Sequence[TensorSpec], weights_name: str, limit: int, metadata: dict[str, str]
) -> dict[str, OutFile]:
    """Share tensors out among files of at most `limit` bytes; a larger one has a file of its own.

    Wider dtypes come first, then names in order, as safetensors itself writes them: so each tensor
    starts at a multiple of its itemsize, and equal tensors give equal files whoever writes them.

    Raises:
        ValueError: safetensors has no dtype for a tensor, or two have one name.
    """
    unknown = [f"{spec.name} ({spec.dtype})" for spec in specs if spec.dtype not in DTYPES]
    if unknown:
        raise ValueError(f"safetensors has no dtype for {', '.join(unknown)}")
    counts = Counter([spec.name for spec in specs] + ["__metadata__"])
    taken = sorted(name for name, count in counts.items() if count > 1)
    if taken:
        raise ValueError(f"a file cannot hold two tensors of one name: {', '.join(taken)}")
    files: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in sorted(specs, key=lambda s: (-s.dtype.itemsize, s.name)):
        if files[-1] and size + spec.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.nbytes
    stem = weights_name.removesuffix(SUFFIX)
    if len(files) == 1:
        return {weights_name: _out_file(files[0], metadata)}
    return {
        f"{stem}-{i:05d}-of-{len(files):05d}{SUFFIX}": _out_file(part, metadata)
        for i, part in enumerate(files, start=1)
    }


def _out_file(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> OutFile:
    header = safetensors_header(specs, metadata)
    starts, end = {}, len(header)
    for spec in specs:
        starts[spec.name] = end
        end += spec.nbytes
    return OutFile(header, starts, end)


def index_text(files: dict[str, OutFile]) -> str:
    """The contents of an index: which tensor is in which file."""
    total = sum(file.nbytes - len(file.header) for file in files.values())
    where = {tensor: name for name, file in files.items() for tensor in file.starts}
    index = {
        "metadata": {"total_size": total, **WRITTEN_BY},
        "weight_map": dict(sorted(where.items())),
    }
    return json.dumps(index, indent=2) + "\n"


def index_name(weights_name: str, library_name: str) -> str:
    """The name of the index of a set of files.

    A variant goes before the last suffix, where `from_pretrained(variant="ema")` looks for it:
    model.ema.safetensors has model.safetensors.index.ema.json.
    """
    stem, own = library_name.removesuffix(SUFFIX), weights_name.removesuffix(SUFFIX)
    if own.startswith(f"{stem}."):
        return f"{library_name}.index.{own.removeprefix(f'{stem}.')}.json"
    return f"{weights_name}.index.json"


def check_weights_name(name: str) -> None:
    """Refuse what is no name of a safetensors file."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*\.safetensors", name):
        raise ValueError(f"weights_name is {name!r}, wanted a file name that ends in {SUFFIX}")


def own_names(weights_name: str, index: str) -> re.Pattern[str]:
    """Matches the files of any export under this name, however many there are."""
    stem = re.escape(weights_name.removesuffix(SUFFIX))
    return re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(index)}")


def is_marked(file: Path) -> bool:
    """Whether an export wrote a weights file or an index.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        if file.name.endswith(SUFFIX):
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
        else:
            metadata = json.loads(file.read_text())["metadata"]
        return bool(metadata.items() >= WRITTEN_BY.items())
    except FileNotFoundError:
        raise
    except (
        OSError, RuntimeError, SafetensorError, ValueError, LookupError, AttributeError, TypeError
    ):  # fmt: skip
        if not file.exists():  # gone while it was opened, which torch tells by a RuntimeError
            raise FileNotFoundError(file) from None
        return False


def max_bytes(size: int | str) -> int:
    """A size in bytes, or as "5GB" (10**9) or "5GiB" (2**30)."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        if isinstance(size, str)
        else None
    )
    if match and match[2].upper() in _SIZE_UNITS:
        found = int(float(match[1]) * _SIZE_UNITS[match[2].upper()])
        if found > 0:
            return found
    raise ValueError(f"max_shard_size is {size!r}, wanted a number of bytes > 0 or such as '5GB'")
