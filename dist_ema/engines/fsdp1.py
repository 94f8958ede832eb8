"""FSDP1: each unit keeps its weights end to end in one flat parameter, cut evenly over ranks.

[Note: the shard]
What `parameters()` gives depends on the moment and on `use_orig_params`: shards of odd shapes,
gathered weights, low-precision ones, or nothing but the flat parameter. The optimizer writes one
thing only, the local shard of the flat parameter, and that is what is listed here. Of each original
parameter the unit knows which range of it lies where in the shard. Between them lies padding, which
is part of no weight.

Private names, checked in torch 2.8 to 2.15: `FullyShardedDataParallel._handle`, `._inter_node_pg`;
of the handle `flat_param`, `process_group`, `uses_sharded_strategy`; of the flat parameter
`_local_shard`, `_full_param_padded`, `_full_prec_full_param_padded`, `_params`, `_param_infos`,
`_shared_param_infos`, `_shard_param_infos`, `_shapes`, `_strides`, `_param_extensions`;
`_runtime_utils._reshard`.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
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
from dist_ema.core.layout import Shape, dense_order
from dist_ema.core.names import Registration, is_instance, registrations
from dist_ema.core.requirements import require_names
from dist_ema.engines.caches import drop_caches

_RUNTIME = "torch.distributed.fsdp._runtime_utils"
_OF_FLAT_PARAMETERS = (
    "_params _param_infos _shared_param_infos _shard_param_infos _shapes _strides _param_extensions"
)
_RARE = 4  # weights of one shape, at most, that may be one weight cut apart


@dataclass(frozen=True, slots=True, eq=False)
class _Original:
    """A parameter as the user's module had it, now part of a unit's flat parameter."""

    handle: Any
    index: int  # in the lists of the flat parameter

    @property
    def shape(self) -> Shape:
        return tuple(self.handle.flat_param._shapes[self.index])

    @property
    def tensor(self) -> torch.Tensor:
        """One object for all places of a tied parameter, with the `requires_grad` it trains by."""
        flat = self.handle.flat_param
        if flat._params is not None:
            parameter: torch.Tensor = flat._params[self.index]
            return parameter
        info = flat._param_infos[self.index]
        view: torch.Tensor = getattr(info.module, info.param_name)
        return view

    def cut(self, registration: Registration) -> Cut:
        flat, index = self.handle.flat_param, self.index
        if flat._param_extensions[index] is not None:
            raise ValueError("FSDP1 over tensor parallelism is not supported; use fully_shard()")
        # Strided but dense parameters (channels-last) are laid down in the order of their storage.
        order = dense_order(torch.empty_strided(self.shape, flat._strides[index], device="meta"))
        start, view = self.held()
        return cut_range(registration, shape=self.shape, start=start, view=view, order=order)

    def held(self) -> tuple[int, torch.Tensor]:
        """Where this rank's range of the parameter starts, in storage order, and its values."""
        part = self.handle.flat_param._shard_param_infos[self.index]
        shard = _shard(self.handle).detach()
        if not part.in_shard:
            return 0, shard[:0]
        return part.intra_param_start_idx, shard.narrow(
            0, part.offset_in_shard, part.numel_in_shard
        )


class Fsdp1Engine(Engine):
    """Ranges of flat parameters. Nothing here communicates."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._units: list[Any] = [m for m in model.modules() if _is_fsdp1(m) and m._handle]
        self._handles = [unit._handle for unit in self._units]
        require_names(sys.modules[_RUNTIME], "_reshard", "torch")
        for handle in self._handles:
            require_names(handle, "flat_param process_group uses_sharded_strategy", "torch")
            require_names(handle.flat_param, _OF_FLAT_PARAMETERS, "torch")
        self._originals = {
            (id(module), name): original
            for handle in self._handles
            for module, name, original in _originals(handle)
        }
        self._flat_parameters: dict[int, torch.Tensor] = {}  # by ids of `Weight.tensor`
        self._taken = {id(p) for handle in self._handles for p in handle.flat_param._params or ()}
        self._others = Registered(
            (registration.registry, registration.name)
            for registration in registrations(model)
            if not registration.is_buffer
            and (id(registration.owner), registration.name) not in self._originals
        )
        self._warn_of_cut_ties()

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
            handle = unit._handle
            gathered = list(_gathered(handle))
            if gathered:
                _reshard(unit, handle, True)
                # FSDP frees the one of two precisions that the mode of the module asks for now.
                for tensor in gathered:
                    tensor.untyped_storage().resize_(0)

    def publish(self) -> None:
        self.release()
        outdate_graphs(handle.flat_param for handle in self._handles)
        drop_caches()

    def _warn_of_cut_ties(self) -> None:
        """A weight tied across two units is two weights from then on.

        No trace of the tie is left but equal values, looked for among weights of a rare shape.
        """
        alike: dict[Shape, dict[_Original, str]] = {}
        for registration in registrations(self._model):
            original = self._original(registration)
            if original is not None and original.tensor.requires_grad:
                alike.setdefault(original.shape, {}).setdefault(original, registration.fqn)
        for fqns in alike.values():
            if len(fqns) > _RARE:
                continue
            for a, b in itertools.combinations(fqns, 2):
                if a.handle is not b.handle and _same_values(a, b):
                    warnings.warn(
                        f"{fqns[a]} and {fqns[b]} hold the same values in two FSDP units; if they "
                        "were tied, they train and are averaged as different weights now: wrap the "
                        "modules that share a weight in one unit",
                        stacklevel=6,
                    )

    def _original(self, registration: Registration) -> _Original | None:
        return (
            None
            if registration.is_buffer
            else self._originals.get((id(registration.owner), registration.name))
        )

    def _locate(self, registration: Registration) -> torch.Tensor:
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
        return cut_whole(registration, tensor)


def _is_fsdp1(module: nn.Module) -> bool:
    library = "torch.distributed.fsdp.fully_sharded_data_parallel"
    return is_instance(module, library, "FullyShardedDataParallel")


def _originals(handle: Any) -> Iterator[tuple[nn.Module, str, _Original]]:
    """Every (module, name) that registered a parameter of this unit: tied ones have several."""
    flat = handle.flat_param
    originals = {}
    for index, info in enumerate(flat._param_infos):
        originals[id(info.module), info.param_name] = original = _Original(handle, index)
        yield info.module, info.param_name, original
    for info in flat._shared_param_infos:
        first = originals[id(info.prim_module), info.prim_param_name]
        yield info.module, info.param_name, first


def _same_values(a: _Original, b: _Original) -> bool:
    """Whether this rank sees that two weights of one shape are equal, and no constants."""
    (first_a, values_a), (first_b, values_b) = a.held(), b.held()
    first = max(first_a, first_b)
    part_a, part_b = values_a[first - first_a :], values_b[first - first_b :]
    common = min(part_a.numel(), part_b.numel())
    if not common or not torch.equal(part_a[:common], part_b[:common]):
        return False
    return bool((part_a[:common] != part_a[0]).any())


def _shard(handle: Any) -> torch.Tensor:
    """This rank's part of the flat parameter; all of it where nothing is sharded."""
    flat: Any = handle.flat_param
    # There is no shard before the first forward. Without sharding the flat parameter itself is
    # viewed, so that autograd notices a write between forward and backward.
    shard: torch.Tensor | None = getattr(flat, "_local_shard", None)
    if shard is None or not handle.uses_sharded_strategy:
        whole_flat: torch.Tensor = flat
        return whole_flat
    return shard


def _gathered(handle: Any) -> Iterator[torch.Tensor]:
    """Gathered weights that are allocated now."""
    for name in ("_full_param_padded", "_full_prec_full_param_padded"):
        tensor: torch.Tensor | None = getattr(handle.flat_param, name, None)
        if tensor is not None and tensor.untyped_storage().size():
            yield tensor
