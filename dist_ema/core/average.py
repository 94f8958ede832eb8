"""A model's weights bound to averages of them, and what keeps the bond good while storage moves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import NoReturn

import torch
from torch import nn

from dist_ema.core.accelerator import synchronize_if_initialized
from dist_ema.core.gather import Gatherer
from dist_ema.core.group import Group
from dist_ema.core.names import registrations
from dist_ema.core.plan import Plan, Selects, chosen, make_plan, rebind
from dist_ema.core.replicas import differing, refuse_destroyed, source
from dist_ema.core.storage import AverageStorage, allocate, average_dtype
from dist_ema.core.swap import Buffers, DeferredSignals, Marks, Swap, WrittenWeights
from dist_ema.core.teacher import Teacher
from dist_ema.engines import select
from dist_ema.engines.engine import (
    Registered,
    Weight,
    drop_caches,
    pointer,
    refuse_freezing,
    without_gaps,
)
from dist_ema.options import Options


class Average:
    """The engine, plan and averages of one model. Its construction is collective."""

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        into: nn.Module | None,
        group: Group,
    ) -> None:
        self.model, self.group = model, group
        self.lock = RLock()  # held while values are updated or exchanged
        self._options = options
        with group.together():
            self._into = into if isinstance(into, nn.Module) else None
            self.marks = Marks()
            self._watch_modules()
            self.marks.refuse("ShardedEMA()")
            self.engine = select(model)
            weights = self.engine.weights()
            averaged = chosen(weights, options.params, options.buffers)
        # A teacher is whole on every rank that holds it.
        split = options.replicas == "split" and into is None
        self.plan = make_plan(weights, averaged, self.engine, split, group)
        # Where no rank shares anything, a swap needs no other rank.
        shares = self.plan.num_shared_groups > 0
        self._any_shares = group.any(shares or self.engine.communicates)
        self._refuse_differing_replicas()
        fragments = [p for p in self.plan.fragments]
        self._teacher: Teacher | None = None
        self._frozen_due = False  # whether the teacher's frozen weights may be others than ours
        with group.together(), torch.no_grad():
            if into is None:
                num_averages = len(options.schedules)
                values = allocate(fragments, options.dtype, num_averages, options.device)
                self.storage = AverageStorage(
                    fragments,
                    values,
                    overlap=options.overlap,
                    # A forward pass writes to buffers, and no optimizer step comes before it.
                    waits=bool(self.plan.buffers),
                )
            else:
                self._teacher = Teacher(into, self.engine, self.plan)
                self.storage = self._storage_in(self._teacher)
            self.start_again()
        self._note_storage()

    def follow(self) -> None:
        """Make the plan again if the model's storage moved. Local.

        Raises:
            RuntimeError: the model is cut in another way than when the average was built.
        """
        if self.group.outdated():
            raise RuntimeError(
                "this average was built before torch.distributed was initialized, for one process; "
                "build ShardedEMA after the process group, with the model that is trained"
            )
        if self._storage() != self._stamp or self._children() != self._structure:
            self._rebind()
        if self._teacher is not None and self._teacher.moved():
            self._teacher.follow(self.plan)
            self.storage = self._storage_in(self._teacher)

    def _storage_in(self, teacher: Teacher) -> AverageStorage:
        """The average in a teacher's own storage, where gaps belong to other weights."""
        fragments = [p for p in self.plan.fragments]
        return AverageStorage(fragments, [teacher.values(self.plan)], owns_gaps=False)

    @torch.no_grad()
    def start_again(self) -> None:
        """Let every average be the live weights. Local."""
        self.storage.copy()
        if self._teacher is not None:
            self._teacher.copy_parameters(self.plan, frozen_only=False)
        self.refresh_teacher()

    def refresh_teacher(self, *, loaded: bool = False) -> None:
        """Let the teacher, if there is one, compute with what was averaged. Local.

        After a load it takes the frozen weights too, and once more at the next update: the model's
        own may be loaded in between.
        """
        if self._teacher is not None:
            if loaded or self._frozen_due:
                self._teacher.copy_parameters(self.plan, frozen_only=True)
            self._teacher.copy_buffers(self.engine, self.plan.averaged)
            self._teacher.refresh()
            self._frozen_due = loaded

    def refuse_thawed(self) -> None:
        """Raise if a weight that was left out, since it was frozen, trains now. Local."""
        for fqn, tensor in self._frozen:
            if tensor.requires_grad:
                raise RuntimeError(
                    f"{fqn}: was frozen when the average was built, so it is not averaged, and "
                    "requires grad now; build ShardedEMA with params='all', or after unfreezing"
                )

    def _rebind(self) -> None:
        engine = select(self.model)
        if type(engine) is not type(self.engine):
            raise RuntimeError(
                f"the model was held by {type(self.engine).__name__} when this average was built, "
                f"and by {type(engine).__name__} now; build ShardedEMA after fully_shard(), DDP or "
                "accelerator.prepare(), with what they return"
            )
        self.plan = rebind(self.plan, engine.weights(), self.group)
        self.engine = engine
        self.storage.bind([p for p in self.plan.fragments])
        self._note_storage()

    def _note_storage(self) -> None:
        """Take what `follow` compares with, from the engine and plan of now."""
        self._held = list(self.model.modules())  # or else ids could be given to new modules
        children = [module._modules for module in self._held]
        self._watch_modules()
        self._parents = [c for c in children if c]
        self._leaves = [c for c in children if not c]
        self._structure = self._children()
        self._averaged_buffers = _registered_buffers(self.model, self.plan.averaged)
        self._stamp = self._storage()
        self._frozen = _frozen(self.plan, self._options.params)
        self._gatherer: Gatherer | None = None
        self._gathered_buffers: list[object] = []

    def _storage(self) -> list[int]:
        """Data pointers of all that is averaged or not to change."""
        return self.engine.stamp() + self._averaged_buffers.addresses()

    def _watch_modules(self) -> None:
        """Learn of swaps of the modules that are read or written: the model's and the teacher's."""
        into = () if self._into is None else self._into.modules()
        self.marks.watch([*self.model.modules(), *into])

    def _children(self) -> list[int]:
        """What changes when a submodule is replaced or added."""
        if any(self._leaves):
            return []
        return list(map(id, itertools.chain.from_iterable(map(dict.values, self._parents))))

    def average_dtype(self, weight: Weight) -> torch.dtype:
        """The dtype in which a weight is averaged, on whatever rank. Local."""
        if self._teacher is not None:
            return self._teacher.dtype_of(weight.fqn)
        return average_dtype(self._options.dtype, weight.tensor)

    def others(self) -> list[Weight]:
        """What the model has now and is not averaged: frozen parameters, and buffers. Local."""
        parameters = [w for w in self.plan.weights if w.fqn not in self.plan.averaged]
        buffers = [w for w in self.engine.buffers() if w.fqn not in self.plan.averaged]
        return parameters + buffers

    def gatherer(self, values: list[torch.Tensor]) -> Gatherer:
        """Who owns what, with the dtypes of these values. Collective: every rank calls it."""
        buffers = [w for w in self.engine.buffers() if w.persistent]
        buffers = [w for w in buffers if w.fqn not in self.plan.averaged]
        stamp: list[object] = [
            (
                (w.fqn, w.aliases, w.shape, w.tensor.dtype, w.problem),
                [(f.meta, pointer(f.view)) for f in w.fragments],
            )
            for w in buffers
        ]
        gapless = [without_gaps(w) for w in buffers]
        is_copied = gapless != buffers  # then it must be copied again each time
        buffers = gapless
        gatherer = self._gatherer if stamp == self._gathered_buffers and not is_copied else None
        # A rank that holds nothing does not notice that storage moved: all do it if one must.
        if self.group.any(gatherer is None) or gatherer is None:
            gatherer = Gatherer(self.plan, values, buffers, self.group)
            self._gatherer, self._gathered_buffers = gatherer, stamp
        return gatherer

    def make_permanent(self, values: list[torch.Tensor]) -> None:
        """Write an average over the live weights, masters and low-precision copies too.

        Collective where weights are replicated or the engine keeps copies.
        """
        with self.group.together():
            refuse_destroyed(self.plan.replica_groups)
        self._await_copies()
        self.engine.release()
        for fragment, value in zip(self.plan.fragments, values, strict=True):
            fragment.view.copy_(value)
        for replica_group in self.plan.replica_groups:
            replica_group.share(source)
        for weight in self.plan.weights:
            if weight.fqn in self.plan.averaged:
                for fragment in weight.fragments:
                    if not fragment.in_place:
                        fragment.forward_view.copy_(fragment.view)
        self._publish()

    @contextmanager
    def showing(self, name: str, values: list[torch.Tensor]) -> Iterator[None]:
        """Within the block the forward pass reads an average. Collective where replicas share."""
        num_parameters = len(self.plan.parameters)
        swap = Swap([p for p in self.plan.parameters], values[:num_parameters])
        with torch.no_grad(), self.swap_group.together():
            refuse_freezing()
            refuse_destroyed(self.plan.replica_groups)
            buffers = Buffers(self.model, self.engine.buffers())
            self.engine.release()
            self._await_copies()
        self._refuse_differing_replicas()
        signals = DeferredSignals()
        armed = shared = False  # whether the way back has something to do, and replicas to share
        written: WrittenWeights | None = None

        def share_back() -> None:
            try:
                self._share() if shared else self._publish()
                if swap.is_shown:
                    raise RuntimeError("live weights were not written back")
            except BaseException as error:
                self.marks.set("torn", name)
                if isinstance(error, Exception):
                    self._raise_torn(error)
                raise

        def leave() -> None:
            # The last callback first, and each of them also if one before it raised.
            with self.lock, torch.no_grad(), ExitStack() as steps:
                steps.callback(self.marks.clear, "shown")
                steps.callback(share_back)
                steps.callback(self._carry_over_if_moved)
                steps.callback(buffers.restore)
                steps.callback(swap.leave)
                steps.callback(self._await_copies)
                steps.callback(self.engine.release)
                if written is not None:
                    steps.callback(written.warn)

        try:
            try:
                signals.hold()
                with self.lock, torch.no_grad():
                    armed = True
                    self.marks.set("shown", name)
                    with self.swap_group.together():
                        swap.enter()
                        averaged = zip(self.plan.buffers, values[num_parameters:], strict=True)
                        for fragment, value in averaged:
                            fragment.view.copy_(value)
                    shared = True
                    self._share()
                    written = WrittenWeights(
                        (weight.fqn, tensor)
                        for weight in self.plan.weights
                        if weight.fqn in self.plan.averaged and not weight.is_buffer
                        for tensor in self.engine.versioned(weight)
                    )
                signals.release()
                yield
            finally:
                signals.hold()
        finally:  # also if a signal came just before they were held
            try:
                if armed:
                    leave()
            finally:
                signals.release()

    @staticmethod
    def _raise_torn(error: Exception) -> NoReturn:
        raise RuntimeError(
            "the way back from average_parameters() has failed: the model's weights are in part "
            "live ones and in part averaged ones. Load the model's weights again, then call "
            f"reset() or load() of the average. {type(error).__name__}: {error}"
        ) from error

    def _await_copies(self) -> None:
        """Wait for forward passes that may still copy weights from host memory to the device."""
        views = (f.forward_view for w in self.plan.weights for f in w.fragments)
        if any(view.device.type == "cpu" for view in views):
            synchronize_if_initialized()

    def _carry_over_if_moved(self) -> None:
        """Bring live weights along to where a block moved the model's storage."""
        if self._storage() == self._stamp:
            return
        old = [f for w in self.plan.weights for f in w.fragments if w.fqn in self.plan.averaged]
        self._rebind()
        self.engine.release()
        new = [f for w in self.plan.weights for f in w.fragments if w.fqn in self.plan.averaged]
        for was, now in zip(old, new, strict=True):
            if now.view.data_ptr() != was.view.data_ptr():
                now.view.copy_(was.view)
                if not now.in_place:
                    now.forward_view.copy_(was.view)

    @property
    def swap_group(self) -> Group:
        """The ranks that a swap involves: all of them, or this one by itself."""
        return self.group if self._any_shares else Group.alone()

    def _share(self) -> None:
        """Let replicas have each other's slices, and the forward pass what stands in storage."""
        for replica_group in self.plan.replica_groups:
            replica_group.share()
        self._publish()

    def _publish(self) -> None:
        """Let the next forward pass read what stands in storage."""
        self.engine.publish()
        drop_caches()

    def _refuse_differing_replicas(self) -> None:
        """Raise if ranks that hold the same weights do not hold the same bits. Collective."""
        names = differing(self.plan.replica_groups, self.plan.num_shared_groups, self.swap_group)
        if names:
            raise RuntimeError(
                f"weights that several ranks hold differ between them: {', '.join(names)}. Each of "
                "these ranks averages a slice of them, and a swap would overwrite the others' live "
                "values; synchronize the weights, pass replicas='whole' to let each rank average "
                "its own, or, if these are different weights under one name (experts), "
                "process_group= with the ranks that together hold one model"
            )


def _frozen(plan: Plan, params: Selects) -> list[tuple[str, torch.Tensor]]:
    """Parameters that are left out because they do not train."""
    if params != "trainable":
        return []
    return [
        (w.fqn, w.tensor) for w in plan.weights if not w.is_buffer and w.fqn not in plan.averaged
    ]


def _registered_buffers(model: nn.Module, names: frozenset[str]) -> Registered:
    return Registered(
        (s.registry, s.name) for s in registrations(model) if s.is_buffer and s.fqn in names
    )
