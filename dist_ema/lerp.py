"""The arithmetic on weights: shadow <- shadow + weight * (live - shadow), in fp32 or wider.

Planned once into batches with equal dtypes and device, then applied with a few grouped calls. Where
a dtype must change first, values pass through a staging buffer that is small enough to stay in
cache: no full-size copy is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

_STAGED_ELEMENTS = 1 << 16  # of one staging buffer: 256 KB in fp32, half a common L2 cache

Pair = tuple[torch.Tensor, torch.Tensor]  # shadow, live: 1-D, of one length


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Pairs with equal dtypes and device. Staging is None where the dtype is right already."""

    shadows: list[torch.Tensor]
    lives: list[torch.Tensor]
    staged_shadows: list[torch.Tensor] | None
    staged_lives: list[torch.Tensor] | None

    def fold(self, weight: float) -> None:
        shadows, lives = self.shadows, self.lives
        if self.staged_lives is not None:
            torch._foreach_copy_(self.staged_lives, lives)
            lives = self.staged_lives
        if self.staged_shadows is not None:
            torch._foreach_copy_(self.staged_shadows, shadows)
            shadows = self.staged_shadows
        torch._foreach_lerp_(shadows, lives, weight)
        if self.staged_shadows is not None:
            torch._foreach_copy_(self.shadows, self.staged_shadows)


class Lerp:
    """The update of a fixed list of (shadow, live) pairs. Everything here is local."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        grouped: dict[object, list[Pair]] = {}
        for shadow, live in pairs:
            if shadow.numel():
                key = (shadow.dtype, live.dtype, shadow.device, live.device)
                grouped.setdefault(key, []).append((shadow, live))
        self._batches = [batch for group in grouped.values() for batch in _batches(group)]

    def fold(self, decay: float) -> None:
        """shadow <- decay * shadow + (1 - decay) * live. No host sync, no allocation.

        A decay of 0 copies and one of 1 leaves the shadow alone, both exactly, also where values
        are not finite.
        """
        if decay == 1.0:
            return
        if decay == 0.0:
            self.copy()
            return
        for batch in self._batches:
            batch.fold(1.0 - decay)

    def copy(self) -> None:
        """shadow <- live."""
        for batch in self._batches:
            torch._foreach_copy_(batch.shadows, batch.lives)


def accumulation_dtype(shadow: torch.dtype, live: torch.dtype) -> torch.dtype:
    """The dtype in which a shadow is updated: its own, but never narrower than fp32."""
    wide = torch.promote_types(shadow, torch.float32)
    return torch.promote_types(wide, torch.complex64) if live.is_complex else wide


def squared_norms(shadow: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """‖shadow - live‖² and ‖live‖² of 1-D tensors, in float64, a chunk at a time."""
    sums = torch.zeros(2, dtype=torch.float64, device=live.device)
    wide = torch.complex128 if live.is_complex() else torch.float64
    step = 1 << 20
    for average, here in zip(shadow.split(step), live.split(step), strict=True):
        exact = here.to(wide)
        apart = average.to(wide).sub_(exact)
        norms = [torch.linalg.vector_norm(apart), torch.linalg.vector_norm(exact)]
        sums += torch.stack(norms).square()
    return sums


def _batches(pairs: list[Pair]) -> Iterator[_Batch]:
    (shadow, live) = pairs[0]
    dtype = accumulation_dtype(shadow.dtype, live.dtype)
    if shadow.dtype == dtype == live.dtype:
        shadows, lives = zip(*pairs, strict=True)
        yield _Batch(list(shadows), list(lives), None, None)
        return

    def staging(wanted: bool) -> torch.Tensor | None:
        if not wanted:
            return None
        return torch.empty(_STAGED_ELEMENTS, dtype=dtype, device=shadow.device)

    shadow_buffer, live_buffer = staging(shadow.dtype != dtype), staging(live.dtype != dtype)
    for chunk in _chunks(pairs):
        shadows, lives = zip(*chunk, strict=True)
        sizes = [s.numel() for s in shadows]
        yield _Batch(
            list(shadows),
            list(lives),
            None if shadow_buffer is None else list(shadow_buffer[: sum(sizes)].split(sizes)),
            None if live_buffer is None else list(live_buffer[: sum(sizes)].split(sizes)),
        )


def _chunks(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Cut and pack pairs into lists of at most `_STAGED_ELEMENTS` elements."""
    chunk: list[Pair] = []
    room = _STAGED_ELEMENTS
    for shadow, live in pairs:
        at = 0
        while at < shadow.numel():
            n = min(room, shadow.numel() - at)
            chunk.append((shadow[at : at + n], live[at : at + n]))
            at, room = at + n, room - n
            if room == 0:
                yield chunk
                chunk, room = [], _STAGED_ELEMENTS
    if chunk:
        yield chunk
