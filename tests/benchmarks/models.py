"""Models that are nothing but weights, and the engines that hold them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ShardedEMA
from tests.benchmarks.launch import Here

ENGINES = ("plain", "ddp", "fsdp1", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """So many tensors of these shapes in turn, in units of so many, and their dtype."""

    name: str
    count: int
    shapes: tuple[tuple[int, ...], ...]
    per_unit: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def every(self) -> list[tuple[int, ...]]:
        return [self.shapes[i % len(self.shapes)] for i in range(self.count)]

    @property
    def numels(self) -> list[int]:
        return [math.prod(shape) for shape in self.every]

    @property
    def numel(self) -> int:
        return sum(self.numels)


class Unit(nn.Module):
    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        for number, shape in enumerate(shapes):
            value = torch.empty(shape, dtype=dtype, device=device).normal_()
            self.register_parameter(f"weight{number}", nn.Parameter(value))


class Model(nn.Module):
    """Units of weights; it is never run."""

    def __init__(self, shapes: Shapes, device: Any = None) -> None:
        super().__init__()
        every, step = shapes.every, shapes.per_unit
        units = (every[start : start + step] for start in range(0, len(every), step))
        self.units = nn.ModuleList(Unit(unit, shapes.dtype, device) for unit in units)


def wrap(engine: str, shapes: Shapes, here: Here) -> nn.Module:
    """A model as an engine holds it before training. Collective, but for "plain"."""
    model = Model(shapes, here.device)
    on_cuda = here.device.type == "cuda"
    if engine == "plain":
        return model
    if engine == "ddp":
        return DistributedDataParallel(model, device_ids=[here.device] if on_cuda else None)
    if engine == "fsdp1":
        options: dict[str, Any] = {"use_orig_params": True, "device_id": here.device}
        for number, unit in enumerate(model.units):
            model.units[number] = FullyShardedDataParallel(unit, **options)
        return FullyShardedDataParallel(model, **options)
    if engine == "fsdp2":
        mesh = init_device_mesh(here.device.type, (here.size,))
        for unit in model.units:
            fully_shard(unit, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    return _zero(int(engine.removeprefix("zero")), model, shapes, here)


def _zero(stage: int, model: nn.Module, shapes: Shapes, here: Here) -> nn.Module:
    if here.device.type == "cuda":
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.init_distributed("nccl")
    else:
        from tests.worlds_deepspeed import library

        deepspeed = library()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000},
        "bf16": {"enabled": shapes.dtype == torch.bfloat16},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine: nn.Module = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return engine


def updater(ema: ShardedEMA, model: nn.Module) -> Callable[[], object]:
    """An update after a step that counts: DeepSpeed's engines tell whether there was one."""
    if not hasattr(model, "global_steps"):
        assert ema.update()
        return ema.update

    def step_and_update() -> None:
        model.global_steps += 1
        applied = ema.update()
        assert applied

    return step_and_update


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def nbytes_of(tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> int:
    """Bytes that this rank holds of some tensors, each storage once."""
    storages = {(s := local(t).untyped_storage()).data_ptr(): s.nbytes() for t in tensors}
    return sum(storages.values())


def elements_of_all_ranks(numel: int, here: Here) -> int:
    total = torch.tensor([numel], device=here.device)
    dist.all_reduce(total)
    return int(total.item())
