"""An average as values of `torch.distributed.checkpoint`: dcp.save({"model": ..., "ema": ema})."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dist_ema.checkpoint.boxed import BoxedTensor, at_least_1d, boxed, fill
from dist_ema.checkpoint.manifest import CheckpointError
from dist_ema.checkpoint.parsing import check_state
from dist_ema.core.layout import Fragment, TensorMeta

_STATE_BYTES = 16384  # of the counters and schedules: a tensor in a checkpoint has one size


def state_dict(
    averages: Mapping[str, Sequence[Fragment]],
    tensors: Sequence[TensorMeta],
    state: Mapping[str, Any],
    *,
    alone: bool = False,
) -> dict[str, Any]:
    """Values that `torch.distributed.checkpoint` saves, reshards and fills in place. Local.

    Tensors share the average's storage. The state is a text in a tensor of bytes, so that nothing
    has to be pickled; a 0-d tensor has shape (1,), since not every stager can copy what a rank does
    not hold otherwise.

    Args:
        alone: this process holds all of each tensor: values are plain tensors.
    """
    text = json.dumps(state, allow_nan=False).encode()
    if len(text) > _STATE_BYTES:
        raise ValueError(f"the state takes {len(text)} bytes, more than {_STATE_BYTES}: too many")
    values = {name: at_least_1d(boxed(parts, tensors)) for name, parts in averages.items()}
    if alone:
        values = {
            name: {fqn: _plain(value) for fqn, value in tensors_of.items()}
            for name, tensors_of in values.items()
        }
    padded = bytearray(text.ljust(_STATE_BYTES))
    return {"averages": values, "state": torch.frombuffer(padded, dtype=torch.uint8)}


def load_state_dict(
    given: Mapping[str, Any],
    averages: Mapping[str, Sequence[Fragment]],
    tensors: Sequence[TensorMeta],
) -> dict[str, Any]:
    """Take what `state_dict` gave, filled in place or copied, and return its state. Local.

    Raises:
        CheckpointError: it has other averages or tensors, or parts that this rank does not hold.
            Nothing has changed.
    """
    wanted = {name: at_least_1d(boxed(parts, tensors)) for name, parts in averages.items()}
    try:
        state = json.loads(bytes(given["state"].cpu().tolist()))
        saved = state["averages"]
        check_state(state, saved)
        absent = [name for name in averages if name not in saved]
        if absent:
            raise CheckpointError(
                f"has no average named {', '.join(map(repr, absent))}; it has "
                f"{', '.join(map(repr, saved))}"
            )
        pairs = [
            (f"{name}, {fqn}", value, given["averages"][name][fqn])
            for name, values in wanted.items()
            for fqn, value in values.items()
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"is no state dict of this average: {error!r}") from error
    for where, own, other in pairs:
        problem = _unlike(own, other)
        if problem:
            raise CheckpointError(f"{where}: {problem}")
    with torch.no_grad():
        for _, own, other in pairs:
            fill(own, other)
    assert isinstance(state, dict)
    return state


def _plain(value: torch.Tensor) -> torch.Tensor:
    """The one part of a tensor that is held whole, as a plain tensor on the same storage."""
    if isinstance(value, BoxedTensor) and len(value.parts) == 1:
        view = value.parts[0].view
        return view if view.shape == value.shape else value
    return value


def _unlike(own: torch.Tensor, other: object) -> str | None:
    """Why one value of a state dict cannot be filled from another."""
    if not isinstance(other, torch.Tensor):
        return f"is a {type(other).__name__}, wanted a tensor"
    if own.shape != other.shape:
        return f"has shape {tuple(other.shape)}, the model {tuple(own.shape)}"
    if isinstance(own, BoxedTensor) and isinstance(other, BoxedTensor):
        theirs = {part.meta.box for part in other.parts}
        lacking = [p.meta.box for p in own.parts if p.meta.box not in theirs]
        if lacking:
            return f"has no box at {lacking[0].offsets} of sizes {lacking[0].sizes}, this rank does"
    return None
