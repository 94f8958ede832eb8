"""An average in a checkpoint that a framework writes: where it is, and what if it is not there."""

from __future__ import annotations

from pathlib import Path

from dist_ema.checkpoint.directory import find
from dist_ema.core.errors import CheckpointError
from dist_ema.ema import ShardedEMA


def is_there(ema: ShardedEMA, path: Path) -> bool:
    """Whether any rank finds something at a path. Collective: every rank calls it."""
    return ema._group.any(find(path).exists())


def load_beside(ema: ShardedEMA, path: Path, remedy: str) -> None:
    """Load an average that belongs to a framework's checkpoint. Collective: every rank calls it.

    Args:
        remedy: what to do if the checkpoint has no average, for the message.

    Raises:
        CheckpointError: as `ShardedEMA.load` does, and if nothing is at `path`. On every rank;
            nothing has changed.
    """
    if not is_there(ema, path):
        raise CheckpointError(f"{path}: this checkpoint was saved without the average; {remedy}")
    ema.load(path)
