"""Side streams on which an average is updated behind the caller's own work on an accelerator.

[Note: fences]
An update on a side stream reads the live weights while the caller goes on. So it waits for what the
caller had started before, and these wait for it: the next step of any torch optimizer (a hook that
is called before each), whatever reads the average through `Shadow`, and the end of the lanes, which
must come before that of the memory that they work on. What writes to weights otherwise must read
the average first (`drift()`, say), or not be called before the next optimizer step.

Without CUDA there are no streams: the same calls run the work at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class Lanes:
    """A few streams of one device. Work on one lane is done in order; lanes overlap."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        self._streams: list[torch.cuda.Stream] = []
        self._pending = False
        if device.type == "cuda":
            self._streams = [torch.cuda.Stream(device) for _ in range(count)]
        self._events = [torch.cuda.Event() for _ in self._streams]
        if self._streams:
            fence = weakref.WeakMethod(self.fence)
            handle = register_optimizer_step_pre_hook(lambda *_: _call(fence))
            weakref.finalize(self, _end, handle, self._events)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block lanes are given work that reads the weights as they are now. Local."""
        if not self._streams:
            yield
            return
        current = torch.cuda.current_stream(self._device)
        for stream in self._streams:
            stream.wait_stream(current)
        self._pending = True
        try:
            yield
        finally:
            for event, stream in zip(self._events, self._streams, strict=True):
                event.record(stream)

    def lane(self, number: int) -> AbstractContextManager[Any]:
        """Give what is launched in the block to a lane, counted around."""
        if not self._streams:
            return nullcontext()
        return torch.cuda.stream(self._streams[number % len(self._streams)])

    def fence(self) -> None:
        """Let what the caller launches from now on wait for the lanes. The host does not wait."""
        if self._pending:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "an update of the average is under way on a side stream, which a CUDA graph "
                    "cannot wait for; read the average before the capture, or build ShardedEMA "
                    "without overlap= and device="
                )
            current = torch.cuda.current_stream(self._device)
            for event in self._events:
                current.wait_event(event)

    def settle(self) -> None:
        """Wait until the lanes are done: for what the host reads."""
        if self._pending:
            for event in self._events:
                event.synchronize()
            self._pending = False


def _end(hook: RemovableHandle, events: list[torch.cuda.Event]) -> None:
    hook.remove()
    for event in events:
        event.synchronize()


def _call(method: weakref.WeakMethod[Any]) -> None:
    bound = method()
    if bound is not None:
        bound()
