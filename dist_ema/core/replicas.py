"""Replicas: ranks that hold the same fragments, split the average of them, and share it.

[Note: finding replicas]
Placements do not show every replica (a weight that tensor parallelism leaves alone is replicated
over the TP axis without saying so), so ranks compare what they hold: one all-gather of 8 bytes a
fragment. For 70 billion parameters in 723 tensors on 1,024 ranks, a rank sends 6 kB and receives
6 MB, once.

[Note: groups of replicas]
No process group is created here: torch has no way to create one among some ranks that leaves the
user's own `new_group()` calls alone. A known group with exactly these ranks is used; without one,
replicas exchange the same bytes by messages in the group that holds the model.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from dist_ema.core.group import (
    Group,
    all_gather_single,
    backends_of,
    device_for,
    digest,
    is_destroyed,
    message,
)
from dist_ema.core.layout import Fragment, FragmentMeta, bits

_GRAIN = 16  # elements: cuts fall on cache lines of fp32
_CHUNK_BYTES = 8 << 20  # in an exchange, over all ranks; two exchanges are in flight
_CHUNK_BYTES_OF_A_RANK = 1 << 17  # at least
_HASHED_ELEMENTS = 1 << 20  # at a time on an accelerator: 16 MB of scratch

Holders = tuple[int, ...]  # ranks, ascending
Storage = Callable[[Fragment], torch.Tensor]  # `view` or `forward_view` of a fragment


def find_holders(metas: Sequence[FragmentMeta], group: Group) -> list[Holders]:
    """The ranks that hold each of this rank's fragments, including this rank, in ascending order.

    Collective: every rank calls it. One all-gather of 8 bytes a fragment.
    """
    if group.size == 1:
        return [(0,)] * len(metas)
    own = labels_of(metas)
    rows = group.all_gather_integers(own)
    order = np.argsort(own)
    keys = own[order]
    holders: list[list[int]] = [[] for _ in metas]
    for rank, row in enumerate(rows if len(own) else []):
        positions = np.minimum(np.searchsorted(keys, row), len(keys) - 1)
        for number in order[positions[keys[positions] == row]].tolist():
            holders[number].append(rank)
    known: dict[Holders, Holders] = {}  # one object for each list: it may be as long as the world
    return [known.setdefault(ranks, ranks) for ranks in map(tuple, holders)]


def labels_of(metas: Sequence[FragmentMeta]) -> np.ndarray:
    """A 64-bit digest of each fragment's name, shape, box and order. int64."""
    digests = [digest(m.fqn, m.shape, m.box.offsets, m.box.sizes, m.order)[0] for m in metas]
    return np.array(digests, dtype=np.int64)


def even_cuts(numel: int, num_ranks: int) -> tuple[int, ...]:
    """Where rank i's slice [cuts[i], cuts[i + 1]) of a sequence starts and ends."""
    return (*(numel * i // num_ranks // _GRAIN * _GRAIN for i in range(num_ranks)), numel)


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaGroup:
    """Fragments of one dtype and device that the same ranks hold, laid end to end.

    Rank `ranks[i]` averages elements [cuts[i], cuts[i + 1]) of that sequence.
    """

    ranks: Holders  # counted within `group`
    group: Group  # the ranks that hold the model
    process_group: dist.ProcessGroup | None  # of exactly `ranks`, if all of them know one
    number: int  # among the shared replica groups of all ranks; -1 if not shared
    fragments: tuple[Fragment, ...]
    starts: tuple[int, ...]  # of each fragment in the sequence
    cuts: tuple[int, ...]

    @property
    def is_shared(self) -> bool:
        return len(self.ranks) > 1

    @property
    def index(self) -> int:
        """This rank's position in `ranks`."""
        return self.ranks.index(self.group.rank)

    def own(self) -> Iterator[Fragment]:
        """The slices that this rank averages."""
        for fragment, start, stop in self._ranges(self.index, 0, self.cuts[-1]):
            yield from fragment.slices(start, stop)

    def share(self, storage: Storage = attrgetter("forward_view")) -> None:
        """Fill the storage of all fragments with what each rank wrote to its own slices.

        Collective among `ranks`: all-gathers of bounded chunks; each byte is sent once.
        """
        if not self.is_shared:
            return
        process_group = self.process_group or self.group.process_group
        assert process_group is not None
        exchange_slices(
            lambda i, start, stop: [
                storage(fragment)[a:b] for fragment, a, b in self._ranges(i, start, stop)
            ],
            [b - a for a, b in itertools.pairwise(self.cuts)],
            # One dtype, unless the model was cast in part later: the widest loses nothing.
            functools.reduce(torch.promote_types, {storage(f).dtype for f in self.fragments}),
            storage(self.fragments[0]).device,
            process_group,
            range(len(self.ranks)) if self.process_group else self.ranks,
        )

    def _ranges(self, i: int, start: int, stop: int) -> Iterator[tuple[Fragment, int, int]]:
        """The fragments, and their elements, of [start, stop) of the slice of rank `ranks[i]`."""
        first, last = self.cuts[i] + start, min(self.cuts[i] + stop, self.cuts[i + 1])
        if first >= last:
            return
        for number in range(bisect.bisect_right(self.starts, first) - 1, len(self.fragments)):
            fragment, base = self.fragments[number], self.starts[number]
            if base >= last:
                return
            yield fragment, max(0, first - base), min(fragment.meta.numel, last - base)


def exchange_slices(
    slices: Callable[[int, int, int], list[torch.Tensor]],
    numels: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
    ranks: Sequence[int],
) -> None:
    """All-gather storage that several ranks hold, of which each has written its own slice.

    Collective among `ranks`. Each byte is sent once, in chunks; a chunk is on its way while the one
    before it is copied to its place. With gloo, or among some ranks of a group, messages go from
    storage to storage without a copy: gloo's all-gather would copy each byte three times.

    Args:
        slices: (i, start, stop) -> the storage of elements [start, stop) of slice i, as 1-D
            tensors in order; less where the slice ends before.
        numels: of slice i, which rank `ranks[i]` wrote.
        dtype: in which elements are sent.
        device: of the storage.
        ranks: within `group`.

    Raises:
        Exception: the first of this rank's copies that failed, once all chunks are exchanged: the
            other ranks do not wait, and cannot know. Or a rank died, or did not take part in time.
    """
    index, longest = ranks.index(dist.get_rank(group)), max(numels)
    sender = device_for(group, device)
    sends = len(ranks) < dist.get_world_size(group) or backends_of(group)[sender.type] == "gloo"
    if sends:
        sender = device_for(group, device, point_to_point=True)
    nbytes = max(_CHUNK_BYTES // len(ranks), _CHUNK_BYTES_OF_A_RANK)
    size = max(1, min(longest, nbytes // dtype.itemsize))
    # Two buffers in turn: rows for the data of each rank, and a row to send in an all-gather.
    staging = torch.empty(2, len(ranks) + 1, size, dtype=dtype, device=sender)
    last: tuple[list[dist.Work], list[_Row]] = [], []
    works: list[dist.Work] = []
    problems: list[Exception] = []

    def attempt(copy: Callable[[], None]) -> None:
        try:
            copy()
        except Exception as problem:
            problems.append(problem)

    def finish(works: list[dist.Work], rows: list[_Row]) -> None:
        for work in works:
            work.wait()
        for row in rows:
            attempt(row.store)

    try:
        for number, start in enumerate(range(0, longest, size)):
            buffers = staging[number % 2]
            rows = [
                _Row(slices(i, start, start + size), buffer, may_be_storage=sends)
                for i, buffer in enumerate(buffers[:-1])
            ]
            own = rows.pop(index)
            if sends:
                attempt(own.fill)
                peers = [rank for rank in ranks if rank != ranks[index]]
                works = _send(own.buffer, [row.buffer for row in rows], peers, group)
            else:
                attempt(_Row(own.pieces, buffers[-1]).fill)
                # As bytes, since no backend supports every dtype.
                gathered, sent = (
                    t.reshape(-1).view(torch.uint8) for t in (buffers[:-1], buffers[-1])
                )
                works = [all_gather_single(gathered, sent, group=group, async_op=True)]
            finish(*last)
            last = works, rows
        finish(*last)
    except BaseException:  # a rank died: nothing may be written to the storage after this call
        for work in [*last[0], *works]:
            with suppress(Exception):
                work.wait()
        raise
    if problems:
        raise problems[0]


class _Row:
    """A chunk of a slice: its storage, and the buffer that is sent or received."""

    def __init__(
        self, pieces: list[torch.Tensor], staging: torch.Tensor, *, may_be_storage: bool = False
    ) -> None:
        kinds = [(piece.dtype, piece.device) for piece in pieces]
        self.is_storage = may_be_storage and kinds == [(staging.dtype, staging.device)]
        numel = sum(piece.numel() for piece in pieces)
        self.pieces, self.buffer = pieces, pieces[0] if self.is_storage else staging[:numel]

    def fill(self) -> None:
        """Copy the storage to the buffer."""
        for piece, part in self._pairs():
            part.copy_(piece)

    def store(self) -> None:
        """Copy the buffer to the storage; autograd notices the write."""
        if self.is_storage:
            torch.autograd.graph.increment_version(self.pieces)
        for piece, part in self._pairs():
            piece.copy_(part)

    def _pairs(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        if self.is_storage:
            return ()
        parts = self.buffer.split([piece.numel() for piece in self.pieces])
        return zip(self.pieces, parts, strict=True)


def _send(
    own: torch.Tensor,
    received: Sequence[torch.Tensor],
    peers: Sequence[int],
    group: dist.ProcessGroup,
) -> list[dist.Work]:
    """Exchange messages with some ranks of a process group, as bytes."""
    operations = [
        message(operation, buffer.view(torch.uint8), group, peer)
        for buffer_of_peer, peer in zip(received, peers, strict=True)
        for operation, buffer in ((dist.isend, own), (dist.irecv, buffer_of_peer))
        if buffer.numel()
    ]
    return dist.batch_isend_irecv(operations) if operations else []


def find_replica_groups(
    held: Sequence[tuple[Fragment, Holders]], group: Group, known: Sequence[dist.ProcessGroup]
) -> tuple[tuple[ReplicaGroup, ...], int]:
    """Group fragments by the ranks that hold them, and cut each group evenly among these ranks.

    Collective: every rank calls it. One all-gather of about 100 bytes a shared replica group.

    Args:
        known: process groups that may be used where they have the ranks of a replica group.

    Returns:
        The replica groups of this rank, and the number of shared ones on all ranks together.

    Raises:
        RuntimeError: ranks list the weights that they share in different orders. On every rank.
    """
    members: dict[tuple[Holders, str, str], list[Fragment]] = {}
    for fragment, holders in held:
        dtypes = f"{fragment.forward_view.dtype}/{fragment.view.dtype}"
        key = (holders, dtypes, fragment.forward_view.device.type)
        members.setdefault(key, []).append(fragment)
    process_groups = group.groups_by_members(known)
    # A process group is used if all members know it by one name: else they wait for each other.
    labels = {k: digest(k, [f.meta for f in members[k]]) for k in members if len(k[0]) > 1}
    own = {
        label: (process_groups[key[0]].group_name if key[0] in process_groups else "", key[2])
        for key, label in labels.items()
    }
    reports = group.all_gather(own)
    with group.together():
        for key, label in labels.items():
            if not all(label in reports[rank] for rank in key[0]):
                raise RuntimeError(
                    f"ranks {list(key[0])} list the weights that they share in different orders "
                    "or with different dtypes; build the model (and masters=) in the same way on "
                    "every rank"
                )
    names: dict[tuple[int, int], set[tuple[str, str]]] = {}
    for report in reports:
        for label, name_and_device in report.items():
            names.setdefault(label, set()).add(name_and_device)
    nameless = [pairs for pairs in names.values() if len(pairs) > 1 or not min(pairs)[0]]
    if any(device != "cpu" for pairs in nameless for _, device in pairs):
        group.connect()
    numbers = {label: i for i, label in enumerate(sorted(names))}

    def replica_group(key: tuple[Holders, str, str]) -> ReplicaGroup:
        ranks, fragments, label = key[0], tuple(members[key]), labels.get(key)
        is_known = label is not None and len({reports[rank][label] for rank in ranks}) == 1
        *starts, numel = itertools.accumulate((f.meta.numel for f in fragments), initial=0)
        return ReplicaGroup(
            ranks,
            group,
            process_groups.get(ranks) if is_known else None,
            -1 if label is None else numbers[label],
            fragments,
            tuple(starts),
            even_cuts(numel, len(ranks)),
        )

    return tuple(map(replica_group, sorted(members))), len(numbers)


def refuse_destroyed(replica_groups: Sequence[ReplicaGroup]) -> None:
    """Raise if a process group of replicas has been destroyed. Local."""
    for replica_group in replica_groups:
        if is_destroyed(replica_group.process_group):
            raise RuntimeError(
                f"the process group of ranks {list(replica_group.ranks)}, which hold the same "
                "weights, has been destroyed; build ShardedEMA again, without that group"
            )


@torch.no_grad()
def differing(replica_groups: Sequence[ReplicaGroup], num_shared: int, group: Group) -> list[str]:
    """Names of weights whose live values are not the same bits on all ranks that hold them.

    Collective: every rank calls it. Reads the shared weights once; where they are equal, costs an
    all-reduce of two integers for each of the `num_shared` replica groups.
    """
    shared = [g for g in replica_groups if g.is_shared]
    numbers = [1 - (1 << 63)] * (2 * num_shared)
    for replica_group in shared:
        value, at = hash_of(replica_group.fragments) >> 1, 2 * replica_group.number
        numbers[at : at + 2] = value, -value
    maxima = group.maxima(numbers) if num_shared else []
    if all(high == -low for high, low in zip(maxima[::2], maxima[1::2], strict=True)):
        return []
    hashes = {(f.meta.fqn, f.meta.box): hash_of([f]) for g in shared for f in g.fragments}
    first: dict[tuple[str, object], int] = {}
    return sorted(
        {
            box[0]
            for report in group.all_gather(hashes)
            for box, value in report.items()
            if first.setdefault(box, value) != value
        }
    )


def hash_of(fragments: Iterable[Fragment]) -> int:
    """A signed 64-bit hash of masters and weights. Equal bits have equal hashes, NaN included."""
    state = xxhash.xxh3_64()
    tensors = ([f.view] if f.in_place else [f.view, f.forward_view] for f in fragments)
    for tensor in itertools.chain.from_iterable(tensors):
        tensor = torch.view_as_real(tensor).view(-1) if tensor.is_complex() else tensor
        if tensor.device.type == "cpu":
            state.update(tensor.detach().view(torch.uint8).numpy().data)
        else:
            state.update(hash_on_device(tensor).to_bytes(8, "little", signed=True))
    return state.intdigest() - (1 << 63)


def hash_on_device(values: torch.Tensor) -> int:
    """64 bits that depend on each bit of a 1-D tensor and its position, computed on its device."""
    integers = bits(values)
    length = min(_HASHED_ELEMENTS, len(integers))
    weights = torch.arange(1, 2 * length, 2, device=integers.device)
    total = torch.zeros((), dtype=torch.int64, device=integers.device)
    for chunk in integers.split(_HASHED_ELEMENTS):
        total = total * 1000003 + (chunk * weights[: len(chunk)]).sum()
    return int(total)
