"""Buffers may come, grow, shrink and go at any time; parameters and what is averaged may not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_ema import ShardedEMA
from tests.worlds import WRAPPERS


class Net(nn.Module):
    """A cache that grows, a buffer that the first forward fills, one that goes, one of no name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("scale", None)
        self.register_buffer("mask", torch.ones(3))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        length = len(x)
        if len(self.cache) < length:
            self.cache = torch.ones(length)
            self.empty = torch.full((length,), 3.0)
        if self.scale is None:
            self.scale = torch.tensor(2.0)
            self.register_buffer("late", torch.arange(5))
        self.mask = None
        return self.linear(x) * self.scale


def build(wrapper: str, **options: object) -> tuple[Net, nn.Module, ShardedEMA]:
    net = Net()
    model = WRAPPERS[wrapper](net)
    return net, model, ShardedEMA(model, decay=0.5, **options)


# A forward pass under the others is collective.
FORWARDS = [*((wrapper, "all") for wrapper in WRAPPERS), ("plain", "first"), ("plain", "last")]


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize(("wrapper", "ranks_that_forward"), FORWARDS)
def test_buffers_are_read_as_they_are(wrapper: str, ranks_that_forward: str, tmp_path: Path):
    _, model, ema = build(wrapper)
    before = ema.gather_state_dict()
    last = dist.get_world_size() - 1
    mine = {"all": True, "first": not dist.get_rank(), "last": dist.get_rank() == last}
    if mine[ranks_that_forward]:
        with torch.no_grad():
            model(torch.ones(6, 8))
    assert ema.update()
    with ema.average_parameters():
        pass
    state = ema.gather_state_dict()
    ema.export(tmp_path / "out")
    ema.save(tmp_path / "saved")
    ema.load(tmp_path / "saved")
    if dist.get_rank() == 0:
        assert before.keys() == {"linear.weight", "linear.bias", "mask", "empty", "mean"}
        # Of a buffer that several ranks have, the first one's is taken.
        forwarded = ranks_that_forward != "last" or last == 0
        wanted = {"linear.weight", "linear.bias", "empty", "mean", "scale", "late"}
        if ranks_that_forward != "all" and last:
            wanted.add("mask")  # of the rank that did not forward
        assert state.keys() == wanted
        assert state["late"].tolist() == list(range(5)) and state["scale"] == 2
        assert len(state["empty"]) == (6 if forwarded else 0)
        exported = load_file(tmp_path / "out/model.safetensors")
        assert exported.keys() == state.keys()
        assert all(torch.equal(exported[name], state[name]) for name in state)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("wrapper", ["plain", "ddp", "fsdp2"])
def test_an_averaged_buffer_that_changes_its_shape_is_refused_on_every_rank(wrapper: str):
    net, _, ema = build(wrapper, buffers="average")
    if dist.get_rank() == 1:
        net.mean = torch.zeros(7)
        with pytest.raises(RuntimeError, match=r"mean: was shape \(4,\).* is shape \(7,\)"):
            ema.update()
    with pytest.raises(RuntimeError, match=r"mean: was shape \(4,\), whole, .*is sh.*7") as caught:
        ema.gather_state_dict()
    assert "fully_shard" not in str(caught.value)  # which has no part in it


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("buffers", ["copy", "some"])
def test_a_teacher_has_the_buffers_of_the_student(buffers: str):
    """Also those that came late, grew, have two names, or are integers beside averaged ones."""
    student = Net()
    student.register_buffer("count", torch.tensor(0))
    student.register_buffer("twin", student.mask)
    teacher = copy.deepcopy(student)
    chosen = "copy" if buffers == "copy" else lambda fqn, buffer: fqn == "mean"
    ema = ShardedEMA(student, decay=0.5, buffers=chosen, into=teacher)
    for step in range(1, 4):
        student(torch.ones(2 * step, 8))
        student.count += step
        student.late.add_(step)
        student.mask = student.twin = torch.full((step + 4,), float(step))
        student.mean.fill_(step)
        ema.update()
        for name in ("late", "scale", "empty", "mask", "twin", "count"):
            assert torch.equal(getattr(teacher, name), getattr(student, name)), (step, name)
        mean = float(step) if buffers == "copy" else step - 1 + 0.5**step
        assert teacher.mean.tolist() == [mean] * 4


@pytest.mark.ranks(0)
def test_a_parameter_that_is_registered_as_a_buffer_too_is_a_parameter():
    for first in (True, False):
        model = nn.Module()
        holder, linear = nn.Module(), nn.Linear(2, 2, bias=False)
        holder.register_buffer("w", linear.weight)
        for name in ("holder", "linear") if first else ("linear", "holder"):
            setattr(model, name, holder if name == "holder" else linear)
        ema = ShardedEMA(model, decay=0.5)
        before = linear.weight.detach().clone()
        with torch.no_grad():
            linear.weight.add_(1)
        ema.update()
        state = ema.gather_state_dict()
        for name in ("linear.weight", "holder.w"):
            torch.testing.assert_close(state[name], before + 0.5)


@pytest.mark.ranks(0)
def test_a_buffer_that_is_a_slice_of_another_tensor_is_read_and_restored():
    net = Net()
    net.register_buffer("slice", torch.arange(12.0).view(4, 3)[:, :2])
    ema = ShardedEMA(net, decay=0.5)
    wanted = net.slice.clone()
    with ema.average_parameters():
        net.slice.add_(1)
    assert torch.equal(net.slice, wanted)
    for change in (1.0, 2.0):
        net.slice.add_(change)
        assert torch.equal(ema.gather_state_dict()["slice"], net.slice)
    net.mean = torch.arange(4.0).view(2, 2)
    assert torch.equal(ema.gather_state_dict()["mean"], net.mean)
    net.mean = net.mean.t()
    assert torch.equal(ema.gather_state_dict()["mean"], net.mean)
