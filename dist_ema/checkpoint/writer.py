"""Writes a checkpoint: each rank the boxes that it owns, rank 0 the manifest, last.

[Note: why not torch's own storage]
torch 2.13's `FileSystemWriter` pickles, and writes over the last checkpoint in place; its
`HuggingFaceStorageWriter` keeps one box of a tensor a rank, the last, and loses the others in
silence; neither checks what it reads. The files have the layout of the second, so that its reader
reads them.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dist_ema.checkpoint import checksums, collector, manifest
from dist_ema.checkpoint.background import Letters
from dist_ema.checkpoint.directory import (
    becomes_visible,
    clear_stale,
    is_ours,
    locked_sibling,
    put_in_place,
    release,
    remove,
    sync,
)
from dist_ema.checkpoint.manifest import (
    BLOCK_BYTES,
    CheckpointError,
    Manifest,
    SavedAverage,
    SavedBox,
    SavedFile,
    SavedTensor,
)
from dist_ema.checkpoint.shards import row_major
from dist_ema.core.layout import Box, Fragment, TensorMeta, uncovered, whole
from dist_ema.core.safetensors import DTYPES, TensorSpec, safetensors_header


@dataclass(frozen=True, slots=True)
class Orders:
    """What rank 0 tells every rank about a save."""

    directory: str
    letters: str  # a directory for letters between the ranks of a save in the background
    save_id: str
    algorithm: str


Report = list[dict[str, Any]]  # JSON: of each average, the files and boxes that a rank wrote


@dataclass(slots=True)
class Save:
    """A checkpoint on its way: begun and finished by rank 0, written by every rank.

    Memory: one block, and on rank 0 the manifest. Data on the CPU, row-major, is written from where
    it is.
    """

    path: Path
    averages: Mapping[str, Sequence[Fragment]]  # of this rank
    tensors: Sequence[TensorMeta]
    state: Mapping[str, Any]
    orders: Orders | None = None
    _written: list[Path] = field(default_factory=list)
    _locks: list[int] = field(default_factory=list)  # on rank 0, of the directories it made

    def begin(self, algorithm: str, *, with_letters: bool) -> None:
        """Make the directory to write to, and clear away what killed saves left. On rank 0."""
        refuse_foreign(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        clear_stale(self.path)
        directory = self._make("tmp")
        letters = self._make("mail") if with_letters else None
        self.orders = Orders(str(directory), str(letters or ""), uuid.uuid4().hex, algorithm)
        for name in self.averages:
            self._directory(name).mkdir(exist_ok=True)

    def check_seen(self) -> None:
        """Refuse directories that this rank does not see."""
        assert self.orders is not None
        wanted = [str(self._directory(name)) for name in self.averages]
        wanted += filter(None, [self.orders.letters])
        if not becomes_visible(lambda: all([os.path.isdir(each) for each in wanted])):
            raise CheckpointError(
                f"{self.path}: this rank does not see {self.orders.directory}, which rank 0 made; "
                "a checkpoint needs a directory that all ranks share"
            )

    def letters(self, rank: int, size: int, timeout: float) -> Letters:
        """Create what this rank needs to tell the others how it fared."""
        assert self.orders is not None
        box, written = Path(self.orders.letters), Path(self.orders.directory)
        return Letters(box, written, rank, size, timeout)

    def write(self, rank: int) -> Report:
        """Write this rank's files and wait until they are on disk."""
        return [self._write_average(name, parts, rank) for name, parts in self.averages.items()]

    def finish(self, reports: Sequence[Report]) -> None:
        """Write the manifest and let the checkpoint take its place. On rank 0."""
        assert self.orders is not None
        data = manifest.dump(self._manifest(reports))
        directory = Path(self.orders.directory)
        path = directory / manifest.FILE
        try:
            path.write_bytes(data)
            sync(path)
            for name in self.averages:
                sync(self._directory(name))
            refuse_foreign(self.path)
            put_in_place(directory, self.path)
        except OSError as error:
            raise CheckpointError(f"{error.filename or path}: {error.strerror}") from error
        self._unlock()

    def abandon(self) -> None:
        """Remove what was written. On rank 0, when no rank writes any more."""
        if self.orders is not None:
            for directory in filter(None, (self.orders.directory, self.orders.letters)):
                remove(Path(directory))
        self._unlock()

    def _unlock(self) -> None:
        while self._locks:
            release(self._locks.pop())

    def _make(self, kind: str) -> Path:
        directory, lock = locked_sibling(self.path, kind)
        self._locks.append(lock)
        return directory

    def is_in_place(self) -> bool:
        """Whether the checkpoint at the path is that of this save."""
        assert self.orders is not None
        try:
            with open(self.path / manifest.FILE, "rb") as file:
                return manifest.read_id(file.read(4096)) == self.orders.save_id
        except OSError:
            return False

    def remove_own(self) -> None:
        """Remove what this rank wrote: there may be no room left to say why."""
        for path in self._written:
            path.unlink(missing_ok=True)

    def _directory(self, name: str) -> Path:
        assert self.orders is not None
        return Path(self.orders.directory) / manifest.directory_of(name, list(self.averages))

    def _write_average(self, name: str, parts: Sequence[Fragment], rank: int) -> dict[str, Any]:
        number = {info.fqn: i for i, info in enumerate(self.tensors)}
        boxes = [(number[p.meta.fqn], p.meta.box, p.tensor) for p in parts if p.is_owner]
        boxes = [entry for entry in boxes if entry[1].numel]
        if rank == 0:  # every rank holds all of a tensor without elements
            empty = [(i, t) for i, t in enumerate(self.tensors) if 0 in t.shape]
            boxes += [(i, whole(t.shape), torch.empty(t.shape, dtype=t.dtype)) for i, t in empty]
        boxes.sort(key=lambda entry: entry[0])
        files: list[list[tuple[int, Box, torch.Tensor]]] = []
        nth = 0
        for at, entry in enumerate(boxes):  # a name is unique in a file
            nth = nth + 1 if at and boxes[at - 1][0] == entry[0] else 0
            if nth == len(files):
                files.append([])
            files[nth].append(entry)
        told: dict[str, Any] = {"files": [], "boxes": []}
        for nth, entries in enumerate(files):
            shard = f"shard-{rank + 1:05d}-model-{nth + 1:05d}-of-{len(files):05d}.safetensors"
            path = self._directory(name) / shard
            specs = [
                TensorSpec(self.tensors[i].fqn, box.sizes, tensor.dtype)
                for i, box, tensor in entries
            ]
            offsets = {
                self.tensors[i].fqn: {"saved_offsets": list(box.offsets)} for i, box, _ in entries
            }
            metadata = {"format": "pt", "DCP_VERSION": "1.0"}
            header = safetensors_header(
                specs, metadata | {"DCP_SHARDING_INFO": json.dumps(offsets)}
            )
            sums, digest = self._write_file(
                path, header, [(s.name, e[2]) for s, e in zip(specs, entries, strict=True)]
            )
            start = len(header)
            for (i, box, _), spec, found in zip(entries, specs, sums, strict=True):
                told["boxes"].append([i, box.offsets, box.sizes, nth, start, found])
                start += spec.nbytes
            told["files"].append([shard, start, len(header), digest])
        return told

    def _write_file(
        self, path: Path, header: bytes, tensors: Sequence[tuple[str, torch.Tensor]]
    ) -> tuple[list[list[str]], str]:
        """Write a file. Returns the checksums of each tensor's blocks, and that of the header."""
        assert self.orders is not None
        digest = checksums.checksum(self.orders.algorithm)
        sums: list[list[str]] = []
        doing = "its header"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._written.append(path)
            try:
                _write_all(fd, memoryview(header))
                for fqn, tensor in tensors:
                    doing = f"tensor {fqn}"
                    sums.append([])
                    for block in row_major(tensor.detach()):
                        sums[-1].append(digest(block))
                        _write_all(fd, block)
                doing = "all of it to disk"
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror} (writing {doing})") from error
        return sums, digest(header)

    @collector.paused()
    def _manifest(self, reports: Sequence[Report]) -> Manifest:
        """Put together what all ranks report; refuse boxes that do not make up the tensors."""
        assert self.orders is not None
        averages = {}
        for name, told in zip(self.averages, zip(*reports, strict=True), strict=True):
            files: dict[str, SavedFile] = {}
            boxes: list[list[SavedBox]] = [[] for _ in self.tensors]
            for of_rank in told:
                shards = [shard for shard, *_ in of_rank["files"]]
                files |= {shard: SavedFile(*rest) for shard, *rest in of_rank["files"]}
                for i, offsets, sizes, nth, start, found in of_rank["boxes"]:
                    box = Box(tuple(offsets), tuple(sizes))
                    nbytes = box.numel * self.tensors[i].dtype.itemsize
                    boxes[i].append(SavedBox(box, shards[nth], start, nbytes, tuple(found)))
            for info, saved in zip(self.tensors, boxes, strict=True):
                problem = uncovered(info.shape, [s.box for s in saved])
                if problem:
                    raise CheckpointError(
                        f"{info.fqn}: {problem}; the process group does not hold the whole model "
                        "(pass process_group=)"
                    )
            averages[name] = SavedAverage(
                manifest.directory_of(name, list(self.averages)),
                files,
                {
                    t.fqn: SavedTensor(t.shape, DTYPES[t.dtype], t.aliases, tuple(saved))
                    for t, saved in zip(self.tensors, boxes, strict=True)
                },
            )
        orders = self.orders
        return Manifest(
            orders.save_id,
            orders.algorithm,
            BLOCK_BYTES,
            written_by(len(reports)),
            self.state,
            averages,
        )


def written_by(world_size: int) -> dict[str, Any]:
    """What a manifest says of its writer."""
    return {
        "world_size": world_size,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dist_ema": _version(),
        "torch": torch.__version__,
    }


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def refuse_foreign(path: Path) -> None:
    """Refuse to replace anything but an empty directory or a checkpoint without files of others."""
    while True:
        before = _inode(path)
        try:
            problem = _foreign(path)
        except FileNotFoundError:  # another process is replacing it
            continue
        if problem is None:
            return
        if _inode(path) == before:  # it is not another job's that was replaced meanwhile
            raise CheckpointError(f"{path}: {problem}")


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _foreign(path: Path) -> str | None:
    """Why a path must not be replaced, or None."""
    if not path.exists():
        return None
    if not path.is_dir():
        return "exists and is no directory"
    entries = sorted(entry.name for entry in path.iterdir())
    if entries and manifest.FILE not in entries:
        return (
            f"exists and is no checkpoint (it holds {', '.join(entries[:5])}); "
            "remove it or save to another path"
        )
    if entries and not manifest.is_head(path / manifest.FILE):
        return (
            f"exists and is no checkpoint of dist_ema ({manifest.FILE} is of another kind or "
            "damaged); remove it or save to another path"
        )
    foreign = [entry for entry in entries if not is_ours(path / entry)]
    if foreign:
        return (
            f"holds files that are not part of the checkpoint ({', '.join(foreign[:5])}); "
            "move them away or save to another path"
        )
    return None


def _version() -> str:
    try:
        return version("dist-ema")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
