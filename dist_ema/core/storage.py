"""Storage of the averages of this rank's fragments: one flat buffer per device and dtype.

[Note: gaps]
Engines that keep many weights in one flat buffer leave small gaps between them (alignment, padding
of the last shard). The buffer of the average has the same gaps, so that neighbors are contiguous on
both sides and one operation updates a whole buffer. Values in a gap are never read as weights.
Neighbors with equal gaps on both sides are a run. Small runs follow each other without a gap, for
`lerp.py` to update several at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_ema.core.accelerator import is_accelerator
from dist_ema.core.layout import Fragment
from dist_ema.core.lerp import Lerp, accumulation_dtype, is_small

_MAX_GAP = 64  # elements of a flat buffer that belong to no weight
_ALIGNMENT_BYTES = 16  # of the first element of a run, for vectorized kernels


class AverageStorage(Lerp):
    """Averages of a list of fragments, and their update. Everything is local."""

    def __init__(
        self,
        fragments: Sequence[Fragment],
        values: Sequence[Sequence[torch.Tensor]],
        *,
        owns_gaps: bool = True,
        overlap: bool = False,
        waits: bool = False,
    ) -> None:
        """
        Args:
            values: for each average, a 1-D tensor for each fragment.
            owns_gaps: whether gaps between values may be written.
            overlap, waits: as of `Lerp`.
        """
        self._max_gap = _MAX_GAP if owns_gaps else 0
        self._values = [list(tensors) for tensors in values]
        self._options = {"overlap": overlap, "waits": waits}
        self._plan(fragments)

    def _plan(self, fragments: Sequence[Fragment]) -> None:
        lives = [f.view for f in fragments]
        runs = _runs(lives, self._max_gap, self._values[0])
        super().__init__(
            [[_span(values, run) for run in runs] for values in self._values],
            [_span(lives, run) for run in runs],
            **self._options,
        )

    def bind(self, fragments: Sequence[Fragment]) -> None:
        """Update from these fragments from now on, since storage moved."""
        self.synchronize()
        self._plan(fragments)

    @property
    def values(self) -> list[list[torch.Tensor]]:
        """For each average, a tensor for each fragment. Waits for an update in progress."""
        self.synchronize()
        return self._values

    @property
    def nbytes(self) -> int:
        """Bytes of all averages, including padding."""
        storages = [v.untyped_storage() for tensors in self._values for v in tensors]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def average_dtype(wanted: torch.dtype, live: torch.Tensor) -> torch.dtype:
    """The dtype of a weight's average: the wanted one, or a complex dtype for a complex weight."""
    return accumulation_dtype(wanted, live.dtype) if live.is_complex() else wanted


def allocate(
    fragments: Sequence[Fragment],
    dtype: torch.dtype,
    num_averages: int,
    wanted: torch.device | None = None,
) -> list[list[torch.Tensor]]:
    """For each average, a 1-D tensor for each fragment, in one flat buffer per device and dtype.

    On the fragments' devices, or on the wanted one: pinned, if that is the CPU and theirs is not.
    """
    views = [f.view for f in fragments]
    averages = [[torch.empty(0, device="cpu")] * len(views) for _ in range(num_averages)]
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, view in enumerate(views):
        kinds.setdefault((average_dtype(dtype, view), view.device), []).append(i)
    for (kind, live_device), members in kinds.items():
        device = wanted or live_device
        pinned = device.type == "cpu" and is_accelerator(live_device)
        runs = _runs([views[i] for i in members], _MAX_GAP)
        runs = [[members[i] for i in run] for run in runs]
        runs.sort(key=lambda run: is_small(_span(views, run)))
        grain = max(1, _ALIGNMENT_BYTES // kind.itemsize)
        starts: dict[int, int] = {}
        end = 0
        for run in runs:
            span = _span(views, run)
            start = end if is_small(span) else -(-end // grain) * grain
            offsets = (int(views[i].storage_offset() - span.storage_offset()) for i in run)
            starts |= zip(run, (start + offset for offset in offsets), strict=True)
            end = start + span.numel()
        for values in averages:
            # Zeros: gaps are averaged too, and subnormal numbers in them would be slow.
            with torch.inference_mode(False):
                buffer = torch.zeros(end, dtype=kind, device=device, pin_memory=pinned)
            for i, start in starts.items():
                values[i] = buffer[start : start + views[i].numel()]
    return averages


def _address(view: torch.Tensor) -> tuple[int, int]:
    return view.untyped_storage().data_ptr(), int(view.storage_offset())


def _gap(before: torch.Tensor, after: torch.Tensor) -> int | None:
    """Elements between two tensors of one storage; None if they are not close neighbors."""
    if before.untyped_storage().data_ptr() != after.untyped_storage().data_ptr():
        return None
    if before.dtype != after.dtype:
        return None
    gap = int(after.storage_offset() - before.storage_offset()) - before.numel()
    return gap if 0 <= gap <= _MAX_GAP else None


def _runs(
    lives: Sequence[torch.Tensor], max_gap: int, values: Sequence[torch.Tensor] | None = None
) -> list[list[int]]:
    """Indices of tensors, in lists of neighbors in storage whose gaps are at most `max_gap`.

    With `values`, the gaps between values must equal those between live tensors.
    """
    values = lives if values is None else values
    runs: list[list[int]] = []
    for i in sorted(range(len(lives)), key=lambda i: (_address(values[i]), _address(lives[i]))):
        if runs:
            last = runs[-1][-1]
            gap = _gap(values[last], values[i])
            if gap is not None and gap <= max_gap and gap == _gap(lives[last], lives[i]):
                runs[-1].append(i)
                continue
        runs.append([i])
    return runs


def _span(tensors: Sequence[torch.Tensor], run: Sequence[int]) -> torch.Tensor:
    """A 1-D view from the start of the first tensor of a run to the end of the last one."""
    first, last = tensors[run[0]], tensors[run[-1]]
    if first is last:
        return first
    length = int(last.storage_offset() - first.storage_offset()) + last.numel()
    return first.as_strided((length,), (1,))
