"""DeepSpeed, ZeRO 0 to 3: masters that its optimizer writes, copies that the model computes with.

[Note: masters and copies]
But for stage 0 in fp32, DeepSpeed trains masters (in fp32, unless told otherwise) and computes with
copies, in fp32 too if the model is. The masters are averaged. The average is shown by writing it
over this rank's part of the copies, and the masters are never touched. A rank holds all masters
(stage 0), an even part of each flat buffer of them (1 and 2), or an even part of each parameter,
end to end in flat buffers (3). The copies are whole on every rank, put together after each step (1
and 2), or cut as the masters are and gathered when a module needs them (3).

Attributes of its optimizers and parameters were checked in deepspeed 0.16.4 to 0.19.8.
`_hp_mapping`, and `safe_get_full_fp32_param` with it, take one parameter for another under
`round_robin_gradients`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.core.engine import (
    Cut,
    Engine,
    Registered,
    Weight,
    cut_range,
    cut_whole,
    outdate_graphs,
    pointer,
)
from dist_ema.core.group import all_gather_single, gather_chunk
from dist_ema.core.layout import whole_fragment
from dist_ema.core.names import Registration, is_instance, layers, registrations
from dist_ema.core.requirements import require, require_names
from dist_ema.engines.caches import drop_caches

_OF_STAGE_3 = (
    "module fp16_groups fp16_partitioned_groups_flat persistent_parameters "
    "_partition_all_parameters invalidate_secondary_tensor"
)
# Attributes of an engine or its optimizer, or calls of them, that tell of what is not supported.
_UNSUPPORTED = {
    "has_moe_layers": "expert parallelism",
    "pipeline_parallelism": "pipeline parallelism",
    "zenflow": "ZenFlow",
    "super_offload": "SuperOffload",
    "swap_optimizer": "offload to NVMe",
    "params_in_nvme_and_cpu": "offload to NVMe",
}


class ZeroEngine(Engine):
    """Parts of DeepSpeed's flat buffers. Only `release` and `publish` communicate."""

    communicates = True

    def __init__(self, model: nn.Module) -> None:
        require("deepspeed")
        engine = _find_engine(model)
        if engine is None:
            raise ValueError(
                "the parameters are in the hands of DeepSpeed; after deepspeed.initialize() or "
                "accelerator.prepare(), pass the DeepSpeedEngine that it returned"
            )
        _refuse_unsupported(engine)
        super().__init__(model)
        self._engine, self._stage = engine, _stage(engine.optimizer)
        masters = self._stage.masters
        self.source = "master" if masters and masters[0].dtype.itemsize >= 4 else "weights"
        moved = self._stage.moved_by_buffers
        self._others = Registered(
            (s.registry, s.name)
            for s in registrations(model)
            if not s.is_buffer and id(s.tensor) not in moved
        )
        self._cuts: dict[int, Callable[[Registration], Cut]] = {}  # by the id of a parameter

    @staticmethod
    def claims(model: nn.Module) -> bool:
        managed = (hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters())
        return "deepspeed" in sys.modules and (_find_engine(model) is not None or any(managed))

    def weights(self) -> list[Weight]:
        self._cuts = {id(parameter): cut for parameter, cut in self._stage.cuts()}
        return super().weights()

    def _cut(self, registration: Registration, tensor: torch.Tensor) -> Cut:
        cut = self._cuts.get(id(tensor))
        return cut_whole(registration, tensor) if cut is None else cut(registration)

    def stamp(self) -> list[int]:
        buffers = [pointer(buffer) for buffer in self._stage.buffers()]
        return buffers + self._others.addresses()

    def applied_steps(self) -> int | None:
        # `was_step_applied()` is stale between optimizer steps where accelerate drives the engine.
        applied: int = self._engine.global_steps - self._engine.skipped_steps
        return applied

    def release(self) -> None:
        offloaded = getattr(self._engine.optimizer, "offloaded_states", ())
        if any(state.name == "lp_params" for state in offloaded):
            raise RuntimeError("the weights are offloaded; call engine.reload_states() first")
        self._stage.release()

    def publish(self) -> None:
        self._stage.publish()
        outdate_graphs(self._engine.module.parameters())
        drop_caches()


class _Whole:
    """Stage 0: parameters whole on every rank, with masters if they are of low precision."""

    def __init__(self, parameters: list[Any], masters: list[Any]) -> None:
        self.parameters, self.masters = parameters, masters
        # Ids of parameters that need no watching, since they move only when `buffers` do.
        self.moved_by_buffers: set[int] = set()

    def buffers(self) -> list[torch.Tensor]:
        """All storage that is viewed, but for parameters that have to be watched themselves."""
        return self.masters

    def cuts(self) -> Iterator[tuple[torch.Tensor, Callable[[Registration], Cut]]]:
        """Of each parameter that has a master or is cut, on this rank or another."""

        def cut(registration: Registration, parameter: torch.Tensor, master: torch.Tensor) -> Cut:
            return tuple(parameter.shape), (whole_fragment(registration.fqn, master, parameter),)

        for parameter, master in zip(self.parameters, self.masters, strict=True):
            yield parameter, partial(cut, parameter=parameter, master=master)

    def release(self) -> None:
        return

    def publish(self) -> None:
        return


class _Flat(_Whole):
    """Parameters end to end in flat buffers; masters of all of it (0) or an even part (1, 2)."""

    def __init__(self, groups: Any, masters: Any, copies: Any, starts: Any, ranks: Any) -> None:
        super().__init__([p for group in groups for p in group], masters)
        self._groups, self._copies, self._starts, self._group = groups, copies, starts, ranks
        # All but one of each: .to() and load_state_dict(assign=True) do not move the buffers.
        self.moved_by_buffers = {id(p) for group in groups for p in group[1:]}

    def buffers(self) -> list[torch.Tensor]:
        return [*self.masters, *self._copies]

    def cuts(self) -> Iterator[tuple[torch.Tensor, Callable[[Registration], Cut]]]:
        for i, group in enumerate(self._groups):
            master, copy, held = self.masters[i].detach(), self._copies[i].detach(), self._held(i)
            for p, start in zip(group, self._starts[i], strict=False):
                if p.numel() and pointer(p) != pointer(copy[start:]):
                    raise RuntimeError(
                        "parameters are not where DeepSpeed keeps them: replaced after initialize()"
                        " (.to(), load_state_dict(assign=True)), or its version is not supported"
                    )
                a, b = (min(max(n, held.start), held.stop) for n in (start, start + p.numel()))
                own, forward_view = master[a - held.start : b - held.start], copy[a:b]
                shape = tuple(p.shape)
                yield (
                    p,
                    partial(
                        cut_range, shape=shape, start=a - start, view=own, forward_view=forward_view
                    ),
                )

    def publish(self) -> None:
        for i, copy in enumerate(self._copies if self._group else ()):
            parts = copy.detach().view(dist.get_world_size(self._group[i]), -1)
            own = copy.detach()[self._held(i)]
            step = gather_chunk(copy.device, len(parts), copy.element_size())
            every = torch.empty(len(parts), step, dtype=copy.dtype, device=copy.device)
            for start in range(0, own.numel(), step):
                mine = own[start : start + step]
                found = every.view(-1)[: len(parts) * mine.numel()]
                all_gather_single(found, mine, group=self._group[i])
                parts[:, start : start + step].copy_(found.view(len(parts), -1))

    def _held(self, i: int) -> slice:
        """The part of a buffer whose masters this rank holds."""
        size, rank = self.masters[i].numel(), dist.get_rank(self._group[i]) if self._group else 0
        return slice(size * rank, size * (rank + 1))


class _Stage3(_Whole):
    """An even part of each parameter; the parts of those that train are in flat buffers."""

    def __init__(self, optimizer: Any) -> None:
        require_names(optimizer, _OF_STAGE_3, "deepspeed")
        masters = optimizer.fp32_partitioned_groups_flat
        super().__init__(list(optimizer.module.parameters()), masters)
        self._optimizer = optimizer
        self.moved_by_buffers = {id(p) for p in self.parameters}
        trained = {id(p) for group in optimizer.fp16_groups for p in group}
        self._rest = [p for p in self.parameters if id(p) not in trained]

    def buffers(self) -> list[torch.Tensor]:
        copies = self._optimizer.fp16_partitioned_groups_flat
        return [*self.masters, *copies, *(p.ds_tensor for p in self._rest)]

    def cuts(self) -> Iterator[tuple[torch.Tensor, Callable[[Registration], Cut]]]:
        for group, masters in zip(self._optimizer.fp16_groups, self.masters, strict=True):
            sizes = [p.ds_tensor.numel() for p in group]
            for p, master in zip(group, masters.detach().split(sizes), strict=True):
                yield p, self._cut(p, master)
        for p in self._rest:
            yield p, self._cut(p, p.ds_tensor.detach().view(-1))

    def release(self) -> None:
        self._optimizer._partition_all_parameters()

    def publish(self) -> None:
        # They stay gathered between steps. One by one: of several at once, DeepSpeed before 0.19
        # waits for the last only, and on the CPU reads the others too early.
        for parameter in self._optimizer.persistent_parameters:
            parameter.all_gather([parameter])
        self._optimizer.invalidate_secondary_tensor()

    def _cut(self, p: Any, master: torch.Tensor) -> Callable[[Registration], Cut]:
        size = master.numel()  # as much on every rank: the end is padded
        start = size * dist.get_rank(p.ds_process_group)
        view, copy = (
            t[: max(0, p.ds_numel - start)] for t in (master, p.ds_tensor.detach().view(-1))
        )
        forward_view = None if pointer(copy) == pointer(view) else copy
        return partial(
            cut_range, shape=tuple(p.ds_shape), start=start, view=view, forward_view=forward_view
        )


def _stage(o: Any) -> _Whole:
    """How an optimizer keeps its masters; told by attributes, since classes do not tell it."""
    if hasattr(o, "fp32_partitioned_groups_flat"):
        return _Stage3(o)
    if hasattr(o, "single_partition_of_fp32_groups"):  # stages 1 and 2; there may be padding
        groups = o.round_robin_bit16_groups
        # Before DeepSpeed 0.19 there is no padding between parameters, and no such attribute.
        starts = getattr(o, "round_robin_bit16_offsets", None) or [_end_to_end(g) for g in groups]
        masters, copies = o.single_partition_of_fp32_groups, o.bit16_groups_flat
        return _Flat(groups, masters, copies, starts, o.real_dp_process_group)
    if hasattr(o, "fp32_groups_flat_partition"):  # BF16_Optimizer, at stage 1
        masters, copies = o.fp32_groups_flat_partition, o.bf16_groups_flat
        starts = [_end_to_end(group) for group in o.bf16_groups]
        return _Flat(o.bf16_groups, masters, copies, starts, o.real_dp_process_group)
    if hasattr(o, "fp32_groups_flat"):  # FP16_Optimizer, at stage 0
        starts = [_end_to_end(group) for group in o.fp16_groups]
        return _Flat(o.fp16_groups, o.fp32_groups_flat, o.fp16_groups_flat, starts, None)
    if hasattr(o, "fp32_groups"):  # FP16_UnfusedOptimizer, at stage 0
        return _Whole([p for g in o.fp16_groups for p in g], [p for g in o.fp32_groups for p in g])
    if o is None or isinstance(o, torch.optim.Optimizer):
        return _Whole([], [])
    raise ValueError(f"DeepSpeed's {type(o).__name__} is not supported")


def _end_to_end(group: list[torch.Tensor]) -> list[int]:
    return [0, *itertools.accumulate(p.numel() for p in group)]


def _find_engine(model: nn.Module) -> Any:
    kind = "deepspeed.runtime.engine", "DeepSpeedEngine"
    return next((module for module in layers(model) if is_instance(module, *kind)), None)


def _refuse_unsupported(engine: Any) -> None:
    for attribute, what in _UNSUPPORTED.items():
        for holder in (engine, engine.optimizer):
            value = getattr(holder, attribute, False)
            if value() if callable(value) else value:
                raise ValueError(f"DeepSpeed with {what} is not supported")
    if engine.mp_world_size > 1 or engine.autotp_size() > 1:
        raise ValueError("DeepSpeed with tensor parallelism is not supported")
