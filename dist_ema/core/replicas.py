"""Replicas: ranks that hold the same fragments, split the average of them, and share it.

[Note: finding replicas]
Placements do not show every replica (a weight that tensor parallelism leaves alone is replicated
over the TP axis without saying so), so ranks compare what they hold: one all-gather of 8 bytes a
fragment. For 70 billion parameters in 723 tensors on 1,024 ranks, a rank sends 6 kB and receives
6 MB, once.

[Note: groups of replicas]
No process group is created here: torch has no way to create one among some ranks that leaves the
user's own `new_group()` calls alone. A known group with exactly these ranks is used; without one,
replicas exchange the same bytes point to point in the group that holds the model.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from dist_ema.core.group import Group, all_gather_single, device_for, digest, gather_chunk
from dist_ema.core.layout import Fragment, FragmentMeta, bits

_GRAIN = 16  # elements: cuts fall on cache lines of fp32
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
    cuts: tuple[int, ...]
    _starts: list[int] = field(init=False)  # of each fragment in the sequence

    @property
    def is_shared(self) -> bool:
        return len(self.ranks) > 1

    @property
    def index(self) -> int:
        """This rank's position in `ranks`."""
        return self.ranks.index(self.group.rank)

    def __post_init__(self) -> None:
        sizes = (f.meta.numel for f in self.fragments[:-1])
        object.__setattr__(self, "_starts", [0, *itertools.accumulate(sizes)])

    def own(self) -> Iterator[Fragment]:
        """The slices that this rank averages."""
        return self._slices(self.cuts[self.index], self.cuts[self.index + 1])

    def share(self, storage: Storage = attrgetter("forward_view")) -> None:
        """Fill the storage of all fragments with what each rank wrote to its own slices.

        Collective among `ranks`: all-gathers of bounded chunks; each byte is sent once.
        """
        if not self.is_shared:
            return
        # One dtype, unless the model was cast in part later: the widest loses nothing.
        dtype = functools.reduce(torch.promote_types, {storage(f).dtype for f in self.fragments})
        longest = max(b - a for a, b in itertools.pairwise(self.cuts))
        process_group = self.process_group or self.group.process_group
        assert process_group is not None
        device = device_for(
            process_group,
            storage(self.fragments[0]).device,
            point_to_point=self.process_group is None,
        )
        chunk = max(1, min(longest, gather_chunk(device, len(self.ranks), dtype.itemsize)))
        own, index = torch.empty(chunk, dtype=dtype, device=device), self.index
        rows = torch.empty(len(self.ranks), chunk, dtype=dtype, device=device)
        for start in range(0, longest, chunk):
            for values, staged in self._chunk(index, start, own, storage):
                staged.copy_(values)
            # As bytes, since no backend supports every dtype.
            self._all_gather(own.view(torch.uint8), rows.view(torch.uint8))
            for i, row in enumerate(rows):
                if i != index:
                    for values, staged in self._chunk(i, start, row, storage):
                        values.copy_(staged)

    def _all_gather(self, own: torch.Tensor, rows: torch.Tensor) -> None:
        """Fill row i of `rows` with `own` of rank `ranks[i]`. Collective among `ranks`."""
        if self.process_group is not None:
            all_gather_single(rows.view(-1), own, group=self.process_group)
            return
        operations = []
        for rank, row in zip(self.ranks, rows, strict=True):
            if rank != self.group.rank:
                operations += [
                    self.group.point_to_point(dist.isend, own, rank),
                    self.group.point_to_point(dist.irecv, row, rank),
                ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def _slices(self, start: int, stop: int) -> Iterator[Fragment]:
        """The fragments of elements [start, stop) of the sequence."""
        if start >= stop:
            return
        for i in range(bisect.bisect_right(self._starts, start) - 1, len(self.fragments)):
            fragment, first = self.fragments[i], self._starts[i]
            if first >= stop:
                return
            yield from fragment.slices(
                max(0, start - first), min(fragment.meta.numel, stop - first)
            )

    def _chunk(
        self, index: int, start: int, staging: torch.Tensor, storage: Storage
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Storage of a chunk of rank `ranks[index]`'s slices, each with its part of `staging`."""
        first = self.cuts[index] + start
        last = min(self.cuts[index + 1], first + len(staging))
        at = 0
        for fragment in self._slices(first, last):
            values = storage(fragment)
            yield values, staging[at : at + values.numel()]
            at += values.numel()


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
    replica_groups = []
    for key in sorted(members):
        holders, fragments = key[0], tuple(members[key])
        number, process_group = -1, None
        if key in labels:
            number = numbers[labels[key]]
            if len({reports[rank][labels[key]] for rank in holders}) == 1:
                process_group = process_groups.get(holders)
        replica_groups.append(
            ReplicaGroup(
                holders,
                group,
                process_group,
                number,
                fragments,
                even_cuts(sum(f.meta.numel for f in fragments), len(holders)),
            )
        )
    return tuple(replica_groups), len(numbers)


def refuse_destroyed(replica_groups: Sequence[ReplicaGroup]) -> None:
    """Raise if a process group of replicas has been destroyed. Local."""
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
    """64 bits, signed, of the bits of masters and weights: equal for equal bits, NaN included."""
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
