"""Saves a checkpoint: each rank writes the boxes that it owns, then rank 0 the manifest.

[Note: why not torch's own storage]
torch's `FileSystemWriter` pickles, and overwrites the last checkpoint in place; its
`HuggingFaceStorageWriter` keeps only the last box of a tensor on each rank, without an error;
neither has checksums. The files here have the layout of the second, so its reader reads them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
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
    hidden_sibling,
    refuse_working_directory,
    replaced_directory,
    start_writeback,
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
from dist_ema.core.layout import (
    Box,
    Fragment,
    TensorMeta,
    collector_paused,
    flat_boxes,
    uncovered,
    whole,
)
from dist_ema.core.safetensors import dtype_name, header_of

Averages = Mapping[str, Sequence[Fragment]]
Report = list[dict[str, Any]]  # JSON: for each average, the files and boxes that a rank wrote

_FINITE_CHUNK = {"cpu": 1 << 18}  # elements: stays in cache between copying and checking
_FINITE_CHUNK_ELSEWHERE = 1 << 24  # fewer waits for the device


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
    two blocks; on rank 0, the manifest. Four small exchanges and one gather of the reports.

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
    non_finite: set[str] | None = set()  # while it is written
    if asynchronous:
        with group.together(error=CheckpointError):
            copies = _room_for_copies(averages, background)
            names = non_finite_names(averages, copies)
        refuse_non_finite(names, group)
        averages, non_finite = copies, None
    with ExitStack() as files, ExitStack() as mail:  # what is left to do if the save fails
        directories, save_id = [], uuid.uuid4().hex
        with group.together(error=CheckpointError):
            if group.rank == 0:
                directories.append(files.enter_context(replaced_directory(place, sync_files=False)))
                if asynchronous and group.size > 1:
                    directories.append(mail.enter_context(hidden_sibling(place, "mail")))
                for name in averages:
                    _directory_of(directories[0], name, averages).mkdir(exist_ok=True)
        directories, save_id = group.broadcast((directories, save_id))
        work = _Save(place, directories[0], save_id, averages, tensors, state, non_finite)
        status: StatusFiles | None = None
        with group.together(error=CheckpointError):
            wanted = [_directory_of(work.directory, name, averages) for name in averages]
            if not becomes_visible(lambda: all([d.is_dir() for d in (*wanted, *directories)])):
                raise CheckpointError(
                    f"{place}: this rank does not see {work.directory}, which rank 0 created; a "
                    "checkpoint needs a directory that all ranks share"
                )
            if len(directories) > 1:
                written, of_status = directories
                status = StatusFiles(written, of_status, group.rank, group.size, timeout)
                mail.callback(status.close)
        if status is not None:
            with group.together(error=CheckpointError):
                status.meet()
        if asynchronous:
            left, rank = (files.pop_all(), mail.pop_all()), group.rank
            background.last = Handle(place, lambda: _write_apart(work, rank, status, *left))
            return background.last
        with group.together(error=CheckpointError):
            report = work.write(group.rank)
        refuse_non_finite(non_finite or set(), group)
        reports = group.gather(report)
        with group.together(error=CheckpointError):
            if group.rank == 0:
                work.finish(reports)
                files.close()
    return None


def _directory_of(directory: Path, name: str, averages: Averages) -> Path:
    """The directory of an average's files, in that of the checkpoint."""
    return directory / manifest.directory_of(name, list(averages))


def tensors_of_all_ranks(tensors: Sequence[TensorMeta], group: Group) -> Sequence[TensorMeta]:
    """The tensors of all ranks, which differ if ranks hold different parts of one model.

    Collective: every rank calls it. An all-reduce of two integers if all ranks have the same.

    Raises:
        CheckpointError: a name has another shape, dtype or aliases on another rank.
    """
    if group.equal(tensors):
        return tensors
    known: dict[str, TensorMeta] = {}
    for meta in itertools.chain(*group.all_gather(list(tensors))):
        other = known.setdefault(meta.fqn, meta)
        if other != meta:
            raise CheckpointError(
                f"ranks have different tensors of one name: {other} and {meta}; parts of one model "
                "need distinct names, and ranks that hold different models a process group each "
                "(process_group=)"
            )
    return list(known.values())


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


def non_finite_names(averages: Averages, copies: Averages | None = None) -> set[str]:
    """Names of tensors that hold NaN or Inf in what this rank owns; fills `copies` too. Local."""
    names = set()
    for source, copied in zip(_owned(averages), _owned(copies or averages), strict=True):
        step = _FINITE_CHUNK.get(source.view.device.type, _FINITE_CHUNK_ELSEWHERE)
        values, out = source.view.detach().split(step), copied.view.split(step)
        for chunk, copy in zip(values, out, strict=True):
            if copies is not None:
                copy.copy_(chunk)
            if not is_finite(copy):
                names.add(source.meta.fqn)
    return names


def _room_for_copies(averages: Averages, background: BackgroundSaves) -> Averages:
    """Fragments on the CPU for what this rank owns, in the memory of the last such call. Local."""
    owned = {name: list(_owned({name: fragments})) for name, fragments in averages.items()}
    views = [f.view for fragments in owned.values() for f in fragments]
    pinned = any(is_accelerator(view.device) for view in views)
    rooms = iter(background.staging([view.nbytes for view in views], pinned))
    return {
        name: [Fragment(f.meta, next(rooms).view(f.view.dtype)) for f in fragments]
        for name, fragments in owned.items()
    }


def _owned(averages: Averages) -> Iterator[Fragment]:
    return (f for fragments in averages.values() for f in fragments if f.is_owner)


def is_finite(values: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no Inf. Allocates nothing unless it does, or overflows."""
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.is_floating_point():
        return True
    # A sum is finite only if all its terms are. A sum that is not finite may have overflowed.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return math.isfinite(total.item()) or bool(values.isfinite().all())


# Writing.


@dataclass(frozen=True)
class _Save:
    """A checkpoint in progress: every rank writes, then rank 0 finishes.

    Memory: one block, and on rank 0 the manifest. Row-major data on the CPU is written in place.
    """

    path: Path  # of the checkpoint
    directory: Path  # that is written
    save_id: str
    averages: Averages
    tensors: Sequence[TensorMeta]
    state: Mapping[str, Any]
    non_finite: set[str] | None  # names, filled by `write`; None: values are known to be finite

    def write(self, rank: int) -> Report:
        """Write this rank's files and wait until they are on disk."""
        return [self._write_average(name, rank) for name in self.averages]

    def finish(self, reports: Sequence[Report]) -> None:
        """Write the manifest. On rank 0."""
        path, data = self.directory / MANIFEST, manifest.dump(self.manifest(reports))
        try:
            path.write_bytes(data)
            sync(path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error

    def is_in_place(self) -> bool:
        """Whether the checkpoint at the path is the one of this save."""
        with suppress(OSError), open(self.path / MANIFEST, "rb") as file:
            return f'"id":"{self.save_id}"'.encode() in file.readline(manifest.MAX_HEAD)
        return False

    def _write_average(self, name: str, rank: int) -> dict[str, Any]:
        number_of = {meta.fqn: i for i, meta in enumerate(self.tensors)}
        owned = [f for f in _owned({name: self.averages[name]}) if f.meta.numel]
        boxes = [(number_of[f.meta.fqn], f.meta.box, f.tensor) for f in owned]
        if rank == 0:  # tensors without elements
            boxes += [
                (i, whole(meta.shape), torch.empty(meta.shape, dtype=meta.dtype, device="cpu"))
                for i, meta in enumerate(self.tensors)
                if 0 in meta.shape
            ]
        files: dict[int, list[tuple[int, Box, torch.Tensor]]] = {}
        num_boxes: Counter[int] = Counter()
        for entry in sorted(boxes, key=lambda entry: entry[0]):  # a name is unique in a file
            files.setdefault(num_boxes[entry[0]], []).append(entry)
            num_boxes[entry[0]] += 1
        report: dict[str, Any] = {"files": [], "boxes": []}
        for nth, entries in files.items():
            shard = f"shard-{rank + 1:05d}-model-{nth + 1:05d}-of-{len(files):05d}.safetensors"
            named = [(self.tensors[i].fqn, box, tensor) for i, box, tensor in entries]
            offsets = {fqn: {"saved_offsets": list(box.offsets)} for fqn, box, _ in named}
            header, starts, nbytes = header_of(
                [(fqn, str(dtype_name(tensor.dtype)), box.sizes) for fqn, box, tensor in named],
                {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)},
            )
            path = _directory_of(self.directory, name, self.averages) / shard
            checksums = self._write_file(path, header, [(fqn, t) for fqn, _, t in named])
            report["files"].append([shard, nbytes, len(header), checksum(ALGORITHM)(header)])
            report["boxes"] += [
                [i, box.offsets, box.sizes, nth, start, blocks]
                for (i, box, _), start, blocks in zip(entries, starts, checksums, strict=True)
            ]
        return report

    def _write_file(
        self, path: Path, header: bytes, tensors: Sequence[tuple[str, torch.Tensor]]
    ) -> list[list[str]]:
        """Write a file. Returns the checksums of each tensor's blocks.

        A block is checked, hashed and written while it is in the cache, and the disk begins with it
        at once: it then works while the next blocks are checked and hashed.
        """
        digest = checksum(ALGORITHM)
        checksums: list[list[str]] = []
        part, end = "its header", len(header)
        try:
            with open(path, "xb", buffering=0) as file:
                fd = file.fileno()
                write_all(fd, memoryview(header))
                for fqn, tensor in tensors:
                    part = f"tensor {fqn}"
                    checksums.append([])
                    for block in row_major_blocks(tensor.detach()):
                        values = torch.frombuffer(block, dtype=tensor.dtype)
                        if self.non_finite is not None and not is_finite(values):
                            self.non_finite.add(fqn)
                        checksums[-1].append(digest(block))
                        write_all(fd, block)
                        start_writeback(fd, end, len(block))
                        end += len(block)
                part = "all of it to disk"
                os.fsync(fd)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror} (writing {part})") from error
        return checksums

    @collector_paused()
    def manifest(self, reports: Sequence[Report]) -> Manifest:
        """The manifest of what all ranks report; raises if the boxes do not cover the tensors."""
        of_averages = zip(self.averages, zip(*reports, strict=True), strict=True)
        averages = {name: self._saved_average(name, of_ranks) for name, of_ranks in of_averages}
        written = written_by(len(reports))
        return Manifest(self.save_id, ALGORITHM, BLOCK_BYTES, written, self.state, averages)

    def _saved_average(self, name: str, reports: Sequence[dict[str, Any]]) -> SavedAverage:
        files: dict[str, SavedFile] = {}
        boxes: list[list[SavedBox]] = [[] for _ in self.tensors]
        for report in reports:
            shards = [shard for shard, *_ in report["files"]]
            files |= {shard: SavedFile(*fields) for shard, *fields in report["files"]}
            for i, offsets, sizes, nth, start, checksums in report["boxes"]:
                box = Box(tuple(offsets), tuple(sizes))
                nbytes = box.numel * self.tensors[i].dtype.itemsize
                boxes[i].append(SavedBox(box, shards[nth], start, nbytes, tuple(checksums)))
        tensors = {}
        for meta, saved in zip(self.tensors, boxes, strict=True):
            problem = uncovered(meta.shape, [s.box for s in saved])
            if problem:
                raise CheckpointError(
                    f"{meta.fqn}: {problem}; the process group does not hold the whole model "
                    "(pass process_group=)"
                )
            dtype = str(dtype_name(meta.dtype))
            tensors[meta.fqn] = SavedTensor(meta.shape, dtype, meta.aliases, tuple(saved))
        return SavedAverage(manifest.directory_of(name, list(self.averages)), files, tensors)


def _write_apart(
    work: _Save, rank: int, status: StatusFiles | None, files: ExitStack, mail: ExitStack
) -> None:
    """Write on a thread: ranks exchange what became of it through status files.

    `files` puts the checkpoint in its place or removes what was written; `mail` removes the status.
    """
    report: Report | None = None
    problem: Exception | None = None
    failure: str | None = None
    with mail:
        try:
            report = work.write(rank)
        except Exception as error:
            problem = error
        own = {"problem": None if problem is None else describe(problem), "report": report}
        try:
            if status is not None and rank > 0:
                status.report(own)
                failure = status.outcome(work.is_in_place)
            else:
                with files:
                    reports = [own, *(status.reports() if status is not None else [])]
                    problems = [each["problem"] if each else "could not write" for each in reports]
                    if any(problems):
                        raise CheckpointError(merge_errors(problems))
                    work.finish([each["report"] for each in reports])
        except Exception as error:
            problem, failure = problem or error, describe(error)
        if status is not None and rank == 0:
            status.conclude(failure)
    if failure is not None:
        raise CheckpointError(failure) from problem


def row_major_blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, block by block; each is valid until the next."""
    step = BLOCK_BYTES // tensor.element_size()
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        data = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
        for start in range(0, len(data), BLOCK_BYTES):
            yield memoryview(data)[start : start + BLOCK_BYTES]
        return
    pinned, length = is_accelerator(tensor.device), min(step, tensor.numel())
    staging = torch.empty(length, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
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
