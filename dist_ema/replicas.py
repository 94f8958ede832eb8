"""Ranks that hold the same fragments: how they split the average, and how they share it."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dist_ema.holders import Holders
from dist_ema.layout import Fragment
from dist_ema.ranks import Ranks, device_for, digest, gather_chunk

_GRAIN = 16  # elements: cuts fall on cache lines of fp32


def shown(fragment: Fragment) -> torch.Tensor:
    """The storage that the forward pass reads."""
    return fragment.shown


def source(fragment: Fragment) -> torch.Tensor:
    """The storage that the optimizer writes."""
    return fragment.view


def even_cuts(numel: int, num_ranks: int) -> tuple[int, ...]:
    """Where rank i's part [cuts[i], cuts[i + 1]) of a sequence starts and ends."""
    return (*(numel * i // num_ranks // _GRAIN * _GRAIN for i in range(num_ranks)), numel)


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaSet:
    """Fragments of one dtype and device that the same ranks hold, laid end to end.

    Rank `ranks[i]` averages elements [cuts[i], cuts[i + 1]) of that sequence.
    """

    ranks: Holders
    group: dist.ProcessGroup | None  # None: this rank alone
    index: int  # this rank's position among `ranks`
    fragments: tuple[Fragment, ...]
    cuts: tuple[int, ...]
    _starts: list[int] = field(init=False)  # of each fragment in the sequence

    def __post_init__(self) -> None:
        sizes = (f.place.numel for f in self.fragments[:-1])
        object.__setattr__(self, "_starts", [0, *itertools.accumulate(sizes)])

    def own(self) -> Iterator[Fragment]:
        """The slices that this rank averages."""
        return self._slices(self.cuts[self.index], self.cuts[self.index + 1])

    def share(self, storage: Callable[[Fragment], torch.Tensor] = shown) -> None:
        """Fill the fragments' storage with what each rank wrote to that of its own slices.

        Collective among `ranks`: all-gathers of bounded chunks; each byte is sent once.

        Args:
            storage: which storage of a fragment, the shown one by default.
        """
        if self.group is None:
            return
        # One dtype, but for a model that was cast in part later: the widest loses nothing.
        kinds = {storage(f).dtype for f in self.fragments}
        dtype = functools.reduce(torch.promote_types, kinds)
        longest = max(b - a for a, b in zip(self.cuts, self.cuts[1:], strict=False))
        device = device_for(self.group, storage(self.fragments[0]).device)
        chunk = max(1, min(longest, gather_chunk(device, len(self.ranks), dtype.itemsize)))
        mine = torch.empty(chunk, dtype=dtype, device=device)
        every = torch.empty(len(self.ranks), chunk, dtype=dtype, device=device)
        for start in range(0, longest, chunk):
            for values, part in self._chunk(self.index, start, chunk, mine, storage):
                part.copy_(values)
            # As bytes, since no backend knows every dtype.
            sent, received = mine.view(torch.uint8), every.view(-1).view(torch.uint8)
            dist.all_gather_single(received, sent, group=self.group)
            for index in range(len(self.ranks)):
                if index != self.index:
                    for values, part in self._chunk(index, start, chunk, every[index], storage):
                        values.copy_(part)

    def differing(self) -> list[str]:
        """Names of weights whose live values are not the same bits on all of `ranks`.

        Collective among `ranks`: one all-reduce of a number a fragment.
        """
        if self.group is None:
            return []
        sums = [_bit_sum(f.shown) for f in self.fragments]
        order = digest([f.place for f in self.fragments])[0]
        device = device_for(self.group, self.fragments[0].shown.device)
        both = torch.tensor([*sums, order >> 1], dtype=torch.int64, device=device)
        both = torch.cat([both, -both])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        highest, lowest = both[: len(sums) + 1].tolist(), (-both[len(sums) + 1 :]).tolist()
        if highest[-1] != lowest[-1]:
            raise RuntimeError(
                f"ranks {list(self.ranks)} list the weights that they share in different orders; "
                "build the model in the same way on every rank"
            )
        pairs = zip(self.fragments, highest, lowest, strict=False)
        return [f.place.fqn for f, high, low in pairs if high != low]

    def _slices(self, start: int, stop: int) -> Iterator[Fragment]:
        """The fragments of elements [start, stop) of the sequence."""
        if start >= stop:
            return
        for i in range(bisect.bisect_right(self._starts, start) - 1, len(self.fragments)):
            fragment, at = self.fragments[i], self._starts[i]
            if at >= stop:
                return
            yield from fragment.slices(max(0, start - at), min(fragment.place.numel, stop - at))

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


def replica_sets(
    held: Sequence[tuple[Fragment, Holders]], ranks: Ranks, known: Sequence[dist.ProcessGroup]
) -> list[ReplicaSet]:
    """Group fragments by who holds them, and cut each group evenly among its holders.

    Collective: every rank calls it (new process groups are made where no known one fits).
    """
    together: dict[tuple[Holders, str, str], list[Fragment]] = {}
    for fragment, holders in held:
        dtypes = f"{fragment.shown.dtype}/{fragment.view.dtype}"
        key = (holders, dtypes, fragment.shown.device.type)
        together.setdefault(key, []).append(fragment)
    keys = sorted(together)
    groups = ranks.subgroups([holders for holders, _, _ in keys if len(holders) > 1], known)
    sets = []
    for key in keys:
        holders, fragments = key[0], together[key]
        total = sum(f.place.numel for f in fragments)
        sets.append(
            ReplicaSet(
                holders,
                groups.get(holders),
                holders.index(ranks.rank),
                tuple(fragments),
                even_cuts(total, len(holders)),
            )
        )
    return sets


def _bit_sum(values: torch.Tensor) -> int:
    """Sum of the bit patterns, as integers modulo 2**63: equal for equal values, NaN included."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = values if not values.is_complex() else torch.view_as_real(values).view(-1)
    bits = bits.view(width[bits.element_size()])
    # In parts: `sum` to a wider dtype casts all of its input first on the CPU.
    total = sum(int(part.sum(dtype=torch.int64)) for part in bits.split(1 << 19))
    return int(total) % (1 << 62)
