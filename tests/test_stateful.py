"""`torch.distributed.checkpoint` saves, reshards and loads an average like any other state."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dist_ema.checkpoint import dcp as average_dcp
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from dist_ema.core.layout import Fragment
from tests.cuts import CUTS, TENSORS, blank, differing, full, parts_of, state_of


class Stateful:
    """What `ShardedEMA` is to torch.distributed.checkpoint."""

    def __init__(self, averages, tensors=TENSORS, state=None):
        self.averages, self.tensors, self.state = averages, tensors, state or state_of(averages)

    def state_dict(self):
        return average_dcp.state_dict(self.averages, self.tensors, self.state)

    def load_state_dict(self, given):
        self.state = average_dcp.load_state_dict(given, self.averages, self.tensors)


def averages_in(cut: str, ranks: Group) -> dict[str, list[Fragment]]:
    return {n: parts_of(cut, TENSORS, full(TENSORS, i), ranks) for i, n in enumerate("ab")}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", ["save", "async_save", "async_save with a writer"])
@pytest.mark.parametrize("cut", CUTS)
def test_torch_saves_and_reshards_the_state_dict(tmp_path: Path, way: str, cut: str):
    ranks, path = Group(), tmp_path / "a"
    model = torch.nn.Linear(3, 3)
    saved = Stateful(averages_in(cut, ranks), state=state_of("ab", step=11))
    state = {"model": model.state_dict(), "ema": saved}
    if way == "save":
        dcp.save(state, checkpoint_id=path)
    else:
        target = {"checkpoint_id": path}
        if way != "async_save":
            target = {"storage_writer": dcp.FileSystemWriter(path)}
        future = dcp.async_save(state, **target)
        for part in itertools.chain(*saved.averages.values()):
            part.view.fill_(-3)
        future.result()
    for other in ("columns", "flat", "last"):
        loaded = Stateful({n: blank(other, TENSORS, ranks) for n in "ab"})
        dcp.load({"model": model.state_dict(), "ema": loaded}, checkpoint_id=path)
        assert loaded.state == state_of("ab", step=11)
        for name, parts in averages_in(other, ranks).items():
            assert not differing(loaded.averages[name], parts), (other, name)


@pytest.mark.ranks(0)
def test_a_state_dict_is_copied_and_taken_back(tmp_path: Path):
    ranks = Group()
    own = Stateful(averages_in("last", ranks))
    for again in (copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))):
        kept = again(own.state_dict())
        for part in itertools.chain(*own.averages.values()):
            part.view.fill_(0)
        own.load_state_dict(kept)
        for name, parts in averages_in("last", ranks).items():
            assert not differing(own.averages[name], parts)
    whole = own.state_dict()
    whole["averages"] = {n: full(TENSORS, i) for i, n in enumerate("ba")}
    for values in whole["averages"].values():
        values["scale"] = values["scale"].view(1)
    own.load_state_dict(whole)
    assert not differing(own.averages["a"], averages_in("last", ranks)["b"])

    before = averages_in("rows", ranks)
    other = Stateful(averages_in("rows", ranks))
    crumbs = Stateful(averages_in("crumbs", ranks)).state_dict()
    short = own.state_dict()
    del short["averages"]["b"]["cube"]
    shaped = own.state_dict()
    shaped["averages"]["a"]["norm.weight"] = torch.zeros(8)
    unlike = own.state_dict()
    unlike["state"] = torch.zeros(5, dtype=torch.uint8)
    for given in (
        {},
        crumbs,
        short,
        shaped,
        unlike,
        {"averages": {}, "state": own.state_dict()["state"]},
    ):
        with pytest.raises(CheckpointError):
            other.load_state_dict(given)
    for name, parts in before.items():
        assert not differing(other.averages[name], parts)


@pytest.mark.ranks(0)
def test_arithmetic_on_a_boxed_tensor_is_refused():
    value = Stateful(averages_in("rows", Group())).state_dict()["averages"]["a"]["cube"]
    with pytest.raises(NotImplementedError, match="gather_state_dict"):
        value + 1
    assert "boxes=[(0, 0, 0)+(3, 2, 5)]" in repr(value)
