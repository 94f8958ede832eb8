"""`torch.distributed.checkpoint` saves, reshards and loads an average like any other state."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dist_ema import HalfLife, ShardedEMA
from dist_ema.checkpoint import dcp as average_dcp
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from dist_ema.core.layout import Fragment
from tests.cuts import CUTS, TENSORS, blank, differing, full, parts_of, state_of
from tests.net import Net


class Stateful:
    """What `ShardedEMA` is to torch.distributed.checkpoint."""

    def __init__(self, averages, tensors=TENSORS, state=None):
        self.averages, self.tensors, self.state = averages, tensors, state or state_of(averages)

    def state_dict(self):
        return average_dcp.state_dict(self.averages, self.tensors, self.state)

    def load_state_dict(self, given):
        self.state = average_dcp.load_state_dict(given, self.averages, self.tensors)

    def check(self, wanted):
        for name, parts in wanted.items():
            assert not differing(self.averages[name], parts), name


def averages_in(cut: str, ranks: Group) -> dict[str, list[Fragment]]:
    return {n: parts_of(cut, TENSORS, full(TENSORS, i), ranks) for i, n in enumerate("ab")}


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("way", "cut"),
    [
        *(("save", cut) for cut in CUTS),
        ("async_save", "flat"),
        ("async_save with a writer", "rows"),
    ],
)
def test_torch_saves_and_reshards_the_state_dict(tmp_path: Path, way: str, cut: str):
    ranks, path = Group(), tmp_path / "a"
    model = torch.nn.Linear(3, 3)
    saved = Stateful(averages_in(cut, ranks), state=state_of("ab", step=11))
    state = {"model": model.state_dict(), "ema": saved}
    if way == "save":
        dcp.save(state, checkpoint_id=path)
    else:
        has_writer = way == "async_save with a writer"
        writer = {"storage_writer": dcp.FileSystemWriter(path)}
        future = dcp.async_save(state, **(writer if has_writer else {"checkpoint_id": path}))
        for part in itertools.chain(*saved.averages.values()):
            part.view.fill_(-3)
        future.result()
    for other in ("columns", "flat", "last"):
        loaded = Stateful({n: blank(other, TENSORS, ranks) for n in "ab"})
        dcp.load({"model": model.state_dict(), "ema": loaded}, checkpoint_id=path)
        assert loaded.state == state_of("ab", step=11)
        loaded.check(averages_in(other, ranks))


@pytest.mark.ranks(0)
def test_a_state_dict_is_copied_and_taken_back():
    own, wanted = (Stateful(averages_in("last", Group())) for _ in range(2))
    for again in (copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))):
        kept = again(own.state_dict())
        for part in itertools.chain(*own.averages.values()):
            part.view.fill_(0)
        own.load_state_dict(kept)
        own.check(wanted.averages)
    whole = own.state_dict()
    whole["averages"] = {n: full(TENSORS, i) for i, n in enumerate("ba")}
    for values in whole["averages"].values():
        values["scale"] = values["scale"].view(1)
    own.load_state_dict(whole)
    own.check({"a": wanted.averages["b"], "b": wanted.averages["a"]})


@pytest.mark.ranks(0)
def test_a_state_dict_that_does_not_fit_changes_nothing():
    own = Stateful(averages_in("rows", Group()))
    short, shaped, unlike = (own.state_dict() for _ in range(3))
    del short["averages"]["b"]["cube"]
    shaped["averages"]["a"]["norm.weight"] = torch.zeros(8)
    unlike["state"] = torch.zeros(5, dtype=torch.uint8)
    empty = {"averages": {}, "state": own.state_dict()["state"]}
    crumbs = Stateful(averages_in("crumbs", Group())).state_dict()
    for given in ({}, crumbs, short, shaped, unlike, empty):
        with pytest.raises(CheckpointError):
            own.load_state_dict(given)
    own.check(averages_in("rows", Group()))


@pytest.mark.ranks(0)
def test_arithmetic_on_a_boxed_tensor_is_refused():
    value = Stateful(averages_in("rows", Group())).state_dict()["averages"]["a"]["cube"]
    with pytest.raises(NotImplementedError, match="gather_state_dict"):
        value + 1
    assert "boxes=[(0, 0, 0)+(3, 2, 5)]" in repr(value)


def of_torchtitan(net: nn.Module, key: str, step: object, dtype: torch.dtype) -> dict[str, Any]:
    """A checkpoint's state as torchtitan flattens it: no key for the model, names of weights."""
    averaged = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
    averaged["running"] = net.running.detach() + 1  # of its buffer_patterns
    average = {f"state.{name}.ema_params": (v * 3).to(dtype) for name, v in averaged.items()}
    return {
        **net.state_dict(),
        "optimizer": {f"state.{name}.exp_avg": value for name, value in averaged.items()},
        "lr_scheduler": {"last_epoch": 3},
        key: average,
        "train_state": {"step": step, "ntokens_seen": 512},
    }


def sharded(seed: int, *, blocks: bool) -> nn.Module:
    torch.manual_seed(seed)
    net = Net()
    for block in net.blocks if blocks else ():
        fully_shard(block)
    return fully_shard(net)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize(
    ("key", "step", "dtype"),
    [("ema_optimizer", int, torch.float32), ("ema", torch.tensor, torch.bfloat16)],
)
def test_an_average_of_torchtitan_is_loaded(key: str, step: Any, dtype: Any, tmp_path: Path):
    net = sharded(1, blocks=True)
    state = of_torchtitan(net, key, step(700), dtype)
    dcp.save(state, checkpoint_id=tmp_path)
    averaged = {name[6:-11]: whole(value).float() for name, value in state[key].items()}
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    rule = HalfLife(fraction=0.05)
    for ema, has_buffers in (
        (ShardedEMA(sharded(2, blocks=False), rule), False),
        (ShardedEMA(sharded(2, blocks=True), rule, buffers="average"), True),
        (ShardedEMA(Net(), rule, process_group=alone), False),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ema.load(tmp_path)
        assert (ema.step, ema.num_updates) == (700, 700)
        loaded = ema.gather_state_dict()
        if ema.group.rank == 0:
            for name, value in averaged.items():
                is_loaded = has_buffers or name != "running"
                assert torch.equal(loaded[name], value) == is_loaded, name
        ema.load(tmp_path, step=5000)
        assert ema.step == 5000


@pytest.mark.ranks(2)
def test_a_checkpoint_of_torchtitan_that_does_not_fit_changes_nothing(tmp_path: Path):
    state = of_torchtitan(sharded(1, blocks=True), "ema", 700, torch.float32)
    average = dict(state["ema"])
    del average["state.tiny.ema_params"]
    average["state.scale.ema_params"] = torch.ones(4)
    dcp.save({**state, "ema": average}, checkpoint_id=tmp_path / "short")
    dcp.save({**state, "ema_optimizer": average}, checkpoint_id=tmp_path / "two")
    del state["ema"]
    dcp.save(state, checkpoint_id=tmp_path / "without")
    marker = tmp_path / "marker"
    dcp.save({**state, "train_state": {"step": Call(marker)}}, checkpoint_id=tmp_path / "hostile")
    net = sharded(2, blocks=False)
    ema = ShardedEMA(net, HalfLife(fraction=0.05))
    dcp.save({"model": net, "mine": ema}, checkpoint_id=tmp_path / "own")
    before = ema.gather_state_dict()
    for name, message in {
        "short": r"does not fit: scale: .*\(4,\).*; missing: tiny",
        "two": "holds several averages",
        "own": r"load\(\{'mine': ema\}",
        "hostile": "none of the classes",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            ema.load(tmp_path / name)
        assert ema.step == 0
        for key, value in ema.gather_state_dict().items():
            assert torch.equal(value, before[key]), (name, key)
    assert not marker.exists()
    with pytest.warns(UserWarning, match="it has no average, so the weights of the model"):
        ema.load(tmp_path / "without")
    assert ema.step == 700
    wanted = {name: whole(value) for name, value in sharded(1, blocks=True).state_dict().items()}
    loaded = ema.gather_state_dict()
    for key in loaded.keys() & {"tiny", "emb.weight", "blocks.1.l2.weight"}:
        assert torch.equal(loaded[key], wanted[key]), key


class Call:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)
