"""FSDP1 as rows of the table of worlds; see [Note: worlds] in tests/worlds.py."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
)

from tests.net import Block, Net
from tests.worlds import BF16, COMPILE_BACKEND, SCALAR, Engine, Training, World, bare, mesh

HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)


@dataclass(frozen=True, kw_only=True)
class Fsdp1(Engine):
    """Each block a unit, the rest the root's; the frozen layer a unit where it must be one."""

    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD
    use_orig_params: bool = True
    mixed_precision: bool = False
    root_only: bool = False
    nested: bool = False  # units inside the blocks, which leaves nothing else to some
    checkpoint_blocks: bool = False
    ignore_root: bool = False  # its own two parameters: the way out for a 0-d one

    def wrap(self, net: Net) -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*NO_SHARD")
            return self._wrap(net, self._options())

    def _wrap(self, net: Net, options: dict[str, Any]) -> nn.Module:
        if not self.use_orig_params:  # then a unit is all frozen or all trained
            net.frozen = FullyShardedDataParallel(net.frozen, **options)
        for i, block in enumerate([] if self.root_only else net.blocks):
            if self.nested:
                block.l1 = FullyShardedDataParallel(block.l1, **options)
            net.blocks[i] = FullyShardedDataParallel(block, **options)
        ignored = {"ignored_states": [net.tiny, net.scale]} if self.ignore_root else {}
        model = FullyShardedDataParallel(net, **options, **ignored)
        if self.checkpoint_blocks:
            apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Block))
        return torch.compile(model, backend=COMPILE_BACKEND) if self.compiled else model

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        # The shapes of shards tell nothing of the weights, so there is one group.
        trainable = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)

    def step(self, training: Training, loss: Tensor) -> None:
        loss.backward()
        if self.ignore_root:  # the gradient of an ignored parameter is left to the user
            for parameter in (training.net.tiny, training.net.scale):
                dist.all_reduce(parameter.grad)
        training.optimizer.step()
        training.optimizer.zero_grad()

    def full_weights(self, training: Training) -> dict[str, Tensor]:
        root = unwrapped(training.model)
        with FullyShardedDataParallel.summon_full_params(root, writeback=False):
            found = {bare(name): p.detach().clone() for name, p in root.named_parameters()}
        return {name: found[name] for name, _ in Net().named_parameters()}

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "device_id": torch.device("cpu"),
            "sharding_strategy": self.strategy,
            "use_orig_params": self.use_orig_params,
        }
        if self.strategy in HYBRID:
            options["device_mesh"] = mesh((2, dist.get_world_size() // 2), ("replicate", "shard"))
        if self.mixed_precision:
            options["mixed_precision"] = MixedPrecision(
                param_dtype=torch.bfloat16,
                reduce_dtype=torch.float32,
                buffer_dtype=torch.float32,
            )
        return options


def unwrapped(model: nn.Module) -> FullyShardedDataParallel:
    return getattr(model, "_orig_mod", model)


MIXED = {"mixed_precision": True, "compute_dtype": torch.bfloat16}
FLAT = {"use_orig_params": False}
SHARD_GRAD_OP = {"strategy": ShardingStrategy.SHARD_GRAD_OP}
NO_SHARD = {"strategy": ShardingStrategy.NO_SHARD}
HYBRID_SHARD = {"strategy": ShardingStrategy.HYBRID_SHARD}
HYBRID_ZERO2 = {"strategy": ShardingStrategy._HYBRID_SHARD_ZERO2}

WORLDS = [
    World(name="full", ranks=(2, 3), engine=Fsdp1()),
    World(name="full_flat", ranks=(2, 4), engine=Fsdp1(**FLAT)),
    World(name="full_mixed", ranks=(3,), engine=Fsdp1(**MIXED)),
    World(name="full_flat_mixed", ranks=(2,), engine=Fsdp1(**FLAT, **MIXED)),
    World(name="full_bf16", ranks=(2,), engine=Fsdp1(**BF16)),
    World(name="full_root_only", ranks=(4,), engine=Fsdp1(root_only=True)),
    World(name="full_nested", ranks=(2,), engine=Fsdp1(nested=True)),
    World(name="full_nested_flat", ranks=(3,), engine=Fsdp1(nested=True, **FLAT)),
    World(name="full_checkpointed", ranks=(2,), engine=Fsdp1(checkpoint_blocks=True)),
    World(name="full_compiled", ranks=(2,), engine=Fsdp1(compiled=True)),
    World(name="full_ignored", ranks=(2,), engine=Fsdp1(ignore_root=True), net=SCALAR),
    World(name="grad_op", ranks=(3,), engine=Fsdp1(**SHARD_GRAD_OP)),
    World(name="grad_op_flat_mixed", ranks=(2,), engine=Fsdp1(**SHARD_GRAD_OP, **FLAT, **MIXED)),
    World(name="no_shard", ranks=(2,), engine=Fsdp1(**NO_SHARD)),
    World(name="no_shard_flat_mixed", ranks=(3,), engine=Fsdp1(**NO_SHARD, **FLAT, **MIXED)),
    World(name="hybrid", ranks=(4,), engine=Fsdp1(**HYBRID_SHARD)),
    World(name="hybrid_flat_mixed", ranks=(4,), engine=Fsdp1(**HYBRID_SHARD, **FLAT, **MIXED)),
    World(name="hybrid_zero2_mixed", ranks=(4,), engine=Fsdp1(**HYBRID_ZERO2, **MIXED)),
]
