"""A consolidated safetensors checkpoint in the layout of the model's library, written in a stream.

Layouts (checked with transformers 5.23, diffusers 0.42, safetensors 0.8):

    transformers   model.safetensors, config.json with the dtype that was written
    diffusers      diffusion_pytorch_model.safetensors, config.json
    otherwise      model.safetensors, aliases of tied weights in the metadata as `save_model` does

Loaders accept a wrong dtype in `config.json` in silence and cast to it, so it is always written.
"""

from __future__ import annotations

import copy
import json
import math
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_ema.files import replaced_directory
from dist_ema.layout import Shape
from dist_ema.names import class_of, is_instance

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


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written."""

    fqn: str
    aliases: tuple[str, ...]  # further names, which are not written
    shape: Shape
    dtype: torch.dtype
    averaged: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export(
    path: Path,
    module: nn.Module,
    specs: Sequence[TensorSpec],
    tensors: Iterable[torch.Tensor],
    *,
    max_shard_size: int | str,
    weights_name: str | None,
) -> None:
    """Write tensors, given in the order of `specs`, and the configuration of an unwrapped module.

    Local: one process writes. Memory: one tensor at a time.

    Raises:
        ValueError: an averaged tensor holds NaN or Inf, or an argument is out of range. What is at
            `path` is left as it was.
    """
    name = weights_name or _weights_name(module)
    stem = name.removesuffix(".safetensors")
    if not name.endswith(".safetensors") or Path(name).name != name or not stem:
        raise ValueError(f"weights_name is {name!r}, wanted a file name that ends in .safetensors")
    unknown = [f"{s.fqn} ({s.dtype})" for s in specs if s.dtype not in DTYPES]
    if unknown:
        raise ValueError(f"safetensors has no dtype for {', '.join(unknown)}")
    files = _split(specs, stem, max_bytes(max_shard_size))
    metadata = {"format": "pt"}
    if not _has_config(module):
        metadata |= {alias: spec.fqn for spec in specs for alias in spec.aliases}
    stale = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    with replaced_directory(path, keep=lambda entry: not stale.fullmatch(entry)) as directory:
        _write_config(directory, module, specs)
        _write_weights(directory, files, iter(tensors), metadata)
        if len(files) > 1:
            _write_index(directory / f"{name}.index.json", files)


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


def safetensors_header(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> bytes:
    """The start of a safetensors file: length, names, shapes, offsets, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for spec in specs:
        header[spec.fqn] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _split(specs: Sequence[TensorSpec], stem: str, limit: int) -> dict[str, list[TensorSpec]]:
    """Fill files in order; a tensor above the limit has a file of its own."""
    files: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if files[-1] and size + spec.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.nbytes
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    return {
        f"{stem}-{i:05d}-of-{len(files):05d}.safetensors": part
        for i, part in enumerate(files, start=1)
    }


def _write_weights(
    directory: Path,
    files: dict[str, list[TensorSpec]],
    tensors: Iterable[torch.Tensor],
    metadata: dict[str, str],
) -> None:
    source = iter(tensors)
    broken: list[str] = []
    for name, specs in files.items():
        with (directory / name).open("xb", buffering=0) as file:
            _write_all(file, safetensors_header(specs, metadata))
            for spec in specs:
                tensor = next(source)
                if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                    raise AssertionError(f"{spec}: got {tuple(tensor.shape)} {tensor.dtype}")
                if spec.averaged and not _is_finite(tensor):
                    broken.append(spec.fqn)
                elif tensor.numel():
                    flat = tensor.contiguous().view(-1).view(torch.uint8)
                    _write_all(file, flat.numpy().data)
    if broken:
        raise ValueError(f"the average holds NaN or Inf in {', '.join(broken)}; nothing is written")


def _write_all(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:  # one write() takes at most 2 GB
        view = view[file.write(view) :]


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.element_size() == 1:
        tensor = tensor.float()
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(1 << 22))


def _write_index(path: Path, files: dict[str, list[TensorSpec]]) -> None:
    index = {
        "metadata": {"total_size": sum(s.nbytes for specs in files.values() for s in specs)},
        "weight_map": {s.fqn: name for name, specs in files.items() for s in specs},
    }
    path.write_text(json.dumps(index, indent=2) + "\n")


def _is_transformers(module: nn.Module) -> bool:
    return is_instance(module, "transformers.modeling_utils", "PreTrainedModel")


def _is_diffusers(module: nn.Module) -> bool:
    return is_instance(module, "diffusers.models.modeling_utils", "ModelMixin")


def _has_config(module: nn.Module) -> bool:
    return _is_transformers(module) or _is_diffusers(module)


def _weights_name(module: nn.Module) -> str:
    return "diffusion_pytorch_model.safetensors" if _is_diffusers(module) else "model.safetensors"


def _class_name(module: nn.Module) -> str:
    """The class that the user wrote; `fully_shard` puts a subclass of it in its place."""
    fsdp2 = class_of("torch.distributed.fsdp._fully_shard._fully_shard", "FSDPModule")
    for cls in type(module).__mro__:
        if fsdp2 is None or not issubclass(cls, fsdp2):
            return cls.__name__
    raise AssertionError(type(module))


def _write_config(directory: Path, module: Any, specs: Sequence[TensorSpec]) -> None:
    floating = [s.dtype for s in specs if s.averaged and s.dtype.is_floating_point]
    if _is_transformers(module):
        config = copy.deepcopy(module.config)
        config.architectures = [_class_name(module)]
        for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
            if part is not None:
                part.dtype = floating[0]
        config.to_json_file(directory / "config.json")
        if module.can_generate() and module.generation_config is not None:
            module.generation_config.save_pretrained(directory)
    elif _is_diffusers(module):
        config = json.loads(module.to_json_string())
        config["_class_name"] = _class_name(module)
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
