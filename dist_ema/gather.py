"""Whole tensors on rank 0, bucket by bucket, from the pieces that ranks own.

Rank 0 learns once who owns which box and tells every rank what to send when. After that each byte
travels once, already in the dtype that is wanted, and rank 0 holds the tensor that it is putting
together, one bucket, and what its caller keeps.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.engines import select
from dist_ema.engines.plain import PlainEngine
from dist_ema.layout import Box, Place, Shape
from dist_ema.names import slots
from dist_ema.plan import Plan
from dist_ema.ranks import Ranks

_BUCKET_BYTES = 32 << 20  # in flight to rank 0 at a time, over all ranks
_ALIGNMENT = 16  # of a piece in a message, so that any dtype may view it


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the state dict, as rank 0 knows it."""

    fqn: str
    aliases: tuple[str, ...]
    shape: Shape
    dtype: torch.dtype  # of the average, or of the live tensor where nothing is averaged
    averaged: bool

    def dtype_as(self, wanted: torch.dtype | None) -> torch.dtype:
        """The dtype to gather in: the wanted one for floating tensors, the average's by default.

        Half-precision tensors that are not averaged are widened to fp32 by default, so that the
        state dict has one floating dtype.
        """
        if not self.dtype.is_floating_point:
            return self.dtype
        if wanted is not None:
            return wanted
        return torch.float32 if self.dtype.itemsize < 4 else self.dtype


@dataclass(frozen=True, slots=True)
class _Span:
    """Elements [start, stop) of a piece of one rank."""

    rank: int
    piece: int
    start: int
    stop: int


@dataclass(slots=True)
class _Bucket:
    """What travels together: spans of each entry, and the entries that are complete after it."""

    spans: list[tuple[int, _Span, Place]] = field(default_factory=list)  # entry number, ...
    complete: list[int] = field(default_factory=list)


class Gatherer:
    """The routes of a plan's pieces to rank 0. Its construction is collective."""

    def __init__(self, plan: Plan, values: Sequence[torch.Tensor], ranks: Ranks) -> None:
        """`values` are the averaged tensors of `plan.pieces`, for their dtypes."""
        self._ranks = ranks
        self.entries: list[Entry] = []  # on rank 0, in the order of the state dict
        pieces = [*plan.pieces, *plan.rest]
        self._pieces = [i for i, piece in enumerate(pieces) if piece.sends]
        dtype_of = {p.fragment.place.fqn: v.dtype for p, v in zip(plan.pieces, values, strict=True)}
        places = [pieces[i].fragment.place for i in self._pieces]
        mine = {p.fqn for p in places}
        told = [
            Entry(w.fqn, w.aliases, w.shape, dtype_of.get(w.fqn, w.tensor.dtype), w.fqn in dtype_of)
            for w in plan.weights
            if w.persistent and (w.fqn in mine or math.prod(w.shape) == 0 or ranks.rank == 0)
        ]
        self._dtypes = {e.fqn: e for e in told}
        self._places = places
        catalogues = ranks.gather((told, places))
        sends: list[list[list[_Span]]] = []
        self._buckets: list[_Bucket] = []
        with ranks.together():
            if ranks.rank == 0:
                owned = self._collect(catalogues)
                self._buckets = _route(self.entries, owned)
                sends = [
                    [[s for _, s, _ in bucket.spans if s.rank == r] for bucket in self._buckets]
                    for r in range(ranks.size)
                ]
        self._sends: list[list[_Span]] = ranks.scatter(sends)

    def buckets(
        self, values: Sequence[torch.Tensor], dtype: torch.dtype | None
    ) -> Generator[list[tuple[Entry, torch.Tensor]], None, None]:
        """What is complete after each bucket: whole tensors on the CPU of rank 0, else nothing.

        Every rank drives it, and gets as many lists as rank 0.

        Args:
            values: a tensor for each of the plan's `pieces` and `rest`, 1-D.
            dtype: of floating tensors; None for the average's.
        """
        sources = [values[i] for i in self._pieces]
        if self._ranks.rank != 0:
            for spans in self._sends:
                self._send(spans, sources, dtype)
                yield []
            return
        whole: dict[int, torch.Tensor] = {}
        done = 0
        try:
            for bucket in self._buckets:
                done += 1
                self._receive(bucket, sources, dtype, whole)
                complete = []
                for number in bucket.complete:
                    entry = self.entries[number]
                    tensor = whole.pop(number, None)
                    if tensor is None:
                        tensor = torch.empty(entry.shape, dtype=entry.dtype_as(dtype))
                    complete.append((entry, tensor))
                yield complete
        finally:
            # The caller stopped half-way; the others are still sending.
            for bucket in self._buckets[done:]:
                self._receive(bucket, sources, dtype, None)

    def _collect(
        self, catalogues: Sequence[tuple[list[Entry], list[Place]]]
    ) -> dict[str, list[tuple[int, int, Place]]]:
        entries: dict[str, Entry] = {}
        owned: dict[str, list[tuple[int, int, Place]]] = {}
        averaged: dict[str, Entry] = {}
        for rank, (told, places) in enumerate(catalogues):
            for entry in told:
                known = entries.setdefault(entry.fqn, entry)
                if known.shape != entry.shape:
                    raise RuntimeError(
                        f"{entry.fqn}: shape {known.shape} on rank 0, {entry.shape} on rank {rank}"
                    )
                if entry.averaged:
                    averaged[entry.fqn] = entry
            for number, place in enumerate(places):
                owned.setdefault(place.fqn, []).append((rank, number, place))
        # A rank that holds nothing of a weight cannot tell the dtype of its average.
        self.entries = [averaged.get(fqn, entry) for fqn, entry in entries.items()]
        for entry in self.entries:
            found = sum(place.numel for _, _, place in owned.get(entry.fqn, []))
            if found != math.prod(entry.shape):
                raise RuntimeError(
                    f"{entry.fqn}: ranks own {found} of {math.prod(entry.shape)} elements; the "
                    "process group does not hold the whole model (pass process_group=)"
                )
        return owned

    def _dtype_of(self, number: int, dtype: torch.dtype | None) -> torch.dtype:
        return self._dtypes[self._places[number].fqn].dtype_as(dtype)

    def _send(
        self, spans: list[_Span], sources: list[torch.Tensor], dtype: torch.dtype | None
    ) -> None:
        if not spans:
            return
        dtypes = [self._dtype_of(s.piece, dtype) for s in spans]
        starts, nbytes = _message(spans, dtypes)
        message = torch.empty(nbytes, dtype=torch.uint8, device=self._ranks.device)
        for span, start, kind in zip(spans, starts, dtypes, strict=True):
            values = sources[span.piece][span.start : span.stop]
            _typed(message, start, values.numel(), kind).copy_(values)
        dist.send(message, self._ranks.global_rank(0), group=self._ranks.group)

    def _receive(
        self,
        bucket: _Bucket,
        sources: list[torch.Tensor],
        dtype: torch.dtype | None,
        whole: dict[int, torch.Tensor] | None,
    ) -> None:
        """Take a bucket in; where `whole` is None, only let the senders go on."""
        by_rank: dict[int, list[tuple[int, _Span, Place]]] = {}
        for item in bucket.spans:
            by_rank.setdefault(item[1].rank, []).append(item)
        waiting = []
        for rank, items in by_rank.items():
            if rank == 0:
                continue
            dtypes = [self.entries[number].dtype_as(dtype) for number, _, _ in items]
            starts, nbytes = _message([span for _, span, _ in items], dtypes)
            message = torch.empty(nbytes, dtype=torch.uint8, device=self._ranks.device)
            source = self._ranks.global_rank(rank)
            work = dist.irecv(message, source, group=self._ranks.group)
            waiting.append((work, message, items, starts, dtypes))
        if whole is not None:
            for number, span, place in by_rank.get(0, []):
                run = sources[span.piece][span.start : span.stop]
                self._put(whole, number, span, place, run, dtype)
        for work, message, items, starts, dtypes in waiting:
            if work is not None:
                work.wait()
            if whole is None:
                continue
            for (number, span, place), start, kind in zip(items, starts, dtypes, strict=True):
                run = _typed(message, start, span.stop - span.start, kind)
                self._put(whole, number, span, place, run, dtype)

    def _put(
        self,
        whole: dict[int, torch.Tensor],
        number: int,
        span: _Span,
        place: Place,
        run: torch.Tensor,
        dtype: torch.dtype | None,
    ) -> None:
        entry = self.entries[number]
        if number not in whole:
            whole[number] = torch.empty(entry.shape, dtype=entry.dtype_as(dtype))
        for at, part in place.slices(span.start, span.stop):
            values = part.unflatten(run[at - span.start : at - span.start + part.numel])
            whole[number][part.box.within(Box((0,) * len(entry.shape), entry.shape))] = values


def one_by_one(
    buckets: Generator[list[tuple[Entry, torch.Tensor]], None, None],
) -> Generator[tuple[Entry, torch.Tensor], None, None]:
    """The tensors of some buckets; closing it lets the other ranks go on."""
    try:
        for bucket in buckets:
            yield from bucket
    finally:
        buckets.close()


def write_into(
    module: nn.Module,
    entries: list[Entry],
    buckets: Generator[list[tuple[Entry, torch.Tensor]], None, None],
    ranks: Ranks,
) -> None:
    """Write gathered tensors into a plain module of each rank. Collective: every rank calls it.

    Each tensor is broadcast from rank 0; all ranks hold one bucket at a time.

    Raises:
        ValueError: the module is sharded, or its names or shapes are others. On every rank.
    """
    entries = ranks.broadcast(entries)
    with ranks.together():
        if not isinstance(module, nn.Module) or not isinstance(select(module), PlainEngine):
            raise ValueError(
                f"module is a {type(module).__name__}, wanted a plain torch.nn.Module whose "
                "weights every rank holds whole; copy_to() without it writes the live weights"
            )
        targets = {slot.fqn: slot.tensor for slot in slots(module) if slot.persistent}
        shapes = {fqn: e.shape for e in entries for fqn in (e.fqn, *e.aliases)}
        wrong = [
            f"{fqn}: average has {shapes.get(fqn, 'nothing')}, module has "
            f"{tuple(targets[fqn].shape) if fqn in targets else 'nothing'}"
            for fqn in dict.fromkeys([*shapes, *targets])
            if fqn not in targets or shapes.get(fqn) != tuple(targets[fqn].shape)
        ]
        if wrong:
            raise ValueError(f"module has another layout: {'; '.join(wrong)}")
    for bucket in buckets:
        told = ranks.broadcast([(entry, tensor.dtype) for entry, tensor in bucket])
        for number, (entry, dtype) in enumerate(told):
            tensor = bucket[number][1] if bucket else torch.empty(entry.shape, dtype=dtype)
            ranks.broadcast_tensor(tensor)
            for fqn in (entry.fqn, *entry.aliases):
                targets[fqn].copy_(tensor)


def _route(
    entries: Sequence[Entry], owned: dict[str, list[tuple[int, int, Place]]]
) -> list[_Bucket]:
    """Fill buckets with spans of the entries, one entry after the other."""
    buckets = [_Bucket()]
    room = _BUCKET_BYTES
    for number, entry in enumerate(entries):
        # The narrower dtype that a caller may ask for only leaves a bucket less full.
        itemsize = max(4, entry.dtype.itemsize)
        for rank, piece, place in owned.get(entry.fqn, []):
            start = 0
            while start < place.numel:
                n = min(place.numel - start, room // itemsize)
                if n <= 0:
                    buckets.append(_Bucket())
                    room = _BUCKET_BYTES
                    continue
                span = _Span(rank, piece, start, start + n)
                buckets[-1].spans.append((number, span, place))
                start, room = start + n, room - n * itemsize
        buckets[-1].complete.append(number)
    return buckets


def _message(spans: list[_Span], dtypes: list[torch.dtype]) -> tuple[list[int], int]:
    """Where each span starts in its message, and the message's length, in bytes."""
    starts, end = [], 0
    for span, dtype in zip(spans, dtypes, strict=True):
        starts.append(end)
        nbytes = (span.stop - span.start) * dtype.itemsize
        end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def _typed(message: torch.Tensor, start: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return message[start : start + numel * dtype.itemsize].view(dtype)
