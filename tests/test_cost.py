"""What an average costs: nothing but arithmetic per update, and one fp32 copy over all ranks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.grid import every_eager_row, every_kind
from tests.net import TRAINABLE
from tests.runs import a_few_worlds, make_ema, start
from tests.worlds import World, num_ranks, worlds

WIDE = {"hidden": 480}  # so that the weights outweigh the alignment of their shadows
HOST_SYNCS = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero"}


class Counted(TorchDispatchMode):
    """The names of all operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """Names of the communication seen by three instruments: functions, dispatcher and profiler."""
    seen: list[str] = []

    def spy(name: str, function):
        def call(*args, **kwargs):
            seen.append(name)
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name, function in inspect.getmembers(dist, inspect.isfunction):
            communicates = "group" in inspect.signature(function).parameters
            if communicates and not name.startswith(("get_", "is_", "_")):
                stack.enter_context(mock.patch.object(dist, name, spy(name, function)))
        communication = stack.enter_context(CommDebugMode())
        profiler = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        yield seen
    seen += [str(name) for name, n in communication.get_comm_counts().items() for _ in range(n)]
    words = ("gloo", "c10d", "record_param_comms")
    seen += [e.key for e in profiler.key_averages() if any(word in e.key for word in words)]


@pytest.mark.ranks(2)
def test_the_instruments_see_communication():
    with counted_collectives() as seen:
        dist.all_reduce(torch.ones(1))
    assert "all_reduce" in seen, seen
    assert any("c10d" in name for name in seen), seen
    assert any("gloo" in name for name in seen), seen


@every_eager_row
def test_an_update_makes_no_collective_and_no_host_sync(world: World):
    run = start(world).train(1)
    run.training.train_step(1)
    with counted_collectives() as seen, Counted() as counted:
        run.ema.update()
    assert seen == [], seen
    assert not HOST_SYNCS & set(counted.operators), counted.operators


@every_kind
def test_an_update_takes_a_few_operators_however_many_weights_there_are(world: World):
    run = start(world).train(1)
    with Counted() as counted:
        run.ema.update()
    work = [name for name in counted.operators if name not in ("aten.detach", "aten.view")]
    assert len(work) <= 4, work


@every_kind
def test_an_update_allocates_nothing(world: World):
    run = start(world).train(1)
    run.ema.update()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.ema.update()
    taken = {e.key: e.self_cpu_memory_usage for e in profiler.key_averages()}
    assert sum(nbytes for nbytes in taken.values() if nbytes > 0) <= 64, taken


@every_eager_row
def test_all_ranks_together_hold_one_fp32_copy(world: World):
    training = world.train(**WIDE)
    weights = training.full_weights()
    copy = 4 * sum(weights[name].numel() for name in TRAINABLE)
    ema = make_ema(training)
    held = [ema.nbytes]
    if dist.is_initialized():
        held = [None] * num_ranks()
        dist.all_gather_object(held, ema.nbytes)
    # A shadow may start on a cache line: some bytes a weight, on each rank.
    slack = 64 * len(TRAINABLE) * len(held)
    assert copy <= sum(held) <= 1.05 * copy + slack, (held, copy)
    if "num_experts" not in world.net:  # an odd number of whole experts cannot be cut evenly
        assert max(held) <= 1.3 * copy / len(held) + slack, (held, copy)


@worlds("ddp-2", "ddp-4", "hsdp")
def test_whole_replicas_hold_what_each_rank_holds(world: World):
    training = world.train(**WIDE)
    split, whole = (make_ema(training, replicas=kind).nbytes for kind in ("split", "whole"))
    num_replicas = 2 if world.name == "hsdp" else num_ranks()
    assert whole == pytest.approx(num_replicas * split, rel=0.05)


@a_few_worlds
def test_frozen_weights_cost_nothing(world: World):
    training = world.train()
    frozen = 4 * sum(p.numel() for p in training.net.frozen.parameters())
    held = torch.tensor([make_ema(training, params=kind).nbytes for kind in ("trainable", "all")])
    if dist.is_initialized():
        dist.all_reduce(held)
    assert frozen <= held[1] - held[0] <= 1.5 * frozen + 256, held


@worlds("plain", "fsdp2-2")
def test_a_swap_without_replicas_makes_no_collective(world: World):
    run = start(world).train(1)
    with run.ema.average_parameters():
        pass
    with counted_collectives() as seen:
        with run.ema.average_parameters():
            pass
    assert seen == [], seen
