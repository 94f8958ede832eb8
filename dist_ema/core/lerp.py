"""The update: average <- average + weight * (live - average), in fp32 or wider.

Planned once into batches of equal dtypes and devices, then applied with a few grouped calls
(`torch._foreach_*`). Where a dtype must be converted, or several averages read the same live
values, a batch is a chunk that stays in cache, so live values are read from memory once and no
full-size copy is made. Small tensors on the CPU are concatenated in cache first, since a grouped
call there costs more per tensor than the copy. Where the average is on another device (offload),
chunks of it are copied to the live values and back; two chunks are in progress at a time, each with
its own staging, so that copies in both directions overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dist_ema.core.accelerator import SideStreams, graph_capture_query, is_accelerator

# Chunks of live values. On a CPU and across devices 4 MB in fp32, a part of a common L3 cache, by
# measurement. Within an accelerator 32 MB, a part of the L2 cache (50 MB on an H100): an estimate.
_CHUNK_ELEMENTS = 1 << 20
_CHUNK_ELEMENTS_WITHIN_ACCELERATOR = 1 << 23
_SMALL_ELEMENTS = 4096  # a call per tensor costs more than copying tensors up to this size

MultiAvgFn = Callable[[list[torch.Tensor], list[torch.Tensor], int], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Tensors of equal dtypes and device. Staging is None where no conversion is needed."""

    averages: list[list[torch.Tensor]]  # one list for each average
    lives: list[torch.Tensor]
    packed: torch.Tensor | None  # buffer to concatenate live values, if each average is one tensor
    staged_lives: list[torch.Tensor] | None
    staged_averages: list[torch.Tensor] | None
    non_blocking: bool  # of copies: a side stream keeps them in order

    def update(self, weights: Sequence[float]) -> None:
        narrow = self._concatenated()
        lives = self._widened(narrow)
        for averages, weight in zip(self.averages, weights, strict=True):
            if weight == 0.0:
                continue
            if weight == 1.0:
                torch._foreach_copy_(averages, narrow, self.non_blocking)
                continue
            if self.staged_averages is None:
                torch._foreach_lerp_(averages, lives, weight)
                continue
            torch._foreach_copy_(self.staged_averages, averages, self.non_blocking)
            torch._foreach_lerp_(self.staged_averages, lives, weight)
            torch._foreach_copy_(averages, self.staged_averages, self.non_blocking)

    def apply(self, fn: MultiAvgFn, num_averaged: int) -> None:
        lives = self._widened(self._concatenated())
        for averages in self.averages:
            if self.staged_averages is None:
                fn(averages, lives, num_averaged)
                continue
            torch._foreach_copy_(self.staged_averages, averages, self.non_blocking)
            fn(self.staged_averages, lives, num_averaged)
            torch._foreach_copy_(averages, self.staged_averages, self.non_blocking)

    def copy(self) -> None:
        lives = self._concatenated()
        for averages in self.averages:
            torch._foreach_copy_(averages, lives, self.non_blocking)

    def _concatenated(self) -> list[torch.Tensor]:
        if self.packed is None:
            return self.lives
        return [torch.cat(self.lives, out=self.packed)]

    def _widened(self, lives: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.staged_lives is None:
            return lives
        torch._foreach_copy_(self.staged_lives, lives)
        return self.staged_lives


class Lerp:
    """The update of a fixed list of live tensors and their averages. Everything here is local."""

    def __init__(
        self,
        averages: Sequence[Sequence[torch.Tensor]],
        lives: Sequence[Sequence[torch.Tensor]],
        *,
        overlap: bool = False,
    ) -> None:
        """
        Args:
            averages: `averages[k][i]`, 1-D, is average k of the concatenation of `lives[i]`.
            overlap: run everything on a side stream (see [Note: fences]).
        """
        grouped: dict[object, list[int]] = {}
        for i, (like, parts) in enumerate(zip(averages[0], lives, strict=True)):
            if like.numel():
                key = (like.dtype, parts[0].dtype, like.device, parts[0].device, len(parts) > 1)
                grouped.setdefault(key, []).append(i)
        self._tracks: list[_Track] = []
        for members in grouped.values():
            of_all = [[of_one[i] for i in members] for of_one in averages]
            here = [lives[i] for i in members]
            first = here[0][0]
            crosses = _crosses(of_all[0][0], first)
            streams = SideStreams(first.device, 2 if crosses else 1) if crosses or overlap else None
            if len(here[0]) > 1:
                batches = list(_packs(of_all, here))
            else:
                whole = [part for (part,) in here]
                batches = list(_batches(of_all, whole, num_stagings=2 if crosses else 1))
            self._tracks.append(_Track(streams, batches, graph_capture_query(first.device)))

    def update(self, decays: Sequence[float]) -> None:
        """average <- decay * average + (1 - decay) * live, with a decay for each average.

        No host sync, no allocation. A decay of 0 copies and a decay of 1 changes nothing, both
        exactly, even where values are not finite.
        """
        weights = [1.0 - decay for decay in decays]
        for track in self._tracks:
            track.run(lambda batch: batch.update(weights))

    def apply(self, fn: MultiAvgFn, num_averaged: int) -> None:
        """Call a function with the signature of torch's `multi_avg_fn` for each batch.

        It gets lists of 1-D tensors of one dtype.
        """
        for track in self._tracks:
            track.run(lambda batch: batch.apply(fn, num_averaged))

    def copy(self) -> None:
        """average <- live, in every average."""
        for track in self._tracks:
            track.run(_Batch.copy)

    def fence(self) -> None:
        """Let later work of the caller wait for updates in progress."""
        for track in self._tracks:
            if track.streams is not None:
                track.streams.fence()

    def synchronize(self) -> None:
        """Let the host and later work of the caller wait for updates in progress."""
        self.fence()
        for track in self._tracks:
            if track.streams is not None:
                track.streams.synchronize()


@dataclass(frozen=True, slots=True, eq=False)
class _Track:
    """Batches with one pair of devices, and the side streams that they run on, if any."""

    streams: SideStreams | None  # the first field: destroyed before the memory that they use
    batches: list[_Batch]
    is_capturing: Callable[[], bool]

    def run(self, work: Callable[[_Batch], None]) -> None:
        if self.is_capturing():
            raise RuntimeError(
                "the average cannot be updated while a graph is captured: each replay would apply "
                "the decay of this call, and step and num_updates would not be incremented; call "
                "update() after the replay, outside the graph"
            )
        if self.streams is None:
            for batch in self.batches:
                work(batch)
            return
        self.streams.run(work, self.batches)


def gains_from_packing(average: torch.Tensor, live: torch.Tensor) -> bool:
    """Whether an own call for this tensor costs more than concatenating it with others."""
    on_cpu = live.device.type == "cpu" and not _crosses(average, live)
    return on_cpu and 0 < live.numel() <= _SMALL_ELEMENTS


def _crosses(average: torch.Tensor, live: torch.Tensor) -> bool:
    """Whether an average is on another device than its live values."""
    return average.device != live.device


def accumulation_dtype(average: torch.dtype, live: torch.dtype) -> torch.dtype:
    """The dtype in which an average is updated: its own, but never narrower than fp32."""
    wide = torch.promote_types(average, torch.float32)
    return torch.promote_types(wide, torch.complex64) if live.is_complex else wide


def squared_norms(average: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """‖average - live‖² and ‖live‖² of 1-D tensors, in float64, a chunk at a time."""
    sums = torch.zeros(2, dtype=torch.float64, device=live.device)
    wide = torch.complex128 if live.is_complex() else torch.float64
    step = 1 << 20
    for chunk, here in zip(average.split(step), live.split(step), strict=True):
        exact = here.to(wide)
        apart = chunk.to(live.device, wide).sub_(exact)
        norms = [torch.linalg.vector_norm(apart), torch.linalg.vector_norm(exact)]
        sums += torch.stack(norms).square()
    return sums


def _batches(
    averages: list[list[torch.Tensor]], lives: list[torch.Tensor], *, num_stagings: int
) -> Iterator[_Batch]:
    """Batches of chunks; `num_stagings` consecutive batches have their own staging."""
    average, live = averages[0][0], lives[0]
    dtype = accumulation_dtype(average.dtype, live.dtype)
    crosses = _crosses(average, live)
    if average.dtype == dtype == live.dtype and len(averages) == 1 and not crosses:
        yield _Batch(averages, lives, None, None, None, False)
        return

    accelerated = is_accelerator(live.device)
    within = accelerated and not crosses
    most = _CHUNK_ELEMENTS_WITHIN_ACCELERATOR if within else _CHUNK_ELEMENTS
    length = min(most, sum(x.numel() for x in lives))

    def stagings(wanted: bool) -> list[torch.Tensor | None]:
        if not wanted:
            return [None] * num_stagings
        with torch.inference_mode(False):
            chunks = torch.empty(num_stagings, length, dtype=dtype, device=live.device)
        return list(chunks)

    average_buffers = stagings(crosses or average.dtype != dtype)
    live_buffers = stagings(live.dtype != dtype)
    for number, cuts in enumerate(_chunks([x.numel() for x in lives], length)):
        sizes = [stop - start for _, start, stop in cuts]

        yield _Batch(
            [[of_one[i][start:stop] for i, start, stop in cuts] for of_one in averages],
            [lives[i][start:stop] for i, start, stop in cuts],
            None,
            _cut(live_buffers[number % num_stagings], sizes),
            _cut(average_buffers[number % num_stagings], sizes),
            crosses and accelerated,
        )


def _packs(
    averages: list[list[torch.Tensor]], lives: Sequence[Sequence[torch.Tensor]]
) -> Iterator[_Batch]:
    """A batch for each averaged tensor; all share the staging."""
    average, live = averages[0][0], lives[0][0]
    dtype = accumulation_dtype(average.dtype, live.dtype)
    length = max(tensor.numel() for tensor in averages[0])
    with torch.inference_mode(False):
        packed = torch.empty(length, dtype=live.dtype, device=live.device)
        wide = [
            None if narrow == dtype else torch.empty(length, dtype=dtype, device=live.device)
            for narrow in (live.dtype, average.dtype)
        ]
    for of_all, parts in zip(zip(*averages, strict=True), lives, strict=True):
        size = [of_all[0].numel()]
        yield _Batch(
            [[of_one] for of_one in of_all],
            list(parts),
            packed[: size[0]],
            _cut(wide[0], size),
            _cut(wide[1], size),
            False,
        )


def _cut(buffer: torch.Tensor | None, sizes: list[int]) -> list[torch.Tensor] | None:
    return None if buffer is None else list(buffer[: sum(sizes)].split(sizes))


def _chunks(sizes: Sequence[int], length: int) -> Iterator[list[tuple[int, int, int]]]:
    """Pack ranges (number, start, stop) of 1-D tensors into lists of `length` elements."""
    chunk: list[tuple[int, int, int]] = []
    free = length
    for number, size in enumerate(sizes):
        at = 0
        while at < size:
            n = min(free, size - at)
            chunk.append((number, at, at + n))
            at, free = at + n, free - n
            if free == 0:
                yield chunk
                chunk, free = [], length
    if chunk:
        yield chunk
