"""Saves a checkpoint: each rank writes the boxes that it owns, then rank 0 the manifest.

[Note: why not torch's own storage]
torch's `FileSystemWriter` pickles, and overwrites the last checkpoint in place; its
`HuggingFaceStorageWriter` keeps only the last box of a tensor on each rank, without an error;
neither has checksums. The files here have the layout of the second, so its reader reads them.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dist_ema.checkpoint import manifest
from dist_ema.checkpoint.background import TIMEOUT_S, BackgroundSaves, Handle, StatusFiles
from dist_ema.checkpoint.directory import (
    MANIFEST,
    becomes_visible,
    clear_stale,
    locked_sibling,
    put_in_place,
    refuse_foreign,
    refuse_working_directory,
    release,
    remove,
    sync,
    target,
)
from dist_ema.checkpoint.manifest import (
    ALGORITHM,
    BLOCK_BYTES,
    Manifest,
    SavedAverage,
    SavedBox,
    SavedFile,
    SavedTensor,
    checksum,
)
from dist_ema.core.accelerator import is_accelerator
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group, describe, merge_errors
from dist_ema.core.layout import Box, Fragment, TensorMeta, flat_boxes, uncovered, whole
from dist_ema.core.safetensors import dtype_name, header_of

Averages = Mapping[str, Sequence[Fragment]]
Report = list[dict[str, Any]]  # JSON: for each average, the files and boxes that a rank wrote

_FINITE_CHUNK = {"cpu": 1 << 18}  # elements: stays in cache between copying and checking
_FINITE_CHUNK_ELSEWHERE = 1 << 24  # fewer waits for the device
_ALIGNMENT = 16


def save(
    path: str | Path,
    averages: Averages,
    tensors: Sequence[TensorMeta],
    state: Mapping[str, Any],
    group: Group,
    *,
    asynchronous: bool = False,
    timeout: float = TIMEOUT_S,
    background: BackgroundSaves | None = None,
) -> Handle | None:
    """Write averages to a directory that all ranks share. Collective: every rank calls it.

    A checkpoint at `path` is replaced atomically; a directory with other files is refused. Memory:
    one block; on rank 0, the manifest. Four small exchanges and one gather of the reports.

    Args:
        averages: this rank's fragments of each average, by name, in the same order on every rank.
        tensors: averaged tensors that this rank knows. Ranks that hold different parts of a model
            (pipeline stages) may know different tensors: the checkpoint holds all of them.
        state: JSON; see `manifest.check_state`.
        asynchronous: return after one copy of the local values, and write on a thread that uses no
            process group (see [Note: status files]). A save or load that follows waits for it.
        timeout: seconds without progress until an asynchronous save gives up a rank.
        background: keeps the memory of that copy for the next save.

    Raises:
        CheckpointError: an average holds NaN or Inf (the tensors are named); a rank cannot write or
            does not see the directory; there is no checkpoint of dist_ema at `path`. On every rank,
            and what was at `path` is unchanged.
    """
    background = background or BackgroundSaves()
    place = target(Path(path))
    values = {"argument path": str(place), "the averages": str(list(averages))}
    with group.together("save()", values, error=CheckpointError):
        background.wait()
        _check(averages, tensors, state)
        state = json.loads(json.dumps(state))  # the caller may change it before it is written
        refuse_working_directory(place)
    tensors = tensors_of_all_ranks(tensors, group)
    with group.together(error=CheckpointError):
        if asynchronous:
            averages, non_finite = _copied(averages, background)
        else:
            non_finite = non_finite_names(averages)
    refuse_non_finite(non_finite, group)
    work = _Save(place, averages, tensors, state)
    status: StatusFiles | None = None
    try:
        with group.together(error=CheckpointError):
            if group.rank == 0:
                work.begin(with_status=asynchronous and group.size > 1)
        work.orders = group.broadcast(work.orders)
        with group.together(error=CheckpointError):
            work.check_visible()
        if asynchronous:
            if group.size > 1:
                with group.together(error=CheckpointError):
                    status = work.status_files(group.rank, group.size, timeout)
                with group.together(error=CheckpointError):
                    status.meet()
            rank = group.rank
            return background.start(place, lambda: _write_apart(work, rank, status))
        with group.together(error=CheckpointError):
            report = work.write(group.rank)
        reports = group.gather(report)
        with group.together(error=CheckpointError):
            if group.rank == 0:
                work.finish(reports)
    except BaseException:
        if status is not None:
            status.close()
        if group.rank == 0:
            work.abandon()
        raise
    return None


def tensors_of_all_ranks(tensors: Sequence[TensorMeta], group: Group) -> Sequence[TensorMeta]:
    """The tensors of all ranks, which differ if ranks hold different parts of one model.

    Collective: every rank calls it. An all-reduce of two integers if all ranks have the same.

    Raises:
        CheckpointError: a name has another shape, dtype or aliases on another rank.
    """
    if group.equal(tensors):
        return tensors
    first: dict[str, tuple[int, TensorMeta]] = {}
    problems: dict[str, str] = {}
    for rank, metas in enumerate(group.all_gather(list(tensors))):
        for meta in metas:
            other, known = first.setdefault(meta.fqn, (rank, meta))
            if meta != known:
                text = f"{_describe(known)} on rank {other} and {_describe(meta)} on rank {rank}"
                problems.setdefault(meta.fqn, f"{meta.fqn} is {text}")
    if problems:
        raise CheckpointError(
            f"ranks have different tensors of one name: {'; '.join(list(problems.values())[:8])}; "
            "parts of one model need distinct names, and ranks that hold different models a "
            "process group each (process_group=)"
        )
    return [meta for _, meta in first.values()]


def _describe(meta: TensorMeta) -> str:
    aliases = f" with the aliases {', '.join(meta.aliases)}" if meta.aliases else ""
    return f"{meta.dtype} of shape {meta.shape}{aliases}"


def _check(averages: Averages, tensors: Sequence[TensorMeta], state: Mapping[str, Any]) -> None:
    unknown = [f"{t.fqn} ({t.dtype})" for t in tensors if dtype_name(t.dtype) is None]
    if unknown:
        raise CheckpointError(f"safetensors has no dtype for {', '.join(unknown)}")
    if any(t.fqn == "__metadata__" for t in tensors):
        raise CheckpointError("safetensors does not allow a tensor named __metadata__")
    json.dumps(state, allow_nan=False)
    manifest.check_state(state, averages)
    for name in averages:
        manifest.directory_of(name, list(averages))


# Finite values.


def refuse_non_finite(names: set[str], group: Group) -> None:
    """Raise CheckpointError on every rank if any has names of non-finite tensors. Collective."""
    if group.any(bool(names)):
        every = sorted(set().union(*group.all_gather(names)))
        raise CheckpointError(
            f"the average holds NaN or Inf in {', '.join(every)}; nothing is written"
        )


def non_finite_names(averages: Averages) -> set[str]:
    """Names of the tensors that hold NaN or Inf in what this rank owns. Local."""
    return {
        fragment.meta.fqn
        for fragment in _owned(averages)
        if not all(map(_is_finite, fragment.view.split(_chunk_of(fragment))))
    }


def _copied(averages: Averages, background: BackgroundSaves) -> tuple[Averages, set[str]]:
    """Copies on the CPU of what this rank owns, and the names that `non_finite_names` has. Local.

    The copies are in the memory of the last such call.
    """
    non_finite = set()
    owned = list(_owned(averages))
    needed = sum(_aligned(fragment.view.nbytes) for fragment in owned)
    pinned = any(is_accelerator(fragment.view.device) for fragment in owned)
    staging = background.staging(needed, pinned)
    copies: dict[str, list[Fragment]] = {}
    end = 0
    for name, fragments in averages.items():
        copies[name] = []
        for fragment in _owned({name: fragments}):
            values = fragment.view.detach()
            copy = staging[end : end + values.nbytes].view(values.dtype)
            end += _aligned(values.nbytes)
            step = _chunk_of(fragment)
            for out, chunk in zip(copy.split(step), values.split(step), strict=True):
                out.copy_(chunk)
                if not _is_finite(out):
                    non_finite.add(fragment.meta.fqn)
            copies[name].append(Fragment(fragment.meta, copy))
    return copies, non_finite


def _owned(averages: Averages) -> Iterator[Fragment]:
    return (f for fragments in averages.values() for f in fragments if f.is_owner)


def _is_finite(values: torch.Tensor) -> bool:
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.is_floating_point():
        return True
    # A sum is finite only if all its terms are. A sum that is not finite may have overflowed.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return math.isfinite(total.item()) or bool(values.isfinite().all())


def _chunk_of(fragment: Fragment) -> int:
    return _FINITE_CHUNK.get(fragment.view.device.type, _FINITE_CHUNK_ELSEWHERE)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


# Writing.


@dataclass(frozen=True, slots=True)
class _Orders:
    """What rank 0 tells every rank of a save."""

    directory: str  # to write to
    status: str  # directory of status files, if the save is asynchronous
    save_id: str


class _Save:
    """A checkpoint in progress: begun and finished by rank 0, written by every rank.

    Memory: one block, and on rank 0 the manifest. Row-major data on the CPU is written in place.
    """

    def __init__(
        self,
        path: Path,
        averages: Averages,
        tensors: Sequence[TensorMeta],
        state: Mapping[str, Any],
    ) -> None:
        self.path, self._averages, self._tensors, self._state = path, averages, tensors, state
        self.orders = _Orders("", "", "")
        self._written: list[Path] = []
        self._locks: list[int] = []  # on rank 0, of the directories it created

    def begin(self, *, with_status: bool) -> None:
        """Create the directory to write to, and remove what killed saves left. On rank 0."""
        refuse_foreign(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        clear_stale(self.path)
        directories = []
        for kind in ("tmp", "mail")[: 1 + with_status]:
            directory, lock = locked_sibling(self.path, kind)
            self._locks.append(lock)
            directories.append(str(directory))
            # Known at once, so that `abandon` removes it if the next step fails.
            self.orders = _Orders(directories[0], "".join(directories[1:]), uuid.uuid4().hex)
        for name in self._averages:
            self._directory(name).mkdir(exist_ok=True)

    def check_visible(self) -> None:
        """Raise if this rank does not see the directories that rank 0 created."""
        wanted = [str(self._directory(name)) for name in self._averages]
        wanted += filter(None, [self.orders.status])
        if not becomes_visible(lambda: all([os.path.isdir(each) for each in wanted])):
            raise CheckpointError(
                f"{self.path}: this rank does not see {self.orders.directory}, which rank 0 "
                "created; a checkpoint needs a directory that all ranks share"
            )

    def status_files(self, rank: int, size: int, timeout: float) -> StatusFiles:
        """Create this rank's status file."""
        return StatusFiles(
            Path(self.orders.status), Path(self.orders.directory), rank, size, timeout
        )

    def write(self, rank: int) -> Report:
        """Write this rank's files and wait until they are on disk."""
        return [
            self._write_average(name, fragments, rank) for name, fragments in self._averages.items()
        ]

    def finish(self, reports: Sequence[Report]) -> None:
        """Write the manifest and put the checkpoint in its place. On rank 0."""
        data = manifest.dump(self._manifest(reports))
        directory = Path(self.orders.directory)
        path = directory / MANIFEST
        try:
            path.write_bytes(data)
            sync(path)
            for name in self._averages:
                sync(self._directory(name))
            refuse_foreign(self.path)
            put_in_place(directory, self.path)
        except OSError as error:
            raise CheckpointError(f"{error.filename or path}: {error.strerror}") from error
        self._unlock()

    def abandon(self) -> None:
        """Remove what was written. On rank 0, when no rank writes any more."""
        for directory in filter(None, (self.orders.directory, self.orders.status)):
            remove(Path(directory))
        self._unlock()

    def _unlock(self) -> None:
        while self._locks:
            release(self._locks.pop())

    def is_in_place(self) -> bool:
        """Whether the checkpoint at the path is the one of this save."""
        try:
            with open(self.path / MANIFEST, "rb") as file:
                fields = manifest.read_head(file.read(manifest.MAX_HEAD))
        except OSError:
            return False
        return fields is not None and fields.get("id") == self.orders.save_id

    def remove_own(self) -> None:
        """Remove what this rank wrote: a full disk may leave no room for the error message."""
        for path in self._written:
            path.unlink(missing_ok=True)

    def _directory(self, name: str) -> Path:
        return Path(self.orders.directory) / manifest.directory_of(name, list(self._averages))

    def _write_average(self, name: str, fragments: Sequence[Fragment], rank: int) -> dict[str, Any]:
        number_of = {meta.fqn: i for i, meta in enumerate(self._tensors)}
        boxes = [
            (number_of[f.meta.fqn], f.meta.box, f.tensor)
            for f in fragments
            if f.is_owner and f.meta.numel
        ]
        if rank == 0:  # tensors without elements
            boxes += [
                (i, whole(meta.shape), torch.empty(meta.shape, dtype=meta.dtype))
                for i, meta in enumerate(self._tensors)
                if 0 in meta.shape
            ]
        boxes.sort(key=lambda entry: entry[0])
        files: list[list[tuple[int, Box, torch.Tensor]]] = []
        nth = 0
        for at, entry in enumerate(boxes):  # a name is unique in a file
            nth = nth + 1 if at and boxes[at - 1][0] == entry[0] else 0
            if nth == len(files):
                files.append([])
            files[nth].append(entry)
        report: dict[str, Any] = {"files": [], "boxes": []}
        for nth, entries in enumerate(files):
            shard = f"shard-{rank + 1:05d}-model-{nth + 1:05d}-of-{len(files):05d}.safetensors"
            names = [self._tensors[i].fqn for i, _, _ in entries]
            offsets = {
                fqn: {"saved_offsets": list(box.offsets)}
                for fqn, (_, box, _) in zip(names, entries, strict=True)
            }
            header, starts, nbytes = header_of(
                [
                    (fqn, str(dtype_name(tensor.dtype)), box.sizes)
                    for fqn, (_, box, tensor) in zip(names, entries, strict=True)
                ],
                {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)},
            )
            tensors = list(zip(names, (tensor for *_, tensor in entries), strict=True))
            checksums = self._write_file(self._directory(name) / shard, header, tensors)
            report["files"].append([shard, nbytes, len(header), checksum(ALGORITHM)(header)])
            report["boxes"] += [
                [i, box.offsets, box.sizes, nth, start, blocks]
                for (i, box, _), start, blocks in zip(entries, starts, checksums, strict=True)
            ]
        return report

    def _write_file(
        self, path: Path, header: bytes, tensors: Sequence[tuple[str, torch.Tensor]]
    ) -> list[list[str]]:
        """Write a file. Returns the checksums of each tensor's blocks."""
        digest = checksum(ALGORITHM)
        checksums: list[list[str]] = []
        part = "its header"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._written.append(path)
            try:
                write_all(fd, memoryview(header))
                for fqn, tensor in tensors:
                    part = f"tensor {fqn}"
                    checksums.append([])
                    for block in row_major_blocks(tensor.detach()):
                        checksums[-1].append(digest(block))
                        write_all(fd, block)
                part = "all of it to disk"
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror} (writing {part})") from error
        return checksums

    def _manifest(self, reports: Sequence[Report]) -> Manifest:
        """The manifest of what all ranks report; raises if the boxes do not cover the tensors."""
        averages = {}
        with manifest.collector_paused():
            for name, of_ranks in zip(self._averages, zip(*reports, strict=True), strict=True):
                averages[name] = self._saved_average(name, of_ranks)
        return Manifest(
            self.orders.save_id,
            ALGORITHM,
            BLOCK_BYTES,
            written_by(len(reports)),
            self._state,
            averages,
        )

    def _saved_average(self, name: str, reports: Sequence[dict[str, Any]]) -> SavedAverage:
        files: dict[str, SavedFile] = {}
        boxes: list[list[SavedBox]] = [[] for _ in self._tensors]
        for report in reports:
            shards = [shard for shard, *_ in report["files"]]
            files |= {shard: SavedFile(*fields) for shard, *fields in report["files"]}
            for i, offsets, sizes, nth, start, checksums in report["boxes"]:
                box = Box(tuple(offsets), tuple(sizes))
                nbytes = box.numel * self._tensors[i].dtype.itemsize
                boxes[i].append(SavedBox(box, shards[nth], start, nbytes, tuple(checksums)))
        tensors = {}
        for meta, saved in zip(self._tensors, boxes, strict=True):
            problem = uncovered(meta.shape, [s.box for s in saved])
            if problem:
                raise CheckpointError(
                    f"{meta.fqn}: {problem}; the process group does not hold the whole model "
                    "(pass process_group=)"
                )
            dtype = str(dtype_name(meta.dtype))
            tensors[meta.fqn] = SavedTensor(meta.shape, dtype, meta.aliases, tuple(saved))
        return SavedAverage(manifest.directory_of(name, list(self._averages)), files, tensors)


def _write_apart(work: _Save, rank: int, status: StatusFiles | None) -> None:
    """Write on a thread: ranks exchange what became of it through status files."""
    report: Report | None = None
    problem: Exception | None = None
    try:
        report = work.write(rank)
    except Exception as error:
        problem = error
        work.remove_own()
    own = {"problem": None if problem is None else describe(problem), "report": report}
    try:
        if status is not None and rank > 0:
            status.report(own)
            failure = status.outcome(work.is_in_place)
        else:
            failure = _finish_apart(work, own, status)
    except Exception as error:
        problem, failure = problem or error, describe(error)
    finally:
        if status is not None:
            status.close()
    if failure is not None:
        raise CheckpointError(failure) from problem


def _finish_apart(work: _Save, own: dict[str, Any], status: StatusFiles | None) -> str | None:
    """On rank 0: finish if all ranks have written, and tell them. Returns the error, if any."""
    failure: str | None = None
    try:
        reports = [own, *(status.reports() if status is not None else [])]
        problems = [each["problem"] if each else "could not write" for each in reports]
        if any(problems):
            raise CheckpointError(merge_errors(problems))
        work.finish([each["report"] for each in reports])
    except Exception as error:
        failure = describe(error)
    if status is not None:
        status.conclude(failure)
    if failure is not None:
        work.abandon()
    return failure


def row_major_blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, block by block; each is valid until the next."""
    step = BLOCK_BYTES // tensor.element_size()
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        data = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
        for start in range(0, len(data), BLOCK_BYTES):
            yield memoryview(data)[start : start + BLOCK_BYTES]
        return
    pinned, length = is_accelerator(tensor.device), min(step, tensor.numel())
    staging = torch.empty(length, dtype=tensor.dtype, pin_memory=pinned)
    sizes = tuple(tensor.shape)
    for start in range(0, tensor.numel(), step):
        end = 0
        for box in flat_boxes(sizes, start, min(start + step, tensor.numel())):
            values = tensor[box.within(whole(sizes))]
            staging[end : end + box.numel].view(box.sizes).copy_(values)
            end += box.numel
        yield staging[:end].view(torch.uint8).numpy().data


def write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def written_by(world_size: int) -> dict[str, Any]:
    """What a manifest records of its writer."""
    try:
        own = version("dist-ema")
    except PackageNotFoundError:  # run from a checkout
        own = "unknown"
    return {
        "world_size": world_size,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dist_ema": own,
        "torch": torch.__version__,
    }
