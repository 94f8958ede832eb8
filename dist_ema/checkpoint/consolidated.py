"""Plain safetensors files, one tensor each name, told as a checkpoint without checksums."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_ema.checkpoint import manifest
from dist_ema.checkpoint.blocks import Files, read_header, read_manifest
from dist_ema.checkpoint.directory import find
from dist_ema.checkpoint.manifest import (
    BLOCK_BYTES,
    ITEMSIZE,
    PLAIN_NAME,
    CheckpointError,
    Manifest,
    SavedAverage,
    SavedBox,
    SavedFile,
    SavedTensor,
)
from dist_ema.checkpoint.parsing import check_shape, check_tiling, shown
from dist_ema.core.layout import whole

NAME = ""  # of the one average that such files hold
_SUFFIX, _INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
_MAX_INDEX_BYTES = 100_000_000
_SAMPLED_BYTES = 64  # of each tensor


def describe(files: Files, only: str | None = None) -> Manifest:
    """What a directory of safetensors files holds: all of them, one, or those of an index.

    The state is empty: such files know no counters.

    Args:
        only: the one file to look at, by name.

    Raises:
        CheckpointError: it holds no such files, or pieces of tensors, or files that are no good.
    """
    names = [only] if only is not None else _names(files)
    found: dict[str, SavedFile] = {}
    tensors: dict[str, SavedTensor] = {}
    for name in names:
        found[name], held = _describe_file(files, name)
        for fqn, tensor in held.items():
            if fqn in tensors:
                raise CheckpointError(
                    f"{files.directory}: {shown(fqn)} is in {tensors[fqn].boxes[0].file} and in "
                    f"{name}; give the one file that is meant"
                )
            tensors[fqn] = tensor
    average = SavedAverage("", found, tensors)
    return Manifest("", "", BLOCK_BYTES, {}, {}, {NAME: average})


def open_any(path: Path) -> tuple[Files, Manifest]:
    """A checkpoint's files and what is in them, whether it has a manifest or not.

    Raises:
        CheckpointError: there is nothing that can be read.
    """
    path = find(path)
    directory, only = (path.parent, path.name) if path.is_file() else (path, None)
    files = Files(directory)
    try:
        if only in (None, manifest.FILE) and files.has(manifest.FILE):
            return files, read_manifest(files)
        return files, describe(files, only)
    except BaseException:
        files.close()
        raise


def sample(files: Files, about: Manifest) -> list[bytes]:
    """The first bytes of each tensor, by which files with equal headers are told apart."""
    boxes = [box for tensor in about.averages[NAME].tensors.values() for box in tensor.boxes]
    return [files.read_bytes(b.file, b.start, min(b.nbytes, _SAMPLED_BYTES)) for b in boxes]


def _names(files: Files) -> list[str]:
    names = [name for name in files.names() if files.has(name)]
    indices = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    if len(indices) > 1:
        raise CheckpointError(f"{files.directory}: has several indices, {', '.join(indices)}")
    if indices:
        return _indexed(files, indices[0])
    found = [name for name in names if name.endswith(_SUFFIX)]
    if not found:
        raise CheckpointError(
            f"{files.directory}: is not a checkpoint; it has no manifest.json and no safetensors "
            f"file, but {shown(names[:8]) if names else 'nothing'}"
        )
    return found


def _indexed(files: Files, index: str) -> list[str]:
    where = files.directory / index
    nbytes = files.size(index)
    if nbytes > _MAX_INDEX_BYTES:
        raise CheckpointError(f"{where}: is {nbytes} bytes long, which no index is")
    try:
        weight_map = json.loads(files.read_bytes(index, 0, nbytes))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: is no index of safetensors files") from error
    for name in names:
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{where}: file {shown(name)} is not a plain name")
        held = read_header(files, name)[0]
        for fqn, file in weight_map.items():
            if file == name and fqn not in held:
                raise CheckpointError(f"{where}: {shown(fqn)} is not in {name}")
    return names


def _describe_file(files: Files, name: str) -> tuple[SavedFile, dict[str, SavedTensor]]:
    where = str(files.directory / name)
    header, header_bytes = read_header(files, name)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: metadata is {shown(metadata)}")
    if "DCP_SHARDING_INFO" in metadata:
        raise CheckpointError(
            f"{where}: holds pieces of tensors, and there is no manifest.json that tells which; "
            "the save was not completed, or the manifest was lost"
        )
    aliases: dict[str, list[str]] = {}
    for alias, fqn in metadata.items():  # as safetensors.torch.save_model notes tied weights
        if isinstance(fqn, str) and fqn in header and alias not in header:
            aliases.setdefault(fqn, []).append(alias)
    tensors, ranges = {}, []
    for fqn, entry in header.items():
        tensor = _tensor(entry, name, header_bytes, f"{where}: {shown(fqn)}", aliases.get(fqn, []))
        tensors[fqn] = tensor
        ranges += [(box.start, box.nbytes, fqn) for box in tensor.boxes]
    size = files.size(name)
    check_tiling(where, ranges, header_bytes, size)
    return SavedFile(size, header_bytes, ""), tensors


def _tensor(
    entry: object, file: str, header_bytes: int, where: str, aliases: list[str]
) -> SavedTensor:
    told: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = told.get("dtype"), told.get("shape"), told.get("data_offsets")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < 1 << 63 for n in numbers
        ):
            raise CheckpointError(f"{where}: header entry is {shown(entry)}")
    assert isinstance(shape, list) and isinstance(offsets, list)
    if not isinstance(dtype, str) or len(offsets) != 2:
        raise CheckpointError(f"{where}: header entry is {shown(entry)}")
    sizes = tuple(shape)
    check_shape(sizes, dtype, where)
    nbytes = math.prod(sizes) * ITEMSIZE[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"{where}: {offsets[1] - offsets[0]} bytes for shape {sizes}")
    box = SavedBox(whole(sizes), file, header_bytes + offsets[0], nbytes, ())
    return SavedTensor(sizes, dtype, tuple(aliases), (box,))
