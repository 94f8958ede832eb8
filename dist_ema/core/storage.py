"""The averaged values of this rank's fragments: one flat buffer a device.

[Note: gaps]
Engines that keep many weights in one flat buffer leave small gaps between them (alignment, padding
of the last shard). The shadow repeats such gaps, so that neighbours stay contiguous on both sides
and one operation updates a whole buffer. What lies in a gap is never read as a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_ema.core.accelerator import is_accelerator
from dist_ema.core.layout import Fragment
from dist_ema.core.lerp import Lerp, MultiAvgFn, accumulation_dtype, gains_from_packing

_PACK_ELEMENTS = 1 << 19  # 2 MB in fp32, a part of a common L3 cache
_MAX_GAP = 64  # elements of a flat buffer that belong to no weight
_ALIGNMENT_BYTES = 16  # what vectorised kernels want of the start of a tensor
_ALIGNED_FROM = 256  # elements: smaller tensors are packed, so that padding stays below 2 %


class AverageStorage:
    """Averages of a list of fragments. Everything is local."""

    def __init__(
        self,
        fragments: Sequence[Fragment],
        values: Sequence[Sequence[torch.Tensor]],
        *,
        owns_gaps: bool = True,
        overlap: bool = False,
        waits: bool = False,
    ) -> None:
        """`values` has for each average a 1-D tensor for each fragment.

        What lies between values may be written only where they are of `allocate`. With `waits`, the
        caller's next work waits for each update.
        """
        self._max_gap = _MAX_GAP if owns_gaps else 0
        self._values = [list(of_one) for of_one in values]
        self._overlap, self._waits = overlap, waits
        self._lerp = self._plan(fragments)

    @property
    def values(self) -> list[list[torch.Tensor]]:
        """For each average a tensor for each fragment. Waits for an update that is under way."""
        self._lerp.synchronize()
        return self._values

    @property
    def nbytes(self) -> int:
        """Bytes of all averages together, padding included."""
        storages = [v.untyped_storage() for of_one in self._values for v in of_one]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def bind(self, fragments: Sequence[Fragment]) -> None:
        """Update from these fragments from now on: storage moved."""
        self._lerp.synchronize()
        self._lerp = self._plan(fragments)

    def _plan(self, fragments: Sequence[Fragment]) -> Lerp:
        lives = [f.view for f in fragments]
        runs = _merge(self._values[0], lives, self._max_gap)
        packs = _pack_small(runs, self._values[0], lives, self._max_gap)
        return Lerp(
            [
                [_span(values[pack[0][0]], values[pack[-1][-1]]) for pack in packs]
                for values in self._values
            ],
            [_parts(pack, self._values[0], lives) for pack in packs],
            overlap=self._overlap,
        )

    def fold(self, decays: Sequence[float]) -> None:
        """Fold the live values in, with a decay for each average. No host sync, no allocation."""
        self._lerp.fold(decays)
        if self._waits:
            self._lerp.fence()

    def apply(self, fn: MultiAvgFn, num_averaged: int) -> None:
        """Fold the live values in by a function in torch's `multi_avg_fn` convention."""
        self._lerp.apply(fn, num_averaged)
        if self._waits:
            self._lerp.fence()

    def copy(self) -> None:
        """Start again from the live values, bit for bit where the dtypes allow."""
        self._lerp.copy()
        self._lerp.fence()


def average_dtype(wanted: torch.dtype, live: torch.Tensor) -> torch.dtype:
    """The dtype of an average: the wanted one, or its complex counterpart at least."""
    return accumulation_dtype(wanted, live.dtype) if live.is_complex() else wanted


def allocate(
    fragments: Sequence[Fragment],
    dtype: torch.dtype,
    num_averages: int,
    wanted: torch.device | None = None,
) -> list[list[torch.Tensor]]:
    """For each average a 1-D tensor for each fragment, in one flat buffer a device.

    Beside the fragments, or on the wanted device: pinned, if that is the CPU and theirs is not.
    """
    views = [f.view for f in fragments]
    averages = [[torch.empty(0)] * len(views) for _ in range(num_averages)]
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, view in enumerate(views):
        kinds.setdefault((average_dtype(dtype, view), view.device), []).append(i)
    for (kind, beside), members in kinds.items():
        device = wanted or beside
        pinned = device.type == "cpu" and is_accelerator(beside)  # so that copies need not wait
        members.sort(key=lambda i: _address(views[i]))
        starts, total = _pack([views[i] for i in members], kind.itemsize)
        for values in averages:
            # Zeros, not empty: gaps are averaged too, and must not hold numbers that trap.
            with torch.inference_mode(False):
                buffer = torch.zeros(total, dtype=kind, device=device, pin_memory=pinned)
            for i, start in zip(members, starts, strict=True):
                values[i] = buffer[start : start + views[i].numel()]
    return averages


def _address(view: torch.Tensor) -> tuple[int, int]:
    return view.untyped_storage().data_ptr(), int(view.storage_offset())


def _gap(before: torch.Tensor, after: torch.Tensor) -> int | None:
    """Elements between two tensors of one storage; None if they are no near neighbours."""
    if before.untyped_storage().data_ptr() != after.untyped_storage().data_ptr():
        return None
    if before.dtype != after.dtype:
        return None
    gap = int(after.storage_offset() - before.storage_offset()) - before.numel()
    return gap if 0 <= gap <= _MAX_GAP else None


def _pack(views: Sequence[torch.Tensor], itemsize: int) -> tuple[list[int], int]:
    """Where each value starts in the flat buffer, and its length, in elements."""
    grain = max(1, _ALIGNMENT_BYTES // itemsize)
    starts: list[int] = []
    end = 0
    for i, view in enumerate(views):
        gap = _gap(views[i - 1], view) if i else None
        start = end + (gap or 0)
        if gap is None and view.numel() >= _ALIGNED_FROM:
            start = -(-end // grain) * grain
        starts.append(start)
        end = start + view.numel()
    return starts, end


def _merge(
    values: Sequence[torch.Tensor], lives: Sequence[torch.Tensor], max_gap: int
) -> list[list[int]]:
    """Runs of numbers of pieces that are neighbours on both sides, across equal gaps."""
    runs: list[list[int]] = []
    for i in sorted(range(len(lives)), key=lambda i: (_address(values[i]), _address(lives[i]))):
        if runs:
            gap = _gap(values[runs[-1][-1]], values[i])
            if gap is not None and gap <= max_gap and gap == _gap(lives[runs[-1][-1]], lives[i]):
                runs[-1].append(i)
                continue
        runs.append([i])
    return runs


def _pack_small(
    runs: list[list[int]],
    values: Sequence[torch.Tensor],
    lives: Sequence[torch.Tensor],
    max_gap: int,
) -> list[list[list[int]]]:
    """Put small runs together that are neighbours in the average; others stay alone."""
    packs: list[list[list[int]]] = []
    room = 0  # in the last pack
    for run in runs:
        live, value = lives[run[0]], values[run[0]]
        whole = _span(live, lives[run[-1]])
        length, small = whole.numel(), gains_from_packing(value, whole)
        if small and length + max_gap <= room:
            before = packs[-1][-1][-1]
            gap = _gap(values[before], value)
            if gap is not None and gap <= max_gap and lives[before].dtype == live.dtype:
                packs[-1].append(run)
                room -= gap + length
                continue
        packs.append([run])
        room = _PACK_ELEMENTS - length if small else 0
    return packs


def _parts(
    pack: list[list[int]], values: Sequence[torch.Tensor], lives: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The live values of a pack, and zeros for the gaps of the average between them."""
    parts: list[torch.Tensor] = []
    for number, run in enumerate(pack):
        gap = _gap(values[pack[number - 1][-1]], values[run[0]]) if number else 0
        if gap:
            parts.append(lives[run[0]].new_zeros(gap))
        parts.append(_span(lives[run[0]], lives[run[-1]]))
    return parts


def _span(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """One 1-D view from the start of a tensor to the end of another that follows in its storage."""
    if first is last:
        return first
    length = int(last.storage_offset() - first.storage_offset()) + last.numel()
    return first.as_strided((length,), (1,))
