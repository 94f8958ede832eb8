"""The update: average <- average + weight * (live - average), in fp32 or wider.

Planned once into batches of equal dtypes and devices, then applied with a few grouped calls
(`torch._foreach_*`). Where a dtype must be converted, or several averages read the same live
values, a batch is a chunk that stays in cache, so live values are read from memory once and no
full-size copy is made. Where the average is on another device (offload), chunks of it are copied to
the live values and back; two chunks are in progress at a time, each with its own staging, so that
copies in both directions overlap.

[Note: small tensors on a CPU]
An operator costs more than the arithmetic of a small tensor, so these are concatenated in cache,
and one operator updates a range of the average. No operator is given more than `_SERIAL_ELEMENTS`
of several tensors together: torch runs more on its thread pool, and to wake a pool, or to wait for
a thread whose core runs another process, takes longer than the update. So an update waits for other
threads only where an elementwise operator on one of the live tensors does too.

[Note: narrow weights]
torch has no operator that reads bf16 and updates fp32, so there are two, over a chunk in cache: one
converts, one updates. Each takes about as long as moving the bytes, and they do not overlap. On an
accelerator with Triton, one kernel does both (`fused.py`). On a CPU `torch.compile` would fuse
them, but needs a C++ compiler and seconds to compile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_ema.core.accelerator import SideStreams, is_accelerator

_LOG = logging.getLogger(__name__)

# Elements of chunks of live values. By measurement on CPUs: 512 kB in fp32 stay in the L2 cache of
# each thread's core; chunks that cross devices have 4 MB.
_CHUNK_A_THREAD = 1 << 17
_CHUNK_ACROSS_DEVICES = 1 << 20
# Within an accelerator 32 MB, a part of the L2 cache (50 MB on an H100): an estimate.
_CHUNK_WITHIN_ACCELERATOR = 1 << 23
_SMALL_BYTES = 8192  # up to this size of live values, copies cost less than operators
_SERIAL_ELEMENTS = (1 << 15) - 16  # torch updates fewer than 2^15 on one thread

MultiAvgFn = Callable[[list[torch.Tensor], list[torch.Tensor], int], None]
# What is done with averages and live values, both of the dtype of the accumulation. None: nothing.
Step = Callable[[list[torch.Tensor], list[torch.Tensor]], object] | None


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Tensors of equal dtypes and device. Staging is None where no conversion is needed."""

    averages: list[list[torch.Tensor]]  # one list for each average
    lives: list[torch.Tensor]
    pack: Callable[[], object] | None  # concatenates live values
    narrow: list[torch.Tensor]  # live values in pieces like those of an average
    staged_lives: list[torch.Tensor] | None
    staged_averages: list[torch.Tensor] | None
    non_blocking: bool  # argument of `copy_`; True on a side stream, which keeps copies in order

    def update(self, steps: Sequence[Step], decays: Sequence[float] | None) -> None:
        if self.pack is not None:
            self.pack()
        lives = self.narrow
        if self.staged_lives is not None:
            lives = self.staged_lives
            torch._foreach_copy_(lives, self.narrow)
        for averages, step in zip(self.averages, steps, strict=True):
            if step is None:
                continue
            if step is _copy:
                torch._foreach_copy_(averages, self.narrow, self.non_blocking)
            elif self.staged_averages is None:
                step(averages, lives)
            else:
                torch._foreach_copy_(self.staged_averages, averages, self.non_blocking)
                step(self.staged_averages, lives)
                torch._foreach_copy_(averages, self.staged_averages, self.non_blocking)


def _copy(averages: list[torch.Tensor], lives: list[torch.Tensor]) -> None:
    """The step of a decay of 0. Live values are copied as they are, without a wider dtype."""


def _step(decay: float) -> Step:
    weight = 1.0 - decay
    if weight == 0.0:
        return None
    return _copy if weight == 1.0 else lambda a, lives: torch._foreach_lerp_(a, lives, weight)


@dataclass(frozen=True, slots=True, eq=False)
class _FusedBatch:
    """Tensors of equal dtypes and device that are updated in one pass."""

    averages: list[list[torch.Tensor]]  # one list for each average
    lives: list[torch.Tensor]
    launches: list[Callable[[float], None]]  # of the weight, one for each average
    batches: list[_Batch]  # for steps that are not given by decays

    def update(self, steps: Sequence[Step], decays: Sequence[float] | None) -> None:
        if decays is None:
            for batch in self.batches:
                batch.update(steps, decays)
            return
        every = zip(self.averages, self.launches, steps, decays, strict=True)
        for averages, launch, step, decay in every:
            if step is _copy:
                torch._foreach_copy_(averages, self.lives)
            elif step is not None:
                launch(1.0 - decay)
                torch.autograd.graph.increment_version(averages)  # as operators of torch do


class Lerp:
    """The update of a fixed list of live tensors and their averages. Everything here is local."""

    def __init__(
        self,
        averages: Sequence[Sequence[torch.Tensor]],
        lives: Sequence[torch.Tensor],
        *,
        overlap: bool = False,
        waits: bool = False,
    ) -> None:
        """
        Args:
            averages: `averages[k][i]` is average k of `lives[i]`, all 1-D.
            overlap: run everything on a side stream (see [Note: fences]).
            waits: whether later work of the caller waits for each update.
        """
        self._num_averages, self._waits = len(averages), waits
        grouped: dict[object, list[int]] = {}
        for i, (average, live) in enumerate(zip(averages[0], lives, strict=True)):
            if live.numel():
                key = (average.dtype, live.dtype, average.device, live.device, is_small(live))
                grouped.setdefault(key, []).append(i)
        tracks = []
        for members in grouped.values():
            of_all, here = [[of_one[i] for i in members] for of_one in averages], lives[members[0]]
            crosses = _crosses(of_all[0][0], here)
            streams = SideStreams(here.device, 2 if crosses else int(overlap))
            own = [lives[i] for i in members]
            batches = list(_batches(of_all, own, 2 if crosses else 1))
            launches = _launches(of_all, own)
            fused = [_FusedBatch(of_all, own, launches, batches)] if launches else batches
            tracks.append(_Track(streams, fused))
        self._tracks = tracks

    def update(self, decays: Sequence[float]) -> None:
        """average <- decay * average + (1 - decay) * live, with a decay for each average.

        No host sync, no allocation. A decay of 0 copies and a decay of 1 changes nothing, both
        exactly, even where values are not finite.
        """
        self._run([_step(decay) for decay in decays], decays)

    @torch.no_grad()
    def apply(self, fn: MultiAvgFn, num_averaged: int) -> None:
        """Call a function with the signature of torch's `multi_avg_fn` for each batch.

        It gets lists of 1-D tensors of one dtype.
        """
        self._run([lambda averages, lives: fn(averages, lives, num_averaged)] * self._num_averages)

    def copy(self) -> None:
        """average <- live, bit for bit where the dtypes allow, in every average.

        Later work of the caller waits for it.
        """
        self._run([_copy] * self._num_averages)
        self.fence()

    def _run(self, steps: Sequence[Step], decays: Sequence[float] | None = None) -> None:
        for track in self._tracks:
            if track.streams.is_capturing():
                raise RuntimeError(
                    "the average cannot be updated while a graph is captured: each replay would "
                    "apply the decay of this call, and step and num_updates would not be "
                    "incremented; call update() after the replay, outside the graph"
                )
            track.streams.run(lambda batch: batch.update(steps, decays), track.batches)
        if self._waits:
            self.fence()

    def fence(self) -> None:
        """Let later work of the caller wait for updates in progress."""
        for track in self._tracks:
            track.streams.fence()

    def synchronize(self) -> None:
        """Let the host and later work of the caller wait for updates in progress."""
        self.fence()
        for track in self._tracks:
            track.streams.synchronize()


@dataclass(frozen=True, eq=False)
class _Track:
    """Batches with one pair of devices, and the side streams that they run on, if any.

    This class has no slots, since slots are destroyed in the order of their names.
    """

    streams: SideStreams  # the first field: destroyed before the memory that they use
    batches: Sequence[_Batch | _FusedBatch]


def is_small(live: torch.Tensor) -> bool:
    """Whether an operator for this tensor alone costs more than concatenating it with others."""
    return live.device.type == "cpu" and live.nbytes <= _SMALL_BYTES


def _crosses(average: torch.Tensor, live: torch.Tensor) -> bool:
    """Whether an average is on another device than its live values."""
    return average.device != live.device


def accumulation_dtype(average: torch.dtype, live: torch.dtype) -> torch.dtype:
    """The dtype in which an average is updated: its own, but never narrower than fp32."""
    wide = torch.promote_types(average, torch.float32)
    return torch.promote_types(wide, torch.complex64) if live.is_complex else wide


def squared_norms(average: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """‖average - live‖² and ‖live‖² of 1-D tensors, computed in float64, chunk by chunk."""
    sums = torch.zeros(2, dtype=torch.float64, device=live.device)
    wide = torch.complex128 if live.is_complex() else torch.float64
    step = 1 << 20
    for chunk, here in zip(average.split(step), live.split(step), strict=True):
        exact = here.to(wide)
        apart = chunk.to(live.device, wide) - exact
        norms = [torch.linalg.vector_norm(apart), torch.linalg.vector_norm(exact)]
        sums += torch.stack(norms).square()
    return sums


def _launches(
    averages: list[list[torch.Tensor]], lives: list[torch.Tensor]
) -> list[Callable[[float], None]]:
    """Updates in one pass, one for each average; [] where there are none."""
    average, live = averages[0][0], lives[0]
    wanted = average.dtype != live.dtype and is_accelerator(live.device)
    if not wanted or _crosses(average, live):
        return []
    try:
        from dist_ema.core.fused import DTYPES, fused_lerp

        fits = average.dtype in DTYPES and live.dtype in DTYPES
        return [fused_lerp(of_one, lives) for of_one in averages] if fits else []
    except ImportError:  # no Triton
        return []
    except Exception as error:  # of a compiler
        _LOG.warning("updates of %s weights take two passes: %r", live.dtype, error)
        return []


def _batches(
    averages: list[list[torch.Tensor]], lives: list[torch.Tensor], num_stagings: int
) -> Iterator[_Batch]:
    """Batches of chunks. They use `num_stagings` staging buffers in turn."""
    average, live = averages[0][0], lives[0]
    dtype = accumulation_dtype(average.dtype, live.dtype)
    crosses, accelerated = _crosses(average, live), is_accelerator(live.device)
    packs = is_small(live) and not crosses and len(lives) > len(_joined(averages[0]))
    if average.dtype == dtype == live.dtype and len(averages) == 1 and not (crosses or packs):
        yield _Batch(averages, lives, None, lives, None, None, False)
        return

    length = min(_chunk_elements(crosses, accelerated, packs), sum(x.numel() for x in lives))

    def stagings(wanted: bool, kind: torch.dtype) -> list[torch.Tensor | None]:
        if not wanted:
            return [None] * num_stagings
        with torch.inference_mode(False):
            return list(torch.empty(num_stagings, length, dtype=kind, device=live.device))

    packed = stagings(packs, live.dtype)
    average_buffers = stagings(crosses or average.dtype != dtype, dtype)
    live_buffers = stagings(live.dtype != dtype, dtype)
    for number, cuts in enumerate(_chunks([x.numel() for x in lives], length)):
        parts = [lives[i][start:stop] for i, start, stop in cuts]
        of_all = [[of_one[i][start:stop] for i, start, stop in cuts] for of_one in averages]
        if packs:
            of_all = [_joined(of_one) for of_one in of_all]
        sizes, turn = [x.numel() for x in of_all[0]], number % num_stagings
        pack = packed[turn]
        yield _Batch(
            of_all,
            parts,
            None if pack is None else _packing(parts, pack[: sum(sizes)]),
            _cut(pack, sizes) or parts,
            _cut(live_buffers[turn], sizes),
            _cut(average_buffers[turn], sizes),
            crosses and accelerated,
        )


def _packing(lives: list[torch.Tensor], packed: torch.Tensor) -> Callable[[], object]:
    """A function that concatenates tensors on the CPU into `packed`.

    It uses NumPy, which takes a quarter of the time of `torch.cat` for each small tensor.
    """
    if any(part.is_conj() or part.is_neg() or part.stride(0) != 1 for part in lives):
        return lambda: torch.cat(lives, out=packed)
    # `Tensor.numpy()` would make the storage of live values non-resizable.
    arrays = [np.from_dlpack(part.view(torch.uint8)) for part in lives]
    out = packed.view(torch.uint8).numpy()
    return lambda: np.concatenate(arrays, out=out)


def _chunk_elements(crosses: bool, accelerated: bool, packs: bool) -> int:
    if crosses:
        return _CHUNK_ACROSS_DEVICES
    if accelerated:
        return _CHUNK_WITHIN_ACCELERATOR
    return _SERIAL_ELEMENTS if packs else _CHUNK_A_THREAD * torch.get_num_threads()


def _joined(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """1-D tensors, with those that follow each other in memory as one."""
    joined: list[torch.Tensor] = []
    for tensor in tensors:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            and last.storage_offset() + last.numel() == tensor.storage_offset()
        ):
            joined[-1] = last.as_strided((last.numel() + tensor.numel(),), (1,))
        else:
            joined.append(tensor)
    return joined


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
