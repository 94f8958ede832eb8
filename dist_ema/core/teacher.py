"""A second module whose weights are the average: the teacher of DINO, BYOL and mean teacher."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from dist_ema.core.engine import Engine, Weight, pointer
from dist_ema.core.layout import Fragment, FragmentMeta
from dist_ema.core.names import named_modules
from dist_ema.core.plan import Plan
from dist_ema.core.storage import AverageStorage


class Teacher:
    """A module that is sharded as the student is: each rank averages into its own shards. Local.

    Every fragment of the student must have one of the same tensor and box here: others would be
    averaged into the wrong weights without an error.
    """

    def __init__(
        self,
        module: nn.Module,
        student: Engine,
        plan: Plan,
        select: Callable[[nn.Module], Engine],
    ) -> None:
        """
        Raises:
            ValueError: the teacher is sharded in another way; the weights are named.
        """
        if not isinstance(module, nn.Module):
            raise ValueError(f"into is a {type(module).__name__}, wanted a torch.nn.Module")
        self._module, self._select = module, select
        self._engine = select(module)
        if type(self._engine) is not type(student):
            raise ValueError(
                f"into is sharded by {type(self._engine).__name__}, the model by "
                f"{type(student).__name__}; wrap both in the same way"
            )
        self._buffer_stamp: list[int] | None = None
        self._buffer_pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._bind(plan)
        if any(
            self._fragments[fragment.meta].view.data_ptr() == fragment.view.data_ptr()
            for weight in plan.weights
            for fragment in weight.fragments
        ):
            raise ValueError("into shares weights with the model; pass a separate module")

    def storage(self, plan: Plan) -> AverageStorage:
        """The average in the teacher's own storage, where gaps belong to other weights."""
        values = [self._fragments[fragment.meta].view for fragment in plan.fragments]
        return AverageStorage(plan.fragments, [values], owns_gaps=False)

    def dtype_of(self, fqn: str) -> torch.dtype:
        """The dtype of one of the teacher's weights."""
        return self._dtypes[fqn]

    def moved(self) -> bool:
        """Whether storage moved since `storage` was called."""
        return self._engine.stamp() != self._stamp

    def follow(self, plan: Plan) -> None:
        """Find the storage again."""
        self._engine = self._select(self._module)
        self._bind(plan)

    def copy_parameters(self, plan: Plan, *, frozen_only: bool) -> None:
        """Copy parameters that are not averaged from the student."""
        for weight in plan.weights:
            if weight.fqn not in plan.averaged and not (
                frozen_only and weight.tensor.requires_grad
            ):
                for fragment in weight.fragments:
                    self._fragments[fragment.meta].view.copy_(fragment.view)

    def copy_buffers(self, student: Engine, averaged: frozenset[str]) -> None:
        """Copy buffers that are not averaged from the student, as they are registered now.

        A buffer that the teacher lacks, or has in another shape, is registered as a copy.
        """
        registries = (student.buffer_registries(), self._engine.buffer_registries())
        if self._buffer_stamp != _stamp_of(registries):
            self._pair_buffers(student, averaged)
            self._buffer_stamp = _stamp_of(registries)
        for target, source in self._buffer_pairs:
            target.copy_(source)

    def _pair_buffers(self, student: Engine, averaged: frozenset[str]) -> None:
        self._adopt_buffers(student, averaged)
        own = {name: w for w in self._engine.buffers() for name in (w.fqn, *w.aliases)}
        self._buffer_pairs = [
            pair
            for weight in student.buffers()
            if weight.fqn in own and weight.fqn not in averaged and not weight.problem
            for pair in zip(own[weight.fqn].views, weight.views, strict=True)
        ]

    def _adopt_buffers(self, student: Engine, averaged: frozenset[str]) -> None:
        """Register copies of buffers of the student that this module lacks, or has otherwise."""
        own = {name: w for w in self._engine.buffers() for name in (w.fqn, *w.aliases)}
        modules = dict(named_modules(self._module))
        for weight in student.buffers():
            buffer = own.get(weight.fqn)
            if weight.fqn in averaged or weight.problem:
                continue
            if buffer is None or _kind(buffer) != _kind(weight):
                copied = weight.tensor.detach().clone()
                for fqn in (weight.fqn, *weight.aliases):
                    owner, _, name = fqn.rpartition(".")
                    if owner in modules:
                        modules[owner].register_buffer(name, copied, persistent=weight.persistent)

    def refresh(self) -> None:
        """Let the next forward pass of the teacher read the new average."""
        self._engine.release()
        self._engine.publish()

    def _bind(self, plan: Plan) -> None:
        weights = {w.fqn: w for w in self._engine.weights()}
        problems = [_difference(weight, weights.get(weight.fqn)) for weight in plan.weights]
        if any(problems):
            listed = "; ".join(filter(None, problems))
            raise ValueError(f"into has another layout than the model: {listed}")
        self._dtypes = {fqn: w.tensor.dtype for fqn, w in weights.items()}
        self._fragments: dict[FragmentMeta, Fragment] = {
            f.meta: f for w in weights.values() for f in w.fragments
        }
        self._stamp = self._engine.stamp()
        self._buffer_stamp = None


def _kind(buffer: Weight) -> object:
    """What the buffers of teacher and student must have in common to be copied in place."""
    dtype = buffer.tensor.dtype
    kind = None if dtype.is_floating_point else dtype  # a teacher may have another precision
    return {buffer.fqn, *buffer.aliases}, buffer.shape, kind


def _difference(student: Weight, teacher: Weight | None) -> str | None:
    """Why a weight of the teacher cannot hold the average of a student's; None if it can."""
    if teacher is None:
        return f"{student.fqn} is missing"
    if teacher.shape != student.shape:
        return f"{student.fqn} has shape {teacher.shape}, the model's {student.shape}"
    if [f.meta for f in teacher.fragments] != [f.meta for f in student.fragments]:
        return f"{student.fqn} is sharded in another way"
    if any(not f.in_place for f in teacher.fragments):
        return f"{student.fqn} is a copy that its engine overwrites from a master"
    return None


def _stamp_of(registries: Iterable[Sequence[dict[str, torch.Tensor | None]]]) -> list[int]:
    """What changes when a buffer is registered, replaced or moved."""
    tensors = itertools.chain.from_iterable(d.values() for each in registries for d in each)
    return [pointer(tensor) for tensor in tensors]
