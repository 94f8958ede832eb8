"""The averages of one model: they follow the model's storage, are swapped in, and gathered."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from threading import RLock
from typing import TYPE_CHECKING

import torch
from torch import nn

from dist_ema.core.accelerator import synchronize_if_initialized
from dist_ema.core.engine import (
    Engine,
    Masters,
    Registered,
    Weight,
    pointer,
    refuse_freezing,
    without_gaps,
)
from dist_ema.core.gather import Gatherer, refuse_unequal_copies
from dist_ema.core.group import Group
from dist_ema.core.layout import Fragment
from dist_ema.core.names import Modules, is_in_parts, registrations
from dist_ema.core.plan import averaged_names, make_plan, rebind
from dist_ema.core.replicas import differing, refuse_destroyed
from dist_ema.core.storage import AverageStorage, allocate, average_dtype
from dist_ema.core.swap import Buffers, DeferredSignals, Marks, Swap, WrittenWeights
from dist_ema.core.teacher import Teacher, as_teacher

if TYPE_CHECKING:
    from dist_ema.options import EMAOptions

Select = Callable[[nn.Module], Engine]


class Average:
    """The engine, plan and averaged values of one model. Its construction is collective."""

    def __init__(
        self,
        model: nn.Module,
        options: EMAOptions,
        into: Modules | str | None,
        group: Group,
        select: Select,
    ) -> None:
        """
        Args:
            into: the teacher whose weights are the average, if any: a module, or the name of an
                adapter of the model.
            select: returns the engine of a model.
        """
        self.model, self.group = model, group
        self.lock = RLock()  # held while values are updated or exchanged
        if into is not None and not isinstance(into, str):
            with group.together():
                into = as_teacher(into)
        self._options, self._into, self._select = options, into, select
        self._masters: Masters | None = None
        with group.together():
            self.marks = self._new_marks()
            self.marks.refuse("ShardedEMA()")
            self.engine = select(model)
            weights = self.engine.weights()
            averaged = averaged_names(weights, options.params, options.buffers)
            weights = self._with_masters(self.engine, weights, averaged)
        trains = any(w.fqn in averaged and not w.is_buffer for w in weights)
        if not group.any(trains):  # a part of a model may have frozen weights only
            raise ValueError(
                f"the model has {sum(not w.is_buffer for w in weights)} parameters and none is "
                f"averaged with params={options.params!r}; pass a model that trains, or "
                "params='all'"
            )
        # Every rank that holds a teacher needs all of it.
        split = options.replicas == "split" and into is None
        self.plan = make_plan(weights, averaged, self.engine, split, group)
        needs_others = self.plan.num_shared_groups > 0 or self.engine.communicates
        # The ranks that take part in a swap.
        self.swap_group = group if group.any(needs_others) else Group.alone()
        self.refuse_differing_replicas()
        self._teacher: Teacher | None = None
        self._copies_frozen = False  # whether the next update copies frozen weights to the teacher
        with group.together(), torch.no_grad():
            if into is None:
                fragments = self.plan.fragments
                self.storage = AverageStorage(
                    fragments,
                    allocate(fragments, options.dtype, len(options.values), options.device),
                    overlap=options.overlap,
                    # A forward pass writes to buffers before the next optimizer step.
                    waits=bool(self.plan.buffers),
                )
            else:
                self._teacher = Teacher(into, model, self.engine, self.plan, select)
                self.storage = self._teacher.storage(self.plan)
            self.reset()
        self._remember()

    # Following the model.

    def follow(self) -> None:
        """Update the plan if the model's storage moved. Local.

        Raises:
            RuntimeError: the model's layout is not the one the average was built for.
        """
        if self.group.outdated():
            raise RuntimeError(
                "this average was built before torch.distributed was initialized, for one process; "
                "build ShardedEMA after the process group, with the model that is trained"
            )
        if self._fingerprint() != self._remembered:
            self._rebind()
        if self._teacher is not None and self._teacher.moved(self.engine):
            with torch.no_grad():
                self._teacher.follow(self.plan, self.engine)
                self.storage = self._teacher.storage(self.plan)

    def refuse_unfrozen(self) -> None:
        """Raise if a parameter that was frozen, and is not averaged, requires grad now. Local."""
        if self._teacher is not None:
            self._teacher.refuse_training()
        for fqn, tensor in self._frozen:
            if tensor.requires_grad:
                raise RuntimeError(
                    f"{fqn}: was frozen when the average was built, so it is not averaged, and "
                    "requires grad now; build ShardedEMA with params='all', or after unfreezing"
                )

    @torch.no_grad()
    def _rebind(self) -> None:
        engine = self._select(self.model)
        if engine.kind != self.engine.kind:
            raise RuntimeError(
                "the model was wrapped, sharded or unwrapped after this average was built "
                f"({self.engine.kind} then, {engine.kind} now); build ShardedEMA after "
                "fully_shard(), DDP or accelerator.prepare(), with what they return"
            )
        weights = self._with_masters(engine, engine.weights(), self.plan.averaged)
        self.plan = rebind(self.plan, weights, self.group)
        self.engine = engine
        self.storage.bind(self.plan.fragments)
        self.marks = self._new_marks()  # modules may have been replaced
        self._remember()

    def _with_masters(
        self, engine: Engine, weights: list[Weight], averaged: frozenset[str]
    ) -> list[Weight]:
        """The weights, with the masters that `masters=` returns now as their views. Local."""
        find = self._options.masters
        if find is None:
            return weights
        self._masters = Masters(find, engine, weights, averaged)
        return self._masters.weights

    @property
    def source(self) -> str:
        """ "master" if what is averaged is fp32 masters, else "weights"."""
        return "master" if self._masters else self.engine.source

    def _remember(self) -> None:
        """Keep what `follow` compares with."""
        self._modules = list(self.model.modules())  # kept, so that ids are not reused
        children = [module._modules for module in self._modules]
        self._parents, self._leaves = [c for c in children if c], [c for c in children if not c]
        self._averaged_buffers = Registered(
            r for r in registrations(self.model) if r.is_buffer and r.fqn in self.plan.averaged
        )
        self._frozen = [
            (w.fqn, w.tensor)
            for w in self.plan.weights
            if self._options.params == "trainable" and w.fqn not in self.plan.averaged
        ]
        self._remembered = self._fingerprint()
        self._gatherer: Gatherer | None = None
        self._gathered_buffers: list[object] = []

    def _fingerprint(self) -> list[int]:
        """Changes if averaged storage moves, or if a module or parameter is added or replaced."""
        children = itertools.chain.from_iterable(map(dict.values, self._parents))
        return [
            *self.engine.stamp(),
            *self._averaged_buffers.addresses(),
            *(self._masters.stamp() if self._masters is not None else ()),
            any(self._leaves),
            *map(id, children),
        ]

    def _new_marks(self) -> Marks:
        teacher = self._into.modules() if isinstance(self._into, nn.Module) else ()
        return Marks([*self.model.modules(), *teacher])

    # Averaging.

    @torch.no_grad()
    def reset(self) -> None:
        """Copy the live weights to every average. Local."""
        self.storage.copy()
        if self._teacher is not None:
            self._teacher.copy_parameters(frozen_only=False)
        self.refresh_teacher()

    def refresh_teacher(self, *, loaded: bool = False) -> None:
        """Let the teacher, if there is one, compute with the new average. Local.

        After a load, frozen weights are copied to it now and at the next update: the model's own
        may be loaded in between. Those of an adapter are few, and copied at each update.
        """
        if self._teacher is None:
            return
        with torch.no_grad():
            self.storage.synchronize()  # a teacher in host memory is read by the host
            if loaded or self._copies_frozen or isinstance(self._into, str):
                self._teacher.copy_parameters(frozen_only=True)
            self._teacher.copy_buffers(self.engine, self.plan.averaged)
            self._teacher.refresh()
            self._copies_frozen = loaded

    def dtype_of(self, weight: Weight) -> torch.dtype:
        """The dtype of a weight's average, the same on every rank. Local."""
        if self._teacher is not None:
            return self._teacher.dtype_of(weight.fqn)
        return average_dtype(self._options.dtype, weight.tensor)

    # Reading.

    def others(self) -> list[Weight]:
        """What the model has now and is not averaged: parameters, then buffers. Local."""
        every = [*(w for w in self.plan.weights if not w.is_buffer), *self.engine.buffers()]
        return [w for w in every if w.fqn not in self.plan.averaged]

    def gatherer(self, values: Sequence[torch.Tensor]) -> Gatherer:
        """The gatherer for one average's values. Collective: every rank calls it."""
        others = [w for w in self.others() if w.persistent]
        registered = [w for w in others if w.is_buffer]
        buffers = [without_gaps(w) for w in registered]  # copies of those with gaps
        if is_in_parts(self.model):
            frozen = [w for w in others if not w.is_buffer]
            refuse_unequal_copies(self.model, [*frozen, *buffers], self.group)
        key: list[object] = [
            (
                (w.fqn, w.aliases, w.shape, w.tensor.dtype, w.problem),
                [(f.meta, pointer(f.view)) for f in w.fragments],
            )
            for w in buffers
        ]
        is_current = key == self._gathered_buffers and buffers == registered
        gatherer = self._gatherer if is_current else None
        # A rank that holds nothing cannot see that storage moved: all ranks rebuild if one must.
        if self.group.any(gatherer is None) or gatherer is None:
            gatherer = Gatherer(self.plan, values, buffers, self.group)
            self._gatherer, self._gathered_buffers = gatherer, key
        return gatherer

    # Writing to the live weights.

    def make_permanent(self, values: Sequence[torch.Tensor]) -> None:
        """Write an average to the live weights, masters and low-precision copies too. Needs `lock`.

        Collective where weights are replicated or the engine keeps copies.
        """
        with self.group.together():
            refuse_destroyed(self.plan.replica_groups)
        self.refuse_differing_replicas()
        self._await_copies()
        self.engine.release()
        with DeferredSignals(), self.group.together():
            for fragment, value in zip(self.plan.fragments, values, strict=True):
                fragment.view.copy_(value)
            for replica_group in self.plan.replica_groups:
                replica_group.share(attrgetter("view"))
            for fragment in self._averaged_fragments():
                if not fragment.in_place:
                    fragment.forward_view.copy_(fragment.view)
            self.engine.publish()

    @contextmanager
    def swap(self, name: str, values: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within the block, the forward pass reads an average. Collective among `swap_group`."""
        num_parameters = len(self.plan.parameters)
        # A teacher keeps the average meanwhile: it may be used inside the block, too.
        exchanges = self._teacher is None
        with torch.no_grad(), self.swap_group.together():
            swap = Swap(self.plan.parameters, values[:num_parameters], exchanges=exchanges)
            refuse_freezing()
            refuse_destroyed(self.plan.replica_groups)
            buffers = Buffers(self.model, self.engine.buffers(), self.engine.precomputed())
            self.engine.release()
            self._await_copies()
        self.refuse_differing_replicas()
        marks, signals = self.marks, DeferredSignals()
        started = False
        written: WrittenWeights | None = None

        def publish() -> None:
            try:
                with self.swap_group.together():
                    self._share_and_publish()
                    if swap.is_active:
                        raise RuntimeError("live weights were not written back")
            except BaseException as error:
                self.marks.set("torn", name)
                if not isinstance(error, Exception):
                    raise
                raise RuntimeError(
                    "the way back from average_parameters() has failed: the model's weights are "
                    "in part live ones and in part averaged ones. Load the model's weights again, "
                    f"then call reset() or load() of the average. {type(error).__name__}: {error}"
                ) from error

        def leave() -> None:
            # Callbacks run in reverse order, and each of them even if another raised.
            with self.lock, torch.no_grad(), ExitStack() as steps:
                steps.callback(publish)
                steps.callback(marks.set, None)
                steps.callback(self._carry_over_if_moved)
                steps.callback(buffers.restore)
                steps.callback(swap.leave)
                steps.callback(self._await_copies)
                steps.callback(self.engine.release)
                if written is not None:
                    steps.callback(written.warn)

        try:
            try:
                with self.lock, signals, torch.no_grad():
                    with self.swap_group.together():
                        marks.refuse("average_parameters()")  # another thread may have swapped
                    started = True
                    marks.set("swapped", name)
                    with self.swap_group.together():
                        try:
                            swap.enter()
                            averaged = zip(self.plan.buffers, values[num_parameters:], strict=True)
                            for fragment, value in averaged:
                                fragment.view.copy_(value)
                        finally:  # the other ranks wait for this one
                            self._share_and_publish()
                    written = WrittenWeights(
                        (weight.fqn, tensor)
                        for weight in self.plan.weights
                        if weight.fqn in self.plan.averaged and not weight.is_buffer
                        for tensor in self.engine.versioned(weight)
                    )
                yield
            finally:
                signals.hold()
        finally:  # even if a signal arrived just before
            try:
                if started:
                    leave()
            finally:
                signals.release()

    def _share_and_publish(self) -> None:
        """Exchange slices among replicas, and let the next forward pass read the storage."""
        with ExitStack() as steps:  # each is taken, even if another one raised: others take part
            steps.callback(self.engine.publish)
            for replica_group in reversed(self.plan.replica_groups):
                steps.callback(replica_group.share)

    def _averaged_fragments(self) -> list[Fragment]:
        """All that this rank holds of averaged weights."""
        return [f for w in self.plan.weights if w.fqn in self.plan.averaged for f in w.fragments]

    def _await_copies(self) -> None:
        """Wait for forward passes that may still copy weights from host memory to the device."""
        views = (f.forward_view for w in self.plan.weights for f in w.fragments)
        if any(view.device.type == "cpu" for view in views):
            synchronize_if_initialized()

    def _carry_over_if_moved(self) -> None:
        """Copy live weights to where a block moved the model's storage."""
        if self._fingerprint() == self._remembered:
            return
        before = self._averaged_fragments()
        self._rebind()
        self.engine.release()
        for old, new in zip(before, self._averaged_fragments(), strict=True):
            if new.view.data_ptr() != old.view.data_ptr():
                new.view.copy_(old.view)
                if not new.in_place:
                    new.forward_view.copy_(old.view)

    def refuse_differing_replicas(self) -> None:
        """Raise if ranks that hold the same weights do not hold the same bits. Collective.

        Called where the live weights are written, and when slices are put together for the first
        time after an update: different weights with one name may have been equal at the start.
        """
        names = differing(self.plan.replica_groups, self.plan.num_shared_groups, self.swap_group)
        if names:
            raise RuntimeError(
                f"weights that several ranks hold differ between them: {', '.join(names)}. Each of "
                "these ranks averages a slice of them, and a swap would overwrite the others' live "
                "values; synchronize the weights, pass replicas='whole' to let each rank average "
                "its own, or, if these are different weights under one name (experts as plain "
                "tensors), shard them as DTensors, or pass process_group= with the ranks that "
                "together hold one model"
            )
