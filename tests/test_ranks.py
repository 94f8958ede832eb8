"""Ranks share the weights that they hold in common; public calls compare what must agree."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA
from dist_ema.core import replicas
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group, all_gather_single, device_for
from dist_ema.core.plan import averaged_names, make_plan
from dist_ema.core.replicas import hash_on_device
from dist_ema.engines.plain import PlainEngine
from tests.oracle import Oracle, worst_relative_error
from tests.runs import MAX_RELATIVE_ERROR, same


def parameters_of_subsets(group: dist.ProcessGroup | None = None) -> nn.ParameterDict:
    """A parameter for each subset of two or more ranks of a group, held by the subset alone."""
    me, size = dist.get_rank(group), dist.get_world_size(group)
    module = nn.ParameterDict()
    for number in range(2, size + 1):
        for members in itertools.combinations(range(size), number):
            generator = torch.Generator().manual_seed(sum(2**m for m in members))
            values = torch.randn(40 + number, 7, generator=generator)
            if me in members:
                module["_".join(map(str, members))] = nn.Parameter(values)
    return module


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def check_shared(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Average two steps, swap, gather, and compare with float64."""
    ema = ShardedEMA(module, decay=0.75, process_group=group)
    oracle = Oracle(weights(module), 0.75)
    for _ in range(2):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        ema.update()
        oracle.update(weights(module))
    live = weights(module)
    with ema.average_parameters():
        inside = weights(module)
    assert worst_relative_error(inside, oracle.average) <= MAX_RELATIVE_ERROR
    same(weights(module), live)
    state = ema.gather_state_dict()
    assert bool(state) == (dist.get_rank(group) == 0)
    if state:
        average = {name: oracle.average[name] for name in state.keys() & oracle.average.keys()}
        assert worst_relative_error(state, average) <= MAX_RELATIVE_ERROR


@pytest.mark.ranks(3, 4)
def test_any_subsets_of_ranks_share_weights_and_no_group_is_made():
    with mock.patch.object(dist, "new_group") as made:
        check_shared(parameters_of_subsets())
    assert not made.called


@pytest.mark.ranks(4)
def test_groups_of_the_user_work_before_between_and_after():
    """Also where a part of the world alone builds averages."""

    def group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            total = torch.tensor(dist.get_rank())
            dist.all_reduce(total, group=group)
            assert total == sum(ranks)
        return group

    group_of((0, 2))
    part = group_of((1, 2, 3))
    for pair in ((0, 1), (1, 3), (0, 1, 2, 3)):
        if dist.get_rank():
            check_shared(parameters_of_subsets(part), part)
        group_of(pair)
    check_shared(parameters_of_subsets())
    group_of((2, 3))


@pytest.mark.ranks(2)
def test_a_known_group_is_used_only_where_all_its_members_know_it():
    a, b = dist.new_group([0, 1]), dist.new_group([0, 1])
    ranks, module = Group(dist.new_group([1, 0])), linear()
    for known, group in (([a, b], a), ([[a, b], [b, a]][dist.get_rank()], None)):
        engine = PlainEngine(module)
        engine.process_groups = lambda known=known: known  # type: ignore[method-assign]
        weights = engine.weights()
        ranks_without_group = Group(ranks.process_group)
        ranks_without_group.groups_by_members = (  # type: ignore[method-assign]
            lambda known: {tuple(dist.get_process_group_ranks(g)): g for g in reversed(known)}
        )
        averaged = averaged_names(weights, "all", "copy")
        [replica_group] = make_plan(
            weights, averaged, engine, True, ranks_without_group
        ).replica_groups
        assert replica_group.process_group is group
        replica_group.share()


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_slices_are_exchanged_by_messages_of_gloo_and_else_by_all_gathers(backend: str):
    rank, numels = dist.get_rank(), [300, 70, 0, 501][: dist.get_world_size()]
    values = torch.zeros(sum(numels))
    slices = values.split(numels)
    slices[rank].fill_(rank + 1)
    version = values._version
    with (
        mock.patch.multiple(replicas, _CHUNK_BYTES=0, _CHUNK_BYTES_OF_A_RANK=400),
        mock.patch.object(replicas, "backends_of", lambda group: {"cpu": backend}),
        mock.patch.object(replicas, "all_gather_single", wraps=all_gather_single) as gathered,
    ):
        replicas.exchange_slices(
            # A chunk is in one piece or in several, which are staged.
            lambda i, start, stop: list(slices[i][start:stop].split(64)),
            numels,
            values.dtype,
            values.device,
            dist.group.WORLD,
            range(len(numels)),
        )
    wanted = [torch.full([numel], i + 1.0) for i, numel in enumerate(numels)]
    assert torch.equal(values, torch.cat(wanted))
    assert values._version > version  # autograd refuses a backward pass through earlier values
    assert gathered.called == (backend == "nccl")


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("way", ["in", "back"])
@pytest.mark.parametrize("action", ["fill", "store"])
def test_a_copy_that_fails_between_two_chunks_is_an_error_on_every_rank(way: str, action: str):
    model = nn.Linear(40, 30)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    ema = ShardedEMA(model, decay=0.5)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    live, calls = weights(model), itertools.count()
    copy = getattr(replicas._Row, action)

    def fails_once(row: Any) -> None:
        if dist.get_rank() == 0 and next(calls) == 1:
            raise MemoryError("no memory")
        copy(row)

    faults = mock.patch.object(replicas._Row, action, fails_once)
    with (
        mock.patch.multiple(replicas, _CHUNK_BYTES=0, _CHUNK_BYTES_OF_A_RANK=400),
        pytest.raises((MemoryError, RuntimeError), match=r"no memory") as raised,
        faults if way == "in" else contextlib.nullcontext(),
        ema.average_parameters(),
    ):
        assert way == "back"
        faults.start()
    if way == "back":
        faults.stop()
        assert "way back" in str(raised.value)
        model.load_state_dict(live)
        ema.reset()
    same(weights(model), live)
    with ema.average_parameters():
        pass
    same(weights(model), live)


@pytest.mark.parametrize(
    ("backends", "collective", "point_to_point"),
    [
        ("cpu:gloo,cuda:gloo", "cuda", "cpu"),  # gloo has no isend of CUDA tensors
        ("cpu:gloo,cuda:nccl", "cuda", "cuda"),
        ("cpu:gloo", "cpu", "cpu"),
    ],
)
def test_a_group_is_given_tensors_that_its_backends_can_send(
    backends: str, collective: str, point_to_point: str
):
    cuda: Any = torch.device("cuda", 0)
    with mock.patch.object(dist, "get_backend_config", lambda group: backends):
        assert device_for(mock.Mock(), cuda).type == collective
        assert device_for(mock.Mock(), cuda, point_to_point=True).type == point_to_point


def test_a_hash_on_a_device_depends_on_each_bit_and_its_place():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values = torch.arange(1, 6_000_000, 1500, dtype=torch.float32).to(dtype)
        swapped, nudged = values.clone(), values.clone()
        swapped[[3, -2]] = values[[-2, 3]]
        nudged[-1] = -nudged[-1]
        assert len({hash_on_device(v) for v in (values, swapped, nudged)}) == 3
        assert hash_on_device(values) == hash_on_device(values.clone())


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(6, 4)


def swap(ema: ShardedEMA, path: Any) -> None:
    with ema.average_parameters():
        pass


CALLS: dict[str, Callable[[ShardedEMA, Any], object]] = {
    "average_parameters": swap,
    "gather_state_dict": lambda ema, path: ema.gather_state_dict(),
    "gather_tensors": lambda ema, path: list(ema.gather_tensors()),
    "copy_to": lambda ema, path: ema.copy_to(),
    "copy_to_module": lambda ema, path: ema.copy_to(linear()),
    "drift": lambda ema, path: ema.drift(),
    "save": lambda ema, path: ema.save(path / "save"),
    "save_asynchronous": lambda ema, path: ema.save(path / "save", asynchronous=True),
    "export": lambda ema, path: ema.export(path / "export"),
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("call", CALLS)
def test_ranks_that_updated_different_numbers_of_times_are_refused(call: str, tmp_path):
    model = linear()
    if call != "average_parameters":  # which needs no other rank under FSDP2
        fully_shard(model)
    ema = ShardedEMA(model, decay=0.5)
    if dist.get_rank() == 0:
        ema.update()
    with pytest.raises(RuntimeError, match=r"\(1, 1\).*rank 0.*\(0, 0\).*rank 1.*update\(\)"):
        CALLS[call](ema, tmp_path)
    assert not list(tmp_path.iterdir())
    if dist.get_rank() == 1:
        ema.update()
    CALLS[call](ema, tmp_path)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("other", [call for call in CALLS if call != "average_parameters"])
def test_ranks_in_different_calls_are_refused(other: str, tmp_path):
    ema = ShardedEMA(linear(), decay=0.5)
    with pytest.raises(RuntimeError, match=r"average_parameters\(\).*rank 0"):
        CALLS["average_parameters" if dist.get_rank() == 0 else other](ema, tmp_path)
    assert not list(tmp_path.iterdir())
    ema.drift()


@pytest.mark.ranks(2)
def test_different_arguments_are_refused_by_name(tmp_path):
    ema = ShardedEMA(linear(), decay={"a": 0.5, "b": 0.9})
    me = dist.get_rank()
    name, dtype = "ab"[me], (torch.float32, torch.bfloat16)[me]
    for call in (ema.drift, ema.gather_state_dict, ema.copy_to):
        with pytest.raises(ValueError, match="name is a on rank 0 and b on rank 1"):
            call(name=name)
    with pytest.raises(ValueError, match="dtype is"):
        ema.gather_state_dict("a", dtype=dtype)
    with pytest.raises(ValueError, match="max_shard_size is"):
        ema.export(tmp_path / "out", name="a", max_shard_size=10**6 + me)
    assert not list(tmp_path.iterdir())


@pytest.mark.ranks(2)
def test_a_rank_that_waits_names_those_that_have_not_arrived():
    ema = ShardedEMA(linear(), decay=0.5)
    if dist.get_rank() == 1:
        time.sleep(1.5)
    with (
        mock.patch.object(Group, "warn_after_s", 0.5),
        mock.patch.object(logging.getLogger("dist_ema.core.group"), "handle") as handle,
    ):
        ema.drift()
    texts = [call.args[0].getMessage() for call in handle.call_args_list]
    assert len(texts) == (dist.get_rank() == 0)
    for text in texts:
        assert "drift()" in text and "have not arrived: 1" in text
        assert "fails after 27 s;" in text  # 0.9 of the timeout that tests/pool.py sets


@pytest.mark.ranks(2)
def test_a_call_of_one_rank_alone_names_the_others_and_meets_no_collective_of_theirs():
    """As under `if accelerator.is_main_process:`, while the others go on to train."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    ema = ShardedEMA(linear(), decay=0.5, process_group=group)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"drift\(\): ranks .*arrived: 1; .*is_main_process"):
            ema.drift()
    else:
        gradients = torch.ones(1000)
        with pytest.raises(RuntimeError):
            dist.all_reduce(gradients, group=group)
        assert torch.equal(gradients, torch.ones(1000))
    dist.barrier()


@pytest.mark.ranks(2)
def test_a_call_that_failed_for_want_of_ranks_may_be_made_again():
    group = dist.new_group([0, 1], timeout=timedelta(seconds=5))
    ema = ShardedEMA(linear(), decay=0.5, process_group=group)
    with mock.patch.object(Group, "_timeout_s", lambda self: 0.1):
        if dist.get_rank() == 0:
            with pytest.raises(RuntimeError, match="arrived: 1"):
                ema.drift()
    dist.barrier()
    ema.drift()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_that_choose_different_weights_are_refused_by_name(sharded: bool):
    model = nn.Sequential(linear(), linear(1))
    if sharded:
        fully_shard(model)
    chosen = (lambda name, p: True) if dist.get_rank() else (lambda name, p: "0" in name)
    with pytest.raises(ValueError, match=r"others: 1\.bias, 1\.weight"):
        ShardedEMA(model, params=chosen)


@pytest.mark.ranks(2)
def test_a_reset_on_one_rank_alone_is_noticed():
    ema = ShardedEMA(linear(), decay=0.5)
    if dist.get_rank() == 0:
        ema.reset()
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        ema.drift()


@pytest.mark.ranks(2)
def test_ranks_that_load_different_files_are_refused(tmp_path):
    for seed in (1, 2):
        ShardedEMA(linear(seed)).export(tmp_path / str(seed))
    ema = ShardedEMA(linear(), decay=0.5)
    before = ema.gather_state_dict()
    with pytest.raises(ValueError, match="path is"):
        ema.load(tmp_path / str(1 + dist.get_rank()))
    link = tmp_path / f"link-{dist.get_rank()}"
    link.mkdir()
    shutil.copy(tmp_path / str(1 + dist.get_rank()) / "model.safetensors", link)
    os.chdir(link)
    with pytest.raises(CheckpointError, match="different"):
        ema.load("/proc/self/cwd/model.safetensors")
    os.chdir(tmp_path)
    same(ema.gather_state_dict(), before)
