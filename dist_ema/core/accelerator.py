"""Accelerators of any kind (CUDA, XPU, NPU, ...), and side streams for updates of an average.

[Note: fences]
An update on a side stream reads the live weights while the caller continues. The update waits for
all work that the caller launched before it. These wait for the update: the next step of any torch
optimizer (by a hook that runs before each step), everything that reads the average through
`AverageStorage`, and the destruction of the streams, which happens before that of the memory that
they use. Other code that writes to the weights must read the average first (`drift()`, for
example).

The weights that an update reads are not freed meanwhile, even if the model moves: the update's plan
holds views of them, and a new plan is made only after `SideStreams.synchronize`.

On a CPU there are no streams: the same calls run the work immediately.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")


def is_accelerator(device: torch.device) -> bool:
    """Whether the device has streams and asynchronous copies from pinned host memory."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and device.type == accelerator.type


def synchronize_if_initialized() -> None:
    """Wait until the accelerator is idle; an accelerator that is not in use is not initialized."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        if getattr(module, "is_initialized", module.is_available)():
            torch.accelerator.synchronize()


def graph_capture_query(device: torch.device) -> Callable[[], bool]:
    """A function that returns whether the current stream is being captured into a graph."""
    module = torch.get_device_module(device) if is_accelerator(device) else None
    return getattr(module, "is_current_stream_capturing", lambda: False)


class SideStreams:
    """A few streams of one device. Work on one stream runs in order; the streams overlap."""

    def __init__(self, device: torch.device, count: int) -> None:
        """
        Args:
            count: number of streams. With 0, and on a CPU, work runs in the calling thread.
        """
        self._device = device
        self._streams: list[torch.Stream] = []
        self._pending = False
        self.is_capturing = graph_capture_query(device)
        if not count or not is_accelerator(device):
            return
        self._streams = [torch.Stream(device) for _ in range(count)]
        self._start = torch.Event(device)
        self._ends = [torch.Event(device) for _ in self._streams]
        hook = _hook_of(weakref.WeakMethod(self.fence))
        handle = register_optimizer_step_pre_hook(hook)
        weakref.finalize(self, _end, handle, self._ends)

    def run(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        """Call `work` with each item, on the streams in turn, after what the caller launched."""
        if not self._streams:
            for item in items:
                work(item)
            return
        self._start.record(torch.accelerator.current_stream(self._device))
        for stream in self._streams:
            stream.wait_event(self._start)
        self._pending = True
        try:
            for number, item in enumerate(items):
                with self._streams[number % len(self._streams)]:
                    work(item)
        finally:
            for event, stream in zip(self._ends, self._streams, strict=True):
                event.record(stream)

    def fence(self) -> None:
        """Let later work of the caller wait for the streams. The host does not wait."""
        if self._pending:
            if self.is_capturing():
                raise RuntimeError(
                    "an update of the average is in progress on a side stream, which a graph that "
                    "is being captured cannot wait for; call ema.drift() before the capture and "
                    "before each replay, or build ShardedEMA without overlap= and device="
                )
            current = torch.accelerator.current_stream(self._device)
            for event in self._ends:
                current.wait_event(event)

    def synchronize(self) -> None:
        """Let the host wait until all work on the streams is done."""
        if self._pending:
            for event in self._ends:
                event.synchronize()
            self._pending = False


def _hook_of(fence: weakref.WeakMethod[Any]) -> Callable[..., None]:
    def call(*_: object) -> None:
        bound = fence()
        if bound is not None:
            bound()

    # Events must be waited for at each call, not traced once, if a training step is compiled.
    hook: Callable[..., None] = torch.compiler.disable(call)
    return hook


def _end(hook: RemovableHandle, events: list[torch.Event]) -> None:
    hook.remove()
    for event in events:
        event.synchronize()
