"""What FSDP1 alone does; the claims of every engine are in the other files."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from dist_ema import ShardedEMA
from tests.grid import rows
from tests.net import TRAINABLE, Net, batch_of_tokens, loss_of
from tests.runs import lerped_tensors, make_ema, same, start
from tests.worlds import World, evaluate, rank
from tests.worlds_fsdp1 import unwrapped

CPU = {"device_id": torch.device("cpu")}


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
    assert torch.equal(run.weights[2]["tiny"], 2 * full["tiny"])
    run.check()


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
