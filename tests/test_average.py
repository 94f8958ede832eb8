"""What the average is: the same numbers on every engine, cut and counted in any way."""

from __future__ import annotations

import inspect
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from dist_ema import EqualWeight, ShardedEMA
from tests.net import ALIASES, BUFFERS, FROZEN, PARAMETERS, TRAINABLE, Net
from tests.oracle import Oracle, relative_distance
from tests.runs import (
    DECAY,
    EXACT,
    a_few_worlds,
    check_average,
    live_buffers,
    live_state,
    make_ema,
    same,
    start,
)
from tests.worlds import World, every_world, from_rank_0, mesh, not_compiled, rank, worlds


@every_world()
def test_the_average_is_that_of_the_full_weights_in_float64(world: World):
    start(world).train(5).check()


@every_world()
def test_the_gathered_state_is_the_bare_models_state_dict(world: World):
    run = start(world).train(2)
    live = live_state(run.training)
    state = run.ema.gather_state_dict()
    if rank() != 0:
        assert state == {}
        return
    wanted = world.make_net().state_dict()
    assert list(state) == list(wanted)
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in wanted.items()}
    assert all(t.device.type == "cpu" for t in state.values())
    for alias, name in ALIASES.items():
        same(state[alias], state[name])
    for name in (*FROZEN, *BUFFERS):
        torch.testing.assert_close(state[name], live[name], check_dtype=False, **EXACT)
    assert state["num_batches"].dtype == torch.int64
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}


@every_world(not_compiled)
def test_a_cut_does_not_change_a_bit_of_the_average(world: World):
    run = start(world).train(4)
    state = run.ema.gather_state_dict()
    if rank() != 0:
        return
    for name in TRAINABLE:
        average = run.weights[0][name].float()
        for weights in run.weights[1:]:
            average.lerp_(weights[name].float(), 1 - DECAY)
        assert torch.equal(state[name], average), name


@every_world(not_compiled)
def test_an_eval_forward_before_the_update_does_not_change_the_average(world: World):
    run, other = start(world), start(world)
    for i in range(3):
        run.training.train_step(i)
        run.training.evaluate()
        run.ema.update()
        other.train_unrecorded()
    state = run.ema.gather_state_dict()
    same(state, other.ema.gather_state_dict())
    if rank() == 0:
        assert not torch.equal(state["emb.weight"], run.weights[0]["emb.weight"].float())


@a_few_worlds
def test_gather_tensors_streams_what_gather_state_dict_gives(world: World):
    run = start(world).train(1)
    state = run.ema.gather_state_dict()
    stream = run.ema.gather_tensors()
    assert iter(stream) is stream
    pairs = list(stream)
    assert len(pairs) == len(state)
    same(dict(pairs), state)
    stream = run.ema.gather_tensors()
    if rank() == 0:  # one that is left half way leaves the ranks in step
        next(stream)
        stream.close()
    else:
        assert list(stream) == []
    same(run.ema.gather_state_dict(), state)


@a_few_worlds
def test_the_gathered_state_is_a_copy_in_any_dtype(world: World):
    run = start(world).train(2)
    state, live = run.ema.gather_state_dict(), live_state(run.training)
    wanted = {n: t.bfloat16() if t.is_floating_point() else t.clone() for n, t in state.items()}
    for tensor in state.values():
        tensor.zero_()
    cast = run.ema.gather_state_dict(dtype=torch.bfloat16)
    assert list(cast) == list(state)
    same(cast, wanted)
    same(live_state(run.training), live)


@a_few_worlds
def test_params_all_averages_frozen_weights_too(world: World):
    run = start(world, params="all").train(1)
    with torch.no_grad():
        for parameter in run.training.net.frozen.parameters():
            parameter.mul_(3)
    run.train(2).check(every=True)
    state = run.ema.gather_state_dict()
    if rank() == 0:
        assert not torch.equal(state["frozen.weight"], run.weights[-1]["frozen.weight"])


@a_few_worlds
def test_a_predicate_chooses_by_name_and_the_rest_is_live(world: World):
    seen = {}

    def chosen(fqn, parameter):
        seen[fqn] = parameter.requires_grad
        return fqn.startswith("blocks")

    run = start(world, params=chosen).train(3)
    assert seen == {name: name not in FROZEN for name in PARAMETERS}
    average = run.oracle().average
    live = {name: average.pop(name) for name in TRAINABLE if not name.startswith("blocks")}
    check_average(run.ema, average)
    state = run.ema.gather_state_dict()
    if rank() == 0:
        for name in live:
            assert torch.equal(state[name], run.weights[-1][name]), name


@worlds("plain", "plain_bf16", "ddp-3", "fsdp2-2", "hsdp", "fsdp2_tp")
def test_averaged_buffers_are_rank_0s_and_integers_are_copied(world: World):
    run = start(world, buffers="average")
    oracle = Oracle({"running": run.training.net.running}, DECAY)
    for _ in range(4):
        run.train(1)
        oracle.update({"running": run.training.net.running})
    check_average(run.ema, oracle.average | run.oracle().average)
    state = run.ema.gather_state_dict()
    if rank() == 0:
        assert state["num_batches"] == 4
        assert "mask" not in state


@a_few_worlds
@pytest.mark.parametrize(("update_every", "start_step"), [(1, 0), (3, 0), (1, 2), (2, 3)])
def test_updates_are_counted_as_documented(world: World, update_every: int, start_step: int):
    counting = {"update_every": update_every, "start_step": start_step}
    run = start(world, **counting)
    oracle = Oracle({name: run.weights[0][name] for name in TRAINABLE}, DECAY, **counting)
    for i in range(8):
        run.training.train_step(i)
        applied = run.ema.update()
        assert applied is oracle.update(run.training.full_weights()), i
        assert run.ema.step == i + 1
    assert run.ema.num_updates == start_step + (8 - start_step) // update_every
    assert run.ema.decay == DECAY**update_every
    check_average(run.ema, oracle.average)


@worlds("plain", "fsdp2-2")
def test_a_given_step_is_the_one_that_schedules_see(world: World):
    run = start(world, EqualWeight())
    wanted = {name: run.weights[0][name].double() for name in TRAINABLE}
    for i, step in enumerate((1, 2, 10)):
        run.training.train_step(i)
        assert run.ema.update(step=step)
        assert run.ema.step == step
        weights = run.training.full_weights()
        for name in TRAINABLE:  # the decay that leads from step - 1 to step
            wanted[name] += (weights[name].double() - wanted[name]) / step
    check_average(run.ema, wanted)


@a_few_worlds
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decay_0_copies_and_decay_1_freezes(world: World, decay: float):
    run = start(world, decay).train(3)
    state = run.ema.gather_state_dict()
    if rank() == 0:
        wanted = run.weights[-1 if decay == 0 else 0]
        for name in TRAINABLE:
            assert torch.equal(state[name], wanted[name]), name


@a_few_worlds
def test_a_torch_averaging_function_gives_what_torch_gives(world: World):
    run = start(world, multi_avg_fn=get_swa_multi_avg_fn()).train(4)
    assert run.ema.num_updates == 4
    nets = [world.make_net() for _ in run.weights]
    for net, weights in zip(nets, run.weights, strict=True):
        net.load_state_dict(weights, strict=False)
    averaged = AveragedModel(nets[0], multi_avg_fn=get_swa_multi_avg_fn())
    for net in nets[1:]:
        averaged.update_parameters(net)
    check_average(run.ema, {n: averaged.module.get_parameter(n).detach() for n in TRAINABLE})


@a_few_worlds
def test_drift_is_the_distance_of_the_average_from_the_live_weights(world: World):
    run = start(world)
    assert run.ema.drift() == 0.0
    run.train(3)
    drift = run.ema.drift()
    state = from_rank_0(run.ema.gather_state_dict())
    live = run.weights[-1]
    wanted = relative_distance([state[n] for n in TRAINABLE], [live[n] for n in TRAINABLE])
    assert 0 < wanted
    assert math.isclose(drift, wanted, rel_tol=1e-4), (drift, wanted)


@a_few_worlds
def test_reset_starts_again_from_the_live_weights(world: World):
    run = start(world).train(3)
    run.ema.reset()
    assert run.ema.num_updates == 0
    assert run.ema.drift() == 0.0
    run.weights = run.weights[-1:]
    run.train(2).check()


@worlds("plain_bf16", "ddp_bf16", "fsdp2_bf16")
def test_weights_without_an_fp32_master_are_averaged_in_fp32_with_a_warning(world: World):
    training = world.train()
    with pytest.warns(UserWarning, match="bfloat16"):
        ema = ShardedEMA(training.model, 0.9999)
    assert ema.source == "weights"
    before = ema.gather_state_dict()
    training.train_step(0)
    ema.update()
    after = ema.gather_state_dict()
    if rank() == 0:
        # A bf16 average would not have moved.
        assert after["emb.weight"].dtype == torch.float32
        assert not torch.equal(after["emb.weight"], before["emb.weight"])


@worlds("plain", "ddp-2", "fsdp2_mixed-2")
def test_fp32_weights_raise_no_warning(world: World):
    training = world.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema = ShardedEMA(training.model, DECAY)
        training.train_step(0)
        ema.update()


@worlds("plain", "ddp-2", "fsdp2-3")
def test_the_average_follows_weights_whose_storage_was_replaced(world: World):
    run = start(world).train(2)
    net = run.training.net
    state = {n: t.detach().clone() for n, t in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    net.head.weight = net.emb.weight  # assign=True unties
    with torch.no_grad():
        for parameter in run.training.parameters().values():
            parameter.add_(0.25)
    run.ema.update()
    run.weights.append(run.training.full_weights())
    run.check()


@pytest.mark.ranks(2)
def test_a_tie_that_fsdp_cut_apart_is_two_weights_with_a_warning():
    net = Net()
    fully_shard(net.head, mesh=mesh((2,), ("shard",)))
    fully_shard(net, mesh=mesh((2,), ("shard",)))
    assert net.head.weight is not net.emb.weight
    # Only since torch 2.12 does it keep what tells that the two were one.
    known = "_orig_param_uid" in inspect.getsource(FSDPParam)
    warned = pytest.warns(UserWarning, match=r"head\.weight") if known else nullcontext()
    with warned:
        ema = ShardedEMA(net, 0.5)
    first = net.emb.weight.full_tensor().detach()
    with torch.no_grad():
        net.emb.weight.mul_(3)
        net.head.weight.mul_(5)
    ema.update()
    state = ema.gather_state_dict()
    if rank() == 0:
        assert list(state) == list(Net().state_dict())
        torch.testing.assert_close(state["emb.weight"], 2 * first)
        torch.testing.assert_close(state["head.weight"], 3 * first)


@pytest.mark.ranks(0, 2)
def test_memory_formats_and_empty_weights_are_averaged():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), torch.nn.Flatten()
    )
    net.register_parameter("empty", torch.nn.Parameter(torch.empty(0, 4)))
    model = torch.nn.parallel.DistributedDataParallel(net) if dist.is_initialized() else net
    ema = ShardedEMA(model, 0.5)
    first = net[0].weight.detach().clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    ema.update()
    state = ema.gather_state_dict()
    if rank() == 0:
        torch.testing.assert_close(state["0.weight"], 2 * first)
        assert state["empty"].shape == (0, 4)
        assert list(state) == list(net.state_dict())


@a_few_worlds
def test_averaging_leaves_the_model_alone(world: World):
    run, bare = start(world).train(3), world.train()
    for i in range(3):
        bare.train_step(i)
    run.ema.gather_state_dict()
    run.ema.drift()
    same(run.training.full_weights(), bare.full_weights())
    same(live_buffers(run.training), live_buffers(bare))


@worlds("plain", "fsdp2-3")
def test_two_averages_of_one_model_do_not_meet(world: World):
    run = start(world, 0.5)
    other = make_ema(run.training, 0.99)
    run.train(1)
    other.update()
    once = run.oracle(0.99).average
    run.train(2).check(0.5)
    check_average(other, once)
