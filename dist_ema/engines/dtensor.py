"""Placements on a mesh: FSDP2, HSDP, tensor parallelism, expert parallelism, and their products.

[Note: the sharded parameter]
`parameters()` of an FSDP2 model returns shards before a forward, gathered tensors after one that
does not reshard, and shards of another mesh with an integer `reshard_after_forward`. The optimizer
always writes the sharded parameter that each `FSDPParam` keeps, which is what this engine lists.

Private names, checked in torch 2.8 to 2.15: `FSDPModule._get_fsdp_state`,
`FSDPState._fsdp_param_groups` (`_fsdp_param_group` before 2.12), `FSDPParamGroup.fsdp_params`,
`.wait_for_unshard`, `._to_sharded`, `FSDPParam._module_info`, `._orig_param_uid` (since 2.12;
without it a tie that was cut apart is not noticed), `.sharded_param` and `._unsharded_param`,
`DTensor._local_tensor`, `_StridedShard` and its `split_factor`.
"""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, placement_types

from dist_ema.core.engine import Cut, Engine, Registered, addresses, path_to_values, values_of
from dist_ema.core.errors import require_names
from dist_ema.core.layout import Box, Fragment, FragmentMeta, Shape, dense_order
from dist_ema.core.names import Registration, is_instance, registrations
from dist_ema.engines.plain import outdate

# Of the weights of float8 and BitNet training in torchao 0.18: where it is None, the all-gather of
# FSDP2 computes it.
PRECOMPUTED = frozenset({"_precomputed_scale"})
Run = tuple[int, int, int]  # start in the global dim, start in the local dim, length


class DTensorEngine(Engine):
    """Shards that DTensor places on a device mesh. Nothing here communicates."""

    precomputed_names = PRECOMPUTED

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        require_names(placement_types, "_StridedShard", "torch")
        require_names(DTensor, "_local_tensor", "torch")
        self._fsdp_modules: list[Any] = [m for m in model.modules() if _is_fsdp2(m)]
        self._managed: dict[tuple[int, str], Any] = {
            key: fsdp_param
            for module in self._fsdp_modules
            for group in _param_groups(module)
            for fsdp_param in group.fsdp_params
            for key in _keys(fsdp_param)
            if not _is_replaced(fsdp_param)
        }
        self._fsdp_params = list({id(p): p for p in self._managed.values()}.values())
        kinds: dict[str, list[Any]] = {}  # by the path to the values
        for fsdp_param in self._fsdp_params:
            path = path_to_values(fsdp_param.sharded_param, PRECOMPUTED)
            if path is not None:
                kinds.setdefault(path, []).append(fsdp_param)
        self._shards = [_Shards(path, params) for path, params in kinds.items()]
        self._warn_of_cut_ties()
        others = [
            r
            for r in registrations(model)
            if not r.is_buffer and (id(r.owner), r.name) not in self._managed
        ]
        self._distributed = [r for r in others if isinstance(r.tensor, DTensor)]
        self._others = Registered(others, PRECOMPUTED)

    @staticmethod
    def claims(model: nn.Module) -> bool:
        return any(_is_fsdp2(m) for m in model.modules()) or any(
            isinstance(r.tensor, DTensor) for r in registrations(model)
        )

    def stamp(self) -> list[int]:
        groups: list[Registered | _Shards] = [self._others, *self._shards]
        return [*itertools.chain.from_iterable(group.addresses() for group in groups)]

    def process_groups(self) -> list[dist.ProcessGroup]:
        tensors = [p.sharded_param for p in self._fsdp_params]
        tensors += [r.registry.get(r.name) for r in self._distributed]
        meshes = {id(t.device_mesh): t.device_mesh for t in tensors if isinstance(t, DTensor)}
        return [
            mesh.get_group(axis)
            for mesh in meshes.values()
            if mesh.get_coordinate() is not None
            for axis in range(mesh.ndim)
        ]

    def release(self) -> None:
        super().release()
        self._reshard()

    def _reshard(self) -> None:
        # The next forward would read weights that are gathered already (on the root at least, which
        # does not reshard after forward by default). `module.reshard()` is not enough: it keeps an
        # all-gather that was not waited for, and does nothing after an exception in a forward.
        for module in self._fsdp_modules:
            for group in _param_groups(module):
                group.wait_for_unshard()
                group._to_sharded()

    def publish(self) -> None:
        self._reshard()
        gathered = (getattr(p, "_unsharded_param", None) for p in self._fsdp_params)
        outdate([t for t in gathered if t is not None] + [w for _, w in self.wrappers()])

    def _warn_of_cut_ties(self) -> None:
        """Warn of weights that were tied across `fully_shard` units and are several weights now."""
        names: dict[int, dict[int, str]] = {}  # by the identity that a weight had, then that of now
        for registration in registrations(self._model):
            fsdp_param = self._managed.get((id(registration.owner), registration.name))
            if fsdp_param is not None:
                uid = getattr(fsdp_param, "_orig_param_uid", id(fsdp_param))  # since torch 2.12
                names.setdefault(uid, {}).setdefault(id(fsdp_param), registration.fqn)
        ties = [" and ".join(tie.values()) for tie in names.values() if len(tie) > 1]
        if ties:
            warnings.warn(
                "fully_shard cut tied weights apart, and they train and are averaged as different "
                f"weights now: {'; '.join(ties)}; shard the modules that share a weight in one "
                "call",
                stacklevel=6,
            )

    def _tensor(self, registration: Registration) -> torch.Tensor:
        fsdp_param = self._managed.get((id(registration.owner), registration.name))
        if fsdp_param is None:
            return registration.tensor
        sharded: torch.Tensor = fsdp_param.sharded_param
        return sharded

    def cut(self, fqn: str, tensor: torch.Tensor) -> Cut:
        if not isinstance(tensor, DTensor):
            return super().cut(fqn, tensor)
        shape, local = tuple(tensor.shape), values_of(tensor, PRECOMPUTED).detach()
        indices = _global_indices(tensor)
        if indices is None or local.numel() == 0:
            return shape, ()
        sizes = tuple(len(index) for index in indices)
        if sizes != tuple(local.shape):
            raise ValueError(f"placements {tensor.placements} give {sizes}, holds {local.shape}")
        runs = [_runs(index) for index in indices]
        if any(len(r) > 1 for r in runs):
            return shape, tuple(_split(fqn, shape, local, runs))
        order = dense_order(local)
        flat = (local if order is None else local.permute(order)).view(-1)
        box = Box(tuple(r[0][0] for r in runs), tuple(local.shape))
        return shape, (Fragment(FragmentMeta(fqn, shape, box, order), flat),)


class _Shards:
    """Sharded parameters of FSDP2, and their addresses with no Python code for each.

    An `FSDPParam` takes its sharded parameter from the module. So while the module has the one that
    was sharded when this was built, the `FSDPParam` has it too, and is not read: it has many
    attributes, which are rarely in a core's caches.
    """

    def __init__(self, path: str, fsdp_params: Sequence[Any]) -> None:
        self._path, self._fsdp_params = path, fsdp_params
        infos = [p._module_info for p in fsdp_params]
        self._registries = [info.module._parameters for info in infos]
        self._names = [info.param_name for info in infos]
        self._sharded = [p.sharded_param for p in fsdp_params]

    def addresses(self) -> list[int]:
        """The data pointers of the sharded parameters as they are now."""
        tensors = [*map(dict.get, self._registries, self._names)]
        if not all(map(operator.is_, tensors, self._sharded)):  # gathered, or replaced
            tensors = [p.sharded_param for p in self._fsdp_params]
        return addresses(tensors, self._path)


def _is_fsdp2(module: nn.Module) -> bool:
    return is_instance(module, "torch.distributed.fsdp._fully_shard._fully_shard", "FSDPModule")


def _param_groups(fsdp_module: Any) -> list[Any]:
    """The groups of parameters that one `fully_shard` call made; before torch 2.12, one or none."""
    require_names(fsdp_module, "_get_fsdp_state", "torch")
    state = fsdp_module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        groups = list(state._fsdp_param_groups)
    else:
        require_names(state, "_fsdp_param_group", "torch")
        groups = [group for group in (state._fsdp_param_group,) if group is not None]
    for group in groups:
        require_names(group, "fsdp_params wait_for_unshard _to_sharded", "torch")
        for fsdp_param in group.fsdp_params[:1]:
            require_names(fsdp_param, "_module_info sharded_param", "torch")
            require_names(type(fsdp_param), "_unsharded_param", "torch")  # assigned later
    return groups


def _is_replaced(fsdp_param: Any) -> bool:
    """Whether a shard on the meta device was replaced by a loaded one.

    transformers registers the loaded one. FSDP2 uses it from the first forward pass on.
    """
    info = fsdp_param._module_info
    registered = info.module._parameters.get(info.param_name)
    return fsdp_param.sharded_param.is_meta and not getattr(registered, "is_meta", True)


def _keys(fsdp_param: Any) -> Iterator[tuple[int, str]]:
    """(id of the module, name) of each registration of this parameter: tied ones have several."""
    info = fsdp_param._module_info
    yield id(info.module), info.param_name
    for module, name in zip(info.shared_modules, info.shared_param_names, strict=True):
        yield id(module), name


def _global_indices(tensor: DTensor) -> list[Sequence[int]] | None:
    """For each dim, the global indices of this rank's part; None off the mesh.

    Placements are applied from the first mesh axis to the last, but for `_StridedShard`: FSDP over
    tensor parallelism cuts what the later axes have cut already.
    """
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:
        return None
    indices: list[Sequence[int]] = [range(size) for size in tensor.shape]
    for dim in range(len(indices)):
        for axis, num_parts in _order_of_cuts(tensor, dim):
            # torch cuts by the rank in the group. The coordinate differs where ranks of the mesh
            # are not in ascending order.
            num_chunks, position = mesh.size(axis), mesh.get_local_rank(axis)
            parts = (_chunk(indices[dim], num_parts, part) for part in range(num_parts))
            cut = [_chunk(part, num_chunks, position) for part in parts]
            indices[dim] = cut[0] if num_parts == 1 else list(itertools.chain.from_iterable(cut))
    return indices


def _order_of_cuts(tensor: DTensor, dim: int) -> list[tuple[int, int]]:
    """The mesh axes that shard a dim, in order, each with the number of parts that it divides.

    A part is a chunk of the dim; an axis with one part divides what the axes before it have left.
    """
    cuts: list[tuple[int, int]] = []
    placement: Any
    for axis, placement in reversed(list(enumerate(tensor.placements))):
        if isinstance(placement, Replicate):
            continue
        # _StridedShard is a subclass of Shard until torch 2.9 only.
        is_strided = isinstance(placement, placement_types._StridedShard)
        if not (is_strided or isinstance(placement, Shard)):
            raise ValueError(f"placement {placement} holds partial values, not a part of a weight")
        if placement.dim != dim:
            continue
        num_parts = int(placement.split_factor) if is_strided else 1
        if num_parts == math.prod(tensor.device_mesh.size(other) for other, _ in cuts):
            cuts.append((axis, 1))  # cuts the parts that the axes in `cuts` have made
        else:
            cuts.insert(0, (axis, num_parts))
    return cuts


def _chunk(index: Sequence[int], num_chunks: int, position: int) -> Sequence[int]:
    """One part of a dim, cut as `torch.chunk` does, by which both placements are defined."""
    size = -(-len(index) // num_chunks)
    return index[size * position : size * (position + 1)]


def _runs(index: Sequence[int]) -> list[Run]:
    """Split a list of global indices into runs without gaps."""
    if isinstance(index, range):
        return [(index.start, 0, len(index))]
    starts = [i for i in range(len(index)) if i == 0 or index[i] != index[i - 1] + 1]
    stops = [*starts[1:], len(index)]
    return [(index[a], a, b - a) for a, b in zip(starts, stops, strict=True)]


def _split(
    fqn: str, shape: Shape, local: torch.Tensor, runs: list[list[Run]]
) -> Iterator[Fragment]:
    """Boxes, each contiguous in the local tensor, of a part with gaps in some dim.

    Dims before the last one with gaps are split index by index, so that each box is contiguous.
    """
    if not local.is_contiguous():
        raise ValueError(f"local shard with gaps and strides {local.stride()} is not contiguous")
    last = max(dim for dim, r in enumerate(runs) if len(r) > 1)
    per_dim = [
        [(g + i, at + i, 1) for g, at, n in r for i in range(n)] if dim < last else r
        for dim, r in enumerate(runs)
    ]
    flat = local.view(-1)
    for combination in itertools.product(*per_dim):
        box = Box(tuple(c[0] for c in combination), tuple(c[2] for c in combination))
        start = sum(c[1] * stride for c, stride in zip(combination, local.stride(), strict=True))
        view = flat[start : start + box.numel]
        yield Fragment(FragmentMeta(fqn, shape, box), view)
