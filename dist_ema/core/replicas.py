"""Ranks that hold the same fragments: how they split the average, and how they share it.

[Note: groups of replicas]
No process group is made here: torch promises no way to make one among some ranks only that leaves
the user's own `new_group()` calls alone. Where a group with exactly these ranks is known on all of
them, it is used; elsewhere replicas exchange the same bytes point to point in the group that holds
the model.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import xxhash

from dist_ema.core.group import Group, all_gather_single, device_for, digest, gather_chunk
from dist_ema.core.holders import Holders
from dist_ema.core.layout import Fragment

_GRAIN = 16  # elements: cuts fall on cache lines of fp32
_HASHED_ELEMENTS = 1 << 20  # at a time on an accelerator: 16 MB of scratch
_INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def forward_storage(fragment: Fragment) -> torch.Tensor:
    """The storage that the forward pass reads."""
    return fragment.forward_view


def source(fragment: Fragment) -> torch.Tensor:
    """The storage that the optimizer writes."""
    return fragment.view


def even_cuts(numel: int, num_ranks: int) -> tuple[int, ...]:
    """Where rank i's part [cuts[i], cuts[i + 1]) of a sequence starts and ends."""
    return (*(numel * i // num_ranks // _GRAIN * _GRAIN for i in range(num_ranks)), numel)


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaGroup:
    """Fragments of one dtype and device that the same ranks hold, laid end to end.

    Rank `ranks[i]` averages elements [cuts[i], cuts[i + 1]) of that sequence.
    """

    ranks: Holders
    group: Group  # the ranks that hold the model; `ranks` are counted among them
    process_group: dist.ProcessGroup | None  # a group of exactly `ranks`, if all of them know one
    number: int  # of this set among those of all ranks that are shared; -1 if it is not shared
    fragments: tuple[Fragment, ...]
    cuts: tuple[int, ...]
    _starts: list[int] = field(init=False)  # of each fragment in the sequence

    @property
    def is_shared(self) -> bool:
        return len(self.ranks) > 1

    @property
    def index(self) -> int:
        """This rank's position among `ranks`."""
        return self.ranks.index(self.group.rank)

    def __post_init__(self) -> None:
        sizes = (f.meta.numel for f in self.fragments[:-1])
        object.__setattr__(self, "_starts", [0, *itertools.accumulate(sizes)])

    def own(self) -> Iterator[Fragment]:
        """The slices that this rank averages."""
        return self._slices(self.cuts[self.index], self.cuts[self.index + 1])

    def share(self, storage: Callable[[Fragment], torch.Tensor] = forward_storage) -> None:
        """Fill the fragments' storage with what each rank wrote to that of its own slices.

        Collective among `ranks`: all-gathers of bounded chunks; each byte is sent once.

        Args:
            storage: which storage of a fragment, that which the forward pass reads by default.
        """
        if not self.is_shared:
            return
        # One dtype, but for a model that was cast in part later: the widest loses nothing.
        kinds = {storage(f).dtype for f in self.fragments}
        dtype = functools.reduce(torch.promote_types, kinds)
        longest = max(b - a for a, b in zip(self.cuts, self.cuts[1:], strict=False))
        process_group = self.process_group or self.group.process_group
        assert process_group is not None
        beside = storage(self.fragments[0]).device
        device = device_for(process_group, beside, point_to_point=self.process_group is None)
        chunk = max(1, min(longest, gather_chunk(device, len(self.ranks), dtype.itemsize)))
        own, index = torch.empty(chunk, dtype=dtype, device=device), self.index
        every = torch.empty(len(self.ranks), chunk, dtype=dtype, device=device)
        for start in range(0, longest, chunk):
            for values, part in self._chunk(index, start, chunk, own, storage):
                part.copy_(values)
            # As bytes, since no backend knows every dtype.
            self._all_gather(own.view(torch.uint8), every.view(torch.uint8))
            for i in range(len(self.ranks)):
                if i != index:
                    for values, part in self._chunk(i, start, chunk, every[i], storage):
                        values.copy_(part)

    def _all_gather(self, own: torch.Tensor, every: torch.Tensor) -> None:
        """Fill row i of `every` with what rank `ranks[i]` has in `own`. Collective."""
        if self.process_group is not None:
            all_gather_single(every.view(-1), own, group=self.process_group)
            return
        operations = []
        for rank, row in zip(self.ranks, every, strict=True):
            if rank != self.group.rank:
                peer = self.group.global_rank(rank)
                operations.append(dist.P2POp(dist.isend, own, peer, group=self.group.process_group))
                operations.append(dist.P2POp(dist.irecv, row, peer, group=self.group.process_group))
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def _slices(self, start: int, stop: int) -> Iterator[Fragment]:
        """The fragments of elements [start, stop) of the sequence."""
        if start >= stop:
            return
        for i in range(bisect.bisect_right(self._starts, start) - 1, len(self.fragments)):
            fragment, at = self.fragments[i], self._starts[i]
            if at >= stop:
                return
            yield from fragment.slices(max(0, start - at), min(fragment.meta.numel, stop - at))

    def _chunk(
        self,
        index: int,
        start: int,
        length: int,
        staging: torch.Tensor,
        storage: Callable[[Fragment], torch.Tensor],
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Storage of a chunk of one rank's slices, each with its part of the staging tensor."""
        first = self.cuts[index] + start
        last = min(self.cuts[index + 1], first + length)
        at = 0
        for fragment in self._slices(first, last):
            values = storage(fragment)
            yield values, staging[at : at + values.numel()]
            at += values.numel()


def find_replica_groups(
    held: Sequence[tuple[Fragment, Holders]], group: Group, known: Sequence[dist.ProcessGroup]
) -> tuple[tuple[ReplicaGroup, ...], int]:
    """Group fragments by who holds them, and cut each group evenly among its holders.

    Collective: every rank calls it. One all-gather of about 100 bytes a shared set.

    Args:
        known: process groups that may be used where they have the ranks of a set.

    Returns:
        The sets of this rank, and the number of shared sets on all ranks together.

    Raises:
        RuntimeError: ranks list the weights that they share in different orders. On every rank.
    """
    together: dict[tuple[Holders, str, str], list[Fragment]] = {}
    for fragment, holders in held:
        dtypes = f"{fragment.forward_view.dtype}/{fragment.view.dtype}"
        key = (holders, dtypes, fragment.forward_view.device.type)
        together.setdefault(key, []).append(fragment)
    keys = sorted(together)
    groups = group.groups_by_members(known)
    # A group is used if all members know it by one name, or else they would wait for each other.
    labels = {k: digest(k, [f.meta for f in together[k]]) for k in keys if len(k[0]) > 1}
    names = {labels[k]: (groups[k[0]].group_name if k[0] in groups else "", k[2]) for k in labels}
    reports = group.all_gather(names)
    with group.together():
        for key, label in labels.items():
            if not all(label in reports[rank] for rank in key[0]):
                raise RuntimeError(
                    f"ranks {list(key[0])} list the weights that they share in different orders; "
                    "build the model in the same way on every rank"
                )
    told = {label: {r[label] for r in reports if label in r} for label in set().union(*reports)}
    lacking = [every for every in told.values() if len(every) > 1 or not min(every)[0]]
    if any(kind != "cpu" for every in lacking for _, kind in every):
        group.connect()
    numbers = {label: i for i, label in enumerate(sorted(set().union(*reports)))}
    replica_groups = []
    for key in keys:
        holders, fragments = key[0], together[key]
        process_group, number = None, -1
        if key in labels:
            number = numbers[labels[key]]
            if len({reports[rank][labels[key]] for rank in holders}) == 1:
                process_group = groups.get(holders)
        cuts = even_cuts(sum(f.meta.numel for f in fragments), len(holders))
        replica_groups.append(
            ReplicaGroup(holders, group, process_group, number, tuple(fragments), cuts)
        )
    return tuple(replica_groups), len(numbers)


def refuse_destroyed(replica_groups: Sequence[ReplicaGroup]) -> None:
    """Raise if a group that replicas share in has been destroyed since. Local."""
    for replica_group in replica_groups:
        if replica_group.process_group is not None:
            try:
                dist.get_backend(replica_group.process_group)
            except ValueError as error:
                raise RuntimeError(
                    f"the process group of ranks {list(replica_group.ranks)}, which hold the same "
                    "weights, has been destroyed; build ShardedEMA again, without that group"
                ) from error


@torch.no_grad()
def differing(replica_groups: Sequence[ReplicaGroup], num_shared: int, group: Group) -> list[str]:
    """Names of weights whose live values are not the same bits on all ranks that hold them.

    Collective: every rank calls it. Reads the shared weights once; where they are equal, costs an
    all-reduce of two integers for each of the `num_shared` sets that ranks share.
    """
    lowest = -(1 << 63) + 1
    numbers = [lowest] * (2 * num_shared)
    for replica_group in replica_groups:
        if replica_group.is_shared:
            value = _hash(f.view for f in replica_group.fragments) >> 1
            numbers[2 * replica_group.number], numbers[2 * replica_group.number + 1] = value, -value
    maxima = group.maxima(numbers) if num_shared else []
    if all(high == -low for high, low in zip(maxima[::2], maxima[1::2], strict=True)):
        return []
    hashes = {
        (f.meta.fqn, f.meta.box): _hash([f.view])
        for replica_group in replica_groups
        if replica_group.is_shared
        for f in replica_group.fragments
    }
    first: dict[object, int] = {}
    wrong = set()
    for theirs in group.all_gather(hashes):
        for meta, value in theirs.items():
            if first.setdefault(meta, value) != value:
                wrong.add(meta[0])
    return sorted(wrong)


def _hash(values: Iterable[torch.Tensor]) -> int:
    """64 bits, signed, of the bit patterns of 1-D tensors: equal for equal bits, NaN included."""
    state = xxhash.xxh3_64()
    for tensor in values:
        tensor = torch.view_as_real(tensor).view(-1) if tensor.is_complex() else tensor
        if tensor.device.type == "cpu":
            state.update(tensor.detach().view(torch.uint8).numpy().data)
        else:
            state.update(hash_on_device(tensor).to_bytes(8, "little", signed=True))
    return state.intdigest() - (1 << 63)


def hash_on_device(values: torch.Tensor) -> int:
    """64 bits that depend on each bit and its place, computed where a 1-D tensor is."""
    bits = values.detach().view(_INTEGER_OF_WIDTH[values.element_size()])
    length = min(_HASHED_ELEMENTS, len(bits))
    weights = torch.arange(1, 2 * length, 2, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(_HASHED_ELEMENTS):
        total = total * 1000003 + (part * weights[: len(part)]).sum()
    return int(total)
