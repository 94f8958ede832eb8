"""Times and memory: interleaved rounds, medians, the same calls on a CPU and on CUDA."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.benchmarks.launch import Here

_CLEAR_PEAK = "5"  # what proc(5) wants in clear_refs to reset the peak of resident memory


@dataclass(frozen=True)
class Clock:
    """Seconds of calls on a device, from when it was idle until it is idle again."""

    device: torch.device

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, act: Callable[[], object], repeats: int = 1) -> float:
        """Seconds a call, over `repeats` calls in a row."""
        self.settle()
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                act()
            return (time.perf_counter() - start) / repeats
        # Events tell the time of the device; where the host is slower, they tell that.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            act()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats


def interleaved(
    acts: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    least_s: float = 0.002,
    together: Here | None = None,
    before: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each act in each round: one after the other, each round starting with the next.

    A sample is of so many calls, the same for all, that the shortest lasts `least_s`. With
    `together`, every rank calls, and all make as many calls as rank 0 chose, starting at once.
    With `before`, a sample is of one call, after that was called.
    """
    clock = Clock(device)
    repeats = 1  # the same for all: the first call of a sample finds its data out of the caches
    for act in acts.values():
        act()  # what is made at the first call is not timed
        taken = max(clock.time(act), 1e-9)
        repeats = 1 if before else max(repeats, round(least_s / taken))
    if together is not None:
        repeats = together.all_gather(repeats)[0]
    names = list(acts)
    taken_by: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            at = number % len(names)
            for name in names[at:] + names[:at]:
                if before is not None:
                    before()
                if together is not None:
                    together.barrier()
                taken_by[name].append(clock.time(acts[name], repeats))
    finally:
        if collecting:
            gc.enable()
    return taken_by


def hot_and_cold(
    acts: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    together: Here | None = None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """`interleaved` twice: call after call, and each call as in training, after other work.

    That work is a matmul, a write to more bytes than caches hold, and a pause of 3 ms, after which
    threads sleep. In a rank of several, all wait for one another after it.
    """
    operand = torch.randn(512, 512, device=device)
    caches = torch.zeros(1 << 24, device=device)

    def work() -> None:
        torch.mm(operand, operand)
        caches.add_(1.0)
        Clock(device).settle()
        time.sleep(0.003)

    hot = interleaved(acts, device, rounds=rounds, together=together)
    return hot, interleaved(acts, device, rounds=2 * rounds, together=together, before=work)


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def ratio(taken: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over rounds of one act's time over another's in the same round."""
    pairs = zip(taken[name], taken[to], strict=True)
    return statistics.median(a / b for a, b in pairs)


def peak_bandwidth(device: torch.device) -> float | None:
    """Bytes a second of a device's memory by its clock and bus width, where torch tells them."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock_khz = getattr(properties, "memory_clock_rate", 0)
    bits = getattr(properties, "memory_bus_width", 0)
    return 2 * clock_khz * 1e3 * bits / 8 or None  # twice: double data rate


def peak_memory(device: torch.device | None = None, *, reset: bool = False) -> int:
    """Most bytes held since the last reset: of the device, or of this process for the CPU.

    With `reset`, what is held now, from where the peak starts again.
    """
    if device is not None and device.type == "cuda":
        if reset:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        gc.collect()
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
    lines = Path("/proc/self/status").read_text().splitlines()
    field = "VmRSS:" if reset else "VmHWM:"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
