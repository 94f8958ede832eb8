"""Averages as whole tensors, for a checkpoint that is one file and is written by a framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ema.core.errors import CheckpointError
from dist_ema.ema import ShardedEMA


def whole(ema: ShardedEMA) -> dict[str, Any]:
    """The averages as whole tensors, and the counters, on rank 0; {} elsewhere. Collective.

    Raises:
        CheckpointError: an average holds NaN or Inf (the tensors are named). On every rank.
    """
    state = ema.state_dict()
    ema.refuse_non_finite()
    averages = {
        name: {fqn: tensor for fqn, tensor in ema.gather_tensors(name) if fqn in wanted}
        for name, wanted in state["averages"].items()
    }
    return {"averages": averages, "state": state["state"]} if any(averages.values()) else {}


def fill(ema: ShardedEMA, found: Mapping[str, Any], where: object) -> None:
    """Take what `whole` gave, from any strategy and number of ranks. Local."""
    wanted, given = ema.state_dict()["averages"], found["averages"]
    mine, theirs = (
        {f"{name}: {fqn}" for name, tensors in averages.items() for fqn in tensors}
        for averages in (wanted, given)
    )
    if mine != theirs:
        raise CheckpointError(
            f"{where}: missing: {', '.join(sorted(mine - theirs)) or 'none'}; "
            f"unexpected: {', '.join(sorted(theirs - mine)) or 'none'}"
        )
    values = {
        name: {fqn: value if value.dim() else value.view(1) for fqn, value in tensors.items()}
        for name, tensors in given.items()
    }
    ema.load_state_dict({"averages": values, "state": found["state"]})
