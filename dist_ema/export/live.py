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

from dist_ema.checkpoint.directory import becomes_visible
from dist_ema.core.gather import Gatherer
from dist_ema.core.group import Group
from dist_ema.core.layout import TensorMeta
from dist_ema.export.card import Card
from dist_ema.export.replace import replaced_files
from dist_ema.export.writing import (
    Draft,
    Writing,
    draft,
    is_scattered,
    refuse_broken,
    stale_files,
)

METHODS = ("auto", "direct", "rank0")


def export(
    path: Path,
    card: Callable[[], Card],
    gatherer: Gatherer,
    values: Sequence[torch.Tensor],
    group: Group,
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
        e.fqn: TensorMeta(e.fqn, e.aliases, e.shape, e.dtype_as(dtype), e.averaged)
        for e in gatherer.tensors
    }
    plan: Draft | None = None
    with group.together():
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, wanted one of {', '.join(METHODS)}")
        if group.rank == 0:
            plan = draft(
                list(outputs.values()),
                card(),
                max_shard_size=max_shard_size,
                weights_name=weights_name,
            )
            stale_files(path, plan)  # raises early
    plan = group.broadcast(plan)
    assert plan is not None
    gatherer.refuse_unreadable(frozenset(plan.where))
    with ExitStack() as on_rank_0:
        directory = path
        with group.together():
            if group.rank == 0:
                directory = on_rank_0.enter_context(
                    replaced_files(path, lambda: stale_files(path, plan))
                )
        writing = Writing(Path(group.broadcast(str(directory))), plan)
        with closing(writing):
            with group.together():
                if group.rank == 0:
                    writing.begin()
            if _is_direct(method, writing, group):
                _write_own(plan, writing, gatherer, values, outputs, dtype, group)
            else:
                _write_bands(
                    writing, gatherer, values, outputs, dtype, group, frozenset(plan.where)
                )
            _refuse_broken(writing, group)
            with group.together():
                writing.sync()
        with group.together():
            on_rank_0.close()


def _is_direct(method: str, writing: Writing, group: Group) -> bool:
    """Whether every rank writes. Collective: every rank calls it."""
    if method == "rank0":
        return False
    if method == "auto" and not group.equal(socket.gethostname()):
        return False
    if method == "auto":
        return not group.any(not writing.is_seen())
    seen = group.all_gather(becomes_visible(writing.is_seen))
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
    outputs: dict[str, TensorMeta],
    dtype: torch.dtype | None,
    group: Group,
) -> None:
    scattered = gatherer.names_where(
        lambda entry, meta: is_scattered(meta, entry.dtype_as(dtype).itemsize)
    ) & set(plan.where)
    with group.together():
        for fqn, pieces in gatherer.own.items():
            if fqn in plan.where and fqn not in scattered:
                for owned in pieces:
                    writing.run(outputs[fqn], owned.meta, values[owned.index])
    if scattered:
        _write_bands(writing, gatherer, values, outputs, dtype, group, scattered, spread=True)


def _write_bands(
    writing: Writing,
    gatherer: Gatherer,
    values: Sequence[torch.Tensor],
    outputs: dict[str, TensorMeta],
    dtype: torch.dtype | None,
    group: Group,
    fqns: frozenset[str],
    *,
    spread: bool = False,
) -> None:
    bands = gatherer.chunks(values, dtype, only=fqns, spread=spread)
    with group.together(), closing(bands):
        for bucket in bands:
            for band in bucket:
                writing.band(outputs[band.tensor.fqn], band.start, band.values)


def _refuse_broken(writing: Writing, group: Group) -> None:
    if group.any(bool(writing.broken)):
        refuse_broken(sorted(set().union(*group.all_gather(writing.broken))))
