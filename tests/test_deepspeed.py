"""What DeepSpeed alone does; the claims of every engine are in the other files."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any
from unittest import mock

import pytest
import torch

from dist_ema import ShardedEMA
from tests import test_swap
from tests.grid import named, rows
from tests.net import TRAINABLE, Net
from tests.runs import DECAY, Run, lerped_tensors, same, start
from tests.worlds import World, evaluate, from_rank_0
from tests.worlds_deepspeed import WORLDS, Zero, skip_without_overflow_checks


@rows("z0_bf16", "z1_bf16", "z1_bf16_optimizer")
def test_the_rows_are_of_the_classes_of_optimizers_that_they_are_there_for(world: World):
    found = type(world.train().optimizer).__name__
    wanted = {
        "z0_bf16": "FP16_UnfusedOptimizer",
        "z1_bf16": "DeepSpeedZeroOptimizer",
        "z1_bf16_optimizer": "BF16_Optimizer",
    }
    if world.name == "z0_bf16" and found == "BF16_Optimizer":
        pytest.skip("this DeepSpeed has one class for stages 0 and 1 in bf16")
    assert found == wanted[world.name]


@rows("z1", "z2", "z3", "z3_bf16", "z3_sub_groups", "z1_aligned_bf16")
def test_an_update_reads_one_run_of_values_a_flat_buffer(world: World):
    run = start(world)
    optimizer = run.training.optimizer
    buffers = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    if buffers is None:
        buffers = optimizer.single_partition_of_fp32_groups
    assert len(buffers) < len(TRAINABLE)
    assert lerped_tensors(run) <= len(buffers)


# When an update counts.


def changed(world: World, **options: Any) -> World:
    """A row of the table with other options of its engine."""
    return dataclasses.replace(world, engine=dataclasses.replace(world.engine, **options))


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("kind", "overflows"), [("", None), ("_bf16", None), ("_bf16", 2)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_updates_are_the_optimizer_steps_that_are_not_skipped(stage: int, kind: str, overflows):
    if overflows:
        skip_without_overflow_checks(stage)
    (world,) = named(WORLDS, f"z{stage}{kind}")
    bf16 = {"check_grad_overflow": True} if overflows else world.engine.bf16
    run = start(changed(world, bf16=bf16, config={"gradient_accumulation_steps": 2}))
    for i in range(6):
        loss = run.training.loss(i)
        run.training.engine.step(run.training, loss * torch.inf if i == overflows else loss)
        applies = i in ((1, 5) if overflows else (1, 3, 5))
        assert (run.ema.update(), run.ema.update()) == (applies, False), i
        if applies:
            run.weights.append(run.training.full_weights())
    assert run.ema.step == run.ema.num_updates == len(run.weights) - 1
    run.check()


# Storage that moves.


def offload_states(engine: Any, **options: Any) -> None:
    try:
        engine.offload_states(**options)
    except AssertionError as refused:  # before DeepSpeed 0.17: stage 3 and its own Adam only
        pytest.skip(str(refused))


@rows("z1_bf16", "z2", "z3", "z3_bf16_cut")
def test_the_average_follows_states_that_are_offloaded_and_reloaded(world: World):
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

    # DeepSpeed loses count of partitions at stage 3 if some parameters do not train.
    training = world.train(world.make_net().requires_grad_(True))
    run = Run(training, ShardedEMA(training.model, DECAY), [training.full_weights()]).train(1)
    live = training.evaluate()
    if world.engine.stage == 3:
        offload_states(training.model, include=[OffloadStateTypeEnum.lp_params])
    else:
        flats = training.optimizer.single_partition_of_fp32_groups
        at = [flat.data_ptr() for flat in flats]
        offload_states(training.model)
        assert all(flat.data_ptr() != before for flat, before in zip(flats, at, strict=True))
    state = run.ema.gather_state_dict()
    with pytest.raises(RuntimeError, match="reload_states"):
        run.ema.average_parameters().__enter__()
    training.model.reload_states()
    same(run.ema.gather_state_dict(), state)
    assert not torch.equal(run.averaged_logits(), live)
    same(training.evaluate(), live)
    run.train(2).check()


@rows("z1_bf16", "z2_offload_bf16", "z3_bf16_cut")
def test_a_loaded_checkpoint_is_seen(world: World, tmp_path):
    run = start(world).train(1)
    run.training.model.save_checkpoint(str(tmp_path), tag="t")
    saved = run.weights[-1]
    run.train(2)
    run.training.model.load_checkpoint(str(tmp_path), tag="t")
    same(run.training.full_weights(), saved)
    run.ema.reset()
    assert run.ema.drift() == 0
    run.weights = [saved]
    run.train(2).check()


@rows("z1", "z2_bf16")
@pytest.mark.parametrize("how", ["cast", "assign"])
def test_parameters_that_are_replaced_under_the_engine_are_an_error(world: World, how: str):
    run = start(world).train(1)
    if how == "cast":
        run.training.model.module.to(torch.float64)
    else:
        state = {n: t.clone() for n, t in run.training.net.state_dict().items()}
        run.training.net.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match="replace"):
        run.ema.update()


# What is refused.


@rows("z1", "z1_bf16_optimizer", "z2_bf16", "z3", "z3_init")
def test_the_module_without_its_engine_is_refused_with_the_remedy(world: World):
    training = world.train()
    for model in (training.model.module, torch.nn.Sequential(training.net)):
        with pytest.raises(ValueError, match="DeepSpeedEngine"):
            ShardedEMA(model)
    ShardedEMA(torch.compile(training.model, backend="eager"))


@rows("z0_bf16", "z2_bf16", "z3")
def test_a_teacher_that_deepspeed_trains_is_refused_by_name(world: World):
    """It would overwrite what was averaged from its own masters."""
    with pytest.raises(ValueError, match="overwrites from a master"):
        ShardedEMA(world.train().model, into=world.train(seed=1).model)


UNSUPPORTED = {
    "optimizer": {"swap_optimizer": True, "params_in_nvme_and_cpu": True},
    "engine": {
        "has_moe_layers": True,
        "pipeline_parallelism": True,
        "mp_world_size": 2,
        "autotp_size": lambda: 2,
        "super_offload": lambda: True,
    },
}


@pytest.mark.ranks(2)
def test_what_is_not_supported_is_refused():
    engine = Zero(stage=3).wrap(Net())
    for holder, attributes in UNSUPPORTED.items():
        for attribute, value in attributes.items():
            holding = engine if holder == "engine" else engine.optimizer
            with mock.patch.object(holding, attribute, value, create=attribute == "super_offload"):
                with pytest.raises(ValueError, match="not supported"):
                    ShardedEMA(engine)
    ShardedEMA(engine)


@pytest.mark.ranks(2)
def test_parameters_that_are_cut_over_a_subgroup_are_refused():
    """As MiCS does, which needs an accelerator: a part is larger than the number of ranks tells."""
    engine = Zero(stage=3).wrap(Net())
    parameter = engine.module.head.weight
    with mock.patch.object(parameter, "ds_numel", parameter.ds_numel // 2):
        with pytest.raises(ValueError, match=r"weight: .* subgroup"):
            ShardedEMA(engine)
    ShardedEMA(engine)


@pytest.mark.ranks(2)
def test_a_swap_is_refused_where_deepcompile_keeps_gathered_weights():
    (world,) = named(WORLDS, "z3")
    run = start(world).train(1)
    engine = run.training.model
    name = next(
        (n for n in ("is_deepcompile_active", "is_deepcompile_enabled") if hasattr(engine, n)), ""
    )
    if not name:
        pytest.skip("this DeepSpeed has no DeepCompile")
    live = run.training.full_weights()
    with mock.patch.object(engine, name, return_value=True):
        with pytest.raises(RuntimeError, match="DeepCompile"):
            run.ema.average_parameters().__enter__()
    same(run.training.full_weights(), live)
    run.averaged_logits()


# Branches that this machine does not reach by itself.


@pytest.mark.ranks(2)
def test_stage_3_in_fp32_may_have_one_storage_for_master_and_copy():
    """On an accelerator, where its device compares equal to that of the tensors."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    create = DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions
    if ".device == self.device" not in inspect.getsource(create):
        pytest.skip("this DeepSpeed makes masters of their own always")

    def aliasing(self) -> None:
        self.device = torch.device("cpu")
        create(self)

    (world,) = named(WORLDS, "z3")
    with mock.patch.object(DeepSpeedZeroOptimizer_Stage3, "_create_fp32_partitions", aliasing):
        run = start(world).train(2)
    optimizer, live = run.training.optimizer, run.training.evaluate()
    for master, copy in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
    ):
        assert master.data_ptr() == copy.data_ptr()
    state, averaged = from_rank_0(run.ema.gather_state_dict()), run.averaged_logits()
    same(averaged, evaluate(world.plain_twin(state)))
    same(run.training.evaluate(), live)
    assert not torch.equal(averaged, live)
    run.train(1).check()


@pytest.mark.ranks(2)
def test_stage_0_with_a_fused_optimizer_keeps_masters_in_flat_buffers():
    engine_module = pytest.importorskip("deepspeed.runtime.engine")
    (world,) = named(WORLDS, "z0_bf16")
    with mock.patch.object(engine_module, "FusedAdam", torch.optim.AdamW):
        kind = type(world.train().optimizer).__name__
        if kind == "BF16_Optimizer":
            pytest.skip("this DeepSpeed has one class for stages 0 and 1 in bf16")
        assert kind == "FP16_Optimizer"
        start(world).train(2).check()
        test_swap.test_the_model_computes_with_the_average_inside_and_comes_back_bit_for_bit(world)


@pytest.mark.ranks(3)
def test_many_swaps_show_the_same_average_and_the_same_weights():
    """DeepSpeed before 0.19 reads persistent parameters before they are gathered, on the CPU."""
    run = start(named(WORLDS, "z3")[0]).train(2)
    live, averaged = run.training.evaluate(), run.averaged_logits()
    for _ in range(10):
        same(run.training.evaluate(), live)
        same(run.averaged_logits(), averaged)
