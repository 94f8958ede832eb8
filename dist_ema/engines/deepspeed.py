"""DeepSpeed, ZeRO 0 to 3: masters that its optimizer writes, copies that the model computes with.

[Note: masters and copies]
But for stage 0 in fp32, DeepSpeed trains masters (in fp32, unless told otherwise) and computes with
copies of them, which are in fp32 too if the model is. The masters are averaged. The average is
shown by writing it over this rank's part of the copies, and the masters are never touched. A rank
holds all masters (stage 0), an even part of each flat buffer of them (1 and 2), or an even part of
each parameter, the parts end to end in flat buffers (3). The copies are whole on every rank, put
together after each step (1 and 2); at stage 3 they are cut as the masters are, and gathered when a
module needs them.

`_hp_mapping` would tell where masters lie, and `safe_get_full_fp32_param` what is in them, but with
`round_robin_gradients` both answer with other parameters' (deepspeed 0.19.8).

Private names of DeepSpeed's optimizers and parameters were read in deepspeed 0.19.8.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.engines.engine import Weight, cut_whole, list_weights, pointer
from dist_ema.layout import Fragment, Place, Shape, range_fragments, whole, whole_fragment
from dist_ema.names import Slot, is_instance, slots, wrapped

# Attributes of an engine or its optimizer that tell of what is not supported.
_UNSUPPORTED = {
    "has_moe_layers": "expert parallelism",
    "pipeline_parallelism": "pipeline parallelism",
    "zenflow": "ZenFlow",
    "super_offload": "SuperOffload",
    "swap_optimizer": "offload to NVMe",
    "params_in_nvme_and_cpu": "offload to NVMe",
}


class ZeroEngine:
    """Parts of DeepSpeed's flat buffers. Only `release` and `publish` communicate."""

    def __init__(self, model: nn.Module) -> None:
        engine = _find_engine(model)
        if engine is None:
            raise ValueError(
                "the model's parameters are in the hands of DeepSpeed; pass what "
                "deepspeed.initialize() or accelerator.prepare() returned (the DeepSpeedEngine), "
                "not the module inside it, and build ShardedEMA after that call"
            )
        _refuse_unsupported(engine)
        self._model, self._engine = model, engine
        self._stage = _stage(engine.optimizer)
        masters = self._stage.masters()
        self.source = "master" if masters and masters[0].dtype.itemsize >= 4 else "weights"
        in_buffers = self._stage.in_buffers()
        self._others = [
            (slot.registry, slot.name)
            for slot in slots(model)
            if slot.is_buffer or id(slot.tensor) not in in_buffers
        ]

    @staticmethod
    def claims(model: nn.Module) -> bool:
        if "deepspeed" not in sys.modules:
            return False
        return _find_engine(model) is not None or any(
            hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters()
        )

    def weights(self) -> list[Weight]:
        ranges = {id(r.parameter): r for r in self._stage.ranges()}

        def cut(slot: Slot, tensor: torch.Tensor) -> tuple[Shape, Sequence[Fragment]]:
            found = ranges.get(id(tensor))
            return cut_whole(slot, tensor) if found is None else found.cut(slot.fqn)

        return list_weights(self._model, lambda slot: slot.tensor, cut)

    def stamp(self) -> list[int]:
        buffers = [pointer(b) for b in (*self._stage.masters(), *self._stage.copies())]
        return buffers + [pointer(registry.get(name)) for registry, name in self._others]

    def applied_steps(self) -> int | None:
        # `was_step_applied()` is stale between optimizer steps where accelerate drives the engine.
        applied: int = self._engine.global_steps - self._engine.skipped_steps
        return applied

    def process_groups(self) -> list[dist.ProcessGroup]:
        return []

    def release(self) -> None:
        offloaded = getattr(self._engine.optimizer, "offloaded_states", ())
        if any(state.name == "lp_params" for state in offloaded):
            raise RuntimeError("the weights are offloaded; call engine.reload_states() first")
        self._stage.release()

    def publish(self) -> None:
        self._stage.publish()


@dataclass(frozen=True, slots=True, eq=False)
class _Range:
    """The part of a parameter, perhaps empty, whose master this rank holds."""

    parameter: torch.Tensor
    shape: Shape
    start: int  # in the parameter
    master: torch.Tensor  # 1-D
    copy: torch.Tensor  # 1-D, as long; of the same storage if there is no master
    order: Shape | None = None

    def cut(self, fqn: str) -> tuple[Shape, Sequence[Fragment]]:
        place = Place(fqn, self.shape, whole(self.shape), self.order)
        copy = None if pointer(self.copy) == pointer(self.master) else self.copy
        return self.shape, tuple(range_fragments(place, self.start, self.master, copy))


class _Stage0:
    """Whole parameters, with a master of each if they are of low precision (unfused optimizer)."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def masters(self) -> list[torch.Tensor]:
        return [p for group in getattr(self._optimizer, "fp32_groups", ()) for p in group]

    def copies(self) -> list[torch.Tensor]:
        """Storage of copies beside that of the model's parameters."""
        return []

    def in_buffers(self) -> set[int]:
        """Ids of parameters that move only when a buffer moves."""
        return set()

    def ranges(self) -> Iterator[_Range]:
        """One of each parameter that has a master or is cut."""
        copies = [p for group in getattr(self._optimizer, "fp16_groups", ()) for p in group]
        for copy, master in zip(copies, self.masters(), strict=True):
            both = whole_fragment("", master, copy)
            yield _Range(copy, tuple(copy.shape), 0, both.view, both.shown, both.place.order)

    def release(self) -> None:
        pass

    def publish(self) -> None:
        pass


class _Flat(_Stage0):
    """Flat buffers, copies whole on every rank and masters too (0), or cut evenly (1 and 2)."""

    def __init__(self, optimizer: Any, groups: str, masters: str, copies: str) -> None:
        super().__init__(optimizer)
        self._names = groups, masters, copies
        self._ranks = getattr(optimizer, "real_dp_process_group", None)  # one group per buffer

    def groups(self) -> list[list[torch.Tensor]]:
        groups: list[list[torch.Tensor]] = getattr(self._optimizer, self._names[0])
        return groups

    def masters(self) -> list[torch.Tensor]:
        masters: list[torch.Tensor] = getattr(self._optimizer, self._names[1])
        return masters

    def copies(self) -> list[torch.Tensor]:
        copies: list[torch.Tensor] = getattr(self._optimizer, self._names[2])
        return copies

    def in_buffers(self) -> set[int]:
        # .to() and load_state_dict(assign=True) leave the buffers where they are, so the first
        # parameter of each is watched too.
        return {id(p) for group in self.groups() for p in group[1:]}

    def ranges(self) -> Iterator[_Range]:
        for i, group in enumerate(self.groups()):
            master, copy = self.masters()[i].detach(), self.copies()[i].detach()
            first, stop = self._held(i)
            starts = [0, *itertools.accumulate(p.numel() for p in group)]
            if hasattr(self._optimizer, "round_robin_bit16_offsets"):  # there may be padding
                starts = self._optimizer.round_robin_bit16_offsets[i]
            for p, start in zip(group, starts, strict=False):
                if p.numel() and pointer(p) != pointer(copy[start:]):
                    raise RuntimeError(
                        "parameters are not where DeepSpeed's optimizer keeps them; do not replace "
                        "them after deepspeed.initialize() (.to(), load_state_dict(assign=True)); "
                        "if you did not, this version of DeepSpeed is not supported"
                    )
                a, b = (min(max(at, first), stop) for at in (start, start + p.numel()))
                yield _Range(p, tuple(p.shape), a - start, master[a - first : b - first], copy[a:b])

    def publish(self) -> None:
        for i, ranks in enumerate(self._ranks or ()):
            copy = self.copies()[i].detach()
            dist.all_gather_single(copy, copy[slice(*self._held(i))], group=ranks)

    def _held(self, i: int) -> tuple[int, int]:
        """The part of a buffer whose masters this rank holds."""
        size = self.masters()[i].numel()
        first = size * dist.get_rank(self._ranks[i]) if self._ranks else 0
        return first, first + size


class _Stage3(_Stage0):
    """An even part of each parameter; those that train are end to end in flat buffers."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        trained = {id(p) for group in optimizer.fp16_groups for p in group}
        self._rest = [p for p in optimizer.module.parameters() if id(p) not in trained]

    def masters(self) -> list[torch.Tensor]:
        masters: list[torch.Tensor] = self._optimizer.fp32_partitioned_groups_flat
        return masters

    def copies(self) -> list[torch.Tensor]:
        return [*self._optimizer.fp16_partitioned_groups_flat, *(p.ds_tensor for p in self._rest)]

    def in_buffers(self) -> set[int]:
        return {id(p) for p in self._optimizer.module.parameters()}

    def ranges(self) -> Iterator[_Range]:
        for group, masters in zip(self._optimizer.fp16_groups, self.masters(), strict=True):
            sizes = [p.ds_tensor.numel() for p in group]
            for p, master in zip(group, masters.detach().split(sizes), strict=True):
                yield self._range(p, master)
        for p in self._rest:
            yield self._range(p, p.ds_tensor.detach().view(-1))

    def release(self) -> None:
        self._optimizer._partition_all_parameters()

    def publish(self) -> None:
        persistent = self._optimizer.persistent_parameters  # they stay gathered between steps
        if persistent:
            persistent[0].all_gather(persistent)
        self._optimizer.invalidate_secondary_tensor()

    def _range(self, parameter: Any, master: torch.Tensor) -> _Range:
        size = master.numel()  # as much on every rank: the end is padded
        start = size * self._optimizer._get_param_partition_rank(parameter)
        length = max(0, min(size, parameter.ds_numel - start))
        copy = parameter.ds_tensor.detach().view(-1)
        return _Range(parameter, tuple(parameter.ds_shape), start, master[:length], copy[:length])


def _stage(optimizer: Any) -> _Stage0:
    """How an optimizer keeps its masters; told by attributes, since classes do not tell it."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _Stage3(optimizer)
    for names in (
        ("round_robin_bit16_groups", "single_partition_of_fp32_groups", "bit16_groups_flat"),
        ("bf16_groups", "fp32_groups_flat_partition", "bf16_groups_flat"),
        ("fp16_groups", "fp32_groups_flat", "fp16_groups_flat"),
    ):
        if hasattr(optimizer, names[1]):
            return _Flat(optimizer, *names)
    plain = optimizer is None or isinstance(optimizer, torch.optim.Optimizer)
    if plain or hasattr(optimizer, "fp32_groups"):
        return _Stage0(optimizer)
    raise ValueError(f"DeepSpeed's {type(optimizer).__name__} is not supported")


def _find_engine(model: nn.Module) -> Any:
    module: nn.Module | None = model
    while module is not None:
        if is_instance(module, "deepspeed.runtime.engine", "DeepSpeedEngine"):
            return module
        module = wrapped(module)
    return None


def _refuse_unsupported(engine: Any) -> None:
    for attribute, what in _UNSUPPORTED.items():
        for holder in (engine, engine.optimizer):
            value = getattr(holder, attribute, False)
            if value() if callable(value) else value:
                raise ValueError(f"DeepSpeed with {what} is not supported")
    if engine.mp_world_size > 1 or engine.autotp_size() > 1:
        raise ValueError("DeepSpeed with tensor parallelism is not supported")
