"""An export from the ranks that hold the average.

[Note: who writes]
"direct": each rank writes what it owns to where it belongs in the final files, from where it lives;
nothing is sent. Where a piece would fall into many short writes (columns of a wide matrix), its
tensor is put together band by band instead, each band on one rank in turn. "rank0": all bands are
put together on rank 0, which alone needs to see the directory. The files are the same bytes.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from dist_ema.export.card import Card
from dist_ema.export.replace import replaced_files
from dist_ema.export.writing import (
    Draft,
    Output,
    Writing,
    draft,
    is_scattered,
    refuse_broken,
    stale_files,
)
from dist_ema.files import becomes_visible
from dist_ema.gather import Entry, Gatherer
from dist_ema.ranks import Ranks

METHODS = ("auto", "direct", "rank0")


def export(
    path: Path,
    card: Callable[[], Card],
    gatherer: Gatherer,
    values: Sequence[torch.Tensor],
    ranks: Ranks,
    *,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    weights_name: str | None,
    method: str,
) -> None:
    """Write a consolidated checkpoint. Collective: every rank calls it.

    Memory: a chunk of 1 Mi elements on each rank; with "rank0", and for scattered tensors, two
    buckets of 16 MiB.

    Args:
        card: tells the library's layout; called on rank 0.
        values: a tensor for each piece that the gatherer knows.

    Raises:
        ValueError: an averaged tensor holds NaN or Inf, or an argument is out of range. On every
            rank; what is at `path` is left as it was.
        OSError: a rank cannot write. The same.
    """
    outputs = {
        e.fqn: Output(e.fqn, e.aliases, e.shape, e.dtype_as(dtype), e.averaged)
        for e in gatherer.entries
    }
    plan: Draft | None = None
    with ranks.together():
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, wanted one of {', '.join(METHODS)}")
        if ranks.rank == 0:
            plan = draft(
                list(outputs.values()),
                card(),
                max_shard_size=max_shard_size,
                weights_name=weights_name,
            )
            stale_files(path, plan)  # raises early
    plan = ranks.broadcast(plan)
    assert plan is not None
    gatherer.refuse_unreadable(frozenset(plan.where))
    with ExitStack() as on_rank_0:
        directory = path
        with ranks.together():
            if ranks.rank == 0:
                directory = on_rank_0.enter_context(
                    replaced_files(path, lambda: stale_files(path, plan))
                )
        writing = Writing(Path(ranks.broadcast(str(directory))), plan)
        with closing(writing):
            with ranks.together():
                if ranks.rank == 0:
                    writing.begin()
            if _is_direct(method, writing, ranks):
                _write_own(plan, writing, gatherer, values, outputs, dtype, ranks)
            else:
                _write_bands(
                    writing, gatherer, values, outputs, dtype, ranks, frozenset(plan.where)
                )
            _refuse_broken(writing, ranks)
            with ranks.together():
                writing.sync()
        with ranks.together():
            on_rank_0.close()


def _is_direct(method: str, writing: Writing, ranks: Ranks) -> bool:
    """Whether every rank writes. Collective: every rank calls it."""
    if method == "rank0":
        return False
    if method == "auto" and not ranks.equal(socket.gethostname()):
        return False
    if method == "auto":
        return not ranks.any(not writing.is_seen())
    seen = ranks.all_gather(becomes_visible(writing.is_seen))
    if not all(seen):
        unseen = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise RuntimeError(
            f"{writing.directory}: rank 0 made it, and these ranks do not see it: {unseen}; export "
            "to a file system that all ranks share, or with method='rank0'"
        )
    return True


def _write_own(
    plan: Draft,
    writing: Writing,
    gatherer: Gatherer,
    values: Sequence[torch.Tensor],
    outputs: dict[str, Output],
    dtype: torch.dtype | None,
    ranks: Ranks,
) -> None:
    scattered = gatherer.fqns_with(
        lambda entry, place: is_scattered(place, entry.dtype_as(dtype).itemsize)
    ) & set(plan.where)
    with ranks.together():
        for fqn, pieces in gatherer.own.items():
            if fqn in plan.where and fqn not in scattered:
                for owned in pieces:
                    writing.run(outputs[fqn], owned.place, values[owned.piece])
    if scattered:
        _write_bands(writing, gatherer, values, outputs, dtype, ranks, scattered, spread=True)


def _write_bands(
    writing: Writing,
    gatherer: Gatherer,
    values: Sequence[torch.Tensor],
    outputs: dict[str, Output],
    dtype: torch.dtype | None,
    ranks: Ranks,
    fqns: frozenset[str],
    *,
    spread: bool = False,
) -> None:
    def room(entry: Entry, start: int, stop: int) -> torch.Tensor:
        return torch.empty(stop - start, dtype=entry.dtype_as(dtype))

    bands = gatherer.bands(values, dtype, room, only=fqns, spread=spread)
    with ranks.together(), closing(bands):
        for bucket in bands:
            for band in bucket:
                writing.band(outputs[band.entry.fqn], band.start, band.values)


def _refuse_broken(writing: Writing, ranks: Ranks) -> None:
    if ranks.any(bool(writing.broken)):
        refuse_broken(sorted(set().union(*ranks.all_gather(writing.broken))))
