"""An average of full weights in float64, with nothing in common with the one under test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

TINY = 1e-12


class Oracle:
    """Follows the full weights recorded after each step; takes every number as a float64."""

    def __init__(
        self,
        start: Mapping[str, Tensor],
        decay: float,
        *,
        update_every: int = 1,
        start_step: int = 0,
    ) -> None:
        self.average = {name: weight.to(torch.float64) for name, weight in start.items()}
        self.step = 0
        self._decay = decay
        self._update_every = update_every
        self._start_step = start_step

    def update(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether this step changed the average."""
        self.step += 1
        since = self.step - self._start_step
        if since > 0 and since % self._update_every != 0:
            return False
        kept = 0.0 if since <= 0 else self._decay**self._update_every
        for name, average in self.average.items():
            self.average[name] = kept * average + (1.0 - kept) * weights[name].to(torch.float64)
        return True


def worst_relative_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference in any tensor, relative to the largest element of that tensor.

    NaN if any is NaN, which `max` of floats would not give.
    """
    errors = [
        (found[name].to(torch.float64) - want).abs().max() / want.abs().max().clamp_min(TINY)
        for name, want in wanted.items()
    ]
    return float(torch.stack(errors).max())


def relative_distance(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """The norm of the difference of two models over the norm of the second."""
    pairs = [(x.to(torch.float64), y.to(torch.float64)) for x, y in zip(a, b, strict=True)]
    difference = sum(float((x - y).square().sum()) for x, y in pairs)
    return (difference / sum(float(y.square().sum()) for _, y in pairs)) ** 0.5
