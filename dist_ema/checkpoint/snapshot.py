"""A pass over the local values before they are saved: are they finite, and a copy if it is due."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from dist_ema.core.accelerator import is_accelerator
from dist_ema.core.layout import Fragment

_CHUNK = {"cpu": 1 << 18}  # elements: stays in cache between copying and checking
_CHUNK_ELSEWHERE = 1 << 24  # fewer waits for the device
_ALIGNMENT = 16

# Kept from one copy to the next: fresh memory costs several times what copying to it does.
_staging: torch.Tensor | None = None


def non_finite(averages: Mapping[str, Sequence[Fragment]]) -> set[str]:
    """Names of the tensors that hold NaN or Inf in what this rank sends. Local."""
    found: set[str] = set()
    for parts in averages.values():
        for part in parts:
            if part.is_owner and not all(map(_finite, part.view.split(_chunk_of(part)))):
                found.add(part.meta.fqn)
    return found


def copied(
    averages: Mapping[str, Sequence[Fragment]],
) -> tuple[dict[str, list[Fragment]], set[str]]:
    """A copy on the CPU of what this rank sends, and which of it is not finite. Local.

    The copy is good until the next call: its memory is used again.
    """
    global _staging
    sending = {name: [p for p in parts if p.is_owner] for name, parts in averages.items()}
    every = [part for parts in sending.values() for part in parts]
    needed = sum(_aligned(part.view.nbytes) for part in every)
    pinned = any(is_accelerator(part.view.device) for part in every)
    if _staging is None or _staging.numel() < needed or (pinned and not _staging.is_pinned()):
        _staging = None  # before the next is made
        _staging = torch.empty(needed, dtype=torch.uint8, pin_memory=pinned)
    copies: dict[str, list[Fragment]] = {}
    found: set[str] = set()
    end = 0
    for name, parts in sending.items():
        copies[name] = []
        for part in parts:
            values = part.view.detach()
            own = _staging[end : end + values.nbytes].view(values.dtype)
            end += _aligned(values.nbytes)
            step = _chunk_of(part)
            for there, here in zip(own.split(step), values.split(step), strict=True):
                there.copy_(here)
                if not _finite(there):
                    found.add(part.meta.fqn)
            copies[name].append(Fragment(part.meta, own, is_owner=True))
    return copies, found


def _finite(values: torch.Tensor) -> bool:
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.is_floating_point():
        return True
    # A sum is finite only if all its terms are. One that is not may have overflowed.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return math.isfinite(total.item()) or bool(values.isfinite().all())


def _chunk_of(part: Fragment) -> int:
    return _CHUNK.get(part.view.device.type, _CHUNK_ELSEWHERE)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
