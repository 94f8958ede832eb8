"""Averages of the fp32 masters that an optimizer outside of the engine keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from dist_ema import ShardedEMA
from tests.net import TRAINABLE, Net, batch_of_tokens, loss_of
from tests.oracle import Oracle
from tests.runs import check_average, same
from tests.worlds import WRAPPERS, from_rank_0

every_wrapper = pytest.mark.parametrize("wrapper", ["plain", "ddp", "fsdp2"])


class Adam(torch.optim.Optimizer):
    """Keeps masters as TransformerEngine's FusedAdam does: from the first step on, in its state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if "master_param" not in state:
                        state["master_param"] = p.detach().float()
                    state["master_param"] -= group["lr"] * p.grad.float().sign()
                    p.copy_(state["master_param"])

    def master(self, p: Tensor) -> Tensor | None:
        return self.state[p].get("master_param")


class Training:
    def __init__(self, wrapper: str, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(seed)
        self.net = Net().to(torch.bfloat16)
        self.model = WRAPPERS[wrapper](self.net)
        self.optimizer = Adam([p for p in self.model.parameters() if p.requires_grad])
        self.ema = ShardedEMA(self.model, 0.9, masters=self.optimizer.master, **options)

    def step(self, seed: int) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model(batch_of_tokens(seed))).backward()
        self.optimizer.step()

    def full(self, *, masters: bool) -> dict[str, Tensor]:
        """Whole masters, or weights where there are none, on every rank."""
        state = {}
        for name, p in self.net.named_parameters():
            master = self.optimizer.state.get(p, {}).get("master_param") if masters else None
            tensor = (p if master is None else master).detach()
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            state[name] = whole.clone()
        return state


@pytest.mark.ranks(1, 2, 3)
@every_wrapper
def test_masters_are_averaged_shown_and_saved(wrapper: str, tmp_path):
    run = Training(wrapper)
    assert run.ema.source == "weights"
    oracle = Oracle({n: run.full(masters=False)[n] for n in TRAINABLE}, 0.9)
    for i in range(6):
        run.step(i)
        run.ema.update()
        oracle.update(run.full(masters=True))
        assert run.ema.source == "master"
    state = from_rank_0(run.ema.gather_state_dict())
    check_average(run.ema, oracle.average)
    weights, masters = run.full(masters=False), run.full(masters=True)
    twin = Net().to(torch.bfloat16)
    twin.load_state_dict(state)
    with torch.no_grad(), run.ema.average_parameters():
        assert torch.equal(run.model(batch_of_tokens(9)), twin.train()(batch_of_tokens(9)))
    same(run.full(masters=False), weights)
    same(run.full(masters=True), masters)
    run.ema.save(tmp_path / "ema")
    other = Training("plain", seed=1, process_group=None)
    other.ema.load(tmp_path / "ema")
    same(trained(from_rank_0(other.ema.gather_state_dict())), trained(state))
    run.ema.copy_to()
    same(trained(run.full(masters=True)), trained(state))
    assert run.ema.drift() == 0.0


def trained(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[name] for name in TRAINABLE}


@pytest.mark.ranks(2)
@every_wrapper
def test_masters_that_the_optimizer_replaces_are_followed(wrapper: str):
    run = Training(wrapper)
    run.step(0)
    run.ema.update()
    for state in run.optimizer.state.values():  # as load_state_dict() does
        state["master_param"] = state["master_param"].clone()
    before = {n: t.double() for n, t in from_rank_0(run.ema.gather_state_dict()).items()}
    run.step(1)
    run.ema.update()
    masters = run.full(masters=True)
    check_average(run.ema, {n: 0.9 * before[n] + 0.1 * masters[n].double() for n in TRAINABLE})


@pytest.mark.ranks(1, 2)
@every_wrapper
def test_a_weight_that_is_not_the_cast_of_its_master_comes_back_bit_for_bit(wrapper: str):
    run = Training(wrapper)
    run.step(0)
    run.ema.update()
    with torch.no_grad():  # stochastic rounding, and a negative zero
        for p in run.net.parameters():
            p.mul_(1.0 + 2**-7)
        run.net.tiny.zero_()
        run.optimizer.master(run.net.tiny).fill_(-0.0)
    before = run.full(masters=False)
    with run.ema.average_parameters():
        assert not torch.equal(run.full(masters=False)["emb.weight"], before["emb.weight"])
    after = run.full(masters=False)
    for name, value in before.items():
        assert torch.equal(after[name].view(torch.int16), value.view(torch.int16)), name


SPOILED: list[tuple[Callable[[Tensor], object], str]] = [
    (lambda m: m.bfloat16(), "scaled or split"),
    (lambda m: m.to(torch.int16), "wanted an fp32 tensor"),
    (lambda m: "master", "wanted an fp32 tensor"),
    (lambda m: m.view(-1)[:-1], "its master has shape"),
    (lambda m: m.t(), "its master has shape"),
    (lambda m: m.t().contiguous().t(), "placed in different"),
    (lambda m: torch.stack([m, m], -1)[..., 0], "not dense"),
]


def test_a_master_that_cannot_be_averaged_is_refused_by_name():
    run = Training("plain")
    run.step(0)
    before = run.ema.gather_state_dict()
    for spoil, message in SPOILED:

        def find(p: Tensor) -> object:
            master = run.optimizer.master(p)
            return spoil(master) if p is run.net.emb.weight else master

        with pytest.raises(ValueError, match=rf"emb\.weight: .*({message})"):
            ShardedEMA(run.net, masters=find)
    same(run.ema.gather_state_dict(), before)
    with pytest.raises(TypeError, match="masters is 3"):
        ShardedEMA(run.net, masters=3)


@pytest.mark.ranks(2)
def test_engines_with_masters_of_their_own_refuse():
    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="masters= cannot be used with Fsdp1Engine"):
        ShardedEMA(model, masters=lambda p: None)


@pytest.mark.ranks(0)
def test_masters_that_never_appear_are_warned_of_at_the_first_update():
    net = Net().to(torch.bfloat16)
    ema = ShardedEMA(net, masters=lambda p: None)
    with pytest.warns(UserWarning, match="no fp32 master"):
        ema.update()


@pytest.mark.ranks(0)
def test_a_master_that_is_a_copy_is_refused():
    run = Training("plain")
    run.step(0)
    with pytest.raises(ValueError, match="a new tensor at each call"):
        ShardedEMA(run.net, masters=lambda p: p.detach().float())
    flat = {
        id(p): run.optimizer.master(p).view(-1) for p in run.net.parameters() if p.grad is not None
    }
    ema = ShardedEMA(run.net, 0.9, masters=lambda p: flat[id(p)].view(p.shape))
    assert ema.update() and ema.source == "master"
