"""Whole tensors from the fragments that ranks own, chunk by chunk.

When a `Gatherer` is built, rank 0 learns which rank owns which box, and every rank which tensors
there are. A chunk is a range of elements of a tensor, in row-major order. Each rank converts the
elements of a chunk that it owns to the requested dtype and sends them once. The receiver buffers
16 MiB of chunks twice: the messages and the result.
"""

from __future__ import annotations

import itertools
import mmap
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.core.engine import Engine, Weight, writable
from dist_ema.core.errors import listed
from dist_ema.core.group import Group, digest
from dist_ema.core.layout import (
    Box,
    Fragment,
    FragmentMeta,
    TensorMeta,
    collector_paused,
    flat_boxes,
    flat_ends,
    overlap,
    whole,
)
from dist_ema.core.names import Modules, as_module, registrations
from dist_ema.core.plan import Plan
from dist_ema.core.replicas import find_holders, hash_of
from dist_ema.core.swap import Marks

_BUCKET_BYTES = 16 << 20  # of chunks that are gathered at a time
_ALIGNMENT = 16  # bytes, of each part of a message, so that any dtype can view it


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements [start, start + numel) of a tensor, row-major, on the rank that gathers them."""

    tensor: TensorMeta
    start: int
    values: torch.Tensor  # 1-D, on the CPU


@dataclass(frozen=True, slots=True)
class OwnedFragment:
    """A fragment that a rank owns, and its first and last element in the row-major tensor."""

    rank: int
    index: int  # among the fragments of that rank
    meta: FragmentMeta
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Range:
    """Elements [start, stop) of a tensor, row-major, in the dtype that is wanted."""

    tensor: TensorMeta
    start: int
    stop: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Part:
    """The intersection of an owned fragment and a range of elements."""

    number: int  # of the range in its bucket
    fragment: OwnedFragment
    common: Box
    outer: Box  # a box of the range that contains `common`, itself contiguous in the range
    at: int  # where `outer` starts in the range
    dtype: torch.dtype

    def read(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The elements, from the values of the rank's fragments."""
        meta = self.fragment.meta
        return meta.unflatten(values[self.fragment.index])[self.common.within(meta.box)]

    def target(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """The same elements in the chunks of the bucket."""
        outer = chunks[self.number].values[self.at : self.at + self.outer.numel]
        return outer.view(self.outer.sizes)[self.common.within(self.outer)]


Allocate = Callable[[TensorMeta, int, int], torch.Tensor]  # (tensor, start, stop) -> 1-D, on CPU

_ByName = dict[str, list[OwnedFragment]]


class Gatherer:
    """What can be gathered, and which rank owns it. Its construction is collective."""

    @collector_paused()
    def __init__(
        self,
        plan: Plan,
        values: Sequence[torch.Tensor],
        buffers: Sequence[Weight],
        group: Group,
    ) -> None:
        """
        Args:
            values: an average, one tensor for each of `plan.fragments`; only dtypes are used.
            buffers: persistent buffers that are not averaged.
        """
        self._group = group
        buffers, owned = _owned_buffers(buffers, group)
        self.rest = [*plan.rest, *owned]  # owned here, not averaged
        fragments = [*plan.fragments, *self.rest]
        dtypes = {f.meta.fqn: v.dtype for f, v in zip(plan.fragments, values, strict=True)}
        metas = [(i, f.meta) for i, f in enumerate(fragments) if f.is_owner]
        names = {meta.fqn for _, meta in metas}
        known = [
            w
            for w in plan.weights
            if w.persistent and (w.fqn in names or not w.numel or w.problem or group.rank == 0)
        ]
        own = [
            TensorMeta(
                w.fqn,
                w.aliases,
                w.shape,
                dtypes.get(w.fqn, w.tensor.dtype),
                w.fqn in dtypes,
                w.problem,
            )
            for w in [*known, *buffers]
        ]
        reports = group.gather((own, metas))
        tensors: list[TensorMeta] = []
        with group.together():
            if group.rank == 0:
                tensors = _merge([tensors for tensors, _ in reports])
                _refuse_missing(tensors, [metas for _, metas in reports])
        self.tensors: list[TensorMeta] = group.broadcast(tensors)  # in the order of the state dict
        self.own = _by_name({group.rank: metas})  # fragments that this rank owns, by fqn
        self._owned = _by_name({rank: metas for rank, (_, metas) in enumerate(reports)})  # of all

    def scattered(self) -> frozenset[str]:
        """Names of tensors of which a rank owns more than runs of elements. Collective.

        An owned fragment of them has gaps in the row-major tensor, or another order in storage.
        """
        names = [
            fqn
            for fqn, fragments in self._owned.items()
            if any(f.meta.order or f.last - f.first + 1 != f.meta.numel for f in fragments)
        ]
        return frozenset(self._group.broadcast(names))

    def chunks(
        self,
        values: Sequence[torch.Tensor],
        dtype: torch.dtype | None,
        allocate: Allocate | None = None,
        *,
        only: frozenset[str] | None = None,
        spread: bool = False,
    ) -> Generator[list[Chunk], None, None]:
        """The chunks of all tensors, in order, on rank 0; none on other ranks.

        Every rank iterates, and gets as many lists as the others. A rank that stops early takes
        part in the remaining exchanges when the generator is closed.

        Args:
            values: 1-D, for each of the plan's `fragments` and then of `rest`.
            dtype: of floating-point tensors; None for the average's.
            allocate: gives the memory for a chunk; by default a new tensor.
            only: the tensors to gather; all if None.
            spread: let the ranks gather chunks in turn, so that each rank gets its share.
        """
        self.refuse_unreadable(only)
        size = self._group.size if spread else 1
        owned = self._owned
        if spread:
            selected = {fqn: f for fqn, f in owned.items() if only is None or fqn in only}
            owned = self._group.broadcast(selected)
        buckets = list(self._buckets(dtype, only))
        turns = [buckets[i : i + size] for i in range(0, len(buckets), size)]
        done = 0
        try:
            for turn in turns:
                done += 1
                yield self._exchange(turn, owned, values, allocate)
        finally:
            for turn in turns[done:]:  # received and discarded
                self._exchange(turn, owned, values, None)

    def refuse_unreadable(self, only: frozenset[str] | None = None) -> None:
        """Raise ValueError if the values of some tensors cannot be read. On every rank."""
        problems = [
            f"{t.fqn}: {t.problem}"
            for t in self.tensors
            if t.problem and (only is None or t.fqn in only)
        ]
        if problems:
            raise ValueError(f"cannot be gathered: {'; '.join(problems)}")

    def _buckets(
        self, dtype: torch.dtype | None, only: frozenset[str] | None
    ) -> Iterator[list[_Range]]:
        """Ranges of the tensors in order, in lists of at most `_BUCKET_BYTES`."""
        bucket: list[_Range] = []
        free = _BUCKET_BYTES
        for tensor in self.tensors:
            if only is not None and tensor.fqn not in only:
                continue
            kind = tensor.dtype_as(dtype)
            start = 0
            while True:
                n = min(tensor.numel - start, free // kind.itemsize)
                if n or not tensor.numel:
                    bucket.append(_Range(tensor, start, start + n, kind))
                start, free = start + n, free - n * kind.itemsize
                if start == tensor.numel:
                    break
                yield bucket
                bucket, free = [], _BUCKET_BYTES
        if bucket:
            yield bucket

    def _exchange(
        self,
        turn: Sequence[Sequence[_Range]],
        owned: _ByName,
        values: Sequence[torch.Tensor],
        allocate: Allocate | None,
    ) -> list[Chunk]:
        """Gather the i-th bucket of a turn on rank i."""
        group = self._group
        operations: list[dist.P2POp] = []
        for receiver, bucket in enumerate(turn):
            parts = _parts(bucket, self.own)[group.rank] if receiver != group.rank else []
            if parts:
                message, runs = _message(parts, group.device)
                for part, run in zip(parts, runs, strict=True):
                    run.copy_(part.read(values))
                operations.append(group.point_to_point(dist.isend, message, receiver))
        bucket = turn[group.rank] if group.rank < len(turn) else []
        received = _parts(bucket, owned)
        local = received.pop(group.rank, [])
        pairs: list[tuple[_Part, torch.Tensor]] = []  # what other ranks send
        for rank, parts in received.items():
            message, runs = _message(parts, group.device)
            operations.append(group.point_to_point(dist.irecv, message, rank))
            pairs += zip(parts, runs, strict=True)
        works = dist.batch_isend_irecv(operations) if operations else []
        chunks = [
            Chunk(
                r.tensor,
                r.start,
                allocate(r.tensor, r.start, r.stop)
                if allocate
                else pages(r.stop - r.start, r.dtype),
            )
            for r in bucket
        ]
        for part in local:
            part.target(chunks).copy_(part.read(values))
        for work in works:
            work.wait()
        for part, run in pairs:
            part.target(chunks).copy_(run)
        return chunks


def _parts(bucket: Sequence[_Range], owned: _ByName) -> defaultdict[int, list[_Part]]:
    """What each rank owns of a bucket, in an order that depends on the rank's fragments only."""
    parts: defaultdict[int, list[_Part]] = defaultdict(list)
    for number, span in enumerate(bucket):
        for fragment in owned.get(span.tensor.fqn, ()):
            if fragment.first >= span.stop or fragment.last < span.start:
                continue
            at = 0
            for outer in flat_boxes(span.tensor.shape, span.start, span.stop):
                common = overlap(outer, fragment.meta.box)
                if common is not None:
                    part = _Part(number, fragment, common, outer, at, span.dtype)
                    parts[fragment.rank].append(part)
                at += outer.numel
    return parts


def _message(
    parts: Sequence[_Part], device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """An uninitialized message of bytes, and the view of each part, in its dtype and shape."""
    sizes = [part.common.numel * part.dtype.itemsize for part in parts]
    padded = [-(-nbytes // _ALIGNMENT) * _ALIGNMENT for nbytes in sizes]
    message = torch.empty(sum(padded), dtype=torch.uint8, device=device)
    return message, [
        run[:nbytes].view(part.dtype).view(part.common.sizes)
        for part, nbytes, run in zip(parts, sizes, message.split(padded), strict=True)
    ]


def whole_tensors(
    gatherer: Gatherer, values: Sequence[torch.Tensor], dtype: torch.dtype | None
) -> Generator[list[tuple[TensorMeta, torch.Tensor]], None, None]:
    """The tensors that each bucket completes, on rank 0. Every rank iterates."""
    incomplete: dict[str, torch.Tensor] = {}

    def allocate(tensor: TensorMeta, start: int, stop: int) -> torch.Tensor:
        if start == 0:
            kind = tensor.dtype_as(dtype)
            incomplete[tensor.fqn] = torch.empty(tensor.shape, dtype=kind, device="cpu")
        return incomplete[tensor.fqn].view(-1)[start:stop]

    chunks = gatherer.chunks(values, dtype, allocate)
    try:
        for bucket in chunks:
            yield [
                (chunk.tensor, incomplete.pop(chunk.tensor.fqn))
                for chunk in bucket
                if chunk.start + chunk.values.numel() == chunk.tensor.numel
            ]
    finally:
        chunks.close()


def pages(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """1-D memory that the system gets back as soon as it is freed.

    malloc keeps blocks of this size that are freed by other threads, up to hundreds of MB of them.
    """
    nbytes = max(1, numel * dtype.itemsize)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)[: numel * dtype.itemsize].view(dtype)


def one_by_one(
    buckets: Generator[list[tuple[TensorMeta, torch.Tensor]], None, None],
) -> Generator[tuple[TensorMeta, torch.Tensor], None, None]:
    """The tensors of all buckets; closing it lets the other ranks continue."""
    try:
        for bucket in buckets:
            yield from bucket
    finally:
        buckets.close()


def write_into(
    given: Modules,
    tensors: list[TensorMeta],
    buckets: Generator[list[tuple[TensorMeta, torch.Tensor]], None, None],
    group: Group,
    select: Callable[[nn.Module], Engine],
) -> None:
    """Write gathered tensors into a plain module of each rank. Collective: every rank calls it.

    Each tensor is broadcast from rank 0; all ranks hold one bucket at a time.

    Raises:
        ValueError: the module is sharded, or its names, shapes or dtypes do not fit. On every rank.
    """
    with group.together():
        try:
            module = as_module(given)
            engine = select(module)
        except TypeError:
            engine = None
        if engine is None or not engine.is_plain:
            raise ValueError(
                f"module is a {type(given).__name__}, wanted a plain torch.nn.Module whose "
                "weights every rank holds whole; copy_to() without it writes the live weights"
            )
        Marks(module.modules()).refuse("copy_to() into a module")
        targets = {r.fqn: writable(r.tensor) for r in registrations(module) if r.persistent}
        averages = {n: (t.shape, t.dtype) for t in tensors for n in (t.fqn, *t.aliases)}
        own = {fqn: (tuple(t.shape), t.dtype) for fqn, t in targets.items()}
        differences = [
            f"{n}: average has {averages.get(n, 'nothing')}, module has {own.get(n, 'nothing')}"
            for n in dict.fromkeys([*averages, *own])
            if not (n in averages and n in own and averages[n][0] == own[n][0])
            or not torch.can_cast(averages[n][1], own[n][1])
        ]
        if differences:
            raise ValueError(f"module has another layout: {'; '.join(differences)}")
        unwritable = [
            fqn
            for fqn, t in targets.items()
            if t.is_meta
            or any(n > 1 and not step for n, step in zip(t.shape, t.stride(), strict=True))
        ]
        if unwritable:
            raise ValueError(
                f"module has no storage of its own for {', '.join(unwritable)}; materialise it "
                "(to_empty(device='cpu'), or clone() of expanded tensors)"
            )
    for bucket in buckets:
        metas = group.broadcast([(meta, tensor.dtype) for meta, tensor in bucket])
        for i, (meta, dtype) in enumerate(metas):
            full = bucket[i][1] if bucket else torch.empty(meta.shape, dtype=dtype, device="cpu")
            group.broadcast_tensor(full)
            for fqn in (meta.fqn, *meta.aliases):
                targets[fqn].copy_(full)
    engine.publish()


def _owned_buffers(buffers: Sequence[Weight], group: Group) -> tuple[list[Weight], list[Fragment]]:
    """The buffers that this rank reports, and their fragments that it owns. Collective.

    Ranks may have different buffers: the first rank that has one reports and owns it, whatever its
    shape, unless the buffer is sharded.
    """
    unsharded = [w for w in buffers if sum(f.meta.numel for f in w.fragments) == w.numel]
    sharded = [w for w in buffers if w not in unsharded]
    shards = [f for w in sharded for f in w.fragments]
    metas = [FragmentMeta(w.fqn, (), whole(())) for w in unsharded] + [f.meta for f in shards]
    is_owner = [holders[0] == group.rank for holders in find_holders(metas, group)]
    own = list(itertools.compress(unsharded, is_owner))
    fragments = [f for w in own for f in w.fragments]
    return own + sharded, fragments + list(itertools.compress(shards, is_owner[len(unsharded) :]))


def refuse_unequal_copies(model: nn.Module, weights: Sequence[Weight], group: Group) -> None:
    """Raise ValueError if different parts of a model differ in a tensor that both of them have.

    Ranks with the same part are assumed to hold equal values: those of one rank are gathered.
    Collective: every rank calls it. One all-gather of names, and one of hashes of such tensors.

    Args:
        weights: what is not averaged here. Replicas of averaged weights are compared anyway.
    """
    part = digest([r.fqn for r in registrations(model)])[0]
    layouts = {w.fqn: f"{w.tensor.dtype} of shape {w.shape}" for w in weights}
    reports = group.all_gather((part, layouts))
    parts_of: defaultdict[str, set[int]] = defaultdict(set)
    for number, names in reports:
        for fqn in names:
            parts_of[fqn].add(number)
    problems = _differing_texts(reports)
    if not problems and any(len(parts) > 1 for parts in parts_of.values()):
        with group.together():
            hashes = {
                f"{w.fqn}{list(f.meta.box.offsets) if len(w.fragments) > 1 else ''}": (
                    f"values of hash {hash_of([f]):x}"
                )
                for w in weights
                if len(parts_of[w.fqn]) > 1
                for f in w.fragments
            }
        problems = _differing_texts(group.all_gather((part, hashes)))
    if problems:
        raise ValueError(
            f"parts of the model have different tensors of one name: {listed(problems)}; give "
            "them names of their own, or equal values"
        )


def _differing_texts(reports: Sequence[tuple[int, Mapping[str, str]]]) -> list[str]:
    """Messages for names whose texts differ between two parts, one for each name."""
    first: dict[str, tuple[int, int, str]] = {}
    problems: dict[str, str] = {}
    for rank, (part, texts) in enumerate(reports):
        for name, text in texts.items():
            first_rank, first_part, wanted = first.setdefault(name, (rank, part, text))
            if part != first_part and text != wanted:
                both = f"{name} has {wanted} on rank {first_rank} and {text} on rank {rank}"
                problems.setdefault(name, both)
    return list(problems.values())


def _merge(reports: Sequence[Sequence[TensorMeta]]) -> list[TensorMeta]:
    """The tensors that ranks report, in the order of the first report."""
    merged: dict[str, TensorMeta] = {}
    for rank, tensors in enumerate(reports):
        for tensor in tensors:
            known = merged.setdefault(tensor.fqn, tensor)
            if known.shape != tensor.shape:
                raise RuntimeError(
                    f"{tensor.fqn}: shape {known.shape} on rank 0, {tensor.shape} on rank {rank}"
                )
            if tensor.averaged:  # a rank that holds no fragment does not know the dtype
                merged[tensor.fqn] = tensor
    return list(merged.values())


def _refuse_missing(
    tensors: Sequence[TensorMeta], owned: Sequence[Sequence[tuple[int, FragmentMeta]]]
) -> None:
    numels: defaultdict[str, int] = defaultdict(int)
    for metas in owned:
        for _, meta in metas:
            numels[meta.fqn] += meta.numel
    for tensor in tensors:
        if numels[tensor.fqn] != tensor.numel and not tensor.problem:
            raise RuntimeError(
                f"{tensor.fqn}: ranks own {numels[tensor.fqn]} of {tensor.numel} elements; the "
                "process group does not hold the whole model (pass process_group=)"
            )


def _by_name(metas_of: Mapping[int, Sequence[tuple[int, FragmentMeta]]]) -> _ByName:
    """The fragments that ranks own, by name of the tensor."""
    owned: _ByName = {}
    for rank, metas in metas_of.items():
        for index, meta in metas:
            first, last = flat_ends(meta.box, whole(meta.shape))
            owned.setdefault(meta.fqn, []).append(OwnedFragment(rank, index, meta, first, last))
    return owned
