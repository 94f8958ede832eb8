"""Weighted sums of saved averages, from disk to disk: one process, bounded memory, one pass.

A result is cut into files and boxes as one of the averages is, which is where most of the others
have their boxes too: a block is then read, checked, and added, once for all the results. Where the
others were cut in another way, by another engine or world, boxes are intersected, and the blocks at
the edges of a region are read again for the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dist_ema.checkpoint import manifest
from dist_ema.checkpoint.directory import MANIFEST, sync
from dist_ema.checkpoint.manifest import (
    ALGORITHM,
    Manifest,
    SavedAverage,
    SavedBox,
    SavedFile,
    SavedTensor,
)
from dist_ema.checkpoint.reader import Checkpoint, boxes_within
from dist_ema.core.errors import CheckpointError
from dist_ema.core.layout import Box
from dist_ema.core.safetensors import torch_dtype

_SUMS_BYTES = 128 << 20  # of the sums being made, over all results
_MIN_BLOCK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Term:
    """A saved average, open to be read."""

    checkpoint: Checkpoint
    average: SavedAverage
    names: Mapping[str, str]  # what it calls each tensor of the result


@dataclass(frozen=True, slots=True)
class Result:
    """A checkpoint of one average, to be written."""

    directory: Path  # empty
    save_id: str
    name: str  # of the average
    coefficients: Sequence[float]  # one for each term
    state: Mapping[str, Any]
    written: Mapping[str, Any]


def combine(
    terms: Sequence[Term],
    like: Term,
    results: Sequence[Result],
    advance: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write sums of averages as checkpoints. Local: one process, without a process group.

    Sums are made in float64 (complex128 for complex tensors) and rounded once. Memory: 128 MiB of
    sums, whatever the tensors' sizes, and one block. Up to 16 results of fp32 are made of whole
    blocks of the usual 4 MiB; with more, blocks are smaller and each is read more than once.

    Args:
        like: the average after which the results are cut and named. All terms have its shapes and
            dtypes.
        advance: called with bytes done, which add up to those of all terms.

    Raises:
        CheckpointError: a term is altered or cut short, or a sum is not finite.
    """
    _Combination(terms, like, results, advance).run()


class _Combination:
    """The state of one pass."""

    def __init__(
        self,
        terms: Sequence[Term],
        like: Term,
        results: Sequence[Result],
        advance: Callable[[int], object],
    ) -> None:
        self._terms, self._like, self._results = terms, like, results
        self._advance = advance
        # One buffer for all: a block of each of a hundred checkpoints would be half a GB.
        buffer = bytearray(max(term.checkpoint.manifest.block_bytes for term in terms))
        for term in terms:
            term.checkpoint.share_buffer(buffer)
        dtypes = {torch_dtype(tensor.dtype) for tensor in like.average.tensors.values()}
        widest = max((_sum_dtype(d).itemsize / d.itemsize for d in dtypes), default=1)
        limit = int(_SUMS_BYTES / len(results) / widest) // 16 * 16
        self._block_bytes = max(_MIN_BLOCK_BYTES, min(like.checkpoint.manifest.block_bytes, limit))
        self._sums = torch.empty(
            max(_SUMS_BYTES, int(self._block_bytes * widest) * len(results)), dtype=torch.uint8
        )
        self._digest = manifest.checksum(ALGORITHM)
        self._broken: set[str] = set()

    def run(self) -> None:
        average = self._like.average
        entries: dict[str, list[tuple[str, SavedBox]]] = {name: [] for name in average.files}
        for fqn, tensor in average.tensors.items():
            for saved in tensor.boxes:
                entries[saved.file].append((fqn, saved))
        files: list[dict[str, SavedFile]] = [{} for _ in self._results]
        sums: list[dict[tuple[str, str], tuple[str, ...]]] = [{} for _ in self._results]
        for name in sorted(entries):
            header = self._like.checkpoint.check_header(average, name)
            with ExitStack() as closing:
                outputs = [
                    closing.enter_context(open(result.directory / name, "xb", buffering=0))
                    for result in self._results
                ]
                for output in outputs:
                    _write_all(output, memoryview(header))
                for fqn, saved in sorted(entries[name], key=lambda entry: entry[1].start):
                    found = self._box(fqn, average.tensors[fqn], saved, outputs)
                    for i, checked in enumerate(found):
                        sums[i][fqn, name] = tuple(checked)
            for each in files:
                each[name] = dataclasses.replace(average.files[name], checksum=self._digest(header))
        if self._broken:
            raise CheckpointError(
                f"the result holds NaN or Inf in {', '.join(sorted(self._broken))}; nothing is "
                "written"
            )
        for result, saved_files, checked_boxes in zip(self._results, files, sums, strict=True):
            self._write_manifest(result, saved_files, checked_boxes)

    def _box(
        self, fqn: str, tensor: SavedTensor, saved: SavedBox, outputs: Sequence[BinaryIO]
    ) -> list[list[str]]:
        """Make and write one box of each result. Returns the checksums of its blocks."""
        dtype = torch_dtype(tensor.dtype)
        sum_dtype = _sum_dtype(dtype)
        block = self._block_bytes // dtype.itemsize
        room = self._sums.numel() // len(outputs) // sum_dtype.itemsize
        step = max(1, room // block) * block
        checked: list[list[str]] = [[] for _ in outputs]
        for start in range(0, saved.box.numel, step):
            stop = min(start + step, saved.box.numel)
            num = (stop - start) * len(outputs)
            sums = self._sums[: num * sum_dtype.itemsize].view(sum_dtype)
            sums = sums.view(len(outputs), stop - start).zero_()
            for i in range(len(self._terms)):
                self._add(i, fqn, dtype, saved.box, start, stop, sums)
            for j, (output, total) in enumerate(zip(outputs, sums, strict=True)):
                for part in total.split(block):
                    rounded = part.to(dtype)
                    if not bool(rounded.isfinite().all()):
                        self._broken.add(fqn)
                    data = rounded.view(torch.uint8).numpy().data
                    checked[j].append(self._digest(data))
                    _write_all(output, data)
        return checked

    def _add(
        self,
        number: int,
        fqn: str,
        dtype: torch.dtype,
        box: Box,
        start: int,
        stop: int,
        sums: torch.Tensor,
    ) -> None:
        """Add a term's part of elements [start, stop) of a box to the sums."""
        term = self._terms[number]
        factors = [result.coefficients[number] for result in self._results]

        def add(out: torch.Tensor, values: torch.Tensor) -> None:
            wide = values.to(out.dtype)
            for total, factor in zip(out, factors, strict=True):
                if factor:
                    total.add_(wide, alpha=factor)

        targets = [
            (piece, sums[:, at : at + piece.numel].view(len(factors), *piece.sizes))
            for at, piece in boxes_within(box, start, stop)
        ]
        term.checkpoint.fill(term.average, term.names[fqn], targets, add)
        self._advance((stop - start) * dtype.itemsize)

    def _write_manifest(
        self,
        result: Result,
        files: Mapping[str, SavedFile],
        checked: Mapping[tuple[str, str], tuple[str, ...]],
    ) -> None:
        tensors = {
            fqn: dataclasses.replace(
                tensor,
                boxes=tuple(
                    dataclasses.replace(saved, checksums=checked[fqn, saved.file])
                    for saved in tensor.boxes
                ),
            )
            for fqn, tensor in self._like.average.tensors.items()
        }
        about = Manifest(
            result.save_id,
            ALGORITHM,
            self._block_bytes,
            result.written,
            result.state,
            {result.name: SavedAverage("", files, tensors)},
        )
        path = result.directory / MANIFEST
        path.write_bytes(manifest.dump(about))
        sync(path)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _write_all(output: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[output.write(data) :]
