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

import gc
import json
import math
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any
from urllib.parse import quote

import xxhash

from dist_ema.checkpoint.directory import MANIFEST
from dist_ema.core.errors import CheckpointError
from dist_ema.core.layout import Box, Shape, uncovered
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
PLAIN_NAME = re.compile(r"[A-Za-z0-9_%-][A-Za-z0-9._%-]{0,254}")

# Types of values; int is a whole number in [0, 2**63), [T] a list of T, {str: T} a mapping to T.
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


@dataclass(frozen=True, slots=True)
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
    if not PLAIN_NAME.fullmatch(quoted):
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
    }
    lines = [f'"{key}": {_json(value)}' for key, value in body.items()]
    lines.append(f'"averages": {{{", ".join(map(_dump_average, manifest.averages.items()))}}}')
    text = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    return head(manifest.id, manifest.algorithm, text) + text


def _dump_average(item: tuple[str, SavedAverage]) -> str:
    """JSON with one line for each file and each tensor, for human readers."""
    name, average = item
    files = {
        file: {"nbytes": f.nbytes, "header_bytes": f.header_bytes, "checksum": f.checksum}
        for file, f in average.files.items()
    }
    numbers = {file: number for number, file in enumerate(files)}
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

    def lines(entries: Mapping[str, object]) -> str:
        return ",\n".join(f"{_json(key)}: {_json(value)}" for key, value in entries.items())

    return (
        f'{_json(name)}: {{"directory": {_json(average.directory)},\n"files": {{\n{lines(files)}\n'
        f'}},\n"tensors": {{\n{lines(tensors)}\n}}}}'
    )


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


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


def read_head(start: bytes) -> dict[str, Any] | None:
    """The first line of a manifest, not verified; None if the file is no manifest.

    Args:
        start: the first `MAX_HEAD` bytes of the file.
    """
    line, newline, _ = start.partition(b"\n")
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_head = bool(newline) and isinstance(fields, dict) and fields.get("format") == FORMAT
    return fields | {"head_bytes": len(line) + 1} if is_head else None


def check_size(start: bytes, nbytes: int) -> None:
    """Raise if a manifest has not the length that its first line states, before it is read."""
    if nbytes > _MAX_BYTES:
        raise CheckpointError(f"is {nbytes} bytes long, more than any manifest")
    fields = read_head(start)
    if fields is None or type(fields.get("bytes")) is not int:
        raise CheckpointError(
            "is not the manifest of a dist_ema checkpoint, or its start is altered"
        )
    wanted = fields["head_bytes"] + fields["bytes"]
    if nbytes != wanted:
        raise CheckpointError(f"is altered or cut short: {nbytes} bytes, {wanted} were written")


def parse(data: bytes) -> Manifest:
    """Check and read the contents of a manifest's file.

    Its contents are not trusted: names must not be paths, and boxes must partition tensors and
    files.

    Raises:
        CheckpointError: it is cut short, altered, of another version, or inconsistent.
    """
    try:
        with collector_paused():
            return _parse(data)
    except (RecursionError, MemoryError, ValueError, OverflowError) as error:
        raise CheckpointError(f"is not a manifest ({type(error).__name__})") from error


def _parse(data: bytes) -> Manifest:
    fields = read_head(data[:MAX_HEAD])
    if fields is None:
        raise CheckpointError(
            "is not the manifest of a dist_ema checkpoint, or its start is altered"
        )
    body = data[fields["head_bytes"] :]
    save_id, algorithm = fields.get("id"), fields.get("algorithm")
    if not isinstance(save_id, str) or not isinstance(algorithm, str):
        raise CheckpointError("the id or algorithm in its first line is not a string")
    if head(save_id, algorithm, body) != data[: fields["head_bytes"]]:
        raise CheckpointError("is altered or cut short: the checksum in its first line differs")
    top = json.loads(body)
    if not isinstance(top, dict) or top.get("format") != FORMAT:
        raise CheckpointError("is not the manifest of a dist_ema checkpoint")
    if top.get("version") != VERSION:
        raise CheckpointError(
            f"has format version {short(top.get('version'))}, this library reads {VERSION}; "
            "use the version of dist_ema that wrote it"
        )
    _check(top, _SCHEMA, "")
    if (top["id"], top["algorithm"]) != (save_id, algorithm):
        raise CheckpointError("has another id or algorithm in its first line than in its body")
    if not re.fullmatch(r"[0-9a-f]{32}", save_id):
        raise CheckpointError(f"has the id {short(save_id)}")
    block_bytes = top["block_bytes"]
    if not 4096 <= block_bytes <= 64 << 20 or block_bytes % 16:
        raise CheckpointError(f"block_bytes is {block_bytes}")
    averages = {
        name: _average(value, f"average {short(name)}", block_bytes)
        for name, value in top["averages"].items()
    }
    directories = [average.directory for average in averages.values()]
    if not averages or len(set(directories)) != len(directories):
        raise CheckpointError(f"averages are in the directories {short(directories)}")
    check_state(top["state"], averages)
    return Manifest(save_id, algorithm, block_bytes, top["written"], top["state"], averages)


def _check(value: object, schema: Any, where: str) -> None:
    """Raise if a JSON value does not have the types of a schema; further keys are allowed."""
    if isinstance(schema, list):
        (kind,) = schema
        is_valid = isinstance(value, list) and not set(map(type, value)) - {kind}
        if is_valid and value and kind is int:
            is_valid = min(value) >= 0 and max(value) < 1 << 63  # type: ignore[call-overload]
        wanted = "a list of whole numbers" if kind is int else "a list of strings"
    elif schema is int:
        is_valid, wanted = type(value) is int and 0 <= value < 1 << 63, "a whole number"
    elif schema is str:
        is_valid, wanted = isinstance(value, str), "a string"
    else:
        is_valid, wanted = isinstance(value, dict), "a mapping"
    if not is_valid:
        raise CheckpointError(f"{where} is {short(value)}, wanted {wanted}")
    if isinstance(schema, dict):
        assert isinstance(value, dict)
        keys = zip(value, repeat(schema[str])) if str in schema else schema.items()
        for key, inner in keys:
            _check(value.get(key), inner, f"{where}, {short(key)}" if where else short(key))


def check_state(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise if counters and schedules are not those of averages with these names.

    {"step": int, "num_updates": int, "averages": {name: {"schedule": {...}, "decay": float|None}}},
    with further JSON beside these.
    """
    _check(state, _STATE, "state")
    averages = state["averages"]
    if set(averages) != set(names):
        raise CheckpointError(f"state is of the averages {short(sorted(averages))}")
    for name, average in averages.items():
        decay = average.get("decay", "absent")
        if decay is not None and (type(decay) not in (int, float) or not 0 <= decay <= 1):
            raise CheckpointError(f"state: the decay of {short(name)} is {short(decay)}")


def _average(value: Mapping[str, Any], where: str, block_bytes: int) -> SavedAverage:
    for name in (*value["files"], *filter(None, [value["directory"]])):
        if not PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{where}: {short(name)} is not a plain name")
    files = {name: SavedFile(**_only(entry, _FILE)) for name, entry in value["files"].items()}
    for name, file in files.items():
        if not 8 <= file.header_bytes <= min(file.nbytes, MAX_HEADER_BYTES):
            raise CheckpointError(f"{name}: a header of {file.header_bytes} bytes in {file.nbytes}")
    numbered = list(files.items())
    tensors = {}
    ranges: dict[str, list[tuple[int, int, str]]] = {name: [] for name in files}
    for fqn, entry in value["tensors"].items():
        label = f"{where}, tensor {short(fqn)}"
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        if dtype not in ITEMSIZE:
            raise CheckpointError(f"{label}: unknown dtype {short(dtype)}")
        if len(shape) > _MAX_DIMS or math.prod(shape) > _MAX_NUMEL:
            raise CheckpointError(f"{label}: shape {short(shape)}")
        boxes = _boxes(entry["boxes"], label, shape, ITEMSIZE[dtype], numbered, block_bytes)
        problem = uncovered(shape, [saved.box for saved in boxes])
        if problem:
            raise CheckpointError(f"{label}: {problem}")
        tensors[fqn] = SavedTensor(shape, dtype, tuple(entry["aliases"]), boxes)
        for saved in boxes:
            ranges[saved.file].append((saved.start, saved.nbytes, fqn))
    for name, file in files.items():
        _check_partition(name, ranges[name], file)
    return SavedAverage(value["directory"], files, tensors)


def _only(entry: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: entry[key] for key in keys}


def _boxes(
    columns: Mapping[str, Any],
    where: str,
    shape: Shape,
    itemsize: int,
    files: Sequence[tuple[str, SavedFile]],
    block_bytes: int,
) -> tuple[SavedBox, ...]:
    numbers, starts, checksums = columns["files"], columns["starts"], columns["checksums"]
    count, ndim = len(numbers), len(shape)
    for key, length in (("starts", count), ("offsets", count * ndim), ("sizes", count * ndim)):
        if len(columns[key]) != length:
            raise CheckpointError(f"{where}: {key} of {count} boxes are {short(columns[key])}")
    offsets, sizes = (_rows(columns[key], count, ndim) for key in ("offsets", "sizes"))
    first = 0  # checksum of the box
    boxes = []
    for number, start, corner, extent in zip(numbers, starts, offsets, sizes, strict=True):
        if any(o + s > n for o, s, n in zip(corner, extent, shape, strict=True)):
            raise CheckpointError(f"{where}: a box at {corner} of sizes {extent} in shape {shape}")
        if number >= len(files):
            raise CheckpointError(f"{where}: a box is in file {number} of {len(files)}")
        (name, file), nbytes = files[number], math.prod(extent) * itemsize
        if start + nbytes > file.nbytes:
            raise CheckpointError(f"{where}: bytes {start} to {start + nbytes} are not in {name}")
        last = first - (-nbytes // block_bytes)
        box = Box(corner, extent)
        boxes.append(SavedBox(box, name, start, nbytes, tuple(checksums[first:last])))
        first = last
    if first != len(checksums):
        raise CheckpointError(f"{where}: {first} blocks with checksums {short(checksums)}")
    return tuple(boxes)


def _rows(column: Sequence[int], count: int, width: int) -> Iterable[Shape]:
    """`count` tuples of `width` numbers."""
    return zip(*[iter(column)] * width, strict=True) if width else repeat((), count)


def _check_partition(name: str, ranges: list[tuple[int, int, str]], file: SavedFile) -> None:
    """Raise if ranges (start, length, tensor) overlap or leave gaps in a file."""
    end, previous = file.header_bytes, "the header"
    for start, length, fqn in sorted(ranges):
        if start != end:
            kind = "overlaps" if start < end else "leaves a gap after"
            raise CheckpointError(f"{name}: {short(fqn)} at byte {start} {kind} {short(previous)}")
        end, previous = start + length, fqn
    if end != file.nbytes:
        raise CheckpointError(f"{name}: has {file.nbytes} bytes, of which {end} are accounted for")


def short(value: object) -> str:
    """A value's `repr` for a message, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


@contextmanager
def collector_paused() -> Iterator[None]:
    """Disable Python's garbage collector, in the main thread.

    It scans all objects whenever a quarter more exist, which takes three quarters of the time to
    read the manifest of a thousand ranks.
    """
    pauses = threading.current_thread() is threading.main_thread() and gc.isenabled()
    if pauses:
        gc.disable()
    try:
        yield
    finally:
        if pauses:
            gc.enable()
