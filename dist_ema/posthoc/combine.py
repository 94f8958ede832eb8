"""Weighted sums of saved tensors, from disk to disk: one process, bounded memory, one pass.

A result of `combine` has the files and boxes of one of the averages. If the other averages have the
same boxes, which is usual, a block is read, verified and added once for all results. If they are
sharded in another way, boxes are intersected, and a block that is in two ranges is read twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
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
from dist_ema.checkpoint.writer import is_finite, write_all
from dist_ema.core.errors import CheckpointError
from dist_ema.core.layout import Box
from dist_ema.core.safetensors import torch_dtype
from dist_ema.posthoc.snapshots import Snapshot

_SUMS_BYTES = 128 << 20  # bytes of all sums in progress
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
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.average.tensors[self.fqn].dtype)

    @property
    def nbytes(self) -> int:
        return self.average.tensors[self.fqn].nbytes

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is one run of bytes in a file without checksums."""
        return self.checkpoint.is_plain and len(self.average.tensors[self.fqn].boxes) == 1

    def read(self, boxes: Sequence[Box], out: torch.Tensor) -> None:
        """Fill a 1-D tensor of the saved dtype with boxes, one after the other."""
        parts = out.split([box.numel for box in boxes])
        targets = [(box, part.view(box.sizes)) for box, part in zip(boxes, parts, strict=True)]
        self.checkpoint.fill(self.average, self.fqn, targets)

    def read_plain(self, first: int, out: torch.Tensor) -> None:
        """Fill a tensor with elements from `first` on, of a tensor that is plain."""
        (saved,) = self.average.tensors[self.fqn].boxes
        data = out.view(torch.uint8).numpy().data
        self.checkpoint.files.read(saved.file, saved.start + first * out.itemsize, data)


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """Elements of a result, and the terms that they are sums of."""

    fqn: str  # of the result
    start: int  # in the result's tensor, or in one of its boxes
    terms: Sequence[Term]
    boxes: Sequence[Box]  # of the saved tensors
    dtype: torch.dtype  # to which sums are rounded

    @property
    def numel(self) -> int:
        return sum(box.numel for box in self.boxes)

    @property
    def nbytes(self) -> int:
        """The number of bytes to read."""
        return self.numel * sum(term.dtype.itemsize for term in self.terms)


class WeightedSums:
    """Computes sums of saved tensors in float64, or in complex128 if they are complex.

    Two threads read and add half of the checkpoints each: one adds while the other reads. Which
    checkpoints are in a half does not depend on the machine.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint], num_sums: int, numel: int) -> None:
        """
        Args:
            checkpoints: all that are read.
            numel: the largest number of elements in a range.
        """
        self._sums = [_Buffer(num_sums * numel, torch.complex128) for _ in range(2)]
        self._values = [_Buffer(numel, torch.complex64) for _ in range(2)]
        self._wide = [_Buffer(SERIAL, torch.complex128) for _ in range(2)]
        # Not one for each checkpoint: blocks of a hundred of them would be half a GB.
        block_bytes = max((each.manifest.block_bytes for each in checkpoints), default=0)
        self._blocks = [bytearray(block_bytes) for _ in range(2)]
        self._threads = ThreadPoolExecutor(2)

    def __enter__(self) -> WeightedSums:
        return self

    def __exit__(self, *raised: object) -> None:
        self._threads.shutdown()

    def compute(self, wanted: Range) -> torch.Tensor:
        """The sums of a range, of shape (number of sums, elements)."""
        first = wanted.terms[0]
        if len(wanted.terms) == 1 and first.coefficients == (1.0,):  # a copy, also of integers
            values = torch.empty((1, wanted.numel), dtype=first.dtype)
            first.checkpoint.buffer = self._blocks[0]
            first.read(wanted.boxes, values[0])
            return values
        by_checkpoint: dict[int, list[Term]] = defaultdict(list)
        for term in wanted.terms:
            by_checkpoint[id(term.checkpoint)].append(term)
        groups = list(by_checkpoint.values())
        halves = [list(chain(*groups[i::2])) for i in range(min(2, len(groups)))]
        tasks = [
            self._threads.submit(self._add_up, i, half, wanted) for i, half in enumerate(halves)
        ]
        total, *others = [task.result() for task in tasks]
        rounded = torch.empty_like(total, dtype=wanted.dtype)
        parts = (tensor.view(-1).split(SERIAL) for tensor in (rounded, total, *others))
        for out, sums, *more in zip(*parts, strict=True):
            for values in more:
                sums.add_(values)
            out.copy_(sums)
        return rounded

    def _add_up(self, half: int, terms: Sequence[Term], wanted: Range) -> torch.Tensor:
        kind, numel = _sum_dtype(wanted.dtype), wanted.numel
        sums = self._sums[half].view(kind, len(terms[0].coefficients), numel)

        def add(outs: torch.Tensor, values: torch.Tensor, coefficients: Sequence[float]) -> None:
            for part, piece in zip(outs.split(SERIAL, 1), values.split(SERIAL), strict=True):
                wide = self._wide[half].view(kind, len(piece)).copy_(piece)
                for out, coefficient in zip(part, coefficients, strict=True):
                    if coefficient:
                        out.add_(wide, alpha=coefficient)

        plain = [term for term in terms if term.is_plain]
        for at in range(0, numel, _IN_CACHE):
            outs = sums[:, at : at + _IN_CACHE]
            for part in outs.split(SERIAL, 1):
                part.fill_(-0.0)  # which added to -0.0 leaves it as it is
            for term in plain:
                values = self._values[half].view(term.dtype, outs.shape[1])
                term.read_plain(wanted.start + at, values)
                add(outs, values, term.coefficients)
        for term in terms:
            if not term.is_plain:
                term.checkpoint.buffer = self._blocks[half]
                values = self._values[half].view(term.dtype, numel)
                term.read(wanted.boxes, values)
                add(sums, values, term.coefficients)
        return sums


class _Buffer:
    """Memory that is used again and again. What is not used takes no memory."""

    def __init__(self, numel: int, widest: torch.dtype) -> None:
        self._storage = torch.empty(numel * widest.itemsize, dtype=torch.uint8)

    def view(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return self._storage[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


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
    # By tensor and file.
    checksums: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))


def combine(
    snapshots: Sequence[Snapshot],
    names: Sequence[Mapping[str, str]],
    like: Snapshot,
    outputs: Sequence[Output],
    advance: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write sums of averages as checkpoints. Local: one process, without a process group.

    Sums are computed in float64 (complex128 for complex tensors) and rounded once. Memory: 128 MiB
    for up to 4 outputs, 256 MiB for more, whatever the sizes of the tensors, and two blocks. Up to
    8 outputs of fp32 have the usual blocks of 4 MiB; with more, blocks are smaller, and blocks of
    the snapshots are read more than once.

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
    digest, non_finite = checksum(ALGORITHM), set[str]()

    def step(dtype: torch.dtype) -> int:
        """The number of elements in a range: as many blocks as fit, but at least one."""
        nbytes = len(outputs) * 2 * (_sum_dtype(dtype).itemsize + dtype.itemsize)
        block = block_bytes // dtype.itemsize
        return max(1, _SUMS_BYTES // nbytes // block) * block

    def ranges(entries: Iterable[tuple[str, SavedBox]]) -> Iterator[Range]:
        for fqn, saved in entries:
            terms = [
                Term(s.checkpoint, s.average, names[i][fqn], [o.coefficients[i] for o in outputs])
                for i, s in enumerate(snapshots)
            ]
            dtype = torch_dtype(average.tensors[fqn].dtype)
            for start in range(0, saved.box.numel, step(dtype)):
                stop = min(start + step(dtype), saved.box.numel)
                boxes = [box for _, box in boxes_within(saved.box, start, stop)]
                yield Range(fqn, start, terms, boxes, dtype)

    numel = max(map(step, dtypes), default=0)
    with WeightedSums([s.checkpoint for s in snapshots], len(outputs), numel) as sums:
        for name, entries in sorted(average.contents.items()):
            header = like.checkpoint.check_file(average, name)
            with ExitStack() as stack:
                files = [
                    stack.enter_context(open(o.directory / name, "xb", buffering=0))
                    for o in outputs
                ]
                for output, file in zip(outputs, files, strict=True):
                    write_all(file.fileno(), memoryview(header))
                    saved_file = average.files[name]
                    output.files[name] = dataclasses.replace(saved_file, checksum=digest(header))
                for each in ranges(entries):
                    totals = sums.compute(each)
                    if not all(map(is_finite, totals)):
                        non_finite.add(each.fqn)
                    for output, file, total in zip(outputs, files, totals, strict=True):
                        for block in total.split(block_bytes // total.itemsize):
                            data = block.view(torch.uint8).numpy().data
                            output.checksums[each.fqn, name].append(digest(data))
                            write_all(file.fileno(), data)
                    advance(each.nbytes)
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
