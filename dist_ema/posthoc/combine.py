"""Weighted sums of saved averages, from disk to disk: one process, bounded memory, one pass.

A result has the files and boxes of one of the averages, which most of the others have too: then a
block is read, verified and added once for all results. Where the others are sharded in another way,
boxes are intersected, and blocks at the edges of a range are read again for the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch

from dist_ema.checkpoint.directory import MANIFEST, sync
from dist_ema.checkpoint.manifest import (
    ALGORITHM,
    Manifest,
    SavedAverage,
    SavedBox,
    SavedFile,
    checksum,
    dump,
)
from dist_ema.checkpoint.reader import Checkpoint, boxes_within
from dist_ema.checkpoint.writer import write_all
from dist_ema.core.errors import CheckpointError
from dist_ema.core.layout import Box
from dist_ema.core.safetensors import torch_dtype
from dist_ema.posthoc.snapshots import Snapshot

_SUMS_BYTES = 128 << 20  # of the sums in progress, over all results
_MIN_BLOCK_BYTES = 4096
_IN_CACHE = 1 << 17  # elements of plain files that are read at a time: sums stay in cache
SERIAL = 32_768  # elements: torch computes longer tensors with threads of its own


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """A saved tensor, and its coefficient in each of several sums."""

    checkpoint: Checkpoint
    average: SavedAverage
    fqn: str
    coefficients: Sequence[float]

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is in one place, without checksums."""
        return self.checkpoint.is_plain and len(self.average.tensors[self.fqn].boxes) == 1

    def read(self, first: int, numel: int, buffer: bytearray) -> torch.Tensor:
        """Elements of a plain tensor from `first` on."""
        tensor = self.average.tensors[self.fqn]
        dtype, (saved,) = torch_dtype(tensor.dtype), tensor.boxes
        view = memoryview(buffer)[: numel * dtype.itemsize]
        self.checkpoint.files.read(saved.file, saved.start + first * dtype.itemsize, view)
        return torch.frombuffer(view, dtype=dtype)


class WeightedSums:
    """Computes sums of saved tensors in float64, or in complex128 if they are complex.

    Two threads read and add half of the checkpoints each: one adds while the other reads. Which
    checkpoints are in a half does not depend on the machine.
    """

    def __init__(self, nbytes: int, checkpoints: Sequence[Checkpoint]) -> None:
        """
        Args:
            nbytes: memory of the sums in progress. Beside it, each thread has a block.
            checkpoints: all that are read.
        """
        self._storage = [torch.empty(nbytes // 2 // 16 * 16, dtype=torch.uint8) for _ in range(2)]
        # Not one for each checkpoint: blocks of a hundred of them would be half a GB.
        block_bytes = max((c.manifest.block_bytes for c in checkpoints), default=0)
        self._buffers = [bytearray(block_bytes) for _ in range(2)]
        self._threads = ThreadPoolExecutor(2)

    def __enter__(self) -> WeightedSums:
        return self

    def __exit__(self, *raised: object) -> None:
        self._threads.shutdown()

    def capacity(self, num_sums: int, dtype: torch.dtype) -> int:
        """The number of elements that fit."""
        return self._storage[0].numel() // num_sums // _sum_dtype(dtype).itemsize

    def compute(
        self,
        terms: Sequence[Term],
        boxes: Sequence[Box],
        dtype: torch.dtype,
        first: int | None = None,
    ) -> torch.Tensor:
        """The sums of some boxes of a tensor, valid until the next call.

        Args:
            first: if the boxes are a range of elements of the tensor, where it starts.

        Returns:
            A tensor of shape (number of sums, elements of all boxes), box after box.
        """
        by_checkpoint: dict[int, list[Term]] = {}
        for term in terms:
            by_checkpoint.setdefault(id(term.checkpoint), []).append(term)
        groups = list(by_checkpoint.values())
        halves = [list(chain(*groups[i::2])) for i in range(min(2, len(groups)))]
        tasks = [
            self._threads.submit(self._add_up, i, half, boxes, dtype, first)
            for i, half in enumerate(halves)
        ]
        wait(tasks)
        total, *others = [task.result() for task in tasks]
        for other in others:
            parts = (t.view(-1).split(SERIAL) for t in (total, other))
            for out, values in zip(*parts, strict=True):
                out.add_(values)
        return total

    def _add_up(
        self,
        thread: int,
        terms: Sequence[Term],
        boxes: Sequence[Box],
        dtype: torch.dtype,
        first: int | None,
    ) -> torch.Tensor:
        wide, num_sums = _sum_dtype(dtype), len(terms[0].coefficients)
        numel = sum(box.numel for box in boxes)
        sums = self._storage[thread][: num_sums * numel * wide.itemsize].view(wide)
        for part in sums.split(SERIAL):
            part.fill_(-0.0)  # which added to -0.0 leaves it as it is
        sums = sums.view(num_sums, numel)
        ends = [0, *accumulate(box.numel for box in boxes)]
        targets = [
            (box, sums[:, end - box.numel : end].view(num_sums, *box.sizes))
            for box, end in zip(boxes, ends[1:], strict=True)
        ]
        plain = [term for term in terms if first is not None and term.is_plain]
        for at in range(0, numel, _IN_CACHE):
            part = sums[:, at : at + _IN_CACHE]
            for term in plain:
                values = term.read((first or 0) + at, part.shape[1], self._buffers[thread])
                _add(term.coefficients, part, values)
        for term in terms:
            if term not in plain:
                term.checkpoint.buffer = self._buffers[thread]
                add = partial(_add, term.coefficients)
                term.checkpoint.fill(term.average, term.fqn, targets, add)
        return sums


def _add(coefficients: Sequence[float], sums: torch.Tensor, values: torch.Tensor) -> None:
    """Add values, each times its coefficient, to several sums."""
    parts = [(sums, values)]
    if sums[0].is_contiguous() and values.is_contiguous():
        flat = sums.view(len(coefficients), -1).split(SERIAL, 1), values.view(-1).split(SERIAL)
        parts = list(zip(*flat, strict=True))
    for outs, part in parts:
        if len(coefficients) > 1:
            part = part.to(outs.dtype)
        for out, coefficient in zip(outs, coefficients, strict=True):
            if coefficient:
                out.add_(part, alpha=coefficient)


@dataclass(slots=True)
class Output:
    """A checkpoint of one average to write."""

    directory: Path  # empty
    save_id: str
    name: str  # of the average
    coefficients: Sequence[float]  # one for each snapshot
    state: Mapping[str, Any]
    written: Mapping[str, Any]
    files: dict[str, SavedFile] = field(default_factory=dict)
    checksums: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # by tensor and file


def combine(
    snapshots: Sequence[Snapshot],
    names: Sequence[Mapping[str, str]],
    like: Snapshot,
    outputs: Sequence[Output],
    advance: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write sums of averages as checkpoints. Local: one process, without a process group.

    Sums are computed in float64 (complex128 for complex tensors) and rounded once. Memory: 128 MiB
    of sums, whatever the sizes of the tensors, and two blocks. Up to 8 outputs of fp32 have the
    usual blocks of 4 MiB; with more, blocks are smaller, and blocks of the snapshots are read more
    than once.

    Args:
        names: for each snapshot, its name of each tensor of `like`; see `match_tensors`.
        like: determines files, boxes and names of the outputs.
        advance: called with numbers of bytes, which add up to those of all snapshots.

    Raises:
        CheckpointError: a snapshot is damaged, or a sum is not finite.
    """
    average = like.average
    dtypes = {torch_dtype(tensor.dtype) for tensor in average.tensors.values()}
    widest = max((_sum_dtype(d).itemsize / d.itemsize for d in dtypes), default=1)
    limit = int(_SUMS_BYTES / 2 / len(outputs) / widest) // 16 * 16
    block_bytes = max(_MIN_BLOCK_BYTES, min(like.checkpoint.manifest.block_bytes, limit))
    all_bytes = max(_SUMS_BYTES, 2 * int(block_bytes * widest) * len(outputs))
    digest, non_finite = checksum(ALGORITHM), set[str]()

    def write_box(fqn: str, saved: SavedBox, fds: Sequence[int]) -> None:
        dtype = torch_dtype(average.tensors[fqn].dtype)
        block = block_bytes // dtype.itemsize
        step = max(1, sums.capacity(len(outputs), dtype) // block) * block
        terms = [
            Term(one.checkpoint, one.average, names[i][fqn], [o.coefficients[i] for o in outputs])
            for i, one in enumerate(snapshots)
        ]
        for output in outputs:
            output.checksums[fqn, saved.file] = []
        for start in range(0, saved.box.numel, step):
            stop = min(start + step, saved.box.numel)
            boxes = [box for _, box in boxes_within(saved.box, start, stop)]
            totals = sums.compute(terms, boxes, dtype)
            advance((stop - start) * dtype.itemsize * len(terms))
            for output, fd, total in zip(outputs, fds, totals, strict=True):
                for chunk in total.split(block):
                    rounded = chunk.to(dtype)
                    if not bool(rounded.isfinite().all()):
                        non_finite.add(fqn)
                    data = rounded.view(torch.uint8).numpy().data
                    output.checksums[fqn, saved.file].append(digest(data))
                    write_all(fd, data)

    entries: dict[str, list[tuple[str, SavedBox]]] = {name: [] for name in average.files}
    for fqn, tensor in average.tensors.items():
        for saved in tensor.boxes:
            entries[saved.file].append((fqn, saved))
    opened = [one.checkpoint for one in [*snapshots, like]]
    with WeightedSums(all_bytes, opened) as sums:
        for name in sorted(entries):
            header = like.checkpoint.check_file(average, name)
            with ExitStack() as stack:
                files = [stack.enter_context(open(o.directory / name, "xb")) for o in outputs]
                fds = [file.fileno() for file in files]
                for output, fd in zip(outputs, fds, strict=True):
                    write_all(fd, memoryview(header))
                    saved_file = average.files[name]
                    output.files[name] = dataclasses.replace(saved_file, checksum=digest(header))
                for fqn, saved in sorted(entries[name], key=lambda entry: entry[1].start):
                    write_box(fqn, saved, fds)
    if non_finite:
        raise CheckpointError(
            f"the result holds NaN or Inf in {', '.join(sorted(non_finite))}; nothing is written"
        )
    for output in outputs:
        _write_manifest(output, average, block_bytes)


def _write_manifest(output: Output, average: SavedAverage, block_bytes: int) -> None:
    tensors = {}
    for fqn, tensor in average.tensors.items():
        boxes = tuple(
            dataclasses.replace(saved, checksums=tuple(output.checksums[fqn, saved.file]))
            for saved in tensor.boxes
        )
        tensors[fqn] = dataclasses.replace(tensor, boxes=boxes)
    manifest = Manifest(
        output.save_id,
        ALGORITHM,
        block_bytes,
        output.written,
        output.state,
        {output.name: SavedAverage("", output.files, tensors)},
    )
    path = output.directory / MANIFEST
    path.write_bytes(dump(manifest))
    sync(path)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64
