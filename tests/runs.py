"""A training run with an average beside it, and the same average in float64 from full weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dist_ema import ShardedEMA
from tests.net import ALIASES, TRAINABLE
from tests.oracle import Oracle, worst_relative_error
from tests.worlds import Training, World, rank, worlds

DECAY = 0.9
EXACT = {"rtol": 0, "atol": 0}
# One step in fp32 loses at most half a unit in the last place in each of three operations.
MAX_RELATIVE_ERROR = 2e-6

# One row of each way of cutting, for claims that the cut can hardly change.
a_few_worlds = worlds("plain", "ddp-2", "fsdp2-3", "hsdp", "fsdp2_tp")


@dataclass
class Run:
    """What a run leaves: the model in training, its average, and the full weights at each step."""

    training: Training
    ema: ShardedEMA
    weights: list[dict[str, Tensor]]  # before the first step, then after each
    next_step: int = 0

    def train(self, num_steps: int) -> Run:
        """Train and average further, recording the full weights at each step."""
        for _ in range(num_steps):
            self.training.train_step(self.next_step)
            self.ema.update()
            self.weights.append(self.training.full_weights())
            self.next_step += 1
        return self

    def train_unrecorded(self) -> Run:
        """One more step with nothing but the user's own calls between it and what comes next."""
        self.training.train_step(self.next_step)
        self.ema.update()
        self.next_step += 1
        return self

    def check(self, decay: float = DECAY, **options: Any) -> None:
        """The gathered average is that of the recorded weights. Collective."""
        check_average(self.ema, self.oracle(decay, **options).average)

    def averaged_logits(self, name: str | None = None) -> Tensor:
        """What the model computes with an average. Collective."""
        with self.ema.average_parameters(name):
            return self.training.evaluate()

    def oracle(self, decay: float = DECAY, *, every: bool = False, **counting: int) -> Oracle:
        """The float64 average of the weights that train, or of every weight."""
        names = list(self.weights[0]) if every else TRAINABLE
        recorded = [{name: weights[name] for name in names} for weights in self.weights]
        oracle = Oracle(recorded[0], decay, **counting)
        for weights in recorded[1:]:
            oracle.update(weights)
        return oracle


def check_average(ema: ShardedEMA, wanted: Mapping[str, Tensor], name: str | None = None) -> None:
    """What rank 0 gathers is `wanted`, but for rounding in fp32. Collective."""
    state = ema.gather_state_dict(name)
    if rank() == 0:
        error = worst_relative_error(state, wanted)
        assert error <= MAX_RELATIVE_ERROR, error


def same(found: Any, wanted: Any) -> None:
    """Raise unless both hold the same tensors, bit for bit."""
    torch.testing.assert_close(found, wanted, **EXACT)


def to_zero(averaged: list[Tensor], live: list[Tensor], num_averaged: Any) -> None:
    """A `multi_avg_fn`: an average that does not depend on the weights, so no mix-up can hide."""
    for average in averaged:
        average.zero_()


def make_ema(training: Training, decay: Any = DECAY, **options: Any) -> ShardedEMA:
    """Build the average without the warning that bf16 weights have no fp32 master."""
    with warnings.catch_warnings():
        if training.engine.weights_dtype != torch.float32:
            warnings.simplefilter("ignore")
        return ShardedEMA(training.model, decay, **options)


def start(world: World, decay: Any = DECAY, *, seed: int = 0, **options: Any) -> Run:
    """A model of this world, its average, and its weights before the first step."""
    training = world.train(seed=seed)
    weights = training.full_weights()
    return Run(training, make_ema(training, decay, **options), [weights])


def live_state(training: Training) -> dict[str, Tensor]:
    """The live model as its state dict has it on this rank: full weights, aliases, buffers."""
    state = training.full_weights()
    state |= {alias: state[name] for alias, name in ALIASES.items()}
    return state | live_buffers(training)


def live_buffers(training: Training) -> dict[str, Tensor]:
    """Copies of all buffers of this rank, the non-persistent ones too."""
    return {name: buffer.detach().clone() for name, buffer in training.net.named_buffers()}


def lerped_tensors(run: Run) -> int:
    """How many tensors the next update passes to the operator that averages."""
    counts = []
    real = torch._foreach_lerp_

    def spy(averages: list[Tensor], live: list[Tensor], weight: Any) -> None:
        counts.append(len(averages))
        real(averages, live, weight)

    run.train_unrecorded()
    run.training.train_step(run.next_step)
    with mock.patch.object(torch, "_foreach_lerp_", spy):
        assert run.ema.update()
    return sum(counts)
