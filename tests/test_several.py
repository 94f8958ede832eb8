"""Several averages, a teacher, and the average made permanent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_ema import EqualWeight, PowerFunction, ShardedEMA
from tests.net import Net
from tests.runs import a_few_worlds, same, start
from tests.worlds import World, from_rank_0


@a_few_worlds
def test_each_of_several_averages_is_what_it_would_be_alone(world: World):
    rules = {"fast": 0.5, "slow": 0.99, "equal": EqualWeight(), "wide": PowerFunction(gamma=3.0)}
    together = start(world, rules).train(4)
    assert together.ema.names == list(rules)
    assert set(together.ema.decay) == set(rules)
    for name, rule in rules.items():
        alone = start(world, rule).train(4)
        assert together.ema.decay[name] == alone.ema.decay
        same(together.ema.gather_state_dict(name), alone.ema.gather_state_dict())
        same(together.averaged_logits(name), alone.averaged_logits())
        assert together.ema.drift(name) == alone.ema.drift()


@a_few_worlds
def test_which_of_several_averages_must_be_said(world: World):
    run = start(world, {"fast": 0.5, "slow": 0.99}).train(1)
    ema = run.ema
    for call in (ema.gather_state_dict, ema.drift, ema.copy_to, run.averaged_logits):
        with pytest.raises(ValueError, match="slow"):
            call()
    with pytest.raises(ValueError, match="no average is named 'ema'"):
        ema.gather_state_dict("ema")


@a_few_worlds
def test_a_teacher_computes_with_the_average_after_each_update(world: World):
    training, teacher = world.train(seed=0), world.train(seed=3)
    ema = ShardedEMA(training.model, 0.9, into=teacher.model)
    for i in range(3):
        training.train_step(i)
        ema.update()
        state, logits = from_rank_0(ema.gather_state_dict()), teacher.evaluate()
        same(logits, world.parallel_twin(state).evaluate())
    with ema.average_parameters():
        same(training.evaluate(), logits)
    same(teacher.evaluate(), logits)


@pytest.mark.ranks(0, 2)
def test_a_teacher_of_another_layout_is_refused_by_name():
    with pytest.raises(ValueError, match=r"blocks\.0\.\S+ has shape"):
        ShardedEMA(Net(), into=Net(hidden=12))
    net = Net()
    with pytest.raises(ValueError, match="shares weights"):
        ShardedEMA(net, into=net)


@a_few_worlds
def test_a_teacher_keeps_what_is_not_averaged(world: World):
    training, teacher = world.train(seed=0), world.train(seed=3)
    chosen = {"blocks.0.l1.weight", "blocks.1.norm.bias"}
    ema = ShardedEMA(training.model, 0.5, into=teacher.model, params=lambda n, _: n in chosen)
    before = teacher.full_weights()
    training.train_step(0)
    ema.update()
    after = teacher.full_weights()
    assert {n for n in before if not torch.equal(before[n], after[n])} <= chosen


@pytest.mark.ranks(0)
def test_a_teacher_has_the_frozen_weights_that_were_loaded_after_it_was_made(tmp_path):
    def model() -> nn.Module:
        frozen = nn.Linear(3, 3).requires_grad_(False)
        return nn.Sequential(frozen, nn.Linear(3, 2))

    student, teacher, saved = model(), model(), model()
    ShardedEMA(saved, 0.5).save(tmp_path / "ema")
    for average_first in (False, True):
        ema = ShardedEMA(student, 0.5, into=teacher)
        with torch.no_grad():
            student[0].weight.fill_(-1)
        if average_first:
            ema.load(tmp_path / "ema")
        student.load_state_dict(saved.state_dict())
        if not average_first:
            ema.load(tmp_path / "ema")
        ema.update()
        assert torch.equal(teacher[0].weight, saved[0].weight)
        with torch.no_grad():
            student[0].weight.fill_(-2)
        ema.reset()
        assert torch.equal(teacher[0].weight, student[0].weight)
