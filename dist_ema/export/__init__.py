"""Consolidated safetensors checkpoints in the layout of the model's library.

This file exports from the ranks that hold an average, `offline` from a checkpoint.

[Note: export methods]
"direct": each rank writes the fragments that it owns to their places in the final files; nothing is
sent. A fragment whose elements are not contiguous in the file (columns of a matrix) would need many
short writes, which cost more than communication: such tensors are gathered chunk by chunk, and the
ranks take turns as the receiver. "rank0": all chunks are gathered on rank 0, the only rank that
must see the directory. Both methods write the same bytes.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dist_ema.checkpoint.directory import becomes_visible
from dist_ema.core.gather import Gatherer
from dist_ema.core.group import Group
from dist_ema.export.files import ExportPlan, Writer, plan_exports, write_export
from dist_ema.export.layouts import model_layouts

METHODS = ("auto", "direct", "rank0")


def export(
    path: Path,
    model: nn.Module,
    gatherer: Gatherer,
    values: Sequence[torch.Tensor],
    group: Group,
    *,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    weights_name: str | None,
    method: str,
) -> None:
    """Write a consolidated checkpoint; see `ShardedEMA.export`. Collective: every rank calls it.

    Args:
        values: a tensor for each fragment that the gatherer knows.
    """
    plans: dict[str, ExportPlan] = {}
    with group.together():
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, wanted one of {', '.join(METHODS)}")
    layouts = model_layouts(model, group)
    with group.together():
        if group.rank == 0:
            tensors = [replace(t, dtype=t.dtype_as(dtype)) for t in gatherer.tensors]
            plans = plan_exports(tensors, layouts, max_shard_size, weights_name)
    plans = group.broadcast(plans)
    gatherer.refuse_unreadable(frozenset(fqn for plan in plans.values() for fqn in plan.places))

    def write_values(writer: Writer) -> None:
        gathered = frozenset(writer.plan.places)
        is_direct = _is_direct(method, writer, group)
        if is_direct:
            gathered &= gatherer.scattered()
        with group.together():
            for fqn in writer.plan.places:  # in the order of the files
                for fragment in () if fqn in gathered else gatherer.own.get(fqn, ()):
                    writer.write_chunk(fqn, fragment.first, values[fragment.index])
        if gathered:
            chunks = gatherer.chunks(values, dtype, only=gathered, spread=is_direct)
            with group.together(), closing(chunks):
                for bucket in chunks:
                    for chunk in bucket:
                        writer.write_chunk(chunk.tensor.fqn, chunk.start, chunk.values)

    write_export(path, plans, group, write_values)


def _is_direct(method: str, writer: Writer, group: Group) -> bool:
    """Whether every rank writes. Collective: every rank calls it."""
    if method == "rank0" or (method == "auto" and not group.equal(socket.gethostname())):
        return False
    sees = writer.sees_files() if method == "auto" else becomes_visible(writer.sees_files)
    blind = [str(rank) for rank, sees in enumerate(group.all_gather(sees)) if not sees]
    if blind and method == "direct":
        raise RuntimeError(
            f"{writer.directory}: rank 0 made it, and these ranks do not see it: "
            f"{', '.join(blind)}; export to a file system that all ranks share, or with "
            "method='rank0'"
        )
    return not blind
