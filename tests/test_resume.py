"""An average is saved under one engine and goes on under another, on other ranks."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dist_ema import HalfLife, ShardedEMA
from dist_ema.checkpoint.reader import load
from dist_ema.checkpoint.writer import save
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from dist_ema.core.layout import TensorMeta
from tests import worlds_deepspeed, worlds_fsdp1
from tests.cuts import blank, parts_of, state_of
from tests.net import ALIASES, TRAINABLE, Net
from tests.runs import a_few_worlds, make_ema, same, start
from tests.worlds import WORLDS, World, barrier, not_compiled, rank

# One of each way of cutting that this file knows of; WORLDS=all runs the whole table.
CUT_DIFFERENTLY = {
    "plain-0", "ddp-3", "fsdp2-3", "fsdp2_columns-4", "fsdp2_bf16-3", "fsdp2_offload-2",
    "fsdp2_ignored-2", "hsdp-4", "fsdp2_tp-4", "tp-2",
    "full_flat-4", "full_bf16-2", "full_nested_flat-3", "no_shard-2", "hybrid-4",
    "z0_bf16-3", "z1_round_robin-4", "z2-4", "z2_offload_bf16-2", "z3-3", "z3_bf16_cut-3",
    "z3_offload_all-2",
}  # fmt: skip
TABLE = [
    pytest.param(world, n, id=f"{world.name}-{n or 'alone'}")
    for world in (*WORLDS, *worlds_fsdp1.WORLDS, *worlds_deepspeed.WORLDS)
    for n in world.ranks
    if f"{world.name}-{n}" in CUT_DIFFERENTLY
    or (os.environ.get("WORLDS") == "all" and not_compiled(world))
]


def infos_of(net: Net) -> list[TensorMeta]:
    aliases = {name: alias for alias, name in ALIASES.items()}
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    return [
        TensorMeta(n, (aliases[n],) if n in aliases else (), shapes[n], torch.float32)
        for n in TRAINABLE
    ]


@pytest.mark.parametrize(("world", "num_ranks"), TABLE)
def test_what_a_world_saves_and_loads_are_the_full_tensors(world: World, tmp_path: Path):
    """One process stands for all the other worlds: what it reads, and writes, is not cut."""
    run = start(world).train(2)
    run.ema.save(tmp_path / "ema")
    saved = run.ema.gather_state_dict()
    tensors = infos_of(world.make_net())
    generator = torch.Generator().manual_seed(9)
    other = {t.fqn: torch.randn(t.shape, generator=generator) for t in tensors}
    if rank() == 0:
        alone = Group.alone()
        parts = blank("last", tensors, alone)
        state = load(tmp_path / "ema", {"ema": parts}, tensors, alone)
        assert (state["step"], state["num_updates"]) == (2, 2)
        for part in parts:
            same(part.tensor, saved[part.meta.fqn])
        averages = {"ema": parts_of("crumbs", tensors, other, alone)}
        save(tmp_path / "other", averages, tensors, state_of(step=5), alone)
    barrier()
    with pytest.warns(UserWarning, match=r"'ema' was saved with .*0\.5.* goes on with .*0\.9"):
        run.ema.load(tmp_path / "other")
    assert (run.ema.step, run.ema.num_updates, run.ema.decay) == (5, 5, 0.5)
    loaded = run.ema.gather_state_dict()
    if rank() == 0:
        same({fqn: loaded[fqn] for fqn in other}, other)


@a_few_worlds
@pytest.mark.parametrize("way", ["save", "background", "dcp", "export"])
def test_a_resumed_average_goes_on_as_if_nothing_had_happened(
    world: World, way: str, tmp_path: Path
):
    decay = 0.9 if way == "export" else {"a": 0.9, "b": HalfLife(steps=3)}
    options = {} if way == "export" else {"update_every": 2, "start_step": 1}
    run, path = start(world, decay, **options).train(4), tmp_path / "ema"
    if way == "dcp":
        dcp.save({"ema": run.ema}, checkpoint_id=path)
    elif way == "export":
        run.ema.export(path)
        barrier()
    else:
        handle = run.ema.save(path, asynchronous=way == "background")
        assert (handle is None) == (way == "save")
    resumed = make_ema(run.training, decay, **options)
    if way == "dcp":
        dcp.load({"ema": resumed}, checkpoint_id=path)
    else:
        resumed.load(path)
    run.training.train_step(4)
    applied, again = run.ema.update(), resumed.update()
    for name in run.ema.names:
        same(resumed.gather_state_dict(name), run.ema.gather_state_dict(name))
    if way != "export":  # which has no counters
        assert applied == again
        assert (resumed.step, resumed.num_updates) == (run.ema.step, run.ema.num_updates)
        assert resumed.decay == run.ema.decay


@a_few_worlds
def test_averaged_buffers_and_whole_replicas_are_saved(world: World, tmp_path: Path):
    options = {"buffers": "average", "replicas": "whole", "params": "all"}
    run = start(world, **options).train(3)
    before, averaged = run.ema.gather_state_dict(), run.ema._average
    parameters = averaged.storage.values[0][: len(averaged.plan.parameters)]
    own = [value.clone() for value in parameters]
    run.ema.save(tmp_path / "ema")
    run.train_unrecorded()
    run.ema.load(tmp_path / "ema")
    same(parameters, own)
    after = run.ema.gather_state_dict()
    for name in before.keys() - {"num_batches"}:  # which is not averaged
        same(after[name], before[name])


@a_few_worlds
def test_a_checkpoint_that_does_not_fit_changes_nothing(world: World, tmp_path: Path):
    run = start(world).train(1)
    run.ema.save(tmp_path / "ema")
    fewer = make_ema(run.training, params=lambda fqn, p: p.requires_grad and fqn != "tiny")
    before = fewer.gather_state_dict()
    with pytest.raises(CheckpointError, match="unexpected: tiny"):
        fewer.load(tmp_path / "ema")
    same(fewer.gather_state_dict(), before)
    assert fewer.step == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fewer.load(tmp_path / "ema", strict=False)
    assert ["unexpected: tiny" in str(w.message) for w in caught] == [True]
    fewer.save(tmp_path / "fewer")
    with pytest.raises(CheckpointError, match="missing: tiny"):
        run.ema.load(tmp_path / "fewer")
    with run.ema.average_parameters():
        for action in (run.ema.save, run.ema.load):
            with pytest.raises(RuntimeError, match="inside average_parameters"):
                action(tmp_path / "ema")


@pytest.mark.ranks(0, 2)
@pytest.mark.parametrize("by", ["load", "dcp"])
def test_fewer_averages_than_were_saved_are_loaded(tmp_path: Path, by: str):
    net = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(net.weight)
    saved = ShardedEMA(net, {"short": 0.5, "long": 0.75})
    with torch.no_grad():
        net.weight.fill_(1.0)
    saved.update()
    ema = ShardedEMA(net, {"long": 0.75})
    if by == "load":
        saved.save(tmp_path / "a")
        with pytest.warns(UserWarning, match="'short' are not loaded"):
            ema.load(tmp_path / "a")
    else:
        dcp.save({"ema": saved}, checkpoint_id=tmp_path / "a")
        dcp.load({"ema": ema}, checkpoint_id=tmp_path / "a")
    assert (ema.step, ema.num_updates) == (1, 1)
    whole = ema.gather_state_dict("long")
    assert not whole or torch.equal(whole["weight"], torch.full((2, 3), 0.25))


def test_a_state_dict_of_another_average_changes_nothing():
    net = torch.nn.Linear(3, 2)
    ema = ShardedEMA(net, {"other": 0.5})
    before = ema.gather_state_dict("other")
    torch.nn.init.ones_(net.weight)
    state = ShardedEMA(net, {"short": 0.5}).state_dict()
    with pytest.raises(CheckpointError, match="no average named 'other'; it has 'short'"):
        ema.load_state_dict(state)
    same(ema.gather_state_dict("other")["weight"], before["weight"])


def test_one_process_has_plain_tensors_in_its_state_dict(tmp_path: Path):
    net = torch.nn.Linear(3, 2)
    net.register_parameter("scale", torch.nn.Parameter(torch.tensor(2.0)))
    saved = ShardedEMA(net, 0.5)
    torch.save(saved.state_dict(), tmp_path / "ema.pt")
    expected = saved.gather_state_dict()
    for parameter in net.parameters():
        torch.nn.init.ones_(parameter)
    ema = ShardedEMA(net, 0.5)
    ema.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    same(ema.gather_state_dict(), expected)


@pytest.mark.ranks(0)
@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_finds_a_load_complete_or_not_begun(tmp_path: Path):
    ema = ShardedEMA(nn.ParameterDict({"a": nn.Parameter(torch.ones(3))}), 0.5)
    ema.update()
    ema.save(tmp_path / "a")
    larger = nn.ParameterDict({n: nn.Parameter(torch.zeros(3)) for n in "ab"})
    other = ShardedEMA(larger, 0.5)
    with pytest.raises(CheckpointError, match="missing: b"):
        other.load(tmp_path / "a", strict=False)
    assert (other.step, other.gather_state_dict()["a"].tolist()) == (0, [0.0] * 3)
    another = ShardedEMA(nn.ParameterDict({"a": nn.Parameter(torch.zeros(3))}), 0.9)
    with pytest.raises(UserWarning, match="goes on with the constructor's"):
        another.load(tmp_path / "a")
    assert (another.step, another.gather_state_dict()["a"].tolist()) == (1, [1.0] * 3)
