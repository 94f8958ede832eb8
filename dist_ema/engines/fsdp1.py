"""FSDP1: each unit keeps its weights end to end in one flat parameter, cut evenly over ranks.

[Note: the shard]
`parameters()` of an FSDP1 model returns shards of odd shapes, gathered weights, low-precision
copies or flat parameters, depending on the moment and on `use_orig_params`. The optimizer always
writes the local shard of the flat parameter, which is what this engine lists. The unit has a table
of the range of each original parameter that is in the shard, and of its place. Padding between them
is not listed.

A weight that is tied across two units without `use_orig_params` becomes two weights. FSDP1 leaves
no trace of the tie, so that no warning is possible.

Private names, checked in torch 2.8 to 2.15: `FullyShardedDataParallel._handle`, `._inter_node_pg`;
of the handle `flat_param`, `process_group`, `uses_sharded_strategy`; of `_flat_param.FlatParameter`
`_local_shard`, `_full_param_padded`, `_full_prec_full_param_padded`, `_params`, `_param_infos`,
`_shared_param_infos`, `_shard_param_infos`, `_shapes`, `_strides`, `_param_extensions`;
`_runtime_utils._reshard`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.core.engine import Cut, Engine, Registered, Weight, cut_range, pointer
from dist_ema.core.errors import require_names
from dist_ema.core.layout import dense_order
from dist_ema.core.names import Registration, is_instance, registrations
from dist_ema.engines.plain import outdate

_RUNTIME = "torch.distributed.fsdp._runtime_utils"
_FLAT_PARAM = "torch.distributed.fsdp._flat_param"
_HANDLE = "flat_param process_group uses_sharded_strategy"
_FLAT_PARAMETER = (
    "_params _param_infos _shared_param_infos _shard_param_infos _shapes _strides _param_extensions"
)
# Assigned at the first forward pass.
_ASSIGNED_LATER = "_local_shard _full_param_padded _full_prec_full_param_padded"


@dataclass(frozen=True, slots=True, eq=False)
class _Original:
    """A parameter of the user's module that is a part of a unit's flat parameter now."""

    handle: Any
    index: int  # in the lists of the flat parameter

    @property
    def tensor(self) -> torch.Tensor:
        """The parameter. The same object for all registrations of a tied parameter."""
        flat = self.handle.flat_param
        info = flat._param_infos[self.index]
        uses_orig_params = flat._params is not None
        tensor: torch.Tensor = (
            flat._params[self.index] if uses_orig_params else getattr(info.module, info.param_name)
        )
        return tensor

    def cut(self, registration: Registration) -> Cut:
        flat, index = self.handle.flat_param, self.index
        if flat._param_extensions[index] is not None:
            raise ValueError("FSDP1 over tensor parallelism is not supported; use fully_shard()")
        # Dense strided parameters (channels-last) are flattened in the order of their storage.
        shape = tuple(flat._shapes[index])
        order = dense_order(torch.empty_strided(shape, flat._strides[index], device="meta"))
        part, start, view = flat._shard_param_infos[index], 0, _shard(self.handle).detach()
        if part.in_shard:
            start = part.intra_param_start_idx
            view = view.narrow(0, part.offset_in_shard, part.numel_in_shard)
        else:
            view = view[:0]
        return cut_range(registration, shape=shape, start=start, view=view, order=order)


class Fsdp1Engine(Engine):
    """Ranges of flat parameters. Nothing here communicates."""

    takes_masters = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        units: list[Any] = [m for m in model.modules() if _is_fsdp1(m)]
        require_names(units[0], "_handle", "torch")
        require_names(sys.modules[_RUNTIME], "_reshard", "torch")
        require_names(sys.modules[_FLAT_PARAM].FlatParameter, _ASSIGNED_LATER, "torch")
        self._units = [unit for unit in units if unit._handle]
        self._handles = [unit._handle for unit in self._units]
        for handle in self._handles:
            require_names(handle, _HANDLE, "torch")
            require_names(handle.flat_param, _FLAT_PARAMETER, "torch")
        self._originals = {
            key: original for handle in self._handles for key, original in _originals(handle)
        }
        self._flat_parameters: dict[int, torch.Tensor] = {}  # by the id of `Weight.tensor`
        self._taken = {id(p) for handle in self._handles for p in handle.flat_param._params or ()}
        self._others = Registered(
            r for r in registrations(model) if not r.is_buffer and self._original(r) is None
        )

    @staticmethod
    def claims(model: nn.Module) -> bool:
        return any(_is_fsdp1(m) for m in model.modules())

    def stamp(self) -> list[int]:
        shards = [pointer(_shard(handle)) for handle in self._handles]
        return shards + self._others.addresses()

    def process_groups(self) -> list[dist.ProcessGroup]:
        groups = [handle.process_group for handle in self._handles]
        groups += [getattr(unit, "_inter_node_pg", None) for unit in self._units]
        return [group for group in dict.fromkeys(groups) if group is not None]

    def versioned(self, weight: Weight) -> Iterator[torch.Tensor]:
        yield from super().versioned(weight)
        if id(weight.tensor) in self._flat_parameters:  # the optimizer may write to it
            yield self._flat_parameters[id(weight.tensor)]

    def release(self) -> None:
        # A forward that does not reshard (SHARD_GRAD_OP, and the root under FULL_SHARD) leaves the
        # gathered weights allocated, and the next one would read them in place of the shards.
        from torch.distributed.fsdp._runtime_utils import _reshard

        for unit in self._units:
            gathered = list(_gathered(unit._handle))
            if gathered:
                _reshard(unit, unit._handle, True)
                # Where there are two precisions, FSDP frees one, by the mode of the module.
                for tensor in gathered:
                    tensor.untyped_storage().resize_(0)

    def publish(self) -> None:
        self.release()
        outdate(handle.flat_param for handle in self._handles)

    def _original(self, registration: Registration) -> _Original | None:
        return self._originals.get((id(registration.owner), registration.name))

    def _tensor(self, registration: Registration) -> torch.Tensor:
        original = self._original(registration)
        if original is None:
            return registration.tensor
        tensor = original.tensor
        self._flat_parameters[id(tensor)] = original.handle.flat_param
        return tensor

    def _cut(self, registration: Registration, tensor: torch.Tensor) -> Cut:
        original = self._original(registration)
        if original is not None:
            return original.cut(registration)
        if id(tensor) in self._taken:
            raise ValueError(
                "is tied to a weight that another FSDP unit has taken, and is a shard of it now; "
                "wrap both modules in one unit, or untie them"
            )
        return super()._cut(registration, tensor)


def _is_fsdp1(module: nn.Module) -> bool:
    library = "torch.distributed.fsdp.fully_sharded_data_parallel"
    return is_instance(module, library, "FullyShardedDataParallel")


def _originals(handle: Any) -> Iterator[tuple[tuple[int, str], _Original]]:
    """The parameters of a unit by (id of the module, name): tied ones have several."""
    flat = handle.flat_param
    originals = {}
    for index, info in enumerate(flat._param_infos):
        originals[id(info.module), info.param_name] = _Original(handle, index)
    yield from originals.items()
    for info in flat._shared_param_infos:
        first = originals[id(info.prim_module), info.prim_param_name]
        yield (id(info.module), info.param_name), first


def _shard(handle: Any) -> torch.Tensor:
    """This rank's part of the flat parameter; all of it where nothing is sharded."""
    # There is no shard before the first forward. Without sharding the flat parameter itself is
    # viewed, so that autograd notices a write between forward and backward.
    flat: torch.Tensor = handle.flat_param
    shard = getattr(flat, "_local_shard", None) if handle.uses_sharded_strategy else None
    return flat if shard is None else shard


def _gathered(handle: Any) -> Iterator[torch.Tensor]:
    """Gathered weights that are allocated now."""
    for name in ("_full_param_padded", "_full_prec_full_param_padded"):
        tensor: torch.Tensor | None = getattr(handle.flat_param, name, None)
        if tensor is not None and tensor.untyped_storage().size():
            yield tensor
