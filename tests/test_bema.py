"""The bias-corrected average, against TRL's formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_ema import BEMA, HalfLife, ShardedEMA
from tests import worlds_deepspeed
from tests.net import TRAINABLE
from tests.oracle import worst_relative_error
from tests.runs import same, start
from tests.worlds import WORLDS, World, from_rank_0
from tests.grid import rows

SETTINGS = {"ema_power": 0.4, "bias_power": 0.3, "lag": 3.0, "multiplier": 0.5}
ROWS = [*WORLDS, *worlds_deepspeed.WORLDS]


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


@rows(ROWS, "plain", "ddp", "fsdp1", "fsdp2", "zero2")
@pytest.mark.parametrize(("freq", "after"), [(1, 0), (3, 2)])
def test_the_corrected_average_is_gathered_shown_and_resumed(
    world: World, freq: int, after: int, tmp_path: Path
):
    options: dict[str, Any] = {"update_every": freq, "start_step": after}
    run = start(world, BEMA(**SETTINGS), **options)
    oracle = TRL(run.training.full_weights(), freq, after)
    for i in range(9):
        run.train(1, first=i)
        weights = run.training.full_weights()
        oracle.update(weights)
        state = from_rank_0(run.ema.gather_state_dict())
        assert worst_relative_error(state, oracle.shown(weights)) <= 2e-6
        if i == 5:
            run.ema.save(tmp_path / "ema")
    same(run.averaged_logits(), world.parallel_twin(state).evaluate())
    run.ema.export(tmp_path / "export")
    run.ema.reset()
    run.ema.load(tmp_path / "ema")
    again = start(world, BEMA(**SETTINGS), **options)
    again.ema.load(tmp_path / "ema")
    assert again.ema.step == run.ema.step == 6
    for kept, other in zip(values(run.ema), values(again.ema), strict=True):
        assert torch.equal(kept, other)


def values(ema: ShardedEMA) -> list[Tensor]:
    """The average and the initial weights of this rank."""
    return [f.view for each in ema.state_dict()["averages"].values() for f in fragments(each)]


def fragments(tensors: dict[str, Any]) -> list[Any]:
    return [f for tensor in tensors.values() for f in getattr(tensor, "fragments", ())]
