"""The worlds that the other tests rely on train, and their reading of the weights is right."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.net import FROZEN, PARAMETERS
from tests.runs import same
from tests.worlds import World, evaluate, every_world, state_of


@every_world()
def test_a_world_trains_and_its_full_weights_are_those_of_the_net(world: World):
    expected = {name: p.detach().clone() for name, p in world.make_net().named_parameters()}
    training = world.train()
    start = training.full_weights()
    assert tuple(start) == PARAMETERS
    same(start, expected)

    for i in range(2):
        training.train_step(i)
    end = training.full_weights()
    for name in PARAMETERS:
        assert torch.equal(start[name], end[name]) == (name in FROZEN), name
    if dist.is_initialized():
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, end)
        for there in everywhere:
            same(there, end)


@every_world()
def test_a_world_computes_what_its_twins_compute(world: World):
    training = world.train()
    training.train_step(0)
    net = world.make_net()
    buffers = {
        name: b for name, b in net.state_dict().items() if name in ("running", "num_batches")
    }
    state = {**state_of(training.full_weights()), **buffers}
    logits = training.evaluate()
    assert logits.dtype == world.compute_dtype
    same(world.parallel_twin(state).evaluate(), logits)
    torch.testing.assert_close(evaluate(world.plain_twin(state)), logits, **world.forward_tolerance)
    assert not torch.equal(world.train(seed=1).evaluate(), logits)
