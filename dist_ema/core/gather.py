"""Whole tensors from the pieces that ranks own, band by band.

Rank 0 learns once who owns which box, and every rank what is gathered. A band is a range of
elements of a tensor, in row-major order; each rank works out from its own boxes what it has of a
band, so a byte travels once, already in the dtype that is wanted, and the one who gathers holds two
buckets of bands beside what its caller keeps.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.core.group import Group
from dist_ema.core.holders import find_holders
from dist_ema.core.layout import (
    Box,
    Fragment,
    FragmentMeta,
    TensorMeta,
    flat_boxes,
    flat_ends,
    overlap,
    whole,
)
from dist_ema.core.names import registrations
from dist_ema.core.plan import Plan
from dist_ema.core.swap import Marks
from dist_ema.engines import select
from dist_ema.engines.engine import Weight, drop_caches
from dist_ema.engines.plain import PlainEngine

_BUCKET_BYTES = 16 << 20  # of what is put together at a time
_ALIGNMENT = 16  # of a part in a message, so that any dtype may view it


@dataclass(frozen=True, slots=True)
class Band:
    """Elements [start, start + numel) of an entry, row-major, on the one rank that gathers them."""

    entry: TensorMeta
    start: int
    values: torch.Tensor  # 1-D, on the CPU


@dataclass(frozen=True, slots=True)
class _Range:
    """Elements [start, stop) of an entry."""

    number: int  # of the entry
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Part:
    """What a piece has in common with a range: a box of it, and where that lies in the range."""

    piece: int  # of the rank that owns it
    meta: FragmentMeta
    common: Box
    outer: Box  # a box of the range that holds `common`, itself contiguous in the range
    at: int  # where `outer` starts in the range

    def read(self, source: torch.Tensor) -> torch.Tensor:
        """The values, of a piece's run."""
        return self.meta.unflatten(source)[self.common.within(self.meta.box)]

    def target(self, values: torch.Tensor) -> torch.Tensor:
        """Where they belong, in the run of a range."""
        run = values[self.at : self.at + self.outer.numel]
        return run.view(self.outer.sizes)[self.common.within(self.outer)]


Room = Callable[[TensorMeta, int, int], torch.Tensor]
"""(entry, start, stop) -> 1-D CPU tensor that a band's values are written to."""


@dataclass(frozen=True, slots=True)
class Owned:
    """A piece that a rank owns, and between which elements of its tensor, row-major, it lies."""

    rank: int
    piece: int
    meta: FragmentMeta
    first: int
    last: int


_ByFqn = dict[str, list[Owned]]


class Gatherer:
    """What there is to gather, and who owns it. Its construction is collective."""

    def __init__(
        self,
        plan: Plan,
        values: Sequence[torch.Tensor],
        buffers: Sequence[Weight],
        group: Group,
    ) -> None:
        """
        Args:
            values: the averaged tensors of `plan.fragments`, for their dtypes.
            buffers: those of the state dict that are not averaged.
        """
        self._group = group
        buffers, sent = _owned_buffers(buffers, group)
        self.rest = [*plan.rest, *sent]  # read live
        pieces = [*plan.fragments, *self.rest]
        dtype_of = {p.meta.fqn: v.dtype for p, v in zip(plan.fragments, values, strict=True)}
        metas = [(i, p.meta) for i, p in enumerate(pieces) if p.is_owner]
        mine = {meta.fqn for _, meta in metas}
        told = [
            TensorMeta(
                w.fqn,
                w.aliases,
                w.shape,
                dtype_of.get(w.fqn, w.tensor.dtype),
                w.fqn in dtype_of,
                w.problem,
            )
            for w in plan.weights
            if w.persistent and (w.fqn in mine or not w.numel or w.problem or group.rank == 0)
        ]
        told += [
            TensorMeta(w.fqn, w.aliases, w.shape, w.tensor.dtype, False, w.problem) for w in buffers
        ]
        catalogues = group.gather((told, metas))
        entries: list[TensorMeta] = []
        with group.together():
            if group.rank == 0:
                entries = _merged([told for told, _ in catalogues])
                _check_covered(entries, [metas for _, metas in catalogues])
        self.entries: list[TensorMeta] = group.broadcast(entries)  # in the order of the state dict
        self.own = _by_fqn({group.rank: metas})  # the pieces that this rank owns, by fqn
        # On rank 0 those of all.
        self._owned = _by_fqn({rank: theirs for rank, (_, theirs) in enumerate(catalogues)})

    def fqns_with(self, wanted: Callable[[TensorMeta, FragmentMeta], bool]) -> frozenset[str]:
        """The tensors of which any rank owns a piece that is wanted. Collective: every rank calls.

        Args:
            wanted: asked on rank 0.
        """
        found = [
            entry.fqn
            for entry in self.entries
            if self._group.rank == 0
            and any(wanted(entry, owned.meta) for owned in self._owned.get(entry.fqn, ()))
        ]
        return frozenset(self._group.broadcast(found))

    def bands(
        self,
        values: Sequence[torch.Tensor],
        dtype: torch.dtype | None,
        room: Room,
        *,
        only: frozenset[str] | None = None,
        spread: bool = False,
    ) -> Generator[list[Band], None, None]:
        """The bands of all entries, in order, on rank 0; none elsewhere.

        Every rank drives it and gets as many lists as the others, also if one stops half-way.

        Args:
            values: a tensor for each of the plan's `pieces` and `rest`, 1-D.
            dtype: of floating tensors; None for the average's.
            room: gives the memory for a band.
            only: the fqns to gather; all if None.
            spread: let all ranks gather bands in turn, so that each has its share.
        """
        self.refuse_unreadable(only)
        size = self._group.size if spread else 1
        owned = self._owned
        if spread:
            named = {f: pieces for f, pieces in owned.items() if only is None or f in only}
            owned = self._group.broadcast(named)
        buckets = list(self._buckets(dtype, only))
        turns = [buckets[i : i + size] for i in range(0, len(buckets), size)]
        done = 0
        try:
            for turn in turns:
                done += 1
                yield self._exchange(turn, owned, values, dtype, room)
        finally:
            # The caller stopped half-way; the others are still sending.
            for turn in turns[done:]:
                self._exchange(turn, owned, values, dtype, None)

    def refuse_unreadable(self, only: frozenset[str] | None = None) -> None:
        """Raise if the values of some entries cannot be read. On every rank, since all know them.

        Raises:
            ValueError: the tensors are named.
        """
        problems = [
            f"{e.fqn}: {e.problem}"
            for e in self.entries
            if e.problem and (only is None or e.fqn in only)
        ]
        if problems:
            raise ValueError(f"cannot be gathered: {'; '.join(problems)}")

    def _buckets(
        self, dtype: torch.dtype | None, only: frozenset[str] | None
    ) -> Iterator[list[_Range]]:
        """Ranges of the entries in order, a bucket's worth at a time."""
        bucket: list[_Range] = []
        free = _BUCKET_BYTES
        for number, entry in enumerate(self.entries):
            if only is not None and entry.fqn not in only:
                continue
            itemsize = entry.dtype_as(dtype).itemsize
            start = 0
            while True:
                n = min(entry.numel - start, free // itemsize)
                if n or not entry.numel:
                    bucket.append(_Range(number, start, start + n))
                start, free = start + n, free - n * itemsize
                if start == entry.numel:
                    break
                yield bucket
                bucket, free = [], _BUCKET_BYTES
        if bucket:
            yield bucket

    def _exchange(
        self,
        turn: Sequence[Sequence[_Range]],
        owned: _ByFqn,
        values: Sequence[torch.Tensor],
        dtype: torch.dtype | None,
        room: Room | None,
    ) -> list[Band]:
        """Let rank i have the i-th bucket of a turn; without room for it, only let it travel."""
        rank = self._group.rank
        operations: list[dist.P2POp] = []
        for to, bucket in enumerate(turn):
            parts = self._parts(bucket, self.own)[rank] if to != rank else []
            if parts:
                starts, message = self._message(bucket, parts, dtype)
                for (i, part), start in zip(parts, starts, strict=True):
                    kind = self.entries[bucket[i].number].dtype_as(dtype)
                    view = _typed(message, start, part.common.numel, kind)
                    view.view(part.common.sizes).copy_(part.read(values[part.piece]))
                operations.append(self._op(dist.isend, message, to))
        mine = turn[rank] if rank < len(turn) else []
        coming = self._parts(mine, owned)
        here = coming.pop(rank, [])
        messages = {source: self._message(mine, parts, dtype) for source, parts in coming.items()}
        operations += [self._op(dist.irecv, m, source) for source, (_, m) in messages.items()]
        waiting = dist.batch_isend_irecv(operations) if operations else []
        bands = self._room(mine, dtype, room) if room is not None else []
        if bands:
            for i, part in here:
                part.target(bands[i].values).copy_(part.read(values[part.piece]))
        for work in waiting:
            work.wait()
        if bands:
            for source, (starts, message) in messages.items():
                for (i, part), start in zip(coming[source], starts, strict=True):
                    target = part.target(bands[i].values)
                    run = _typed(message, start, part.common.numel, target.dtype)
                    target.copy_(run.view(part.common.sizes))
        return bands

    def _op(self, operation: Callable[..., object], message: torch.Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(
            operation, message, self._group.global_rank(rank), group=self._group.process_group
        )

    def _room(self, bucket: Sequence[_Range], dtype: torch.dtype | None, room: Room) -> list[Band]:
        bands = []
        for span in bucket:
            entry = self.entries[span.number]
            values = room(entry, span.start, span.stop)
            if values.shape != (span.stop - span.start,) or values.dtype != entry.dtype_as(dtype):
                raise AssertionError(f"{entry}: room of {tuple(values.shape)} {values.dtype}")
            bands.append(Band(entry, span.start, values))
        return bands

    def _parts(
        self, bucket: Sequence[_Range], owned: _ByFqn
    ) -> defaultdict[int, list[tuple[int, _Part]]]:
        """What each rank owns of a bucket, with the numbers of the ranges.

        In an order that depends on nothing but the rank's own pieces.
        """
        parts: defaultdict[int, list[tuple[int, _Part]]] = defaultdict(list)
        for i, span in enumerate(bucket):
            entry = self.entries[span.number]
            for piece in owned.get(entry.fqn, ()):
                if piece.first < span.stop and piece.last >= span.start:
                    parts[piece.rank] += [(i, part) for part in _common(entry, span, piece)]
        return parts

    def _message(
        self,
        bucket: Sequence[_Range],
        parts: Sequence[tuple[int, _Part]],
        dtype: torch.dtype | None,
    ) -> tuple[list[int], torch.Tensor]:
        """Where each part starts in its message, in bytes, and the message, to be filled."""
        starts, end = [], 0
        for i, part in parts:
            starts.append(end)
            nbytes = part.common.numel * self.entries[bucket[i].number].dtype_as(dtype).itemsize
            end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return starts, torch.empty(end, dtype=torch.uint8, device=self._group.device)


def whole_tensors(
    gatherer: Gatherer, values: Sequence[torch.Tensor], dtype: torch.dtype | None
) -> Generator[list[tuple[TensorMeta, torch.Tensor]], None, None]:
    """The tensors that each bucket completes, on rank 0. Every rank drives it."""
    made: dict[str, torch.Tensor] = {}

    def room(entry: TensorMeta, start: int, stop: int) -> torch.Tensor:
        if start == 0:
            made[entry.fqn] = torch.empty(entry.shape, dtype=entry.dtype_as(dtype))
        return made[entry.fqn].view(-1)[start:stop]

    bands = gatherer.bands(values, dtype, room)
    try:
        for bucket in bands:
            yield [
                (band.entry, made.pop(band.entry.fqn))
                for band in bucket
                if band.start + band.values.numel() == band.entry.numel
            ]
    finally:
        bands.close()


def one_by_one(
    buckets: Generator[list[tuple[TensorMeta, torch.Tensor]], None, None],
) -> Generator[tuple[TensorMeta, torch.Tensor], None, None]:
    """The tensors of some buckets; closing it lets the other ranks go on."""
    try:
        for bucket in buckets:
            yield from bucket
    finally:
        buckets.close()


def write_into(
    module: nn.Module,
    entries: list[TensorMeta],
    buckets: Generator[list[tuple[TensorMeta, torch.Tensor]], None, None],
    group: Group,
) -> None:
    """Write gathered tensors into a plain module of each rank. Collective: every rank calls it.

    Each tensor is broadcast from rank 0; all ranks hold one bucket at a time.

    Raises:
        ValueError: the module is sharded, or its names or shapes are others. On every rank.
    """
    with group.together():
        if not isinstance(module, nn.Module) or not isinstance(select(module), PlainEngine):
            raise ValueError(
                f"module is a {type(module).__name__}, wanted a plain torch.nn.Module whose "
                "weights every rank holds whole; copy_to() without it writes the live weights"
            )
        marks = Marks()
        marks.watch(module.modules())
        marks.refuse("copy_to() into a module")
        targets = {
            registration.fqn: registration.tensor
            for registration in registrations(module)
            if registration.persistent
        }
        shapes = {fqn: e.shape for e in entries for fqn in (e.fqn, *e.aliases)}
        wrong = [
            f"{fqn}: average has {shapes.get(fqn, 'nothing')}, module has "
            f"{tuple(targets[fqn].shape) if fqn in targets else 'nothing'}"
            for fqn in dict.fromkeys([*shapes, *targets])
            if fqn not in targets or shapes.get(fqn) != tuple(targets[fqn].shape)
        ]
        if wrong:
            raise ValueError(f"module has another layout: {'; '.join(wrong)}")
        unwritable = [
            fqn
            for fqn, t in targets.items()
            if t.is_meta
            or any(n > 1 and not step for n, step in zip(t.shape, t.stride(), strict=True))
        ]
        if unwritable:
            raise ValueError(
                f"module has no storage of its own for {', '.join(unwritable)}; materialise it "
                "(to_empty(device='cpu'), or clone() what was expanded)"
            )
    for bucket in buckets:
        told = group.broadcast([(entry, tensor.dtype) for entry, tensor in bucket])
        for number, (entry, dtype) in enumerate(told):
            tensor = bucket[number][1] if bucket else torch.empty(entry.shape, dtype=dtype)
            group.broadcast_tensor(tensor)
            for fqn in (entry.fqn, *entry.aliases):
                targets[fqn].copy_(tensor)
    drop_caches()


def _owned_buffers(buffers: Sequence[Weight], group: Group) -> tuple[list[Weight], list[Fragment]]:
    """The buffers that this rank tells of, and what it sends of them. Collective.

    Ranks need not agree on buffers: the first rank that has one tells and sends its own, whatever
    its shape, unless the buffer is cut over ranks.
    """
    whole_ones = [w for w in buffers if sum(f.meta.numel for f in w.fragments) == w.numel]
    cut = [w for w in buffers if w not in whole_ones]
    fragments = [f for w in cut for f in w.fragments]
    metas = [FragmentMeta(w.fqn, (), whole(())) for w in whole_ones] + [f.meta for f in fragments]
    holders = find_holders(metas, [False] * len(metas), group)
    is_first = [found[0] == group.rank for found in holders]
    own = list(itertools.compress(whole_ones, is_first))
    sent = [f for w in own for f in w.fragments]
    return own + cut, sent + list(itertools.compress(fragments, is_first[len(whole_ones) :]))


def _merged(told: Sequence[Sequence[TensorMeta]]) -> list[TensorMeta]:
    """What ranks tell of the entries, as one list in the order of the first."""
    entries: dict[str, TensorMeta] = {}
    for rank, theirs in enumerate(told):
        for entry in theirs:
            known = entries.setdefault(entry.fqn, entry)
            if known.shape != entry.shape:
                raise RuntimeError(
                    f"{entry.fqn}: shape {known.shape} on rank 0, {entry.shape} on rank {rank}"
                )
            if entry.averaged:  # a rank that holds nothing of it cannot tell its dtype
                entries[entry.fqn] = entry
    return list(entries.values())


def _check_covered(
    entries: Sequence[TensorMeta], metas: Sequence[list[tuple[int, FragmentMeta]]]
) -> None:
    found: dict[str, int] = {}
    for theirs in metas:
        for _, meta in theirs:
            found[meta.fqn] = found.get(meta.fqn, 0) + meta.numel
    for entry in entries:
        if found.get(entry.fqn, 0) != entry.numel and not entry.problem:
            raise RuntimeError(
                f"{entry.fqn}: ranks own {found.get(entry.fqn, 0)} of {entry.numel} elements; the "
                "process group does not hold the whole model (pass process_group=)"
            )


def _by_fqn(metas: Mapping[int, Sequence[tuple[int, FragmentMeta]]]) -> _ByFqn:
    """Places of pieces, by rank, told by tensor."""
    owned: _ByFqn = {}
    for rank, theirs in metas.items():
        for piece, meta in theirs:
            first, last = flat_ends(meta.box, whole(meta.shape))
            owned.setdefault(meta.fqn, []).append(Owned(rank, piece, meta, first, last))
    return owned


def _common(entry: TensorMeta, span: _Range, owned: Owned) -> Iterator[_Part]:
    """What a piece has in common with a range."""
    at = 0
    for outer in flat_boxes(entry.shape, span.start, span.stop):
        common = overlap(outer, owned.meta.box)
        if common is not None:
            yield _Part(owned.piece, owned.meta, common, outer, at)
        at += outer.numel


def _typed(message: torch.Tensor, start: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return message[start : start + numel * dtype.itemsize].view(dtype)
