"""Writes a checkpoint: each rank the boxes that it owns, rank 0 the manifest, last.

[Note: why not torch's own storage]
torch 2.13's `FileSystemWriter` pickles, and writes over the last checkpoint in place; its
`HuggingFaceStorageWriter` keeps one box of a tensor a rank, the last, and loses the others in
silence; neither checks what it reads. `ShardWriter` keeps their interface, so that the planning is
torch's, and the layout of the second, so that its reader reads these files.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dist_ema.checkpoint import checksums, collector, manifest
from dist_ema.checkpoint.boxed import TensorInfo
from dist_ema.checkpoint.manifest import (
    BLOCK_BYTES,
    CheckpointError,
    Manifest,
    SavedAverage,
    SavedBox,
    SavedFile,
    SavedTensor,
)
from dist_ema.checkpoint.planners import box_of, key_of, split_key
from dist_ema.checkpoint.shards import SHARD, Shard, lay_out, nbytes_of, row_major
from dist_ema.export.format import DTYPES
from dist_ema.files import becomes_visible, clear_stale, put_in_place, sibling, sync


@dataclasses.dataclass(frozen=True, slots=True)
class Orders:
    """What rank 0 tells a rank about a save."""

    directory: str
    letters: str  # a directory for letters between the ranks of a save in the background
    save_id: str
    algorithm: str
    rank: int


class ShardWriter(StorageWriter):
    """Writes a checkpoint beside its path and puts it there when all ranks have written.

    Memory: one block, and on rank 0 the manifest. Data on the CPU, row-major, is written from where
    it is.
    """

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        tensors: Sequence[TensorInfo],
        state: Mapping[str, Any],
        *,
        asynchronous: bool,
    ) -> None:
        self.path = path
        self.directory: Path | None = None  # being written
        self._names = list(names)
        self._tensors = tensors
        self._state = state
        self._asynchronous = asynchronous
        self._letters: Path | None = None
        self._plans: list[SavePlan] = []
        self._written: list[Path] = []

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        fast = checksums.is_available(checksums.FAST)
        return dataclasses.replace(plan, storage_data=fast)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the directory to write to, and clear away what killed saves left. On rank 0."""
        fast = all(plan.storage_data for plan in plans)
        algorithm = checksums.FAST if fast else checksums.ALWAYS
        refuse_foreign(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        clear_stale(self.path)
        self.directory = sibling(self.path, "tmp")
        self.directory.mkdir()
        for name in self._names:
            (self.directory / self._subdirectory(name)).mkdir(exist_ok=True)
        letters = ""
        if self._asynchronous and len(plans) > 1:
            self._letters = sibling(self.path, "mail")
            self._letters.mkdir()
            letters = str(self._letters)
        directory, save_id = str(self.directory), uuid.uuid4().hex
        self._plans = [
            dataclasses.replace(
                plan, storage_data=Orders(directory, letters, save_id, algorithm, rank)
            )
            for rank, plan in enumerate(plans)
        ]
        return self._plans

    def check_seen(self, orders: Orders) -> None:
        """Refuse directories that this rank does not see."""
        wanted = [os.path.join(orders.directory, self._subdirectory(name)) for name in self._names]
        wanted += [orders.letters] * bool(orders.letters)
        if not becomes_visible(lambda: all([os.path.isdir(each) for each in wanted])):
            raise CheckpointError(
                f"{self.path}: this rank does not see {orders.directory}, which rank 0 made; "
                "a checkpoint needs a directory that all ranks share"
            )

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files and wait until they are on disk."""
        orders: Orders = plan.storage_data
        self.directory = Path(orders.directory)
        sums: list[tuple[str, ...]] = [()] * len(plan.items)
        for shard in lay_out(plan, orders.rank):
            self._write(shard, planner, orders, sums)
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                WriteResult(item.index, nbytes_of(item), found)
                for item, found in zip(plan.items, sums, strict=True)
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and let the checkpoint take its place. On rank 0."""
        assert self.directory is not None
        orders: Orders = self._plans[0].storage_data
        data = manifest.dump(self._manifest(orders, results))
        path = self.directory / manifest.FILE
        try:
            path.write_bytes(data)
            sync(path)
            for name in self._names:
                sync(self.directory / self._subdirectory(name))
            put_in_place(
                self.directory, self.path, keep=lambda entry: not is_ours(self.path / entry)
            )
        except OSError as error:
            raise CheckpointError(f"{error.filename or path}: {error.strerror}") from error

    def abandon(self) -> None:
        """Remove what was written. On rank 0, when no rank writes any more."""
        for directory in (self.directory, self._letters):
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)

    def is_in_place(self, orders: Orders) -> bool:
        """Whether the checkpoint at the path is that of this save."""
        try:
            with open(self.path / manifest.FILE, "rb") as file:
                return manifest.read_id(file.read(4096)) == orders.save_id
        except OSError:
            return False

    def remove_own(self) -> None:
        """Remove what this rank wrote: there may be no room left to say why."""
        for path in self._written:
            path.unlink(missing_ok=True)

    def _subdirectory(self, name: str) -> str:
        return manifest.directory_of(name, self._names)

    def _write(
        self, shard: Shard, planner: SavePlanner, orders: Orders, sums: list[tuple[str, ...]]
    ) -> None:
        assert self.directory is not None
        path = self.directory / self._subdirectory(self._names[shard.number]) / shard.name
        digest = checksums.checksum(orders.algorithm)
        doing = "its header"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._written.append(path)
            try:
                _write_all(fd, memoryview(shard.header))
                for position, item in shard.items:
                    doing = f"tensor {split_key(item.index.fqn)[1]}"
                    tensor = planner.resolve_data(item)
                    assert isinstance(tensor, torch.Tensor)
                    found = []
                    for block in row_major(tensor.detach()):
                        found.append(digest(block))
                        _write_all(fd, block)
                    sums[position] = tuple(found)
                doing = "all of it to disk"
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror} (writing {doing})") from error

    @collector.paused()
    def _manifest(self, orders: Orders, results: list[list[WriteResult]]) -> Manifest:
        digest = checksums.checksum(orders.algorithm)
        files: list[dict[str, SavedFile]] = [{} for _ in self._names]
        boxes: dict[str, list[SavedBox]] = {}
        for rank, (plan, written) in enumerate(zip(self._plans, results, strict=True)):
            for shard in lay_out(plan, rank):
                end = len(shard.header)
                for position, item in shard.items:
                    start, end = end, end + nbytes_of(item)
                    assert item.tensor_data is not None
                    boxes.setdefault(item.index.fqn, []).append(
                        SavedBox(
                            box_of(item.tensor_data.chunk),
                            shard.name,
                            start,
                            end - start,
                            written[position].storage_data,
                        )
                    )
                files[shard.number][shard.name] = SavedFile(
                    end, len(shard.header), digest(shard.header)
                )
        averages = {
            name: SavedAverage(
                self._subdirectory(name),
                files[number],
                {
                    t.fqn: SavedTensor(
                        t.shape, DTYPES[t.dtype], t.aliases, tuple(boxes[key_of(number, t.fqn)])
                    )
                    for t in self._tensors
                },
            )
            for number, name in enumerate(self._names)
        }
        return Manifest(
            orders.save_id,
            orders.algorithm,
            BLOCK_BYTES,
            written_by(len(self._plans)),
            self._state,
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
    """Replace a checkpoint or an empty directory, nothing else."""
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: exists and is no directory")
    entries = sorted(entry.name for entry in path.iterdir())
    if entries and manifest.FILE not in entries:
        raise CheckpointError(
            f"{path}: exists and is no checkpoint (it holds {', '.join(entries[:5])}); "
            "remove it or save to another path"
        )


def is_ours(path: Path) -> bool:
    """Whether an entry of a checkpoint goes with it when it is replaced."""
    if path.is_dir() and not path.is_symlink():
        names = [entry.name for entry in path.iterdir()]
        return bool(names) and all(map(SHARD.fullmatch, names))
    return path.name == manifest.FILE or SHARD.fullmatch(path.name) is not None


def _version() -> str:
    try:
        return version("dist-ema")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
