"""DeepSpeed as rows of the table of worlds; see [Note: worlds] in tests/worlds.py."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.net import Net
from tests.worlds import Engine, Training, World


@dataclass(frozen=True, kw_only=True)
class Zero(Engine):
    """A stage of ZeRO, with further entries of its configuration."""

    stage: int = 0
    bf16: Mapping[str, Any] | None = None  # None: fp32
    zero: Mapping[str, Any] = field(default_factory=dict)  # of "zero_optimization"
    config: Mapping[str, Any] = field(default_factory=dict)
    zero_init: bool = False  # parameters are partitioned before deepspeed.initialize()

    def wrap(self, net: Net) -> nn.Module:
        deepspeed = library()
        if "torch_autocast" in self.config and not hasattr(deepspeed.runtime, "torch_autocast"):
            pytest.skip("this DeepSpeed has no torch_autocast")
        settings = deepspeed.runtime.zero.config.DeepSpeedZeroConfig.model_fields
        if "parameter_alignment" in self.zero and "parameter_alignment" not in settings:
            pytest.skip("this DeepSpeed has no parameter_alignment")
        bf16 = {} if self.bf16 is None else {"bf16": {"enabled": True, **self.bf16}}
        config = configuration(self.stage, zero=self.zero, **bf16, **self.config)
        if self.zero_init:
            with deepspeed.zero.Init(config_dict_or_path=config):
                _put_into(net, Net(hidden=net.blocks[0].l1.out_features))
        optimizer = super().make_optimizer(net)
        return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return model.optimizer

    def step(self, training: Training, loss: Tensor) -> None:
        training.model.backward(loss)
        training.model.step()

    def settle(self, training: Training) -> None:
        if self.stage == 3 and "torch_autocast" in self.config:
            # What a forward has gathered is rounded to what it computes in.
            training.model.empty_partition_cache()

    def full_weights(self, training: Training) -> dict[str, Tensor]:
        """The fp32 masters, and what has none."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = self.shown_weights(training)
        trained = {n: p for n, p in training.net.named_parameters() if p.requires_grad}
        # safe_get_full_fp32_param is wrong with the first, and returns None for the others.
        is_fused = hasattr(training.optimizer, "fp32_groups_flat")
        if self.zero.get("round_robin_gradients") or is_fused:
            masters = masters_by_address(training.optimizer, trained)
        elif hasattr(training.optimizer, "fp32_groups"):
            masters = masters_of_unfused(training.optimizer, trained)
        elif self.stage == 0 and self.bf16 is None:
            masters = trained
        else:
            masters = {n: safe_get_full_fp32_param(p) for n, p in trained.items()}
        for name, master in masters.items():
            weights[name] = master.detach().clone().view(weights[name].shape)
        return weights

    def shown_weights(self, training: Training) -> dict[str, Tensor]:
        """What the forward pass computes with."""
        shown = {}
        for name, parameter in training.net.named_parameters():
            if self.stage == 3:
                with library().zero.GatheredParameters([parameter]):
                    shown[name] = parameter.detach().clone()
            else:
                shown[name] = parameter.detach().clone()
        return shown


def configuration(
    stage: int, *, batch_size: int | str = 4, zero: Mapping[str, Any] | None = None, **others: Any
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **(zero or {})},
        **others,
    }


def library() -> Any:
    """DeepSpeed, imported in the workers only: it takes seconds."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        # It would compile a shared-memory backend: no compiler is needed here, nor a lock file.
        backend = sys.modules["deepspeed.comm.torch"]
        with mock.patch.object(backend, "build_shm_op", return_value=None):
            deepspeed.init_distributed("gloo")
        if torch.__version__.startswith("2.11."):
            _gather_detached(backend.TorchBackend)
    if autocast := sys.modules.get("deepspeed.runtime.torch_autocast"):  # since DeepSpeed 0.17
        autocast.TORCH_AUTOCAST_INITIALIZED = False  # an engine sets it for all that follow
    return deepspeed


def _gather_detached(backend: Any) -> None:
    """DeepSpeed 0.18 gathers in grad mode what requires grad, which gloo in torch 2.11 refuses."""
    original = backend.all_gather_into_tensor

    def all_gather_into_tensor(
        self: Any, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return original(self, output_tensor.detach(), input_tensor.detach(), *args, **kwargs)

    backend.all_gather_into_tensor = all_gather_into_tensor


def skip_without_overflow_checks(stage: int) -> None:
    """In bf16 DeepSpeed looks for overflows since 0.17, at stages 0 and 3 after 0.18."""
    known = importlib.util.find_spec("deepspeed.runtime.precision_config") is not None
    if stage in (0, 3):
        module = importlib.import_module("deepspeed.runtime.zero.stage3")
        known = known and "update_scale=True" in inspect.getsource(module)
    if not known:
        pytest.skip("this DeepSpeed applies a step in bf16 that overflows")


def _put_into(net: Net, built: Net) -> None:
    """Let a net have the parameters and buffers of one that was built in parts, and keep values."""
    parameters = [built.get_parameter(name) for name, _ in net.named_parameters()]
    with library().zero.GatheredParameters(parameters, modifier_rank=0), torch.no_grad():
        for parameter, value in zip(parameters, net.parameters(), strict=True):
            if parameter.numel():
                parameter.copy_(value)
    for name, module in net.named_modules():
        theirs = built.get_submodule(name)
        module._parameters, module._buffers = theirs._parameters, theirs._buffers


def masters_by_address(optimizer: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masters in flat buffers (at stages 1 and 2, parts), cut where the copies' parameters lie."""
    found = {}
    is_fused = hasattr(optimizer, "fp32_groups_flat")  # at stage 0
    buffers = (
        "fp32_groups_flat fp16_groups_flat"
        if is_fused
        else ("single_partition_of_fp32_groups bit16_groups_flat")
    )
    for part, copies in zip(*(getattr(optimizer, name) for name in buffers.split()), strict=True):
        whole = part.detach() if is_fused else torch.empty(copies.numel())
        if not is_fused:
            dist.all_gather(list(whole.chunk(dist.get_world_size())), part.detach())
        for name, parameter in parameters.items():
            start, rest = divmod(parameter.data_ptr() - copies.data_ptr(), copies.element_size())
            if not rest and 0 <= start < copies.numel():
                found[name] = whole[start : start + parameter.numel()]
    return found


def masters_of_unfused(optimizer: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    masters = {
        id(copy): master
        for copies, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for copy, master in zip(copies, masters, strict=True)
    }
    return {name: masters[id(parameter)] for name, parameter in parameters.items()}


BF16 = {"bf16": {}, "compute_dtype": torch.bfloat16}
# Another class of optimizer than for other stages and gradients.
BF16_OPTIMIZER = {"config": {"data_types": {"grad_accum_dtype": "fp32"}}, **BF16}
ROUND_ROBIN = {"round_robin_gradients": True}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
AUTOCAST = {
    "config": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "compute_dtype": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class AutocastWorld(World):
    """Its plain twin runs under autocast, with weights rounded where stage 3 gathers them so."""

    def plain_twin(self, state: Mapping[str, Tensor]) -> nn.Module:
        twin = Net(**self.net)
        twin.load_state_dict(state)
        if self.engine.stage == 3:
            for module in twin.modules():
                if isinstance(module, nn.Linear):
                    for parameter in module.parameters():
                        parameter.data = parameter.data.to(self.compute_dtype).float()
        return Autocast(twin, self.compute_dtype).eval()


class Autocast(nn.Module):
    def __init__(self, net: Net, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.net(tokens)


def persistence(threshold: int) -> dict[str, Any]:
    """Up to how many elements stage 3 keeps a parameter gathered; by default all of `Net`'s."""
    return {"stage3_param_persistence_threshold": threshold}


# Before 0.19 hpZ on 4 ranks cannot cut a parameter of one element.
HPZ_NET = {"scalar_size": 2}


def _row(name: str, *ranks: int, **engine: Any) -> World:
    kind = AutocastWorld if "autocast" in name else World
    return kind(name=name, ranks=ranks, engine=Zero(**engine))


WORLDS = [
    _row("z0", 2, stage=0),
    _row("z0_bf16", 3, stage=0, **BF16),
    _row("z1", 3, stage=1),
    _row("z1_bf16", 2, stage=1, **BF16),
    _row("z1_bf16_optimizer", 2, stage=1, **BF16_OPTIMIZER),
    _row("z1_round_robin", 4, stage=1, zero=ROUND_ROBIN),
    _row("z1_aligned_bf16", 3, stage=1, zero={"parameter_alignment": True} | ROUND_ROBIN, **BF16),
    _row("z1_autocast", 2, stage=1, **AUTOCAST),
    _row("z2", 2, 4, stage=2),
    _row("z2_bf16", 3, stage=2, **BF16),
    _row("z2_offload_bf16", 2, stage=2, zero=OFFLOAD, **BF16),
    _row("z3", 2, stage=3),
    _row("z3_on_three", 3, stage=3),
    _row("z3_bf16", 4, stage=3, **BF16),
    _row("z3_bf16_cut", 3, stage=3, zero=persistence(0), **BF16),
    _row("z3_sub_groups", 2, stage=3, zero={"sub_group_size": 20} | persistence(20), **BF16),
    _row("z3_offload", 2, stage=3, zero=OFFLOAD),
    _row("z3_offload_all", 2, stage=3, zero={"offload_param": {"device": "cpu"}} | OFFLOAD, **BF16),
    _row("z3_init", 3, stage=3, zero_init=True, **BF16),
    World(
        name="z3_hpz",
        ranks=(4,),
        engine=Zero(stage=3, zero={"zero_hpz_partition_size": 2} | persistence(0), **BF16),
        net=HPZ_NET,
    ),
    _row("z3_autocast", 2, stage=3, zero=persistence(0), **AUTOCAST),
]
