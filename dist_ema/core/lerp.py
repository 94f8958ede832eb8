"""The arithmetic on weights: shadow <- shadow + weight * (live - shadow), in fp32 or wider.

Planned once into batches with equal dtypes and devices, then applied with a few grouped calls.
Where a dtype must change first, or several averages read the same live values, the batches are
chunks that stay in cache: no full-size copy is ever made, and live values are read from memory
once. Small tensors of the CPU are laid end to end in cache first: a grouped call there is a call
for each tensor, which costs more than its elements. Where the average lies on another device
(offload), chunks of it come to the live values and go back; two chunks are under way at a time,
each with its own staging, so that the ways there and back overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dist_ema.core.accelerator import SideStreams, graph_capture_query, is_accelerator

# Of live values. On a CPU and across devices 4 MB in fp32, a part of a common L3 cache: measured
# against smaller and larger ones. Within an accelerator 32 MB, a part of the L2 cache (an H100 has
# 50 MB), since a grouped call takes as long to launch as some MB to average: an estimate.
_CHUNK_ELEMENTS = 1 << 20
_CHUNK_ELEMENTS_WITHIN_ACCELERATOR = 1 << 23
_SMALL_ELEMENTS = 4096  # of a tensor whose own call costs more than copying it

MultiAvgFn = Callable[[list[torch.Tensor], list[torch.Tensor], int], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Pieces with equal dtypes and device. Staging is None where the dtype is right already."""

    averages: list[list[torch.Tensor]]  # one list for each average
    lives: list[torch.Tensor]
    packed: torch.Tensor | None  # all live values end to end, where the shadows are one tensor
    staged_lives: list[torch.Tensor] | None
    staged_averages: list[torch.Tensor] | None  # used by one average after the other
    rushes: bool  # whether copies need not be waited for: a side stream keeps them in order

    def fold(self, weights: Sequence[float]) -> None:
        narrow = self._whole_lives()
        lives = self._widened(narrow)
        for averages, weight in zip(self.averages, weights, strict=True):
            if weight == 0.0:
                continue
            if weight == 1.0:
                torch._foreach_copy_(averages, narrow, self.rushes)
                continue
            if self.staged_averages is None:
                torch._foreach_lerp_(averages, lives, weight)
                continue
            torch._foreach_copy_(self.staged_averages, averages, self.rushes)
            torch._foreach_lerp_(self.staged_averages, lives, weight)
            torch._foreach_copy_(averages, self.staged_averages, self.rushes)

    def apply(self, fn: MultiAvgFn, num_averaged: int) -> None:
        lives = self._widened(self._whole_lives())
        for averages in self.averages:
            if self.staged_averages is None:
                fn(averages, lives, num_averaged)
                continue
            torch._foreach_copy_(self.staged_averages, averages, self.rushes)
            fn(self.staged_averages, lives, num_averaged)
            torch._foreach_copy_(averages, self.staged_averages, self.rushes)

    def copy(self) -> None:
        lives = self._whole_lives()
        for averages in self.averages:
            torch._foreach_copy_(averages, lives, self.rushes)

    def _whole_lives(self) -> list[torch.Tensor]:
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
        """`shadows[k][i]` is what average k holds of `lives[i]`, end to end: 1-D, of one length.

        With `overlap` everything runs on a side stream (see [Note: fences]).
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

    def fold(self, decays: Sequence[float]) -> None:
        """shadow <- decay * shadow + (1 - decay) * live, with a decay for each average.

        No host sync, no allocation. A decay of 0 copies and one of 1 leaves the average alone,
        both exactly, also where values are not finite.
        """
        weights = [1.0 - decay for decay in decays]
        for track in self._tracks:
            track.run(lambda batch: batch.fold(weights))

    def apply(self, fn: MultiAvgFn, num_averaged: int) -> None:
        """Let a function in torch's `multi_avg_fn` convention fold the live values in.

        It is called with lists of 1-D pieces that have one dtype, batch by batch.
        """
        for track in self._tracks:
            track.run(lambda batch: batch.apply(fn, num_averaged))

    def copy(self) -> None:
        """shadow <- live, in every average."""
        for track in self._tracks:
            track.run(_Batch.copy)

    def fence(self) -> None:
        """Let what the caller launches next wait for updates that are under way."""
        for track in self._tracks:
            if track.streams is not None:
                track.streams.fence()

    def synchronize(self) -> None:
        """Let the host, and what the caller launches next, wait for updates under way."""
        self.fence()
        for track in self._tracks:
            if track.streams is not None:
                track.streams.synchronize()


@dataclass(frozen=True, slots=True, eq=False)
class _Track:
    """Batches with one pair of devices, and the side streams that they run on, if any."""

    streams: SideStreams | None  # first: they end before the memory that they use is freed
    batches: list[_Batch]
    is_capturing: Callable[[], bool]

    def run(self, work: Callable[[_Batch], None]) -> None:
        if self.is_capturing():
            raise RuntimeError(
                "the average cannot be updated while a graph is captured: each replay would apply "
                "the decay of this one call, and step and num_updates would not count it; call "
                "update() after the replay, outside the graph"
            )
        if self.streams is None:
            for batch in self.batches:
                work(batch)
            return
        self.streams.run(work, self.batches)


def gains_from_packing(average: torch.Tensor, live: torch.Tensor) -> bool:
    """Whether a call for a small tensor costs more than copying it beside others first."""
    on_cpu = live.device.type == "cpu" and not _crosses(average, live)
    return on_cpu and 0 < live.numel() <= _SMALL_ELEMENTS


def _crosses(average: torch.Tensor, live: torch.Tensor) -> bool:
    """Whether an average has to come to the device of its live values."""
    return average.device != live.device


def accumulation_dtype(average: torch.dtype, live: torch.dtype) -> torch.dtype:
    """The dtype in which a shadow is updated: its own, but never narrower than fp32."""
    wide = torch.promote_types(average, torch.float32)
    return torch.promote_types(wide, torch.complex64) if live.is_complex else wide


def squared_norms(average: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """‖shadow - live‖² and ‖live‖² of 1-D tensors, in float64, a chunk at a time."""
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
    """`num_stagings` batches in a row have staging of their own."""
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
    """A batch for each tensor of the shadows; all share the staging."""
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
    room = length
    for number, size in enumerate(sizes):
        at = 0
        while at < size:
            n = min(room, size - at)
            chunk.append((number, at, at + n))
            at, room = at + n, room - n
            if room == 0:
                yield chunk
                chunk, room = [], length
    if chunk:
        yield chunk
