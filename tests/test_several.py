"""Several averages, a teacher, and the average made permanent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_ema import EqualWeight, PowerFunction, ShardedEMA
from tests.net import TRAINABLE, Net
from tests.runs import EXACT, a_few_worlds, live_state, start
from tests.worlds import World, evaluate, every_world, from_rank_0, not_compiled


@a_few_worlds
def test_each_of_several_averages_is_what_it_would_be_alone(world: World):
    rules = {"fast": 0.5, "slow": 0.99, "equal": EqualWeight(), "wide": PowerFunction(gamma=3.0)}
    together = start(world, rules).train(4)
    assert together.ema.names == list(rules)
    assert set(together.ema.decay) == set(rules)
    for name, rule in rules.items():
        alone = start(world, rule).train(4)
        state, wanted = together.ema.gather_state_dict(name), alone.ema.gather_state_dict()
        torch.testing.assert_close(state, wanted, **EXACT)
        with together.ema.average_parameters(name):
            shown = together.training.evaluate()
        with alone.ema.average_parameters():
            torch.testing.assert_close(shown, alone.training.evaluate(), **EXACT)
        assert together.ema.drift(name) == alone.ema.drift()


@a_few_worlds
def test_which_of_several_averages_must_be_said(world: World):
    ema = start(world, {"fast": 0.5, "slow": 0.99}).train(1).ema
    for call in (ema.gather_state_dict, ema.drift, ema.copy_to):
        with pytest.raises(ValueError, match="fast"):
            call()
    with pytest.raises(ValueError, match="no average is named 'ema'"):
        ema.gather_state_dict("ema")


@every_world(not_compiled)
def test_copy_to_makes_the_average_the_live_weights_and_training_goes_on(world: World):
    run = start(world).train(3)
    average = from_rank_0(run.ema.gather_state_dict())
    run.ema.copy_to()
    live = live_state(run.training)
    for name in TRAINABLE:
        assert torch.equal(live[name], average[name].to(live[name].dtype)), name
    if live["emb.weight"].dtype == torch.float32:
        assert run.ema.drift() == 0
    run.train(1)
    assert run.ema.drift() > 0


@a_few_worlds
def test_copy_to_writes_a_whole_module_on_every_rank(world: World):
    run = start(world).train(2)
    state = from_rank_0(run.ema.gather_state_dict())
    target = world.make_net(seed=9)
    run.ema.copy_to(target)
    torch.testing.assert_close(dict(target.state_dict()), state, **EXACT)


@a_few_worlds
def test_copy_to_refuses_a_module_of_another_layout_and_changes_nothing(world: World):
    run = start(world).train(1)
    other = world.make_net(seed=9, hidden=12)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"blocks\.0\."):
        run.ema.copy_to(other)
    torch.testing.assert_close(dict(other.state_dict()), before, **EXACT)


@a_few_worlds
def test_a_teacher_computes_with_the_average_after_each_update(world: World):
    training, teacher = world.train(seed=0), world.train(seed=3)
    ema = ShardedEMA(training.model, 0.9, into=teacher.model)
    for i in range(3):
        training.train_step(i)
        ema.update()
        state = from_rank_0(ema.gather_state_dict())
        found = teacher.evaluate()
        twin = world.parallel_twin(state) if "tp" in world.name else world.plain_twin(state)
        wanted = twin.evaluate() if "tp" in world.name else evaluate(twin)
        torch.testing.assert_close(found, wanted, **EXACT)
    with ema.average_parameters():
        torch.testing.assert_close(training.evaluate(), found, **EXACT)
    torch.testing.assert_close(teacher.evaluate(), found, **EXACT)


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
