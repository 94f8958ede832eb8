"""Versions that are too old are refused with what was found, what is wanted and what to do."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from dist_ema import ShardedEMA
from dist_ema.core.errors import MINIMUM, require
from dist_ema.engines.dtensor import _param_groups
from tests.grid import named
from tests.worlds import World
from tests.worlds_deepspeed import WORLDS

ROOT = Path(__file__).parents[1]


def test_minimum_versions_are_those_that_pip_reads():
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["deepspeed"]]
    assert {f"{name}>={version}" for name, version in MINIMUM.items()} <= set(wanted)
    extras = project["optional-dependencies"].values()
    assert not [w for w in [*wanted, *itertools.chain(*extras)] if re.search("<|==|~", w)], "a cap"


def test_an_older_torch_is_refused_at_the_import(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    for name in [name for name in sys.modules if name.split(".")[0] == "dist_ema"]:
        monkeypatch.delitem(sys.modules, name)
    wanted = r"dist_ema needs torch 2\.8 or newer.*2\.7\.1\+cu126.*pip install 'torch>=2\.8'"
    with pytest.raises(ImportError, match=wanted):
        exec("from dist_ema import ShardedEMA", {})


@pytest.mark.ranks(2)
@pytest.mark.parametrize("world", named(WORLDS, "z1_bf16", "z3"), ids=lambda w: w.name)
def test_an_older_deepspeed_is_refused_when_the_average_is_built(world: World):
    training = world.train()
    with mock.patch("deepspeed.__version__", "0.16.3"):
        with pytest.raises(ImportError, match=r"deepspeed 0\.16\.4 or newer.*deepspeed 0\.16\.3"):
            ShardedEMA(training.model)
    ShardedEMA(training.model)


@pytest.mark.parametrize("version", ["2.8", "2.8.0+cpu", "2.10.0a0+git1", "2.15.0", "3.0"])
def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch, version: str):
    monkeypatch.setattr(torch, "__version__", version)
    require("torch")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["wait_for_unshard", "_to_sharded", "_module_info", "_cache"])
def test_a_private_name_that_is_missing_is_told_when_the_average_is_built(name: str):
    model = fully_shard(torch.nn.Linear(4, 4))
    [group] = _param_groups(model)
    owner: object = type(group)
    if name in ("_cache", "_module_info"):
        owner = parametrize if name == "_cache" else group.fsdp_params[0]
    with mock.patch.object(owner, name):
        delattr(owner, name)
        installed = re.escape(torch.__version__)
        with pytest.raises(
            RuntimeError, match=rf"{name} .*torch {installed} .*install torch 2\.8 to"
        ):
            ShardedEMA(model)
    ShardedEMA(model)
