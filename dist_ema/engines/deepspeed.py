"""DeepSpeed, ZeRO 0 to 3: masters that its optimizer writes, copies that the model computes with.

[Note: masters and copies]
Except at stage 0 in fp32, DeepSpeed trains masters (fp32 by default) and computes with copies of
them, even if the model is fp32. The masters are averaged. A swap writes the average over this
rank's part of the copies and never touches the masters. A rank holds all masters (stage 0), an even
part of each flat buffer of masters (1 and 2), or an even part of each parameter, end to end in flat
buffers (3). The copies are whole on every rank, and gathered after each step (1 and 2); or they are
cut as the masters are, and gathered when a module needs them (3).

Attributes of its optimizers and parameters were checked in deepspeed 0.16.4 to 0.19.8.
`_hp_mapping` and `safe_get_full_fp32_param` confuse parameters with `round_robin_gradients`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.core.engine import Cut, Engine, Registered, Weight, cut_range, pointer
from dist_ema.core.errors import require, require_names
from dist_ema.core.layout import whole_fragment
from dist_ema.core.names import Registration, is_instance, layers, registrations
from dist_ema.core.replicas import exchange_slices
from dist_ema.engines.plain import outdate

# For each kind of optimizer, the attribute that identifies it, then the others that are read.
_STAGE_3 = (
    "fp32_partitioned_groups_flat fp16_groups fp16_partitioned_groups_flat parameter_offload "
    "offloaded_states"
)
_OFFLOAD = (
    "partition_all_parameters module offload_device persistent_parameters get_param_coordinator"
)
_PARAMETER = (  # at stage 3
    "ds_tensor ds_numel ds_shape ds_status ds_process_group ds_secondary_tensor all_gather"
)
_STAGES_1_2 = (
    "single_partition_of_fp32_groups round_robin_bit16_groups bit16_groups_flat "
    "real_dp_process_group"
)
_BF16 = "fp32_groups_flat_partition bf16_groups bf16_groups_flat real_dp_process_group"
_FUSED = "fp32_groups_flat fp16_groups fp16_groups_flat"
_UNFUSED = "fp32_groups fp16_groups"
_ENGINE = "optimizer global_steps skipped_steps mp_world_size autotp_size"
# Attributes or methods of an engine or its optimizer that are true if a feature is in use.
_UNSUPPORTED = {
    "has_moe_layers": "expert parallelism",
    "pipeline_parallelism": "pipeline parallelism",
    "zenflow": "ZenFlow",
    "super_offload": "SuperOffload",
    "swap_optimizer": "offload to NVMe",
    "params_in_nvme_and_cpu": "offload to NVMe",
}


MakeCut = Callable[[Registration], Cut]


class ZeroEngine(Engine):
    """Parts of DeepSpeed's flat buffers. Only `release` and `publish` communicate."""

    communicates = True
    takes_masters = False

    def __init__(self, model: nn.Module) -> None:
        require("deepspeed")
        engine = _find_engine(model)
        if engine is None:
            raise ValueError(
                "DeepSpeed manages the parameters; after deepspeed.initialize() or "
                "accelerator.prepare(), pass the DeepSpeedEngine that it returned"
            )
        _refuse_unsupported(engine)
        super().__init__(model)
        self._engine, self._stage = engine, _stage(engine.optimizer)
        masters = self._stage.masters
        self.source = "master" if masters and masters[0].dtype.itemsize >= 4 else "weights"
        moved = self._stage.moved_by_buffers
        self._others = Registered(
            r for r in registrations(model) if not r.is_buffer and id(r.tensor) not in moved
        )
        self._cuts: dict[int, MakeCut] = {}  # by the id of a parameter

    @staticmethod
    def claims(model: nn.Module) -> bool:
        managed = (hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters())
        return "deepspeed" in sys.modules and (_find_engine(model) is not None or any(managed))

    def weights(self) -> list[Weight]:
        self._cuts = {id(parameter): cut for parameter, cut in self._stage.cuts()}
        return super().weights()

    def _cut(self, registration: Registration, tensor: torch.Tensor) -> Cut:
        cut = self._cuts.get(id(tensor))
        return super()._cut(registration, tensor) if cut is None else cut(registration)

    def stamp(self) -> list[int]:
        buffers = [pointer(buffer) for buffer in self._stage.buffers()]
        return buffers + self._others.addresses()

    def applied_steps(self) -> int | None:
        if isinstance(self._stage, _Stage3) and not self._stage.masters:
            raise ValueError(
                "this DeepSpeedEngine has no optimizer, so it counts no steps and its weights stay "
                "as they are; pass the engine that trains, and this one as into="
            )
        # `was_step_applied()` is stale between optimizer steps with accelerate.
        applied: int = self._engine.global_steps - self._engine.skipped_steps
        return applied

    def release(self) -> None:
        offloaded = getattr(self._engine.optimizer, "offloaded_states", ())
        if any(state.name == "lp_params" for state in offloaded):
            raise RuntimeError("the weights are offloaded; call engine.reload_states() first")
        if isinstance(self._stage, _Stage3) and _is_deepcompiled(self._engine):
            raise RuntimeError(
                "DeepCompile keeps gathered weights between steps, and would compute with them in "
                "place of what is written; set deepcompile to false in the config"
            )
        self._stage.release()

    def refresh(self, weights: Sequence[Weight]) -> None:
        self._stage.refresh([weight.tensor for weight in weights if not weight.is_buffer])
        outdate()

    def publish(self) -> None:
        self._stage.publish()
        outdate(self._engine.module.parameters())


class _Whole:
    """Stage 0: parameters whole on every rank, with masters if they are of low precision."""

    # Ids of parameters that need no watching, since they move only when `buffers` do.
    moved_by_buffers: Collection[int] = ()

    def __init__(self, parameters: list[Any], masters: list[Any]) -> None:
        self.parameters, self.masters = parameters, masters

    def buffers(self) -> list[torch.Tensor]:
        """All storage that is viewed, except parameters that are watched themselves."""
        return self.masters

    def cuts(self) -> Iterator[tuple[torch.Tensor, MakeCut]]:
        """Each parameter that has a master or is cut, on this rank or another."""

        def cut(registration: Registration, parameter: torch.Tensor, master: torch.Tensor) -> Cut:
            return tuple(parameter.shape), (whole_fragment(registration.fqn, master, parameter),)

        for parameter, master in zip(self.parameters, self.masters, strict=True):
            yield parameter, partial(cut, parameter=parameter, master=master)

    def release(self) -> None:
        return

    def refresh(self, parameters: Sequence[Any]) -> None:
        """Drop gathered copies of some parameters. Local."""

    def publish(self) -> None:
        return


class _Flat(_Whole):
    """Parameters end to end in flat buffers; masters of all of it (0) or an even part (1, 2)."""

    def __init__(
        self, groups: Any, masters: Any, copies: Any, process_groups: Any = None, starts: Any = None
    ) -> None:
        """`starts` of the parameters in the flat buffers are given where there is padding."""
        super().__init__([p for group in groups for p in group], masters)
        self._groups, self._copies, self._process_groups = groups, copies, process_groups
        self._starts = starts or [
            [0, *itertools.accumulate(p.numel() for p in group)] for group in groups
        ]
        # All but one of each: .to() and load_state_dict(assign=True) do not move the buffers.
        self.moved_by_buffers = {id(p) for group in groups for p in group[1:]}

    def buffers(self) -> list[torch.Tensor]:
        return [*self.masters, *self._copies]

    def cuts(self) -> Iterator[tuple[torch.Tensor, MakeCut]]:
        for i, group in enumerate(self._groups):
            master, copy, held = self.masters[i].detach(), self._copies[i].detach(), self._held(i)
            for p, start in zip(group, self._starts[i], strict=False):
                if p.numel() and pointer(p) != pointer(copy[start:]):
                    raise RuntimeError(
                        "parameters are not where DeepSpeed keeps them: replaced after initialize()"
                        " (.to(), load_state_dict(assign=True)), or its version is not supported"
                    )
                a, b = (min(max(n, held.start), held.stop) for n in (start, start + p.numel()))
                view, shape = master[a - held.start : b - held.start], tuple(p.shape)
                yield (
                    p,
                    partial(
                        cut_range, shape=shape, start=a - start, view=view, forward_view=copy[a:b]
                    ),
                )

    def publish(self) -> None:
        """All-gather the low-precision copies, of which each rank has updated one part."""
        for copy, process_group in zip(self._copies, self._process_groups or (), strict=False):
            parts = list(copy.detach().view(dist.get_world_size(process_group), -1))
            exchange_slices(
                partial(_elements, parts),
                [part.numel() for part in parts],
                copy.dtype,
                copy.device,
                process_group,
                range(len(parts)),
            )

    def _held(self, i: int) -> slice:
        """The part of a buffer whose masters this rank holds."""
        size, groups = self.masters[i].numel(), self._process_groups
        rank = dist.get_rank(groups[i]) if groups else 0
        return slice(size * rank, size * (rank + 1))


class _Stage3(_Whole):
    """An even part of each parameter; the parts of those that train are in flat buffers."""

    def __init__(self, offload: Any, optimizer: Any = None) -> None:
        """
        Args:
            offload: cuts and gathers the parameters, with or without an optimizer.
        """
        require_names(offload, _OFFLOAD, "deepspeed")
        if offload.offload_device == "nvme":
            raise ValueError("DeepSpeed with offload to NVMe is not supported")
        for parameter in offload.module.parameters():
            require_names(parameter, _PARAMETER, "deepspeed")
        masters = getattr(optimizer, "fp32_partitioned_groups_flat", [])
        super().__init__(list(offload.module.parameters()), masters)
        self._offload, self._optimizer = offload, optimizer
        self._groups = getattr(optimizer, "fp16_groups", ())
        self._owners = {
            id(p): m for m in offload.module.modules() for p in m.parameters(recurse=False)
        }
        self.moved_by_buffers = {id(p) for p in self.parameters}
        trained = {id(p) for group in self._groups for p in group}
        self._rest = [p for p in self.parameters if id(p) not in trained]

    def buffers(self) -> list[torch.Tensor]:
        copies = getattr(self._optimizer, "fp16_partitioned_groups_flat", ())
        return [*self.masters, *copies, *(p.ds_tensor for p in self._rest)]

    def cuts(self) -> Iterator[tuple[torch.Tensor, MakeCut]]:
        for group, masters in zip(self._groups, self.masters, strict=True):
            sizes = [p.ds_tensor.numel() for p in group]
            for p, master in zip(group, masters.detach().split(sizes), strict=True):
                yield p, self._cut(p, master)
        for p in self._rest:
            yield p, self._cut(p, p.ds_tensor.detach().view(-1))

    def release(self) -> None:
        self._offload.partition_all_parameters()

    def refresh(self, parameters: Sequence[Any]) -> None:
        gathered = [p for p in parameters if p.ds_status.name != "NOT_AVAILABLE"]
        for module in dict.fromkeys(self._owners[id(p)] for p in gathered):
            self._offload.get_param_coordinator().release_and_reset_all(module)
        _invalidate(parameters)

    def publish(self) -> None:
        # They stay gathered between steps. Each is gathered by itself: of several, DeepSpeed before
        # 0.19 waits for the last only, and on the CPU reads the others too early.
        for parameter in self._offload.persistent_parameters:
            parameter.all_gather([parameter])
        _invalidate(self.parameters)

    def _cut(self, p: Any, master: torch.Tensor) -> MakeCut:
        if hasattr(p.ds_tensor, "ds_quant_scale"):
            return _refuse_quantized
        size = master.numel()  # the same on every rank: the end is padded
        if size != -(-p.ds_numel // dist.get_world_size(p.ds_process_group)):
            return _refuse_subgroups
        start = size * dist.get_rank(p.ds_process_group)
        view, copy = (
            t[: max(0, p.ds_numel - start)] for t in (master, p.ds_tensor.detach().view(-1))
        )
        forward_view = None if pointer(copy) == pointer(view) else copy
        return partial(
            cut_range, shape=tuple(p.ds_shape), start=start, view=view, forward_view=forward_view
        )


def _refuse_quantized(registration: Registration) -> Cut:
    raise ValueError("is quantized by zero_quantized_nontrainable_weights; leave that setting out")


def _refuse_subgroups(registration: Registration) -> Cut:
    raise ValueError("is cut over a subgroup of the ranks (MiCS); leave mics_shard_size out")


def _invalidate(parameters: Iterable[Any]) -> None:
    """Drop the copies within a node, from which ZeRO++ (hpZ) gathers weights."""
    for parameter in parameters:
        parameter.ds_secondary_tensor = None


def _stage(o: Any) -> _Whole:
    """How an optimizer keeps its masters. Told apart by attributes, as classes do not show it."""
    if _has(o, _STAGE_3):
        return _Stage3(o.parameter_offload, o)
    if _has(o, _OFFLOAD):  # DeepSpeedZeRoOffload, at stage 3 without optimizer
        return _Stage3(o)
    if _has(o, _STAGES_1_2):
        # Before DeepSpeed 0.19 there is no padding between parameters, and no such attribute.
        starts = getattr(o, "round_robin_bit16_offsets", None)
        masters, copies = o.single_partition_of_fp32_groups, o.bit16_groups_flat
        return _Flat(o.round_robin_bit16_groups, masters, copies, o.real_dp_process_group, starts)
    if _has(o, _BF16):  # BF16_Optimizer, at stage 1, and at stage 0 before DeepSpeed 0.18
        masters, copies = o.fp32_groups_flat_partition, o.bf16_groups_flat
        return _Flat(o.bf16_groups, masters, copies, o.real_dp_process_group)
    if _has(o, _FUSED):  # FP16_Optimizer, at stage 0
        return _Flat(o.fp16_groups, o.fp32_groups_flat, o.fp16_groups_flat)
    if _has(o, _UNFUSED):  # FP16_UnfusedOptimizer, at stage 0
        return _Whole([p for g in o.fp16_groups for p in g], [p for g in o.fp32_groups for p in g])
    if o is None or isinstance(o, torch.optim.Optimizer):
        return _Whole([], [])
    raise ValueError(f"DeepSpeed's {type(o).__name__} is not supported")


def _has(optimizer: Any, names: str) -> bool:
    """Whether an optimizer has the first attribute. Raises RuntimeError if it lacks another one."""
    if not hasattr(optimizer, names.split()[0]):
        return False
    require_names(optimizer, names, "deepspeed")
    return True


def _find_engine(model: nn.Module) -> Any:
    kind = "deepspeed.runtime.engine", "DeepSpeedEngine"
    return next((module for module in layers(model) if is_instance(module, *kind)), None)


def _refuse_unsupported(engine: Any) -> None:
    require_names(engine, _ENGINE, "deepspeed")
    for attribute, what in _UNSUPPORTED.items():
        for holder in (engine, engine.optimizer):
            value = getattr(holder, attribute, False)
            if value() if callable(value) else value:
                raise ValueError(f"DeepSpeed with {what} is not supported")
    if engine.mp_world_size > 1 or engine.autotp_size() > 1:
        raise ValueError("DeepSpeed with tensor parallelism is not supported")


def _is_deepcompiled(engine: Any) -> bool:
    """Whether DeepCompile is in use; before DeepSpeed 0.18, whether the config asks for it."""
    for name in ("is_deepcompile_active", "is_deepcompile_enabled"):
        if hasattr(engine, name):
            return bool(getattr(engine, name)())
    return False


def _elements(parts: list[torch.Tensor], i: int, start: int, stop: int) -> list[torch.Tensor]:
    return [parts[i][start:stop]]
