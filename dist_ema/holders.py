"""Which ranks hold the same fragments, found out without a list of all that all ranks hold.

[Note: finding replicas]
Placements do not show every replica (a weight that tensor parallelism leaves alone is replicated
over the TP axis, and says nothing of it), so ranks compare what they hold. Each fragment's digest
goes to one home rank, chosen by the digest, which answers with the list of holders, as stretches of
equal steps. A rank sends and receives 24 bytes a fragment and about as many for the answer, and 24
for each rank: 0.13 MB both ways for 70 billion parameters in 723 tensors on 1,024 ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from dist_ema.layout import Place
from dist_ema.ranks import Ranks, digest

Holders = tuple[int, ...]


def find_holders(places: Sequence[Place], averaged: Sequence[bool], ranks: Ranks) -> list[Holders]:
    """The ranks that hold each of this rank's places, itself included, in rising order.

    Collective: every rank calls it. Two all-to-alls of about 24 bytes a place each.

    Args:
        averaged: whether this rank wants the weight of each place averaged.

    Raises:
        ValueError: some holders want a weight averaged and some do not. On every rank.
    """
    if ranks.size == 1:
        return [(0,)] * len(places)
    asked, rows = questions(places, averaged, ranks.size)
    told = ranks.exchange(answers(ranks.exchange(rows)))
    holders: list[Holders] = [()] * len(places)
    known: dict[Holders, Holders] = {}  # one copy of each list: it is as long as the ranks are many
    for ats, row in zip(asked, told, strict=True):
        for at, found in zip(ats, _read_answer(row.tolist(), len(ats)), strict=True):
            holders[at] = known.setdefault(found, found)
    with ranks.together():
        unequal = [p.fqn for p, found in zip(places, holders, strict=True) if not found]
        if unequal:
            raise ValueError(
                f"averaged on some ranks and not on others: {', '.join(dict.fromkeys(unequal))}; "
                "requires_grad and params= must choose the same weights on every rank"
            )
    return holders


def questions(
    places: Sequence[Place], averaged: Sequence[bool], num_ranks: int
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """For each rank the numbers of the places that it is asked about, and what it is sent. Local.

    Three words a place: a digest of 128 bits, whose home the rank is, and whether it is averaged.
    """
    keys = [digest(p.fqn, p.shape, p.box.offsets, p.box.sizes, p.order) for p in places]
    asked: list[list[int]] = [[] for _ in range(num_ranks)]
    for at, (low, _high) in enumerate(keys):
        asked[low % num_ranks].append(at)
    words = [[word for at in ats for word in (*keys[at], int(averaged[at]))] for ats in asked]
    return asked, [torch.tensor(row, dtype=torch.int64) for row in words]


def answers(received: Sequence[torch.Tensor], only: int | None = None) -> list[torch.Tensor]:
    """What a home rank answers each rank, or one of them, to what all of them sent. Local."""
    asked = [_triples(row.tolist()) for row in received]
    holders_of: dict[tuple[int, int], list[int]] = {}
    wanted: dict[tuple[int, int], set[int]] = {}
    for rank, triples in enumerate(asked):
        for low, high, flag in triples:
            holders_of.setdefault((low, high), []).append(rank)
            wanted.setdefault((low, high), set()).add(flag)
    runs_of = {
        # An empty list says that the holders want different things.
        key: _as_runs(holders) if len(wanted[key]) == 1 else ()
        for key, holders in holders_of.items()
    }
    return [
        _answer([runs_of[low, high] for low, high, _ in triples])
        for triples in (asked if only is None else [asked[only]])
    ]


def _triples(words: list[int]) -> list[tuple[int, int, int]]:
    return list(zip(words[::3], words[1::3], words[2::3], strict=True))


def _as_runs(numbers: Sequence[int]) -> tuple[range, ...]:
    """Rising numbers in few stretches of equal steps: replicas lie evenly on a mesh.

    Written out, the holders of one buffer of a model on 1,024 ranks would cost its home 8 MB.
    """
    runs: list[range] = []
    at = 0
    while at < len(numbers):
        step = max(1, numbers[at + 1] - numbers[at]) if at + 1 < len(numbers) else 1
        stop = at + 1
        while stop < len(numbers) and numbers[stop] - numbers[stop - 1] == step:
            stop += 1
        runs.append(range(numbers[at], numbers[stop - 1] + 1, step))
        at = stop
    return tuple(runs)


def _answer(lists: list[tuple[range, ...]]) -> torch.Tensor:
    """Each distinct list of runs once, then the number of the list of each question."""
    distinct: dict[tuple[range, ...], int] = {}
    numbers = [distinct.setdefault(runs, len(distinct)) for runs in lists]
    words = [len(distinct)]
    for runs in distinct:
        words += [len(runs), *(word for r in runs for word in (r.start, r.stop, r.step))]
    return torch.tensor(words + numbers, dtype=torch.int64)


def _read_answer(words: list[int], num_questions: int) -> list[Holders]:
    at, distinct = 1, []
    for _ in range(words[0]):
        stop = at + 1 + 3 * words[at]
        runs = itertools.starmap(range, _triples(words[at + 1 : stop]))
        distinct.append(tuple(itertools.chain.from_iterable(runs)))
        at = stop
    return [distinct[number] for number in words[at : at + num_questions]]
