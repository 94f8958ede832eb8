"""Weighted sums of saved tensors, from disk to disk: one process, bounded memory, one pass.

A result of `combine` has the files and boxes of one of the averages. If the other averages have the
same boxes, which is usual, a block is read, verified and added once for all results. If they are
sharded in another way, boxes are intersected, and a block that is in two ranges is read twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

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
from dist_ema.core.gather import pages
from dist_ema.core.layout import Box
from dist_ema.core.safetensors import torch_dtype
from dist_ema.posthoc.snapshots import Snapshot

_SUMS_BYTES = 128 << 20  # bytes of all sums in progress
_MIN_BLOCK_BYTES = 4096
_NUM_THREADS = 2
_IN_CACHE = 1 << 16  # elements of plain files that are read at a time: sums stay in cache
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

    def read(self, wanted: Range, at: int, out: Tensor) -> None:
        """Fill a 1-D tensor of the saved dtype with elements of a range.

        Args:
            at: the first element; 0 unless all terms of the range are plain.
        """
        if self.is_plain:
            (saved,) = self.average.tensors[self.fqn].boxes
            first = saved.start + (wanted.start + at) * out.itemsize
            self.checkpoint.files.read(saved.file, first, out.view(torch.uint8).numpy().data)
            return
        parts = out.split([box.numel for box in wanted.boxes])
        targets = [
            (box, part.view(box.sizes)) for box, part in zip(wanted.boxes, parts, strict=True)
        ]
        self.checkpoint.fill(self.average, self.fqn, targets)


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

    Two threads compute a range each: one adds while the other reads.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint], num_sums: int, numel: int) -> None:
        """
        Args:
            checkpoints: all that are read.
            numel: the largest number of elements in a range.
        """
        self._locks = {each: Lock() for each in checkpoints}
        # Not one for each checkpoint: blocks of a hundred of them would be half a GB.
        block_bytes = max((each.manifest.block_bytes for each in self._locks), default=0)
        self._idle = [_Buffers(num_sums, numel, block_bytes) for _ in range(_NUM_THREADS)]
        self._threads = ThreadPoolExecutor(_NUM_THREADS)

    def __enter__(self) -> WeightedSums:
        return self

    def __exit__(self, *raised: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def compute(self, ranges: Iterable[Range]) -> Iterator[tuple[Range, Tensor]]:
        """Each range, with its sums of shape (number of sums, elements).

        The next ranges are computed meanwhile, as many as there are threads.
        """
        running: deque[tuple[Range, Future[Tensor]]] = deque()
        for each in ranges:
            running.append((each, self._threads.submit(self._compute, each)))
            if len(running) > _NUM_THREADS:
                wanted, task = running.popleft()
                yield wanted, task.result()
        while running:
            wanted, task = running.popleft()
            yield wanted, task.result()

    def _compute(self, wanted: Range) -> Tensor:
        buffers = self._idle.pop()
        try:
            (first, *others), numel = wanted.terms, wanted.numel
            if not others and first.coefficients == (1.0,):  # a copy, also of integers
                copy = pages(numel, first.dtype).view(1, numel)
                self._read(first, wanted, 0, copy[0], buffers.block)
                return copy
            num_sums = len(first.coefficients)
            result = pages(num_sums * numel, wanted.dtype).view(num_sums, numel)
            step = _IN_CACHE if all(term.is_plain for term in wanted.terms) else numel
            for at in range(0, numel, step):
                self._add_up(wanted, at, result[:, at : at + step], buffers)
            return result
        finally:
            self._idle.append(buffers)

    def _add_up(self, wanted: Range, at: int, out: Tensor, buffers: _Buffers) -> None:
        """Fill `out` with sums of elements of a range, from `at` on."""
        kind, numel = _sum_dtype(wanted.dtype), out.shape[1]
        sums = [_pieces(row) for row in buffers.sums.view(kind, *out.shape)]
        for piece in chain.from_iterable(chain.from_iterable(sums)):
            piece.fill_(-0.0)  # which added to -0.0 leaves it as it is
        dtypes = {term.dtype for term in wanted.terms}
        values = {dtype: buffers.values.view(dtype, numel) for dtype in dtypes}
        pieces = {dtype: _pieces(tensor) for dtype, tensor in values.items()}
        wides = [
            buffers.wide.view(kind, len(part)).split(SERIAL) for part in out[0].split(_IN_CACHE)
        ]
        for term in wanted.terms:
            self._read(term, wanted, at, values[term.dtype], buffers.block)
            for narrow, wide, *parts in zip(pieces[term.dtype], wides, *sums, strict=True):
                torch._foreach_copy_(wide, narrow)
                for part, coefficient in zip(parts, term.coefficients, strict=True):
                    if coefficient:
                        torch._foreach_add_(part, wide, alpha=coefficient)
        for rounded, row in zip(out, sums, strict=True):
            for narrow, part in zip(_pieces(rounded), row, strict=True):
                torch._foreach_copy_(narrow, part)

    def _read(self, term: Term, wanted: Range, at: int, out: Tensor, block: bytearray) -> None:
        with self._locks[term.checkpoint]:
            term.checkpoint.buffer = block
            term.read(wanted, at, out)


def _pieces(values: Tensor) -> list[tuple[Tensor, ...]]:
    """Parts of a 1-D tensor that stay in cache, each in parts that torch computes on one thread."""
    return [part.split(SERIAL) for part in values.split(_IN_CACHE)]


class _Buffers:
    """The memory of a thread, used again and again."""

    def __init__(self, num_sums: int, numel: int, block_bytes: int) -> None:
        self.sums = _Buffer(num_sums * numel)
        self.values = _Buffer(numel)
        self.wide = _Buffer(_IN_CACHE)
        self.block = bytearray(block_bytes)


class _Buffer:
    """Memory for tensors of any dtype. What is not used takes no memory."""

    def __init__(self, numel: int) -> None:
        nbytes = numel * torch.complex128.itemsize
        self._storage = torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def view(self, dtype: torch.dtype, *shape: int) -> Tensor:
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
        nbytes = len(outputs) * (2 * _sum_dtype(dtype).itemsize + 3 * dtype.itemsize)
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
                for each, totals in sums.compute(ranges(entries)):
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
