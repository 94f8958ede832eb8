"""The manifest of a checkpoint: what was saved, where it lies, and what each byte must hash to.

[Note: checkpoint layout]
    NAME/manifest.json                            this file
    NAME/shard-00001-model-00001-of-00002.safetensors
    NAME/slow/shard-...                           several averages: a directory for each

A shard file is written by one rank, in the layout of torch's `HuggingFaceStorageWriter`: a box is
stored under the name of its tensor, row-major, and `__metadata__` has the boxes' offsets. A name is
unique within a file, so the j-th box of a tensor on a rank goes to part j of its files.

The manifest is two JSON texts: one line with the checksum of all that follows, then the body. It
has a column for each property of a tensor's boxes, since a thousand ranks have a million boxes:

    {"offsets": [0, 0, 8, 0], "sizes": [8, 5, 8, 5],    each box's numbers after the last one's
     "files": [0, 1], "starts": [96, 96],               of its file among `files`; of its first byte
     "checksums": ["8f1c...", "03ab..."]}               of its blocks, one box after the other

A box has a checksum for each block of `block_bytes`, so that a reader of a part hashes little more
than that part. Boxes cover each tensor, and with its header the bytes of each file, without hole or
overlap.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dist_ema.checkpoint.checksums import checksum
from dist_ema.checkpoint.directory import MANIFEST
from dist_ema.core.layout import Box, Shape

FORMAT, VERSION = "dist_ema", 2
FILE = MANIFEST
BLOCK_BYTES = 4 << 20  # of data under one checksum: stays in cache between reading and hashing
ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip

# Of a file or directory: never a path, never hidden.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_%-][A-Za-z0-9._%-]{0,254}")


class CheckpointError(Exception):
    """A checkpoint could not be written or read. The message names the file and the tensor."""


@dataclass(frozen=True, slots=True)
class SavedBox:
    """A box of a tensor, row-major, as a range of bytes of a file."""

    box: Box
    file: str  # in the directory of its average
    start: int
    nbytes: int
    checksums: tuple[str, ...]  # one for each block; none where nothing is known


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor and the boxes that it was cut into."""

    shape: Shape
    dtype: str  # as safetensors calls it
    aliases: tuple[str, ...]
    boxes: tuple[SavedBox, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file of shards: its header, then its boxes end to end."""

    nbytes: int
    header_bytes: int
    checksum: str  # of the header


@dataclass(frozen=True, slots=True)
class SavedAverage:
    """One average: its tensors, and the files that hold them."""

    directory: str  # below the manifest's; "" is that one
    files: Mapping[str, SavedFile]
    tensors: Mapping[str, SavedTensor]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is known about a checkpoint before its data is read."""

    id: str  # of the save, 32 hexadecimal digits
    algorithm: str  # of the checksums; "" where there are none
    block_bytes: int
    written: Mapping[str, Any]  # world_size and versions, to be shown
    state: Mapping[str, Any]  # counters and schedules
    averages: Mapping[str, SavedAverage]

    def blocks(self, saved: SavedBox) -> int:
        """How many checksums a box has."""
        return -(-saved.nbytes // self.block_bytes)


def directory_of(name: str, names: Sequence[str]) -> str:
    """Where an average's files go: the directory itself if it is the only one, else one below."""
    if len(names) == 1:
        return ""
    quoted = quote(name, safe="").replace("~", "%7E")
    if quoted.startswith(".") or quoted == FILE:
        quoted = quoted.replace(".", "%2E")
    if not PLAIN_NAME.fullmatch(quoted):
        raise CheckpointError(f"average {name!r}: cannot name a directory; use a shorter name")
    return quoted


def dump(manifest: Manifest) -> bytes:
    """The contents of a manifest's file."""
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
    """JSON with a line for each file and each tensor, so that it can be looked through."""
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
                "checksums": [found for b in t.boxes for found in b.checksums],
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
    """The first line of a manifest, the only one for this body."""
    found = checksum(algorithm)(body)
    line = {"format": FORMAT, "id": save_id, "algorithm": algorithm, "checksum": found}
    return _json(line | {"bytes": len(body)}).encode() + b"\n"


def read_id(start: bytes) -> str | None:
    """The id of the save that wrote the manifest whose first bytes these are, unchecked."""
    try:
        head = json.loads(start.split(b"\n", 1)[0])
        return str(head["id"])
    except (ValueError, LookupError, TypeError):
        return None


def is_head(path: Path) -> bool:
    """Whether a file begins as a manifest does."""
    with open(path, "rb") as file:
        start = file.read(64)
    return start.startswith(f'{{"format":{_json(FORMAT)}'.encode())
