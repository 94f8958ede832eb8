"""What the average is: the same numbers on every engine, cut and counted in any way."""

from __future__ import annotations

import inspect
import math
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from dist_ema import EqualWeight, PowerFunction, ShardedEMA
from tests.grid import every_eager_row, every_kind
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
from tests.worlds import WRAPPERS, World, evaluate, from_rank_0, mesh, rank, worlds

two_worlds = worlds("plain", "fsdp2-3")


@every_eager_row
def test_the_average_is_that_of_the_full_weights_and_no_reading_leaves_a_trace(world: World):
    """In float64 but for rounding, and bit for bit in fp32, however the weights are cut."""
    run = start(world).train(3)
    first, last = run.weights[0], run.weights[-1]
    net, dtype = world.make_net(), world.compute_dtype
    assert tuple(first) == tuple(last) == PARAMETERS
    for name, parameter in net.named_parameters():
        assert torch.equal(first[name].to(dtype), parameter.detach().to(dtype)), name
        assert torch.equal(first[name], last[name]) == (name in FROZEN), name
    same(last, from_rank_0(last))

    run.check()
    state = from_rank_0(run.ema.gather_state_dict())
    assert list(state) == list(net.state_dict())
    for name in TRAINABLE:
        average = first[name].float()
        for weights in run.weights[1:]:
            average.lerp_(weights[name].float(), 1 - DECAY)
        assert torch.equal(state[name], average), name

    other = start(world)
    for i in range(3):  # nothing but the user's own calls
        other.training.train_step(i)
        if i == 0:
            other.training.evaluate()
        other.ema.update()
        if i == 1:  # one step before the end: DDP makes up for buffers that differ in the next one
            other.averaged_logits()
    same(from_rank_0(other.ema.gather_state_dict()), state)
    same(other.training.full_weights(), last)
    same(live_buffers(other.training), live_buffers(run.training))


@every_kind
def test_the_gathered_state_is_the_bare_models_state_dict_and_a_copy_in_any_dtype(world: World):
    run = start(world).train(1)
    live, wanted = live_state(run.training), world.make_net().state_dict()
    state, cast = run.ema.gather_state_dict(), run.ema.gather_state_dict(dtype=torch.bfloat16)
    stream = run.ema.gather_tensors()
    assert iter(stream) is stream
    streamed = list(stream)
    if rank() != 0:
        assert not (state or cast or streamed)
    else:
        assert list(state) == list(cast) == list(wanted)
        assert len(streamed) == len(state)
        same(dict(streamed), state)
        for name, tensor in state.items():
            floats = wanted[name].is_floating_point()
            assert tensor.dtype == (torch.float32 if floats else torch.int64)
            assert (tensor.shape, tensor.device.type) == (wanted[name].shape, "cpu")
            same(cast[name], tensor.bfloat16() if floats else tensor)
        for alias, name in ALIASES.items():
            same(state[alias], state[name])
        for name in (*FROZEN, *BUFFERS):
            torch.testing.assert_close(state[name], live[name], check_dtype=False, **EXACT)
    stream = run.ema.gather_tensors()
    if rank() == 0:  # one that is left half way leaves the ranks in step
        next(stream)
        stream.close()
    else:
        assert list(stream) == []
    again = run.ema.gather_state_dict()
    same(again, state)
    for tensor in again.values():
        tensor.zero_()
    same(live_state(run.training), live)
    same(run.ema.gather_state_dict(), state)


@every_kind
def test_a_predicate_chooses_by_name_and_the_rest_is_live(world: World, tmp_path):
    """Also weights that do not train: they are averaged, saved, loaded and shown."""
    seen, chosen = {}, {*FROZEN, "blocks.0.l1.weight", "tiny"}

    def choose(fqn, parameter):
        seen[fqn] = parameter.requires_grad
        return fqn in chosen

    run, other = (start(world, seed=seed, params=choose) for seed in (0, 1))
    assert seen == {name: name not in FROZEN for name in PARAMETERS}
    other.ema.save(tmp_path / "other")
    run.ema.load(tmp_path / "other")
    live, first = run.train(1).weights[-1], other.weights[0]
    check_average(run.ema, {n: 0.9 * first[n].double() + 0.1 * live[n].double() for n in chosen})
    state = from_rank_0(run.ema.gather_state_dict())
    for name in set(TRAINABLE) - chosen:
        assert torch.equal(state[name], live[name].float()), name
    before = run.training.evaluate()
    plain = evaluate(world.plain_twin(state))
    torch.testing.assert_close(run.averaged_logits(), plain, **world.forward_tolerance)
    same(run.training.evaluate(), before)
    same(run.training.full_weights(), live)


@two_worlds
def test_params_all_averages_frozen_weights_too(world: World):
    run = start(world, params="all").train(1)
    with torch.no_grad():
        for parameter in run.training.net.frozen.parameters():
            parameter.mul_(3)
    run.train(2).check(every=True)


BUFFERS_OPTIONS = {
    "copy": "copy",
    "average": "average",
    "some": lambda fqn, buffer: fqn == "running",
    "none": lambda fqn, buffer: False,
}


@worlds("plain", "plain_bf16", "ddp-3", "fsdp2-2", "hsdp", "fsdp2_tp")
@pytest.mark.parametrize("buffers", BUFFERS_OPTIONS)
def test_buffers_of_rank_0_are_averaged_or_copied_shown_and_come_back(world: World, buffers: str):
    averaged = buffers in ("average", "some")
    run = start(world, buffers=BUFFERS_OPTIONS[buffers])
    oracle = Oracle({"running": run.training.net.running}, DECAY if averaged else 0.0)
    for _ in range(3):
        run.train(1)
        oracle.update({"running": run.training.net.running})
    check_average(run.ema, oracle.average | run.oracle().average)
    before, state = live_buffers(run.training), run.ema.gather_state_dict()
    with run.ema.average_parameters():
        shown = live_buffers(run.training)
    same(live_buffers(run.training), before)
    assert torch.equal(shown["running"], before["running"]) != averaged
    if rank() == 0:
        same(shown["running"], state["running"].to(shown["running"].dtype))
        assert state["num_batches"] == 3
        assert "mask" not in state


@two_worlds
@pytest.mark.parametrize(("update_every", "start_step"), [(1, 2), (3, 0), (2, 3)])
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


@two_worlds
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


@two_worlds
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decay_0_copies_and_decay_1_freezes(world: World, decay: float):
    run = start(world, decay).train(2)
    state = from_rank_0(run.ema.gather_state_dict())
    same({n: state[n] for n in TRAINABLE}, {n: run.weights[int(decay) - 1][n] for n in TRAINABLE})


@every_kind
def test_each_of_several_averages_is_what_it_would_be_alone_and_must_be_named(world: World):
    rules = {"fast": 0.5, "slow": 0.99, "equal": EqualWeight(), "wide": PowerFunction(gamma=3.0)}
    run = start(world, rules)
    alone = {name: make_ema(run.training, rule) for name, rule in rules.items()}
    for i in range(3):
        run.training.train_step(i)
        for ema in (run.ema, *alone.values()):
            ema.update()
    assert run.ema.names == list(rules)
    assert run.ema.decay == {name: ema.decay for name, ema in alone.items()}
    for name, ema in alone.items():
        same(run.ema.gather_state_dict(name), ema.gather_state_dict())
        assert run.ema.drift(name) == ema.drift()
        logits = run.averaged_logits(name)
        with ema.average_parameters():
            same(run.training.evaluate(), logits)
    for call in (run.ema.gather_state_dict, run.ema.drift, run.ema.copy_to, run.averaged_logits):
        with pytest.raises(ValueError, match="slow"):
            call()
    for call in (run.ema.gather_state_dict, run.averaged_logits):
        with pytest.raises(ValueError, match="no average is named 'ema'"):
            call("ema")
    with pytest.raises(ValueError, match="name is a generator, wanted the name of an average"):
        run.averaged_logits(run.training.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@a_few_worlds
def test_drift_is_the_distance_of_the_average_from_the_live_weights_until_reset(
    world: World, dtype: torch.dtype
):
    run = start(world, dtype=dtype)
    assert run.ema.drift() == 0.0
    live = run.train(3).weights[-1]
    state = from_rank_0(run.ema.gather_state_dict())
    wanted = relative_distance([state[n] for n in TRAINABLE], [live[n] for n in TRAINABLE])
    assert wanted > 0
    assert math.isclose(run.ema.drift(), wanted, rel_tol=1e-4), wanted
    run.check()  # an average in float64 is not computed with in place
    run.ema.reset()
    assert (run.ema.num_updates, run.ema.drift()) == (0, 0.0)
    run.weights = [live]
    run.train(2).check()


@worlds("plain_bf16", "ddp_bf16", "fsdp2_bf16")
def test_weights_without_an_fp32_master_are_averaged_in_fp32_with_a_warning(world: World):
    """Elsewhere there is no warning, or tests/pool.py would make it an error."""
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


@pytest.mark.parametrize(("wrapper", "num_ranks"), [("plain", 0), ("ddp", 2), ("fsdp1", 2)])
def test_memory_formats_and_empty_weights_are_averaged(wrapper: str):
    conv = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    net = torch.nn.Sequential(conv, torch.nn.Flatten())
    if wrapper != "fsdp1":
        net.register_parameter("empty", torch.nn.Parameter(torch.empty(0, 4)))
    first = {name: p.detach().clone() for name, p in net.named_parameters()}
    model = WRAPPERS[wrapper](net)
    ema = ShardedEMA(model, 0.5)
    is_fsdp1 = wrapper == "fsdp1"
    whole = FullyShardedDataParallel.summon_full_params(model) if is_fsdp1 else nullcontext()
    with whole, torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    ema.update()
    state = ema.gather_state_dict()
    if rank() == 0:
        assert list(state) == list(first)
        same(state, {name: 2 * p for name, p in first.items()})


@a_few_worlds
def test_averaging_leaves_the_model_alone(world: World):
    run, bare = start(world).train(3), world.train()
    for i in range(3):
        bare.train_step(i)
    run.ema.drift()
    same(run.training.full_weights(), bare.full_weights())
    same(live_buffers(run.training), live_buffers(bare))
