"""The bias-corrected average, against TRL's formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_ema import BEMA, HalfLife, ShardedEMA
from dist_ema.core.errors import CheckpointError
from tests.grid import rows
from tests.net import TRAINABLE
from tests.oracle import worst_relative_error
from tests.runs import same, start
from tests.worlds import World, from_rank_0

SETTINGS = {"ema_power": 0.4, "bias_power": 0.3, "lag": 3.0, "multiplier": 0.5}


class TRL:
    """`BEMACallback` of TRL: an update every `freq` steps after step `after`, t is the raw step."""

    def __init__(self, weights: dict[str, Tensor], freq: int, after: int) -> None:
        self.freq, self.after, self.step = freq, after, 0
        self.copy(weights)

    def copy(self, weights: dict[str, Tensor]) -> None:
        self.initial = {name: weights[name].double() for name in TRAINABLE}
        self.average, self.alpha = dict(self.initial), 0.0

    def update(self, weights: dict[str, Tensor]) -> None:
        self.step += 1
        if self.step <= self.after:
            self.copy(weights)
        elif (self.step - self.after) % self.freq == 0:
            time = SETTINGS["lag"] + SETTINGS["multiplier"] * self.step
            beta, self.alpha = time ** -SETTINGS["ema_power"], time ** -SETTINGS["bias_power"]
            for name, average in self.average.items():
                self.average[name] = (1 - beta) * average + beta * weights[name].double()

    def shown(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: average + self.alpha * (weights[name].double() - self.initial[name])
            for name, average in self.average.items()
        }


@rows("plain", "ddp", "full_mixed", "fsdp2", "hsdp", "z2")
def test_the_corrected_average_is_gathered_shown_and_resumed(world: World, tmp_path: Path):
    options: dict[str, Any] = {"update_every": 2, "start_step": 1}
    run = start(world, BEMA(**SETTINGS), **options)
    oracle = TRL(run.weights[0], freq=2, after=1)
    for _ in range(6):
        run.train(1)
        oracle.update(run.weights[-1])
        state = from_rank_0(run.ema.gather_state_dict())
        assert worst_relative_error(state, oracle.shown(run.weights[-1])) <= 2e-6
    same(run.averaged_logits(), world.parallel_twin(state).evaluate())
    run.ema.save(tmp_path / "ema")
    kept = values(run.ema)
    assert len(kept) == 2 and any(not torch.equal(*pair) for pair in zip(*kept, strict=True))
    other = start(world, BEMA(**SETTINGS), seed=1, **options)
    other.ema.load(tmp_path / "ema")
    assert (other.ema.step, other.ema.decay) == (run.ema.step, run.ema.decay)
    for own, loaded in zip(kept, values(other.ema), strict=True):
        same(own, loaded)
    # The corrected values are in the checkpoint, for those who have no live weights.
    plain = start(world, 0.5, seed=1)
    with pytest.warns(UserWarning, match="was saved with"):
        plain.ema.load(tmp_path / "ema")
    loaded = from_rank_0(plain.ema.gather_state_dict())
    same({n: loaded[n] for n in TRAINABLE}, {n: state[n] for n in TRAINABLE})


def values(ema: ShardedEMA) -> list[list[Tensor]]:
    """This rank's part of the average and of the initial weights."""
    return [
        [part for tensor in tensors.values() for part in parts(tensor)]
        for tensors in ema.state_dict()["averages"].values()
    ]


def parts(tensor: Any) -> list[Tensor]:
    return [f.view for f in tensor.fragments] if hasattr(tensor, "fragments") else [tensor]


@pytest.mark.ranks(2)
def test_a_checkpoint_without_initial_weights_is_refused(tmp_path: Path):
    model = torch.nn.Linear(3, 3)
    ShardedEMA(model, 0.5).save(tmp_path / "ema")
    with pytest.raises(CheckpointError, match=r"no average named 'ema\.uncorrected'"):
        ShardedEMA(model, BEMA()).load(tmp_path / "ema")


def test_a_bema_has_no_second_module_and_no_name_twice():
    model = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="without bias correction"):
        ShardedEMA(model, BEMA(), into=torch.nn.Linear(3, 3))
    for name in ("a.initial", "a.uncorrected"):
        with pytest.raises(ValueError, match="that a BEMA keeps"):
            ShardedEMA(model, {"a": BEMA(), name: 0.5})


@pytest.mark.parametrize(("start", "every"), [(0, 1), (2, 1), (3, 4)])
def test_a_share_of_the_run_is_the_half_life_of_torchtitan(start: int, every: int):
    model = torch.nn.Linear(3, 3)
    ema = ShardedEMA(model, HalfLife(fraction=0.05), start_step=start, update_every=every)
    for step in range(1, 40):
        if ema.update() and step > start:
            n = max((step - start) // every, 1)
            assert ema.decay == pytest.approx(2 ** (-1 / (0.05 * n)), rel=1e-12)


def test_averaged_buffers_are_not_corrected():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    bema, plain = (
        ShardedEMA(model, rule, buffers="average")
        for rule in (BEMA(**SETTINGS), lambda t, delta: BEMA(**SETTINGS)(t, delta))
    )
    for _ in range(20):
        model(0.01 * torch.randn(16, 4))
        bema.update()
        plain.update()
    state, uncorrected = bema.gather_state_dict(), plain.gather_state_dict()
    assert (state["1.running_var"] > 0).all()
    same(state["1.running_var"], uncorrected["1.running_var"])
