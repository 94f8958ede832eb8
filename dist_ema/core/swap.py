"""Exchange of live and averaged values in the storage that the forward pass reads.

[Note: the way back]
The live weights are restored whatever happens during a swap:
- each write of `Swap` is either complete or undone when it raises;
- signals with Python handlers (Ctrl-C) are deferred while values are exchanged;
- all averages of the same modules refuse to read or write meanwhile (`Marks`).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # without enums, six times as fast as `signal`
import itertools
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dist_ema.core.engine import Weight, writable
from dist_ema.core.layout import Fragment, bits
from dist_ema.core.names import ddp_modules, registrations

_CHUNK_BYTES = 1 << 20  # exchanged at a time: three of them fit a common L2 cache
_MARK = "_dist_ema_swap"  # attribute of a module: the mark of a swap, or None
_NAMES = "SIGINT SIGTERM SIGHUP SIGALRM SIGVTALRM SIGPROF SIGCHLD SIGUSR1 SIGUSR2"
_SIGNALS = [getattr(signal, n) for n in _NAMES.split() if hasattr(signal, n)]  # of this system


class Swap:
    """Averaged values in the storage of some fragments that the forward pass reads. Local.

    - Equal dtypes: live and averaged values are exchanged through a small buffer.
    - The forward pass reads a copy of a master: the copy is overwritten, and cast again to restore.
    - Different dtypes without a master, or a copy that is not the cast of its master (stochastic
      rounding), or averaged values that must stay where they are: the live values are set aside
      meanwhile.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment],
        values: Sequence[torch.Tensor],
        *,
        exchanges: bool = True,
    ) -> None:
        """`exchanges`: whether live values may be kept in the storage of the averaged ones."""
        buffers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        self._writes: list[_Exchange | _Overwrite] = []
        for fragment, average in zip(fragments, values, strict=True):
            live = fragment.view
            if not (exchanges and fragment.in_place and average.dtype == live.dtype):
                self._writes.append(_Overwrite(fragment, average))
                continue
            size = _CHUNK_BYTES // live.element_size()
            if (live.dtype, live.device) not in buffers:
                buffers[live.dtype, live.device] = live.new_empty(size)
            buffer = buffers[live.dtype, live.device]
            self._writes += [
                _Exchange(*chunks, buffer)
                for chunks in zip(live.split(size), average.split(size), strict=True)
            ]
        self._num_done = 0

    @property
    def is_active(self) -> bool:
        """Whether some storage holds averaged values in place of live ones."""
        return self._num_done > 0

    def enter(self) -> None:
        """Write the average. After an error, `leave` undoes what was done."""
        for write in self._writes:
            write.do()
            self._num_done += 1

    def leave(self) -> None:
        """Restore the live weights, bit for bit."""
        _retry_once(self._leave)

    def _leave(self) -> None:
        while self._num_done:  # in reverse, so that weights with shared storage are restored too
            self._writes[self._num_done - 1].undo()
            self._num_done -= 1


@dataclass(slots=True, eq=False)
class _Exchange:
    """A chunk of live and averaged values that are exchanged. `undo` is the same operation."""

    live: torch.Tensor
    average: torch.Tensor
    buffer: torch.Tensor  # on the device of `live`, at least as long

    def do(self) -> None:
        kept = self.buffer[: self.live.numel()].copy_(self.live)
        try:
            self.live.copy_(self.average)
            try:
                self.average.copy_(kept)
            except BaseException:
                self.average.copy_(self.live)
                raise
        except BaseException:
            self.live.copy_(kept)
            raise

    undo = do


@dataclass(slots=True, eq=False)
class _Overwrite:
    """Averaged values over live ones, which are set aside unless they are the cast of a master."""

    fragment: Fragment
    average: torch.Tensor
    kept: torch.Tensor | None = None

    def do(self) -> None:
        self.kept = None if self._is_cast() else self.fragment.forward_view.clone()
        try:
            self.fragment.forward_view.copy_(self.average)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        self.fragment.forward_view.copy_(self.fragment.view if self.kept is None else self.kept)
        self.kept = None

    def _is_cast(self) -> bool:
        """Whether the values that the forward pass reads are, bit for bit, a cast of the master."""
        if self.fragment.in_place:
            return False
        live, master = self.fragment.forward_view, self.fragment.view
        size = _CHUNK_BYTES // master.element_size()
        return all(
            torch.equal(bits(chunk), bits(exact.to(chunk)))
            for chunk, exact in zip(live.split(size), master.split(size), strict=True)
        )


class Buffers:
    """Copies of a model's buffers, to restore them and what was precomputed after a swap. Local.

    They are copied, not exchanged: an evaluation may write to them (DDP broadcasts rank 0's,
    `update_bn` recomputes them), and neither the live nor the averaged values may change.
    """

    def __init__(
        self,
        model: nn.Module,
        buffers: Sequence[Weight],
        precomputed: Sequence[tuple[dict[str, torch.Tensor | None], str]],
    ) -> None:
        """
        Args:
            buffers: all buffers that the model has now.
            precomputed: where tensors are kept that were computed from weights.
        """
        every = registrations(model)
        places = [(r.registry, r.name) for r in every if r.is_buffer] + list(precomputed)
        self._registered = [(place, name, place[name]) for place, name in places]
        self._copies = [(f.view, f.view.clone()) for w in buffers for f in w.fragments]
        # Slices of larger tensors have no fragments.
        slices = [w.tensor for w in buffers if w.problem and type(w.tensor) is torch.Tensor]
        slices = [t for t in slices if t.layout == torch.strided and not t.is_meta]
        self._copies += [(writable(t), t.clone()) for t in slices]
        # After a forward without gradients DDP skips the next broadcast of buffers, since it takes
        # them for equal on all ranks. Once restored, they are not.
        self._ddp = [(m, m.require_forward_param_sync) for m in ddp_modules(model)]

    def restore(self) -> None:
        """Restore values, and registrations that were replaced."""
        _retry_once(self._restore)

    def _restore(self) -> None:
        for registry, name, tensor in self._registered:
            if registry.get(name) is not tensor:
                registry[name] = tensor
        for view, copy in self._copies:
            # A needless write would make autograd report a saved buffer as modified.
            if not torch.equal(view, copy):
                view.copy_(copy)
        for module, must_sync in self._ddp:
            module.require_forward_param_sync = must_sync


def _retry_once(action: Callable[[], None]) -> None:
    """Run an action that can be repeated; if it is interrupted, complete it before raising."""
    try:
        action()
    except BaseException:
        action()
        raise


class WrittenWeights:
    """Detects writes to weights of this rank within a block. Local.

    Compares the version counters of autograd, and watches optimizer steps, since `torch._foreach_*`
    does not increment the version of a DTensor.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """`tensors` are those that may be written to, with the name of the weight."""
        self._watched = [(fqn, t, t._version) for fqn, t in tensors if not t.is_inference()]
        self._stepped: set[int] = set()
        self._hook = register_optimizer_step_post_hook(self._note_step)

    def _note_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            self._stepped.update(id(p) for p in group["params"] if p.grad is not None)

    def warn(self) -> None:
        """Stop watching, and warn of weights that were written to, by name."""
        self._hook.remove()
        names = [
            fqn
            for fqn, tensor, version in self._watched
            if tensor._version != version or id(tensor) in self._stepped
        ]
        if names:
            warnings.warn(
                "weights were written to inside average_parameters() (an optimizer step, "
                "load_state_dict(), Embedding(max_norm=)). The live weights are restored; what was "
                "written is lost, or, where live and averaged weights have one dtype, is now in "
                f"the average: {', '.join(dict.fromkeys(names))}. Write outside the block; load() "
                "or reset() corrects the average",
                stacklevel=2,
            )


class DeferredSignals:
    """Defers signals that have Python handlers (Ctrl-C) between `hold()` and `release()`.

    Python runs such handlers in the main thread only; in other threads this has no effect.
    """

    def __init__(self) -> None:
        self._holding = False
        self._handlers: dict[int, Any] = {}
        self._frames: dict[int, FrameType | None] = {}  # of the signals received

    def hold(self) -> None:
        """Defer signals from now on."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._holding = True
        try:
            for number in _SIGNALS:
                handler = _signal.getsignal(number)
                if callable(handler) and handler != self._handle:
                    self._handlers[number] = handler
                    _signal.signal(number, self._handle)
        except BaseException:  # a signal arrived just before
            self.release()
            raise

    def release(self) -> None:
        """Restore the handlers, and call those whose signals were received. They may raise."""
        try:
            for number in reversed(self._handlers):
                _signal.signal(number, self._handlers[number])
        finally:
            self._holding = False
        frames, self._frames = self._frames, {}
        with ExitStack() as calls:  # every one is called, even if another raised
            for number, frame in frames.items():
                calls.callback(self._handlers[number], number, frame)

    __enter__ = hold

    def __exit__(self, *_: object) -> None:
        self.release()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._frames[number] = frame
        else:
            self._handlers[number](number, frame)


class Marks:
    """Marks on modules whose weights are swapped, seen by every average of these modules. Local.

    A mark is an attribute of the module: (state, name of the average, id of the module's
    `__dict__`). The state is "swapped", or "torn" if the live weights could not be restored. A
    copy of a module has the mark with the id of the original: such a mark is ignored.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._dicts = [module.__dict__ for module in modules]
        for attributes in self._dicts:  # always there, so that no compiled code is guarded by it
            attributes.setdefault(_MARK, None)

    def set(self, state: str | None, name: str = "") -> None:
        """Mark the modules, or remove their marks."""
        for attributes in self._dicts:
            attributes[_MARK] = (state, name, id(attributes)) if state is not None else None

    def mend(self) -> None:
        """Remove marks of live weights that could not be restored, and were loaded again since."""
        for attributes in self._dicts:
            if (attributes.get(_MARK) or "?")[0] == "torn":
                attributes[_MARK] = None

    def refuse(self, call: str, *, mends: bool = False) -> None:
        """Raise if a module is swapped or torn.

        Args:
            mends: whether the call ends the state "torn".
        """
        marks = map(dict.get, self._dicts, itertools.repeat(_MARK))
        if not any(marks):
            return
        for attributes in self._dicts:
            state, name, owner = attributes.get(_MARK) or ("", "", 0)
            if owner != id(attributes):
                continue
            if state == "swapped":
                raise RuntimeError(
                    f"{call} inside average_parameters(): the model, or a part of it, computes "
                    f"with the average {name!r}, whose storage holds the live weights; leave the "
                    "block first"
                )
            if not mends:
                raise RuntimeError(
                    f"{call}: the way back from average_parameters() has failed, and the model's "
                    f"weights are in part live ones and in part those of the average {name!r}. "
                    "Load the model's weights again, then call reset(), load() or "
                    "load_state_dict() of the average"
                )
