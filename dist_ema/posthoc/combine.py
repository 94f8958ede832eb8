"""Weighted sums of saved averages, from disk to disk: one process, bounded memory, one pass.

A result has the files and boxes of one of the averages, which most of the others have too: then a
block is read, verified and added once for all results. Where the others are sharded in another way,
boxes are intersected, and blocks at the edges of a range are read again for the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
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
from dist_ema.checkpoint.reader import boxes_within
from dist_ema.checkpoint.writer import write_all
from dist_ema.core.errors import CheckpointError
from dist_ema.core.safetensors import torch_dtype
from dist_ema.posthoc.snapshots import Snapshot

_SUMS_BYTES = 128 << 20  # of the sums in progress, over all results
_MIN_BLOCK_BYTES = 4096


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
    of sums, whatever the sizes of the tensors, and one block. Up to 16 outputs of fp32 have the
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
    # One buffer for all: a block of each of a hundred checkpoints would be half a GB.
    buffer = bytearray(max(one.checkpoint.manifest.block_bytes for one in [*snapshots, like]))
    for one in snapshots:
        one.checkpoint.buffer = buffer
    dtypes = {torch_dtype(tensor.dtype) for tensor in average.tensors.values()}
    widest = max((_sum_dtype(d).itemsize / d.itemsize for d in dtypes), default=1)
    limit = int(_SUMS_BYTES / len(outputs) / widest) // 16 * 16
    block_bytes = max(_MIN_BLOCK_BYTES, min(like.checkpoint.manifest.block_bytes, limit))
    all_sums = torch.empty(
        max(_SUMS_BYTES, int(block_bytes * widest) * len(outputs)), dtype=torch.uint8
    )
    digest, non_finite = checksum(ALGORITHM), set[str]()

    def sums_of(fqn: str, saved: SavedBox, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a box, in each output."""
        dtype = torch_dtype(average.tensors[fqn].dtype)
        wide = _sum_dtype(dtype)
        nbytes = (stop - start) * len(outputs) * wide.itemsize
        sums = all_sums[:nbytes].view(wide).view(len(outputs), stop - start).zero_()
        targets = [
            (box, sums[:, at : at + box.numel].view(len(outputs), *box.sizes))
            for at, box in boxes_within(saved.box, start, stop)
        ]
        for i, snapshot in enumerate(snapshots):
            factors = [output.coefficients[i] for output in outputs]

            def add(out: torch.Tensor, values: torch.Tensor, factors: Any = factors) -> None:
                values = values.to(out.dtype)
                for total, factor in zip(out, factors, strict=True):
                    if factor:
                        total.add_(values, alpha=factor)

            snapshot.checkpoint.fill(snapshot.average, names[i][fqn], targets, add)
            advance((stop - start) * dtype.itemsize)
        return sums

    def write_box(fqn: str, saved: SavedBox, fds: Sequence[int]) -> None:
        dtype = torch_dtype(average.tensors[fqn].dtype)
        block = block_bytes // dtype.itemsize
        fitting = all_sums.numel() // len(outputs) // _sum_dtype(dtype).itemsize
        step = max(1, fitting // block) * block
        for output in outputs:
            output.checksums[fqn, saved.file] = []
        for start in range(0, saved.box.numel, step):
            sums = sums_of(fqn, saved, start, min(start + step, saved.box.numel))
            for output, fd, total in zip(outputs, fds, sums, strict=True):
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
