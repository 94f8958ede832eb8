"""A manifest read by somebody who does not trust it: every number is checked before it is used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

from dist_ema.checkpoint import collector
from dist_ema.checkpoint.manifest import (
    FORMAT,
    ITEMSIZE,
    PLAIN_NAME,
    VERSION,
    CheckpointError,
    Manifest,
    SavedAverage,
    SavedBox,
    SavedFile,
    SavedTensor,
    head,
)
from dist_ema.core.layout import Box, Shape, uncovered

MAX_HEADER_BYTES = 100_000_000  # of a safetensors file; the library that reads them has this limit
_MAX_BYTES = 1 << 30  # of a manifest; 2000 tensors on 1000 ranks need a tenth of it
MAX_HEAD = 4096
_MAX_DIMS = 64  # of a tensor; torch has no more
_MAX_NUMEL = 1 << 62
_ID = re.compile(r"[0-9a-f]{32}")


def check_size(start: bytes, nbytes: int, where: str) -> None:
    """Refuse a manifest of another length than its first line says, before it is read.

    Args:
        start: its first bytes, at most `MAX_HEAD`.
        nbytes: the length of the file.
    """
    if nbytes > _MAX_BYTES:
        raise CheckpointError(f"{where}: is {nbytes} bytes long, which no manifest is")
    line, newline, _ = start.partition(b"\n")
    try:
        body_bytes = json.loads(line)["bytes"]
    except (ValueError, RecursionError, LookupError, TypeError):
        body_bytes = None
    if not newline or type(body_bytes) is not int:
        raise CheckpointError(
            f"{where}: is no manifest of a dist_ema checkpoint, or its start is altered"
        )
    wanted = len(line) + 1 + body_bytes
    if nbytes != wanted:
        raise CheckpointError(
            f"{where}: is altered or cut short: it has {nbytes} bytes, {wanted} were written"
        )


def parse(data: bytes, where: str) -> Manifest:
    """Check a manifest's file and read it.

    Takes time and memory in proportion to its length, but for boxes that lie side by side in every
    direction (see `layout.uncovered`).

    Raises:
        CheckpointError: it is cut short, altered, of another version, or makes no sense.
    """
    try:
        return _parse(data)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (RecursionError, MemoryError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: is no manifest ({type(error).__name__})") from error


@collector.paused()
def _parse(data: bytes) -> Manifest:
    line, newline, body = data[:MAX_HEAD].partition(b"\n")
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        told = None
    if not newline or not isinstance(told, dict) or told.get("format") != FORMAT:
        raise CheckpointError("is no manifest of a dist_ema checkpoint, or its start is altered")
    body = data[len(line) + 1 :]
    save_id, algorithm = _text(told, "id"), _text(told, "algorithm")
    try:
        expected = head(save_id, algorithm, body)
    except LookupError as error:
        raise CheckpointError(f"cannot be checked: {error.args[0]}") from None
    if expected != line + b"\n":
        raise CheckpointError("is altered or cut short: its first line has another checksum")

    def refuse(constant: str) -> None:
        raise CheckpointError(f"holds {constant}, which is not JSON")

    top = json.loads(body, parse_constant=refuse)
    if not isinstance(top, dict) or top.get("format") != FORMAT:
        raise CheckpointError("is not the manifest of a dist_ema checkpoint")
    if top.get("version") != VERSION:
        raise CheckpointError(
            f"has format version {shown(top.get('version'))}, this library reads {VERSION}; "
            "use the version of dist_ema that wrote it"
        )
    if _text(top, "id") != save_id or _text(top, "algorithm") != algorithm:
        raise CheckpointError("has another id or algorithm in its first line than in its body")
    if not _ID.fullmatch(save_id):
        raise CheckpointError(f"has the id {shown(save_id)}")
    block_bytes = _number(top, "block_bytes")
    if not 4096 <= block_bytes <= 64 << 20 or block_bytes % 16:
        raise CheckpointError(f"block_bytes is {shown(block_bytes)}")
    averages = {
        name: _average(value, f"average {shown(name)}", block_bytes)
        for name, value in _mapping(top, "averages").items()
    }
    directories = [average.directory for average in averages.values()]
    if not averages or len(set(directories)) != len(directories):
        raise CheckpointError(f"averages are in the directories {shown(directories)}")
    written, state = _mapping(top, "written"), _mapping(top, "state")
    check_state(state, averages)
    return Manifest(save_id, algorithm, block_bytes, written, state, averages)


def check_state(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse counters and schedules that are not what `save` takes.

    {"step": int, "num_updates": int, "averages": {name: {"schedule": {...}, "decay": float|None}}}
    and anything else that is JSON beside that.
    """
    for key in ("step", "num_updates"):
        _number(state, key)
    averages = _mapping(state, "averages")
    if set(averages) != set(names):
        raise CheckpointError(f"state tells of the averages {shown(sorted(averages))}")
    for name in averages:
        average = _mapping(averages, name)
        _mapping(average, "schedule")
        decay = average.get("decay", "absent")
        if decay is not None and (type(decay) not in (int, float) or not 0 <= decay <= 1):
            raise CheckpointError(f"state: the decay of {shown(name)} is {shown(decay)}")


def _average(value: object, where: str, block_bytes: int) -> SavedAverage:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is {shown(value)}")
    directory = _text(value, "directory", where)
    if directory and not PLAIN_NAME.fullmatch(directory):
        raise CheckpointError(f"{where}: directory {shown(directory)} is not a plain name")
    files = {
        name: _file(name, entry, where) for name, entry in _mapping(value, "files", where).items()
    }
    numbered = list(files.items())
    tensors = {}
    ranges: dict[str, list[tuple[int, int, str]]] = {name: [] for name in files}
    for fqn, entry in _mapping(value, "tensors", where).items():
        tensors[fqn] = tensor = _tensor(
            entry, f"{where}, tensor {shown(fqn)}", numbered, block_bytes
        )
        for saved in tensor.boxes:
            ranges[saved.file].append((saved.start, saved.nbytes, fqn))
    for name, file in files.items():
        check_tiling(name, ranges[name], file.header_bytes, file.nbytes)
    return SavedAverage(directory, files, tensors)


def _file(name: str, value: object, where: str) -> SavedFile:
    if not PLAIN_NAME.fullmatch(name):
        raise CheckpointError(f"{where}: file {shown(name)} is not a plain name")
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: is {shown(value)}")
    nbytes, header_bytes = _number(value, "nbytes", name), _number(value, "header_bytes", name)
    if not 8 <= header_bytes <= nbytes or header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(f"{name}: a header of {header_bytes} bytes in {nbytes}")
    return SavedFile(nbytes, header_bytes, _text(value, "checksum", name))


def _tensor(
    value: object, where: str, files: Sequence[tuple[str, SavedFile]], block_bytes: int
) -> SavedTensor:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is {shown(value)}")
    shape, dtype = _numbers(value, "shape", where), _text(value, "dtype", where)
    check_shape(shape, dtype, where)
    aliases = value.get("aliases")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise CheckpointError(f"{where}: aliases are {shown(aliases)}")
    boxes = _boxes(
        _mapping(value, "boxes", where), where, shape, ITEMSIZE[dtype], files, block_bytes
    )
    problem = uncovered(shape, [saved.box for saved in boxes])
    if problem:
        raise CheckpointError(f"{where}: {problem}")
    return SavedTensor(shape, dtype, tuple(aliases), boxes)


def _boxes(
    columns: Mapping[str, Any],
    where: str,
    shape: Shape,
    itemsize: int,
    files: Sequence[tuple[str, SavedFile]],
    block_bytes: int,
) -> tuple[SavedBox, ...]:
    numbers, starts = _numbers(columns, "files", where), _numbers(columns, "starts", where)
    places = [_rows(columns, key, where, len(numbers), len(shape)) for key in ("offsets", "sizes")]
    sums = columns.get("checksums")
    if len(starts) != len(numbers) or not isinstance(sums, list) or set(map(type, sums)) - {str}:
        raise CheckpointError(
            f"{where}: {len(numbers)} boxes with starts {shown(starts)} and checksums {shown(sums)}"
        )
    at = 0
    boxes = []
    for number, start, offsets, sizes in zip(numbers, starts, *places, strict=True):
        if any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            raise CheckpointError(
                f"{where}: a box at {shown(offsets)} of sizes {shown(sizes)} in shape "
                f"{shown(shape)}"
            )
        if number >= len(files):
            raise CheckpointError(f"{where}: a box is in file {number} of {len(files)}")
        (name, file), nbytes = files[number], math.prod(sizes) * itemsize
        if start + nbytes > file.nbytes:
            raise CheckpointError(
                f"{where}: bytes from {start} to {start + nbytes} are not in {name}"
            )
        at, begin = at - (-nbytes // block_bytes), at
        boxes.append(SavedBox(Box(offsets, sizes), name, start, nbytes, tuple(sums[begin:at])))
    if at != len(sums):
        raise CheckpointError(f"{where}: {at} blocks with checksums {shown(sums)}")
    return tuple(boxes)


def _rows(
    columns: Mapping[str, Any], key: str, where: str, count: int, width: int
) -> Iterable[Shape]:
    """`count` tuples of `width` numbers, which the column holds one after the other."""
    column = _numbers(columns, key, where)
    if len(column) != count * width:
        raise CheckpointError(f"{where}: {key} of {count} boxes are {shown(column)}")
    return zip(*[iter(column)] * width, strict=True) if width else repeat((), count)


def check_shape(shape: Shape, dtype: str, where: str) -> None:
    if dtype not in ITEMSIZE:
        raise CheckpointError(f"{where}: unknown dtype {shown(dtype)}")
    if len(shape) > _MAX_DIMS or math.prod(shape) > _MAX_NUMEL:
        raise CheckpointError(f"{where}: shape {shown(shape)}")


def check_tiling(
    file: str, ranges: list[tuple[int, int, str]], header_bytes: int, nbytes: int
) -> None:
    """Refuse ranges of bytes (start, length, whose) that leave or overlap something in a file."""
    end, before = header_bytes, "the header"
    for start, length, fqn in sorted(ranges):
        if start != end:
            kind = "overlaps" if start < end else "leaves a gap after"
            raise CheckpointError(f"{file}: {shown(fqn)} at byte {start} {kind} {shown(before)}")
        end, before = start + length, fqn
    if end != nbytes:
        raise CheckpointError(f"{file}: has {nbytes} bytes, of which {end} are accounted for")


def shown(value: object) -> str:
    """What was found, on one line that is fit to be printed."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _text(mapping: Mapping[str, Any], key: str, where: str = "") -> str:
    value = mapping.get(key)
    if not isinstance(value, str):
        raise CheckpointError(f"{where and where + ': '}{key} is {shown(value)}, wanted a text")
    return value


def _number(mapping: Mapping[str, Any], key: str, where: str = "") -> int:
    value = mapping.get(key)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise CheckpointError(
            f"{where and where + ': '}{key} is {shown(value)}, wanted a whole number"
        )
    return value


def _numbers(mapping: Mapping[str, Any], key: str, where: str) -> Shape:
    value = mapping.get(key)
    if (
        not isinstance(value, list)
        or set(map(type, value)) - {int}
        or min(value, default=0) < 0
        or max(value, default=0) >= 1 << 63
    ):
        raise CheckpointError(f"{where}: {key} is {shown(value)}, wanted whole numbers")
    return tuple(value)


def _mapping(mapping: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
    value = mapping.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where and where + ': '}{key} is {shown(value)}, wanted a mapping")
    return value
