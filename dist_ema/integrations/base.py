"""What the integrations share: options, the build, overflowed steps, evaluation and resuming."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dist_ema.checkpoint.directory import find
from dist_ema.checkpoint.manifest import CheckpointError
from dist_ema.ema import ShardedEMA
from dist_ema.options import EMAOptions
from dist_ema.schedule import Schedule

if TYPE_CHECKING:
    from dist_ema.options import EMAKeywords

Decay = float | Schedule | Mapping[str, float | Schedule]


def is_there(ema: ShardedEMA, path: Path) -> bool:
    """Whether any rank finds something at a path. Collective: every rank calls it."""
    return ema.group.any(find(path).exists())


class AveragingCallback:
    """Base of the callbacks, which adapt the names and events of their framework.

    Args:
        options: the keyword-only arguments of `ShardedEMA`.
        needs_name: whether one of several averages must be named even without evaluation.

    Raises:
        ValueError, TypeError: an argument is out of range, with the text of `ShardedEMA`.
    """

    def __init__(
        self,
        decay: Decay,
        options: EMAKeywords,
        *,
        evaluate: bool | str,
        missing: str,
        needs_name: bool = False,
    ) -> None:
        self._keywords: dict[str, Any] = {"decay": decay, **options}
        names = list(EMAOptions.of(**self._keywords).schedules)
        if missing not in ("raise", "restart"):
            raise ValueError(f"missing is {missing!r}, wanted 'raise' or 'restart'")
        if isinstance(evaluate, str) and evaluate not in names:
            raise ValueError(f"evaluate is {evaluate!r}, wanted one of the averages {names}")
        if not isinstance(evaluate, str) and len(names) > 1 and (evaluate or needs_name):
            raise ValueError(
                f"there are several averages, {names}; say by evaluate= which is meant"
            )
        self.ema: ShardedEMA | None = None  # built when training starts
        self._evaluates = evaluate is not False
        self._name = evaluate if isinstance(evaluate, str) else None
        self._missing = missing
        self._is_shown = False
        self._scale = 0.0

    def _build(self, model: nn.Module) -> ShardedEMA:
        self.ema = None  # frees the memory of an earlier one first
        self.ema = ShardedEMA(model, **self._keywords)
        return self.ema

    def _overflowed(self, scaler: Any) -> bool:
        """Whether gradients overflowed since the last call, so that the step was skipped.

        The scale of an fp16 gradient scaler decreases only then. Reading it is a host sync.
        """
        before, self._scale = self._scale, 0.0 if scaler is None else float(scaler.get_scale())
        return self._scale < before

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

    def _refuse_missing(self, path: Path, problem: str) -> None:
        """Raise a `CheckpointError`, or warn if `missing` is "restart". `problem` says why."""
        if self._missing == "raise":
            raise CheckpointError(
                f"{path}: {problem}; resume from a checkpoint that has it, or build EMACallback "
                "with missing='restart' to start from the weights of the checkpoint"
            )
        warnings.warn(
            f"{path}: {problem}; it starts again: the average starts from the weights of the "
            "checkpoint",
            stacklevel=3,
        )
