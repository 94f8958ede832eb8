"""Safetensors files that no save wrote: one file, or a directory of them with or without an index.

Headers and indices are not trusted: they are checked as a manifest is.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dist_ema.checkpoint.directory import Files
from dist_ema.checkpoint.manifest import (
    MAX_HEADER_BYTES,
    SavedAverage,
    SavedBox,
    SavedFile,
    SavedTensor,
    check_contents,
    check_file_names,
    check_tensor,
    check_types,
    short,
)
from dist_ema.core.errors import CheckpointError
from dist_ema.core.layout import whole

_SUFFIX, _INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
_MAX_INDEX_BYTES = 100_000_000
_ENTRY = {"dtype": str, "shape": [int], "data_offsets": [int]}


def describe(files: Files, only: str | None, *, has_models: bool = False) -> SavedAverage:
    """The tensors of a directory's files, or of only one of them, with the aliases that
    `safetensors.torch.save_model` notes.

    Args:
        has_models: if only subdirectories have such files, read each of them as one model, whose
            name is the prefix of the names of its tensors.

    Raises:
        CheckpointError: a file is damaged, a tensor is in two files, or there is none.
    """
    if only is not None:
        return _describe(files, [only], {})
    names = files.names() if has_models else []
    models = [name for name in names if any(n.endswith(_SUFFIX) for n in files.names(name))]
    if not models or any(name.endswith(_SUFFIX) for name in names) or files.checkpoints():
        return _describe(files, *_names(files))
    saved_files: dict[str, SavedFile] = {}
    tensors: dict[str, SavedTensor] = {}
    for model in models:
        average = _describe(files, *_names(files, f"{model}/"))
        saved_files |= average.files
        for fqn, tensor in average.tensors.items():
            aliases = tuple(f"{model}.{alias}" for alias in tensor.aliases)
            tensors[f"{model}.{fqn}"] = replace(tensor, aliases=aliases)
    return SavedAverage("", saved_files, tensors)


def _describe(files: Files, names: Sequence[str], index: Mapping[str, str]) -> SavedAverage:
    tensors: dict[str, SavedTensor] = {}
    saved_files: dict[str, SavedFile] = {}
    for name in names:
        one = _describe_file(files, name)
        for fqn in one.tensors.keys() & tensors.keys():
            raise CheckpointError(
                f"{files.directory}: {short(fqn)} is in {tensors[fqn].boxes[0].file} and in "
                f"{name}; give the path of one file"
            )
        saved_files |= one.files
        tensors |= one.tensors
    for fqn, name in index.items():
        if fqn not in tensors or tensors[fqn].boxes[0].file != name:
            raise CheckpointError(
                f"{files.directory}: {short(fqn)} is not in {name}, in which the index lists it"
            )
    return SavedAverage("", saved_files, tensors)


def _names(files: Files, at: str = "") -> tuple[list[str], dict[str, str]]:
    """The files to read in a directory, and the file of each tensor that an index lists."""
    names = [at + name for name in files.names(at) if files.has(at + name)]
    indices = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    weights = [name for name in names if name.endswith(_SUFFIX)]
    if len(indices) > 1:
        raise CheckpointError(f"{files.directory}: has several indices, {', '.join(indices)}")
    if indices:
        where = f"{files.directory / indices[0]}: is no index; it"
        index = _json(files, indices[0], 0, min(files.size(indices[0]), _MAX_INDEX_BYTES), where)
        check_types(index, {"weight_map": {str: str}}, where)
        check_file_names(index["weight_map"].values(), where)
        weight_map = {fqn: at + name for fqn, name in index["weight_map"].items()}
        return sorted(set(weight_map.values())), weight_map
    if not weights and (inside := files.checkpoints()):
        raise CheckpointError(
            f"{files.directory}: is not a checkpoint, but holds {short(inside[:8])}: give the path "
            "of one"
        )
    if not weights:
        raise CheckpointError(
            f"{files.directory}: is not a checkpoint; it has no manifest.json and no "
            f"safetensors file, but {short(names[:8]) if names else 'nothing'}"
        )
    return weights, {}


def _describe_file(files: Files, name: str) -> SavedAverage:
    where = f"{files.directory / name}: is no safetensors file, or cut short"
    nbytes = files.size(name)
    length = 8 + int.from_bytes(files.read_bytes(name, 0, min(8, nbytes)), "little")
    if not 8 < length <= min(nbytes, MAX_HEADER_BYTES):
        raise CheckpointError(f"{where} (a header of {length} bytes in {nbytes})")
    entries = _json(files, name, 8, length - 8, f"{where}; the header")
    metadata = entries.pop("__metadata__", {})
    try:
        check_types(metadata, {str: str}, "__metadata__")
        check_types(entries, {str: _ENTRY}, "the header")
        aliases: defaultdict[str, list[str]] = defaultdict(list)
        for alias, fqn in metadata.items():
            aliases[fqn].append(alias)
        tensors = {fqn: _tensor(fqn, entries[fqn], aliases[fqn], name, length) for fqn in entries}
        average = SavedAverage("", {name: SavedFile(nbytes, length, "")}, tensors)
        check_contents(average)
    except CheckpointError as error:
        raise CheckpointError(f"{where} ({error})") from error
    if "DCP_SHARDING_INFO" in metadata:
        raise CheckpointError(
            f"{files.directory / name}: holds pieces of tensors, and there is no manifest.json "
            "that describes them; the save was not completed, or the manifest was lost"
        )
    return average


def _tensor(
    fqn: str, entry: Mapping[str, Any], aliases: Sequence[str], file: str, length: int
) -> SavedTensor:
    shape, offsets = tuple(entry["shape"]), entry["data_offsets"]
    nbytes = check_tensor(short(fqn), shape, entry["dtype"]) * whole(shape).numel
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"data_offsets of {short(fqn)} do not fit its shape and dtype")
    box = SavedBox(whole(shape), file, length + offsets[0], nbytes, ())
    return SavedTensor(shape, entry["dtype"], tuple(aliases), (box,))


def _json(files: Files, name: str, start: int, nbytes: int, where: str) -> dict[str, Any]:
    """The JSON object in a part of a file."""
    try:
        value = json.loads(files.read_bytes(name, start, nbytes))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not JSON")
    return value
