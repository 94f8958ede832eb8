"""Which ranks hold the same fragments.

[Note: finding replicas]
Placements do not show every replica (a weight that tensor parallelism leaves alone is replicated
over the TP axis and does not say so), so ranks compare what they hold: one all-gather of 8 bytes a
fragment. For 70 billion parameters in 723 tensors on 1,024 ranks, a rank sends 6 kB and receives
6 MB, once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_ema.core.group import Group, digest
from dist_ema.core.layout import FragmentMeta

Holders = tuple[int, ...]


def find_holders(
    metas: Sequence[FragmentMeta], averaged: Sequence[bool], group: Group
) -> list[Holders]:
    """The ranks that hold each of this rank's places, itself included, in ascending order.

    Collective: every rank calls it. One all-gather of 8 bytes a place.

    Args:
        averaged: whether this rank wants the weight of each place averaged.

    Raises:
        ValueError: some holders want a weight averaged and some do not. On every rank.
    """
    if group.size == 1:
        return [(0,)] * len(metas)
    own = labels_of(metas, averaged)
    rows = group.all_gather_integers(own)
    order = np.argsort(own >> 1)
    keys = own[order] >> 1
    holders: list[list[int]] = [[] for _ in metas]
    unequal = set()
    for rank, row in enumerate(rows if len(own) else []):
        at = np.minimum(np.searchsorted(keys, row >> 1), len(keys) - 1)
        hits = np.flatnonzero(keys[at] == row >> 1)
        for number, label in zip(order[at[hits]].tolist(), row[hits].tolist(), strict=True):
            holders[number].append(rank)
            if label != own[number]:
                unequal.add(metas[number].fqn)
    with group.together():
        if unequal:
            raise ValueError(
                f"averaged on some ranks and not on others: {', '.join(sorted(unequal))}; "
                "requires_grad and params= must choose the same weights on every rank"
            )
    known: dict[Holders, Holders] = {}  # one object for each list: it may be as long as the world
    return [known.setdefault(found, found) for found in map(tuple, holders)]


def labels_of(metas: Sequence[FragmentMeta], averaged: Sequence[bool]) -> np.ndarray:
    """63 bits of a digest of each place, then one bit that says whether it is averaged. int64."""
    digests = [digest(p.fqn, p.shape, p.box.offsets, p.box.sizes, p.order)[0] for p in metas]
    labels = [value & ~1 | int(flag) for value, flag in zip(digests, averaged, strict=True)]
    return np.array(labels, dtype=np.int64)
