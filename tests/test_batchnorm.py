"""update_bn over ranks, against torch's in one process that sees every rank's batches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import update_bn as torch_update_bn

from dist_ema import ShardedEMA
from dist_ema.batchnorm import update_bn
from tests.runs import EXACT
from tests.worlds import from_rank_0, mesh, num_ranks, rank

CASES = [("plain", 0), *((engine, n) for engine in ("ddp", "fsdp2") for n in (1, 2, 3))]
wrapped = pytest.mark.parametrize(("engine", "num_ranks"), CASES)


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 7), nn.BatchNorm1d(7, momentum=0.3)
        self.conv, self.norm2 = nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3, momentum=None)
        self.without = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.linear(x)).relu().unsqueeze(1)
        return self.without(self.norm2(self.conv(h)))


def wrap(engine: str, net: Normalized) -> nn.Module:
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    if engine == "fsdp2":
        shards = mesh((num_ranks(),), ("shard",))
        fully_shard(net.linear, mesh=shards)
        return fully_shard(net, mesh=shards)
    return net


def batches_of(rank: int, engine: str) -> list[Tensor]:
    """A rank may have more than another, or none, but under FSDP, whose forward communicates."""
    generator = torch.Generator().manual_seed(rank)
    num = 2 if engine == "fsdp2" else (2, 0, 3)[rank]
    return [torch.randn(4 + rank, 5, generator=generator) for _ in range(num)]


def statistics(net: Normalized) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def one_process(state: dict[str, Tensor], engine: str) -> dict[str, Tensor]:
    """The statistics of a bare net with these weights over the batches of every rank."""
    net = Normalized()
    net.load_state_dict(state)
    torch_update_bn([b for r in range(num_ranks()) for b in batches_of(r, engine)], net)
    return statistics(net)


def check_settings(net: Normalized, *, training: bool) -> None:
    assert (net.norm.momentum, net.norm2.momentum) == (0.3, None)
    assert {module.training for module in net.modules()} == {training}


@wrapped
def test_update_bn_over_ranks_is_that_of_one_process_over_all_batches(engine: str):
    torch.manual_seed(0)
    net = Normalized()
    wanted = one_process(net.state_dict(), engine)
    model = wrap(engine, net)
    model.eval()
    update_bn([(b, "a label") for b in batches_of(rank(), engine)], model)
    torch.testing.assert_close(statistics(net), wanted)
    check_settings(net, training=False)


@wrapped
def test_inside_average_parameters_it_is_of_the_average_and_holds_until_the_block_ends(engine: str):
    torch.manual_seed(0)
    net = Normalized()
    model = wrap(engine, net)
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    ema.update()
    before, state = statistics(net), from_rank_0(ema.gather_state_dict())
    wanted = one_process(state, engine)
    with ema.average_parameters():
        update_bn(batches_of(rank(), engine), model)
        torch.testing.assert_close(statistics(net), wanted)
    torch.testing.assert_close(statistics(net), before, **EXACT)
    check_settings(net, training=True)


def failing(batches: list[Tensor]) -> Iterator[Tensor]:
    yield batches[0]
    raise OSError("a file is gone")


@wrapped
def test_everything_comes_back_when_the_batches_end_in_an_error(engine: str):
    torch.manual_seed(0)
    net = Normalized()
    model = wrap(engine, net)
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        net.linear.weight.mul_(1.5)
    ema.update()
    net.norm.eval()  # a mode of its own
    before, weights = statistics(net), [p.detach().clone() for p in model.parameters()]
    batches = [torch.randn(4, 5), torch.randn(4, 5)]
    with pytest.raises(OSError, match="a file is gone"):
        with ema.average_parameters():
            shown = statistics(net)
            try:
                update_bn(failing(batches), model)
            finally:
                torch.testing.assert_close(statistics(net), shown, **EXACT)
    torch.testing.assert_close(statistics(net), before, **EXACT)
    torch.testing.assert_close([p.detach() for p in model.parameters()], weights, **EXACT)
    assert (net.norm.training, net.norm2.training, net.norm.momentum) == (False, True, 0.3)
    net.norm.train()
    wanted = one_process(from_rank_0(full_state(net)), engine)
    update_bn(batches_of(rank(), engine), model)
    torch.testing.assert_close(statistics(net), wanted)


def full_state(net: Normalized) -> dict[str, Tensor]:
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in net.state_dict().items()
    }


@pytest.mark.ranks(0, 2)
def test_a_batch_that_fails_on_one_rank_is_an_error_on_every_rank():
    net = Normalized()
    before = statistics(net)
    batches = [torch.randn(4, 5), torch.randn(4, 6 if rank() == 0 else 5)]
    with pytest.raises(RuntimeError, match="shapes"):
        update_bn(batches, net)
    torch.testing.assert_close(statistics(net), before, **EXACT)
    check_settings(net, training=True)


@wrapped
def test_no_batch_on_any_rank_is_refused_and_statistics_stay(engine: str):
    net = Normalized()
    before = statistics(net)
    model = wrap(engine, net)
    with pytest.raises(ValueError, match="no rank passed a batch"):
        update_bn([], model)
    torch.testing.assert_close(statistics(net), before, **EXACT)
    check_settings(net, training=True)


def no_layers() -> nn.Module:
    return nn.Linear(5, 7)


def other_layers() -> nn.Module:
    return nn.BatchNorm1d(5)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("other", "error", "match"),
    [
        (type(None), TypeError, r"rank 1: model is a NoneType, wanted one torch\.nn\.Module"),
        (no_layers, RuntimeError, r"layers .* is \[7, 3\] on rank 0 and \[\] on"),
        (other_layers, RuntimeError, r"is \[7, 3\] on rank 0 and \[5\] on rank 1"),
    ],
    ids=["none", "no-layers", "other-layers"],
)
def test_another_model_on_one_rank_is_an_error_on_every_rank(other, error, match: str):
    with pytest.raises(error, match=match):
        update_bn([torch.ones(2, 5)], Normalized() if rank() == 0 else other())


@pytest.mark.ranks(2)
def test_another_call_on_one_rank_is_an_error_on_every_rank():
    net = Normalized()
    ema = ShardedEMA(net, 0.5)
    with pytest.raises(RuntimeError, match=r"the call is update_bn\(\) on rank 0 and drift\(\)"):
        update_bn([torch.ones(2, 5)], net) if rank() == 0 else ema.drift()
