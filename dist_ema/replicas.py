"""Ranks that hold the same fragments: who they are, how they split the average, how they share it.

[Note: finding replicas]
Placements do not show every replica (a weight that tensor parallelism leaves alone is replicated
over the TP axis, and says nothing of it), so ranks compare what they hold. Each fragment's digest
goes to one home rank, chosen by the digest, which answers with the list of holders. A rank sends
and receives 16 bytes a fragment and a few more for the answer, however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_ema.layout import Fragment, Place
from dist_ema.ranks import Ranks, device_for, digest

_CHUNK_BYTES = 32 << 20  # staging of an all-gather, over all ranks
_GRAIN = 16  # elements: cuts fall on cache lines of fp32

Holders = tuple[int, ...]


def shown(fragment: Fragment) -> torch.Tensor:
    """The storage that the forward pass reads."""
    return fragment.shown


def source(fragment: Fragment) -> torch.Tensor:
    """The storage that the optimizer writes."""
    return fragment.view


def find_holders(places: Sequence[Place], ranks: Ranks) -> list[Holders]:
    """The ranks that hold each of this rank's places, itself included, in rising order.

    Collective: every rank calls it. Two all-to-alls of about 24 bytes a place.
    """
    if ranks.size == 1:
        return [(0,)] * len(places)
    keys = [digest(p.fqn, p.shape, p.box.offsets, p.box.sizes, p.order) for p in places]
    asked: list[list[int]] = [[] for _ in range(ranks.size)]
    for at, (low, _high) in enumerate(keys):
        asked[low % ranks.size].append(at)
    questions = [
        torch.tensor([word for at in ats for word in keys[at]], dtype=torch.int64) for ats in asked
    ]
    holders_of: dict[tuple[int, int], list[int]] = {}
    received = [_pairs(row.tolist()) for row in ranks.exchange(questions)]
    for rank, pairs in enumerate(received):
        for pair in pairs:
            holders_of.setdefault(pair, []).append(rank)
    answers = ranks.exchange([_answer([holders_of[p] for p in pairs]) for pairs in received])
    holders: list[Holders] = [()] * len(places)
    for ats, row in zip(asked, answers, strict=True):
        for at, found in zip(ats, _read_answer(row.tolist(), len(ats)), strict=True):
            holders[at] = found
    return holders


def _pairs(words: list[int]) -> list[tuple[int, int]]:
    return list(zip(words[::2], words[1::2], strict=True))


def _answer(lists: list[list[int]]) -> torch.Tensor:
    """Each distinct list once, then the number of the list of each question."""
    distinct: dict[tuple[int, ...], int] = {}
    numbers = [distinct.setdefault(tuple(holders), len(distinct)) for holders in lists]
    words = [len(distinct)]
    for holders in distinct:
        words += [len(holders), *holders]
    return torch.tensor(words + numbers, dtype=torch.int64)


def _read_answer(words: list[int], num_questions: int) -> list[Holders]:
    at, distinct = 1, []
    for _ in range(words[0]):
        distinct.append(tuple(words[at + 1 : at + 1 + words[at]]))
        at += 1 + words[at]
    return [distinct[number] for number in words[at : at + num_questions]]


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
        like = storage(self.fragments[0])
        longest = max(b - a for a, b in zip(self.cuts, self.cuts[1:], strict=False))
        chunk = max(1, min(longest, _CHUNK_BYTES // (like.element_size() * len(self.ranks))))
        # Bytes, since no backend knows every dtype.
        device = device_for(self.group, like.device)
        mine = torch.empty(chunk * like.element_size(), dtype=torch.uint8, device=device)
        every = torch.empty(len(self.ranks) * mine.numel(), dtype=torch.uint8, device=device)
        rows = every.view(len(self.ranks), -1)
        for start in range(0, longest, chunk):
            for values, part in self._chunk(self.index, start, chunk, mine, storage):
                part.copy_(values)
            dist.all_gather_single(every, mine, group=self.group)
            for index in range(len(self.ranks)):
                if index != self.index:
                    for values, part in self._chunk(index, start, chunk, rows[index], storage):
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
        at = 0
        for fragment in self.fragments:
            n = fragment.place.numel
            if at < stop and at + n > start:
                yield from fragment.slices(max(0, start - at), min(n, stop - at))
            at += n

    def _chunk(
        self,
        index: int,
        start: int,
        length: int,
        staging: torch.Tensor,
        storage: Callable[[Fragment], torch.Tensor],
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Storage of a chunk of one rank's slices, each with its part of the staging bytes."""
        first = self.cuts[index] + start
        last = min(self.cuts[index + 1], first + length)
        at = 0
        for fragment in self._slices(first, last):
            values = storage(fragment)
            nbytes = values.numel() * values.element_size()
            yield values, staging[at : at + nbytes].view(values.dtype)
            at += nbytes


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
    sets = []
    for key in sorted(together):
        holders, fragments = key[0], together[key]
        alone = len(holders) == 1
        total = sum(f.place.numel for f in fragments)
        cuts = [total * i // len(holders) // _GRAIN * _GRAIN for i in range(len(holders))]
        sets.append(
            ReplicaSet(
                holders,
                None if alone else ranks.subgroup(holders, known),
                holders.index(ranks.rank),
                tuple(fragments),
                (*cuts, total),
            )
        )
    return sets


def _bit_sum(values: torch.Tensor) -> int:
    """Sum of the bit patterns, as integers modulo 2**63: equal for equal values, NaN included."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = values if not values.is_complex() else torch.view_as_real(values).view(-1)
    bits = bits.view(width[bits.element_size()])
    # In parts: `sum` to a wider dtype casts all of its input first on the CPU.
    total = sum(int(part.sum(dtype=torch.int64)) for part in bits.split(1 << 22))
    return int(total) % (1 << 62)
