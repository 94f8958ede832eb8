"""The swap: averaged values in the storage that the forward pass reads, and the way back.

[Note: the way back]
Nothing may come between an exchange of values and the guarantee that it is undone:
- every single write of `Swap` is either done or undone when it raises;
- signals with Python handlers (Ctrl-C) wait while values are exchanged (`DeferredSignals`);
- all averages of the model refuse to read or write meanwhile (`Marks`).
"""

from __future__ import annotations

import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dist_ema.core.layout import Fragment
from dist_ema.core.names import ddp_modules, registrations
from dist_ema.engines.engine import Weight

_CHUNK_BYTES = 4 << 20  # of live and averaged values that are exchanged at a time
_MARKS = "_dist_ema_marks"  # attribute of a module: the list of marks of each average of it
_SIGNALS = [
    number
    for name in ("INT", "TERM", "HUP", "ALRM", "VTALRM", "PROF", "CHLD", "USR1", "USR2")
    if (number := getattr(signal, f"SIG{name}", None)) is not None
]


class Swap:
    """Averaged values in the shown storage of some fragments, and the way back. Local.

    - one dtype on both sides: live and averaged values change places, through small buffers;
    - the forward pass reads a copy of a master: the copy is overwritten, and cast again to restore;
    - dtypes differ and there is no master: the live values are set aside meanwhile.
    """

    def __init__(self, fragments: Sequence[Fragment], values: Sequence[torch.Tensor]) -> None:
        staging = _Staging()
        self._writes: list[_Exchange | _Overwrite] = []
        for fragment, value in zip(fragments, values, strict=True):
            if fragment.in_place and value.dtype == fragment.view.dtype:
                self._writes += _exchanges(fragment.view, value, staging)
            else:
                self._writes.append(_Overwrite(fragment, value))
        self._num_done = 0

    @property
    def is_shown(self) -> bool:
        """Whether some storage still holds averaged values in place of live ones."""
        return self._num_done > 0

    def enter(self) -> None:
        """Show the average. What is done when it raises is undone by `leave`."""
        for write in self._writes:
            write.do()
            self._num_done += 1

    def leave(self) -> None:
        """Show the live weights again, bit for bit, and only then raise what interrupted it."""
        _twice_if_interrupted(self._leave)

    def _leave(self) -> None:
        while self._num_done:  # backwards, so that two weights over one storage come back as well
            self._writes[self._num_done - 1].undo()
            self._num_done -= 1


class _Staging:
    """Two buffers for chunks of a dtype: fresh memory costs more than the copy to it.

    Both are on the weights' device, so that what crosses to or from a pinned average is a copy
    between it and the device, and never passes through pageable memory.
    """

    def __init__(self) -> None:
        self._pairs: dict[object, list[torch.Tensor]] = {}

    def copies(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of two chunks of one dtype, until the next call."""
        key = (a.dtype, a.device)
        if key not in self._pairs:
            size = _CHUNK_BYTES // a.element_size()
            self._pairs[key] = [a.new_empty(size) for _ in range(2)]
        first, second = (
            buffer[: t.numel()].copy_(t) for buffer, t in zip(self._pairs[key], (a, b), strict=True)
        )
        return first, second


@dataclass(slots=True, eq=False)
class _Exchange:
    """A chunk of live and averaged values that change places. `undo` is the same again."""

    live: torch.Tensor
    average: torch.Tensor
    staging: _Staging

    def do(self) -> None:
        live, average = self.staging.copies(self.live, self.average)
        try:
            self.live.copy_(average)
            self.average.copy_(live)
        except BaseException:
            self.live.copy_(live)
            self.average.copy_(average)
            raise

    undo = do


def _exchanges(live: torch.Tensor, average: torch.Tensor, staging: _Staging) -> Iterator[_Exchange]:
    size = _CHUNK_BYTES // live.element_size()
    if live.numel() <= size:
        yield _Exchange(live, average, staging)
        return
    for pair in zip(live.split(size), average.split(size), strict=True):
        yield _Exchange(*pair, staging)


@dataclass(slots=True, eq=False)
class _Overwrite:
    """Averaged values over a copy of a master, or over live values that are set aside."""

    fragment: Fragment
    value: torch.Tensor
    aside: torch.Tensor | None = None

    def do(self) -> None:
        self.aside = self.fragment.view.clone() if self.fragment.in_place else None
        try:
            self.fragment.forward_view.copy_(self.value)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        self.fragment.forward_view.copy_(self.fragment.view if self.aside is None else self.aside)
        self.aside = None


class Buffers:
    """A model's buffers set aside while the average is shown. Local.

    They are copied, not exchanged: an evaluation may write to them (DDP sends rank 0's to all,
    `update_bn` recomputes them), and neither the live values nor the averaged ones may change.
    """

    def __init__(self, model: nn.Module, buffers: Sequence[Weight]) -> None:
        """`buffers` are all that the model has now."""
        self._registered = [
            (s.registry, s.name, s.tensor) for s in registrations(model) if s.is_buffer
        ]
        self._kept = [(f.view, f.view.clone()) for w in buffers for f in w.fragments]
        # Slices of larger tensors have no fragments.
        gaps = [w.tensor for w in buffers if w.problem and type(w.tensor) is torch.Tensor]
        self._kept += [(t, t.clone()) for t in gaps if t.layout == torch.strided and not t.is_meta]
        # A forward without gradients makes DDP skip the next broadcast of buffers: it takes them to
        # be equal on all ranks, which they are no more once they are restored.
        self._ddp = [(m, m.require_forward_param_sync) for m in ddp_modules(model)]

    def restore(self) -> None:
        """Put back what was set aside, and only then raise what interrupted it."""
        _twice_if_interrupted(self._restore)

    def _restore(self) -> None:
        for registry, name, tensor in self._registered:
            if registry.get(name) is not tensor:
                registry[name] = tensor
        for view, kept in self._kept:
            # A needless write would tell autograd that a saved buffer has changed.
            if not torch.equal(view, kept):
                view.copy_(kept)
        for module, must_sync in self._ddp:
            module.require_forward_param_sync = must_sync


def _twice_if_interrupted(act: Callable[[], None]) -> None:
    """Do what can be continued or repeated; if it raises, once more, and then raise."""
    try:
        act()
    except BaseException:
        act()
        raise


class WrittenWeights:
    """Finds weights of this rank that a block wrote to. Local.

    By the versions that autograd counts, and by steps of optimizers: `torch._foreach_*` does not
    count what it writes to a DTensor.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """`tensors` are what may be written to, with the name of the weight."""
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
                "or reset() makes the average good again",
                stacklevel=2,
            )


class DeferredSignals:
    """Delays signals that have Python handlers (Ctrl-C) between `hold()` and `release()`.

    Python runs such handlers in the main thread only: in others there is nothing to delay.
    """

    def __init__(self) -> None:
        self._holding = False
        self._handlers: dict[int, Any] = {}
        self._frames: dict[int, FrameType | None] = {}  # of the signals that came

    def hold(self) -> None:
        """Let signals wait from now on."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._holding = True
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._handle:
                self._handlers[number] = handler
                signal.signal(number, self._handle)

    def release(self) -> None:
        """Put the handlers back, and call those whose signals came. They may raise."""
        try:
            for number in reversed(self._handlers):
                signal.signal(number, self._handlers[number])
        finally:
            self._holding = False
        frames, self._frames = self._frames, {}
        with ExitStack() as calls:  # each, also if one before it raised
            for number, frame in frames.items():
                calls.callback(self._handlers[number], number, frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._frames[number] = frame
        else:
            self._handlers[number](number, frame)


_Mark = tuple[str, str, frozenset[int]]  # state, name of the average, ids of the modules' __dict__


class Marks:
    """What every average knows of swaps of the modules that it reads or writes. Local.

    Each average has a list of marks, and each of its modules refers to it. A swap adds its mark to
    the lists that its modules refer to, so that averages of the same modules, or of modules around
    or inside them, refuse to read or write. Copies of a module inherit marks, which are void: they
    name other modules.
    """

    def __init__(self) -> None:
        self._own: list[_Mark] = []
        self._set: _Mark | None = None  # by this average
        self._dicts: list[dict[str, Any]] = []
        self._forget: Callable[[], object] | None = None

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Learn of swaps of these modules, in place of those before."""
        if self._forget is not None:
            self._forget()
        self._dicts = [module.__dict__ for module in modules]
        known = {mark for marks in self._lists() for mark in marks}
        ids = set(map(id, self._dicts))
        self._own[:] = [mark for mark in known if not mark[2].isdisjoint(ids)]
        for attributes in self._dicts:  # plain lists can be copied and pickled with the module
            attributes.setdefault(_MARKS, []).append(self._own)
        finalizer = weakref.finalize(self, _remove, self._dicts, self._own)
        finalizer.atexit = False
        self._forget = finalizer

    def set(self, state: str, name: str) -> None:
        """Mark these modules: "shown", or "torn" where the way back failed."""
        self.clear("shown")
        self._set = (state, name, frozenset(map(id, self._dicts)))
        for marks in self._lists():
            marks.append(self._set)

    def clear(self, state: str) -> None:
        """Remove the mark that `set` made, if it is of this state."""
        if self._set is not None and self._set[0] == state:
            self._discard(self._set)
            self._set = None

    def mend(self) -> None:
        """The live weights were loaded again after a way back that failed."""
        for mark in list(self._own):
            if mark[0] == "torn":
                self._discard(mark)

    def refuse(self, what: str, *, mends: bool = False) -> None:
        """Raise if an average is shown in these modules, or could not be taken back.

        Args:
            mends: whether the call is one that ends the state "torn".
        """
        for state, name, _ in self._own:
            if state == "shown":
                raise RuntimeError(
                    f"{what} inside average_parameters(): the model, or a part of it, shows the "
                    f"average {name!r}, and the average's storage holds the live weights; leave "
                    "the block first"
                )
            if not mends:
                raise RuntimeError(
                    f"{what}: the way back from average_parameters() has failed, and the model's "
                    f"weights are in part live ones and in part those of the average {name!r}. "
                    "Load the model's weights again, then call reset(), load() or "
                    "load_state_dict() of the average"
                )

    def _lists(self) -> list[list[_Mark]]:
        """The list of every average that has one of these modules, this one's included."""
        found = {id(marks): marks for d in self._dicts for marks in d.get(_MARKS, ())}
        return list(found.values())

    def _discard(self, mark: _Mark | None) -> None:
        for marks in (self._own, *self._lists()):
            if mark in marks:
                marks.remove(mark)


def _remove(dicts: list[dict[str, Any]], own: list[_Mark]) -> None:
    """Take an average's list from its modules; a torn model stays marked as such."""
    if any(state == "torn" for state, _, _ in own):
        return
    for attributes in dicts:
        attributes[_MARKS] = [marks for marks in attributes.get(_MARKS, ()) if marks is not own]
        if not attributes[_MARKS]:
            del attributes[_MARKS]
