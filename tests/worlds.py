"""The engines, meshes and models that the grid tests run over, as one table of named rows.

[Note: worlds]
A `World` says how a `Net` is wrapped and on how many ranks that makes sense. Its `Engine` is a
recipe: wrap the net, step the optimizer, and read the full weights back through the engine's own
interface. Nothing here shares code with `dist_ema`, so that a reading of the weights made here can
judge one made there. `World.train` puts the recipe to work and returns a `Training`.

To add an engine: subclass `Engine` in a file of its own, and add its rows to tests/grid.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.net import ALIASES, Block, Net, batch_of_tokens, loss_of
from tests.pool import NO_GROUP

# "eager" runs the operators that dynamo traced as they are: the wrappers and guards of a compiled
# module without the minutes of a code generator.
COMPILE_BACKEND = "eager"
WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.")


# The simplest way to wrap any module.
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda module: module,
    "ddp": DistributedDataParallel,
    "fsdp1": lambda module: FullyShardedDataParallel(
        module, device_id=torch.device("cpu"), use_orig_params=True
    ),
    "fsdp2": lambda module: fully_shard(module, mesh=mesh((dist.get_world_size(),), ("shard",))),
}


@functools.cache
def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Cached as long as the worker lives: the threads and sockets of a group are never freed."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How one engine wraps, trains and reads a model."""

    weights_dtype: torch.dtype = torch.float32  # of the weights that the optimizer writes
    compute_dtype: torch.dtype | None = None  # of the forward pass; None: the weights'
    model_parallel: int = 1  # neighbouring ranks that see the same data
    compiled: bool = False

    @property
    def uses_dynamo(self) -> bool:
        return self.compiled

    def wrap(self, net: Net) -> nn.Module:
        raise NotImplementedError

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
        ]
        # foreach mixes tensors of several meshes in one call, which DTensor refuses.
        return torch.optim.AdamW(groups, lr=1e-2, foreach=self.model_parallel == 1)

    def step(self, training: Training, loss: Tensor) -> None:
        loss.backward()
        training.optimizer.step()
        training.optimizer.zero_grad()

    def settle(self, training: Training) -> None:
        """Make `training.net.parameters()` what the optimizer writes."""

    def full_weights(self, training: Training) -> dict[str, Tensor]:
        """Every parameter of a settled model, whole, under its name in the bare `Net`."""
        raise NotImplementedError

    def shown_weights(self, training: Training) -> dict[str, Tensor]:
        """The same of what the forward pass computes with, which may be a cast of a master."""
        return self.full_weights(training)

    def data_rank(self) -> int:
        return dist.get_rank() // self.model_parallel if dist.is_initialized() else 0


@dataclass(frozen=True, kw_only=True)
class Plain(Engine):
    """One process, or copies that are kept equal by hand."""

    def wrap(self, net: Net) -> nn.Module:
        return torch.compile(net, backend=COMPILE_BACKEND) if self.compiled else net

    def full_weights(self, training: Training) -> dict[str, Tensor]:
        return {bare(name): p.detach().clone() for name, p in training.net.named_parameters()}


@dataclass(frozen=True, kw_only=True)
class Ddp(Plain):
    compile_inside: bool = False
    compile_blocks: bool = False

    @property
    def uses_dynamo(self) -> bool:
        return self.compiled or self.compile_inside or self.compile_blocks

    def wrap(self, net: Net) -> nn.Module:
        if self.compile_blocks:
            for i, block in enumerate(net.blocks):
                net.blocks[i] = torch.compile(block, backend=COMPILE_BACKEND)
        inner = torch.compile(net, backend=COMPILE_BACKEND) if self.compile_inside else net
        model = DistributedDataParallel(inner)
        return torch.compile(model, backend=COMPILE_BACKEND) if self.compiled else model


@dataclass(frozen=True, kw_only=True)
class TensorParallel(Engine):
    """TP alone: the linear layers of the blocks are cut, all other weights are plain copies."""

    model_parallel: int = 2

    def wrap(self, net: Net) -> nn.Module:
        return parallelize_blocks(net, mesh((self.model_parallel,), ("tp",)))

    def full_weights(self, training: Training) -> dict[str, Tensor]:
        return {
            bare(name): (whole(p) if isinstance(p, DTensor) else p).detach().clone()
            for name, p in training.net.named_parameters()
        }


def whole(tensor: DTensor) -> Tensor:
    """As full_tensor(), which in torch 2.8 joins uneven parts of tensor parallelism out of order.

    FSDP, the first dimensions of the mesh, cut last: its parts are joined first.
    """
    if all(type(placement) in (Shard, Replicate) for placement in tensor.placements):
        return tensor.full_tensor()
    joined, groups = tensor.to_local().detach(), tensor.device_mesh.get_all_groups()
    for group, placement in zip(groups, tensor.placements, strict=True):
        if not placement.is_replicate():
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, joined, group=group)
            joined = torch.cat(parts, placement.dim)
    return joined


@dataclass(frozen=True, kw_only=True)
class Fsdp2(TensorParallel):
    """fully_shard in its modes, on a 1-D mesh, a replicate x shard mesh or a dp x tp mesh."""

    model_parallel: int = 1
    replicas: int = 1  # HSDP where > 1
    reshard_after_forward: bool | int | None = None  # None: the argument is left out
    mixed_precision: bool = False
    shard_columns: bool = False
    checkpoint_blocks: bool = False
    offload: bool = False
    root_only: bool = False
    ignore_scalar: bool = False

    def wrap(self, net: Net) -> nn.Module:
        if self.model_parallel > 1:
            parallelize_blocks(net, self._mesh2d()["tp"])
        if self.checkpoint_blocks:
            apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, Block))
        options = self._options(net)
        for block in [] if self.root_only else net.blocks:
            fully_shard(block, **options)
        fully_shard(net, **options)
        return torch.compile(net, backend=COMPILE_BACKEND) if self.compiled else net

    def step(self, training: Training, loss: Tensor) -> None:
        loss.backward()
        if self.ignore_scalar:  # fully_shard leaves an ignored parameter's gradient to the user
            dist.all_reduce(training.net.scale.grad, op=dist.ReduceOp.AVG)
        training.optimizer.step()
        training.optimizer.zero_grad()

    def settle(self, training: Training) -> None:
        # What parameters() gives depends on what happens to be gathered at the moment.
        for module in training.net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _mesh2d(self) -> DeviceMesh:
        num_shards = dist.get_world_size() // self.model_parallel
        return mesh((num_shards, self.model_parallel), ("dp", "tp"))

    def _mesh(self) -> DeviceMesh:
        num_ranks = dist.get_world_size()
        if self.model_parallel > 1:
            return self._mesh2d()["dp"]
        if self.replicas > 1:
            return mesh((self.replicas, num_ranks // self.replicas), ("replicate", "shard"))
        return mesh((num_ranks,), ("shard",))

    def _options(self, net: Net) -> dict[str, Any]:
        options: dict[str, Any] = {"mesh": self._mesh()}
        if self.reshard_after_forward is not None:
            options["reshard_after_forward"] = self.reshard_after_forward
        if self.mixed_precision:
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        if self.shard_columns:  # where they divide: fully_shard has no uneven column shards
            options["shard_placement_fn"] = lambda p: (
                Shard(1) if p.dim() == 2 and p.shape[1] % dist.get_world_size() == 0 else None
            )
        if self.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        if self.ignore_scalar:
            options["ignored_params"] = {net.scale}
        return options


@dataclass(frozen=True, kw_only=True)
class ExpertParallel(Fsdp2):
    """Experts on a mesh of their own, where FSDP cuts them again; all else over all ranks."""

    model_parallel: int = 2

    def wrap(self, net: Net) -> nn.Module:
        shape = (dist.get_world_size() // self.model_parallel, self.model_parallel)
        experts = mesh(shape, ("efsdp", "ep"))
        options: dict[str, Any] = {"mesh": experts["efsdp"]}
        if self.shard_columns:
            options["shard_placement_fn"] = lambda p: Shard(1) if p.shape[1] % 2 == 0 else None
        for block in net.blocks:
            block.mesh, banks = experts["ep"], [block.l1, block.l2]
            for bank in banks:
                for name, p in bank.named_parameters():
                    cut = distribute_tensor(p.detach(), block.mesh, [Shard(0)])
                    setattr(bank, name, nn.Parameter(cut))
            fully_shard(banks, **options)
            fully_shard(block, mesh=self._mesh())
        return fully_shard(net, mesh=self._mesh())

    def _mesh(self) -> DeviceMesh:
        return mesh((dist.get_world_size(),), ("shard",))


def evaluate(model: nn.Module, seed: int = 7) -> Tensor:
    """The logits of any form of the net in eval mode."""
    model.eval()
    with torch.no_grad():
        logits = model(batch_of_tokens(seed))
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def parallelize_blocks(net: Net, tp_mesh: DeviceMesh) -> Net:
    for block in net.blocks:
        parallelize_module(block, tp_mesh, {"l1": ColwiseParallel(), "l2": RowwiseParallel()})
    return net


def bare(name: str) -> str:
    """The name without what compiling and checkpointing put in."""
    for wrapper in WRAPPER_NAMES:
        name = name.replace(wrapper, "")
    return name


class Training:
    """A `Net` in training under one engine, as a user would hold it."""

    def __init__(self, engine: Engine, net: Net) -> None:
        self.engine = engine
        self.net = net
        self.model = engine.wrap(net)
        self.optimizer = engine.make_optimizer(self.model)

    def train_step(self, i: int) -> None:
        """One optimizer step on this rank's batch number `i`."""
        self.engine.step(self, self.loss(i))

    def loss(self, i: int) -> Tensor:
        self.model.train()
        return loss_of(self.model(batch_of_tokens(100 + 10 * i + self.engine.data_rank())))

    def evaluate(self, seed: int = 7) -> Tensor:
        """The logits in eval mode for a batch that is the same on every rank."""
        logits = evaluate(self.model, seed)
        self.model.train()
        return logits

    def full_weights(self) -> dict[str, Tensor]:
        """Copies of all parameters, whole, under their names in the bare `Net`. Collective."""
        self.engine.settle(self)
        return self.engine.full_weights(self)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer writes, which may be shards, by name in the bare `Net`."""
        self.engine.settle(self)
        return {bare(name): parameter for name, parameter in self.net.named_parameters()}


@dataclass(frozen=True, kw_only=True)
class World:
    """One row of the grid."""

    name: str
    ranks: tuple[int, ...]
    engine: Engine
    net: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.engine.compute_dtype or self.engine.weights_dtype

    @property
    def forward_tolerance(self) -> dict[str, float]:
        """How far its forward pass may be from a plain module's: TP sums in another order."""
        if self.engine.model_parallel == 1:
            return {"rtol": 0, "atol": 0}
        return {"rtol": 0, "atol": 0.2 if self.compute_dtype == torch.bfloat16 else 1e-5}

    def make_net(self, *, seed: int = 0, **options: Any) -> Net:
        torch.manual_seed(seed)
        return Net(**{**self.net, **options}).to(self.engine.weights_dtype)

    def train(self, net: Net | None = None, *, seed: int = 0, **options: Any) -> Training:
        return Training(self.engine, self.make_net(seed=seed, **options) if net is None else net)

    def plain_twin(self, state: Mapping[str, Tensor]) -> Net:
        """The bare `Net` with these weights, computing in the dtype that the world computes in."""
        twin = Net(**self.net)
        twin.load_state_dict(state)
        for parameter in twin.parameters():
            parameter.data = parameter.data.to(self.compute_dtype)
        return twin.eval()

    def parallel_twin(self, state: Mapping[str, Tensor]) -> Training:
        """A second model of this world that had these weights before it was wrapped."""
        net = self.make_net(seed=1)
        net.load_state_dict(state)
        return self.train(net)


def state_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full weights as a state dict: with the tied names, without buffers."""
    return {**weights, **{alias: weights[name] for alias, name in ALIASES.items()}}


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


BF16 = {"weights_dtype": torch.bfloat16}
MIXED = {"mixed_precision": True, "compute_dtype": torch.bfloat16}
SCALAR = {"scalar_dims": 0}
EVEN = {"hidden": 12}
TP_NET = {"hidden": 10}  # 5 rows a rank, which fully_shard then cuts in 3 and 2

WORLDS = [
    World(name="plain", ranks=(NO_GROUP,), engine=Plain(), net=SCALAR),
    World(name="plain_bf16", ranks=(NO_GROUP,), engine=Plain(**BF16), net=SCALAR),
    World(name="plain_compiled", ranks=(NO_GROUP,), engine=Plain(compiled=True), net=SCALAR),
    World(name="ddp", ranks=(1, 2, 3, 4), engine=Ddp(), net=SCALAR),
    World(name="ddp_bf16", ranks=(2,), engine=Ddp(**BF16), net=SCALAR),
    World(name="ddp_compiled", ranks=(2,), engine=Ddp(compiled=True), net=SCALAR),
    World(name="ddp_of_compiled", ranks=(2,), engine=Ddp(compile_inside=True), net=SCALAR),
    World(name="ddp_compiled_blocks", ranks=(2,), engine=Ddp(compile_blocks=True), net=SCALAR),
    World(name="fsdp2", ranks=(1, 2, 3, 4), engine=Fsdp2()),
    World(name="fsdp2_reshard", ranks=(2,), engine=Fsdp2(reshard_after_forward=True)),
    World(name="fsdp2_no_reshard", ranks=(2,), engine=Fsdp2(reshard_after_forward=False)),
    World(name="fsdp2_reshard_to_2", ranks=(4,), engine=Fsdp2(reshard_after_forward=2)),
    World(name="fsdp2_root_only", ranks=(3,), engine=Fsdp2(root_only=True)),
    World(name="fsdp2_mixed", ranks=(2,), engine=Fsdp2(**MIXED)),
    World(name="fsdp2_bf16", ranks=(3,), engine=Fsdp2(**BF16)),
    World(name="fsdp2_columns", ranks=(2, 4), engine=Fsdp2(shard_columns=True), net=EVEN),
    World(name="fsdp2_checkpointed", ranks=(2,), engine=Fsdp2(checkpoint_blocks=True)),
    World(name="fsdp2_compiled", ranks=(2,), engine=Fsdp2(compiled=True)),
    World(name="fsdp2_offload", ranks=(2,), engine=Fsdp2(offload=True)),
    World(name="fsdp2_ignored", ranks=(2,), engine=Fsdp2(ignore_scalar=True), net=SCALAR),
    World(name="hsdp", ranks=(4,), engine=Fsdp2(replicas=2)),
    World(
        name="hsdp_mixed_no_reshard",
        ranks=(4,),
        engine=Fsdp2(replicas=2, reshard_after_forward=False, **MIXED),
    ),
    World(name="fsdp2_tp", ranks=(4,), engine=Fsdp2(model_parallel=2), net=TP_NET),
    World(
        name="fsdp2_tp_mixed_no_reshard",
        ranks=(4,),
        engine=Fsdp2(model_parallel=2, reshard_after_forward=False, **MIXED),
        net=TP_NET,
    ),
    World(name="fsdp2_ep", ranks=(2, 4), engine=ExpertParallel(), net={"num_experts": 3}),
    World(
        name="fsdp2_ep_columns",
        ranks=(4,),
        engine=ExpertParallel(shard_columns=True),
        net={"num_experts": 5, **EVEN},
    ),
    World(name="tp", ranks=(2,), engine=TensorParallel(), net=TP_NET),
]


def not_compiled(world: World) -> bool:
    """For a choice of rows, where tracing takes a second or two and can hardly matter."""
    return not world.engine.uses_dynamo


def worlds(*names: str) -> pytest.MarkDecorator:
    """Run the body on these rows only, on all their ranks; "fsdp2-3" stands for one number."""
    known = {world.name for world in WORLDS} | {f"{w.name}-{n}" for w in WORLDS for n in w.ranks}
    if unknown := set(names) - known:
        raise ValueError(f"no such world: {sorted(unknown)}")
    return parametrized(
        WORLDS, lambda world, num_ranks: bool({world.name, f"{world.name}-{num_ranks}"} & {*names})
    )


def parametrized(
    table: Iterable[World], chosen: Callable[[World, int], bool] = lambda world, num_ranks: True
) -> pytest.MarkDecorator:
    """Run the body on rows of a table, on their numbers of ranks."""
    rows = [
        pytest.param(world, num_ranks, id=f"{world.name}-{num_ranks or 'alone'}")
        for world in table
        for num_ranks in world.ranks
        if chosen(world, num_ranks)
    ]
    return pytest.mark.parametrize(("world", "num_ranks"), rows)
