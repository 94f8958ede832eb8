"""The manifest of a checkpoint: what was saved, in which files, and the checksum of each block.

[Note: checkpoint layout]
    NAME/manifest.json                            this file
    NAME/shard-00001-model-00001-of-00002.safetensors
    NAME/slow/shard-...                           several averages: a directory for each

A shard file is written by one rank, in the layout of torch's `HuggingFaceStorageWriter`: a box is
stored under the name of its tensor, row-major, and `__metadata__` has the offsets of the boxes. A
name is unique within a file, so the j-th box of a tensor on a rank goes to file j of the rank.

The manifest is two JSON texts: one line with the checksum of all that follows, then the body. The
body has a column for each property of a tensor's boxes, since a thousand ranks have a million
boxes:

    {"offsets": [0, 0, 8, 0], "sizes": [8, 5, 8, 5],    one number per dim, box after box
     "files": [0, 1], "starts": [96, 96],               index of the file; first byte in it
     "checksums": ["8f1c...", "03ab..."]}               of the blocks, box after box

A box has one checksum for each block of `block_bytes`, so that a reader of a part hashes little
more than that part. Boxes partition each tensor, and header and boxes partition each file.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import repeat
from typing import Any
from urllib.parse import quote

import xxhash

from dist_ema.checkpoint.directory import MANIFEST
from dist_ema.core.errors import CheckpointError
from dist_ema.core.layout import Box, Shape, collector_paused, uncovered
from dist_ema.core.safetensors import ITEMSIZE

FORMAT, VERSION = "dist_ema", 2
ALGORITHM = "xxh3_64"
BLOCK_BYTES = 4 << 20  # of data under one checksum: stays in cache between reading and hashing
MAX_HEAD = 4096  # bytes of the first line
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as in the safetensors library
_MAX_BYTES = 1 << 30  # of a manifest; 2000 tensors on 1000 ranks need a tenth of it
_MAX_DIMS = 64  # of a tensor, as in torch
_MAX_NUMEL = 1 << 62

# Of a file or directory: neither a path nor hidden.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_%-][A-Za-z0-9._%-]{0,254}")

# Types of values; int is a whole number in [0, 2**63), [T] a list of T, {str: T} a mapping to T.
_HEAD = {"id": str, "algorithm": str, "bytes": int}
_STATE = {"step": int, "num_updates": int, "averages": {str: {"schedule": dict}}}
_BOXES = {"offsets": [int], "sizes": [int], "files": [int], "starts": [int], "checksums": [str]}
_TENSOR = {"shape": [int], "dtype": str, "aliases": [str], "boxes": _BOXES}
_FILE = {"nbytes": int, "header_bytes": int, "checksum": str}
_SCHEMA = {
    "id": str,
    "algorithm": str,
    "block_bytes": int,
    "written": dict,
    "state": _STATE,
    "averages": {str: {"directory": str, "files": {str: _FILE}, "tensors": {str: _TENSOR}}},
}
_KINDS = {int: "whole number", str: "string", dict: "mapping"}


@dataclass(frozen=True, slots=True)
class SavedBox:
    """A box of a tensor, row-major, as a range of bytes of a file."""

    box: Box
    file: str  # in the directory of its average
    start: int
    nbytes: int
    checksums: tuple[str, ...]  # one for each block; none in plain safetensors files


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor and its boxes."""

    shape: Shape
    dtype: str  # safetensors name
    aliases: tuple[str, ...]
    boxes: tuple[SavedBox, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A shard file: a header, then boxes one after the other."""

    nbytes: int
    header_bytes: int
    checksum: str  # of the header


@dataclass(frozen=True)
class SavedAverage:
    """One average: its tensors, and the files that hold them."""

    directory: str  # relative to the manifest's directory; "" for the same
    files: Mapping[str, SavedFile]
    tensors: Mapping[str, SavedTensor]

    def path_of(self, file: str) -> str:
        """A file's path relative to the manifest's directory."""
        return f"{self.directory}/{file}" if self.directory else file

    def names(self) -> dict[str, str]:
        """The name of each tensor, by its name and by its aliases."""
        names = {alias: fqn for fqn, t in self.tensors.items() for alias in t.aliases}
        return names | {fqn: fqn for fqn in self.tensors}

    @cached_property
    def contents(self) -> Mapping[str, Sequence[tuple[str, SavedBox]]]:
        """The boxes of each file in the order of its bytes, with the names of their tensors."""
        contents: dict[str, list[tuple[str, SavedBox]]] = {name: [] for name in self.files}
        for fqn, tensor in self.tensors.items():
            for saved in tensor.boxes:
                contents[saved.file].append((fqn, saved))
        for boxes in contents.values():
            boxes.sort(key=lambda entry: (entry[1].start, entry[1].nbytes))
        return contents

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is known about a checkpoint before its data is read."""

    id: str  # of the save, 32 hexadecimal digits
    algorithm: str  # of the checksums; "" in plain safetensors files
    block_bytes: int
    written: Mapping[str, Any]  # world size and versions, for display
    state: Mapping[str, Any]  # counters and schedules
    averages: Mapping[str, SavedAverage]


def checksum(name: str) -> Callable[[bytes | memoryview], str]:
    """A checksum function by name, from bytes to hexadecimal digits."""
    if name == ALGORITHM:
        digest: Callable[[bytes | memoryview], str] = xxhash.xxh3_64_hexdigest
        return digest
    if name == "crc32":  # read only: earlier versions wrote it
        return lambda data: f"{zlib.crc32(data):08x}"
    raise CheckpointError(f"unknown checksum {name!r}; this version knows {ALGORITHM}, crc32")


def directory_of(name: str, names: Sequence[str]) -> str:
    """The directory of an average's files: the manifest's own if it is the only average."""
    if len(names) == 1:
        return ""
    quoted = quote(name, safe="").replace("~", "%7E")
    if quoted.startswith(".") or quoted == MANIFEST:
        quoted = quoted.replace(".", "%2E")
    if not _PLAIN_NAME.fullmatch(quoted):
        raise CheckpointError(f"average {name!r}: cannot name a directory; use a shorter name")
    return quoted


# Writing.


def dump(manifest: Manifest) -> bytes:
    """The contents of the manifest's file."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "id": manifest.id,
        "algorithm": manifest.algorithm,
        "block_bytes": manifest.block_bytes,
        "written": manifest.written,
        "state": manifest.state,
        "averages": {name: _columns(average) for name, average in manifest.averages.items()},
    }
    text = _json(body, depth=4).encode() + b"\n"  # a line for each file and tensor
    return head(manifest.id, manifest.algorithm, text) + text


def _columns(average: SavedAverage) -> dict[str, Any]:
    files = {name: asdict(file) for name, file in average.files.items()}
    numbers = {name: number for number, name in enumerate(files)}
    tensors = {
        fqn: {
            "shape": t.shape,
            "dtype": t.dtype,
            "aliases": t.aliases,
            "boxes": {
                "offsets": [offset for b in t.boxes for offset in b.box.offsets],
                "sizes": [size for b in t.boxes for size in b.box.sizes],
                "files": [numbers[b.file] for b in t.boxes],
                "starts": [b.start for b in t.boxes],
                "checksums": [value for b in t.boxes for value in b.checksums],
            },
        }
        for fqn, t in average.tensors.items()
    }
    return {"directory": average.directory, "files": files, "tensors": tensors}


def _json(value: object, depth: int = 0) -> str:
    """JSON in which the entries of mappings have a line each, down to a depth."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    lines = [f"{_json(key)}:{_json(each, depth - 1)}" for key, each in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def head(save_id: str, algorithm: str, body: bytes) -> bytes:
    """The first line of a manifest with this body."""
    line = {
        "format": FORMAT,
        "id": save_id,
        "algorithm": algorithm,
        "checksum": checksum(algorithm)(body),
        "bytes": len(body),
    }
    return _json(line).encode() + b"\n"


# Reading.


def read_head(start: bytes, nbytes: int) -> dict[str, Any]:
    """The first line of a manifest, with "head_bytes". Its checksum is not verified.

    Args:
        start: the first `MAX_HEAD` bytes of the file.
        nbytes: length of the file.

    Raises:
        CheckpointError: the file is not a manifest, or its first line states another length.
    """
    if nbytes > _MAX_BYTES:
        raise CheckpointError(f"is {nbytes} bytes long, more than any manifest")
    line, newline, _ = start.partition(b"\n")
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not newline or not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CheckpointError(
            "is not the manifest of a dist_ema checkpoint, or its start is altered"
        )
    check_types(fields, _HEAD, "the first line")
    head_bytes = len(line) + 1
    wanted = head_bytes + fields["bytes"]
    if nbytes != wanted:
        raise CheckpointError(f"is altered or cut short: {nbytes} bytes, {wanted} were written")
    return fields | {"head_bytes": head_bytes}


def parse(data: bytes) -> Manifest:
    """Check and read the contents of a manifest's file.

    The checksum shows damage; beyond that, types are checked, names must not be paths, and boxes
    must partition tensors and files, so that no other file and no other memory is touched.

    Raises:
        CheckpointError: it is cut short, altered, of another version, or inconsistent.
    """
    try:
        return _parse(data)
    except (RecursionError, MemoryError, ValueError, OverflowError) as error:
        raise CheckpointError(f"is not a manifest ({type(error).__name__})") from error


@collector_paused()
def _parse(data: bytes) -> Manifest:
    fields = read_head(data[:MAX_HEAD], len(data))
    save_id, algorithm, head_bytes = fields["id"], fields["algorithm"], fields["head_bytes"]
    body = data[head_bytes:]
    if head(save_id, algorithm, body) != data[:head_bytes]:
        raise CheckpointError("is altered or cut short: the checksum in its first line differs")
    top = json.loads(body)
    check_types(top, {"version": int}, "the manifest")
    if top["version"] != VERSION:
        raise CheckpointError(
            f"has format version {top['version']}, this library reads {VERSION}; "
            "use the version of dist_ema that wrote it"
        )
    check_types(top, _SCHEMA, "the manifest")
    if (top["id"], top["algorithm"]) != (save_id, algorithm):
        raise CheckpointError("has another id or algorithm in its first line than in its body")
    block_bytes = top["block_bytes"]
    if not 4096 <= block_bytes <= 64 << 20 or block_bytes % 16:
        raise CheckpointError(f"block_bytes is {block_bytes}")
    averages = {
        name: _average(value, f"average {short(name)}", block_bytes)
        for name, value in top["averages"].items()
    }
    if not averages:
        raise CheckpointError("has no averages")
    check_state(top["state"], averages)
    json.dumps([top["state"], top["written"]], allow_nan=False)  # raises ValueError
    return Manifest(save_id, algorithm, block_bytes, top["written"], top["state"], averages)


def _average(value: Mapping[str, Any], where: str, block_bytes: int) -> SavedAverage:
    check_file_names([*value["files"], *filter(None, [value["directory"]])], where)
    files = {
        name: SavedFile(**{key: entry[key] for key in _FILE})
        for name, entry in value["files"].items()
    }
    tensors = {}
    for fqn, entry in value["tensors"].items():
        label, shape = f"{where}, tensor {short(fqn)}", tuple(entry["shape"])
        itemsize = check_tensor(label, shape, entry["dtype"])
        boxes = _boxes(entry["boxes"], label, len(shape), itemsize, list(files), block_bytes)
        check_boxes(label, shape, [saved.box for saved in boxes])
        tensors[fqn] = SavedTensor(shape, entry["dtype"], tuple(entry["aliases"]), boxes)
    average = SavedAverage(value["directory"], files, tensors)
    check_contents(average)
    return average


def _boxes(
    columns: Mapping[str, Any],
    where: str,
    ndim: int,
    itemsize: int,
    files: Sequence[str],
    block_bytes: int,
) -> tuple[SavedBox, ...]:
    numbers, starts, checksums = columns["files"], columns["starts"], columns["checksums"]
    count = len(numbers)
    wanted = {"starts": count, "offsets": count * ndim, "sizes": count * ndim}
    if any(len(columns[key]) != n for key, n in wanted.items()) or any(
        number >= len(files) for number in numbers
    ):
        raise CheckpointError(f"{where}: columns of {count} boxes do not fit: {short(columns)}")
    corners, extents = (
        zip(*[iter(columns[key])] * ndim, strict=True) if ndim else repeat((), count)
        for key in ("offsets", "sizes")
    )
    first = 0  # index of the first checksum of the box
    boxes = []
    for number, start, offsets, sizes in zip(numbers, starts, corners, extents, strict=True):
        nbytes = math.prod(sizes) * itemsize
        last = first - (-nbytes // block_bytes)
        own = tuple(checksums[first:last])
        boxes.append(SavedBox(Box(offsets, sizes), files[number], start, nbytes, own))
        first = last
    if first != len(checksums):
        raise CheckpointError(f"{where}: {first} blocks with checksums {short(checksums)}")
    return tuple(boxes)


# Checks, also for files that no save wrote.


def check_tensor(where: str, shape: Shape, dtype: str | None) -> int:
    """Raise if there is no such tensor. Returns the bytes of an element."""
    if dtype not in ITEMSIZE:
        raise CheckpointError(f"{where}: unknown dtype {short(dtype)}")
    if len(shape) > _MAX_DIMS or math.prod(shape) > _MAX_NUMEL:
        raise CheckpointError(f"{where}: shape {short(shape)}")
    return ITEMSIZE[dtype]


def check_boxes(where: str, shape: Shape, boxes: Sequence[Box]) -> None:
    """Raise unless boxes partition a tensor of this shape."""
    for box in boxes:
        if any(o + s > n for o, s, n in zip(box.offsets, box.sizes, shape, strict=True)):
            raise CheckpointError(f"{where}: {box} is not within shape {shape}")
    if problem := uncovered(shape, boxes):
        raise CheckpointError(f"{where}: {problem}")


def check_contents(average: SavedAverage) -> None:
    """Raise unless header and boxes partition each file."""
    for name, contents in average.contents.items():
        file, end = average.files[name], average.files[name].header_bytes
        for fqn, saved in contents:
            if saved.start != end:
                kind = "overlaps" if saved.start < end else "leaves a gap after"
                raise CheckpointError(
                    f"{name}: {short(fqn)} at byte {saved.start} {kind} what ends at {end}"
                )
            end += saved.nbytes
        if end != file.nbytes or not 8 <= file.header_bytes <= MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{name}: has {file.nbytes} bytes with a header of {file.header_bytes}, of which "
                f"{end} are accounted for"
            )


def check_types(value: object, schema: Any, where: object) -> None:
    """Raise if a JSON value does not have the types of a schema; further keys are allowed."""
    is_list, kind = isinstance(schema, list), schema
    if isinstance(schema, list | dict):
        kind = schema[0] if is_list else dict
    values: Any = value if is_list else [value]
    is_valid = isinstance(values, list) and set(map(type, values)) <= {kind}
    if is_valid and values and kind is int:
        is_valid = 0 <= min(values) and max(values) < 1 << 63
    if not is_valid:
        wanted = f"a list of {_KINDS[kind]}s" if is_list else f"a {_KINDS[kind]}"
        raise CheckpointError(f"{where} is {short(value)}, wanted {wanted}")
    if isinstance(schema, dict) and isinstance(value, dict):
        for key, inner in zip(value, repeat(schema[str])) if str in schema else schema.items():
            check_types(value.get(key), inner, f"{where}, {short(key)}")


def check_state(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise unless the state has counters, and schedules of the averages with these names.

    {"step": int, "num_updates": int, "averages": {name: {"schedule": {...}, "decay": float|None}}},
    with further JSON beside these.
    """
    check_types(state, _STATE, "state")
    averages = state["averages"]
    if set(averages) != set(names):
        raise CheckpointError(f"state is of the averages {short(sorted(averages))}")
    for name, average in averages.items():
        decay = average.get("decay", "absent")
        if decay is not None and (type(decay) not in (int, float) or not 0 <= decay <= 1):
            raise CheckpointError(f"state: the decay of {short(name)} is {short(decay)}")


def check_file_names(names: Iterable[object], where: object) -> None:
    """Raise unless every name is a plain file name: neither a path nor hidden."""
    for name in names:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{where}: file {short(name)} is not a plain name")


def refuse_absent(names: Iterable[str], saved: Iterable[str]) -> None:
    """Raise if averages with these names are not among those that were saved."""
    saved = list(saved)
    absent = [name for name in names if name not in saved]
    if absent:
        raise CheckpointError(
            f"has no average named {', '.join(map(repr, absent))}; it has "
            f"{', '.join(map(repr, saved))}"
        )


def short(value: object) -> str:
    """A value's `repr` for a message, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
