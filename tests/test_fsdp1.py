"""FSDP1: the same claims as for every other engine, and what only it does."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from dist_ema import ShardedEMA
from tests import grid, test_average, test_cost, test_several, test_swap
from tests.grid import lerped_tensors, named, over
from tests.net import TRAINABLE, Net, batch_of_tokens, loss_of
from tests.oracle import worst_relative_error
from tests.runs import MAX_RELATIVE_ERROR, make_ema, same, start
from tests.worlds import World, evaluate, rank
from tests.worlds_fsdp1 import WORLDS, Fsdp1, unwrapped

# One row of each way of cutting and of gathering.
KINDS = named(
    WORLDS,
    "full",
    "full_flat",
    "full_bf16",
    "full_ignored",
    "grad_op_flat_mixed",
    "no_shard",
    "hybrid",
)

globals().update(
    over(
        WORLDS,
        test_average.test_the_average_is_that_of_the_full_weights_in_float64,
        test_average.test_the_gathered_state_is_the_bare_models_state_dict,
        test_swap.test_the_forward_under_the_swap_is_that_of_a_plain_model,
        test_swap.test_training_after_a_swap_is_bit_identical_to_training_without,
        test_cost.test_an_update_makes_no_collective_and_no_host_sync,
        test_cost.test_all_ranks_together_hold_one_fp32_copy,
    )
    | over(
        KINDS,
        test_average.test_a_cut_does_not_change_a_bit_of_the_average,
        test_average.test_an_eval_forward_before_the_update_does_not_change_the_average,
        test_swap.test_weights_are_the_average_inside_and_come_back_with_buffers_bit_for_bit,
        test_swap.test_an_optimizer_step_inside_the_block_is_told_and_undone_in_the_weights,
        test_cost.test_an_update_takes_a_few_operators_however_many_weights_there_are,
        test_cost.test_an_update_allocates_nothing,
        test_swap.test_a_swap_works_in_inference_mode,
        test_swap.test_copy_to_makes_the_average_the_live_weights,
        test_several.test_each_of_several_averages_is_what_it_would_be_alone,
        grid.test_a_backward_pass_never_mixes_weights_and_average,
        test_swap.test_an_average_of_zeros_makes_a_model_of_zeros,
        grid.test_weights_that_do_not_train_are_averaged_with_all_and_shown,
    )
    | over(
        [world for world in KINDS if world.name != "full_bf16"],  # which warns
        test_several.test_a_teacher_computes_with_the_average_after_each_update,
    )
    | over(
        [world for world in KINDS if world.name != "no_shard"],  # FSDP1 raises there by itself
        test_swap.test_a_forward_that_fails_changes_nothing_and_leaves_nothing_gathered,
    )
    | over(
        named(WORLDS, "no_shard", "hybrid"),
        test_swap.test_whole_replicas_give_and_show_what_split_ones_do,
    )
)

CPU = {"device_id": torch.device("cpu")}


rows = functools.partial(grid.rows, WORLDS)


@rows("full", "full_flat", "full_nested", "full_root_only", "full_mixed")
def test_an_update_reads_one_run_of_values_a_unit(world: World):
    run = start(world)
    units = [
        unit
        for unit in FullyShardedDataParallel.fsdp_modules(unwrapped(run.training.model))
        if unit._handle is not None and any(p.requires_grad for p in unit.parameters())
    ]
    assert lerped_tensors(run) <= len(units)


@rows("full", "full_flat", "grad_op_flat_mixed", "hybrid")
def test_a_swap_before_the_first_forward_shows_the_average(world: World):
    training = world.train()
    ema = make_ema(training, 1.0, params="all")
    root = unwrapped(training.model)
    with FullyShardedDataParallel.summon_full_params(root, writeback=True), torch.no_grad():
        for parameter in root.parameters():
            parameter.add_(0.5)
    with ema.average_parameters():
        shown = training.evaluate()
    live = training.evaluate()
    same(shown, world.train().evaluate())
    assert not torch.equal(live, shown)


@rows("full", "full_flat", "no_shard")
def test_weights_loaded_and_written_by_fsdp_itself_are_seen(world: World):
    run = start(world)
    root = unwrapped(run.training.model)
    full = {name: t.clone() for name, t in world.make_net(seed=5).state_dict().items()}
    set_model_state_dict(root, full, options=StateDictOptions(full_state_dict=True))
    assert run.ema.update()
    run.weights.append(run.training.full_weights())
    with FullyShardedDataParallel.summon_full_params(root, writeback=True), torch.no_grad():
        for parameter in root.parameters():
            parameter.mul_(2)
    assert run.ema.update()
    run.weights.append(run.training.full_weights())
    state = run.ema.gather_state_dict()
    if rank() == 0:
        assert torch.equal(run.weights[2]["tiny"], 2 * full["tiny"])
        assert worst_relative_error(state, run.oracle().average) <= MAX_RELATIVE_ERROR


@rows("full", "full_flat")
def test_casting_after_wrapping_leaves_the_shards_that_are_averaged(world: World):
    """It casts what the module registers, which FSDP points at its shards again, or fails to."""
    run, bare = start(world).train(1), start(world).train(1)
    run.training.model.to(torch.bfloat16)
    assert run.ema.update()
    assert bare.ema.update()
    state, wanted = run.ema.gather_state_dict(), bare.ema.gather_state_dict()
    if rank() == 0:
        for name in TRAINABLE:
            same(state[name], wanted[name])


@rows("grad_op_flat_mixed", "full_mixed")
def test_evaluation_in_full_precision_reads_the_average(world: World, monkeypatch):
    """With FSDP_USE_FULL_PREC_IN_EVAL a unit gathers into one of two buffers, by its mode."""
    monkeypatch.setenv("FSDP_USE_FULL_PREC_IN_EVAL", "1")
    run = start(world).train(2)
    live = run.training.evaluate()  # leaves gathered weights, and the module in training mode
    shown = run.averaged_logits()
    state = run.ema.gather_state_dict()
    same(run.training.evaluate(), live)
    assert not torch.equal(shown, live)
    if rank() == 0:
        twin = Net(**world.net)
        twin.load_state_dict(state)
        same(shown, evaluate(twin))


@rows("full", "full_flat", "grad_op_flat_mixed")
def test_shards_come_back_after_an_exception_inside_a_forward(world: World):
    run = start(world).train(2)
    units = FullyShardedDataParallel.fsdp_modules(unwrapped(run.training.model))
    shards = [unit._handle.flat_param._local_shard for unit in units]
    before = [shard.clone() for shard in shards]
    average = run.ema.gather_state_dict()

    def fail(module, inputs):
        raise ZeroDivisionError

    live = run.training.evaluate()
    hook = run.training.net.drop.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        with run.ema.average_parameters():
            run.training.evaluate()
    hook.remove()
    same(shards, before)
    same(run.training.evaluate(), live)
    same(run.ema.gather_state_dict(), average)


@pytest.mark.ranks(2)
def test_memory_formats_and_empty_weights_are_averaged():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), torch.nn.Flatten()
    )
    first = {name: p.detach().clone() for name, p in net.named_parameters()}
    model = FullyShardedDataParallel(net, use_orig_params=True, **CPU)
    ema = ShardedEMA(model, 0.5)
    with FullyShardedDataParallel.summon_full_params(model, writeback=True), torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    ema.update()
    state = ema.gather_state_dict()
    if rank() == 0:
        same(state, {name: 2 * p for name, p in first.items()})


@pytest.mark.ranks(2, 3)
def test_a_tie_that_units_cut_apart_is_two_weights():
    net = Net()
    for name in ("head", "frozen"):
        setattr(net, name, FullyShardedDataParallel(getattr(net, name), **CPU))
    model = FullyShardedDataParallel(net, **CPU)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ema = ShardedEMA(model, 0.5)
    for i in range(2):
        loss_of(model(batch_of_tokens(i))).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    state = ema.gather_state_dict()
    if rank() == 0:
        assert list(state) == list(Net().state_dict())
        assert not torch.equal(state["head.weight"], state["emb.weight"])


@pytest.mark.ranks(2)
def test_a_tie_with_a_weight_that_another_unit_took_is_refused_by_name():
    net = Net()
    net.head = FullyShardedDataParallel(net.head, use_orig_params=True, **CPU)
    model = FullyShardedDataParallel(net, use_orig_params=True, **CPU)
    with pytest.raises(ValueError, match=r"emb\.weight.*one unit"):
        ShardedEMA(model, 0.5)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_an_average_built_before_fsdp_raises_at_the_first_update(use_orig_params: bool):
    net = Net()
    ema = ShardedEMA(net, 0.5)
    Fsdp1(use_orig_params=use_orig_params).wrap(net)
    with pytest.raises(RuntimeError, match="build ShardedEMA after"):
        ema.update()
    assert (ema.step, ema.num_updates) == (0, 0)


@rows("full", "full_flat")
def test_a_weight_that_thaws_is_refused(world: World):
    run = start(world).train(1)
    for parameter in run.training.net.frozen.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"frozen\.\w+.*params='all'"):
        run.ema.update()
