"""Ranges of a saved tensor, read from whichever blocks of whichever boxes hold them."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import torch

from dist_ema.checkpoint.blocks import Checker, Files
from dist_ema.checkpoint.manifest import Manifest, SavedBox
from dist_ema.checkpoint.reader import Source
from dist_ema.layout import Box, flat_boxes, flat_ends, overlap


class RegionReader:
    """Reads ranges of elements. Memory: one block. Every byte that is copied was checked."""

    def __init__(self, files: Files, about: Manifest) -> None:
        self._block_bytes = about.block_bytes
        self._checker = Checker(files, about)
        self._raw = torch.frombuffer(self._checker.buffer, dtype=torch.uint8)
        self._boxes: tuple[Source | None, Boxes] = (None, Boxes(()))  # of the tensor read last

    def read(self, source: Source, start: int, out: torch.Tensor) -> None:
        """Fill a 1-D tensor of the source's dtype with elements from `start` on, row-major.

        Raises:
            CheckpointError: the bytes are altered or cut short.
        """
        if source is not self._boxes[0]:
            self._boxes = source, Boxes(source.tensor.boxes)
        at = 0
        for outer in flat_boxes(source.tensor.shape, start, start + out.numel()):
            target = out[at : at + outer.numel].view(outer.sizes)
            for saved in self._boxes[1].meeting(outer):
                self._copy(source, saved, outer, target)
            at += outer.numel

    def _copy(self, source: Source, saved: SavedBox, outer: Box, target: torch.Tensor) -> None:
        """Copy what a saved box has of a box of the tensor."""
        common = overlap(outer, saved.box)
        assert common is not None
        block = self._block_bytes // source.dtype.itemsize
        first, last = flat_ends(common, saved.box)
        for number in range(first // block, last // block + 1):
            begin, end = number * block, min((number + 1) * block, saved.box.numel)
            moves = [
                (there, held, part)
                for there, held in placed(saved.box, begin, end)
                if (part := overlap(held, common)) is not None
            ]
            if not moves:
                continue
            read = self._checker.block(source.average, source.fqn, saved, number)
            values = self._raw[: len(read)].view(source.dtype)
            for there, held, part in moves:
                run = values[there : there + held.numel].view(held.sizes)
                target[part.within(outer)] = run[part.within(held)]


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
