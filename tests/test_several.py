"""Several averages, torch's own averaging functions, a teacher, and the average made permanent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.optim.swa_utils import update_bn as torch_update_bn

from dist_ema import EqualWeight, PowerFunction, ShardedEMA
from dist_ema.batchnorm import update_bn
from tests.net import TRAINABLE, Net
from tests.runs import EXACT, MAX_RELATIVE_ERROR, a_few_worlds, live_state, start
from tests.worlds import World, evaluate, every_world, from_rank_0, not_compiled, num_ranks, rank


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


@a_few_worlds
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_torchs_multi_avg_fn_gives_what_averaged_model_gives(world: World, kind: str):
    fn = get_ema_multi_avg_fn(0.9) if kind == "ema" else get_swa_multi_avg_fn()
    run = start(world, multi_avg_fn=fn).train(5)
    state = run.ema.gather_state_dict()
    if rank() != 0:
        return
    reference = AveragedModel(nn.ParameterDict(), multi_avg_fn=fn)
    for weights in run.weights[1:]:
        live = nn.ParameterDict({n.replace(".", "/"): weights[n].double() for n in TRAINABLE})
        if not len(reference.module):
            reference = AveragedModel(live, multi_avg_fn=fn)
        reference.update_parameters(live)
    assert run.ema.num_updates == int(reference.n_averaged)
    for name in TRAINABLE:
        wanted = reference.module[name.replace(".", "/")]
        assert (state[name] - wanted).abs().max() <= MAX_RELATIVE_ERROR * wanted.abs().max()


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


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 7), nn.BatchNorm1d(7, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def batches_of(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(4, 5, generator=generator) for _ in range(2 + rank)]


@pytest.mark.ranks(0, 1, 2, 3)
def test_update_bn_over_ranks_is_that_of_one_process_over_all_batches():
    torch.manual_seed(0)
    net = Normalized()
    wanted = Normalized()
    wanted.load_state_dict(net.state_dict())
    torch_update_bn([b for r in range(num_ranks()) for b in batches_of(r)], wanted)
    distributed = dist.is_initialized()
    model = nn.parallel.DistributedDataParallel(net) if distributed else net
    model.eval()
    update_bn(batches_of(rank()), model)
    torch.testing.assert_close(net.norm.running_mean, wanted.norm.running_mean)
    torch.testing.assert_close(net.norm.running_var, wanted.norm.running_var)
    assert net.norm.num_batches_tracked == wanted.norm.num_batches_tracked
    assert (net.norm.momentum, model.training, net.norm.training) == (0.3, False, False)


@pytest.mark.ranks(0, 2)
def test_update_bn_inside_average_parameters_holds_until_the_block_ends():
    torch.manual_seed(0)
    net = Normalized()
    ema = ShardedEMA(net, 0.5)
    with torch.no_grad():
        net.linear.weight.add_(1.0)
    ema.update()
    before = net.norm.running_mean.clone()
    with ema.average_parameters():
        update_bn(batches_of(rank()), net)
        assert not torch.equal(net.norm.running_mean, before)
    assert torch.equal(net.norm.running_mean, before)


@pytest.mark.ranks(0, 2)
def test_update_bn_restores_everything_when_a_batch_fails_on_one_rank():
    net = Normalized()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    batches = batches_of(rank())
    if rank() == 0:
        batches[1] = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="shapes"):
        update_bn(batches, net)
    torch.testing.assert_close(dict(net.state_dict()), before, **EXACT)
    assert (net.norm.momentum, net.training) == (0.3, True)


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
