"""A pass over the local values before they are saved: are they finite, and a copy if it is due."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from dist_ema.accelerator import is_accelerator
from dist_ema.checkpoint.boxed import Part

_CHUNK = {"cpu": 1 << 18}  # elements: stays in cache between copying and checking
_CHUNK_ELSEWHERE = 1 << 24  # fewer waits for the device
_ALIGNMENT = 16

# Kept from one copy to the next: fresh memory costs several times what copying to it does.
_staging: torch.Tensor | None = None


def non_finite(averages: Mapping[str, Sequence[Part]]) -> set[str]:
    """Names of the tensors that hold NaN or Inf in what this rank sends. Local."""
    found: set[str] = set()
    for parts in averages.values():
        for part in parts:
            if part.sends and not all(map(_finite, part.values.split(_chunk_of(part)))):
                found.add(part.place.fqn)
    return found


def copied(averages: Mapping[str, Sequence[Part]]) -> tuple[dict[str, list[Part]], set[str]]:
    """A copy on the CPU of what this rank sends, and which of it is not finite. Local.

    The copy is good until the next call: its memory is used again.
    """
    global _staging
    sending = {name: [p for p in parts if p.sends] for name, parts in averages.items()}
    every = [part for parts in sending.values() for part in parts]
    needed = sum(_aligned(part.values.nbytes) for part in every)
    pinned = any(is_accelerator(part.values.device) for part in every)
    if _staging is None or _staging.numel() < needed or (pinned and not _staging.is_pinned()):
        _staging = None  # before the next is made
        _staging = torch.empty(needed, dtype=torch.uint8, pin_memory=pinned)
    copies: dict[str, list[Part]] = {}
    found: set[str] = set()
    end = 0
    for name, parts in sending.items():
        copies[name] = []
        for part in parts:
            values = part.values.detach()
            own = _staging[end : end + values.nbytes].view(values.dtype)
            end += _aligned(values.nbytes)
            step = _chunk_of(part)
            for there, here in zip(own.split(step), values.split(step), strict=True):
                there.copy_(here)
                if not _finite(there):
                    found.add(part.place.fqn)
            copies[name].append(Part(part.place, own, True))
    return copies, found


def _finite(values: torch.Tensor) -> bool:
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.is_floating_point():
        return True
    # A sum is finite only if all its terms are. One that is not may have overflowed.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return math.isfinite(total.item()) or bool(values.isfinite().all())


def _chunk_of(part: Part) -> int:
    return _CHUNK.get(part.values.device.type, _CHUNK_ELSEWHERE)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
