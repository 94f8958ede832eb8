"""Code shared by the integrations."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dist_ema.checkpoint.directory import find
from dist_ema.core.errors import CheckpointError
from dist_ema.ema import ShardedEMA
from dist_ema.options import DEFAULT_NAME, EMAKeywords, EMAOptions
from dist_ema.schedule import Schedule

Decay = float | Schedule | Mapping[str, float | Schedule]

RESTART = "with missing='restart' it starts again, from the weights of the checkpoint"


def load_from(ema: ShardedEMA, path: Path) -> bool:
    """Load the average if there is one in a framework's checkpoint. Collective."""
    if there := ema.group.any(find(path).exists()):
        ema.load(path)
    return there


class AveragingCallback:
    """Base of the callbacks, which adapt the names and events of their framework."""

    def __init__(
        self, decay: Decay, options: EMAKeywords, evaluate: bool | str, missing: str, log: bool
    ) -> None:
        self._keywords: dict[str, Any] = {"decay": decay, **options}
        names = list(EMAOptions.of(**self._keywords).schedules)
        if missing not in ("raise", "restart"):
            raise ValueError(f"missing is {missing!r}, wanted 'raise' or 'restart'")
        if isinstance(evaluate, str) and evaluate not in names:
            raise ValueError(f"evaluate is {evaluate!r}, wanted one of the averages {names}")
        if not isinstance(evaluate, str) and len(names) > 1 and evaluate:
            raise ValueError(f"several averages, {names}; select one with evaluate=NAME")
        self.ema: ShardedEMA | None = None  # built when training starts
        self._trainer: Any = None
        self._evaluates, self._missing, self._logs = evaluate is not False, missing, log
        self._name = evaluate if isinstance(evaluate, str) else None
        self._is_shown, self._scale, self._drift_step = False, 0.0, -1

    def _build(self, model: nn.Module) -> ShardedEMA:
        self.ema = None  # frees the memory of an earlier one first
        self.ema, self._drift_step = ShardedEMA(model, **self._keywords), -1
        return self.ema

    def _metrics(self, *, drift: bool = False) -> dict[str, float]:
        """What loggers get: decays and updates, local; or drifts, collective, once per step."""
        ema = self.ema
        if not self._logs or ema is None or (drift and self._drift_step == ema.step):
            return {}
        prefix = {n: "ema" if ema.names == [DEFAULT_NAME] else f"ema/{n}" for n in ema.names}
        if drift:
            self._drift_step = ema.step
            return {f"{prefix[n]}/drift": ema.drift(n) for n in ema.names}
        decays = ema.decay if isinstance(ema.decay, dict) else {ema.names[0]: ema.decay}
        known = {f"{prefix[n]}/decay": d for n, d in decays.items() if d is not None}
        return {**known, "ema/updates": ema.num_updates}

    def _overflowed(self, owner: Any) -> bool:
        """Whether the owner's fp16 scaler skipped a step since the last call. A host sync."""
        scaler = getattr(owner, "scaler", None)
        before, self._scale = self._scale, 0.0 if scaler is None else float(scaler.get_scale())
        return self._scale < before  # it decreases only then

    @contextmanager
    def _showing(self) -> Iterator[None]:
        """Within the block the model computes with the average, if there is one. May be nested."""
        if self.ema is None or self._is_shown:
            yield
            return
        with self.ema.average_parameters(self._name):
            self._is_shown = True
            try:
                yield
            finally:
                self._is_shown = False

    def _report(self, problem: str) -> None:
        """Raise a `CheckpointError`, or warn if `missing` is "restart"."""
        if self._missing == "raise":
            raise CheckpointError(problem)
        warnings.warn(problem, stacklevel=3)
