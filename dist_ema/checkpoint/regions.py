"""Boxes of a saved tensor, read from whichever blocks of whichever saved boxes hold them."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dist_ema.checkpoint.blocks import Checker, Files
from dist_ema.checkpoint.manifest import Manifest, SavedBox
from dist_ema.checkpoint.reader import Source
from dist_ema.core.layout import Box, flat_boxes, flat_ends, overlap

Target = tuple[Box, torch.Tensor]  # a box of the tensor, and what it is read into


def _copy(out: torch.Tensor, values: torch.Tensor) -> None:
    out.copy_(values)


class RegionReader:
    """Reads boxes. Memory: one block. Every byte that is copied was checked."""

    def __init__(self, files: Files, about: Manifest, buffer: bytearray | None = None) -> None:
        """`buffer` holds a block; several readers may share one."""
        self._block_bytes = about.block_bytes
        self._checker = Checker(files, about)
        if buffer is not None:
            self._checker.buffer = buffer
        self._raw = torch.frombuffer(self._checker.buffer, dtype=torch.uint8)
        self._boxes: tuple[Source | None, Boxes] = (None, Boxes(()))  # of the tensor read last

    def read(self, source: Source, start: int, out: torch.Tensor) -> None:
        """Fill a 1-D tensor of the source's dtype with elements from `start` on, row-major."""
        targets, at = [], 0
        for outer in flat_boxes(source.tensor.shape, start, start + out.numel()):
            targets.append((outer, out[at : at + outer.numel].view(outer.sizes)))
            at += outer.numel
        self.fill(source, targets)

    def check(self, source: Source, targets: Sequence[Target]) -> None:
        """Read the bytes that would fill these boxes, and compare their checksums."""
        self.fill(source, targets, None)

    def fill(
        self,
        source: Source,
        targets: Sequence[Target],
        put: Callable[[torch.Tensor, torch.Tensor], None] | None = _copy,
    ) -> None:
        """Fill boxes of one tensor from the saved ones. Each block is read once.

        Args:
            put: called with a part of a target and its saved values; None only checks the bytes.
        """
        if source is not self._boxes[0]:
            self._boxes = source, Boxes(source.tensor.boxes)
        wanted: dict[Box, tuple[SavedBox, list[tuple[Box, Target]]]] = {}
        for target in targets:
            for saved in self._boxes[1].meeting(target[0]):
                common = overlap(target[0], saved.box)
                assert common is not None
                wanted.setdefault(saved.box, (saved, []))[1].append((common, target))
        for saved, parts in sorted(wanted.values(), key=lambda w: (w[0].file, w[0].start)):
            block = self._block_bytes // source.dtype.itemsize
            ends = [flat_ends(common, saved.box) for common, _ in parts]
            for number in range(
                min(a for a, _ in ends) // block, max(b for _, b in ends) // block + 1
            ):
                begin, end = number * block, min((number + 1) * block, saved.box.numel)
                moves = [
                    (there, held, inner, target)
                    for there, held in placed(saved.box, begin, end)
                    for common, target in parts
                    if (inner := overlap(held, common)) is not None
                ]
                if not moves:
                    continue
                read = self._checker.block(source.average, source.fqn, saved, number)
                if put is None:
                    continue
                values = self._raw[: len(read)].view(source.dtype)
                for there, held, inner, (outer, out) in moves:
                    run = values[there : there + held.numel].view(held.sizes)
                    index: Any = (..., *inner.within(outer))
                    put(out[index], run[inner.within(held)])


class Boxes:
    """The boxes of a tensor, to be found by place."""

    def __init__(self, boxes: Sequence[SavedBox]) -> None:
        self._exact = {saved.box: saved for saved in boxes if saved.nbytes}
        self._sorted = sorted(self._exact.values(), key=lambda saved: saved.box.offsets)
        self._starts = [saved.box.offsets[:1] for saved in self._sorted]
        self._longest = max((saved.box.sizes[:1] for saved in self._sorted), default=())

    def meeting(self, box: Box) -> list[SavedBox]:
        """Those that overlap a box. They partition the tensor, so an equal one is the only one."""
        if box in self._exact:
            return [self._exact[box]]
        candidates = self._sorted
        if box.offsets and candidates:
            first = bisect.bisect_right(self._starts, (box.offsets[0] - self._longest[0],))
            last = bisect.bisect_left(self._starts, (box.offsets[0] + box.sizes[0],))
            candidates = self._sorted[first:last]
        return [saved for saved in candidates if overlap(saved.box, box) is not None]


def placed(box: Box, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """The boxes, in the tensor, of elements [start, stop) of a box, each with its start in them."""
    at = 0
    for part in flat_boxes(box.sizes, start, stop):
        offsets = tuple(base + o for base, o in zip(box.offsets, part.offsets, strict=True))
        yield at, Box(offsets, part.sizes)
        at += part.numel
